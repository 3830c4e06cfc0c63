//! Disks with btrfs, made and mounted by the kernel, and their comparison with what chainfs shows.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use chainfs::guest::btrfs::Btrfs;
use chainfs::guest::{FileKind, FileSystem, Source, Subvolume, Time};

use crate::disk::{FileSource, Tree, assert_same_trees, have_same_content, kernel_tree, our_tree};
use support::{Outcome as _, eventually, tool};

/// The upper bits of inode numbers say in which subvolume they are; for the kernel it is another device.
const OWN_NUMBER: u64 = (1 << 40) - 1;
/// The number that the kernel gives a subvolume that is not there, and the bit that says so here.
const STUB: u64 = 2;
const STUB_BIT: u64 = 1 << 63;

/// A file system on one or more devices, in a directory of its own.
pub(crate) struct Disk {
    dir: tempfile::TempDir,
    pub(crate) images: Vec<PathBuf>,
}

impl Disk {
    /// Formatted with options of mkfs.btrfs, on devices of these sizes.
    pub(crate) fn format(options: &str, sizes: &[u64]) -> Self {
        let disk = Self::blank(sizes);
        let words = options.split(' ').filter(|word| !word.is_empty());
        tool("mkfs.btrfs").args(["-q", "-f"]).args(words).args(&disk.images).succeeds();
        disk
    }

    fn blank(sizes: &[u64]) -> Self {
        let dir = tempfile::Builder::new().prefix("chainfs-btrfs-").tempdir().expect("a directory");
        let make = |(number, size): (usize, &u64)| {
            let image = dir.path().join(format!("disk{number}"));
            File::create(&image).and_then(|file| file.set_len(*size)).expect("a disk");
            image
        };
        let images = sizes.iter().enumerate().map(make).collect();
        Self { dir, images }
    }

    /// Mounts the file system while `work` is done in it.
    pub(crate) fn mounted<T>(&self, options: &str, work: impl FnOnce(&Path) -> T) -> T {
        self.mounted_if_readable(options, work).expect("the kernel reads it")
    }

    /// The same; `None` if the kernel fails to read it.
    pub(crate) fn mounted_if_readable<T>(&self, options: &str, work: impl FnOnce(&Path) -> T) -> Option<T> {
        let mount = Mounted::new(&self.images, &self.dir.path().join("mnt"), options)?;
        let result = work(&mount.dir);
        mount.end();
        Some(result)
    }

    /// The devices at one moment, even while mounted: the content of a snapshot.
    pub(crate) fn snapshot(&self) -> Self {
        // Copying takes time, and the kernel may write meanwhile. A copy that is unchanged afterwards is of
        // one moment.
        for _ in 0..20 {
            let copy = Self::blank(&vec![0; self.images.len()]);
            let pairs = || self.images.iter().zip(&copy.images);
            for (from, to) in pairs() {
                tool("cp").arg("--sparse=always").arg(from).arg(to).succeeds();
            }
            if pairs().all(|(from, to)| have_same_content(from, to)) {
                return copy;
            }
        }
        panic!("{} changes all the time", self.images[0].display());
    }

    /// The devices with these numbers as sources.
    pub(crate) fn sources(&self, numbers: impl IntoIterator<Item = usize>) -> Vec<Arc<dyn Source>> {
        numbers.into_iter().map(|n| Arc::new(FileSource::open(&self.images[n])) as Arc<dyn Source>).collect()
    }

    pub(crate) fn open(&self) -> Vec<Subvolume> {
        Btrfs::open(&self.sources(0..self.images.len())).expect("our reader opens it")
    }

    pub(crate) fn read(&self, device: usize, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        File::open(&self.images[device]).and_then(|f| f.read_exact_at(&mut bytes, at)).expect("its bytes");
        bytes
    }

    pub(crate) fn write(&self, device: usize, at: u64, bytes: &[u8]) {
        let file = File::options().write(true).open(&self.images[device]).expect("the disk");
        file.write_all_at(bytes, at).expect("a change");
    }

    /// Whether the file system has a log to replay.
    pub(crate) fn has_log(&self) -> bool {
        self.read(0, (64 << 10) + 0x60, 8) != [0; 8]
    }
}

/// A mount for as long as this lives, with a loop device for each image.
struct Mounted {
    dir: PathBuf,
    loops: Vec<String>,
    ended: bool,
}

