//! Every feature of the kernel can be done without: the same tree, the same bytes, the same news.

#[allow(dead_code, unused_imports, reason = "each test binary uses its part")]
mod common;

use std::time::Duration;

use common::*;

#[test]
fn without_a_feature_of_the_kernel_every_view_is_the_same() {
    for options in ["nopassthrough", "noreadahead", "noinotify", "threads=1", "cache=1M", ALL_OFF] {
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
        // A second time: now from whatever has been kept.
        assert_chain(&store, &mount, "web", "web.qcow2", "qcow2");
        mount.umount();
    }
}

#[test]
fn without_inotify_changes_are_noticed_by_looking_again() {
    let store = Store::new();
    store.create("one.qcow2", MIB, "");
    let mount = Mount::with(&store, "noinotify,rescan=1");
    store.create("two.qcow2", MIB, "");
    eventually("a new image is shown", Duration::from_secs(6), || mount.path("two/active.raw").exists());
    mount.umount();
}

const ALL_OFF: &str = "nopassthrough,noreadahead,noinotify,rescan=1,threads=1,cache=1M";
