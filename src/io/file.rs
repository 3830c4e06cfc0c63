//! One file of a store, opened when needed and closed when descriptors run short.
//!
//! A [`StoreFile`] promises that its bytes come from the very file it was made for: when it has
//! to be opened again, another file at that place, or the same one changed, is `Stale`, never
//! silently read. While a [`ReadLock`] is held, its descriptor carries QEMU's reader locks.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use rustix::fs::{self, FileType, SeekFrom};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};

use super::beneath::Root;
use super::descriptors::Descriptors;
use super::locks;
use super::{Conflict, Storage};

/// Which file this is, whatever its name: device and inode number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FileId {
    /// Device number.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
}

/// What changes when somebody writes to a file: size, mtime and ctime.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Signature {
    /// Bytes.
    pub size: u64,
    /// Modification time, seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// Change time, seconds and nanoseconds.
    pub ctime: (i64, u32),
}

/// Attributes of a file, as far as chainfs needs them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileStat {
    /// Which file.
    pub id: FileId,
    /// Whether it has changed.
    pub signature: Signature,
    /// Allocated blocks of 512 bytes.
    pub blocks: u64,
    /// Type and permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Hard links.
    pub link_count: u64,
}

impl FileStat {
    /// Attributes of an open file.
    pub fn of(file: impl AsFd) -> Result<Self> {
        Ok(fs::fstat(file).map_err(|error| Error::io("asking for a file's attributes", error))?.into())
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        FileType::from_raw_mode(self.mode) == FileType::RegularFile
    }

    /// Whether anybody may write it, by its mode.
    pub fn has_write_bit(&self) -> bool {
        self.mode & 0o222 != 0
    }
}

impl From<fs::Stat> for FileStat {
    fn from(stat: fs::Stat) -> Self {
        Self {
            id: FileId { device: stat.st_dev, inode: stat.st_ino },
            signature: Signature {
                size: stat.st_size.unsigned_abs(),
                mtime: (stat.st_mtime, stat.st_mtime_nsec as u32),
                ctime: (stat.st_ctime, stat.st_ctime_nsec as u32),
            },
            blocks: stat.st_blocks.unsigned_abs(),
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            link_count: stat.st_nlink,
        }
    }
}

/// A file beneath a root. Cheap to keep: it needs a descriptor only while it is read or locked.
#[derive(Debug)]
pub struct StoreFile {
    root: Arc<Root>,
    path: PathBuf,
    id: FileId,
    /// What the file looked like when it was described; `None` for files that may change while
    /// they are read (a disk that somebody else writes, read by force).
    expected: Option<Signature>,
    descriptor: RwLock<Option<Arc<OwnedFd>>>,
    /// Set by every use, cleared by the search for a descriptor to close.
    pub(super) used: AtomicBool,
    descriptors: Arc<Descriptors>,
    /// This very file, for the register of open descriptors.
    me: Weak<Self>,
    /// Readers that want QEMU's locks held. Taken before `descriptor`.
    readers: Mutex<usize>,
}

