//! A store on a web server: it shows what the same files show in a directory, returns nothing wrong whatever
//! the server does, and needs no server for what is in the cache.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chainfs::error::{ErrorKind, Result};
use chainfs::io::RemoteOptions;
use chainfs::store::{OpenView, Store, StoreOptions, ViewPart};
use chainfs::units::Stability;
use support::store::Store as Files;
use support::web::{Fault, WebServer};
use support::{MIB, Rng};

use super::memory::{bytes, files, views};

/// A server, and a cache beside the files.
struct Remote {
    files: Files,
    server: WebServer,
    options: RemoteOptions,
}

impl Remote {
    fn of(files: Files) -> Self {
        let server = WebServer::new(&files.root());
        let options = RemoteOptions {
            cache_dir: Some(files.beside("cache")),
            deadline: Duration::from_secs(5),
            ..RemoteOptions::default()
        };
        Self { files, server, options }
    }

    fn try_open(&self) -> Result<Arc<Store>> {
        let remote = self.options.clone();
        let options = StoreOptions { notify: false, cache: 4 << 20, remote, ..StoreOptions::default() };
        Store::open(Path::new(&self.server.address()), options)
    }

    fn open(&self) -> Arc<Store> {
        self.try_open().expect("a store")
    }

    fn local(&self) -> Arc<Store> {
        let options = StoreOptions { notify: false, cache: 4 << 20, ..StoreOptions::default() };
        Store::open(&self.files.root(), options).expect("a store")
    }
}

/// One raw disk of 4 MiB.
fn one_disk() -> Remote {
    let files = Files::new();
    files.raw("disk.raw", 4 * MIB, 9);
    Remote::of(files)
}

fn disk(store: &Store) -> Result<OpenView> {
    let catalog = store.catalog();
    let shown = store.chain_views(&catalog, catalog.chain(Path::new("disk")).expect("a chain"));
    store.open_view(&catalog, &shown.layers, ViewPart::Active, Stability::Live)
}

fn assert_same_views(found: &BTreeMap<String, Vec<u8>>, expected: &BTreeMap<String, Vec<u8>>) {
    assert_eq!(found.keys().collect::<Vec<_>>(), expected.keys().collect::<Vec<_>>());
    for (name, bytes) in expected {
        assert!(found[name] == *bytes, "{name} shows other bytes");
    }
}

#[test]
fn a_store_on_a_server_shows_what_the_same_files_show_in_a_directory() {
    let remote = Remote::of(files());
    let expected = views(&remote.local());
    assert!(expected.len() >= 8, "{:?}", expected.keys());
    let store = remote.open();
    assert_same_views(&views(&store), &expected);
    assert_eq!(store.catalog().problems, remote.local().catalog().problems);
    // Once read, nothing is read again: by this one, or by another one on the same cache.
    let before = remote.server.reads();
    assert_same_views(&views(&store), &expected);
    assert_same_views(&views(&remote.open()), &expected);
    assert_eq!(remote.server.reads(), before, "everything is in the cache");
    // Nor is anything asked for at all offline.
    remote.server.set_down(true);
    let offline = Remote { options: RemoteOptions { offline: true, ..remote.options.clone() }, ..remote };
    assert_same_views(&views(&offline.open()), &expected);
}

#[test]
fn without_a_cache_all_is_the_same() {
    let mut remote = Remote::of(files());
    remote.options.cache_dir = None;
    assert_same_views(&views(&remote.open()), &views(&remote.local()));
}

#[test]
fn a_single_image_and_its_backing_files_are_opened_by_address() {
    let remote = Remote::of(files());
    let remote_options = remote.options.clone();
    let options = StoreOptions { notify: false, remote: remote_options, ..StoreOptions::default() };
    let address = format!("{}/sub/top.qcow2", remote.server.address());
    let refused =
        Store::open(Path::new(&format!("{address}x")), options.clone()).map(drop).expect_err("no such");
    assert_eq!(refused.kind(), ErrorKind::NotFound, "{refused}");
    let address = format!("{}/one.qcow2", remote.server.address());
    let store = Store::open(Path::new(&address), options).expect("an image");
    let single = store.catalog().single.expect("one image");
    assert_eq!(store.catalog().layers(single).len(), 2);
}

