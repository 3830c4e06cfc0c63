//! A guest: a file system on a chain's active disk, mounted and written by this machine's kernel while
//! snapshots are taken.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use support::command::Control;
use support::{Mount, Outcome as _, Store, eventually, tool};

use super::{VERBATIM, VIEWS, assert_same_files, work};

/// Where a file system is on a disk, and how the kernel mounts all of it.
pub(super) struct Placed {
    pub(super) kind: &'static str,
    pub(super) options: &'static str,
    pub(super) offset: u64,
    pub(super) len: u64,
}

/// The kernel's mount of a part of a disk.
pub(super) struct KernelMount {
    pub(super) dir: PathBuf,
    device: String,
    ended: bool,
}

impl KernelMount {
    pub(super) fn new(disk: &Path, placed: &Placed, dir: PathBuf) -> Self {
        let (offset, len) = (placed.offset.to_string(), placed.len.to_string());
        let words = ["--find", "--show", "--offset", &offset, "--sizelimit", &len];
        let device = tool("losetup").args(words).arg(disk).succeeds().trim().to_owned();
        fs::create_dir_all(&dir).expect("a mount point");
        let mounted = Self { dir, device, ended: false };
        // Copies of one file system have one identity.
        eventually("mounted", || {
            if placed.kind == "btrfs" {
                let _ = tool("btrfs").args(["device", "scan", "--forget"]).outcome();
            }
            let mut mount = tool("mount");
            mount.args(["-t", placed.kind, "-o", &format!("noatime,{}", placed.options)]);
            mount.arg(&mounted.device).arg(&mounted.dir).outcome().0 == 0
        });
        mounted
    }

    pub(super) fn end(mut self) {
        eventually("unmounted", || tool("umount").arg(&self.dir).outcome().0 == 0);
        self.ended = true;
    }
}

impl Drop for KernelMount {
    fn drop(&mut self) {
        if !self.ended {
            let _ = tool("umount").arg("--lazy").arg(&self.dir).outcome();
        }
        let _ = tool("losetup").arg("-d").arg(&self.device).outcome();
    }
}

/// Takes three snapshots of a chain while its guest writes. `layer` does what is special to a layer, and
/// returns the root within the file system.
pub(super) fn four_layers(
    store: &Store,
    mount: &Mount,
    placed: &Placed,
    layer: &mut dyn FnMut(&Path, usize) -> PathBuf,
) {
    let guest = KernelMount::new(&mount.path("vm/active.raw"), placed, store.beside("guest"));
    let control = Control::of(mount, "vm");
    for number in 1..=4 {
        let root = layer(&guest.dir, number);
        work(&root, number);
        if number == 4 {
            break;
        }
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for file in 0u64.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let path = root.join(format!("var/lib/live {number} {}", file % 500));
                    fs::write(path, vec![(file % 251) as u8; 5000]).expect("a file");
                }
            });
            control.done(&format!("snapshot {}", VIEWS[number - 1]));
            stop.store(true, Ordering::Relaxed);
        });
    }
    guest.end();
}

/// Compares all of the file system in every view with the kernel's mount of the same view. `place`: where a
/// view shows all of it.
pub(super) fn compare_views(store: &Store, chain: &str, placed: &Placed, place: &dyn Fn(&str) -> String) {
    let mount = Mount::with(store, VERBATIM);
    for view in VIEWS {
        let disk = if view == "active" { "active.raw".to_owned() } else { format!("snapshots/{view}.raw") };
        let copy = store.beside("copy");
        tool("cp").arg("--sparse=always").arg(mount.path(chain).join(disk)).arg(&copy).succeeds();
        let began = SystemTime::now();
        let kernel = KernelMount::new(&copy, placed, store.beside("kernel"));
        let files = mount.path(format!("{chain}/files/{view}")).join(place(view));
        assert_same_files(&format!("{chain}, {view}"), &files, &kernel.dir, began);
        kernel.end();
        fs::remove_file(copy).expect("the copy");
    }
    mount.umount();
}
