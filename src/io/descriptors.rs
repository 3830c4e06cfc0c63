//! A limit for open descriptors: a store may have more images than a process may have descriptors.
//!
//! Long-lived opens reserve descriptors first: images, files that are written, and the sockets of the workers
//! that read guests' file systems. If none is left, the least recently used entry (by the clock algorithm)
//! that can be reopened is closed: first idle files and idle workers, then files that only carry a reader's
//! locks. If no entry can be closed, the request is refused. A reserve is kept for short-lived opens:
//! directories that are listed, files that are probed.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Error, ErrorKind, Result};

/// More descriptors would not help.
const MAX_LIMIT: usize = 65_536;
/// With fewer descriptors, requests cannot be served.
const MIN_LIMIT: usize = 12;
/// Estimate of the descriptors that stay open for the life of the process, until they are counted.
const ESTIMATED_OTHERS: usize = 16;
/// How long a request waits for entries that are in use, and how often it tries.
const MAX_WAIT: Duration = Duration::from_secs(5);
const RETRY_INTERVAL: Duration = Duration::from_millis(2);
/// Attempts at a short-lived open while the process has no descriptor left.
const MAX_ATTEMPTS: usize = 64;

/// Which descriptors are closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reclaim {
    /// Those that carry no locks.
    Unlocked,
    /// Those that carry readers' locks, too: they are taken again.
    EvenLocked,
}

/// An entry that uses descriptors and can be reopened.
pub trait Reclaimable: Send + Sync {
    /// Whether it was used since the last call.
    fn was_used(&self) -> bool;
    /// Closes its descriptors, unless they are in use or not among those to be closed. Never blocks.
    fn reclaim(&self, which: Reclaim) -> bool;
}

/// All long-lived open descriptors.
pub struct Descriptors {
    limit: AtomicUsize,
    count: AtomicUsize,
    /// The number of those that cannot be closed.
    pinned: AtomicUsize,
    /// In the order of the clock's hand; some may have been dropped since.
    idle: Mutex<VecDeque<Weak<dyn Reclaimable>>>,
    /// Held during a search for entries to close: one search at a time. While it is held, other locks are
    /// only tried.
    search: Mutex<()>,
}

impl std::fmt::Debug for Descriptors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Descriptors")
            .field("limit", &self.limit)
            .field("count", &self.count)
            .finish_non_exhaustive()
    }
}

/// A reservation of descriptors, until dropped.
#[derive(Debug)]
pub struct DescriptorReservation {
    of: Arc<Descriptors>,
    count: usize,
}

impl Drop for DescriptorReservation {
    fn drop(&mut self) {
        self.of.count.fetch_sub(self.count, Ordering::AcqRel);
    }
}

/// Marks some reserved descriptors as not closable, until dropped.
#[derive(Debug)]
pub struct Pin {
    of: Arc<Descriptors>,
    count: usize,
}

impl Drop for Pin {
    fn drop(&mut self) {
        self.of.pinned.fetch_sub(self.count, Ordering::AcqRel);
    }
}

impl Descriptors {
    /// The limit of this process, less other open descriptors and a reserve. Raises the soft limit to the
    /// hard one.
    pub fn for_process() -> Arc<Self> {
        static PROCESS: LazyLock<Arc<Descriptors>> = LazyLock::new(|| {
            let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
            let wanted = maximum.unwrap_or(MAX_LIMIT as u64).min(MAX_LIMIT as u64);
            if current.is_some_and(|current| current < wanted) {
                // The result is ignored: the limit is read again below.
                let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
            }
            Descriptors::with_limit(usable(process_limit(), others(0) + ESTIMATED_OTHERS).max(MIN_LIMIT))
        });
        Arc::clone(&PROCESS)
    }

    /// At most `limit` descriptors.
    pub fn with_limit(limit: usize) -> Arc<Self> {
        Arc::new(Self {
            limit: AtomicUsize::new(limit),
            count: AtomicUsize::new(0),
            pinned: AtomicUsize::new(0),
            idle: Mutex::default(),
            search: Mutex::default(),
        })
    }

    /// Counts the other open descriptors. Called when all permanent ones but `more` are open. `Exhausted` if
    /// too few are left.
    pub fn count_others(&self, more: usize) -> Result<()> {
        let (most, others) = (process_limit(), others(self.open_count()) + more);
        let limit = usable(most, others);
        if limit < MIN_LIMIT {
            let least = (others + short_lived(0) + MIN_LIMIT).next_multiple_of(16);
            let fact = format!("the limit of open files is {most}, which is too low: {least} are needed");
            return Err(Error::new(ErrorKind::Exhausted, format!("{fact}; {REMEDY}")));
        }
        self.limit.store(limit, Ordering::Release);
        Ok(())
    }