// E2
#[test]
fn no_fault_of_the_server_changes_a_byte() {
    let faults = [
        Fault::Cut,
        Fault::Short,
        Fault::OtherRange,
        Fault::Whole,
        Fault::Status(500),
        Fault::Status(503),
        Fault::Status(429),
        Fault::Redirect,
        Fault::Hangup,
    ];
    for fault in faults {
        let remote = one_disk();
        let expected = bytes(&disk(&remote.local()).expect("a disk")).expect("its bytes");
        let store = remote.open();
        let open = disk(&store).expect("a disk");
        remote.server.fail(fault, 3);
        match bytes(&open) {
            Ok(found) => assert!(found == expected, "{fault:?} changed bytes"),
            Err(error) => {
                assert!(matches!(error.kind(), ErrorKind::Io | ErrorKind::Unsupported), "{fault:?}: {error}");
            }
        }
        remote.server.behave();
        assert!(bytes(&open).expect("bytes, after the fault") == expected, "{fault:?} left wrong bytes");
    }
}

#[test]
fn a_silent_server_is_an_error_by_the_deadline() {
    let mut remote = one_disk();
    remote.options.deadline = Duration::from_secs(2);
    let store = remote.open();
    let open = disk(&store).expect("a disk");
    let first = bytes(&open).expect("bytes");
    drop((open, store));
    fs::remove_dir_all(remote.files.beside("cache")).expect("no cache");
    let store = remote.open();
    let open = disk(&store).expect("a disk");
    remote.server.fail(Fault::Stall, 100);
    let begun = Instant::now();
    let error = bytes(&open).expect_err("nothing to read");
    assert_eq!(error.kind(), ErrorKind::Io, "{error}");
    assert!(error.to_string().contains("no answer within"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    remote.server.behave();
    assert!(bytes(&open).expect("bytes") == first);
}

#[test]
fn another_version_of_an_object_is_stale() {
    let remote = one_disk();
    let store = remote.open();
    let open = disk(&store).expect("a disk");
    let mut first = vec![0; 4096];
    open.view.read_at(0, &mut first).expect("a block");
    // Its server now has another version, which only a request can tell.
    let mut other = fs::read(remote.files.path("disk.raw")).expect("a file");
    other.reverse();
    remote.files.put("disk.raw", &other);
    let error = open.view.read_at(3 * MIB, &mut first).expect_err("no bytes of another version");
    assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
    std::thread::sleep(Duration::from_millis(1100));
    store.rescan().expect("a scan");
    assert!(bytes(&disk(&store).expect("a disk")).expect("its bytes") == other);
    // A server that ignores conditions is found out by what it answers.
    let before = bytes(&disk(&store).expect("a disk")).expect("its bytes");
    fs::remove_dir_all(remote.files.beside("cache")).expect("no cache");
    let store = remote.open();
    let open = disk(&store).expect("a disk");
    remote.server.fail(Fault::OtherTag, 1);
    let error = open.view.read_at(3 * MIB, &mut first).expect_err("no bytes of another version");
    assert_eq!(error.kind(), ErrorKind::Stale, "{error}");
    assert!(bytes(&open).expect("bytes") == before);
    // An object that was removed is stale, too.
    let open = disk(&store).expect("a disk");
    fs::remove_file(remote.files.path("disk.raw")).expect("a file");
    fs::remove_dir_all(remote.files.beside("cache")).expect("no cache");
    drop((open, store));
    let error = remote.try_open().map(drop).expect_err("nothing is left");
    assert_eq!(error.kind(), ErrorKind::NotFound, "{error}");
}

#[test]
fn what_is_not_in_the_cache_is_an_error_offline() {
    let mut remote = one_disk();
    {
        let store = remote.open();
        let open = disk(&store).expect("a disk");
        let mut block = vec![0; 4096];
        open.view.read_at(0, &mut block).expect("a block");
    }
    remote.options.offline = true;
    let before = remote.server.requests();
    let store = remote.open();
    let open = disk(&store).expect("a disk");
    let (mut block, mut raw) = (vec![0; 4096], fs::read(remote.files.path("disk.raw")).expect("a file"));
    open.view.read_at(0, &mut block).expect("a block that is there");
    assert!(block == raw[..4096]);
    let error = open.view.read_at(3 * MIB, &mut block).expect_err("a block that is not there");
    assert!(error.to_string().contains("not in the cache"), "{error}");
    assert_eq!(remote.server.requests(), before);
    raw.clear();
    // A store that was never listed cannot be shown.
    remote.options.cache_dir = Some(remote.files.beside("another"));
    let error = remote.try_open().map(drop).expect_err("no listing");
    assert!(error.to_string().contains("no listing"), "{error}");
}

// E1: what is there is right, or not there.
/// Every file of the cache, damaged in turn: by other bytes, cut, emptied, removed.
#[test]
fn a_damaged_cache_never_shows_wrong_bytes() {
    let remote = one_disk();
    let expected = bytes(&disk(&remote.local()).expect("a disk")).expect("its bytes");
    let mut rng = Rng::new(11);
    for round in 0..24 {
        {
            let store = remote.open();
            assert!(bytes(&disk(&store).expect("a disk")).expect("its bytes") == expected, "round {round}");
        }
        let mut found: Vec<PathBuf> = fs::read_dir(remote.files.beside("cache"))
            .expect("a cache")
            .map(|entry| entry.expect("one").path())
            .collect();
        found.retain(|path| path.extension().is_some_and(|extension| extension != "listing"));
        found.sort();
        let path = &found[round % found.len()];
        let is_data = path.extension().is_some_and(|extension| extension == "data");
        match round % 4 {
            // Other bytes of a chunk cannot be noticed without digests of it.
            0 if !is_data => {
                let mut bytes = fs::read(path).expect("a file");
                let at = rng.below(bytes.len().min(4096) as u64) as usize;
                bytes[at] ^= 0xff;
                fs::write(path, bytes).expect("a file");
            }
            1 => fs::File::options()
                .write(true)
                .open(path)
                .expect("a file")
                .set_len(rng.below(4096))
                .expect("cut"),
            2 => fs::write(path, b"").expect("a file"),
            _ => fs::remove_file(path).expect("a file"),
        }
    }
}

#[test]
fn the_cache_keeps_its_size() {
    let mut remote = one_disk();
    remote.options.cache_size = 2 * MIB;
    let expected = bytes(&disk(&remote.local()).expect("a disk")).expect("its bytes");
    let store = remote.open();
    let open = disk(&store).expect("a disk");
    let mut rng = Rng::new(5);
    let mut block = vec![0; 64 << 10];
    for _ in 0..200 {
        let at = rng.below(4 * MIB - block.len() as u64);
        open.view.read_at(at, &mut block).expect("bytes");
        assert!(block == expected[at as usize..at as usize + block.len()], "at {at}");
    }
    let used: u64 = fs::read_dir(remote.files.beside("cache"))
        .expect("a cache")
        .map(|entry| {
            std::os::unix::fs::MetadataExt::blocks(&entry.expect("one").metadata().expect("a file")) * 512
        })
        .sum();
    assert!(used <= 3 * MIB, "{used} bytes are used");
}

/// Many readers of one disk, cold: each chunk is fetched once.
#[test]
fn readers_share_fetches() {
    let remote = one_disk();
    let expected = bytes(&disk(&remote.local()).expect("a disk")).expect("its bytes");
    remote.server.delay(Duration::from_millis(20));
    let store = remote.open();
    let open = Arc::new(disk(&store).expect("a disk"));
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(bytes(&open).expect("its bytes") == expected));
        }
    });
    assert_eq!(remote.server.sent(), 4 * MIB, "{:?}", remote.server.ranges("disk.raw"));
}

