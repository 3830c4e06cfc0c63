//! The tables of the image that is written: what they say now, whether or not it is on disk yet.
//!
//! Everything here happens under one lock, which is held for a lookup or a change, never for guest
//! data. A table that is not in memory is read under it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::RefcountTable;
use crate::format::refcount::{block_entries, refcount, table_entry};
use crate::format::subcluster::SUBCLUSTERS;
use crate::format::{Compressed, EntryFormat, Mapping, Snapshot, Table};
use crate::io::WriteStorage;
use crate::units::{ClusterBits, GuestOffset, HostOffset};

use super::cluster_roles::ClusterRoles;
use super::shadow_tables::ShadowTables;
use super::slices::{Class, Slices};

/// Bytes of a slice; tables of smaller clusters have one slice a cluster.
const SLICE_LEN: u64 = 4096;

/// What does not change while an image is open for writing.
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

    /// Whether clusters may be shared: COPIED flags are then looked at before they are believed, and
    /// reading may mend them. Ends with the last internal snapshot.
    pub(super) fn has_snapshots(&self) -> bool {
        self.has_snapshots.load(Ordering::Acquire)
    }

    pub(super) fn slice_len(&self) -> u64 {
        SLICE_LEN.min(self.cluster().size())
    }

    /// Where guest data goes.
    pub(super) fn data(&self) -> &Arc<dyn WriteStorage> {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// Bytes of disk behind one L1 entry.
    pub(super) fn l1_span(&self) -> u64 {
        self.cluster().size() * self.format.l2_entries()
    }

    /// How much of `len` bytes from `at` on one L2 table maps.
    pub(super) fn rest_of_table(&self, at: u64, len: u64) -> u64 {
        let span = self.l1_span();
        len.min(span - at % span)
    }

    pub(super) fn corrupt(&self, fact: impl std::fmt::Display) -> Error {
        Error::new(ErrorKind::Corrupt, format!("{}: {fact}; unmount it and run chainfs check --repair all", self.name))
    }
}

/// An L2 entry as it stands; the second word only with extended L2 entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct RawL2Entry {
    pub(super) entry: u64,
    pub(super) bitmap: u64,
}

/// Where the bytes of a piece of the disk are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Piece {
    /// In the data file, and nobody else refers to them: they may be overwritten.
    Own(HostOffset),
    /// In the data file, shared with an internal snapshot.
    Shared(HostOffset),
    /// They are zeroes.
    Zero,
    /// In a compressed cluster.
    Compressed(Compressed),
    /// In the layers below.
    Below,
}

/// What of an internal snapshot its filling needs.
#[derive(Clone, Debug)]
pub(super) struct SnapshotRoot {
    pub(super) name: Vec<u8>,
    pub(super) l1: Table,
    /// Bytes of its disk; `None`: as many as the active one has.
    pub(super) size: Option<u64>,
}

impl SnapshotRoot {
    pub(super) fn of(snapshot: &Snapshot) -> Self {
        Self { name: snapshot.name.clone(), l1: snapshot.l1, size: snapshot.virtual_size }
    }
}

/// What the next flush, once its mappings are durable, makes free.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Freed {
    /// The first cluster of the file.
    pub(super) first: u64,
    /// Clusters; each loses one reference.
    pub(super) count: u64,
}

/// The tables and what is known of the file.
pub(super) struct Tables {
    pub(super) l1: Table,
    pub(super) refcount_table: RefcountTable,
    pub(super) slices: Slices,
    pub(super) roles: ClusterRoles,
    /// No cluster before this one is free.
    pub(super) free_hint: u64,
    /// Clusters from here on have never been used: what the file has of them are zeroes.
    pub(super) fresh: u64,
    /// Bytes of the file, as this writer has made it.
    pub(super) file_len: u64,
    pub(super) pending: Vec<Freed>,
    /// The internal snapshots, as the header names them.
    pub(super) snapshots: Vec<SnapshotRoot>,
    /// Whether there are others, whose tables cannot be found.
    pub(super) has_damaged_snapshots: bool,
    /// The image as it was, while what is written can be undone.
    pub(super) shadow: Option<ShadowTables>,
}

impl Tables {
    /// The slice that holds byte `at` of the file, if it is in memory, and the index of the word.
    fn cached(&self, image: &ImageFile, at: u64) -> Option<(&Arc<[u64]>, usize)> {
        let place = at - at % image.slice_len();
        self.slices.get(place).map(|words| (words, ((at - place) / 8) as usize))
    }

