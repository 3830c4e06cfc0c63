//! Where a layer keeps what: guest offsets to mappings, one table lookup at a time.
//!
//! A [`Layer`] is one guest-visible state of one image: the active one or an internal snapshot.
//! [`Layer::map`] promises a run of at least one byte, never more than was asked for, and treats
//! every table entry as hostile. `Hole` means "I am silent", never "zero".

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::subcluster::SUBCLUSTERS;
use crate::format::{self, Compressed, EntryFormat, Header, Malformed, Snapshot, Table};
use crate::units::{GuestOffset, HostOffset};

use super::{Body, Image};

/// What a layer says about a range of its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The bytes lie in the data file from here on.
    Data(HostOffset),
    /// They read as zeroes, whatever lies below; a cluster may be preallocated for them.
    Zero(Option<HostOffset>),
    /// They are part of a compressed cluster.
    Compressed(Compressed),
    /// This layer is silent: ask the one below.
    Hole,
}

/// One state of one image.
#[derive(Clone, Debug)]
pub struct Layer {
    image: Arc<Image>,
    l1: Table,
    /// Added to every offset: where VM state begins, else 0.
    shift: u64,
    size: u64,
}

impl Layer {
    /// What the image holds now.
    pub fn active(image: &Arc<Image>) -> Result<Self> {
        let l1 = image.header().map_or(Table { offset: HostOffset(0), entries: 0 }, |header| header.l1);
        Ok(Self { l1, shift: 0, size: image.virtual_size()?, image: Arc::clone(image) })
    }

