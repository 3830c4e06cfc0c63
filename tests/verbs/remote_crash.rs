//! The cache of a remote store, cut off by a crash of the machine at every point of filling and evicting:
//! what was lost is fetched again, and nothing wrong is shown.

use std::fs;
use std::path::Path;
use std::time::Duration;

use chainfs::io::{CacheFiles, LocalDirectory, RemoteOptions, RemoteStore};
use rustix::io::Errno;
use support::crash::each_state;
use support::store::Store as Files;
use support::web::WebServer;
use support::{KIB, MIB, Rng};

use super::scenario::crash::{describe, effort};
use super::scenario::run::scratch;
use super::scenario::scene::Scene;
use super::scenario::tape::{Fault, Recorder, Tape};

const DISK: &str = "disk.raw";
const LEN: u64 = 3 * MIB;
const CHUNK: u64 = 256 * KIB;
const STATES: usize = 150;

fn options() -> RemoteOptions {
    RemoteOptions {
        // Two thirds of the disk.
        cache_size: 2 * MIB,
        deadline: Duration::from_secs(20),
        durable_every: Duration::from_millis(2),
        ..RemoteOptions::default()
    }
}

/// Reads the disk here and there, with a cache in the hands of a recorder.
fn record(server: &WebServer, expected: &[u8], recorder: &Recorder, root: &Path) -> Tape {
    let files = recorder.open(root).expect("a directory");
    let cache = CacheFiles { files, boot: "before".into() };
    let tree = RemoteStore::with_cache(&server.address(), Some(cache), &options()).expect("a store");
    let disk = tree.open_file(Path::new(DISK)).expect("a disk");
    let (mut rng, mut bytes) = (Rng::new(7), vec![0; 4096]);
    for _ in 0..50 {
        let at = rng.below(LEN / CHUNK) * CHUNK + rng.below(CHUNK - 4096);
        disk.read_at(at, &mut bytes).expect("bytes");
        assert!(bytes == expected[at as usize..at as usize + 4096], "at {at}");
        // Now and then it is all durable before the next read.
        std::thread::sleep(Duration::from_millis(rng.below(3) * 4));
    }
    drop((disk, tree));
    std::thread::sleep(Duration::from_millis(20));
    recorder.tape()
}

/// The tables name their files by identity, and these are other files now.
fn adopt(scene: &Scene, root: &Path) {
    let directory = LocalDirectory::open(root).expect("a directory");
    for path in scene.names.keys().filter(|path| path.extension().is_some_and(|found| found == "chunks")) {
        let data = path.with_extension("data");
        let Some(file) = scene.names.get(&data) else { continue };
        let mut bytes = fs::read(root.join(path)).expect("a table");
        let Some((block, sum)) = bytes.get(..4096).map(|header| header.split_at(4092)) else { continue };
        // What is torn stays so.
        if crc32c::crc32c(block).to_le_bytes() != sum {
            continue;
        }
        let len = usize::from(u16::from_le_bytes([block[24], block[25]]));
        let noted = String::from_utf8_lossy(&block[26..26 + len]).into_owned();
        let inode = noted.split(':').nth(1).and_then(|inode| u64::from_str_radix(inode, 16).ok());
        if inode != Some(scene.inodes[*file]) {
            continue;
        }
        let now = directory.identify(&data).expect("its identity").to_string();
        let mut header = block[..24].to_vec();
        header.extend((now.len() as u16).to_le_bytes());
        header.extend(now.as_bytes());
        header.extend(&block[26 + len..]);
        header.resize(4092, 0);
        header.extend(crc32c::crc32c(&header).to_le_bytes());
        bytes[..4096].copy_from_slice(&header);
        fs::write(root.join(path), bytes).expect("a table");
    }
}

