//! What a store lives in: a directory of this machine, or anything else that lists and reads objects.
//!
//! A [`Backend`] is one tree of objects with names. It promises: nothing outside of the tree is opened; an
//! open object's bytes come from that object, and its [`ObjectStat::version`] changes with them. Rules about
//! readers and writers of one file are not its business: [`StoreFile`](super::StoreFile) has them for all
//! backends. What a backend cannot do, it does not have: without names nothing is changed and commands are
//! refused, without locks no others are kept out, without news the store is looked at every so often.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

use super::object::{Identity, ObjectId, ObjectStat, ObjectVersion};
use super::permissions::Permissions;
use super::{Changes, Directory, Existing, LocalFile, LockHolder, Storage, WriteStorage};

/// One tree of objects. Paths are relative to its root, which is the empty path or `.`.
pub trait Backend: Send + Sync {
    /// The root as the user gave it, made absolute. Names in images may begin with it.
    fn given(&self) -> &Path;

    /// The root without symbolic links. Names in images may begin with it, and messages name it.
    fn canonical(&self) -> &Path;

    /// Converts an absolute path to one relative to the root, as given or as canonical; `None` if it is
    /// outside.
    fn relative(&self, absolute: &Path) -> Option<PathBuf> {
        let roots = [self.given(), self.canonical()];
        roots.iter().find_map(|root| absolute.strip_prefix(root).ok()).map(Path::to_path_buf)
    }

    /// Opens a directory for listing; no part of the path may be a link. `None` if `mounts` says so.
    fn open_directory(&self, path: &Path, mounts: MountPoints) -> Result<Option<Box<dyn OpenDirectory>>>;

    /// What is at `path`; links are followed within the tree. Errors: `NotFound`, `Escape` and `Io`.
    fn stat(&self, path: &Path) -> Result<ObjectStat>;

    /// Like [`Backend::stat`]; a link at the end of the path is not followed.
    fn stat_itself(&self, path: &Path) -> Result<ObjectStat>;

    /// Which object is at `path`; links are followed within the tree.
    fn identify(&self, path: &Path) -> Result<Identity>;

    /// Whether `path` is a directory, with no link in the path.
    fn is_real_directory(&self, path: &Path) -> bool;

    /// The target of the link at `path`; `None` if that is no link.
    fn link_target(&self, path: &Path) -> Option<PathBuf>;

    /// Opens an object for reading, which is the present one at `path`. Errors: as [`Backend::stat`].
    fn open_file(&self, path: &Path) -> Result<Arc<dyn OpenObject>>;

    /// Opens the object that was listed, or is `Stale`: another object, or another version of it, is at the
    /// path now.
    fn open_expected(&self, path: &Path, expected: &Expected) -> Result<Arc<dyn OpenObject>> {
        let object = self.open_file(path)?;
        // R3: this file, unchanged, or no bytes.
        if expected.is_met_by(&object.stat()?) { Ok(object) } else { Err(stale(path)) }
    }

    /// Opens an object for reading and writing, without creating or truncating it. Additional errors:
    /// `Denied` and `ReadOnly`.
    fn open_file_for_writing(&self, path: &Path) -> Result<Arc<dyn WriteObject>>;

    /// The names, if they can be changed. `None`: nothing can be made, renamed or removed, so that the store
    /// is read-only.
    fn names(&self) -> Option<Arc<dyn Directory>>;

    /// News of changes, if the backend has any to give. `None`: it has to be looked at every so often.
    fn changes(&self) -> Option<Arc<dyn Changes>>;

    /// Owner and permissions of what is at `path`; links are followed within the tree.
    fn permissions(&self, path: &Path) -> Result<Permissions>;

    /// The permissions of the root and of all directories above it.
    fn permissions_above(&self) -> Result<Vec<Permissions>>;

    /// The directories that are searched to resolve `path`, and the resolved path without links.
    fn steps(&self, path: &Path) -> Result<(Vec<PathBuf>, PathBuf)>;

    /// Whether copies within the tree may share their space with the original, as far as can be told before
    /// one is made.
    fn shares_blocks(&self) -> bool;

    /// Whether others may change the tree without that [`Changes`] tells of it.
    fn has_remote_writers(&self) -> bool;

