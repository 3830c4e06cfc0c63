//! Snapshots that the kernel reads by itself, through a map of all layers: the same bytes as QEMU reads, also
//! of odd chains; every promise of snapshots that the daemon serves; nothing is left behind.

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::Command;

use rustix::fs::OFlags;
use rustix::io::Errno;
use support::command::Control;
use support::compare::{View, assert_same, views_of};
use support::foreign::{Loop, Mounted, amount};
use support::jobs::kill;
use support::victims::errno;
use support::*;

const MAPPED: &str = "kernel, from a map of all layers";

/// Who serves a disk now.
fn server(mount: &Mount, view: &str) -> String {
    let path =
        OpenOptions::new().read(true).custom_flags(OFlags::PATH.bits().cast_signed()).open(mount.path(view));
    server_of(&path.unwrap_or_else(|error| panic!("{view}: {error}")))
}

/// The same for an open file, or a path of one.
fn server_of(file: &File) -> String {
    let mut value = [0; 64];
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let len = rustix::fs::getxattr(path, "user.chainfs.served-by", &mut value[..]).expect("the attribute");
    String::from_utf8_lossy(&value[..len]).into_owned()
}

/// Opens a view; the kernel reads it by itself. The first open may be too early for that.
fn open_mapped(mount: &Mount, view: &str) -> File {
    let mut found = None;
    eventually(&format!("the kernel reads {view} by itself"), || {
        let file = File::open(mount.path(view)).unwrap_or_else(|error| panic!("{view}: {error}"));
        found = (server(mount, view) == MAPPED).then_some(file);
        found.is_some()
    });
    found.expect("a view")
}

fn name_of(chain: &str, view: &View) -> String {
    format!("{chain}/{}", view.name)
}

/// All frozen views of a chain are read by the kernel, and are as QEMU reads them.
fn assert_mapped(store: &Store, mount: &Mount, chain: &str, leaf: &str) {
    for view in views_of(store, leaf, "qcow2").iter().filter(|view| view.name != "active.raw") {
        let shown = name_of(chain, view);
        let oracle =
            store.try_oracle(&view.image, &view.format, view.snapshot.as_deref()).expect("QEMU reads it");
        // A raw layer may be read without a map.
        let open = (view.format != "raw").then(|| open_mapped(mount, &shown));
        assert_same(&mount.path(&shown), &oracle);
        // The kernel makes no direct reads from a map; the daemon does.
        let direct = OFlags::DIRECT.bits().cast_signed();
        let direct = || OpenOptions::new().read(true).custom_flags(direct).open(mount.path(&shown));
        if let Some(open) = open {
            assert_eq!(errno(direct()), Some(Errno::INVAL), "{shown}");
            mount.close(open);
        }
        // Once the kernel has released all that was open before.
        let mut opened = None;
        eventually("the daemon serves direct reads", || {
            opened = direct().ok();
            opened.is_some()
        });
        let direct = opened.expect("a view");
        let mut bytes = vec![0; 3 * 4096];
        let place = bytes.as_ptr().align_offset(4096);
        let len = direct.read_at(&mut bytes[place..place + 4096], 0).expect("a direct read");
        let mut want = vec![0; 4096];
        let want_len =
            File::open(&oracle).and_then(|file| file.read_at(&mut want, 0)).expect("what QEMU reads");
        assert_eq!(len, want_len, "{shown}");
        assert!(bytes[place..place + len] == want[..len], "{shown}: a direct read");
        fs::remove_file(oracle).expect("the oracle's file");
    }
}

