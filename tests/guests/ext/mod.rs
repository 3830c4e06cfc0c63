//! ext2, ext3 and ext4, compared with the kernel: whole trees as its mount shows them, dirty journals as it
//! replays them, and damage. Needs root and loop devices.

pub(crate) mod content;
mod damage;
pub(crate) mod disk;
mod encrypted;
mod journals;

use std::fs::{self};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::Path;
use std::sync::Arc;

use chainfs::guest::ext::{Ext, probe};
use chainfs::guest::{FileKind, FileSystem as _, Source};

use crate::counted::Counted;
use content::*;
use disk::*;
use support::{Outcome as _, tool};

const MIB: u64 = 1 << 20;

fn long() -> bool {
    std::env::var_os("CHAINFS_LONG").is_some()
}

/// Fills a disk of that kind, and compares all of it.
fn shown_as_by_the_kernel(mkfs: &str, size: u64, content: &Content) -> Disk {
    let disk = Disk::format(mkfs, size);
    disk.mounted("rw", |dir| content.fill(dir));
    compare(&disk, mkfs);
    disk
}

fn compare(disk: &Disk, what: &str) -> Ext {
    let ours = disk.open();
    let tree = our_tree(&ours, &disk.image);
    let (theirs, sizes) =
        disk.mounted("ro", |dir| (kernel_tree(dir), rustix::fs::statvfs(dir).expect("statvfs")));
    assert_same_trees(what, &theirs, &tree);
    let counted = ours.statistics();
    let our =
        (counted.blocks, counted.free_blocks, counted.available_blocks, counted.inodes, counted.free_inodes);
    assert_eq!(our, (sizes.f_blocks, sizes.f_bfree, sizes.f_bavail, sizes.f_files, sizes.f_ffree), "{what}");
    assert_eq!(ours.remarks(), Vec::<String>::new(), "{what}");
    ours
}

#[test]
fn ext2_of_all_kinds() {
    for mkfs in [
        "mkfs.ext2",
        "mkfs.ext2 -b 1024",
        "mkfs.ext2 -b 4096 -I 128",
        "mkfs.ext2 -O ^filetype,^dir_index -b 2048",
    ] {
        shown_as_by_the_kernel(mkfs, 96 * MIB, &Content::small());
    }
}

#[test]
fn ext3_of_all_kinds() {
    for mkfs in ["mkfs.ext3", "mkfs.ext3 -b 1024 -I 256 -N 5000", "mkfs.ext3 -b 4096 -O ^dir_index"] {
        shown_as_by_the_kernel(mkfs, 96 * MIB, &Content::small());
    }
}

#[test]
fn ext4_of_the_usual_kinds() {
    for mkfs in [
        "mkfs.ext4 -b 1024",
        "mkfs.ext4 -b 2048 -O ^64bit,^metadata_csum",
        "mkfs.ext4 -b 4096 -O ^64bit,^metadata_csum,uninit_bg",
        "mkfs.ext4 -b 4096 -I 128",
        "mkfs.ext4 -b 4096 -I 1024 -O metadata_csum_seed",
    ] {
        shown_as_by_the_kernel(mkfs, 128 * MIB, &Content::ext4());
    }
    let mapped = Content { punched: false, ..Content::ext4() };
    shown_as_by_the_kernel("mkfs.ext4 -b 4096 -O ^extent,^64bit,^metadata_csum", 128 * MIB, &mapped);
}

#[test]
fn ext4_with_rare_features() {
    let long_values = Content { value_len: 40_000, ..Content::ext4() };
    for (mkfs, content) in [
        ("mkfs.ext4 -b 4096 -O inline_data", Content::ext4()),
        ("mkfs.ext4 -b 1024 -I 512 -O inline_data,metadata_csum", Content::ext4()),
        ("mkfs.ext4 -b 4096 -O ea_inode", long_values),
        ("mkfs.ext4 -b 1024 -O bigalloc -C 16384", Content::ext4()),
        ("mkfs.ext4 -b 4096 -O bigalloc -C 65536", Content::ext4()),
        ("mkfs.ext4 -b 1024 -O meta_bg,^resize_inode", Content::ext4()),
        ("mkfs.ext4 -b 1024 -O sparse_super2,^resize_inode", Content::ext4()),
        ("mkfs.ext4 -b 4096 -O large_dir,fast_commit,orphan_file,mmp", Content::ext4()),
        ("mkfs.ext4 -b 4096 -O verity,stable_inodes", Content::ext4()),
    ] {
        shown_as_by_the_kernel(mkfs, 128 * MIB, &content);
    }
}

