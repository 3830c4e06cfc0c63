//! A handle of an active disk: reads and writes through the disk's current state, a view or a writer.
//! Dropping the last writable handle ends the writing.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::chain::View;
use crate::error::{Error, ErrorKind, Result};
use crate::image::write::Zeroing;
use crate::units::{BlockStatus, human_size};

use super::super::Store;
use super::{Access, ActiveDisk, DiskState, PanicWatch, WritingDisk};

/// A handle of an active disk.
pub struct ActiveHandle {
    pub(super) store: Arc<Store>,
    pub(super) disk: Arc<ActiveDisk>,
    access: Access,
}

impl std::fmt::Debug for ActiveHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActiveHandle")
            .field("name", &self.disk.name())
            .field("access", &self.access)
            .finish_non_exhaustive()
    }
}

impl ActiveHandle {
    /// A handle that has been counted among the disk's openings.
    pub(super) fn new(store: &Arc<Store>, disk: Arc<ActiveDisk>, access: Access) -> Self {
        Self { store: Arc::clone(store), disk, access }
    }

    /// Size of the disk.
    pub fn size(&self) -> Result<u64> {
        self.with(|source| {
            Ok(match source {
                ActiveSource::View(view) => view.size(),
                ActiveSource::Writer(writing) => writing.writer.size(),
            })
        })
    }

    /// Whether the disk is read by force while another process writes it.
    pub fn is_forced(&self) -> bool {
        matches!(&*self.disk.state.read(), DiskState::Reading(open) if open.forced.is_some())
    }

    /// Whether it was opened for writing.
    pub fn writes(&self) -> bool {
        self.access.writes()
    }

