//! The extents of a file: where its bytes are, and in which form.

use crate::error::Result;
use crate::guest::bytes::{array, le16, le64, slice};
use crate::guest::filesystem::{FileKind, FileRun, RunKind};
use crate::guest::runs::Runs;

use super::compression::Compression;
use super::format::{Key, corrupt, kind, limit};
use super::tree::{Item, Items};
use super::{Shared, about};

/// Bytes of an extent's item before inline data.
pub(super) const INLINE_AT: usize = 21;
/// Bytes of the item of any other extent.
const ITEM_LEN: usize = 53;
/// Items that one question about a file looks at, at most.
const MAX_ITEMS: usize = 1 << 20;

/// An extent of a file (`btrfs_file_extent_item`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct FileExtent {
    /// The position in the file.
    pub(super) start: u64,
    /// Bytes of the file; for inline extents, before they are rounded up to sectors.
    pub(super) len: u64,
    /// Bytes of the whole extent when it is decompressed.
    pub(super) ram_len: u64,
    pub(super) compression: Compression,
    pub(super) form: ExtentForm,
}

/// Where the bytes of an extent are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtentForm {
    /// In the item.
    Inline,
    /// Nowhere.
    Hole,
    /// On the devices: a part of a larger extent. If it is reserved, nothing was written.
    Stored { disk: u64, disk_len: u64, offset: u64, is_reserved: bool },
}

impl FileExtent {
    /// Decodes the item of an extent.
    pub(super) fn parse(key: Key, item: &[u8]) -> Result<Self> {
        let wrong = |fact: &str| corrupt(format!("inode {} has an extent {fact}", key.object));
        let [number] = array(item, 16);
        let [encryption] = array(item, 17);
        let [form] = array(item, 20);
        if item.len() < INLINE_AT {
            return Err(wrong("that is too short"));
        }
        if encryption != 0 || le16(item, 18) != 0 {
            return Err(super::format::unsupported(format!("inode {} is encrypted", key.object)));
        }
        let compression = Compression::parse(number)?;
        let (start, ram_len) = (key.offset, le64(item, 8));
        if form == 0 {
            let stored = (item.len() - INLINE_AT) as u64;
            let len = if compression == Compression::None { stored } else { ram_len };
            if start != 0 || len > 64 << 10 {
                return Err(wrong("in its item that is too long"));
            }
            return Ok(Self { start, len, ram_len: len, compression, form: ExtentForm::Inline });
        }
        if form > 2 || item.len() < ITEM_LEN {
            return Err(wrong("of an unknown kind"));
        }
        let (disk, disk_len) = (le64(item, 21), le64(item, 29));
        let (offset, len) = (le64(item, 37), le64(item, 45));
        let ends = [start.checked_add(len), disk.checked_add(disk_len), offset.checked_add(len)];
        if len == 0 || ends.contains(&None) {
            return Err(wrong("of an impossible length"));
        }
        if disk == 0 {
            return Ok(Self { start, len, ram_len, compression, form: ExtentForm::Hole });
        }
        let whole = if compression == Compression::None { disk_len } else { ram_len };
        if offset + len > whole {
            return Err(wrong("that is longer than its space"));
        }
        let form = ExtentForm::Stored { disk, disk_len, offset, is_reserved: form == 2 };
        Ok(Self { start, len, ram_len, compression, form })
    }
}

/// A part of a file, all of one form.
#[derive(Debug)]
pub(super) struct FileSegment {
    pub(super) start: u64,
    /// Larger than `start`.
    pub(super) end: u64,
    /// The extent, and its item; `None`: a hole.
    pub(super) extent: Option<(FileExtent, Item)>,
}

/// A forward walk through the segments of a file, from a position to another one, without gaps.
pub(super) struct FileSegments<'a> {
    shared: &'a Shared,
    items: Items<'a>,
    object: u64,
    at: u64,
    end: u64,
    /// The extent after the hole that was given last.
    next: Option<(FileExtent, Item)>,
    items_left: usize,
}

