//! Guests' partitions and files through real mounts, compared with the kernel's own mount of the same view:
//! as a point-in-time view during writes, read by a sandboxed process. Needs root, loop devices and ext4.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;
use support::command::Control;
use support::foreign::{Loop, Mounted, Qemu};
use support::*;

/// Where the first partition of the disks here begins, and its size.
const START: u64 = MIB;
const PARTITION: u64 = 62 * MIB;

/// A disk with a partition that holds an ext4 file system with the contents of `tree`.
fn disk(store: &Store, name: &str, tree: &Path) -> PathBuf {
    let path = store.beside(name);
    let file = File::create(&path).expect("a disk");
    file.set_len(64 * MIB).expect("its size");
    tool("sgdisk").args(["-n1:2048:+62M", "-t1:8300"]).arg(&path).succeeds();
    tool("mkfs.ext4")
        .args(["-q", "-F", "-E", &format!("offset={START}"), "-d"])
        .arg(tree)
        .arg(&path)
        .arg(format!("{}k", PARTITION / 1024))
        .succeeds();
    path
}

/// A small guest: an operating system's root, with links that lead everywhere.
fn small_tree(store: &Store) -> PathBuf {
    let tree = store.beside("tree");
    for dir in ["etc", "home/joe", "usr/lib", "deep/er/still"] {
        fs::create_dir_all(tree.join(dir)).expect("a directory");
    }
    fs::write(tree.join("etc/hostname"), "web01\n").expect("a file");
    fs::write(
        tree.join("etc/os-release"),
        "NAME=\"Debian GNU/Linux\"\nVERSION_ID=\"12\"\nID=debian\nPRETTY_NAME=\"Debian 12\"\n",
    )
    .expect("a file");
    fs::write(tree.join("usr/lib/big"), Rng::new(7).bytes(3 * MIB)).expect("a file");
    fs::write(tree.join("home/joe/secret"), "for joe alone").expect("a file");
    fs::set_permissions(tree.join("home/joe/secret"), fs::Permissions::from_mode(0o600)).expect("its mode");
    let links: [(&str, &str); 8] = [
        ("deep/er/absolute", "/etc/hostname"),
        ("deep/er/inside", "../../etc/hostname"),
        ("deep/er/climbs", "../../../../../../../../etc/hostname"),
        ("deep/er/dot", "."),
        ("deep/er/winds", "dot/dot/../../../../../../etc/hostname"),
        ("to-still", "deep/er/still"),
        // `er` is the part of a link's target above the root, wherever the link is.
        ("through", "to-still/../inside"),
        ("root-itself", "/"),
    ];
    for (name, target) in links {
        symlink(target, tree.join(name)).expect("a link");
    }
    fs::write(tree.join("home/joe/marked"), "for all").expect("a file");
    let marked = rustix::fs::setxattr(
        tree.join("home/joe/marked"),
        "trusted.mark",
        b"1",
        rustix::fs::XattrFlags::empty(),
    );
    marked.expect("an attribute");
    tool("mkfifo").arg(tree.join("pipe")).succeeds();
    tool("mknod").arg(tree.join("null")).args(["c", "1", "3"]).succeeds();
    tree
}

/// A chain of three layers whose lowest is `disk`.
fn chain_on(store: &Store, disk: &Path) {
    let disk = disk.to_str().expect("a plain path");
    store.img(["convert", "-f", "raw", "-O", "qcow2", disk, "base.qcow2"]);
    store.overlay("sn1.qcow2", "base.qcow2", "qcow2", "");
    store.overlay("vm.qcow2", "sn1.qcow2", "qcow2", "");
}

fn small_chain() -> Store {
    let store = Store::new();
    let tree = small_tree(&store);
    chain_on(&store, &disk(&store, "disk", &tree));
    store
}

/// All processes that are workers of the mount's daemon.
fn workers(mount: &Mount) -> Vec<u32> {
    let daemon = mount.daemon();
    let tasks = fs::read_dir(format!("/proc/{daemon}/task")).expect("its threads");
    let children = tasks.flat_map(|task| {
        let path = task.expect("a thread").path().join("children");
        let listed = fs::read_to_string(path).unwrap_or_default();
        listed.split_whitespace().filter_map(|pid| pid.parse().ok()).collect::<Vec<u32>>()
    });
    children.collect()
}

#[derive(Debug, PartialEq, Eq)]
struct Entry {
    kind: fs::FileType,
    mode: u32,
    owner: (u32, u32),
    times: [(i64, i64); 2],
    size: u64,
    blocks: u64,
    links: u64,
    device: u64,
    /// The first path, in order, of the same inode.
    same_as: PathBuf,
    target: Option<PathBuf>,
    attributes: Vec<(Vec<u8>, Vec<u8>)>,
    content: Option<Vec<u8>>,
}

