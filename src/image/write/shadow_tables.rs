//! Undoable writing: until it is published, nothing that the image shows changes on disk.
//!
//! The writer works on a copy of the L1 table that no header names. No existing entry counts as this disk's
//! own, so a table is copied before its first change and no old cluster is written in place; clusters of the
//! old tables keep their counts. [`Qcow2Writer::publish`] makes everything durable, then lets one write
//! within the header's first sector name the copy, with the disk's size; only then do old tables and clusters
//! lose their references. [`Qcow2Writer::abandon`] frees the allocated clusters. A crash before or after that
//! write leaves clusters that nothing refers to.

use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::format::refcount::{refcount, set_refcount};
use crate::format::{EntryFormat, L1Table};
use crate::units::HostOffset;

use super::allocate::ClusterCount;
use super::cluster_roles::ClusterSet;
use super::open::read_header;
use super::qcow2::Qcow2Writer;
use super::reservation::ClusterRange;
use super::slices::TableClass;
use super::tables::{ImageFile, Tables};
use super::where_possible;

/// Number of held references before they are sorted and joined.
const KEPT: usize = 1 << 16;

/// The state of the image before the first write.
pub(super) struct ShadowTables {
    old_l1: L1Table,
    /// Clusters that were counted since and that only the new tables refer to.
    pub(super) made: ClusterSet,
    /// References that the old state of the image still holds.
    kept: HeldReferences,
}

/// References that are removed later. A cluster of compressed data has several.
struct HeldReferences {
    runs: Vec<ClusterRange>,
    tidy_at: usize,
}

impl HeldReferences {
    fn push(&mut self, cluster: u64) {
        match self.runs.last_mut() {
            Some(last) if last.first + last.count == cluster => last.count += 1,
            _ => self.runs.push(ClusterRange { first: cluster, count: 1 }),
        }
        if self.runs.len() > self.tidy_at {
            self.tidy();
        }
    }

    /// Joins contiguous ones.
    fn tidy(&mut self) {
        self.runs.sort_unstable_by_key(|run| run.first);
        let mut joined: Vec<ClusterRange> = Vec::new();
        for run in self.runs.drain(..) {
            match joined.last_mut() {
                Some(last) if last.first + last.count == run.first => last.count += run.count,
                _ => joined.push(run),
            }
        }
        self.runs = joined;
        self.tidy_at = KEPT.max(2 * self.runs.len());
    }
}

impl ShadowTables {
    fn new(old_l1: L1Table) -> Self {
        Self { old_l1, made: ClusterSet::default(), kept: HeldReferences { runs: Vec::new(), tidy_at: KEPT } }
    }

    /// Part of a table without the COPIED flags of clusters that the old state uses, too.
    pub(super) fn mask(&self, image: &ImageFile, words: &mut [u64], class: TableClass) {
        let step = match class {
            TableClass::L1 => 1,
            TableClass::L2 => (image.format.l2_entry_len() / 8) as usize,
            TableClass::RefcountBlock | TableClass::RefcountTable => return,
        };
        // M9: clusters of the old state look shared, so they are copied before they are changed.
        for word in words.iter_mut().step_by(step) {
            let is_plain = class == TableClass::L1 || !EntryFormat::is_compressed(*word);
            if is_plain && !self.made.contains(image.cluster().index(EntryFormat::raw_offset(*word))) {
                *word = EntryFormat::shared(*word);
            }
        }
    }
}

impl Tables {
    /// Records that nothing refers to a cluster any more: it is free after the next flush, or, if the old
    /// state has it, after publishing.
    pub(super) fn free_later(&mut self, cluster: u64) {
        if let Some(shadow) = &mut self.shadow
            && !shadow.made.contains(cluster)
        {
            return shadow.kept.push(cluster);
        }
        match self.pending.last_mut() {
            Some(last) if last.first + last.count == cluster => last.count += 1,
            _ => self.pending.push(ClusterRange { first: cluster, count: 1 }),
        }
    }

    /// The bytes of a table in the file, in which every cluster with a count of 1 is marked as the disk's
    /// own.
    fn with_flags(
        &mut self,
        image: &ImageFile,
        at: HostOffset,
        len: u64,
        class: TableClass,
    ) -> Result<Option<Vec<u8>>> {
        let mut bytes = vec![0; len as usize];
        image.file.read_at(at.0, &mut bytes)?;
        let entry_len = if class == TableClass::L1 { 8 } else { image.format.l2_entry_len() };
        let mut is_changed = false;
        for entry in bytes.chunks_exact_mut(entry_len as usize) {
            let word = refcount(&entry[..8], 0, 6);
            let host = EntryFormat::raw_offset(word);
            if host == 0 || class == TableClass::L2 && EntryFormat::is_compressed(word) {
                continue;
            }
            let is_own = self.count(image, image.cluster().index(host))? == 1;
            let flagged =
                if is_own { word | EntryFormat::owned(HostOffset(host)) } else { EntryFormat::shared(word) };
            is_changed |= flagged != word;
            set_refcount(&mut entry[..8], 0, 6, flagged);
        }
        Ok(is_changed.then_some(bytes))
    }
}

