//! The descriptor for writing a file.
//!
//! It stays open as long as the file has a writer: it is never closed to free a descriptor. It carries no
//! locks: those are on the [`StoreFile`](super::StoreFile)'s descriptor. It is always of the same file as
//! those.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;
use rustix::fs::{self, FallocateFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockStatus, Run};

use super::descriptors::DescriptorReservation;
use super::file::{extent, read_full};
use super::object::ObjectStat;
use super::{Storage, WriteStorage, copy_by_hand};

/// Bytes written at a time if the file system cannot zero a range.
const ZEROES: &[u8] = &[0; 64 << 10];
/// Bytes per copy request to the kernel: a request cannot be interrupted.
const MAX_COPY: u64 = 16 << 20;

/// A file that is open for reading and writing.
#[derive(Debug)]
pub struct WritableFile {
    file: Arc<OwnedFd>,
    path: PathBuf,
    _room: DescriptorReservation,
    /// Exclusive while tables are written, shared by readers of tables through the
    /// [`StoreFile`](super::StoreFile). A leaf.
    tables: Arc<RwLock<()>>,
}

impl WritableFile {
    /// Takes over an open file, for which `room` is reserved; `path` is for messages.
    pub(super) fn new(
        file: OwnedFd,
        path: &Path,
        room: DescriptorReservation,
        tables: &Arc<RwLock<()>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            file: Arc::new(file),
            path: path.to_path_buf(),
            _room: room,
            tables: Arc::clone(tables),
        })
    }

    fn fail(&self, doing: &str, error: impl Into<std::io::Error>) -> Error {
        Error::io(format!("{doing} {}", self.path.display()), error)
    }

    fn fallocate(&self, doing: &str, mode: FallocateFlags, at: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        loop {
            match fs::fallocate(&self.file, mode, at, len) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error @ (Errno::OPNOTSUPP | Errno::NOSYS)) => {
                    return Err(Error::new(
                        ErrorKind::Unsupported,
                        format!("{doing} {}: its file system cannot do that ({error})", self.path.display()),
                    ));
                }
                Err(error) => return Err(self.fail(doing, error)),
            }
        }
    }
}

impl Storage for WritableFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        read_full(&self.file, at, buf).map_err(|error| self.fail("reading", error))
    }

    fn len(&self) -> Result<u64> {
        Ok(ObjectStat::of(&self.file)?.size)
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        Ok(extent(&self.file, at, end))
    }

    fn open_file(&self) -> Option<Arc<OwnedFd>> {
        Some(Arc::clone(&self.file))
    }
}

impl WriteStorage for WritableFile {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            match rustix::io::pwrite(&self.file, &bytes[done..], at + done as u64) {
                Ok(0) => return Err(self.fail("writing", std::io::ErrorKind::WriteZero)),
                Ok(len) => done += len,
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.fail("writing", error)),
            }
        }
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        loop {
            match fs::ftruncate(&self.file, len) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.fail("changing the length of", error)),
            }
        }
    }

    fn punch_hole(&self, at: u64, len: u64) -> Result<()> {
        self.fallocate("punching a hole in", FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        match self.fallocate("zeroing a part of", FallocateFlags::ZERO_RANGE, at, len) {
            Err(error) if error.kind() == ErrorKind::Unsupported => {}
            done => return done,
        }
        let (mut at, end) = (at, at + len);
        while at < end {
            let piece = (end - at).min(ZEROES.len() as u64);
            self.write_at(at, &ZEROES[..piece as usize])?;
            at += piece;
        }
        Ok(())
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.fallocate("reserving space for", FallocateFlags::empty(), at, len)
    }

    fn reserve(&self, at: u64, len: u64) -> Result<()> {
        self.fallocate("reserving space for", FallocateFlags::KEEP_SIZE, at, len)
    }

    fn write_table_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let _alone = self.tables.write();
        self.write_at(at, bytes)
    }

    fn copy_from(&self, at: u64, source: &dyn Storage, from: u64, len: u64) -> Result<()> {
        let Some(source_file) = source.open_file() else { return copy_by_hand(self, at, source, from, len) };
        let mut done = 0;
        while done < len {
            // The kernel first tries to share the blocks, and copies otherwise.
            let (mut read_at, mut write_at) = (from + done, at + done);
            let piece = (len - done).min(MAX_COPY) as usize;
            match fs::copy_file_range(
                &source_file,
                Some(&mut read_at),
                &self.file,
                Some(&mut write_at),
                piece,
            ) {
                Ok(0) => {
                    let fact = format!(
                        "a file ends before {:#x}, in the middle of what was to be copied",
                        from + len
                    );
                    return Err(Error::new(ErrorKind::Io, fact));
                }
                Ok(copied) => done += copied as u64,
                Err(Errno::INTR) => {}
                // Across file systems, and on file systems without support for copies.
                Err(
                    Errno::XDEV
                    | Errno::OPNOTSUPP
                    | Errno::NOSYS
                    | Errno::INVAL
                    | Errno::TXTBSY
                    | Errno::PERM,
                ) => {
                    return copy_by_hand(self, at + done, source, from + done, len - done);
                }
                Err(error) => return Err(self.fail("copying into", error)),
            }
        }
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        loop {
            match fs::fdatasync(&self.file) {
                Ok(()) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(self.fail("flushing", error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Descriptors, Expect, LockSupport, Reclaim, Reclaimable, Root, StoreFile, WriterKind};
    use super::*;
    use crate::units::Stability;

    fn file(content: &[u8]) -> (tempfile::TempDir, Arc<StoreFile>) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("a"), content).unwrap();
        let root = Arc::new(Root::open(directory.path()).unwrap());
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
        assert_eq!(seen.open_for_writing().unwrap_err().kind(), ErrorKind::Stale);
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