/// Reads from beginning to end need few requests, and reads here and there few bytes.
#[test]
fn fetches_grow_with_streams() {
    let files = Files::new();
    files.raw("disk.raw", 64 * MIB, 3);
    let remote = Remote::of(files);
    let store = remote.open();
    let open = disk(&store).expect("a disk");
    let mut block = vec![0; 64 << 10];
    let before = remote.server.reads();
    for at in (0..64 * MIB).step_by(block.len()) {
        open.view.read_at(at, &mut block).expect("bytes");
    }
    let requests = remote.server.reads() - before;
    assert!(requests <= 20, "{requests} requests: {:?}", remote.server.ranges("disk.raw"));
    let remote = Remote::of(remote.files);
    fs::remove_dir_all(remote.files.beside("cache")).expect("no cache");
    let store = remote.open();
    let open = disk(&store).expect("a disk");
    let (mut rng, before) = (Rng::new(4), remote.server.sent());
    for _ in 0..10 {
        open.view.read_at(rng.below(63) * MIB, &mut block).expect("bytes");
    }
    assert!(remote.server.sent() - before <= 10 * (256 << 10), "{:?}", remote.server.ranges("disk.raw"));
}

/// A server that forgets one request in many: the second one is answered.
#[test]
fn a_slow_read_is_sent_again() {
    let files = Files::new();
    files.raw("disk.raw", 16 * MIB, 3);
    let mut remote = Remote::of(files);
    remote.options.deadline = Duration::from_mins(1);
    let store = remote.open();
    let open = disk(&store).expect("a disk");
    let mut block = vec![0; 4096];
    // Backwards, so that each read is a request of its own.
    for chunk in (8..60).rev().step_by(2) {
        open.view.read_at(chunk * (256 << 10), &mut block).expect("bytes");
    }
    remote.server.fail(Fault::Stall, 1);
    let begun = Instant::now();
    open.view.read_at(2 * (256 << 10), &mut block).expect("bytes");
    // The first attempt would have ended after 20 s.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert!(block == fs::read(remote.files.path("disk.raw")).expect("a file")[2 * (256 << 10)..][..4096]);
}
