//! The index of a large directory: the blocks that can hold a name.
//!
//! An invalid index is no error of the directory: the caller then reads the whole directory.

use crate::error::Result;
use crate::guest::bytes::{le16, le32};

use super::Ext;
use super::hash::Hasher;
use super::inode::Inode;

/// Where the root describes the index: after the entries `.` and `..`.
const INFO_AT: usize = 24;
/// Entries of other nodes follow one unused directory entry.
const NODE_ENTRIES_AT: usize = 8;
const ENTRY_LEN: usize = 8;
const MAX_LEVELS: u8 = 3;
/// Blocks over which one hash may continue; with more, the directory is read.
const MAX_LEAVES: usize = 4096;

/// The hash version of a directory with an index.
pub(super) fn version(ext: &Ext, inode: &Inode) -> Result<u8> {
    Ok(ext.directory_block(inode, 0)?[INFO_AT + 4])
}

/// The blocks of the directory that can hold `name`, in order.
pub(super) fn leaves(ext: &Ext, inode: &Inode, name: &[u8]) -> Result<Vec<u32>> {
    let wrong = || inode.corrupt("has a damaged index of its names");
    let root = ext.directory_block(inode, 0)?;
    let (version, info_len, levels) = (root[INFO_AT + 4], usize::from(root[INFO_AT + 5]), root[INFO_AT + 6]);
    let superblock = &ext.superblock;
    let hasher = Hasher::new(version, superblock.unsigned_hash, superblock.hash_seed).ok_or_else(wrong)?;
    if le32(&root, INFO_AT) != 0 || info_len < 8 || levels > MAX_LEVELS {
        return Err(wrong());
    }
    let hash = hasher.hash(name);
    let mut nodes = children(&root, INFO_AT + info_len, hash).ok_or_else(wrong)?;
    for _ in 0..levels {
        let mut next_level = Vec::new();
        for node in nodes {
            let bytes = ext.directory_block(inode, node)?;
            next_level.extend(children(&bytes, NODE_ENTRIES_AT, hash).ok_or_else(wrong)?);
            if next_level.len() > MAX_LEAVES {
                return Err(wrong());
            }
        }
        nodes = next_level;
    }
    Ok(nodes)
}

/// The children that can hold a hash: the last one that begins at or before it, and those after it that
/// continue it.
fn children(node: &[u8], at: usize, hash: u32) -> Option<Vec<u32>> {
    let (limit, count) = (usize::from(le16(node.get(at..at + 4)?, 0)), usize::from(le16(node, at + 2)));
    if count == 0 || count > limit || at + count * ENTRY_LEN > node.len() {
        return None;
    }
    let entry = |index: usize| &node[at + index * ENTRY_LEN..][..ENTRY_LEN];
    // The first entry has no hash: it begins at 0, and its space holds the counts.
    let key = |index: usize| if index == 0 { 0 } else { le32(entry(index), 0) };
    let (mut low, mut high) = (1, count);
    while low < high {
        let middle = usize::midpoint(low, high);
        if key(middle) <= hash {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    let first = low - 1;
    // A hash that continues from the block before has its lowest bit set, so it sorts later.
    let continued = (low..count).take_while(|index| key(*index) & !1 == hash);
    Some(std::iter::once(first).chain(continued).map(|index| le32(entry(index), 4) & 0x0fff_ffff).collect())
}
