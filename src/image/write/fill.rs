//! Filling from below: all tables of an image, the active ones and those of its internal snapshots, get
//! what layers hold that are going to be taken away from under it.
//!
//! No view changes by it: where all are silent, what shows through is written first and named then. So
//! a table that several share is changed in place, for all of them, and one cluster of data serves
//! all that are silent at its place: its count is the number of views that reach it.
//!
//! The guest's writes win: what is filled is looked at, copied and named while its range is held.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use crate::error::Result;
use crate::format::refcount::max_refcount;
use crate::format::subcluster::SUBCLUSTERS;
use crate::format::{EntryFormat, Mapping, SubclusterEntry, Version};
use crate::units::{GuestOffset, HostOffset};

use super::allocate::Run;
use super::meta::{Core, Meta, Words};
use super::qcow2::{MAX_TURN, Qcow2Writer, subclusters};
use super::roots::Group;
use super::{Body, Writer, Zeroing, zero_bytes};

/// What is to be had in an image's own tables. Said by whoever knows what will lie below it.
pub trait Fill: Send + Sync {
    /// What is to stand at `at` where the image is silent there, and for how many of `len` bytes the same
    /// holds; at least 1. Asked of the longest of the image's disks.
    fn wanted(&self, at: u64, len: u64) -> Result<(Wanted, u64)>;
}

/// What is to stand where an image is silent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// Nothing: what will be below shows the same bytes.
    Nothing,
    /// It has to read as zeroes.
    Zero,
    /// What shows through now.
    Data,
}

impl Writer {
    /// Gives the active tables and those of all internal snapshots places of their own for what `fill`
    /// wants in `[at, at + len)`, in whole clusters, to the end of the longest of their disks. What
    /// each of them shows stays the same. Returns how many bytes were copied from below.
    ///
    /// Whoever else reads internal snapshots of this file has to forget their tables afterwards: one may
    /// have moved, or a cluster of which only a part was allocated.
    pub fn fill(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64> {
        match &self.body {
            // A raw image is never silent.
            Body::Raw(_) => Ok(0),
            Body::Qcow2(qcow2) => qcow2.fill_from_below(at, len, fill),
        }
    }
}

/// A cluster of the disk at which somebody is silent. Masks have a bit for each subcluster; where there are
/// none, the first bit stands for the cluster.
struct Spot {
    guest: u64,
    /// Where somebody is silent.
    silent: u32,
    /// What gets data.
    data: u32,
    /// What of that is zeroes, because the format has no other way to say so.
    blank: u32,
    /// What becomes zero in the tables.
    zero: u32,
}

/// Views that will share one new cluster.
struct Job {
    guest: u64,
    /// What of the cluster is filled.
    mask: u32,
    roots: Vec<usize>,
    /// The cluster that they leave, and what they have there.
    old: Option<(HostOffset, u32)>,
}

/// What a group has at a spot.
struct Share<'a> {
    group: &'a Group,
    /// Where it is silent and gets data.
    data: u32,
    /// Where it has data.
    allocated: u32,
    /// Its cluster is the active disk's alone.
    is_own: bool,
}

/// Data for a cluster that they have already, which nobody else uses.
struct InPlace {
    host: HostOffset,
    guest: u64,
    mask: u32,
}

/// Everything that one turn does.
#[derive(Default)]
struct Plan {
    jobs: Vec<Job>,
    in_place: Vec<InPlace>,
    /// Clusters for the jobs, in their order.
    runs: Vec<Run>,
    /// Where each job's cluster is, by position and view, and how many share it.
    hosts: HashMap<(u64, usize), (HostOffset, usize)>,
}

/// Where bytes come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Source {
    Below(u64),
    File(u64),
    Zero,
}

struct Segment {
    host: u64,
    from: Source,
    len: u64,
}

