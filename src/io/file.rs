//! One file of a store, opened when needed and closed when descriptors run short.
//!
//! A [`StoreFile`] promises that its bytes come from the file it was created for: if it is reopened and
//! another file has its path, or the same one has changed, it is `Stale`. While a [`ReadLock`] exists, its
//! opening carries QEMU's reader locks, and while a [`WriteLock`] exists, the writer's. This one
//! opening carries all locks of the process on the file; writes go through another one ([`WritableFile`]).
//!
//! These rules hold for every [`Backend`].

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};
use rustix::fs::{self, SeekFrom};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result, shell_word};
use crate::units::{BlockStatus, Run, Stability};

use super::backend::{Backend, Expected, LockConflict, LockKind, LockOwners as Owners, OpenObject, stale};
use super::descriptors::{DescriptorReservation, Descriptors, Pin, Reclaim, Reclaimable};
use super::object::{Identity, ObjectId, ObjectStat, ObjectVersion, Timestamp};
use super::{LocalFile, Storage, WritableFile, WriteStorage};

impl ObjectStat {
    /// What the kernel tells of an open file, in any open mode.
    pub(super) fn of(file: impl AsFd) -> Result<Self> {
        Ok(fs::fstat(file).map_err(|error| Error::io("reading a file's attributes", error))?.into())
    }
}

impl Identity {
    /// The identity of an open file, in any open mode. Not every file system has a birth time.
    pub(super) fn of(file: impl AsFd) -> Result<Self> {
        let mask = fs::StatxFlags::INO | fs::StatxFlags::BTIME;
        let found = fs::statx(file, "", fs::AtFlags::EMPTY_PATH, mask)
            .map_err(|error| Error::io("reading the file's identity", error))?;
        let has_birth = fs::StatxFlags::from_bits_retain(found.stx_mask).contains(fs::StatxFlags::BTIME);
        let device = fs::makedev(found.stx_dev_major, found.stx_dev_minor);
        let birth = Timestamp { seconds: found.stx_btime.tv_sec, nanoseconds: found.stx_btime.tv_nsec };
        Ok(Self::new(ObjectId::new(device, found.stx_ino), has_birth.then_some(birth)))
    }
}

impl From<fs::Stat> for ObjectStat {
    fn from(stat: fs::Stat) -> Self {
        let size = stat.st_size.unsigned_abs();
        let modified = Timestamp { seconds: stat.st_mtime, nanoseconds: stat.st_mtime_nsec as u32 };
        let changed = Timestamp { seconds: stat.st_ctime, nanoseconds: stat.st_ctime_nsec as u32 };
        Self {
            id: ObjectId::new(stat.st_dev, stat.st_ino),
            version: ObjectVersion::of_file(size, modified, changed),
            size,
            modified,
            blocks: stat.st_blocks.unsigned_abs(),
            mode: stat.st_mode,
            uid: stat.st_uid,
            gid: stat.st_gid,
            link_count: stat.st_nlink,
        }
    }
}

/// A file of a store. It is open only while it is read or locked.
pub struct StoreFile {
    backend: Arc<dyn Backend>,
    /// Its path; changed only by [`StoreFile::renamed`]. A leaf.
    path: RwLock<PathBuf>,
    id: ObjectId,
    /// The attributes at the time of the scan; `None` for files that may change while they are read (a disk
    /// that another process writes, read with `force_share`). A leaf.
    expected: Mutex<Option<ObjectStat>>,
    opened: RwLock<Option<(Arc<dyn OpenObject>, DescriptorReservation)>>,
    /// Set by every use, cleared by the search for a descriptor to close.
    used: AtomicBool,
    descriptors: Arc<Descriptors>,
    /// A reference to itself, for the registry of open descriptors.
    me: Weak<Self>,
    /// The users of QEMU's locks on the opening. Taken before `opened`.
    holders: Mutex<LockOwners>,
    /// Whether its descriptor must stay open because it carries a writer's locks. Changed under `holders`, as
    /// is `written`.
    pinned: AtomicBool,
    /// Who else wants it to stay open. A leaf.
    keepers: Mutex<Keepers>,
    /// Whether this process writes the file: then all changes are its own.
    written: AtomicBool,
    /// See [`WritableFile`]. A leaf.
    tables: Arc<RwLock<()>>,
}

impl std::fmt::Debug for StoreFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StoreFile").field("path", &self.path).field("id", &self.id).finish_non_exhaustive()
    }
}

