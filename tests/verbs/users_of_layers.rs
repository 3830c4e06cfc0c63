//! Deletes, reverts, rebases and the trash in the presence of open handles, overlays and concurrent writers.

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use chainfs::error::ErrorKind;
use chainfs::image::write::Zeroing;
use chainfs::ops::{Engine, JobState, Request};
use chainfs::store::{
    Access, ActiveHandle, Intent, NewTop, OpenDisk, Operation, PullOperation, SnapshotOperation, Store,
    StoreOptions, ViewPart,
};
use support::foreign::Qemu;
use support::intents::witness;
use support::lab::{Kind, Lab, extension, run};

fn options(trash: bool) -> StoreOptions {
    let trash = trash.then_some(Duration::from_hours(24));
    StoreOptions { notify: false, trash, ..StoreOptions::default() }
}

fn open(lab: &Lab, trash: bool) -> Arc<Store> {
    Store::open(&lab.store.root(), options(trash)).unwrap()
}

fn done(store: &Arc<Store>, chain: &str, command: &str) {
    let status =
        run(&Engine::new(store), chain, command).unwrap_or_else(|error| panic!("{command}: {error}"));
    assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
}

fn bytes(disk: &Arc<OpenDisk>) -> Vec<u8> {
    let view = disk.view();
    let mut bytes = vec![0; view.view.size() as usize];
    view.view.read_at(0, &mut bytes).unwrap();
    bytes
}

/// A disk with two internal snapshots, `inner` and `second`.
fn with_two() -> Lab {
    let lab = Lab::new(Kind { inner: &["web"], ..Kind::PLAIN });
    lab.store.img(["snapshot", "-c", "second", "web.qcow2"]);
    lab.store.scribble("web.qcow2", "qcow2", 33);
    lab
}

fn guest(store: &Arc<Store>, chain: &str) -> ActiveHandle {
    let catalog = store.catalog();
    let layers = catalog.layers(catalog.chain(Path::new(chain)).unwrap());
    store.open_active(&catalog, &layers, Access::ReadWrite).unwrap()
}

fn inner(store: &Arc<Store>, place: usize) -> chainfs::error::Result<Arc<OpenDisk>> {
    let catalog = store.catalog();
    let layers = catalog.layers(catalog.chain(Path::new("web")).unwrap());
    store.open_disk(&catalog, &layers, ViewPart::Snapshot(place))
}

#[test]
fn readers_of_an_internal_snapshot_do_not_notice_a_deletion() {
    let lab = with_two();
    let store = open(&lab, false);
    let disk = guest(&store, "web");
    disk.write_at(0, &[9; 512]).unwrap();
    // Both have been opened, by their indices.
    drop(bytes(&inner(&store, 0).unwrap()));
    let second = inner(&store, 1).unwrap();
    let before = bytes(&second);
    done(&store, "web", "delete active@inner");
    assert!(bytes(&second) == before, "to whom it is open");
    assert!(bytes(&inner(&store, 0).unwrap()) == before, "opened anew");
}

#[test]
fn a_new_internal_snapshot_is_not_taken_for_a_deleted_one() {
    let lab = with_two();
    let store = open(&lab, false);
    let disk = guest(&store, "web");
    drop(bytes(&inner(&store, 1).unwrap()));
    done(&store, "web", "delete active@second");
    disk.write_at(0, &vec![7; 1 << 20]).unwrap();
    done(&store, "web", "snapshot third internal");
    let mut now = vec![0; 4 << 20];
    disk.read_at(0, &mut now).unwrap();
    assert!(bytes(&inner(&store, 1).unwrap()) == now);
}

#[test]
fn a_deleted_internal_snapshot_is_not_opened_from_a_stale_scan() {
    let lab = with_two();
    let store = open(&lab, false);
    let catalog = store.catalog();
    let layers = catalog.layers(catalog.chain(Path::new("web")).unwrap());
    let disk = guest(&store, "web");
    done(&store, "web", "delete active@inner");
    disk.write_at(0, &vec![7; 4 << 20]).unwrap();
    let late = store.open_disk(&catalog, &layers, ViewPart::Snapshot(0));
    assert_eq!(late.unwrap_err().kind(), ErrorKind::Stale);
}

