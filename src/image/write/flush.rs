//! The ordered write-back of one image.
//!
//! Everything else may change tables in memory; only this file writes them to disk, because the order in
//! which they arrive there is what a crash can see: refcounts and data, barrier, the refcount table, barrier,
//! mappings, barrier, the L1 table, barrier. Only then do freed clusters lose their references, and only
//! after a moment in which no I/O is in flight.

use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, MutexGuard};

use crate::error::{Error, ErrorKind, Result};
use crate::units::HostOffset;

use super::qcow2::Qcow2Writer;
use super::reservation::ClusterRange;
use super::slices::{Batch, CLASSES, TableClass};
use super::tables::ImageFile;

/// Bytes of adjacent slices that are written with one call, at most.
const MAX_WRITE: usize = 1 << 20;

/// Flushes, one at a time; concurrent callers share the next one.
#[derive(Default)]
pub(super) struct Flushes {
    turn: Mutex<()>,
    /// Flushes begun.
    begun: AtomicU64,
    /// The number of the last successful one.
    done: AtomicU64,
}

impl Flushes {
    /// Waits for its turn.
    pub(super) fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock()
    }
}

impl Qcow2Writer {
    /// Returns when everything written before the call is durable.
    pub(super) fn flush(&self) -> Result<()> {
        let asked = self.flushes.begun.load(Ordering::SeqCst);
        let _turn = self.flushes.turn();
        self.check_poison()?;
        // A flush that began after this call has included its writes.
        if self.flushes.done.load(Ordering::SeqCst) > asked {
            return Ok(());
        }
        self.flush_in_turn()
    }

    /// Flushes twice if necessary, so that freed clusters are counted as free on disk, too.
    pub(super) fn close(&self) -> Result<()> {
        let _turn = self.flushes.turn();
        self.check_poison()?;
        while self.is_dirty() {
            self.flush_in_turn()?;
        }
        self.release_reserve()
    }

    pub(super) fn is_dirty(&self) -> bool {
        let tables = self.tables.read();
        self.data_dirty.load(Ordering::Acquire)
            || tables.slices.is_dirty()
            || !tables.pending.is_empty()
            || !tables.dropped.is_empty()
    }

    /// The flush itself; the caller has the turn.
    pub(super) fn flush_in_turn(&self) -> Result<()> {
        if self.is_dirty() {
            // Tables that were repaired while they were only read are a first change, too.
            self.prepare()?;
        }
        let number = self.flushes.begun.fetch_add(1, Ordering::SeqCst) + 1;
        self.write_back().map_err(|error| self.poisoned_by(error))?;
        self.flushes.done.store(number, Ordering::SeqCst);
        Ok(())
    }

    fn write_back(&self) -> Result<()> {
        // M1, M4: counts and data, then the tables that name them, then the roots; a barrier after each. All
        // as of one moment: every mapping among them has its data written and its cluster counted.
        let (batches, freed) = {
            let mut tables = self.tables.write();
            tables.free_dropped(&self.image)?;
            (CLASSES.map(|class| tables.slices.take_dirty(class)), std::mem::take(&mut tables.pending))
        };
        // The first flush also makes durable what an earlier writer has left unsynced: a program that has
        // read it may rely on it.
        let is_first_flush = !self.has_synced.load(Ordering::Acquire);
        let is_data_dirty = self.data_dirty.swap(false, Ordering::AcqRel) || is_first_flush;
        for (class, batch) in CLASSES.iter().zip(&batches) {
            write_batch(&self.image, batch)?;
            let is_first = *class == TableClass::RefcountBlock;
            if is_first
                && is_data_dirty
                && let Some(data_file) = &self.image.data_file
            {
                data_file.sync()?;
            }
            if !batch.is_empty()
                || (is_first && (is_first_flush || is_data_dirty && self.image.data_file.is_none()))
            {
                // The kernel may have dropped pages that it could not write, and still show them.
                self.image
                    .file
                    .sync()
                    .inspect_err(|_| self.has_lost_writes.store(true, Ordering::Release))?;
            }
            self.tables.write().slices.written(batch);
        }
        self.has_synced.store(true, Ordering::Release);
        self.release(&freed)
    }