/// A chain of layers that differ in everything that QEMU lets one choose.
fn odd_chain(store: &Store, directory: &str, rng: &mut Rng) -> String {
    store.dir(directory);
    let pick = |rng: &mut Rng, from: &[&'static str]| from[rng.below(from.len() as u64) as usize];
    let depth = 1 + rng.below(5);
    let mut size = 512 * (1 + rng.below(6 * MIB / 512));
    let mut below: Option<String> = None;
    for layer in 0..=depth {
        let is_raw = layer == 0 && rng.below(3) == 0;
        let name = format!("l{layer}.{}", if is_raw { "raw" } else { "qcow2" });
        let path = format!("{directory}/{name}");
        if is_raw {
            // Not whole sectors, sometimes: the rest of the last one is zero.
            let len = if rng.below(2) == 0 { size } else { size - rng.below(512) };
            store.raw(&path, len, rng.next());
        } else {
            let cluster = pick(rng, &["512", "1k", "2k", "4k", "16k", "64k", "1M", "2M"]);
            let mut options = format!("cluster_size={cluster}");
            if matches!(cluster, "16k" | "64k" | "1M") && rng.below(3) == 0 {
                options += ",extended_l2=on";
            }
            if rng.below(4) == 0 {
                options += ",compression_type=zstd";
            }
            if below.is_none() && rng.below(5) == 0 {
                options = format!("{options},data_file={}", store.path(format!("{path}.data")).display());
            }
            match &below {
                None => store.create(&path, size, &options),
                Some(below) => {
                    let format = if Path::new(below).extension().is_some_and(|end| end == "raw") {
                        "raw"
                    } else {
                        "qcow2"
                    };
                    store.overlay(&path, below, format, &options);
                }
            }
            // Longer or shorter than what is below.
            if below.is_some() && rng.below(3) == 0 {
                let new = 512 * (1 + rng.below(6 * MIB / 512));
                store.img(["resize", "-q", "--shrink", "-f", "qcow2", &path, &new.to_string()]);
                size = new;
            }
            store.scribble(&path, "qcow2", rng.next());
            let unit = 64 * KIB;
            if !options.contains("data_file") && cluster == "64k" && size >= unit && rng.below(2) == 0 {
                let at = rng.below(size / unit) * unit;
                let command = store.write_compressed(rng, at, unit);
                store.io(&path, "qcow2", [command]);
            }
            // QEMU makes none in an image with a data file.
            if (layer == depth || rng.below(3) == 0) && !options.contains("data_file") {
                store.img(["snapshot", "-c", "kept", &path]);
                store.scribble(&path, "qcow2", rng.next());
            }
        }
        below = Some(name);
    }
    format!("{directory}/l{depth}.qcow2")
}

#[test]
fn odd_chains_are_read_as_qemu_reads_them() {
    let chains = amount(10, 2000);
    for first in (0..chains).step_by(10) {
        let store = Store::new();
        let leaves: Vec<(String, String)> = (first..chains.min(first + 10))
            .map(|seed| {
                let directory = format!("c{seed}");
                let leaf = odd_chain(&store, &directory, &mut Rng::new(seed * 31 + 5));
                (leaf.trim_end_matches(".qcow2").to_owned(), leaf)
            })
            .collect();
        let mount = Mount::with(&store, "kernelmap=on");
        for (chain, leaf) in &leaves {
            assert_mapped(&store, &mount, chain, leaf);
        }
        assert_eq!(mount.text(".chainfs/problems.txt"), "");
        mount.umount();
    }
}

/// base <- mid <- web of 4 MiB, with compressed clusters in the base.
fn three_layers() -> Store {
    let store = Store::new();
    store.create("base.qcow2", 4 * MIB, "");
    store.scribble("base.qcow2", "qcow2", 1);
    let command = store.write_compressed(&mut Rng::new(9), MIB, 64 * KIB);
    store.io("base.qcow2", "qcow2", [command]);
    store.overlay("mid.qcow2", "base.qcow2", "qcow2", "");
    store.scribble("mid.qcow2", "qcow2", 2);
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "");
    store.scribble("web.qcow2", "qcow2", 3);
    store
}

