//! An active disk under faults: images removed, disks full or failing, limits, modes, signals.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use support::active::{LEAVES, Model, assert_left_behind, chain, errno, rw};
use support::mount::connection_of;
use support::*;

#[test]
fn handles_of_a_removed_or_replaced_image_keep_the_old_file() {
    let store = chain();
    let mount = Mount::new(&store);
    for (chain, image, format) in LEAVES {
        let active = mount.path(chain).join("active.raw");
        let disk = rw(&active);
        disk.write_all_at(b"before", 0).expect("a write");
        disk.sync_all().expect("a sync");
        let aside = store.beside("aside");
        fs::copy(store.path(image), &aside).expect("a copy");
        let mut want = fs::read(&active).expect("bytes");
        fs::remove_file(store.path(image)).expect("an unlink");
        eventually("it has gone", || !active.exists());
        disk.write_all_at(b"after", 512).expect("a write");
        disk.sync_all().expect("a sync");
        let mut have = [0; 5];
        disk.read_exact_at(&mut have, 512).expect("a read");
        assert_eq!(&have, b"after");
        fs::rename(&aside, store.path(image)).expect("a rename");
        eventually("another has its name", || active.exists());
        let other = rw(&active);
        other.write_all_at(b"other", 512).expect("a write");
        want[512..517].copy_from_slice(b"other");
        disk.read_exact_at(&mut have, 512).expect("a read");
        assert_eq!(&have, b"after", "two files, two disks");
        drop((disk, other));
        assert_left_behind(&store, image, format, &Model(want));
    }
    mount.umount();
}

fn send(signal: Signal, pid: u32) {
    kill_process(Pid::from_raw(pid.cast_signed()).expect("a process number"), signal).expect("a process");
}

#[test]
fn sigterm_flushes_first_and_a_busy_mount_goes_on_serving() {
    let store = chain();
    let mount = Mount::new(&store);
    let disk = rw(&mount.path("web/active.raw"));
    disk.write_all_at(&vec![0x6b; 65_536], MIB).expect("a write");
    send(Signal::TERM, mount.daemon());
    eventually("QEMU sees it by force", || {
        let oracle = store.try_oracle(Path::new("web.qcow2"), "qcow2", None);
        oracle.is_ok_and(|path| {
            fs::read(path).is_ok_and(|b| b[MIB as usize..][..65_536].iter().all(|b| *b == 0x6b))
        })
    });
    disk.write_all_at(b"still served", 0).expect("a write");
    let mut model = Model::of(&mount.path("web/active.raw"));
    model.0[..12].copy_from_slice(b"still served");
    // Asked again it is taken away, and ends, all flushed, with its last user.
    let daemon = mount.daemon();
    send(Signal::TERM, daemon);
    eventually("it is out of the way", || connection_of(mount.dir()).is_none());
    disk.write_all_at(b"to the last", 512).expect("a write");
    model.0[512..523].copy_from_slice(b"to the last");
    drop(disk);
    eventually("the daemon has ended", || !Path::new(&format!("/proc/{daemon}")).exists());
    assert_left_behind(&store, "web.qcow2", "qcow2", &model);
}

#[test]
fn after_kill_nine_synced_data_is_there_with_leaks_at_most() {
    let store = chain();
    for round in 0..4_u8 {
        let mount = Mount::new(&store);
        let mut open = Vec::new();
        for (chain, ..) in LEAVES {
            let disk = rw(&mount.path(chain).join("active.raw"));
            disk.write_all_at(&vec![round + 1; 100_000], 300_000).expect("a write");
            disk.sync_data().expect("a sync");
            for at in (0..20).map(|n| n * 70_001) {
                let _ = disk.write_at(&vec![0xee; 30_000], 400_000 + at);
            }
            open.push(disk);
        }
        send(Signal::KILL, mount.daemon());
        drop(open);
        drop(mount);
        let (code, out, err) =
            tool("qemu-img").args(["check", "web.qcow2"]).current_dir(store.root()).outcome();
        assert!(code == 0 || code == 3, "round {round}: {code}\n{out}{err}");
        for (_, image, format) in LEAVES {
            let bytes = fs::read(store.oracle(image, format)).expect("what QEMU reads");
            assert!(bytes[300_000..400_000].iter().all(|b| *b == round + 1), "{image}, round {round}");
        }
    }
    let mount = Mount::new(&store);
    let disk = rw(&mount.path("web/active.raw"));
    disk.write_all_at(b"mended", 0).expect("a write");
    drop(disk);
    mount.umount();
}

