//! The index of a large directory: which of its blocks can hold a name.
//!
//! An index that cannot be made sense of is no error of the directory: whoever asks then reads it from its beginning
//! to its end.

use crate::error::Result;
use crate::guest::bytes::{le16, le32};

use super::Ext;
use super::hash::Hasher;
use super::inode::Inode;

/// Where the root says what it is: after the entries `.` and `..`.
const INFO_AT: usize = 24;
/// Entries of other nodes lie behind one unused directory entry.
const NODE_ENTRIES_AT: usize = 8;
const ENTRY_LEN: usize = 8;
const MAX_LEVELS: u8 = 3;
/// Blocks in which one hash can go on; a name among more is found by reading the directory.
const MAX_LEAVES: usize = 4096;

/// Which hash a directory with an index has.
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
        let mut below = Vec::new();
        for node in nodes {
            let bytes = ext.directory_block(inode, node)?;
            below.extend(children(&bytes, NODE_ENTRIES_AT, hash).ok_or_else(wrong)?);
            if below.len() > MAX_LEAVES {
                return Err(wrong());
            }
        }
        nodes = below;
    }
    Ok(nodes)
}

/// The children that can hold a hash: the last that begins at or before it, and those after it that go on with it.
fn children(node: &[u8], at: usize, hash: u32) -> Option<Vec<u32>> {
    let (limit, count) = (usize::from(le16(node.get(at..at + 4)?, 0)), usize::from(le16(node, at + 2)));
    if count == 0 || count > limit || at + count * ENTRY_LEN > node.len() {
        return None;
    }
    let entry = |index: usize| &node[at + index * ENTRY_LEN..][..ENTRY_LEN];
    // The first has no hash: it begins at 0, and its place holds the counts.
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
    // A hash that goes on from the block before is marked in its lowest bit, so it sorts behind.
    let goes_on = (low..count).take_while(|index| key(*index) & !1 == hash);
    Some(std::iter::once(first).chain(goes_on).map(|index| le32(entry(index), 4) & 0x0fff_ffff).collect())
}
