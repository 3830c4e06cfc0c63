//! Internal snapshots, taken while the disk is read and written.
//!
//! A snapshot is a copy of the active L1 table, and one more reference to every cluster that it reaches. One
//! write of 20 bytes within the header's first sector names it. A crash before that leaves leaks, and COPIED
//! flags that are missing on clusters that have only one reference (see [`super::unfinished`]).

use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{INCOMPATIBLE_AT, MAX_SNAPSHOTS, SNAPSHOTS_AT};
use crate::format::snapshot::{MAX_TABLE_LEN, append, next_id};
use crate::format::{EntryFormat, L1Table, Snapshot};
use crate::image::read_snapshots;
use crate::units::HostOffset;

use super::Writer;
use super::open::read_header;
use super::qcow2::Qcow2Writer;
use super::reservation::{ClusterRange, Reservation};
use super::slices::TableClass;
use super::tables::{ImageFile, SnapshotRoot};
use super::writable::WritableSnapshots;

/// A new internal snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSnapshot {
    /// Its name. The caller checks whether the name is in use.
    pub name: Vec<u8>,
    /// Seconds since 1970.
    pub seconds: u32,
    /// And nanoseconds.
    pub nanoseconds: u32,
}

impl Writer {
    /// Takes an internal snapshot of the disk, without VM state, during reads and writes. It contains all
    /// writes acknowledged before the call; it is durable when this returns.
    ///
    /// Refused: `Unsupported` (a raw image, an external data file, refcounts too narrow), `Limit`.
    pub fn take_snapshot(&self, snapshot: &NewSnapshot) -> Result<()> {
        self.with_snapshots()?.take(snapshot)
    }

    /// The internal snapshots that the image has now.
    pub fn snapshots(&self) -> Result<Vec<Snapshot>> {
        self.format.with_snapshots().map_or_else(|| Ok(Vec::new()), WritableSnapshots::list)
    }

    pub(super) fn with_snapshots(&self) -> Result<&dyn WritableSnapshots> {
        self.format.with_snapshots().ok_or_else(|| {
            let sentence = "a raw image holds no internal snapshots; take an external one";
            Error::new(ErrorKind::Unsupported, format!("{}: {sentence}", self.format.name()))
        })
    }
}

/// The snapshot table as it is in the file.
pub(super) struct StoredSnapshots {
    pub(super) at: HostOffset,
    pub(super) bytes: Vec<u8>,
    pub(super) snapshots: Vec<Snapshot>,
}

impl StoredSnapshots {
    /// Its clusters.
    pub(super) fn clusters(&self, image: &ImageFile) -> ClusterRange {
        ClusterRange {
            first: image.cluster().index(self.at.0),
            count: (self.bytes.len() as u64).div_ceil(image.cluster().size()),
        }
    }
}

/// The clusters of a new snapshot, which nothing refers to yet.
struct SnapshotClusters {
    /// None for a disk without an L1 table.
    l1: Option<Reservation>,
    table: Reservation,
}

impl Qcow2Writer {
    pub(super) fn snapshot_table(&self) -> Result<StoredSnapshots> {
        // A writer that takes a snapshot writes another table and frees the old one, at once.
        let _turn = self.flushes.turn();
        let image = &self.image;
        let header = read_header(&image.name, &*image.file)?;
        let (snapshots, len) = read_snapshots(&image.name, &*image.file, &header)?;
        let mut bytes = vec![0; len as usize];
        let have = image.file.read_at(header.snapshots.offset.0, &mut bytes)?;
        assert!(have == bytes.len(), "what has been read is there");
        Ok(StoredSnapshots { at: header.snapshots.offset, bytes, snapshots })
    }

    pub(super) fn refuse_data_file(&self) -> Result<()> {
        if self.image.data_file.is_none() {
            return Ok(());
        }
        let sentence = "its data lies in an external file, of which there are no internal snapshots; take an \
            external \
                        one";
        Err(Error::new(ErrorKind::Unsupported, format!("{}: {sentence}", self.image.name)))
    }