#[test]
fn programs_use_a_mapped_disk_as_any_file() {
    let store = three_layers();
    let oracle = store.oracle("mid.qcow2", "qcow2");
    let mount = Mount::with(&store, "kernelmap=on");
    let view = "web/snapshots/mid.raw";
    let open = open_mapped(&mount, view);
    let shown = mount.path(view);
    tool("cmp").arg(&shown).arg(&oracle).succeeds();
    tool("qemu-img").args(["compare", "-q", "-f", "raw", "-F", "raw"]).arg(&shown).arg(&oracle).succeeds();
    let command = format!("read -q 0 {}", 4 * MIB);
    tool("qemu-io").args(["-r", "-t", "writeback", "-f", "raw", "-c", &command]).arg(&shown).succeeds();
    let script = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); \
         sys.exit(m[:] != open(sys.argv[2], 'rb').read())";
    tool("python3").args(["-c", script]).arg(&shown).arg(&oracle).succeeds();
    let device = Loop::read_only(&shown);
    tool("cmp").arg(&device.0).arg(&oracle).succeeds();
    device.detach();
    // It is read-only, and has its holes and locks.
    assert!(OpenOptions::new().write(true).open(&shown).is_err());
    let holes = support::compare::runs_by_seek(&shown);
    assert!(holes.iter().any(|run| run.data), "{holes:?}");
    let locked = tool("qemu-io").args(["-c", "write 0 4k"]).arg(store.path("mid.qcow2")).outcome();
    assert!(locked.2.contains("lock"), "{locked:?}");
    assert_eq!(server(&mount, "web/active.raw"), "daemon");
    assert_eq!(server(&mount, "web/snapshots/base.raw"), "nobody, it is not open");
    // Direct reads are the daemon's: not while the kernel reads the disk, and from then on always.
    let mut direct = tool("qemu-io");
    direct.args(["-r", "-t", "none", "-f", "raw", "-c", &command]).arg(&shown);
    let (_, _, err) = direct.outcome();
    assert!(err.contains("does not support O_DIRECT") || err.contains("Invalid argument"), "{err}");
    mount.close(open);
    eventually("the daemon serves direct reads", || direct.outcome().0 == 0);
    let open = File::open(&shown).expect("a view");
    assert_eq!(server(&mount, view), "daemon");
    mount.close(open);
    mount.umount();
}

#[test]
// R2
fn what_is_cut_off_is_an_error_and_never_zeroes() {
    let store = three_layers();
    let intact = fs::read(store.oracle("mid.qcow2", "qcow2")).expect("what QEMU reads");
    let mount = Mount::with(&store, "kernelmap=on");
    let open = open_mapped(&mount, "web/snapshots/mid.raw");
    for layer in ["mid.qcow2", "base.qcow2"] {
        let file = OpenOptions::new().write(true).open(store.path(layer)).expect("an image");
        file.set_len(256 << 10).expect("a cut");
    }
    let mut errors = 0;
    for at in (0..4 * MIB).step_by(4096) {
        let mut have = [0; 4096];
        match errno(open.read_exact_at(&mut have, at)) {
            None => assert!(have == intact[at as usize..][..4096], "other bytes at {at}"),
            Some(Errno::IO) => errors += 1,
            Some(other) => panic!("{other} at {at}"),
        }
    }
    assert!(errors > 0, "nothing was cut off");
    drop(open);
    mount.abandon();
}

#[test]
fn a_damaged_disk_is_served_by_the_daemon() {
    let store = three_layers();
    let image = Damage::to(store.path("base.qcow2"));
    // An entry that leads out of the file, in a place that is not covered.
    let oracle = fs::read(store.oracle("web.qcow2", "qcow2")).expect("what QEMU reads");
    store.create("bad.qcow2", 4 * MIB, "");
    store.io("bad.qcow2", "qcow2", ["write -q -P 7 0 1M"]);
    let bad = Damage::to(store.path("bad.qcow2"));
    bad.put_u64(bad.l2_entry_at(5 << 16), 1 << 40 | 1 << 63);
    store.overlay_sized("top.qcow2", "bad.qcow2", "qcow2", 4 * MIB);
    drop(image);
    let mount = Mount::with(&store, "kernelmap=on");
    let shown = File::open(mount.path("top/snapshots/bad.raw")).expect("a view");
    let mut bytes = vec![0; 64 << 10];
    assert_eq!(errno(shown.read_exact_at(&mut bytes, 5 << 16)), Some(Errno::IO));
    shown.read_exact_at(&mut bytes, 4 << 16).expect("what is before the damage");
    assert!(bytes.iter().all(|byte| *byte == 7));
    assert_eq!(server(&mount, "top/snapshots/bad.raw"), "daemon");
    mount.close(shown);
    assert!(fs::read(mount.path("web/active.raw")).expect("a disk") == oracle);
    mount.umount();
}

