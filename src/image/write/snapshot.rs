//! Internal snapshots, taken while the disk is read and written.
//!
//! A snapshot is the active L1 table once more, and one reference more to everything that it reaches.
//! One write of 12 bytes within the header's first sector names it; whatever is cut off before that
//! leaves leaks, and COPIED flags that say too much of clusters that nobody else refers to.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{MAX_SNAPSHOTS, SNAPSHOTS_AT};
use crate::format::refcount::max_refcount;
use crate::format::snapshot::{MAX_TABLE_LEN, append, next_id};
use crate::format::{EntryFormat, Snapshot, Table};
use crate::image::read_snapshots;
use crate::units::HostOffset;

use super::allocate::Run;
use super::meta::{Core, Freed, Meta, SnapshotRoot, Words, piece_of, references};
use super::open::read_header;
use super::qcow2::Qcow2Writer;
use super::slices::Class;
use super::{Body, Writer};

/// An internal snapshot that is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name. Whether there is one of that name already is for the caller to see.
    pub name: Vec<u8>,
    /// Seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
}

impl Writer {
    /// Takes an internal snapshot of the disk, without VM state, while others read and write. What has
    /// been acknowledged before the call is in it; it is durable when this returns.
    ///
    /// Refused: `Unsupported` (a raw image, an external data file, refcounts too narrow), `Limit`.
    pub fn take_snapshot(&self, snapshot: &NewSnapshot) -> Result<()> {
        match &self.body {
            Body::Raw(raw) => Err(raw.without_snapshots()),
            Body::Qcow2(qcow2) => qcow2.take_snapshot(snapshot),
        }
    }

    /// The internal snapshots that the image has now.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        match &self.body {
            Body::Raw(_) => Ok(Vec::new()),
            Body::Qcow2(qcow2) => Ok(qcow2.snapshot_table()?.snapshots),
        }
    }
}

/// The snapshot table as it stands in the file.
struct SnapshotTable {
    at: HostOffset,
    bytes: Vec<u8>,
    snapshots: Vec<Snapshot>,
}

/// The clusters of a snapshot to be, which nothing refers to yet.
struct Places {
    /// None for a disk without an L1 table.
    l1: Option<Run>,
    table: Run,
}

impl Qcow2Writer {
    fn snapshot_table(&self) -> Result<SnapshotTable> {
        // Taking a snapshot names another table and gives the old one back, at once.
        let _turn = self.flushes.turn();
        let core = &self.core;
        let header = read_header(&core.name, &*core.file)?;
        let (snapshots, len) = read_snapshots(&core.name, &*core.file, &header)?;
        let mut bytes = vec![0; len as usize];
        let have = core.file.read_at(header.snapshots.offset.0, &mut bytes)?;
        assert!(have == bytes.len(), "what has been read is there");
        Ok(SnapshotTable { at: header.snapshots.offset, bytes, snapshots })
    }

    fn take_snapshot(&self, new: &NewSnapshot) -> Result<()> {
        let core = &self.core;
        if core.data_file.is_some() {
            let sentence = "its data lies in an external file, of which there are no internal snapshots; take an \
                            external one";
            return Err(Error::new(ErrorKind::Unsupported, format!("{}: {sentence}", core.name)));
        }
        self.prepare()?;
        // No mapping changes from here on; what is written in place goes on.
        let _all = self.ranges.hold(0, u64::MAX);
        self.check_poison()?;
        let old = self.snapshot_table()?;
        let snapshot = self.describe_snapshot(new, &old)?;
        let mut table = old.bytes.clone();
        append(&mut table, &snapshot);
        let table_len = table.len() as u64;
        if old.snapshots.len() as u64 >= MAX_SNAPSHOTS || table_len > MAX_TABLE_LEN {
            let fact = format!("it has {} internal snapshots, and room for no more; delete some", old.snapshots.len());
            return Err(Error::new(ErrorKind::Limit, format!("{}: {fact}", core.name)));
        }
        self.refuse_overflow().map_err(|error| self.damaged(error))?;
        let places = self.reserve_places(snapshot.l1, table_len)?;
        // Until the active tables change, failing is only failing.
        let written = self.write_snapshot(&places, &snapshot, table, old.bytes.len());
        let snapshot = match written {
            Ok(snapshot) => snapshot,
            Err(error) => {
                self.meta.write().drop_places(core, &places).map_err(|error| self.poisoned_by(error))?;
                return Err(error);
            }
        };
        self.share_everything()?;
        self.switch_snapshots(&old, &places, &snapshot, table_len)
    }

