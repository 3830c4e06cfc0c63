//! The superblock: the file system's parameters, validated once.
//!
//! A [`Superblock`] that exists is safe to compute with: block and inode sizes are powers of two within their
//! limits, no divisor is zero. Whether its references lie on the disk is checked when they are read.

use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::{corrupt, le16, le32, unsupported};

use super::bytes::join;
use super::checksum::crc32c;

/// Where the first superblock is, and how long each is.
pub(super) const SUPERBLOCK_AT: u64 = 1024;
pub(super) const SUPERBLOCK_LEN: usize = 1024;

const MAGIC: u16 = 0xef53;

/// Features without which the file system cannot be read.
pub(super) mod incompat {
    pub(in super::super) const COMPRESSION: u32 = 0x1;
    pub(in super::super) const FILETYPE: u32 = 0x2;
    pub(in super::super) const RECOVER: u32 = 0x4;
    pub(in super::super) const JOURNAL_DEV: u32 = 0x8;
    pub(in super::super) const META_BG: u32 = 0x10;
    pub(in super::super) const EXTENTS: u32 = 0x40;
    pub(in super::super) const SIXTY_FOUR: u32 = 0x80;
    pub(in super::super) const EA_INODE: u32 = 0x400;
    pub(in super::super) const CSUM_SEED: u32 = 0x2000;
    pub(in super::super) const LARGE_DIR: u32 = 0x4000;
}

const COMPAT_JOURNAL: u32 = 0x4;
const COMPAT_DIR_INDEX: u32 = 0x20;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const RO_COMPAT_SPARSE_SUPER: u32 = 0x1;
const RO_COMPAT_HUGE_FILE: u32 = 0x8;
const RO_COMPAT_GDT_CSUM: u32 = 0x10;
const RO_COMPAT_METADATA_CSUM: u32 = 0x400;
const FLAG_UNSIGNED_HASH: u32 = 0x2;

/// The supported incompatible features: all but compression, which no kernel ever had.
const KNOWN: u32 = 0x3_f7d6;

/// The content of a superblock at the start of a disk, without a full validation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SuperblockProbe {
    /// `ext2`, `ext3` or `ext4`, by the features in use.
    pub version: &'static str,
    /// The label without padding; any bytes.
    pub label: Vec<u8>,
    /// The identity.
    pub uuid: [u8; 16],
}

/// Detects an ext2, ext3 or ext4 file system in the first bytes of a disk, at least 2,048; `None` if there is
/// none.
pub fn probe(first: &[u8]) -> Option<SuperblockProbe> {
    let raw = first.get(SUPERBLOCK_AT as usize..)?.get(..SUPERBLOCK_LEN)?;
    if !is_superblock(raw) || le32(raw, 0x60) & incompat::JOURNAL_DEV != 0 {
        return None;
    }
    let label = &raw[0x78..0x88];
    let end = label.iter().position(|byte| *byte == 0).unwrap_or(label.len());
    let uuid = raw[0x68..0x78].try_into().expect("16 bytes");
    Some(SuperblockProbe { version: version(raw), label: label[..end].to_vec(), uuid })
}

/// Magic and sizes that no other format has at these offsets by chance.
fn is_superblock(raw: &[u8]) -> bool {
    le16(raw, 0x38) == MAGIC && le32(raw, 0x18) <= 6 && le32(raw, 0x20) != 0 && le32(raw, 0x28) != 0
}

/// The oldest driver that could mount it for writing.
fn version(raw: &[u8]) -> &'static str {
    let (compat, incompat, ro_compat) = (le32(raw, 0x5c), le32(raw, 0x60), le32(raw, 0x64));
    let old = incompat::FILETYPE | incompat::META_BG | incompat::RECOVER | incompat::JOURNAL_DEV;
    if incompat & !old != 0 || ro_compat & !0x7 != 0 {
        "ext4"
    } else if compat & COMPAT_JOURNAL != 0 {
        "ext3"
    } else {
        "ext2"
    }
}

/// Where the journal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JournalPlace {
    None,
    Inode(u32),
    OtherDevice,
}

/// How metadata is protected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksums {
    None,
    /// Group descriptors only.
    Descriptors,
    /// All metadata, with this initial state.
    All(u32),
}

