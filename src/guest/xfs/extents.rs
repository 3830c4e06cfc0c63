//! The extents of a fork: a list in the inode, or a B-tree.
//!
//! A walk moves forward and caches the current leaf, so that listing a file with many extents reads each leaf
//! once. Its memory does not grow with the file. Fields follow "XFS Algorithms & Data Structures", chapter
//! "Data Extents".

use std::sync::Arc;

use crate::error::Result;
use crate::guest::bytes::{be16, be32, be64, corrupt};

use super::Xfs;
use super::blocks::Buffer;
use super::checksum::BTREE;
use super::inode::{Fork, ForkFormat, Inode};

/// Bytes of a stored extent.
const EXTENT_LEN: usize = 16;
/// Levels of a B-tree, without the root in the inode.
const LEVEL_LIMIT: u16 = 9;
/// Bytes of the header of the root in the inode.
const ROOT_HEADER_LEN: usize = 4;

/// The mapping of some blocks of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// Not allocated.
    Hole,
    /// Allocated, never written: zeroes.
    Unwritten,
    /// At this byte offset of the disk.
    Stored(u64),
}

/// Blocks that are contiguous in the file and on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    /// At least 1.
    pub(super) count: u64,
    pub(super) mapping: Mapping,
}

/// An extent as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Extent {
    /// The first block in the file.
    start: u64,
    /// The first block on the disk (`xfs_fsblock_t`).
    block: u64,
    count: u64,
    is_unwritten: bool,
}

impl Extent {
    fn parse(raw: &[u8]) -> Self {
        let (high, low) = (be64(raw, 0), be64(raw, 8));
        Self {
            is_unwritten: high >> 63 != 0,
            start: (high & !(1 << 63)) >> 9,
            block: (high & 0x1ff) << 43 | low >> 21,
            count: low & ((1 << 21) - 1),
        }
    }
}

/// The extents of a range of a file.
#[derive(Debug)]
struct Leaf {
    /// The range in blocks that these extents describe completely.
    start: u64,
    end: u64,
    /// By their first blocks, without overlaps.
    extents: Vec<Extent>,
}

impl Leaf {
    fn new(start: u64, end: u64, raw: &[u8]) -> Result<Self> {
        let extents: Vec<Extent> = raw.chunks_exact(EXTENT_LEN).map(Extent::parse).collect();
        let follows = |pair: &[Extent]| pair[0].start + pair[0].count <= pair[1].start;
        if !extents.windows(2).all(follows) || extents.iter().any(|extent| extent.count == 0) {
            return Err(corrupt("has extents that overlap"));
        }
        Ok(Self { start, end, extents })
    }

    /// The blocks from `at` on, which lies within the leaf's range.
    fn segment(&self, xfs: &Xfs, at: u64) -> Result<Segment> {
        let next = self.extents.partition_point(|extent| extent.start <= at);
        let until = self.extents.get(next).map_or(self.end, |extent| extent.start.min(self.end));
        let found = next.checked_sub(1).map(|index| self.extents[index]);
        let Some(extent) = found.filter(|extent| at - extent.start < extent.count) else {
            return Ok(Segment { count: until.saturating_sub(at).max(1), mapping: Mapping::Hole });
        };
        let (skip, count) = (at - extent.start, extent.count - (at - extent.start));
        let place = xfs.superblock.offset(extent.block, extent.count).ok_or_else(|| {
            corrupt(format!("has an extent at block {:#x}, which does not exist", extent.block))
        })?;
        let mapping = if extent.is_unwritten {
            Mapping::Unwritten
        } else {
            Mapping::Stored(place + (skip << xfs.superblock.block_bits))
        };
        Ok(Segment { count, mapping })
    }
}

/// A forward walk through the blocks of a fork.
pub(super) struct ExtentWalk<'a> {
    xfs: &'a Xfs,
    inode: &'a Inode,
    fork: Fork,
    leaf: Option<Leaf>,
}

impl<'a> ExtentWalk<'a> {
    pub(super) fn new(xfs: &'a Xfs, inode: &'a Inode, fork: Fork) -> Self {
        Self { xfs, inode, fork, leaf: None }
    }

