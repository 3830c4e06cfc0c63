//! The local directory as a backend: everything of a store that is a matter of this machine's file systems.
//!
//! Confinement is [`Root`]'s, names are those of `directory`, and locks are QEMU's of `locks`. Nothing
//! outside of this layer knows descriptors, inode numbers or times of files.

use std::ffi::OsStr;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{self, Access, Advice, AtFlags, CWD, FallocateFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockStatus, Run};

use super::backend::{
    Backend, DirEntry, LockConflict, LockKind, LockOwners, MountPoints, ObjectLocks, OpenDirectory,
    OpenObject, Space, WriteObject,
};
use super::beneath::Root;
use super::changes::Inotify;
use super::descriptors::Descriptors;
use super::directory::names_beneath;
use super::file::{extent, read_full};
use super::locks::{self, Conflict};
use super::object::{Identity, ObjectStat, ObjectVersion};
use super::permissions::Permissions;
use super::{Changes, Directory, Storage, WriteStorage, copy_by_hand, lock_holders, mounts};

/// Bytes written at a time if the file system cannot zero a range.
const ZEROES: &[u8] = &[0; 64 << 10];
/// Bytes per copy request to the kernel: a request cannot be interrupted.
const MAX_COPY: u64 = 16 << 20;
/// Contiguous bytes that were copied before the disk gets them.
const WRITTEN_SOON: u64 = 8 << 20;
/// Magic numbers (statfs(2)) of file systems on which copies may share their blocks: XFS, btrfs, bcachefs. An
/// XFS may have been made without it, which shows when it is tried.
const SHARING: [u64; 3] = [0x5846_5342, 0x9123_683E, 0xCA45_1A4E];
/// Magic numbers of NFS, SMB, SMB2, FUSE, 9P, Ceph, AFS and OCFS2: other machines may write there.
const REMOTE: [u64; 8] =
    [0x6969, 0xFF53_4D42, 0xFE53_4D42, 0x6573_5546, 0x0102_1997, 0x00C3_6400, 0x5346_414F, 0x7461_636F];

/// A directory of this machine, beneath which files may be opened.
#[derive(Debug)]
pub struct LocalDirectory {
    root: Arc<Root>,
    descriptors: Arc<Descriptors>,
}

impl LocalDirectory {
    /// Opens the directory `path` and follows symbolic links, because the user named it.
    pub fn open(path: &Path) -> Result<Arc<dyn Backend>> {
        Self::with_descriptors(path, Descriptors::for_process())
    }

    /// The same; files that are made take their descriptors from these.
    pub fn with_descriptors(path: &Path, descriptors: Arc<Descriptors>) -> Result<Arc<dyn Backend>> {
        Ok(Arc::new(Self { root: Arc::new(Root::open(path)?), descriptors }))
    }

    fn is_on(&self, kinds: &[u64]) -> bool {
        self.root.file_system().is_ok_and(|kind| kinds.contains(&kind))
    }
}

impl Backend for LocalDirectory {
    fn given(&self) -> &Path {
        self.root.given()
    }

    fn canonical(&self) -> &Path {
        self.root.canonical()
    }

    fn open_directory(&self, path: &Path, mounts: MountPoints) -> Result<Option<Box<dyn OpenDirectory>>> {
        let found = match (self.root.open_directory(path, mounts)?, mounts) {
            (None, MountPoints::SkipOwn) if !is_chainfs_mount(&self.root.canonical().join(path)) => {
                self.root.open_directory(path, MountPoints::Enter)?
            }
            (found, _) => found,
        };
        Ok(found.map(|directory| Box::new(LocalOpenDirectory(Arc::new(directory))) as _))
    }

    fn stat(&self, path: &Path) -> Result<ObjectStat> {
        self.root.stat(path)
    }

    fn stat_itself(&self, path: &Path) -> Result<ObjectStat> {
        self.root.stat_itself(path)
    }

    fn identify(&self, path: &Path) -> Result<Identity> {
        self.root.identify(path)
    }

    fn is_real_directory(&self, path: &Path) -> bool {
        self.root.is_real_directory(path)
    }

    fn link_target(&self, path: &Path) -> Option<PathBuf> {
        self.root.link_target(path)
    }

    fn open_file(&self, path: &Path) -> Result<Arc<dyn OpenObject>> {
        Ok(Arc::new(LocalOpenFile::new(self.root.open_file(path)?, path)))
    }

