//! A bucket as what a store lives in: images that are read in chunks, and kept in a cache of this machine.
//!
//! It promises what a local directory does for readers: an open object is one version of it, and no byte of
//! another one is returned (R3). Every call ends by the deadline. What is in the cache needs no server.
//!
//! The tree is that of the last listing. A scan lists anew; if the server does not answer then, the last
//! listing stays. Nothing can be written: commands need names, and a bucket has none to change.

mod cache;
mod cached_object;
mod chunk_table;
mod fetch;
mod listing;

use std::collections::HashMap;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use chainfs_objects::{Bucket, Location, Patience};
use parking_lot::{Mutex, RwLock};

use crate::error::{Error, ErrorKind, Result};

use super::object_tree::{ListedObject, Listing, ObjectSource, ObjectTree};
use super::{Backend, BackendCounter, Storage};

use cache::ChunkCache;
use fetch::{OpenRemoteObject, Remote, RemoteObject, convert};
use listing::{Named, SavedListing};

/// A listing is as good as new for so long.
const FRESH: Duration = Duration::from_secs(1);

/// Whether a path is the address of a remote store, and not one of this machine.
pub fn is_address(path: &Path) -> bool {
    path.to_str().is_some_and(Location::is_meant)
}

/// How a remote store is read.
#[derive(Clone, Debug)]
pub struct RemoteOptions {
    /// The directory of the cache, which is made if it is missing; `None` for no cache.
    pub cache_dir: Option<PathBuf>,
    /// Bytes that the cache may have.
    pub cache_size: u64,
    /// Whether the server is never asked: what is in the cache is all there is.
    pub offline: bool,
    /// The time after which a request fails.
    pub deadline: Duration,
    /// How often what was fetched is made durable.
    pub durable_every: Duration,
}

/// The files of a cache.
pub struct CacheFiles {
    /// The directory that has them.
    pub files: Arc<dyn Backend>,
    /// A name for this run of the machine, which is another one after it was started again.
    pub boot: String,
}

impl Default for RemoteOptions {
    fn default() -> Self {
        Self {
            cache_dir: None,
            cache_size: 20 << 30,
            offline: false,
            deadline: Duration::from_secs(30),
            durable_every: Duration::from_secs(5),
        }
    }
}

/// A bucket as a store's backend.
pub struct RemoteStore {
    location: Location,
    /// The address, as a path: names in images may begin with it.
    name: PathBuf,
    space: u64,
    remote: Arc<Remote>,
    saved: Option<SavedListing>,
    named: RwLock<Arc<Named>>,
    /// When the last listing was made. Held while one is.
    looked: Mutex<Option<Instant>>,
    /// Objects that are open, by what is one version of one object.
    open: Mutex<HashMap<u64, Weak<RemoteObject>>>,
}

impl RemoteStore {
    /// Opens the store at an address, and lists it.
    pub fn open(address: &str, options: &RemoteOptions) -> Result<Arc<dyn Backend>> {
        let files = options.cache_dir.as_deref().map(cache_directory).transpose();
        let files = files.map_err(|error| error.within("cache_dir"))?;
        let files = files.filter(|files| {
            // What is only present would count there after another machine has lost it.
            let is_shared = files.has_remote_writers();
            if is_shared {
                let fact = "is on a network file system: nothing is cached; name a directory of this machine";
                tracing::warn!("cache_dir {} {fact}", files.given().display());
            }
            !is_shared
        });
        Self::with_cache(address, files.map(|files| CacheFiles { files, boot: boot_id() }), options)
    }

    /// The same with these files for its cache, instead of those in `cache_dir`.
    pub fn with_cache(
        address: &str,
        cache: Option<CacheFiles>,
        options: &RemoteOptions,
    ) -> Result<Arc<dyn Backend>> {
        let location = Location::parse(address).map_err(|error| convert(&error))?;
        let patience = Patience { deadline: options.deadline, ..Patience::default() };
        let bucket = if options.offline { None } else { Some(Bucket::open(&location, patience)) };
        let bucket = bucket.transpose().map_err(|error| convert(&error))?;
        let saved = cache.as_ref().and_then(|cache| SavedListing::new(&cache.files, &location.to_string()));
        let cache = cache.map(|cache| ChunkCache::open(cache, options.cache_size)).transpose()?.map(Arc::new);
        if let Some(cache) = &cache {
            keep_durable(cache, options.durable_every)?;
        }
        let shown = location.to_string();
        let store = Arc::new(Self {
            name: PathBuf::from(&shown),
            space: listing::number_of(&shown),
            location,
            remote: Arc::new(Remote::new(shown, bucket, cache)),
            saved,
            named: RwLock::default(),
            looked: Mutex::default(),
            open: Mutex::default(),
        });
        if store.remote.bucket.is_none() {
            let listing = store.saved.as_ref().and_then(SavedListing::read).ok_or_else(|| {
                let fact =
                    "has no listing in the cache; mount it once without -o offline, with the same cache_dir";
                Error::new(ErrorKind::NotFound, format!("{} {fact}", store.location))
            })?;
            *store.named.write() = Arc::new(listing);
        } else {
            store.list()?;
        }
        Ok(Arc::new(ObjectTree(store)))
    }

