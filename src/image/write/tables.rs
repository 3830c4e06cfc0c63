//! The tables of the image that is being written: their current state, on disk or not.
//!
//! Everything here happens under one lock, which is held for a lookup or a change, never for guest
//! data. A table that is not in memory is read under it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::RefcountTable;
use crate::format::refcount::{block_entries, refcount, table_entry};
use crate::format::{EntryFormat, L1Table, L2Entry, Malformed, Mapping, RawL2Entry, Snapshot};
use crate::image::cursor::{self, SLICE_LEN, TableSource, words_of};
use crate::io::WriteStorage;
use crate::units::{ClusterBits, HostOffset, Run};

use super::cluster_roles::ClusterRoles;
use super::reservation::{ClusterRange, DroppedReservations};
use super::shadow_tables::ShadowTables;
use super::slices::{Slices, TableClass};

/// The constant properties of an image that is open for writing.
pub(super) struct ImageFile {
    pub(super) name: String,
    pub(super) file: Arc<dyn WriteStorage>,
    /// Holds the guest's data instead of `file`, each cluster at its guest offset.
    pub(super) data_file: Option<Arc<dyn WriteStorage>>,
    pub(super) format: EntryFormat,
    /// Refcounts are `1 << order` bits wide.
    pub(super) order: u32,
    /// See [`ImageFile::has_snapshots`].
    pub(super) has_snapshots: AtomicBool,
}

impl ImageFile {
    pub(super) fn cluster(&self) -> ClusterBits {
        self.format.cluster
    }

    /// Whether clusters may be shared: COPIED flags are then verified before use, and reading may repair
    /// them. Ends with the last internal snapshot.
    pub(super) fn has_snapshots(&self) -> bool {
        self.has_snapshots.load(Ordering::Acquire)
    }

    pub(super) fn slice_len(&self) -> u64 {
        SLICE_LEN.min(self.cluster().size())
    }

    /// The file of guest data.
    pub(super) fn data(&self) -> &Arc<dyn WriteStorage> {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// Bytes of disk behind one L1 entry.
    pub(super) fn l1_span(&self) -> u64 {
        self.format.l1_span()
    }

    /// The fields of an entry that matter to a writer: whether data is this disk's alone; preallocated
    /// clusters do not matter.
    fn relevant(&self, entry: L2Entry) -> L2Entry {
        match entry.mapping {
            // A data file belongs to one disk alone.
            Mapping::Data(_) => L2Entry { copied: entry.copied || self.data_file.is_some(), ..entry },
            Mapping::Zero(_) => L2Entry { mapping: Mapping::Zero(None), copied: false },
            Mapping::Compressed(_) | Mapping::Hole => L2Entry { copied: false, ..entry },
        }
    }

    fn corrupt_l2(&self, at: u64, reason: &Malformed) -> Error {
        self.corrupt(format_args!("the L2 entry of guest offset {at:#x}: {}", reason.fact()))
    }

    /// How many of `len` bytes from `at` on one L2 table maps.
    pub(super) fn rest_of_table(&self, at: u64, len: u64) -> u64 {
        let span = self.l1_span();
        len.min(span - at % span)
    }

    pub(super) fn corrupt(&self, fact: impl std::fmt::Display) -> Error {
        Error::new(
            ErrorKind::Corrupt,
            format!("{}: {fact}; unmount it and run chainfs check --repair all", self.name),
        )
    }
}

/// Why a lookup has no answer.
pub(super) enum LookupMiss {
    /// The tables have to be loaded first.
    NotLoaded,
    /// There is none.
    Failed(Error),
}

/// The fields of an internal snapshot that filling needs.
#[derive(Clone, Debug)]
pub(super) struct SnapshotRoot {
    pub(super) name: Vec<u8>,
    pub(super) l1: L1Table,
    /// Bytes of its disk; `None`: as many as the active one has.
    pub(super) size: Option<u64>,
}

impl SnapshotRoot {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        Self { name: snapshot.name.clone(), l1: snapshot.l1, size: snapshot.virtual_size }
    }
}