impl Qcow2Writer {
    fn fill_from_below(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64> {
        self.prepare()?;
        let cluster = self.core.cluster();
        let (mut at, end) = (cluster.floor(at), at.saturating_add(len));
        let mut copied = 0;
        loop {
            let end = end.min(self.meta.read().longest(self.size()));
            if at >= end {
                return Ok(copied);
            }
            self.check_poison()?;
            let turn = self.core.rest_of_table(at, end - at).min(MAX_TURN);
            let held = self.hold(at, turn);
            copied += self.fill_held(at, turn, fill)?;
            drop(held);
            self.relieve()?;
            at = cluster.floor(at + turn - 1) + cluster.size();
        }
    }

    /// One turn, within one L2 table of each, for whoever holds the range.
    fn fill_held(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64> {
        let longest = self.meta.read().longest(self.size());
        let mut spots = self.meta.write().silent_spots(&self.core, at, len, self.size())?;
        let mut answers = Answers { fill, end: longest, from: 0, to: 0, wanted: Wanted::Nothing };
        for spot in &mut spots {
            self.ask(spot, &mut answers)?;
        }
        spots.retain(|spot| spot.data | spot.zero != 0);
        if spots.is_empty() {
            return Ok(0);
        }
        if self.meta.write().is_being_left(&self.core, &spots, self.size())? {
            // On disk, who has left still refers to what is about to be changed.
            self.flush()?;
        }
        let plan = self.with_tables(|meta| {
            for group in meta.groups(&self.core, at, self.size())? {
                meta.ready_table(&self.core, &group, at)?;
            }
            meta.plan(&self.core, &spots, self.size())
        })?;
        self.carry_out(&plan, &spots, at, longest).inspect_err(|_| {
            if self.check_poison().is_ok() {
                // Nothing refers to the clusters: they are as free as before.
                let mut meta = self.meta.write();
                for run in &plan.runs {
                    let _ = meta.give_back(&self.core, *run).map_err(|error| self.poisoned_by(error));
                }
            }
        })
    }

    /// Bytes of what has an answer of its own in the tables.
    fn fill_unit(&self) -> u64 {
        unit_len(&self.core)
    }

    fn ask(&self, spot: &mut Spot, answers: &mut Answers<'_>) -> Result<()> {
        let unit = self.fill_unit();
        for index in (0..SUBCLUSTERS).filter(|index| spot.silent >> index & 1 == 1) {
            let start = spot.guest + u64::from(index) * unit;
            let bit = 1 << index;
            match answers.of(start, unit)? {
                Wanted::Nothing => {}
                Wanted::Zero if self.core.format.version == Version::V2 => {
                    spot.data |= bit;
                    spot.blank |= bit;
                }
                Wanted::Zero => spot.zero |= bit,
                Wanted::Data => spot.data |= bit,
            }
        }
        Ok(())
    }

    /// Puts the data where it belongs, then lets the tables name it.
    fn carry_out(&self, plan: &Plan, spots: &[Spot], at: u64, longest: u64) -> Result<u64> {
        let core = &self.core;
        self.check_poison()?;
        if self.raw_data
            && let Some(data_file) = &core.data_file
        {
            let unit = self.fill_unit();
            for spot in spots {
                for (from, to) in runs_of(spot.zero) {
                    let (start, end) = (spot.guest + from * unit, (spot.guest + to * unit).min(self.size()));
                    zero_bytes(&**data_file, start, end - start, Zeroing::Unmap)?;
                }
            }
        }
        let copied = self.write_segments(&self.segments(plan, spots, longest))?;
        self.data_dirty.store(true, Ordering::Release);
        let mut meta = self.meta.write();
        meta.name_filled(core, plan, spots, at, self.size()).map_err(|error| self.poisoned_by(error))?;
        Ok(copied)
    }

    fn segments(&self, plan: &Plan, spots: &[Spot], longest: u64) -> Vec<Segment> {
        let core = &self.core;
        let (size, unit) = (core.cluster().size(), self.fill_unit());
        let blank = |guest: u64| {
            let index = spots.binary_search_by_key(&guest, |spot| spot.guest).expect("a spot of the plan");
            spots[index].blank
        };
        let mut all: Vec<Segment> = Vec::new();
        let mut push = |host: u64, from: Source, len: u64| {
            if len == 0 {
                return;
            }
            if let Some(last) = all.last_mut()
                && last.host + last.len == host
                && last.len < MAX_TURN
                && match (last.from, from) {
                    (Source::Below(start), Source::Below(next)) | (Source::File(start), Source::File(next)) => {
                        start + last.len == next
                    }
                    (Source::Zero, Source::Zero) => true,
                    _ => false,
                }
            {
                last.len += len;
            } else {
                all.push(Segment { host, from, len });
            }
        };
        let mut from_below = |host: u64, guest: u64, mask: u32, is_fresh: bool| {
            let blank = blank(guest);
            for (mask, is_blank) in [(mask & !blank, false), (mask & blank, true)] {
                for (from, to) in runs_of(mask) {
                    let (start, end) = (guest + from * unit, guest + to * unit);
                    let shown = if is_blank { 0 } else { end.min(longest).saturating_sub(start) };
                    push(host + from * unit, Source::Below(start), shown);
                    // A data file is no longer than the disk, and new clusters hold zeroes.
                    if !is_fresh && core.data_file.is_none() {
                        push(host + from * unit + shown, Source::Zero, end - start - shown);
                    }
                }
            }
        };
        let mut clusters =
            plan.runs.iter().flat_map(|run| (run.first..run.first + run.count).map(|n| (n, run.is_fresh)));
        let mut old: Vec<Segment> = Vec::new();
        for job in &plan.jobs {
            let (number, is_fresh) = clusters.next().expect("a cluster for each job");
            let host = number * size;
            from_below(host, job.guest, job.mask, is_fresh);
            if let Some((from, allocated)) = job.old {
                for (start, end) in runs_of(allocated) {
                    let (start, len) = (start * unit, (end - start) * unit);
                    old.push(Segment { host: host + start, from: Source::File(from.0 + start), len });
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
    fn write_segments(&self, segments: &[Segment]) -> Result<u64> {
        let (mut bytes, mut copied) = (Vec::new(), 0);
        let below = self.below();
        let mut rest = segments;
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
                match (segment.from, &below) {
                    (Source::Below(guest), Some(below)) => {
                        below.read_at(guest, part)?;
                        copied += segment.len;
                    }
                    (Source::File(at), _) => self.read_data(HostOffset(at), part)?,
                    (Source::Below(_), None) | (Source::Zero, _) => {}
                }
            }
            self.core.data().write_at(first.host, &bytes)?;
            rest = &rest[count..];
        }
        Ok(copied)
    }
}

/// What was answered last, which may hold for more.
struct Answers<'a> {
    fill: &'a dyn Fill,
    /// Nothing is asked from here on.
    end: u64,
    from: u64,
    to: u64,
    wanted: Wanted,
}

impl Answers<'_> {
    /// What `[start, start + len)` needs as a whole: data, unless one answer holds for all of it.
    fn of(&mut self, start: u64, len: u64) -> Result<Wanted> {
        let (mut at, end) = (start, (start + len).min(self.end));
        let mut whole: Option<Wanted> = None;
        while at < end {
            if !(self.from..self.to).contains(&at) {
                let asked = self.end - at;
                let (wanted, run) = self.fill.wanted(at, asked)?;
                assert!(run > 0 && run <= asked, "an answer for what was asked");
                (self.from, self.to, self.wanted) = (at, at + run, wanted);
            }
            whole = match whole {
                None => Some(self.wanted),
                Some(other) if other == self.wanted => Some(other),
                // What shows through now is right for any mixture.
                Some(_) => Some(Wanted::Data),
            };
            at = self.to;
        }
        Ok(whole.unwrap_or(Wanted::Nothing))
    }
}

fn unit_len(core: &Core) -> u64 {
    let size = core.cluster().size();
    if core.format.extended { size / u64::from(SUBCLUSTERS) } else { size }
}

/// The runs of set bits, as first and end.
fn runs_of(mask: u32) -> impl Iterator<Item = (u64, u64)> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let rest = mask.checked_shr(from).unwrap_or(0);
        if rest == 0 {
            return None;
        }
        let start = from + rest.trailing_zeros();
        let end = start + (mask >> start).trailing_ones();
        from = end;
        Some((start.into(), end.into()))
    })
}

