//! A bound on open files: a store has more images than a process may have descriptors.
//!
//! Files register when they are opened; beyond the limit the one not used for longest (by the
//! clock algorithm) is closed. It is opened again, and checked, when it is next read. Only files
//! that are open count: a file that nobody needs any more never costs another its descriptor.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::file::StoreFile;

/// Descriptors kept for everything that is not an image: threads, sockets, directories, logs.
const RESERVED: u64 = 128;
/// More would only slow down `fork` and `exec` of nobody, and help nobody.
const MOST: u64 = 65_536;

/// The files that are open now.
#[derive(Debug)]
pub struct Descriptors {
    limit: usize,
    count: AtomicUsize,
    /// In the order of the clock's hand; among them some that have been dropped since.
    open: Mutex<VecDeque<Weak<StoreFile>>>,
}

impl Descriptors {
    /// As many as the process may have, less a reserve. Raises the soft limit to the hard one.
    pub fn for_process() -> Arc<Self> {
        let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
        let wanted = maximum.unwrap_or(MOST).min(MOST);
        if current.is_some_and(|current| current < wanted) {
            // Refused or not, what counts is the limit that holds afterwards.
            let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
        }
        let current = getrlimit(Resource::Nofile).current.unwrap_or(MOST).min(MOST);
        Self::with_limit(current.saturating_sub(RESERVED).max(8) as usize)
    }

    /// At most `limit` open files.
    pub fn with_limit(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, count: AtomicUsize::new(0), open: Mutex::new(VecDeque::new()) })
    }

    /// How many files are open; for metrics.
    pub fn open_count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Notes that a file has been closed. Takes no lock, for the last who lets go of a file may be
    /// the search for one to close.
    pub(super) fn closed(&self) {
        self.count.fetch_sub(1, Ordering::Relaxed);
    }

    /// Notes that `file` has just been opened, and closes another if that makes too many.
    pub(super) fn opened(&self, file: &Weak<StoreFile>) {
        self.count.fetch_add(1, Ordering::Relaxed);
        let mut open = self.open.lock();
        if open.len() > 2 * self.limit {
            open.retain(|file| file.strong_count() > 0);
        }
        open.push_back(Weak::clone(file));
        self.make_room(&mut open, file);
    }

    /// Notes a descriptor that stays open for as long as its owner lives, and closes another if
    /// that makes too many.
    pub(super) fn pinned(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.make_room(&mut self.open.lock(), &Weak::new());
    }

    fn make_room(&self, open: &mut VecDeque<Weak<StoreFile>>, file: &Weak<StoreFile>) {
        // Twice round at most: the first pass may find every file used since the last.
        let mut steps = 2 * open.len();
        while self.open_count() > self.limit && steps > 0 {
            steps -= 1;
            let Some(candidate) = open.pop_front() else { break };
            let Some(other) = candidate.upgrade() else { continue };
            let spared = std::ptr::eq(Arc::as_ptr(&other), file.as_ptr()) || other.used.swap(false, Ordering::Relaxed);
            if spared || !other.close_idle() {
                open.push_back(candidate);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FileStat, Root, Storage};
    use super::*;
    use std::path::Path;

    #[test]
    fn a_hundred_files_are_read_through_ten_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let root = Arc::new(Root::open(directory.path()).unwrap());
        let descriptors = Descriptors::with_limit(10);
        let files: Vec<_> = (0..100)
            .map(|n| {
                let name = format!("{n}");
                std::fs::write(directory.path().join(&name), &name).unwrap();
                let seen = root.stat(Path::new(&name)).unwrap();
                StoreFile::new(&descriptors, &root, Path::new(&name), &seen, true)
            })
            .collect();
        for _ in 0..3 {
            for (n, file) in files.iter().enumerate() {
                let mut buf = [0; 8];
                let len = file.read_at(0, &mut buf).unwrap();
                assert_eq!(&buf[..len], n.to_string().as_bytes());
                assert!(descriptors.open_count() <= 10);
            }
        }
    }

    #[test]
    fn files_that_nobody_needs_any_more_cost_no_other_its_descriptor() {
        let directory = tempfile::tempdir().unwrap();
        let root = Arc::new(Root::open(directory.path()).unwrap());
        let descriptors = Descriptors::with_limit(4);
        std::fs::write(directory.path().join("a"), "a").unwrap();
        let seen = root.stat(Path::new("a")).unwrap();
        let file = || StoreFile::new(&descriptors, &root, Path::new("a"), &seen, true);
        let idle = file();
        idle.read_at(0, &mut [0]).unwrap();
        for _ in 0..50 {
            file().read_at(0, &mut [0]).unwrap();
        }
        assert_eq!(descriptors.open_count(), 1);
        assert!(descriptors.open.lock().len() <= 10);
        assert!(idle.close_idle(), "it was closed, and its locks with it");
    }

    #[test]
    fn a_file_replaced_while_closed_is_stale() {
        let directory = tempfile::tempdir().unwrap();
        let root = Arc::new(Root::open(directory.path()).unwrap());
        let place = directory.path().join("a");
        std::fs::write(&place, "old").unwrap();
        let seen = root.stat(Path::new("a")).unwrap();
        let file = StoreFile::new(&Descriptors::with_limit(1), &root, Path::new("a"), &seen, true);
        file.read_at(0, &mut [0; 3]).unwrap();
        assert!(file.close_idle());
        std::fs::write(directory.path().join("b"), "new").unwrap();
        std::fs::rename(directory.path().join("b"), &place).unwrap();
        assert_eq!(file.read_at(0, &mut [0; 3]).unwrap_err().kind(), crate::error::ErrorKind::Stale);
        let _ = FileStat::of(std::fs::File::open(place).unwrap()).unwrap();
    }
}