    fn open_file_for_writing(&self, path: &Path) -> Result<Arc<dyn WriteObject>> {
        Ok(Arc::new(LocalOpenFile::new(self.root.open_file_for_writing(path)?, path)))
    }

    fn names(&self) -> Option<Arc<dyn Directory>> {
        Some(names_beneath(&self.root, &self.descriptors))
    }

    fn changes(&self) -> Option<Arc<dyn Changes>> {
        Some(Arc::new(Inotify::new()?))
    }

    fn permissions(&self, path: &Path) -> Result<Permissions> {
        self.root.permissions(path)
    }

    fn permissions_above(&self) -> Result<Vec<Permissions>> {
        self.root.permissions_above()
    }

    fn steps(&self, path: &Path) -> Result<(Vec<PathBuf>, PathBuf)> {
        self.root.steps(path)
    }

    fn shares_blocks(&self) -> bool {
        self.is_on(&SHARING)
    }

    fn has_remote_writers(&self) -> bool {
        self.is_on(&REMOTE)
    }

    fn space(&self) -> Result<Space> {
        let stat = self.root.statvfs()?;
        Ok(Space {
            block_len: stat.f_bsize as u32,
            unit_len: stat.f_frsize as u32,
            blocks: stat.f_blocks,
            free: stat.f_bfree,
            available: stat.f_bavail,
            files: stat.f_files,
            files_free: stat.f_ffree,
        })
    }
}

/// Whether a mount of chainfs is what one sees at `path`.
fn is_chainfs_mount(path: &Path) -> bool {
    mounts().is_ok_and(|mounts| {
        mounts
            .iter()
            .rfind(|mount| mount.directory == path)
            .is_some_and(|mount| mount.kind == super::OWN_KIND)
    })
}

/// A file or directory of this machine that is open, for what only the kernel can do with it: copying,
/// sharing blocks, passthrough. The one way to a descriptor; a store that lies elsewhere has none.
#[derive(Clone, Debug)]
pub struct LocalFile {
    file: Arc<OwnedFd>,
    /// Counts as a user of that as long as this lives.
    _user_of: Option<Arc<dyn OpenObject>>,
}

impl LocalFile {
    pub(super) fn new(file: &Arc<OwnedFd>) -> Self {
        Self { file: Arc::clone(file), _user_of: None }
    }

    /// Reads from `at` into `buf`; fewer bytes mean the end of the file.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        read_full(&self.file, at, buf).map_err(|error| Error::io("reading", error))
    }

    /// Whether it can be read with `O_DIRECT`.
    pub fn takes_direct_reads(&self) -> bool {
        let Ok(flags) = fs::fcntl_getfl(&self.file) else { return false };
        let takes = fs::fcntl_setfl(&self.file, flags | OFlags::DIRECT).is_ok();
        takes && fs::fcntl_setfl(&self.file, flags).is_ok()
    }

    pub(super) fn used_by(self, object: Arc<dyn OpenObject>) -> Self {
        Self { _user_of: Some(object), ..self }
    }
}

impl AsFd for LocalFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A path by which the kernel finds an open file or directory, whatever its name is by now.
pub(super) fn path_of(file: impl AsFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

#[derive(Debug)]
struct LocalOpenDirectory(Arc<OwnedFd>);

impl OpenDirectory for LocalOpenDirectory {
    fn list(&self) -> Result<Vec<DirEntry>> {
        Root::list(&self.0)
    }

    fn version(&self) -> Result<ObjectVersion> {
        Ok(ObjectStat::of(&*self.0)?.version)
    }

    fn stat_entry(&self, name: &OsStr) -> Result<Option<ObjectStat>> {
        match fs::statat(&*self.0, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat.into())),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(Error::io("asking for its attributes", error)),
        }
    }

    fn open_entry(&self, name: &OsStr) -> Result<Option<Arc<dyn OpenObject>>> {
        let found = Root::open_entry(&self.0, name)?;
        Ok(found.map(|file| Arc::new(LocalOpenFile::new(file, Path::new(name))) as _))
    }

    fn check_writable(&self) -> std::io::Result<()> {
        let access = Access::WRITE_OK | Access::EXEC_OK;
        Ok(fs::accessat(CWD, path_of(&*self.0), access, AtFlags::EACCESS)?)
    }

    fn local_file(&self) -> Option<LocalFile> {
        Some(LocalFile::new(&self.0))
    }
}

/// A file that is open, for reading or for both.
#[derive(Debug)]
pub(super) struct LocalOpenFile {
    file: Arc<OwnedFd>,
    /// For messages.
    path: PathBuf,
    /// What was copied into it last, in one run, and need not be on its way to the disk.
    copied: Mutex<Range<u64>>,
}