    /// Reads the bytes from `at` up to the end of the disk, and returns their number.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.with(|source| match source {
            ActiveSource::View(view) => within(view.size(), at, buf, |at, buf| view.read_at(at, buf)),
            ActiveSource::Writer(WritingDisk { writer, .. }) => {
                within(writer.size(), at, buf, |at, buf| writer.read_at(at, buf))
            }
        })
    }

    /// Writes at `at` up to the end of the disk, and returns the number of bytes; `NoSpace` if none.
    pub fn write_at(&self, at: u64, bytes: &[u8]) -> Result<usize> {
        self.writing(|writing| {
            let size = writing.writer.size();
            let len = size.saturating_sub(at).min(bytes.len() as u64) as usize;
            if len == 0 && !bytes.is_empty() {
                let fact = format!("{} ends at {size:#x}; grow it with truncate", self.disk.name());
                return Err(Error::new(ErrorKind::NoSpace, fact));
            }
            self.disk.before_images.before_change(writing, at, len as u64);
            writing.write_at(at, &bytes[..len])?;
            Ok(len)
        })
    }

    /// Makes a range read as zeroes, as far as it lies within the disk.
    pub fn zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        self.writing(|writing| match writing.writer.size().saturating_sub(at).min(len) {
            0 => Ok(()),
            len => {
                self.disk.before_images.before_change(writing, at, len);
                writing.zero(at, len, zeroing)
            }
        })
    }

    /// Allocates space for a range, as far as it lies within the disk.
    pub fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.writing(|WritingDisk { writer, .. }| match writer.size().saturating_sub(at).min(len) {
            0 => Ok(()),
            len => writer.allocate(at, len),
        })
    }

    /// `NoSpace` if there is certainly no room for the new data of a disk of `size` bytes. Otherwise the disk
    /// would grow, which cannot be undone, and fill the file system before that was found.
    pub fn check_room(&self, size: u64) -> Result<()> {
        let state = self.disk.state.read();
        let DiskState::Writing(WritingDisk { writer, open, .. }) = &*state else { return Ok(()) };
        let free = open.top.data_file.as_ref().unwrap_or(&open.top.file).free_space()?;
        if size.saturating_sub(writer.size()) > free {
            let fact = format!(
                "{} would need {}, and {} are free",
                self.disk.name(),
                human_size(size),
                human_size(free)
            );
            return Err(Error::new(ErrorKind::NoSpace, fact));
        }
        Ok(())
    }

    /// Sets the size of the disk to `size` bytes, rounded up to sectors; `Forbidden` if that is less than
    /// now.
    pub fn set_size(&self, size: u64) -> Result<()> {
        self.writing(|writing| {
            let now = writing.writer.size();
            if size.checked_next_multiple_of(512) == Some(now) {
                return Ok(());
            }
            if size < now {
                let fact = format!(
                    "{} has {} and would have {}",
                    self.disk.name(),
                    human_size(now),
                    human_size(size)
                );
                return Err(Error::new(ErrorKind::Forbidden, format!("{fact}; shrink a disk with resize")));
            }
            self.disk.before_images.before_change(writing, now, 0);
            writing.grow(size)
        })
    }

    /// Returns when all earlier writes are durable.
    pub fn flush(&self) -> Result<()> {
        self.with(|source| match source {
            ActiveSource::View(_) => Ok(()),
            ActiveSource::Writer(WritingDisk { writer, .. }) => {
                self.disk.poison(writer).map_or(Ok(()), Err)?;
                let _watch = PanicWatch(&self.disk.has_panicked);
                self.store.active.flush_count.fetch_add(1, Ordering::Relaxed);
                writer.flush()
            }
        })
    }

    /// The error for close(2): why nothing is written any more.
    pub fn trouble(&self) -> Result<()> {
        if !self.writes() {
            return Ok(());
        }
        self.writing(|_| Ok(()))
    }

    /// The first byte at or after `at` whose status is `wanted`; `None` if there is none before the end of
    /// the disk. While a client may hold changed pages that are not written yet, everything is data.
    pub fn seek(&self, at: u64, wanted: BlockStatus) -> Result<Option<u64>> {
        let may_be_mapped = self.disk.mappable.load(Ordering::Acquire) > 0;
        self.with(|source| match source {
            ActiveSource::Writer(WritingDisk { writer, .. }) if may_be_mapped => {
                Ok(Some(at).filter(|at| wanted == BlockStatus::Data && *at < writer.size()))
            }
            ActiveSource::Writer(WritingDisk { writer, .. }) if at < writer.size() => writer.seek(at, wanted),
            ActiveSource::View(view) if at < view.size() => view.seek(at, wanted),
            ActiveSource::View(_) | ActiveSource::Writer(_) => Ok(None),
        })
    }

    fn with<T>(&self, work: impl FnOnce(ActiveSource<'_>) -> Result<T>) -> Result<T> {
        match &*self.disk.state.read() {
            DiskState::Reading(open) => work(ActiveSource::View(&open.view)),
            DiskState::Writing(writing) => work(ActiveSource::Writer(writing)),
            DiskState::Failed(error) => Err(error.clone()),
            DiskState::Closed(_) => {
                Err(Error::new(ErrorKind::Stale, format!("{} is closed", self.disk.name())))
            }
        }
    }

    pub(super) fn writing<T>(&self, work: impl FnOnce(&WritingDisk) -> Result<T>) -> Result<T> {
        let refuse = || Error::new(ErrorKind::ReadOnly, format!("{} was opened read-only", self.disk.name()));
        self.with(|source| match source {
            ActiveSource::Writer(writing) if self.writes() => {
                self.disk.poison(&writing.writer).map_or(Ok(()), Err)?;
                let _watch = PanicWatch(&self.disk.has_panicked);
                work(writing)
            }
            ActiveSource::Writer(_) | ActiveSource::View(_) => Err(refuse()),
        })
    }
}

impl Drop for ActiveHandle {
    fn drop(&mut self) {
        self.disk.mappable.fetch_sub(usize::from(self.access == Access::ReadWrite), Ordering::AcqRel);
        let mut openings = self.disk.openings.lock();
        openings.count -= 1;
        if self.access.writes() {
            openings.writers -= 1;
            if openings.writers == 0 {
                self.disk.end_writing(&self.store, openings.count > 0);
            }
        }
        if openings.count == 0 {
            let state = self.disk.state.read();
            self.disk.before_images.end(self.disk.version(&state));
        }
    }
}

/// The current source of an active disk's bytes.
enum ActiveSource<'a> {
    View(&'a View),
    Writer(&'a WritingDisk),
}

/// Reads the part of a range that lies within a disk. In a damaged range the bytes before the damage are
/// good; a read that continues from there gets the error.
fn within(size: u64, at: u64, buf: &mut [u8], read: impl Fn(u64, &mut [u8]) -> Result<()>) -> Result<usize> {
    const STEP: usize = 4096;
    let len = size.saturating_sub(at).min(buf.len() as u64) as usize;
    let buf = &mut buf[..len];
    let Err(error) = read(at, buf) else { return Ok(len) };
    let mut good = 0;
    while good < len {
        let end = (good + STEP).min(len);
        if read(at + good as u64, &mut buf[good..end]).is_err() {
            break;
        }
        good = end;
    }
    if good > 0 { Ok(good) } else { Err(error) }
}
