//! The bytes of a guest's file, by the run: the one place that asks where they lie and remembers the answer.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::{FileRun, Ino, RunKind, TreeId};
use crate::units::Run;

use super::{DiskContents, OpenedFile};

/// A regular file of a guest. Threads share it.
#[derive(Debug)]
pub struct MappedFile {
    contents: Arc<DiskContents>,
    tree: TreeId,
    ino: Ino,
    size: u64,
    /// Bytes of the file to map with one request to the worker.
    window: u64,
    known: Mutex<Arc<KnownRuns>>,
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

    /// The rest of the run that contains `at`: where the byte at `at` is.
    fn find(&self, at: u64) -> Option<Run<RunKind>> {
        let index = self.runs.partition_point(|(end, _)| *end <= at);
        let (end, kind) = *self.runs.get(index)?;
        let start = if index == 0 { self.start } else { self.runs[index - 1].0 };
        let into = at.checked_sub(start)?;
        let kind = match kind {
            RunKind::Stored(place) => RunKind::Stored(place.checked_add(into)?),
            RunKind::Verified(place) => RunKind::Verified(place.checked_add(into)?),
            other => other,
        };
        Some(Run::new(kind, end - at))
    }
}

impl MappedFile {
    /// Opens a regular file, and maps its beginning.
    pub fn open(contents: &Arc<DiskContents>, tree: TreeId, ino: Ino, window: u64) -> Result<Self> {
        let OpenedFile { size, runs } = contents.open_file(tree, ino)?;
        let known = Mutex::new(Arc::new(KnownRuns::new(0, runs)));
        Ok(Self { contents: Arc::clone(contents), tree, ino, size, window, known })
    }

    /// The same for a file whose size is known: nothing is asked yet.
    pub fn sized(contents: &Arc<DiskContents>, tree: TreeId, ino: Ino, size: u64, window: u64) -> Self {
        Self { contents: Arc::clone(contents), tree, ino, size, window, known: Mutex::default() }
    }

    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The rest of the run at `at`, which lies within the file: where the byte at `at` is.
    pub fn run(&self, at: u64) -> Result<Run<RunKind>> {
        let mut known = Arc::clone(&self.known.lock());
        if known.find(at).is_none() {
            let len = self.window.min(self.size - at);
            known = Arc::new(KnownRuns::new(at, self.contents.runs(self.tree, self.ino, at, len)?));
            *self.known.lock() = Arc::clone(&known);
        }
        let unmapped = || Error::new(ErrorKind::Corrupt, "a part of the file has no location");
        Ok(known.find(at).ok_or_else(unmapped)?.at_most(self.size - at))
    }

    /// Fills `buf` with the bytes at `at`, all of which lie before the file's end.
    pub fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let here = at + done as u64;
            let run = self.run(here)?;
            let piece = (run.len as usize).min(buf.len() - done);
            let piece = &mut buf[done..done + piece];
            self.contents.read_run(self.tree, self.ino, here, run.value, piece)?;
            done += piece.len();
        }
        Ok(())
    }
}
