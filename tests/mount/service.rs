//! The service of the mount, through a transport in memory: no kernel, and the same answers.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use chainfs::fs::service::{
    AttributeChange, CacheMode, Errno, Features, OpenFile, ServedBy, Statistics, TimedAttributes, Write,
    XattrReply,
};
use chainfs::fs::{Attributes, NodeKind};
use chainfs::units::are_zero;
use support::damage::header;
use support::transport::libc_flags::{READ, READ_WRITE, WRITE};
use support::transport::{FEATURES, Listed, Open, PendingBytes, ROOT, Transport};
use support::*;

/// The length of the VM state here.
const VM_STATE_LEN: u64 = 4 * KIB;

/// `base.raw` <- `mid.qcow2` with an internal snapshot <- `web.qcow2`, in the root; a disk with a partition
/// and an ext4 file system in `vms`.
fn store() -> Store {
    let store = Store::new();
    store.raw("base.raw", 2 * MIB, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.scribble("mid.qcow2", "qcow2", 2);
    store.img(["snapshot", "-c", "monday", "mid.qcow2"]);
    store.scribble("mid.qcow2", "qcow2", 3);
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "cluster_size=4k");
    store.scribble("web.qcow2", "qcow2", 4);
    // The internal snapshot has VM state, as its entry in the table says.
    let image = Damage::to(store.path("mid.qcow2"));
    let entry = image.u64(header::SNAPSHOTS_OFFSET);
    image.put_u32(entry + 32, VM_STATE_LEN as u32);
    image.put_u64(entry + 40, VM_STATE_LEN);
    let tree = store.beside("tree");
    fs::create_dir_all(tree.join("etc/many")).expect("a directory");
    fs::write(tree.join("etc/hostname"), "web01\n").expect("a file");
    for number in 0..40 {
        fs::write(tree.join(format!("etc/many/{number}")), "").expect("a file");
    }
    std::os::unix::fs::symlink("etc/hostname", tree.join("link")).expect("a link");
    store.dir("vms");
    store.guest("vms/disk.raw", &tree, 6);
    store
}

fn transport(store: &Store) -> Transport {
    Transport::new(&store.root(), FEATURES)
}

type Directories = BTreeMap<OsString, (u64, Vec<Listed>)>;

/// All directories of a mount, by path.
fn directories(transport: &Transport) -> Directories {
    let mut found = Directories::new();
    transport.directories(ROOT, Path::new(""), &mut found);
    found
}

/// Each directory finds what it lists, and no other name that any directory has.
fn assert_lookups_agree(transport: &Transport, found: &Directories) {
    let all: BTreeSet<&OsString> =
        found.values().flat_map(|(_, entries)| entries.iter().map(|entry| &entry.name)).collect();
    for (path, (inode, entries)) in found {
        let names: BTreeSet<&OsString> = entries.iter().map(|entry| &entry.name).collect();
        assert_eq!(names.len(), entries.len(), "{} lists a name twice", path.display());
        for entry in entries {
            let place = Path::new(path).join(&entry.name);
            let looked_up = transport.lookup(*inode, &entry.name);
            let looked_up =
                looked_up.unwrap_or_else(|errno| panic!("{}: {errno}", place.display())).attributes;
            assert_eq!((looked_up.inode, looked_up.kind), (entry.inode, entry.kind), "{}", place.display());
        }
        for name in all.difference(&names) {
            let errno = transport.lookup(*inode, name).err();
            // A volume that cannot be mounted is not listed. Its lookup says why.
            let is_expected = matches!(errno, Some(Errno::NOENT | Errno::OPNOTSUPP));
            assert!(is_expected, "{}: {}: {errno:?}", path.display(), name.display());
        }
    }
}