impl Mounted {
    /// `None` if the kernel fails to read the file system.
    fn new(images: &[PathBuf], dir: &Path, options: &str) -> Option<Self> {
        fs::create_dir_all(dir).expect("a mount point");
        let attach =
            |image: &PathBuf| tool("losetup").args(["-f", "--show"]).arg(image).succeeds().trim().to_owned();
        let loops: Vec<String> = images.iter().map(attach).collect();
        let devices = loops.join(",device=");
        let mut mounted = Self { dir: dir.to_owned(), loops, ended: false };
        let mut is_readable = true;
        let options = format!("noatime,{options},device={devices}");
        // The kernel remembers devices by their identity; those of a copy may be older. A device of another
        // test can be forgotten between its scan and its mount.
        eventually("mounted", || {
            let _ = tool("btrfs").args(["device", "scan", "--forget"]).outcome();
            let mut mount = tool("mount");
            mount.args(["-t", "btrfs", "-o", &options, &mounted.loops[0]]).arg(dir);
            let (code, _, said) = mount.outcome();
            assert!(code == 0 || !said.contains("wrong fs type"), "{options}: {said}");
            is_readable = !said.contains("can't read superblock");
            code == 0 || !is_readable
        });
        mounted.ended = !is_readable;
        is_readable.then_some(mounted)
    }

    fn end(mut self) {
        // A process that another test has just forked holds these descriptors until it executes its program.
        eventually("unmounted", || tool("umount").arg(&self.dir).outcome().0 == 0);
        self.ended = true;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if !self.ended {
            let _ = tool("umount").arg("--lazy").arg(&self.dir).status();
        }
        for device in &self.loops {
            let _ = tool("losetup").args(["-d", device]).outcome();
        }
    }
}

/// All of a tree as chainfs shows it, with the kernel's inode numbers.
pub(crate) fn shown(files: &dyn FileSystem, disk: &Disk) -> Tree {
    let mut tree = our_tree(files, &disk.images[0]);
    for node in tree.values_mut() {
        node.ino = if node.ino & STUB_BIT == 0 { node.ino & OWN_NUMBER } else { STUB };
    }
    tree
}

/// What the kernel made up when it mounted: the times of what a replay touched, and of subvolumes that are
/// not there.
pub(crate) fn forgive_times_since(begin: SystemTime, theirs: &mut Tree, ours: &mut Tree) {
    // The clock of file systems lags by a tick.
    let begin = begin.duration_since(UNIX_EPOCH).expect("a time").saturating_sub(Duration::from_millis(20));
    let begin = Time { seconds: begin.as_secs().cast_signed(), nanoseconds: begin.subsec_nanos() };
    for (path, node) in theirs.iter_mut() {
        let Some(our) = ours.get(path).map(|node| node.attributes) else { continue };
        let is_stub = node.ino == STUB;
        let their = &mut node.attributes;
        for (their, our) in [
            (&mut their.changed, our.changed),
            (&mut their.modified, our.modified),
            (&mut their.accessed, our.accessed),
        ] {
            if is_stub || *their >= begin && our < begin {
                *their = our;
            }
        }
        if is_stub {
            their.created = our.created;
        }
    }
}

/// Compares all trees and the numbers of statfs with the kernel's.
pub(crate) fn compare(disk: &Disk, what: &str) -> Vec<Subvolume> {
    let trees = disk.open();
    let begin = SystemTime::now();
    for (index, tree) in trees.iter().enumerate() {
        let path = tree.path.as_deref().map(String::from_utf8_lossy);
        let name = path.filter(|_| index > 0).map(|path| format!("/{path}"));
        let what = format!("{what}, {name:?}");
        assert_eq!(tree.files.remarks(), Vec::<String>::new(), "{what}");
        let mut ours = shown(&*tree.files, disk);
        let options = name.map_or_else(|| "ro".to_owned(), |name| format!("ro,subvol={name}"));
        let (mut theirs, sizes) =
            disk.mounted(&options, |dir| (kernel_tree(dir), rustix::fs::statvfs(dir).expect("statvfs")));
        forgive_times_since(begin, &mut theirs, &mut ours);
        if ours.len() > 1 || theirs.len() > 1 {
            assert_same_trees(&what, &theirs, &ours);
        }
        let counted = tree.files.statistics();
        let our = (counted.blocks, counted.free_blocks, counted.available_blocks, counted.inodes);
        assert_eq!(our, (sizes.f_blocks, sizes.f_bfree, sizes.f_bavail, sizes.f_files), "{what}: statfs");
        assert_eq!(u64::from(counted.block_size), sizes.f_bsize, "{what}");
    }
    trees
}

/// The kinds of files in a tree, for tests of tests.
pub(crate) fn count(tree: &Tree, kind: FileKind) -> usize {
    tree.values().filter(|node| node.attributes.kind == kind).count()
}