/// The first flush fails, as on a failing disk; data that was not written then is never called durable.
#[test]
// M7
fn a_disk_with_a_failed_flush_is_read_only_and_affects_no_other() {
    let store = chain();
    store.create("other.qcow2", MIB, "");
    for (chain, image, other) in [("web", "web.qcow2", "plain"), ("plain", "plain.raw", "other")] {
        let mut command = tool("strace");
        command.args(["-f", "-qq", "-o", "/dev/null", "-e", "trace=fdatasync", "-P"]).arg(store.path(image));
        // strace counts by thread.
        command.args(["-e", "inject=fdatasync:error=EIO:when=1", chainfs_binary()]);
        let mount = Mount::foreground(&store, command, "");
        let active = mount.path(chain).join("active.raw");
        let disk = rw(&active);
        disk.write_all_at(b"doubtful", 0).expect("a write");
        assert_eq!(errno(disk.sync_all()), Some(Errno::IO));
        assert_eq!(errno(disk.write_all_at(b"more", 0)), Some(Errno::IO));
        assert_eq!(errno(disk.sync_all()), Some(Errno::IO), "once is for ever");
        let mut have = [0; 8];
        disk.read_exact_at(&mut have, 0).expect("it goes on being read");
        assert_eq!(errno(nix::unistd::close(disk).map_err(Into::into)), Some(Errno::IO), "close tells");
        let may_write = || errno(File::options().write(true).open(&active).map(drop));
        eventually("until it is mounted again", || may_write() == Some(Errno::IO));
        File::open(&active).expect("it goes on being read");
        let fine = rw(&mount.path(other).join("active.raw"));
        fine.write_all_at(b"fine", 0).expect("a write");
        fine.sync_all().expect("a sync");
        drop(fine);
        mount.umount();
        let log = fs::read_to_string(store.beside("mount.output")).expect("a log");
        assert!(log.contains(chain), "{log}");
        let mount = Mount::new(&store);
        rw(&mount.path(chain).join("active.raw")).write_all_at(b"again", 0).expect("a write");
        mount.umount();
    }
}

/// A small file system for the store, on a loop device.
struct Small<'a>(&'a Store);

impl<'a> Small<'a> {
    fn new(store: &'a Store, mib: u64) -> Self {
        let image = store.beside("small.ext4");
        File::create(&image).and_then(|f| f.set_len(mib * MIB)).expect("room");
        tool("mke2fs").args(["-q", "-F", "-t", "ext4", "-m", "0"]).arg(&image).succeeds();
        tool("mount").args(["-o", "loop"]).arg(&image).arg(store.root()).succeeds();
        Self(store)
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        tool("umount").arg(self.0.root()).succeeds();
    }
}

#[test]
fn a_full_file_system_is_enospc_and_loses_nothing() {
    fills_its_file_system(true);
}

#[test]
fn writes_before_enospc_can_be_synced() {
    fills_its_file_system(false);
}