    pub(super) fn take_snapshot(&self, new: &NewSnapshot) -> Result<()> {
        self.refuse_data_file()?;
        self.prepare()?;
        // No mapping changes from here on; writes in place continue.
        let _all = self.ranges.hold(0, u64::MAX);
        self.check_poison()?;
        let old = self.snapshot_table()?;
        let snapshot = self.describe_snapshot(new, &old)?;
        let table = self.table_with(&old, &snapshot)?;
        let table_len = table.len() as u64;
        let l1 = self.tables.read().l1;
        self.refuse_overflow(l1, l1.entries.into()).map_err(|error| self.damaged(error))?;
        let places = self.reserve_clusters(snapshot.l1, table_len)?;
        // Until the active tables change, a failure has no consequence.
        let snapshot = self.write_snapshot(&places, &snapshot, table, old.bytes.len())?;
        self.reserve_l2_tables()?;
        let bits = self.mark_unfinished()?;
        let shared = self.share_everything();
        let done = shared.and_then(|()| self.switch_snapshots(&old, places, &snapshot, table_len, bits));
        done.inspect_err(|_| self.repair_unfinished())
    }

    /// The bytes of the table with one more snapshot.
    pub(super) fn table_with(&self, old: &StoredSnapshots, snapshot: &Snapshot) -> Result<Vec<u8>> {
        let mut table = old.bytes.clone();
        append(&mut table, snapshot);
        if old.snapshots.len() as u64 >= MAX_SNAPSHOTS || table.len() as u64 > MAX_TABLE_LEN {
            let fact = format!(
                "it has {} internal snapshots, and room for no more; delete some",
                old.snapshots.len()
            );
            return Err(Error::new(ErrorKind::Limit, format!("{}: {fact}", self.image.name)));
        }
        Ok(table)
    }

