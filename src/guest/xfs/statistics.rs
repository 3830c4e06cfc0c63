//! The numbers of statfs(2), as the kernel counts them on a mount that cannot be written.
//!
//! After a replay the free blocks are counted from the groups' headers: the superblock's numbers are written
//! only at a clean unmount.

use crate::guest::bytes::be32;
use crate::guest::filesystem::Statistics;

use super::Xfs;
use super::superblock::Superblock;

/// Groups whose headers are read. Larger file systems use the superblock's numbers.
const GROUP_LIMIT: u32 = 1 << 16;
/// Blocks of each group that the kernel sets aside for the growth of the trees of free space
/// (`xfs_alloc_set_aside`).
const SET_ASIDE: u64 = 8;
const NAME_LEN: u32 = 255;

/// What the headers of the groups say.
#[derive(Clone, Copy, Default)]
struct Groups {
    /// Inodes, free inodes, and free blocks.
    counts: [u64; 3],
    /// Blocks of the trees of free space, without their roots.
    trees: u64,
}

impl Xfs {
    pub(super) fn count(&self) -> Statistics {
        let superblock = &self.superblock;
        let groups = self.count_groups();
        let counts = groups.map(|groups| groups.counts).filter(|_| self.is_replayed);
        let [inodes, free_inodes, free_blocks] = counts.unwrap_or(superblock.counts);
        // The trees of free space count as free, and cannot be used.
        let set_aside =
            u64::from(superblock.group_count) * SET_ASIDE + groups.map_or(0, |groups| groups.trees);
        let free_blocks = free_blocks.min(superblock.block_count).saturating_sub(set_aside);
        let log = if superblock.log_start == 0 { 0 } else { u64::from(superblock.log_blocks) };
        // Free blocks could become inodes, up to a share of the file system.
        let possible = inodes.saturating_add(free_blocks << superblock.inodes_per_block_bits);
        let files = match inode_limit(superblock) {
            0 => possible,
            limit => possible.min(limit).max(inodes),
        };
        Statistics {
            block_size: 1 << superblock.block_bits,
            blocks: superblock.block_count.saturating_sub(log),
            free_blocks,
            available_blocks: free_blocks,
            inodes: files,
            free_inodes: files.saturating_sub(inodes.saturating_sub(free_inodes)),
            name_len: NAME_LEN,
        }
    }

    /// What the headers of all groups say; `None` if one cannot be read.
    fn count_groups(&self) -> Option<Groups> {
        let superblock = &self.superblock;
        if superblock.group_count > GROUP_LIMIT {
            return None;
        }
        let mut groups = Groups::default();
        for group in 0..superblock.group_count {
            let at = superblock.group_offset(group);
            let mut header = [0; 96];
            self.blocks.read_at(at + (1 << superblock.sector_bits), &mut header).ok()?;
            if !header.starts_with(b"XAGF") {
                return None;
            }
            let field = |at: usize| u64::from(be32(&header, at));
            // agf_freeblks, agf_flcount, agf_btreeblks
            let (free, listed, trees) = (field(52), field(48), field(60));
            groups.counts[2] += free + listed + trees;
            // agf_btreeblks counts the tree of reverse mappings as well, without its root.
            let reverse = if superblock.has_reverse_map { field(80).saturating_sub(1) } else { 0 };
            groups.trees += trees.saturating_sub(reverse);
            self.blocks.read_at(at + (2 << superblock.sector_bits), &mut header).ok()?;
            if !header.starts_with(b"XAGI") {
                return None;
            }
            // agi_count, agi_freecount
            groups.counts[0] += u64::from(be32(&header, 16));
            groups.counts[1] += u64::from(be32(&header, 28));
        }
        Some(groups)
    }
}

/// The largest number of inodes; 0: no limit.
fn inode_limit(superblock: &Superblock) -> u64 {
    let blocks = superblock.block_count / 100 * u64::from(superblock.inode_percent)
        + superblock.block_count % 100 * u64::from(superblock.inode_percent) / 100;
    // Inodes are made in chunks of 64, or of a block.
    let chunk = (64 >> superblock.inodes_per_block_bits).max(1);
    (blocks / chunk * chunk) << superblock.inodes_per_block_bits
}