/// Where an entry is silent, up to `end` of the disk, and where it has data.
fn silent(core: &Core, words: Words, guest: u64, end: u64) -> Result<(u32, u32)> {
    let corrupt = |reason: crate::format::Malformed| {
        core.corrupt(format_args!("the L2 entry of guest offset {guest:#x}: {}", reason.fact()))
    };
    if !core.format.extended {
        let entry = core.format.l2(words.entry, GuestOffset(guest)).map_err(corrupt)?;
        return Ok((u32::from(entry.mapping == Mapping::Hole && guest < end), 0));
    }
    let entry = core.format.l2_extended(words.entry, words.bitmap, GuestOffset(guest)).map_err(corrupt)?;
    let count = end.saturating_sub(guest).div_ceil(unit_len(core)).min(SUBCLUSTERS.into());
    if entry.compressed().is_some() || count == 0 {
        return Ok((0, entry.allocated()));
    }
    Ok((!(entry.allocated() | entry.zero()) & subclusters(0, count), entry.allocated()))
}

impl Meta {
    /// The clusters of `[at, at + len)` at which somebody is silent.
    fn silent_spots(&mut self, core: &Core, at: u64, len: u64, size: u64) -> Result<Vec<Spot>> {
        let groups = self.groups(core, at, size)?;
        let mut spots = Vec::new();
        for guest in (at..at + len).step_by(core.cluster().size() as usize) {
            let mut all = 0;
            for group in &groups {
                let words = self.entry_in(core, group.table, guest)?;
                all |= silent(core, words, guest, group.end)?.0;
            }
            if all != 0 {
                spots.push(Spot { guest, silent: all, data: 0, blank: 0, zero: 0 });
            }
        }
        Ok(spots)
    }

