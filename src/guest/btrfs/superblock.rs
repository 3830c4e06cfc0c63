//! The superblock: where the trees are, and what a reader has to know.
//!
//! A [`Superblock`] that exists has a right checksum, sizes that are safe to compute with, and only features
//! that this reader knows.

use crate::error::Result;
use crate::guest::bytes::{array, le16, le32, le64, slice};
use crate::guest::source::Source;

use super::checksum::Checksum;
use super::format::{corrupt, is_fact, unsupported};
use super::node::NodePointer;

/// Where the copies are.
pub(super) const COPIES: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
pub(super) const LEN: usize = 4096;
const MAGIC: &[u8] = b"_BHRfS_M";
const CHUNK_ARRAY_AT: usize = 0x32b;
const CHUNK_ARRAY_LEN: usize = 2048;
const DEV_ITEM_AT: usize = 0xc9;

/// Features that change how a file system is read (`incompat_flags`).
pub(super) mod incompat {
    pub(in super::super) const NO_HOLES: u64 = 1 << 9;
    pub(in super::super) const METADATA_UUID: u64 = 1 << 10;
    const ZONED: u64 = 1 << 12;
    const EXTENT_TREE_V2: u64 = 1 << 13;
    const RAID_STRIPE_TREE: u64 = 1 << 14;
    const SIMPLE_QUOTA: u64 = 1 << 16;
    /// All others up to 1 << 11, which are either old or change nothing for a reader.
    pub(super) const KNOWN: u64 = 0xfff | SIMPLE_QUOTA;
    pub(super) const NAMED: [(u64, &str); 3] = [
        (ZONED, "zoned devices"),
        (EXTENT_TREE_V2, "the second version of the extent tree"),
        (RAID_STRIPE_TREE, "a RAID stripe tree"),
    ];
}

/// Features of the free space that a reader need not know, except for counting it (`compat_ro_flags`).
pub(super) mod compat_ro {
    pub(in super::super) const FREE_SPACE_TREE: u64 = 1 << 0;
    pub(in super::super) const BLOCK_GROUP_TREE: u64 = 1 << 3;
}

/// The device that holds a superblock (`dev_item`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DeviceItem {
    pub(super) id: u64,
    pub(super) total_bytes: u64,
    pub(super) bytes_used: u64,
    pub(super) uuid: [u8; 16],
}

/// The number and the UUID of a device.
pub(super) type DeviceId = (u64, [u8; 16]);

impl DeviceItem {
    pub(super) const LEN: usize = 98;

    pub(super) fn identity(&self) -> DeviceId {
        (self.id, self.uuid)
    }

    pub(super) fn parse(item: &[u8]) -> Self {
        Self {
            id: le64(item, 0),
            total_bytes: le64(item, 8),
            bytes_used: le64(item, 16),
            uuid: array(item, 66),
        }
    }
}

/// A superblock.
#[derive(Clone, Debug)]
pub(super) struct Superblock {
    /// The identity of the file system.
    pub(super) fsid: [u8; 16],
    /// The identity in its nodes: not that of the file system if this was changed.
    pub(super) node_fsid: [u8; 16],
    pub(super) generation: u64,
    pub(super) root: NodePointer,
    pub(super) chunk_root: NodePointer,
    /// The root of the log trees; `None` if nothing was synced since the last commit.
    pub(super) log_root: Option<NodePointer>,
    pub(super) total_bytes: u64,
    pub(super) bytes_used: u64,
    pub(super) root_directory: u64,
    pub(super) device_count: u64,
    /// A power of two from 512 to 64 KiB.
    pub(super) sector_len: u32,
    /// A power of two from `sector_len` to 64 KiB.
    pub(super) node_len: u32,
    pub(super) incompat: u64,
    pub(super) compat_ro: u64,
    pub(super) checksum: Checksum,
    pub(super) device: DeviceItem,
    /// The chunks that hold the chunk tree: pairs of key and item.
    pub(super) chunk_array: Vec<u8>,
}

