//! FUSE over `io_uring`: the same bytes, answers and ends as through /dev/fuse, and /dev/fuse where the
//! kernel or its administrator has it not. Needs root, who sets the parameter of the module and puts it back.
//!
//! Where the kernel does not have it, `tests/setup.sh` says so, and these tests see that mounts do without.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use support::command::Control;
use support::jobs::{at_work, settled};
use support::lab::Lab;
use support::*;

const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";
const RESTRICTION: &str = "/proc/sys/kernel/io_uring_disabled";
/// Aligned for `O_DIRECT`.
const BLOCK: usize = 4096;

/// Tests that need the parameter set run together, those that need another state of the machine alone.
static MACHINE: RwLock<()> = RwLock::new(());
/// How many tests need it set, and what it was before the first of them.
static USERS: Mutex<(usize, String)> = Mutex::new((0, String::new()));

/// While this lives, the kernel offers FUSE over `io_uring` to new mounts, if it has that.
struct Offered(RwLockReadGuard<'static, ()>);

impl Offered {
    fn new() -> Self {
        let guard = MACHINE.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut users = USERS.lock().expect("nobody panics here");
        if users.0 == 0 && has_ring() {
            users.1 = fs::read_to_string(PARAMETER).expect("the parameter");
            fs::write(PARAMETER, "Y").expect("root sets the parameter");
        }
        users.0 += 1;
        Self(guard)
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        let mut users = USERS.lock().expect("nobody panics here");
        users.0 -= 1;
        if users.0 == 0 && has_ring() {
            fs::write(PARAMETER, users.1.trim()).expect("root sets the parameter");
        }
        let _ = &self.0;
    }
}

/// A file of the kernel with another content, until it is dropped; meanwhile no other test here runs.
struct Changed<'a>(&'a str, String, RwLockWriteGuard<'static, ()>);

impl<'a> Changed<'a> {
    fn new(path: &'a str, content: &str) -> Self {
        let guard = MACHINE.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let before = fs::read_to_string(path).expect(path);
        fs::write(path, content).expect(path);
        Self(path, before, guard)
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        fs::write(self.0, self.1.trim()).expect(self.0);
        let _ = &self.2;
    }
}

fn has_ring() -> bool {
    Path::new(PARAMETER).exists()
}

/// The number of times that threads of a daemon have waited, by the beginning of their names.
fn waits(daemon: u32, name: &str) -> u64 {
    let Ok(threads) = fs::read_dir(format!("/proc/{daemon}/task")) else { return 0 };
    let count = |thread: fs::DirEntry| {
        let text = |file: &str| fs::read_to_string(thread.path().join(file)).unwrap_or_default();
        let status = text("status");
        let line = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        if text("comm").starts_with(name) {
            line.map_or(0, |n| n.trim().parse().expect("a number"))
        } else {
            0
        }
    };
    threads.flatten().map(count).sum()
}

/// Whether requests of a mount come over `io_uring`.
fn is_over_ring(mount: &Mount) -> bool {
    let daemon = mount.daemon();
    let counts = || ["fuse-ring", "fuser-"].map(|name| waits(daemon, name));
    let before = counts();
    for _ in 0..20 {
        mount.names(".chainfs");
        mount.text("README.txt");
    }
    let after = counts();
    let [over_ring, through_device] = [0, 1].map(|index| after[index] - before[index]);
    assert!(over_ring > 0 || through_device > 0, "{before:?} {after:?}");
    // Forgotten inodes always come through the device.
    over_ring > 0
}

fn assert_over_ring(mount: &Mount) {
    assert_eq!(is_over_ring(mount), has_ring(), "{}", mount.dir().display());
}

/// A chain of a raw, a qcow2 and an active image, and a disk with a guest's files.
fn store() -> Store {
    let store = Store::new();
    store.raw("base.raw", 6 * MIB + 512, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.scribble("mid.qcow2", "qcow2", 2);
    store.img(["snapshot", "-c", "monday", "mid.qcow2"]);
    store.scribble("mid.qcow2", "qcow2", 3);
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "cluster_size=4k");
    store.scribble("web.qcow2", "qcow2", 4);
    let tree = store.beside("tree");
    fs::create_dir_all(tree.join("etc/many")).expect("a directory");
    fs::write(tree.join("etc/hostname"), "web01\n").expect("a file");
    fs::write(tree.join("etc/big"), Rng::new(9).bytes(3 * MIB)).expect("a file");
    for number in 0..700 {
        let name = format!("etc/many/{number}-{}", "n".repeat(number % 90));
        fs::write(tree.join(name), "").expect("a file");
    }
    std::os::unix::fs::symlink("etc/hostname", tree.join("link")).expect("a link");
    store.dir("vms");
    store.guest("vms/disk.raw", &tree, 16);
    store
}

/// What a client sees of a file: mode, size, owner, links, attributes, and its bytes, its target or its
/// names.
fn seen(path: &Path, all: &mut BTreeMap<String, String>, top: &Path) {
    let stat = fs::symlink_metadata(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let name = path.strip_prefix(top).expect("it is below").display().to_string();
    let mut names = vec![0; 64 << 10];
    let len = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
    // What the daemon has counted, and when, is not the same twice.
    let is_page = path.extension().is_some_and(|extension| extension == "html");
    let is_counted = name.starts_with(".chainfs/") || name.ends_with("status") || is_page;
    let content = if stat.is_dir() {
        let names = support::mount::names_in(path);
        for name in &names {
            seen(&path.join(name), all, top);
        }
        names.join("/")
    } else if stat.is_symlink() {
        fs::read_link(path).expect("a target").display().to_string()
    } else if is_counted || stat.mode() & 0o444 == 0 {
        String::new()
    } else {
        let bytes = fs::read(path).unwrap_or_else(|error| panic!("{name}: {error}"));
        format!("{} bytes, {:x}", bytes.len(), sum(&bytes))
    };
    let size = if is_counted { 0 } else { stat.size() };
    let (mode, owner, links) = (stat.mode(), (stat.uid(), stat.gid()), stat.nlink());
    all.insert(name, format!("{mode:o} {size} {owner:?} {links} {:x} {content}", sum(&names[..len])));
}

fn sum(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .fold(0xCBF2_9CE4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01B3))
}

#[test]
fn every_view_and_file_is_the_same_over_io_uring() {
    let _offered = Offered::new();
    let store = store();
    let [over_ring, through_device] = ["nopassthrough", "nopassthrough,noiouring"].map(|options| {
        let mount = Mount::with(&store, options);
        if options == "nopassthrough" {
            assert_over_ring(&mount);
        } else {
            assert!(!is_over_ring(&mount), "{options}");
        }
        assert_chain(&store, &mount, "web", "web.qcow2", "qcow2");
        let mut all = BTreeMap::new();
        seen(mount.dir(), &mut all, mount.dir());
        mount.umount();
        all
    });
    assert!(over_ring.len() > 750, "{}", over_ring.len());
    for (name, shown) in &through_device {
        assert_eq!(over_ring.get(name), Some(shown), "{name}");
    }
    assert_eq!(over_ring.len(), through_device.len());
}

#[test]
fn reads_of_any_length_are_whole_over_io_uring() {
    let _offered = Offered::new();
    let store = store();
    let mount = Mount::new(&store);
    // A raw layer is read by the kernel itself: its file is registered over the ring as well.
    assert_same(&mount.path("web/snapshots/base.raw"), &store.oracle("base.raw", "raw"));
    mount.umount();
    let mount = Mount::with(&store, "nopassthrough");
    assert_over_ring(&mount);
    for (view, image) in [("web/active.raw", "web.qcow2"), ("web/snapshots/mid.raw", "mid.qcow2")] {
        let expected = fs::read(store.oracle(image, "qcow2")).expect("the bytes");
        let file = File::open(mount.path(view)).expect(view);
        let direct = File::options().read(true).custom_flags(libc::O_DIRECT).open(mount.path(view));
        let direct = direct.expect(view);
        let mut rng = Rng::new(7);
        let mut buffer = vec![0; (2 << 20) + BLOCK];
        let aligned = buffer.as_ptr().align_offset(BLOCK);
        for len in [1, 511, BLOCK, 65_537, 1 << 20, (1 << 20) + 1, 2 << 20] {
            for (file, is_direct) in [(&file, false), (&direct, true)] {
                let unit = if is_direct { BLOCK as u64 } else { 1 };
                let len = len.next_multiple_of(unit as usize);
                let at = rng.below(expected.len() as u64) / unit * unit;
                let buffer = &mut buffer[aligned..][..len];
                let got = file.read_at(buffer, at).expect("a read");
                let wanted = &expected[at as usize..];
                assert_eq!(got, len.min(wanted.len()), "{view} {at} {len}");
                assert_eq!(first_difference(&buffer[..got], &wanted[..got]), None, "{view} {at} {len}");
            }
        }
    }
    mount.umount();
}

#[test]
fn writes_over_io_uring_are_in_the_image() {
    let _offered = Offered::new();
    for options in ["", "noparallelwrites"] {
        let store = store();
        let mount = Mount::with(&store, options);
        assert_over_ring(&mount);
        let path = mount.path("web/active.raw");
        let mut expected = fs::read(&path).expect("the disk");
        let file = File::options().read(true).write(true).open(&path).expect("the disk");
        let mut rng = Rng::new(11);
        for len in [1, 512, 4096, 100_000, 1 << 20, (3 << 20) + 77] {
            let at = rng.below(expected.len() as u64 - len);
            let bytes = rng.bytes(len);
            file.write_all_at(&bytes, at).expect("a write");
            expected[at as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        file.sync_data().expect("a flush");
        // Several at a time, each with its own part.
        let bytes = rng.bytes(4 << 20);
        std::thread::scope(|scope| {
            for (number, part) in bytes.chunks(256 << 10).enumerate() {
                let file = &file;
                scope.spawn(move || file.write_all_at(part, number as u64 * (256 << 10)).expect("a write"));
            }
        });
        expected[..bytes.len()].copy_from_slice(&bytes);
        let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&file, punch, MIB, 128 * KIB).expect("a hole");
        expected[MIB as usize..][..128 << 10].fill(0);
        file.set_len(8 * MIB).expect("a longer disk");
        expected.resize(8 << 20, 0);
        file.sync_all().expect("a flush");
        // What cannot be done has its errno.
        let errno = |error: std::io::Error| error.raw_os_error();
        assert_eq!(file.write_at(b"x", 8 * MIB).map_err(errno), Err(Some(libc::ENOSPC)));
        assert_eq!(fs::write(mount.path("web/new"), "x").map_err(errno), Err(Some(libc::EPERM)));
        assert_eq!(fs::remove_file(&path).map_err(errno), Err(Some(libc::EPERM)));
        assert_eq!(fs::metadata(mount.path("web/none")).map(drop).map_err(errno), Err(Some(libc::ENOENT)));
        let mode = fs::Permissions::from_mode(0o777);
        assert_eq!(fs::set_permissions(&path, mode).map_err(errno), Err(Some(libc::EPERM)));
        // An attribute of a disk lives as long as the mount.
        let flags = rustix::fs::XattrFlags::CREATE;
        rustix::fs::setxattr(&path, "trusted.libvirt.security.ref_dac", b"1", flags).expect("an attribute");
        let mut value = [0; 9];
        let got = rustix::fs::getxattr(&path, "trusted.libvirt.security.ref_dac", &mut value[..]);
        assert_eq!((got, value[0]), (Ok(1), b'1'));
        rustix::fs::removexattr(&path, "trusted.libvirt.security.ref_dac").expect("an attribute");
        drop(file);
        let control = Control::of(&mount, "web");
        control.done("snapshot monday2");
        assert!(mount.names("web/snapshots").contains(&"monday2.raw".to_owned()), "{options}");
        mount.umount();
        let leaf = fs::read(store.oracle("web.qcow2", "qcow2")).expect("the bytes");
        assert_eq!(first_difference(&leaf, &expected), None, "{options}");
        store.img(["check", "-q", "web.qcow2"]);
    }
}

/// Binds the calling thread to the processor of that number, modulo the number that may be used.
fn bind(number: usize) {
    let usable = sched_getaffinity(None).expect("the processors");
    let processors: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| usable.is_set(*cpu)).collect();
    let mut set = CpuSet::new();
    set.set(processors[number % processors.len()]);
    sched_setaffinity(None, &set).expect("a processor");
}

/// Looks at the mount on each processor a few times, and again until `is_over` holds.
fn look(mount: &Mount, is_over: impl Fn() -> bool + Sync) {
    let looks = |number| {
        bind(number);
        let disk = File::open(mount.path("web/active.raw")).expect("the disk");
        let mut count = 0;
        while count < 3 || !is_over() {
            mount.names("web/snapshots");
            disk.read_exact_at(&mut [0; 4096], 0).expect("the disk");
            count += 1;
        }
    };
    std::thread::scope(|scope| {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        for number in 0..processors {
            scope.spawn(move || looks(number));
        }
    });
}

#[test]
fn two_hundred_waiting_reads_stop_nobody() {
    const READERS: usize = 200;
    let _offered = Offered::new();
    let lab = Lab::slow(false);
    let mount = at_work(&lab, "pull");
    let ended = AtomicUsize::new(0);
    let path = mount.path("web/control/progress");
    std::thread::scope(|scope| {
        for number in 0..READERS {
            let (path, ended) = (&path, &ended);
            scope.spawn(move || {
                bind(number);
                // To its end: that of the command.
                let text = fs::read_to_string(path).expect("the progress");
                assert!(text.ends_with("done\n"), "{text}");
                ended.fetch_add(1, Ordering::Relaxed);
            });
        }
        look(&mount, || ended.load(Ordering::Relaxed) == READERS);
    });
    settled(&lab, &mount, "pull");
    mount.umount();
}

/// The processes that read guests' disks for a daemon.
fn workers(daemon: u32) -> Vec<Pid> {
    let children = fs::read_dir(format!("/proc/{daemon}/task")).expect("the daemon's threads");
    let children = children.flatten().map(|thread| fs::read_to_string(thread.path().join("children")));
    children
        .flat_map(|list| list.unwrap_or_default().split_whitespace().map(str::to_owned).collect::<Vec<_>>())
        .filter_map(|pid| Pid::from_raw(pid.parse().ok()?))
        .collect()
}

/// Processes that go on when this is dropped.
struct Stopped(Vec<Pid>);

impl Drop for Stopped {
    fn drop(&mut self) {
        for process in &self.0 {
            let _ = kill_process(*process, Signal::CONT);
        }
    }
}

#[test]
fn a_stopped_worker_stops_only_its_own_disk() {
    const CLIENTS: usize = 40;
    let _offered = Offered::new();
    let store = store();
    let mount = Mount::new(&store);
    assert_over_ring(&mount);
    let place = "vms/disk/files/active/p1/etc/many";
    assert_eq!(mount.text("vms/disk/files/active/p1/etc/hostname"), "web01\n");
    let workers = workers(mount.daemon());
    assert!(!workers.is_empty(), "a worker reads the guest's disk");
    for worker in &workers {
        kill_process(*worker, Signal::STOP).expect("a worker");
    }
    let workers = Stopped(workers);
    let ended = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for number in 0..CLIENTS {
            let (mount, ended) = (&mount, &ended);
            scope.spawn(move || {
                bind(number);
                let name = format!("{number}-{}", "n".repeat(number % 90));
                let found = fs::metadata(mount.path(place).join(name));
                ended.fetch_add(1, Ordering::Relaxed);
                found.map(|found| found.len()).ok()
            });
        }
        // They go on, also if the test fails. A worker that is silent for a minute is replaced.
        let workers = workers;
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        look(&mount, || ended.load(Ordering::Relaxed) > 0 || start.elapsed() > second);
        assert_eq!(ended.load(Ordering::Relaxed), 0, "all wait for the worker");
        drop(workers);
    });
    assert_eq!(mount.text("vms/disk/files/active/p1/etc/hostname"), "web01\n");
    mount.umount();
}

