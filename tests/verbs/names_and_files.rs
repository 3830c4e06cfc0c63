//! Commands with unusual names, files and sizes.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use chainfs::error::ErrorKind;
use chainfs::ops::{Engine, JobState};
use chainfs::store::{
    Access, CommitOperation, FileRef, Format, NewTop, Operation, PullOperation, SnapshotOperation,
    StoreOptions,
};
use support::intents::{leave, witness};
use support::lab::{Kind, Lab, run};

const MIB: u64 = 1 << 20;

fn assert_done(lab: &Lab, command: &str) {
    let status = lab.run(command);
    assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
}

#[test]
fn a_disk_is_never_replaced_by_its_own_overlay() {
    let lab = Lab::new(Kind::PLAIN);
    let before = lab.content("web.qcow2");
    assert_eq!(lab.refused("snapshot web").kind(), ErrorKind::Exists);
    assert!(before == lab.content("web.qcow2"));
}

#[test]
fn names_with_a_colon_are_file_names() {
    let lab = Lab::new(Kind::PLAIN);
    let before = lab.content("web.qcow2");
    assert_done(&lab, "snapshot 10:30");
    assert!(before == lab.content("web.qcow2"));
    assert_done(&lab, "snapshot 10:45");
    assert_done(&lab, "commit top=10:45 base=10:30");
}

#[test]
fn a_file_that_has_the_name_already_is_kept() {
    let lab = Lab::new(Kind::PLAIN);
    let before = lab.content("web.qcow2");
    std::os::unix::fs::symlink("nowhere", lab.store.path("monday.qcow2")).unwrap();
    assert_eq!(lab.refused("snapshot monday").kind(), ErrorKind::Exists);
    assert!(fs::symlink_metadata(lab.store.path("monday.qcow2")).is_ok(), "somebody else's file");
    assert!(before == lab.content("web.qcow2"));
}

#[test]
fn disks_of_one_directory_do_not_get_one_name() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.create("db.qcow2", MIB, "");
    let before = lab.contents(&["web.qcow2", "db.qcow2"]);
    run(&Engine::new(&lab.open()), ".chainfs", "snapshot monday chains=web,db").unwrap();
    assert_eq!(lab.chain("db.qcow2"), ["db.qcow2", "db-monday.qcow2"]);
    assert_eq!(lab.chain("web.qcow2")[..2], ["web.qcow2", "web-monday.qcow2"]);
    assert!(before == lab.contents(&["web.qcow2", "db.qcow2"]));
    let error = run(&Engine::new(&lab.open()), ".chainfs", "snapshot tuesday chains=web,web").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage, "{error}");
}

#[test]
fn no_file_gets_a_name_that_changes_its_format() {
    for command in ["snapshot sn file=over.raw", "snapshot sn file=over.img", "snapshot sn file=over.invalid"]
    {
        let lab = Lab::new(Kind::PLAIN);
        let error = lab.refused(command);
        assert!(error.kind() == ErrorKind::Usage, "{command}: {error}");
    }
    let lab = Lab::new(Kind::PLAIN);
    fs::rename(lab.store.path("web.qcow2"), lab.store.path("plain")).unwrap();
    for command in ["snapshot sn.raw", "snapshot sn.invalid"] {
        let error = run(&Engine::new(&lab.open()), "plain", command).unwrap_err();
        assert!(error.kind() == ErrorKind::Usage, "{command}: {error}");
    }
}

#[test]
fn a_raw_base_takes_a_name_by_which_it_is_raw() {
    for base in ["base.bak", "base", "base.qcow2"] {
        let lab = Lab::new(Kind::PLAIN);
        lab.store.raw(base, 2 * MIB, 5);
        lab.store.overlay("vm.qcow2", base, "raw", "");
        lab.store.scribble("vm.qcow2", "qcow2", 9);
        let before = lab.content("vm.qcow2");
        // The lab's own chain would be backed by the new base.
        for name in ["web", "sn3", "sn2", "sn1"] {
            fs::remove_file(lab.store.path(format!("{name}.qcow2"))).unwrap();
        }
        let status = run(&Engine::new(&lab.open()), "vm", "commit").unwrap();
        assert_eq!(status.state, JobState::Done, "{base}: {:?}", status.error);
        assert!(before == fs::read(lab.store.path("vm.raw")).expect("a raw disk"), "{base}");
        assert!(lab.open().catalog().chain(Path::new("vm")).is_some(), "{base}");
    }
}

