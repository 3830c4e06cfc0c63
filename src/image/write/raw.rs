//! The writer of a raw file: the disk is the file, rounded up to whole sectors.
//!
//! There are no tables, so durability is the file's own: a flush is a sync. After a failed sync there is no
//! further one, since the kernel may have dropped pages that it could not write.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::image::Mapping;
use crate::io::{Storage, WriteStorage};
use crate::units::{BlockStatus, HostOffset, Run, round_up_to_sector};

use super::shrink::smaller;
use super::writable::WritableFormat;
use super::{Zeroing, zero_bytes};

/// A raw file that is written.
pub(super) struct RawWriter {
    name: String,
    file: Arc<dyn WriteStorage>,
    /// Bytes of the disk.
    size: AtomicU64,
    /// Whether the file holds all sectors of the disk completely. Set under `growing`.
    whole: AtomicBool,
    /// Held while the file's length changes.
    growing: Mutex<()>,
    /// Set when a change has been made, before its caller returns.
    dirty: AtomicBool,
    /// There has been a sync since the file was opened.
    has_synced: AtomicBool,
    /// Held during a sync: a second caller must not return before the first sync is done.
    syncing: Mutex<()>,
    /// Why nothing is written any more.
    poison: OnceLock<Error>,
}

impl RawWriter {
    pub(super) fn new(name: &str, file: Arc<dyn WriteStorage>) -> Result<Self> {
        let len = file.len()?;
        let size = round_up_to_sector(len);
        Ok(Self {
            name: name.to_string(),
            file,
            size: AtomicU64::new(size),
            whole: AtomicBool::new(len == size),
            growing: Mutex::default(),
            dirty: AtomicBool::new(false),
            has_synced: AtomicBool::new(false),
            syncing: Mutex::default(),
            poison: OnceLock::new(),
        })
    }

    /// Makes a change that ends at `end`. First it completes the last sector of the file, if the change
    /// reaches there, so that the disk keeps its size.
    fn change(&self, end: u64, change: impl FnOnce() -> Result<()>) -> Result<()> {
        self.healthy()?;
        if !self.whole.load(Ordering::Acquire) && end > self.size() - 512 {
            let _growing = self.growing.lock();
            if !self.whole.load(Ordering::Acquire) {
                self.file.set_len(self.size())?;
                self.whole.store(true, Ordering::Release);
            }
        }
        let done = change();
        // Also after a failure: a part may have been written.
        self.dirty.store(true, Ordering::Release);
        done
    }

    fn check(&self, at: u64, len: u64) -> u64 {
        let end = at.checked_add(len).expect("a range of the disk");
        assert!(end <= self.size(), "a range past the end of the disk");
        end
    }

    fn healthy(&self) -> Result<()> {
        self.poison().map_or(Ok(()), Err)
    }
}

