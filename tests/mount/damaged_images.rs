//! Images that are truncated, damaged in a part that a reader does not need, or without their backing file:
//! readable data is read, lost data is an error, and never becomes zeroes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use chainfs::ops::{Engine, Request};
use chainfs::store::{Store as Opened, StoreOptions};
use chainfs::units::are_zero;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use serde_json::Value;
use support::active::errno;
use support::chainfs_binary;
use support::command::Control;
use support::damage::{Damage, header};
use support::mount::Mount;
use support::store::Store;
use support::tools::{Outcome as _, tool};

const CLUSTER: u64 = 64 << 10;
const DISK: u64 = 4 << 20;

fn chainfs<const N: usize>(store: &Store, words: [&str; N]) -> Command {
    let mut command = tool(chainfs_binary());
    command.args(words).current_dir(store.root()).env("XDG_CONFIG_HOME", store.beside("config"));
    command
}

/// The disk, cluster by cluster; `None` where it cannot be read.
fn clusters(disk: &Path, size: u64) -> Vec<Option<Vec<u8>>> {
    let file = File::open(disk).unwrap_or_else(|e| panic!("{}: {e}", disk.display()));
    let read = |at: u64| {
        let mut bytes = vec![0; CLUSTER.min(size - at) as usize];
        match file.read_exact_at(&mut bytes, at) {
            Ok(()) => Some(bytes),
            Err(error) => {
                assert_eq!(Errno::from_io_error(&error), Some(Errno::IO), "{at:#x}: {error}");
                None
            }
        }
    };
    (0..size).step_by(CLUSTER as usize).map(read).collect()
}

/// How writing a sector at `at` ends.
fn write(disk: &Path, at: u64) -> Option<Errno> {
    match File::options().write(true).open(disk) {
        Ok(file) => errno(file.write_all_at(&[9; 512], at).and_then(|()| file.sync_all())),
        failed => errno(failed),
    }
}

/// A way to make `t.qcow2`, a disk of `DISK` bytes, and where to cut it.
struct Cut {
    name: &'static str,
    make: fn(&Store) -> u64,
}

fn scribbled(store: &Store, options: &str) {
    store.create("t.qcow2", DISK, options);
    store.io("t.qcow2", "qcow2", ["write -q -P 5 0 3M"]);
}

/// The file offset of a guest offset's cluster.
fn host(store: &Store, guest: u64) -> u64 {
    Damage::to(store.path("t.qcow2")).host_offset(guest)
}

const CUTS: [Cut; 8] = [
    Cut {
        name: "data",
        make: |store| {
            scribbled(store, "");
            host(store, 1 << 20)
        },
    },
    Cut {
        name: "within a cluster",
        make: |store| {
            scribbled(store, "");
            host(store, (3 << 20) - CLUSTER) + 12_288
        },
    },
    Cut {
        name: "an L2 table above a backing file",
        make: |store| {
            store.create("base.qcow2", DISK, "");
            store.io("base.qcow2", "qcow2", ["write -q -P 7 0 4M"]);
            // One L2 table maps 2 MiB.
            store.overlay("t.qcow2", "base.qcow2", "qcow2", "cluster_size=4k");
            store.io("t.qcow2", "qcow2", ["write -q -P 5 0 1M", "write -q -P 6 3M 300k"]);
            let image = Damage::to(store.path("t.qcow2"));
            image.u64(image.l1_at() + 8) & 0x00ff_ffff_ffff_fe00
        },
    },
    Cut {
        name: "subclusters",
        make: |store| {
            scribbled(store, "extended_l2=on");
            Damage::to(store.path("t.qcow2")).len() - 5 * CLUSTER - 4096
        },
    },
    Cut {
        name: "compressed",
        make: |store| {
            store.raw("source.raw", DISK, 3);
            store.img(["convert", "-c", "-f", "raw", "-O", "qcow2", "source.raw", "t.qcow2"]);
            fs::remove_file(store.path("source.raw")).expect("room");
            Damage::to(store.path("t.qcow2")).len() / 2
        },
    },
    Cut {
        name: "what only an internal snapshot has",
        make: |store| {
            scribbled(store, "");
            store.img(["snapshot", "-c", "one", "t.qcow2"]);
            store.io("t.qcow2", "qcow2", ["write -q -P 6 1M 64k"]);
            store.img(["snapshot", "-c", "two", "t.qcow2"]);
            let at = host(store, 1 << 20);
            // At another, free offset before it.
            store.io("t.qcow2", "qcow2", ["discard -q 1M 64k"]);
            at
        },
    },
    Cut {
        name: "the tables of an internal snapshot",
        make: |store| {
            scribbled(store, "");
            store.img(["snapshot", "-c", "one", "t.qcow2"]);
            // The last cluster is the second one's table, which names both.
            store.img(["snapshot", "-c", "two", "t.qcow2"]);
            let image = Damage::to(store.path("t.qcow2"));
            let table = image.u64(header::SNAPSHOTS_OFFSET);
            let two = image.u64(table + (40 + 24 + 1 + 3_u64).next_multiple_of(8));
            two.min(table)
        },
    },
    Cut {
        name: "version 2",
        make: |store| {
            scribbled(store, "compat=0.10");
            host(store, 2 << 20)
        },
    },
];

