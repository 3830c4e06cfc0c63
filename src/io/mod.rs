//! Positional storage: the source of an image's bytes.
//!
//! Higher layers use the [`Storage`] trait, which a file beneath a store implements, or a vector in a test.
//! This layer handles files, confinement and QEMU's locks, and knows nothing of qcow2.

mod backend;
mod beneath;
mod changes;
mod descriptors;
pub mod detached;
mod directory;
mod file;
mod file_lock;
mod file_users;
mod groups;
mod host_files;
mod local;
mod lock_holders;
mod locks;
mod memory;
mod mount_users;
mod mountinfo;
mod object;
mod object_tree;
mod permissions;
mod remote;
mod writable_file;

pub use backend::{
    Backend, BackendCounter, DirEntry, EntryKind, Expected, LockConflict, LockKind, LockOwners, MountPoints,
    NoLocks, NoNames, ObjectLocks, OpenDirectory, OpenObject, Space, WriteObject,
};
pub use beneath::OWN_KIND;
pub use changes::{Change, ChangeKind, Changes, Interrupt, WatchId};
pub use descriptors::{DescriptorReservation, Descriptors, Pin, Reclaim, Reclaimable};
pub use directory::{Directory, Existing, directory_of};
pub use file::{Expect, KeptOpen, LockSupport, ReadLock, StoreFile, WriteLock, WriterKind};
pub use file_lock::FileLock;
pub use file_users::{FileNumber, FileUser, FileUsers, UsedFile, WantedFiles, WhichFile, file_users};
pub use groups::groups_of_process;
pub use host_files::{HostFileVersion, host_files, host_text};
pub use local::{LocalDirectory, LocalFile};
pub use lock_holders::{LockHolder, OwnProcess, all_lock_holders};
pub use locks::{ImageLocks, WRITER_BYTE};
pub use memory::MemoryDirectory;
pub use mount_users::{loop_devices, namespaces_with, other_users_of, users_of};
pub use mountinfo::{MountEntry, mounts, parse as parse_mounts, unescape as unescape_mount_word};
pub use object::{Identity, ObjectId, ObjectStat, ObjectVersion, Timestamp};
pub use permissions::{AccessEntry, Permissions, Who};
pub use remote::{CacheFiles, RemoteOptions, RemoteStore, is_address};
pub use writable_file::WritableFile;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockStatus, Run};

#[expect(clippy::len_without_is_empty, reason = "no caller tests for empty files")]
/// The bytes of one image file (or external data file), by position.
pub trait Storage: Send + Sync {
    /// Reads from `at` into `buf` and returns the number of bytes. Fewer than `buf.len()` means the end of
    /// the file, never an interrupted read.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize>;

    /// Present size of the file in bytes.
    fn len(&self) -> Result<u64>;

    /// The first run of `[at, end)` that is all data or all hole. If the file system does not report holes,
    /// everything is data.
    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        Ok(Run::new(BlockStatus::Data, end - at))
    }

    /// Like [`Storage::read_at`], for tables that this process may be writing (with
    /// [`WriteStorage::write_table_at`]): the result is never a mixture of old and new bytes.
    fn read_table_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.read_at(at, buf)
    }

    /// The file of this machine behind it, for what only the kernel can do with one: copy, share blocks, pass
    /// reads through. `None` if there is none: callers then copy through a buffer.
    fn local_file(&self) -> Option<LocalFile> {
        None
    }
}

/// A writable file. Between two calls of [`WriteStorage::sync`], a crash of the machine may lose or keep any
/// part of the changes, in any combination. A crash of the process loses no change whose call has returned.
pub trait WriteStorage: Storage {
    /// Writes all of `bytes` at `at`; the file grows if necessary. After an error, any part may have been
    /// written.
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()>;

    /// Sets the file's length to `len` bytes. New bytes read as zeroes.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Punches a hole: frees the space of a range, which then reads as zeroes. The file's length stays.
    /// `Unsupported` if the file system cannot punch holes.
    fn punch_hole(&self, at: u64, len: u64) -> Result<()>;

    /// Zeroes a range and keeps (or allocates) its space; the file grows if necessary.
    fn write_zeroes(&self, at: u64, len: u64) -> Result<()>;

    /// Allocates space for a range without changing its bytes, so that a later write cannot fail for lack of
    /// space; the file grows if necessary. `Unsupported` if the file system cannot do that.
    fn allocate(&self, at: u64, len: u64) -> Result<()>;

    /// Like [`WriteStorage::allocate`], but keeps the file's length. [`WriteStorage::punch_hole`] frees space
    /// past the end.
    fn reserve(&self, at: u64, len: u64) -> Result<()>;

    /// Like [`WriteStorage::write_at`], for tables that other threads may be reading (with
    /// [`Storage::read_table_at`]).
    fn write_table_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.write_at(at, bytes)
    }

    /// Copies `len` bytes at `from` of `source` to `at`; the file grows if necessary. The source must be long
    /// enough. Both files share the blocks afterwards if the file system supports it.
    fn copy_from(&self, at: u64, source: &dyn Storage, from: u64, len: u64) -> Result<()> {
        copy_by_hand(self, at, source, from, len)
    }

    /// Makes all of it a copy of `source` that shares its blocks with it; whether that could be done.
    fn share_all_of(&self, _source: &dyn Storage) -> bool {
        false
    }

    /// Makes all writes durable, the file's length included.
    fn sync(&self) -> Result<()>;
}

/// All bytes of a small file, at most `limit` of them.
pub fn read_all(file: &dyn Storage, limit: u64) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut room = file.len()?.saturating_add(1).min(limit) as usize;
    while room > 0 {
        let start = bytes.len();
        bytes.resize(start + room, 0);
        let len = file.read_at(start as u64, &mut bytes[start..])?;
        bytes.truncate(start + len);
        if len < room {
            break;
        }
        // It has grown meanwhile.
        room = (limit - bytes.len() as u64).min(COPY_STEP) as usize;
    }
    Ok(bytes)
}

/// The text of a small file, at most `limit` bytes of it.
pub fn read_text(file: &dyn Storage, limit: u64) -> Result<String> {
    String::from_utf8(read_all(file, limit)?)
        .map_err(|_| Error::new(ErrorKind::Io, "stream did not contain valid UTF-8"))
}

/// Bytes copied at a time if the kernel cannot copy.
const COPY_STEP: u64 = 1 << 20;

/// [`WriteStorage::copy_from`] through a buffer.
fn copy_by_hand<W: WriteStorage + ?Sized>(
    target: &W,
    at: u64,
    source: &dyn Storage,
    from: u64,
    len: u64,
) -> Result<()> {
    let mut buffer = vec![0; len.min(COPY_STEP) as usize];
    let mut done = 0;
    while done < len {
        let piece = &mut buffer[..(len - done).min(COPY_STEP) as usize];
        if source.read_at(from + done, piece)? < piece.len() {
            let fact = format!("a file ends before {:#x}, within the range to copy", from + len);
            return Err(Error::new(ErrorKind::Io, fact));
        }
        target.write_at(at + done, piece)?;
        done += piece.len() as u64;
    }
    Ok(())
}

impl Storage for Vec<u8> {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let Some(rest) = usize::try_from(at).ok().and_then(|at| self.get(at..)) else { return Ok(0) };
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(len)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.as_slice().len() as u64)
    }
}
