//! The writable disk: one image that somebody writes, raw or qcow2.
//!
//! Promises: what [`Writer::flush`] has returned for survives any crash; a crash in between leaves
//! an image in which every sector holds the bytes before or after some later write, at worst
//! with clusters that nothing refers to. All methods may be called from any thread at once.
//! The layers below are asked through [`Below`] and never changed.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::io::WriteStorage;

/// What lies below the image that is written: where it is silent, these bytes show through.
pub trait Below: Send + Sync {
    /// Bytes of that disk. Beyond them it reads as zeroes.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes at `at`, zeroes past the end of the disk.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()>;

    /// Whether the disk is known to read as zeroes at `at` without looking at data, and for how
    /// many of the `len` bytes from there the same answer holds; at least 1. Past its end it does.
    fn zero_run(&self, at: u64, len: u64) -> Result<(bool, u64)>;
}

/// What becomes of the space of a range that is to read as zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Clusters keep their place (fallocate's `ZERO_RANGE`).
    Keep,
    /// Whole clusters are given back (`PUNCH_HOLE`, discard).
    Unmap,
}

/// How a writer behaves.
#[derive(Clone, Copy, Debug)]
pub struct WriterOptions {
    /// Bytes of tables kept in memory. Changed ones count as well: before they fill a half of it, they
    /// are written back.
    pub cache: usize,
}

impl Default for WriterOptions {
    fn default() -> Self {
        Self { cache: 16 << 20 }
    }
}

/// A disk that can be written.
pub struct Writer {
    _file: Arc<dyn WriteStorage>,
}

impl Writer {
    /// The disk of a raw file.
    pub fn raw(name: &str, file: Arc<dyn WriteStorage>) -> Result<Arc<Self>> {
        let _ = name;
        Ok(Arc::new(Self { _file: file }))
    }

    /// The active disk of a qcow2 image. Nothing is written before the first change.
    ///
    /// Refused: `Corrupt` (marked as such, or its refcounts do not cover its own tables),
    /// `Unsupported` (encryption, unknown features). Refcounts of an image that was not closed
    /// properly are rebuilt first.
    pub fn qcow2(
        name: &str,
        file: Arc<dyn WriteStorage>,
        data_file: Option<Arc<dyn WriteStorage>>,
        below: Option<Arc<dyn Below>>,
        options: WriterOptions,
    ) -> Result<Arc<Self>> {
        let _ = (name, data_file, below, options);
        Ok(Arc::new(Self { _file: file }))
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        0
    }

    /// Fills `buf` with the bytes at `at`. The range must lie within the disk.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let _ = (at, buf);
        Err(todo())
    }

    /// Writes `bytes` at `at`, any position and length within the disk. Overlapping writes of
    /// several threads leave one or the other's bytes in each sector.
    pub fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let _ = (at, bytes);
        Err(todo())
    }

    /// Makes a range read as zeroes, whatever lies below.
    pub fn zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        let _ = (at, len, zeroing);
        Err(todo())
    }

    /// Takes space for a range, so that writing there cannot fail for want of it.
    pub fn allocate(&self, at: u64, len: u64) -> Result<()> {
        let _ = (at, len);
        Err(todo())
    }

    /// Makes the disk `size` bytes long, rounded up to sectors. What is new reads as zeroes.
    /// `Forbidden` if it is smaller than now.
    pub fn grow(&self, size: u64) -> Result<()> {
        let _ = size;
        Err(todo())
    }

    /// Returns when everything written before the call is durable. If it fails, the disk is
    /// poisoned: it takes no more writes, and goes on being read.
    pub fn flush(&self) -> Result<()> {
        Err(todo())
    }

    /// Flushes, and gives back what was freed, so that the file is as a checker wants it. The
    /// disk can still be used.
    pub fn close(&self) -> Result<()> {
        Err(todo())
    }

    /// Whether anything has changed since the last flush.
    pub fn is_dirty(&self) -> bool {
        false
    }

    /// Why nothing is written any more, if so.
    pub fn poison(&self) -> Option<Error> {
        None
    }

    /// The first byte at or after `at` that may be other than zero (or, with `data` false, that is
    /// surely zero). `None` if there is none before the end of the disk.
    pub fn seek(&self, at: u64, data: bool) -> Result<Option<u64>> {
        let _ = (at, data);
        Err(todo())
    }
}

fn todo() -> Error {
    Error::new(ErrorKind::Unsupported, "writing")
}
