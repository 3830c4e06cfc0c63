//! Maps guest offsets of a layer to host offsets, one table lookup at a time.
//!
//! A [`Layer`] is one guest-visible state of one image: the active one or an internal snapshot.
//! [`Layer::map`] promises a run of at least one byte, never more than was asked for, and treats every table
//! entry as hostile. `Hole` means "unallocated", never "zero".

use std::cell::{Ref, RefCell};
use std::ops::Deref;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::entry::SUBCLUSTERS;
use crate::format::{EntryFormat, Header, L1Table, L2Entry, Malformed, Mapping, Snapshot};
use crate::units::{GuestOffset, HostOffset, Run};

use super::cursor::{self, TableSource};
use super::{Image, ImageBody};

/// One state of one image.
#[derive(Clone, Debug)]
pub struct Layer {
    image: Arc<Image>,
    l1: L1Table,
    /// Added to every offset: where VM state begins, else 0.
    shift: u64,
    size: u64,
}

impl Layer {
    /// The current state of the image.
    pub fn active(image: &Arc<Image>) -> Result<Self> {
        let l1 = image.header().map_or(L1Table { offset: HostOffset(0), entries: 0 }, |header| header.l1);
        Ok(Self { l1, shift: 0, size: image.virtual_size()?, image: Arc::clone(image) })
    }

    /// The state of one of its internal snapshots.
    pub fn snapshot(image: &Arc<Image>, snapshot: &Snapshot) -> Result<Self> {
        // Nothing of a damaged entry is safe to compute with.
        if let Some(damage) = &snapshot.damage {
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("an internal snapshot cannot be read: {damage}"),
            ));
        }
        let size = match snapshot.virtual_size {
            Some(size) => size,
            None => image.virtual_size()?,
        };
        Ok(Self { l1: snapshot.l1, shift: 0, size, image: Arc::clone(image) })
    }

    /// The VM state saved with an internal snapshot, as a disk of its own.
    pub fn vm_state(image: &Arc<Image>, snapshot: &Snapshot) -> Result<Self> {
        let Self { l1, size, .. } = Self::snapshot(image, snapshot)?;
        let span = image.header().map_or(1, |header| header.l1_entry_span());
        let shift = Snapshot::vm_state_offset(size, span).map_or(u64::MAX, |at| at.0);
        Ok(Self { l1, shift, size: snapshot.vm_state_size, image: Arc::clone(image) })
    }

    /// The image.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    /// Bytes of this state's disk.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The cluster size, where there are clusters.
    pub fn cluster_size(&self) -> Option<u64> {
        self.image.header().map(|header| header.cluster.size())
    }

    /// The unit in which it allocates, where there is one: a cluster, or a subcluster.
    pub fn allocation_unit(&self) -> Option<u64> {
        let header = self.image.header()?;
        let subclusters = if header.extended_l2() { u64::from(SUBCLUSTERS) } else { 1 };
        Some(header.cluster.size() / subclusters)
    }

    /// The mapping of `at`, and for how many of the `max` bytes from there the same holds. `Corrupt` applies
    /// to the rest of the cluster (see [`Layer::rest_of_cluster`]).
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<Run<Mapping>> {
        self.map_by(at, max, |header, at, max| {
            let tables = LayerTables { layer: self, format: header.entry_format() };
            cursor::lookup(&tables, at, max)
        })
    }

    /// For going over the whole layer once.
    pub fn walk(&self) -> LayerWalk<'_> {
        LayerWalk { layer: self, held: RefCell::default() }
    }

    fn map_by(
        &self,
        at: GuestOffset,
        max: u64,
        lookup: impl FnOnce(&Header, u64, u64) -> Result<Run<L2Entry>>,
    ) -> Result<Run<Mapping>> {
        assert!(max > 0);
        // C4: a longer lower layer is not visible here.
        // Beyond its end a layer reads as zeroes even if one below it is longer.
        if at.0 >= self.size {
            return Ok(Run::new(Mapping::Zero(None), max));
        }
        let max = max.min(self.size - at.0);
        match &self.image.body {
            ImageBody::Raw => Ok(Run::new(Mapping::Data(HostOffset(at.0)), max)),
            ImageBody::Lost(sentence) => {
                let fact = "this part of the disk is in none of the layers that are left";
                Err(Error::new(ErrorKind::Corrupt, format!("{sentence}; {fact}")))
            }
            ImageBody::Qcow2(header) => {
                let run = lookup(header, at.0.saturating_add(self.shift), max)?.map(|entry| entry.mapping);
                self.within_file(run)
            }
        }
    }

    /// For how many of `max` bytes an error at `at` holds: to the end of its cluster, or of its subcluster,
    /// since the next one may be readable.
    pub fn rest_of_cluster(&self, at: GuestOffset, max: u64) -> u64 {
        let Some(header) = self.image.header() else { return max };
        let remaining = header.cluster.remaining(GuestOffset(at.0.saturating_add(self.shift)));
        ((remaining - 1) % self.allocation_unit().unwrap_or(remaining) + 1).min(max)
    }

    /// Position of `at` within its cluster.
    pub fn within_cluster(&self, at: GuestOffset) -> u64 {
        self.image.header().map_or(0, |header| header.cluster.within(at.0 + self.shift))
    }

    /// Data must be within the file: missing bytes are corrupt, not zero.
    fn within_file(&self, run: Run<Mapping>) -> Result<Run<Mapping>> {
        let (Mapping::Data(host), Some(mut end)) = (run.value, self.image.data_len) else { return Ok(run) };
        if host.0 >= end {
            // A frozen image that a pull fills grows, and its tables may be read from then on.
            end = self.image.data().len()?;
        }
        if host.0 < end {
            return Ok(run.at_most(end - host.0));
        }
        // R2: missing bytes are an error.
        Err(self.image.corrupt(&format!(
            "a data cluster at {host} lies past the end of the file ({end:#x}); the file was cut short, \
                restore it from a copy"
        )))
    }
}