fn attributes(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut names = vec![0; 65_536];
    let len =
        rustix::fs::llistxattr(path, &mut names[..]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let value = |name: &[u8]| {
        let mut value = vec![0; 65_536];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..])
            .unwrap_or_else(|e| panic!("{} {}: {e}", path.display(), String::from_utf8_lossy(name)));
        value.truncate(len);
        value
    };
    let mut found: Vec<_> = names[..len]
        .split(|byte| *byte == 0)
        .filter(|name| !name.is_empty())
        .map(|name| (name.to_vec(), value(name)))
        .collect();
    found.sort();
    found
}

/// Everything beneath a directory, as any user sees it.
fn walk(root: &Path) -> BTreeMap<PathBuf, Entry> {
    let mut inodes = BTreeMap::new();
    let mut found = BTreeMap::new();
    let mut rest = vec![PathBuf::new()];
    while let Some(directory) = rest.pop() {
        let listed =
            fs::read_dir(root.join(&directory)).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
        let mut paths: Vec<_> =
            listed.map(|entry| directory.join(entry.expect("an entry").file_name())).collect();
        paths.push(directory.clone());
        for path in paths {
            let place = root.join(&path);
            let stat = fs::symlink_metadata(&place).unwrap_or_else(|e| panic!("{}: {e}", place.display()));
            if stat.is_dir() && path != directory {
                rest.push(path);
                continue;
            }
            let same_as = inodes.entry(stat.ino()).or_insert_with(|| path.clone()).clone();
            let entry = Entry {
                kind: stat.file_type(),
                mode: stat.mode() & 0o7777,
                owner: (stat.uid(), stat.gid()),
                times: [(stat.mtime(), stat.mtime_nsec()), (stat.ctime(), stat.ctime_nsec())],
                size: stat.size(),
                blocks: stat.blocks(),
                links: stat.nlink(),
                device: stat.rdev(),
                same_as,
                target: stat.is_symlink().then(|| fs::read_link(&place).expect("a target")),
                attributes: attributes(&place),
                content: stat
                    .is_file()
                    .then(|| fs::read(&place).unwrap_or_else(|e| panic!("{}: {e}", place.display()))),
            };
            found.insert(path, entry);
        }
    }
    // Which of several names is the first depends on the order of the walk.
    let firsts: BTreeMap<PathBuf, PathBuf> =
        found.iter().fold(BTreeMap::new(), |mut firsts, (path, entry)| {
            firsts.entry(entry.same_as.clone()).or_insert_with(|| path.clone());
            firsts
        });
    for entry in found.values_mut() {
        entry.same_as = firsts[&entry.same_as].clone();
    }
    found
}

fn assert_same_tree(shown: &Path, kernel: &Path) {
    let (shown, kernel) = (walk(shown), walk(kernel));
    let names = |tree: &BTreeMap<PathBuf, Entry>| tree.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&shown), names(&kernel));
    for (path, entry) in &kernel {
        let ours = &shown[path];
        assert!(ours.content == entry.content, "{}: other content", path.display());
        let without = |entry: &Entry| {
            format!(
                "{:?}",
                Entry {
                    content: None,
                    same_as: entry.same_as.clone(),
                    target: entry.target.clone(),
                    attributes: entry.attributes.clone(),
                    ..*entry
                }
            )
        };
        assert_eq!(without(ours), without(entry), "{}", path.display());
    }
    assert!(kernel.len() > 5, "there is something to compare");
}

/// The kernel's mount of a copy of a view's bytes: it replays the journal there.
fn kernel_mount(store: &Store, shown: &Path, name: &str) -> (Loop, Mounted) {
    let copy = store.beside(format!("{name}.copy"));
    tool("cp").arg("--sparse=always").arg(shown).arg(&copy).succeeds();
    let device = Loop::new(&copy);
    let mounted = Mounted::new(&device.0, store.beside(format!("{name}.kernel")));
    (device, mounted)
}

#[test]
fn every_view_matches_the_kernel_including_journals() {
    let store = Store::new();
    let tree = small_tree(&store);
    let disk = disk(&store, "disk", &tree);
    every_view_matches_the_kernel(&store, &disk);
}