    /// The same, read from the file if need be.
    pub(super) fn slice(&mut self, image: &ImageFile, at: u64, class: Class) -> Result<(Arc<[u64]>, usize)> {
        let place = at - at % image.slice_len();
        let index = ((at - place) / 8) as usize;
        if let Some(words) = self.slices.get(place) {
            return Ok((Arc::clone(words), index));
        }
        let mut bytes = vec![0; image.slice_len() as usize];
        let have = image.file.read_at(place, &mut bytes)?;
        // The last table of a file may end with the file; what is missing of it is zero.
        if at >= place + have as u64 && at >= self.file_len {
            return Err(image.corrupt(format_args!("a table at {at:#x} lies past the end of the file")));
        }
        let mut words: Arc<[u64]> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect();
        if let Some(shadow) = &self.shadow {
            shadow.mask(image, Arc::make_mut(&mut words), class);
        }
        let may_lie = class == Class::L2 && image.has_snapshots() && self.shadow.is_none();
        let mended = if may_lie { self.mend(image, &words)? } else { None };
        self.slices.insert(place, class, Arc::clone(&words));
        let Some(mended) = mended else { return Ok((words, index)) };
        self.slices.change(place).expect("it was just kept").copy_from_slice(&mended);
        Ok((mended, index))
    }

    /// Part of an L2 table without the COPIED flags that its clusters' counts belie, if there are any. A
    /// crash while an internal snapshot was taken leaves such; believing them would change snapshots.
    fn mend(&mut self, image: &ImageFile, words: &[u64]) -> Result<Option<Arc<[u64]>>> {
        let mut mended: Option<Arc<[u64]>> = None;
        for index in (0..words.len()).step_by((image.format.l2_entry_len() / 8) as usize) {
            let word = words[index];
            let host = EntryFormat::raw_offset(word);
            let is_own = EntryFormat::copied(word) && !EntryFormat::is_compressed(word) && host != 0;
            if is_own && self.count(image, image.cluster().index(host))? != 1 {
                let mended = mended.get_or_insert_with(|| words.into());
                Arc::make_mut(mended)[index] = EntryFormat::shared(word);
            }
        }
        Ok(mended)
    }

    pub(super) fn word(&mut self, image: &ImageFile, at: u64, class: Class) -> Result<u64> {
        let (words, index) = self.slice(image, at, class)?;
        Ok(words[index])
    }

    pub(super) fn set_word(&mut self, image: &ImageFile, at: u64, class: Class, value: u64) -> Result<()> {
        if self.word(image, at, class)? != value {
            let place = at - at % image.slice_len();
            self.slices.change(place).expect("it was just read")[((at - place) / 8) as usize] = value;
        }
        Ok(())
    }

