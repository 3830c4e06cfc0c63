//! The superblock: geometry, features, and the arithmetic of block and inode numbers.
//!
//! Field names and offsets follow "XFS Algorithms & Data Structures", chapter "Superblocks".

use crate::error::Result;
use crate::guest::bytes::{array, be16, be32, be64, corrupt, slice, unsupported};

use super::checksum;

/// Bytes that are read for a superblock: the largest sector.
pub(super) const SUPERBLOCK_LEN: usize = 1 << 15;
/// Bytes of it that have a meaning.
const USED_LEN: usize = 512;

/// Bits of `sb_versionnum`.
mod version {
    pub(super) const NUMBER: u16 = 0xf;
    pub(super) const DIRV2: u16 = 0x2000;
    pub(super) const BORG: u16 = 0x4000;
    pub(super) const MORE: u16 = 0x8000;
}

/// A bit of `sb_features_ro_compat`.
const RMAPBT: u32 = 2;

/// Bits of `sb_features2`.
mod features2 {
    pub(super) const FTYPE: u32 = 0x200;
}

/// Bits of `sb_features_incompat`.
pub(super) mod incompat {
    pub(in crate::guest::xfs) const FTYPE: u32 = 1;
    pub(in crate::guest::xfs) const META_UUID: u32 = 1 << 2;
    pub(in crate::guest::xfs) const NEEDS_REPAIR: u32 = 1 << 4;
    /// `FTYPE`, `SPINODES`, `META_UUID`, `BIGTIME`, `NEEDSREPAIR`, `NREXT64`, `EXCHRANGE`, `PARENT`,
    /// `METADIR`, `ZONED` and `ZONE_GAPS`. The last two concern the realtime device alone.
    pub(in crate::guest::xfs) const KNOWN: u32 = (1 << 11) - 1;
}

/// A valid superblock.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "they are features that do not depend on each other")]
pub(super) struct Superblock {
    /// Whether metadata have checksums (version 5).
    pub(super) has_checksums: bool,
    /// Whether directory entries hold the kind of their inode.
    pub(super) has_kinds: bool,
    /// Whether names are compared without regard to ASCII case.
    pub(super) ignores_case: bool,
    /// Whether groups have a tree of reverse mappings.
    pub(super) has_reverse_map: bool,
    /// `sb_features_incompat`.
    pub(super) incompat: u32,
    /// `sb_blocklog`.
    pub(super) block_bits: u32,
    /// `sb_inodelog`.
    pub(super) inode_bits: u32,
    /// `sb_inopblog`.
    pub(super) inodes_per_block_bits: u32,
    /// `sb_agblklog`.
    pub(super) group_bits: u32,
    /// `sb_sectlog`.
    pub(super) sector_bits: u32,
    /// `sb_blocklog + sb_dirblklog`.
    pub(super) directory_bits: u32,
    /// `sb_dblocks`.
    pub(super) block_count: u64,
    /// `sb_agblocks`.
    pub(super) group_blocks: u32,
    /// `sb_agcount`.
    pub(super) group_count: u32,
    /// `sb_rootino`.
    pub(super) root: u64,
    /// `sb_logstart`; 0: the log is on another device.
    pub(super) log_start: u64,
    /// `sb_logblocks`.
    pub(super) log_blocks: u32,
    /// `sb_uuid`.
    pub(super) uuid: [u8; 16],
    /// The UUID in the headers of metadata.
    pub(super) meta_uuid: [u8; 16],
    /// `sb_icount`, `sb_ifree`, `sb_fdblocks`.
    pub(super) counts: [u64; 3],
    /// `sb_imax_pct`.
    pub(super) inode_percent: u8,
}