/// Many files, fifty thousand names in one directory, thousands of extents of one file.
#[test]
fn a_large_tree() {
    let (files, pieces) = if long() { (usize::MAX >> 1, 10_000) } else { (1000, 3000) };
    let size = if long() { 12_000 } else { 700 };
    let content = Content { files, names: 50_000, pieces, ..Content::ext4() };
    let disk = shown_as_by_the_kernel("mkfs.ext4 -b 4096", size * MIB, &content);
    let source = Arc::new(Counted::new(FileSource::open(&disk.image)));
    let ours = Ext::open(Arc::clone(&source) as Arc<dyn Source>).expect("our reader opens it");
    let many = ours.lookup(ours.root(), b"many").expect("it is whole").expect("it is there");
    let fragmented = ours.lookup(ours.root(), b"fragmented").expect("it is whole").expect("it is there");
    source.taken();
    for number in (1..50_000).filter(|number| (number - 3) % 7 != 0).step_by(50) {
        let name = format!("entry {number:06} with a name that is not short");
        assert!(ours.lookup(many, name.as_bytes()).expect("it is whole").is_some(), "{name}");
        let (requests, bytes) = source.taken();
        assert!(
            requests <= 16 && bytes <= 64 << 10,
            "the whole directory is read: {requests} requests, {bytes} bytes"
        );
    }
    let mut count = 0;
    let mut at = 0;
    loop {
        let runs = ours.runs(fragmented, at, u64::MAX, 512).expect("it is whole");
        if runs.is_empty() {
            break;
        }
        count += runs.len();
        at += runs.iter().map(|run| run.len).sum::<u64>();
    }
    assert_eq!(count as u64, 2 * pieces);
}

/// A directory of many names without an index gets one in memory.
#[test]
fn a_large_directory_without_an_index() {
    let disk = Disk::format("mkfs.ext2 -b 4096 -O ^dir_index -N 5000", 64 * MIB);
    // The kernel walks all names for each name that it adds. Fewer names, and more lookups.
    let (names, absent) = if long() { (20_000, 10_000) } else { (6000, 33_000_u64) };
    disk.mounted("rw", |dir| many_names(&dir.join("many"), names));
    compare(&disk, "a large directory without an index");
    let source = Arc::new(Counted::new(FileSource::open(&disk.image)));
    let ours = Ext::open(Arc::clone(&source) as Arc<dyn Source>).expect("our reader opens it");
    let many = ours.lookup(ours.root(), b"many").expect("it is whole").expect("it is there");
    assert_eq!(ours.lookup(many, b"absent").expect("it is whole"), None);
    // The index is made once.
    source.taken();
    for number in 1..absent {
        let name = format!("absent {number}");
        assert_eq!(ours.lookup(many, name.as_bytes()).expect("it is whole"), None);
    }
    let (requests, bytes) = source.taken();
    assert!(requests <= absent / 100, "the directory is read again: {requests} requests, {bytes} bytes");
}

/// Each hash that an index can be sorted by, with names of signed and unsigned bytes.
#[test]
fn every_hash_of_an_index() {
    for hash in ["legacy", "half_md4", "tea"] {
        for flags in [1u32, 2] {
            let disk = Disk::format("mkfs.ext4 -b 1024 -O ^metadata_csum,dir_index", 24 * MIB);
            disk.debugfs(&format!("set_super_value def_hash_version {hash}"));
            disk.debugfs(&format!("set_super_value flags {flags}"));
            disk.mounted("rw", |dir| {
                for number in 0..1500u32 {
                    let tail: &[u8] = if number % 2 == 0 { b"\xc3\xa4\xff\x80" } else { b"plain" };
                    let name =
                        [format!("{number}-").repeat(1 + number as usize % 9).as_bytes(), tail].concat();
                    symlink("x", dir.join(std::ffi::OsStr::from_bytes(&name))).expect("a name");
                }
            });
            compare(&disk, hash);
            // An index that cannot be used is no error: the directory is read instead. That would be detected
            // here.
            let source = Arc::new(Counted::new(FileSource::open(&disk.image)));
            let ours = Ext::open(Arc::clone(&source) as Arc<dyn Source>).expect("our reader opens it");
            assert_eq!(ours.lookup(ours.root(), b"absent").expect("it is whole"), None);
            let (_, bytes) = source.taken();
            assert!(bytes < 10_000, "{hash} {flags}: {bytes} bytes");
        }
    }
}

