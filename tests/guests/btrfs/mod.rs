//! btrfs, compared with the kernel: whole trees as its mount shows them, logs as it replays them, several
//! devices, and damage. Needs root and loop devices.

mod damage;
mod devices;
pub(crate) mod disk;
mod logs;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use chainfs::guest::FileKind;

use crate::content::{Content, many_names};
use crate::disk::set_xattr;
pub(crate) use disk::forgive_times_since;
use disk::*;
use support::{Outcome as _, Rng, tool};

const MIB: u64 = 1 << 20;

/// Fills a disk of that kind, and compares all of it.
fn shown_as_by_the_kernel(mkfs: &str, options: &str, content: &Content) -> Disk {
    let disk = Disk::format(mkfs, &[400 * MIB]);
    disk.mounted(&format!("rw,{options}"), |dir| {
        content.fill(dir);
        special(dir);
    });
    compare(&disk, &format!("{mkfs}, {options}"));
    disk
}

/// Everything that fits nodes of 4 KiB.
fn small_nodes() -> Content {
    Content { value_len: 300, target_len: 3000, ..Content::ext4() }
}

/// What other file systems do not have: shared extents, attributes of many sizes, prepared space.
fn special(dir: &Path) {
    let dir = dir.join("special");
    fs::create_dir(&dir).expect("a directory");
    let mut rng = Rng::new(5);
    let whole = dir.join("whole");
    let mut text = Vec::new();
    while text.len() < 700_000 {
        text.extend(format!("line {} {}\n", text.len(), rng.below(1000)).bytes());
    }
    fs::write(&whole, &text).expect("a file");
    fs::write(dir.join("random"), rng.bytes(300_000)).expect("a file");
    for len in [1, 100, 2000, 2048, 2049, 4000, 4096, 5000] {
        fs::write(dir.join(format!("text {len}")), &text[..len]).expect("a file");
    }
    let clone = dir.join("clone");
    tool("cp").arg("--reflink=auto").arg(&whole).arg(&clone).succeeds();
    // A part of a shared extent is written, and holes are punched into others.
    let file = File::options().write(true).open(&clone).expect("the file");
    file.write_all_at(b"changed", 200_000).expect("a change");
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&file, flags, 300_000, 100_000).expect("a hole");
    for number in 0..40u8 {
        set_xattr(&whole, &format!("user.{number}"), &vec![number; usize::from(number) * 20]);
    }
}

#[test]
fn options_of_all_times() {
    for (mkfs, options) in [
        ("", "compress=no"),
        ("-O ^no-holes,^skinny-metadata -R ^free-space-tree", "space_cache=v1"),
        ("-O ^no-holes -R ^free-space-tree -n 4096", "space_cache=v1,max_inline=2048"),
        ("-n 65536", "max_inline=0"),
        ("-n 32768 -m single -d single", "nodatacow"),
        ("-m dup -d dup", "nodatasum"),
        ("-R quota", "ssd"),
    ] {
        let content = if mkfs.contains("-n 4096") { small_nodes() } else { Content::ext4() };
        shown_as_by_the_kernel(mkfs, options, &content);
    }
    shown_as_by_the_kernel("--mixed -n 4096", "compress=no", &small_nodes());
}

/// Features that mkfs.btrfs of Debian 12 does not know.
#[test]
fn options_of_newer_programs() {
    let (_, out, known) = tool("mkfs.btrfs").args(["-O", "list-all"]).outcome();
    for feature in ["block-group-tree", "squota"] {
        if out.contains(feature) || known.contains(feature) {
            shown_as_by_the_kernel(&format!("-O {feature}"), "compress=no", &Content::ext4());
        } else {
            println!("mkfs.btrfs does not know {feature}");
        }
    }
}

#[test]
fn every_compression() {
    for options in ["compress-force=zlib", "compress-force=lzo", "compress-force=zstd:15", "compress=zstd"] {
        shown_as_by_the_kernel("", options, &Content::ext4());
    }
    shown_as_by_the_kernel("-n 4096 --mixed", "compress-force=lzo", &small_nodes());
}

#[test]
fn every_checksum() {
    for sum in ["xxhash", "sha256", "blake2"] {
        shown_as_by_the_kernel(&format!("--csum {sum}"), "compress=no", &Content::small());
    }
}

#[test]
fn a_changed_identity() {
    for option in ["-m", "-u"] {
        let disk = Disk::format("", &[200 * MIB]);
        disk.mounted("rw", special);
        tool("btrfstune").args(["-f", option]).arg(&disk.images[0]).succeeds();
        compare(&disk, option);
    }
}

