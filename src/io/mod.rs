//! Positional storage: where the bytes of an image come from.
//!
//! Everything above speaks to a [`Storage`]; it does not know whether that is a file beneath a
//! store or a vector in a test. This layer knows files, confinement and QEMU's locks, and
//! nothing of qcow2.

mod beneath;
mod descriptors;
mod directory;
mod file;
mod file_lock;
mod groups;
mod lock_holders;
mod locks;
mod mount_users;
mod mountinfo;
mod permissions;
mod writable_file;

pub use beneath::{DirEntry, EntryKind, OWN_KIND, Root};
pub use descriptors::{DescriptorReservation, Descriptors, Pin, Reclaimable};
pub use directory::{Directory, Host, ThisHost, directory_of};
pub use file::{
    FileId, FileStat, FileVersion, Identity, ReadLock, StoreFile, WriteLock, WriterKind, birth_of, read_full,
};
pub use file_lock::FileLock;
pub use groups::groups_of_process;
pub use lock_holders::{LockHolder, all_lock_holders, lock_holders};
pub use locks::{Conflict, WRITER_BYTE, probe_writer};
pub use mount_users::{namespaces_with, other_users_of, users_of};
pub use mountinfo::{MountEntry, mounts};
pub use permissions::{AccessEntry, Permissions, Who};
pub use writable_file::WritableFile;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockStatus, Run};

#[expect(clippy::len_without_is_empty, reason = "an empty image file is nothing to ask for")]
/// The bytes of one image file (or external data file), by position.
pub trait Storage: Send + Sync {
    /// Reads from `at` into `buf` and returns how many bytes were there. Fewer than `buf.len()`
    /// means that the file ends: never an interrupted read.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize>;

    /// Bytes of the file now.
    fn len(&self) -> Result<u64>;

    /// The first run of `[at, end)` that is all data or all hole. Where holes cannot be told, everything is data.
    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        Ok(Run::new(BlockStatus::Data, end - at))
    }

    /// As [`Storage::read_at`], of tables that this process may be writing (with
    /// [`WriteStorage::write_table_at`]): what is read is never a mixture of before and after.
    fn read_table_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.read_at(at, buf)
    }

    /// The open file behind it, for copies that the kernel can make by itself; `None` where there is none.
    fn open_file(&self) -> Option<Arc<OwnedFd>> {
        None
    }
}

/// A file that may be changed. Between two calls of [`WriteStorage::sync`] a crash of the machine
/// may lose or keep any part of what was done, in any combination; a crash of the process loses
/// nothing of what has returned.
pub trait WriteStorage: Storage {
    /// Writes all of `bytes` at `at`; the file grows if it must. After an error any part of them
    /// may have been written.
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()>;

    /// Makes the file `len` bytes long. What is new of it reads as zeroes.
    fn set_len(&self, len: u64) -> Result<()>;

    /// Gives back the space of a range, which reads as zeroes from then on; the file's length
    /// stays. `Unsupported` where the file system cannot.
    fn punch_hole(&self, at: u64, len: u64) -> Result<()>;

    /// Makes a range read as zeroes and keeps (or takes) its space; the file grows if it must.
    fn write_zeroes(&self, at: u64, len: u64) -> Result<()>;

    /// Takes space for a range, whose bytes stay as they are, so that writing there cannot fail
    /// for want of it; the file grows if it must. `Unsupported` where the file system cannot.
    fn allocate(&self, at: u64, len: u64) -> Result<()>;

    /// Takes space for a range as [`WriteStorage::allocate`] does, but leaves the file as long as it is.
    /// What lies past its end is given back by [`WriteStorage::punch_hole`].
    fn reserve(&self, at: u64, len: u64) -> Result<()>;

    /// As [`WriteStorage::write_at`], of tables that others of this process may be reading (with
    /// [`Storage::read_table_at`]).
    fn write_table_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.write_at(at, bytes)
    }

    /// Copies `len` bytes of `source` from `from` on to `at`; the file grows if it must. The source has to
    /// have them all. Where the file system can, both files share the bytes afterwards.
    fn copy_from(&self, at: u64, source: &dyn Storage, from: u64, len: u64) -> Result<()> {
        copy_by_hand(self, at, source, from, len)
    }

    /// Returns when all that was written is durable, the file's length included.
    fn sync(&self) -> Result<()>;
}

/// Bytes that are copied at once where the kernel cannot do it.
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
            let fact = format!("a file ends before {:#x}, in the middle of what was to be copied", from + len);
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