    /// Its space, for `df`.
    fn space(&self) -> Result<Space>;

    /// Bytes of the object at `path` that are on this machine; `None` if the tree is of this machine.
    fn cached(&self, _path: &Path) -> Option<u64> {
        None
    }

    /// What has happened between this machine and the tree, if that is elsewhere.
    fn counters(&self) -> Vec<BackendCounter> {
        Vec::new()
    }
}

/// A count of what has happened since a backend was opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BackendCounter {
    /// Its name as a metric.
    pub name: &'static str,
    /// A sentence on it.
    pub help: &'static str,
    /// How often, or how many bytes.
    pub value: u64,
}

impl fmt::Debug for dyn Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Backend").field(&self.canonical()).finish()
    }
}

/// What becomes of directories on which another file system is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountPoints {
    /// They are entered.
    Enter,
    /// They are left alone: no request goes to the other mount, so it may be this daemon's own.
    Skip,
    /// They are entered, unless that is a mount of chainfs: it cannot answer while a scan waits for it.
    SkipOwn,
}

/// The object that a caller means to open.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// Which one it is.
    pub id: ObjectId,
    /// Its version; `None` if it may have changed.
    pub version: Option<ObjectVersion>,
}

impl Expected {
    /// Whether that is the object.
    pub fn is_met_by(&self, found: &ObjectStat) -> bool {
        found.id == self.id && self.version.is_none_or(|version| version == found.version)
    }
}

/// That the object at `path` is not the one that was looked up.
pub(super) fn stale(path: &Path) -> Error {
    let fact = "was changed or replaced since it was looked up; open it again";
    Error::new(ErrorKind::Stale, format!("{} {fact}", path.display()))
}

/// The types of directory entries that a scan distinguishes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// An object with bytes (a regular file).
    File,
    /// A directory.
    Directory,
    /// A link to another path.
    Symlink,
    /// FIFO, socket or device: never opened.
    Other,
}

/// One entry of a directory.
#[derive(Clone, Debug)]
pub struct DirEntry {
    /// The name, one component.
    pub name: OsString,
    /// The type.
    pub kind: EntryKind,
}

/// A directory that is open for listing: it stays the same one, whatever becomes of its name.
pub trait OpenDirectory: Send + Sync {
    /// Its entries, without `.` and `..`, sorted by name. What is renamed meanwhile may be missing.
    fn list(&self) -> Result<Vec<DirEntry>>;

    /// Its version, which changes with its entries.
    fn version(&self) -> Result<ObjectVersion>;

    /// What the entry `name` is; a link is not followed. `None` if there is none.
    fn stat_entry(&self, name: &OsStr) -> Result<Option<ObjectStat>>;

    /// Opens the entry `name` without following a link. `None` if it is missing or no regular file.
    fn open_entry(&self, name: &OsStr) -> Result<Option<Arc<dyn OpenObject>>>;

    /// Fails if this process may not make files in it.
    fn check_writable(&self) -> std::io::Result<()>;

    /// The directory of this machine that it is, if so. Only for what the kernel alone can do (watching).
    fn local_file(&self) -> Option<LocalFile>;
}

/// An object that is open.
pub trait OpenObject: Storage {
    /// What it is now.
    fn stat(&self) -> Result<ObjectStat>;

    /// Its identity.
    fn identity(&self) -> Result<Identity>;

    /// Free bytes where it lies.
    fn free_space(&self) -> Result<u64>;

    /// The locks on it. They belong to this opening, and end with it.
    fn locks(&self) -> &dyn ObjectLocks;

    /// Opens the same object for writing, also if it has no name any more.
    fn reopen_for_writing(&self) -> Result<Arc<dyn WriteObject>>;
}

impl fmt::Debug for dyn OpenObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OpenObject").field(&self.stat().map(|stat| stat.id)).finish()
    }
}

/// An object that is open for writing.
pub trait WriteObject: OpenObject + WriteStorage {}

impl<T: OpenObject + WriteStorage> WriteObject for T {}

impl fmt::Debug for dyn WriteObject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WriteObject").field(&self.stat().map(|stat| stat.id)).finish()
    }
}