#[test]
// R4
fn truncated_data_is_an_error_until_its_loss_is_accepted() {
    for Cut { name, make } in CUTS {
        let store = Store::new();
        let at = make(&store);
        let path = store.path("t.qcow2");
        let before = fs::read(store.oracle("t.qcow2", "qcow2")).expect("what it was");
        Damage::to(&path).set_len(at);
        let cut = fs::read(&path).expect("the image");

        let mount = Mount::with(&store, "nofiles");
        let disk = mount.path("t/active.raw");
        let left = clusters(&disk, DISK);
        for place in [0, DISK - 512] {
            assert_eq!(write(&disk, place), Some(Errno::IO), "{name}");
        }
        let control = Control::of(&mount, "t");
        for command in ["snapshot x internal", "resize +1M", "pull"] {
            // A layer without a backing file needs no pull.
            let refused = control.give(command);
            let state = control.wait();
            assert!(
                refused.is_some() || state == "failed" || command == "pull",
                "{name}, {command}: {state}"
            );
        }
        assert!(clusters(&disk, DISK) == left, "{name}: it reads as before");
        mount.umount();
        assert!(fs::read(&path).expect("the image") == cut, "{name}: nothing was written");

        let (code, out, err) = chainfs(&store, ["check", "--repair", "all", "t.qcow2"]).outcome();
        assert!(code == 0 && out.contains("Lost: "), "{name}: {code}: {out}{err}");
        store.img(["check", "-q", "t.qcow2"]);
        let now = fs::read(store.oracle("t.qcow2", "qcow2")).expect("what is left");
        for (number, left) in left.iter().enumerate() {
            let range = number * CLUSTER as usize..(number + 1) * CLUSTER as usize;
            let (now, before) = (&now[range.clone()], &before[range]);
            if let Some(bytes) = left {
                assert!(now == bytes && now == before, "{name}: cluster {number} is as it was");
                continue;
            }
            let mut sectors = now.chunks(512).zip(before.chunks(512));
            let is_known = |(now, before): (&[u8], &[u8])| now == before || are_zero(now);
            assert!(sectors.all(is_known), "{name}: cluster {number}");
        }
        let mount = Mount::with(&store, "nofiles");
        assert_eq!(write(&mount.path("t/active.raw"), DISK - 512), None, "{name}");
        mount.umount();
        store.img(["check", "-q", "t.qcow2"]);
    }
}

#[test]
fn truncated_images_are_neither_merged_into_nor_copied_as_zeroes() {
    for command in
        ["commit top=s1 base=base", "commit base=base", "pull into=s1", "rebase layer=s1 base=none"]
    {
        let store = Store::new();
        store.create("base.qcow2", DISK, "");
        store.io("base.qcow2", "qcow2", ["write -q -P 1 0 4M"]);
        store.overlay("s1.qcow2", "base.qcow2", "qcow2", "");
        store.io("s1.qcow2", "qcow2", ["write -q -P 2 0 1M"]);
        store.overlay("vm.qcow2", "s1.qcow2", "qcow2", "");
        store.io("vm.qcow2", "qcow2", ["write -q -P 3 0 64k"]);
        let base = Damage::to(store.path("base.qcow2"));
        base.set_len(base.host_offset(2 << 20));
        let mount = Mount::with(&store, "nofiles");
        let before = clusters(&mount.path("vm/active.raw"), DISK);
        assert!(before.iter().any(Option::is_none) && before.iter().any(Option::is_some));
        let control = Control::of(&mount, "vm");
        let refused = control.give(command);
        assert!(refused.is_some() || control.wait() == "failed", "{command}: {}", control.status("state"));
        mount.umount();
        let mount = Mount::with(&store, "nofiles");
        assert!(clusters(&mount.path("vm/active.raw"), DISK) == before, "{command}");
    }
}