/// For images that this kernel cannot mount: compared with the directory that filled the disk.
fn shown_as_filled(mkfs: &str, change: impl FnOnce(&Disk, &Path)) {
    let from = tempfile::Builder::new().prefix("chainfs-ext-").tempdir().expect("a directory");
    let content = Content { value_len: 200, ..Content::small() };
    content.fill(from.path());
    let disk = Disk::format(&format!("{mkfs} -d {}", from.path().display()), 256 * MIB);
    change(&disk, from.path());
    let (mut theirs, mut ours) = (kernel_tree(from.path()), our_tree(&disk.open(), &disk.image));
    ours.retain(|path, _| !path.starts_with(b"/lost+found"));
    // The copy makes two of a symbolic link with two names, and forgets the bits of times after 2038.
    let kept = |path: &[u8]| path != b"/links/the same link" && !path.starts_with(b"/times");
    theirs.retain(|path, _| kept(path));
    ours.retain(|path, _| kept(path));
    for tree in [&mut theirs, &mut ours] {
        for (path, node) in tree.iter_mut() {
            // Attributes that a copy does not keep, or keeps in its own way.
            node.ino = 0;
            node.data.clear();
            node.xattrs.sort();
            let own = &mut node.attributes;
            own.modified.nanoseconds = 0;
            (own.blocks, own.accessed, own.changed, own.created) = (0, own.modified, own.modified, None);
            if own.kind == FileKind::Symlink {
                own.links = 1;
            }
            if path.is_empty() || own.kind == FileKind::Directory {
                (own.size, own.links, own.modified, own.accessed, own.changed) = <_>::default();
            }
        }
    }
    assert_same_trees(mkfs, &theirs, &ours);
}

#[test]
fn blocks_of_64_kib() {
    shown_as_filled("mkfs.ext4 -b 65536", |_, _| {});
    shown_as_filled("mkfs.ext2 -b 65536", |_, _| {});
}

#[test]
fn quotas_and_sealed_files() {
    let mkfs = "mkfs.ext4 -b 4096 -O quota,project,verity -E quotatype=usrquota:prjquota";
    shown_as_filled(mkfs, |disk, _| {
        // Extents, verity.
        disk.debugfs("set_inode_field /sizes/65537 flags 0x180000");
    });
}

#[test]
fn names_of_any_case() {
    shown_as_filled("mkfs.ext4 -b 4096 -O casefold -E encoding=utf8", |disk, from| {
        disk.debugfs("mkdir Folded");
        disk.debugfs("set_inode_field Folded flags 0x40080000");
        disk.debugfs(&format!("write {} Folded/Name", from.join("sizes/4097").display()));
        // A file that debugfs writes is as old as that moment, which may be in the next second.
        let modified = fs::metadata(from.join("sizes/4097")).expect("a file").mtime();
        disk.debugfs(&format!("set_inode_field Folded/Name mtime @{modified}"));
        fs::create_dir(from.join("Folded")).expect("a directory");
        tool("cp").arg("-p").arg(from.join("sizes/4097")).arg(from.join("Folded/Name")).succeeds();
    });
}

/// The comparison itself: one bit of anything is noticed.
#[test]
fn the_comparison_notices_a_change() {
    let disk = Disk::format("mkfs.ext4 -b 1024 -O ^metadata_csum", 32 * MIB);
    disk.mounted("rw", |dir| {
        fs::write(dir.join("file"), vec![1; 100_000]).expect("a file");
        set_xattr(&dir.join("file"), "user.name", b"value");
        symlink("target", dir.join("link")).expect("a link");
    });
    let theirs = disk.mounted("ro", kernel_tree);
    let noticed = |command: &str| {
        let changed = disk.snapshot();
        changed.debugfs(command);
        let lines = differences(&theirs, &our_tree(&changed.open(), &changed.image));
        assert!(!lines.is_empty(), "{command} is not noticed");
    };
    for field in
        ["mode 0100600", "uid 7", "gid 7", "size 99999", "links_count 2", "atime 1", "mtime 1", "ctime 1"]
    {
        noticed(&format!("set_inode_field file {field}"));
    }
    for command in [
        "set_inode_field file blocks 6",
        "set_inode_field link block[0] 0x41414141",
        "rm link",
        "ea_rm file user.name",
    ] {
        noticed(command);
    }
    noticed("ea_set file user.name other");
    noticed("ln file another");
    noticed("punch file 3 3");
    let content = disk.snapshot();
    let block: u64 = content.debugfs("bmap file 5").trim().parse().expect("a block");
    content.write(block * 1024 + 5, b"x");
    assert_eq!(differences(&theirs, &our_tree(&content.open(), &content.image)).len(), 1);
}

#[test]
fn a_probe_tells_version_label_and_identity() {
    for (mkfs, version) in [("mkfs.ext2", "ext2"), ("mkfs.ext3", "ext3"), ("mkfs.ext4", "ext4")] {
        let uuid = "01234567-89ab-cdef-0123-456789abcdef";
        let disk = Disk::format(&format!("{mkfs} -L a-label -U {uuid}"), 16 * MIB);
        let found = probe(&disk.read(0, 2048)).expect("a file system");
        assert_eq!((found.version, found.label.as_slice()), (version, b"a-label".as_slice()));
        assert_eq!(
            found.uuid,
            [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]
        );
    }
    assert_eq!(probe(&[0; 4096]), None);
    assert_eq!(probe(&[0xff; 2047]), None);
}
