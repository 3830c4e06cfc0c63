//! The writable disk: one image that is open for writing, raw or qcow2.
//!
//! Promises: after [`Writer::flush`] returns, the data survives any crash; a crash in between leaves an image
//! in which every sector holds the bytes before or after some later write, at worst with clusters that
//! nothing refers to. All methods may be called from any thread at once. The layers below are read through
//! [`BackingDisk`] and never changed.

mod allocate;
mod cluster_roles;
mod copy;
mod fill;
mod fill_plan;
mod flush;
mod growth;
mod loss;
mod open;
mod qcow2;
mod ranges;
mod raw;
mod reach;
mod reservation;
mod roots;
mod shadow_tables;
mod shrink;
mod slices;
mod snapshot;
mod snapshot_apply;
mod snapshot_delete;
mod tables;
#[cfg(test)]
mod testing;
mod undoable;
mod unfinished;
mod writable;
mod zero;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};
use crate::image::{HeaderChange, Mapping};
use crate::io::{Storage, WriteStorage};
use crate::units::{BlockStatus, Run};

pub use fill::{FilePlace, Fill};
pub(super) use open::refcounts_damaged;
pub use ranges::{Held, Ranges};
pub use snapshot::NewSnapshot;
pub use undoable::UndoableWriter;

pub use open::check_writable;

use qcow2::Qcow2Writer;
use raw::RawWriter;
use writable::WritableFormat;

/// The backing disk of the image that is written: its bytes are visible where the image is unallocated.
pub trait BackingDisk: Send + Sync {
    /// Fills `buf` with the bytes at `at`, zeroes past the end of the disk.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()>;

    /// The status of the bytes at `at` without reading data, and for how many of the `len` bytes from there
    /// the same answer holds. Past its end the disk reads as zeroes.
    fn status_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>>;
}

/// The treatment of the space of a range that becomes zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Zeroing {
    /// Clusters stay allocated (fallocate's `ZERO_RANGE`).
    Keep,
    /// Whole clusters are freed (`PUNCH_HOLE`, discard).
    Unmap,
}

/// Makes the bytes of a file zero; where it has no holes, they are written.
fn zero_bytes(file: &dyn WriteStorage, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
    match zeroing {
        Zeroing::Keep => file.write_zeroes(at, len),
        Zeroing::Unmap => match file.punch_hole(at, len) {
            Err(error) if error.kind() == ErrorKind::Unsupported => file.write_zeroes(at, len),
            done => done,
        },
    }
}

/// Ignores an operation that the file system does not support and that is only an improvement.
fn where_possible(outcome: Result<()>) -> Result<()> {
    match outcome {
        Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
        other => other,
    }
}

/// Releases space that was reserved beyond the end of a file, which ends at `from`.
fn release_behind(file: &dyn WriteStorage, from: u64, end: u64) -> Result<()> {
    if end > from {
        where_possible(file.punch_hole(from, end - from))?;
        // Some file systems only do it when the length is set, even to its present value.
        file.set_len(from)?;
    }
    Ok(())
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

/// Maximum duration of one seek, since other requests wait for its thread.
const SEEK_LIMIT: Duration = Duration::from_millis(200);

/// A disk that can be written.
pub struct Writer {
    format: Arc<dyn WritableFormat>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("size", &self.size()).finish_non_exhaustive()
    }
}

impl Writer {
    /// The disk of a raw file.
    pub fn raw(name: &str, file: Arc<dyn WriteStorage>) -> Result<Arc<Self>> {
        Ok(Arc::new(Self { format: Arc::new(RawWriter::new(name, file)?) }))
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
        backing: Option<Arc<dyn BackingDisk>>,
        options: WriterOptions,
    ) -> Result<Arc<Self>> {
        let writer = Qcow2Writer::open(name, file, data_file, backing, options)?;
        Ok(Arc::new(Self { format: Arc::new(writer) }))
    }

    /// Reserves space beyond the end of the file, so that `bytes` more of it can be used even on a full file
    /// system. The rest of it is released when the disk is closed, published or abandoned. Does nothing where
    /// the file system cannot do that, nor for a raw image, which needs none there.
    pub fn reserve(&self, bytes: u64) -> Result<()> {
        self.format.reserve(bytes)
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.format.size()
    }

    fn assert_inside(&self, at: u64, len: u64) {
        let end = at.checked_add(len).expect("a range of the disk");
        assert!(end <= self.size(), "a range past the end of the disk");
    }

