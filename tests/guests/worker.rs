//! Compromised workers: whatever one answers, the client gets an error or a harmless value. A shell script
//! gives the answers of such a worker.

use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use chainfs::browse::content::OpenContent;
use chainfs::browse::worker::WorkerProgram;
use chainfs::browse::{Browser, DiskContents, PointInTime, walk};
use chainfs::error::{ErrorKind, Result};
use chainfs::fs::{Caller, GuestOptions, MountTree, NodeKind, Ownership};
use chainfs::guest::{Ino, RunKind, TreeId};
use chainfs::store::{Store, StoreOptions};
use support::Rng;

/// Longer than anything here takes.
const LONG: Duration = Duration::from_secs(30);

/// The result of `work`; fails if that takes long.
fn soon<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, wait) = mpsc::channel();
    std::thread::spawn(move || done.send(work()));
    wait.recv_timeout(LONG).expect("an answer, some day")
}

/// A message as a worker sends it: an answer of these bytes.
fn answer(bytes: &[u8]) -> String {
    let message = [&[2, 0], bytes].concat();
    let mut frame = (message.len() as u32).to_le_bytes().to_vec();
    frame.extend([0; 4]);
    frame.extend(message);
    frame.iter().fold(String::new(), |mut text, byte| {
        write!(text, "\\{byte:03o}").expect("there is room");
        text
    })
}

/// The answer that a disk holds one volume of that name, with an ext4 file system.
fn layout(name: &str) -> String {
    let volume = [&[name.len() as u8], name.as_bytes(), &[0, 0, 4, 0, 0, 0]].concat();
    answer(&[&[1, 0, 0, 0, 1], &volume[..], &[0, 0, 0, 0]].concat())
}

/// The answer that this volume's first tree is the root of an operating system.
fn system_on(name: &str) -> String {
    answer(&[&[12, 1, name.len() as u8], name.as_bytes(), &[0; 12]].concat())
}

/// The attributes of an inode of that kind.
fn attributes(kind: u8) -> Vec<u8> {
    [&[kind, 0, 0, 0, 0, 0, 1][..], &[0; 9]].concat()
}

const DIRECTORY: u8 = 1;
const SYMLINK: u8 = 2;

