//! Clusters that are counted and that nothing refers to yet.
//!
//! A [`Reservation`] is committed in the moment in which a table, or the header, comes to name its clusters;
//! dropped before that, it frees them. So the clusters that a drop frees were never named, whatever has
//! failed, and no refcount falls below the references (M1).
//!
//! A drop happens anywhere: under the tables' lock, in the turn of a flush, on a poisoned disk. So it takes
//! no lock but that of a list, and does no I/O. The refcounts follow under the tables' lock, before the next
//! cluster is allocated and before a flush takes its batch ([`Tables::free_dropped`]). On a poisoned disk
//! neither happens any more.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::Result;
use crate::units::HostOffset;

use super::tables::{ImageFile, Tables};

/// Contiguous clusters of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClusterRange {
    pub(super) first: u64,
    pub(super) count: u64,
}

impl ClusterRange {
    /// The numbers of the clusters.
    pub(super) fn numbers(self) -> std::ops::Range<u64> {
        self.first..self.first + self.count
    }

    /// The first byte.
    pub(super) fn start(self, image: &ImageFile) -> HostOffset {
        HostOffset(self.first * image.cluster().size())
    }

    /// Bytes.
    pub(super) fn len(self, image: &ImageFile) -> u64 {
        self.count * image.cluster().size()
    }
}

/// The use of reserved clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClusterUse {
    /// Guest data, or a table that gets its role when it is named.
    Any,
    /// A table that is written without the slices; it has its role already.
    Table,
}

/// Clusters of the file that were just counted and that nothing refers to yet.
#[derive(Debug)]
#[must_use = "a reservation that is dropped frees its clusters"]
pub(super) struct Reservation {
    clusters: ClusterRange,
    is_fresh: bool,
    used_for: ClusterUse,
    /// `None` once it is committed.
    dropped: Option<Arc<DroppedReservations>>,
}

impl Reservation {
    /// The clusters.
    pub(super) fn clusters(&self) -> ClusterRange {
        self.clusters
    }

    /// Whether the file holds zeroes there.
    pub(super) fn is_fresh(&self) -> bool {
        self.is_fresh
    }

    /// The clusters are named from here on, or may be: they stay counted, whatever happens.
    pub(super) fn commit(mut self) -> ClusterRange {
        self.dropped = None;
        self.clusters
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        if let Some(dropped) = self.dropped.take() {
            dropped.list.lock().push((self.clusters, self.used_for));
        }
    }
}

/// Reservations that were dropped, and whose clusters are still counted. Its lock is a leaf.
#[derive(Debug, Default)]
pub(super) struct DroppedReservations {
    list: Mutex<Vec<(ClusterRange, ClusterUse)>>,
}

impl DroppedReservations {
    pub(super) fn is_empty(&self) -> bool {
        self.list.lock().is_empty()
    }

    fn pop(&self) -> Option<(ClusterRange, ClusterUse)> {
        self.list.lock().pop()
    }
}

impl Tables {
    /// A reservation of clusters whose refcounts are 1 by now.
    pub(super) fn reserved(
        &self,
        clusters: ClusterRange,
        is_fresh: bool,
        used_for: ClusterUse,
    ) -> Reservation {
        Reservation { clusters, is_fresh, used_for, dropped: Some(Arc::clone(&self.dropped)) }
    }

    /// Counts the clusters of dropped reservations as free. They may hold any bytes by now.
    pub(super) fn free_dropped(&mut self, image: &ImageFile) -> Result<()> {
        while let Some((clusters, used_for)) = self.dropped.pop() {
            if used_for == ClusterUse::Table {
                self.roles.remove(clusters.first, clusters.count);
            }
            // M1: nothing has ever named them.
            self.unreference(image, clusters)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::WriterOptions;
    use super::super::allocate::ClusterCount;
    use super::super::qcow2::Qcow2Writer;
    use super::super::testing::MemoryFile;
    use super::*;
    use crate::error::{Error, ErrorKind};
    use crate::image::check::check;
    use crate::image::create::{CreateOptions, initial_image};

    fn writer() -> (Arc<MemoryFile>, Qcow2Writer) {
        let options = CreateOptions { size: Some(1 << 20), ..CreateOptions::default() };
        let bytes = Mutex::new(initial_image(&options).unwrap());
        let memory = Arc::new(MemoryFile { bytes, punches: true, ..MemoryFile::default() });
        let writer =
            Qcow2Writer::open("a.qcow2", Arc::clone(&memory) as _, None, None, WriterOptions::default());
        (memory, writer.unwrap())
    }

    fn reserve(writer: &Qcow2Writer, count: u64) -> Reservation {
        writer.with_tables(|tables| tables.allocate(&writer.image, ClusterCount::Exactly(count))).unwrap()
    }

    fn leaks(memory: &MemoryFile) -> u64 {
        let report = check(&*memory.bytes.lock(), "a.qcow2").unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0));
        report.leaks
    }

    #[test]
    fn clusters_of_a_dropped_reservation_are_allocated_again() {
        let (_, writer) = writer();
        let (dropped, kept) = (reserve(&writer, 3), reserve(&writer, 1).commit());
        let clusters = dropped.clusters();
        drop(dropped);
        assert_eq!(reserve(&writer, 3).commit(), clusters, "M1: only what was dropped is free");
        assert_eq!(writer.tables.write().count(&writer.image, kept.first).unwrap(), 1);
    }

    #[test]
    fn a_flush_counts_dropped_clusters_as_free() {
        let (memory, writer) = writer();
        let dropped = reserve(&writer, 2);
        writer.flush().unwrap();
        assert_eq!(leaks(&memory), 2, "they are counted until they are dropped");
        drop(dropped);
        assert!(writer.is_dirty());
        writer.close().unwrap();
        assert_eq!((leaks(&memory), writer.is_dirty()), (0, false));
    }

    #[test]
    fn a_reserved_table_has_its_role_until_it_is_freed() {
        let (_, writer) = writer();
        let table = writer.with_tables(|tables| tables.allocate_table(&writer.image, 1)).unwrap();
        let cluster = table.clusters().first;
        assert!(writer.tables.read().roles.contains(cluster));
        drop(table);
        assert_eq!(reserve(&writer, 1).commit().first, cluster, "M3: it has no role any more");
    }

    #[test]
    fn a_drop_on_a_poisoned_disk_changes_nothing() {
        let (memory, writer) = writer();
        let reservation = reserve(&writer, 1);
        writer.flush().unwrap();
        writer.poisoned_by(Error::new(ErrorKind::Io, "the disk is gone"));
        let before = memory.bytes.lock().clone();
        drop(reservation);
        assert!(writer.flush().is_err() && writer.close().is_err());
        assert_eq!(*memory.bytes.lock(), before, "M7: nothing is written");
    }
}