#[test]
fn a_truncated_external_data_file_is_not_extended() {
    let store = Store::new();
    store.create("t.qcow2", DISK, "data_file=t.data");
    store.io("t.qcow2", "qcow2", ["write -q -P 5 0 3M"]);
    let data = Damage::to(store.path("t.data"));
    data.set_len(1 << 20);
    let mount = Mount::with(&store, "nofiles");
    let disk = mount.path("t/active.raw");
    let left = clusters(&disk, DISK);
    assert!(left[15].is_some() && left[16].is_none());
    assert_eq!(write(&disk, DISK - 512), Some(Errno::IO));
    assert_eq!(data.len(), 1 << 20);
    mount.umount();
    // The reported remedy.
    data.set_len(DISK);
    let mount = Mount::with(&store, "nofiles");
    assert_eq!(write(&mount.path("t/active.raw"), DISK - 512), None);
}

#[test]
fn a_truncated_bitmap_keeps_its_image_from_growing_over_it() {
    let store = Store::new();
    store.create("t.qcow2", DISK, "");
    store.img(["bitmap", "--add", "--disable", "t.qcow2", "b0"]);
    let image = Damage::to(store.path("t.qcow2"));
    let len = image.len();
    // QEMU puts its table, and then the directory, at the end.
    store.io("t.qcow2", "qcow2", ["write -q -P 5 0 64k"]);
    let image = Damage::to(store.path("t.qcow2"));
    let (data, end) = (image.host_offset(0), image.len());
    assert!(end > len.min(data));
    image.set_len(data.min(end - CLUSTER));
    let mount = Mount::with(&store, "nofiles");
    assert_eq!(write(&mount.path("t/active.raw"), DISK - 512), Some(Errno::IO));
}

#[test]
fn a_leak_beyond_the_end_does_not_block_writing() {
    let store = Store::new();
    scribbled(&store, "");
    let image = Damage::to(store.path("t.qcow2"));
    let block = image.u64(image.u64(header::REFCOUNT_TABLE_OFFSET));
    image.put(block + (image.len() / CLUSTER + 3) * 2, &[0, 1]);
    let mount = Mount::with(&store, "nofiles");
    assert_eq!(write(&mount.path("t/active.raw"), DISK - 512), None);
}

#[test]
fn a_damaged_snapshot_entry_affects_that_snapshot_only() {
    let store = Store::new();
    scribbled(&store, "");
    for name in ["one", "two", "three"] {
        store.img(["snapshot", "-c", name, "t.qcow2"]);
        store.io("t.qcow2", "qcow2", ["write -q -P 6 1M 64k"]);
    }
    let image = Damage::to(store.path("t.qcow2"));
    let entry = image.u64(header::SNAPSHOTS_OFFSET);
    let expected = fs::read(store.try_oracle(Path::new("t.qcow2"), "qcow2", Some("2")).expect("a snapshot"));
    for (what, at, bytes) in [
        ("its L1 table's place", 0, 0x0040_0200_u64.to_be_bytes()),
        ("its disk's size", 48, u64::MAX.to_be_bytes()),
    ] {
        let good = image.bytes(entry + at, 8);
        image.put(entry + at, &bytes);
        let mount = Mount::with(&store, "nofiles");
        assert_eq!(mount.names("t/snapshots"), ["active@three.raw", "active@two.raw"], "{what}");
        let two = fs::read(mount.path("t/snapshots/active@two.raw"));
        assert!(two.expect("a snapshot") == *expected.as_ref().expect("a snapshot"), "{what}");
        let problem = mount.text("t/info/problem.txt");
        assert!(problem.contains("\"one\"") && !problem.contains("two"), "{what}: {problem}");
        assert_eq!(write(&mount.path("t/active.raw"), DISK - 512), None, "{what}");
        let control = Control::of(&mount, "t");
        control.done("snapshot four internal");
        control.done("delete active@four");
        mount.umount();
        let table = image.u64(header::SNAPSHOTS_OFFSET);
        image.put(table + at, &good);
        store.img(["check", "-q", "t.qcow2"]);
        assert_eq!(table, image.u64(header::SNAPSHOTS_OFFSET));
        if table != entry {
            return a_damaged_size(&store);
        }
    }
}

