//! ext2, ext3 and ext4, judged by the kernel: whole trees as its mount shows them, dirty journals as it replays them,
//! damage as far as it goes and no further. Needs root and loop devices.

#[allow(dead_code, unused_imports, reason = "each test binary uses its part")]
#[path = "common/tools.rs"]
mod tools;

#[allow(dead_code, reason = "each test binary uses its part")]
#[path = "common/rng.rs"]
mod rng;

#[path = "guest_common/ext.rs"]
mod ext;

#[path = "guest_common/ext_content.rs"]
mod ext_content;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chainfs::error::ErrorKind;
use chainfs::guest::ext::{Ext, probe};
use chainfs::guest::{FileSystem as _, RunKind};

use ext::*;
use ext_content::*;
use rng::Rng;
use tools::{Outcome as _, tool};

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
    let (theirs, sizes) = disk.mounted("ro", |dir| (kernel_tree(dir), rustix::fs::statvfs(dir).expect("statvfs")));
    assert_same_trees(what, &theirs, &tree);
    let counted = ours.statistics();
    let our = (counted.blocks, counted.free_blocks, counted.available_blocks, counted.inodes, counted.free_inodes);
    assert_eq!(our, (sizes.f_blocks, sizes.f_bfree, sizes.f_bavail, sizes.f_files, sizes.f_ffree), "{what}");
    assert_eq!(ours.remarks(), Vec::<String>::new(), "{what}");
    ours
}

#[test]
fn ext2_of_all_kinds() {
    for mkfs in
        ["mkfs.ext2", "mkfs.ext2 -b 1024", "mkfs.ext2 -b 4096 -I 128", "mkfs.ext2 -O ^filetype,^dir_index -b 2048"]
    {
        shown_as_by_the_kernel(mkfs, 96 * MIB, &Content::small());
    }
}
