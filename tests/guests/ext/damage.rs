//! Damaged disks: damage is an error of the affected file, and never more than an error.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;

use crate::counted::Counted;
use chainfs::error::ErrorKind;
use chainfs::guest::ext::Ext;
use chainfs::guest::{FileSystem as _, Ino, Source};

use super::journals::{small_changes, work};
use crate::content::*;
use crate::disk::*;
use crate::scramble::{scramble, telling_blocks};
use support::Rng;

use super::{MIB, long};

/// A small disk with some files, for damage.
pub(crate) fn victim(mkfs: &str) -> Disk {
    let disk = Disk::format(mkfs, 40 * MIB);
    disk.mounted("rw", |dir| {
        fs::create_dir(dir.join("sub")).expect("a directory");
        for number in 0..20 {
            fs::write(dir.join(format!("sub/file {number}")), vec![number; 5000]).expect("a file");
        }
        many_names(&dir.join("many"), 600);
        set_xattr(&dir.join("sub/file 5"), "user.large", &[5; 700]);
        let pieces = File::create(dir.join("pieces")).expect("a file");
        for piece in 0..30u64 {
            pieces.write_all_at(&[1; 1024], piece * 9000).expect("a piece");
        }
    });
    disk
}

pub(crate) fn find(ours: &Ext, path: &str) -> Ino {
    let step = |at, name: &str| ours.lookup(at, name.as_bytes()).expect("it is whole").expect("it is there");
    path.split('/').fold(ours.root(), step)
}

fn names_in(ours: &Ext, directory: Ino) -> (usize, Option<ErrorKind>) {
    let mut count = 0;
    let listed = ours.list(directory, 0, &mut |_| {
        count += 1;
        true
    });
    (count, listed.err().map(|error| error.kind()))
}

/// Damage is an error of the affected entry; everything else stays readable.
#[test]
fn damage_affects_only_the_damaged_files() {
    let disk = victim("mkfs.ext4 -b 1024 -g 8192");
    let whole = our_tree(&disk.open(), &disk.image);
    let block_of =
        |what: &str| -> u64 { disk.debugfs(&format!("bmap {what} 0")).trim().parse().expect("a block") };

    let inode = disk.snapshot();
    inode.debugfs("set_inode_field \"/sub/file 7\" checksum 0x1234");
    let ours = inode.open();
    assert_eq!(names_in(&ours, find(&ours, "sub")), (20, None));
    for number in 0..20 {
        let found = ours.attributes(find(&ours, &format!("sub/file {number}")));
        assert_eq!(found.err().map(|error| error.kind()), (number == 7).then_some(ErrorKind::Corrupt));
    }

    let directory = disk.snapshot();
    let block: u64 = directory.debugfs("bmap /many 3").trim().parse().expect("a block");
    directory.write(block * 1024 + 100, b"!");
    let ours = directory.open();
    let (names, error) = names_in(&ours, find(&ours, "many"));
    assert!(error == Some(ErrorKind::Corrupt) && names > 450, "{names} {error:?}");
    let mut last = None;
    ours.list(find(&ours, "many"), 0, &mut |entry| {
        last = Some(entry.next);
        true
    })
    .expect_err("the damage is told at the end");
    let again = ours.list(find(&ours, "many"), last.expect("there are names"), &mut |_| true);
    assert!(again.is_err(), "and by the rest of a listing that has gone by it");

    let attributes = disk.snapshot();
    let stat = attributes.debugfs("stat \"/sub/file 5\"");
    let block: u64 = stat
        .split("File ACL: ")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .expect("one")
        .parse()
        .expect("a block");
    attributes.write(block * 1024 + 900, b"!");
    let ours = attributes.open();
    let hit = find(&ours, "sub/file 5");
    assert_eq!(ours.extended_attributes(hit).expect_err("it is damaged").kind(), ErrorKind::Corrupt);
    assert_eq!(ours.read_at(hit, 0, &mut [0; 10]).expect("its content is whole"), 10);

    let extents = disk.snapshot();
    let dump = extents.debugfs("extents /pieces");
    let node = dump.lines().find(|line| line.trim_start().starts_with("0/")).expect("an index");
    let block: u64 = node.split_whitespace().nth(7).expect("its block").parse().expect("a number");
    extents.write(block * 1024 + 20, b"!");
    let ours = extents.open();
    assert_eq!(
        ours.read_at(find(&ours, "pieces"), 0, &mut [0; 10]).expect_err("it is damaged").kind(),
        ErrorKind::Corrupt
    );

    // The first group's descriptor: there is a copy in the second.
    let descriptor = disk.snapshot();
    descriptor.write(2 * 1024 + 0xc, b"\x11\x22");
    let ours = descriptor.open();
    assert_eq!(our_tree(&ours, &descriptor.image), whole);
    assert!(ours.remarks()[0].contains("group 0 is damaged"), "{:?}", ours.remarks());
    descriptor.write((8193 + 1) * 1024 + 0xc, b"\x11\x22");
    assert_eq!(our_tree(&descriptor.open(), &descriptor.image), whole);
    descriptor.write((8193 + 1) * 1024, &[0xff; 64]);
    assert_eq!(our_tree(&descriptor.open(), &descriptor.image), whole);
    descriptor.write(2 * 1024, &[0xff; 64]);
    assert!(descriptor.open().attributes(Ino(2)).is_err(), "nothing says any more where the inodes are");
    assert!(block_of("/sub") > 0);
}