    pub(super) fn xfs(&self) -> &'a Xfs {
        self.xfs
    }

    pub(super) fn inode(&self) -> &'a Inode {
        self.inode
    }

    pub(super) fn fork(&self) -> Fork {
        self.fork
    }

    /// The segment at block `at`, with at most `limit` blocks, as the inode itself says.
    pub(super) fn stored(&mut self, at: u64, limit: u64) -> Result<Segment> {
        let leaf = match self.leaf.take() {
            Some(leaf) if (leaf.start..leaf.end).contains(&at) => leaf,
            _ => self.read_leaf(at).map_err(|error| self.inode.about(error))?,
        };
        let segment = leaf.segment(self.xfs, at).map_err(|error| self.inode.about(error))?;
        self.leaf = Some(leaf);
        Ok(Segment { count: segment.count.min(limit).max(1), ..segment })
    }

    fn read_leaf(&self, at: u64) -> Result<Leaf> {
        let area = self.inode.area(self.fork);
        match self.inode.format_of(self.fork) {
            ForkFormat::Extents => {
                let count = self.inode.extent_count(self.fork);
                let len = usize::try_from(count).ok().and_then(|count| count.checked_mul(EXTENT_LEN));
                let raw = len.and_then(|len| area.get(..len));
                Leaf::new(0, u64::MAX, raw.ok_or_else(|| corrupt("has more extents than fit into it"))?)
            }
            ForkFormat::Btree => self.descend(area, at),
            ForkFormat::Device | ForkFormat::Local | ForkFormat::Invalid => Err(corrupt("has no extents")),
        }
    }

    /// The leaf of the B-tree that describes block `at`.
    fn descend(&self, area: &[u8], at: u64) -> Result<Leaf> {
        let (mut level, count) = (be16(area, 0), be16(area, 2));
        let capacity = area.len().saturating_sub(ROOT_HEADER_LEN) / 16;
        if level == 0 || level > LEVEL_LIMIT {
            return Err(corrupt(format!("has an extent tree with {level} levels")));
        }
        let (mut start, mut end) = (0, u64::MAX);
        let root = area.get(ROOT_HEADER_LEN..).unwrap_or_default();
        let mut child = child_of(root, count.into(), capacity, at, &mut start, &mut end)?;
        loop {
            level -= 1;
            let block = self.read_block(child, level)?;
            let header_len = if self.xfs.superblock.has_checksums { 72 } else { 24 };
            let body = &block.bytes[header_len..];
            let count = usize::from(be16(&block.bytes, 6));
            if level == 0 {
                let raw = body.get(..count * EXTENT_LEN);
                return Leaf::new(start, end, raw.ok_or_else(|| corrupt("has an overfull extent block"))?);
            }
            child = child_of(body, count, body.len() / 16, at, &mut start, &mut end)?;
        }
    }

    fn read_block(&self, number: u64, level: u16) -> Result<Arc<Buffer>> {
        let superblock = &self.xfs.superblock;
        let at = superblock.offset(number, 1);
        let at =
            at.ok_or_else(|| corrupt(format!("has an extent block {number:#x}, which does not exist")))?;
        let magic = if superblock.has_checksums { *b"BMA3" } else { *b"BMAP" };
        let block = self.xfs.owned(self.inode, &[(at, superblock.block_len())], &BTREE)?;
        if be32(&block.bytes, 0) != u32::from_be_bytes(magic) || be16(&block.bytes, 4) != level {
            return Err(corrupt(format!("has a damaged extent block at {at:#x}")));
        }
        Ok(block)
    }
}

/// The child of a node that describes block `at`. The node is `count` keys, then, after room for `capacity`
/// of them, the blocks of the children. Narrows the described range.
fn child_of(
    node: &[u8],
    count: usize,
    capacity: usize,
    at: u64,
    start: &mut u64,
    end: &mut u64,
) -> Result<u64> {
    if count == 0 || count > capacity {
        return Err(corrupt("has an extent tree whose node has an invalid number of entries"));
    }
    let key = |index: usize| be64(node, index * 8);
    let (mut low, mut high) = (0, count);
    while low < high {
        let middle = low.midpoint(high);
        if key(middle) <= at {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    if low < count {
        *end = (*end).min(key(low));
    }
    // Blocks before the first key are a hole, which the first child describes.
    let index = low.saturating_sub(1);
    if low > 0 {
        *start = (*start).max(key(index));
    }
    Ok(be64(node, capacity * 8 + index * 8))
}