/// The same with another field, since the table has moved.
fn a_damaged_size(store: &Store) {
    let image = Damage::to(store.path("t.qcow2"));
    let entry = image.u64(header::SNAPSHOTS_OFFSET);
    image.put(entry + 48, &u64::MAX.to_be_bytes());
    let mount = Mount::with(store, "nofiles");
    assert_eq!(mount.names("t/snapshots"), ["active@three.raw", "active@two.raw"]);
}

#[test]
fn pull_refuses_to_leave_a_damaged_snapshot_behind() {
    let store = Store::new();
    store.create("base.qcow2", DISK, "");
    store.io("base.qcow2", "qcow2", ["write -q -P 1 0 4M"]);
    store.overlay("vm.qcow2", "base.qcow2", "qcow2", "");
    store.img(["snapshot", "-c", "one", "vm.qcow2"]);
    let image = Damage::to(store.path("vm.qcow2"));
    image.put_u64(image.u64(header::SNAPSHOTS_OFFSET), 0x0040_0200);
    let mount = Mount::with(&store, "nofiles");
    let said = Control::of(&mount, "vm").refused("pull", Errno::IO);
    assert!(said.contains("internal snapshot with a damaged entry"), "{said}");
}

#[test]
fn damaged_refcounts_do_not_block_reading() {
    let kinds: [(&str, u64, u64, bool); 5] = [
        ("no place", header::REFCOUNT_TABLE_OFFSET, 0, true),
        ("a place that is not aligned", header::REFCOUNT_TABLE_OFFSET, 0x10200, true),
        ("a place that no file has", header::REFCOUNT_TABLE_OFFSET, 0x7fff_ffff_ffff_0000, true),
        ("the place of the snapshots", header::REFCOUNT_TABLE_OFFSET, u64::MAX, true),
        ("counts of a width that there is not", header::REFCOUNT_ORDER, 0, false),
    ];
    for (what, at, value, is_mended) in kinds {
        let store = Store::new();
        scribbled(&store, "");
        store.img(["snapshot", "-c", "one", "t.qcow2"]);
        let expected = fs::read(store.oracle("t.qcow2", "qcow2")).expect("what it holds");
        let image = Damage::to(store.path("t.qcow2"));
        let value = match (at, value) {
            (header::REFCOUNT_ORDER, _) => 9 << 32 | u64::from(image.u32(header::HEADER_LEN)),
            (_, u64::MAX) => image.u64(header::SNAPSHOTS_OFFSET),
            _ => value,
        };
        image.put_u64(at, value);
        chainfs(&store, ["info", "t.qcow2"]).succeeds();
        chainfs(&store, ["map", "t.qcow2"]).succeeds();
        let mount = Mount::with(&store, "nofiles");
        assert!(fs::read(mount.path("t/active.raw")).expect("the disk") == expected, "{what}");
        assert!(
            fs::read(mount.path("t/snapshots/active@one.raw")).expect("the snapshot") == expected,
            "{what}"
        );
        let problem = mount.text("t/info/problem.txt");
        assert!(
            problem.contains("refcount") && problem.contains("chainfs check --repair all"),
            "{what}: {problem}"
        );
        assert_eq!(write(&mount.path("t/active.raw"), 0), Some(Errno::IO), "{what}");
        assert!(Control::of(&mount, "t").give("snapshot x internal").is_some(), "{what}");
        mount.umount();
        if is_mended {
            let (code, out, err) = chainfs(&store, ["check", "--repair", "all", "t.qcow2"]).outcome();
            assert_eq!(code, 0, "{what}: {out}{err}");
            store.img(["check", "-q", "t.qcow2"]);
            let mount = Mount::with(&store, "nofiles");
            assert_eq!(write(&mount.path("t/active.raw"), 0), None, "{what}");
        }
    }
}

