//! Damaged disks: damage is an error of the affected file, and never more than an error.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex};

use chainfs::error::{ErrorKind, Result};
use chainfs::guest::xfs::Xfs;
use chainfs::guest::{FileKind, FileSystem as _, Ino, Source};

use crate::content::*;
use crate::counted::Counted;
use crate::disk::*;
use crate::ext::journals::work;
use support::{Outcome as _, Rng, tool};

use super::{SIZE, long, open};

fn victim(mkfs: &str) -> Disk {
    let disk = Disk::format(mkfs, SIZE);
    disk.mounted("rw", |dir| {
        fs::create_dir(dir.join("sub")).expect("a directory");
        for number in 0..20 {
            fs::write(dir.join(format!("sub/file-{number}")), vec![number; 5000]).expect("a file");
        }
        many_names(&dir.join("many"), 3000);
        for value in 0..40 {
            set_xattr(&dir.join("sub/file-5"), &format!("user.large {value}"), &[5; 700]);
        }
        let pieces = File::create(dir.join("pieces")).expect("a file");
        for piece in 0..600u64 {
            pieces.write_all_at(&[1; 1024], piece * 9000).expect("a piece");
        }
    });
    disk
}

fn find(ours: &Xfs, path: &str) -> Ino {
    let step = |at, name: &str| ours.lookup(at, name.as_bytes()).expect("it is whole").expect("it is there");
    path.split('/').fold(ours.root(), step)
}

/// The byte offset of what commands of `xfs_db` find, beginning in the inode of a path.
fn place_of(disk: &Disk, path: &str, commands: &[&str]) -> u64 {
    let mut db = tool("xfs_db");
    db.args(["-r", "-c", &format!("path {path}")]);
    for command in commands.iter().chain(&["daddr"]) {
        db.args(["-c", command]);
    }
    let shown = db.arg(&disk.image).succeeds();
    let sector: u64 = shown.trim().rsplit(' ').next().expect("a word").parse().expect("a number");
    sector * 512
}

#[test]
fn damage_affects_only_the_damaged_files() {
    let disk = victim("mkfs.xfs");
    let inode = disk.snapshot();
    // Inodes of 512 bytes begin at sectors.
    inode.write(place_of(&inode, "/sub/file-7", &[]) + 11, b"!");
    let ours = open(&inode);
    for number in 0..20 {
        let found = ours.attributes(find(&ours, &format!("sub/file-{number}")));
        assert_eq!(found.err().map(|error| error.kind()), (number == 7).then_some(ErrorKind::Corrupt));
    }

    let directory = disk.snapshot();
    directory.write(place_of(&directory, "/many", &["dblock 2"]) + 100, b"!");
    let ours = open(&directory);
    let mut names = 0;
    let listed = ours.list(find(&ours, "many"), 0, &mut |_| {
        names += 1;
        true
    });
    let error = listed.err().map(|error| error.kind());
    assert!(error == Some(ErrorKind::Corrupt) && names > 1500, "{names} {error:?}");

    let attributes = disk.snapshot();
    attributes.write(place_of(&attributes, "/sub/file-5", &["ablock 1"]) + 900, b"!");
    let ours = open(&attributes);
    let hit = find(&ours, "sub/file-5");
    assert_eq!(ours.extended_attributes(hit).expect_err("it is damaged").kind(), ErrorKind::Corrupt);
    assert_eq!(ours.read_at(hit, 0, &mut [0; 10]).expect("its content is whole"), 10);
}

/// A disk that notes which blocks of a kibibyte are read.
struct Noted(FileSource, Mutex<BTreeSet<u64>>);

impl Source for Noted {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.1.lock().expect("no panic").extend(at / 1024..(at + buf.len() as u64).div_ceil(1024));
        self.0.read_at(at, buf)
    }
}

/// A disk with other bytes in some places.
struct Patched(FileSource, Vec<(u64, Vec<u8>)>);

