//! File systems on several devices: all profiles, and devices that are missing or damaged.

use std::fs;
use std::path::Path;

use chainfs::error::ErrorKind;
use chainfs::guest::btrfs::Btrfs;

use super::disk::*;
use super::{MIB, special};
use crate::content::{Content, many_names};
use crate::disk::{Tree, assert_same_trees, kernel_tree};
use support::Rng;

fn fill(dir: &Path) {
    special(dir);
    many_names(&dir.join("many"), 3000);
    for number in 0..20 {
        fs::write(dir.join(format!("large {number}")), Rng::new(number).bytes(900_000)).expect("a file");
    }
}

/// The kernel's tree of a whole disk, and what chainfs shows of some of its devices.
fn with_devices(disk: &Disk, theirs: &Tree, devices: &[usize], what: &str) {
    let trees = Btrfs::open(&disk.sources(devices.iter().copied())).expect("our reader opens it");
    let remarks = trees[0].files.remarks();
    assert_eq!(remarks.len(), usize::from(devices.len() < disk.images.len()), "{what}: {remarks:?}");
    // Nothing says where the bytes of several devices are.
    assert_same_trees(what, theirs, &shown(&*trees[0].files, disk));
}

#[test]
fn every_profile() {
    for (profile, count, losable) in [
        ("single", 2, 0),
        ("raid0", 3, 0),
        ("raid1", 2, 1),
        ("raid1c3", 3, 2),
        ("raid1c4", 4, 3),
        ("raid10", 4, 1),
        ("raid5", 3, 1),
        ("raid6", 4, 2),
    ] {
        let disk = Disk::format(&format!("-d {profile} -m {profile}"), &vec![300 * MIB; count]);
        disk.mounted("rw", fill);
        compare(&disk, profile);
        let theirs = disk.mounted("ro", kernel_tree);
        let all: Vec<usize> = (0..count).collect();
        // In any order, and twice.
        let mut reversed: Vec<usize> = all.iter().rev().copied().collect();
        reversed.push(0);
        with_devices(&disk, &theirs, &reversed[..count], &format!("{profile}, reversed"));
        Btrfs::open(&disk.sources(reversed)).expect("a device given twice is no error");
        for lost in 0..if losable > 0 { count } else { 0 } {
            let left: Vec<usize> =
                all.iter().copied().filter(|device| (device + count - lost) % count >= losable).collect();
            with_devices(&disk, &theirs, &left, &format!("{profile}, only {left:?}"));
        }
    }
}

#[test]
fn a_missing_device_without_a_copy_costs_only_its_bytes() {
    let disk = Disk::format("-d raid0 -m raid1", &[300 * MIB, 300 * MIB]);
    disk.mounted("rw", fill);
    let trees = Btrfs::open(&disk.sources([1])).expect("metadata has a copy");
    let files = &*trees[0].files;
    let large = files.lookup(files.root(), b"large 1").expect("it is whole").expect("it is there");
    let mut buf = vec![0; 4096];
    let read: Vec<Result<usize, ErrorKind>> = (0..900_000u64)
        .step_by(64 << 10)
        .map(|at| files.read_at(large, at, &mut buf).map_err(|e| e.kind()))
        .collect();
    let failed = read.iter().filter(|read| **read == Err(ErrorKind::Corrupt)).count();
    let good = read.iter().filter(|read| read.is_ok()).count();
    assert!(failed >= 5 && good >= 5 && failed + good == read.len(), "{read:?}");
}

#[test]
fn mixed_profiles_and_sizes() {
    let disk = Disk::format("-d raid0 -m raid1c3", &[200 * MIB, 400 * MIB, 300 * MIB]);
    disk.mounted("rw,compress=zstd", |dir| Content::small().fill(dir));
    compare(&disk, "devices of different sizes");
}

/// A copy of a device, as an LVM snapshot is: each of them shows its own content, whichever is newer.
#[test]
fn a_clone_beside_a_volume_does_not_replace_it() {
    let disk = Disk::format("", &[260 * MIB]);
    disk.mounted("rw", |dir| fs::write(dir.join("state"), "old").expect("a file"));
    let old = disk.snapshot();
    disk.mounted("rw", |dir| fs::write(dir.join("state"), "new").expect("a file"));
    for (first, second, content) in [(&disk, &old, "new"), (&old, &disk, "old")] {
        let trees = Btrfs::open(&[first.sources([0]), second.sources([0])].concat()).expect("it is whole");
        let files = &*trees[0].files;
        let state = files.lookup(files.root(), b"state").expect("a lookup").expect("a file");
        let mut found = [0; 3];
        assert_eq!(files.read_at(state, 0, &mut found).expect("its bytes"), 3);
        assert_eq!(found, content.as_bytes());
    }
}