/// base <- one <- two <- three <- web, with base's clusters of that size and all others of 4 KiB.
fn five_layers(cluster: &str) -> Store {
    let store = Store::new();
    store.create("base.qcow2", 4 * MIB, &format!("cluster_size={cluster}"));
    for (name, below) in [("one", "base"), ("two", "one"), ("three", "two"), ("web", "three")] {
        store.scribble(&format!("{below}.qcow2"), "qcow2", below.len() as u64 * 7);
        store.overlay(&format!("{name}.qcow2"), &format!("{below}.qcow2"), "qcow2", "cluster_size=4k");
    }
    store
}

#[test]
// X4, C3
fn commands_keep_the_bytes_of_a_mapped_disk() {
    // With larger clusters in base, a commit moves what is shown of them.
    for (cluster, moves) in [("4k", false), ("64k", true)] {
        let store = five_layers(cluster);
        let intact = fs::read(store.oracle("three.qcow2", "qcow2")).expect("what QEMU reads");
        let mount = Mount::with(&store, "kernelmap=on");
        let control = Control::of(&mount, "web");
        let view = "web/snapshots/three.raw";
        let open = open_mapped(&mount, view);
        let judge = |context: &str| {
            // Not from the pages that are cached.
            drop_caches();
            let mut bytes = vec![0; intact.len()];
            open.read_exact_at(&mut bytes, 0).unwrap_or_else(|error| panic!("{context}: {error}"));
            assert!(bytes == intact, "{cluster}, {context}: the open disk has other bytes");
            let again = fs::read(mount.path(view)).expect("the disk, opened again");
            assert!(again == intact, "{cluster}, {context}: the disk has other bytes");
            // X3: it is the same file, and still read by the kernel.
            let inode = |found: std::io::Result<fs::Metadata>| found.expect("metadata").ino();
            assert_eq!(inode(fs::metadata(mount.path(view))), inode(open.metadata()), "{cluster}, {context}");
            assert_eq!(server_of(&open), MAPPED, "{cluster}, {context}");
        };
        judge("before");
        control.done("commit top=one base=base");
        judge("a commit");
        if moves {
            let sentence = control.refused("commit top=two base=base", Errno::BUSY);
            assert!(sentence.contains("three.qcow2"), "{sentence}");
            mount.close(open);
            let again = "commit top=two base=base";
            eventually("what was moved can be committed", || control.give(again).is_none());
            assert_eq!(control.wait(), "done", "{}", control.status("error"));
        } else {
            control.done("commit top=two base=base");
            judge("another commit");
            control.done("snapshot monday");
            judge("a snapshot");
            control.done("pull into=three base=none");
            judge("a pull");
            mount.close(open);
        }
        assert!(fs::read(mount.path(view)).expect("the disk") == intact, "{cluster}");
        mount.umount();
        store.img(["check", "-q", "three.qcow2"]);
    }
}

/// Drops the pages of all files that are not in use.
fn drop_caches() {
    fs::write("/proc/sys/vm/drop_caches", "1").expect("root");
}