/// For each cluster, QEMU's map of the whole chain: the depth of the layer that holds it, if one does.
fn depths(store: &Store, name: &str) -> Vec<Option<u64>> {
    let map: Value = serde_json::from_str(&store.img(["map", "--output=json", name])).expect("JSON");
    let number = |run: &Value, key: &str| run[key].as_u64().expect("a number");
    let mut depths = vec![None; (DISK / CLUSTER) as usize];
    for run in map.as_array().expect("a list").iter().filter(|run| run["present"] == true) {
        let end = number(run, "start") + number(run, "length");
        for at in (number(run, "start")..end).step_by(CLUSTER as usize) {
            depths[(at / CLUSTER) as usize] = Some(number(run, "depth"));
        }
    }
    depths
}

#[test]
fn data_of_the_layers_above_a_lost_one_can_be_salvaged() {
    let store = Store::new();
    store.create("base.qcow2", DISK, "");
    store.io("base.qcow2", "qcow2", ["write -q -P 1 0 2M"]);
    store.overlay("mid.qcow2", "base.qcow2", "qcow2", "");
    store.io("mid.qcow2", "qcow2", ["write -q -P 2 512k 512k", "write -q -z 3M 256k"]);
    store.overlay("top.qcow2", "mid.qcow2", "qcow2", "");
    store.io("top.qcow2", "qcow2", ["write -q -P 3 768k 64k"]);
    let before = fs::read(store.oracle("top.qcow2", "qcow2")).expect("what it was");
    let depths = depths(&store, "top.qcow2");
    fs::remove_file(store.path("base.qcow2")).expect("it was there");

    let mount = Mount::with(&store, "nofiles");
    assert_eq!(errno(File::open(mount.path("top/active.raw"))), Some(Errno::IO), "not without the option");
    assert!(mount.text("top/info/problem.txt").contains("base.qcow2"));
    mount.umount();

    let mount = Mount::with(&store, "nofiles,salvage");
    for (view, above) in [("active", 0), ("snapshots/mid", 1)] {
        let disk = mount.path(format!("top/{view}.raw"));
        let have = clusters(&disk, DISK);
        for (number, (have, depth)) in have.iter().zip(&depths).enumerate() {
            let is_held = depth.is_some_and(|depth| (above..2).contains(&depth));
            assert!(above > 0 || have.is_some() == is_held, "{view}, cluster {number}, held by {depth:?}");
            if let Some(have) = have
                && is_held
            {
                assert!(
                    *have == before[number * CLUSTER as usize..][..CLUSTER as usize],
                    "{view}, cluster {number}"
                );
            }
        }
    }
    let disk = File::open(mount.path("top/active.raw")).expect("the disk");
    assert_eq!(seek(&disk, SeekFrom::Data(2 << 20)), Ok(2 << 20), "what is lost is no hole");
    assert_eq!(write(&mount.path("top/active.raw"), 768 << 10), Some(Errno::ROFS));
    for command in
        ["commit", "pull", "snapshot x internal", "snapshot x", "clone y from=mid", "rebase base=none"]
    {
        assert!(Control::of(&mount, "top").give(command).is_some(), "{command}");
    }
    drop(disk);
    mount.umount();

    chainfs(&store, ["map", "top.qcow2"]).fails();
    let map = chainfs(&store, ["map", "-o", "salvage", "--output", "json", "top.qcow2"]).succeeds();
    let map: Value = serde_json::from_str(&map).expect("JSON");
    for run in map.as_array().expect("a list") {
        let (start, len) =
            (run["start"].as_u64().expect("a place"), run["length"].as_u64().expect("a length"));
        for at in (start..start + len).step_by(CLUSTER as usize) {
            let is_held = depths[(at / CLUSTER) as usize].is_some_and(|depth| depth < 2);
            assert_eq!(run["lost"] == true, !is_held, "{at:#x}: {run}");
        }
    }
}

