//! Following changes behind our back.
//!
//! inotify tells of names that come and go and of files that were written; a thread gathers that
//! for a moment and looks again. A file that is only being written (a running guest's disk) costs
//! one look at its header, not a scan. Where the system cannot tell (network file systems, too
//! many directories), the store is scanned every so often; a lost event is a scan.

use std::collections::{HashMap, HashSet};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;

use super::Store;
use super::describe::{DetectedContent, header_digest};
use super::intents::{LOCK_NAME, MARKER, is_own_name};
use super::leftovers::is_draft;
use super::plain::PLAIN_NAME;
use super::resolve::StorePath;
use super::scan::by_descriptor;

/// How long events are gathered before anything is done about them.
const GATHER: Duration = Duration::from_millis(100);

/// The interval of retries after a failed scan.
const AGAIN: Duration = Duration::from_secs(1);

const INTEREST: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// The directories that the system watches for us.
pub(super) struct Watches {
    inotify: OwnedFd,
    directories: Mutex<HashMap<i32, StorePath>>,
    /// Where chainfs keeps what was begun: who else works on the store is told of there.
    own: Mutex<HashSet<i32>>,
    /// Set when a directory could not be watched: then the store is scanned every so often.
    incomplete: AtomicBool,
}

impl Watches {
    /// `None` where the system has none to give.
    pub(super) fn new() -> Option<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok()?;
        Some(Self {
            inotify,
            directories: Mutex::default(),
            own: Mutex::default(),
            incomplete: AtomicBool::new(false),
        })
    }

    /// Watches a directory; one that is watched already only once.
    pub(super) fn add(&self, place: StorePath, directory: &OwnedFd) {
        match inotify::add_watch(&self.inotify, by_descriptor(directory), INTEREST) {
            Ok(watch) => {
                self.directories.lock().insert(watch, place);
            }
            Err(error) => {
                if !self.incomplete.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "{} cannot be watched ({error}); the store is scanned periodically",
                        place.path.display()
                    );
                }
            }
        }
    }

    /// Watches a directory of our own.
    pub(super) fn add_own(&self, directory: &OwnedFd) {
        if let Ok(watch) = inotify::add_watch(&self.inotify, by_descriptor(directory), INTEREST) {
            self.own.lock().insert(watch);
        }
    }

    /// Takes all events that are there.
    fn take(&self, found: &mut PendingChanges) {
        let mut buf = [MaybeUninit::uninit(); 16 * 1024];
        let mut reader = Reader::new(&self.inotify, &mut buf);
        loop {
            match reader.next() {
                Ok(event) => {
                    let flags = event.events();
                    let name = event.file_name().map_or(&[][..], |name| name.to_bytes());
                    if flags.contains(ReadFlags::IGNORED) {
                        self.directories.lock().remove(&event.wd()); // the directory has gone
                        self.own.lock().remove(&event.wd());
                        continue;
                    }
                    if self.own.lock().contains(&event.wd()) {
                        found.names |= name != LOCK_NAME && name != PLAIN_NAME;
                        continue;
                    }
                    // The directory itself comes but once.
                    let is_ours = is_own_name(name) || is_draft(std::ffi::OsStr::from_bytes(name).as_ref());
                    if is_ours && name != MARKER.as_bytes() {
                        continue;
                    }
                    if flags == ReadFlags::MODIFY {
                        let directory = self.directories.lock().get(&event.wd()).cloned();
                        let path = |d: &StorePath| d.path.join(std::ffi::OsStr::from_bytes(name));
                        found.written.extend(directory.map(|d| StorePath { root: d.root, path: path(&d) }));
                    } else {
                        found.names = true;
                    }
                }
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

/// The events since the last scan.
#[derive(Default)]
struct PendingChanges {
    /// Names were added, removed or changed, or the change is unknown.
    names: bool,
    /// Files that were written to.
    written: HashSet<StorePath>,
}

/// The thread that follows a store, until dropped.
pub struct Watcher {
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts following `store`.
    pub fn start(store: &Arc<Store>) -> std::io::Result<Self> {
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let (store, stopped) = (Arc::clone(store), Arc::clone(&stop));
        let thread = thread::Builder::new().name("watcher".into()).spawn(move || follow(&store, &stopped))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn follow(store: &Arc<Store>, stop: &OwnedFd) {
    let rescan_after = store.options().rescan.max(Duration::from_secs(1));
    let mut last_scan = Instant::now();
    // Whether the last scan has failed.
    let mut is_behind = false;
    loop {
        let told = store.watches.as_ref().filter(|watches| !watches.incomplete.load(Ordering::Relaxed));
        let polled = told.is_none() || is_remote(store);
        let patience =
            if polled { rescan_after.saturating_sub(last_scan.elapsed()) } else { Duration::from_hours(1) };
        let patience = if is_behind { patience.min(AGAIN) } else { patience };
        if wait(stop, store.watches.as_ref().map(|watches| &watches.inotify), patience) {
            return;
        }
        let is_due =
            (polled && last_scan.elapsed() >= rescan_after) || (is_behind && last_scan.elapsed() >= AGAIN);
        let mut found = PendingChanges { names: is_due, ..PendingChanges::default() };
        if let Some(watches) = &store.watches {
            watches.take(&mut found);
            if !found.names && found.written.is_empty() {
                continue;
            }
            // An intent that another process has removed is missing for others, and is all that remains of a
            // command if this process is killed: it is restored at once.
            store.restore_intents();
            // What belongs together comes together: a rename, a burst of writes.
            if wait(stop, None, GATHER) {
                return;
            }
            watches.take(&mut found);
        }
        if !found.names {
            found.names = found.written.iter().any(|place| describes_itself_anew(store, place));
        }
        if found.names {
            let scanned = store.rescan();
            is_behind = scanned.is_err();
            match scanned {
                // A large store that changes all the time is not scanned all the time.
                Ok(took) if took > GATHER && wait(stop, None, 3 * took) => return,
                Ok(_) => {}
                Err(error) => tracing::warn!("the store cannot be scanned: {error}"),
            }
            last_scan = Instant::now();
        }
    }
}

/// Waits for events on `inotify` or for `patience` to end; `true` if it is time to stop.
fn wait(stop: &OwnedFd, inotify: Option<&OwnedFd>, patience: Duration) -> bool {
    let timeout =
        Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: i64::from(patience.subsec_nanos()) };
    let mut fds = vec![PollFd::new(stop, PollFlags::IN)];
    fds.extend(inotify.map(|inotify| PollFd::new(inotify, PollFlags::IN)));
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) => !fds[0].revents().is_empty(),
        Err(Errno::INTR) => false,
        Err(_) => true,
    }
}

/// Whether the header of a file that is being written has changed.
fn describes_itself_anew(store: &Store, place: &StorePath) -> bool {
    let catalog = store.catalog();
    let Some(image) = catalog.images.iter().find(|image| image.place == *place) else {
        // In the store it may become an image; elsewhere only named files count.
        return place.root == 0;
    };
    let Ok(file) = store.roots()[place.root].open_file(&place.path) else { return true };
    let Ok(stat) = crate::io::ObjectStat::of(&file) else { return true };
    match &image.content {
        DetectedContent::Qcow2(qcow2) => {
            header_digest(&file, stat.size).map_or(true, |now| now != qcow2.digest)
        }
        DetectedContent::Malformed(_) | DetectedContent::Foreign(_) => true,
        // What ought to have a header may get it.
        DetectedContent::Plain if image.problem.is_some() => true,
        DetectedContent::Plain | DetectedContent::Unseen => stat.size != image.stat.size,
    }
}

/// Whether the store lies on a file system whose changes may be made elsewhere: those are not told of.
fn is_remote(store: &Store) -> bool {
    // Magic numbers of NFS, SMB, SMB2, FUSE, 9P, Ceph, AFS and OCFS2 (statfs(2)).
    const REMOTE: [u64; 8] =
        [0x6969, 0xFF53_4D42, 0xFE53_4D42, 0x6573_5546, 0x0102_1997, 0x00C3_6400, 0x5346_414F, 0x7461_636F];
    store.roots()[0].file_system().is_ok_and(|kind| REMOTE.contains(&kind))
}
