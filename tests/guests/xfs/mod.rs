//! XFS, compared with the kernel: whole trees as its mount shows them, dirty logs as it replays them, and
//! damage. Needs root and loop devices.

mod damage;
mod logs;

use std::fs::{self, File};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::sync::Arc;

use chainfs::guest::xfs::Xfs;
use chainfs::guest::{FileSystem as _, Source};

use crate::content::*;
use crate::counted::Counted;
use crate::disk::*;
use support::{Outcome as _, Rng, tool};

const MIB: u64 = 1 << 20;
/// mkfs.xfs makes nothing smaller without being told.
const SIZE: u64 = 320 * MIB;

fn long() -> bool {
    std::env::var_os("CHAINFS_LONG").is_some()
}

fn open(disk: &Disk) -> Xfs {
    Xfs::open(disk.source()).expect("our reader opens it")
}

/// What XFS has beside the content of all file systems: shared extents, and extents that were reserved.
fn more(dir: &Path) {
    let dir = dir.join("more");
    fs::create_dir(&dir).expect("a directory");
    let mut rng = Rng::new(11);
    fs::write(dir.join("one"), rng.bytes(3_000_000)).expect("a file");
    // File systems without shared extents refuse it, and have a copy.
    let options = ["--reflink=auto"];
    tool("cp").args(options).arg(dir.join("one")).arg(dir.join("two")).succeeds();
    let two = File::options().write(true).open(dir.join("two")).expect("a file");
    for piece in 0..60 {
        two.write_all_at(&rng.bytes(5000), piece * 49_152 + 100).expect("a piece of its own");
    }
    for len in [1, 100, 300, 340, 480, 700, 1000, 1023] {
        symlink("l".repeat(len), dir.join(format!("link of {len}"))).expect("a link");
    }
    for (number, len) in [1, 100, 1000, 3000, 5000, 20_000, 65_536].into_iter().enumerate() {
        let file = dir.join(format!("value of {len}"));
        fs::write(&file, "content").expect("a file");
        set_xattr(&file, "user.value", &rng.bytes(len));
        set_xattr(&file, "user.second", &[number as u8; 200]);
    }
    let many = dir.join("many attributes");
    fs::create_dir(&many).expect("a directory");
    for number in 0..900 {
        set_xattr(&many, &format!("user.attribute with number {number}"), &rng.bytes(number % 90));
    }
    // From the largest form of a directory back to the smallest.
    many_names(&dir.join("shrunk"), 3000);
    for entry in fs::read_dir(dir.join("shrunk")).expect("a directory").skip(2) {
        let path = entry.expect("an entry").path();
        if path.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) }.expect("a removal");
    }
    for names in [1, 3, 20, 150, 400] {
        many_names(&dir.join(format!("{names} names")), names);
    }
    rustix::fs::fsync(File::open(&dir).expect("a directory").as_fd()).expect("fsync");
}

fn fill(dir: &Path, content: &Content) {
    content.fill(dir);
    more(dir);
}

fn shown_as_by_the_kernel(mkfs: &str, size: u64, content: &Content) -> Disk {
    let disk = Disk::format(mkfs, size);
    disk.mounted("rw", |dir| fill(dir, content));
    compare(&disk, &open(&disk), mkfs);
    disk
}

fn content() -> Content {
    // XFS has targets of 1,024 bytes and minor numbers of 18 bits.
    Content { value_len: 40_000, target_len: 1023, minor: 0x35678, ..Content::ext4() }
}

/// The options of ten years of distributions.
#[test]
fn version_5_of_the_usual_kinds() {
    for mkfs in [
        "mkfs.xfs",
        // RHEL 7, and the first kernels with checksums.
        "mkfs.xfs -m crc=1,finobt=0,rmapbt=0,reflink=0,bigtime=0,inobtcount=0 -i sparse=0,nrext64=0",
        "mkfs.xfs -m crc=1,finobt=1,rmapbt=0,reflink=1,bigtime=0,inobtcount=0 -i sparse=1,nrext64=0",
        "mkfs.xfs -m rmapbt=1,reflink=1,bigtime=1 -i nrext64=1,size=1024",
    ] {
        shown_as_by_the_kernel(mkfs, SIZE, &content());
    }
}

