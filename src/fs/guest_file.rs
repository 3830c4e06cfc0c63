//! An open file of a guest: the daemon reads its bytes from the disk at the offsets that the worker returned.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::browse::{DiskLease, Listing, MappedFile};
use crate::error::Result;
use crate::guest::{Ino, RunKind};
use crate::units::BlockStatus;

use super::mounted_volumes::MountedVolume;

/// Bytes of a file to map with one request to the worker.
const WINDOW: u64 = 1 << 30;
/// Time limit of one seek, which occupies a serving thread.
const SEEK_LIMIT: Duration = Duration::from_millis(200);

/// An open file.
#[derive(Debug)]
pub struct GuestFile {
    file: MappedFile,
    /// Keeps the disk's content unchanged.
    _lease: DiskLease,
}

impl GuestFile {
    pub(super) fn open(slot: &MountedVolume, ino: Ino) -> Result<Self> {
        let lease = slot.inside.lease()?;
        Ok(Self { file: MappedFile::open(&slot.inside, slot.tree, ino, WINDOW)?, _lease: lease })
    }

    pub(super) fn size(&self) -> u64 {
        self.file.size()
    }

    /// Reads up to the end of the file, all or nothing: the page cache would treat a short read as zeroes.
    pub(super) fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let len = self.size().saturating_sub(at).min(buf.len() as u64) as usize;
        self.file.read_at(at, &mut buf[..len])?;
        Ok(len)
    }

    /// Like a disk's seek: after the time limit, the rest counts as data.
    pub(super) fn seek(&self, at: u64, wanted: BlockStatus) -> Result<Option<u64>> {
        let begun = Instant::now();
        let mut at = at;
        while at < self.size() {
            let run = self.file.run(at)?;
            if (run.value != RunKind::Hole) == (wanted == BlockStatus::Data) {
                return Ok(Some(at));
            }
            at += run.len;
            if begun.elapsed() > SEEK_LIMIT {
                return Ok(Some(at).filter(|at| wanted == BlockStatus::Data && *at < self.size()));
            }
        }
        Ok(None)
    }
}

/// An open directory.
#[derive(Debug)]
pub struct GuestDirectory {
    pub(super) slot: Arc<MountedVolume>,
    ino: Ino,
    /// The last listing, and the position at which it starts.
    listed: Mutex<Option<(u64, Arc<Listing>)>>,
    _lease: DiskLease,
}

impl GuestDirectory {
    pub(super) fn open(slot: &Arc<MountedVolume>, ino: Ino) -> Result<Self> {
        let lease = slot.inside.lease()?;
        Ok(Self { slot: Arc::clone(slot), ino, listed: Mutex::new(None), _lease: lease })
    }

    /// Entries from a position on, and how many of them to skip.
    pub(super) fn from(&self, place: u64) -> Result<(Arc<Listing>, usize)> {
        if let Some((start, listed)) = &*self.listed.lock() {
            // The kernel reads a listing in several requests: later ones continue within the last listing.
            let after =
                listed.entries.iter().position(|listed| listed.entry.next == place).map(|index| index + 1);
            let skip = if *start == place { Some(0) } else { after };
            if let Some(skip) = skip.filter(|skip| *skip < listed.entries.len() || listed.ends) {
                return Ok((Arc::clone(listed), skip));
            }
        }
        let listed = Arc::new(self.slot.inside.list(self.slot.tree, self.ino, place)?);
        *self.listed.lock() = Some((place, Arc::clone(&listed)));
        Ok((listed, 0))
    }
}