impl WritableFormat for RawWriter {
    fn data_storage(&self) -> Arc<dyn Storage> {
        Arc::clone(&self.file) as _
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.check(at, buf.len() as u64);
        let len = self.file.read_at(at, buf)?;
        // Only the padding of the last sector may be missing; any other missing byte was truncated.
        if len < buf.len() && self.file.len()? <= self.size() - 512 {
            let fact = format!("{}: the file ends at {:#x}; it was cut short", self.name, at + len as u64);
            return Err(Error::new(ErrorKind::Io, fact));
        }
        buf[len..].fill(0);
        Ok(())
    }

    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        let end = self.check(at, bytes.len() as u64);
        self.change(end, || self.file.write_at(at, bytes))
    }

    fn copy_from(&self, at: u64, len: u64, source: &dyn Storage, from: u64) -> Result<()> {
        let end = self.check(at, len);
        self.change(end, || self.file.copy_from(at, source, from, len))
    }

    fn zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        let end = self.check(at, len);
        self.change(end, || zero_bytes(&*self.file, at, len, zeroing))
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        let end = self.check(at, len);
        self.change(end, || self.file.allocate(at, len))
    }

    fn grow(&self, size: u64) -> Result<()> {
        self.healthy()?;
        let size =
            size.checked_next_multiple_of(512).filter(|size| i64::try_from(*size).is_ok()).ok_or_else(
                || Error::new(ErrorKind::TooLarge, format!("{}: no file can have {size} bytes", self.name)),
            )?;
        let _growing = self.growing.lock();
        let now = self.size();
        if size < now {
            let fact = format!("{} has {now} bytes and would have {size}; shrink it with resize", self.name);
            return Err(Error::new(ErrorKind::Forbidden, fact));
        }
        self.file.set_len(size)?;
        self.whole.store(true, Ordering::Release);
        self.size.store(size, Ordering::Release);
        self.dirty.store(true, Ordering::Release);
        Ok(())
    }

    /// Makes the file shorter, durably. One that ends within a sector stays as it is if its own size is
    /// requested.
    fn shrink(&self, size: u64) -> Result<()> {
        self.healthy()?;
        let size = smaller(&self.name, size, self.size())?;
        let _growing = self.growing.lock();
        if size < self.size() {
            self.flush()?;
            self.file.set_len(size)?;
            self.whole.store(true, Ordering::Release);
            self.size.store(size, Ordering::Release);
            self.dirty.store(true, Ordering::Release);
        }
        self.flush()
    }

    fn flush(&self) -> Result<()> {
        let _syncing = self.syncing.lock();
        self.healthy()?;
        // Cleared first: a later change is for the next flush. The very first flush also makes durable what
        // an earlier writer has left unsynced: a program that has read it may rely on it.
        if !self.dirty.swap(false, Ordering::AcqRel) && self.has_synced.swap(true, Ordering::AcqRel) {
            return Ok(());
        }
        self.has_synced.store(true, Ordering::Release);
        self.file.sync().inspect_err(|error| {
            self.dirty.store(true, Ordering::Release);
            let fact = format!("{} takes no more writes until it is mounted again: {error}", self.name);
            self.poison.get_or_init(|| Error::new(ErrorKind::Poisoned, fact));
        })
    }

    fn close(&self) -> Result<()> {
        self.flush()
    }

    fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    fn poison(&self) -> Option<Error> {
        self.poison.get().cloned()
    }

    fn map(&self, at: u64, max: u64) -> Result<Run<Mapping>> {
        Ok(Run::new(Mapping::Data(HostOffset(at)), max))
    }

    fn seek_run(&self, at: u64, len: u64) -> Result<Run<BlockStatus>> {
        self.file.extent(at, at + len)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::MemoryFile;
    use super::*;

    fn writer(bytes: &[u8]) -> (Arc<MemoryFile>, RawWriter) {
        let memory = Arc::new(MemoryFile { bytes: Mutex::new(bytes.to_vec()), ..MemoryFile::default() });
        let writer = RawWriter::new("a.raw", Arc::clone(&memory) as _).unwrap();
        (memory, writer)
    }

    #[test]
    fn a_partial_last_sector_is_padded_on_read_and_completed_on_write() {
        let (memory, writer) = writer(&[7; 700]);
        assert_eq!(writer.size(), 1024);
        let mut buf = [1; 1024];
        writer.read_at(0, &mut buf).unwrap();
        assert_eq!((buf[699], buf[700], buf[1023]), (7, 0, 0));
        writer.write_at(0, &[1; 512]).unwrap();
        assert_eq!(memory.len().unwrap(), 700, "the last sector was not touched");
        writer.write_at(600, &[2; 4]).unwrap();
        assert_eq!((memory.len().unwrap(), writer.size()), (1024, 1024));
    }

    #[test]
    fn a_truncated_range_is_an_error_and_not_zeroes() {
        let (memory, writer) = writer(&[7; 4096]);
        memory.set_len(1024).unwrap();
        assert_eq!(writer.read_at(0, &mut [0; 4096]).unwrap_err().kind(), ErrorKind::Io);
        assert_eq!(writer.read_at(512, &mut [0; 1024]).unwrap_err().kind(), ErrorKind::Io);
        writer.read_at(0, &mut [0; 1024]).unwrap();
    }

    #[test]
    fn zeroing_writes_zeroes_where_holes_are_not_supported() {
        let (memory, writer) = writer(&[7; 4096]);
        writer.zero(512, 512, Zeroing::Unmap).unwrap();
        writer.zero(2048, 512, Zeroing::Keep).unwrap();
        let bytes = memory.bytes.lock().clone();
        assert!(bytes[512..1024].iter().chain(&bytes[2048..2560]).all(|byte| *byte == 0));
        let kept = [&bytes[..512], &bytes[1024..2048], &bytes[2560..]].concat();
        assert_eq!(kept, [7; 3072]);
    }

    #[test]
    fn a_disk_grows_by_whole_sectors_and_never_shrinks() {
        let (memory, writer) = writer(&[7; 700]);
        writer.grow(1025).unwrap();
        assert_eq!((writer.size(), memory.len().unwrap()), (1536, 1536));
        assert_eq!(writer.grow(1024).unwrap_err().kind(), ErrorKind::Forbidden);
        assert_eq!(writer.grow(u64::MAX).unwrap_err().kind(), ErrorKind::TooLarge);
    }

    #[test]
    fn only_changes_are_synced_and_a_failed_sync_is_final() {
        let (memory, writer) = writer(&[7; 4096]);
        writer.flush().unwrap();
        assert_eq!(memory.syncs.load(Ordering::Relaxed), 1, "what another may have left behind");
        writer.flush().unwrap();
        assert_eq!(memory.syncs.load(Ordering::Relaxed), 1);
        writer.write_at(0, b"x").unwrap();
        assert!(writer.is_dirty());
        writer.flush().unwrap();
        assert!(!writer.is_dirty());
        memory.fails.store(true, Ordering::Relaxed);
        writer.write_at(0, b"y").unwrap();
        assert_eq!(writer.flush().unwrap_err().kind(), ErrorKind::Io);
        memory.fails.store(false, Ordering::Relaxed);
        for refused in [writer.flush(), writer.write_at(0, b"z"), writer.grow(8192), writer.close()] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Poisoned);
        }
        assert_eq!(memory.syncs.load(Ordering::Relaxed), 3);
        let mut buf = [0];
        writer.read_at(0, &mut buf).unwrap();
        assert_eq!(&buf, b"y", "it goes on being read");
    }
}
