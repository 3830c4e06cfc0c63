//! Extent trees: the mapping of a file's blocks in ext4.
//!
//! Each node is searched by bisection, and each must lie within the range its parent states. So a walk always
//! moves forward through the file and ends, even in a damaged tree.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::bytes::{le16, le32};

use super::blocks::{Block, Blocks};
use super::bytes::join;
use super::checksum::crc32c;
use super::inode::{BLOCK_AREA, Inode};
use super::map::{ExtMapping, ExtSegment};

const MAGIC: u16 = 0xf30a;
const ENTRY_LEN: usize = 12;
const MAX_DEPTH: u16 = 5;
/// The largest length of a written extent; a larger value means reserved, unwritten blocks.
const MAX_WRITTEN: u16 = 1 << 15;
/// A file has fewer blocks than this.
const END: u64 = 1 << 32;

/// A node of the tree with a valid header.
struct ExtentNode {
    bytes: Arc<[u8]>,
    count: usize,
    depth: u16,
}

impl ExtentNode {
    fn parse(inode: &Inode, bytes: Arc<[u8]>, depth: Option<u16>) -> Result<Self> {
        let (count, max) = (usize::from(le16(&bytes, 2)), usize::from(le16(&bytes, 4)));
        let found = le16(&bytes, 6);
        let fits = (1 + max) * ENTRY_LEN <= bytes.len() && count <= max;
        if le16(&bytes, 0) != MAGIC || !fits || found > MAX_DEPTH || depth.is_some_and(|depth| depth != found)
        {
            return Err(inode.corrupt("has a damaged extent tree"));
        }
        if count == 0 && found > 0 {
            return Err(inode.corrupt("has an extent tree with an empty index"));
        }
        let end = (1 + max) * ENTRY_LEN;
        if let Some(seed) = inode.seed.filter(|_| depth.is_some())
            && (end + 4 > bytes.len() || crc32c(seed, &bytes[..end]) != le32(&bytes, end))
        {
            return Err(inode.corrupt("has an extent block with a wrong checksum"));
        }
        Ok(Self { bytes, count, depth: found })
    }

    fn entry(&self, index: usize) -> &[u8] {
        &self.bytes[(1 + index) * ENTRY_LEN..][..ENTRY_LEN]
    }

    /// The block of the file at which an entry begins.
    fn key(&self, index: usize) -> u64 {
        le32(self.entry(index), 0).into()
    }

    /// How many entries begin at or before `at`.
    fn until(&self, at: u64) -> usize {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = usize::midpoint(low, high);
            if self.key(middle) <= at {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low
    }
}

/// A leaf of the tree, and the range of the file's blocks that it covers.
pub(super) struct ExtentLeaf {
    node: ExtentNode,
    start: u64,
    end: u64,
}

/// The leaf that covers block `at` of a file.
pub(super) fn leaf(inode: &Inode, blocks: &Blocks, at: u64) -> Result<ExtentLeaf> {
    let (mut start, mut end) = (0, END);
    let mut node = ExtentNode::parse(inode, inode.raw[BLOCK_AREA].into(), None)?;
    while node.depth > 0 {
        // The first child also covers the hole before it.
        let child = node.until(at).saturating_sub(1);
        let key = node.key(child);
        if child + 1 < node.count {
            end = end.min(node.key(child + 1));
        }
        if child > 0 {
            start = start.max(key);
        }
        if start > at || end <= at {
            return Err(inode.corrupt("has an extent tree that is not in order"));
        }
        let entry = node.entry(child);
        let block = Block(join(le32(entry, 4), le16(entry, 8)));
        let bytes = blocks.read(block).map_err(|error| inode.about(error))?;
        node = ExtentNode::parse(inode, bytes, Some(node.depth - 1))?;
        if node.count > 0 && node.key(0) < key {
            return Err(inode.corrupt("has an extent tree that is not in order"));
        }
    }
    Ok(ExtentLeaf { node, start, end })
}

impl ExtentLeaf {
    pub(super) fn covers(&self, at: u64) -> bool {
        (self.start..self.end).contains(&at)
    }

    /// The segment at block `at` of the file, which this leaf must cover, with its length within this leaf.
    pub(super) fn segment(&self, inode: &Inode, at: u64) -> Result<ExtSegment> {
        debug_assert!(self.covers(at));
        let after = self.node.until(at);
        let next = if after < self.node.count { self.node.key(after) } else { self.end };
        if next <= at {
            return Err(inode.corrupt("has extents that are not in order"));
        }
        let Some(before) = after.checked_sub(1) else {
            return Ok(ExtSegment { count: next.min(self.end) - at, mapping: ExtMapping::Hole });
        };
        let entry = self.node.entry(before);
        let (key, len) = (self.node.key(before), le16(entry, 4));
        let (len, written) = if len > MAX_WRITTEN { (len - MAX_WRITTEN, false) } else { (len, true) };
        let into = at - key;
        if into >= u64::from(len) {
            return Ok(ExtSegment { count: next.min(self.end) - at, mapping: ExtMapping::Hole });
        }
        let first = Block(join(le32(entry, 8), le16(entry, 6)) + into);
        // Never beyond the next extent: the walk must visit each one.
        let count = (u64::from(len) - into).min(next - at);
        Ok(ExtSegment {
            count,
            mapping: if written { ExtMapping::Stored(first) } else { ExtMapping::Unwritten },
        })
    }
}
