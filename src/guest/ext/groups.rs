//! Group descriptors, read on demand: they hold the position of a group's inodes.
//!
//! A descriptor with a wrong checksum is not fatal: its copies are tried. Without a valid copy the descriptor
//! is used if its references lie within the file system. The inode read through it has a checksum of its own.

use crate::error::Result;
use crate::guest::bytes::{corrupt, le16, le32};

use super::blocks::{Block, Blocks};
use super::bytes::join;
use super::checksum::{crc16, crc32c, crc32c_without_field};
use super::superblock::{Checksums, Superblock, incompat};

/// The used fields of a group's descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockGroup {
    pub(super) inode_table: Block,
    pub(super) free_clusters: u32,
    pub(super) free_inodes: u32,
    /// Its checksum is correct, or it has none.
    pub(super) sound: bool,
}

/// The descriptor of a group.
pub(super) fn group(superblock: &Superblock, blocks: &Blocks, group: u64) -> Result<BlockGroup> {
    if group >= superblock.group_count() {
        return Err(corrupt(format!(
            "group {group} is referenced, but there are only {}",
            superblock.group_count()
        )));
    }
    let per_block = superblock.block_len() as u64 / superblock.descriptor_len as u64;
    let (index, place) = (group / per_block, (group % per_block) as usize * superblock.descriptor_len);
    let usable = |block: Block| -> Result<BlockGroup> {
        let bytes = blocks.read(block)?;
        let found = decode(superblock, group, &bytes[place..place + superblock.descriptor_len]);
        let table_len = u64::from(superblock.inodes_per_group) * superblock.inode_len as u64;
        blocks.within(found.inode_table, table_len.div_ceil(superblock.block_len() as u64))?;
        if found.inode_table.0 <= u64::from(superblock.first_data_block) {
            return Err(corrupt(format!("the inode table of group {group} overlaps the superblock")));
        }
        Ok(found)
    };
    let [first, copies @ ..] = places(superblock, index);
    let primary = usable(first.expect("the first position always exists"));
    if primary.as_ref().is_ok_and(|group| group.sound) {
        return primary;
    }
    let copy = copies.into_iter().flatten().filter_map(|block| usable(block).ok()).find(|copy| copy.sound);
    match (primary, copy) {
        // Without checksums a copy counts as sound, but it is used only if the primary is out of range.
        (_, Some(copy)) => Ok(BlockGroup { sound: false, ..copy }),
        (primary, None) => primary,
    }
}

/// The blocks that hold the descriptors of this index: the primary, then its copies.
fn places(superblock: &Superblock, index: u64) -> [Option<Block>; 3] {
    let per_block = superblock.block_len() as u64 / superblock.descriptor_len as u64;
    let at_start_of = |group: u64| {
        // With blocks of 1 KiB, block 0 is the boot sector even if block numbers start at 0 (bigalloc).
        let boot = u64::from(superblock.block_bits == 10 && superblock.first_data_block == 0 && group == 0);
        let copy = u64::from(superblock.group_has_copy(group));
        Block(superblock.group_start(group).saturating_add(boot + copy))
    };
    if superblock.has(incompat::META_BG) && index >= superblock.first_meta_group.into() {
        let first = index * per_block;
        let count = superblock.group_count();
        let copy = |group: u64| (group < count).then(|| at_start_of(group));
        return [Some(at_start_of(first)), copy(first + 1), copy(first + per_block - 1)];
    }
    let backup = (1..superblock.group_count().min(1 << 16)).find(|group| superblock.group_has_copy(*group));
    [Some(Block(at_start_of(0).0 + index)), backup.map(|group| Block(at_start_of(group).0 + index)), None]
}

fn decode(superblock: &Superblock, group: u64, raw: &[u8]) -> BlockGroup {
    let wide = raw.len() >= 64;
    let high = |at: usize| if wide { le32(raw, at) } else { 0 };
    let high16 = |at: usize| if wide { u32::from(le16(raw, at)) << 16 } else { 0 };
    let group = (group as u32).to_le_bytes();
    let sum = le16(raw, 0x1e);
    let sound = match superblock.checksums {
        Checksums::None => true,
        Checksums::All(seed) => crc32c_without_field(crc32c(seed, &group), raw, 0x1e, 2) as u16 == sum,
        Checksums::Descriptors => {
            let state = crc16(crc16(crc16(!0, &superblock.uuid), &group), &raw[..0x1e]);
            crc16(state, if wide { &raw[0x20..] } else { &[] }) == sum
        }
    };
    BlockGroup {
        inode_table: Block(join(le32(raw, 0x8), high(0x28))),
        free_clusters: u32::from(le16(raw, 0xc)) | high16(0x2c),
        free_inodes: u32::from(le16(raw, 0xe)) | high16(0x2e),
        sound,
    }
}