impl LocalOpenFile {
    pub(super) fn new(file: OwnedFd, path: &Path) -> Self {
        Self { file: Arc::new(file), path: path.to_path_buf(), copied: Mutex::default() }
    }

    /// Lets the kernel begin to write what was copied, so that the disk works while the next bytes are
    /// copied: else most of it waits for the flush at the end. Shorter runs are left to the kernel.
    fn write_soon(&self, at: u64, len: u64) {
        let run = {
            let mut run = self.copied.lock();
            let start = if run.end == at { run.start } else { at };
            *run = start..at + len;
            if run.end - run.start < WRITTEN_SOON {
                return;
            }
            std::mem::replace(&mut *run, at + len..at + len)
        };
        // Pages that are to be written stay in the page cache.
        let _ = fs::fadvise(&self.file, run.start, NonZeroU64::new(run.end - run.start), Advice::DontNeed);
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

impl OpenObject for LocalOpenFile {
    fn stat(&self) -> Result<ObjectStat> {
        ObjectStat::of(&*self.file)
    }

    fn identity(&self) -> Result<Identity> {
        Identity::of(&*self.file)
    }

    fn free_space(&self) -> Result<u64> {
        let stat = fs::fstatvfs(&self.file).map_err(|error| Error::io("reading the free space", error))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    fn locks(&self) -> &dyn ObjectLocks {
        self
    }

    fn reopen_for_writing(&self) -> Result<Arc<dyn WriteObject>> {
        let opened = fs::open(path_of(&*self.file), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
        let file =
            opened.map_err(|error| Error::io(format!("opening {} again", self.path.display()), error))?;
        Ok(Arc::new(Self::new(file, &self.path)))
    }
}

impl From<Conflict> for LockConflict {
    fn from(conflict: Conflict) -> Self {
        match conflict {
            Conflict::Held { byte, fact } => Self::Held { fact, lock: byte },
            Conflict::System(error) if locks::is_unsupported(error) => Self::Unsupported(error.into()),
            Conflict::System(error) => Self::System(error.into()),
        }
    }
}

impl ObjectLocks for LocalOpenFile {
    fn take(&self, kind: LockKind) -> std::result::Result<(), LockConflict> {
        let file = self.file.as_fd();
        match kind {
            LockKind::Reader => locks::take_reader_set(file)?,
            LockKind::Writer => locks::add_writer_set(file)?,
            LockKind::Exclusive => locks::take_whole(file)?,
        }
        Ok(())
    }

    fn conflict(&self, kind: LockKind) -> std::result::Result<(), LockConflict> {
        Ok(locks::conflict(self.file.as_fd(), kind)?)
    }

    fn release(&self, kind: LockKind) {
        let file = self.file.as_fd();
        match kind {
            LockKind::Reader => locks::drop_all(file),
            LockKind::Writer => locks::drop_writer_set(file),
            LockKind::Exclusive => locks::drop_whole(file),
        }
    }

    fn is_written_by_others(&self) -> bool {
        locks::probe_writer(self.file.as_fd())
    }

    fn wait_for_turn(&self) -> std::io::Result<()> {
        Ok(fs::flock(&self.file, FlockOperation::LockExclusive)?)
    }

    fn holders(&self, lock: i64) -> LockOwners {
        match self.stat() {
            Ok(stat) => lock_holders::owners(stat.id, lock),
            Err(_) => LockOwners::default(),
        }
    }
}

impl Storage for LocalOpenFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        read_full(&self.file, at, buf)
            .map_err(|error| Error::io(format!("reading {} at {at:#x}", self.path.display()), error))
    }

    fn len(&self) -> Result<u64> {
        Ok(self.stat()?.size)
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        Ok(extent(&self.file, at, end))
    }

    fn local_file(&self) -> Option<LocalFile> {
        Some(LocalFile::new(&self.file))
    }
}

impl WriteStorage for LocalOpenFile {
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

    fn copy_from(&self, at: u64, source: &dyn Storage, from: u64, len: u64) -> Result<()> {
        let Some(source_file) = source.local_file() else { return copy_by_hand(self, at, source, from, len) };
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
                Ok(copied) => {
                    self.write_soon(at + done, copied as u64);
                    done += copied as u64;
                }
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

    fn share_all_of(&self, source: &dyn Storage) -> bool {
        source.local_file().is_some_and(|source| fs::ioctl_ficlone(&self.file, &source).is_ok())
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
