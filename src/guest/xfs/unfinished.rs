//! Finishes changes of mappings that were begun when the log ended: clones, and exchanges of ranges.
//!
//! A mapping is asked for backwards: the last change that covers a block decides, or says in which file and
//! at which block the earlier changes are to be asked.

use crate::error::Result;
use crate::guest::bytes::corrupt;

use super::Xfs;
use super::extents::{ExtentWalk, Mapping, Segment};
use super::inode::Fork;
use super::log::Unfinished;

/// Where a block is, as far as the unfinished changes say.
enum Resolved {
    /// As an inode says at a block.
    Stored { inode: u64, at: u64 },
    /// As a change says.
    Changed(Mapping),
}

impl ExtentWalk<'_> {
    /// The segment at block `at`, with the unfinished changes.
    pub(super) fn finished(&mut self, at: u64, limit: u64) -> Result<Segment> {
        let own = self.inode().number;
        if self.fork() == Fork::Attributes {
            return self.stored(at, limit);
        }
        let (resolved, limit) = resolve(self.xfs(), own, at, limit)?;
        match resolved {
            Resolved::Changed(mapping) => Ok(Segment { count: limit, mapping }),
            Resolved::Stored { inode, at } if inode == own => self.stored(at, limit),
            Resolved::Stored { inode, at } => {
                let other = self.xfs().inode(inode)?;
                ExtentWalk::new(self.xfs(), &other, Fork::Data).stored(at, limit)
            }
        }
    }
}

/// Asks the changes, the last one first, about block `at` of a file. The answer is valid for the returned
/// number of blocks, at most `limit`.
fn resolve(xfs: &Xfs, inode: u64, at: u64, limit: u64) -> Result<(Resolved, u64)> {
    let (mut inode, mut at, mut limit) = (inode, at, limit.max(1));
    for change in xfs.unfinished.iter().rev() {
        match change {
            Unfinished::Map { inode: changed, start, count, place } if *changed == inode => {
                if let Some(skip) = covered(*start, *count, at, &mut limit) {
                    let mapping = match place {
                        None => Mapping::Hole,
                        Some((_, true)) => Mapping::Unwritten,
                        Some((block, false)) => {
                            let place = xfs.superblock.offset(*block, *count).ok_or_else(|| {
                                corrupt(format!("the log maps block {block:#x}, which does not exist"))
                            })?;
                            Mapping::Stored(place + (skip << xfs.superblock.block_bits))
                        }
                    };
                    return Ok((Resolved::Changed(mapping), limit));
                }
            }
            Unfinished::Map { .. } => {}
            Unfinished::Exchange { inodes, starts, count, .. } => {
                for (own, other) in [(0, 1), (1, 0)] {
                    if inodes[own] != inode {
                        continue;
                    }
                    if let Some(skip) = covered(starts[own], *count, at, &mut limit) {
                        inode = inodes[other];
                        at = starts[other].saturating_add(skip);
                        break;
                    }
                }
            }
        }
    }
    Ok((Resolved::Stored { inode, at }, limit))
}

/// How far into a range of `count` blocks from `start` on the block `at` is, if it is in it. `limit` becomes
/// the number of blocks for which the answer is the same.
fn covered(start: u64, count: u64, at: u64, limit: &mut u64) -> Option<u64> {
    let end = start.saturating_add(count);
    if at < start {
        *limit = (*limit).min(start - at);
        return None;
    }
    if at >= end {
        return None;
    }
    *limit = (*limit).min(end - at);
    Some(at - start)
}

impl Xfs {
    /// The size that an unfinished exchange gives a file.
    pub(super) fn exchanged_size(&self, number: u64) -> Option<u64> {
        self.unfinished.iter().rev().find_map(|change| match change {
            Unfinished::Exchange { inodes, sizes: Some(sizes), .. } => {
                inodes.iter().position(|inode| *inode == number).map(|index| sizes[index])
            }
            Unfinished::Exchange { .. } | Unfinished::Map { .. } => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::guest::xfs::blocks::{Blocks, LogOverlay};
    use crate::guest::xfs::superblock::Superblock;

    /// A file system of version 4 without files, of 16 blocks of 4 KiB in one group.
    fn file_system(unfinished: Vec<Unfinished>) -> Xfs {
        let mut raw = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| raw[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"XFSB");
        put(4, &4096u32.to_be_bytes());
        put(8, &16u64.to_be_bytes());
        put(84, &16u32.to_be_bytes());
        put(88, &1u32.to_be_bytes());
        put(100, &0x2004u16.to_be_bytes());
        put(104, &256u16.to_be_bytes());
        put(120, &[12, 9, 8, 4, 4]);
        Xfs {
            superblock: Superblock::parse(&raw, false).unwrap(),
            blocks: Blocks::new(Arc::new(raw), LogOverlay::default()),
            is_replayed: true,
            unfinished,
            inodes: crate::cache::Cache::new(1000),
            statistics: std::sync::OnceLock::new(),
            remarks: Vec::new(),
            stale: Vec::new(),
        }
    }

    /// Who has the block, or what a change says, block by block.
    fn all(xfs: &Xfs, inode: u64, count: u64) -> Vec<String> {
        let mut shown = Vec::new();
        let mut at = 0;
        while at < count {
            let (resolved, valid) = resolve(xfs, inode, at, count - at).unwrap();
            assert!((1..=count - at).contains(&valid));
            for step in 0..valid {
                shown.push(match &resolved {
                    Resolved::Stored { inode, at } => format!("{inode}:{}", at + step),
                    Resolved::Changed(Mapping::Stored(place)) => format!("at {}", (place >> 12) + step),
                    Resolved::Changed(other) => format!("{other:?}"),
                });
            }
            at += valid;
        }
        shown
    }

    fn map(inode: u64, start: u64, count: u64, place: Option<(u64, bool)>) -> Unfinished {
        Unfinished::Map { inode, start, count, place }
    }

    #[test]
    fn the_last_change_of_a_block_counts() {
        let changes = vec![
            map(1, 2, 3, Some((4, false))),
            map(1, 3, 1, None),
            map(1, 6, 1, Some((0, true))),
            map(2, 0, 9, None),
        ];
        let shown = all(&file_system(changes), 1, 8);
        assert_eq!(shown, ["1:0", "1:1", "at 4", "Hole", "at 6", "1:5", "Unwritten", "1:7"]);
        assert!(resolve(&file_system(vec![map(1, 0, 3, Some((14, false)))]), 1, 0, 9).is_err());
    }

    #[test]
    fn an_exchange_is_followed_to_the_other_file() {
        let exchange =
            |starts, count| Unfinished::Exchange { inodes: [1, 2], starts, count, sizes: Some([70, 80]) };
        // What was mapped before the exchange goes with it; what is mapped after it does not.
        let changes = vec![map(2, 11, 1, None), exchange([1, 10], 3), map(1, 3, 1, Some((5, false)))];
        let xfs = file_system(changes);
        assert_eq!(all(&xfs, 1, 5), ["1:0", "2:10", "Hole", "at 5", "1:4"]);
        assert_eq!(all(&xfs, 2, 14)[9..], ["2:9", "1:1", "1:2", "1:3", "2:13"]);
        assert_eq!([1, 2, 3].map(|inode| xfs.exchanged_size(inode)), [Some(70), Some(80), None]);
        // Two exchanges of the same range are none.
        let twice = file_system(vec![exchange([0, 0], 4), exchange([0, 0], 4)]);
        assert_eq!(all(&twice, 1, 5), ["1:0", "1:1", "1:2", "1:3", "1:4"]);
    }
}
