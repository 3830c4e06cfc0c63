//! A store that lies in memory: it shows what the same files show in a directory, refuses to be changed, and
//! notices another version of an object.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use chainfs::error::{ErrorKind, Result};
use chainfs::io::MemoryDirectory;
use chainfs::ops::{Engine, Request};
use chainfs::store::{Access, ChainView, OpenView, Store, StoreOptions, ViewPart};
use chainfs::units::Stability;
use support::store::Store as Files;

const MIB: u64 = 1 << 20;

/// Several chains: two on one base with an internal snapshot, one in a directory on an image with an external
/// data file, a raw one, and an image whose header is damaged.
pub(crate) fn files() -> Files {
    let files = Files::new();
    files.create("base.qcow2", 2 * MIB, "");
    files.scribble("base.qcow2", "qcow2", 1);
    for (name, seed) in [("one.qcow2", 2), ("two.qcow2", 3)] {
        files.overlay(name, "base.qcow2", "qcow2", "");
        files.scribble(name, "qcow2", seed);
    }
    files.img(["snapshot", "-c", "inner", "two.qcow2"]);
    files.scribble("two.qcow2", "qcow2", 4);
    files.create("low.qcow2", MIB, "data_file=data.raw,data_file_raw=on");
    files.scribble("low.qcow2", "qcow2", 5);
    files.dir("sub");
    files.overlay("sub/top.qcow2", "../low.qcow2", "qcow2", "");
    files.raw("disk.raw", MIB, 6);
    files.create("broken.qcow2", MIB, "");
    let mut bytes = fs::read(files.path("broken.qcow2")).expect("an image");
    bytes[20..24].fill(0xff);
    files.put("broken.qcow2", &bytes);
    files
}

fn load(directory: &Path, beneath: &Path, memory: &MemoryDirectory) {
    for entry in fs::read_dir(directory).expect("a directory") {
        let entry = entry.expect("an entry");
        let path = beneath.join(entry.file_name());
        if entry.file_type().expect("its type").is_dir() {
            load(&entry.path(), &path, memory);
        } else {
            memory.put(path, fs::read(entry.path()).expect("a file"));
        }
    }
}

fn options() -> StoreOptions {
    StoreOptions { notify: false, cache: 4 << 20, ..StoreOptions::default() }
}

/// The files of a store in memory, and that store.
fn in_memory(files: &Files) -> (MemoryDirectory, Arc<Store>) {
    let memory = MemoryDirectory::new("/memory");
    load(&files.root(), Path::new(""), &memory);
    let store = Store::open_tree(memory.backend(), options()).expect("a store");
    (memory, store)
}

fn open(store: &Store, chain: &str) -> Result<OpenView> {
    let catalog = store.catalog();
    let shown = store.chain_views(&catalog, catalog.chain(Path::new(chain)).expect("a chain"));
    store.open_view(&catalog, &shown.layers, ViewPart::Active, Stability::Live)
}

pub(crate) fn bytes(open: &OpenView) -> Result<Vec<u8>> {
    let mut bytes = vec![0; open.view.size() as usize];
    open.view.read_at(0, &mut bytes).map(|()| bytes)
}

/// Each view of each chain, with its bytes.
pub(crate) fn views(store: &Store) -> BTreeMap<String, Vec<u8>> {
    let (catalog, mut found) = (store.catalog(), BTreeMap::new());
    for (chain, leaf) in catalog.chains() {
        let shown = store.chain_views(&catalog, leaf);
        for ChainView { layer, snapshot, active, name, .. } in &shown.views {
            let part = snapshot.map_or(ViewPart::Active, ViewPart::Snapshot);
            let open = store
                .open_view(&catalog, &shown.layers[*layer..], part, Stability::live_if(*active))
                .expect("a view");
            let key = format!("{}/{}", chain.display(), String::from_utf8_lossy(name));
            found.insert(key, bytes(&open).expect("its bytes"));
        }
    }
    found
}

#[test]
fn a_store_in_memory_shows_what_the_same_files_show_in_a_directory() {
    let files = files();
    let local = Store::open(&files.root(), options()).expect("a store");
    let (_, memory) = in_memory(&files);
    let (expected, found) = (views(&local), views(&memory));
    assert!(expected.len() >= 8, "{:?}", expected.keys());
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, bytes) in &expected {
        assert!(found[name] == *bytes, "{name} shows other bytes");
    }
    let problems = |store: &Store| store.catalog().problems.clone();
    assert_eq!(problems(&memory), problems(&local));
    assert!(problems(&memory).iter().any(|problem| problem.path == Path::new("broken.qcow2")));
}

#[test]
fn commands_and_writers_are_refused_where_nothing_can_be_changed() {
    let (_, store) = in_memory(&files());
    let engine = Engine::new(&store);
    engine.resume();
    for command in ["snapshot monday", "commit top=base", "pull", "delete base", "clone new"] {
        let request = Request::parse_command(command.as_bytes()).expect("a command");
        let refused = engine.run(Path::new("one"), &request, command).expect_err(command);
        assert_eq!(refused.kind(), ErrorKind::ReadOnly, "{command}");
        assert!(refused.to_string().contains("copy it to a directory"), "{command}: {refused}");
    }
    let catalog = store.catalog();
    let shown = store.chain_views(&catalog, catalog.chain(Path::new("one")).expect("a chain"));
    let chain = Arc::new("one".into());
    let id = store.view_id(&catalog, &chain, &shown, shown.active().expect("an active disk"), false);
    let refused = store.open_writable(&id, Access::Write).map(drop).expect_err("no writer");
    assert_eq!(refused.kind(), ErrorKind::ReadOnly, "{refused}");
    assert!(store.open_writable(&id, Access::Read).is_ok());
    engine.stop();
}

#[test]
fn another_version_of_an_object_is_noticed() {
    let files = files();
    let (memory, store) = in_memory(&files);
    let before = open(&store, "disk").expect("a disk");
    let old = bytes(&before).expect("its bytes");
    let new: Vec<u8> = old.iter().map(|byte| !byte).collect();
    memory.put("disk.raw", new.clone());
    // What is open is the old version, which is gone: no bytes of the new one come instead.
    let refused = bytes(&before).expect_err("no bytes of another version");
    assert_eq!(refused.kind(), ErrorKind::Stale, "{refused}");
    drop(before);
    let seen = store.catalog();
    store.rescan().expect("a scan");
    let index = |catalog: &chainfs::store::Catalog| catalog.chain(Path::new("disk")).expect("a chain");
    let now = store.catalog();
    let (was, is) = (&seen.images[index(&seen)], &now.images[index(&now)]);
    assert!(was.stat.id == is.stat.id && was.stat.version != is.stat.version);
    assert_eq!(bytes(&open(&store, "disk").expect("a disk")).expect("its bytes"), new);
    // A scan finds what comes and goes, too.
    memory.remove("disk.raw");
    memory.put("sub/more.raw", new.clone());
    store.rescan().expect("a scan");
    assert!(store.catalog().chain(Path::new("disk")).is_none());
    assert_eq!(bytes(&open(&store, "sub/more").expect("a disk")).expect("its bytes"), new);
}
