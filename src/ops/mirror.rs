//! The mirror of guest writes while their disk is merged into a layer below: each write goes to both.
//!
//! Promises: in the range that has been copied, both hold the same bytes at every moment between two
//! requests; a failure of the mirror never fails a guest's request, but fails the merge.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::image::write::{Ranges, Writer, Zeroing};
use crate::store::Mirror;

/// The mirror of one job.
pub(super) struct MergeMirror {
    target: Arc<Writer>,
    /// Held while a range of the disk is changed in both places, or copied.
    ranges: Ranges,
    /// The end of the copied range; `u64::MAX` once everything is copied, wherever the disk ends by then.
    copied: AtomicU64,
    /// Why the two are no longer the same.
    failure: Mutex<Option<Error>>,
}

impl MergeMirror {
    pub(super) fn new(target: &Arc<Writer>) -> Arc<Self> {
        Arc::new(Self {
            target: Arc::clone(target),
            ranges: Ranges::default(),
            copied: AtomicU64::new(0),
            failure: Mutex::default(),
        })
    }

    /// Copies a piece of the disk while no write changes it.
    pub(super) fn copy(&self, at: u64, len: u64, copy: impl FnOnce() -> Result<u64>) -> Result<u64> {
        let _held = self.ranges.hold(at, at + len);
        let moved = copy()?;
        self.copied.store(at + len, Ordering::Release);
        Ok(moved)
    }

    /// Extends the target to the size of the disk, `size` bytes, if it is smaller.
    pub(super) fn level(&self, size: impl FnOnce() -> u64) -> Result<()> {
        let _held = self.ranges.hold(0, u64::MAX);
        let size = size();
        if size > self.target.size() { self.target.grow(size) } else { Ok(()) }
    }

    /// Ends the copying if the disk, of `size` bytes, ends at or before `at`: from here on every change goes
    /// to both, also where the disk grows. The target reads as zeroes beyond the disk's end then.
    pub(super) fn complete(&self, at: u64, size: impl FnOnce() -> u64) -> Result<bool> {
        let _held = self.ranges.hold(0, u64::MAX);
        let size = size();
        if size > at {
            return Ok(false);
        }
        zero_from(&self.target, size)?;
        self.copied.store(u64::MAX, Ordering::Release);
        Ok(true)
    }

    /// Why the merge cannot continue, if so.
    pub(super) fn check(&self) -> Result<()> {
        self.failure.lock().clone().map_or(Ok(()), Err)
    }

    /// Applies `change` to the disk and then, in the copied range, `same` to the target.
    fn both(
        &self,
        at: u64,
        len: u64,
        change: impl FnOnce() -> Result<()>,
        same: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let _held = self.ranges.hold(at, at.saturating_add(len));
        let changed = change();
        if let Err(error) = &changed {
            // A part of it may have been done.
            self.fail(error);
            return changed;
        }
        if at < self.copied.load(Ordering::Acquire)
            && self.failure.lock().is_none()
            && let Err(error) = same()
        {
            self.fail(&error);
        }
        Ok(())
    }

    fn fail(&self, error: &Error) {
        self.failure.lock().get_or_insert_with(|| error.clone());
    }
}

/// Makes the target read as zeroes from `size` on.
pub(super) fn zero_from(target: &Writer, size: u64) -> Result<()> {
    match target.size().saturating_sub(size) {
        0 => Ok(()),
        rest => target.zero(size, rest, Zeroing::Unmap),
    }
}

impl Mirror for MergeMirror {
    fn write_at(&self, disk: &Writer, at: u64, bytes: &[u8]) -> Result<()> {
        let len = bytes.len() as u64;
        self.both(at, len, || disk.write_at(at, bytes), || self.target.write_at(at, bytes))
    }

    fn zero(&self, disk: &Writer, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        self.both(at, len, || disk.zero(at, len, zeroing), || self.target.zero(at, len, zeroing))
    }

    fn grow(&self, disk: &Writer, size: u64) -> Result<()> {
        let same = || if self.target.size() < disk.size() { self.target.grow(disk.size()) } else { Ok(()) };
        // The target must read as zeroes beyond the disk's old end, as the disk does.
        let _held = self.ranges.hold(0, u64::MAX);
        let old = disk.size();
        disk.grow(size)?;
        let zeroed = self.target.size().min(disk.size()).saturating_sub(old);
        let done = if zeroed > 0 { self.target.zero(old, zeroed, Zeroing::Unmap) } else { Ok(()) };
        if let Err(error) = done.and_then(|()| same()) {
            self.fail(&error);
        }
        Ok(())
    }
}
