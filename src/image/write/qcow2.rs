//! The active disk of a qcow2 image: reading it, and writing it.
//!
//! A write to clusters that belong to this disk alone goes straight to their location, in parallel with all
//! others. Any other write holds its range of clusters, writes head, data and tail to clusters that nothing
//! refers to yet, and changes the mapping only after that.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::format::compressed::decompress;
use crate::format::entry::SUBCLUSTERS;
use crate::format::{Compressed, Compression, EntryFormat, L2Entry, Mapping, RawL2Entry, SubclusterEntry};
use crate::units::{BlockStatus, GuestOffset, HostOffset, Run, are_zero};

use super::BackingDisk;
use super::allocate::{AllocError, ClusterCount};
use super::copy::{Payload, read_exactly};
use super::flush::Flushes;
use super::ranges::{Held, Ranges};
use super::reservation::Reservation;
use super::tables::{ImageFile, LookupMiss, Tables, entry_run};

/// Maximum number of freed clusters that wait for a flush.
const MAX_PENDING: usize = 1 << 16;
/// Maximum bytes that one turn of an allocating write covers.
pub(super) const MAX_TURN: u64 = 4 << 20;
/// Bytes of decompressed clusters that are cached.
const DECOMPRESSED: usize = 4 << 20;

/// A qcow2 image that is open for writing.
pub(super) struct Qcow2Writer {
    pub(super) image: ImageFile,
    /// Cloned and released at once: another may replace it at any time.
    pub(super) backing: RwLock<Option<Arc<dyn BackingDisk>>>,
    pub(super) compression: Compression,
    /// The data file is a raw image by itself: zero ranges of the disk must be zero there.
    pub(super) raw_data: bool,
    pub(super) size: AtomicU64,
    /// Ranges of clusters whose mappings are being changed. Taken before everything else here; held across
    /// data I/O.
    pub(super) ranges: Ranges,
    /// Held, shared, from the lookup of a location in the file to the end of the I/O there; exclusively, for
    /// a moment, before freed clusters may be used again. Taken before `tables`.
    pub(super) reuse_gate: RwLock<()>,
    /// One flush (or growth of a table) at a time. Taken before `tables`; held across I/O.
    pub(super) flushes: Flushes,
    /// The tables. A holder never waits for another lock.
    pub(super) tables: RwLock<Tables>,
    /// Guest data has been written since the last flush began.
    pub(super) data_dirty: AtomicBool,
    /// There has been a barrier since the image was opened.
    pub(super) has_synced: AtomicBool,
    /// The end of the space that is reserved beyond the end of the file; 0 if there is none.
    pub(super) reserved_end: AtomicU64,
    /// The preparations of the first change are done.
    pub(super) prepared: AtomicBool,
    /// The preparations of the first change of the disk's content are done.
    pub(super) is_told: AtomicBool,
    pub(super) preparing: Mutex<()>,
    /// A barrier has failed: the file may read differently after a crash.
    pub(super) has_lost_writes: AtomicBool,
    /// Why nothing is written any more.
    pub(super) poison: OnceLock<Error>,
    pub(super) decompressed: Cache<(u64, u32), Arc<[u8]>>,
}

/// A range of the file that a mapping is about to name, and its future entries.
struct WriteTarget {
    /// The offset of the first cluster on the disk.
    guest: u64,
    /// The offset of its first byte.
    host: HostOffset,
    /// The file holds zeroes there.
    is_fresh: bool,
    /// The new clusters, where some are needed.
    reservation: Option<Reservation>,
    /// The entries as they were.
    old: Vec<RawL2Entry>,
    /// From here on other writers may be writing to the disk's own clusters.
    limit: u64,
}

impl Qcow2Writer {
    pub(super) fn decompressed_cache() -> Cache<(u64, u32), Arc<[u8]>> {
        Cache::new(DECOMPRESSED)
    }

    /// The current backing.
    pub(super) fn backing(&self) -> Option<Arc<dyn BackingDisk>> {
        self.backing.read().clone()
    }