    /// The entry of the snapshot, but for the place of its L1 table.
    fn describe_snapshot(&self, new: &NewSnapshot, old: &SnapshotTable) -> Result<Snapshot> {
        let name = &self.core.name;
        if new.name.len() > usize::from(u16::MAX) {
            return Err(Error::new(ErrorKind::Usage, format!("{name}: the name of the snapshot is too long")));
        }
        let Some(id) = next_id(&old.snapshots) else {
            let fact = "an internal snapshot has the largest number that there is as its id; delete it";
            return Err(Error::new(ErrorKind::Limit, format!("{name}: {fact}")));
        };
        Ok(Snapshot {
            id: id.to_string().into_bytes(),
            name: new.name.clone(),
            l1: self.meta.read().l1,
            seconds: new.seconds,
            nanoseconds: new.nanoseconds,
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            virtual_size: Some(self.size()),
            icount: None,
            extra_len: 24,
        })
    }

    /// Makes sure that everything the active tables reach can be counted once more, and that it may be.
    fn refuse_overflow(&self) -> Result<()> {
        let core = &self.core;
        let most = max_refcount(core.order);
        let entries = self.meta.read().l1.entries;
        // Several compressed clusters may lie in one of the file.
        let mut more: HashMap<u64, u64> = HashMap::new();
        for index in 0..u64::from(entries) {
            let mut meta = self.meta.write();
            let Some((table, all)) = meta.table_entries(core, index)? else { continue };
            let mut fits = meta.count(core, core.cluster().index(table.0))? < most;
            for (number, words) in all.iter().enumerate() {
                let Some(clusters) = references(core, *words) else { continue };
                let guest = index * core.l1_span() + number as u64 * core.cluster().size();
                piece_of(core, *words, guest)?;
                meta.may_be_clusters(core, clusters)?;
                for cluster in clusters.first..clusters.first + clusters.count {
                    let mut count = meta.count(core, cluster)?;
                    if count == 0 {
                        return Err(core.corrupt(format_args!("cluster {cluster:#x} is in use, but its refcount is 0")));
                    }
                    if EntryFormat::is_compressed(words.entry) && count.saturating_mul(2) > most {
                        let more = more.entry(cluster).or_default();
                        count += *more;
                        *more += 1;
                    }
                    fits &= count < most;
                }
            }
            if !fits {
                let bits = 1 << core.order;
                let sentence = format!(
                    "its refcounts of {bits} bits cannot count one more internal snapshot; delete some, or give it \
                     wider ones (qemu-img amend -o refcount_bits=16, or qemu-img convert)"
                );
                return Err(Error::new(ErrorKind::Unsupported, format!("{}: {sentence}", core.name)));
            }
        }
        Ok(())
    }

    fn reserve_places(&self, l1: Table, table_len: u64) -> Result<Places> {
        let core = &self.core;
        let size = core.cluster().size();
        self.with_tables(|meta| {
            let l1 = match l1.len_bytes().div_ceil(size) {
                0 => None,
                clusters => Some(meta.allocate(core, clusters, true)?),
            };
            let table = match meta.allocate(core, table_len.div_ceil(size), true) {
                Ok(table) => table,
                Err(stop) => {
                    l1.map_or(Ok(()), |l1| meta.give_back(core, l1))?;
                    return Err(stop);
                }
            };
            let places = Places { l1, table };
            for run in places.runs() {
                meta.roles.add(run.first, run.count);
                // What they were before may still be in memory.
                meta.slices.forget(run.first * size, (run.first + run.count) * size, core.slice_len());
            }
            Ok(places)
        })
    }

    /// Writes the copy of the L1 table and the new snapshot table, whose last entry begins behind `old_len`.
    fn write_snapshot(
        &self,
        places: &Places,
        snapshot: &Snapshot,
        mut table: Vec<u8>,
        old_len: usize,
    ) -> Result<Snapshot> {
        let core = &self.core;
        let size = core.cluster().size();
        let offset = HostOffset(places.l1.map_or(0, |run| run.first * size));
        let snapshot = Snapshot { l1: Table { offset, ..snapshot.l1 }, ..snapshot.clone() };
        table.truncate(old_len);
        append(&mut table, &snapshot);
        table.resize(table.len().next_multiple_of(size as usize), 0);
        if let Some(run) = places.l1 {
            let l1 = self.meta.read().l1;
            let mut bytes = self.meta.write().table_bytes(core, l1.offset, l1.entries.into(), Class::L1)?;
            for entry in bytes.as_chunks_mut::<8>().0 {
                *entry = EntryFormat::shared(u64::from_be_bytes(*entry)).to_be_bytes();
            }
            bytes.resize((run.count * size) as usize, 0);
            core.file.write_at(offset.0, &bytes)?;
        }
        core.file.write_at(places.table.first * size, &table)?;
        self.data_dirty.store(true, Ordering::Release);
        Ok(snapshot)
    }