fn fills_its_file_system(syncs_each: bool) {
    let store = Store::new();
    let small = Small::new(&store, 24);
    store.create("web.qcow2", 64 * MIB, "");
    store.create("other.qcow2", MIB, "");
    let mount = Mount::new(&store);
    let other = rw(&mount.path("other/active.raw"));
    other.write_all_at(&vec![1; 65_536], 0).expect("a write");
    other.sync_all().expect("a sync");
    let disk = rw(&mount.path("web/active.raw"));
    // Room is left for the other's existing data, and for tables.
    fs::write(store.path("ballast"), vec![1; 10 << 20]).expect("ballast");
    let mut written = 0_u64;
    let refused = loop {
        match disk.write_at(&vec![7; 65_536], written) {
            Ok(len) => written += len as u64,
            Err(error) => break error,
        }
        if syncs_each && let Err(error) = disk.sync_data() {
            break error;
        }
        assert!(written < 64 * MIB, "it never fills");
    };
    assert_eq!(Errno::from_io_error(&refused), Some(Errno::NOSPC), "{refused}");
    disk.sync_data().expect("tables have their space");
    let mut have = vec![0; 65_536];
    disk.read_exact_at(&mut have, written.saturating_sub(131_072)).expect("it is read all the same");
    other.write_all_at(&vec![2; 65_536], 0).expect("the other chain has its space");
    other.sync_all().expect("a sync");
    fs::remove_file(store.path("ballast")).expect("an unlink");
    let mut model = vec![0; 64 << 20];
    disk.read_exact_at(&mut model, 0).expect("a read");
    let mut model = Model(model);
    for at in [written, written + 65_536, 40 * MIB] {
        model.write(&disk, at, &vec![9; 65_536]);
    }
    disk.sync_all().expect("a sync");
    drop((disk, other));
    mount.umount();
    assert!(model.0[..written as usize - 65_536].iter().all(|b| *b == 7));
    assert_left_behind(&store, "web.qcow2", "qcow2", &model);
    store.img(["check", "-q", "other.qcow2"]);
    drop(small);
}

#[test]
fn a_write_beyond_the_file_size_limit_is_efbig_and_survived() {
    let store = Store::new();
    store.create("web.qcow2", 64 * MIB, "");
    let mut command = tool("sh");
    command.args(["-c", "ulimit -f 8192; exec \"$@\"", "sh", chainfs_binary()]);
    let mount = Mount::foreground(&store, command, "");
    let disk = rw(&mount.path("web/active.raw"));
    let mut at = 0;
    let refused = loop {
        match disk.write_at(&vec![7; 1 << 20], at) {
            Ok(len) => at += len as u64,
            Err(error) => break error,
        }
        assert!(at < 64 * MIB, "there is no limit");
    };
    assert_eq!(Errno::from_io_error(&refused), Some(Errno::FBIG));
    disk.write_all_at(b"what is there", 0).expect("a write in place");
    drop(disk);
    mount.umount();
    store.img(["check", "-q", "web.qcow2"]);
}

#[test]
fn images_that_the_daemon_may_not_write_are_read_only() {
    let store = chain();
    let refusal = |mount: &Mount| {
        let active = mount.path("web/active.raw");
        File::open(&active).expect("it can be read");
        errno(File::options().write(true).open(&active))
    };
    // The store is on a file system that is mounted read-only.
    tool("mount").arg("--bind").arg(store.root()).arg(store.root()).succeeds();
    tool("mount").args(["-o", "remount,bind,ro"]).arg(store.root()).succeeds();
    let mount = Mount::new(&store);
    let refused = refusal(&mount);
    drop(mount);
    tool("umount").arg(store.root()).succeeds();
    assert_eq!(refused, Some(Errno::ROFS));
    // The image is another user's, and the daemon has no right to all files.
    std::os::unix::fs::chown(store.path("web.qcow2"), Some(65_534), None).expect("an owner");
    let mut command = tool("setpriv");
    command.args(["--bounding-set=-dac_override", "--inh-caps=-dac_override", chainfs_binary()]);
    let mount = Mount::foreground(&store, command, "");
    assert_eq!(refusal(&mount), Some(Errno::ACCESS));
    mount.umount();
}
