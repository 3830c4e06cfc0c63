//! Looking into the disks of a store: the guests' volumes and files, in every view of every chain.
//!
//! Promises: nothing is parsed before somebody asks, and never in this process; what one asks for of a view is what the view
//! shows, and of an active disk what it showed when it was first looked into. The parsers are `guest`'s, the disks are `store`'s; what is
//! shown where is for others.

pub mod content;
pub mod difference;
mod disk;
mod inside;
pub mod ranges;
pub mod versions;
pub mod walk;
pub mod worker;

use std::collections::{BTreeSet, HashMap};
use std::num::NonZero;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Once, OnceLock, Weak};
use std::time::Duration;

use lru::LruCache;
use parking_lot::Mutex;

use crate::error::Result;
use crate::guest::volumes::{Layout, MissingVolumeGroup, PhysicalVolumeName};
use crate::store::{ACTIVE, Catalog, Store, ViewId, shown};

use disk::{Digests, Disk};
use inside::Session;
use worker::protocol::{Answer, Request};
use worker::{Program, Worker};

pub use inside::{Hold, Inside};
pub use worker::{ListedEntry, Listing, Mounted, OpenedFile};

/// Insides that are kept for whoever looks next.
const KEPT: NonZero<usize> = NonZero::new(256).expect("not zero");
/// Workers that run at the same time, about.
const RUNNING: usize = 16;
/// After so long without a question a worker ends.
const IDLE: Duration = Duration::from_secs(30);
/// How often it is looked whether anything can rest.
const PERIOD: Duration = Duration::from_secs(2);
/// Chains in which the other disks of a volume group are looked for, at most.
const CANDIDATES: usize = 256;
/// Disks of one set, at most.
const DISKS: usize = 32;

/// Which moment of an active disk is meant; of all others there is only one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// That of the first look, as long as it is known what the disk was then.
    First,
    /// Now, which is the first look for those who look later.
    Now,
    /// Now, of the partitions alone: what others see of the files stays as it is.
    Table,
}

/// Looks into the disks of one store.
pub struct Browser {
    store: Arc<Store>,
    program: Program,
    digests: Arc<Digests>,
    sets: AtomicU32,
    /// Bytes that have been read of disks.
    read: Arc<AtomicU64>,
    /// By chain: what one guest has written must not harm another's readers.
    workers: Mutex<HashMap<Arc<PathBuf>, Arc<Worker>>>,
    /// By disk, and whether they are for the sake of the partitions alone.
    insides: Mutex<LruCache<(ViewId, bool), Arc<Inside>>>,
    /// All that somebody still has, be they kept here or not. A leaf.
    in_use: Mutex<Vec<Weak<Inside>>>,
    /// Held while a view is looked into for the first time: once.
    first: Mutex<()>,
    resting: Once,
}

impl std::fmt::Debug for Browser {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Browser").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Browser {
    /// For the disks of `store`, with workers that are `program`.
    pub fn new(store: &Arc<Store>, program: Program) -> Arc<Self> {
        Arc::new(Self {
            store: Arc::clone(store),
            program,
            digests: Arc::new(Digests::new()),
            sets: AtomicU32::new(1),
            read: Arc::default(),
            workers: Mutex::default(),
            insides: Mutex::new(LruCache::new(KEPT)),
            in_use: Mutex::default(),
            first: Mutex::new(()),
            resting: Once::new(),
        })
    }

    /// The inside of a disk.
    pub fn inside(self: &Arc<Self>, id: &ViewId, moment: Moment) -> Result<Arc<Inside>> {
        let key = (id.clone(), moment == Moment::Table && id.is_active());
        if let Some(known) = self.known(&key, moment) {
            return Ok(known);
        }
        let _first = self.first.lock();
        // Somebody else may have done it meanwhile, and that is fresh enough.
        if let Some(known) = self.known(&key, moment) {
            return Ok(known);
        }
        self.resting.call_once(|| self.begin_to_rest());
        let inside = Arc::new(self.look_into(id)?);
        self.in_use.lock().push(Arc::downgrade(&inside));
        let old = self.insides.lock().push(key, Arc::clone(&inside));
        drop(old);
        Ok(inside)
    }