/// Sets a flag when it is dropped, also if the test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Clients that read and write until they are told to stop, or until they get an error.
fn busy<T>(mount: &Mount, during: impl FnOnce() -> T) -> T {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..8 {
            let (is_over, path) = (&is_over, mount.path("web/active.raw"));
            scope.spawn(move || {
                bind(number);
                let Ok(file) = File::options().read(true).write(true).open(path) else { return };
                let mut buffer = vec![0; 256 << 10];
                while !is_over.load(Ordering::Relaxed) {
                    let result = if number == 0 {
                        file.write_at(&buffer, 0)
                    } else {
                        file.read_at(&mut buffer, number as u64 * 4096)
                    };
                    if result.is_err() {
                        return;
                    }
                }
            });
        }
        let _over = Over(&is_over);
        std::thread::sleep(Duration::from_millis(200));
        during()
    })
}

fn in_foreground(store: &Store) -> Mount {
    let mount = Mount::foreground(store, tool(chainfs_binary()), "");
    assert_over_ring(&mount);
    mount
}

#[test]
fn an_abort_ends_clients_and_daemon() {
    let _offered = Offered::new();
    // A process that another test makes here would close its files of a mount, and wait for the stopped
    // daemon.
    if !is_alone(module_path!(), "an_abort_ends_clients_and_daemon") {
        return;
    }
    let store = store();
    for is_stopped in [false, true] {
        let mut mount = in_foreground(&store);
        let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process");
        busy(&mount, || {
            if is_stopped {
                kill_process(daemon, Signal::STOP).expect("the daemon");
            }
            // The mount is in use, which is found after the connection was aborted. Not by umount(8): a
            // process that is made here closes files of the mount first, and waits for the daemon.
            let flags = rustix::mount::UnmountFlags::FORCE;
            assert_eq!(rustix::mount::unmount(mount.dir(), flags), Err(rustix::io::Errno::BUSY));
        });
        if is_stopped {
            kill_process(daemon, Signal::CONT).expect("the daemon");
        }
        eventually("the daemon ends", || mount.exit_code().is_some());
        mount.abandon();
    }
    assert_usable(&store);
}

