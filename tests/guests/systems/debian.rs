//! The same layouts with a whole Debian, as debootstrap installs it. Only in long runs.

use std::path::Path;

use support::{MIB, Outcome as _, project, tool};

use super::{btrfs, lvm};

const SIZE: u64 = 3000 * MIB;

/// The files of a Debian, as an archive that `tests/setup.sh` makes once.
pub(super) fn archive() -> std::path::PathBuf {
    let path = project().join("target/tools/debian.tar");
    assert!(path.exists(), "{} is missing; run CHAINFS_LONG=1 tests/setup.sh", path.display());
    path
}

/// A Debian, and the files that the tests change.
fn debian(root: &Path) {
    tool("tar")
        .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-xpf"])
        .arg(archive())
        .arg("-C")
        .arg(root)
        .succeeds();
    for number in 0..40 {
        std::fs::write(root.join(format!("var/lib/{number}")), vec![number; 900]).expect("a file");
    }
}

#[test]
#[ignore = "takes minutes"]
fn debian_below_the_top_level_of_btrfs() {
    btrfs::below_the_top_level(SIZE, debian);
}

#[test]
#[ignore = "takes minutes"]
fn debian_in_a_default_subvolume_of_btrfs() {
    btrfs::below_a_default_subvolume(SIZE, debian);
}

#[test]
#[ignore = "takes minutes"]
fn debian_on_xfs_on_a_logical_volume() {
    lvm::xfs_on_a_logical_volume(SIZE, debian);
}
