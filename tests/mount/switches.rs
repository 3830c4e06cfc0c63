//! Every feature of the kernel is optional: the same tree, the same bytes, the same change detection.

use support::*;

#[test]
fn without_a_feature_of_the_kernel_every_view_is_the_same() {
    for options in [
        "nopassthrough",
        "kernelmap=on",
        "kernelmap=off",
        "noparallelwrites",
        "nosharedmapping",
        "noacl",
        "noxattr",
        "noreadahead",
        "noiouring",
        "noseccomp",
        "noinotify",
        "threads=1",
        "cache=1M",
        ALL_OFF,
    ] {
        let store = Store::new();
        store.raw("base.raw", 2 * MIB, 1);
        store.overlay("mid.qcow2", "base.raw", "raw", "");
        store.scribble("mid.qcow2", "qcow2", 2);
        store.img(["snapshot", "-c", "monday", &store.path("mid.qcow2").to_string_lossy()]);
        store.scribble("mid.qcow2", "qcow2", 3);
        store.overlay("web.qcow2", "mid.qcow2", "qcow2", "cluster_size=4k");
        store.scribble("web.qcow2", "qcow2", 4);
        let mount = Mount::with(&store, options);
        assert_chain(&store, &mount, "web", "web.qcow2", "qcow2");
        // A second time: now from the caches.
        assert_chain(&store, &mount, "web", "web.qcow2", "qcow2");
        let words = ["-f", "raw", "-c", "write -P 7 1000 300k", "-c", "write -z -u 64k 64k", "-c", "flush"];
        tool("qemu-io").args(words).arg(mount.path("web/active.raw")).succeeds();
        mount.umount();
        // As QEMU reads it afterwards.
        store.io(
            "web.qcow2",
            "qcow2",
            ["read -q -P 7 1000 60k", "read -q -P 0 64k 64k", "read -q -P 7 128k 100k"],
        );
        store.img(["check", "-q", "web.qcow2"]);
    }
}

/// Maps a disk shared and writable, and changes its first byte through that; python's exit code.
fn maps(disk: &std::path::Path) -> i32 {
    let script = "import mmap, sys; f = open(sys.argv[1], 'r+b'); m = mmap.mmap(f.fileno(), 4096); m[0] = \
        55; m.flush()";
    tool("python3").args(["-c", script]).arg(disk).outcome().0
}

#[test]
fn without_kernel_support_only_shared_mappings_are_refused() {
    let store = Store::new();
    store.create("web.qcow2", MIB, "");
    for (options, code) in [("nosharedmapping", 1), ("", 0)] {
        let mount = Mount::with(&store, options);
        assert_eq!(maps(&mount.path("web/active.raw")), code, "{options}");
        mount.umount();
        store.io("web.qcow2", "qcow2", [format!("read -q -P {} 0 1", 55 * (1 - code))]);
    }
}

#[test]
fn without_extended_attributes_the_kernel_answers() {
    let store = Store::new();
    store.create("web.qcow2", MIB, "");
    for (options, errno) in [("", None), ("noxattr", Some(rustix::io::Errno::OPNOTSUPP))] {
        let mount = Mount::with(&store, options);
        let mut value = [0; 100];
        for _ in 0..2 {
            let got =
                rustix::fs::getxattr(mount.path("web/active.raw"), "user.chainfs.depth", &mut value[..]);
            assert_eq!(got.err(), errno, "{options}");
            let listed = rustix::fs::listxattr(mount.path("web/active.raw"), &mut value[..]);
            assert_eq!(listed.err(), errno, "{options}");
        }
        mount.umount();
    }
}

#[test]
fn without_inotify_changes_are_noticed_by_polling() {
    let store = Store::new();
    store.create("one.qcow2", MIB, "");
    let mount = Mount::with(&store, "noinotify,rescan=1");
    store.create("two.qcow2", MIB, "");
    eventually("a new image is shown", || mount.path("two/active.raw").exists());
    mount.umount();
}

const ALL_OFF: &str = "nopassthrough,noparallelwrites,nosharedmapping,noacl,noxattr,noreadahead,noseccomp,\
                       noiouring,noinotify,rescan=1,threads=1,cache=1M";