#[test]
fn nothing_is_left_of_a_killed_daemon() {
    let _offered = Offered::new();
    let store = store();
    let mount = Mount::new(&store);
    assert_over_ring(&mount);
    let daemon = mount.daemon();
    busy(&mount, || {
        kill_process(Pid::from_raw(daemon.cast_signed()).expect("a process"), Signal::KILL).expect("ours");
        eventually("the daemon is gone", || !Path::new(&format!("/proc/{daemon}/task")).exists());
    });
    mount.abandon();
    assert_usable(&store);
}

#[test]
fn a_busy_mount_is_detached_and_ends_with_its_last_file() {
    let _offered = Offered::new();
    let store = store();
    let mut mount = in_foreground(&store);
    let before = fs::read(mount.path("web/snapshots/mid.raw")).expect("a snapshot");
    let file = File::open(mount.path("web/snapshots/mid.raw")).expect("a snapshot");
    busy(&mount, || {
        let said = tool(chainfs_binary()).arg("umount").arg(mount.dir()).fails();
        assert!(said.contains("in use"), "{said}");
    });
    tool("umount").arg("--lazy").arg(mount.dir()).succeeds();
    let mut bytes = vec![0; before.len()];
    file.read_exact_at(&mut bytes, 0).expect("an open file goes on");
    assert!(bytes == before);
    assert_eq!(mount.exit_code(), None);
    drop(file);
    eventually("the daemon ends", || mount.exit_code().is_some());
    assert_eq!(mount.exit_code(), Some(0));
    mount.umount();
}

