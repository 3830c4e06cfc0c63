//! An open file of a guest: the daemon reads its bytes from the disk at the offsets that the worker returned.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::browse::{DiskLease, Listing, OpenedFile};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{FileRun, Ino, RunKind};
use crate::units::BlockStatus;

use super::mounted_volumes::MountedVolume;

/// Bytes of a file to map with one request to the worker.
const WINDOW: u64 = 1 << 30;
/// Time limit of one seek, which occupies a serving thread.
const SEEK_LIMIT: Duration = Duration::from_millis(200);

/// An open file.
#[derive(Debug)]
pub struct GuestFile {
    pub(super) slot: Arc<MountedVolume>,
    ino: Ino,
    size: u64,
    known: Mutex<Arc<KnownRuns>>,
    /// Keeps the disk's content unchanged.
    _lease: DiskLease,
}

/// The mapping of a part of a file: runs without gaps.
#[derive(Debug, Default)]
struct KnownRuns {
    start: u64,
    /// The end of each run, and the location of its first byte.
    runs: Vec<(u64, RunKind)>,
}

impl KnownRuns {
    fn new(start: u64, runs: Vec<FileRun>) -> Self {
        let mut end = start;
        let runs = runs.into_iter().map(|run| {
            end += run.len;
            (end, run.kind)
        });
        Self { start, runs: runs.collect() }
    }

    /// The run that contains `at`: start, end, and the location of its first byte.
    fn find(&self, at: u64) -> Option<(u64, u64, RunKind)> {
        let index = self.runs.partition_point(|(end, _)| *end <= at);
        let (end, kind) = *self.runs.get(index)?;
        let start = if index == 0 { self.start } else { self.runs[index - 1].0 };
        (start <= at).then_some((start, end, kind))
    }
}

impl GuestFile {
    pub(super) fn open(slot: &Arc<MountedVolume>, ino: Ino) -> Result<Self> {
        let lease = slot.inside.lease()?;
        let OpenedFile { size, runs } = slot.inside.open_file(slot.volume, ino)?;
        let known = Mutex::new(Arc::new(KnownRuns::new(0, runs)));
        Ok(Self { slot: Arc::clone(slot), ino, size, known, _lease: lease })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// The run at `at`, within the file: its end, and the location of the byte at `at`.
    fn run(&self, at: u64) -> Result<(u64, RunKind)> {
        let mut known = Arc::clone(&self.known.lock());
        if known.find(at).is_none() {
            known = Arc::new(self.request_runs(at)?);
            *self.known.lock() = Arc::clone(&known);
        }
        let unmapped = || Error::new(ErrorKind::Corrupt, "a part of the file has no location");
        let (start, end, kind) = known.find(at).ok_or_else(unmapped)?;
        let kind = match kind {
            RunKind::Stored(place) => RunKind::Stored(place.checked_add(at - start).ok_or_else(unmapped)?),
            other => other,
        };
        Ok((end.min(self.size), kind))
    }

    fn request_runs(&self, at: u64) -> Result<KnownRuns> {
        let runs = self.slot.inside.runs(self.slot.volume, self.ino, at, WINDOW.min(self.size - at))?;
        Ok(KnownRuns::new(at, runs))
    }

    /// Reads up to the end of the file, all or nothing: the page cache would treat a short read as zeroes.
    pub(super) fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let len = self.size.saturating_sub(at).min(buf.len() as u64) as usize;
        let mut done = 0;
        while done < len {
            let here = at + done as u64;
            let (end, kind) = self.run(here)?;
            let piece = ((end - here) as usize).min(len - done);
            self.slot.inside.read_run(
                self.slot.volume,
                self.ino,
                here,
                kind,
                &mut buf[done..done + piece],
            )?;
            done += piece;
        }
        Ok(len)
    }

    /// Like a disk's seek: after the time limit, the rest counts as data.
    pub(super) fn seek(&self, at: u64, wanted: BlockStatus) -> Result<Option<u64>> {
        let begun = Instant::now();
        let mut at = at;
        while at < self.size {
            let (end, kind) = self.run(at)?;
            if (kind != RunKind::Hole) == (wanted == BlockStatus::Data) {
                return Ok(Some(at));
            }
            at = end;
            if begun.elapsed() > SEEK_LIMIT {
                return Ok(Some(at).filter(|at| wanted == BlockStatus::Data && *at < self.size));
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
        let listed = Arc::new(self.slot.inside.list(self.slot.volume, self.ino, place)?);
        *self.listed.lock() = Some((place, Arc::clone(&listed)));
        Ok((listed, 0))
    }
}