    /// Fills `buf` with the bytes at `at`. The range must lie within the disk.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.assert_inside(at, buf.len() as u64);
        self.format.read_at(at, buf)
    }

    /// Writes `bytes` at `at`, any position and length within the disk. Overlapping writes of
    /// several threads leave one or the other's bytes in each sector.
    pub fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.assert_inside(at, bytes.len() as u64);
        self.format.write_at(at, bytes)
    }

    /// Makes `[at, at + len)` hold the bytes of `source` at `from`, all of which it has to have. Whole
    /// clusters are copied from file to file, so that they may share their bytes where the file system can do
    /// that.
    pub fn copy_from(&self, at: u64, len: u64, source: &dyn Storage, from: u64) -> Result<()> {
        self.assert_inside(at, len);
        if len == 0 {
            return Ok(());
        }
        self.format.copy_from(at, len, source, from)
    }

    /// Makes a range read as zeroes, whatever the backing disk holds.
    pub fn zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        self.assert_inside(at, len);
        if len == 0 {
            return Ok(());
        }
        self.format.zero(at, len, zeroing)
    }

    /// Takes space for a range, so that writing there cannot fail for want of it.
    pub fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.assert_inside(at, len);
        if len == 0 {
            return Ok(());
        }
        self.format.allocate(at, len)
    }

    /// Extends the disk to `size` bytes, rounded up to sectors. New bytes read as zeroes. `Forbidden` if it
    /// is smaller than now.
    pub fn grow(&self, size: u64) -> Result<()> {
        self.format.grow(size)
    }

    /// Returns when everything written before the call is durable. If it fails, the disk is poisoned: it
    /// takes no more writes, and can still be read.
    pub fn flush(&self) -> Result<()> {
        self.format.flush()
    }

    /// Flushes until freed clusters are counted as free, so that the file is clean for a checker. The disk
    /// can still be used.
    pub fn close(&self) -> Result<()> {
        self.format.close()
    }

    /// Changes the header of a qcow2 image: a crash leaves the old header or the new one. The disk's content
    /// is not touched, and need not be flushed. `Unsupported` without such a header, or without room in it;
    /// nothing has been written then. Any other failure poisons the disk as a failed flush does.
    pub fn change_header(&self, change: &HeaderChange) -> Result<()> {
        let Some(overlay) = self.format.as_overlay() else {
            let sentence = format!("{}: a raw image has no header", self.format.name());
            return Err(Error::new(ErrorKind::Unsupported, sentence));
        };
        overlay.change_header(change)
    }

    /// Puts another source below the image, which the caller promises shows the same bytes, while the disk is
    /// read and written.
    ///
    /// # Panics
    /// If something is to lie below a raw image.
    pub fn set_backing(&self, backing: Option<Arc<dyn BackingDisk>>) {
        if let Some(overlay) = self.format.as_overlay() {
            overlay.set_backing(backing);
        } else {
            assert!(backing.is_none(), "nothing shows through a raw image");
        }
    }

    /// The image's own mapping of `at`, and for how many of `max` bytes the same holds. Valid until that
    /// range changes.
    pub fn map(&self, at: u64, max: u64) -> Result<Run<Mapping>> {
        self.format.map(at, max)
    }

    /// The file that [`Mapping::Data`] speaks of.
    pub fn data_storage(&self) -> Arc<dyn Storage> {
        self.format.data_storage()
    }

    /// Whether anything has changed since the last flush.
    pub fn is_dirty(&self) -> bool {
        self.format.is_dirty()
    }

    /// Why nothing is written any more, if so.
    pub fn poison(&self) -> Option<Error> {
        self.format.poison()
    }

    /// The first byte at or after `at` whose status is `wanted`. `None` if there is none before the end of
    /// the disk.
    ///
    /// A search that reaches its time limit reports the rest as data, which is always allowed.
    pub fn seek(&self, at: u64, wanted: BlockStatus) -> Result<Option<u64>> {
        let start = Instant::now();
        let (mut at, size) = (at, self.size());
        while at < size {
            let run = self.format.seek_run(at, size - at)?;
            if run.value == wanted {
                return Ok(Some(at));
            }
            at += run.len;
            if start.elapsed() > SEEK_LIMIT {
                return Ok(Some(at).filter(|at| wanted == BlockStatus::Data && *at < size));
            }
        }
        Ok(None)
    }
}