#[test]
fn every_view_of_an_xfs_guest_matches_the_kernel_including_the_log() {
    let store = Store::new();
    let tree = small_tree(&store);
    let volume = store.beside("volume");
    File::create(&volume).and_then(|file| file.set_len(310 * MIB)).expect("a volume");
    tool("mkfs.xfs").args(["-q", "-L", "system"]).arg(&volume).succeeds();
    let device = Loop::new(&volume);
    let mounted = Mounted::new(&device.0, store.beside("filled"));
    tool("cp").arg("-a").arg(tree.join(".")).arg(&mounted.0).succeeds();
    mounted.umount();
    device.detach();
    let disk = store.beside("disk");
    File::create(&disk).and_then(|file| file.set_len(312 * MIB)).expect("a disk");
    tool("sgdisk").args(["-n1:2048:+310M", "-t1:8300"]).arg(&disk).succeeds();
    let (from, to) = (format!("if={}", volume.display()), format!("of={}", disk.display()));
    tool("dd").args(["status=none", "bs=1M", "seek=1", "conv=notrunc,sparse", &from, &to]).succeeds();
    every_view_matches_the_kernel(&store, &disk);
}

fn every_view_matches_the_kernel(store: &Store, disk: &Path) {
    chain_on(store, disk);
    let mount = Mount::with(store, "symlinks=verbatim");
    let control = Control::of(&mount, "vm");
    // The guest: the kernel, with the partition on a loop device, snapshots being taken while it writes.
    let device = Loop::new(&mount.path("vm/partitions/active/p1.raw"));
    let guest = Mounted::new(&device.0, store.beside("guest"));
    let mut rng = Rng::new(3);
    for round in 0..3 {
        let dir = guest.0.join(format!("round {round}"));
        fs::create_dir(&dir).expect("a directory");
        for number in 0..60 {
            let path = dir.join(format!("file {number} \u{e9}"));
            let len = rng.below(40_000);
            fs::write(&path, rng.bytes(len)).expect("a file");
            if number % 5 == 0 {
                fs::hard_link(&path, dir.join(format!("again {number}"))).expect("a link");
                tool("setfattr").args(["-n", "user.mark", "-v", "seen"]).arg(&path).succeeds();
                tool("setfacl").args(["-m", "u:1234:r"]).arg(&path).succeeds();
            }
        }
        let sparse = File::create(dir.join("sparse")).expect("a file");
        sparse.write_all_at(b"far", 5 * MIB).expect("its end");
        fs::write(guest.0.join("etc/hostname"), format!("round{round}\n")).expect("a change");
        // The journal has it, its place on the disk has not.
        rustix::fs::fsync(File::open(guest.0.join("etc/hostname")).expect("a file")).expect("fsync");
        control.done(&format!("snapshot live{round}"));
        fs::write(guest.0.join("etc/hostname"), "later\n").expect("a change");
    }
    guest.umount();
    device.detach();
    for (round, view) in ["live0", "live1", "live2", "base", "active"].into_iter().enumerate() {
        let (device, kernel) = kernel_mount(store, &mount.path(format!("vm/partitions/{view}/p1.raw")), view);
        assert_same_tree(&mount.path(format!("vm/files/{view}/p1")), &kernel.0);
        if view.starts_with("live") {
            assert_eq!(mount.text(format!("vm/files/{view}/p1/etc/hostname")), format!("round{round}\n"));
        }
        kernel.umount();
        device.detach();
    }
    mount.umount();
}

#[test]
// G3
fn links_stay_inside_their_volume_and_special_files_do_not_open() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let root = mount.path("vm/files/sn1/p1");
    for name in ["deep/er/absolute", "deep/er/inside", "deep/er/climbs", "deep/er/winds", "through"] {
        let text = fs::read_to_string(root.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(
            text,
            "web01\n",
            "{name} -> {}",
            fs::read_link(root.join(name)).expect("a target").display()
        );
    }
    assert_eq!(
        fs::read_link(root.join("deep/er/absolute")).expect("a target"),
        Path::new("../../etc/hostname")
    );
    assert_eq!(
        fs::canonicalize(root.join("root-itself")).expect("a place"),
        fs::canonicalize(&root).expect("a place")
    );
    let mut target = [0; 100];
    let link = root.join("deep/er/absolute");
    let len =
        rustix::fs::lgetxattr(&link, "system.chainfs.target", &mut target[..]).expect("the guest's own text");
    assert_eq!(&target[..len], b"/etc/hostname");
    for (name, errno) in [("pipe", Errno::NXIO), ("null", Errno::ACCESS)] {
        let refused = File::open(root.join(name)).expect_err(name);
        assert_eq!(Errno::from_io_error(&refused), Some(errno), "{name}");
    }
    assert!(fs::write(root.join("etc/hostname"), "mine").is_err(), "guests' files are only read");
    mount.umount();
    let mount = Mount::with(&store, "symlinks=verbatim");
    let root = mount.path("vm/files/sn1/p1");
    assert_eq!(fs::read_link(root.join("deep/er/absolute")).expect("a target"), Path::new("/etc/hostname"));
    assert!(fs::symlink_metadata(root.join("pipe")).expect("a FIFO").file_type().is_fifo());
    mount.umount();
}