/// The tables and the state of the file.
pub(super) struct Tables {
    pub(super) l1: L1Table,
    pub(super) refcount_table: RefcountTable,
    pub(super) slices: Slices,
    pub(super) roles: ClusterRoles,
    /// No cluster before this one is free.
    pub(super) free_hint: u64,
    /// Clusters from here on have never been used: the file has zeroes there.
    pub(super) fresh: u64,
    /// Length of the file, as this writer has set it.
    pub(super) file_len: u64,
    /// Clusters that the next flush frees once its mappings are durable: each loses one reference.
    pub(super) pending: Vec<ClusterRange>,
    /// Reservations whose clusters are still counted.
    pub(super) dropped: Arc<DroppedReservations>,
    /// The internal snapshots, as the header names them.
    pub(super) snapshots: Vec<SnapshotRoot>,
    /// Whether there are others, whose tables are unknown.
    pub(super) has_damaged_snapshots: bool,
    /// The old state of the image, in undoable mode.
    pub(super) shadow: Option<ShadowTables>,
}

impl Tables {
    /// The slice that holds byte `at` of the file, and the index of the word; read from the file if
    /// necessary.
    pub(super) fn slice(
        &mut self,
        image: &ImageFile,
        at: u64,
        class: TableClass,
    ) -> Result<(Arc<[u64]>, usize)> {
        let place = at - at % image.slice_len();
        let index = ((at - place) / 8) as usize;
        if let Some(words) = self.slices.get(place) {
            return Ok((Arc::clone(words), index));
        }
        let mut bytes = vec![0; image.slice_len() as usize];
        let have = image.file.read_at(place, &mut bytes)?;
        // The last table of a file may end with the file; missing bytes are zero.
        if at >= place + have as u64 && at >= self.file_len {
            return Err(image.corrupt(format_args!("a table at {at:#x} lies past the end of the file")));
        }
        let mut words = words_of(&bytes);
        if let Some(shadow) = &self.shadow {
            shadow.mask(image, Arc::make_mut(&mut words), class);
        }
        let may_contradict = class == TableClass::L2 && image.has_snapshots() && self.shadow.is_none();
        let repaired = if may_contradict { self.repair_flags_in(image, &words)? } else { None };
        self.slices.insert(place, class, Arc::clone(&words));
        let Some(repaired) = repaired else { return Ok((words, index)) };
        self.slices.change(place).expect("it was just kept").copy_from_slice(&repaired);
        Ok((repaired, index))
    }

    /// Part of an L2 table without the COPIED flags that contradict the counts, if there are any. A crash
    /// while an internal snapshot was taken leaves such flags; using them would change snapshots.
    fn repair_flags_in(&mut self, image: &ImageFile, words: &[u64]) -> Result<Option<Arc<[u64]>>> {
        let mut repaired: Option<Arc<[u64]>> = None;
        for index in (0..words.len()).step_by((image.format.l2_entry_len() / 8) as usize) {
            let word = words[index];
            let host = EntryFormat::raw_offset(word);
            let is_own = EntryFormat::copied(word) && !EntryFormat::is_compressed(word) && host != 0;
            if is_own && self.count(image, image.cluster().index(host))? != 1 {
                let repaired = repaired.get_or_insert_with(|| words.into());
                Arc::make_mut(repaired)[index] = EntryFormat::shared(word);
            }
        }
        Ok(repaired)
    }

    pub(super) fn word(&mut self, image: &ImageFile, at: u64, class: TableClass) -> Result<u64> {
        let (words, index) = self.slice(image, at, class)?;
        Ok(words[index])
    }

    pub(super) fn set_word(
        &mut self,
        image: &ImageFile,
        at: u64,
        class: TableClass,
        value: u64,
    ) -> Result<()> {
        if self.word(image, at, class)? != value {
            let place = at - at % image.slice_len();
            self.slices.change(place).expect("it was just read")[((at - place) / 8) as usize] = value;
        }
        Ok(())
    }

