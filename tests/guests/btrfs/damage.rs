//! Damage: other copies are used where there are any, and it stays with the entry that it hits.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chainfs::guest::btrfs::Btrfs;
use chainfs::guest::{RunKind, Source};

use super::disk::*;
use super::{MIB, special};
use crate::content::many_names;
use crate::disk::{assert_same_trees, kernel_tree, walk_everything};
use crate::scramble::{scramble, telling_blocks};
use support::foreign::amount;
use support::{Outcome as _, Rng, tool};

/// A small disk with some of everything.
fn small(mkfs: &str) -> Disk {
    let disk = Disk::format(mkfs, &[260 * MIB]);
    disk.mounted("rw,compress=zstd", |dir| {
        special(dir);
        many_names(&dir.join("many"), 500);
    });
    disk
}

#[test]
fn a_damaged_superblock_is_read_by_its_copy() {
    let disk = small("");
    let theirs = disk.mounted("ro", kernel_tree);
    disk.write(0, (64 << 10) + 100, b"damage");
    let trees = disk.open();
    let stale = trees[0].files.stale();
    assert!(stale.len() == 1 && stale[0].contains("its copy 1 is used"), "{stale:?}");
    assert_eq!(trees[0].files.remarks(), stale);
    assert_same_trees("a copy", &theirs, &shown(&*trees[0].files, &disk));
    disk.write(0, (64 << 20) + 100, b"damage");
    Btrfs::open(&disk.sources([0])).expect_err("no copy is left");
}

/// Either copy of everything is damaged, and the other one is used.
#[test]
fn damaged_copies_of_metadata_and_data_are_not_used() {
    let disk = small("-m dup -d dup");
    let theirs = disk.mounted("ro", kernel_tree);
    let size = disk.images[0].metadata().expect("a size").len();
    let whole = disk.read(0, 0, size as usize);
    let damaged = disk.snapshot();
    // Of blocks that are there twice, the first.
    let mut seen = std::collections::HashSet::new();
    let mut count = 0;
    for (number, block) in (0u64..).zip(whole.chunks(4096)) {
        let is_superblock = [16, 16 << 10].contains(&number);
        let is_telling = block.iter().any(|byte| *byte != block[0]);
        if is_telling && !is_superblock && seen.insert(block) {
            damaged.write(0, number * 4096 + 1000, b"damage");
            count += 1;
        }
    }
    assert!(count > 100, "{count} blocks were damaged");
    let trees = damaged.open();
    assert_same_trees("the other copies", &theirs, &shown(&*trees[0].files, &damaged));
}

/// Data with a checksum and without a copy is an error where it is damaged, as for the kernel; data without a
/// checksum is read as it is.
#[test]
fn damaged_data_without_a_copy_is_an_error() {
    let disk = Disk::format("-m dup -d single", &[260 * MIB]);
    let content = Rng::new(4).bytes(64 << 10);
    disk.mounted("rw", |dir| {
        fs::write(dir.join("summed"), &content).expect("a file");
        tool("touch").arg(dir.join("plain")).succeeds();
        tool("chattr").arg("+C").arg(dir.join("plain")).succeeds();
        fs::write(dir.join("plain"), &content).expect("a file");
    });
    let open = |name: &[u8]| {
        let files = Arc::clone(&disk.open()[0].files);
        let ino = files.lookup(files.root(), name).expect("a lookup").expect("a file");
        let runs = files.runs(ino, 0, u64::MAX, 10).expect("its runs");
        (files, ino, runs[0].kind)
    };
    for name in [&b"summed"[..], b"plain"] {
        let (files, ino, kind) = open(name);
        let mut found = vec![0; content.len()];
        assert_eq!(files.read_at(ino, 0, &mut found).expect("its bytes"), content.len());
        assert!(found == content);
        let (RunKind::Verified(at) | RunKind::Stored(at)) = kind else { panic!("{kind:?}") };
        assert_eq!(matches!(kind, RunKind::Verified(_)), name == b"summed", "{kind:?}");
        assert!(disk.read(0, at, content.len()) == content, "it lies where the reader says");
        disk.write(0, at + 9000, b"damage");
    }
    let (files, ino, _) = open(b"summed");
    let mut sector = vec![0; 4096];
    for at in (0..64 << 10).step_by(4096) {
        let read = files.read_at(ino, at, &mut sector);
        assert_eq!(read.is_err(), at == 8192, "at {at}");
    }
    let (files, ino, _) = open(b"plain");
    assert_eq!(files.read_at(ino, 8192, &mut sector).expect("its bytes"), 4096);
    let theirs = disk.mounted("ro", |dir| {
        let read = |name: &str| {
            let file = fs::File::open(dir.join(name)).expect("a file");
            let mut sector = vec![0; 4096];
            file.read_exact_at(&mut sector, 8192).map(|()| sector).ok()
        };
        [read("summed"), read("plain")]
    });
    assert_eq!(theirs, [None, Some(sector)]);
}