    /// The entry of a snapshot of the current disk, with the current L1 table.
    pub(super) fn describe_snapshot(&self, new: &NewSnapshot, old: &StoredSnapshots) -> Result<Snapshot> {
        let name = &self.image.name;
        if new.name.len() > usize::from(u16::MAX) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{name}: the name of the snapshot is too long"),
            ));
        }
        let Some(id) = next_id(&old.snapshots) else {
            let fact = "an internal snapshot has the largest number that there is as its id; delete it";
            return Err(Error::new(ErrorKind::Limit, format!("{name}: {fact}")));
        };
        Ok(Snapshot {
            id: id.to_string().into_bytes(),
            name: new.name.clone(),
            l1: self.tables.read().l1,
            seconds: new.seconds,
            nanoseconds: new.nanoseconds,
            vm_clock_nanoseconds: 0,
            vm_state_size: 0,
            virtual_size: Some(self.size()),
            icount: None,
            extra_len: 24,
            damage: None,
        })
    }

    fn reserve_clusters(&self, l1: L1Table, table_len: u64) -> Result<SnapshotClusters> {
        let image = &self.image;
        let size = image.cluster().size();
        self.with_tables(|tables| {
            let l1 = match l1.len_bytes().div_ceil(size) {
                0 => None,
                clusters => Some(tables.allocate_table(image, clusters)?),
            };
            Ok(SnapshotClusters { l1, table: tables.allocate_table(image, table_len.div_ceil(size))? })
        })
    }

    /// Writes the copy of the L1 table and the new snapshot table, whose last entry begins at `old_len`.
    fn write_snapshot(
        &self,
        places: &SnapshotClusters,
        snapshot: &Snapshot,
        mut table: Vec<u8>,
        old_len: usize,
    ) -> Result<Snapshot> {
        let image = &self.image;
        let size = image.cluster().size();
        let l1_clusters = places.l1.as_ref().map(Reservation::clusters);
        let offset = l1_clusters.map_or(HostOffset(0), |clusters| clusters.start(image));
        let snapshot = Snapshot { l1: L1Table { offset, ..snapshot.l1 }, ..snapshot.clone() };
        table.truncate(old_len);
        append(&mut table, &snapshot);
        table.resize(table.len().next_multiple_of(size as usize), 0);
        if let Some(clusters) = l1_clusters {
            let l1 = self.tables.read().l1;
            let mut bytes =
                self.tables.write().table_bytes(image, l1.offset, l1.entries.into(), TableClass::L1)?;
            for entry in bytes.as_chunks_mut::<8>().0 {
                *entry = EntryFormat::shared(u64::from_be_bytes(*entry)).to_be_bytes();
            }
            bytes.resize(clusters.len(image) as usize, 0);
            image.file.write_at(offset.0, &bytes)?;
        }
        image.file.write_at(places.table.clusters().start(image).0, &table)?;
        self.data_dirty.store(true, Ordering::Release);
        Ok(snapshot)
    }

    /// Counts every cluster that the active tables reach once more, and clears the COPIED flags.
    ///
    /// Table by table: meanwhile the rest is still written in place. Such a write has not been acknowledged
    /// before the call, and every other waits for its range, so the snapshot is of one moment all the same:
    /// when the last flag is cleared.
    fn share_everything(&self) -> Result<()> {
        let entries = self.tables.read().l1.entries;
        for index in 0..u64::from(entries) {
            // A failure halfway cannot be rolled back reliably.
            let shared = self.tables.write().share_active(&self.image, index);
            shared.map_err(|error| self.poisoned_by(error))?;
            self.write_back_if_pressed()?;
        }
        // M8: the snapshot is of the moment in which the last writer in place is done.
        // A lookup from before the flags were cleared is finished once the gate was held exclusively.
        drop(self.reuse_gate.write());
        Ok(())
    }

    /// Makes everything durable, lets the header name the new table, and frees the old one.
    fn switch_snapshots(
        &self,
        old: &StoredSnapshots,
        places: SnapshotClusters,
        snapshot: &Snapshot,
        len: u64,
        bits: Option<u64>,
    ) -> Result<()> {
        let image = &self.image;
        let _turn = self.flushes.turn();
        self.check_poison()?;
        // Data written in place is part of the snapshot, and the copies are only written: one barrier for
        // all.
        self.data_dirty.store(true, Ordering::Release);
        self.flush_in_turn()?;
        // The header may name both from here on, even if the write's outcome is unknown.
        places.l1.map(Reservation::commit);
        let table = places.table.commit();
        assert!(len <= table.len(image), "the table lies in its clusters");
        // With that, counts and flags agree again.
        self.name_snapshots(old.snapshots.len() as u32 + 1, table.start(image), bits)?;
        self.adopt_snapshot(old, snapshot)
    }

    /// Switches to a table with one more snapshot, which the header names by now.
    pub(super) fn adopt_snapshot(&self, old: &StoredSnapshots, snapshot: &Snapshot) -> Result<()> {
        let image = &self.image;
        let mut tables = self.tables.write();
        image.has_snapshots.store(true, Ordering::Release);
        tables.snapshots.push(SnapshotRoot::of(snapshot));
        let table = old.clusters(image);
        tables.roles.remove(table.first, table.count);
        // Durably, nothing names it any more.
        tables.unreference(image, table).map_err(|error| self.poisoned_by(error))
    }

    /// Lets the header name a snapshot table that is durable by now; the caller has the turn. `bits`, if the
    /// version has the field, are the incompatible features from then on.
    pub(super) fn name_snapshots(&self, count: u32, at: HostOffset, bits: Option<u64>) -> Result<()> {
        let mut field = count.to_be_bytes().to_vec();
        field.extend(at.0.to_be_bytes());
        if let Some(bits) = bits {
            assert!(SNAPSHOTS_AT + field.len() as u64 == INCOMPATIBLE_AT, "the fields lie side by side");
            field.extend(bits.to_be_bytes());
        }
        let switched = self.image.file.write_at(SNAPSHOTS_AT, &field).and_then(|()| {
            self.image.file.sync().inspect_err(|_| self.has_lost_writes.store(true, Ordering::Release))
        });
        switched.map_err(|error| self.poisoned_by(error))
    }
}
