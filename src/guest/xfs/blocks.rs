//! The bytes of metadata: from the disk, or from the log where it has newer ones.
//!
//! Metadata are read in their own units and kept in a bounded cache; file content bypasses both. The overlay
//! holds what the log's replay has written, sector by sector, up to a limit.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::corrupt;
use crate::guest::source::Source;

/// Bytes of metadata cached per file system.
const CACHE_LEN: usize = 4 << 20;
/// Bytes that a replay may write. A log is 2 GiB at most, and writes most blocks many times.
const OVERLAY_LIMIT: usize = 256 << 20;
/// The unit of the overlay.
pub(super) const SECTOR_LEN: usize = 512;

/// Sectors that are newer in the log.
#[derive(Debug, Default)]
pub(super) struct LogOverlay(BTreeMap<u64, Box<[u8; SECTOR_LEN]>>);

impl LogOverlay {
    /// Replaces the bytes from `at` on. `before` is read where a sector is replaced in part.
    pub(super) fn write(&mut self, before: &dyn Source, at: u64, bytes: &[u8]) -> Result<()> {
        let mut done = 0;
        while done < bytes.len() {
            let here = at + done as u64;
            let (sector, skip) = (here / SECTOR_LEN as u64, (here % SECTOR_LEN as u64) as usize);
            let len = (SECTOR_LEN - skip).min(bytes.len() - done);
            if !self.0.contains_key(&sector) {
                if self.0.len() * SECTOR_LEN >= OVERLAY_LIMIT {
                    let fact = format!("its changes take more than {} MiB of memory", OVERLAY_LIMIT >> 20);
                    return Err(Error::new(ErrorKind::Limit, fact));
                }
                let mut old = Box::new([0; SECTOR_LEN]);
                before.read_at(sector * SECTOR_LEN as u64, &mut old[..])?;
                self.0.insert(sector, old);
            }
            if let Some(found) = self.0.get_mut(&sector) {
                found[skip..skip + len].copy_from_slice(&bytes[done..done + len]);
            }
            done += len;
        }
        Ok(())
    }

    /// Replaces, in bytes that were read from `at` on, what is newer in the log. Returns whether anything
    /// was.
    pub(super) fn apply(&self, at: u64, buf: &mut [u8]) -> bool {
        let unit = SECTOR_LEN as u64;
        let end = at + buf.len() as u64;
        let mut is_changed = false;
        for (sector, bytes) in self.0.range(at / unit..end.div_ceil(unit)) {
            let from = (sector * unit).max(at);
            let to = ((sector + 1) * unit).min(end);
            let skip = (from - sector * unit) as usize;
            let len = (to - from) as usize;
            buf[(from - at) as usize..][..len].copy_from_slice(&bytes[skip..skip + len]);
            is_changed = true;
        }
        is_changed
    }
}

/// Metadata that were read and checked.
#[derive(Debug)]
pub(super) struct Buffer {
    pub(super) bytes: Box<[u8]>,
    /// Whether the log has changed it: then its checksum is not the one of these bytes.
    pub(super) is_replayed: bool,
}

pub(super) struct Blocks {
    source: Arc<dyn Source>,
    overlay: LogOverlay,
    cache: Cache<(u64, usize), Arc<Buffer>>,
}

impl Blocks {
    pub(super) fn new(source: Arc<dyn Source>, overlay: LogOverlay) -> Self {
        Self { source, overlay, cache: Cache::new(CACHE_LEN) }
    }

    pub(super) fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// Reads metadata that may be anywhere, unchecked.
    pub(super) fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<bool> {
        self.source.read_at(at, buf)?;
        Ok(self.overlay.apply(at, buf))
    }

    /// `len` bytes of metadata that consist of these pieces (byte offset, length) of the disk. They are kept
    /// only if `check` accepts them.
    pub(super) fn metadata(
        &self,
        pieces: &[(u64, usize)],
        check: impl FnOnce(&Buffer) -> Result<()>,
    ) -> Result<Arc<Buffer>> {
        let len = pieces.iter().map(|(_, len)| len).sum();
        let first = pieces.first().ok_or_else(|| corrupt("metadata without a place are referenced"))?.0;
        if let Some(found) = self.cache.get(&(first, len)) {
            return Ok(found);
        }
        let mut bytes = vec![0; len].into_boxed_slice();
        let (mut done, mut is_replayed) = (0, false);
        for (at, len) in pieces {
            is_replayed |= self.read_at(*at, &mut bytes[done..done + len])?;
            done += len;
        }
        let buffer = Buffer { bytes, is_replayed };
        check(&buffer)?;
        let buffer = Arc::new(buffer);
        self.cache.put((first, len), Arc::clone(&buffer), len + 64);
        Ok(buffer)
    }
}
