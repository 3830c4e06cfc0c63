//! The store: a directory of images, or one image, and all views of it.
//!
//! Promises: only files beneath the roots are ever opened; a catalog is immutable and replaced as a whole; no
//! file is opened before its first access, nor for writing before the first writer. Other modules show the
//! store to users.

mod active;
mod address;
mod bind;
mod build;
mod catalog;
mod control_dir;
mod definitions;
mod describe;
mod disk;
mod domains;
mod encoded;
mod evidence;
mod file_names;
mod find_uses;
mod flusher;
mod former_names;
mod freeze_list;
mod identity;
mod intent;
mod intents;
mod job_image;
mod judge;
mod kept_states;
mod known_intents;
mod leftovers;
mod mapped_view;
mod names;
mod open;
mod open_view;
mod operation;
mod options;
mod owners;
mod plain;
mod possible_uses;
mod resolve;
mod rights;
mod scan;
#[cfg(test)]
pub(crate) mod testing;
mod trash;
mod trust;
mod users;
mod views;
mod visible;
mod watch;

use std::collections::HashMap;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use lru::LruCache;
use parking_lot::{Mutex, RwLock};

use crate::cache::Weighted;
use crate::chain::{FlatCache, View};
use crate::error::{Error, Result};
use crate::format::Frozen;
use crate::image::Caches;
use crate::io::{
    Backend, Descriptors, Directory as Names, Expect, LocalDirectory, MountPoints, NoNames, ObjectId,
    ObjectStat, OpenDirectory, RemoteStore, StoreFile, is_address,
};
use crate::units::Stability;

pub use active::{
    Access, ActiveAttributes, ActiveHandle, ActiveJob, FormerTop, Mirror, NewTopFile, PointInTimeView,
    PreparedActiveCommit, PreparedOverlay, Quiesced,
};
pub use bind::FileBinding;
pub use catalog::{BackingLink, Catalog, CatalogDirectory, ImageEntry, ImageIndex};
pub use control_dir::{ControlDir, MARKER, OpenBackend};
pub use describe::{BadHeader, DetectedContent, ForeignImage, Qcow2Description};
pub use disk::OpenDisk;
pub use domains::{DomainSnapshot, ManagedFile};
pub(crate) use evidence::DataFileRef;
pub use evidence::{Digest, Evidence, FileRef, SAMPLES, SectorSample};
pub use file_names::{INVALIDATED_EXTENSION, layer_name, shown};
pub use flusher::Flusher;
pub use freeze_list::FROZEN_NOTES;
pub use identity::{FoundView, ViewId, ViewIdentity, stale};
pub use intent::Intent;
pub use intents::{FoundIntent, OwnedIntent};
pub use job_image::JobImage;
pub use judge::AccessJudge;
pub(crate) use leftovers::{command_name, draft_name, is_draft};
pub use mapped_view::{MappedView, StillThere};
pub use names::{ACTIVE, README, STORE_DIRECTORY, encode};
pub use open::DeletionGuard;
pub use open_view::{OpenView, ViewPart};
pub(crate) use operation::Effects;
pub use operation::{
    CommitOperation, CopyOperation, NewTop, Operation, PullOperation, ShrinkOperation, SnapshotOperation,
    invalidated_name,
};
pub use options::{Format, StoreOptions};
pub use possible_uses::PossibleUse;
pub use resolve::{BrokenLink, StorePath, UnresolvedName};
pub use rights::Subject;
pub use scan::Problem;
pub use trash::TrashItem;
pub use views::{ChainView, ChainViews};
pub use watch::Watcher;

use active::ActiveDisks;

use disk::OpenDisks;
use domains::Domains;
use former_names::FormerNames;
use freeze_list::FreezeList;
use open::OpenImages;
use owners::Owners;
use plain::PlainList;
use scan::{KnownFiles, Scan, ScanBasis, ScanContext};

/// Bytes of cached names of views.
const CHAINS_KEPT_LEN: usize = 16 << 20;
/// How many views' flattened maps stay cached after their last use.
const VIEWS_KEPT: usize = 256;

/// How many files that commands have named are remembered.
const INTRODUCED: usize = 16;
/// Scans in a row while names change: the result of the last one counts however they change, and the next
/// event makes another scan.
const SCANS: usize = 4;