#[test]
fn a_base_that_grows_shows_nothing_of_the_layers_below() {
    for sizes in [[4 * MIB, 2 * MIB, 4 * MIB, 4 * MIB, 5 * MIB], [4 * MIB, MIB, 3 * MIB, 2 * MIB, 4 * MIB]] {
        for options in ["", "compat=0.10", "cluster_size=2M"] {
            for command in
                ["commit top=sn3 base=sn1", "commit top=sn2 base=sn1", "commit base=sn1", "pull base=sn1"]
            {
                let lab = Lab::new(Kind { options, sizes, ..Kind::PLAIN });
                let before = lab.content("web.qcow2");
                assert_done(&lab, command);
                assert!(before == lab.content("web.qcow2"), "{command} {options} {sizes:?}");
                lab.assert_clean();
            }
        }
    }
}

#[test]
fn a_data_file_that_backs_others_is_not_written() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.create("low.qcow2", 2 * MIB, "data_file=d.raw,data_file_raw=on");
    lab.store.scribble("low.qcow2", "qcow2", 3);
    lab.store.overlay("other.qcow2", "d.raw", "raw", "");
    lab.store.overlay("vm.qcow2", "low.qcow2", "qcow2", "");
    lab.store.scribble("vm.qcow2", "qcow2", 4);
    let before = lab.content("other.qcow2");
    let error = run(&Engine::new(&lab.open()), "vm", "commit").unwrap_err();
    assert!(error.kind() == ErrorKind::NotEmpty && error.to_string().contains("other.qcow2"), "{error}");
    assert!(before == lab.content("other.qcow2"));
}

#[test]
fn a_data_file_with_another_name_is_not_written() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.create("low.qcow2", 2 * MIB, "data_file=d.raw,data_file_raw=on");
    lab.store.scribble("low.qcow2", "qcow2", 3);
    lab.store.overlay("vm.qcow2", "low.qcow2", "qcow2", "");
    fs::hard_link(lab.store.path("d.raw"), lab.store.beside("copy")).unwrap();
    assert_eq!(run(&Engine::new(&lab.open()), "vm", "commit").unwrap_err().kind(), ErrorKind::Busy);
}

#[test]
fn a_disk_that_grows_during_an_active_commit_loses_nothing() {
    let lab = Lab::new(Kind::PLAIN);
    let store = lab.open();
    let catalog = store.catalog();
    let leaf = catalog.chain(Path::new("web")).unwrap();
    let guest = store.open_active(&catalog, &catalog.layers(leaf), Access::ReadWrite).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let start = 4 * MIB;
    let sizes = std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let mut at = start;
            while !done.load(Ordering::Acquire) && at < start + 64 * MIB {
                guest.set_size(at + 4096).unwrap();
                assert_eq!(guest.write_at(at, &[(at >> 12) as u8 | 1; 4096]).unwrap(), 4096);
                at += 4096;
            }
            at
        });
        let status = run(&Engine::new(&store), "web", "commit");
        done.store(true, Ordering::Release);
        let status = status.unwrap();
        assert_eq!(status.state, JobState::Done, "{:?}", status.error);
        work.join().unwrap()
    });
    assert!(sizes > start);
    let mut page = [0; 4096];
    for at in (start..sizes).step_by(4096) {
        guest.read_at(at, &mut page).unwrap();
        assert!(page == [(at >> 12) as u8 | 1; 4096], "at {at:#x} of {sizes:#x}");
    }
}

