//! Extents during a replay: a logged extent replaces what was at its place.

use crate::error::Result;
use crate::guest::bytes::le64;

use super::super::extents::{ExtentForm, FileExtent};
use super::super::format::{Key, corrupt, kind};
use super::super::superblock::incompat;
use super::super::tree::Item;
use super::replay::{Replay, set};

/// Fields of `btrfs_file_extent_item`.
const OFFSET_AT: usize = 37;
const LEN_AT: usize = 45;

impl Replay<'_> {
    /// An extent in the log.
    pub(super) fn extent(&mut self, item: &Item) -> Result<()> {
        let (key, number) = (item.key, item.key.object);
        if !self.exists(number)? {
            return Ok(());
        }
        let known = self.tree.get(self.nodes, key)?;
        if known.is_some_and(|known| known.data() == item.data()) {
            return Ok(());
        }
        let extent = FileExtent::parse(key, item.data())?;
        let (end, bytes) = match extent.form {
            ExtentForm::Inline => (self.superblock.whole_sectors(extent.len), extent.ram_len),
            ExtentForm::Hole => (extent.start + extent.len, 0),
            ExtentForm::Stored { .. } => (extent.start + extent.len, extent.len),
        };
        let removed = self.drop_extents(number, extent.start, end)?;
        if extent.form != ExtentForm::Hole || !self.superblock.has(incompat::NO_HOLES) {
            self.put(key, item.data().to_vec())?;
        }
        self.change_bytes(number, bytes, removed)
    }

    /// Removes a range of a file, and returns how many bytes of space that frees.
    pub(super) fn drop_extents(&mut self, number: u64, start: u64, end: u64) -> Result<u64> {
        let mut freed = 0u64;
        let from = Key::new(number, kind::EXTENT_DATA, start);
        // The extent before may reach into the range.
        let before = self.tree.last_to(self.nodes, from)?.map(|item| item.key);
        let mut next = Some(before.filter(|key| key.is_beside(from)).unwrap_or(from));
        while let Some(key) = next {
            let found = self.tree.first_from(self.nodes, key)?;
            let Some(item) = found.filter(|i| i.key.is_beside(from) && i.key.offset < end) else { break };
            next = item.key.next();
            freed = freed.saturating_add(self.drop_range(&item, start, end)?);
        }
        Ok(freed)
    }

    /// Removes a range from an extent: all of it, or one of its ends, or its middle.
    fn drop_range(&mut self, item: &Item, start: u64, end: u64) -> Result<u64> {
        let key = item.key;
        let extent = FileExtent::parse(key, item.data())?;
        let extent_end = key.offset + extent.len;
        if extent_end <= start {
            return Ok(0);
        }
        let takes_space = |len: u64| if extent.form == ExtentForm::Hole { 0 } else { len };
        if start <= key.offset && extent_end <= end {
            self.change(key, None)?;
            return Ok(takes_space(extent.len));
        }
        if extent.form == ExtentForm::Inline {
            return Err(corrupt(format!("the log of inode {} divides an inline extent", key.object)));
        }
        if end < extent_end {
            let mut rest = item.data().to_vec();
            let skip = end - key.offset;
            if extent.form != ExtentForm::Hole {
                set(&mut rest, OFFSET_AT, le64(item.data(), OFFSET_AT).saturating_add(skip));
            }
            set(&mut rest, LEN_AT, extent_end - end);
            self.put(Key::new(key.object, key.kind, end), rest)?;
        }
        if key.offset < start {
            let mut beginning = item.data().to_vec();
            set(&mut beginning, LEN_AT, start - key.offset);
            self.put(key, beginning)?;
        } else {
            self.change(key, None)?;
        }
        Ok(takes_space(extent_end.min(end) - start.max(key.offset)))
    }
}