#[test]
fn partitions_are_disks_and_only_active_ones_are_writable() {
    let store = small_chain();
    let mount = Mount::new(&store);
    assert_eq!(mount.names("vm/partitions"), ["active", "base", "sn1"]);
    assert_eq!(mount.names("vm/partitions/sn1"), ["p1.raw"]);
    let part = mount.path("vm/partitions/active/p1.raw");
    assert_eq!(fs::metadata(&part).expect("a partition").len(), PARTITION);
    let whole = fs::read(mount.path("vm/snapshots/sn1.raw")).expect("a disk");
    let frozen = fs::read(mount.path("vm/partitions/sn1/p1.raw")).expect("a partition");
    assert!(
        frozen == whole[START as usize..][..PARTITION as usize],
        "the partition is a stretch of the disk"
    );
    for name in ["vm/partitions/sn1/p1.raw", "vm/partitions/base/p1.raw"] {
        assert!(File::options().write(true).open(mount.path(name)).is_err(), "{name}");
    }
    let open = File::options().read(true).write(true).open(&part).expect("a partition");
    open.write_all_at(b"first", 0).expect("a write");
    open.write_all_at(b"last!", PARTITION - 5).expect("a write");
    assert_eq!(
        Errno::from_io_error(&open.write_all_at(b"beyond", PARTITION).unwrap_err()),
        Some(Errno::NOSPC)
    );
    assert_eq!(open.write_at(b"across the end", PARTITION - 6).expect("a short write"), 6);
    assert_eq!(Errno::from_io_error(&open.set_len(PARTITION / 2).unwrap_err()), Some(Errno::PERM));
    assert_eq!(Errno::from_io_error(&open.set_len(PARTITION * 2).unwrap_err()), Some(Errno::PERM));
    open.sync_all().expect("fsync");
    let disk = File::open(mount.path("vm/active.raw")).expect("the disk");
    let mut bytes = [0; 6];
    disk.read_exact_at(&mut bytes, START + PARTITION - 6).expect("a read");
    assert_eq!(&bytes, b"across");
    let mut beyond = [0; 64];
    disk.read_exact_at(&mut beyond, START + PARTITION).expect("a read");
    assert!(beyond == whole[(START + PARTITION) as usize..][..64], "nothing beyond was written");
    drop((open, disk));
    // A guest changes its table: the new partitions are shown.
    tool("sgdisk").args(["-d1", "-n1:4096:+10M", "-n2:0:+5M"]).arg(mount.path("vm/active.raw")).succeeds();
    eventually("the new partitions", || mount.names("vm/partitions/active") == ["p1.raw", "p2.raw"]);
    assert_eq!(fs::metadata(&part).expect("a partition").len(), 10 * MIB);
    assert_eq!(mount.names("vm/partitions/sn1"), ["p1.raw"]);
    mount.umount();
    store.img(["check", "-q", "vm.qcow2"]);
}

#[test]
// G4
fn volumes_are_parsed_on_first_access_and_unlocked_later() {
    let store = small_chain();
    let mount = Mount::new(&store);
    tool("find").arg(mount.path("vm/files")).args(["-maxdepth", "1"]).succeeds();
    tool("ls").arg("-lR").arg(mount.path("vm/info")).arg(mount.path("vm/partitions")).arg("-d").succeeds();
    assert_eq!(workers(&mount), Vec::<u32>::new(), "a walk past is no look inside");
    assert_eq!(mount.text("vm/files/active/p1/etc/hostname"), "web01\n");
    assert_eq!(workers(&mount).len(), 1);
    // Another program can write the image now, though the kernel still knows the guest's files.
    store.io("vm.qcow2", "qcow2", ["write -q -P 7 40M 64k"]);
    store.io("vm.qcow2", "qcow2", ["write -q -P 8 40M 64k"]);
    assert_eq!(mount.text("vm/files/active/p1/etc/hostname"), "web01\n");
    mount.umount();
}