impl Superblock {
    /// Parses a superblock. Checks everything that later arithmetic relies on. `is_replayed`: the log has
    /// changed it, and its checksum was not computed again.
    pub(super) fn parse(raw: &[u8], is_replayed: bool) -> Result<Self> {
        if raw.len() < USED_LEN || !raw.starts_with(b"XFSB") {
            return Err(corrupt("there is no XFS superblock"));
        }
        let versions = be16(raw, 100);
        let number = versions & version::NUMBER;
        if !matches!(number, 4 | 5) {
            return Err(unsupported(format!("XFS of version {number} is not supported")));
        }
        let has_checksums = number == 5;
        let invalid = |fact: &str| Err(corrupt(format!("the superblock {fact}")));
        let sector_bits = u32::from(raw[121]);
        if !(9..=15).contains(&sector_bits) {
            return invalid("has an invalid sector size");
        }
        let incompat = if has_checksums { be32(raw, 216) } else { 0 };
        if incompat & !incompat::KNOWN != 0 {
            let bits = incompat & !incompat::KNOWN;
            return Err(unsupported(format!("the XFS feature bits {bits:#x} are not supported")));
        }
        let features2 = if versions & version::MORE != 0 { be32(raw, 200) } else { 0 };
        let [block_bits, _, inode_bits, inodes_per_block_bits, group_bits] =
            array::<5>(raw, 120).map(u32::from);
        let directory_bits = block_bits + u32::from(raw[192]);
        let found = Self {
            has_checksums,
            has_kinds: if has_checksums {
                incompat & incompat::FTYPE != 0
            } else {
                features2 & features2::FTYPE != 0
            },
            ignores_case: versions & version::BORG != 0,
            has_reverse_map: has_checksums && be32(raw, 212) & RMAPBT != 0,
            incompat,
            block_bits,
            inode_bits,
            inodes_per_block_bits,
            group_bits,
            sector_bits,
            directory_bits,
            block_count: be64(raw, 8),
            group_blocks: be32(raw, 84),
            group_count: be32(raw, 88),
            root: be64(raw, 56),
            log_start: be64(raw, 48),
            log_blocks: be32(raw, 96),
            uuid: array(raw, 32),
            meta_uuid: if incompat & incompat::META_UUID != 0 { array(raw, 248) } else { array(raw, 32) },
            counts: [be64(raw, 128), be64(raw, 136), be64(raw, 144)],
            inode_percent: raw[127],
        };
        let is_geometry = (9..=16).contains(&block_bits)
            && be32(raw, 4) == 1 << block_bits
            && (8..=11).contains(&inode_bits)
            && u32::from(be16(raw, 104)) == 1 << inode_bits
            && block_bits.checked_sub(inode_bits) == Some(inodes_per_block_bits)
            && (block_bits..=16).contains(&directory_bits);
        let groups = u64::from(found.group_count) * u64::from(found.group_blocks);
        let is_grouped = group_bits < 32
            && found.group_blocks > 0
            && found.group_blocks <= 1 << group_bits
            && found.group_count > 0
            && found.block_count <= groups
            && found.block_count > groups - u64::from(found.group_blocks)
            && found.block_count < 1 << (63 - block_bits);
        if !is_geometry || !is_grouped {
            return invalid("has an invalid geometry");
        }
        // The checksum covers the sector.
        if has_checksums && !is_replayed && !checksum::is_valid(slice(raw, 0, 1 << sector_bits), 224) {
            return invalid("has a wrong checksum");
        }
        if versions & version::DIRV2 == 0 && !has_checksums {
            return Err(unsupported("directories of version 1 are not supported"));
        }
        Ok(found)
    }

    /// Bytes of a block.
    pub(super) fn block_len(&self) -> usize {
        1 << self.block_bits
    }

    /// Bytes of an inode.
    pub(super) fn inode_len(&self) -> usize {
        1 << self.inode_bits
    }

    /// Blocks of a group, by its number: the last may be shorter.
    fn blocks_of(&self, group: u64) -> u64 {
        let start = group * u64::from(self.group_blocks);
        u64::from(self.group_blocks).min(self.block_count.saturating_sub(start))
    }

    /// The byte offset of `count` blocks from the block with the number `number` (`xfs_fsblock_t`: the group
    /// in the upper bits) on; `None` unless they lie within one group.
    pub(super) fn offset(&self, number: u64, count: u64) -> Option<u64> {
        let group = number >> self.group_bits;
        let within = number & ((1 << self.group_bits) - 1);
        if group >= u64::from(self.group_count) || within.checked_add(count)? > self.blocks_of(group) {
            return None;
        }
        Some((group * u64::from(self.group_blocks) + within) << self.block_bits)
    }

    /// The byte offset of the block that holds an inode, and the inode's offset in it; `None` if there is no
    /// such inode.
    pub(super) fn inode_place(&self, ino: u64) -> Option<(u64, usize)> {
        if ino >> (self.group_bits + self.inodes_per_block_bits) >= u64::from(self.group_count) {
            return None;
        }
        let block = ino >> self.inodes_per_block_bits;
        let index = ino & ((1 << self.inodes_per_block_bits) - 1);
        Some((self.offset(block, 1)?, (index as usize) << self.inode_bits))
    }

    /// The byte offset of the first block of a group.
    pub(super) fn group_offset(&self, group: u32) -> u64 {
        (u64::from(group) * u64::from(self.group_blocks)) << self.block_bits
    }
}