/// A listing that is resumed at any offset continues there, whatever the room, with attributes and without.
fn assert_offsets_agree(transport: &Transport, found: &Directories) {
    for (path, (inode, _)) in found {
        let (file, _) = transport.open_directory(*inode).expect("a directory");
        let whole = transport.list_all(file, usize::MAX).expect("a listing");
        for room in [1, 3] {
            assert_eq!(transport.list_all(file, room).expect("a listing"), whole, "{}", path.display());
        }
        let offsets = [0].into_iter().chain(whole.iter().map(|entry| entry.next));
        for (offset, skipped) in offsets.zip(0..) {
            let rest = transport.list(file, offset, usize::MAX).expect("a listing");
            assert_eq!(rest, whole[skipped..], "{} from {offset}", path.display());
            let mut rest = transport.list_with_attributes(file, offset, usize::MAX).expect("a listing");
            for entry in &mut rest {
                let attributes = entry.found.take().expect("attributes").attributes;
                assert_eq!(
                    (attributes.inode, attributes.kind),
                    (entry.inode, entry.kind),
                    "{}",
                    path.display()
                );
            }
            assert_eq!(rest, whole[skipped..], "{} from {offset} with attributes", path.display());
        }
        transport.release(file);
    }
}

#[test]
fn each_directory_finds_what_it_lists_at_every_offset() {
    let store = store();
    let transport = transport(&store);
    let found = directories(&transport);
    for path in [
        "",
        ".chainfs",
        ".chainfs/control",
        "vms",
        "web",
        "web/control",
        "web/info",
        "web/snapshots",
        "web/partitions",
        "web/partitions/active",
        "web/files",
        "web/files/active",
        "vms/disk/partitions/active",
        "vms/disk/files/active",
        "vms/disk/files/active/p1",
        "vms/disk/files/active/p1/etc/many",
    ] {
        assert!(found.contains_key(Path::new(path).as_os_str()), "{path} is in {:?}", found.keys());
    }
    assert_lookups_agree(&transport, &found);
    assert_offsets_agree(&transport, &found);
    let entries = |path: &str| found[Path::new(path).as_os_str()].1.len();
    assert_eq!([entries("vms/disk/files/active/p1/etc/many"), entries("web/snapshots")], [40, 4]);
}

#[test]
// X1
fn nodes_are_found_without_their_names() {
    let store = store();
    let transport = transport(&store);
    let found = directories(&transport);
    let of = |inode: u64, name: &str| transport.lookup(inode, name).expect("a node");
    let generation = of(ROOT, "web").generation;
    assert_eq!((of(ROOT, ".").generation, of(ROOT, "..").attributes.inode), (0, ROOT));
    assert!(generation > 0 && i32::try_from(generation).is_ok());
    for (path, (inode, entries)) in &found {
        for entry in entries {
            let place = Path::new(path).join(&entry.name);
            let (named, bare) =
                (transport.lookup(*inode, &entry.name).expect("a node"), of(entry.inode, "."));
            let changed = named.attributes.changed;
            assert_eq!(Attributes { changed, ..bare.attributes }, named.attributes, "{}", place.display());
            assert_eq!((bare.generation, named.generation), (generation, generation), "{}", place.display());
            let above = transport.lookup(entry.inode, "..").map(|found| found.attributes.inode);
            let is_directory = entry.kind == NodeKind::Directory;
            assert_eq!(
                above,
                if is_directory { Ok(*inode) } else { Err(Errno::STALE) },
                "{}",
                place.display()
            );
        }
    }
    assert_ne!(self::transport(&store).lookup(ROOT, "web").expect("a node").generation, generation);
}

#[test]
fn a_text_has_another_ctime_when_it_says_something_else() {
    let store = store();
    let transport = transport(&store);
    let changed = |path: &str| {
        let inode = transport.inode(path);
        transport.lookup(inode, ".").expect("a node").attributes.changed
    };
    let paths = ["web/control/status", "web/info/chain.json", ".chainfs/chains.json", ".chainfs/tree.txt"];
    let before = paths.map(changed);
    assert_eq!(paths.map(changed), before, "tar(1) would complain");
    assert_eq!(command(&transport, "web/control/snapshot", "no=word"), Err(Errno::INVAL));
    assert_ne!(changed(paths[0]), before[0]);
}

#[test]
fn a_store_of_one_image_has_its_chain_as_root() {
    let store = store();
    let transport = Transport::new(&store.path("web.qcow2"), FEATURES);
    let found = directories(&transport);
    assert!(found.contains_key(Path::new("snapshots").as_os_str()), "{:?}", found.keys());
    assert_lookups_agree(&transport, &found);
    assert_offsets_agree(&transport, &found);
}

/// What qemu-img reads of an image.
fn converted(store: &Store, image: &str, options: &[&str]) -> Vec<u8> {
    let flat = store.beside("flat");
    tool("qemu-img")
        .args(["convert", "-O", "raw"])
        .args(options)
        .arg(store.path(image))
        .arg(&flat)
        .succeeds();
    fs::read(&flat).expect("a flat disk")
}