    /// Whether a table or a cluster of a spot waits for a flush to lose references.
    fn is_being_left(&mut self, core: &Core, spots: &[Spot], size: u64) -> Result<bool> {
        for group in self.groups(core, spots[0].guest, size)? {
            let Some(table) = group.table.filter(|_| !group.is_active_alone()) else { continue };
            if self.is_pending(core, core.cluster().index(table.0))? {
                return Ok(true);
            }
            for spot in spots.iter().filter(|_| core.format.extended) {
                let words = self.entry_in(core, group.table, spot.guest)?;
                let host = core.cluster().index(EntryFormat::raw_offset(words.entry));
                if host != 0 && !EntryFormat::is_compressed(words.entry) && self.is_pending(core, host)? {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// Who gets which cluster; takes the clusters.
    fn plan(&mut self, core: &Core, spots: &[Spot], size: u64) -> super::allocate::Attempt<Plan> {
        let mut plan = Plan::default();
        let Some(first) = spots.first() else { return Ok(plan) };
        let groups = self.groups(core, first.guest, size)?;
        for spot in spots.iter().filter(|spot| spot.data != 0) {
            self.plan_spot(core, spot, &groups, &mut plan)?;
        }
        let mut left = plan.jobs.len() as u64;
        while left > 0 {
            match self.allocate(core, left, false) {
                Ok(run) => {
                    plan.runs.push(run);
                    left -= run.count;
                }
                Err(stop) => {
                    for run in plan.runs {
                        self.give_back(core, run)?;
                    }
                    return Err(stop);
                }
            }
        }
        let clusters = plan.runs.iter().flat_map(|run| run.first..run.first + run.count);
        for (job, cluster) in plan.jobs.iter().zip(clusters) {
            let host = HostOffset(cluster * core.cluster().size());
            plan.hosts.extend(job.roots.iter().map(|root| ((job.guest, *root), (host, job.roots.len()))));
        }
        Ok(plan)
    }

    fn plan_spot(&mut self, core: &Core, spot: &Spot, groups: &[Group], plan: &mut Plan) -> Result<()> {
        let mut by_host: Vec<(Option<HostOffset>, Vec<Share<'_>>)> = Vec::new();
        for group in groups {
            let words = self.entry_in(core, group.table, spot.guest)?;
            let (silent, allocated) = silent(core, words, spot.guest, group.end)?;
            let host = match EntryFormat::raw_offset(words.entry) {
                _ if EntryFormat::is_compressed(words.entry) => continue,
                0 => None,
                host => Some(HostOffset(host)),
            };
            let data = silent & spot.data;
            // Without subclusters a cluster is silent as a whole.
            if data == 0 && (host.is_none() || !core.format.extended) {
                continue;
            }
            let is_own = group.is_active_alone() && EntryFormat::copied(words.entry);
            let share = Share { group, data, allocated, is_own };
            match by_host.iter_mut().find(|(other, _)| *other == host) {
                Some((_, all)) => all.push(share),
                None => by_host.push((host, vec![share])),
            }
        }
        for (host, all) in by_host {
            let data = all.iter().fold(0, |mask, share| mask | share.data);
            let allocated = all.iter().fold(0, |mask, share| mask | share.allocated);
            if data == 0 {
                continue;
            }
            if core.data_file.is_some() {
                let host = HostOffset(spot.guest);
                plan.in_place.push(InPlace { host, guest: spot.guest, mask: data });
                continue;
            }
            let Some(host) = host else {
                plan.share(core, spot.guest, &all);
                continue;
            };
            let users: u64 = all.iter().map(|share| share.group.roots.len() as u64).sum();
            let cluster = core.cluster().index(host.0);
            let is_all = matches!(all[..], [Share { is_own: true, .. }]) || self.count(core, cluster)? == users;
            self.may_be_data(core, host, core.cluster().size())?;
            if is_all && data & allocated == 0 {
                plan.in_place.push(InPlace { host, guest: spot.guest, mask: data });
            } else {
                // Somebody else has bytes there: all that are known leave it.
                plan.jobs.extend(all.iter().map(|share| Job {
                    guest: spot.guest,
                    mask: share.data,
                    roots: share.group.roots.clone(),
                    old: Some((host, share.allocated)),
                }));
            }
        }
        Ok(())
    }

    /// Lets all tables name what has been filled, and counts it.
    fn name_filled(&mut self, core: &Core, plan: &Plan, spots: &[Spot], at: u64, size: u64) -> Result<()> {
        // Afresh: meanwhile the active table may have come to be one of its own.
        let groups = self.groups(core, at, size)?;
        for (host, count) in plan.hosts.values() {
            if *count > 1 {
                self.set_count(core, core.cluster().index(host.0), *count as u64)?;
            }
        }
        for spot in spots {
            for group in &groups {
                let Some(table) = group.table else { continue };
                let words = self.entry_in(core, group.table, spot.guest)?;
                let (silent, _) = silent(core, words, spot.guest, group.end)?;
                let (data, zero) = (silent & spot.data, silent & spot.zero);
                let new = plan.hosts.get(&(spot.guest, group.roots[0])).copied();
                let new =
                    new.filter(|_| data != 0 || EntryFormat::raw_offset(words.entry) != 0 && core.format.extended);
                let entry = match new {
                    Some((host, 1)) => EntryFormat::owned(host),
                    Some((host, _)) => EntryFormat::shared(EntryFormat::owned(host)),
                    None if data != 0 && core.data_file.is_some() => EntryFormat::owned(HostOffset(spot.guest)),
                    None if zero != 0 && !core.format.extended => EntryFormat::zero(None),
                    None => words.entry,
                };
                let bitmap = if core.format.extended && !EntryFormat::is_compressed(words.entry) {
                    let (had, was_zero) = (words.bitmap as u32, (words.bitmap >> 32) as u32);
                    SubclusterEntry::bitmap(had | data, was_zero | zero)
                } else {
                    words.bitmap
                };
                self.set_entry_in(core, table, spot.guest, Words { entry, bitmap })?;
                if new.is_some() {
                    group.roots.iter().try_for_each(|_| self.release(core, words))?;
                }
            }
        }
        Ok(())
    }
}

impl Plan {
    /// One new cluster for all that have none, or as many as counts of this width need.
    fn share(&mut self, core: &Core, guest: u64, all: &[Share<'_>]) {
        let most = max_refcount(core.order);
        let mut job: Option<Job> = None;
        for Share { group, data, .. } in all {
            let fits = |job: &Job| (job.roots.len() + group.roots.len()) as u64 <= most;
            match &mut job {
                Some(job) if fits(job) => {
                    job.mask |= data;
                    job.roots.extend(&group.roots);
                }
                _ => {
                    let next = Job { guest, mask: *data, roots: group.roots.clone(), old: None };
                    self.jobs.extend(job.replace(next));
                }
            }
        }
        self.jobs.extend(job);
    }
}