fn inode(lab: &Lab, name: &str) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(lab.store.path(name)).unwrap().ino()
}

fn named(lab: &Lab, name: &str) -> FileRef {
    witness(&lab.store, name, false)
}

#[test]
fn a_base_that_keeps_its_name_is_hidden_while_invalid() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.raw("vm.raw", 2 * MIB, 5);
    lab.store.overlay("vm.qcow2", "vm.raw", "raw", "");
    let deed = Operation::Commit(CommitOperation {
        top: named(&lab, "vm.qcow2"),
        base: named(&lab, "vm.raw"),
        between: Vec::new(),
        children: Vec::new(),
        keep: false,
        is_copied: false,
        rename: Some("vm.raw".into()),
    });
    leave(&lab.store, "commit", "vm", deed);
    let store = lab.open();
    let catalog = store.catalog();
    assert_eq!(catalog.intents.len(), 1, "{:?}", catalog.problems);
    let leaf = catalog.chain(Path::new("vm")).unwrap();
    assert_eq!(store.chain_views(&catalog, leaf).snapshots().count(), 0);
}

#[test]
fn a_commit_whose_top_was_removed_is_not_complete() {
    let lab = Lab::new(Kind::PLAIN);
    let deed = Operation::Commit(CommitOperation {
        top: named(&lab, "sn2.qcow2"),
        base: named(&lab, "base.qcow2"),
        between: vec![named(&lab, "sn1.qcow2")],
        children: vec![named(&lab, "sn3.qcow2")],
        keep: false,
        is_copied: false,
        rename: None,
    });
    leave(&lab.store, "commit", "web", deed);
    let away = lab.store.beside("sn2.qcow2");
    fs::rename(lab.store.path("sn2.qcow2"), &away).unwrap();
    let files: Vec<_> =
        lab.files().into_iter().map(|name| (fs::read(lab.store.path(&name)).unwrap(), name)).collect();
    let engine = Engine::new(&lab.open());
    engine.resume();
    engine.stop();
    let now: Vec<_> =
        lab.files().into_iter().map(|name| (fs::read(lab.store.path(&name)).unwrap(), name)).collect();
    assert!(files == now, "nothing is changed: {:?}", lab.files());
}

#[test]
fn a_resumed_snapshot_replaces_no_other_file() {
    let lab = Lab::new(Kind::PLAIN);
    let name = ".chainfs-184f2a3b4c5d6e7f-1-0-0.new";
    lab.store.overlay_sized(name, "monday.qcow2", "qcow2", 4 * MIB);
    let disks = vec![NewTop {
        old: named(&lab, "web.qcow2"),
        frozen: "monday.qcow2".into(),
        overlay: named(&lab, name),
        name: "web.qcow2".into(),
        backing: None,
    }];
    let deed = Operation::Snapshot(SnapshotOperation {
        seconds: 1,
        nanoseconds: 0,
        description: String::new(),
        disks,
    });
    leave(&lab.store, "snapshot monday", "web", deed);
    // The second name was given; then the user has replaced the first by a copy.
    fs::rename(lab.store.path("web.qcow2"), lab.store.path("monday.qcow2")).unwrap();
    fs::copy(lab.store.path("sn3.qcow2"), lab.store.path("web.qcow2")).unwrap();
    let (copy, old) = (inode(&lab, "web.qcow2"), inode(&lab, "monday.qcow2"));
    let engine = Engine::new(&lab.open());
    engine.resume();
    engine.stop();
    assert_eq!(inode(&lab, "web.qcow2"), copy, "the user's file");
    assert_eq!(inode(&lab, "monday.qcow2"), old, "the last name of the disk");
    assert!(!lab.store.path(name).exists(), "an overlay that nobody has seen, and nobody wants");
}