#[test]
fn disks_have_the_bytes_that_qemu_reads() {
    let store = store();
    let transport = transport(&store);
    for (path, image, options) in [
        ("web/snapshots/base.raw", "base.raw", &["-f", "raw"][..]),
        ("web/snapshots/mid.raw", "mid.qcow2", &["-f", "qcow2"]),
        ("web/snapshots/mid@monday.raw", "mid.qcow2", &["-f", "qcow2", "-l", "monday"]),
        ("web/active.raw", "web.qcow2", &["-f", "qcow2"]),
        ("vms/disk/active.raw", "vms/disk.raw", &["-f", "raw"]),
    ] {
        assert!(transport.content(path) == converted(&store, image, options), "{path}");
    }
    assert!(
        transport.content("vms/disk/partitions/active/p1.raw")
            == converted(&store, "vms/disk.raw", &["-f", "raw"])[MIB as usize..7 * MIB as usize],
        "the partition"
    );
    assert_eq!(transport.content("vms/disk/files/active/p1/etc/hostname"), b"web01\n");
    assert_eq!(transport.content("web/snapshots/mid@monday.vmstate"), [0; VM_STATE_LEN as usize]);
    let link = transport.inode("vms/disk/files/active/p1/link");
    let target = transport.ask(|service, reply| service.read_link(Transport::call(link), reply));
    assert_eq!(target.as_deref(), Ok(&b"etc/hostname"[..]));
}

#[test]
fn what_is_written_is_read_and_is_in_the_image() {
    let store = store();
    let transport = transport(&store);
    let open = transport.open(transport.inode("web/active.raw"), READ_WRITE).expect("the active disk");
    let bytes = Rng::new(5).bytes(300 * KIB);
    assert_eq!(transport.write(open.file, 1000, &bytes), Ok(bytes.len()));
    let (offset, len) = (MIB, 64 * KIB);
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    let punched = transport.ask(|service, reply| service.fallocate(open.file, (offset, len), punch, reply));
    assert_eq!(punched, Ok(()));
    let mut expected = transport.read_all(&open).expect("the disk");
    assert!(expected[1000..1000 + bytes.len()] == bytes, "what was written");
    assert!(are_zero(&expected[MIB as usize..][..64 << 10]), "what was punched");
    let grown = AttributeChange { size: Some(3 * MIB), handle: Some(open.file.handle), ..Default::default() };
    let size = transport
        .ask(|service, reply| service.set_attributes(Transport::call(open.file.inode), grown, reply))
        .expect("a longer disk")
        .attributes
        .size;
    assert_eq!(size, 3 * MIB);
    expected.resize(3 << 20, 0);
    assert_eq!(transport.ask(|service, reply| service.flush(open.file, reply)), Ok(()));
    assert_eq!(transport.ask(|service, reply| service.sync(open.file, reply)), Ok(()));
    transport.release(open.file);
    transport.service.close();
    assert!(converted(&store, "web.qcow2", &["-f", "qcow2"]) == expected, "what QEMU reads");
    store.img(["check", "-q", "web.qcow2"]);
}

/// Gives a command through a control file; the answer.
fn command(transport: &Transport, path: &str, text: &str) -> Result<usize, Errno> {
    let open = transport.open(transport.inode(path), WRITE).expect("a control file");
    let given = transport.write(open.file, 0, text.as_bytes());
    transport.release(open.file);
    given
}

#[test]
fn commands_are_given_through_control_files() {
    let store = store();
    let transport = transport(&store);
    assert_eq!(command(&transport, "web/control/snapshot", "tuesday\n"), Ok(8));
    let progress = transport.content("web/control/progress");
    assert_eq!(String::from_utf8_lossy(&progress).lines().last(), Some("done"));
    let status = String::from_utf8(transport.content("web/control/status")).expect("text");
    assert!(status.contains("state: done"), "{status}");
    assert!(transport.lookup(transport.inode("web/snapshots"), "tuesday.raw").is_ok());
    // What a command was refused is told by the next read of the same handle.
    let open = transport.open(transport.inode("web/control/plan"), READ_WRITE).expect("the plan");
    assert_eq!(transport.write(open.file, 0, b"commit nothing\n"), Err(Errno::INVAL));
    let plan = transport.read_all(&open).expect("the plan");
    assert!(String::from_utf8_lossy(&plan).contains("refused"), "{}", String::from_utf8_lossy(&plan));
    transport.release(open.file);
}

