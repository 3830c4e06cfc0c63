//! Looking into the disks of a store: the guests' volumes and files, in every view of every chain.
//!
//! Promises: nothing is parsed before somebody asks, and never in this process; what one asks for of a view is what the view
//! shows, and of an active disk what it showed when it was first looked into. The parsers are `guest`'s, the disks are `store`'s; what is
//! shown where is for others.

mod assembly;
pub mod content;
pub mod difference;
mod disk;
mod disk_contents;
pub mod ranges;
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
use crate::guest::volumes::VolumeLayout;
use crate::store::{Store, ViewId};

use disk::{BrowsedDisk, Digests};
use disk_contents::Exchange;
use worker::protocol::{Answer, Request};
use worker::{Pool, Worker, WorkerProgram};

pub use disk_contents::{DiskContents, DiskLease};
pub use worker::{ListedEntry, Listing, Mounted, OpenedFile};

/// Insides that are kept for whoever looks next.
const KEPT: NonZero<usize> = NonZero::new(256).expect("not zero");
/// Workers that are kept, running or not: each is of one chain.
const WORKERS_KEPT: usize = 64;
/// After so long without a question a worker ends.
const IDLE: Duration = Duration::from_secs(30);
/// How often it is looked whether anything can rest.
const PERIOD: Duration = Duration::from_secs(2);

/// Which moment of an active disk is meant; of all others there is only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PointInTime {
    /// That of the first look, as long as it is known what the disk was then.
    First,
    /// Now, which is the first look for those who look later.
    Now,
    /// Now, of the partitions alone: what others see of the files stays as it is.
    Table,
}

/// A disk, and whether it is looked into for the sake of its partitions alone.
type ContentsKey = (ViewId, bool);

/// Looks into the disks of one store.
pub struct Browser {
    store: Arc<Store>,
    pool: Arc<Pool>,
    digests: Arc<Digests>,
    sets: AtomicU32,
    /// Bytes that have been read of disks.
    read: Arc<AtomicU64>,
    /// By chain: what one guest has written must not harm another's readers.
    workers: Mutex<HashMap<Arc<PathBuf>, Arc<Worker>>>,
    insides: Mutex<LruCache<ContentsKey, Arc<DiskContents>>>,
    /// All that somebody still has, be they kept here or not. A leaf.
    in_use: Mutex<Vec<Weak<DiskContents>>>,
    /// Whether there is a thread that lets go of what rests.
    resting: Mutex<bool>,
}

