//! Scans during which names change. A disk that has a chain before and afterwards has it in every scan.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use chainfs::error::Result;
use chainfs::io::{DirEntry, LocalFile, ObjectStat, ObjectVersion, OpenDirectory, OpenObject};
use chainfs::ops::Engine;
use chainfs::store::{Store as Opened, StoreOptions};
use support::host::{Hands, wrap};
use support::lab::run;
use support::*;

/// Work that is done once, right after a scan has looked at the entry of this name.
type Meddling = Arc<Mutex<Option<(&'static str, Box<dyn FnOnce() + Send>)>>>;

/// Hands that change names while a directory is scanned.
struct Meddler(Meddling);

impl Hands for Meddler {
    fn listing(&self, inner: Box<dyn OpenDirectory>) -> Box<dyn OpenDirectory> {
        Box::new(MeddledListing { inner, meddling: Arc::clone(&self.0) })
    }
}

struct MeddledListing {
    inner: Box<dyn OpenDirectory>,
    meddling: Meddling,
}

impl OpenDirectory for MeddledListing {
    fn stat_entry(&self, name: &OsStr) -> Result<Option<ObjectStat>> {
        let found = self.inner.stat_entry(name);
        let due = self.meddling.lock().unwrap().take_if(|(at, _)| name == *at);
        if let Some((_, meddle)) = due {
            meddle();
        }
        found
    }

    fn list(&self) -> Result<Vec<DirEntry>> {
        self.inner.list()
    }

    fn version(&self) -> Result<ObjectVersion> {
        self.inner.version()
    }

    fn open_entry(&self, name: &OsStr) -> Result<Option<Arc<dyn OpenObject>>> {
        self.inner.open_entry(name)
    }

    fn check_writable(&self) -> std::io::Result<()> {
        self.inner.check_writable()
    }

    fn local_file(&self) -> Option<LocalFile> {
        self.inner.local_file()
    }
}

fn options() -> StoreOptions {
    StoreOptions { notify: false, ..StoreOptions::default() }
}

/// web.qcow2 on base.qcow2, and the same beneath `dir`.
fn store_with_disks() -> Store {
    let store = Store::new();
    fs::create_dir(store.path("dir")).expect("a directory");
    for directory in ["", "dir/"] {
        store.create(&format!("{directory}base.qcow2"), MIB, "");
        store.overlay(&format!("{directory}web.qcow2"), "base.qcow2", "qcow2", "");
    }
    store
}

/// Scans the store while `meddle` is done after the entry `at` was looked at; returns the layers of both
/// disks.
fn layers_after(store: &Store, at: &'static str, meddle: impl FnOnce() + Send + 'static) -> Vec<Vec<String>> {
    let meddling = Meddling::default();
    let open = |path: &Path| wrap(path, Meddler(Arc::clone(&meddling)));
    let opened = Opened::open_on(&store.root(), options(), &open).expect("a store");
    *meddling.lock().unwrap() = Some((at, Box::new(meddle)));
    opened.rescan().expect("a scan");
    assert!(meddling.lock().unwrap().is_none(), "nothing has happened during the scan");
    let catalog = opened.catalog();
    let chains: Vec<_> = catalog.chains().map(|(path, _)| path).collect();
    assert!(catalog.problems.is_empty(), "{:?}", catalog.problems);
    assert_eq!(chains.len(), 2, "{chains:?}");
    let layers = |chain: &str| {
        let leaf = catalog.chain(Path::new(chain)).unwrap_or_else(|| panic!("no {chain}: {chains:?}"));
        let name = |index: &usize| catalog.images[*index].place.path.display().to_string();
        catalog.layers(leaf).iter().map(name).collect()
    };
    vec![layers("web"), layers("dir/web")]
}

#[test]
fn a_disk_keeps_its_chain_when_a_command_begins_and_ends_during_a_scan() {
    // The snapshot's name is sorted before the disk's, or behind.
    for snapshot in ["a", "z"] {
        // Before the first file was looked at, between two, and after the last.
        for at in ["base.qcow2", "web.qcow2"] {
            for (directory, chain) in [("", "web"), ("dir/", "dir/web")] {
                let context = format!("{snapshot} of {chain} at {at}");
                let store = store_with_disks();
                let root = store.root();
                let layers = layers_after(&store, at, move || {
                    let other = Opened::open(&root, options()).expect("a store");
                    run(&Engine::new(&other), chain, &format!("snapshot {snapshot}")).expect("a snapshot");
                });
                let ours = [format!("{directory}web.qcow2"), format!("{directory}{snapshot}.qcow2")];
                let ours = ours.into_iter().chain([format!("{directory}base.qcow2")]).collect::<Vec<_>>();
                assert!(layers.contains(&ours), "{context}: {layers:?}");
            }
        }
    }
}

#[test]
fn a_disk_keeps_its_chain_when_its_second_name_becomes_the_only_one() {
    for snapshot in ["a", "z"] {
        let store = store_with_disks();
        // As in the midst of a snapshot whose notes are gone at the end of the scan.
        let (old, new) = (store.path("web.qcow2"), store.path(format!("{snapshot}.qcow2")));
        fs::hard_link(&old, &new).expect("a link");
        let draft = store.beside("draft.qcow2");
        let size = (MIB).to_string();
        let words = ["create", "-q", "-u", "-f", "qcow2", "-F", "qcow2", "-b"];
        tool("qemu-img").args(words).arg(format!("{snapshot}.qcow2")).arg(&draft).arg(size).succeeds();
        let layers = layers_after(&store, "web.qcow2", move || fs::rename(draft, old).expect("a rename"));
        assert_eq!(layers[0], ["web.qcow2", &format!("{snapshot}.qcow2"), "base.qcow2"]);
    }
}

#[test]
fn other_names_that_change_all_the_time_keep_no_scan_from_its_end() {
    let store = store_with_disks();
    let opened = Opened::open(&store.root(), options()).expect("a store");
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                fs::write(store.path("other.qcow2"), "").expect("a file");
                fs::remove_file(store.path("other.qcow2")).expect("a file");
            }
        });
        for _ in 0..200 {
            opened.rescan().expect("a scan");
            assert!(opened.catalog().chain(Path::new("web")).is_some());
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
}