impl Qcow2Writer {
    /// Switches to a copy of the L1 table. No other thread has the writer yet.
    pub(super) fn begin_undoable(&self) -> Result<()> {
        let old_l1 = {
            let mut tables = self.tables.write();
            tables.shadow = Some(ShadowTables::new(tables.l1));
            // Repairs in memory must not reach the old tables.
            tables.slices.forget_class(TableClass::L1);
            tables.slices.forget_class(TableClass::L2);
            tables.l1
        };
        self.prepare()?;
        self.move_l1(old_l1.entries)
    }

    pub(super) fn is_undoable(&self) -> bool {
        self.tables.read().shadow.is_some()
    }

    /// Extends the table that no header names to `entries`; the caller holds all ranges.
    pub(super) fn extend_l1(&self, entries: u32) -> Result<()> {
        let size = self.image.cluster().size();
        {
            let mut tables = self.tables.write();
            let is_copy =
                tables.shadow.as_ref().is_some_and(|shadow| shadow.old_l1.offset != tables.l1.offset);
            // The rest of its last cluster is zeroes.
            if is_copy && u64::from(entries) * 8 <= tables.l1.len_bytes().next_multiple_of(size) {
                tables.l1.entries = entries;
                return Ok(());
            }
        }
        self.move_l1(entries)
    }

    fn move_l1(&self, entries: u32) -> Result<()> {
        if entries == 0 {
            return Ok(());
        }
        let image = &self.image;
        let size = image.cluster().size();
        let clusters = (u64::from(entries) * 8).div_ceil(size);
        let place = self.with_tables(|tables| tables.allocate(image, ClusterCount::Exactly(clusters)))?;
        let mut tables = self.tables.write();
        let old = tables.l1;
        tables.copy_l1(image, &place)?;
        let new = place.commit();
        let offset = new.start(image);
        self.data_dirty.store(true, Ordering::Release);
        tables.l1 = L1Table { offset, entries };
        tables.roles.add(new.first, clusters);
        let (first, count) = (image.cluster().index(old.offset.0), old.len_bytes().div_ceil(size));
        tables.slices.forget(old.offset.0, old.offset.0 + count * size, image.slice_len());
        if tables.shadow.as_ref().is_some_and(|shadow| shadow.made.contains(first)) {
            tables.roles.remove(first, count);
            (first..first + count).for_each(|cluster| tables.free_later(cluster));
        }
        Ok(())
    }

    /// Makes the written data the image's content.
    pub(super) fn publish(&self) -> Result<()> {
        let image = &self.image;
        // No mapping changes meanwhile; a write in place goes to clusters that were allocated for this
        // writer.
        let _all = self.ranges.hold(0, u64::MAX);
        let _turn = self.flushes.turn();
        self.check_poison()?;
        assert!(self.is_undoable(), "there is something to be published");
        self.flush_in_turn()?;
        if self.is_dirty() {
            // Clusters that were freed since are counted as free, too.
            self.flush_in_turn()?;
        }
        let l1 = self.flag_own_clusters()?;
        let header = read_header(&image.name, &*image.file)?;
        self.mark_bitmaps(&header)?;
        self.clear_unknown_features(&header)?;
        image.file.sync().map_err(|error| self.poisoned_by(error))?;

        self.name_l1(self.size(), l1, None)?;

        let freed = {
            let mut tables = self.tables.write();
            let shadow = tables.shadow.take().expect("it is undoable");
            let mut freed = shadow.kept.runs;
            let (first, count) = (
                image.cluster().index(shadow.old_l1.offset.0),
                shadow.old_l1.len_bytes().div_ceil(image.cluster().size()),
            );
            if shadow.old_l1.offset != l1.offset && count > 0 {
                freed.push(ClusterRange { first, count });
            }
            for run in &freed {
                tables.roles.remove(run.first, run.count);
            }
            // On disk the flags mark this disk's own clusters.
            tables.slices.forget_class(TableClass::L1);
            tables.slices.forget_class(TableClass::L2);
            freed
        };
        self.release(&freed).map_err(|error| self.poisoned_by(error))?;
        self.flush_in_turn()?;
        self.release_reserve()
    }