/// Without its first superblock, a file system is found by a copy, and its journal is replayed.
#[test]
fn copies_of_the_superblock_are_found() {
    for mkfs in [
        "mkfs.ext4 -b 1024",
        "mkfs.ext2 -b 1024 -O ^sparse_super,^resize_inode",
        "mkfs.ext4 -b 2048",
        "mkfs.ext4 -b 1024 -O bigalloc -C 4096",
        "mkfs.ext4 -b 1024 -O sparse_super2,^resize_inode",
    ] {
        let disk = victim(mkfs);
        let whole = our_tree(&disk.open(), &disk.image);
        disk.write(1024, &[0; 1024]);
        let ours = disk.open();
        assert_eq!(our_tree(&ours, &disk.image), whole, "{mkfs}");
        assert!(ours.remarks()[0].contains("its copy in group 1 is used"), "{:?}", ours.remarks());
    }
    let disk = Disk::format("mkfs.ext4 -b 4096", 256 * MIB);
    let dirty = disk.mounted("rw,commit=300", |dir| {
        work(dir, 0);
        disk.snapshot()
    });
    let whole = our_tree(&dirty.open(), &dirty.image);
    dirty.write(1024, &[0; 1024]);
    assert_eq!(our_tree(&dirty.open(), &dirty.image), whole, "replayed");
}

#[test]
fn unreadable_volumes_are_refused_with_a_reason() {
    let refused =
        |disk: &Disk| Ext::open(Arc::new(FileSource::open(&disk.image))).expect_err("it cannot be opened");
    let disk = victim("mkfs.ext4 -b 1024 -O ^metadata_csum");
    disk.write(1024 + 0x63, &[0x80]);
    let error = refused(&disk);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(
        error.to_string().contains("ext4 with features that chainfs does not know: 0x80000000"),
        "{error}"
    );
    let nothing = Disk::format("mkfs.ext4", 8 * MIB);
    nothing.write(0, &[0; 4096]);
    assert_eq!(refused(&nothing).kind(), ErrorKind::Corrupt);

    // A directory with a wrong encryption flag, and a file: they cannot be read.
    let disk = victim("mkfs.ext4 -b 1024 -O encrypt");
    disk.debugfs("set_inode_field /sub flags 0x80800");
    disk.debugfs("set_inode_field \"/pieces\" flags 0x80800");
    let ours = disk.open();
    let (sub, pieces) = (find(&ours, "sub"), find(&ours, "pieces"));
    assert!(!matches!(ours.lookup(sub, b"file 1"), Ok(Some(_))));
    assert_eq!(names_in(&ours, sub), (0, Some(ErrorKind::Corrupt)), "no name of it can be one");
    assert_eq!(
        ours.read_at(pieces, 0, &mut [0; 9]).expect_err("it is encrypted").kind(),
        ErrorKind::Unsupported
    );
    assert_eq!(ours.runs(pieces, 0, 9, 9).expect_err("it is encrypted").kind(), ErrorKind::Unsupported);
    assert!(ours.attributes(pieces).is_ok() && names_in(&ours, find(&ours, "many")).1.is_none());

    // The truncation is reported, and the rest is shown.
    let disk = victim("mkfs.ext4 -b 1024");
    File::options()
        .write(true)
        .open(&disk.image)
        .and_then(|file| file.set_len(20 * MIB))
        .expect("a shorter disk");
    let ours = disk.open();
    assert!(ours.remarks()[0].contains("the rest is missing"), "{:?}", ours.remarks());
    assert!(names_in(&ours, find(&ours, "many")).0 > 0);
}

/// Requests and bytes that opening a damaged disk of 32 MiB takes at most; an undamaged one takes some 80.
const OPENING: (u64, u64) = (10_000, 64 << 20);
/// The same for one question; an undamaged directory takes some 50.
const ANSWER: (u64, u64) = (20_000, 128 << 20);

/// Random changes of metadata: an answer or an error, in time, and never a panic.
#[test]
fn every_damaged_disk_gets_an_answer() {
    let rounds = if long() { 2000 } else { 36 };
    let with_journal = Disk::format("mkfs.ext4 -b 1024 -O fast_commit,^metadata_csum -J size=4", 32 * MIB);
    let dirty = with_journal.mounted("rw,commit=300", |dir| {
        small_changes(dir, 0);
        small_changes(dir, 1);
        with_journal.snapshot()
    });
    let disks = [
        victim("mkfs.ext4 -b 1024 -O ^metadata_csum"),
        victim("mkfs.ext4 -b 1024"),
        victim("mkfs.ext3 -b 1024"),
        victim("mkfs.ext4 -b 4096 -I 256 -O inline_data,^metadata_csum"),
        victim("mkfs.ext4 -b 1024 -O bigalloc,^metadata_csum,ea_inode,large_dir -C 4096"),
        dirty,
    ];
    let disks = disks.map(|disk| fs::read(&disk.image).expect("a disk"));
    let mut errors = 0;
    for round in 0..rounds {
        let mut rng = Rng::new(round + 4711);
        let mut bytes = disks[round as usize % disks.len()].clone();
        let blocks = telling_blocks(&bytes);
        scramble(&mut bytes, &blocks, &mut rng);
        let source = Arc::new(Counted::new(bytes));
        let opened = Ext::open(Arc::clone(&source) as Arc<dyn Source>);
        let (requests, read) = source.taken();
        assert!(
            requests <= OPENING.0 && read <= OPENING.1,
            "round {round}: opening: {requests} requests, {read} bytes"
        );
        let Ok(ours) = opened else {
            errors += 1;
            continue;
        };
        errors += walk_everything(&ours, |what, ino| {
            let (requests, read) = source.taken();
            let is_little = requests <= ANSWER.0 && read <= ANSWER.1;
            assert!(is_little, "round {round}: {what} of inode {}: {requests} requests, {read} bytes", ino.0);
        });
    }
    assert!(errors > rounds as usize / 4, "the changes hit nothing: {errors} errors");
}
