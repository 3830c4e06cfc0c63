//! Filling from below: all tables of an image, the active ones and those of its internal snapshots, get the
//! data of layers that are about to be removed from its backing chain.
//!
//! No view changes: where all are unallocated, the visible bytes are written first and named then. So a table
//! that several views share is changed in place, for all of them, and one cluster of data serves all views
//! that are unallocated there: its count is the number of views that reach it.
//!
//! The guest's writes win: a range is inspected, copied and named while it is held.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Version;
use crate::format::entry::SUBCLUSTERS;
use crate::io::Storage;
use crate::units::{BlockStatus, HostOffset, Run};

use super::fill_plan::{ClusterFill, FillPlan, runs_of, unit_len};
use super::qcow2::{MAX_TURN, Qcow2Writer};
use super::{Writer, Zeroing, zero_bytes};

/// What to add to an image's own tables. Implemented by the caller, who knows its future backing file.
pub trait Fill: Send + Sync {
    /// What to add at `at` where the image is unallocated, and for how many of `len` bytes the same holds:
    /// the bytes visible now, zeroes, or nothing, since the new backing shows the same bytes. Called for the
    /// range of the longest of the image's disks.
    fn wanted(&self, at: u64, len: u64) -> Result<Run<Option<BlockStatus>>>;

    /// The file that holds the visible bytes at `at` unchanged, and the offset, so that they need not pass
    /// through memory; and for how many of `len` bytes the same holds.
    fn place(&self, at: u64, len: u64) -> Result<Run<Option<FilePlace>>> {
        let _ = at;
        Ok(Run::new(None, len))
    }
}

/// A file and an offset in it.
pub type FilePlace = (Arc<dyn Storage>, u64);

impl Writer {
    /// Allocates clusters, in the active tables and in those of all internal snapshots, for the ranges that
    /// `fill` wants in `[at, at + len)`, in whole clusters, to the end of the longest of their disks. Each of
    /// them keeps its bytes. Returns how many bytes were copied from below.
    ///
    /// Other readers of internal snapshots of this file must discard their cached tables afterwards: a table
    /// may have moved, or a cluster of which only a part was allocated.
    pub fn fill(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64> {
        // An image that cannot have a backing file is fully allocated.
        self.format.as_overlay().map_or(Ok(0), |overlay| overlay.fill(at, len, fill))
    }
}

/// The source of the bytes.
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
            self.write_back_if_pressed()?;
            at = cluster.floor(at + turn - 1) + cluster.size();
        }
    }

    /// One turn, within one L2 table of each view; the caller holds the range.
    fn fill_held(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64> {
        let longest = self.tables.read().longest(self.size());
        let mut gaps = self.tables.write().find_gaps(&self.image, at, len, self.size())?;
        let mut answers = WantedAnswers { fill, end: longest, from: 0, to: 0, wanted: None };
        for gap in &mut gaps {
            self.ask(gap, &mut answers)?;
        }
        gaps.retain(|gap| gap.data | gap.zero != 0);
        if gaps.is_empty() {
            return Ok(0);
        }
        if self.tables.write().is_losing_references(&self.image, &gaps, self.size())? {
            // M8: references that a view has dropped in memory are dropped on disk before the cluster
            // changes.
            // On disk, a view that has dropped a cluster in memory still refers to it.
            self.flush()?;
        }
        let plan = self.with_tables(|tables| {
            for group in tables.groups(&self.image, at, self.size())? {
                tables.ready_table(&self.image, &group, at)?;
            }
            tables.plan(&self.image, &gaps, self.size())
        })?;
        self.carry_out(plan, &gaps, at, longest, fill)
    }

    fn ask(&self, gap: &mut ClusterFill, answers: &mut WantedAnswers<'_>) -> Result<()> {
        let unit = unit_len(&self.image);
        for index in (0..SUBCLUSTERS).filter(|index| gap.unallocated >> index & 1 == 1) {
            let start = gap.guest + u64::from(index) * unit;
            let bit = 1 << index;
            match answers.of(start, unit)? {
                None => {}
                Some(BlockStatus::Zero) if self.image.format.version == Version::V2 => {
                    gap.data |= bit;
                    gap.blank |= bit;
                }
                Some(BlockStatus::Zero) => gap.zero |= bit,
                Some(BlockStatus::Data) => gap.data |= bit,
            }
        }
        Ok(())
    }

    /// Writes the data, then lets the tables name it.
    fn carry_out(
        &self,
        mut plan: FillPlan,
        gaps: &[ClusterFill],
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
            for gap in gaps {
                for (from, to) in runs_of(gap.zero) {
                    let (start, end) = (gap.guest + from * unit, (gap.guest + to * unit).min(self.size()));
                    zero_bytes(&**data_file, start, end - start, Zeroing::Unmap)?;
                }
            }
        }
        let copied = self.write_segments(self.segments(&plan, gaps, longest), fill)?;
        self.data_dirty.store(true, Ordering::Release);
        let mut tables = self.tables.write();
        // M4: from here on the tables name the clusters, which hold their data.
        for place in plan.places.drain(..) {
            place.commit();
        }
        tables.name_filled(image, &plan, gaps, at, self.size()).map_err(|error| self.poisoned_by(error))?;
        Ok(copied)
    }

    fn segments(&self, plan: &FillPlan, gaps: &[ClusterFill], longest: u64) -> Vec<FillSegment> {
        let image = &self.image;
        let (size, unit) = (image.cluster().size(), unit_len(&self.image));
        let blank = |guest: u64| {
            let index = gaps.binary_search_by_key(&guest, |gap| gap.guest).expect("a cluster of the plan");
            gaps[index].blank
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

    /// Writes segments, adjacent ones with one call; returns how many bytes came from below.
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

    /// Copies the parts of a segment that a file holds unchanged directly from that file; leaves the rest.
    /// Returns how many bytes were copied.
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

/// The last answer, which may cover more clusters.
struct WantedAnswers<'a> {
    fill: &'a dyn Fill,
    /// There is nothing to ask beyond this offset.
    end: u64,
    from: u64,
    to: u64,
    wanted: Option<BlockStatus>,
}

impl WantedAnswers<'_> {
    /// What `[start, start + len)` needs as a whole: data, unless one answer covers all of it.
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
                // The visible bytes are right for any mixture.
                Some(_) => Some(Some(BlockStatus::Data)),
            };
            at = self.to;
        }
        Ok(whole.flatten())
    }
}
