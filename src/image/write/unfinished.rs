//! Commands during which counts and COPIED flags on disk disagree for a moment.
//!
//! A count and its flag are in different sectors, and no order writes both at once: while an internal
//! snapshot is taken or deleted, a crash leaves flags that are wrong. They do no harm, but a checker calls
//! them errors. So the image is marked as dirty before, durably, and the next program that opens it for
//! writing, chainfs or QEMU, recounts and repairs the flags. The write that ends the command clears the mark.
//! Version 2 has no such mark: there flags are checked on every opening for writing.

use std::sync::atomic::Ordering;

use crate::error::Result;
use crate::format::Version;
use crate::format::feature;
use crate::format::header::INCOMPATIBLE_AT;
use crate::image::check::{repair_dirty, repair_flags};

use super::open::read_header;
use super::qcow2::Qcow2Writer;
use super::where_possible;

impl Qcow2Writer {
    /// Marks the image, durably. Returns its incompatible features without the mark, if the version has them.
    pub(super) fn mark_unfinished(&self) -> Result<Option<u64>> {
        let Some(bits) = self.finished_bits()? else { return Ok(None) };
        let marked = self.image.file.write_at(INCOMPATIBLE_AT, &(bits | feature::DIRTY).to_be_bytes());
        marked.and_then(|()| self.image.file.sync()).map_err(|error| self.poisoned_by(error))?;
        Ok(Some(bits))
    }

    /// The incompatible features without the mark, if the version has them.
    pub(super) fn finished_bits(&self) -> Result<Option<u64>> {
        if self.image.format.version == Version::V2 {
            return Ok(None);
        }
        let header = read_header(&self.image.name, &*self.image.file)?;
        Ok(Some(header.incompatible & !feature::DIRTY))
    }

    /// Clears the mark: all is durable. The next flush makes that durable, too; without it, a recount changes
    /// nothing.
    pub(super) fn clear_unfinished(&self, bits: Option<u64>) -> Result<()> {
        let Some(bits) = bits else { return Ok(()) };
        let cleared = self.image.file.write_at(INCOMPATIBLE_AT, &bits.to_be_bytes());
        self.data_dirty.store(true, Ordering::Release);
        cleared.map_err(|error| self.poisoned_by(error))
    }

    /// Allocates space for all L2 tables, which are about to be written: a full file system then refuses the
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

    /// After a failure, which has poisoned the disk: repairs the file, if it can be read as it will be after
    /// a crash. Else the mark stays, and the next opening repairs it.
    pub(super) fn repair_unfinished(&self) {
        let image = &self.image;
        let _turn = self.flushes.turn();
        if self.check_poison().is_ok() || self.has_lost_writes.load(Ordering::Acquire) {
            return;
        }
        let repaired = match image.format.version {
            Version::V2 => repair_flags(&*image.file, &image.name),
            Version::V3 => repair_dirty(&*image.file, &image.name).map(drop),
        };
        if let Err(error) = repaired {
            tracing::warn!("{error}: its refcounts are rebuilt at the next opening for writing");
        }
    }
}
