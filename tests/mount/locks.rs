//! QEMU and a mount exclude each other, in both directions, by QEMU's own locks.

use std::fs::File;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::io::Errno;
use support::foreign::Qemu;
use support::*;

/// `base.raw` <- `mid.qcow2` <- `web.qcow2`.
fn chain() -> Store {
    let store = Store::new();
    store.raw("base.raw", 2 * MIB, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.scribble("mid.qcow2", "qcow2", 2);
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "");
    store.scribble("web.qcow2", "qcow2", 3);
    store
}

/// The result of a write by qemu-io; it changes nothing, since it writes nothing.
fn qemu_writes(store: &Store, image: &str, format: &str) -> Result<(), String> {
    let (code, out, err) =
        tool("qemu-io").args(["-f", format, "-c", "flush", image]).current_dir(store.root()).outcome();
    if code == 0 { Ok(()) } else { Err(out + &err) }
}

fn open(path: &Path) -> Result<File, Errno> {
    File::open(path).map_err(|e| Errno::from_io_error(&e).expect("an errno"))
}

#[test]
fn below_a_running_guest_snapshots_can_be_read_and_its_own_disk_is_busy() {
    let store = chain();
    let oracles = [("base", store.oracle("base.raw", "raw")), ("mid", store.oracle("mid.qcow2", "qcow2"))];
    let mount = Mount::new(&store);
    let guest = Qemu::running_on(&store, "web.qcow2", &[]);
    assert_eq!(open(&mount.path("web/active.raw")).err(), Some(Errno::BUSY));
    for (name, oracle) in &oracles {
        assert_same(&mount.path(format!("web/snapshots/{name}.raw")), oracle);
    }
    guest.shut_down();
    assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    mount.umount();
}

#[test]
fn a_guest_may_start_while_its_snapshots_are_being_read() {
    let store = chain();
    let mount = Mount::new(&store);
    let reading = open(&mount.path("web/snapshots/mid.raw")).expect("a view");
    let guest = Qemu::running_on(&store, "web.qcow2", &[]);
    guest.shut_down();
    assert!(qemu_writes(&store, "mid.qcow2", "qcow2").is_err(), "the layer being read is not to be written");
    drop(reading);
    mount.umount();
}

#[test]
fn another_reader_does_not_disturb() {
    let store = chain();
    let oracle = store.oracle("web.qcow2", "qcow2");
    let mount = Mount::new(&store);
    let guest = Qemu::running_on(&store, "web.qcow2", &["--read-only"]);
    assert_same(&mount.path("web/active.raw"), &oracle);
    guest.shut_down();
    mount.umount();
}

#[test]
fn force_share_reads_under_a_running_guest() {
    let store = chain();
    let oracle = store.oracle("web.qcow2", "qcow2");
    let mount = Mount::with(&store, "force_share");
    let guest = Qemu::running_on(&store, "web.qcow2", &[]);
    assert_same(&mount.path("web/active.raw"), &oracle);
    let reading = open(&mount.path("web/active.raw")).expect("a view");
    guest.shut_down();
    assert_eq!(qemu_writes(&store, "web.qcow2", "qcow2"), Ok(()), "who reads by force keeps nobody out");
    drop(reading);
    mount.umount();
}

#[test]
fn an_open_view_locks_each_of_its_layers_against_writers() {
    let store = chain();
    let mount = Mount::new(&store);
    for image in [("base.raw", "raw"), ("mid.qcow2", "qcow2"), ("web.qcow2", "qcow2")] {
        assert_eq!(qemu_writes(&store, image.0, image.1), Ok(()), "a mount alone holds no lock");
    }
    let reading = open(&mount.path("web/active.raw")).expect("a view");
    for (image, format) in [("base.raw", "raw"), ("mid.qcow2", "qcow2"), ("web.qcow2", "qcow2")] {
        let refused = qemu_writes(&store, image, format).expect_err("a lock");
        assert!(refused.contains("lock"), "{image}: {refused}");
        // Readers share.
        store.img(["info", "-f", format, image]);
        store.img(["map", "-f", format, image]);
    }
    drop(reading);
    for (image, format) in [("base.raw", "raw"), ("mid.qcow2", "qcow2"), ("web.qcow2", "qcow2")] {
        eventually("the locks are gone", || qemu_writes(&store, image, format).is_ok());
    }
    mount.umount();
}

#[test]
fn closing_one_of_two_handles_drops_no_lock() {
    let store = chain();
    let mount = Mount::new(&store);
    let (active, mid) = (mount.path("web/active.raw"), mount.path("web/snapshots/mid.raw"));
    let (first, second) = (open(&active).expect("a view"), open(&mid).expect("a view"));
    let again = open(&mid).expect("a view");
    drop(first);
    eventually("the active layer is free", || qemu_writes(&store, "web.qcow2", "qcow2").is_ok());
    mount.close(again);
    assert!(qemu_writes(&store, "mid.qcow2", "qcow2").is_err(), "mid is still open");
    assert!(qemu_writes(&store, "base.raw", "raw").is_err(), "base lies below it");
    drop(second);
    eventually("nothing is held", || qemu_writes(&store, "base.raw", "raw").is_ok());
    mount.umount();
}