/// A plan refuses whatever the command refuses, in the same words.
fn assert_planned(store: &Store, command: &str, says: &str) {
    let options = StoreOptions { notify: false, ..StoreOptions::default() };
    let opened = Opened::open(&store.root(), options).expect("a store");
    let engine = Engine::new(&opened);
    let request = Request::parse_command(command.as_bytes()).expect("a command");
    let plan = engine.plan(Path::new("t"), &request).unwrap_or_else(|error| panic!("{command}: {error}"));
    let planned: Vec<String> = plan.refusals.iter().map(ToString::to_string).collect();
    let refused = engine.run(Path::new("t"), &request, command);
    let refused = refused.expect_err(command).to_string();
    assert!(refused.contains(says), "{command}: {refused}");
    assert!(planned.contains(&refused), "{command}: {refused}\nis not planned: {planned:#?}");
}

#[test]
// R4
fn plans_refuse_growth_over_lost_data() {
    let chain = |options: &str| {
        let store = Store::new();
        store.create("base.qcow2", DISK, options);
        store.io("base.qcow2", "qcow2", ["write -q -P 1 0 3M"]);
        for (name, below) in [("mid.qcow2", "base.qcow2"), ("t.qcow2", "mid.qcow2")] {
            store.overlay(name, below, "qcow2", options);
            store.io(name, "qcow2", ["write -q -P 2 512k 2M"]);
        }
        store.img(["snapshot", "-c", "inner", "t.qcow2"]);
        // The last cluster of each file is the disk's alone.
        for name in ["base.qcow2", "mid.qcow2", "t.qcow2"] {
            store.io(name, "qcow2", ["write -q -P 3 3M 64k"]);
        }
        store.dir(".chainfs");
        store
    };
    let cases = [
        ("t.qcow2", "snapshot monday"),
        ("t.qcow2", "snapshot monday internal"),
        ("t.qcow2", "pull"),
        ("t.qcow2", "pull base=base"),
        ("t.qcow2", "rebase base=none"),
        ("t.qcow2", "resize 8M"),
        ("t.qcow2", "resize 1M shrink"),
        ("t.qcow2", "delete mid method=pull discard-internal"),
        ("t.qcow2", "delete active@inner"),
        ("t.qcow2", "revert to=active@inner"),
        ("mid.qcow2", "commit discard-internal"),
        ("mid.qcow2", "pull into=mid"),
        ("base.qcow2", "commit top=mid"),
        ("base.qcow2", "delete base method=commit"),
    ];
    for (cut, command) in cases {
        let store = chain("");
        let image = Damage::to(store.path(cut));
        image.set_len(image.host_offset(3 << 20));
        assert_planned(&store, command, "cut short");
    }
}

#[test]
fn plans_refuse_growth_of_a_truncated_data_file() {
    for command in ["pull", "resize 8M", "snapshot monday"] {
        let store = Store::new();
        store.create("base.qcow2", DISK, "");
        store.overlay("t.qcow2", "base.qcow2", "qcow2", "data_file=t.data");
        store.io("t.qcow2", "qcow2", ["write -q -P 2 512k 2M"]);
        store.dir(".chainfs");
        File::options()
            .write(true)
            .open(store.path("t.data"))
            .and_then(|file| file.set_len(1 << 20))
            .expect("a file");
        assert_planned(&store, command, "data file ends");
    }
}

#[test]
fn plans_refuse_where_no_intent_can_be_written() {
    let store = Store::new();
    store.create("base.qcow2", DISK, "");
    store.overlay("t.qcow2", "base.qcow2", "qcow2", "");
    for place in [".chainfs", ".chainfs/intents"] {
        store.dir(".chainfs/intents");
        // The files made by a first command.
        let names = [".chainfs/lock", ".chainfs/plain"].map(|name| store.put(name, b""));
        assert!(names.iter().all(|name| name.exists()));
        tool("chattr").arg("+i").arg(store.path(place)).succeeds();
        let told = std::panic::catch_unwind(|| {
            for command in ["commit", "pull", "snapshot monday", "resize 8M", "clone new from=base"] {
                assert_planned(&store, command, "cannot be written");
            }
        });
        tool("chattr").arg("-i").arg(store.path(place)).succeeds();
        assert!(told.is_ok(), "{place}");
    }
}