/// An open store.
pub struct Store {
    given: PathBuf,
    roots: Vec<Arc<dyn Backend>>,
    options: StoreOptions,
    /// Whether its names can be changed.
    can_change: bool,
    /// For a store that is one image: its current path. A leaf.
    single: RwLock<Option<StorePath>>,
    guard: ControlDir,
    catalog: RwLock<Arc<Catalog>>,
    /// The results of the last scan. Held during a scan: one at a time.
    known: Mutex<Arc<KnownFiles>>,
    /// The files that have been seen without qcow2's magic. A leaf.
    plain: Mutex<PlainList>,
    /// The store around it, once it was needed. Taken before all locks of a scan.
    whole: Mutex<Option<Arc<Store>>>,
    /// The link by which the user has named the single image.
    by_link: Option<StorePath>,
    watches: Option<watch::Watches>,
    descriptors: Arc<Descriptors>,
    caches: Arc<Caches>,
    flat: Arc<FlatCache>,
    opened: OpenImages,
    active: ActiveDisks,
    disks: OpenDisks,
    /// Commands that are changing files. A leaf.
    changing: Mutex<Vec<Weak<kept_states::ChangingFiles>>>,
    /// Views that the kernel reads by itself. A leaf.
    mapped: Mutex<Vec<Weak<MappedView>>>,
    /// Files that a command has named, and that no scan or header may reach. A leaf.
    introduced: Mutex<LruCache<StorePath, ()>>,
    /// States of layers that jobs of this process have given another digest without changing their bytes. A
    /// leaf.
    same_states: Mutex<HashMap<u64, u64>>,
    chain_views: Mutex<Weighted<(u64, ImageIndex), Arc<ChainViews>>>,
    /// Held while notes of the trash are rewritten: jobs end without the store's lock. A leaf.
    trash_notes: Mutex<()>,
    domains: Domains,
    /// Locked while `catalog` is replaced.
    former_names: Mutex<FormerNames>,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("given", &self.given).finish_non_exhaustive()
    }
}

impl Store {
    /// Opens and scans the store at `path`: a directory, one image file, or an address of either in object
    /// storage.
    pub fn open(path: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        if is_address(path) {
            return Self::open_address(path, options);
        }
        Self::open_on(path, options, &LocalDirectory::open)
    }

    /// The same; `open` opens the directories that the store consists of.
    pub fn open_on(path: &Path, options: StoreOptions, open: &OpenBackend<'_>) -> Result<Arc<Self>> {
        let metadata = std::fs::metadata(path)
            .map_err(|error| Error::io(format!("opening {}", path.display()), error))?;
        let (directory, single) = if metadata.is_dir() {
            (path.to_path_buf(), None)
        } else {
            // The user's path may contain links; the image's directory is the one of the image itself.
            let absolute = path.canonicalize().map_err(|error| Error::io("finding the image", error))?;
            let name = absolute.file_name().unwrap_or_default().into();
            let directory = absolute.parent().unwrap_or(Path::new("/")).to_path_buf();
            (directory, Some(StorePath { root: 0, path: name }))
        };
        let mut roots = vec![open(&directory)?];
        let link = if single.is_some() { link_of(path, &directory)? } else { None };
        let guard = match &single {
            None => ControlDir::of_directory(&roots[0], open)?,
            Some(_) => ControlDir::of_image(&roots[0], options.whole_store.as_deref(), open)?,
        };
        for directory in &options.backing_dirs {
            let root = match directory.to_str().filter(|_| is_address(directory)) {
                Some(address) => RemoteStore::open(address, &options.remote),
                None => open(directory),
            };
            roots.push(root.map_err(|error| error.within("backing_dir"))?);
        }
        let by_link = match link {
            Some((directory, path)) => {
                roots.push(open(&directory)?);
                Some(StorePath { root: roots.len() - 1, path })
            }
            None => None,
        };
        let given = std::path::absolute(path).map_err(|error| Error::io("finding the store", error))?;
        Self::new(given, roots, guard, (single, by_link), options)
    }

    /// Opens and scans the store that is all of `tree`.
    pub fn open_tree(tree: Arc<dyn Backend>, options: StoreOptions) -> Result<Arc<Self>> {
        let (given, guard) = (tree.given().to_path_buf(), ControlDir::of_tree(&tree));
        Self::new(given, vec![tree], guard, (None, None), options)
    }