/// [`Layer::map`] for one pass over the whole layer: each L2 table is read in one piece, and
/// none is kept in the cache of the store.
#[derive(Debug)]
pub struct LayerWalk<'a> {
    layer: &'a Layer,
    held: RefCell<Held>,
}

/// What was read last.
#[derive(Debug, Default)]
struct Held {
    /// The index of an L2 table in the L1 table, and its place.
    table: Option<(u64, HostOffset)>,
    /// Its words, as far as the file has them.
    words: Vec<u64>,
    /// Memory to read into.
    bytes: Vec<u8>,
}

impl LayerWalk<'_> {
    /// As [`Layer::map`].
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<Run<Mapping>> {
        self.layer.map_by(at, max, |header, at, max| {
            let format = header.entry_format();
            let index = at / format.l1_span();
            let tables =
                WalkedTables { cached: LayerTables { layer: self.layer, format }, held: &self.held, index };
            let held = self.held.borrow().table;
            match held {
                Some((same, table)) if same == index => cursor::lookup_in(&tables, table, at, max),
                _ => cursor::lookup(&tables, at, max),
            }
        })
    }
}

/// The tables of a layer, L2 tables past the cache.
struct WalkedTables<'a> {
    cached: LayerTables<'a>,
    held: &'a RefCell<Held>,
    /// Of the L2 table in the L1 table.
    index: u64,
}

/// Words of a table. Those of the held one are not counted: there are millions of lookups.
enum WalkedWords<'a> {
    Held(Ref<'a, [u64]>),
    Cached(Arc<[u64]>),
}

impl Deref for WalkedWords<'_> {
    type Target = [u64];

    fn deref(&self) -> &[u64] {
        match self {
            Self::Held(words) => words,
            Self::Cached(words) => words,
        }
    }
}

impl<'a> TableSource for WalkedTables<'a> {
    type Words = WalkedWords<'a>;
    type Miss = Error;

    fn format(&self) -> EntryFormat {
        self.cached.format()
    }

    fn l1(&self) -> L1Table {
        self.cached.l1()
    }

    fn l1_slice(&self, index: u64) -> Result<(WalkedWords<'a>, usize)> {
        let (words, at) = self.cached.l1_slice(index)?;
        Ok((WalkedWords::Cached(words), at))
    }

    fn l2_slice(&self, table: HostOffset, index: u64) -> Result<(WalkedWords<'a>, usize)> {
        let wanted = Some((self.index, table));
        if self.held.borrow().table != wanted {
            let Held { table: known, words, bytes } = &mut *self.held.borrow_mut();
            *known = None;
            let cluster = self.format().cluster.size();
            self.cached.layer.image.read_whole_table(table, cluster, bytes, words)?;
            *known = wanted;
        }
        let words = Ref::map(self.held.borrow(), |held| held.words.as_slice());
        // What the file does not have is missed as always.
        if index + self.format().l2_entry_words() <= words.len() as u64 {
            return Ok((WalkedWords::Held(words), index as usize));
        }
        let (words, at) = self.cached.l2_slice(table, index)?;
        Ok((WalkedWords::Cached(words), at))
    }

    fn bad_l1(&self, at: u64, reason: Malformed) -> Error {
        self.cached.bad_l1(at, reason)
    }

    fn bad_l2(&self, at: u64, reason: Malformed) -> Error {
        self.cached.bad_l2(at, reason)
    }

    fn relevant(&self, entry: L2Entry) -> L2Entry {
        self.cached.relevant(entry)
    }
}

/// The tables of a layer, through the cache of the store.
struct LayerTables<'a> {
    layer: &'a Layer,
    format: EntryFormat,
}

impl TableSource for LayerTables<'_> {
    type Words = Arc<[u64]>;
    type Miss = Error;

    fn format(&self) -> EntryFormat {
        self.format
    }

    fn l1(&self) -> L1Table {
        self.layer.l1
    }

    fn l1_slice(&self, index: u64) -> Result<(Arc<[u64]>, usize)> {
        self.layer.image.slice(self.layer.l1.offset, self.layer.l1.len_bytes(), index)
    }

    fn l2_slice(&self, table: HostOffset, index: u64) -> Result<(Arc<[u64]>, usize)> {
        self.layer.image.slice(table, self.format.cluster.size(), index)
    }

    fn bad_l1(&self, _at: u64, reason: Malformed) -> Error {
        self.layer.image.corrupt(&reason.to_string())
    }

    fn bad_l2(&self, at: u64, reason: Malformed) -> Error {
        self.layer.image.corrupt(&format!("the L2 entry of guest offset {at:#x}: {reason}"))
    }

    fn relevant(&self, entry: L2Entry) -> L2Entry {
        // The number of references does not matter to a reader.
        L2Entry { copied: false, ..entry }
    }
}
