//! One bound on everything that is open: a store has more images than a process may have descriptors.
//!
//! Whoever opens something that lasts takes room for it first: images, files that are written, and the sockets of the
//! processes that read guests' file systems. Where there is none left, what was not used for longest (by the clock algorithm) and can be had again
//! is let go of: files that are idle and processes that nobody asks anything, then files that only carry a reader's locks. Whoever finds nothing that can
//! go is refused; nobody else is. A reserve stays for what is open for a moment: directories that are listed, files that are looked at.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::error::{Error, ErrorKind, Result};

/// More would only slow down `fork` and `exec` of nobody, and help nobody.
const MOST: usize = 65_536;
/// With less room than that nothing can be served.
const LEAST: usize = 12;
/// What is going to be open for as long as the process lives, before it has been counted.
const EXPECTED: usize = 16;
/// How long somebody waits for what is just being used, and how often he looks.
const PATIENCE: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(2);
/// How often something is opened that is open for a moment only, where the process has no descriptor left.
const TRIES: usize = 64;

/// Something that costs descriptors and can be had again.
pub trait Reclaimable: Send + Sync {
    /// Whether it was used since this was asked last.
    fn was_used(&self) -> bool;
    /// Gives back what it has, unless somebody is just using it, or (not `at_any_cost`) might miss it. It waits for nobody.
    fn let_go(&self, at_any_cost: bool) -> bool;
}

/// All that is open and lasts.
pub struct Descriptors {
    limit: AtomicUsize,
    count: AtomicUsize,
    /// Those of them that cannot be let go of.
    pinned: AtomicUsize,
    /// In the order of the clock's hand; among them some that have been dropped since.
    idle: Mutex<VecDeque<Weak<dyn Reclaimable>>>,
    /// Held during a search for what can go: one at a time. Below it things are only tried.
    search: Mutex<()>,
}

impl std::fmt::Debug for Descriptors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Descriptors").field("limit", &self.limit).field("count", &self.count).finish_non_exhaustive()
    }
}

/// Room for some descriptors, until dropped.
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