    /// Bytes that have been read of disks so far, be it for a worker or for a file's sake.
    pub fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// The inside of a disk, if somebody has looked into it before.
    pub fn known_inside(&self, id: &ViewId) -> Option<Arc<Inside>> {
        self.insides.lock().peek(&(id.clone(), false)).cloned()
    }

    fn known(&self, key: &(ViewId, bool), moment: Moment) -> Option<Arc<Inside>> {
        let known = self.insides.lock().get(key).cloned()?;
        let is_good = if moment == Moment::First { known.is_good() } else { known.is_unchanged() };
        is_good.then_some(known)
    }

    fn worker(&self, chain: &Arc<PathBuf>) -> Arc<Worker> {
        let mut workers = self.workers.lock();
        if let Some(worker) = workers.get(chain) {
            return Arc::clone(worker);
        }
        let running: Vec<Arc<Worker>> = workers.values().filter(|worker| worker.is_running()).cloned().collect();
        if running.len() >= RUNNING {
            workers.retain(|_, worker| worker.is_running());
        }
        let worker = Arc::new(Worker::new(&self.program));
        workers.insert(Arc::clone(chain), Arc::clone(&worker));
        drop(workers);
        if running.len() >= RUNNING {
            for worker in running {
                worker.rest(PERIOD);
            }
        }
        worker
    }

    fn look_into(&self, id: &ViewId) -> Result<Inside> {
        let worker = self.worker(&id.chain);
        let mut disks = vec![Disk::new(&self.store, id, &self.read)?];
        let mut set = self.sets.fetch_add(1, Ordering::Relaxed);
        let mut layout = self.open(&worker, set, &disks)?;
        // Numbers of the layout are places in the list: another list is another set.
        let mut remarks = Vec::new();
        while let Some(more) = self.more_disks(&worker, &disks, &layout.missing, &mut remarks) {
            remarks.clear();
            disks.extend(more);
            set = self.sets.fetch_add(1, Ordering::Relaxed);
            layout = self.open(&worker, set, &disks)?;
        }
        let mounted = layout.volumes.iter().map(|_| Mutex::default()).collect();
        let (digests, systems) = (Arc::clone(&self.digests), OnceLock::new());
        Ok(Inside { worker, digests, set, disks, layout, remarks, mounted, systems })
    }

    fn open(&self, worker: &Worker, set: u32, disks: &[Disk]) -> Result<Layout> {
        let sizes = disks.iter().map(Disk::size).collect();
        match worker.ask(&Request::Open { set, sizes }, &Session::new(disks, &self.digests))?.0 {
            Answer::Layout(layout) => Ok(*layout),
            _ => Err(inside::confused()),
        }
    }

    /// Disks of other chains that hold what is missing, in the view of the same moment, and what should be known of it. A guest's other disks
    /// are told by what both say of their group. Clones of guests say the same, so a neighbour goes before all others, and where that leaves a choice, none is
    /// taken.
    fn more_disks(
        &self,
        worker: &Worker,
        disks: &[Disk],
        missing: &[MissingVolumeGroup],
        remarks: &mut Vec<String>,
    ) -> Option<Vec<Disk>> {
        if missing.is_empty() || disks.len() >= DISKS {
            return None;
        }
        let catalog = self.store.catalog();
        let id = disks[0].id();
        let mut candidates = Vec::new();
        for other in self.same_moment(&catalog, id) {
            if disks.iter().any(|disk| disk.id() == &other) || !self.is_as_open(id, &other) {
                continue;
            }
            // One that cannot be opened now is as good as absent, which is said.
            let Ok(disk) = Disk::new(&self.store, &other, &self.read) else { continue };
            let request = Request::PhysicalVolumes { size: disk.size() };
            let session = Session::new(std::slice::from_ref(&disk), &self.digests);
            if let Ok((Answer::PhysicalVolumes(held), _)) = worker.ask(&request, &session) {
                drop(session);
                candidates.push((disk, held));
            }
        }
        let mut chosen = BTreeSet::new();
        for group in missing {
            for absent in &group.absent {
                let is_it = |held: &PhysicalVolumeName| {
                    let says_so = held.group.as_ref().is_none_or(|id| *id == group.id);
                    held.id == *absent && says_so && held.state.is_none_or(|state| state == group.state)
                };
                let mut found: Vec<usize> =
                    (0..candidates.len()).filter(|at| candidates[*at].1.iter().any(is_it)).collect();
                let is_near = |at: &usize| candidates[*at].0.id().chain.parent() == id.chain.parent();
                if found.iter().any(is_near) {
                    found.retain(is_near);
                }
                match found[..] {
                    [] => {}
                    [one] => {
                        chosen.insert(one);
                    }
                    _ => {
                        let names: Vec<_> = found.iter().map(|at| shown(&candidates[*at].0.id().chain)).collect();
                        let fact = format!("physical volume {absent} of {} is on several disks", group.name);
                        remarks.push(format!("{fact}, and none was taken for this guest's: {}", names.join(", ")));
                    }
                }
            }
        }
        let taken = candidates.into_iter().enumerate().filter(|(at, _)| chosen.contains(at)).map(|(_, (disk, _))| disk);
        let taken: Vec<Disk> = taken.take(DISKS - disks.len()).collect();
        (!taken.is_empty()).then_some(taken)
    }

