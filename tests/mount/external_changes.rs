//! Changes by other processes during use: images are truncated, replaced, deleted, made and rebased. Reads
//! are right or an error; changes are noticed.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;

use chainfs::units::are_zero;
use rustix::io::Errno;
use support::victims::*;
use support::*;

#[test]
fn an_image_truncated_while_open_gives_its_old_bytes_or_an_error() {
    let victims = Victims::new("");
    let _ = victims.victim("cut");
    victims.mounted(|mount| {
        let shown = File::open(mount.path("cut/active.raw")).expect("a view");
        let snapshot = File::open(mount.path("cut/snapshots/active@kept.raw")).expect("a view");
        Damage::to(victims.store.path("cut.qcow2")).set_len(20_000);
        for at in (0..VICTIM_SIZE).step_by(VICTIM_CLUSTER as usize) {
            let mut have = vec![0; VICTIM_CLUSTER as usize];
            match errno(shown.read_exact_at(&mut have, at)) {
                None => assert!(have == victims.intact[at as usize..][..have.len()], "wrong bytes at {at}"),
                Some(Errno::IO | Errno::STALE) => {}
                Some(other) => panic!("{other} at {at}"),
            }
            let _ = snapshot.read_at(&mut have, at);
        }
        let mut last = vec![0; 512];
        assert!(shown.read_exact_at(&mut last, VICTIM_SIZE - 100_000).is_err(), "bytes that are gone");
    });
}

#[test]
fn a_raw_image_truncated_while_open_never_hangs_its_reader() {
    let victims = Victims::new("");
    victims.store.raw("cut.raw", 4 * MIB, 14);
    victims.store.overlay("top.qcow2", "cut.raw", "raw", "");
    victims.mounted(|mount| {
        let below = File::open(mount.path("top/snapshots/cut.raw")).expect("a view");
        let top = File::open(mount.path("top/active.raw")).expect("a view");
        File::options()
            .write(true)
            .open(victims.store.path("cut.raw"))
            .and_then(|f| f.set_len(4096))
            .expect("a cut");
        let mut all = vec![0; 4 * MIB as usize];
        let _ = below.read_at(&mut all, MIB);
        let result = top.read_exact_at(&mut all[..65_536], 3 * MIB);
        assert!(result.is_err() || are_zero(&all[..65_536]), "bytes that are gone");
    });
}

#[test]
// R3
fn an_image_replaced_while_it_is_open_is_never_mixed_with_its_successor() {
    let victims = Victims::new("");
    let _ = victims.victim("swapped");
    let store = &victims.store;
    store.create("next", 3 * MIB, "cluster_size=4k");
    store.io("next", "qcow2", [store.write(&mut Rng::new(15), 0, 3 * MIB)]);
    let next = store.oracle("next", "qcow2");
    let aside = store.beside("next.qcow2");
    fs::rename(store.path("next"), &aside).expect("out of the store");
    victims.mounted(|mount| {
        let shown = File::open(mount.path("swapped/active.raw")).expect("a view");
        fs::rename(&aside, store.path("swapped.qcow2")).expect("a new file under the old name");
        for at in (0..VICTIM_SIZE).step_by(VICTIM_CLUSTER as usize) {
            let mut have = vec![0; VICTIM_CLUSTER as usize];
            match errno(shown.read_exact_at(&mut have, at)) {
                None => assert!(have == victims.intact[at as usize..][..have.len()], "other bytes at {at}"),
                Some(Errno::IO | Errno::STALE) => {}
                Some(other) => panic!("{other} at {at}"),
            }
        }
        drop(shown);
        eventually("the new image is shown", || {
            fs::metadata(mount.path("swapped/active.raw")).is_ok_and(|m| m.len() == 3 * MIB)
        });
        assert_same(&mount.path("swapped/active.raw"), &next);
    });
}

#[test]
fn an_image_deleted_while_open_disappears_without_harm() {
    let victims = Victims::new("");
    let _ = victims.victim("doomed");
    victims.mounted(|mount| {
        let shown = File::open(mount.path("doomed/active.raw")).expect("a view");
        fs::remove_file(victims.store.path("doomed.qcow2")).expect("an unlink");
        let mut have = vec![0; VICTIM_CLUSTER as usize];
        match errno(shown.read_exact_at(&mut have, MIB)) {
            None => assert!(have == victims.intact[MIB as usize..][..have.len()]),
            Some(Errno::IO | Errno::STALE) => {}
            Some(other) => panic!("{other}"),
        }
        eventually("the chain is gone", || !mount.path("doomed").exists());
        let _ = shown.read_exact_at(&mut have, 0);
    });
}

