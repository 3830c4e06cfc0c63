//! Ranges that become zero, and ranges that get their space allocated.
//!
//! Whole clusters (subclusters, if there are any) become zero in the tables; partial ones at the edges are
//! written, unless all bytes around them read as zero anyway. Version 2 has no zero flag: there a cluster is
//! freed only where nothing below would be visible, else zeroes are written.
//!
//! Space is punched before the mapping changes, never later: by then the cluster may be allocated again. A
//! crash in between shows zeroes, as requested.

use std::sync::atomic::Ordering;

use crate::error::Result;
use crate::format::entry::SUBCLUSTERS;
use crate::format::{EntryFormat, Mapping, RawL2Entry, SubclusterEntry, Version};
use crate::units::{BlockStatus, HostOffset, Run};

use super::allocate::ClusterCount;
use super::qcow2::{Qcow2Writer, subclusters};
use super::tables::{Tables, entry_run};
use super::{Zeroing, where_possible, zero_bytes};

/// Clusters whose entries change at once.
const BATCH: usize = 1024;

/// A cluster, part of which becomes zero.
struct ZeroChange {
    guest: u64,
    from: u64,
    to: u64,
    /// The part that the disk has, or will have.
    disk_end: u64,
}

impl ZeroChange {
    /// Bytes of the disk that become zero.
    fn disk_len(&self) -> u64 {
        self.to.min(self.disk_end) - self.from
    }
}