impl Source for Patched {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.0.read_at(at, buf)?;
        for (place, bytes) in &self.1 {
            for (here, byte) in (*place..).zip(bytes).filter(|(here, _)| *here >= at) {
                if let Some(old) = buf.get_mut((here - at) as usize) {
                    *old = *byte;
                }
            }
        }
        Ok(())
    }
}

/// Up to 40 changes of these blocks: bits, bytes, numbers, and pieces of other blocks.
fn patches(disk: &FileSource, blocks: &[u64], rng: &mut Rng) -> Vec<(u64, Vec<u8>)> {
    let place = |rng: &mut Rng| blocks[rng.below(blocks.len() as u64) as usize] * 1024 + rng.below(1024);
    let read = |at: u64, len: usize| {
        let mut bytes = vec![0; len];
        disk.read_at(at.min(disk.size() - len as u64), &mut bytes).expect("it is on the disk");
        bytes
    };
    (0..=rng.below(40))
        .map(|_| {
            let at = place(rng);
            match rng.below(4) {
                0 => (at, vec![read(at, 1)[0] ^ 1 << rng.below(8)]),
                1 => (at, vec![[0, 0xff, 0x7f, 0x80][rng.below(4) as usize]]),
                2 => (at & !3, (rng.next() as u32).to_le_bytes().to_vec()),
                _ => (at & !15, read(place(rng), 64)),
            }
        })
        .collect()
}

/// The blocks that are read to open a disk and to show its files, without their content.
fn telling_blocks(disk: &Disk) -> Vec<u64> {
    let noted = Arc::new(Noted(FileSource::open(&disk.image), Mutex::default()));
    let ours = Xfs::open(Arc::clone(&noted) as Arc<dyn Source>).expect("our reader opens it");
    let mut left = vec![ours.root()];
    while let Some(ino) = left.pop() {
        let kind = ours.attributes(ino).expect("it is whole").kind;
        ours.extended_attributes(ino).expect("it is whole");
        match kind {
            FileKind::Directory => ours
                .list(ino, 0, &mut |entry| {
                    left.push(entry.ino);
                    true
                })
                .expect("it is whole"),
            FileKind::File => drop(ours.runs(ino, 0, u64::MAX, 4096).expect("it is whole")),
            FileKind::Symlink => drop(ours.read_link(ino).expect("it is whole")),
            _ => {}
        }
    }
    noted.1.lock().expect("no panic").iter().copied().collect()
}

/// Damaged structures get an answer: within limits of time, and never a panic. Without checksums, damage is
/// seen only by those who read it; and what a log has changed has none.
#[test]
fn scrambled_disks_get_an_answer() {
    let rounds = if long() { 2000 } else { 60 };
    let clean = ["mkfs.xfs", "mkfs.xfs -b size=1024"].map(victim);
    let work_on = |mkfs: &str| {
        let disk = Disk::format(mkfs, SIZE);
        disk.mounted("rw", |dir| {
            work(dir, 0);
            work(dir, 1);
            disk.snapshot()
        })
    };
    let dirty = ["mkfs.xfs", "mkfs.xfs -b size=1024"].map(work_on);
    for disk in clean.iter().chain(&dirty) {
        let blocks = telling_blocks(disk);
        let mut asked = 0;
        for seed in 0..rounds {
            let source = FileSource::open(&disk.image);
            let patches = patches(&source, &blocks, &mut Rng::new(seed));
            let counted = Arc::new(Counted::new(Patched(source, patches)));
            let Ok(ours) = Xfs::open(Arc::clone(&counted) as Arc<dyn Source>) else { continue };
            counted.taken();
            walk_everything(&ours, |what, ino| {
                let (requests, bytes) = counted.taken();
                let is_bounded = requests <= 20_000 && bytes <= 64 << 20;
                assert!(is_bounded, "seed {seed}, {what} of {}: {requests} for {bytes} bytes", ino.0);
                asked += 1;
            });
        }
        assert!(asked > rounds * 10, "most damaged disks can be opened");
    }
}