#[test]
// G1
fn a_worker_has_no_rights_and_its_crash_is_survived() {
    let store = small_chain();
    // With one thread all that waits for a guest has one of its own.
    for (options, seccomp) in [("", "2"), ("noseccomp,threads=1", "0")] {
        let mount = Mount::with(&store, options);
        assert_eq!(mount.text("vm/files/sn1/p1/etc/hostname"), "web01\n");
        let [worker] = workers(&mount)[..] else { panic!("one worker") };
        let status = fs::read_to_string(format!("/proc/{worker}/status")).expect("its status");
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}"));
            line[name.len() + 1..].trim().to_owned()
        };
        assert_eq!(field("Seccomp"), seccomp, "{options}");
        for rights in ["CapInh", "CapPrm", "CapEff"] {
            assert_eq!(field(rights), "0000000000000000", "{rights}, {options}");
        }
        assert_eq!(field("NoNewPrivs"), "1", "{options}");
        let limits = fs::read_to_string(format!("/proc/{worker}/limits")).expect("its limits");
        let open_files = limits.lines().find(|line| line.starts_with("Max open files")).expect("the limit");
        assert_eq!(open_files.split_whitespace().nth(3), Some("0"), "{open_files}");
        let links = fs::read_dir(format!("/proc/{worker}/fd")).expect("its descriptors");
        for link in links {
            let target = fs::read_link(link.expect("a descriptor").path()).expect("what it is");
            let target = target.to_str().expect("plain");
            assert!(target.starts_with("socket:"), "a worker has {target}");
        }
        // The file is open while the worker ends, and while another one runs.
        let open = File::open(mount.path("vm/files/sn1/p1/usr/lib/big")).expect("a file");
        tool("kill").args(["-9", &worker.to_string()]).succeeds();
        let mut bytes = vec![0; 3 * MIB as usize];
        open.read_exact_at(&mut bytes, 0).expect("its bytes");
        assert!(bytes == fs::read(store.beside("tree/usr/lib/big")).expect("the original"));
        assert_eq!(mount.names("vm/files/sn1/p1/deep/er").len(), 6);
        assert_ne!(workers(&mount), [worker]);
        drop(open);
        mount.umount();
    }
}

/// How often the first thread of a process has slept.
fn sleeps(process: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{process}/task/{process}/status")).expect("its status");
    let line =
        status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:")).expect("how often");
    line.trim().parse().expect("a number")
}

#[test]
fn an_idle_worker_sleeps_and_ends_with_its_daemon() {
    let store = small_chain();
    let mount = Mount::with(&store, "");
    assert_eq!(mount.text("vm/files/sn1/p1/etc/hostname"), "web01\n");
    let [worker] = workers(&mount)[..] else { panic!("one worker") };
    let before = sleeps(worker);
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(
        sleeps(worker),
        before,
        "whoever waits for the daemon's end does not look for it again and again"
    );
    tool("kill").args(["-9", &mount.daemon().to_string()]).succeeds();
    eventually("the worker ends", || !fs::exists(format!("/proc/{worker}")).expect("/proc"));
}

/// A file whose inode is damaged fails alone; its name and its neighbours stay.
#[test]
fn a_damaged_file_keeps_its_name_and_fails_alone() {
    let store = Store::new();
    let tree = small_tree(&store);
    let disk = disk(&store, "disk", &tree);
    let damage = "set_inode_field /etc/hostname checksum 0x1234";
    tool("debugfs").args(["-w", "-R", damage]).arg(format!("{}?offset={START}", disk.display())).succeeds();
    chain_on(&store, &disk);
    let mount = Mount::with(&store, "");
    let etc = mount.path("vm/files/sn1/p1/etc");
    let names = || {
        let entries =
            fs::read_dir(&etc).expect("a directory").map(|entry| entry.expect("an entry").file_name());
        let mut names: Vec<_> = entries.collect();
        names.sort();
        names
    };
    for _ in 0..2 {
        assert_eq!(names(), ["hostname", "os-release"]);
        for _ in 0..2 {
            let error = fs::symlink_metadata(etc.join("hostname")).expect_err("it is damaged");
            assert_eq!(error.raw_os_error(), Some(Errno::IO.raw_os_error()), "{error}");
        }
        let whole = fs::read_to_string(etc.join("os-release")).expect("it is whole");
        assert!(whole.contains("ID=debian"), "{whole}");
    }
    mount.umount();
}