impl Superblock {
    /// Decodes and verifies the copy that belongs at `at`.
    pub(super) fn parse(raw: &[u8], at: u64) -> Result<Self> {
        if slice(raw, 0x40, MAGIC.len()) != MAGIC {
            return Err(corrupt("there is no btrfs superblock"));
        }
        let checksum = Checksum::parse(le16(raw, 0xc4))?;
        if raw.len() != LEN || !checksum.fits_block(raw) {
            return Err(corrupt("the superblock's checksum is wrong"));
        }
        if le64(raw, 0x30) != at {
            return Err(corrupt(format!("the superblock at {at:#x} belongs at {:#x}", le64(raw, 0x30))));
        }
        let incompat = le64(raw, 0xbc);
        if let Some((_, name)) = incompat::NAMED.iter().find(|(flag, _)| incompat & flag != 0) {
            return Err(unsupported(format!("it has {name}")));
        }
        let unknown = incompat & !incompat::KNOWN;
        if unknown != 0 {
            return Err(unsupported(format!("it has unknown features ({unknown:#x})")));
        }
        let (sector_len, node_len) = (le32(raw, 0x90), le32(raw, 0x94));
        let is_size = |len: u32| len.is_power_of_two() && (512..=64 << 10).contains(&len);
        if !is_size(sector_len) || !is_size(node_len) || node_len < sector_len {
            return Err(corrupt(format!("impossible sizes: sectors of {sector_len}, nodes of {node_len}")));
        }
        let array_len = le32(raw, 0xa0) as usize;
        if array_len > CHUNK_ARRAY_LEN {
            return Err(corrupt(format!("impossible size of the chunk array: {array_len}")));
        }
        let generation = le64(raw, 0x48);
        let has_metadata_uuid = incompat & incompat::METADATA_UUID != 0;
        let log_root =
            NodePointer { at: le64(raw, 0x60), level: raw[0xc8], generation: generation.saturating_add(1) };
        Ok(Self {
            fsid: array(raw, 0x20),
            node_fsid: array(raw, if has_metadata_uuid { 0x23b } else { 0x20 }),
            generation,
            root: NodePointer { at: le64(raw, 0x50), level: raw[0xc6], generation },
            chunk_root: NodePointer { at: le64(raw, 0x58), level: raw[0xc7], generation: le64(raw, 0xa4) },
            log_root: (log_root.at != 0).then_some(log_root),
            total_bytes: le64(raw, 0x70),
            bytes_used: le64(raw, 0x78),
            root_directory: le64(raw, 0x80),
            device_count: le64(raw, 0x88),
            sector_len,
            node_len,
            incompat,
            compat_ro: le64(raw, 0xb4),
            checksum,
            device: DeviceItem::parse(slice(raw, DEV_ITEM_AT, DeviceItem::LEN)),
            chunk_array: slice(raw, CHUNK_ARRAY_AT, array_len).to_vec(),
        })
    }

    pub(super) fn has(&self, feature: u64) -> bool {
        self.incompat & feature != 0
    }

    /// Rounds up to whole sectors; saturates.
    pub(super) fn whole_sectors(&self, len: u64) -> u64 {
        let sector = u64::from(self.sector_len);
        len.checked_next_multiple_of(sector).unwrap_or(!(sector - 1))
    }
}

/// The superblock of a device: the first one if it is valid, as the kernel does, else the newest valid copy.
/// The number is that of the copy.
pub(super) fn find(source: &dyn Source) -> Result<(Superblock, usize)> {
    let primary = read(source, COPIES[0]);
    match &primary {
        // An unknown feature is unknown in a copy, too; what failed for the moment must not become a copy.
        Ok(_) => return primary.map(|found| (found, 0)),
        Err(error) if !is_fact(error) || error.kind() == crate::error::ErrorKind::Unsupported => {
            return primary.map(|found| (found, 0));
        }
        Err(_) => {}
    }
    let mut newest: Option<(Superblock, usize)> = None;
    for (number, at) in COPIES.into_iter().enumerate().skip(1) {
        match read(source, at) {
            Ok(found) if newest.as_ref().is_none_or(|(other, _)| other.generation < found.generation) => {
                newest = Some((found, number));
            }
            Err(error) if !is_fact(&error) => return Err(error),
            _ => {}
        }
    }
    match newest {
        Some(found) => Ok(found),
        None => primary.map(|found| (found, 0)),
    }
}

fn read(source: &dyn Source, at: u64) -> Result<Superblock> {
    if source.size() < at + LEN as u64 {
        return Err(corrupt("there is no btrfs superblock"));
    }
    let mut raw = vec![0; LEN];
    source.read_at(at, &mut raw)?;
    Superblock::parse(&raw, at)
}
