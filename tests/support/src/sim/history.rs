//! The allowed content of each sector, at any point of the tape.
//!
//! A sector has a list of versions. A write covered by an acknowledged flush is certain; a later or failed
//! one may be there or not. A write of a part of a sector may be there byte by byte; whole sectors only as
//! wholes.

use std::collections::BTreeMap;

use super::value::{Value, describe};
use super::{Pages, SECTOR};

/// The point at which the disk is checked.
#[derive(Clone, Copy, Debug)]
pub enum Moment {
    /// After a crash that kept at most the first so many events of the tape.
    Cut(usize),
    /// Through the writer, with nothing in flight: all acknowledged writes are there.
    Now,
}

/// Something the guest asked for.
struct Operation {
    begun: usize,
    acked: Option<usize>,
    what: String,
}

struct Version {
    operation: usize,
    value: Value,
}

/// The disk's past.
#[derive(Default)]
pub struct History {
    pub initial: Pages,
    pub initial_size: u64,
    operations: Vec<Operation>,
    sectors: BTreeMap<u64, Vec<Version>>,
    sizes: Vec<(usize, u64)>,
    /// Where acknowledged flushes were begun and acknowledged.
    flushes: Vec<(usize, usize)>,
    /// Internal snapshots and their bytes, in the order in which they were taken.
    snapshots: Vec<(usize, Pages)>,
}

impl History {
    pub fn new(initial: Pages, initial_size: u64) -> Self {
        Self { initial, initial_size, ..Self::default() }
    }

    /// An operation has begun; its number.
    pub fn begin(&mut self, at: usize, what: String) -> usize {
        self.operations.push(Operation { begun: at, acked: None, what });
        self.operations.len() - 1
    }

    pub fn acknowledge(&mut self, operation: usize, at: usize) {
        self.operations[operation].acked = Some(at);
    }

    pub fn flushed(&mut self, begun: usize, acked: usize) {
        self.flushes.push((begun, acked));
    }

    pub fn resized(&mut self, operation: usize, size: u64) {
        self.sizes.push((operation, size));
    }

    /// `operation` takes an internal snapshot of a disk that holds `content`.
    pub fn snapshot(&mut self, operation: usize, content: Pages) {
        self.snapshots.push((operation, content));
    }

    /// The last one was not taken.
    pub fn take_snapshot_back(&mut self) {
        self.snapshots.pop().expect("one that was begun");
    }

    /// The bytes of the internal snapshots, oldest first, and how many of them have to be there.
    pub fn snapshots(&self, moment: Moment) -> (Vec<&Pages>, usize) {
        let possible = self.snapshots.iter().filter(|(operation, _)| self.is_possible(*operation, moment));
        let certain = self.snapshots.iter().filter(|(operation, _)| self.is_done(*operation, moment)).count();
        (possible.map(|(_, content)| content).collect(), certain)
    }

    /// Whether an internal snapshot is being taken, so that COPIED flags may be wrong.
    pub fn is_sharing(&self, moment: Moment) -> bool {
        let (possible, certain) = self.snapshots(moment);
        possible.len() > certain
    }

    fn is_done(&self, operation: usize, moment: Moment) -> bool {
        let acked = self.operations[operation].acked;
        acked.is_some_and(|acked| !matches!(moment, Moment::Cut(cut) if acked >= cut))
    }

    fn original(&self, sector: u64) -> Value {
        if sector * SECTOR >= self.initial_size { Value::Zero } else { Value::Initial }
    }

    /// `operation` puts `value` into the bytes of a range.
    pub fn put(&mut self, operation: usize, at: u64, bytes: &[u8], value: &Value) {
        let end = at + bytes.len() as u64;
        for sector in at / SECTOR..end.div_ceil(SECTOR) {
            let (start, next) = (sector * SECTOR, (sector + 1) * SECTOR);
            let value = if start >= at && next <= end {
                value.clone()
            } else {
                let last = self.sectors.get(&sector).and_then(|versions| versions.last());
                let last = last.map_or_else(|| self.original(sector), |version| version.value.clone());
                let mut whole = last.bytes(sector, &self.initial);
                let (from, to) = (start.max(at), next.min(end));
                whole[(from - start) as usize..(to - start) as usize]
                    .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
                Value::Mixed(whole.as_slice().into())
            };
            self.sectors.entry(sector).or_default().push(Version { operation, value });
        }
    }

