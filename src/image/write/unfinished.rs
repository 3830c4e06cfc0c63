//! Commands under which, for a moment, counts and COPIED flags on disk do not agree.
//!
//! A count and the flag that goes with it lie in different sectors, and no order writes both at once: when an
//! internal snapshot is taken, or one is deleted, a crash leaves flags that say too much or too little. That
//! harms nobody, but a checker calls it an error. So the image is marked as dirty before, durably, and
//! whoever opens it next for writing, chainfs or QEMU, counts anew and puts the flags right. The mark goes
//! with the write that ends the command. Version 2 has no place for it: there flags are looked at whenever
//! the image is opened to be written.

use std::sync::atomic::Ordering;

use crate::error::Result;
use crate::format::Version;
use crate::format::feature;
use crate::format::header::INCOMPATIBLE_AT;
use crate::image::check::{mend_flags, rebuild_dirty};

use super::open::read_header;
use super::qcow2::Qcow2Writer;
use super::where_possible;

impl Qcow2Writer {
    /// Marks the image, durably. Returns its incompatible features without the mark, if there is a place for
    /// them.
    pub(super) fn mark_unfinished(&self) -> Result<Option<u64>> {
        let Some(bits) = self.finished_bits()? else { return Ok(None) };
        let marked = self.image.file.write_at(INCOMPATIBLE_AT, &(bits | feature::DIRTY).to_be_bytes());
        marked.and_then(|()| self.image.file.sync()).map_err(|error| self.poisoned_by(error))?;
        Ok(Some(bits))
    }

    /// The incompatible features without the mark, if there is a place for them.
    pub(super) fn finished_bits(&self) -> Result<Option<u64>> {
        if self.image.format.version == Version::V2 {
            return Ok(None);
        }
        let header = read_header(&self.image.name, &*self.image.file)?;
        Ok(Some(header.incompatible & !feature::DIRTY))
    }

    /// Takes the mark away: all is durable. The next flush makes that durable, too; if it does not come to
    /// that, counting anew changes nothing.
    pub(super) fn clear_unfinished(&self, bits: Option<u64>) -> Result<()> {
        let Some(bits) = bits else { return Ok(()) };
        let cleared = self.image.file.write_at(INCOMPATIBLE_AT, &bits.to_be_bytes());
        self.data_dirty.store(true, Ordering::Release);
        cleared.map_err(|error| self.poisoned_by(error))
    }

    /// Takes space for all L2 tables, which are about to be written: a full file system then refuses the
    /// command before it has begun.
    pub(super) fn reserve_l2_tables(&self) -> Result<()> {
        let image = &self.image;
        let l1 = self.tables.read().l1;
        for index in 0..u64::from(l1.entries) {
            let table = self.tables.write().table_of(image, l1, index)?;
            if let Some(table) = table {
                where_possible(image.file.allocate(table.0, image.cluster().size()))?;
            }
        }
        let len = image.file.len()?;
        let mut tables = self.tables.write();
        tables.file_len = tables.file_len.max(len);
        Ok(())
    }

    /// After a failure, which has poisoned the disk: puts right what stands in the file, if that can be read
    /// as it will be after a crash. Else the mark stays, and the next who opens the image does it.
    pub(super) fn mend_unfinished(&self) {
        let image = &self.image;
        let _turn = self.flushes.turn();
        if self.check_poison().is_ok() || self.has_lost_writes.load(Ordering::Acquire) {
            return;
        }
        let mended = match image.format.version {
            Version::V2 => mend_flags(&*image.file, &image.name),
            Version::V3 => rebuild_dirty(&*image.file, &image.name).map(drop),
        };
        if let Err(error) = mended {
            tracing::warn!("{error}: its refcounts are counted anew when it is next opened to be written");
        }
    }
}