/// The users of the locks on the file's descriptor.
#[derive(Debug, Default)]
struct LockOwners {
    /// The number of readers.
    readers: usize,
    /// The number of readers that were promised that the file does not change.
    frozen: usize,
    /// The writer, if there is one.
    writer: Option<WriterKind>,
}

/// Descriptors of a file that is written: one carries the locks, one is written through.
const DESCRIPTORS_OF_A_WRITER: usize = 2;
/// The part of all descriptors that may be pinned by disks that guests write, and by all written files. The
/// rest is for readers.
const GUESTS_PART: (usize, usize) = (2, 5);
const JOBS_PART: (usize, usize) = (3, 5);
/// The same for files that stay open for the kernel: others come first.
const KEPT_PART: (usize, usize) = (1, 8);

/// Users of a file who want its descriptor to stay open.
#[derive(Debug, Default)]
struct Keepers {
    count: usize,
    pin: Option<Pin>,
}

/// Which version of a file its user takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// The one that was seen: any change that is not ours makes the file stale.
    SameVersion,
    /// Any: another process may write the file meanwhile.
    AnyVersion,
}

/// What a writer needs of the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockSupport {
    /// Locks: without them nothing excludes a second writer.
    Required,
    /// Nothing: the user has declared that no other process uses the file.
    Optional,
}

/// The purpose of writing a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriterKind {
    /// For a guest: the disk's content changes.
    Guest,
    /// For a job, which guarantees that no view changes for readers that have the file open as frozen.
    Job,
}

