//! Applying internal snapshots: the disk is reset to one, and the snapshot stays.
//!
//! Every cluster that its disk reaches is counted once more, for a new L1 table that one write within the
//! header's first sector names together with the size. A crash before that leaves the old disk, afterwards
//! the snapshot's, at worst with leaks. The VM state stays the snapshot's alone.

use std::sync::atomic::Ordering;

use crate::error::Result;
use crate::format::{EntryFormat, L1Table, Snapshot};
use crate::units::HostOffset;

use super::Writer;
use super::qcow2::Qcow2Writer;
use super::reservation::{ClusterRange, Reservation};
use super::snapshot::{NewSnapshot, StoredSnapshots};
use super::tables::{ImageFile, Tables};

impl Writer {
    /// Resets the disk to an internal snapshot, one of [`Writer::snapshots`], including its size where it is
    /// recorded. The disk's old content is lost, unless it becomes another snapshot (`save`) in the same
    /// moment; the snapshot stays. No other thread reads or writes the disk. It is durable when this returns.
    ///
    /// Refused: `Unsupported` (a raw image, an external data file, refcounts too narrow; another size with
    /// bitmaps or in version 2), `Stale` (it has no such snapshot), `TooLarge`, `Limit`, `Corrupt`. A failure
    /// after the point of no return poisons the disk.
    ///
    /// # Panics
    /// In undoable mode.
    pub fn apply_snapshot(&self, snapshot: &Snapshot, save: Option<&NewSnapshot>) -> Result<()> {
        self.with_snapshots()?.apply(snapshot, save)
    }
}

/// A snapshot of the current disk, which keeps the disk's L1 table: no count changes by that.
struct SavedDisk {
    snapshot: Snapshot,
    /// The table that contains it; nothing refers to that yet.
    table: Reservation,
    count: u32,
}

impl Qcow2Writer {
    pub(super) fn apply_snapshot(&self, snapshot: &Snapshot, save: Option<&NewSnapshot>) -> Result<()> {
        let image = &self.image;
        assert!(!self.is_undoable(), "what is written can be undone");
        self.refuse_data_file()?;
        let _all = self.ranges.hold(0, u64::MAX);
        self.check_poison()?;
        let table = self.snapshot_table()?;
        let snapshot = &table.snapshots[self.find_snapshot(&table, snapshot)?];
        let size = snapshot.virtual_size.unwrap_or(self.size());
        if size != self.size() {
            self.refuse_unrecorded_sizes()?;
            self.refuse_bitmaps()?;
        }
        let entries = self.l1_entries_for(size)?;
        self.prepare_content()?;
        // Pending references have been removed.
        self.flush()?;
        let old = self.tables.read().l1;
        // VM state follows the entries of its disk.
        let source = L1Table { entries: snapshot.l1.entries.min(entries as u32), ..snapshot.l1 };
        self.refuse_overflow(source, source.entries.into()).map_err(|error| self.damaged(error))?;
        if save.is_none() {
            self.each_table(old, |index| self.tables.write().check_unreference(image, old, index))
                .map_err(|error| self.damaged(error))?;
        }
        let kept = save.map(|new| self.write_saved_table(new, &table)).transpose()?;
        let (new, place) = self.write_l1(source, entries)?;
        self.each_table(source, |index| {
            let mut tables = self.tables.write();
            let shared = match &kept {
                None => tables.share_unless_active(image, source, index),
                // The disk's own tables become the other snapshot's, and lose no references.
                Some(_) => tables.share_for_active(image, source, index),
            };
            // A failure halfway cannot be rolled back reliably.
            shared.map_err(|error| self.poisoned_by(error))
        })?;
        match self.switch_to(new, place, size, kept)? {
            Some(kept) => {
                self.adopt_snapshot(&table, &kept)?;
                self.each_table(old, |index| self.tables.write().forget_table(image, old, index))
                    .map_err(|error| self.poisoned_by(error))?;
            }
            // The remaining clusters have the snapshot's count as well: none has become the disk's own.
            None => {
                self.unreference_l1(old, |tables, index, table| {
                    tables.unreference_unless_active(image, index, table)
                })?;
            }
        }
        self.flush()
    }

