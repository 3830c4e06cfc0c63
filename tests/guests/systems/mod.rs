//! Systems as distributions lay them out, in chains of four layers that are taken while the guest writes: the
//! root is found in every view, and every file is what the kernel shows of the same view.
//!
//! The guest is this machine's kernel, with its file system on a loop device over the mount's active disk.
//! Long runs have the files of a whole Debian, and a guest in a virtual machine with what this kernel may
//! lack.

mod btrfs;
mod debian;
mod guest;
mod lvm;
mod machine;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use support::{Mount, Outcome as _, chainfs_binary, tool};

use crate::btrfs::forgive_times_since;
use crate::disk::{assert_same_trees, kernel_tree, set_xattr};

/// Options of a mount that shows links and FIFOs as the guest's kernel does.
const VERBATIM: &str = "symlinks=verbatim";
/// The views of a chain of four layers, oldest first.
const VIEWS: [&str; 4] = ["l1", "l2", "l3", "active"];

/// A system without its fstab.
fn system(root: &Path) {
    for dir in ["etc/alternatives", "usr/bin", "usr/lib", "var/lib", "home", "boot", "proc"] {
        fs::create_dir_all(root.join(dir)).expect("a directory");
    }
    fs::write(root.join("usr/lib/os-release"), "ID=debian\nPRETTY_NAME=\"Debian 12\"\n").expect("a file");
    symlink("../usr/lib/os-release", root.join("etc/os-release")).expect("a link");
    symlink("usr/bin", root.join("bin")).expect("a link");
    symlink("/usr/bin/mawk", root.join("etc/alternatives/awk")).expect("a link");
    symlink("/etc/alternatives/awk", root.join("usr/bin/awk")).expect("a link");
    // It climbs above the root.
    symlink("../../../../usr/bin/mawk", root.join("usr/bin/climbs")).expect("a link");
    fs::write(root.join("usr/bin/mawk"), "awk\n").expect("a file");
    tool("cp").arg("/bin/true").arg(root.join("usr/bin/sh")).succeeds();
    fs::hard_link(root.join("usr/bin/sh"), root.join("usr/bin/dash")).expect("a link");
    set_xattr(&root.join("usr/bin/sh"), "user.mark", b"1");
    tool("mkfifo").arg(root.join("var/lib/pipe")).succeeds();
    for number in 0..40 {
        fs::write(root.join(format!("var/lib/{number}")), vec![number; 300 * usize::from(number)])
            .expect("a file");
    }
}

/// What a guest does in a layer: the host's name is another one, and files come, go, change and move.
fn work(root: &Path, layer: usize) {
    synced(&root.join("etc/hostname"), format!("layer-{layer}\n").as_bytes());
    let lib = root.join("var/lib");
    fs::remove_file(lib.join(format!("{layer}"))).expect("a removal");
    fs::rename(lib.join(format!("{}", 10 + layer)), lib.join(format!("moved {layer}"))).expect("a move");
    fs::write(lib.join(format!("{}", 20 + layer)), format!("changed {layer}")).expect("a change");
    fs::create_dir(lib.join(format!("new {layer}"))).expect("a directory");
    fs::write(lib.join(format!("new {layer}/file")), vec![7; 200_000]).expect("a file");
    synced(&lib.join("last"), format!("{layer}").as_bytes());
}

fn synced(path: &Path, bytes: &[u8]) {
    use std::io::Write as _;
    let mut file = fs::File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    file.write_all(bytes).and_then(|()| file.sync_all()).expect("a synced file");
}

/// Compares a tree of a mount with what the kernel shows of the same disk.
fn assert_same_files(what: &str, shown: &Path, kernel: &Path, mounted_at: SystemTime) {
    let (mut ours, mut theirs) = (kernel_tree(shown), kernel_tree(kernel));
    forgive_times_since(mounted_at, &mut theirs, &mut ours);
    for node in ours.values_mut().chain(theirs.values_mut()) {
        // A mount has numbers of its own, and no time of creation.
        (node.ino, node.attributes.created) = (0, None);
    }
    assert_same_trees(what, &theirs, &ours);
    assert_eq!(hard_links(shown), hard_links(kernel), "{what}");
    println!("{what}: {} files as the kernel's", theirs.len());
}

/// The groups of names of one inode.
fn hard_links(root: &Path) -> Vec<Vec<PathBuf>> {
    let mut groups = std::collections::HashMap::<(u64, u64), Vec<PathBuf>>::new();
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            let stat = fs::symlink_metadata(&path).expect("attributes");
            if stat.is_dir() {
                left.push(path);
            } else if stat.nlink() > 1 {
                let name = path.strip_prefix(root).expect("a path in it").to_owned();
                groups.entry((stat.dev(), stat.ino())).or_default().push(name);
            }
        }
    }
    let mut groups: Vec<Vec<PathBuf>> = groups.into_values().collect();
    for group in &mut groups {
        group.sort();
    }
    groups.sort();
    groups
}

/// All inode numbers of a mount's directory are different, but those of hard links.
fn assert_unique_numbers(root: &Path) {
    let mut known = std::collections::HashMap::<u64, PathBuf>::new();
    let mut left = vec![root.to_owned()];
    while let Some(dir) = left.pop() {
        for entry in fs::read_dir(&dir).expect("a directory") {
            let path = entry.expect("an entry").path();
            let stat = fs::symlink_metadata(&path).expect("attributes");
            if stat.is_dir() {
                left.push(path.clone());
            }
            if (stat.is_dir() || stat.nlink() == 1)
                && let Some(other) = known.insert(stat.ino(), path.clone())
            {
                panic!("{} and {} have one number", path.display(), other.display());
            }
        }
    }
}

fn chainfs(words: &[&str]) -> String {
    tool(chainfs_binary()).args(words).succeeds()
}

/// Every view of a chain has its root where it belongs, for the mount and for commands. `places`: what `root`
/// leads to, by view. `words`: options of commands.
fn assert_roots(mount: &Mount, chain: &str, views: [&str; 4], places: [&str; 4], words: &[&str]) {
    for (number, (view, place)) in (1..).zip(views.iter().zip(places)) {
        let files = mount.path(format!("{chain}/files/{view}"));
        assert_eq!(fs::read_link(files.join("root")).expect("the root"), Path::new(place), "{view}");
        let name = format!("layer-{number}\n");
        assert_eq!(fs::read_to_string(files.join("root/etc/hostname")).expect("a file"), name, "{view}");
        let root = files.join("root");
        let listed = chainfs(&[&["ls"], words, &[root.to_str().expect("a plain path")]].concat());
        assert!(listed.contains("etc\n") && listed.contains("usr\n"), "{view}: {listed}");
    }
    let hostname = mount.path(format!("{chain}/files/active/root/etc/hostname"));
    let versions = chainfs(&[&["versions"], words, &[hostname.to_str().expect("a plain path")]].concat());
    assert_eq!(versions.lines().count(), 4, "{versions}");
    println!("{versions}");
}