/// A damaged node costs the names in it. The others are listed, then comes the error.
#[test]
fn a_listing_continues_behind_damage() {
    let disk = Disk::format("--mixed -m single -n 4096", &[20 * MIB]);
    disk.mounted("rw", |dir| many_names(&dir.join("many"), 500));
    let size = disk.images[0].metadata().expect("a size").len() as usize;
    let good = disk.read(0, 0, size);
    let list = |bytes: &[u8]| -> Option<(Vec<Vec<u8>>, bool)> {
        let source: Arc<dyn Source> = Arc::new(bytes.to_vec());
        let trees = Btrfs::open(&[source]).ok()?;
        let files = &*trees[0].files;
        let directory = files.lookup(files.root(), b"many").ok()??;
        let mut names = Vec::new();
        // In several steps, as a mount does.
        let (mut from, mut is_whole) = (0, true);
        loop {
            let mut count = 0;
            let listed = files.list(directory, from, &mut |entry| {
                names.push(entry.name);
                (from, count) = (entry.next, count + 1);
                count < 50
            });
            is_whole &= listed.is_ok();
            if count < 50 {
                return Some((names, is_whole));
            }
        }
    };
    let (all, is_whole) = list(&good).expect("it is whole");
    assert!(is_whole && all.len() > 400);
    let (mut bytes, mut gaps) = (good.clone(), 0);
    for node in nodes(&good) {
        bytes[node + 200] ^= 1;
        if let Some((names, is_whole)) = list(&bytes) {
            // A damaged node beside the directory could have held names, too.
            assert!(!is_whole || names.len() == all.len());
            assert!(names.iter().all(|name| all.contains(name)));
            gaps += usize::from(!is_whole && names.first() == all.first() && names.last() == all.last());
        }
        bytes[node + 200] ^= 1;
    }
    assert!(gaps > 3, "{gaps} of the damaged nodes were in the middle");
}

/// Where there are nodes of 4 KiB: they begin with a checksum of the rest.
fn nodes(bytes: &[u8]) -> Vec<usize> {
    let is_node = |at: usize| {
        let sum = u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        sum != 0 && crc32c(&bytes[at + 32..at + 4096]) == sum
    };
    (0..bytes.len()).step_by(4096).filter(|at| is_node(*at)).collect()
}

/// Randomly changed disks give answers in time. Their checksums are made right again, as an attacker would.
#[test]
fn changed_disks_get_answers() {
    let rounds = amount(45, 2000);
    let disk = Disk::format("-m single -n 4096 --mixed", &[120 * MIB]);
    let log = disk.mounted("rw,commit=300,compress=lzo", |dir| {
        special(dir);
        many_names(&dir.join("many"), 200);
        fs::create_dir(dir.join("new")).expect("a directory");
        // Another program's sync(2) commits it, and there is no log.
        let mut moments = (0..20).map(|number| {
            let path = dir.join(format!("new/synced {number}"));
            fs::write(&path, "synced").expect("a file");
            fs::File::open(&path).and_then(|file| file.sync_all()).expect("fsync");
            disk.snapshot()
        });
        moments.find(Disk::has_log).expect("a disk with a log")
    });
    let good = log.read(0, 0, 120 << 20);
    let nodes = nodes(&good);
    assert!(nodes.len() > 20, "{} nodes", nodes.len());
    let blocks = telling_blocks(&good);
    let blocks: Vec<usize> =
        blocks.into_iter().filter(|block| nodes.contains(&((block * 1024) & !4095))).collect();
    let (mut errors, mut slowest) = (0, Duration::ZERO);
    let mut disk = Arc::new(good.clone());
    for round in 0..rounds {
        let bytes = Arc::get_mut(&mut disk).expect("nobody reads the last one");
        // Many nodes are not in use any more.
        let mut rng = Rng::new(round + 7);
        (0..6).for_each(|_| scramble(bytes, &blocks, &mut rng));
        for at in &nodes {
            if bytes[*at..at + 4096] != good[*at..at + 4096] {
                let sum = crc32c(&bytes[at + 32..at + 4096]);
                bytes[*at..at + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
        let start = Instant::now();
        match Btrfs::open(&[Arc::clone(&disk) as Arc<dyn Source>]) {
            Err(_) => errors += 1,
            Ok(trees) => {
                slowest = slowest.max(start.elapsed());
                for tree in trees {
                    let mut last = Instant::now();
                    errors += walk_everything(&*tree.files, |what, ino| {
                        let took = last.elapsed();
                        assert!(took < support::hang(), "round {round}: {what} of {} took {took:?}", ino.0);
                        slowest = slowest.max(took);
                        last = Instant::now();
                    });
                }
            }
        }
        Arc::get_mut(&mut disk).expect("nobody reads it").copy_from_slice(&good);
    }
    println!("{rounds} disks: {errors} errors, the slowest answer {slowest:?}");
    assert!(errors > rounds as usize / 2, "the damage hit nothing: {errors} errors");
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}
