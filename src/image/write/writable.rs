//! What a format implements so that its images can be written.
//!
//! [`Writer`](super::Writer) is what everybody above uses; it has checked every range against the disk's size
//! before a format is asked. Internal snapshots and backing files are for formats that have them. All methods
//! may be called from any thread at once.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::Snapshot;
use crate::image::{HeaderChange, Mapping};
use crate::io::Storage;
use crate::units::{BlockStatus, Run};

use super::fill::Fill;
use super::qcow2::Qcow2Writer;
use super::snapshot::NewSnapshot;
use super::{BackingDisk, Zeroing};

/// An image of some format that is written. Ranges lie within the disk; those of changes are not empty.
pub(super) trait WritableFormat: Send + Sync {
    /// The image's name for messages.
    fn name(&self) -> &str;

    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes at `at`.
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()>;

    /// Writes `bytes` at `at`.
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()>;

    /// Makes `[at, at + len)` hold the bytes of `source` at `from`.
    fn copy_from(&self, at: u64, len: u64, source: &dyn Storage, from: u64) -> Result<()>;

    /// Makes a range read as zeroes.
    fn zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()>;

    /// Takes space for a range.
    fn allocate(&self, at: u64, len: u64) -> Result<()>;

    /// Makes the disk longer; `Forbidden` if it would become shorter.
    fn grow(&self, size: u64) -> Result<()>;

    /// Makes the disk shorter, durably. Nobody else uses it.
    fn shrink(&self, size: u64) -> Result<()>;

    /// Makes everything written before the call durable.
    fn flush(&self) -> Result<()>;

    /// Flushes until the file is as a checker wants it.
    fn close(&self) -> Result<()>;

    /// Where the image itself has what it shows.
    fn map(&self, at: u64, max: u64) -> Result<Run<Mapping>>;

    /// The file that [`Mapping::Data`] speaks of.
    fn data_storage(&self) -> Arc<dyn Storage>;

    /// What is known of the bytes at `at` without reading them: what cannot be known is data.
    fn seek_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>>;

    /// Whether anything has changed since the last flush.
    fn is_dirty(&self) -> bool;

    /// Why nothing is written any more, if so.
    fn poison(&self) -> Option<Error>;

    /// Takes space behind the end of the file, where the format uses any there.
    fn reserve(&self, _bytes: u64) -> Result<()> {
        Ok(())
    }

    /// The image as one that may have a backing file.
    fn as_overlay(&self) -> Option<&dyn WritableOverlay> {
        None
    }

    /// The image as one that may hold internal snapshots.
    fn with_snapshots(&self) -> Option<&dyn WritableSnapshots> {
        None
    }
}

/// An image that may have a backing file, which its header names.
pub(super) trait WritableOverlay {
    /// Puts another source of the same bytes below the image.
    fn set_backing(&self, backing: Option<Arc<dyn BackingDisk>>);

    /// Changes the header, in steps that a crash may cut anywhere.
    fn change_header(&self, change: &HeaderChange) -> Result<()>;

    /// As [`Writer::fill`](super::Writer::fill).
    fn fill(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64>;
}

/// An image that may hold internal snapshots.
pub(super) trait WritableSnapshots {
    /// Those that it holds now.
    fn list(&self) -> Result<Vec<Snapshot>>;

    /// Takes one of the disk as it is.
    fn take(&self, snapshot: &NewSnapshot) -> Result<()>;

    /// Makes the disk what one shows; `save`: what it held becomes another.
    fn apply(&self, snapshot: &Snapshot, save: Option<&NewSnapshot>) -> Result<()>;

    /// Deletes one.
    fn delete(&self, snapshot: &Snapshot) -> Result<()>;
}

impl WritableFormat for Qcow2Writer {
    fn name(&self) -> &str {
        &self.image.name
    }

    fn size(&self) -> u64 {
        self.size()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.read_at(at, buf)
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.write_at(at, bytes)
    }

    fn copy_from(&self, at: u64, len: u64, source: &dyn Storage, from: u64) -> Result<()> {
        self.copy_from(at, len, source, from)
    }

    fn zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        self.zero(at, len, zeroing)
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.allocate(at, len)
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.grow(size)
    }

    fn shrink(&self, size: u64) -> Result<()> {
        self.shrink(size)
    }

    fn flush(&self) -> Result<()> {
        self.flush()
    }

    fn close(&self) -> Result<()> {
        self.close()
    }

    fn map(&self, at: u64, max: u64) -> Result<Run<Mapping>> {
        Ok(self.lookup(at, max)?.map(|entry| entry.mapping))
    }

    fn data_storage(&self) -> Arc<dyn Storage> {
        Arc::clone(self.image.data()) as _
    }

    fn seek_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>> {
        self.seek_run(at, len)
    }

    fn is_dirty(&self) -> bool {
        self.is_dirty()
    }

    fn poison(&self) -> Option<Error> {
        self.check_poison().err()
    }

    fn reserve(&self, bytes: u64) -> Result<()> {
        self.reserve(bytes)
    }

    fn as_overlay(&self) -> Option<&dyn WritableOverlay> {
        Some(self)
    }

    fn with_snapshots(&self) -> Option<&dyn WritableSnapshots> {
        Some(self)
    }
}

impl WritableOverlay for Qcow2Writer {
    fn set_backing(&self, backing: Option<Arc<dyn BackingDisk>>) {
        self.set_backing(backing);
    }

    fn change_header(&self, change: &HeaderChange) -> Result<()> {
        self.change_header(change)
    }

    fn fill(&self, at: u64, len: u64, fill: &dyn Fill) -> Result<u64> {
        self.fill_from_below(at, len, fill)
    }
}

impl WritableSnapshots for Qcow2Writer {
    fn list(&self) -> Result<Vec<Snapshot>> {
        Ok(self.snapshot_table()?.snapshots)
    }

    fn take(&self, snapshot: &NewSnapshot) -> Result<()> {
        self.take_snapshot(snapshot)
    }

    fn apply(&self, snapshot: &Snapshot, save: Option<&NewSnapshot>) -> Result<()> {
        self.apply_snapshot(snapshot, save)
    }

    fn delete(&self, snapshot: &Snapshot) -> Result<()> {
        self.delete_snapshot(snapshot)
    }
}