    /// Counts everything that the active tables reach once more, and takes their COPIED flags away.
    ///
    /// Table by table: meanwhile the rest is still written in place. Such a write has not been
    /// acknowledged before the call, and every other waits for its range, so that the snapshot is of one
    /// moment all the same: that in which the last flag goes.
    fn share_everything(&self) -> Result<()> {
        let entries = self.meta.read().l1.entries;
        for index in 0..u64::from(entries) {
            // Halfway there is no way back that could not fail as well.
            let shared = self.meta.write().share_table(&self.core, index);
            shared.map_err(|error| self.poisoned_by(error))?;
            self.relieve()?;
        }
        // Whoever looked a place up while it was the disk's alone is done with it when the gate has been ours.
        drop(self.reuse_gate.write());
        Ok(())
    }

    /// Makes everything durable, lets the header name the new table, and gives the old one back.
    fn switch_snapshots(&self, old: &SnapshotTable, places: &Places, snapshot: &Snapshot, len: u64) -> Result<()> {
        let core = &self.core;
        let size = core.cluster().size();
        let _turn = self.flushes.turn();
        self.check_poison()?;
        // What was written in place is part of the snapshot, the copies are only written: one barrier for all.
        self.data_dirty.store(true, Ordering::Release);
        self.flush_in_turn()?;
        let mut field = (old.snapshots.len() as u32 + 1).to_be_bytes().to_vec();
        field.extend((places.table.first * size).to_be_bytes());
        let switched = core.file.write_at(SNAPSHOTS_AT, &field).and_then(|()| core.file.sync());
        switched.map_err(|error| self.poisoned_by(error))?;
        assert!(len <= places.table.count * size, "the table lies in its clusters");
        let mut meta = self.meta.write();
        core.has_snapshots.store(true, Ordering::Release);
        meta.snapshots.push(SnapshotRoot::of(snapshot));
        let (first, count) = (core.cluster().index(old.at.0), (old.bytes.len() as u64).div_ceil(size));
        meta.roles.remove(first, count);
        // Durably, nothing names it any more.
        meta.unreference(core, Freed { first, count }).map_err(|error| self.poisoned_by(error))
    }
}

impl Places {
    fn runs(&self) -> impl Iterator<Item = Run> {
        self.l1.into_iter().chain([self.table])
    }
}

impl Meta {
    fn drop_places(&mut self, core: &Core, places: &Places) -> Result<()> {
        places.runs().try_for_each(|run| {
            self.roles.remove(run.first, run.count);
            self.give_back(core, run)
        })
    }

    /// The L2 table that an entry of the active L1 table names, and its entries (without their bitmaps).
    fn table_entries(&mut self, core: &Core, index: u64) -> Result<Option<(HostOffset, Vec<Words>)>> {
        let Some(table) = self.l2_table(core, index * core.l1_span())? else { return Ok(None) };
        let mut all = Vec::with_capacity(core.format.l2_entries() as usize);
        let words_per_entry = (core.format.l2_entry_len() / 8) as usize;
        for at in (table.0..table.0 + core.cluster().size()).step_by(core.slice_len() as usize) {
            if at > table.0 && at >= self.file_len {
                break; // the last table of a file may end with it
            }
            let (words, _) = self.slice(core, at, Class::L2)?;
            let bitmap = |entry: &[u64]| entry.get(1).copied().unwrap_or(0);
            all.extend(words.chunks_exact(words_per_entry).map(|e| Words { entry: e[0], bitmap: bitmap(e) }));
        }
        Ok(Some((table, all)))
    }

    fn share_table(&mut self, core: &Core, index: u64) -> Result<()> {
        let Some((table, all)) = self.table_entries(core, index)? else { return Ok(()) };
        for (number, words) in all.iter().enumerate() {
            let Some(clusters) = references(core, *words) else { continue };
            for cluster in clusters.first..clusters.first + clusters.count {
                self.count_once_more(core, cluster)?;
            }
            if EntryFormat::copied(words.entry) {
                let at = table.0 + number as u64 * core.format.l2_entry_len();
                self.set_word(core, at, Class::L2, EntryFormat::shared(words.entry))?;
            }
        }
        self.count_once_more(core, core.cluster().index(table.0))?;
        let place = self.l1_place(core, index * core.l1_span());
        let word = self.word(core, place, Class::L1)?;
        self.set_word(core, place, Class::L1, EntryFormat::shared(word))
    }

    fn count_once_more(&mut self, core: &Core, cluster: u64) -> Result<()> {
        let count = self.count(core, cluster)?;
        if count >= max_refcount(core.order) {
            return Err(core.corrupt(format_args!("cluster {cluster:#x} has more references than its refcount")));
        }
        self.set_count(core, cluster, count + 1)
    }
}