/// The kernel of today mounts no version 4: mkfs.xfs itself copies the files, and they are the oracle.
#[test]
fn version_4_of_all_kinds() {
    let place = tempfile::tempdir().expect("a directory");
    let (mut lines, mut files) = (vec!["/dev/null\n0 0\nd--755 3 4".to_owned()], Vec::new());
    let mut rng = Rng::new(4);
    for (directory, count) in [("few", 3), ("some", 60), ("many", 2500)] {
        lines.push(format!("{directory} d--750 0 0"));
        for number in 0..count {
            let len = [0, 1, 100, 4096, 30_000][number % 5];
            let source = place.path().join(format!("{directory}-{}", number % 20));
            if number < 20 {
                fs::write(&source, rng.bytes(len)).expect("a file");
            }
            let name = format!("file-{number}-{}", "n".repeat(number % 40));
            lines.push(format!("{name} ---640 7 {number} {}", source.display()));
            files.push((format!("{directory}/{name}"), number as u32, source));
        }
        lines.push("$".to_owned());
    }
    let long = "t".repeat(700);
    lines.push(format!("short l--777 0 0 few\nlong l--777 0 0 {long}\nnull c--666 0 0 1 3\n$\n"));
    let path = place.path().join("prototype");
    fs::write(&path, lines.join("\n")).expect("a file");
    for options in [
        "-m crc=0,finobt=0 -n ftype=0",
        "-m crc=0,finobt=0 -n ftype=1 -b size=1024",
        "-m crc=0,finobt=0 -b size=512 -i size=256 -n size=4096",
        "-m crc=0,finobt=0 -i attr=1,projid32bit=0 -l version=1 -n size=65536",
    ] {
        let disk = Disk::format(&format!("mkfs.xfs {options} -p {}", path.display()), SIZE);
        let ours = open(&disk);
        assert_eq!(ours.remarks(), Vec::<String>::new(), "{options}");
        let tree = our_tree(&ours, &disk.image);
        assert_eq!(tree.len(), files.len() + 7, "{options}");
        for (path, gid, source) in &files {
            let node = &tree[[b"/", path.as_bytes()].concat().as_slice()];
            let attributes = &node.attributes;
            assert_eq!((attributes.mode, attributes.uid, attributes.gid), (0o640, 7, *gid), "{path}");
            assert_eq!(attributes.size, fs::metadata(source).expect("a file").len(), "{path}");
            let mut bytes = vec![0; attributes.size as usize];
            ours.read_at(chainfs::guest::Ino(node.ino), 0, &mut bytes).expect("it is whole");
            assert_eq!(bytes, fs::read(source).expect("a file"), "{path}");
        }
        assert_eq!(tree[&b"/short"[..]].target.as_deref(), Some(&b"few"[..]));
        assert_eq!(tree[&b"/long"[..]].target.as_deref(), Some(long.as_bytes()));
        assert_eq!(tree[&b"/null"[..]].attributes.device, (1, 3));
    }
}

#[test]
fn other_sizes_of_blocks_directories_and_inodes() {
    for mkfs in [
        "mkfs.xfs -b size=1024 -n size=4096",
        "mkfs.xfs -b size=1024 -n size=65536",
        "mkfs.xfs -b size=4096 -n size=16384 -i size=2048",
        "mkfs.xfs -b size=2048 -i size=512 -d agcount=4",
        "mkfs.xfs -s size=4096",
    ] {
        shown_as_by_the_kernel(mkfs, SIZE, &content());
    }
}

/// Many files, fifty thousand names in one directory, thousands of extents of one file; few reads for each.
#[test]
fn a_large_tree() {
    let (files, pieces) = if long() { (usize::MAX >> 1, 20_000) } else { (1000, 3000) };
    let size = if long() { 12_000 } else { 900 };
    let content = Content { files, names: 50_000, pieces, ..content() };
    let disk = shown_as_by_the_kernel("mkfs.xfs", size * MIB, &content);
    let source = Arc::new(Counted::new(FileSource::open(&disk.image)));
    let ours = Xfs::open(Arc::clone(&source) as Arc<dyn Source>).expect("our reader opens it");
    let many = ours.lookup(ours.root(), b"many").expect("it is whole").expect("it is there");
    source.taken();
    for number in (1..50_000).filter(|number| (number - 3) % 7 != 0).step_by(50) {
        let name = format!("entry {number:06} with a name that is not short");
        assert!(ours.lookup(many, name.as_bytes()).expect("it is whole").is_some(), "{name}");
        let (requests, bytes) = source.taken();
        assert!(requests <= 8 && bytes <= 8 << 12, "{name}: {requests} requests for {bytes} bytes");
    }
}

/// Realtime files, which are on another device, are refused one by one.
#[test]
fn files_on_a_realtime_device_are_refused() {
    let disk = Disk::format("mkfs.xfs", SIZE);
    disk.mounted("rw", |dir| {
        fs::write(dir.join("plain"), "plain").expect("a file");
        fs::write(dir.join("far"), vec![1; 10_000]).expect("a file");
    });
    tool("xfs_db").args(["-x", "-c", "path /far", "-c", "write core.realtime 1"]).arg(&disk.image).succeeds();
    let ours = open(&disk);
    let find = |name: &[u8]| ours.lookup(ours.root(), name).expect("it is whole").expect("it is there");
    let mut buf = [0; 5];
    assert_eq!(ours.read_at(find(b"plain"), 0, &mut buf).expect("it is on the disk"), 5);
    let error = ours.read_at(find(b"far"), 0, &mut buf).expect_err("it is elsewhere");
    assert!(error.to_string().contains("realtime device"), "{error}");
    assert_eq!(ours.attributes(find(b"far")).expect("its attributes are here").size, 10_000);
}