    /// What one of its internal snapshots holds.
    pub fn snapshot(image: &Arc<Image>, snapshot: &Snapshot) -> Result<Self> {
        // Nothing of a damaged entry is safe to compute with.
        if let Some(damage) = &snapshot.damage {
            return Err(Error::new(ErrorKind::Corrupt, format!("an internal snapshot cannot be read: {damage}")));
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

    /// What is known of `at`, and for how many of the `max` bytes from there the same holds.
    /// `Corrupt` speaks for the rest of the cluster (see [`Layer::rest_of_cluster`]).
    pub fn map(&self, at: GuestOffset, max: u64) -> Result<(Mapping, u64)> {
        assert!(max > 0);
        // C4: a lower layer that is longer shows nothing here.
        // Beyond its end a layer reads as zeroes even if one below it is longer.
        if at.0 >= self.size {
            return Ok((Mapping::Zero(None), max));
        }
        let max = max.min(self.size - at.0);
        match &self.image.body {
            Body::Raw => Ok((Mapping::Data(HostOffset(at.0)), max)),
            Body::Lost(sentence) => {
                let fact = "this part of the disk is in none of the layers that are left";
                Err(Error::new(ErrorKind::Corrupt, format!("{sentence}; {fact}")))
            }
            Body::Qcow2(header) => self.map_qcow2(header, GuestOffset(at.0.saturating_add(self.shift)), max),
        }
    }

    /// For how many of `max` bytes an error at `at` speaks: to the end of its cluster, or of its
    /// subcluster, for the next one may have another answer.
    pub fn rest_of_cluster(&self, at: GuestOffset, max: u64) -> u64 {
        let Some(header) = self.image.header() else { return max };
        let remaining = header.cluster.remaining(GuestOffset(at.0.saturating_add(self.shift)));
        let unit = if header.extended_l2() { header.cluster.size() / u64::from(SUBCLUSTERS) } else { remaining };
        ((remaining - 1) % unit + 1).min(max)
    }

    /// Position of `at` within its cluster.
    pub fn within_cluster(&self, at: GuestOffset) -> u64 {
        self.image.header().map_or(0, |header| header.cluster.within(at.0 + self.shift))
    }

    fn map_qcow2(&self, header: &Header, at: GuestOffset, max: u64) -> Result<(Mapping, u64)> {
        let format = header.entry_format();
        let l2_span = header.l1_entry_span();
        let index = at.0 / l2_span;
        let l1_len = u64::from(self.l1.entries) * 8;
        if index >= u64::from(self.l1.entries) {
            return Ok((Mapping::Hole, max));
        }
        let (words, first) = self.image.slice(self.l1.offset, l1_len, index)?;
        let mut run = l2_span - at.0 % l2_span;
        if let Some(table) = self.l1_entry(format, words[(index - first) as usize])? {
            return self.map_in_table(format, table, at, max.min(run));
        }
        // Silent L1 entries that follow in the slice make one long hole.
        let following = &words[(index - first) as usize + 1..];
        let silent = following.iter().take_while(|word| matches!(self.l1_entry(format, **word), Ok(None)));
        run = run.saturating_add(l2_span.saturating_mul(silent.count() as u64));
        Ok((Mapping::Hole, max.min(run)))
    }

    fn l1_entry(&self, format: EntryFormat, word: u64) -> Result<Option<HostOffset>> {
        format.l1(word).map(|entry| entry.l2).map_err(|reason| self.image.corrupt(&reason.to_string()))
    }

    fn map_in_table(
        &self,
        format: EntryFormat,
        table: HostOffset,
        at: GuestOffset,
        max: u64,
    ) -> Result<(Mapping, u64)> {
        let cluster = format.cluster;
        let words_per_entry = format.l2_entry_len() / 8;
        let index = cluster.index(at.0) % format.l2_entries();
        let (words, first) = self.image.slice(table, cluster.size(), index * words_per_entry)?;
        let mut entries = words[(index * words_per_entry - first) as usize..].chunks_exact(words_per_entry as usize);
        let (mapping, mut run) = self.entry(format, entries.next().expect("the slice holds the entry"), at)?;
        // Entries that go on where the last ended make one run.
        while run < max && cluster.aligned(at.0 + run) {
            let Some(entry) = entries.next() else { break };
            match self.entry(format, entry, GuestOffset(at.0 + run)) {
                Ok((next, more)) if continues(mapping, next, run) => run += more,
                _ => break,
            }
        }
        self.within_file(mapping, run.min(max))
    }

    /// One L2 entry's word on `at`, for at most the rest of its cluster.
    fn entry(&self, format: EntryFormat, words: &[u64], at: GuestOffset) -> Result<(Mapping, u64)> {
        let cluster = format.cluster;
        let corrupt = |reason: Malformed| self.image.corrupt(&format!("the L2 entry of guest offset {at}: {reason}"));
        let within = cluster.within(at.0);
        let guest = GuestOffset(cluster.floor(at.0));
        if !format.extended {
            let entry = format.l2(words[0], guest).map_err(corrupt)?;
            return Ok((advance(entry.mapping, within), cluster.remaining(at)));
        }
        let entry = format.l2_extended(words[0], words[1], guest).map_err(corrupt)?;
        let size = cluster.size() / u64::from(SUBCLUSTERS);
        let from = within / size;
        let (mapping, count) = entry.run(from as u32);
        let run = (from + u64::from(count)) * size - within;
        Ok((advance(mapping, within - from * size), run))
    }

    /// Data must lie in the file: what is missing there is corrupt, not zero.
    fn within_file(&self, mapping: Mapping, run: u64) -> Result<(Mapping, u64)> {
        let (Mapping::Data(host), Some(mut end)) = (mapping, self.image.data_len) else { return Ok((mapping, run)) };
        if host.0 >= end {
            // A frozen image that is filled from below grows, and its tables may be read from then on.
            end = self.image.data().len()?;
        }
        if host.0 < end {
            return Ok((mapping, run.min(end - host.0)));
        }
        // R2: missing bytes are an error.
        Err(self.image.corrupt(&format!(
            "a data cluster at {host} lies past the end of the file ({end:#x}); the file was cut short, restore it from a copy"
        )))
    }
}

/// The mapping `within` bytes into the cluster.
fn advance(mapping: format::Mapping, within: u64) -> Mapping {
    match mapping {
        format::Mapping::Data(host) => Mapping::Data(HostOffset(host.0 + within)),
        format::Mapping::Zero { preallocated } => Mapping::Zero(preallocated.map(|host| HostOffset(host.0 + within))),
        format::Mapping::Compressed(stream) => Mapping::Compressed(stream),
        format::Mapping::Hole => Mapping::Hole,
    }
}

/// Whether `next`, `run` bytes further on, is the same answer.
fn continues(mapping: Mapping, next: Mapping, run: u64) -> bool {
    match (mapping, next) {
        (Mapping::Data(host), Mapping::Data(next)) | (Mapping::Zero(Some(host)), Mapping::Zero(Some(next))) => {
            host.0.checked_add(run) == Some(next.0)
        }
        (Mapping::Zero(None), Mapping::Zero(None)) | (Mapping::Hole, Mapping::Hole) => true,
        _ => false,
    }
}