impl StoreFile {
    /// A file that was found at `path` with these attributes.
    pub fn new(
        descriptors: &Arc<Descriptors>,
        backend: &Arc<dyn Backend>,
        path: &Path,
        seen: &ObjectStat,
        expect: Expect,
    ) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            backend: Arc::clone(backend),
            path: RwLock::new(path.to_path_buf()),
            id: seen.id,
            expected: Mutex::new((expect == Expect::SameVersion).then_some(*seen)),
            opened: RwLock::new(None),
            used: AtomicBool::new(false),
            descriptors: Arc::clone(descriptors),
            me: Weak::clone(me),
            holders: Mutex::default(),
            pinned: AtomicBool::new(false),
            keepers: Mutex::default(),
            written: AtomicBool::new(false),
            tables: Arc::default(),
        })
    }

    /// Opens the file if necessary, with the locks of its readers, and keeps its descriptor open until the
    /// guard is dropped: who reads it without asking this process would not notice that the locks are gone.
    /// `Exhausted` if too many descriptors would stay open.
    pub fn keep_open(self: &Arc<Self>) -> Result<KeptOpen> {
        {
            let mut keepers = self.keepers.lock();
            if keepers.pin.is_none() {
                keepers.pin = Some(self.descriptors.pin(1, KEPT_PART)?);
            }
            keepers.count += 1;
        }
        let kept = KeptOpen { file: Arc::clone(self) };
        drop(self.opened()?);
        Ok(kept)
    }

    /// Its path beneath the root.
    pub fn path(&self) -> PathBuf {
        self.path.read().clone()
    }

    /// Records a new path. Only for the caller that renamed the file, under a [`WriteLock`].
    pub fn renamed(&self, path: &Path) {
        *self.path.write() = path.to_path_buf();
    }

    /// Its identity.
    pub fn id(&self) -> ObjectId {
        self.id
    }

    /// Reads the present attributes.
    pub fn stat(&self) -> Result<ObjectStat> {
        self.opened()?.stat()
    }

    /// Free bytes of its file system.
    pub fn free_space(&self) -> Result<u64> {
        self.opened()?.free_space()
    }

    /// The file of this machine that it is, opened anew, for passthrough. `None` if it is none.
    pub fn open_local(&self) -> Result<Option<LocalFile>> {
        Ok(self.open()?.local_file())
    }

    /// The expected version; `None` if the file may change.
    pub fn expected(&self) -> Option<ObjectVersion> {
        self.expected_stat().map(|expected| expected.version)
    }

    /// What the file was with the expected version.
    pub fn expected_stat(&self) -> Option<ObjectStat> {
        *self.expected.lock()
    }

    /// Whether the file has its expected attributes, or is changed only by this process.
    pub fn is_as_expected(&self) -> Result<bool> {
        loop {
            let Some(expected) = self.expected() else { return Ok(true) };
            if self.is_written() || self.stat()?.version == expected {
                return Ok(true);
            }
            // A writer of this process may have ended in between and recorded the new attributes.
            if self.expected() == Some(expected) {
                return Ok(false);
            }
        }
    }

    /// Whether only this process has changed the file, checked even while this process writes it: the caller
    /// has recorded all its own changes.
    pub fn is_untouched(&self) -> Result<bool> {
        Ok(self.expected() == Some(self.stat()?.version))
    }

    /// Whether this process writes the file now.
    pub fn is_written(&self) -> bool {
        self.written.load(Ordering::Acquire)
    }

    /// Whether its descriptor carries locks.
    pub fn is_locked(&self) -> bool {
        let holders = self.holders.lock();
        holders.readers > 0 || holders.writer.is_some()
    }

    /// Makes the present attributes the expected ones: this process has made the changes. Only under a
    /// [`WriteLock`].
    pub fn accept_changes(&self) -> Result<()> {
        assert!(self.is_written(), "own changes need a write lock");
        let now = self.stat()?;
        if let Some(expected) = &mut *self.expected.lock() {
            *expected = now;
        }
        Ok(())
    }

    /// Takes QEMU's reader locks (or shares those already held) until the guard is dropped. `Busy` if another
    /// process writes the file or has marked it inconsistent. For a reader of frozen bytes, also `Busy`
    /// if this process writes the file.
    pub fn lock(self: &Arc<Self>, stability: Stability) -> Result<ReadLock> {
        let mut holders = self.holders.lock();
        // W1: what a guest writes is promised to no reader as frozen.
        if stability == Stability::Frozen && holders.writer == Some(WriterKind::Guest) {
            let fact = "is being written through this mount; close the active disk that it holds";
            return Err(Error::new(ErrorKind::Busy, format!("{} {fact}", self.path().display())));
        }
        if holders.readers == 0 && holders.writer.is_none() {
            let opened = self.opened()?;
            opened
                .locks()
                .take(LockKind::Reader)
                .map_err(|conflict| self.refused(&*opened, conflict, LockKind::Reader))?;
        }
        holders.readers += 1;
        holders.frozen += usize::from(stability == Stability::Frozen);
        Ok(ReadLock { file: Arc::clone(self), stability })
    }

    /// The reason why [`StoreFile::lock`] or [`StoreFile::lock_for_writing`] would fail now because of other
    /// processes. Takes no lock.
    pub fn locked_out(&self, kind: LockKind, support: LockSupport) -> Option<Error> {
        if self.holders.lock().writer.is_some() {
            return None;
        }
        // Not under `holders`: opening it would take a reader's locks.
        let opened = match self.opened() {
            Ok(opened) => opened,
            Err(error) => return Some(error),
        };
        match opened.locks().conflict(kind) {
            Ok(()) => None,
            Err(LockConflict::Unsupported(_)) if support == LockSupport::Optional => None,
            Err(conflict) => Some(self.refused(&*opened, conflict, kind)),
        }
    }

    /// Takes QEMU's writer locks, in addition to those of this process' readers, until the guard is dropped;
    /// until then the descriptor stays open. `Busy` if another process' locks exclude a writer, or if a
    /// reader of this process was promised that the file does not change. `ReadOnly` if locks do not work,
    /// unless they are optional.
    pub fn lock_for_writing(self: &Arc<Self>, kind: WriterKind, support: LockSupport) -> Result<WriteLock> {
        let mut holders = self.holders.lock();
        let busy = |fact| Err(Error::new(ErrorKind::Busy, format!("{} {fact}", self.path().display())));
        if holders.writer.is_some() {
            return busy("is being written through this mount already");
        }
        // C2, W1: a file that is being read as frozen takes no guest's writes.
        if holders.frozen > 0 && kind == WriterKind::Guest {
            return busy("is open as a snapshot in this mount; close that first");
        }
        let part = if kind == WriterKind::Guest { GUESTS_PART } else { JOBS_PART };
        let pin = self.descriptors.pin(DESCRIPTORS_OF_A_WRITER, part)?;
        // Before the locks are taken: from here on the descriptor stays open.
        self.pinned.store(true, Ordering::Release);
        if let Err(error) = self.take_writer_set(&holders, support) {
            self.pinned.store(false, Ordering::Release);
            return Err(error);
        }
        holders.writer = Some(kind);
        self.written.store(true, Ordering::Release);
        Ok(WriteLock { file: Arc::clone(self), _pin: pin })
    }

    fn take_writer_set(&self, holders: &LockOwners, support: LockSupport) -> Result<()> {
        let opened = self.opened()?;
        let locks = opened.locks();
        if holders.readers == 0 {
            locks
                .take(LockKind::Reader)
                .map_err(|conflict| self.refused(&*opened, conflict, LockKind::Writer))?;
        }
        match locks.take(LockKind::Writer) {
            Err(LockConflict::Unsupported(_)) if support == LockSupport::Optional => Ok(()),
            Err(conflict) => {
                if holders.readers == 0 {
                    locks.release(LockKind::Reader);
                }
                Err(self.refused(&*opened, conflict, LockKind::Writer))
            }
            Ok(()) => Ok(()),
        }
    }

    /// Opens the file for writing; `Stale` if the path has another file now.
    pub fn open_for_writing(&self) -> Result<Arc<dyn WriteStorage>> {
        let room = self.descriptors.reserve(1)?;
        let file = self.backend.open_file_for_writing(&self.path())?;
        if file.stat()?.id != self.id {
            return Err(stale(&self.path()));
        }
        Ok(WritableFile::new(file, room, &self.tables))
    }

    fn refused(&self, opened: &dyn OpenObject, conflict: LockConflict, kind: LockKind) -> Error {
        let path = self.path();
        let path = path.display();
        let for_reading = kind == LockKind::Reader;
        match conflict {
            LockConflict::Held { fact, lock } => {
                let Owners { text: holders, domain, .. } = opened.locks().holders(lock);
                let sentence = format!("{path} {fact} ({holders})");
                let remedy = match domain {
                    Some(domain) => {
                        let remedy = if for_reading {
                            format!(
                                "take a snapshot with virsh snapshot-create-as {} --disk-only and read that, \
                                 or shut {domain} down",
                                shell_word(&domain)
                            )
                        } else {
                            format!("shut {domain} down first")
                        };
                        return Error::new(ErrorKind::Busy, sentence).held_by(domain, remedy);
                    }
                    None if for_reading => {
                        "wait until it is closed, or read it while it changes with -U (for a mount: -o \
                         force_share)"
                    }
                    None => "wait until it is closed",
                };
                Error::new(ErrorKind::Busy, format!("{sentence}; {remedy}"))
            }
            LockConflict::Unsupported(_) if !for_reading => Error::new(
                ErrorKind::ReadOnly,
                format!(
                    "{path} is on a file system without file locks, which cannot exclude a second writer; if \
                        no \
                     other process uses it, mount with -o nolock"
                ),
            ),
            LockConflict::Unsupported(error) | LockConflict::System(error) => {
                Error::io(format!("locking {path}"), error)
            }
        }
    }

    fn unlock(&self, stability: Stability) {
        let mut holders = self.holders.lock();
        holders.readers -= 1;
        holders.frozen -= usize::from(stability == Stability::Frozen);
        if holders.readers == 0
            && holders.writer.is_none()
            && let Some((opened, _)) = &*self.opened.read()
        {
            opened.locks().release(LockKind::Reader);
        }
    }

    fn unlock_writing(&self) {
        let mut holders = self.holders.lock();
        holders.writer = None;
        if let Some((opened, _)) = &*self.opened.read() {
            let kind = if holders.readers == 0 { LockKind::Reader } else { LockKind::Writer };
            opened.locks().release(kind);
        }
        self.written.store(false, Ordering::Release);
        self.pinned.store(false, Ordering::Release);
    }

    fn must_stay_open(&self) -> bool {
        self.pinned.load(Ordering::Acquire) || self.keepers.lock().count > 0
    }

    /// The file, opened if necessary. Callers drop it soon, because it keeps the file open.
    fn opened(&self) -> Result<Arc<dyn OpenObject>> {
        if let Some((open, _)) = &*self.opened.read() {
            self.used.store(true, Ordering::Relaxed);
            return Ok(Arc::clone(open));
        }
        let mut slot = self.opened.write();
        if let Some((open, _)) = &*slot {
            return Ok(Arc::clone(open));
        }
        let room = self.descriptors.reserve(1)?;
        let open = self.open()?;
        // Closing the descriptor released the readers' locks. They are taken again on the new one; `open` has
        // checked that the file was not written in between.
        if self.holders.try_lock().is_none_or(|holders| holders.readers > 0) {
            open.locks()
                .take(LockKind::Reader)
                .map_err(|conflict| self.refused(&*open, conflict, LockKind::Reader))?;
        }
        *slot = Some((Arc::clone(&open), room));
        drop(slot);
        self.used.store(true, Ordering::Relaxed);
        self.descriptors.register(Weak::clone(&self.me) as _);
        Ok(open)
    }

    fn open(&self) -> Result<Arc<dyn OpenObject>> {
        // R3: this file, unchanged, or no bytes.
        let expected = Expected { id: self.id, version: self.expected() };
        self.backend.open_expected(&self.path(), &expected)
    }
}