/// A worker that answers `first`, and then `again` repeatedly, without reading.
fn worker(place: &Path, first: &str, again: &str) -> WorkerProgram {
    let path = place.join("worker");
    let text = format!("#!/bin/sh\nexec >&0\nprintf '{first}'\nwhile printf '{again}'; do :; done\n");
    fs::write(&path, text).expect("a script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
    WorkerProgram { path, seccomp: false }
}

/// A store of one disk, read through such a worker.
fn browser(first: &str, again: &str) -> (tempfile::TempDir, Arc<Store>, Arc<Browser>) {
    let place = tempfile::tempdir().expect("a directory");
    let images = place.path().join("store");
    fs::create_dir(&images).expect("a store");
    fs::write(images.join("vm.raw"), vec![0; 1 << 20]).expect("a disk");
    let store =
        Store::open(&images, StoreOptions { notify: false, ..StoreOptions::default() }).expect("a store");
    let browser = Browser::new(&store, worker(place.path(), first, again));
    (place, store, browser)
}

/// The disk's contents as such a worker reports them.
fn inside(first: &str, again: &str) -> (tempfile::TempDir, Result<Arc<DiskContents>>) {
    let (place, store, browser) = browser(first, again);
    let catalog = store.catalog();
    let chain = Arc::new(PathBuf::from("vm"));
    let views = store.chain_views(&catalog, catalog.chain(&chain).expect("the chain"));
    let view = store.view_id(&catalog, &chain, &views, views.active().expect("its disk"), false);
    (place, soon(move || browser.contents(&view, PointInTime::First)))
}

#[test]
fn a_volume_named_like_a_path_is_ignored() {
    let (_place, good) = inside(&layout("disk"), &system_on("disk"));
    let good = good.expect("there is nothing wrong with that");
    assert_eq!(good.operating_systems().expect("one").len(), 1);
    for name in ["../../../etc", "/etc", "..", ".", "", "a-b/c", "root"] {
        let (_place, found) = inside(&layout(name), &system_on(name));
        assert_eq!(found.expect_err(name).kind(), ErrorKind::Io, "{name}");
    }
    for (root, count) in
        [("disk/@", 1), ("disk.subvolumes/@", 1), ("disk/../..", 0), ("/etc", 0), ("disk2", 0)]
    {
        let (_place, found) = inside(&layout("disk"), &system_on(root));
        assert_eq!(found.expect("a disk").operating_systems().expect("a list").len(), count, "{root}");
    }
}

#[test]
fn opening_a_set_that_the_worker_does_not_have_ends() {
    let no_such_set = answer(&[0]);
    let (_place, found) = inside(&layout("disk"), &format!("{no_such_set}{}", layout("disk")));
    let found = found.expect("there is nothing wrong with that");
    let mounted = soon(move || found.mount(TreeId::main(0)));
    assert_eq!(mounted.expect_err("there is no set").kind(), ErrorKind::Io);
}

/// The number of an entry encodes its depth, which depends on its being a directory or not, and the target of
/// a link depends on the depth.
#[test]
fn type_and_inode_number_of_an_entry_come_from_one_answer() {
    let mounted = answer(&[&[3, 2, 1][..], &[0; 12]].concat());
    let root = answer(&[&[6][..], &attributes(DIRECTORY)].concat());
    let found = answer(&[&[4, 1, 12][..], &attributes(DIRECTORY), &[0]].concat());
    let other = answer(&[&[6][..], &attributes(SYMLINK)].concat());
    let (_place, store, browser) = browser(&[layout("disk"), mounted, root, found].concat(), &other);
    let options = GuestOptions { shown: true, verbatim: false };
    let tree = MountTree::new(&store, Ownership::default(), &browser, options);
    let kind = soon(move || {
        let path = ["vm", "files", "active", "disk", "entry"];
        let step = |at: (u64, NodeKind), name: &&str| {
            let found = tree.lookup(&Caller::ADMINISTRATOR, at.0, name.as_ref())?;
            Ok((found.inode, found.kind))
        };
        let found: Result<_> = path.iter().try_fold((1, NodeKind::Directory), step);
        found.map(|(_, kind)| kind)
    });
    assert_eq!(kind.expect("it is there"), NodeKind::Directory);
}

/// Numbers at which something ends, and others.
fn odd(rng: &mut Rng) -> u64 {
    let known = [
        0,
        1,
        2,
        511,
        512,
        4096,
        65_535,
        SIZE - 1,
        SIZE,
        SIZE + 1,
        1 << 32,
        1 << 40,
        1 << 62,
        i64::MAX as u64,
    ];
    match rng.below(20) {
        19 => u64::MAX,
        18 => rng.below(u64::MAX),
        17 => u64::MAX - rng.below(5000),
        index if index < 14 => known[index as usize],
        _ => rng.below(SIZE),
    }
}

fn number(mut value: u64, into: &mut Vec<u8>) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

/// An answer of that kind, each number in it an odd one.
fn odd_answer(rng: &mut Rng, kind: u8) -> String {
    let mut bytes = vec![kind];
    let run = |rng: &mut Rng, into: &mut Vec<u8>| {
        number(odd(rng), into);
        let stored = rng.below(4) > 0;
        into.push(u8::from(stored));
        if stored {
            number(odd(rng), into);
        }
    };
    match kind {
        LAYOUT => {
            bytes.extend([0, 0, 0, 1, 4]);
            bytes.extend(b"disk");
            number(odd(rng), &mut bytes);
            let count = rng.below(4) as u8;
            bytes.push(count);
            for _ in 0..count {
                number(odd(rng), &mut bytes);
                number(odd(rng), &mut bytes);
                // In a container that is not there.
                if rng.below(50) == 0 {
                    bytes.push(3);
                    number(rng.below(3), &mut bytes);
                    number(odd(rng), &mut bytes);
                    continue;
                }
                // Linear, striped, zeroes, or computed.
                let place = rng.below(8).min(3) as u8;
                bytes.push([4, 2, 1, 0][usize::from(place)]);
                let legs = if place == 3 { 1 } else { rng.below(4) as u8 };
                if place == 2 {
                    (0..3).for_each(|_| number(odd(rng), &mut bytes));
                    bytes.push(legs);
                }
                for _ in 0..if place >= 2 { legs } else { 0 } {
                    let is_absent = place == 2 && rng.below(4) == 0;
                    if place == 2 {
                        bytes.push(u8::from(!is_absent));
                    }
                    if !is_absent {
                        number(rng.below(3), &mut bytes);
                        number(odd(rng), &mut bytes);
                    }
                }
            }
            bytes.extend([4, 0, 0, 0, 0, 0, 0, 0]);
        }
        OPENED => {
            number(odd(rng), &mut bytes);
            let count = rng.below(5) as u8;
            bytes.push(count);
            (0..count).for_each(|_| run(rng, &mut bytes));
        }
        RUNS => {
            let count = rng.below(5) as u8;
            bytes.push(count);
            (0..count).for_each(|_| run(rng, &mut bytes));
        }
        ATTRIBUTES => {
            bytes.extend([0, 0, 0, 0]);
            number(odd(rng), &mut bytes);
            number(odd(rng), &mut bytes);
            bytes.extend([1, 0, 0]);
            for _ in 0..3 {
                number(odd(rng), &mut bytes);
                number(odd(rng) & u64::from(u32::MAX), &mut bytes);
            }
            bytes.push(0);
        }
        _ => {
            bytes.extend([2, 1, 0, 0, 0, 0, 0, 0, 0, 0]);
            // Its other trees.
            bytes.extend([0, 1]);
            (0..2).for_each(|_| number(odd(rng) & u64::from(u32::MAX), &mut bytes));
            bytes.push(0);
        }
    }
    answer(&bytes)
}

const SIZE: u64 = 1 << 20;
const LAYOUT: u8 = 1;
const MOUNTED: u8 = 3;
const ATTRIBUTES: u8 = 6;
const OPENED: u8 = 8;
const RUNS: u8 = 9;

/// Reads everything that a worker reports, as far as it can be read.
fn look_at_everything(inside: &Arc<DiskContents>, rng: &mut Rng) {
    let mut buf = vec![0; 5000];
    for _ in 0..20 {
        let (at, len) = (odd(rng), rng.below(5000) as usize);
        let _ = inside.read_volume(0, at, &mut buf[..len]);
        let _ = inside.origin(0, at, odd(rng));
    }
    let _ = chainfs::report::volumes::listed(inside);
    if let Ok(tree) = walk::GuestTree::open(inside, TreeId::main(0)) {
        let entry = tree.root();
        let content = OpenContent::new(&tree, &entry);
        for at in [0, entry.attributes.size / 2, entry.attributes.size.saturating_sub(1)] {
            let left = entry.attributes.size.saturating_sub(at).min(5000) as usize;
            let _ = content.read_at(at, &mut buf[..left]);
        }
    }
    let Ok(opened) = inside.open_file(TreeId::main(0), Ino(12)) else { return };
    for run in opened.runs {
        if let RunKind::Stored(_) | RunKind::Hole = run.kind {
            let _ = inside.read_run(TreeId::main(0), Ino(12), 0, run.kind, &mut buf);
        }
    }
}

#[test]
// G6
fn any_number_from_a_worker_causes_at_most_an_error() {
    let mut looked = 0;
    for seed in 0..150 {
        let mut rng = Rng::new(seed);
        let kinds = [LAYOUT, MOUNTED, ATTRIBUTES, RUNS, RUNS, RUNS, OPENED];
        let said: String = kinds.iter().map(|kind| odd_answer(&mut rng, *kind)).collect();
        let (_place, found) = inside(&said, &odd_answer(&mut rng, RUNS));
        if let Ok(found) = found {
            looked += 1;
            soon(move || look_at_everything(&found, &mut rng));
        }
    }
    assert!(looked > 100, "{looked} answers were understood");
}

#[test]
// G6
fn a_container_within_itself_and_one_without_a_key_are_refused() {
    // Volume `disk`, 4096 bytes, encrypted in container 0, whose volume is the given one.
    let layout = |volume: u8| {
        let head = [&[LAYOUT, 0, 0, 0, 1, 4][..], b"disk", &[0x80, 0x20, 1, 0, 0x80, 0x20, 3, 0, 0]].concat();
        let data = [1, 0, 0x80, 0x20, 0, 0];
        answer(&[&head[..], &[4, 0, 0, 0, 0, 0, 0, 1, volume], &[7; 32], &data].concat())
    };
    for volume in [0, 1, 200] {
        let (_place, found) = inside(&layout(volume), &layout(volume));
        assert_eq!(found.expect_err("it reads itself").kind(), ErrorKind::Io);
    }
    let head = [&[LAYOUT, 0, 0, 0, 1, 4][..], b"disk", &[0x80, 0x20, 0, 4, 0, 0, 0, 0, 0, 0, 1, 0]].concat();
    let keyless = answer(&[&head[..], &[7; 32], &[1, 0, 0x80, 0x20, 0, 0]].concat());
    let (_place, found) = inside(&keyless, &keyless);
    assert_eq!(found.expect_err("there is no key").kind(), ErrorKind::Io);
}