/// Changes a disk during a command on it; returns the disk's bytes then, and at the end.
fn while_at_work(
    lab: &Lab,
    command: &str,
    act: impl FnOnce(&ActiveHandle),
    (at, len): (u64, usize),
) -> (Vec<u8>, Vec<u8>) {
    let store = open(lab, false);
    let engine = Engine::new(&store);
    let disk = guest(&store, "disk");
    let request = Request::parse_command(command.as_bytes()).unwrap();
    engine.run(Path::new("disk"), &request, command).unwrap();
    act(&disk);
    let read = || {
        let mut bytes = vec![0; len];
        disk.read_at(at, &mut bytes).unwrap();
        bytes
    };
    let then = read();
    let mut status = engine.status(Path::new("disk"));
    while status.state == JobState::Running {
        status = engine.wait(Path::new("disk"), status.version, Duration::from_millis(50));
    }
    assert_eq!(status.state, JobState::Done, "{:?}", status.error);
    (then, read())
}

#[test]
fn a_disk_that_grows_during_a_command_shows_zeroes() {
    let size = 8 << 20;
    for (version, command) in [
        ("compat=1.1,cluster_size=4k", "rebase base=full.qcow2"),
        ("compat=0.10,cluster_size=4k", "rebase base=full.qcow2"),
        ("compat=1.1,cluster_size=4k", "delete mid method=pull"),
    ] {
        for delay in [0, 1, 10, 40] {
            let lab = Lab::new(Kind::PLAIN);
            lab.store.create("full.qcow2", 3 * size, "");
            lab.store.io("full.qcow2", "qcow2", ["write -q -P 0x55 0 24M"]);
            lab.store.img([
                "create",
                "-q",
                "-f",
                "qcow2",
                "-b",
                "full.qcow2",
                "-F",
                "qcow2",
                "mid.qcow2",
                "8M",
            ]);
            lab.store.io("mid.qcow2", "qcow2", ["write -q -P 0x44 0 8M"]);
            lab.store.overlay("disk.qcow2", "mid.qcow2", "qcow2", version);
            let grow = |disk: &ActiveHandle| {
                thread::sleep(Duration::from_millis(delay));
                disk.set_size(3 * size).unwrap();
            };
            let (then, now) = while_at_work(&lab, command, grow, (size, 2 * size as usize));
            assert!(then.iter().chain(&now).all(|byte| *byte == 0), "{version}, {command}, after {delay} ms");
            lab.store.img(["check", "-q", "disk.qcow2"]);
        }
    }
}

#[test]
fn a_range_discarded_behind_a_fill_stays_zero() {
    for delay in [0, 5, 20, 60] {
        let lab = Lab::new(Kind::PLAIN);
        lab.store.create("empty.qcow2", 24 << 20, "");
        lab.store.create("full.qcow2", 24 << 20, "");
        lab.store.io("full.qcow2", "qcow2", ["write -q -P 0x55 0 24M"]);
        // In version 2 only unallocated ranges or data can express it.
        lab.store.overlay("disk.qcow2", "empty.qcow2", "qcow2", "compat=0.10,cluster_size=4k");
        lab.store.io("disk.qcow2", "qcow2", ["write -q -P 0x66 0 1M"]);
        let discard = |disk: &ActiveHandle| {
            thread::sleep(Duration::from_millis(delay));
            disk.zero(0, 1 << 20, Zeroing::Unmap).unwrap();
        };
        let (then, now) = while_at_work(&lab, "rebase base=full.qcow2", discard, (0, 1 << 20));
        assert!(then.iter().chain(&now).all(|byte| *byte == 0), "after {delay} ms");
        lab.store.img(["check", "-q", "disk.qcow2"]);
    }
}

#[test]
fn a_disk_that_others_use_is_neither_reverted_nor_shrunk() {
    let lab = Lab::new(Kind { inner: &["web"], ..Kind::PLAIN });
    let far = [
        "create",
        "-q",
        "-u",
        "-f",
        "qcow2",
        "-b",
        "/elsewhere/web.qcow2",
        "-F",
        "qcow2",
        "user.qcow2",
        "4M",
    ];
    lab.store.img(far);
    for command in ["revert to=sn1 discard-internal", "revert to=active@inner", "resize 1M shrink"] {
        let error = lab.refused(command);
        // Its name cannot be followed, and may be this disk.
        assert!(
            error.kind() == ErrorKind::Forbidden && error.to_string().contains("user.qcow2"),
            "{command}: {error}"
        );
    }
    // One image of a store that is mounted by itself: the store is queried.
    let lab = Lab::new(Kind::PLAIN);
    fs::create_dir(lab.store.path(".chainfs")).unwrap();
    lab.store.overlay("user.qcow2", "web.qcow2", "qcow2", "");
    let before = lab.content("user.qcow2");
    let store = Store::open(&lab.store.path("web.qcow2"), options(false)).unwrap();
    let catalog = store.catalog();
    let written = store.open_active(&catalog, &catalog.layers(0), Access::Write).map(drop).unwrap_err();
    assert!(written.kind() == ErrorKind::ReadOnly && written.to_string().contains("user.qcow2"), "{written}");
    for command in ["revert to=sn1", "resize 1M shrink"] {
        let error = run(&Engine::new(&store), "", command).unwrap_err();
        assert!(
            error.kind() == ErrorKind::NotEmpty && error.to_string().contains("user.qcow2"),
            "{command}: {error}"
        );
    }
    assert!(lab.content("user.qcow2") == before);
}