    /// The first `entries` of a table, as they are in memory, as bytes.
    pub(super) fn table_bytes(
        &mut self,
        image: &ImageFile,
        at: HostOffset,
        entries: u64,
        class: TableClass,
    ) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(entries as usize * 8);
        for index in 0..entries {
            bytes.extend(self.word(image, at.0 + index * 8, class)?.to_be_bytes());
        }
        Ok(bytes)
    }

    // Refcounts.

    /// The block that counts `cluster`; `None` if there is none yet.
    pub(super) fn refcount_block(&mut self, image: &ImageFile, cluster: u64) -> Result<Option<HostOffset>> {
        let index = cluster / block_entries(image.cluster(), image.order);
        if index < self.refcount_table_entries(image) { self.block_of_entry(image, index) } else { Ok(None) }
    }

    /// The block that an entry of the refcount table names.
    pub(super) fn block_of_entry(&mut self, image: &ImageFile, index: u64) -> Result<Option<HostOffset>> {
        let entry = self.word(image, self.refcount_table.offset.0 + index * 8, TableClass::RefcountTable)?;
        table_entry(entry, image.cluster()).map_err(|reason| image.corrupt(reason.fact()))
    }

    pub(super) fn refcount_table_entries(&self, image: &ImageFile) -> u64 {
        u64::from(self.refcount_table.clusters) * image.cluster().size() / 8
    }

    /// The location of the count of `cluster` in its block: the word, and the index in that word.
    pub(super) fn count_place(image: &ImageFile, block: HostOffset, cluster: u64) -> (u64, usize) {
        let index = cluster % block_entries(image.cluster(), image.order);
        let per_word = 64 >> image.order;
        (block.0 + index / per_word * 8, (index % per_word) as usize)
    }

    /// The number of references of a cluster.
    pub(super) fn count(&mut self, image: &ImageFile, cluster: u64) -> Result<u64> {
        let Some(block) = self.refcount_block(image, cluster)? else { return Ok(0) };
        let (at, index) = Self::count_place(image, block, cluster);
        let word = self.word(image, at, TableClass::RefcountBlock)?;
        Ok(refcount(&word.to_be_bytes(), index, image.order))
    }

    // Mappings.

    /// The entry for `at`, for at most `max` bytes, as far as the tables are in memory.
    pub(super) fn map(
        &self,
        image: &ImageFile,
        at: u64,
        max: u64,
    ) -> std::result::Result<Run<L2Entry>, LookupMiss> {
        cursor::lookup(&CachedTables { image, tables: self }, at, max)
    }

    /// Checks that an entry names possible data: clusters that the file has, and that hold no table. `len` is
    /// at least 1.
    pub(super) fn may_be_data(&self, image: &ImageFile, host: HostOffset, len: u64) -> Result<()> {
        if image.data_file.is_some() {
            return Ok(());
        }
        let (first, last) = (image.cluster().index(host.0), image.cluster().index(host.0 + len - 1));
        self.may_be_clusters(image, ClusterRange { first, count: last - first + 1 })
    }

    pub(super) fn may_be_clusters(&self, image: &ImageFile, clusters: ClusterRange) -> Result<()> {
        let (first, end) = (clusters.first, clusters.first + clusters.count);
        if end > self.fresh {
            return Err(
                image.corrupt(format_args!("a data cluster at {first:#x} lies past the end of the file"))
            );
        }
        // M3: a table is never data.
        match (first..end).find(|cluster| self.roles.contains(*cluster)) {
            Some(table) => {
                Err(image.corrupt(format_args!("cluster {table:#x} is named as data, but holds a table")))
            }
            None => Ok(()),
        }
    }

    /// Loads the tables that [`Tables::map`] missed.
    pub(super) fn load(&mut self, image: &ImageFile, at: u64) -> Result<()> {
        if let Some(table) = self.l2_table(image, at)? {
            self.slice(image, Self::l2_place(image, table, at), TableClass::L2)?;
        }
        Ok(())
    }

    /// The file offset of an offset's L1 entry.
    pub(super) fn l1_place(&self, image: &ImageFile, at: u64) -> u64 {
        let index = at / image.l1_span();
        assert!(index < u64::from(self.l1.entries), "a position that the L1 table covers");
        self.l1.offset.0 + index * 8
    }

    /// The file offset of an offset's L2 entry.
    pub(super) fn l2_place(image: &ImageFile, table: HostOffset, at: u64) -> u64 {
        table.0 + image.cluster().index(at) % image.format.l2_entries() * image.format.l2_entry_len()
    }

    /// The L2 table of an offset.
    pub(super) fn l2_table(&mut self, image: &ImageFile, at: u64) -> Result<Option<HostOffset>> {
        self.table_of(image, self.l1, at / image.l1_span())
    }

    /// The L2 table that an entry of any L1 table names; none beyond its end.
    pub(super) fn table_of(
        &mut self,
        image: &ImageFile,
        l1: L1Table,
        index: u64,
    ) -> Result<Option<HostOffset>> {
        if index >= u64::from(l1.entries) {
            return Ok(None);
        }
        let word = self.word(image, l1.offset.0 + index * 8, TableClass::L1)?;
        image.format.l1(word).map(|entry| entry.l2).map_err(|reason| image.corrupt(reason.fact()))
    }

    /// The L2 entry of an offset; unallocated without a table.
    pub(super) fn entry(&mut self, image: &ImageFile, at: u64) -> Result<RawL2Entry> {
        let table = self.l2_table(image, at)?;
        self.entry_in(image, table, at)
    }

    /// Sets the L2 entry of an offset, whose table may be written (see `own_l2_table`).
    pub(super) fn set_entry(&mut self, image: &ImageFile, at: u64, words: RawL2Entry) -> Result<()> {
        let table = self.l2_table(image, at)?.expect("a table that was made ready");
        self.set_entry_in(image, table, at, words)
    }

    /// Records that an entry no longer refers to the clusters of `words` (see `free_later`).
    pub(super) fn release(&mut self, image: &ImageFile, words: RawL2Entry) -> Result<()> {
        if let Some(freed) = references(image, words) {
            self.may_be_clusters(image, freed)?;
            (freed.first..freed.first + freed.count).for_each(|cluster| self.free_later(cluster));
        }
        Ok(())
    }
}