#[test]
// G2
fn an_open_active_disk_shows_one_point_in_time_despite_writes() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let big = fs::read(store.beside("tree/usr/lib/big")).expect("the original");
    let root = mount.path("vm/files/active");
    let open = File::open(root.join("p1/usr/lib/big")).expect("a file");
    // All of the partition is overwritten while the file is open.
    let part =
        File::options().write(true).open(mount.path("vm/partitions/active/p1.raw")).expect("a partition");
    for at in (0..PARTITION).step_by(MIB as usize) {
        part.write_all_at(&vec![0xee; MIB as usize], at).expect("a write");
    }
    let mut bytes = vec![0; big.len()];
    open.read_exact_at(&mut bytes, 0).expect("its bytes");
    assert!(bytes == big, "what is read is what it was");
    assert_eq!(fs::read_to_string(root.join("p1/etc/hostname")).expect("a file"), "web01\n");
    drop(open);
    // A new opening of the directory shows the current state.
    assert_eq!(mount.names("vm/files/active"), ["volumes.txt"]);
    assert!(
        mount.text("vm/files/active/volumes.txt").contains("unknown"),
        "{}",
        mount.text("vm/files/active/volumes.txt")
    );
    eventually("the names of before are forgotten", || fs::metadata(root.join("p1/etc/hostname")).is_err());
    assert_eq!(mount.text("vm/files/sn1/p1/etc/hostname"), "web01\n");
    drop(part);
    mount.umount();
}

/// Bytes that the daemon has in memory.
fn memory(mount: &Mount) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", mount.daemon())).expect("its status");
    let line = status.lines().find(|line| line.starts_with("RssAnon:")).expect("its memory");
    line.split_whitespace().nth(1).and_then(|number| number.parse::<u64>().ok()).expect("a number") << 10
}

/// Ten seconds, and some time to detect their end.
const NOBODY_LOOKS: Duration = Duration::from_secs(14);

#[test]
fn an_idle_disk_is_closed() {
    let (store, forced_store) = (small_chain(), small_chain());
    let mount = Mount::new(&store);
    let disk = File::options().write(true).open(mount.path("vm/active.raw")).expect("a disk");
    let mut shown = Vec::new();
    for round in 0..5 {
        // Each time the disk is another one, and the kernel knows files of all of them.
        disk.write_all_at(&[round], START + PARTITION - 1).expect("a write");
        assert!(mount.names("vm/files/active").contains(&"p1".to_owned()));
        shown.push(rustix::fs::open(
            mount.path("vm/files/active/p1"),
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC,
            rustix::fs::Mode::empty(),
        ));
    }
    // And one that was read by force, when another process had it.
    let forced = Mount::with(&forced_store, "force_share");
    let qemu = Qemu::running_on(&forced_store, "vm.qcow2", &[]);
    assert_eq!(forced.text("vm/files/active/p1/etc/hostname"), "web01\n");
    qemu.shut_down();

    std::thread::sleep(NOBODY_LOOKS);

    let before = memory(&mount);
    for at in (0..PARTITION).step_by(MIB as usize) {
        disk.write_all_at(&vec![0xee; MIB as usize], START + at).expect("a write");
    }
    let more = memory(&mount).saturating_sub(before);
    assert!(more < PARTITION, "{more} bytes are kept for nobody");
    drop((shown, disk));
    mount.umount();

    Control::of(&forced, "vm").done("revert to=sn1");
    assert_eq!(forced.text("vm/files/active/p1/etc/hostname"), "web01\n");
    forced.umount();
}

#[test]
fn an_open_partition_of_a_removed_disk_stays_readable() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let open = File::open(mount.path("vm/partitions/sn1/p1.raw")).expect("a partition");
    let before = fs::read(store.oracle("sn1.qcow2", "qcow2")).expect("a disk");
    fs::rename(store.path("vm.qcow2"), store.beside("vm.qcow2")).expect("it goes");
    eventually("it is seen to have gone", || !mount.path("vm").exists());
    // The kernel caches answers for that long.
    std::thread::sleep(Duration::from_millis(700));
    assert_eq!(open.metadata().expect("what it was").len(), PARTITION);
    let mut bytes = vec![0; MIB as usize];
    open.read_exact_at(&mut bytes, 0).expect("its bytes");
    assert!(bytes == before[START as usize..][..MIB as usize]);
    drop(open);
    mount.umount();
}

#[test]
fn commands_wait_for_open_guest_files_only() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let control = Control::of(&mount, "vm");
    let open = File::open(mount.path("vm/files/base/p1/etc/hostname")).expect("a file");
    let said = control.refused("commit top=sn1 base=base", Errno::BUSY);
    assert!(said.contains("base"), "{said}");
    drop(open);
    assert_eq!(mount.text("vm/files/base/p1/etc/hostname"), "web01\n");
    assert_eq!(mount.text("vm/files/sn1/p1/etc/hostname"), "web01\n");
    control.done("commit top=sn1 base=base");
    assert_eq!(mount.text("vm/files/active/p1/etc/hostname"), "web01\n");
    assert_eq!(mount.names("vm/files"), ["active", "base"]);
    mount.umount();
}

