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
        let xfs = self.xfs();
        let (resolved, limit) = resolve(xfs, &xfs.unfinished, own, at, limit)?;
        match resolved {
            Resolved::Changed(mapping) => Ok(Segment { count: limit, mapping }),
            Resolved::Stored { inode, at } if inode == own => self.stored(at, limit),
            Resolved::Stored { inode, at } => {
                let other = xfs.inode(inode)?;
                ExtentWalk::new(xfs, &other, Fork::Data).stored(at, limit)
            }
        }
    }
}

/// Asks the changes, the last one first, about block `at` of a file. The answer is valid for the returned
/// number of blocks, at most `limit`.
fn resolve(xfs: &Xfs, changes: &[Unfinished], inode: u64, at: u64, limit: u64) -> Result<(Resolved, u64)> {
    let (mut inode, mut at, mut limit) = (inode, at, limit.max(1));
    for change in changes.iter().rev() {
        match change {
            Unfinished::Map { inode: owner, start, count, place } if *owner == inode => {
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
    /// The number of blocks of a file with the unfinished changes, from the one without them.
    pub(super) fn finished_blocks(&self, number: u64, blocks: u64) -> Result<u64> {
        let mut blocks = blocks;
        for (index, change) in self.unfinished.iter().enumerate() {
            let before = &self.unfinished[..index];
            match change {
                Unfinished::Map { inode, start, count, place } if *inode == number => {
                    let added = if place.is_some() { *count } else { 0 };
                    let removed = self.allocated(before, number, *start, *count)?;
                    blocks = blocks.saturating_add(added).saturating_sub(removed);
                }
                Unfinished::Map { .. } => {}
                Unfinished::Exchange { inodes, starts, count, .. } => {
                    let Some(own) = inodes.iter().position(|inode| *inode == number) else { continue };
                    let other = 1 - own;
                    let added = self.allocated(before, inodes[other], starts[other], *count)?;
                    let removed = self.allocated(before, number, starts[own], *count)?;
                    blocks = blocks.saturating_add(added).saturating_sub(removed);
                }
            }
        }
        Ok(blocks)
    }

    /// How many blocks of a range of a file have a place after some changes.
    fn allocated(&self, changes: &[Unfinished], inode: u64, start: u64, count: u64) -> Result<u64> {
        let end = start.saturating_add(count);
        let (mut at, mut allocated) = (start, 0);
        while at < end {
            let (resolved, limit) = resolve(self, changes, inode, at, end - at)?;
            let segment = match resolved {
                Resolved::Changed(mapping) => Segment { count: limit, mapping },
                Resolved::Stored { inode, at } => {
                    let stored = self.inode(inode)?;
                    ExtentWalk::new(self, &stored, Fork::Data).stored(at, limit)?
                }
            };
            if segment.mapping != Mapping::Hole {
                allocated += segment.count;
            }
            at += segment.count;
        }
        Ok(allocated)
    }

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
            let (resolved, valid) = resolve(xfs, &xfs.unfinished, inode, at, count - at).unwrap();
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
        let outside = file_system(vec![map(1, 0, 3, Some((14, false)))]);
        assert!(resolve(&outside, &outside.unfinished, 1, 0, 9).is_err());
        // No earlier change and no inode is asked: all of it is mapped by changes.
        let blocks = |changes| file_system(changes).finished_blocks(1, 10).unwrap();
        let first = map(1, 0, 8, Some((0, false)));
        assert_eq!(blocks(vec![map(2, 0, 8, None)]), 10);
        assert_eq!(blocks(vec![map(2, 0, 8, None), map(2, 2, 3, Some((1, true)))]), 10);
        let after = |change| {
            let xfs = file_system(vec![first.clone(), change]);
            (xfs.allocated(&xfs.unfinished[..1], 1, 0, 8).unwrap(), xfs.allocated(&xfs.unfinished, 1, 0, 8))
        };
        assert_eq!(after(map(1, 2, 3, None)).1.unwrap(), 5);
        assert_eq!(after(map(1, 2, 3, Some((9, true)))).0, 8);
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