    /// Everything up to which tape position an acknowledged flush covers, as of `moment`.
    fn covered(&self, moment: Moment) -> usize {
        match moment {
            Moment::Cut(cut) => self
                .flushes
                .iter()
                .filter(|(_, acked)| *acked < cut)
                .map(|(begun, _)| *begun)
                .max()
                .unwrap_or(0),
            Moment::Now => usize::MAX,
        }
    }

    fn is_certain(&self, operation: usize, covered: usize) -> bool {
        self.operations[operation].acked.is_some_and(|acked| acked < covered)
    }

    fn is_possible(&self, operation: usize, moment: Moment) -> bool {
        match moment {
            Moment::Cut(cut) => self.operations[operation].begun < cut,
            Moment::Now => true,
        }
    }

    /// The values that a sector may have.
    pub fn legal(&self, sector: u64, moment: Moment) -> Vec<Value> {
        self.legal_given(sector, moment, self.covered(moment))
    }

    fn legal_given(&self, sector: u64, moment: Moment, covered: usize) -> Vec<Value> {
        let mut values = vec![self.original(sector)];
        for version in self.sectors.get(&sector).into_iter().flatten() {
            if self.is_certain(version.operation, covered) {
                values.clear();
            } else if !self.is_possible(version.operation, moment) {
                continue;
            }
            values.push(version.value.clone());
        }
        values
    }

    /// Smallest and largest size that the disk may have.
    pub fn legal_sizes(&self, moment: Moment) -> Vec<u64> {
        let covered = self.covered(moment);
        let mut sizes = vec![self.initial_size];
        for (operation, size) in &self.sizes {
            if self.is_certain(*operation, covered) {
                sizes.clear();
            } else if !self.is_possible(*operation, moment) {
                continue;
            }
            sizes.push(*size);
        }
        sizes
    }

    /// Judges the bytes of whole sectors at `at`.
    pub fn judge(&self, at: u64, bytes: &[u8], moment: Moment) -> Result<(), String> {
        assert!(at.is_multiple_of(SECTOR));
        let covered = self.covered(moment);
        for (index, bytes) in bytes.chunks(SECTOR as usize).enumerate() {
            let sector = at / SECTOR + index as u64;
            let original = self.original(sector);
            let fits = match self.sectors.get(&sector) {
                None => original.is(bytes, sector, &self.initial),
                Some(_) => self.is_one_of(bytes, sector, &self.legal_given(sector, moment, covered)),
            };
            if !fits {
                return Err(self.complaint(sector, bytes, moment, covered));
            }
        }
        Ok(())
    }

    fn is_one_of(&self, bytes: &[u8], sector: u64, values: &[Value]) -> bool {
        if values.iter().rev().any(|value| value.is(bytes, sector, &self.initial)) {
            return true;
        }
        if !values.iter().any(|value| matches!(value, Value::Mixed(_))) {
            return false;
        }
        let values: Vec<_> = values.iter().map(|value| value.bytes(sector, &self.initial)).collect();
        bytes.iter().enumerate().all(|(index, byte)| values.iter().any(|value| value[index] == *byte))
    }

    fn complaint(&self, sector: u64, bytes: &[u8], moment: Moment, covered: usize) -> String {
        let mut lines = vec![format!("sector {sector:#x} holds {}; legal at {moment:?}:", describe(bytes))];
        for value in self.legal_given(sector, moment, covered) {
            lines.push(format!("  {}", describe(&value.bytes(sector, &self.initial))));
        }
        lines.push("its past:".into());
        for version in self.sectors.get(&sector).into_iter().flatten() {
            let Operation { begun, acked, what } = &self.operations[version.operation];
            lines.push(format!("  {what} begun at {begun}, acknowledged at {acked:?}"));
        }
        lines.push(format!("flushes: {:?}", self.flushes));
        lines.join("\n")
    }

    /// The ranges that anything was written to, widened to `unit` and cut at `size`.
    pub fn touched(&self, unit: u64, size: u64) -> Vec<(u64, u64)> {
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        for sector in self.sectors.keys() {
            let (start, end) = (sector * SECTOR / unit * unit, (sector * SECTOR / unit + 1) * unit);
            match ranges.last_mut() {
                Some((_, last)) if *last >= start => *last = end.max(*last),
                _ => ranges.push((start, end)),
            }
        }
        ranges.retain(|(start, _)| *start < size);
        ranges.into_iter().map(|(start, end)| (start, end.min(size) - start)).collect()
    }

    /// Operations so far.
    pub fn len(&self) -> usize {
        self.operations.len()
    }
}