#[test]
fn each_kind_of_failure_has_its_errno() {
    let store = store();
    let transport = transport(&store);
    let inode = |path| transport.inode(path);
    let (active, mid) = (inode("web/active.raw"), inode("web/snapshots/mid.raw"));
    let open = transport.open(active, READ_WRITE).expect("the active disk");
    let gone = OpenFile { inode: active, handle: u64::MAX };
    let change = |inode, change| {
        let call = Transport::call(inode);
        transport.ask(|service, reply| service.set_attributes(call, change, reply)).err()
    };
    let attribute = |name: &str, room| {
        let call = Transport::call(mid);
        transport.ask(|service, reply| service.extended_attribute(call, name.as_ref(), room, reply))
    };
    let seek =
        |offset, whence| transport.ask(|service, reply| service.seek(open.file, offset, whence, reply));
    let fallocate =
        |mode| transport.ask(|service, reply| service.fallocate(open.file, (0, 4096), mode, reply)).err();
    let access = |inode, mask| {
        transport.ask(|service, reply| service.access(Transport::call(inode), mask, reply)).err()
    };
    let write_back = Write { offset: 0, bytes: b"x\n", flags: READ_WRITE, is_write_back: true };
    let control = transport.open(inode("web/control/commit"), READ_WRITE).expect("a control file");

    assert_eq!(transport.lookup(ROOT, "nothing").err(), Some(Errno::NOENT));
    assert_eq!(transport.lookup(mid, "name").err(), Some(Errno::NOENT), "in a file");
    assert_eq!(transport.lookup(1 << 40, "name").err(), Some(Errno::STALE), "no such node");
    assert_eq!(transport.lookup(1 << 62 | 5 << 47, "name").err(), Some(Errno::STALE), "no such volume");
    assert_eq!(transport.open(mid, WRITE).err(), Some(Errno::ROFS));
    assert_eq!(transport.open(inode("web"), READ).err(), Some(Errno::INVAL), "a directory");
    assert_eq!(transport.open_directory(mid).err(), Some(Errno::INVAL), "a file");
    assert_eq!(transport.list(open.file, 0, 9).err(), Some(Errno::INVAL), "a file");
    assert_eq!(transport.write(gone, 0, b"x").err(), Some(Errno::STALE));
    let nobody = Open { file: gone, served_by: ServedBy::Daemon(CacheMode::Direct) };
    assert_eq!(transport.read(&nobody, 0, 9).err(), Some(Errno::STALE));
    let modes = AttributeChange { changes_mode: true, ..AttributeChange::default() };
    assert_eq!(change(active, modes), Some(Errno::PERM));
    let shorter = AttributeChange { size: Some(4096), ..AttributeChange::default() };
    assert_eq!(change(active, shorter), Some(Errno::PERM));
    assert_eq!(change(mid, shorter), Some(Errno::ROFS));
    assert_eq!(transport.ask::<()>(|service, reply| service.change_names(reply)).err(), Some(Errno::PERM));
    let link = transport.ask(|service, reply| service.read_link(Transport::call(mid), reply));
    assert_eq!(link.err(), Some(Errno::INVAL));
    assert_eq!(attribute("user.chainfs.format", 0), Ok(XattrReply::Size(5)));
    assert_eq!(attribute("user.chainfs.format", 5), Ok(XattrReply::Bytes(b"qcow2".into())));
    assert_eq!(attribute("user.chainfs.format", 4), Err(Errno::RANGE));
    assert_eq!(attribute("user.other", 0), Err(Errno::NODATA));
    assert_eq!(seek(0, libc::SEEK_DATA).map(|at| at < 2 * MIB), Ok(true));
    assert_eq!(seek(4 << 20, libc::SEEK_HOLE), Err(Errno::NXIO));
    assert_eq!(seek(-1, libc::SEEK_DATA), Err(Errno::NXIO));
    assert_eq!(seek(0, libc::SEEK_END), Err(Errno::INVAL));
    assert_eq!(fallocate(libc::FALLOC_FL_COLLAPSE_RANGE), Some(Errno::OPNOTSUPP));
    assert_eq!(access(mid, libc::W_OK), Some(Errno::ROFS));
    assert_eq!(access(mid, libc::X_OK), Some(Errno::ACCESS));
    let given = transport.ask(|service, reply| service.write(control.file, write_back, reply));
    assert_eq!(given, Err(Errno::INVAL), "a page that is written back");
    assert_eq!(command(&transport, "web/control/commit", "nothing\n"), Err(Errno::INVAL));
    assert_eq!(transport.write(open.file, 2 * MIB, b"x"), Err(Errno::NOSPC), "behind the end");
}

