//! A partition as a disk: a range of an open disk.
//!
//! Only the range is accessible, and its size is fixed.

use crate::error::{Error, ErrorKind, Result};
use crate::image::write::Zeroing;
use crate::store::ActiveHandle;
use crate::units::BlockStatus;

use super::handles::Handle;

/// A range of an open disk.
#[derive(Clone, Debug)]
pub struct PartitionRange {
    /// The disk: a snapshot or an active one.
    pub(super) disk: Box<Handle>,
    /// Start in bytes.
    pub(super) start: u64,
    /// Length in bytes.
    pub(super) len: u64,
}

impl PartitionRange {
    /// Clips a range to the partition; returns the disk offset and the length.
    pub(super) fn clip(&self, at: u64, len: u64) -> (u64, u64) {
        let at = at.min(self.len);
        (self.start + at, len.min(self.len - at))
    }

    /// The active disk of the partition.
    fn active(&self) -> Result<&ActiveHandle> {
        match &*self.disk {
            Handle::Active(disk) => Ok(disk),
            _ => Err(super::change::read_only()),
        }
    }

    pub(super) fn write_at(&self, at: u64, bytes: &[u8]) -> Result<usize> {
        let (place, len) = self.clip(at, bytes.len() as u64);
        if len == 0 && !bytes.is_empty() {
            let fact =
                format!("the partition ends at {:#x}; change the partition table through the disk", self.len);
            return Err(Error::new(ErrorKind::NoSpace, fact));
        }
        self.active()?.write_at(place, &bytes[..len as usize])
    }

    pub(super) fn zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        let (place, len) = self.clip(at, len);
        if len == 0 { Ok(()) } else { self.active()?.zero(place, len, zeroing) }
    }

    pub(super) fn allocate(&self, at: u64, len: u64) -> Result<()> {
        let (place, len) = self.clip(at, len);
        if len == 0 { Ok(()) } else { self.active()?.allocate(place, len) }
    }

    /// `Forbidden`, unless `size` is the present size.
    pub(super) fn set_size(&self, size: u64) -> Result<()> {
        if size == self.len {
            return Ok(());
        }
        let fact = format!("a partition of {} bytes keeps its size; change the partition table", self.len);
        Err(Error::new(ErrorKind::Forbidden, fact))
    }

    /// Converts a result of [`MountTree::seek`](super::MountTree::seek) on the disk to an offset in the
    /// partition.
    pub(super) fn found(&self, found: Option<u64>, wanted: BlockStatus) -> Option<u64> {
        match found.map(|found| found - self.start) {
            Some(found) if found < self.len => Some(found),
            // Every file ends with a hole.
            _ => (wanted == BlockStatus::Zero).then_some(self.len),
        }
    }
}