/// Whether a new mount shows the disks, and the image is sound.
fn assert_usable(store: &Store) {
    let mount = Mount::new(store);
    assert_chain(store, &mount, "web", "web.qcow2", "qcow2");
    mount.umount();
}

#[test]
fn where_the_administrator_forbids_it_requests_come_through_the_device() {
    let store = store();
    let _changed = has_ring().then(|| Changed::new(PARAMETER, "N"));
    let mount = Mount::new(&store);
    assert!(!is_over_ring(&mount));
    assert_chain(&store, &mount, "web", "web.qcow2", "qcow2");
    mount.umount();
}

#[test]
fn an_ordinary_user_has_it_unless_io_uring_is_forbidden() {
    let store = store();
    let oracle = store.oracle("web.qcow2", "qcow2");
    let bin = store.beside("bin");
    fs::create_dir(&bin).expect("a directory");
    fs::copy(chainfs_binary(), bin.join("chainfs")).expect("a copy of the binary");
    for path in [store.beside(""), store.beside("oracle"), bin, oracle.clone(), store.beside("bin/chainfs")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("permissions");
    }
    std::os::unix::fs::chown(store.beside("mnt"), Some(65534), Some(65534)).expect("an owner");
    let script = r#"
        set -e
        cd "$HOME"
        bin/chainfs mount store mnt
        for process in /proc/[0-9]*; do
            [ "$(stat -c %u "$process" 2> /dev/null)" = 65534 ] || continue
            tr '\0' ' ' < "$process/cmdline" | grep -q "chainfs mount store mnt" || continue
            grep -l '^fuse-ring' "$process"/task/*/comm > /dev/null && echo over the ring
        done
        cmp mnt/web/active.raw "$ORACLE"
        bin/chainfs umount mnt
        echo all well
    "#;
    // Forbidden is it only to processes without privilege.
    for (restriction, expected) in [("0", has_ring()), ("1", false)] {
        let _changed = has_ring().then(|| Changed::new(RESTRICTION, restriction));
        let before = has_ring().then(|| fs::read_to_string(PARAMETER).expect("the parameter"));
        let set = |value: &str| has_ring().then(|| fs::write(PARAMETER, value).expect("the parameter"));
        set("Y");
        let outcome = tool("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-c", script])
            .env("HOME", store.beside("").canonicalize().expect("a path"))
            .env("ORACLE", &oracle)
            .env_remove("XDG_CONFIG_HOME")
            .outcome();
        set(before.unwrap_or_default().trim());
        let (code, out, err) = outcome;
        assert!(code == 0 && out.ends_with("all well\n"), "{out}{err}");
        assert_eq!(out.contains("over the ring"), expected, "{restriction}: {out}{err}");
    }
}
