//! The surroundings of an active disk's writer, stressed: other users of the written bytes, and late
//! notifications.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::io::Errno;
use support::*;

fn open_rw(path: &Path) -> Result<File, Errno> {
    let opened = File::options().read(true).write(true).open(path);
    opened.map_err(|e| Errno::from_io_error(&e).expect("an errno"))
}

/// The kernel reports a close to the mount a moment later.
fn let_go(store: &Store, image: &str, format: &str) {
    eventually("the mount lets go", || {
        tool("qemu-io").args(["-f", format, "-c", "flush", image]).current_dir(store.root()).outcome().0 == 0
    });
}

/// Change notifications are off: the mount knows only its first scan, unless it rescans.
const DEAF: &str = "noinotify,rescan=3600";

#[test]
fn an_image_that_has_become_a_layer_is_not_written_before_a_rescan() {
    let store = Store::new();
    store.raw("raw.raw", MIB, 1);
    store.create("cow.qcow2", MIB, "");
    let mount = Mount::with(&store, DEAF);
    let disks = ["raw", "cow"].map(|chain| mount.path(chain).join("active.raw"));
    for disk in &disks {
        drop(open_rw(disk).expect("a leaf"));
    }
    let_go(&store, "raw.raw", "raw");
    let_go(&store, "cow.qcow2", "qcow2");
    store.overlay("on-raw.qcow2", "raw.raw", "raw", "");
    store.overlay("on-cow.qcow2", "cow.qcow2", "qcow2", "");
    for disk in disks {
        let refused = open_rw(&disk);
        assert!(
            matches!(refused, Err(Errno::ROFS | Errno::STALE | Errno::NOENT)),
            "{}: {refused:?}",
            disk.display()
        );
    }
    mount.umount();
}

#[test]
fn a_raw_image_that_was_frozen_is_not_written_before_a_rescan() {
    let store = Store::new();
    store.raw("plain.raw", MIB, 1);
    let mount = Mount::with(&store, DEAF);
    drop(open_rw(&mount.path("plain/active.raw")).expect("a leaf"));
    let_go(&store, "plain.raw", "raw");
    store.dir(".chainfs");
    store.put(".chainfs/frozen.toml", b"[[frozen]]\npath = \"plain.raw\"\nseconds = 1\n");
    let refused = open_rw(&mount.path("plain/active.raw"));
    assert!(matches!(refused, Err(Errno::ROFS | Errno::STALE | Errno::NOENT)), "{refused:?}");
    mount.umount();
}

/// `vm.qcow2` whose bytes are in `data.raw`.
fn with_data_file() -> Store {
    let store = Store::new();
    store.create("vm.qcow2", MIB, "data_file=data.raw");
    store.scribble("vm.qcow2", "qcow2", 1);
    store
}

fn assert_not_written(store: &Store, options: &str, why: &str) {
    let before = fs::read(store.path("data.raw")).expect("a data file");
    let mount = Mount::with(store, options);
    let active = mount.path("vm/active.raw");
    fs::read(&active).unwrap_or_else(|e| panic!("{why}: {e}"));
    match open_rw(&active) {
        Ok(disk) => panic!("{why}: it was opened to be written, {:?}", disk.write_at(b"spoilt", 0)),
        Err(errno) => assert_eq!(errno, Errno::ROFS, "{why}"),
    }
    mount.umount();
    assert!(fs::read(store.path("data.raw")).expect("a data file") == before, "{why}");
}

#[test]
fn an_external_data_file_is_as_safe_from_writing_as_an_image() {
    let store = with_data_file();
    let mount = Mount::new(&store);
    open_rw(&mount.path("vm/active.raw")).expect("a leaf").write_all_at(b"mine", 0).expect("a write");
    mount.umount();
    assert_not_written(&store, "readonly=data.raw", "the user says that it is never written");
    fs::set_permissions(store.path("data.raw"), fs::Permissions::from_mode(0o444)).expect("a mode");
    assert_not_written(&store, "", "its mode says that it is never written");
    fs::set_permissions(store.path("data.raw"), fs::Permissions::from_mode(0o644)).expect("a mode");
    store.overlay("top.qcow2", "data.raw", "raw", "");
    assert_not_written(&store, "", "another image stands on it");
    fs::remove_file(store.path("top.qcow2")).expect("an overlay");
    store.dir(".chainfs");
    store.put(".chainfs/frozen.toml", b"[[frozen]]\npath = \"data.raw\"\nseconds = 1\n");
    assert_not_written(&store, "", "it is frozen");
}