/// Says that some of what has room cannot be let go of, until dropped.
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
    /// Those of this process: as many as it may have, less what is open besides and a reserve. Raises the soft limit to the hard one.
    pub fn for_process() -> Arc<Self> {
        static PROCESS: LazyLock<Arc<Descriptors>> = LazyLock::new(|| {
            let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
            let wanted = maximum.unwrap_or(MOST as u64).min(MOST as u64);
            if current.is_some_and(|current| current < wanted) {
                // Refused or not, what counts is the limit that holds afterwards.
                let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum });
            }
            Descriptors::with_limit(rest(process_limit(), others(0) + EXPECTED).max(LEAST))
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

    /// Counts what is open besides, once all is that is going to be open for as long as the process lives, but for `more`.
    /// `Exhausted` if that leaves too little.
    pub fn settle(&self, more: usize) -> Result<()> {
        let (most, others) = (process_limit(), others(self.open_count()) + more);
        let limit = rest(most, others);
        if limit < LEAST {
            let least = (others + reserve(0) + LEAST).next_multiple_of(16);
            let fact = format!("at most {most} files may be open at a time, which is too few: {least} are needed");
            return Err(Error::new(ErrorKind::Exhausted, format!("{fact}; {RAISE}")));
        }
        self.limit.store(limit, Ordering::Release);
        Ok(())
    }

    /// How many may be open.
    pub fn limit(&self) -> usize {
        self.limit.load(Ordering::Acquire)
    }

    /// How many are open; for metrics.
    pub fn open_count(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    /// How many may be open for a moment besides.
    pub fn reserve(&self) -> usize {
        reserve(self.limit())
    }

    /// Room for `count` more. Waits a moment for what is just being used; then it is `Exhausted`.
    pub fn claim(self: &Arc<Self>, count: usize) -> Result<DescriptorReservation> {
        let begun = Instant::now();
        loop {
            if let Some(room) = self.try_claim(count) {
                return Ok(room);
            }
            if begun.elapsed() > PATIENCE {
                let fact = format!("{} files are open, and more may not be", self.open_count());
                return Err(Error::new(ErrorKind::Exhausted, format!("{fact}; close some of them, or {RAISE}")));
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Room for `count` more, if there is some or what is idle can make some.
    pub fn try_claim(self: &Arc<Self>, count: usize) -> Option<DescriptorReservation> {
        let take = || {
            // B2: taken before anything is opened.
            let more = |now: usize| (now + count <= self.limit()).then_some(now + count);
            self.count.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_ok()
        };
        let is_taken = take() || (self.make_room(self.limit().saturating_sub(count)) && take());
        is_taken.then(|| DescriptorReservation { of: Arc::clone(self), count })
    }

    /// Notes that `count` descriptors cannot be let go of. `Exhausted` if more than `part` (nominator and denominator) of all were pinned
    /// then: something has to be left to read everything else with.
    pub fn pin(self: &Arc<Self>, count: usize, part: (usize, usize)) -> Result<Pin> {
        let most = self.limit() * part.0 / part.1;
        let more = |now: usize| (now + count <= most.max(count)).then_some(now + count);
        if self.pinned.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).is_err() {
            let fact = "too many disks are being written at the same time";
            return Err(Error::new(ErrorKind::Exhausted, format!("{fact}; close some of them, or {RAISE}")));
        }
        Ok(Pin { of: Arc::clone(self), count })
    }

    /// Notes something that has room and can be let go of.
    pub fn register(&self, idle: Weak<dyn Reclaimable>) {
        let mut all = self.idle.lock();
        if all.len() > 2 * self.limit() {
            all.retain(|idle| idle.strong_count() > 0);
        }
        all.push_back(idle);
    }

    /// Lets go of what was not used for longest, until no more than `most` are open; whether they are.
    fn make_room(&self, most: usize) -> bool {
        let _search = self.search.lock();
        for at_any_cost in [false, true] {
            // Twice round at most: the first time round all may have been used since the last.
            let mut steps = 2 * self.idle.lock().len();
            while self.open_count() > most && steps > 0 {
                steps -= 1;
                let Some(next) = self.idle.lock().pop_front() else { break };
                let Some(idle) = next.upgrade() else { continue };
                if idle.was_used() || !idle.let_go(at_any_cost) {
                    self.idle.lock().push_back(next);
                }
            }
        }
        self.open_count() <= most
    }

    /// The process has no descriptor left though there was room: something else has more open than was known.
    fn relieve(&self) {
        let has_let_go = self.make_room(self.open_count().saturating_sub(4));
        // That can be asked only where there is a descriptor left to ask with.
        if has_let_go {
            // What is open for a moment is among the others: the reserve is theirs.
            let limit = process_limit().saturating_sub(others(self.open_count()));
            self.limit.fetch_min(limit.max(LEAST), Ordering::AcqRel);
        }
    }
}

/// The remedy.
const RAISE: &str = "raise the limit of open files (ulimit -n, LimitNOFILE=)";

/// Opens something for a moment; where the process has no descriptor left, what is idle makes room for it.
pub(super) fn with_room<T>(mut open: impl FnMut() -> rustix::io::Result<T>) -> rustix::io::Result<T> {
    for _ in 0..TRIES {
        match open() {
            Err(Errno::MFILE) => {}
            done => return done,
        }
        Descriptors::for_process().relieve();
        std::thread::sleep(PAUSE);
    }
    open()
}

/// How many descriptors the process may have.
fn process_limit() -> usize {
    getrlimit(Resource::Nofile).current.map_or(MOST, |current| current.min(MOST as u64) as usize)
}

/// How many descriptors are open besides those `counted`.
fn others(counted: usize) -> usize {
    // One is the directory's own.
    let open = std::fs::read_dir("/proc/self/fd").map_or(EXPECTED, |all| all.count().saturating_sub(1));
    open.saturating_sub(counted)
}

/// What is kept for what is open for a moment only.
fn reserve(most: usize) -> usize {
    (most / 8).clamp(24, 128)
}

fn rest(most: usize, others: usize) -> usize {
    most.saturating_sub(others + reserve(most))
}

#[cfg(test)]
mod tests {
    use super::super::{FileStat, Root, Storage, StoreFile};
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
        assert!(descriptors.idle.lock().len() <= 10);
        assert!(idle.let_go(false), "it was closed, and its locks with it");
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
        assert!(file.let_go(false));
        std::fs::write(directory.path().join("b"), "new").unwrap();
        std::fs::rename(directory.path().join("b"), &place).unwrap();
        assert_eq!(file.read_at(0, &mut [0; 3]).unwrap_err().kind(), crate::error::ErrorKind::Stale);
        let _ = FileStat::of(std::fs::File::open(place).unwrap()).unwrap();
    }

    /// Something that has room for three, as long as nobody asks for it back.
    struct Lent(Mutex<Option<DescriptorReservation>>, bool);

    impl Reclaimable for Lent {
        fn was_used(&self) -> bool {
            false
        }

        fn let_go(&self, at_any_cost: bool) -> bool {
            (at_any_cost || !self.1) && self.0.lock().take().is_some()
        }
    }

    fn lend(descriptors: &Arc<Descriptors>, is_missed: bool) -> Arc<Lent> {
        let lent = Arc::new(Lent(Mutex::new(Some(descriptors.claim(3).unwrap())), is_missed));
        descriptors.register(Arc::downgrade(&lent) as _);
        lent
    }

    #[test]
    fn what_is_idle_longest_goes_first_and_what_somebody_would_miss_last() {
        let descriptors = Descriptors::with_limit(10);
        let all = [true, false, false].map(|is_missed| lend(&descriptors, is_missed));
        let left = || all.each_ref().map(|lent| lent.0.lock().is_some());
        let first = descriptors.try_claim(1).unwrap();
        assert_eq!(left(), [true; 3]);
        let second = descriptors.try_claim(2).unwrap();
        assert_eq!(left(), [true, false, true]);
        let third = descriptors.try_claim(6).unwrap();
        assert_eq!(left(), [false; 3]);
        assert!(descriptors.try_claim(2).is_none(), "one is left");
        drop((first, second, third));
        assert_eq!(descriptors.open_count(), 0);
        assert!(descriptors.try_claim(10).is_some());
    }

    #[test]
    fn who_exceeds_the_limit_is_refused_and_nobody_else() {
        let descriptors = Descriptors::with_limit(10);
        let mine = descriptors.claim(8).unwrap();
        let refused = descriptors.claim(3).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Exhausted);
        assert!(refused.to_string().contains("ulimit -n"), "{refused}");
        let _others = descriptors.claim(2).unwrap();
        drop(mine);
        let pins: Vec<_> = (0..2).map(|_| descriptors.pin(2, (1, 2)).unwrap()).collect();
        assert_eq!(descriptors.pin(2, (1, 2)).unwrap_err().kind(), ErrorKind::Exhausted);
        let _job = descriptors.pin(2, (3, 4)).unwrap();
        drop(pins);
        descriptors.pin(2, (1, 2)).unwrap();
    }
}
