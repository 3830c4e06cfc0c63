//! Internal snapshots, deleted while the disk is read and written.
//!
//! One write of 20 bytes within the header's first sector names a table without the entry; only then do the
//! clusters of the snapshot lose their references. A crash before that leaves the snapshot; afterwards it
//! leaves leaks, and COPIED flags that are missing where a count is 1 by then (see [`super::unfinished`]).

use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::format::feature;
use crate::format::snapshot::without;
use crate::format::{L1Table, Snapshot};
use crate::units::HostOffset;

use super::Writer;
use super::qcow2::Qcow2Writer;
use super::reservation::{ClusterRange, Reservation};
use super::snapshot::StoredSnapshots;
use super::tables::Tables;

impl Writer {
    /// Deletes an internal snapshot, one of [`Writer::snapshots`], during reads and writes of the disk, and
    /// frees its space. The snapshot must not be open. It is gone durably when this returns.
    ///
    /// Refused: `Unsupported` (a raw image, an external data file), `Stale` (it has no such snapshot),
    /// `Corrupt` (its clusters are not counted). A failure after the point of no return poisons the disk.
    ///
    /// # Panics
    /// In undoable mode.
    pub fn delete_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        self.with_snapshots()?.delete(snapshot)
    }
}

impl Qcow2Writer {
    pub(super) fn delete_snapshot(&self, snapshot: &Snapshot) -> Result<()> {
        let image = &self.image;
        assert!(!self.is_undoable(), "what is written can be undone");
        self.refuse_data_file()?;
        self.prepare()?;
        // No mapping changes from here on; writes in place continue.
        let _all = self.ranges.hold(0, u64::MAX);
        // Pending references have been removed: counts have their final values.
        self.flush()?;
        let old = self.snapshot_table()?;
        let index = self.find_snapshot(&old, snapshot)?;
        if let Some(damage) = &snapshot.damage {
            let fact =
                format!("its internal snapshot cannot be deleted, since its clusters are unknown: {damage}");
            return Err(Error::new(ErrorKind::Corrupt, format!("{}: {fact}", image.name)));
        }
        self.each_table(snapshot.l1, |index| {
            self.tables.write().check_unreference(image, snapshot.l1, index)
        })
        .map_err(|error| self.damaged(error))?;
        let table = without(&old.bytes, old.snapshots.len() as u32, index);
        let bits = self.finished_bits()?;
        let place = self.place_table(table)?;
        self.switch_to_smaller_table(&old, index, place, bits)?;
        let left = self.unreference_l1(snapshot.l1, |tables, index, table| {
            let freed = tables.unreference_table(image, table)?;
            tables.flag_own(image, index)?;
            Ok(freed)
        });
        // Freed clusters are free on disk, too.
        left.and_then(|()| self.flush()).inspect_err(|_| self.repair_unfinished())?;
        self.clear_unfinished(bits)
    }

    /// The index of a snapshot in the table.
    pub(super) fn find_snapshot(&self, table: &StoredSnapshots, snapshot: &Snapshot) -> Result<usize> {
        let is_it = |found: &Snapshot| {
            (&found.id, &found.name, found.l1) == (&snapshot.id, &snapshot.name, snapshot.l1)
        };
        table.snapshots.iter().position(is_it).ok_or_else(|| {
            let name = String::from_utf8_lossy(&snapshot.name).into_owned();
            let fact = format!("its internal snapshot \"{}\" was removed or replaced", name.escape_debug());
            Error::new(ErrorKind::Stale, format!("{}: {fact}", self.image.name))
        })
    }

    /// Calls `work` for each entry of an L1 table, and writes tables back where they become too many.
    pub(super) fn each_table(&self, l1: L1Table, mut work: impl FnMut(u64) -> Result<()>) -> Result<()> {
        for index in 0..u64::from(l1.entries) {
            work(index)?;
            self.write_back_if_pressed()?;
        }
        Ok(())
    }

    /// Writes a snapshot table to new clusters; an empty one needs none.
    fn place_table(&self, mut table: Vec<u8>) -> Result<Option<Reservation>> {
        if table.is_empty() {
            return Ok(None);
        }
        let image = &self.image;
        let size = image.cluster().size();
        table.resize(table.len().next_multiple_of(size as usize), 0);
        let place = self.with_tables(|tables| tables.allocate_table(image, table.len() as u64 / size))?;
        image.file.write_at(place.clusters().start(image).0, &table)?;
        self.data_dirty.store(true, Ordering::Release);
        Ok(Some(place))
    }

    /// Lets the header name the table without the entry, and frees the old one.
    fn switch_to_smaller_table(
        &self,
        old: &StoredSnapshots,
        index: usize,
        place: Option<Reservation>,
        bits: Option<u64>,
    ) -> Result<()> {
        let image = &self.image;
        let _turn = self.flushes.turn();
        self.check_poison()?;
        self.flush_in_turn()?;
        // From here on counts are lowered, and missing flags are set.
        let bits = bits.map(|bits| bits | feature::DIRTY);
        let at = place.map_or(HostOffset(0), |place| place.commit().start(image));
        self.name_snapshots(old.snapshots.len() as u32 - 1, at, bits)?;
        let mut tables = self.tables.write();
        // The clusters of damaged ones are unknown here.
        tables
            .snapshots
            .remove(old.snapshots[..index].iter().filter(|snapshot| snapshot.damage.is_none()).count());
        let table = old.clusters(image);
        tables.roles.remove(table.first, table.count);
        tables.unreference(image, table).map_err(|error| self.poisoned_by(error))
    }

    /// Frees an L1 table that the header no longer names; `leave` removes the references of its entries'
    /// clusters, and returns the freed ones. A failure halfway cannot be rolled back.
    pub(super) fn unreference_l1(
        &self,
        l1: L1Table,
        leave: impl Fn(&mut Tables, u64, HostOffset) -> Result<Vec<ClusterRange>>,
    ) -> Result<()> {
        let image = &self.image;
        let size = image.cluster().size();
        // A lookup from before is finished once the gate was held exclusively.
        drop(self.reuse_gate.write());
        self.each_table(l1, |index| {
            let mut tables = self.tables.write();
            let table = tables.table_of(image, l1, index).map_err(|error| self.poisoned_by(error))?;
            let Some(table) = table else { return Ok(()) };
            let freed = leave(&mut tables, index, table).map_err(|error| self.poisoned_by(error))?;
            drop(tables);
            self.punch(&freed);
            Ok(())
        })?;
        let own =
            ClusterRange { first: image.cluster().index(l1.offset.0), count: l1.len_bytes().div_ceil(size) };
        let mut tables = self.tables.write();
        tables.slices.forget(l1.offset.0, l1.offset.0 + own.count * size, image.slice_len());
        tables.roles.remove(own.first, own.count);
        let has_some = tables.has_damaged_snapshots || !tables.snapshots.is_empty();
        image.has_snapshots.store(has_some, Ordering::Release);
        tables.unreference(image, own).map_err(|error| self.poisoned_by(error))
    }
}