#[test]
fn an_image_protected_by_one_name_is_not_written_by_another() {
    let store = Store::new();
    store.dir("golden");
    store.create("golden/disk.qcow2", MIB, "");
    store.raw("golden/plain.raw", MIB, 1);
    for name in ["disk.qcow2", "plain.raw"] {
        fs::hard_link(store.path("golden").join(name), store.path(format!("a-{name}"))).expect("a hard link");
    }
    let mount = Mount::with(&store, "readonly=golden/*");
    for chain in ["a-disk", "a-plain"] {
        let refused = open_rw(&mount.path(chain).join("active.raw"));
        assert!(matches!(refused, Err(Errno::ROFS | Errno::NOENT)), "{chain}: {refused:?}");
    }
    mount.umount();
}

#[test]
fn opening_a_snapshot_while_the_writer_closes_uses_no_old_tables() {
    const CLUSTER: u64 = 64 << 10;
    const ROUNDS: u64 = 100;
    let store = Store::new();
    store.raw("base.raw", 16 * MIB, 1);
    store.overlay("web.qcow2", "base.raw", "raw", "");
    store.img(["snapshot", "-c", "monday", "web.qcow2"]);
    let mount = Mount::new(&store);
    let active = mount.path("web/active.raw");
    let snapshots = mount.path("web/snapshots");
    let snapshot = mount
        .names("web/snapshots")
        .into_iter()
        .find(|name| name.contains("monday") && !name.contains("vmstate"))
        .map(|name| snapshots.join(name))
        .expect("a snapshot");
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    // A writer that begins may conflict.
                    drop(File::open(&snapshot));
                }
            });
        }
        let mut round = 0_u64;
        let found = loop {
            if round == ROUNDS {
                break Ok(());
            }
            let at = round % (16 * MIB / CLUSTER) * CLUSTER;
            let value = [(round % 251) as u8 + 1; 512];
            // All readers have the current tables in memory.
            if let Ok(disk) = File::open(&active) {
                let _ = disk.read_at(&mut [0; 512], at);
            }
            let Ok(disk) = open_rw(&active) else { continue };
            disk.write_all_at(&value, at).expect("a write");
            drop(disk);
            thread::sleep(Duration::from_millis(round % 4));
            let mut buf = [0; 512];
            let Ok(disk) = File::open(&active) else { continue };
            disk.read_exact_at(&mut buf, at).expect("a read");
            if buf != value {
                break Err(format!("round {round}: {} is not {}", buf[0], value[0]));
            }
            round += 1;
        };
        is_over.store(true, Ordering::Relaxed);
        assert_eq!(found, Ok(()), "after {round} rounds");
    });
    mount.umount();
}

/// A small file system over the store's directory.
struct Small<'a>(&'a Store);

impl<'a> Small<'a> {
    fn new(store: &'a Store) -> Self {
        tool("mount").args(["-t", "tmpfs", "-o", "size=64m", "small"]).arg(store.root()).succeeds();
        Self(store)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        tool("umount").arg(self.0.root()).succeeds();
    }
}

#[test]
fn a_failed_allocation_reserves_nothing_and_does_not_grow_the_disk() {
    let store = Store::new();
    let small = Small::new(&store);
    store.raw("plain.raw", MIB, 1);
    store.create("cow.qcow2", MIB, "");
    let mount = Mount::new(&store);
    for chain in ["plain", "cow"] {
        let disk = open_rw(&mount.path(chain).join("active.raw")).expect("a disk");
        let free = || rustix::fs::statvfs(store.root()).expect("free space").f_bfree;
        let (before, none) = (free(), rustix::fs::FallocateFlags::empty());
        assert_eq!(rustix::fs::fallocate(&disk, none, 0, 1 << 40), Err(Errno::NOSPC), "{chain}");
        assert_eq!((disk.metadata().expect("a size").len(), free()), (MIB, before), "{chain}");
        rustix::fs::fallocate(&disk, none, 0, 2 * MIB).expect("space");
        assert_eq!(disk.metadata().expect("a size").len(), 2 * MIB, "{chain}");
    }
    mount.umount();
    drop(small);
}