/// The clusters that an entry refers to.
pub(super) fn references(image: &ImageFile, words: RawL2Entry) -> Option<ClusterRange> {
    if image.data_file.is_some() {
        return None;
    }
    if EntryFormat::is_compressed(words.entry) {
        let stream = image.format.raw_compressed(words.entry);
        let first = image.cluster().index(stream.at.0);
        let last = image.cluster().index(stream.at.0 + u64::from(stream.len) - 1);
        return Some(ClusterRange { first, count: last - first + 1 });
    }
    match EntryFormat::raw_offset(words.entry) {
        0 => None,
        host => Some(ClusterRange { first: image.cluster().index(host), count: 1 }),
    }
}

/// The meaning of an entry for `at`, at most to the end of the cluster.
pub(super) fn entry_run(image: &ImageFile, raw: RawL2Entry, at: u64) -> Result<Run<L2Entry>> {
    let found = image.format.l2_run(raw, at).map_err(|reason| image.corrupt_l2(at, &reason))?;
    Ok(found.map(|entry| image.relevant(entry)))
}

/// The active tables, as far as they are in memory.
struct CachedTables<'a> {
    image: &'a ImageFile,
    tables: &'a Tables,
}

impl<'a> CachedTables<'a> {
    fn slice(&self, at: u64) -> std::result::Result<(&'a [u64], usize), LookupMiss> {
        let place = at - at % self.image.slice_len();
        let words = self.tables.slices.get(place).ok_or(LookupMiss::NotLoaded)?;
        Ok((words, ((at - place) / 8) as usize))
    }
}

impl<'a> TableSource for CachedTables<'a> {
    type Words = &'a [u64];
    type Miss = LookupMiss;

    fn format(&self) -> EntryFormat {
        self.image.format
    }

    fn l1(&self) -> L1Table {
        self.tables.l1
    }

    fn l1_slice(&self, index: u64) -> std::result::Result<(&'a [u64], usize), LookupMiss> {
        self.slice(self.tables.l1.offset.0 + index * 8)
    }

    fn l2_slice(&self, table: HostOffset, index: u64) -> std::result::Result<(&'a [u64], usize), LookupMiss> {
        self.slice(table.0 + index * 8)
    }

    fn bad_l1(&self, _at: u64, reason: Malformed) -> LookupMiss {
        LookupMiss::Failed(self.image.corrupt(reason.fact()))
    }

    fn bad_l2(&self, at: u64, reason: Malformed) -> LookupMiss {
        LookupMiss::Failed(self.image.corrupt_l2(at, &reason))
    }

    fn relevant(&self, entry: L2Entry) -> L2Entry {
        self.image.relevant(entry)
    }
}
