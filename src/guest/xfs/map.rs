//! The content of files: where its bytes are, and reading them.
//!
//! Changes of the mapping that were begun and not finished when the log ends are finished here, as the kernel
//! does when it mounts the file system.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::bytes::unsupported;
use crate::guest::filesystem::{FileKind, FileRun, RunKind};

use super::Xfs;
use super::blocks::Buffer;
use super::checksum::HeaderLayout;
use super::extents::{ExtentWalk, Mapping, Segment};
use super::inode::{Fork, Inode};

impl ExtentWalk<'_> {
    /// The segment at block `at`, with at most `limit` blocks.
    pub(super) fn segment(&mut self, at: u64, limit: u64) -> Result<Segment> {
        if self.xfs().unfinished.is_empty() {
            return self.stored(at, limit);
        }
        self.finished(at, limit)
    }
}

impl Xfs {
    /// A regular file whose content can be read.
    fn file(&self, number: u64) -> Result<Arc<Inode>> {
        let inode = self.inode(number)?;
        if inode.kind != FileKind::File {
            return Err(inode.corrupt("is not a regular file"));
        }
        if inode.is_realtime() {
            return Err(unsupported(format!("inode {number} has its content on the realtime device")));
        }
        Ok(inode)
    }

    pub(super) fn runs_of(&self, number: u64, at: u64, len: u64, most: usize) -> Result<Vec<FileRun>> {
        let inode = self.file(number)?;
        let end = inode.size.min(at.saturating_add(len));
        let mut runs: Vec<FileRun> = Vec::new();
        let bits = self.superblock.block_bits;
        let (mut walk, mut at) = (ExtentWalk::new(self, &inode, Fork::Data), at);
        while at < end {
            let block = at >> bits;
            let segment = walk.segment(block, (end.div_ceil(1 << bits) - block).max(1))?;
            let len = ((block + segment.count) << bits).min(end) - at;
            let skip = at & ((1 << bits) - 1);
            let kind = match segment.mapping {
                Mapping::Hole | Mapping::Unwritten => RunKind::Hole,
                Mapping::Stored(place) => RunKind::Stored(place + skip),
            };
            if let Some(last) = runs.last_mut().filter(|last| follows(last, kind)) {
                last.len += len;
            } else if runs.len() < most {
                runs.push(FileRun { len, kind });
            } else {
                break;
            }
            at += len;
        }
        Ok(runs)
    }

    pub(super) fn read_file(&self, number: u64, at: u64, buf: &mut [u8]) -> Result<usize> {
        let inode = self.file(number)?;
        let len = inode.size.saturating_sub(at).min(buf.len() as u64) as usize;
        self.read_content(&inode, at, &mut buf[..len])?;
        Ok(len)
    }

    fn read_content(&self, inode: &Inode, at: u64, buf: &mut [u8]) -> Result<()> {
        let bits = self.superblock.block_bits;
        let mut walk = ExtentWalk::new(self, inode, Fork::Data);
        let mut done = 0;
        while done < buf.len() {
            let here = at + done as u64;
            let (block, skip) = (here >> bits, here & ((1 << bits) - 1));
            let wanted = (skip + (buf.len() - done) as u64).div_ceil(1 << bits);
            let segment = walk.segment(block, wanted)?;
            let len = ((segment.count << bits) - skip).min((buf.len() - done) as u64) as usize;
            let part = &mut buf[done..done + len];
            match segment.mapping {
                Mapping::Hole | Mapping::Unwritten => part.fill(0),
                Mapping::Stored(place) => self.blocks.source().read_at(place + skip, part)?,
            }
            done += len;
        }
        Ok(())
    }

    /// The places of `count` blocks of metadata from `block` on in a fork; `None` if any of them is a hole.
    pub(super) fn pieces(
        &self,
        walk: &mut ExtentWalk<'_>,
        block: u64,
        count: u64,
    ) -> Result<Option<Vec<(u64, usize)>>> {
        let mut pieces = Vec::new();
        let mut done = 0;
        while done < count {
            let segment = walk.segment(block + done, count - done)?;
            let Mapping::Stored(place) = segment.mapping else { return Ok(None) };
            pieces.push((place, (segment.count << self.superblock.block_bits) as usize));
            done += segment.count;
        }
        Ok(Some(pieces))
    }

    /// Metadata of an inode that consist of these pieces; with checksums, their header has this layout.
    pub(super) fn owned(
        &self,
        inode: &Inode,
        pieces: &[(u64, usize)],
        layout: &HeaderLayout,
    ) -> Result<Arc<Buffer>> {
        self.blocks.metadata(pieces, |buffer| {
            if self.superblock.has_checksums {
                let at = pieces[0].0;
                layout.check(&self.superblock, &buffer.bytes, buffer.is_replayed, at, inode.number)?;
            }
            Ok(())
        })
    }
}

/// Whether a run continues another one.
fn follows(last: &FileRun, kind: RunKind) -> bool {
    match (last.kind, kind) {
        (RunKind::Hole, RunKind::Hole) => true,
        (RunKind::Stored(place), RunKind::Stored(next)) => place + last.len == next,
        _ => false,
    }
}