#[test]
fn the_owner_reads_all_and_others_by_the_modes_of_the_image() {
    let store = small_chain();
    tool("chown").args(["-R", "nobody"]).arg(store.root()).succeeds();
    fs::set_permissions(store.root().parent().expect("a parent"), fs::Permissions::from_mode(0o755))
        .expect("a mode");
    for name in ["base.qcow2", "sn1.qcow2", "vm.qcow2"] {
        fs::set_permissions(store.path(name), fs::Permissions::from_mode(0o600)).expect("a mode");
    }
    let dir = store.beside("user-mnt");
    fs::create_dir(&dir).expect("a mount point");
    tool("chown").arg("nobody").arg(&dir).succeeds();
    let as_user = |command: &str| -> (i32, String, String) {
        let mut run = tool("setpriv");
        run.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--inh-caps=-all", "env"]);
        run.args(["HOME=/nonexistent", "XDG_CONFIG_HOME=/nonexistent", "bash", "-c", command]);
        run.outcome()
    };
    let (code, _, said) =
        as_user(&format!("{} mount {} {}", chainfs_binary(), store.root().display(), dir.display()));
    assert_eq!(code, 0, "{said}");
    let shown = dir.join("vm/files");
    let (code, out, said) = as_user(&format!(
        "cd {0} && cat sn1/p1/etc/hostname && cat active/p1/home/joe/secret && cat sn1/root/etc/hostname && \
            sha256sum < base/p1/usr/lib/big && ls -lR . | wc -l",
        shown.display()
    ));
    // Attributes that the kernel shows to root only are hidden from other users.
    let copied = as_user(&format!(
        "copy=$(mktemp -d -p /dev/shm); cp --preserve=xattr {}/active/p1/home/joe/marked $copy; said=$?; rm \
            -r $copy; exit $said",
        shown.display()
    ));
    let unmounted = as_user(&format!("{} umount {}", chainfs_binary(), dir.display()));
    assert_eq!((code, copied.0, unmounted.0), (0, 0, 0), "{said}{}{}", copied.2, unmounted.2);
    assert!(out.starts_with("web01\nfor joe aloneweb01\n"), "{out}");
    // With allow_other, the image's permissions are checked, and then the guest's own modes.
    let mount = Mount::with(&store, "allow_other");
    assert_eq!(
        attributes(&mount.path("vm/files/sn1/p1/home/joe/marked")),
        [(b"trusted.mark".to_vec(), b"1".to_vec())]
    );
    let refused = as_user(&format!("cat {}/vm/files/sn1/p1/etc/hostname", mount.dir().display()));
    assert_eq!(refused.0, 0, "the image is nobody's: {}", refused.2);
    let refused = as_user(&format!("cat {}/vm/files/sn1/p1/home/joe/secret", mount.dir().display()));
    assert_eq!(refused.0, 1, "{refused:?}");
    mount.umount();
    tool("chown").args(["-R", "root"]).arg(store.root()).succeeds();
    let mount = Mount::with(&store, "allow_other");
    let refused = as_user(&format!("ls {}/vm/files/sn1", mount.dir().display()));
    assert_eq!(refused.0, 2, "{refused:?}");
    mount.umount();
}