/// Reads everything with the cache that a crash has left; whether all was right, and the chunks that were
/// there.
fn judge(server: &WebServer, expected: &[u8], scene: &Scene, boot: &str) -> (bool, u64) {
    let place = scratch();
    scene.save(place.path());
    adopt(scene, place.path());
    let files = LocalDirectory::open(place.path()).expect("a directory");
    let cache = CacheFiles { files, boot: boot.into() };
    // Nothing is evicted meanwhile.
    let options = RemoteOptions { cache_size: 64 * MIB, ..options() };
    let tree = RemoteStore::with_cache(&server.address(), Some(cache), &options).expect("a store");
    let disk = tree.open_file(Path::new(DISK)).expect("a disk");
    let there = tree.cached(Path::new(DISK)).expect("a cache") / CHUNK;
    let mut bytes = vec![0; CHUNK as usize];
    // From the end on, so that no stream begins.
    let is_right = (0..LEN / CHUNK).rev().all(|chunk| {
        let at = chunk * CHUNK;
        disk.read_at(at, &mut bytes).expect("bytes") == bytes.len()
            && bytes == expected[at as usize..(at + CHUNK) as usize]
    });
    (is_right, there)
}

/// The states that showed something wrong, of `limit` at most; how many were judged, and the chunks that were
/// there in all.
fn judged(server: &WebServer, expected: &[u8], tape: &Tape, limit: usize) -> (Vec<String>, usize, u64) {
    let (mut wrong, mut there) = (Vec::new(), 0);
    let visited = each_state(tape, &effort(limit), support::sim::seed(), |candidate, scene| {
        let (is_right, chunks) = judge(server, expected, &scene, "after");
        if !is_right {
            wrong.push(describe(tape, candidate));
        }
        there += chunks;
        wrong.is_empty()
    });
    (wrong, visited.visited, there)
}

// E1
#[test]
fn a_crash_of_the_machine_leaves_nothing_wrong_in_the_cache() {
    let files = Files::new();
    fs::write(files.path(DISK), Rng::new(3).bytes(LEN)).expect("a disk");
    let expected = fs::read(files.path(DISK)).expect("bytes");
    let server = WebServer::new(&files.root());
    let place = scratch();
    let tape = record(&server, &expected, &Recorder::new(place.path(), false), place.path());
    let (wrong, states, there) = judged(&server, &expected, &tape, STATES);
    assert!(wrong.is_empty(), "{}", wrong[0]);
    // Some of the states that are drawn are equal.
    assert!(states >= STATES / 3 && there >= 50, "{states} states had {there} chunks: too few");
    // After a crash of the process alone, all that was stored counts.
    let (_, scene) = support::crash::last_state(&tape);
    let (is_right, chunks) = judge(&server, &expected, &scene, "before");
    assert!(is_right && chunks >= 4, "{chunks} chunks");
}

/// Where a sync does nothing, a crash has to leave something wrong: else the test above would see nothing.
#[test]
fn the_test_notices_syncs_that_are_missing() {
    let files = Files::new();
    fs::write(files.path(DISK), Rng::new(3).bytes(LEN)).expect("a disk");
    let expected = fs::read(files.path(DISK)).expect("bytes");
    let server = WebServer::new(&files.root());
    let place = scratch();
    let tape = record(&server, &expected, &Recorder::swallowing_syncs(place.path()), place.path());
    let (wrong, states, _) = judged(&server, &expected, &tape, 10 * STATES);
    assert!(!wrong.is_empty(), "{states} states are all right");
}

/// Calls of the cache that fail, one in each run: the bytes come from the server instead.
#[test]
fn a_cache_that_fails_changes_no_byte() {
    let files = Files::new();
    fs::write(files.path(DISK), Rng::new(3).bytes(LEN)).expect("a disk");
    let expected = fs::read(files.path(DISK)).expect("bytes");
    let server = WebServer::new(&files.root());
    // The first calls make the cache itself, which has to work.
    for number in [5, 6, 7, 8, 10, 13, 21, 34] {
        let place = scratch();
        let recorder = Recorder::new(place.path(), false);
        recorder.arm(Some(Fault { number, errno: Errno::IO, lasting: false }));
        let tape = record(&server, &expected, &recorder, place.path());
        assert!(recorder.calls() > number, "call {number} was made");
        let (is_right, _) = judge(&server, &expected, &support::crash::last_state(&tape).1, "before");
        assert!(is_right, "after call {number} failed");
    }
}