    /// Sets the COPIED flags of all new tables, in the file only: in memory, clusters of the old state must
    /// not be written in place before the header has dropped them. Returns the L1 table.
    fn flag_own_clusters(&self) -> Result<L1Table> {
        let image = &self.image;
        let l1 = self.tables.read().l1;
        for index in 0..u64::from(l1.entries) {
            let mut tables = self.tables.write();
            let Some(table) = tables.l2_table(image, index * image.l1_span())? else { continue };
            let is_made = |shadow: &ShadowTables| shadow.made.contains(image.cluster().index(table.0));
            if tables.shadow.as_ref().is_some_and(is_made)
                && let Some(bytes) =
                    tables.with_flags(image, table, image.cluster().size(), TableClass::L2)?
            {
                image.file.write_at(table.0, &bytes)?;
            }
        }
        let mut tables = self.tables.write();
        let is_copy = tables.shadow.as_ref().is_some_and(|shadow| shadow.old_l1.offset != l1.offset);
        if is_copy && let Some(bytes) = tables.with_flags(image, l1.offset, l1.len_bytes(), TableClass::L1)? {
            image.file.write_at(l1.offset.0, &bytes)?;
        }
        Ok(l1)
    }

    /// Frees all allocated clusters; the image is as it was.
    pub(super) fn abandon(&self) -> Result<()> {
        let image = &self.image;
        let _all = self.ranges.hold(0, u64::MAX);
        let _turn = self.flushes.turn();
        self.check_poison()?;
        // Readers and writers in place are done with it.
        drop(self.reuse_gate.write());
        let runs = {
            let mut tables = self.tables.write();
            tables.free_dropped(image).map_err(|error| self.poisoned_by(error))?;
            let shadow = tables.shadow.as_ref().expect("an undoable writer");
            let (runs, old_l1) = (shadow.made.runs(), shadow.old_l1);
            tables.pending.clear();
            tables.slices.forget_class(TableClass::L1);
            tables.slices.forget_class(TableClass::L2);
            tables.l1 = old_l1;
            for (first, count) in &runs {
                tables.roles.remove(*first, *count);
                let freed = ClusterRange { first: *first, count: *count };
                tables.unreference(image, freed).map_err(|error| self.poisoned_by(error))?;
            }
            runs
        };
        self.flush_in_turn()?;
        let ended = Error::new(
            ErrorKind::Poisoned,
            format!("{}: its changes were abandoned; open it again", image.name),
        );
        // The first reason stands.
        drop(self.poison.set(ended));
        let size = image.cluster().size();
        for (first, count) in runs {
            where_possible(image.file.punch_hole(first * size, count * size))?;
        }
        self.release_reserve()
    }

    /// Reserves space beyond the end of the file.
    pub(super) fn reserve(&self, bytes: u64) -> Result<()> {
        self.check_poison()?;
        let tables = self.tables.write();
        let from = tables.file_len.max(self.image.file.len()?);
        where_possible(self.image.file.reserve(from, bytes))?;
        self.reserved_end.fetch_max(from.saturating_add(bytes), Ordering::SeqCst);
        Ok(())
    }

    /// Releases the rest of that space.
    pub(super) fn release_reserve(&self) -> Result<()> {
        let end = self.reserved_end.swap(0, Ordering::SeqCst);
        if end == 0 {
            return Ok(());
        }
        // Under the lock under which the file grows.
        let tables = self.tables.write();
        let from = tables.file_len.max(self.image.file.len()?);
        super::release_behind(&*self.image.file, from, end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_references_are_joined_and_keep_their_number() {
        let mut kept = HeldReferences { runs: Vec::new(), tidy_at: 8 };
        (0..20_000u64).step_by(2).chain((1..20_000).step_by(2)).for_each(|cluster| kept.push(cluster));
        (500..510).for_each(|cluster| kept.push(cluster));
        assert!(kept.runs.len() < KEPT);
        kept.tidy();
        let counted: u64 = kept.runs.iter().map(|run| run.count).sum();
        assert_eq!(counted, 20_010);
        let twice = (0..20_000).filter(|cluster| {
            let holds = |run: &&ClusterRange| (run.first..run.first + run.count).contains(cluster);
            kept.runs.iter().filter(holds).count() == 2
        });
        assert_eq!(twice.collect::<Vec<_>>(), (500..510).collect::<Vec<_>>());
        assert!(kept.runs.len() < 5, "{:?}", kept.runs);
    }
}