    /// Writes a snapshot table with one more entry, for the current disk.
    fn write_saved_table(&self, new: &NewSnapshot, old: &StoredSnapshots) -> Result<SavedDisk> {
        let image = &self.image;
        let size = image.cluster().size();
        let snapshot = self.describe_snapshot(new, old)?;
        let mut bytes = self.table_with(old, &snapshot)?;
        bytes.resize(bytes.len().next_multiple_of(size as usize), 0);
        let table = self.with_tables(|tables| tables.allocate_table(image, bytes.len() as u64 / size))?;
        image.file.write_at(table.clusters().start(image).0, &bytes)?;
        self.data_dirty.store(true, Ordering::Release);
        Ok(SavedDisk { snapshot, table, count: old.snapshots.len() as u32 + 1 })
    }

    /// Makes everything durable, and lets the header name the new tables. Returns the saved snapshot.
    fn switch_to(
        &self,
        new: L1Table,
        place: Option<Reservation>,
        size: u64,
        kept: Option<SavedDisk>,
    ) -> Result<Option<Snapshot>> {
        let _turn = self.flushes.turn();
        self.check_poison()?;
        self.flush_in_turn()?;
        // The header may name both from here on, even if the write's outcome is unknown.
        place.map(Reservation::commit);
        let (kept, snapshots) = match kept {
            None => (None, None),
            Some(SavedDisk { snapshot, table, count }) => {
                (Some(snapshot), Some((count, table.commit().start(&self.image))))
            }
        };
        self.name_l1(size, new, snapshots)?;
        self.tables.write().l1 = new;
        self.size.store(size, Ordering::Release);
        Ok(kept)
    }

    /// Writes a new L1 table for the snapshot's disk, without COPIED flags.
    fn write_l1(&self, source: L1Table, entries: u64) -> Result<(L1Table, Option<Reservation>)> {
        let image = &self.image;
        let size = image.cluster().size();
        if entries == 0 {
            return Ok((L1Table { offset: HostOffset(0), entries: 0 }, None));
        }
        let mut bytes = Vec::with_capacity((entries * 8).next_multiple_of(size) as usize);
        for index in 0..entries {
            let table = self.tables.write().table_of(image, source, index)?;
            let entry = table.map_or(0, |table| EntryFormat::shared(EntryFormat::owned(table)));
            bytes.extend(entry.to_be_bytes());
        }
        bytes.resize(bytes.len().next_multiple_of(size as usize), 0);
        let place = self.with_tables(|tables| tables.allocate_table(image, bytes.len() as u64 / size))?;
        let offset = place.clusters().start(image);
        image.file.write_at(offset.0, &bytes)?;
        self.data_dirty.store(true, Ordering::Release);
        Ok((L1Table { offset, entries: entries as u32 }, Some(place)))
    }
}

impl Tables {
    /// Counts the table of an entry for the active disk, too, unless the disk has it already.
    fn share_unless_active(&mut self, image: &ImageFile, l1: L1Table, index: u64) -> Result<()> {
        let table = self.table_of(image, l1, index)?;
        if table == self.table_of(image, self.l1, index)? {
            Ok(())
        } else {
            self.share_for_active(image, l1, index)
        }
    }

    /// Counts the table of an entry once more.
    fn share_for_active(&mut self, image: &ImageFile, l1: L1Table, index: u64) -> Result<()> {
        let Some(table) = self.table_of(image, l1, index)? else { return Ok(()) };
        self.roles.add(image.cluster().index(table.0), 1);
        self.share_table(image, table)
    }

    /// A table that the disk has dropped is none of its tables any more, though a snapshot has it.
    fn forget_table(&mut self, image: &ImageFile, l1: L1Table, index: u64) -> Result<()> {
        let table = self.table_of(image, l1, index)?;
        if let Some(table) = table
            && self.table_of(image, self.l1, index)? != Some(table)
        {
            self.roles.remove(image.cluster().index(table.0), 1);
        }
        Ok(())
    }

    /// Removes the active disk's references from a table that it has dropped, unless the new L1 table names
    /// it as well.
    fn unreference_unless_active(
        &mut self,
        image: &ImageFile,
        index: u64,
        table: HostOffset,
    ) -> Result<Vec<ClusterRange>> {
        if self.table_of(image, self.l1, index)? == Some(table) {
            return Ok(Vec::new());
        }
        self.roles.remove(image.cluster().index(table.0), 1);
        self.unreference_table(image, table)
    }
}