impl Qcow2Writer {
    /// Makes a range read as zeroes.
    pub(super) fn zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        self.prepare_content()?;
        let end = at + len;
        let mut at = at;
        while at < end {
            self.check_poison()?;
            let turn = self.image.rest_of_table(at, end - at);
            let _held = self.hold(at, turn);
            self.zero_held(at, turn, zeroing, self.size())?;
            at += turn;
            self.write_back_if_pressed()?;
        }
        Ok(())
    }

    /// The same with the range held by the caller; the disk ends, or will end, at `disk_end`.
    pub(super) fn zero_held(&self, at: u64, len: u64, zeroing: Zeroing, disk_end: u64) -> Result<()> {
        if self.raw_data
            && let Some(data_file) = &self.image.data_file
        {
            zero_bytes(&**data_file, at, len, zeroing)?;
            self.data_dirty.store(true, Ordering::Release);
        }
        let unit = self.unit();
        let end = at + len;
        let first_whole = at.next_multiple_of(unit);
        let last_whole = if end == disk_end { end.next_multiple_of(unit) } else { end - end % unit };
        if first_whole >= last_whole {
            let middle = first_whole.min(end);
            self.zero_part(at, middle, zeroing, disk_end)?;
            return self.zero_part(middle, end, zeroing, disk_end);
        }
        self.zero_part(at, first_whole, zeroing, disk_end)?;
        self.zero_units(first_whole, last_whole, zeroing, disk_end)?;
        self.zero_part(last_whole, end.max(last_whole), zeroing, disk_end)
    }

    /// Bytes of the unit that has its own mapping in the tables.
    fn unit(&self) -> u64 {
        let size = self.image.cluster().size();
        if self.image.format.extended { size / u64::from(SUBCLUSTERS) } else { size }
    }

    /// Zeroes less than a unit.
    fn zero_part(&self, from: u64, to: u64, zeroing: Zeroing, disk_end: u64) -> Result<()> {
        if from >= to || self.reads_zero(from, to - from)? {
            return Ok(());
        }
        let unit = self.unit();
        let (unit_start, unit_end) = (from - from % unit, from - from % unit + unit);
        let rest = unit_end.min(disk_end).saturating_sub(to);
        if self.reads_zero(unit_start, from - unit_start)? && self.reads_zero(to, rest)? {
            return self.zero_units(unit_start, unit_end, zeroing, disk_end);
        }
        self.write_held(from, &vec![0; (to - from) as usize])
    }

    /// Writes; the caller holds the range.
    pub(super) fn write_held(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let position = at + done as u64;
            let in_place = self.write_in_place(position, &bytes[done..])?;
            done += if in_place > 0 { in_place } else { self.fill(position, &bytes[done..])? };
        }
        Ok(())
    }

    /// Zeroes whole units.
    fn zero_units(&self, start: u64, end: u64, zeroing: Zeroing, disk_end: u64) -> Result<()> {
        let size = self.image.cluster().size();
        let unit = self.unit();
        let mut changes = Vec::new();
        let mut at = start;
        while at < end {
            let Run { value: entry, len } = self.lookup(at, end - at)?;
            let status = match entry.mapping {
                Mapping::Zero(_) => Run::new(BlockStatus::Zero, len),
                Mapping::Hole => match self.backing() {
                    Some(backing) => backing.status_run(at, len)?,
                    None => Run::new(BlockStatus::Zero, len),
                },
                Mapping::Data(_) | Mapping::Compressed(_) => Run::new(BlockStatus::Data, len),
            };
            // Nothing to do, unless a cluster can be freed.
            if status.value == BlockStatus::Zero
                && (entry.mapping == Mapping::Hole || zeroing == Zeroing::Keep)
            {
                at += status.len;
                continue;
            }
            let guest = self.image.cluster().floor(at);
            let from = (at - at % unit).max(start);
            changes.push(ZeroChange { guest, from, to: (guest + size).min(end), disk_end });
            at = guest + size;
            if changes.len() == BATCH {
                self.apply(&changes, zeroing)?;
                changes.clear();
            }
        }
        self.apply(&changes, zeroing)
    }

    fn apply(&self, changes: &[ZeroChange], zeroing: Zeroing) -> Result<()> {
        if self.image.format.version == Version::V2 {
            return changes.iter().try_for_each(|change| self.zero_version_2(change, zeroing));
        }
        if zeroing == Zeroing::Unmap {
            self.punch_space(changes)?;
        }
        for change in changes {
            let is_whole = change.to - change.from == self.image.cluster().size();
            let is_done = self.with_tables(|tables| {
                let words = tables.entry(&self.image, change.guest)?;
                if EntryFormat::is_compressed(words.entry) && !is_whole {
                    return Ok(false);
                }
                tables.own_l2_table(&self.image, change.guest)?;
                let words = tables.entry(&self.image, change.guest)?;
                self.zero_entry(tables, change, words, zeroing)?;
                Ok(true)
            })?;
            if !is_done {
                // Part of a compressed cluster: the rest needs a cluster of its own.
                self.write_held(change.from, &vec![0; change.disk_len() as usize])?;
            }
        }
        Ok(())
    }

    /// Changes one entry; its former clusters are free after the next flush.
    fn zero_entry(
        &self,
        tables: &mut Tables,
        change: &ZeroChange,
        words: RawL2Entry,
        zeroing: Zeroing,
    ) -> Result<()> {
        let image = &self.image;
        let kept = self.preallocated_cluster_of(words, change.guest).filter(|_| zeroing == Zeroing::Keep);
        if !image.format.extended {
            let new = RawL2Entry { entry: EntryFormat::zero(kept), bitmap: 0 };
            tables.set_entry(image, change.guest, new)?;
            if kept.is_none() {
                tables.release(image, words)?;
            }
            return Ok(());
        }
        let unit = self.unit();
        let end = (change.to - change.guest).div_ceil(unit);
        let mask = subclusters((change.from - change.guest) / unit, end);
        let is_compressed = EntryFormat::is_compressed(words.entry);
        let (allocated, zero) =
            if is_compressed { (0, 0) } else { (words.bitmap as u32 & !mask, (words.bitmap >> 32) as u32) };
        let keeps = !is_compressed && (kept.is_some() || allocated != 0);
        let entry = if keeps { words.entry } else { 0 };
        tables.set_entry(
            image,
            change.guest,
            RawL2Entry { entry, bitmap: SubclusterEntry::bitmap(allocated, zero | mask) },
        )?;
        if !keeps {
            tables.release(image, words)?;
        }
        Ok(())
    }

    /// The cluster that an entry may keep preallocated while it reads as zeroes.
    fn preallocated_cluster_of(&self, words: RawL2Entry, guest: u64) -> Option<HostOffset> {
        let has_data_file = self.image.data_file.is_some();
        if has_data_file && (EntryFormat::copied(words.entry) || EntryFormat::raw_offset(words.entry) != 0) {
            return Some(HostOffset(guest));
        }
        if has_data_file { None } else { self.preallocated_cluster(words, guest) }
    }

    /// Punches holes in clusters that belong to this disk alone.
    fn punch_space(&self, changes: &[ZeroChange]) -> Result<()> {
        if self.raw_data {
            return Ok(()); // done, as data
        }
        let mut hole: Option<(u64, u64)> = None;
        // Elsewhere the space stays allocated until the cluster is used again.
        let punch =
            |(start, end): (u64, u64)| where_possible(self.image.data().punch_hole(start, end - start));
        for change in changes {
            for (host, len) in self.own_places(change)? {
                hole = match hole {
                    Some((start, end)) if end == host.0 => Some((start, host.0 + len)),
                    Some(other) => {
                        punch(other)?;
                        Some((host.0, host.0 + len))
                    }
                    None => Some((host.0, host.0 + len)),
                };
                self.data_dirty.store(true, Ordering::Release);
            }
        }
        hole.map_or(Ok(()), punch)
    }

    /// The clusters of a change that belong to this disk alone.
    fn own_places(&self, change: &ZeroChange) -> Result<Vec<(HostOffset, u64)>> {
        let image = &self.image;
        let size = image.cluster().size();
        let mut places = Vec::new();
        self.with_tables(|tables| {
            places.clear();
            let words = tables.entry(image, change.guest)?;
            let kept =
                if image.data_file.is_some() { None } else { self.preallocated_cluster(words, change.guest) };
            if let Some(host) = kept.filter(|_| change.to - change.from == size) {
                places.push((host, size));
            } else {
                let mut at = change.from;
                while at < change.to {
                    let run = entry_run(image, words, at)?.at_most(change.to - at);
                    if let Some(host) = run.value.own_data() {
                        places.push((host, run.len));
                    }
                    at += run.len;
                }
            }
            for (host, len) in &places {
                tables.may_be_data(image, *host, *len)?;
            }
            Ok(())
        })?;
        Ok(places)
    }

    fn zero_version_2(&self, change: &ZeroChange, zeroing: Zeroing) -> Result<()> {
        let len = change.disk_len();
        if self.reads_zero(change.from, len)? {
            return Ok(());
        }
        let size = self.image.cluster().size();
        let shines_through = match self.backing() {
            None => false,
            Some(backing) => {
                let run = backing.status_run(change.guest, size)?;
                run.value == BlockStatus::Data || run.len < size
            }
        };
        let is_whole = change.to - change.from == size;
        if zeroing == Zeroing::Keep || shines_through || !is_whole || self.image.data_file.is_some() {
            return self.write_held(change.from, &vec![0; len as usize]);
        }
        self.punch_space(std::slice::from_ref(change))?;
        self.with_tables(|tables| {
            tables.own_l2_table(&self.image, change.guest)?;
            let words = tables.entry(&self.image, change.guest)?;
            tables.set_entry(&self.image, change.guest, RawL2Entry::default())?;
            tables.release(&self.image, words)?;
            Ok(())
        })
    }

    /// Allocates space for a range.
    pub(super) fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.prepare()?;
        let cluster = self.image.cluster();
        let end = (at + len).min(self.size());
        let mut guest = cluster.floor(at);
        while guest < end {
            let held = self.ranges.hold(guest, guest + cluster.size());
            self.allocate_cluster(guest, (guest + cluster.size()).min(self.size()))?;
            drop(held);
            guest += cluster.size();
            self.write_back_if_pressed()?;
        }
        Ok(())
    }

    fn allocate_cluster(&self, guest: u64, end: u64) -> Result<()> {
        let image = &self.image;
        let size = image.cluster().size();
        let words = self.with_tables(|tables| {
            let words = tables.entry(image, guest)?;
            entry_run(image, words, guest)?;
            if let Some(host) = self.preallocated_cluster(words, guest) {
                tables.may_be_data(image, host, size)?;
            }
            Ok(words)
        })?;
        if image.data_file.is_some() {
            self.allocate_space(HostOffset(guest), end - guest)?;
        } else if let Some(host) = self.preallocated_cluster(words, guest) {
            self.allocate_space(host, size)?;
        } else if image.format.version == Version::V3 && self.reads_zero(guest, end - guest)? {
            return self.preallocate(guest);
        }
        // Bytes of the backing, or of a shared cluster, get a cluster of their own.
        let mut at = guest;
        while at < end {
            let Run { value: entry, len } = self.lookup(at, end - at)?;
            let is_placed = entry.own_data().is_some()
                || (entry.mapping == Mapping::Zero(None)
                    && (image.data_file.is_some() || self.preallocated_cluster(words, guest).is_some()));
            if !is_placed {
                let mut bytes = vec![0; len as usize];
                self.read_inner(at, &mut bytes)?;
                self.write_held(at, &bytes)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Preallocates a cluster for an entry that reads as zeroes.
    fn preallocate(&self, guest: u64) -> Result<()> {
        let image = &self.image;
        let place = self.with_tables(|tables| {
            tables.own_l2_table(image, guest)?;
            tables.allocate(image, ClusterCount::Exactly(1))
        })?;
        let host = place.clusters().start(image);
        self.allocate_space(host, image.cluster().size())?;
        let bitmap = if image.format.extended { SubclusterEntry::bitmap(0, u32::MAX) } else { 0 };
        let entry =
            if image.format.extended { EntryFormat::owned(host) } else { EntryFormat::zero(Some(host)) };
        let mut tables = self.tables.write();
        let old = tables.entry(image, guest)?;
        place.commit();
        tables
            .set_entry(image, guest, RawL2Entry { entry, bitmap })
            .map_err(|error| self.poisoned_by(error))?;
        tables.release(image, old).map_err(|error| self.poisoned_by(error))
    }

    fn allocate_space(&self, host: HostOffset, len: u64) -> Result<()> {
        where_possible(self.image.data().allocate(host.0, len))
    }
}