/// An access control list in the format of the extended attribute: tag, permissions, id.
fn access_list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let bytes = |(tag, bits, id): &(u16, u16, u32)| {
        [tag.to_le_bytes().as_slice(), &bits.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    [2u32.to_le_bytes().to_vec(), entries.iter().flat_map(bytes).collect()].concat()
}

#[test]
fn access_control_lists_of_the_guest_grant_access() {
    const NO_ID: u32 = !0;
    let [owner, user, group, mask, other] = [1, 2, 4, 0x10, 0x20];
    let (store, nobody) = (Store::new(), 65_534);
    let tree = small_tree(&store);
    // The group bits of the mode are the mask: they may be more than the group's rights, or less than a
    // user's.
    let lists = [
        (
            "let-in",
            0o640,
            [(owner, 6, NO_ID), (user, 4, nobody), (group, 0, NO_ID), (mask, 4, NO_ID), (other, 0, NO_ID)],
        ),
        (
            "kept-out",
            0o644,
            [(owner, 6, NO_ID), (user, 0, nobody), (group, 4, NO_ID), (mask, 4, NO_ID), (other, 4, NO_ID)],
        ),
    ];
    for (name, mode, list) in lists {
        let path = tree.join(name);
        fs::write(&path, name).expect("a file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("a mode");
        let set = rustix::fs::setxattr(
            &path,
            "system.posix_acl_access",
            &access_list(&list),
            rustix::fs::XattrFlags::empty(),
        );
        set.expect("a list");
    }
    chain_on(&store, &disk(&store, "disk", &tree));
    fs::set_permissions(store.root().parent().expect("a parent"), fs::Permissions::from_mode(0o755))
        .expect("a mode");
    for (options, let_in, kept_out) in [
        ("allow_other", 0, 1),
        // Modes alone.
        ("allow_other,noacl", 1, 0),
        // The mounting user decides.
        ("allow_other,umask=022", 0, 0),
        ("allow_other,umask=077", 1, 1),
    ] {
        let mount = Mount::with(&store, options);
        for (name, code) in [("let-in", let_in), ("kept-out", kept_out)] {
            let mut cat = tool("setpriv");
            cat.args(["--reuid=nobody", "--regid=nogroup", "--clear-groups", "--inh-caps=-all", "cat"]);
            let found = cat.arg(mount.path("vm/files/sn1/p1").join(name)).outcome();
            assert_eq!(found.0, code, "{options}, {name}: {}", found.2);
        }
        mount.umount();
    }
}

#[test]
fn without_the_files_option_there_are_no_guest_files() {
    let store = small_chain();
    let mount = Mount::with(&store, "nofiles");
    assert_eq!(mount.names("vm"), ["active.raw", "control", "info", "snapshots"]);
    mount.umount();
}

/// A journal that cannot be replayed: the guest's last writes are missing, which must be reported.
#[test]
fn an_old_state_of_a_volume_is_reported_everywhere() {
    let store = Store::new();
    let tree = small_tree(&store);
    for name in ["good.raw", "old.raw"] {
        let image = store.path(name);
        tool("mkfs.ext4")
            .args(["-q", "-b", "4096", "-O", "^metadata_csum", "-d"])
            .arg(&tree)
            .arg(&image)
            .arg("32M")
            .succeeds();
    }
    let image = store.path("old.raw");
    let journal: u64 =
        tool("debugfs").args(["-R", "bmap <8> 0"]).arg(&image).succeeds().trim().parse().expect("a block");
    let file = File::options().read(true).write(true).open(&image).expect("an image");
    let mut features = [0];
    file.read_exact_at(&mut features, 1024 + 0x60).expect("a superblock");
    file.write_all_at(&[features[0] | 4], 1024 + 0x60).expect("a superblock of a guest that runs");
    file.write_all_at(&[0], journal * 4096).expect("a damaged journal");
    drop(file);
    let (old, good) = (image.display().to_string(), store.path("good.raw").display().to_string());
    let copied = store.beside("copied").display().to_string();
    let host = format!("{old}:/disk/etc/hostname");
    let commands: [(&[&str], i32, &str); 7] = [
        (&["ls", &format!("{old}:/disk/etc")], 1, "hostname"),
        (&["ls", &old], 1, "ext4"),
        (&["ls", "--output", "json", &old], 1, "cannot be replayed"),
        (&["cat", &host], 1, "web01"),
        (&["cp", &host, &copied], 1, ""),
        (&["versions", &host], 1, "web01"),
        (&["diff", "--files", &good, &old], 2, ""),
    ];
    for (words, want, shown) in commands {
        let (code, out, err) = tool(chainfs_binary()).args(words).outcome();
        assert_eq!(code, want, "{words:?}: {out}{err}");
        assert!(words[0] == "versions" || out.contains(shown), "{words:?}: what there is is shown: {out}");
        let is_said =
            err.contains("disk of active: the journal cannot be replayed") && err.contains("e2fsck");
        assert!(is_said, "{words:?}: {err}");
    }
    assert_eq!(fs::read_to_string(&copied).expect("a copy"), "web01\n");
    let (code, _, err) = tool(chainfs_binary()).args(["ls", &format!("{good}:/disk/etc")]).outcome();
    assert_eq!((code, err.as_str()), (0, ""));

    let mount = Mount::new(&store);
    assert_eq!(mount.names("old/files/active"), ["disk", "disk.problem.txt", "root", "volumes.txt"]);
    assert_eq!(mount.names("good/files/active"), ["disk", "root", "volumes.txt"]);
    let said = mount.text("old/files/active/disk.problem.txt");
    assert!(said.contains("the journal cannot be replayed") && said.ends_with('\n'), "{said}");
    assert!(mount.text("old/files/active/volumes.txt").contains("the journal cannot be replayed"));
    assert_eq!(mount.text("old/files/active/disk/etc/hostname"), "web01\n");
    assert!(!mount.path("good/files/active/disk.problem.txt").exists());
    mount.umount();
}