#[test]
fn an_unsafe_rebase_of_a_shared_layer_is_refused() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.overlay("clone.qcow2", "sn2.qcow2", "qcow2", "");
    lab.store.create("other.qcow2", 4 << 20, "");
    let before = lab.content("clone.qcow2");
    for layer in ["sn2", "sn1"] {
        let error = lab.refused(&format!("rebase layer={layer} base=other.qcow2 unsafe"));
        assert!(
            error.kind() == ErrorKind::NotEmpty && error.to_string().contains("clone.qcow2"),
            "{layer}: {error}"
        );
    }
    assert!(lab.content("clone.qcow2") == before);
}

/// Leaves an intent as its owner would that is killed right after writing it, and resumes it.
fn taken_up(
    lab: &Lab,
    store: Arc<Store>,
    trash: bool,
    command: &str,
    chain: &str,
    deed: Operation,
) -> Arc<Store> {
    let names = store.guard_names();
    store.guard().prepare(&*names).unwrap();
    drop(store.guard().begin(&*names, "x", &Intent::new(command, Path::new(chain), deed)).unwrap());
    drop(store);
    let store = open(lab, trash);
    let engine = Engine::new(&store);
    engine.resume();
    engine.stop();
    store.rescan().unwrap();
    assert!(store.catalog().intents.is_empty());
    store
}

#[test]
fn the_base_of_a_leaf_stays_frozen_after_an_interrupted_delete() {
    let lab = Lab::new(Kind::PLAIN);
    done(&open(&lab, false), "web", "revert to=sn1 save=kept");
    let store = open(&lab, false);
    let catalog = store.catalog();
    let kept = catalog.chain(Path::new("kept")).unwrap();
    let named = |index: usize| witness(&lab.store, &catalog.images[index].shown(), false);
    let between = vec![named(catalog.layers(kept)[1])];
    let deed =
        Operation::Pull(PullOperation { into: vec![], base: None, remove: vec![named(kept)], between });
    let store = taken_up(&lab, store, false, "delete kept", "kept", deed);
    let catalog = store.catalog();
    assert!(!lab.store.path("kept.qcow2").exists());
    assert!(!catalog.is_active(catalog.chain(Path::new("sn3")).unwrap()));
}

#[test]
fn a_disk_replaced_by_a_killed_revert_goes_to_the_trash() {
    let lab = Lab::new(Kind::PLAIN);
    let web = lab.content("web.qcow2");
    let store = open(&lab, true);
    let catalog = store.catalog();
    let layers = catalog.layers(catalog.chain(Path::new("web")).unwrap());
    let named = |index: usize| witness(&lab.store, &catalog.images[index].shown(), false);
    let (aside, overlay) = (".chainfs-184f2a3b4c5d6e7f-1-0-1.new", ".chainfs-184f2a3b4c5d6e7f-1-0-0.new");
    lab.store.img(["create", "-q", "-f", "qcow2", "-b", "sn1.qcow2", "-F", "qcow2", overlay]);
    let top = NewTop {
        old: named(layers[0]),
        frozen: aside.into(),
        overlay: witness(&lab.store, overlay, false),
        name: "web.qcow2".into(),
        backing: Some(named(layers[1])),
    };
    let deed = Operation::Snapshot(SnapshotOperation {
        seconds: 1,
        nanoseconds: 0,
        description: String::new(),
        disks: vec![top],
    });
    fs::hard_link(lab.store.path("web.qcow2"), lab.store.path(aside)).unwrap();
    fs::rename(lab.store.path(overlay), lab.store.path("web.qcow2")).unwrap();
    let store = taken_up(&lab, store, true, "revert to=sn1", "web", deed);
    let items = store.trash().unwrap();
    assert_eq!(items.len(), 1);
    store.restore(&items[0].id, Some(OsStr::new("then.qcow2"))).unwrap();
    assert!(lab.content("then.qcow2") == web);
    let catalog = store.catalog();
    assert!(!catalog.is_active(catalog.chain(Path::new("then")).unwrap()), "a snapshot");
}