#[test]
fn calls_that_wait_are_answered_when_the_mount_ends() {
    let store = Store::new();
    store.create("base.qcow2", 64 * MIB, "");
    store.speckle("base.qcow2", 32 * MIB, 7);
    store.overlay("web.qcow2", "base.qcow2", "qcow2", "");
    let transport = transport(&store);
    assert!(command(&transport, "web/control/pull", "\n").is_ok());
    // Each open of the progress has its own lines: the second read of one waits for news of the job.
    let waiting: Vec<_> = (0..3)
        .map(|_| {
            let open = transport.open(transport.inode("web/control/progress"), READ).expect("the progress");
            assert!(transport.read(&open, 0, 99).is_ok());
            let (pending, answer) = PendingBytes::new();
            transport.service.read(open.file, 0, 99, pending);
            (open, answer)
        })
        .collect();
    let disk = transport.open(transport.inode("web/active.raw"), READ).expect("the active disk");
    transport.service.close();
    for (open, answer) in waiting {
        assert!(answer.recv().expect("an answer").0.is_ok());
        assert_eq!(transport.read(&open, 0, 99).err(), Some(Errno::STALE), "its handle is closed");
    }
    assert_eq!(transport.read(&disk, 0, 99).err(), Some(Errno::STALE));
}

#[test]
fn a_panic_is_an_answer() {
    let store = store();
    let transport = transport(&store);
    let open = transport.open(transport.inode("web/snapshots/mid.raw"), READ).expect("a snapshot");
    let (mut pending, answer) = PendingBytes::new();
    pending.panics = true;
    transport.service.read(open.file, 0, 4096, pending);
    assert_eq!(answer.recv().expect("an answer").0, Err(Errno::IO));
    assert!(transport.read(&open, 0, 4096).is_ok(), "the next call is served");
}

fn mode(transport: &Transport, path: &str, flags: i32) -> (Open, Option<CacheMode>) {
    let open = transport.open(transport.inode(path), flags).unwrap_or_else(|errno| panic!("{path}: {errno}"));
    let mode = match &open.served_by {
        ServedBy::Daemon(mode) => Some(*mode),
        ServedBy::Passthrough(_) | ServedBy::BesidePassthrough(_) => None,
    };
    (open, mode)
}

#[test]
fn the_service_decides_who_serves_a_file_and_what_is_cached() {
    let store = store();
    let transport = transport(&store);
    let modes = |expected: &[(&str, i32, Option<CacheMode>)]| {
        for (path, flags, expected) in expected {
            let (open, found) = mode(&transport, path, *flags);
            assert_eq!(found, *expected, "{path}");
            transport.release(open.file);
        }
    };
    let (guest, partition) = ("vms/disk/files/active/p1/etc/hostname", "vms/disk/partitions/active/p1.raw");
    modes(&[
        ("web/snapshots/base.raw", READ, None),
        ("web/snapshots/mid.raw", READ, Some(CacheMode::Cached)),
        ("web/snapshots/mid.raw", READ, Some(CacheMode::KeepCache)),
        ("web/active.raw", READ, Some(CacheMode::DirectParallel)),
        ("web/active.raw", READ_WRITE, Some(CacheMode::DirectParallel)),
        (partition, READ_WRITE, Some(CacheMode::DirectParallel)),
        ("web/info/chain.json", READ, Some(CacheMode::Direct)),
        (".chainfs/chains.json", READ, Some(CacheMode::Direct)),
        ("web/control/commit", READ_WRITE, Some(CacheMode::Direct)),
        ("web/control/progress", READ, Some(CacheMode::Stream)),
        (guest, READ, Some(CacheMode::Immutable)),
        ("vms/disk/files/active/volumes.txt", READ, Some(CacheMode::Direct)),
    ]);
    let is_immutable =
        |path| transport.open_directory(transport.inode(path)).expect("a directory").1.is_immutable;
    assert!(is_immutable("vms/disk/files/active/p1/etc") && !is_immutable("vms/disk/files/active"));
    let ttl = |path: &str| {
        let (parent, name) = path.rsplit_once('/').expect("a path");
        transport.lookup(transport.inode(parent), name).expect(path).ttl
    };
    let times = ["web/active.raw", "web/snapshots/mid.raw", "vms/disk/files/active/p1", guest].map(ttl);
    let half = Duration::from_millis(500);
    assert_eq!(times, [Duration::ZERO, half, half, Duration::from_hours(1)]);
}