    /// The first `entries` of a table, as they stand in memory, as bytes.
    pub(super) fn table_bytes(
        &mut self,
        image: &ImageFile,
        at: HostOffset,
        entries: u64,
        class: Class,
    ) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(entries as usize * 8);
        for index in 0..entries {
            bytes.extend(self.word(image, at.0 + index * 8, class)?.to_be_bytes());
        }
        Ok(bytes)
    }

    // Refcounts.

    /// The block that counts `cluster`; `None` where there is none yet.
    pub(super) fn refcount_block(&mut self, image: &ImageFile, cluster: u64) -> Result<Option<HostOffset>> {
        let index = cluster / block_entries(image.cluster(), image.order);
        if index < self.refcount_table_entries(image) { self.block_of_entry(image, index) } else { Ok(None) }
    }

    /// The block that an entry of the refcount table names.
    pub(super) fn block_of_entry(&mut self, image: &ImageFile, index: u64) -> Result<Option<HostOffset>> {
        let entry = self.word(image, self.refcount_table.offset.0 + index * 8, Class::RefcountTable)?;
        table_entry(entry, image.cluster()).map_err(|reason| image.corrupt(reason.fact()))
    }

    pub(super) fn refcount_table_entries(&self, image: &ImageFile) -> u64 {
        u64::from(self.refcount_table.clusters) * image.cluster().size() / 8
    }

    /// Where the count of `cluster` stands in its block: the word, and which count of that word.
    pub(super) fn count_place(image: &ImageFile, block: HostOffset, cluster: u64) -> (u64, usize) {
        let index = cluster % block_entries(image.cluster(), image.order);
        let per_word = 64 >> image.order;
        (block.0 + index / per_word * 8, (index % per_word) as usize)
    }

    /// How many references a cluster has.
    pub(super) fn count(&mut self, image: &ImageFile, cluster: u64) -> Result<u64> {
        let Some(block) = self.refcount_block(image, cluster)? else { return Ok(0) };
        let (at, index) = Self::count_place(image, block, cluster);
        let word = self.word(image, at, Class::RefcountBlock)?;
        Ok(refcount(&word.to_be_bytes(), index, image.order))
    }

    // Mappings.

    /// The L2 table of a position of the disk: `Ok(None)` where there is none, `Err(())` where
    /// the L1 entry is not in memory.
    fn cached_table(&self, image: &ImageFile, at: u64) -> std::result::Result<Result<Option<HostOffset>>, ()> {
        let index = at / image.l1_span();
        if index >= u64::from(self.l1.entries) {
            return Ok(Ok(None));
        }
        let (words, within) = self.cached(image, self.l1.offset.0 + index * 8).ok_or(())?;
        Ok(image.format.l1(words[within]).map(|entry| entry.l2).map_err(|reason| image.corrupt(reason.fact())))
    }

    /// What the tables say of `at`, for at most `max` bytes. `None`: they have to be loaded first.
    pub(super) fn piece(&self, image: &ImageFile, at: u64, max: u64) -> Option<Result<(Piece, u64)>> {
        match self.cached_table(image, at) {
            Err(()) => None,
            Ok(Err(error)) => Some(Err(error)),
            Ok(Ok(None)) => Some(Ok((Piece::Below, image.rest_of_table(at, max)))),
            Ok(Ok(Some(table))) => self.piece_in(image, table, at, max),
        }
    }

    fn piece_in(&self, image: &ImageFile, table: HostOffset, at: u64, max: u64) -> Option<Result<(Piece, u64)>> {
        let cluster = image.cluster();
        let words_per_entry = (image.format.l2_entry_len() / 8) as usize;
        let index = cluster.index(at) % image.format.l2_entries();
        let (words, first) = self.cached(image, table.0 + index * image.format.l2_entry_len())?;
        let mut entries = words[first..].chunks_exact(words_per_entry);
        let mut next = |at: u64| {
            let entry = entries.next()?;
            let words = RawL2Entry { entry: entry[0], bitmap: if image.format.extended { entry[1] } else { 0 } };
            Some(piece_of(image, words, at))
        };
        let (piece, mut run) = match next(at).expect("the slice holds the entry") {
            Ok(found) => found,
            Err(error) => return Some(Err(error)),
        };
        while run < max && cluster.aligned(at + run) {
            match next(at + run) {
                Some(Ok((other, more))) if goes_on(piece, other, run) => run += more,
                _ => break,
            }
        }
        Some(Ok((piece, run.min(max))))
    }

    /// Makes sure that what an entry names may be data: clusters that the file has, and that are no
    /// table's. `len` is at least 1.
    pub(super) fn may_be_data(&self, image: &ImageFile, host: HostOffset, len: u64) -> Result<()> {
        if image.data_file.is_some() {
            return Ok(());
        }
        let (first, last) = (image.cluster().index(host.0), image.cluster().index(host.0 + len - 1));
        self.may_be_clusters(image, Freed { first, count: last - first + 1 })
    }

    pub(super) fn may_be_clusters(&self, image: &ImageFile, clusters: Freed) -> Result<()> {
        let (first, end) = (clusters.first, clusters.first + clusters.count);
        if end > self.fresh {
            return Err(image.corrupt(format_args!("a data cluster at {first:#x} lies past the end of the file")));
        }
        // M3: a table is never data.
        match (first..end).find(|cluster| self.roles.contains(*cluster)) {
            Some(table) => Err(image.corrupt(format_args!("cluster {table:#x} is named as data, but holds a table"))),
            None => Ok(()),
        }
    }

    /// Loads the tables that [`Tables::piece`] missed.
    pub(super) fn load(&mut self, image: &ImageFile, at: u64) -> Result<()> {
        if let Some(table) = self.l2_table(image, at)? {
            self.slice(image, Self::l2_place(image, table, at), Class::L2)?;
        }
        Ok(())
    }

    /// Where the L1 entry of a position stands in the file.
    pub(super) fn l1_place(&self, image: &ImageFile, at: u64) -> u64 {
        let index = at / image.l1_span();
        assert!(index < u64::from(self.l1.entries), "a position that the L1 table covers");
        self.l1.offset.0 + index * 8
    }

    /// Where the L2 entry of a position stands.
    pub(super) fn l2_place(image: &ImageFile, table: HostOffset, at: u64) -> u64 {
        table.0 + image.cluster().index(at) % image.format.l2_entries() * image.format.l2_entry_len()
    }

    /// The L2 table of a position.
    pub(super) fn l2_table(&mut self, image: &ImageFile, at: u64) -> Result<Option<HostOffset>> {
        self.table_of(image, self.l1, at / image.l1_span())
    }

    /// The L2 table that an entry of any L1 table names; none behind its end.
    pub(super) fn table_of(&mut self, image: &ImageFile, l1: Table, index: u64) -> Result<Option<HostOffset>> {
        if index >= u64::from(l1.entries) {
            return Ok(None);
        }
        let word = self.word(image, l1.offset.0 + index * 8, Class::L1)?;
        image.format.l1(word).map(|entry| entry.l2).map_err(|reason| image.corrupt(reason.fact()))
    }

    /// The L2 entry of a position; silent where there is no table.
    pub(super) fn entry(&mut self, image: &ImageFile, at: u64) -> Result<RawL2Entry> {
        let table = self.l2_table(image, at)?;
        self.entry_in(image, table, at)
    }

    /// Sets the L2 entry of a position, whose table may be written (see `own_l2_table`).
    pub(super) fn set_entry(&mut self, image: &ImageFile, at: u64, words: RawL2Entry) -> Result<()> {
        let table = self.l2_table(image, at)?.expect("a table that was made ready");
        self.set_entry_in(image, table, at, words)
    }

    /// Notes that an entry no longer refers to what `words` name (see `free_later`).
    pub(super) fn release(&mut self, image: &ImageFile, words: RawL2Entry) -> Result<()> {
        if let Some(freed) = references(image, words) {
            self.may_be_clusters(image, freed)?;
            (freed.first..freed.first + freed.count).for_each(|cluster| self.free_later(cluster));
        }
        Ok(())
    }
}