impl Shared {
    /// The segments of a file between two positions.
    pub(super) fn segments(
        &self,
        subvolume: usize,
        object: u64,
        at: u64,
        end: u64,
    ) -> Result<FileSegments<'_>> {
        let tree = self.tree(subvolume);
        let key = Key::new(object, kind::EXTENT_DATA, at);
        // The extent that holds the position begins before it.
        let before = tree.last_to(&self.nodes, key).map_err(about(object))?;
        let first = before.map(|item| item.key).filter(|found| found.is_beside(key)).unwrap_or(key);
        let items = tree.items_to(&self.nodes, first, Key { offset: end, ..key });
        Ok(FileSegments { shared: self, items, object, at, end, next: None, items_left: MAX_ITEMS })
    }

    /// Where the bytes of a file are.
    pub(super) fn runs(
        &self,
        subvolume: usize,
        object: u64,
        at: u64,
        len: u64,
        most: usize,
    ) -> Result<Vec<FileRun>> {
        let inode = self.inode_of(subvolume, object, FileKind::File)?;
        let end = inode.attributes.size.min(at.saturating_add(len));
        let mut runs = Runs::new(most);
        if at >= end || most == 0 {
            return Ok(runs.runs);
        }
        for segment in self.segments(subvolume, object, at, end)? {
            let segment = segment?;
            if !self.add_runs(&segment, &mut runs) {
                break;
            }
        }
        Ok(runs.runs)
    }

    /// Adds the runs of a segment; false if there is no room for them.
    fn add_runs(&self, segment: &FileSegment, runs: &mut Runs) -> bool {
        let len = segment.end - segment.start;
        let Some((extent, _)) = &segment.extent else { return runs.push(len, RunKind::Hole) };
        match extent.form {
            ExtentForm::Hole | ExtentForm::Stored { is_reserved: true, .. } => runs.push(len, RunKind::Hole),
            ExtentForm::Stored { disk, offset, .. } if extent.compression == Compression::None => {
                let mut at = disk + offset + (segment.start - extent.start);
                let mut left = len;
                if !self.nodes.volume.is_alone {
                    return runs.push(len, RunKind::Opaque);
                }
                while left > 0 {
                    // What cannot be located is an error when it is read.
                    let piece = self.nodes.volume.piece(at, left).ok();
                    let now = piece.as_ref().map_or(left, |piece| piece.len);
                    let kind = match piece.and_then(|piece| self.nodes.volume.place(&piece)) {
                        Some((offset, true)) if !self.sums.has_some(&self.nodes, at, now) => {
                            RunKind::Stored(offset)
                        }
                        Some((offset, _)) => RunKind::Verified(offset),
                        None => RunKind::Opaque,
                    };
                    if !runs.push(now, kind) {
                        return false;
                    }
                    (at, left) = (at.saturating_add(now), left - now);
                }
                true
            }
            ExtentForm::Inline | ExtentForm::Stored { .. } => runs.push(len, RunKind::Opaque),
        }
    }
}

impl FileSegments<'_> {
    /// The next extent that ends behind the position.
    fn extent(&mut self) -> Result<Option<(FileExtent, Item)>> {
        loop {
            let Some(item) = self.items.next().transpose()? else { return Ok(None) };
            if item.key.offset >= self.end {
                return Ok(None);
            }
            let Some(left) = self.items_left.checked_sub(1) else {
                return Err(limit(format!("inode {} has too many extents at one place", self.object)));
            };
            self.items_left = left;
            let extent = FileExtent::parse(item.key, item.data())?;
            if self.stop(&extent) > self.at {
                return Ok(Some((extent, item)));
            }
        }
    }

    /// Where an extent ends in the file. Inline data ends with its sector.
    fn stop(&self, extent: &FileExtent) -> u64 {
        match extent.form {
            ExtentForm::Inline => self.shared.superblock.whole_sectors(extent.len),
            _ => extent.start + extent.len,
        }
    }

    fn advance(&mut self) -> Result<FileSegment> {
        let next = match self.next.take() {
            Some(next) => Some(next),
            None => self.extent()?,
        };
        let start = self.at;
        let Some((extent, item)) = next else {
            self.at = self.end;
            return Ok(FileSegment { start, end: self.end, extent: None });
        };
        if extent.start > start {
            self.at = extent.start.min(self.end);
            self.next = Some((extent, item));
            return Ok(FileSegment { start, end: self.at, extent: None });
        }
        self.at = self.stop(&extent).min(self.end);
        Ok(FileSegment { start, end: self.at, extent: Some((extent, item)) })
    }
}

impl Iterator for FileSegments<'_> {
    type Item = Result<FileSegment>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let found = self.advance().map_err(about(self.object));
        if found.is_err() {
            self.at = self.end;
        }
        Some(found)
    }
}

/// The bytes in the item of an inline extent.
pub(super) fn inline_bytes(item: &[u8]) -> &[u8] {
    slice(item, INLINE_AT, item.len())
}
