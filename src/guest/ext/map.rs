//! The mapping of a file's bytes: extents, indirect blocks, inline data, and changes by fast commits.
//!
//! A [`MapWalk`] moves forward through a file's blocks and caches the current leaf, so that listing a file
//! with thousands of extents visits each once. Blocks that are newer in the journal are mapped to the
//! journal.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::filesystem::{FileKind, FileRun, RunKind};
use crate::guest::runs::Runs;

use super::Ext;
use super::blocks::{Block, Journaled};
use super::extents::{self, ExtentLeaf};
use super::inode::{Inode, flags};
use super::{indirect, inline};

/// Consecutive empty maps that one request may walk; a file in good health has none.
const EMPTY_MAPS: u32 = 1 << 14;

/// The mapping of a segment's blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtMapping {
    Hole,
    /// Reserved, never written: zeroes.
    Unwritten,
    Stored(Block),
}

/// Blocks of a file that are contiguous in the file and on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ExtSegment {
    /// At least 1.
    pub(super) count: u64,
    pub(super) mapping: ExtMapping,
}

/// A forward walk through a file's blocks.
pub(super) struct MapWalk<'a> {
    ext: &'a Ext,
    inode: &'a Inode,
    leaf: Option<ExtentLeaf>,
}

impl<'a> MapWalk<'a> {
    pub(super) fn new(ext: &'a Ext, inode: &'a Inode) -> Self {
        Self { ext, inode, leaf: None }
    }

    /// The segment at block `at`, with at most `limit` blocks. Stored blocks lie within the file system.
    pub(super) fn segment(&mut self, at: u64, limit: u64) -> Result<ExtSegment> {
        let number = self.inode.number;
        let (segment, limit) = if let Some(changed) = self.ext.fast.range(number, at) {
            (changed, limit)
        } else {
            let next = self.ext.fast.next_range(number, at);
            (self.unchanged(at)?, next.map_or(limit, |next| limit.min(next - at)))
        };
        let segment = ExtSegment { count: segment.count.min(limit), ..segment };
        debug_assert!(segment.count > 0, "a walk must move forward");
        if let ExtMapping::Stored(first) = segment.mapping {
            self.ext.blocks.within(first, segment.count).map_err(|error| self.inode.about(error))?;
        }
        Ok(segment)
    }

    /// The same without fast commits.
    fn unchanged(&mut self, at: u64) -> Result<ExtSegment> {
        if !self.inode.is(flags::EXTENTS) {
            return indirect::segment(self.inode, &self.ext.blocks, at);
        }
        if at >= 1 << 32 {
            return Ok(ExtSegment { count: u64::MAX - at, mapping: ExtMapping::Hole });
        }
        let leaf = match self.leaf.take() {
            Some(leaf) if leaf.covers(at) => leaf,
            _ => extents::leaf(self.inode, &self.ext.blocks, at)?,
        };
        self.leaf.insert(leaf).segment(self.inode, at)
    }
}

impl Ext {
    /// A regular file whose content can be read.
    fn file(&self, number: u32) -> Result<Arc<Inode>> {
        let inode = self.inode(number)?;
        if inode.kind != FileKind::File {
            return Err(inode.corrupt("is not a regular file"));
        }
        inode.refuse_encrypted()?;
        Ok(inode)
    }

    pub(super) fn runs_of(&self, number: u32, at: u64, len: u64, most: usize) -> Result<Vec<FileRun>> {
        let inode = self.file(number)?;
        let end = inode.size.min(at.saturating_add(len));
        let mut runs = Runs::new(most);
        if at >= end || most == 0 {
            return Ok(runs.runs);
        }
        if inode.is(flags::INLINE_DATA) {
            return Ok(vec![FileRun { len: end - at, kind: RunKind::Opaque }]);
        }
        let bits = self.superblock.block_bits;
        let (mut walk, mut at, mut barren) = (MapWalk::new(self, &inode), at, 0);
        while at < end {
            let block = at >> bits;
            let segment = walk.segment(block, (end.div_ceil(1 << bits) - block).max(1))?;
            let segment_end = ((block + segment.count) << bits).min(end);
            barren = if segment.mapping == ExtMapping::Hole { barren + 1 } else { 0 };
            if barren > EMPTY_MAPS {
                return Err(inode.corrupt("has thousands of empty map blocks"));
            }
            let room = match segment.mapping {
                ExtMapping::Hole | ExtMapping::Unwritten => runs.push(segment_end - at, RunKind::Hole),
                ExtMapping::Stored(first) => {
                    self.stored(first, at & ((1 << bits) - 1), segment_end - at, &mut runs)
                }
            };
            if !room {
                break;
            }
            at = segment_end;
        }
        Ok(runs.runs)
    }

    /// Adds the stored bytes from `skip` bytes after the beginning of `first` on; false if `runs` is full.
    fn stored(&self, mut first: Block, mut skip: u64, mut len: u64, runs: &mut Runs) -> bool {
        let block_len = self.superblock.block_len() as u64;
        while len > 0 {
            let count = (skip + len).div_ceil(block_len);
            let newer = self.blocks.overlay().first_of(first, count);
            let plain = newer.map_or(count, |(newer, _)| newer.0 - first.0);
            let here = if plain == 0 { 1 } else { plain };
            let now = (here * block_len - skip).min(len);
            let kind = match newer {
                Some((_, Journaled { escaped: true, .. })) if plain == 0 => RunKind::Opaque,
                Some((_, Journaled { place, .. })) if plain == 0 => {
                    RunKind::Stored(self.blocks.offset(place) + skip)
                }
                _ => RunKind::Stored(self.blocks.offset(first) + skip),
            };
            if !runs.push(now, kind) {
                return false;
            }
            (first, skip, len) = (Block(first.0 + here), 0, len - now);
        }
        true
    }

    pub(super) fn read_file(&self, number: u32, at: u64, buf: &mut [u8]) -> Result<usize> {
        let inode = self.file(number)?;
        self.read_content(&inode, at, buf)
    }

    /// Reads an inode's content from `at` on, up to its end, for any kind of inode.
    pub(super) fn read_content(&self, inode: &Inode, at: u64, buf: &mut [u8]) -> Result<usize> {
        let len = inode.size.saturating_sub(at).min(buf.len() as u64) as usize;
        let buf = &mut buf[..len];
        if inode.is(flags::INLINE_DATA) {
            inline::read(inode, at, buf)?;
            return Ok(len);
        }
        let bits = self.superblock.block_bits;
        let (mut walk, mut done) = (MapWalk::new(self, inode), 0);
        while done < len {
            let here = at + done as u64;
            let (block, skip) = (here >> bits, here & ((1 << bits) - 1));
            let left = (len - done) as u64;
            let segment = walk.segment(block, (skip + left).div_ceil(1 << bits))?;
            let now = ((segment.count << bits) - skip).min(left) as usize;
            let part = &mut buf[done..][..now];
            match segment.mapping {
                ExtMapping::Hole | ExtMapping::Unwritten => part.fill(0),
                ExtMapping::Stored(first) => self.blocks.read_at(first, skip, part)?,
            }
            done += now;
        }
        Ok(len)
    }
}
