//! Positional storage: where the bytes of an image come from.
//!
//! Everything above speaks to a [`Storage`]; it does not know whether that is a file beneath a
//! store or a vector in a test. This layer knows files, confinement and QEMU's locks, and
//! nothing of qcow2.

mod beneath;
mod descriptors;
mod file;
mod holders;
mod locks;
mod mountinfo;

pub use beneath::{DirEntry, EntryKind, OWN_KIND, Root};
pub use descriptors::Descriptors;
pub use file::{FileId, FileStat, ReadLock, Signature, StoreFile};
pub use holders::{Holder, all_lock_holders, lock_holders, users_of};
pub use locks::{Conflict, WRITER_BYTE, probe_writer};
pub use mountinfo::{MountEntry, mounts};

use crate::error::Result;

#[expect(clippy::len_without_is_empty, reason = "an empty image file is nothing to ask for")]
/// The bytes of one image file (or external data file), by position.
pub trait Storage: Send + Sync {
    /// Reads from `at` into `buf` and returns how many bytes were there. Fewer than `buf.len()`
    /// means that the file ends: never an interrupted read.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize>;

    /// Bytes of the file now.
    fn len(&self) -> Result<u64>;

    /// The first run of `[at, end)` that is all data (`true`) or all hole (`false`), and its
    /// length, at least 1. Where holes cannot be told, everything is data.
    fn extent(&self, at: u64, end: u64) -> Result<(bool, u64)> {
        Ok((true, end - at))
    }
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