#[test]
// C5
fn a_frozen_leaf_stays_frozen_when_it_is_merged_down() {
    let lab = Lab::new(Kind::PLAIN);
    assert_done(&lab, "pull");
    let content = lab.content("sn3.qcow2");
    let engine = Engine::new(&lab.open());
    let status = run(&engine, "sn3", "commit top=sn3 base=sn2").unwrap();
    assert_eq!(status.state, JobState::Done, "{:?}", status.error);
    assert!(lab.content("sn2.qcow2") == content);
    let catalog = lab.open().catalog();
    let leaf = catalog.chain(Path::new("sn2")).unwrap();
    assert!(!catalog.is_active(leaf), "a snapshot that nobody may write");
}

#[test]
fn a_failed_pull_unlocks_the_chain() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.create("gone.qcow2", MIB, "");
    let deed = Operation::Pull(PullOperation {
        into: vec![named(&lab, "web.qcow2")],
        base: Some(named(&lab, "gone.qcow2")),
        remove: Vec::new(),
        between: vec![named(&lab, "sn3.qcow2"), named(&lab, "sn2.qcow2")],
    });
    leave(&lab.store, "pull base=sn1", "web", deed);
    fs::remove_file(lab.store.path("gone.qcow2")).unwrap();
    let engine = Engine::new(&lab.open());
    engine.resume();
    engine.stop();
    assert_done(&lab, "snapshot monday");
}

#[test]
fn a_single_raw_image_keeps_its_chain() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.raw("disk.raw", 2 * MIB, 7);
    let before = lab.content("disk.raw");
    let options = StoreOptions { notify: false, ..StoreOptions::default() };
    for command in ["snapshot monday", "snapshot tuesday file=new.qcow2"] {
        let place = ["disk.qcow2", "disk.raw"]
            .map(|name| lab.store.path(name))
            .into_iter()
            .find(|path| path.exists());
        let store = chainfs::store::Store::open(&place.unwrap(), options.clone()).unwrap();
        let status = run(&Engine::new(&store), "", command).unwrap();
        assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
        store.rescan().unwrap();
        let catalog = store.catalog();
        let leaf = catalog.single.unwrap();
        assert!(catalog.is_active(leaf), "{command}");
        assert!(before == lab.content(&catalog.images[leaf].place.path.display().to_string()));
    }
}

#[test]
fn an_internal_snapshot_is_of_one_disk() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.create("db.qcow2", MIB, "");
    let error =
        run(&Engine::new(&lab.open()), ".chainfs", "snapshot monday internal chains=web,db").unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn an_unreadable_freeze_list_is_not_overwritten() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.raw("disk.raw", MIB, 7);
    lab.store.dir(".chainfs");
    lab.store.put(".chainfs/frozen.toml", b"[[frozen]]\npath = 7\n");
    let engine = Engine::new(&lab.open());
    assert!(run(&engine, "disk", "snapshot monday").is_err());
    assert_eq!(fs::read(lab.store.path(".chainfs/frozen.toml")).unwrap(), b"[[frozen]]\npath = 7\n");
    assert!(lab.files().contains(&"disk.raw".to_owned()), "{:?}", lab.files());
}

#[test]
fn a_format_that_a_user_states_holds_for_new_names_too() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.raw("disk.img", MIB, 7);
    let formats = vec![(glob::Pattern::new("disk*").unwrap(), Format::Raw)];
    let options = StoreOptions { notify: false, formats, ..StoreOptions::default() };
    let store = chainfs::store::Store::open(&lab.store.root(), options).unwrap();
    assert_eq!(run(&Engine::new(&store), "disk", "snapshot monday").unwrap_err().kind(), ErrorKind::Usage);
}

#[test]
fn a_disk_that_was_frozen_since_it_was_looked_up_is_not_written() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.raw("disk.raw", MIB, 7);
    let store = lab.open();
    let catalog = store.catalog();
    let leaf = catalog.chain(Path::new("disk")).unwrap();
    let status = run(&Engine::new(&store), "disk", "snapshot monday file=disk.qcow2").unwrap();
    assert_eq!(status.state, JobState::Done, "{:?}", status.error);
    assert!(store.open_active(&catalog, &[leaf], Access::Write).is_err());
}
