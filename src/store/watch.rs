//! Detects changes by other processes.
//!
//! The backend tells of names that come and go and of files that were written; a thread gathers that
//! for a moment and looks again. A file that is only being written (a running guest's disk) costs
//! one look at its header, not a scan. Where the backend cannot tell (network file systems, too
//! many directories), the store is scanned every so often; a lost event is a scan.

use std::collections::{HashMap, HashSet};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::io::{
    Backend, Change, ChangeKind, Changes, Interrupt, LocalDirectory, MountPoints, OpenDirectory, WatchId,
};

use super::Store;
use super::control_dir::{LOCK_NAME, MARKER, is_own_name};
use super::describe::{DetectedContent, header_digest};
use super::leftovers::is_draft;
use super::plain::PLAIN_NAME;
use super::resolve::StorePath;

/// How long events are collected before they are handled.
const GATHER: Duration = Duration::from_millis(100);

/// Sub-directories with definitions that are watched, at most: one for each domain with snapshots.
const MAX_DEFINITIONS: usize = 1000;

/// The interval of retries after a failed scan.
const AGAIN: Duration = Duration::from_secs(1);

/// The directories that are watched for us.
pub(super) struct Watches {
    changes: Arc<dyn Changes>,
    directories: Mutex<HashMap<WatchId, StorePath>>,
    /// The directory of intents: changes there show other processes' commands.
    own: Mutex<HashSet<WatchId>>,
    /// Directories with libvirt's definitions.
    definitions: Mutex<HashSet<WatchId>>,
    /// Set when a directory could not be watched: then the store is scanned periodically.
    incomplete: AtomicBool,
}

impl Watches {
    /// `None` where the backend has no news to give.
    pub(super) fn new(backend: &dyn Backend) -> Option<Self> {
        Some(Self {
            changes: backend.changes()?,
            directories: Mutex::default(),
            own: Mutex::default(),
            definitions: Mutex::default(),
            incomplete: AtomicBool::new(false),
        })
    }

    /// Watches a directory; one that is watched already is not added again.
    pub(super) fn add(&self, place: StorePath, directory: &dyn OpenDirectory) {
        match self.changes.watch(directory) {
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

    /// Watches a directory of chainfs itself.
    pub(super) fn add_own(&self, directory: &dyn OpenDirectory) {
        if let Ok(watch) = self.changes.watch(directory) {
            self.own.lock().insert(watch);
        }
    }

    /// Watches a directory with definitions, and its sub-directories. Without, they are read with each scan.
    pub(super) fn add_definitions(&self, directory: &Path) {
        let Ok(root) = LocalDirectory::open(directory) else { return };
        let subs = std::fs::read_dir(directory).into_iter().flatten().flatten().take(MAX_DEFINITIONS);
        let subs = subs.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let names = std::iter::once(PathBuf::new()).chain(subs.map(|entry| PathBuf::from(entry.file_name())));
        for name in names {
            if let Ok(Some(open)) = root.open_directory(&name, MountPoints::Skip)
                && let Ok(watch) = self.changes.watch(&*open)
            {
                self.definitions.lock().insert(watch);
            }
        }
    }

    /// Takes all news that are there.
    fn take(&self, found: &mut PendingChanges) {
        self.changes.take(&mut |change| self.hear(change, found));
    }

    fn hear(&self, Change { watch, kind, name }: Change<'_>, found: &mut PendingChanges) {
        let bytes = name.as_bytes();
        if kind == ChangeKind::Gone {
            self.directories.lock().remove(&watch);
            self.own.lock().remove(&watch);
            self.definitions.lock().remove(&watch);
            return;
        }
        if self.definitions.lock().contains(&watch) {
            // libvirt writes them anew and renames them. A directory comes with the first snapshot of a domain.
            found.names |= !bytes.contains(&b'.') || bytes.ends_with(b".xml");
            return;
        }
        if self.own.lock().contains(&watch) {
            found.names |= bytes != LOCK_NAME && bytes != PLAIN_NAME;
            return;
        }
        // The directory itself comes but once.
        let is_ours = is_own_name(bytes) || is_draft(name.as_ref());
        if is_ours && bytes != MARKER.as_bytes() {
            return;
        }
        if kind == ChangeKind::Written {
            let directory = self.directories.lock().get(&watch).cloned();
            found.written.extend(directory.map(|d| StorePath { root: d.root, path: d.path.join(name) }));
        } else {
            found.names = true;
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
    stop: Arc<Interrupt>,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Starts following `store`.
    pub fn start(store: &Arc<Store>) -> std::io::Result<Self> {
        let stop = Arc::new(Interrupt::new()?);
        let (store, stopped) = (Arc::clone(store), Arc::clone(&stop));
        let thread = thread::Builder::new().name("watcher".into()).spawn(move || follow(&store, &stopped))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.raise();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn follow(store: &Arc<Store>, stop: &Interrupt) {
    let rescan_after = store.options().rescan.max(Duration::from_secs(1));
    let mut last_scan = Instant::now();
    // Whether the last scan has failed.
    let mut is_behind = false;
    loop {
        let told = store.watches.as_ref().filter(|watches| !watches.incomplete.load(Ordering::Relaxed));
        let polled = told.is_none() || store.roots()[0].has_remote_writers();
        let patience =
            if polled { rescan_after.saturating_sub(last_scan.elapsed()) } else { Duration::from_hours(1) };
        let patience = if is_behind { patience.min(AGAIN) } else { patience };
        let is_over = match &store.watches {
            Some(watches) => watches.changes.wait(stop, patience),
            None => stop.wait(patience),
        };
        if is_over {
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
            // Related events come together: a rename, a burst of writes.
            if stop.wait(GATHER) {
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
                // A large store that changes continuously is not scanned continuously.
                Ok(took) if took > GATHER && stop.wait(3 * took) => return,
                Ok(_) => {}
                Err(error) => tracing::warn!("the store cannot be scanned: {error}"),
            }
            last_scan = Instant::now();
        }
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
    let Ok(stat) = file.stat() else { return true };
    match &image.content {
        DetectedContent::Qcow2(qcow2) => {
            header_digest(&*file, stat.size).map_or(true, |now| now != qcow2.digest)
        }
        DetectedContent::Malformed(_) | DetectedContent::Foreign(_) => true,
        // A file that should have a header may get it.
        DetectedContent::Plain if image.problem.is_some() => true,
        DetectedContent::Plain | DetectedContent::Unseen => stat.size != image.stat.size,
    }
}
