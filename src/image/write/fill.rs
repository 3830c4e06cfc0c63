//! Filling from below: all tables of an image, the active ones and those of its internal snapshots, get
//! what layers hold that are going to be taken away from under it.
//!
//! No view changes by it: where all are silent, what shows through is written first and named then. So
//! a table that several share is changed in place, for all of them, and one cluster of data serves
//! all that are silent at its place: its count is the number of views that reach it.
//!
//! The guest's writes win: what is filled is looked at, copied and named while its range is held.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Version;
use crate::format::subcluster::SUBCLUSTERS;
use crate::io::Storage;
use crate::units::{BlockStatus, HostOffset, Run};

use super::fill_plan::{ClusterFill, FillPlan, runs_of, unit_len};
use super::qcow2::{MAX_TURN, Qcow2Writer};
use super::{Writer, Zeroing, zero_bytes};

/// What is to be had in an image's own tables. Said by whoever knows what will lie below it.
pub trait Fill: Send + Sync {
    /// What is to stand at `at` where the image is silent there, and for how many of `len` bytes the same
    /// holds: what shows through now, zeroes, or nothing, for what will be below shows the same bytes. Asked
    /// of the longest of the image's disks.
    fn wanted(&self, at: u64, len: u64) -> Result<Run<Option<BlockStatus>>>;

    /// The file in which what shows through at `at` lies as it is, and where, so that it need not go through
    /// memory; and for how many of `len` bytes the same holds.
    fn place(&self, at: u64, len: u64) -> Result<Run<Option<FilePlace>>> {
        let _ = at;
        Ok(Run::new(None, len))
    }
}

/// A file and a position in it.
pub type FilePlace = (Arc<dyn Storage>, u64);

impl Writer {
    /// Gives the active tables and those of all internal snapshots places of their own for what `fill`
    /// wants in `[at, at + len)`, in whole clusters, to the end of the longest of their disks. What
    /// each of them shows stays the same. Returns how many bytes were copied from below.
    ///
    /// Whoever else reads internal snapshots of this file has to forget their tables afterwards: one may
    /// have moved, or a cluster of which only a part was allocated.
    pub fn fill(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64> {
        // An image without a backing file is never silent.
        self.format.as_overlay().map_or(Ok(0), |overlay| overlay.fill(at, len, fill))
    }
}

/// Where bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FillSource {
    Backing(u64),
    File(u64),
    Zero,
}

struct FillSegment {
    host: u64,
    from: FillSource,
    len: u64,
}

