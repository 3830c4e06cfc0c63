//! The content of a store's disks: the guests' volumes and files, in every view of every chain.
//!
//! Promises:
//! - Nothing is parsed before a client requests it, and never in this process.
//! - A request shows what the view shows; of an active disk, its state when it was first opened here.
//!
//! The parsers are `guest`'s, the disks are `store`'s; where the files appear is left to the callers.

mod assembly;
pub mod content;
pub mod difference;
mod disk;
mod disk_contents;
mod keys;
mod mapped_file;
pub mod ranges;
pub mod search;
mod validate;
pub mod versions;
pub mod walk;
pub mod worker;

use std::collections::HashMap;
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::Result;
use crate::guest::luks::ContainerKeys;
use crate::guest::volumes::VolumeLayout;
use crate::store::{Store, ViewId};

use disk::{BrowsedDisk, Digests};
use disk_contents::{Exchange, decryptors};
use worker::protocol::{Answer, Request};
use worker::{Pool, Worker, WorkerProgram};

pub use disk_contents::{DiskContents, DiskLease, VolumeOrigin};
pub use keys::Keyring;
pub use mapped_file::MappedFile;
pub use worker::{FoundEntry, ListedEntry, Listing, Mounted, OpenedFile, Trees};

/// Disk contents that are cached for later clients.
const CACHED_CONTENTS: NonZero<usize> = NonZero::new(256).expect("not zero");
/// Workers that are kept, running or not: one per chain.
const MAX_WORKERS: usize = 64;
/// A worker without a request for this long is stopped.
const IDLE: Duration = Duration::from_secs(30);
/// How often idle resources are looked for.
const PERIOD: Duration = Duration::from_secs(2);

/// The point in time of an active disk; a frozen disk has only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointInTime {
    /// The state at the first open, as long as it is known.
    First,
    /// The current state; it becomes the first for later clients.
    Now,
    /// The current state of the partitions alone: the state of the shown files does not change.
    Table,
}

/// A disk, and whether only its partitions are read.
type ContentsKey = (ViewId, bool);

/// Opens the contents of one store's disks.
pub struct Browser {
    store: Arc<Store>,
    pool: Arc<Pool>,
    digests: Arc<Digests>,
    /// The keys of encrypted volumes.
    keyring: Arc<Keyring>,
    sets: AtomicU32,
    /// Bytes read from disks.
    read: Arc<AtomicU64>,
    /// By chain: data of one guest must not harm another guest's readers.
    workers: Mutex<HashMap<Arc<PathBuf>, Arc<Worker>>>,
    contents: Mutex<LruCache<ContentsKey, Arc<DiskContents>>>,
    /// All contents with a client, cached or not. A leaf lock.
    in_use: Mutex<Vec<Weak<DiskContents>>>,
    /// Whether the thread that releases idle resources runs.
    has_idle_thread: Mutex<bool>,
}