impl Reclaimable for StoreFile {
    fn was_used(&self) -> bool {
        self.used.swap(false, Ordering::Relaxed)
    }

    /// Closes the descriptor. This releases the readers' locks; they are taken again at the next read, and
    /// another process may have written in between. A writer's locks could not be taken again, so its
    /// descriptor stays open.
    fn reclaim(&self, which: Reclaim) -> bool {
        let is_locked =
            || self.holders.try_lock().is_none_or(|held| held.readers > 0 || held.writer.is_some());
        if self.must_stay_open() || (which == Reclaim::Unlocked && is_locked()) {
            return false;
        }
        let Some(mut slot) = self.opened.try_write() else { return false };
        let is_used = slot.as_ref().is_some_and(|(open, _)| Arc::strong_count(open) > 1);
        // Checked again: a writer sets the flag before it takes the descriptor.
        if is_used || self.must_stay_open() {
            return false;
        }
        let old = slot.take();
        drop(slot);
        drop(old);
        true
    }
}

impl Storage for StoreFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.opened()?.read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.stat()?.size)
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        self.opened()?.extent(at, end)
    }

    fn read_table_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let _unchanged = self.tables.read();
        self.read_at(at, buf)
    }

    fn local_file(&self) -> Option<LocalFile> {
        let opened = self.opened().ok()?;
        Some(opened.local_file()?.used_by(opened))
    }
}

