//! The generated files: trees, descriptions, problems and counters.
//!
//! A file is generated on first access and cached while its catalog is current, so that the size from stat(2)
//! is the size that is read.

use std::num::NonZero;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use lru::LruCache;
use parking_lot::Mutex;

use super::kernel_map::KernelMapStatistics;
use crate::report::metrics::{MetricKind, Metrics};
use crate::report::text::TextOptions;
use crate::report::{html, json, store as report, svg, text, trash};
use crate::store::{Catalog, ImageIndex, Store, TrashItem};

use super::node::{ChainDocument, StoreDocument};
use super::pieces::Pieces;

/// Number of files in the cache. Those of a chain are small, those of the store few.
const FILES_CACHED: usize = 8192;
/// Bytes of files in the cache.
const CACHED_LEN: usize = 32 << 20;
/// Number of cached lists of chains: for the administrator and a few users.
const LISTS_CACHED: usize = 4;

/// The file with the metrics, beneath the mount point.
pub const METRICS_PATH: &str = ".chainfs/metrics";
/// The metric that is the process id of the daemon.
pub const PROCESS_METRIC: &str = "chainfs_process_id";

/// Counters of a mount since its start.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Reads of disks.
    pub reads: AtomicU64,
    /// Bytes of disks that were read.
    pub read_bytes: AtomicU64,
    /// Writes to disks.
    pub writes: AtomicU64,
    /// Bytes of disks that were written.
    pub write_bytes: AtomicU64,
    /// Requests that failed with an error other than "no such name".
    pub errors: AtomicU64,
    /// Disks opened.
    pub opens: AtomicU64,
}

/// Catalog, period of the locks shown, and file.
type InfoFileKey = ((u64, u64), Option<(ImageIndex, ChainDocument)>, Option<StoreDocument>);

/// How long a tree's information about locks is cached.
const LOCKS_TTL: Duration = Duration::from_secs(2);

/// Cached files by key, and their total size in bytes.
type CachedFiles = (LruCache<InfoFileKey, Arc<[u8]>>, usize);

/// The info files of a mount.
#[derive(Debug)]
pub(super) struct InfoFiles {
    cached: Mutex<CachedFiles>,
    /// Lists of chains, by catalog.
    chains: Mutex<LruCache<u64, Arc<Pieces>>>,
    started: Instant,
}

impl InfoFiles {
    pub(super) fn new() -> Self {
        let cached = Mutex::new((LruCache::new(NonZero::new(FILES_CACHED).expect("not zero")), 0));
        let chains = Mutex::new(LruCache::new(NonZero::new(LISTS_CACHED).expect("not zero")));
        Self { cached, chains, started: Instant::now() }
    }

    /// The version of a file: the catalog's serial number and, for trees with locks, a period of time.
    fn subject(&self, catalog: &Catalog, shows_locks: bool) -> (u64, u64) {
        let moment = if shows_locks { self.started.elapsed().as_secs() / LOCKS_TTL.as_secs() } else { 0 };
        (catalog.serial, moment)
    }

    /// The list of all chains.
    pub(super) fn chains(&self, store: &Arc<Store>, catalog: &Arc<Catalog>) -> Arc<Pieces> {
        if let Some(cached) = self.chains.lock().get(&catalog.serial) {
            return Arc::clone(cached);
        }
        let made = Arc::new(Pieces::new(report::ChainsJson::new(store, catalog)));
        self.chains.lock().put(catalog.serial, Arc::clone(&made));
        made
    }

    /// A file of the store.
    pub(super) fn of_store(
        &self,
        store: &Store,
        catalog: &Catalog,
        document: StoreDocument,
        live: &report::Live<'_>,
        metrics: impl FnOnce() -> String,
        may_see: &dyn Fn(&TrashItem) -> bool,
    ) -> Arc<[u8]> {
        let shares = |chain: &Path| report::share(live, chain);
        let make = || match document {
            StoreDocument::TreeText => {
                text::forest(&report::forest_with_progress(store, catalog, &shares), &TextOptions::local())
            }
            StoreDocument::TreeSvg => svg::forest(
                &report::forest_with_progress(store, catalog, &shares),
                &TimeZone::system(),
                false,
            ),
            StoreDocument::Page => html::page(&report::store_page(store, catalog, live)),
            StoreDocument::Readme => report::readme(store, catalog, live),
            StoreDocument::Problems => report::problems_text(catalog) + &report::locked_text(store, catalog),
            StoreDocument::Chains | StoreDocument::Metrics | StoreDocument::Trash => String::new(),
        };
        match document {
            StoreDocument::Metrics => return metrics().into_bytes().into(),
            StoreDocument::Trash => {
                let text = match store.trash() {
                    Ok(mut items) => {
                        items.retain(may_see);
                        trash::listed(&items, &TimeZone::system())
                    }
                    Err(error) => trash::unlisted(&error),
                };
                return text.into_bytes().into();
            }
            _ => {}
        }
        let shows_locks = matches!(
            document,
            StoreDocument::TreeText | StoreDocument::TreeSvg | StoreDocument::Page | StoreDocument::Problems
        );
        self.get((self.subject(catalog, shows_locks), None, Some(document)), make)
    }