impl std::fmt::Debug for Browser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Browser").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Browser {
    /// For the disks of `store`, with workers that are `program`.
    pub fn new(store: &Arc<Store>, program: WorkerProgram) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(store),
            pool: Pool::new(program, store.descriptors()),
            digests: Arc::new(Digests::new()),
            sets: AtomicU32::new(1),
            read: Arc::default(),
            workers: Mutex::default(),
            insides: Mutex::new(LruCache::new(KEPT)),
            in_use: Mutex::default(),
            resting: Mutex::default(),
        })
    }

    /// The inside of a disk.
    pub fn inside(self: &Arc<Self>, id: &ViewId, moment: PointInTime) -> Result<Arc<DiskContents>> {
        let key = (id.clone(), moment == PointInTime::Table && id.is_active());
        if let Some(known) = self.known(&key, moment) {
            return Ok(known);
        }
        let worker = self.worker(&id.chain);
        let _first = worker.first.lock();
        // Somebody else may have done it meanwhile, and that is fresh enough.
        if let Some(known) = self.known(&key, moment) {
            return Ok(known);
        }
        self.begin_to_rest();
        let inside = Arc::new(self.look_into(id, &worker)?);
        self.in_use.lock().push(Arc::downgrade(&inside));
        let old = self.insides.lock().push(key, Arc::clone(&inside));
        drop(old);
        Ok(inside)
    }

    /// Bytes that have been read of disks so far, be it for a worker or for a file's sake.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Why what has been shown of some volumes is not what was written last: disk, volume and sentence.
    pub fn stale(&self) -> Vec<(ViewId, String, String)> {
        let mut insides: Vec<Arc<DiskContents>> =
            self.insides.lock().iter().map(|(_, inside)| Arc::clone(inside)).collect();
        insides.reverse();
        let of = |inside: &Arc<DiskContents>| {
            let all = inside.stale().into_iter();
            all.map(|(volume, said)| (inside.id().clone(), volume.to_owned(), said)).collect::<Vec<_>>()
        };
        insides.iter().flat_map(of).collect()
    }

    /// The inside of a disk, if somebody has looked into it before.
    pub fn known_inside(&self, id: &ViewId) -> Option<Arc<DiskContents>> {
        self.insides.lock().peek(&(id.clone(), false)).cloned()
    }

    fn known(&self, key: &ContentsKey, moment: PointInTime) -> Option<Arc<DiskContents>> {
        let known = self.insides.lock().get(key).cloned()?;
        let is_good = if moment == PointInTime::First { known.is_good() } else { known.is_unchanged() };
        is_good.then_some(known)
    }

    fn worker(&self, chain: &Arc<PathBuf>) -> Arc<Worker> {
        let mut workers = self.workers.lock();
        if let Some(worker) = workers.get(chain) {
            return Arc::clone(worker);
        }
        if workers.len() >= WORKERS_KEPT {
            // One that somebody still has may be begun again, and only those in here are ended when they are idle.
            workers.retain(|_, worker| worker.may_run() || Arc::strong_count(worker) > 1);
        }
        let worker = Worker::new(&self.pool);
        workers.insert(Arc::clone(chain), Arc::clone(&worker));
        worker
    }

    /// How many processes that read guests' file systems run.
    pub fn workers(&self) -> usize {
        self.pool.running()
    }

    fn look_into(&self, id: &ViewId, worker: &Arc<Worker>) -> Result<DiskContents> {
        let mut disks = vec![BrowsedDisk::new(&self.store, id, &self.read)?];
        let mut set = self.sets.fetch_add(1, Ordering::Relaxed);
        let mut layout = self.open(worker, set, &disks)?;
        // Numbers of the layout are places in the list: another list is another set.
        let mut remarks = Vec::new();
        while let Some(more) = self.more_disks(worker, &disks, &layout.missing, &mut remarks) {
            remarks.clear();
            disks.extend(more);
            set = self.sets.fetch_add(1, Ordering::Relaxed);
            layout = self.open(worker, set, &disks)?;
        }
        let mounted = layout.volumes.iter().map(|_| Mutex::default()).collect();
        let (worker, digests, systems) = (Arc::clone(worker), Arc::clone(&self.digests), OnceLock::new());
        Ok(DiskContents { worker, digests, set, disks, layout, remarks, mounted, systems })
    }

    fn open(&self, worker: &Worker, set: u32, disks: &[BrowsedDisk]) -> Result<VolumeLayout> {
        let sizes = disks.iter().map(BrowsedDisk::size).collect();
        match worker.ask(&Request::Open { set, sizes }, &Exchange::new(disks, &self.digests))?.0 {
            Answer::Layout(layout) => {
                validate::check_layout(&layout, disks[0].size())?;
                Ok(*layout)
            }
            _ => Err(validate::confused()),
        }
    }

    fn begin_to_rest(self: &Arc<Self>) {
        let mut is_resting = self.resting.lock();
        if *is_resting {
            return;
        }
        let browser = Arc::downgrade(self);
        let work = move || {
            loop {
                std::thread::sleep(PERIOD);
                let Some(browser) = browser.upgrade() else { return };
                browser.rest();
            }
        };
        match std::thread::Builder::new().name("rest".into()).spawn(work) {
            Ok(_) => *is_resting = true,
            // Whoever looks next tries again.
            Err(error) => tracing::warn!("what reads guests' file systems is not ended when it is idle: {error}"),
        }
    }

    fn rest(&self) {
        // Those of earlier moments, too: the kernel goes on to know their files when others have taken their place here.
        let mut in_use = self.in_use.lock();
        in_use.retain(|inside| inside.strong_count() > 0);
        let insides: Vec<Arc<DiskContents>> = in_use.iter().filter_map(Weak::upgrade).collect();
        drop(in_use);
        for inside in insides {
            inside.rest();
        }
        let workers: Vec<Arc<Worker>> = self.workers.lock().values().cloned().collect();
        for worker in workers {
            worker.rest(IDLE);
        }
    }
}