#[test]
fn all_opens_of_a_raw_layer_are_served_the_same_way() {
    let store = store();
    let base = "web/snapshots/base.raw";
    let mut transport = transport(&store);
    // While one open is passthrough, the others are, from the same registered file.
    let (first, second) = (mode(&transport, base, READ), mode(&transport, base, READ));
    assert_eq!((first.1, second.1), (None, None));
    for (open, _) in [first, second] {
        transport.release(open.file);
    }
    // A transport that cannot register files: the daemon serves them, and is not asked again.
    transport.registers = false;
    let (first, found) = mode(&transport, base, READ);
    assert_eq!(found, Some(CacheMode::Cached));
    transport.registers = true;
    let (second, found) = mode(&transport, base, READ);
    assert_eq!(found, Some(CacheMode::KeepCache));
    for open in [first, second] {
        transport.release(open.file);
    }
    assert_eq!(mode(&transport, base, READ).1, Some(CacheMode::KeepCache));
    // Without the feature.
    let plain = Features { passthrough: false, parallel_writes: false, ..FEATURES };
    let transport = Transport::new(&store.root(), plain);
    assert_eq!(mode(&transport, base, READ).1, Some(CacheMode::Cached));
    assert_eq!(mode(&transport, "web/active.raw", READ).1, Some(CacheMode::Direct));
}

#[test]
fn the_service_decides_which_thread_serves_a_call() {
    let store = store();
    let transport = Transport::new(&store.root(), Features { threads: 1, ..FEATURES });
    let own = std::thread::current().name().map(str::to_owned);
    let lookup = |path: &str| {
        let call = Transport::call(transport.inode(path));
        transport.ask_with_thread::<TimedAttributes>(|service, reply| service.attributes(call, reply)).1
    };
    assert_eq!(lookup("web/active.raw"), own);
    // With one thread, no call that may wait for a guest's disk occupies it.
    assert_eq!(lookup("vms/disk/files/active/p1/etc").as_deref(), Some("offload"));
    let open = transport.open(transport.inode("web/active.raw"), READ_WRITE).expect("the active disk");
    let written = Write { offset: 0, bytes: b"x", flags: READ_WRITE, is_write_back: false };
    let wrote = transport.ask_with_thread(|service, reply| service.write(open.file, written, reply));
    assert_eq!(wrote, (Ok(1), own));
    let synced = transport.ask_with_thread(|service, reply| service.sync(open.file, reply));
    assert_eq!(synced, (Ok(()), Some("fsync".into())));
    let plan = transport.open(transport.inode("web/control/plan"), WRITE).expect("the plan");
    let given = Write { bytes: b"commit\n", ..written };
    let (_, thread) = transport.ask_with_thread(|service, reply| service.write(plan.file, given, reply));
    assert_eq!(thread.as_deref(), Some("command"));
}

#[test]
fn statistics_are_those_of_the_file_system_that_a_node_is_in() {
    let store = store();
    let transport = transport(&store);
    let statistics = |path: &str| {
        let call = Transport::call(transport.inode(path));
        transport.ask::<Statistics>(|service, reply| service.statistics(call, reply)).expect("statistics")
    };
    let (of_store, of_guest) = (statistics("web"), statistics("vms/disk/files/active/p1/etc"));
    assert!(of_guest.blocks * u64::from(of_guest.block_size) <= 6 * MIB, "{of_guest:?}");
    assert!(of_store.blocks * u64::from(of_store.fragment_size) > 64 * MIB, "{of_store:?}");
    let found = transport.lookup(ROOT, "web").expect("a chain").attributes;
    assert_eq!((found.kind, found.inode), (NodeKind::Directory, transport.inode("web")));
}