#[test]
fn unmounting_releases_every_lock_before_it_returns() {
    let store = chain();
    let mount = Mount::new(&store);
    drop(open(&mount.path("web/active.raw")).expect("a view"));
    mount.umount();
    for (image, format) in [("base.raw", "raw"), ("mid.qcow2", "qcow2"), ("web.qcow2", "qcow2")] {
        assert_eq!(qemu_writes(&store, image, format), Ok(()));
    }
}

fn set_lock(file: &File, byte: i64, kind: i32) {
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: byte,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(file, FcntlArg::F_OFD_SETLK(&lock)).expect("a lock");
}

/// Holds one byte of an image as QEMU does: a shared lock of the open file description.
fn hold(path: &Path, byte: i64) -> File {
    let file = File::open(path).expect("an image");
    set_lock(&file, byte, libc::F_RDLCK);
    file
}

#[test]
fn a_layer_written_or_marked_inconsistent_makes_its_view_and_those_above_busy() {
    let store = chain();
    let mount = Mount::new(&store);
    let view = |name: &str| mount.path("web").join(name);
    for byte in [101, 200] {
        // An opener's own locks exclude such a holder; chainfs does not test for it.
        eventually("nobody reads", || qemu_writes(&store, "mid.qcow2", "qcow2").is_ok());
        let holder = hold(&store.path("mid.qcow2"), byte);
        assert_eq!(open(&view("active.raw")).err(), Some(Errno::BUSY), "byte {byte}");
        assert_eq!(open(&view("snapshots/mid.raw")).err(), Some(Errno::BUSY), "byte {byte}");
        assert!(open(&view("snapshots/base.raw")).is_ok(), "byte {byte} is above the base");
        // Not by closing it: a process that another test has just forked has it, too, until it runs its
        // program.
        set_lock(&holder, byte, libc::F_UNLCK);
        assert!(open(&view("active.raw")).is_ok(), "byte {byte} is gone");
    }
    // A holder that only excludes writers, or only reads, does not disturb a reader.
    for byte in [100, 201, 203] {
        let _holder = hold(&store.path("mid.qcow2"), byte);
        assert!(open(&view("active.raw")).is_ok(), "byte {byte}");
    }
    mount.umount();
}

/// Cached pages of a disk are good only for as long as no file below has changed.
#[test]
fn the_second_opening_reads_writes_of_a_guest_in_between() {
    let store = chain();
    let mount = Mount::new(&store);
    for round in 0..4 {
        assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
        let mut rng = Rng::new(50 + round);
        let at = rng.below(MIB);
        let (write, zero) =
            (store.write(&mut rng, at, 200_000), format!("write -q -z -u {} 65536", round * 65_536));
        eventually("the view lets go", || qemu_writes(&store, "web.qcow2", "qcow2").is_ok());
        store.io("web.qcow2", "qcow2", [write, zero]);
    }
    mount.umount();
}

#[test]
fn reporting_tools_respect_a_running_guest_as_qemu_img_does() {
    let store = chain();
    let guest = Qemu::running_on(&store, "web.qcow2", &[]);
    let run = |args: &[&str]| tool(chainfs_binary()).args(args).arg(store.path("web.qcow2")).outcome();
    let (code, _, err) = run(&["check"]);
    assert_eq!(code, 1, "check could not check: {err}");
    assert!(err.contains("web.qcow2"), "{err}");
    guest.shut_down();
    assert_eq!(run(&["check"]).0, 0);
}

/// `losetup` and `mount -o loop` take EBUSY for a loop device that another has got first.
#[test]
fn a_loop_device_on_a_disk_that_a_guest_writes_is_refused_in_time() {
    let store = chain();
    let mount = Mount::new(&store);
    let guest = Qemu::running_on(&store, "web.qcow2", &[]);
    let active = mount.path("web/active.raw");
    assert_eq!(open(&active).err(), Some(Errno::BUSY));
    let point = store.beside("point");
    std::fs::create_dir(&point).expect("a directory");
    for options in [&["--read-only", "--find", "--show"][..], &["--find", "--show"]] {
        let (code, out, err) = tool("losetup").args(options).arg(&active).outcome();
        assert_eq!((code, out.as_str()), (1, ""), "losetup {options:?}: {err}");
        assert!(err.contains("Text file busy"), "losetup {options:?}: {err}");
    }
    let (code, _, err) = tool("mount").args(["-o", "loop,ro"]).arg(&active).arg(&point).outcome();
    assert_eq!(code, 32, "mount: {err}");
    // Others are told its format.
    std::thread::scope(|scope| {
        let other = scope.spawn(|| open(&active).err());
        assert_eq!(other.join().expect("no panic"), Some(Errno::BUSY));
    });
    guest.shut_down();
    assert_same(&active, &store.oracle("web.qcow2", "qcow2"));
    mount.umount();
}