#[test]
fn nothing_stays_behind() {
    let store = three_layers();
    let maps = store.beside("maps");
    let options = format!("kernelmap=on,map_dir={}", maps.display());
    let erofs = || fs::read_to_string("/proc/self/mountinfo").expect("mounts").matches(" erofs ").count();
    let before = erofs();
    let mount = Mount::with(&store, &options);
    let open = open_mapped(&mount, "web/snapshots/mid.raw");
    let metrics = mount.text(".chainfs/metrics");
    assert!(metrics.contains("\nchainfs_kernel_maps 1\n"), "{metrics}");
    assert_eq!((erofs(), mount::names_in(&maps)), (before, Vec::new()), "no path leads to a map");
    // A mount with maps that are not in use can be unmounted.
    drop(open);
    mount.umount();
    assert_eq!(mount::names_in(&maps), Vec::<String>::new());
    let mount = Mount::with(&store, &options);
    let open = open_mapped(&mount, "web/snapshots/mid.raw");
    let layer = store.path("mid.qcow2");
    kill(mount);
    drop(open);
    assert_eq!((erofs(), mount::names_in(&maps)), (before, Vec::new()));
    // A lease for writing is given only if the file is not open elsewhere, not even in the kernel.
    let lease = "import fcntl, os, sys; fcntl.fcntl(os.open(sys.argv[1], os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_WRLCK)";
    eventually("the layer is free", || tool("python3").args(["-c", lease]).arg(&layer).outcome().0 == 0);
    fs::remove_dir(&maps).expect("an empty directory");
}

#[test]
fn an_unused_map_is_dropped() {
    let store = three_layers();
    let mount = Mount::with(&store, "kernelmap=on");
    drop(open_mapped(&mount, "web/snapshots/mid.raw"));
    eventually("the map is dropped", || mount.text(".chainfs/metrics").contains("\nchainfs_kernel_maps 0\n"));
    drop(open_mapped(&mount, "web/snapshots/mid.raw"));
    mount.umount();
}

#[test]
fn where_no_map_can_be_the_daemon_serves_all() {
    let store = three_layers();
    let oracle = store.oracle("mid.qcow2", "qcow2");
    let tmpfs = store.beside("tmpfs");
    let tmpfs_mount = Mounted::tmpfs(&tmpfs);
    let on_tmpfs = format!("map_dir={}", tmpfs.display());
    for options in ["kernelmap=off", &on_tmpfs, "nopassthrough"] {
        let mount = Mount::with(&store, options);
        for _ in 0..2 {
            let open = File::open(mount.path("web/snapshots/mid.raw")).expect("a view");
            assert_eq!(server(&mount, "web/snapshots/mid.raw"), "daemon", "{options}");
            assert_same(&mount.path("web/snapshots/mid.raw"), &oracle);
            mount.close(open);
        }
        mount.umount();
    }
    for (options, facts) in [
        (format!("kernelmap=on,{on_tmpfs}"), &["kernelmap=on", "trying a kernel map"][..]),
        ("kernelmap=on,nopassthrough".into(), &["leave out nopassthrough"]),
        ("kernelmap=on,map_dir=/proc/no".into(), &["kernelmap=on", "making /proc/no"]),
    ] {
        let refusal =
            Mount::try_new(&store, &store.root(), &store.beside("mnt"), &options).err().expect("refused");
        let text = format!("{refusal:?}");
        assert!(facts.iter().all(|fact| text.contains(fact)), "{options}: {text}");
    }
    tmpfs_mount.umount();
}

#[test]
fn only_with_maps_nothing_can_be_stacked_on_the_mount() {
    let store = three_layers();
    for (options, is_stackable) in [("kernelmap=on", false), ("kernelmap=off", true)] {
        let mount = Mount::with(&store, options);
        let (upper, work, merged) = (store.beside("upper"), store.beside("work"), store.beside("merged"));
        for directory in [&upper, &work, &merged] {
            fs::create_dir_all(directory).expect("a directory");
        }
        let words = format!(
            "lowerdir={},upperdir={},workdir={}",
            mount.dir().display(),
            upper.display(),
            work.display()
        );
        let mut command = Command::new("mount");
        command.args(["-t", "overlay", "overlay", "-o", &words]).arg(&merged);
        let (code, _, err) = command.outcome();
        assert_eq!(code == 0, is_stackable, "{options}: {err}");
        if code == 0 {
            tool("umount").arg(&merged).succeeds();
        }
        mount.umount();
    }
}