#[derive(Clone, Debug)]
pub(super) struct Superblock {
    pub(super) uuid: [u8; 16],
    /// 10 to 16.
    pub(super) block_bits: u32,
    pub(super) block_count: u64,
    pub(super) reserved_blocks: u64,
    pub(super) free_blocks: u64,
    pub(super) free_inodes: u32,
    pub(super) overhead_clusters: u32,
    /// Blocks of a cluster, as a power of two; at most 20.
    pub(super) cluster_bits: u32,
    pub(super) first_data_block: u32,
    pub(super) blocks_per_group: u32,
    pub(super) inodes_per_group: u32,
    pub(super) inode_count: u32,
    /// A power of two, 128 up to the size of a block.
    pub(super) inode_len: usize,
    /// A power of two, 32 to 1,024.
    pub(super) descriptor_len: usize,
    pub(super) first_meta_group: u32,
    pub(super) incompat: u32,
    ro_compat: u32,
    compat: u32,
    backup_groups: [u32; 2],
    pub(super) checksums: Checksums,
    pub(super) journal: JournalPlace,
    pub(super) hash_seed: [u32; 4],
    pub(super) unsigned_hash: bool,
    /// The hash version of directories that do not state one.
    pub(super) hash_version: u8,
    /// The group of this copy of the superblock.
    pub(super) group: u16,
    /// Whether its own checksum is correct, or it has none.
    pub(super) sound: bool,
}

impl Superblock {
    /// Decodes and validates. A wrong checksum is only recorded: the caller may have other copies.
    pub(super) fn parse(raw: &[u8]) -> Result<Self> {
        assert_eq!(raw.len(), SUPERBLOCK_LEN);
        if le16(raw, 0x38) != MAGIC {
            return Err(corrupt("there is no ext2, ext3 or ext4 superblock"));
        }
        let incompat = le32(raw, 0x60);
        let ro_compat = le32(raw, 0x64);
        let sound = ro_compat & RO_COMPAT_METADATA_CSUM == 0 || crc32c(!0, &raw[..0x3fc]) == le32(raw, 0x3fc);
        if let Err(error) = refuse_unknown(incompat, version(raw)) {
            // An unknown feature may be a symptom of damage.
            return Err(if sound { error } else { corrupt(format!("the superblock is damaged ({error})")) });
        }
        let wrong = |what: &str, found: u64| {
            corrupt(format!("the superblock's {what} is {found}, which is impossible"))
        };
        let (log_block, log_cluster) = (le32(raw, 0x18), le32(raw, 0x1c));
        if log_block > 6 {
            return Err(wrong("block size exponent", log_block.into()));
        }
        let clustered = ro_compat & 0x200 != 0;
        let cluster_bits = if clustered { log_cluster.checked_sub(log_block) } else { Some(0) };
        let cluster_bits = cluster_bits
            .filter(|bits| *bits <= 20)
            .ok_or_else(|| wrong("cluster size", log_cluster.into()))?;
        let block_bits = 10 + log_block;
        let dynamic = le32(raw, 0x4c) != 0;
        let inode_len = if dynamic { usize::from(le16(raw, 0x58)) } else { 128 };
        if !inode_len.is_power_of_two() || !(128..=1 << block_bits).contains(&inode_len) {
            return Err(wrong("inode size", inode_len as u64));
        }
        let wide = incompat & incompat::SIXTY_FOUR != 0;
        let descriptor_len = if wide { usize::from(le16(raw, 0xfe)) } else { 32 };
        if !descriptor_len.is_power_of_two() || !(32..=1024).contains(&descriptor_len) {
            return Err(wrong("group descriptor size", descriptor_len as u64));
        }
        let high = |at: usize| if wide { le32(raw, at) } else { 0 };
        let block_count = join(le32(raw, 0x4), high(0x150));
        let first_data_block = le32(raw, 0x14);
        if block_count <= u64::from(first_data_block) || block_count > u64::MAX >> block_bits {
            return Err(wrong("number of blocks", block_count));
        }
        let (blocks_per_group, inodes_per_group) = (le32(raw, 0x20), le32(raw, 0x28));
        if blocks_per_group == 0 || inodes_per_group == 0 {
            return Err(corrupt("the superblock has groups without blocks or inodes"));
        }
        let uuid: [u8; 16] = raw[0x68..0x78].try_into().expect("16 bytes");
        let compat = le32(raw, 0x5c);
        let journal_inode = le32(raw, 0xe0);
        let all = ro_compat & RO_COMPAT_METADATA_CSUM != 0;
        let seed = if incompat & incompat::CSUM_SEED != 0 { le32(raw, 0x270) } else { crc32c(!0, &uuid) };
        Ok(Self {
            uuid,
            block_bits,
            block_count,
            reserved_blocks: join(le32(raw, 0x8), high(0x154)),
            free_blocks: join(le32(raw, 0xc), high(0x158)),
            free_inodes: le32(raw, 0x10),
            overhead_clusters: le32(raw, 0x248),
            cluster_bits,
            first_data_block,
            blocks_per_group,
            inodes_per_group,
            inode_count: le32(raw, 0),
            inode_len,
            descriptor_len,
            first_meta_group: le32(raw, 0x104),
            incompat,
            ro_compat,
            compat,
            backup_groups: [le32(raw, 0x24c), le32(raw, 0x250)],
            checksums: match (all, ro_compat & RO_COMPAT_GDT_CSUM != 0) {
                (true, _) => Checksums::All(seed),
                (false, true) => Checksums::Descriptors,
                (false, false) => Checksums::None,
            },
            journal: match (compat & COMPAT_JOURNAL != 0, journal_inode) {
                (false, _) => JournalPlace::None,
                (true, 0) => JournalPlace::OtherDevice,
                (true, inode) => JournalPlace::Inode(inode),
            },
            hash_seed: [0xec, 0xf0, 0xf4, 0xf8].map(|at| le32(raw, at)),
            unsigned_hash: le32(raw, 0x160) & FLAG_UNSIGNED_HASH != 0,
            hash_version: raw[0xfc],
            group: le16(raw, 0x5a),
            sound,
        })
    }