    /// Whether whoever may read one disk may read the other: what one shows of the other is no secret then.
    fn is_as_open(&self, one: &ViewId, other: &ViewId) -> bool {
        let owner = |id: &ViewId| {
            let stat = self.store.find_view(id).ok()?.image().stat;
            Some((stat.uid, stat.gid, stat.mode & 0o444))
        };
        owner(one).is_some_and(|known| owner(other) == Some(known))
    }

    /// The views of other chains that show the moment that `id` shows: the active disks beside an active one, else those of the same name, or of
    /// the name that a snapshot of several chains gives. Neighbours come first.
    fn same_moment(&self, catalog: &Catalog, id: &ViewId) -> Vec<ViewId> {
        let directory = id.chain.parent();
        let mut chains: Vec<_> = catalog.chains().filter(|(path, _)| *path != *id.chain).collect();
        chains.sort_by_key(|(path, _)| path.parent() != directory);
        let name = without_stem(&id.name, &id.chain);
        let ids = chains.into_iter().take(CANDIDATES).filter_map(|(path, leaf)| {
            let path = Arc::new(path);
            let views = self.store.chain_views(catalog, leaf);
            let is_it = |other: &[u8]| {
                let is_same = other == &*id.name || without_stem(other, &path) == name;
                if id.is_active() { other == ACTIVE } else { is_same }
            };
            let view = views.views.iter().find(|view| view.active == id.is_active() && is_it(&view.name))?;
            Some(self.store.view_id(catalog, &path, &views, view, false))
        });
        ids.collect()
    }

    fn begin_to_rest(self: &Arc<Self>) {
        let browser = Arc::downgrade(self);
        let work = move || {
            loop {
                std::thread::sleep(PERIOD);
                let Some(browser) = browser.upgrade() else { return };
                browser.rest();
            }
        };
        if let Err(error) = std::thread::Builder::new().name("rest".into()).spawn(work) {
            tracing::warn!("what reads guests' file systems is not ended when it is idle: {error}");
        }
    }

    fn rest(&self) {
        // Those of earlier moments, too: the kernel goes on to know their files when others have taken their place here.
        let mut in_use = self.in_use.lock();
        in_use.retain(|inside| inside.strong_count() > 0);
        let insides: Vec<Arc<Inside>> = in_use.iter().filter_map(Weak::upgrade).collect();
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

/// A view's name without its chain's: disks of one directory have snapshots that are called `CHAIN-NAME`.
fn without_stem<'a>(name: &'a [u8], chain: &std::path::Path) -> &'a [u8] {
    use std::os::unix::ffi::OsStrExt;
    let stem = chain.file_name().map_or(&b""[..], OsStrExt::as_bytes);
    name.strip_prefix(stem).and_then(|rest| rest.strip_prefix(b"-")).unwrap_or(name)
}