/// The clusters that an entry refers to.
pub(super) fn references(image: &ImageFile, words: RawL2Entry) -> Option<Freed> {
    if image.data_file.is_some() {
        return None;
    }
    if EntryFormat::is_compressed(words.entry) {
        let stream = image.format.raw_compressed(words.entry);
        let first = image.cluster().index(stream.at.0);
        let last = image.cluster().index(stream.at.0 + u64::from(stream.len) - 1);
        return Some(Freed { first, count: last - first + 1 });
    }
    match EntryFormat::raw_offset(words.entry) {
        0 => None,
        host => Some(Freed { first: image.cluster().index(host), count: 1 }),
    }
}

/// What an entry says of `at`, and for how many bytes, at most to the end of the cluster.
pub(super) fn piece_of(image: &ImageFile, words: RawL2Entry, at: u64) -> Result<(Piece, u64)> {
    let cluster = image.cluster();
    let (within, guest) = (cluster.within(at), GuestOffset(cluster.floor(at)));
    let corrupt = |reason: crate::format::Malformed| {
        image.corrupt(format_args!("the L2 entry of guest offset {at:#x}: {}", reason.fact()))
    };
    if !image.format.extended {
        let entry = image.format.l2(words.entry, guest).map_err(corrupt)?;
        return Ok((piece(image, entry.mapping, entry.copied, within), cluster.size() - within));
    }
    let entry = image.format.l2_extended(words.entry, words.bitmap, guest).map_err(corrupt)?;
    let size = cluster.size() / u64::from(SUBCLUSTERS);
    let from = within / size;
    let (mapping, count) = entry.run(from as u32);
    Ok((piece(image, mapping, entry.copied, within - from * size), (from + u64::from(count)) * size - within))
}

fn piece(image: &ImageFile, mapping: Mapping, copied: bool, within: u64) -> Piece {
    match mapping {
        // A data file is one disk's alone.
        Mapping::Data(host) if copied || image.data_file.is_some() => Piece::Own(HostOffset(host.0 + within)),
        Mapping::Data(host) => Piece::Shared(HostOffset(host.0 + within)),
        Mapping::Zero { .. } => Piece::Zero,
        Mapping::Compressed(stream) => Piece::Compressed(stream),
        Mapping::Hole => Piece::Below,
    }
}

fn goes_on(piece: Piece, next: Piece, run: u64) -> bool {
    match (piece, next) {
        (Piece::Own(host), Piece::Own(next)) | (Piece::Shared(host), Piece::Shared(next)) => host.0 + run == next.0,
        (Piece::Zero, Piece::Zero) | (Piece::Below, Piece::Below) => true,
        _ => false,
    }
}