    /// Replaces the backing by one that shows the same bytes.
    pub(super) fn set_backing(&self, backing: Option<Arc<dyn BackingDisk>>) {
        *self.backing.write() = backing;
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The entry of the tables for an offset. A caller that does I/O there holds the gate.
    pub(super) fn lookup(&self, at: u64, max: u64) -> Result<Run<L2Entry>> {
        loop {
            match self.tables.read().map(&self.image, at, max) {
                Ok(run) => return Ok(run),
                Err(LookupMiss::Failed(error)) => return Err(error),
                Err(LookupMiss::NotLoaded) => {}
            }
            self.tables.write().load(&self.image, at)?;
        }
    }

    /// Fills `buf` with the bytes at `at`.
    pub(super) fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let position = at + done as u64;
            let gate = self.reuse_gate.read();
            let Run { value: entry, len } = self.lookup(position, (buf.len() - done) as u64)?;
            let part = &mut buf[done..done + len as usize];
            if entry.mapping == Mapping::Hole {
                // Nothing of this file is read: a slow layer below must not delay flushes.
                drop(gate);
            }
            self.read_mapping(entry.mapping, position, part)?;
            done += len as usize;
        }
        if self.image.has_snapshots() {
            // Reading may have repaired tables. If they cannot be written, a writer gets the error.
            let _ = self.write_back_if_pressed();
        }
        Ok(())
    }

    /// The same; the caller holds the range, so that no cluster there is freed.
    pub(super) fn read_inner(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let position = at + done as u64;
            let Run { value: entry, len } = self.lookup(position, (buf.len() - done) as u64)?;
            self.read_mapping(entry.mapping, position, &mut buf[done..done + len as usize])?;
            done += len as usize;
        }
        Ok(())
    }

    fn read_mapping(&self, mapping: Mapping, position: u64, part: &mut [u8]) -> Result<()> {
        match mapping {
            Mapping::Data(host) => return self.read_data(host, part),
            Mapping::Compressed(stream) => {
                let cluster = self.decompress(stream)?;
                let within = self.image.cluster().within(position) as usize;
                part.copy_from_slice(&cluster[within..within + part.len()]);
            }
            Mapping::Hole => match self.backing() {
                Some(backing) => return backing.read_at(position, part),
                None => part.fill(0),
            },
            Mapping::Zero(_) => part.fill(0),
        }
        Ok(())
    }

    pub(super) fn read_data(&self, host: HostOffset, buf: &mut [u8]) -> Result<()> {
        let have = self.image.data().read_at(host.0, buf)?;
        if have == buf.len() {
            return Ok(());
        }
        let end = host.0 + have as u64;
        let fact = format!("{}: the file ends at {end:#x}, before the data it should hold", self.image.name);
        Err(Error::new(ErrorKind::Io, fact))
    }

    fn decompress(&self, stream: Compressed) -> Result<Arc<[u8]>> {
        // No stream is ever written: the bytes of a location stay unchanged, or are never asked for again.
        let key = (stream.at.0, stream.len);
        if let Some(cluster) = self.decompressed.get(&key) {
            return Ok(cluster);
        }
        let mut input = vec![0; stream.len as usize];
        let have = self.image.file.read_at(stream.at.0, &mut input)?;
        let mut cluster = vec![0; self.image.cluster().size() as usize];
        decompress(self.compression, &input[..have], &mut cluster).map_err(|reason| {
            self.image.corrupt(format_args!("compressed cluster at {}: {reason}", stream.at))
        })?;
        let cluster: Arc<[u8]> = cluster.into();
        self.decompressed.put(key, Arc::clone(&cluster), cluster.len());
        Ok(cluster)
    }

    /// Whether the disk is known to read as zeroes there, and the minimum length of that answer.
    pub(super) fn status_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>> {
        let Run { value: entry, len } = self.lookup(at, len)?;
        match entry.mapping {
            Mapping::Data(_) | Mapping::Compressed(_) => Ok(Run::new(BlockStatus::Data, len)),
            Mapping::Zero(_) => Ok(Run::new(BlockStatus::Zero, len)),
            Mapping::Hole => match self.backing() {
                Some(backing) => backing.status_run(at, len),
                None => Ok(Run::new(BlockStatus::Zero, len)),
            },
        }
    }

    /// As [`Self::status_run`], for seeking: an unreadable range is no hole, so that a copying program sees
    /// the error.
    pub(super) fn seek_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>> {
        match self.status_run(at, len) {
            Err(error) if error.kind() == ErrorKind::Corrupt => {
                let cluster = self.image.cluster();
                Ok(Run::new(BlockStatus::Data, (cluster.size() - cluster.within(at)).min(len)))
            }
            found => found,
        }
    }

    /// Whether all of a range is known to read as zeroes.
    pub(super) fn reads_zero(&self, at: u64, len: u64) -> Result<bool> {
        let mut done = 0;
        while done < len {
            let run = self.status_run(at + done, len - done)?;
            if run.value == BlockStatus::Data {
                return Ok(false);
            }
            done += run.len;
        }
        Ok(true)
    }

    /// Writes `bytes` at `at`.
    pub(super) fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.prepare_content()?;
        let mut done = 0;
        while done < bytes.len() {
            let position = at + done as u64;
            let rest = &bytes[done..];
            let in_place = self.write_in_place(position, rest)?;
            done += if in_place > 0 { in_place } else { self.write_elsewhere(position, rest)? };
        }
        self.write_back_if_pressed()
    }

    /// Overwrites clusters that belong to this disk alone; returns how many bytes that were, from the start
    /// of `bytes`.
    pub(super) fn write_in_place(&self, at: u64, bytes: &[u8]) -> Result<usize> {
        let _gate = self.reuse_gate.read();
        self.check_poison()?;
        let Run { value: entry, len } = self.lookup_to_write(at, bytes.len() as u64)?;
        let Some(host) = entry.own_data() else { return Ok(0) };
        self.image.data().write_at(host.0, &bytes[..len as usize])?;
        self.data_dirty.store(true, Ordering::Release);
        Ok(len as usize)
    }

    /// As [`Self::lookup`], for a write: damage found here ends all writing.
    pub(super) fn lookup_to_write(&self, at: u64, max: u64) -> Result<Run<L2Entry>> {
        loop {
            let found = {
                let tables = self.tables.read();
                tables.map(&self.image, at, max).and_then(|run| match run.value.own_data() {
                    // M3: no table is overwritten, whatever names it as data.
                    Some(host) => tables
                        .may_be_data(&self.image, host, run.len)
                        .map(|()| run)
                        .map_err(LookupMiss::Failed),
                    None => Ok(run),
                })
            };
            match found {
                Ok(run) => return Ok(run),
                Err(LookupMiss::Failed(error)) => return Err(self.damaged(error)),
                Err(LookupMiss::NotLoaded) => self.tables.write().load(&self.image, at)?,
            }
        }
    }

    /// Writes to clusters that are not allocated to this disk alone yet; returns how many bytes that were,
    /// which may be none if another thread was faster.
    fn write_elsewhere(&self, at: u64, bytes: &[u8]) -> Result<usize> {
        let len = self.image.rest_of_table(at, bytes.len() as u64).min(MAX_TURN);
        let _held = self.hold(at, len);
        self.fill(at, &bytes[..len as usize])
    }

    /// Waits for the clusters of a range, and holds them.
    pub(super) fn hold(&self, at: u64, len: u64) -> Held<'_> {
        let cluster = self.image.cluster();
        self.ranges.hold(cluster.floor(at), cluster.floor(at + len - 1) + cluster.size())
    }

    /// With the range held: allocates clusters for the first of `bytes`, and writes them there. Returns how
    /// many; none if the first has a cluster.
    pub(super) fn fill(&self, at: u64, bytes: &[u8]) -> Result<usize> {
        self.fill_with(at, Payload::Bytes(bytes))
    }

    /// The same with bytes of any source.
    pub(super) fn fill_with(&self, at: u64, payload: Payload<'_>) -> Result<usize> {
        let target = self.with_tables(|tables| self.find_target(tables, at, payload.len()))?;
        let Some(target) = target else { return Ok(0) };
        self.fill_target(target, at, payload)
    }

    /// The target of the bytes at `at`; `None` if they are allocated already.
    fn find_target(
        &self,
        tables: &mut Tables,
        at: u64,
        len: u64,
    ) -> std::result::Result<Option<WriteTarget>, AllocError> {
        let image = &self.image;
        let cluster = image.cluster();
        let guest = cluster.floor(at);
        let first = tables.entry(image, at)?;
        if entry_run(image, first, at)?.value.own_data().is_some() {
            return Ok(None);
        }
        tables.own_l2_table(image, at)?;
        // Read again: in a table of its own, flags may have been repaired.
        let first = tables.entry(image, at)?;
        if let Some(host) = self.preallocated_cluster(first, guest) {
            tables.may_be_data(image, host, cluster.size())?;
            let limit = self.end_of_unplaced(first, at)?;
            return Ok(Some(WriteTarget {
                guest,
                host,
                is_fresh: false,
                reservation: None,
                old: vec![first],
                limit,
            }));
        }
        let wanted = cluster.index(at + len - 1) - cluster.index(at) + 1;
        let mut old = vec![first];
        for index in 1..wanted {
            let position = guest + index * cluster.size();
            let words = tables.entry(image, position)?;
            let has_place = entry_run(image, words, position)?.value.own_data().is_some();
            if has_place || self.preallocated_cluster(words, position).is_some() {
                break;
            }
            old.push(words);
        }
        if image.data_file.is_some() {
            let host = HostOffset(guest);
            return Ok(Some(WriteTarget {
                guest,
                host,
                is_fresh: false,
                reservation: None,
                old,
                limit: u64::MAX,
            }));
        }
        let reservation = tables.allocate(image, ClusterCount::UpTo(old.len() as u64))?;
        let clusters = reservation.clusters();
        old.truncate(clusters.count as usize);
        let (host, is_fresh) = (clusters.start(image), reservation.is_fresh());
        Ok(Some(WriteTarget { guest, host, is_fresh, reservation: Some(reservation), old, limit: u64::MAX }))
    }

    /// Where, in the cluster of `at`, the first allocated subcluster after it begins.
    fn end_of_unplaced(&self, words: RawL2Entry, at: u64) -> Result<u64> {
        let cluster_end = self.image.cluster().floor(at) + self.image.cluster().size();
        let mut end = at;
        while end < cluster_end {
            let run = entry_run(&self.image, words, end)?;
            if run.value.own_data().is_some() {
                break;
            }
            end += run.len;
        }
        Ok(end)
    }

    /// The cluster of the file that an entry has preallocated for its cluster and that has no other
    /// reference.
    pub(super) fn preallocated_cluster(&self, words: RawL2Entry, guest: u64) -> Option<HostOffset> {
        if self.image.data_file.is_some() {
            // With subclusters, the others of the cluster may be allocated.
            return (self.image.format.extended && words.bitmap as u32 != 0).then_some(HostOffset(guest));
        }
        let host = EntryFormat::raw_offset(words.entry);
        let is_kept =
            EntryFormat::copied(words.entry) && !EntryFormat::is_compressed(words.entry) && host != 0;
        is_kept.then_some(HostOffset(host))
    }

    /// Writes the data to the target, then lets the tables name it.
    fn fill_target(&self, mut target: WriteTarget, at: u64, payload: Payload<'_>) -> Result<usize> {
        let image = &self.image;
        let target_end = target.guest + target.old.len() as u64 * image.cluster().size();
        let end = (at + payload.len()).min(target_end).min(target.limit);
        let (from, to) = self.region(&target, at, end)?;
        self.check_poison()?;
        match payload {
            Payload::Bytes(bytes) => {
                self.write_joined(&target, from, at, &bytes[..(end - at) as usize], to)?;
            }
            Payload::File(source, read_at, _) if (from, to) == (at, end) => {
                image.data().copy_from(target.host.0 + (at - target.guest), source, read_at, end - at)?;
            }
            Payload::File(source, read_at, _) => {
                self.write_joined(&target, from, at, &read_exactly(source, read_at, end - at)?, to)?;
            }
        }
        self.data_dirty.store(true, Ordering::Release);
        let mut tables = self.tables.write();
        // M4: from here on the tables name the clusters, which hold their data.
        let is_new = target.reservation.take().map(Reservation::commit).is_some();
        for (index, old) in target.old.iter().enumerate() {
            let within = index as u64 * image.cluster().size();
            let guest = target.guest + within;
            let host = HostOffset(target.host.0 + within);
            let words =
                self.with_data(*old, guest, host, from.max(guest), to.min(guest + image.cluster().size()));
            tables.set_entry(image, guest, words).map_err(|error| self.poisoned_by(error))?;
            if is_new {
                tables.release(image, *old).map_err(|error| self.poisoned_by(error))?;
            }
        }
        Ok((end - at) as usize)
    }

    /// The range that has to be written so that `[at, end)` can be: whole clusters, or the subclusters around
    /// it.
    fn region(&self, target: &WriteTarget, at: u64, end: u64) -> Result<(u64, u64)> {
        let image = &self.image;
        let size = image.cluster().size();
        let clusters = (target.guest, image.cluster().floor(end - 1) + size);
        let (mut from, mut to) = clusters;
        if image.format.extended {
            let unit = size / u64::from(SUBCLUSTERS);
            let is_partial = |words: &RawL2Entry, guest: u64| -> Result<bool> {
                // Other data of the old cluster has to move as well: then as a whole.
                let entry = image
                    .format
                    .l2_extended(words.entry, words.bitmap, GuestOffset(guest))
                    .map_err(|reason| image.corrupt(reason.fact()))?;
                Ok(entry.compressed().is_none() && (target.reservation.is_none() || entry.allocated() == 0))
            };
            let last = (to - target.guest) / size - 1;
            if is_partial(&target.old[0], target.guest)? {
                from = at - at % unit;
            }
            if is_partial(&target.old[last as usize], target.guest + last * size)? {
                to = end.next_multiple_of(unit);
            }
        }
        // A data file is no longer than the disk.
        Ok((from, if image.data_file.is_some() { to.min(self.size()).max(end) } else { to }))
    }

    /// Writes `[from, to)` of the disk to the target in one piece: `bytes` at `at`, and the disk's current
    /// bytes around them; zeroes at the edges are left out where the file holds them already.
    fn write_joined(&self, target: &WriteTarget, from: u64, at: u64, bytes: &[u8], to: u64) -> Result<()> {
        let host = |guest: u64| target.host.0 + (guest - target.guest);
        let end = at + bytes.len() as u64;
        if from == at && to == end {
            return self.image.data().write_at(host(at), bytes);
        }
        let mut head = vec![0; (at - from) as usize];
        let mut tail = vec![0; (to - end) as usize];
        let head_is_zero = self.read_around(from, &mut head)?;
        let tail_is_zero = self.read_around(end, &mut tail)?;
        if target.is_fresh && head_is_zero {
            head.clear();
        }
        if target.is_fresh && tail_is_zero {
            tail.clear();
        }
        let start = at - head.len() as u64;
        if head.is_empty() && tail.is_empty() {
            // Nothing at all: a cluster that is only to be allocated.
            return if bytes.is_empty() { Ok(()) } else { self.image.data().write_at(host(at), bytes) };
        }
        head.reserve_exact(bytes.len() + tail.len());
        head.extend_from_slice(bytes);
        head.extend_from_slice(&tail);
        self.image.data().write_at(host(start), &head)
    }

    /// Fills `buf` with the disk's current bytes, zeroes past its end; returns whether it is all zeroes.
    fn read_around(&self, at: u64, buf: &mut [u8]) -> Result<bool> {
        let size = self.size();
        let inside = size.saturating_sub(at).min(buf.len() as u64) as usize;
        buf[inside..].fill(0);
        if inside == 0 || self.reads_zero(at, inside as u64)? {
            buf.fill(0);
            return Ok(true);
        }
        self.read_inner(at, &mut buf[..inside])?;
        Ok(are_zero(buf))
    }

    /// The entry of a cluster that now has data of `[from, to)` at `host`.
    fn with_data(&self, old: RawL2Entry, guest: u64, host: HostOffset, from: u64, to: u64) -> RawL2Entry {
        let entry = EntryFormat::owned(host);
        if !self.image.format.extended {
            return RawL2Entry { entry, bitmap: 0 };
        }
        let unit = self.image.cluster().size() / u64::from(SUBCLUSTERS);
        let mask = subclusters((from - guest) / unit, (to - guest).div_ceil(unit));
        // A compressed cluster has no bits; all of it has been written.
        let (allocated, zero) = (old.bitmap as u32, (old.bitmap >> 32) as u32);
        RawL2Entry { entry, bitmap: SubclusterEntry::bitmap(allocated | mask, zero & !mask) }
    }

    /// Runs a change of the tables that may allocate; grows the refcount table if necessary.
    pub(super) fn with_tables<T>(
        &self,
        mut work: impl FnMut(&mut Tables) -> std::result::Result<T, AllocError>,
    ) -> Result<T> {
        loop {
            let outcome = {
                let mut tables = self.tables.write();
                // Checked under the lock: after a failed flush nothing is allocated any more.
                self.check_poison()?;
                work(&mut tables)
            };
            match outcome {
                Ok(done) => return Ok(done),
                Err(AllocError::Failed(error)) => return Err(self.damaged(error)),
                Err(AllocError::RefcountTableFull(entries)) => self.grow_refcount_table(entries)?,
            }
        }
    }

    /// Writes tables back if too many have changed, or too many clusters wait to be freed.
    pub(super) fn write_back_if_pressed(&self) -> Result<()> {
        let is_pressed = {
            let tables = self.tables.read();
            tables.slices.is_pressed() || tables.pending.len() > MAX_PENDING
        };
        if is_pressed { self.flush() } else { Ok(()) }
    }
}

/// The bits of subclusters `from..to`.
pub(super) fn subclusters(from: u64, to: u64) -> u32 {
    assert!(from < to && to <= u64::from(SUBCLUSTERS));
    (u32::MAX >> (u64::from(SUBCLUSTERS) - (to - from))) << from
}