/// Reads from `at` until `buf` is full or the file ends; returns the number of bytes.
pub(super) fn read_full(file: impl AsFd, at: u64, buf: &mut [u8]) -> rustix::io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match rustix::io::pread(&file, &mut buf[done..], at + done as u64) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// The file system's answer for [`Storage::extent`].
pub(super) fn extent(file: &OwnedFd, at: u64, end: u64) -> Run<BlockStatus> {
    let (data, hole) =
        (|end: u64| Run::new(BlockStatus::Data, end - at), |end: u64| Run::new(BlockStatus::Zero, end - at));
    // This moves the descriptor's position, which no reader uses.
    match fs::seek(file, SeekFrom::Data(at)) {
        Ok(next) if next > at => hole(next.min(end)),
        Ok(_) => match fs::seek(file, SeekFrom::Hole(at)) {
            Ok(next) if next > at => data(next.min(end)),
            _ => data(end),
        },
        Err(Errno::NXIO) => hole(end), // no data up to the end of the file
        Err(_) => data(end),
    }
}

/// Keeps the descriptor of a [`StoreFile`] open, until dropped.
#[derive(Debug)]
pub struct KeptOpen {
    file: Arc<StoreFile>,
}

impl Drop for KeptOpen {
    fn drop(&mut self) {
        let mut keepers = self.file.keepers.lock();
        keepers.count -= 1;
        if keepers.count == 0 {
            keepers.pin = None;
        }
    }
}

/// QEMU's reader locks on a [`StoreFile`], until dropped.
#[derive(Debug)]
pub struct ReadLock {
    file: Arc<StoreFile>,
    stability: Stability,
}

impl ReadLock {
    /// The locked file.
    pub fn file(&self) -> &Arc<StoreFile> {
        &self.file
    }

    /// What was promised of the file.
    pub fn stability(&self) -> Stability {
        self.stability
    }

    /// Gives up the promise that the file does not change.
    pub fn thaw(&mut self) {
        if std::mem::replace(&mut self.stability, Stability::Live) == Stability::Frozen {
            self.file.holders.lock().frozen -= 1;
        }
    }
}

impl Drop for ReadLock {
    fn drop(&mut self) {
        self.file.unlock(self.stability);
    }
}

/// QEMU's writer locks on a [`StoreFile`], until dropped.
#[derive(Debug)]
pub struct WriteLock {
    file: Arc<StoreFile>,
    _pin: Pin,
}

impl WriteLock {
    /// The locked file.
    pub fn file(&self) -> &Arc<StoreFile> {
        &self.file
    }

    /// Changes the purpose of writing. `Busy` if the new one is a guest's, and a reader was promised that the
    /// file does not change.
    pub fn become_for(&self, kind: WriterKind) -> Result<()> {
        let mut holders = self.file.holders.lock();
        if kind == WriterKind::Guest && holders.frozen > 0 {
            let fact = "is open as a snapshot in this mount; close that first";
            return Err(Error::new(ErrorKind::Busy, format!("{} {fact}", self.file.path().display())));
        }
        holders.writer = Some(kind);
        Ok(())
    }
}

impl Drop for WriteLock {
    fn drop(&mut self) {
        self.file.unlock_writing();
    }
}