impl Qcow2Writer {
    pub(super) fn fill_from_below(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64> {
        if self.tables.read().has_damaged_snapshots {
            let fact = "it has an internal snapshot whose entry is damaged, and what shows through that \
                cannot be kept";
            return Err(Error::new(
                ErrorKind::Corrupt,
                format!("{}: {fact}; restore it from a copy", self.image.name),
            ));
        }
        self.prepare()?;
        let cluster = self.image.cluster();
        let (mut at, end) = (cluster.floor(at), at.saturating_add(len));
        let mut copied = 0;
        loop {
            let end = end.min(self.tables.read().longest(self.size()));
            if at >= end {
                return Ok(copied);
            }
            self.check_poison()?;
            let turn = self.image.rest_of_table(at, end - at).min(MAX_TURN);
            let held = self.hold(at, turn);
            copied += self.fill_held(at, turn, fill)?;
            drop(held);
            self.relieve()?;
            at = cluster.floor(at + turn - 1) + cluster.size();
        }
    }

    /// One turn, within one L2 table of each, for whoever holds the range.
    fn fill_held(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64> {
        let longest = self.tables.read().longest(self.size());
        let mut spots = self.tables.write().silent_spots(&self.image, at, len, self.size())?;
        let mut answers = WantedAnswers { fill, end: longest, from: 0, to: 0, wanted: None };
        for spot in &mut spots {
            self.ask(spot, &mut answers)?;
        }
        spots.retain(|spot| spot.data | spot.zero != 0);
        if spots.is_empty() {
            return Ok(0);
        }
        if self.tables.write().is_being_left(&self.image, &spots, self.size())? {
            // M8: what a view has left in memory is left on disk before it is changed.
            // On disk, who has left still refers to what is about to be changed.
            self.flush()?;
        }
        let plan = self.with_tables(|tables| {
            for group in tables.groups(&self.image, at, self.size())? {
                tables.ready_table(&self.image, &group, at)?;
            }
            tables.plan(&self.image, &spots, self.size())
        })?;
        self.carry_out(plan, &spots, at, longest, fill)
    }

    fn ask(&self, spot: &mut ClusterFill, answers: &mut WantedAnswers<'_>) -> Result<()> {
        let unit = unit_len(&self.image);
        for index in (0..SUBCLUSTERS).filter(|index| spot.silent >> index & 1 == 1) {
            let start = spot.guest + u64::from(index) * unit;
            let bit = 1 << index;
            match answers.of(start, unit)? {
                None => {}
                Some(BlockStatus::Zero) if self.image.format.version == Version::V2 => {
                    spot.data |= bit;
                    spot.blank |= bit;
                }
                Some(BlockStatus::Zero) => spot.zero |= bit,
                Some(BlockStatus::Data) => spot.data |= bit,
            }
        }
        Ok(())
    }

    /// Puts the data where it belongs, then lets the tables name it.
    fn carry_out(
        &self,
        mut plan: FillPlan,
        spots: &[ClusterFill],
        at: u64,
        longest: u64,
        fill: &dyn Fill,
    ) -> Result<u64> {
        let image = &self.image;
        self.check_poison()?;
        if self.raw_data
            && let Some(data_file) = &image.data_file
        {
            let unit = unit_len(&self.image);
            for spot in spots {
                for (from, to) in runs_of(spot.zero) {
                    let (start, end) = (spot.guest + from * unit, (spot.guest + to * unit).min(self.size()));
                    zero_bytes(&**data_file, start, end - start, Zeroing::Unmap)?;
                }
            }
        }
        let copied = self.write_segments(self.segments(&plan, spots, longest), fill)?;
        self.data_dirty.store(true, Ordering::Release);
        let mut tables = self.tables.write();
        // M4: from here on the tables name the clusters, which hold their data.
        for place in plan.places.drain(..) {
            place.commit();
        }
        tables.name_filled(image, &plan, spots, at, self.size()).map_err(|error| self.poisoned_by(error))?;
        Ok(copied)
    }

    fn segments(&self, plan: &FillPlan, spots: &[ClusterFill], longest: u64) -> Vec<FillSegment> {
        let image = &self.image;
        let (size, unit) = (image.cluster().size(), unit_len(&self.image));
        let blank = |guest: u64| {
            let index = spots.binary_search_by_key(&guest, |spot| spot.guest).expect("a spot of the plan");
            spots[index].blank
        };
        let mut all: Vec<FillSegment> = Vec::new();
        let mut push = |host: u64, from: FillSource, len: u64| {
            if len == 0 {
                return;
            }
            if let Some(last) = all.last_mut()
                && last.host + last.len == host
                && last.len < MAX_TURN
                && match (last.from, from) {
                    (FillSource::Backing(start), FillSource::Backing(next))
                    | (FillSource::File(start), FillSource::File(next)) => start + last.len == next,
                    (FillSource::Zero, FillSource::Zero) => true,
                    _ => false,
                }
            {
                last.len += len;
            } else {
                all.push(FillSegment { host, from, len });
            }
        };
        let mut from_below = |host: u64, guest: u64, mask: u32, is_fresh: bool| {
            let blank = blank(guest);
            for (mask, is_blank) in [(mask & !blank, false), (mask & blank, true)] {
                for (from, to) in runs_of(mask) {
                    let (start, end) = (guest + from * unit, guest + to * unit);
                    let shown = if is_blank { 0 } else { end.min(longest).saturating_sub(start) };
                    push(host + from * unit, FillSource::Backing(start), shown);
                    // A data file is no longer than the disk, and new clusters hold zeroes.
                    if !is_fresh && image.data_file.is_none() {
                        push(host + from * unit + shown, FillSource::Zero, end - start - shown);
                    }
                }
            }
        };
        let mut clusters = plan
            .places
            .iter()
            .flat_map(|place| place.clusters().numbers().map(|number| (number, place.is_fresh())));
        let mut old: Vec<FillSegment> = Vec::new();
        for job in &plan.shared {
            let (number, is_fresh) = clusters.next().expect("a cluster for each job");
            let host = number * size;
            from_below(host, job.guest, job.mask, is_fresh);
            if let Some((from, allocated)) = job.old {
                for (start, end) in runs_of(allocated) {
                    let (start, len) = (start * unit, (end - start) * unit);
                    old.push(FillSegment { host: host + start, from: FillSource::File(from.0 + start), len });
                }
            }
        }
        for place in &plan.in_place {
            from_below(place.host.0, place.guest, place.mask, false);
        }
        all.extend(old);
        all
    }

    /// Writes segments, those that lie side by side together; returns how many bytes came from below.
    fn write_segments(&self, segments: Vec<FillSegment>, fill: &dyn Fill) -> Result<u64> {
        let (mut bytes, mut copied) = (Vec::new(), 0);
        let backing = self.backing();
        let mut left = Vec::with_capacity(segments.len());
        for segment in segments {
            match segment.from {
                FillSource::Backing(guest) => copied += self.copy_placed(&segment, guest, fill, &mut left)?,
                FillSource::File(_) | FillSource::Zero => left.push(segment),
            }
        }
        let mut rest = left.as_slice();
        while let Some(first) = rest.first() {
            let mut count = 0;
            let mut end = first.host;
            while let Some(next) = rest.get(count)
                && next.host == end
                && (count == 0 || end + next.len - first.host <= MAX_TURN)
            {
                end += next.len;
                count += 1;
            }
            bytes.clear();
            bytes.resize((end - first.host) as usize, 0);
            for segment in &rest[..count] {
                let start = (segment.host - first.host) as usize;
                let part = &mut bytes[start..start + segment.len as usize];
                match (segment.from, &backing) {
                    (FillSource::Backing(guest), Some(backing)) => {
                        backing.read_at(guest, part)?;
                        copied += segment.len;
                    }
                    (FillSource::File(at), _) => self.read_data(HostOffset(at), part)?,
                    (FillSource::Backing(_), None) | (FillSource::Zero, _) => {}
                }
            }
            self.image.data().write_at(first.host, &bytes)?;
            rest = &rest[count..];
        }
        Ok(copied)
    }

    /// Moves what of a segment from below lies in a file as it is from there; the rest is left. Returns how
    /// many bytes that were.
    fn copy_placed(
        &self,
        segment: &FillSegment,
        guest: u64,
        fill: &dyn Fill,
        left: &mut Vec<FillSegment>,
    ) -> Result<u64> {
        let (mut done, mut copied) = (0, 0);
        while done < segment.len {
            let Run { value: place, len: run } = fill.place(guest + done, segment.len - done)?;
            let host = segment.host + done;
            if let Some((file, from)) = place {
                self.image.data().copy_from(host, &*file, from, run)?;
                copied += run;
            } else {
                left.push(FillSegment { host, from: FillSource::Backing(guest + done), len: run });
            }
            done += run;
        }
        Ok(copied)
    }
}

/// What was answered last, which may hold for more.
struct WantedAnswers<'a> {
    fill: &'a dyn Fill,
    /// Nothing is asked from here on.
    end: u64,
    from: u64,
    to: u64,
    wanted: Option<BlockStatus>,
}

impl WantedAnswers<'_> {
    /// What `[start, start + len)` needs as a whole: data, unless one answer holds for all of it.
    fn of(&mut self, start: u64, len: u64) -> Result<Option<BlockStatus>> {
        let (mut at, end) = (start, (start + len).min(self.end));
        let mut whole: Option<Option<BlockStatus>> = None;
        while at < end {
            if !(self.from..self.to).contains(&at) {
                let asked = self.end - at;
                let run = self.fill.wanted(at, asked)?;
                assert!(run.len > 0 && run.len <= asked, "an answer for what was asked");
                (self.from, self.to, self.wanted) = (at, at + run.len, run.value);
            }
            whole = match whole {
                None => Some(self.wanted),
                Some(other) if other == self.wanted => Some(other),
                // What shows through now is right for any mixture.
                Some(_) => Some(Some(BlockStatus::Data)),
            };
            at = self.to;
        }
        Ok(whole.flatten())
    }
}