    /// A file of a chain; `None` for the problem file of a chain without problems.
    pub(super) fn of_chain(
        &self,
        store: &Store,
        catalog: &Catalog,
        leaf: ImageIndex,
        document: ChainDocument,
        live: &report::Live<'_>,
    ) -> Option<Arc<[u8]>> {
        let shares = |chain: &Path| report::share(live, chain);
        if document == ChainDocument::Problem {
            return report::chain_problem(catalog, leaf).map(|text| text.into_bytes().into());
        }
        let make = || match document {
            ChainDocument::Chain => json::pretty(&report::chain_info_in_short(store, catalog, leaf)),
            ChainDocument::TreeText => text::forest(
                &report::chain_forest_with_progress(store, catalog, leaf, &shares),
                &TextOptions::local(),
            ),
            ChainDocument::TreeSvg => svg::forest(
                &report::chain_forest_with_progress(store, catalog, leaf, &shares),
                &TimeZone::system(),
                false,
            ),
            ChainDocument::Page => html::page(&report::chain_page(store, catalog, leaf, live)),
            ChainDocument::Problem | ChainDocument::OperatingSystem => String::new(),
        };
        let shows_locks =
            matches!(document, ChainDocument::TreeText | ChainDocument::TreeSvg | ChainDocument::Page);
        Some(self.get((self.subject(catalog, shows_locks), Some((leaf, document)), None), make))
    }

    fn get(&self, key: InfoFileKey, text: impl FnOnce() -> String) -> Arc<[u8]> {
        if let Some(cached) = self.cached.lock().0.get(&key) {
            return Arc::clone(cached);
        }
        let made: Arc<[u8]> = text().into_bytes().into();
        let mut cached = self.cached.lock();
        let (documents, len) = &mut *cached;
        *len += made.len();
        if let Some((_, old)) = documents.push(key, Arc::clone(&made)) {
            *len -= old.len();
        }
        while *len > CACHED_LEN && documents.len() > 1 {
            let Some((_, old)) = documents.pop_lru() else { break };
            *len -= old.len();
        }
        made
    }
}

/// The counters in Prometheus' text format.
pub(super) fn metrics(
    store: &Store,
    catalog: &Catalog,
    counters: &Counters,
    open: usize,
    inodes: usize,
    kernel_maps: KernelMapStatistics,
) -> String {
    let (tables, clusters, maps, descriptors) = store.usage();
    let mut metrics = Metrics::new();
    let mut counter = |name, help: &str, value: &AtomicU64| {
        metrics.family(name, MetricKind::Counter, help).sample(&[], value.load(Ordering::Relaxed));
    };
    counter("chainfs_reads_total", "Reads of disks answered by the daemon.", &counters.reads);
    counter("chainfs_read_bytes_total", "Bytes of disks read through the daemon.", &counters.read_bytes);
    let (writers, flushes) = store.writer_usage();
    counter("chainfs_writes_total", "Writes to disks.", &counters.writes);
    counter("chainfs_write_bytes_total", "Bytes of disks written.", &counters.write_bytes);
    counter(
        "chainfs_flushes_total",
        "Flushes of disks, asked for or by the clock.",
        &AtomicU64::new(flushes),
    );
    counter("chainfs_opens_total", "Disks opened.", &counters.opens);
    counter("chainfs_errors_total", "Requests answered with an error.", &counters.errors);
    counter("chainfs_kernel_maps_total", "Kernel maps made.", &AtomicU64::new(kernel_maps.made));
    for root in store.roots() {
        for found in root.counters() {
            counter(found.name, found.help, &AtomicU64::new(found.value));
        }
    }
    let mut gauge = |name, help: &str, value: usize| {
        metrics.family(name, MetricKind::Gauge, help).sample(&[], value);
    };
    gauge(PROCESS_METRIC, "The process that serves the mount.", std::process::id() as usize);
    gauge("chainfs_images", "Images of the store.", catalog.images.len());
    gauge("chainfs_chains", "Chains of the store.", catalog.chains().count());
    gauge("chainfs_problems", "Lines of problems.txt.", catalog.problems.len());
    gauge("chainfs_open_handles", "Files and directories open in the mount.", open);
    gauge("chainfs_inodes", "Inode numbers given so far.", inodes);
    gauge("chainfs_writers", "Active disks that are being written.", writers);
    gauge("chainfs_kernel_maps", "Disks that the kernel can read by itself now.", kernel_maps.maps as usize);
    let help = "Bytes on disk of these maps.";
    gauge("chainfs_kernel_map_bytes", help, kernel_maps.bytes as usize);
    gauge("chainfs_open_files", "Image files open now.", descriptors);
    metrics
        .family("chainfs_cache_bytes", MetricKind::Gauge, "Bytes held in caches.")
        .sample(&[("cache", "tables")], tables)
        .sample(&[("cache", "clusters")], clusters)
        .sample(&[("cache", "maps")], maps);
    metrics.finish()
}
