//! Real guests' disks: the kernel's own file systems, loop devices and QEMU's servers work on views as
//! on any other disk. Needs root and loop devices.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use support::foreign::greeted;
use support::*;

/// A file system mounted for as long as this lives.
struct Attached {
    dir: PathBuf,
    mounted: bool,
}

impl Attached {
    fn new(disk: &Path, dir: &Path, options: &str) -> Self {
        fs::create_dir_all(dir).expect("a mount point");
        tool("mount").args(["-o", options]).arg(disk).arg(dir).succeeds();
        Self { dir: dir.to_owned(), mounted: true }
    }

    fn detach(mut self) {
        tool("umount").arg(&self.dir).succeeds();
        self.mounted = false;
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.mounted {
            // Unmounting a loop mount frees its device as well.
            let _ = tool("umount").arg("--lazy").arg(&self.dir).status();
        }
    }
}

/// Something of everything a guest has: small and large, deep, sparse, linked, odd names.
fn fill(dir: &Path, seed: u64) {
    let mut rng = Rng::new(seed);
    for number in 0..60 {
        let sub = dir.join(format!("seed{seed}/d{}", number % 7));
        fs::create_dir_all(&sub).expect("a directory");
        let len = [0, 1, 700, 4096, 20_000, 300_000][rng.below(6) as usize];
        fs::write(sub.join(format!("file {number}")), rng.bytes(len)).expect("a file");
    }
    let top = dir.join(format!("seed{seed}"));
    let sparse = fs::File::create(top.join("sparse")).expect("a file");
    sparse.set_len(20 * MIB).expect("a sparse file");
    std::os::unix::fs::FileExt::write_all_at(&sparse, b"far out", 19 * MIB).expect("its end");
    symlink("sparse", top.join("a link")).expect("a link");
    fs::hard_link(top.join("sparse"), top.join("another name")).expect("a hard link");
}

/// A guest that works on a plain disk of its own; at times the disk's state becomes a layer, which holds the
/// differences from the layer below.
struct Guest<'a> {
    store: &'a Store,
    /// The disk as the guest sees it.
    disk: PathBuf,
    kind: &'static str,
}

impl Guest<'_> {
    fn install<'a>(store: &'a Store, kind: &'static str, size: u64) -> Guest<'a> {
        let disk = store.beside(format!("{kind}.disk"));
        fs::File::create(&disk).and_then(|f| f.set_len(size)).expect("a disk");
        let quiet = if kind == "btrfs" { "-f" } else { "-q" };
        tool(&format!("mkfs.{kind}")).arg(quiet).arg(&disk).succeeds();
        Guest { store, disk, kind }
    }

    fn works(&self, seed: u64) {
        let dir = self.store.beside(format!("{}.guest", self.kind));
        let attached = Attached::new(&self.disk, &dir, "loop");
        fill(&dir, seed);
        if seed > 1 {
            fs::remove_dir_all(dir.join(format!("seed{}", seed - 1)).join("d3")).expect("a removal");
        }
        attached.detach();
    }

    /// The disk's present state becomes a layer.
    fn freeze(&self, layer: &str, backing: Option<(&str, &str)>) {
        let disk = self.disk.to_str().expect("a plain path");
        match backing {
            None => fs::copy(&self.disk, self.store.path(layer)).map(drop).expect("a copy"),
            Some((backing, format)) => {
                let backing = self.store.path(backing);
                let backing = backing.to_str().expect("a plain path");
                let args = ["convert", "-f", "raw", "-O", "qcow2", "-B", backing, "-F", format, disk, layer];
                drop(self.store.img(args));
            }
        }
    }

    /// The files as they were, kept in a copy of the disk.
    fn remember(&self, name: &str) -> PathBuf {
        let copy = self.store.beside(format!("{}.{name}", self.kind));
        tool("cp").arg("--sparse=always").arg(&self.disk).arg(&copy).succeeds();
        copy
    }
}