    /// The limit of open descriptors.
    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Acquire)
    }

    /// The number of open descriptors; for metrics.
    pub fn open_count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// Whether `count` more may be opened for something that is not needed: half of all stay free then.
    pub fn have_plenty(&self, count: usize) -> bool {
        self.open_count() + count <= self.limit() / 2
    }

    /// The reserve for short-lived opens.
    pub fn short_lived(&self) -> usize {
        short_lived(self.limit())
    }

    /// Reserves `count` descriptors. Waits briefly for entries in use; then fails with `Exhausted`.
    pub fn reserve(self: &Arc<Self>, count: usize) -> Result<DescriptorReservation> {
        let begun = Instant::now();
        loop {
            if let Some(reservation) = self.try_reserve(count) {
                return Ok(reservation);
            }
            if begun.elapsed() > MAX_WAIT {
                let fact = format!("{} files are open, which is the limit", self.open_count());
                return Err(Error::new(
                    ErrorKind::Exhausted,
                    format!("{fact}; close some of them, or {REMEDY}"),
                ));
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
    }

    /// Reserves `count` descriptors, and closes idle entries if necessary; `None` if that is not enough.
    pub fn try_reserve(self: &Arc<Self>, count: usize) -> Option<DescriptorReservation> {
        let take = || {
            // B2: taken before anything is opened.
            let more = |now: usize| (now + count <= self.limit()).then_some(now + count);
            self.count.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
        };
        let is_taken = take() || (self.reclaim_down_to(self.limit().saturating_sub(count)) && take());
        is_taken.then(|| DescriptorReservation { of: Arc::clone(self), count })
    }

    /// Marks `count` descriptors as not closable. `Exhausted` if more than `part` (numerator and denominator)
    /// of all would be pinned: readers need the rest.
    pub fn pin(self: &Arc<Self>, count: usize, part: (usize, usize)) -> Result<Pin> {
        let most = self.limit() * part.0 / part.1;
        let more = |now: usize| (now + count <= most.max(count)).then_some(now + count);
        if self.pinned.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_err() {
            let fact = "too many disks are being written at the same time";
            return Err(Error::new(ErrorKind::Exhausted, format!("{fact}; close some of them, or {REMEDY}")));
        }
        Ok(Pin { of: Arc::clone(self), count })
    }

    /// Registers an entry that has a reservation and can be closed.
    pub fn register(&self, idle: Weak<dyn Reclaimable>) {
        let mut all = self.idle.lock();
        if all.len() > 2 * self.limit() {
            all.retain(|idle| idle.strong_count() > 0);
        }
        all.push_back(idle);
    }

    /// Closes the least recently used entries until at most `most` are open; whether that succeeded.
    fn reclaim_down_to(&self, most: usize) -> bool {
        let _search = self.search.lock();
        for which in [Reclaim::Unlocked, Reclaim::EvenLocked] {
            // At most two rounds: in the first one, all entries may have their use mark set.
            let mut steps = 2 * self.idle.lock().len();
            while self.open_count() > most && steps > 0 {
                steps -= 1;
                let Some(next) = self.idle.lock().pop_front() else { break };
                let Some(idle) = next.upgrade() else { continue };
                if idle.was_used() || !idle.reclaim(which) {
                    self.idle.lock().push_back(next);
                }
            }
        }
        self.open_count() <= most
    }

    /// Handles EMFILE despite a reservation: other code has more descriptors open than was counted.
    fn handle_shortage(&self) {
        let is_reclaimed = self.reclaim_down_to(self.open_count().saturating_sub(4));
        // Counting needs a descriptor of its own.
        if is_reclaimed {
            // Short-lived opens are counted among the others: they use the reserve.
            let limit = process_limit().saturating_sub(others(self.open_count()));
            self.limit.fetch_min(limit.max(MIN_LIMIT), Ordering::AcqRel);
        }
    }
}

/// The remedy.
const REMEDY: &str = "raise the limit of open files (ulimit -n, LimitNOFILE=)";

/// Runs a short-lived open; closes idle entries if the process has no descriptor left.
pub(super) fn with_descriptor<T>(mut open: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    for _ in 0..MAX_ATTEMPTS {
        match open() {
            Err(Errno::MFILE) => {}
            done => return done,
        }
        Descriptors::for_process().handle_shortage();
        std::thread::sleep(RETRY_INTERVAL);
    }
    open()
}

/// The process' limit of descriptors.
fn process_limit() -> usize {
    getrlimit(Resource::Nofile).current.map_or(MAX_LIMIT, |current| current.min(MAX_LIMIT as u64) as usize)
}

/// The number of open descriptors other than those `counted`.
fn others(counted: usize) -> usize {
    // One is that of the directory itself.
    let open =
        std::fs::read_dir("/proc/self/fd").map_or(ESTIMATED_OTHERS, |all| all.count().saturating_sub(1));
    open.saturating_sub(counted)
}

/// The reserve for short-lived opens, for a limit.
fn short_lived(most: usize) -> usize {
    (most / 8).clamp(24, 128)
}

fn usable(most: usize, others: usize) -> usize {
    most.saturating_sub(others + short_lived(most))
}

#[cfg(test)]
mod tests {
    use super::super::{Expect, LocalDirectory, ObjectStat, Storage, StoreFile};
    use super::*;
    use std::path::Path;

    #[test]
    fn a_hundred_files_are_read_through_ten_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let root = LocalDirectory::open(directory.path()).unwrap();
        let descriptors = Descriptors::with_limit(10);
        let files: Vec<_> = (0..100)
            .map(|n| {
                let name = format!("{n}");
                std::fs::write(directory.path().join(&name), &name).unwrap();
                let seen = root.stat(Path::new(&name)).unwrap();
                StoreFile::new(&descriptors, &root, Path::new(&name), &seen, Expect::SameVersion)
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
    fn dropped_files_free_their_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let root = LocalDirectory::open(directory.path()).unwrap();
        let descriptors = Descriptors::with_limit(4);
        std::fs::write(directory.path().join("a"), "a").unwrap();
        let seen = root.stat(Path::new("a")).unwrap();
        let file = || StoreFile::new(&descriptors, &root, Path::new("a"), &seen, Expect::SameVersion);
        let idle = file();
        idle.read_at(0, &mut [0]).unwrap();
        for _ in 0..50 {
            file().read_at(0, &mut [0]).unwrap();
        }
        assert_eq!(descriptors.open_count(), 1);
        assert!(descriptors.idle.lock().len() <= 10);
        assert!(idle.reclaim(Reclaim::Unlocked), "it holds no locks and can be closed");
    }

    #[test]
    fn a_file_replaced_while_closed_is_stale() {
        let directory = tempfile::tempdir().unwrap();
        let root = LocalDirectory::open(directory.path()).unwrap();
        let place = directory.path().join("a");
        std::fs::write(&place, "old").unwrap();
        let seen = root.stat(Path::new("a")).unwrap();
        let file =
            StoreFile::new(&Descriptors::with_limit(1), &root, Path::new("a"), &seen, Expect::SameVersion);
        file.read_at(0, &mut [0; 3]).unwrap();
        assert!(file.reclaim(Reclaim::Unlocked));
        std::fs::write(directory.path().join("b"), "new").unwrap();
        std::fs::rename(directory.path().join("b"), &place).unwrap();
        assert_eq!(file.read_at(0, &mut [0; 3]).unwrap_err().kind(), crate::error::ErrorKind::Stale);
        let _ = ObjectStat::of(std::fs::File::open(place).unwrap()).unwrap();
    }

    /// An entry with three descriptors that closes on request.
    struct Lent(Mutex<Option<DescriptorReservation>>, bool);

    impl Reclaimable for Lent {
        fn was_used(&self) -> bool {
            false
        }

        fn reclaim(&self, which: Reclaim) -> bool {
            (which == Reclaim::EvenLocked || !self.1) && self.0.lock().take().is_some()
        }
    }

    fn lend(descriptors: &Arc<Descriptors>, is_locked: bool) -> Arc<Lent> {
        let lent = Arc::new(Lent(Mutex::new(Some(descriptors.reserve(3).unwrap())), is_locked));
        descriptors.register(Arc::downgrade(&lent) as _);
        lent
    }

    #[test]
    fn least_recently_used_entries_are_reclaimed_locked_ones_last() {
        let descriptors = Descriptors::with_limit(10);
        let all = [true, false, false].map(|is_locked| lend(&descriptors, is_locked));
        let left = || all.each_ref().map(|lent| lent.0.lock().is_some());
        let first = descriptors.try_reserve(1).unwrap();
        assert_eq!(left(), [true; 3]);
        let second = descriptors.try_reserve(2).unwrap();
        assert_eq!(left(), [true, false, true]);
        let third = descriptors.try_reserve(6).unwrap();
        assert_eq!(left(), [false; 3]);
        assert!(descriptors.try_reserve(2).is_none(), "one is left");
        drop((first, second, third));
        assert_eq!(descriptors.open_count(), 0);
        assert!(descriptors.try_reserve(10).is_some());
    }

    #[test]
    fn only_requests_beyond_the_limit_are_refused() {
        let descriptors = Descriptors::with_limit(10);
        let mine = descriptors.reserve(8).unwrap();
        let refused = descriptors.reserve(3).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Exhausted);
        assert!(refused.to_string().contains("ulimit -n"), "{refused}");
        let _others = descriptors.reserve(2).unwrap();
        drop(mine);
        let pins: Vec<_> = (0..2).map(|_| descriptors.pin(2, (1, 2)).unwrap()).collect();
        assert_eq!(descriptors.pin(2, (1, 2)).unwrap_err().kind(), ErrorKind::Exhausted);
        let _job = descriptors.pin(2, (3, 4)).unwrap();
        drop(pins);
        descriptors.pin(2, (1, 2)).unwrap();
    }
}