    fn new(
        given: PathBuf,
        roots: Vec<Arc<dyn Backend>>,
        guard: ControlDir,
        (single, by_link): (Option<StorePath>, Option<StorePath>),
        mut options: StoreOptions,
    ) -> Result<Arc<Self>> {
        // Commands rest on names: without them nothing is begun, and disks are not written either.
        let can_change = roots[0].names().is_some() && guard.root.names().is_some();
        options.read_only |= !can_change;
        // Half for the flattened maps, a quarter each for tables and for decompressed clusters.
        let quarter = (options.cache / 4) as usize;
        let store = Arc::new(Self {
            given,
            watches: if options.notify { watch::Watches::new(&*roots[0]) } else { None },
            roots,
            options,
            can_change,
            single: RwLock::new(single),
            guard,
            catalog: RwLock::default(),
            known: Mutex::default(),
            plain: Mutex::default(),
            whole: Mutex::default(),
            by_link,
            descriptors: Descriptors::for_process(),
            caches: Caches::new(quarter, quarter),
            flat: Arc::new(FlatCache::new(2 * quarter)),
            opened: OpenImages::new(NonZero::new(VIEWS_KEPT).expect("not zero")),
            active: ActiveDisks::default(),
            disks: OpenDisks::default(),
            changing: Mutex::default(),
            mapped: Mutex::default(),
            introduced: Mutex::new(LruCache::new(NonZero::new(INTRODUCED).expect("not zero"))),
            same_states: Mutex::default(),
            chain_views: Mutex::new(Weighted::new(CHAINS_KEPT_LEN)),
            trash_notes: Mutex::default(),
            domains: Domains::default(),
            former_names: Mutex::default(),
        });
        store.rescan()?;
        Ok(store)
    }

    /// The store as the user named it, made absolute.
    pub fn given(&self) -> &Path {
        &self.given
    }

    /// The directories beneath which files are opened; the first is the store's own.
    pub fn roots(&self) -> &[Arc<dyn Backend>] {
        &self.roots
    }

    /// The directory of its intents and its lock.
    pub fn guard(&self) -> &ControlDir {
        &self.guard
    }

    /// The limit of its open descriptors.
    pub fn descriptors(&self) -> Arc<Descriptors> {
        Arc::clone(&self.descriptors)
    }

    /// The names beneath the store's own directory.
    pub fn names(&self) -> Arc<dyn Names> {
        names_of(&*self.roots[0])
    }

    /// The names beneath the guarded directory.
    pub fn guard_names(&self) -> Arc<dyn Names> {
        names_of(&*self.guard.root)
    }

    /// Its options.
    pub fn options(&self) -> &StoreOptions {
        &self.options
    }