/// Names with equal hashes share an item.
#[test]
fn names_with_equal_hashes() {
    let hash = |name: &str| {
        name.bytes().fold(!1u32, |sum, byte| {
            (0..8)
                .fold(sum ^ u32::from(byte), |sum, _| (sum >> 1) ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 })
        })
    };
    let mut known = std::collections::HashMap::new();
    let mut equal = Vec::new();
    for number in 0u64.. {
        let name = format!("n{:x}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if let Some(other) = known.insert(hash(&name), name.clone()) {
            equal.push((other, name));
            if equal.len() == 5 {
                break;
            }
        }
    }
    let disk = Disk::format("", &[200 * MIB]);
    disk.mounted("rw", |dir| {
        fs::write(dir.join("file"), "attributes").expect("a file");
        for (one, other) in &equal {
            fs::write(dir.join(one), one).expect("a file");
            fs::write(dir.join(other), other).expect("a file");
        }
        fs::remove_file(dir.join(&equal[0].0)).expect("a removal");
    });
    compare(&disk, "equal hashes");
}

#[test]
fn a_large_tree() {
    let long = std::env::var_os("CHAINFS_LONG").is_some();
    let (files, pieces) = if long { (usize::MAX >> 1, 10_000) } else { (1500, 3000) };
    let content = Content { files, names: 30_000, pieces, ..Content::ext4() };
    let disk = Disk::format("", &[if long { 12_000 } else { 1500 } * MIB]);
    disk.mounted("rw,compress=zstd", |dir| content.fill(dir));
    compare(&disk, "a large tree");
}

fn btrfs(words: &[&str], path: &Path) {
    tool("btrfs").args(words).arg(path).succeeds();
}

#[test]
fn subvolumes_and_snapshots() {
    let disk = Disk::format("", &[400 * MIB]);
    let make = |path: &Path| btrfs(&["subvolume", "create"], path);
    let default = disk.mounted("rw", |dir| {
        for name in ["@", "@home", "@/var"] {
            make(&dir.join(name));
        }
        fs::create_dir_all(dir.join("@/srv/deep/down")).expect("directories");
        make(&dir.join("@/srv/deep/down/nested"));
        for (number, path) in ["@", "@home", "@/var", "@/srv/deep/down/nested"].into_iter().enumerate() {
            let dir = dir.join(path);
            fs::write(dir.join(format!("in {number}")), Rng::new(number as u64).bytes(30_000))
                .expect("a file");
            many_names(&dir.join("many"), 50 + number);
        }
        let snapshot = |from: &str, to: &str, extra: &[&str]| {
            let mut words = vec!["subvolume", "snapshot"];
            words.extend(extra);
            tool("btrfs").args(words).arg(dir.join(from)).arg(dir.join(to)).succeeds();
        };
        fs::create_dir(dir.join("snapshots")).expect("a directory");
        // In snapshots, the subvolumes within are empty directories.
        snapshot("@", "snapshots/1", &["-r"]);
        fs::write(dir.join("@/in 0"), "changed").expect("a file");
        snapshot("@", "snapshots/2", &[]);
        fs::write(dir.join("snapshots/2/only here"), "in a snapshot").expect("a file");
        make(&dir.join("gone"));
        snapshot("snapshots/2", "snapshots/3", &["-r"]);
        btrfs(&["subvolume", "delete"], &dir.join("gone"));
        // The name of a moved subvolume is another one, and a snapshot keeps the old one.
        fs::rename(dir.join("@/var"), dir.join("@home/var moved")).expect("a move");
        tool("sync").arg("-f").arg(dir).succeeds();
        tool("btrfs").args(["inspect-internal", "rootid"]).arg(dir.join("@")).succeeds().trim().to_owned()
    });
    let names = |disk: &Disk| {
        let trees = compare(disk, "subvolumes");
        trees
            .iter()
            .map(|tree| tree.path.as_deref().map(|path| String::from_utf8_lossy(path).into_owned()))
            .collect()
    };
    let expected = [
        Some(""),
        Some("@"),
        Some("@home"),
        Some("@home/var moved"),
        Some("@/srv/deep/down/nested"),
        Some("snapshots/1"),
        Some("snapshots/2"),
        Some("snapshots/3"),
    ];
    let found: Vec<Option<String>> = names(&disk);
    assert_eq!(found.iter().map(Option::as_deref).collect::<Vec<_>>(), expected);
    let nested = shown(&*disk.open()[0].files, &disk);
    assert!(nested.contains_key(&b"/@/srv/deep/down/nested/in 3"[..]));
    assert!(count(&nested, FileKind::Directory) > 20);

    disk.mounted("rw", |dir| {
        tool("btrfs").args(["subvolume", "set-default", &default]).arg(dir).succeeds();
    });
    let found: Vec<Option<String>> = names(&disk);
    assert_eq!(found[..2], [Some("@".to_owned()), Some(String::new())]);
    assert_eq!(found.len(), expected.len());
}