/// What a lock says to others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockKind {
    /// "I read it as an image": others may read it, too.
    Reader,
    /// "I write it as an image", in addition to [`LockKind::Reader`], which its holder has already.
    Writer,
    /// "It is mine": for files of chainfs itself.
    Exclusive,
}

/// Why a lock was refused.
#[derive(Debug)]
pub enum LockConflict {
    /// Another opening holds one that excludes it.
    Held {
        /// The reason, phrased to follow the object's name.
        fact: &'static str,
        /// Which lock that is, for [`ObjectLocks::holders`].
        lock: i64,
    },
    /// The backend has locks, and they do not work here (a file system without file locks).
    Unsupported(std::io::Error),
    /// The lock cannot be asked for.
    System(std::io::Error),
}

/// The locks on an open object: bytes of a file, or leases.
pub trait ObjectLocks: Send + Sync {
    /// Takes a lock, or none of it. Where locks do not work, that is an error for writers alone: no reader of
    /// images is there that could be found out.
    fn take(&self, kind: LockKind) -> std::result::Result<(), LockConflict>;

    /// Why [`ObjectLocks::take`] would fail now. Takes no lock.
    fn conflict(&self, kind: LockKind) -> std::result::Result<(), LockConflict>;

    /// Gives up a lock: [`LockKind::Writer`] keeps the reader's, [`LockKind::Reader`] gives up both.
    fn release(&self, kind: LockKind);

    /// Whether another opening writes it as an image now. Takes no lock.
    fn is_written_by_others(&self) -> bool;

    /// Waits until no other process adds to a list of chainfs. The turn ends with this opening.
    fn wait_for_turn(&self) -> std::io::Result<()>;

    /// The other processes that hold a lock, as far as they can be found.
    fn holders(&self, lock: i64) -> LockOwners;
}

/// Who holds a lock.
#[derive(Debug, Default)]
pub struct LockOwners {
    /// As part of a message.
    pub text: String,
    /// A virtual machine of one of them.
    pub domain: Option<String>,
    /// The processes.
    pub processes: Vec<LockHolder>,
}

/// The locks of a backend that has none: no other process is excluded or found.
#[derive(Clone, Copy, Debug)]
pub struct NoLocks;

impl ObjectLocks for NoLocks {
    fn take(&self, _: LockKind) -> std::result::Result<(), LockConflict> {
        Ok(())
    }

    fn conflict(&self, _: LockKind) -> std::result::Result<(), LockConflict> {
        Ok(())
    }

    fn release(&self, _: LockKind) {}

    fn is_written_by_others(&self) -> bool {
        false
    }

    fn wait_for_turn(&self) -> std::io::Result<()> {
        Ok(())
    }

    fn holders(&self, _: i64) -> LockOwners {
        LockOwners::default()
    }
}

/// Space of a backend, in blocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct Space {
    /// Bytes of a block.
    pub block_len: u32,
    /// Bytes of the unit in which blocks are counted.
    pub unit_len: u32,
    /// Blocks.
    pub blocks: u64,
    /// Blocks that are free.
    pub free: u64,
    /// Blocks that are free for users without privileges.
    pub available: u64,
    /// Files that it may have.
    pub files: u64,
    /// How many of them may still be made.
    pub files_free: u64,
}

/// The names of a backend that has none to change: every change is refused.
#[derive(Clone, Copy, Debug)]
pub struct NoNames;

impl NoNames {
    fn refuse<T>(path: &Path) -> Result<T> {
        let fact = "lies where nothing can be made or renamed; copy the store to a directory first";
        Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", path.display())))
    }
}

impl Directory for NoNames {
    fn create(&self, path: &Path, _: Option<&Path>) -> Result<Arc<dyn WriteStorage>> {
        Self::refuse(path)
    }

    fn create_directory(&self, path: &Path) -> Result<()> {
        Self::refuse(path)
    }

    fn link(&self, from: &Path, _: &Path) -> Result<()> {
        Self::refuse(from)
    }

    fn rename(&self, from: &Path, _: &Path, _: Existing) -> Result<()> {
        Self::refuse(from)
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        Self::refuse(path)
    }

    fn sync(&self, path: &Path) -> Result<()> {
        Self::refuse(path)
    }
}