impl std::fmt::Debug for Browser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Browser").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Browser {
    /// For the disks of `store`, with workers that run `program`. Encrypted volumes stay closed.
    pub fn new(store: &Arc<Store>, program: WorkerProgram) -> Arc<Self> {
        Self::with_keys(store, program, Arc::default())
    }

    /// The same, with keys for encrypted volumes.
    pub fn with_keys(store: &Arc<Store>, program: WorkerProgram, keyring: Arc<Keyring>) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(store),
            pool: Pool::new(program, store.descriptors()),
            digests: Arc::new(Digests::new()),
            keyring,
            sets: AtomicU32::new(1),
            read: Arc::default(),
            workers: Mutex::default(),
            contents: Mutex::new(LruCache::new(CACHED_CONTENTS)),
            in_use: Mutex::default(),
            has_idle_thread: Mutex::default(),
        })
    }

    /// The contents of a disk.
    pub fn contents(self: &Arc<Self>, id: &ViewId, moment: PointInTime) -> Result<Arc<DiskContents>> {
        let key = (id.clone(), moment == PointInTime::Table && id.is_active());
        if let Some(known) = self.known(&key, moment) {
            return Ok(known);
        }
        let worker = self.worker(&id.chain);
        let _opening = worker.opening.lock();
        // Another thread may have opened it meanwhile; that is recent enough.
        if let Some(known) = self.known(&key, moment) {
            return Ok(known);
        }
        self.start_idle_thread();
        let contents = Arc::new(self.open_contents(id, &worker, key.1)?);
        self.in_use.lock().push(Arc::downgrade(&contents));
        let old = self.contents.lock().push(key, Arc::clone(&contents));
        drop(old);
        Ok(contents)
    }

    /// Bytes read from disks so far, for workers and for files.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Why the shown state of some volumes is not the last one: disk, volume and sentence.
    pub fn stale(&self) -> Vec<(ViewId, String, String)> {
        let mut all: Vec<Arc<DiskContents>> =
            self.contents.lock().iter().map(|(_, contents)| Arc::clone(contents)).collect();
        all.reverse();
        let of = |contents: &Arc<DiskContents>| {
            let stale = contents.stale().into_iter();
            stale
                .map(|(volume, sentence)| (contents.id().clone(), volume.to_owned(), sentence))
                .collect::<Vec<_>>()
        };
        all.iter().flat_map(of).collect()
    }

    /// The contents of a disk if a client has opened them before.
    pub fn known_contents(&self, id: &ViewId) -> Option<Arc<DiskContents>> {
        self.contents.lock().peek(&(id.clone(), false)).cloned()
    }

    fn known(&self, key: &ContentsKey, moment: PointInTime) -> Option<Arc<DiskContents>> {
        let known = self.contents.lock().get(key).cloned()?;
        let is_valid = if moment == PointInTime::First { known.is_valid() } else { known.is_unchanged() };
        (is_valid && known.has_keys_of(self.keyring.version())).then_some(known)
    }

    fn worker(&self, chain: &Arc<PathBuf>) -> Arc<Worker> {
        let mut workers = self.workers.lock();
        if let Some(worker) = workers.get(chain) {
            return Arc::clone(worker);
        }
        if workers.len() >= MAX_WORKERS {
            // A worker with a client may be started again, and idle ones are only stopped if they are listed
            // here.
            workers.retain(|_, worker| worker.may_be_running() || Arc::strong_count(worker) > 1);
        }
        let worker = Worker::new(&self.pool);
        workers.insert(Arc::clone(chain), Arc::clone(&worker));
        worker
    }

    /// The number of running worker processes.
    pub fn workers(&self) -> usize {
        self.pool.running()
    }

    fn open_contents(&self, id: &ViewId, worker: &Arc<Worker>, is_table: bool) -> Result<DiskContents> {
        let mut disks = vec![BrowsedDisk::new(&self.store, id, &self.read)?];
        let mut set = self.sets.fetch_add(1, Ordering::Relaxed);
        let (mut keys, version) = (ContainerKeys::default(), self.keyring.version());
        let mut layout = self.open(worker, set, &disks, &keys)?;
        // The layout refers to disks by index: another list of disks is another set.
        let mut remarks = Vec::new();
        loop {
            if let Some(more) = self.more_disks(worker, &disks, &layout.missing, &mut remarks) {
                remarks.clear();
                disks.extend(more);
            } else if is_table || !self.unlock_more(&disks, &layout, &mut keys)? {
                break;
            }
            // What an unlocked volume holds may lack members again.
            set = self.sets.fetch_add(1, Ordering::Relaxed);
            layout = self.open(worker, set, &disks, &keys)?;
        }
        let mounted = layout.volumes.iter().map(|_| Mutex::default()).collect();
        let (worker, digests, systems) = (Arc::clone(worker), Arc::clone(&self.digests), OnceLock::new());
        let decryptors = decryptors(&layout, &keys)?;
        let keys = (keys, version);
        Ok(DiskContents { worker, digests, set, disks, keys, decryptors, layout, remarks, mounted, systems })
    }

    fn open(
        &self,
        worker: &Worker,
        set: u32,
        disks: &[BrowsedDisk],
        keys: &ContainerKeys,
    ) -> Result<VolumeLayout> {
        let sizes = disks.iter().map(BrowsedDisk::size).collect();
        let request = Request::Open { set, sizes, keys: keys.clone() };
        match worker.ask(&request, &Exchange::new(disks, &self.digests))?.0 {
            Answer::Layout(layout) => {
                validate::check_layout(&layout, disks[0].size())?;
                Ok(*layout)
            }
            _ => Err(validate::protocol_violation()),
        }
    }

    fn start_idle_thread(self: &Arc<Self>) {
        let mut is_running = self.has_idle_thread.lock();
        if *is_running {
            return;
        }
        let browser = Arc::downgrade(self);
        let work = move || {
            loop {
                std::thread::sleep(PERIOD);
                let Some(browser) = browser.upgrade() else { return };
                browser.release_idle();
            }
        };
        match std::thread::Builder::new().name("idle".into()).spawn(work) {
            Ok(_) => *is_running = true,
            // The next open retries.
            Err(error) => tracing::warn!("idle file-system workers are not stopped: {error}"),
        }
    }

    fn release_idle(&self) {
        // Contents of earlier points in time as well: the kernel still knows their files after newer ones
        // have replaced them here.
        let mut in_use = self.in_use.lock();
        in_use.retain(|contents| contents.strong_count() > 0);
        let all: Vec<Arc<DiskContents>> = in_use.iter().filter_map(Weak::upgrade).collect();
        drop(in_use);
        for contents in all {
            contents.release_idle();
        }
        let workers: Vec<Arc<Worker>> = self.workers.lock().values().cloned().collect();
        for worker in workers {
            worker.stop_if_idle(IDLE);
        }
    }
}
