//! Changes an image's bytes directly, and finds the tables to change.
//!
//! Offsets are those of the qcow2 specification; all numbers are big-endian.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

pub mod header {
    pub const MAGIC: u64 = 0;
    pub const VERSION: u64 = 4;
    pub const BACKING_OFFSET: u64 = 8;
    pub const BACKING_LEN: u64 = 16;
    pub const CLUSTER_BITS: u64 = 20;
    pub const SIZE: u64 = 24;
    pub const CRYPT_METHOD: u64 = 32;
    pub const L1_ENTRY_COUNT: u64 = 36;
    pub const L1_OFFSET: u64 = 40;
    pub const REFCOUNT_TABLE_OFFSET: u64 = 48;
    pub const REFCOUNT_TABLE_CLUSTERS: u64 = 56;
    pub const SNAPSHOT_COUNT: u64 = 60;
    pub const SNAPSHOTS_OFFSET: u64 = 64;
    pub const INCOMPATIBLE: u64 = 72;
    pub const COMPATIBLE: u64 = 80;
    pub const AUTOCLEAR: u64 = 88;
    pub const REFCOUNT_ORDER: u64 = 96;
    pub const HEADER_LEN: u64 = 100;
    pub const COMPRESSION_TYPE: u64 = 104;
    pub const V3_LEN: u64 = 112;
}

/// The bits of an L1 or L2 entry that are an offset.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

pub struct Damage(File);

impl Damage {
    pub fn to(path: impl AsRef<Path>) -> Self {
        let path = path.as_ref();
        let file = OpenOptions::new().read(true).write(true).open(path);
        Self(file.unwrap_or_else(|e| panic!("{}: {e}", path.display())))
    }

    pub fn bytes(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.0.read_exact_at(&mut bytes, at).expect("bytes of an image");
        bytes
    }

    pub fn u32(&self, at: u64) -> u32 {
        u32::from_be_bytes(self.bytes(at, 4).try_into().expect("four bytes"))
    }

    pub fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes(at, 8).try_into().expect("eight bytes"))
    }

    pub fn put(&self, at: u64, bytes: &[u8]) {
        self.0.write_all_at(bytes, at).expect("room for damage");
    }

    pub fn put_u32(&self, at: u64, value: u32) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn put_u64(&self, at: u64, value: u64) {
        self.put(at, &value.to_be_bytes());
    }

    pub fn len(&self) -> u64 {
        self.0.metadata().expect("an image's metadata").len()
    }

    pub fn set_len(&self, len: u64) {
        self.0.set_len(len).expect("another length");
    }

    /// Replaces all header extensions. They must not reach the backing file's name, which stays.
    pub fn set_extensions(&self, extensions: &[(u32, &[u8])]) {
        let mut at = u64::from(self.u32(header::HEADER_LEN));
        let limit = match self.u64(header::BACKING_OFFSET) {
            0 => self.cluster_size(),
            name => name,
        };
        for (magic, bytes) in extensions {
            self.put_u32(at, *magic);
            self.put_u32(at + 4, bytes.len() as u32);
            self.put(at + 8, bytes);
            at += 8 + (bytes.len() as u64).next_multiple_of(8);
        }
        assert!(at + 8 <= limit, "extensions reach the backing file's name");
        self.put_u64(at, 0);
    }

    /// Puts bytes at the next cluster boundary past the end; returns where.
    pub fn append(&self, bytes: &[u8]) -> u64 {
        let at = self.len().next_multiple_of(self.cluster_size());
        self.put(at, bytes);
        self.set_len((at + bytes.len() as u64).next_multiple_of(self.cluster_size()));
        at
    }

    pub fn cluster_size(&self) -> u64 {
        1 << self.u32(header::CLUSTER_BITS)
    }

    pub fn l1_at(&self) -> u64 {
        self.u64(header::L1_OFFSET)
    }

    /// The disk's size when this internal snapshot was taken.
    pub fn snapshot_disk_size(&self, id: &str) -> u64 {
        let mut at = self.u64(header::SNAPSHOTS_OFFSET);
        loop {
            let lengths = self.bytes(at + 12, 4);
            let [id_len, name_len] =
                [0, 2].map(|n| u64::from(u16::from_be_bytes([lengths[n], lengths[n + 1]])));
            let extra_len = u64::from(self.u32(at + 36));
            if self.bytes(at + 40 + extra_len, id_len as usize) == id.as_bytes() {
                return if extra_len >= 16 { self.u64(at + 48) } else { self.u64(header::SIZE) };
            }
            at += (40 + extra_len + id_len + name_len).next_multiple_of(8);
        }
    }

    /// The file offset of a guest offset's L2 entry. Standard entries only.
    pub fn l2_entry_at(&self, guest: u64) -> u64 {
        let entry_count = self.cluster_size() / 8;
        let cluster = guest / self.cluster_size();
        let table = self.u64(self.l1_at() + cluster / entry_count * 8) & OFFSET_MASK;
        assert!(table != 0, "no L2 table for {guest}");
        table + cluster % entry_count * 8
    }

    /// The file offset of a guest offset's cluster.
    pub fn host_offset(&self, guest: u64) -> u64 {
        self.u64(self.l2_entry_at(guest)) & OFFSET_MASK
    }
}