    /// Why nothing of it is changed, if so: a sentence's end that follows the store's name.
    pub fn read_only(&self) -> Option<&'static str> {
        if !self.can_change {
            return Some("lies where nothing can be made or renamed; copy it to a directory first");
        }
        self.options.read_only.then_some("is mounted read-only; mount it without -o ro")
    }

    /// The store as of the last scan.
    pub fn catalog(&self) -> Arc<Catalog> {
        Arc::clone(&self.catalog.read())
    }

    /// Scans again, and returns the duration.
    pub fn rescan(&self) -> Result<Duration> {
        let start = Instant::now();
        let mut known = self.known.lock();
        for turn in 1.. {
            let (mut catalog, now_known, basis) = self.scan_once(&known)?;
            *known = now_known;
            if basis.holds(&*self.roots[0]) || turn == SCANS {
                self.former_names.lock().follow(&self.catalog(), &mut catalog);
                let catalog = Arc::new(catalog);
                self.opened.retire(&catalog);
                self.active.tell_of_gone(&catalog);
                self.keep_states_of_commands(&catalog);
                *self.catalog.write() = catalog;
                break;
            }
        }
        Ok(start.elapsed())
    }

    fn scan_once(&self, known: &KnownFiles) -> Result<(Catalog, Arc<KnownFiles>, ScanBasis)> {
        let single = self.single.read().clone();
        self.plain.lock().refresh(&self.guard);
        let visit = |path: &Path, fd: &dyn OpenDirectory| {
            if let Some(watches) = &self.watches {
                watches.add(StorePath { root: 0, path: path.to_path_buf() }, fd);
            }
        };
        let ways = ScanContext { known, plain: &self.plain, prefix: &self.guard.prefix, visit: &visit };
        let mut scan = match &single {
            None => scan::scan(&*self.roots[0], &ways)?,
            Some(place) => {
                let directory = StorePath { root: 0, path: PathBuf::new() };
                if let (Some(watches), Some(fd)) =
                    (&self.watches, self.roots[0].open_directory(Path::new(""), MountPoints::Enter)?)
                {
                    watches.add(directory, &*fd);
                }
                Scan { files: vec![scan::describe_place(&*self.roots[0], place, &ways)?], ..Scan::default() }
            }
        };
        self.restore_intents();
        if let Some(watches) = &self.watches {
            self.guard.own_directories().iter().for_each(|directory| watches.add_own(&**directory));
            self.options.domains.iter().for_each(|directory| watches.add_definitions(directory));
        }
        let previous = self.catalog();
        let basis = std::mem::take(&mut scan.basis);
        scan.introduced = self.introduced.lock().iter().map(|(place, ())| place.clone()).collect();
        if let Some(damage) = self.plain.lock().damage() {
            scan.problems.push(Problem { path: plain::PLAIN.into(), sentence: damage.to_owned() });
        }
        let which = (single.is_some(), self.by_link.clone());
        let managed = self.domains.files(&self.options, &self.roots);
        let settings = (&self.options, &managed);
        let (catalog, now_known, directories) =
            build::build(&self.roots, &self.guard, settings, scan, &ways, &previous, which);
        self.remember_plain();
        for place in directories {
            // A missing directory cannot be watched.
            if let (Some(watches), Ok(Some(fd))) =
                (&self.watches, self.roots[place.root].open_directory(&place.path, MountPoints::Skip))
            {
                watches.add(place, &*fd);
            }
        }
        Ok((catalog, now_known, basis))
    }

    /// Writes those intents of this process again whose files another process has removed.
    pub(crate) fn restore_intents(&self) {
        self.guard.restore(&*self.guard_names());
    }

    /// Records the files that have been seen without qcow2's magic, where that is wanted and possible.
    fn remember_plain(&self) {
        let mut plain = self.plain.lock();
        if !self.options.remember || self.options.read_only || !plain.is_ahead() {
            return;
        }
        if let Err(error) = plain.save(&self.guard, &*self.guard_names()) {
            tracing::info!("the list of raw files lasts only as long as this mount: {error}");
        }
    }

    /// The views of a chain, computed once per catalog.
    pub fn chain_views(&self, catalog: &Catalog, leaf: ImageIndex) -> Arc<ChainViews> {
        let key = (catalog.serial, leaf);
        if let Some(views) = self.chain_views.lock().get(&key) {
            return views;
        }
        let mut views = ChainViews::new(catalog, leaf);
        views.rename_states(&self.same_states.lock());
        let views = Arc::new(views);
        self.chain_views.lock().put(key, Arc::clone(&views), views.weight());
        views
    }

    /// Records that the disk of a store that is one image is at `path` from now on.
    pub(in crate::store) fn follow_single(&self, path: &Path) {
        if let Some(place) = &mut *self.single.write() {
            place.path = path.to_path_buf();
        }
    }

    /// The current attributes of an image file, or those of the scan if it is gone.
    pub fn stat_now(&self, image: &ImageEntry) -> ObjectStat {
        match self.roots[image.place.root].stat(&image.place.path) {
            Ok(stat) if stat.id == image.stat.id => stat,
            _ => image.stat,
        }
    }

    /// The names of open views to which a change of the image `base` would be visible, unless all of `cover`
    /// lie above it.
    pub fn exposed(&self, base: ObjectId, cover: &[ObjectId]) -> Vec<String> {
        self.opened.exposed(base, cover)
    }

    /// The disk that the layers `from..to` of a view make by themselves; `None` if the range is empty.
    pub fn part_of(&self, view: &View, from: usize, to: usize) -> Option<Arc<View>> {
        let stability = Stability::live_if(view.is_live() && from == 0);
        (from < to).then(|| View::new(view.layers()[from..to].to_vec(), stability, &self.flat))
    }

    /// Why a frozen raw file cannot be recorded, if so.
    pub(crate) fn check_notes(&self) -> Result<()> {
        FreezeList::check(&self.guard)
    }

    /// Why the list of frozen raw images cannot be used, if so.
    pub fn notes_problem(&self) -> Option<String> {
        FreezeList::read(&self.guard).problem()
    }

    /// Discards an unusable list of frozen raw images. Under the store's lock.
    pub fn forget_notes(&self) -> Result<()> {
        freeze_list::forget(&self.guard, &*self.guard_names())
    }

    /// Records, durably, whether a raw file is frozen. `path` is relative to the guarded directory.
    pub fn note_frozen(&self, path: &Path, frozen: Option<&Frozen>) -> Result<()> {
        FreezeList::change(&self.guard, &*self.guard_names(), path, frozen)
    }

    /// A file of the store, opened on its first read.
    pub fn file(&self, place: &StorePath, seen: &ObjectStat, expect: Expect) -> Arc<StoreFile> {
        StoreFile::new(&self.descriptors, &self.roots[place.root], &place.path, seen, expect)
    }

    /// The file that `name` in a header at `from` would name, or the rest of a sentence on why there is none.
    pub(crate) fn named_by(
        &self,
        from: &StorePath,
        name: &[u8],
    ) -> std::result::Result<StorePath, UnresolvedName> {
        resolve::resolve(&self.roots, &self.options.maps, from, name)
    }

    /// Why a name of `to` would not count in an image at `from` that the user `owner` owns, as the rest of a
    /// sentence.
    pub(crate) fn uncounted(&self, owner: u32, from: &StorePath, to: &StorePath) -> Option<String> {
        Owners::new(&self.roots, &self.options).refuse(owner, from, to)
    }

    /// For a store that is one image, or lies in a marked one: all images beneath the uppermost marked
    /// directory, or the one that the user has named, as of now.
    pub(crate) fn whole(&self) -> Result<Option<Arc<Catalog>>> {
        let is_single = self.catalog().single.is_some();
        let own = self.guard.root.canonical();
        let stated = self.options.whole_store.is_some();
        let around = control_dir::marked(own).last().filter(|_| !stated).unwrap_or(own);
        if !self.guard.is_whole || (!is_single && around == self.roots[0].canonical()) {
            return Ok(None);
        }
        let mut whole = self.whole.lock();
        if let Some(store) = &*whole {
            store.rescan()?;
            return Ok(Some(store.catalog()));
        }
        let options = StoreOptions {
            notify: false,
            remember: false,
            read_only: true,
            whole_store: None,
            ..self.options.clone()
        };
        let store = whole.insert(Self::open(around, options)?);
        Ok(Some(store.catalog()))
    }

    /// Adds a file anywhere beneath the roots to the next scans.
    pub(crate) fn introduce(&self, place: StorePath) {
        self.introduced.lock().put(place, ());
    }

    /// The access rights to its files, as of now.
    pub fn judge(&self) -> AccessJudge {
        AccessJudge::new(&self.roots)
    }

    /// The path of an image on the host.
    pub fn host_path(&self, place: &StorePath) -> PathBuf {
        self.roots[place.root].canonical().join(&place.path)
    }

    /// Bytes of memory in the caches of tables, decompressed clusters and flattened maps, and the
    /// number of image files open now.
    pub fn usage(&self) -> (usize, usize, usize, usize) {
        let (tables, clusters) = self.caches.weights();
        (tables, clusters, self.flat.weight(), self.descriptors.open_count())
    }
}

/// The names of a tree; every change of them is refused where they cannot be changed.
fn names_of(tree: &dyn Backend) -> Arc<dyn Names> {
    tree.names().unwrap_or_else(|| Arc::new(NoNames))
}

/// The directory and name of the link by which the user names an image in another directory: names in its
/// header are relative to that directory, as in QEMU.
fn link_of(path: &Path, directory: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
    let fail = |error| Error::io("finding the image", error);
    let absolute = std::path::absolute(path).map_err(fail)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else { return Ok(None) };
    let parent = parent.canonicalize().map_err(fail)?;
    Ok((parent != directory).then(|| (parent, name.into())))
}