#[test]
fn images_that_come_go_or_change_their_backing_file_are_noticed() {
    let store = Store::new();
    for (name, seed) in [("one", 16), ("two", 17)] {
        store.create(&format!("{name}.qcow2"), MIB, "");
        store.scribble(&format!("{name}.qcow2"), "qcow2", seed);
    }
    store.overlay("web.qcow2", "one.qcow2", "qcow2", "");
    let mount = Mount::new(&store);
    assert_eq!(mount.top(), ["two", "web"]);

    store.overlay("later.qcow2", "one.qcow2", "qcow2", "");
    // qemu-img makes it empty and lets it grow.
    let is_whole =
        || fs::metadata(mount.path("later/active.raw")).is_ok_and(|metadata| metadata.len() == MIB);
    eventually("a new leaf", is_whole);
    assert_same(&mount.path("later/active.raw"), &store.oracle("later.qcow2", "qcow2"));

    store.img(["rebase", "-u", "-b", "two.qcow2", "-F", "qcow2", "web.qcow2"]);
    eventually("another base", || mount.names("web/snapshots") == ["two.raw"]);
    assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    eventually("two is no leaf any more", || !mount.path("two").exists());

    store.dir("deep/down");
    store.create("deep/down/new.qcow2", MIB, "");
    eventually("an image in a new directory", || mount.path("deep/down/new/active.raw").exists());

    fs::rename(store.path("deep"), store.path("moved")).expect("a rename");
    eventually("a renamed directory", || {
        mount.path("moved/down/new/active.raw").exists() && !mount.path("deep").exists()
    });

    fs::remove_file(store.path("web.qcow2")).expect("an unlink");
    eventually("a leaf is gone and its base is one", || {
        !mount.path("web").exists() && mount.path("two").exists()
    });

    store.img(["snapshot", "-c", "monday", "two.qcow2"]);
    eventually("a new internal snapshot", || mount.path("two/snapshots/active@monday.raw").exists());

    store.overlay_unchecked("broken.qcow2", "absent.qcow2", "qcow2");
    eventually("a problem", || mount.text(".chainfs/problems.txt").contains("absent.qcow2"));
    store.create("absent.qcow2", MIB, "");
    eventually("the problem is solved", || mount.text(".chainfs/problems.txt").is_empty());
    assert_same(&mount.path("broken/active.raw"), &store.oracle("broken.qcow2", "qcow2"));
    mount.umount();
}

#[test]
fn a_disk_grown_by_another_process_is_shown_at_its_new_size() {
    let store = Store::new();
    store.create("web.qcow2", MIB, "");
    let mount = Mount::new(&store);
    assert_eq!(fs::metadata(mount.path("web/active.raw")).expect("a view").len(), MIB);
    store.img(["resize", "-q", "web.qcow2", "3M"]);
    store.io("web.qcow2", "qcow2", [store.write(&mut Rng::new(18), 2 * MIB, 100_000)]);
    eventually("the new size", || {
        fs::metadata(mount.path("web/active.raw")).is_ok_and(|m| m.len() == 3 * MIB)
    });
    assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    mount.umount();
}

/// File systems reuse the inode number of a deleted file at once: neither it nor the name distinguishes old
/// from new.
#[test]
// X1
fn a_new_file_under_an_old_name_shows_its_own_bytes() {
    let store = Store::new();
    let mount = Mount::new(&store);
    for round in 0..6 {
        for (name, format) in [("again.raw", "raw"), ("new.qcow2", "qcow2")] {
            let active = mount.path(name.split('.').next().expect("a stem")).join("active.raw");
            if format == "raw" {
                store.raw(name, MIB, 100 + round);
            } else {
                // Made elsewhere, so that the image appears complete.
                store.create("aside", MIB, "");
                store.io("aside", "qcow2", [store.write(&mut Rng::new(200 + round), 0, MIB)]);
                fs::rename(store.path("aside"), store.path(name)).expect("a rename");
            }
            let want = fs::read(store.oracle(name, format)).expect("what QEMU reads");
            eventually("its bytes are shown", || fs::read(&active).is_ok_and(|have| have == want));
            fs::remove_file(store.path(name)).expect("an unlink");
            if round % 2 == 0 {
                eventually("it is gone", || !active.exists());
            }
        }
    }
    mount.umount();
}

#[test]
fn views_of_an_abandoned_command_are_hidden_within_a_second() {
    use chainfs::store::{CommitOperation, Operation};
    use support::intents::{leave, witness};
    let store = Store::new();
    store.raw("base.raw", MIB, 1);
    store.overlay("sn1.qcow2", "base.raw", "raw", "");
    store.overlay("web.qcow2", "sn1.qcow2", "qcow2", "");
    let mount = Mount::new(&store);
    let base = mount.path("web/snapshots/base.raw");
    assert!(base.exists());
    let named = |name: &str| witness(&store, name, false);
    let deed = Operation::Commit(CommitOperation {
        top: named("sn1.qcow2"),
        base: named("base.raw"),
        between: vec![],
        children: vec![named("web.qcow2")],
        keep: false,
        is_copied: false,
        rename: None,
    });
    let intent = leave(&store, "commit top=sn1", "web", deed);
    eventually("what is being spoilt is hidden", || !base.exists());
    assert!(mount.path("web/snapshots/sn1.raw").exists() && mount.path("web/active.raw").exists());
    let problems = fs::read_to_string(mount.path(".chainfs/problems.txt")).expect("problems");
    assert!(problems.contains("commit top=sn1"), "{problems}");
    fs::remove_file(store.path(intent)).expect("an intent");
    eventually("it is shown again", || base.exists());
}

#[test]
fn an_image_replaced_continuously_is_in_every_scan() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let store = Store::new();
    for name in ["a.qcow2", "web.qcow2", "z.qcow2"] {
        store.create(name, MIB, "");
    }
    let options = chainfs::store::StoreOptions { notify: false, ..Default::default() };
    let opened = chainfs::store::Store::open(&store.root(), options).expect("a store");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..3000 {
                let draft = store.path(format!("{round}.draft"));
                fs::copy(store.path("web.qcow2"), &draft).expect("a copy");
                fs::rename(&draft, store.path("web.qcow2")).expect("its name");
            }
            is_over.store(true, Ordering::Relaxed);
        });
        let mut scans = 0;
        while !is_over.load(Ordering::Relaxed) {
            opened.rescan().expect("a scan");
            assert!(
                opened.catalog().chain("web".as_ref()).is_some(),
                "it was not met in scan {scans}: {:?}",
                opened.catalog().chains().collect::<Vec<_>>()
            );
            scans += 1;
        }
    });
}
