//! A file in memory, for the tests of this layer.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Storage, WriteStorage};

/// A file in memory whose syncs and space can be made to fail.
#[derive(Default)]
pub(super) struct MemoryFile {
    pub(super) bytes: Mutex<Vec<u8>>,
    pub(super) syncs: AtomicU64,
    pub(super) fails: AtomicBool,
    pub(super) punches: bool,
}

impl Storage for MemoryFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.bytes.lock().read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.bytes.lock().len() as u64)
    }
}

impl WriteStorage for MemoryFile {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let (at, end) = (at as usize, at as usize + bytes.len());
        let mut all = self.bytes.lock();
        let len = all.len().max(end);
        all.resize(len, 0);
        all[at..end].copy_from_slice(bytes);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.bytes.lock().resize(len as usize, 0);
        Ok(())
    }

    fn punch_hole(&self, at: u64, len: u64) -> Result<()> {
        if self.punches {
            self.write_zeroes(at, len)
        } else {
            Err(Error::new(ErrorKind::Unsupported, "punching"))
        }
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.write_at(at, &vec![0; len as usize])
    }

    fn reserve(&self, _at: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn allocate(&self, _at: u64, _len: u64) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "reserving"))
    }

    fn sync(&self) -> Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        if self.fails.load(Ordering::Relaxed) {
            Err(Error::new(ErrorKind::Io, "the disk is gone"))
        } else {
            Ok(())
        }
    }
}