    /// Bytes of a block.
    pub(super) fn block_len(&self) -> usize {
        1 << self.block_bits
    }

    pub(super) fn group_count(&self) -> u64 {
        (self.block_count - u64::from(self.first_data_block)).div_ceil(self.blocks_per_group.into())
    }

    /// The first block of a group.
    pub(super) fn group_start(&self, group: u64) -> u64 {
        u64::from(self.first_data_block) + group * u64::from(self.blocks_per_group)
    }

    /// Whether the group begins with a copy of the superblock.
    pub(super) fn group_has_copy(&self, group: u64) -> bool {
        if group == 0 {
            return true;
        }
        if self.compat & COMPAT_SPARSE_SUPER2 != 0 {
            return self.backup_groups.iter().any(|backup| u64::from(*backup) == group);
        }
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        self.ro_compat & RO_COMPAT_SPARSE_SUPER == 0 || group == 1 || [3, 5, 7].into_iter().any(power_of)
    }

    pub(super) fn has(&self, feature: u32) -> bool {
        self.incompat & feature != 0
    }

    pub(super) fn huge_files(&self) -> bool {
        self.ro_compat & RO_COMPAT_HUGE_FILE != 0
    }

    pub(super) fn indexed_directories(&self) -> bool {
        self.compat & COMPAT_DIR_INDEX != 0
    }

    /// The initial state of metadata checksums, if there are any.
    pub(super) fn seed(&self) -> Option<u32> {
        match self.checksums {
            Checksums::All(seed) => Some(seed),
            Checksums::None | Checksums::Descriptors => None,
        }
    }
}

fn refuse_unknown(features: u32, version: &str) -> Result<()> {
    if features & incompat::JOURNAL_DEV != 0 {
        return Err(unsupported(
            "this is the external journal of an ext3 or ext4 file system, without files",
        ));
    }
    let unknown = features & !KNOWN;
    if unknown == 0 {
        return Ok(());
    }
    let name =
        |bit| if bit == incompat::COMPRESSION { "compression".to_owned() } else { format!("{bit:#x}") };
    let names: Vec<String> =
        (0..32).map(|bit| unknown & 1 << bit).filter(|bit| *bit != 0).map(name).collect();
    let fact = format!("{version} with features that chainfs does not know: {}", names.join(", "));
    Err(Error::new(ErrorKind::Unsupported, fact))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw() -> Vec<u8> {
        let mut raw = vec![0; SUPERBLOCK_LEN];
        let mut put = |at: usize, value: u32| raw[at..at + 4].copy_from_slice(&value.to_le_bytes());
        put(0, 64);
        put(4, 1000);
        put(0x14, 1);
        put(0x20, 8192);
        put(0x28, 64);
        put(0x38, MAGIC.into());
        raw
    }

    #[test]
    fn versions_follow_from_features() {
        let mut raw = raw();
        assert_eq!(version(&raw), "ext2");
        raw[0x5c] = 4;
        assert_eq!(version(&raw), "ext3");
        raw[0x60] = 0x42;
        assert_eq!(version(&raw), "ext4");
    }

    #[test]
    fn unknown_features_are_named() {
        let mut raw = raw();
        raw[0x60] = 1;
        raw[0x63] = 0x80;
        let error = Superblock::parse(&raw).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().ends_with("compression, 0x80000000"), "{error}");
    }

    #[test]
    fn copies_are_in_groups_0_and_1_and_powers_of_3_5_and_7() {
        let mut raw = raw();
        raw[0x64] = 1;
        let superblock = Superblock::parse(&raw).unwrap();
        let groups: Vec<u64> = (0..130).filter(|group| superblock.group_has_copy(*group)).collect();
        assert_eq!(groups, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn impossible_sizes_are_corrupt() {
        for (at, value) in [(0x18, 7u8), (0x20 + 1, 0), (0x28, 0), (4, 0)] {
            let mut raw = raw();
            raw[at] = value;
            if at == 4 {
                raw[5] = 0;
            }
            assert_eq!(Superblock::parse(&raw).unwrap_err().kind(), ErrorKind::Corrupt, "{at:#x}");
        }
    }
}