#[test]
fn the_trash_never_blocks_a_delete() {
    // On another file system.
    let lab = Lab::new(Kind::PLAIN);
    let place = lab.store.path("sub");
    let mounted = support::foreign::Mounted::tmpfs(&place);
    for name in lab.files().iter().filter(|name| extension(name) == "qcow2") {
        fs::copy(lab.store.path(name), place.join(name)).unwrap();
    }
    let store = open(&lab, true);
    done(&store, "sub/web", "delete sn2 method=pull");
    done(&store, "sub/web", "revert to=base");
    assert!(store.trash().unwrap().is_empty());
    drop((store, mounted));
    // Without room in its header for a mark.
    let lab = Lab::new(Kind { options: "cluster_size=512", sizes: [1 << 20; 5], ..Kind::PLAIN });
    let long = format!("{}base.qcow2", "./".repeat(175));
    lab.store.img(["rebase", "-u", "-f", "qcow2", "-b", &long, "-F", "qcow2", "sn1.qcow2"]);
    let store = open(&lab, true);
    done(&store, "web", "delete sn1 method=pull");
    done(&store, "web", "delete sn2 method=pull");
    assert_eq!(store.trash().unwrap().len(), 2);
    // While another process reads it.
    let lab = Lab::new(Kind::PLAIN);
    let store = open(&lab, true);
    let reader = Qemu::running_on(&lab.store, "sn2.qcow2", &["--read-only"]);
    done(&store, "web", "delete sn2 method=pull");
    reader.shut_down();
    let items = store.trash().unwrap();
    store.restore(&items[0].id, None).unwrap();
    let catalog = store.catalog();
    assert!(!catalog.is_active(catalog.chain(Path::new("sn2")).unwrap()), "marked when it comes back");
}

#[test]
fn nothing_invalid_is_restored_from_the_trash() {
    let lab = Lab::new(Kind::PLAIN);
    let store = open(&lab, true);
    done(&store, "web", "delete sn2 method=pull");
    let id = store.trash().unwrap()[0].id.clone();
    for name in ["again.raw", "again.invalid", ".chainfs-again.qcow2", "again.img"] {
        assert_eq!(
            store.restore(&id, Some(OsStr::new(name))).unwrap_err().kind(),
            ErrorKind::Usage,
            "{name}"
        );
    }
    store.restore(&id, Some(OsStr::new("again.qcow2"))).unwrap();
}

#[test]
fn layers_outside_of_the_store_back_images_like_others() {
    let outside = Lab::new(Kind::PLAIN);
    let far = outside.store.path("base.qcow2");
    let with_far = |trash| StoreOptions { backing_dirs: vec![outside.store.root()], ..options(trash) };
    let lab = Lab::new(Kind::PLAIN);
    let store = Store::open(&lab.store.root(), with_far(true)).unwrap();
    let before = lab.contents(&["web.qcow2", "sn1.qcow2"]);
    done(&store, "web", &format!("rebase layer=sn1 base={}", far.display()));
    assert!(before == lab.contents(&["web.qcow2", "sn1.qcow2"]));
    done(&store, "web", "delete sn1 method=pull");
    done(&store, "web", "pull base=base");
    let items = store.trash().unwrap();
    store.restore(&items[0].id, None).unwrap();
    assert!(before == lab.contents(&["web.qcow2", "sn1.qcow2"]));
}

#[test]
fn the_image_of_a_single_image_mount_is_not_deleted() {
    let lab = Lab::new(Kind::PLAIN);
    fs::create_dir(lab.store.path(".chainfs")).unwrap();
    done(&open(&lab, false), "web", "revert to=sn1 save=kept");
    let store = Store::open(&lab.store.path("kept.qcow2"), options(false)).unwrap();
    let error = run(&Engine::new(&store), "", "delete kept").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Forbidden, "{error}");
}

#[test]
fn a_disk_is_not_written_while_its_replacement_is_copied() {
    let lab = Lab::slow(false);
    lab.store.img(["snapshot", "-c", "inner", "sn2.qcow2"]);
    let want = lab.content("sn2.qcow2@inner");
    let store = open(&lab, false);
    let engine = Engine::new(&store);
    let request = Request::parse_command(b"revert to=sn2@inner").unwrap();
    engine.run(Path::new("web"), &request, "revert to=sn2@inner").unwrap();
    let catalog = store.catalog();
    let layers = catalog.layers(catalog.chain(Path::new("web")).unwrap());
    let refused = store.open_active(&catalog, &layers, Access::Write).map(drop).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::Busy, "what he writes would be lost: {refused}");
    let mut status = engine.status(Path::new("web"));
    while status.state == JobState::Running {
        status = engine.wait(Path::new("web"), status.version, Duration::from_millis(50));
    }
    assert_eq!(status.state, JobState::Done, "{:?}", status.error);
    assert!(lab.content("web.qcow2") == want);
}
