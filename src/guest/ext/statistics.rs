//! The numbers of statfs(2), counted like the kernel does: from the groups. The superblock is only written at
//! times.

use crate::guest::filesystem::Statistics;

use super::superblock::incompat;
use super::{Ext, groups};

/// Groups whose descriptors are read: 128 TiB with the usual sizes. Larger file systems use the superblock's
/// numbers.
const MAX_GROUPS: u64 = 1 << 20;
const NAME_LEN: u32 = 255;

impl Ext {
    pub(super) fn count(&self) -> Statistics {
        let superblock = &self.superblock;
        let whole = superblock
            .block_count
            .saturating_sub(u64::from(superblock.overhead_clusters) << superblock.cluster_bits);
        let (free_blocks, free_inodes) =
            self.count_free().unwrap_or((superblock.free_blocks, superblock.free_inodes.into()));
        // The kernel's own reserve: a fiftieth, at most 4,096 clusters.
        let clusters = superblock.block_count >> superblock.cluster_bits;
        let reserve = if superblock.has(incompat::EXTENTS) { (clusters / 50).min(4096) } else { 0 };
        let reserve = reserve << superblock.cluster_bits;
        Statistics {
            block_size: 1 << superblock.block_bits,
            blocks: whole,
            free_blocks,
            available_blocks: free_blocks.saturating_sub(superblock.reserved_blocks.saturating_add(reserve)),
            inodes: superblock.inode_count.into(),
            free_inodes,
            name_len: NAME_LEN,
        }
    }

    /// Free blocks and inodes of all groups; `None` if a descriptor cannot be read.
    fn count_free(&self) -> Option<(u64, u64)> {
        let count = self.superblock.group_count();
        if count > MAX_GROUPS {
            return None;
        }
        let (mut clusters, mut inodes) = (0, 0);
        for group in 0..count {
            let group = groups::group(&self.superblock, &self.blocks, group).ok()?;
            clusters += u64::from(group.free_clusters);
            inodes += u64::from(group.free_inodes);
        }
        Some((clusters << self.superblock.cluster_bits, inodes))
    }
}