fn assert_same_files(ours: &Path, theirs: &Path) {
    let (code, out, err) = tool("diff").args(["-r", "--no-dereference"]).arg(ours).arg(theirs).outcome();
    assert_eq!(code, 0, "{out}{err}");
    let list = |dir: &Path| {
        let mut find = tool("find");
        // A directory's size and links are its file system's own affair.
        find.args([".", "-type", "d", "-printf", "%P %y %m %U %G %T@\n", "-o"]);
        find.args(["-printf", "%P %y %m %U %G %T@ %s %n %l\n"]).current_dir(dir);
        let mut lines: Vec<String> = find.succeeds().lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    assert_eq!(list(ours), list(theirs));
}

/// A file system's disk, twice frozen, read through a loop device on each view.
fn reads_through_a_loop_device(kind: &'static str, size: u64, options: &str) {
    let store = Store::new();
    let guest = Guest::install(&store, kind, size);
    guest.works(1);
    guest.freeze("base.raw", None);
    let one = guest.remember("one");
    guest.works(2);
    guest.freeze("second.qcow2", Some(("base.raw", "raw")));
    let two = guest.remember("two");
    guest.works(3);
    guest.freeze("web.qcow2", Some(("second.qcow2", "qcow2")));
    let three = guest.remember("three");

    let mount = Mount::new(&store);
    for (view, disk) in [("snapshots/base.raw", &one), ("snapshots/second.raw", &two), ("active.raw", &three)]
    {
        let view = mount.path("web").join(view);
        assert_same(&view, disk);
        let theirs = Attached::new(disk, &store.beside("theirs"), options);
        // Two file systems of one identity cannot be mounted at once by all kernels; so compare with a copy.
        let kept = store.beside("kept");
        tool("cp").args(["-a", "--sparse=always"]).arg(&theirs.dir).arg(&kept).succeeds();
        theirs.detach();
        let ours = Attached::new(&view, &store.beside("ours"), options);
        assert_same_files(&ours.dir, &kept);
        ours.detach();
        fs::remove_dir_all(&kept).expect("the copy");
    }
    mount.umount();
}

#[test]
fn an_ext4_guest_reads_through_a_loop_device() {
    reads_through_a_loop_device("ext4", 96 * MIB, "ro,loop,noload");
}

#[test]
fn an_xfs_guest_reads_through_a_loop_device() {
    reads_through_a_loop_device("xfs", 320 * MIB, "ro,loop,norecovery,nouuid");
}

#[test]
fn a_btrfs_guest_reads_through_a_loop_device() {
    reads_through_a_loop_device("btrfs", 160 * MIB, "ro,loop");
}

/// A QEMU server for one of the mount's files.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn scribbled_chain() -> Store {
    let store = Store::new();
    store.raw("base.raw", 8 * MIB, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.scribble("mid.qcow2", "qcow2", 2);
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "");
    store.scribble("web.qcow2", "qcow2", 3);
    store
}

#[test]
fn qemu_nbd_serves_views() {
    let store = scribbled_chain();
    let mount = Mount::new(&store);
    for (view, image) in [("snapshots/mid.raw", "mid.qcow2"), ("active.raw", "web.qcow2")] {
        let socket = store.beside("nbd.sock");
        let mut nbd = Command::new("qemu-nbd");
        nbd.args(["--read-only", "-f", "raw", "-k"]).arg(&socket).arg(mount.path("web").join(view));
        let served = Served(nbd.stdin(Stdio::null()).spawn().expect("qemu-nbd starts"));
        greeted(&socket);
        let copy = store.beside("copy.raw");
        let address = format!("nbd+unix:///?socket={}", socket.display());
        tool("qemu-img").args(["convert", "-f", "raw", "-O", "raw", &address]).arg(&copy).succeeds();
        assert_same(&copy, &store.oracle(image, "qcow2"));
        drop(served);
        let _ = fs::remove_file(&socket);
    }
    mount.umount();
}

#[test]
fn qemu_img_reads_views_as_any_raw_image() {
    let store = scribbled_chain();
    let mount = Mount::new(&store);
    let view = mount.path("web/active.raw");
    let other = store.oracle("web.qcow2", "qcow2");
    tool("qemu-img").args(["compare", "-f", "raw", "-F", "raw"]).arg(&view).arg(&other).succeeds();
    tool("qemu-img")
        .args(["compare", "-f", "raw", "-F", "qcow2"])
        .arg(&view)
        .arg(store.path("web.qcow2"))
        .succeeds();
    let overlay = store.beside("throwaway.qcow2");
    tool("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"])
        .arg(&view)
        .arg(&overlay)
        .succeeds();
    tool("qemu-io").args(["-f", "qcow2", "-c", "write -P 9 0 64k"]).arg(&overlay).succeeds();
    tool("qemu-img").args(["check", "-q"]).arg(&overlay).succeeds();
    mount.umount();
}

#[test]
fn copies_of_a_view_keep_its_holes() {
    let store = Store::new();
    store.create("web.qcow2", 64 * MIB, "");
    let mut rng = Rng::new(4);
    let writes: Vec<String> = (0..8).map(|n| store.write(&mut rng, n * 8 * MIB, 128 * KIB)).collect();
    store.io("web.qcow2", "qcow2", writes);
    store.overlay("top.qcow2", "web.qcow2", "qcow2", "");
    let mount = Mount::new(&store);
    for (view, how) in
        [("top/snapshots/web.raw", "auto"), ("top/active.raw", "auto"), ("top/active.raw", "always")]
    {
        let copy = store.beside("copy.raw");
        tool("cp").arg(format!("--sparse={how}")).arg(mount.path(view)).arg(&copy).succeeds();
        assert_same(&copy, &store.oracle("web.qcow2", "qcow2"));
        let taken = fs::metadata(&copy).expect("a copy").blocks() * 512;
        assert!(taken < 4 * MIB, "{view} copied with --sparse={how} takes {} KiB", taken >> 10);
        fs::remove_file(copy).expect("the copy");
    }
    mount.umount();
}
