//! Repairs beside a mount: an open image is not repaired, and a later opener sees the same bytes.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use support::*;

/// A chain whose leaf has an internal snapshot and two leaked clusters.
fn leaking() -> Store {
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    store.overlay("web.qcow2", "base.raw", "raw", "");
    store.scribble("web.qcow2", "qcow2", 2);
    store.img(["snapshot", "-c", "monday", "web.qcow2"]);
    store.scribble("web.qcow2", "qcow2", 3);
    leak(&store);
    store
}

/// Counts of unused clusters become 1.
fn leak(store: &Store) {
    let file = File::options().read(true).write(true).open(store.path("web.qcow2")).expect("an image");
    let word = |at: u64| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at).expect("a word");
        u64::from_be_bytes(bytes)
    };
    let block = word(word(48));
    let clusters = file.metadata().expect("a length").len().div_ceil(64 << 10);
    for cluster in clusters + 5..clusters + 7 {
        file.write_all_at(&1_u16.to_be_bytes(), block + cluster * 2).expect("a count");
    }
    // Beyond the end only the clusters that the file has are counted.
    file.set_len((clusters + 8) * (64 << 10)).expect("room");
}

fn repair(store: &Store) -> (i32, String) {
    let (code, out, err) =
        tool(chainfs_binary()).args(["check", "--repair", "all"]).arg(store.path("web.qcow2")).outcome();
    (code, out + &err)
}

#[test]
fn an_image_that_a_mount_has_open_is_not_repaired() {
    let store = leaking();
    let mount = Mount::new(&store);
    let snapshot = "web/snapshots/active@monday.raw";
    let open =
        |name: &str, write: bool| File::options().read(true).write(write).open(mount.path(name)).expect(name);
    for (name, write) in [("web/active.raw", true), ("web/active.raw", false), (snapshot, false)] {
        let opened = open(name, write);
        let before = fs::read(store.path("web.qcow2")).expect("an image");
        let (code, said) = repair(&store);
        assert_eq!(code, 1, "{name}: {said}");
        assert!(said.contains("chainfs") && said.contains("web.qcow2"), "{name}: {said}");
        assert!(fs::read(store.path("web.qcow2")).expect("an image") == before, "{name}");
        drop(opened);
    }
    mount.umount();
}

#[test]
fn a_mount_shows_the_same_bytes_after_a_repair_and_stays_writable() {
    let store = leaking();
    let mount = Mount::new(&store);
    let disks = ["web/active.raw", "web/snapshots/active@monday.raw"].map(|name| mount.path(name));
    let read = |disk: &Path| fs::read(disk).expect("a disk");
    let before = disks.each_ref().map(|disk| read(disk));
    let mut said = (1, String::new());
    eventually("nobody has it open", || {
        said = repair(&store);
        said.0 == 0
    });
    assert!(said.1.contains("2 leaked clusters"), "{}", said.1);
    assert!(disks.each_ref().map(|disk| read(disk)) == before);
    let disk = File::options().write(true).open(&disks[0]).expect("a disk");
    disk.write_all_at(&vec![9; 200_000], 300_001).expect("a write");
    drop(disk);
    let mut after = before[0].clone();
    after[300_001..500_001].fill(9);
    assert!(read(&disks[0]) == after && read(&disks[1]) == before[1]);
    mount.umount();
    store.img(["check", "-q", "web.qcow2"]);
}

#[test]
fn while_a_chain_above_it_is_written_a_layer_is_not_repaired() {
    let store = leaking();
    store.overlay("top.qcow2", "web.qcow2", "qcow2", "");
    let mount = Mount::new(&store);
    let disk = File::options().write(true).open(mount.path("top/active.raw")).expect("a disk");
    disk.write_all_at(b"above", 0).expect("a write");
    let (code, said) = repair(&store);
    assert_eq!(code, 1, "{said}");
    drop(disk);
    mount.umount();
    assert_eq!(repair(&store).0, 0);
}