    fn list(&self) -> Result<()> {
        let Some(bucket) = &self.remote.bucket else { return Ok(()) };
        let found = bucket.list().map_err(|error| convert(&error))?;
        let named = Named::of(found);
        if named.listing.tag != self.named.read().listing.tag
            && !named.listing.objects.is_empty()
            && let Some(saved) = &self.saved
            && let Err(error) = saved.write(&named)
        {
            tracing::warn!("the listing of {} could not be kept for -o offline: {error}", self.location);
        }
        *self.named.write() = Arc::new(named);
        Ok(())
    }
}

impl ObjectSource for RemoteStore {
    fn name(&self) -> &Path {
        &self.name
    }

    fn space(&self) -> u64 {
        self.space
    }

    fn listing(&self) -> Arc<Listing> {
        Arc::clone(&self.named.read().listing)
    }

    fn look(&self) -> Result<()> {
        let mut looked = self.looked.lock();
        if looked.is_some_and(|when| when.elapsed() < FRESH) {
            return Ok(());
        }
        let result = self.list();
        *looked = Some(Instant::now());
        if let Err(error) = result {
            // What is open or in the cache goes on.
            tracing::warn!("{} is shown as it was listed last: {error}", self.location);
        }
        Ok(())
    }

    fn open(&self, path: &Path, object: &ListedObject) -> Result<Arc<dyn Storage>> {
        let named = Arc::clone(&self.named.read());
        let Some(version) = named.version(path, object) else { return Err(super::backend::stale(path)) };
        let id = listing::number_of(&format!("{} {version}", path.display()));
        let mut open = self.open.lock();
        if let Some(object) = open.get(&id).and_then(Weak::upgrade) {
            return Ok(Arc::new(OpenRemoteObject(object)));
        }
        let name = path.to_str().unwrap_or_default().to_owned();
        let opened = RemoteObject::new(&self.remote, name, version.to_owned(), object.len, id);
        open.retain(|_, object| object.strong_count() > 0);
        open.insert(id, Arc::downgrade(&opened));
        Ok(Arc::new(OpenRemoteObject(opened)))
    }

    fn cached(&self, path: &Path, object: &ListedObject) -> Option<u64> {
        let named = Arc::clone(&self.named.read());
        let (cache, version) = (self.remote.cache.as_ref()?, named.version(path, object)?);
        Some(cache.present(&self.remote.shown, path.to_str()?, version, object.len))
    }

    fn counters(&self) -> Vec<BackendCounter> {
        let mut found = Vec::new();
        let mut add = |name, help, value: &AtomicU64| {
            found.push(BackendCounter { name, help, value: value.load(Ordering::Relaxed) });
        };
        if let Some(cache) = &self.remote.cache {
            add("chainfs_remote_evicted_bytes_total", "Bytes evicted from the cache.", &cache.evicted);
        }
        let Some(bucket) = &self.remote.bucket else { return found };
        let counters = bucket.counters();
        add("chainfs_remote_requests_total", "Requests sent to the remote store.", &counters.requests);
        add("chainfs_remote_received_bytes_total", "Bytes of objects received.", &counters.received);
        add("chainfs_remote_retries_total", "Attempts after a failed one.", &counters.retries);
        add("chainfs_remote_hedges_total", "Second requests for slow reads.", &counters.hedges);
        add("chainfs_remote_hedges_won_total", "Second requests answered first.", &counters.hedges_won);
        add("chainfs_remote_timeouts_total", "Attempts without an answer in time.", &counters.timeouts);
        let help = "Replies that were not what was asked for.";
        add("chainfs_remote_wrong_replies_total", help, &counters.wrong_replies);
        let help = "Replies that an object is another version than was opened.";
        add("chainfs_remote_changed_total", help, &counters.changed);
        let help = "Replies that credentials are missing, expired or not enough.";
        add("chainfs_remote_denied_total", help, &counters.denied);
        add("chainfs_remote_failures_total", "Requests that failed in the end.", &counters.failures);
        found
    }
}

/// Opens the directory of the cache. Only its owner may look into it: it has the bytes of disks.
fn cache_directory(path: &Path) -> Result<Arc<dyn Backend>> {
    if !path.is_dir() {
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
        made.map_err(|error| Error::io(format!("making {}", path.display()), error))?;
    }
    super::LocalDirectory::open(path)
}

/// The run of this machine: what is in the page cache is lost when it changes.
fn boot_id() -> String {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
    // Without it nothing counts that is not durable.
    text.map_or_else(|_| format!("process {}", std::process::id()), |text| text.trim().to_owned())
}

/// Makes durable what was fetched, as long as the cache is used.
fn keep_durable(cache: &Arc<ChunkCache>, every: Duration) -> Result<()> {
    let cache = Arc::downgrade(cache);
    let run = move || {
        loop {
            std::thread::sleep(every);
            let Some(cache) = cache.upgrade() else { return };
            if let Err(error) = cache.make_durable() {
                tracing::warn!("what was fetched counts only until the machine stops: {error}");
            }
        }
    };
    let thread = std::thread::Builder::new().name("cache".into()).spawn(run);
    thread.map(drop).map_err(|error| Error::io("starting a thread for the cache", error))
}