    /// Removes the references of freed clusters, now that nothing on disk refers to them.
    pub(super) fn release(&self, freed: &[ClusterRange]) -> Result<()> {
        if freed.is_empty() {
            return Ok(());
        }
        // M5: no mapping on disk names them any more; after the gate, no I/O of an old lookup is in flight. A
        // lookup from before the free is finished once the gate was held exclusively.
        drop(self.reuse_gate.write());
        let mut tables = self.tables.write();
        for freed in freed {
            tables.unreference(&self.image, *freed)?;
        }
        Ok(())
    }

    /// Replaces the refcount table of `entries` entries by a larger one.
    pub(super) fn grow_refcount_table(&self, entries: u64) -> Result<()> {
        let _turn = self.flushes.turn();
        self.check_poison()?;
        let mut tables = self.tables.write();
        if tables.refcount_table_entries(&self.image) != entries {
            return Ok(()); // another thread has been faster
        }
        tables.free_dropped(&self.image).map_err(|error| self.damaged(error))?;
        let growth = tables.plan_refcount_table(&self.image).map_err(|error| self.damaged(error))?;
        // Until the header names the new table nothing has changed: a failure has no consequence.
        growth.write(&self.image)?;
        let blocks = tables.slices.take_dirty(TableClass::RefcountBlock);
        let table = tables.slices.take_dirty(TableClass::RefcountTable);
        let switched = (|| {
            write_batch(&self.image, &blocks)?;
            self.image.file.sync()?;
            growth.switch(&self.image)?;
            self.image.file.sync()
        })();
        switched.map_err(|error| self.poisoned_by(error))?;
        tables.slices.written(&blocks);
        tables.slices.written(&table);
        tables.adopt(&self.image, &growth).map_err(|error| self.poisoned_by(error))
    }

    /// Records that tables or data could not be made durable: nothing is written any more.
    #[expect(clippy::needless_pass_by_value, reason = "for map_err")]
    pub(super) fn poisoned_by(&self, error: Error) -> Error {
        let first = self.poison.get_or_init(|| {
            let kind =
                if error.kind() == ErrorKind::Corrupt { ErrorKind::Corrupt } else { ErrorKind::Poisoned };
            let sentence = "nothing more is written to it until it is opened again; earlier flushes are safe";
            let poison = Error::new(kind, format!("{}: {error}; {sentence}", self.image.name));
            tracing::error!("{poison}");
            poison
        });
        first.clone()
    }

    /// The reason why nothing is written, if there is one.
    pub(super) fn check_poison(&self) -> Result<()> {
        // M7: checked before each write.
        self.poison.get().map_or(Ok(()), |poison| Err(poison.clone()))
    }
}

/// Writes slices, adjacent ones together.
fn write_batch(image: &ImageFile, batch: &Batch) -> Result<()> {
    let slice_len = image.slice_len();
    let mut bytes: Vec<u8> = Vec::new();
    let mut start = HostOffset(0);
    for (place, words) in batch {
        let is_next = start.0 + bytes.len() as u64 == *place;
        if !bytes.is_empty() && (!is_next || bytes.len() >= MAX_WRITE) {
            image.file.write_table_at(start.0, &bytes)?;
            bytes.clear();
        }
        if bytes.is_empty() {
            start = HostOffset(*place);
        }
        debug_assert_eq!(words.len() as u64 * 8, slice_len);
        bytes.extend(words.iter().flat_map(|word| word.to_be_bytes()));
    }
    if bytes.is_empty() { Ok(()) } else { image.file.write_table_at(start.0, &bytes) }
}
