//! A file of a store that is open for writing.
//!
//! It stays open as long as the file has a writer: it is never closed to free a descriptor. It carries no
//! locks: those are on the opening that [`StoreFile`](super::StoreFile) reads through. It is always of the
//! same object as that.

use std::sync::Arc;

use parking_lot::RwLock;

use crate::error::Result;
use crate::units::{BlockStatus, Run};

use super::descriptors::DescriptorReservation;
use super::{LocalFile, Storage, WriteObject, WriteStorage};

/// A file that is open for reading and writing.
pub struct WritableFile {
    file: Arc<dyn WriteObject>,
    _room: DescriptorReservation,
    /// Exclusive while tables are written, shared by readers of tables through the
    /// [`StoreFile`](super::StoreFile). A leaf.
    tables: Arc<RwLock<()>>,
}

impl WritableFile {
    /// Takes over an open file, for which `room` is reserved.
    pub(super) fn new(
        file: Arc<dyn WriteObject>,
        room: DescriptorReservation,
        tables: &Arc<RwLock<()>>,
    ) -> Arc<Self> {
        Arc::new(Self { file, _room: room, tables: Arc::clone(tables) })
    }
}

impl Storage for WritableFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.file.read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        self.file.len()
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        self.file.extent(at, end)
    }

    fn local_file(&self) -> Option<LocalFile> {
        self.file.local_file()
    }
}

impl WriteStorage for WritableFile {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_at(at, bytes)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.file.set_len(len)
    }

    fn punch_hole(&self, at: u64, len: u64) -> Result<()> {
        self.file.punch_hole(at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.file.write_zeroes(at, len)
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.file.allocate(at, len)
    }

    fn reserve(&self, at: u64, len: u64) -> Result<()> {
        self.file.reserve(at, len)
    }

    fn write_table_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let _alone = self.tables.write();
        self.file.write_table_at(at, bytes)
    }

    fn copy_from(&self, at: u64, source: &dyn Storage, from: u64, len: u64) -> Result<()> {
        self.file.copy_from(at, source, from, len)
    }

    fn share_all_of(&self, source: &dyn Storage) -> bool {
        self.file.share_all_of(source)
    }

    fn sync(&self) -> Result<()> {
        self.file.sync()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Descriptors, Expect, LocalDirectory, LockSupport, Reclaim, Reclaimable, StoreFile, WriterKind,
    };
    use super::*;
    use crate::error::ErrorKind;
    use crate::units::Stability;
    use std::path::Path;

    fn file(content: &[u8]) -> (tempfile::TempDir, Arc<StoreFile>) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a"), content).unwrap();
        let root = LocalDirectory::open(directory.path()).unwrap();
        let seen = root.stat(Path::new("a")).unwrap();
        let file =
            StoreFile::new(&Descriptors::with_limit(2), &root, Path::new("a"), &seen, Expect::SameVersion);
        (directory, file)
    }

    #[test]
    fn bytes_are_written_zeroed_truncated_and_read() {
        let (directory, seen) = file(b"0123456789");
        let file = seen.open_for_writing().unwrap();
        file.write_at(4, b"abcdefgh").unwrap();
        file.write_zeroes(6, 2).unwrap();
        file.punch_hole(0, 2).unwrap();
        file.allocate(0, 8192).unwrap();
        assert_eq!(file.len().unwrap(), 8192);
        file.set_len(13).unwrap();
        file.sync().unwrap();
        assert_eq!(std::fs::read(directory.path().join("a")).unwrap(), b"\0\x0023ab\0\0efgh\0");
        assert_eq!(file.read_at(10, &mut [0; 8]).unwrap(), 3);
    }

    #[test]
    fn a_replaced_file_is_not_written() {
        let (directory, seen) = file(b"old");
        let lock = seen.lock_for_writing(WriterKind::Guest, LockSupport::Required).unwrap();
        std::fs::write(directory.path().join("b"), "new").unwrap();
        std::fs::rename(directory.path().join("b"), directory.path().join("a")).unwrap();
        assert_eq!(seen.open_for_writing().map(drop).unwrap_err().kind(), ErrorKind::Stale);
        drop(lock);
    }

    #[test]
    fn the_descriptor_with_a_writers_locks_stays_open() {
        let (_directory, seen) = file(b"old");
        let lock = seen.lock_for_writing(WriterKind::Guest, LockSupport::Required).unwrap();
        let file = seen.open_for_writing().unwrap();
        file.write_at(0, b"new bytes").unwrap();
        assert!(!seen.reclaim(Reclaim::EvenLocked));
        assert!(seen.is_as_expected().unwrap(), "our own changes");
        seen.accept_changes().unwrap();
        drop(lock);
        assert!(seen.reclaim(Reclaim::EvenLocked));
        assert_eq!(seen.read_at(0, &mut [0; 16]).unwrap(), 9, "it is the file as this process left it");
    }

    #[test]
    fn frozen_readers_and_a_writer_of_this_process_exclude_each_other() {
        let (_directory, file) = file(b"old");
        let live = file.lock(Stability::Live).unwrap();
        let frozen = file.lock(Stability::Frozen).unwrap();
        assert_eq!(
            file.lock_for_writing(WriterKind::Guest, LockSupport::Required).unwrap_err().kind(),
            ErrorKind::Busy
        );
        drop(frozen);
        let writer = file.lock_for_writing(WriterKind::Guest, LockSupport::Required).unwrap();
        assert_eq!(file.lock(Stability::Frozen).unwrap_err().kind(), ErrorKind::Busy);
        drop((live, writer));
        file.lock(Stability::Frozen).unwrap();
    }
}