impl StoreFile {
    /// A file that was seen at `path` with these attributes. `fixed`: any change makes it stale.
    pub fn new(
        descriptors: &Arc<Descriptors>,
        root: &Arc<Root>,
        path: &Path,
        seen: &FileStat,
        fixed: bool,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            root: Arc::clone(root),
            path: path.to_path_buf(),
            id: seen.id,
            expected: fixed.then_some(seen.signature),
            descriptor: RwLock::new(None),
            used: AtomicBool::new(false),
            descriptors: Arc::clone(descriptors),
            me: Weak::clone(me),
            readers: Mutex::new(0),
        })
    }

    /// Its place beneath the root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its identity.
    pub fn id(&self) -> FileId {
        self.id
    }

    /// Attributes now.
    pub fn stat(&self) -> Result<FileStat> {
        FileStat::of(&*self.descriptor()?)
    }

    /// A descriptor of its own, for passthrough: the caller's to close.
    pub fn open_again(&self) -> Result<OwnedFd> {
        self.open()
    }

    /// Takes QEMU's reader locks (or joins those already held), for as long as the guard lives.
    /// `Busy` if another process writes the file or has marked it inconsistent.
    pub fn lock(self: &Arc<Self>) -> Result<ReadLock> {
        let mut readers = self.readers.lock();
        if *readers == 0 {
            let descriptor = self.descriptor()?;
            locks::take_reader_set(descriptor.as_fd()).map_err(|conflict| self.refused(&conflict))?;
        }
        *readers += 1;
        Ok(ReadLock { file: Arc::clone(self) })
    }

    fn refused(&self, conflict: &Conflict) -> Error {
        let path = self.path.display();
        match conflict {
            Conflict::Held { byte, fact } => {
                let holders = super::holders::describe(self.id, *byte);
                Error::new(
                    ErrorKind::Busy,
                    format!("{path} {fact} ({holders}); wait until it is closed, or mount with -o force_share"),
                )
            }
            Conflict::System(error) => Error::io(format!("locking {path}"), *error),
        }
    }

    fn unlock(&self) {
        let mut readers = self.readers.lock();
        *readers -= 1;
        if *readers == 0
            && let Some(descriptor) = &*self.descriptor.read()
        {
            locks::drop_all(descriptor.as_fd());
        }
    }

    /// The descriptor, opened if need be. Callers let go of it soon: it is what keeps the file open.
    pub(crate) fn descriptor(&self) -> Result<Arc<OwnedFd>> {
        if let Some(open) = &*self.descriptor.read() {
            self.used.store(true, Ordering::Relaxed);
            return Ok(Arc::clone(open));
        }
        let mut slot = self.descriptor.write();
        if let Some(open) = &*slot {
            return Ok(Arc::clone(open));
        }
        let open = Arc::new(self.open()?);
        // A reader's locks went with the descriptor that was closed; they come back with this one,
        // and `open` has made sure that nothing was written in between.
        if self.readers.try_lock().is_none_or(|readers| *readers > 0) {
            locks::take_reader_set(open.as_fd()).map_err(|conflict| self.refused(&conflict))?;
        }
        *slot = Some(Arc::clone(&open));
        drop(slot);
        self.used.store(true, Ordering::Relaxed);
        self.descriptors.opened(&self.me);
        Ok(open)
    }

    fn open(&self) -> Result<OwnedFd> {
        let file = self.root.open_file(&self.path)?;
        let stat = FileStat::of(&file)?;
        if stat.id != self.id || self.expected.is_some_and(|expected| expected != stat.signature) {
            return Err(Error::new(
                ErrorKind::Stale,
                format!("{} was changed or replaced since it was looked up; open it again", self.path.display()),
            ));
        }
        Ok(file)
    }

    /// Closes the descriptor unless somebody is just using the slot. Called when descriptors run short.
    pub(super) fn close_idle(&self) -> bool {
        let is_closed = self.descriptor.try_write().is_some_and(|mut slot| slot.take().is_some());
        if is_closed {
            self.descriptors.closed();
        }
        is_closed
    }
}

impl Drop for StoreFile {
    fn drop(&mut self) {
        if self.descriptor.get_mut().is_some() {
            self.descriptors.closed();
        }
    }
}

impl Storage for StoreFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let descriptor = self.descriptor()?;
        let mut done = 0;
        while done < buf.len() {
            match rustix::io::pread(&*descriptor, &mut buf[done..], at + done as u64) {
                Ok(0) => break,
                Ok(len) => done += len,
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::io(format!("reading {} at {at:#x}", self.path.display()), error)),
            }
        }
        Ok(done)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.stat()?.signature.size)
    }

    fn extent(&self, at: u64, end: u64) -> Result<(bool, u64)> {
        let descriptor = self.descriptor()?;
        // The descriptor's own position moves, which no reader looks at.
        match fs::seek(&*descriptor, SeekFrom::Data(at)) {
            Ok(data) if data > at => Ok((false, data.min(end) - at)),
            Ok(_) => match fs::seek(&*descriptor, SeekFrom::Hole(at)) {
                Ok(hole) if hole > at => Ok((true, hole.min(end) - at)),
                _ => Ok((true, end - at)),
            },
            Err(Errno::NXIO) => Ok((false, end - at)), // no data up to the end of the file
            Err(_) => Ok((true, end - at)),
        }
    }
}

/// QEMU's reader locks on a [`StoreFile`], until dropped.
#[derive(Debug)]
pub struct ReadLock {
    file: Arc<StoreFile>,
}

impl Drop for ReadLock {
    fn drop(&mut self) {
        self.file.unlock();
    }
}
