//! Removed layers that are still valid can be restored, for as long as the user wants and as long as nothing
//! changes below them.

use std::ffi::OsStr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chainfs::error::ErrorKind;
use chainfs::ops::{Engine, JobState};
use chainfs::store::{Store, StoreOptions, TrashItem};
use support::lab::{Kind, Lab, run};
use support::*;

const WEEK: Duration = Duration::from_hours(7 * 24);

fn open(lab: &Lab, trash: Option<Duration>) -> Arc<Store> {
    Store::open(&lab.store.root(), StoreOptions { notify: false, trash, ..StoreOptions::default() }).unwrap()
}

fn done(store: &Arc<Store>, command: &str) {
    let status =
        run(&Engine::new(store), "web", command).unwrap_or_else(|error| panic!("{command}: {error}"));
    assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
}

/// Names of the items of the trash, oldest first.
fn names(items: &[TrashItem]) -> Vec<&str> {
    items.iter().map(|item| item.path.to_str().unwrap()).collect()
}

#[test]
// C5, T1
fn a_deleted_snapshot_comes_back_with_its_bytes_and_stays_frozen() {
    for raw_base in [false, true] {
        let lab = Lab::new(Kind { raw_base, ..Kind::PLAIN });
        let before = lab.contents(&["sn2.qcow2", "web.qcow2"]);
        let store = open(&lab, Some(WEEK));
        done(&store, "delete sn2 method=pull");
        assert!(!lab.store.path("sn2.qcow2").exists());
        let items = store.trash().unwrap();
        assert_eq!((names(&items), &*items[0].command), (vec!["sn2.qcow2"], "delete sn2 method=pull"));
        assert_eq!(store.restore("nothing", None).unwrap_err().kind(), ErrorKind::NotFound);
        assert_eq!(
            store.restore(&items[0].id, Some(OsStr::new("../x"))).unwrap_err().kind(),
            ErrorKind::Usage
        );
        assert_eq!(
            store.restore(&items[0].id, Some(OsStr::new("sn3.qcow2"))).unwrap_err().kind(),
            ErrorKind::Exists
        );
        store.restore(&items[0].id, None).unwrap();
        assert!(before == lab.contents(&["sn2.qcow2", "web.qcow2"]));
        let catalog = store.catalog();
        assert!(!catalog.is_active(catalog.chain(Path::new("sn2")).unwrap()), "a snapshot as before");
        assert!(store.trash().unwrap().is_empty());
        lab.assert_clean();
    }
}

#[test]
fn an_overlay_of_a_trashed_layer_is_restored_after_it() {
    let lab = Lab::new(Kind::PLAIN);
    let before = lab.contents(&["sn2.qcow2", "sn1.qcow2", "web.qcow2"]);
    let store = open(&lab, Some(WEEK));
    done(&store, "delete sn2 method=pull");
    done(&store, "delete sn1 method=pull");
    let items = store.trash().unwrap();
    assert_eq!(names(&items), ["sn2.qcow2", "sn1.qcow2"]);
    let error = store.restore(&items[0].id, None).unwrap_err();
    assert!(error.kind() == ErrorKind::Stale && error.to_string().contains(&items[1].id), "{error}");
    store.restore(&items[1].id, None).unwrap();
    store.restore(&items[0].id, None).unwrap();
    assert!(before == lab.contents(&["sn2.qcow2", "sn1.qcow2", "web.qcow2"]));
}

#[test]
fn a_disk_replaced_by_a_revert_is_restored_under_another_name() {
    let lab = Lab::new(Kind::PLAIN);
    let web = lab.content("web.qcow2");
    let store = open(&lab, Some(WEEK));
    done(&store, "revert to=sn1");
    let items = store.trash().unwrap();
    assert_eq!(names(&items), ["web.qcow2"]);
    assert_eq!(store.restore(&items[0].id, None).unwrap_err().kind(), ErrorKind::Exists);
    store.restore(&items[0].id, Some(OsStr::new("then.qcow2"))).unwrap();
    assert!(lab.content("then.qcow2") == web);
    let catalog = store.catalog();
    assert!(!catalog.is_active(catalog.chain(Path::new("then")).unwrap()));
}

#[test]
// T1
fn trash_that_would_become_invalid_is_removed_first() {
    let lab = Lab::new(Kind::PLAIN);
    let store = open(&lab, Some(WEEK));
    done(&store, "delete sn2 method=pull");
    // It is backed by sn1, which is merged into.
    let request = chainfs::ops::Request::parse_command(b"commit top=sn3 base=sn1").unwrap();
    let plan = Engine::new(&store).plan(Path::new("web"), &request).unwrap();
    assert!(
        plan.notes.iter().any(|note| note.contains("sn2.qcow2") && note.contains("trash")),
        "{:?}",
        plan.notes
    );
    done(&store, "commit top=sn3 base=sn1");
    assert!(store.trash().unwrap().is_empty());
    // A merged layer is no trash: others show it.
    let left = std::fs::read_dir(lab.store.path(".chainfs/trash")).unwrap().count();
    assert_eq!(left, 0, "nor are notes left");
}

#[test]
fn without_the_option_nothing_is_kept_and_old_items_are_removed() {
    let lab = Lab::new(Kind::PLAIN);
    done(&open(&lab, None), "delete sn2 method=pull");
    assert!(!lab.store.path(".chainfs/trash").exists());
    let store = open(&lab, Some(WEEK));
    done(&store, "delete sn1 method=pull");
    store.sweep_trash().unwrap();
    assert_eq!(store.trash().unwrap().len(), 1);
    let late = open(&lab, Some(Duration::ZERO));
    std::thread::sleep(Duration::from_millis(1100));
    late.sweep_trash().unwrap();
    assert!(late.trash().unwrap().is_empty());
}

#[test]
fn the_command_line_and_the_mount_list_and_restore() {
    let lab = Lab::new(Kind::PLAIN);
    let before = lab.content("sn2.qcow2");
    let mount = Mount::with(&lab.store, "trash=7");
    assert_eq!(mount.text(".chainfs/trash.txt"), "");
    support::command::Control::of(&mount, "web").done("delete sn2 method=pull");
    let listed = mount.text(".chainfs/trash.txt");
    assert!(listed.contains("sn2.qcow2   delete sn2 method=pull"), "{listed}");
    let said = tool(chainfs_binary()).arg("trash").arg(mount.dir()).succeeds();
    assert_eq!(said, listed);
    let id = listed.split(' ').next().unwrap();
    let json = tool(chainfs_binary()).args(["trash", "--json"]).arg(lab.store.root()).succeeds();
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!((value[0]["id"].as_str(), value[0]["filename"].as_str()), (Some(id), Some("sn2.qcow2")));
    let said = tool(chainfs_binary())
        .args(["trash", "--restore", id, "--name", "again.qcow2"])
        .arg(mount.dir())
        .succeeds();
    assert_eq!(said, "again.qcow2\n");
    eventually("it is shown", || mount.path("again/snapshots/again.raw").exists());
    assert!(std::fs::read(mount.path("again/snapshots/again.raw")).unwrap() == before);
    let (code, _, err) =
        tool(chainfs_binary()).args(["trash", "--remove", id]).arg(lab.store.root()).outcome();
    assert!(code == 1 && err.contains("not in the trash"), "{err}");
    mount.umount();
}

#[test]
fn files_of_others_in_the_trash_stay_however_old_they_are() {
    let lab = Lab::new(Kind::PLAIN);
    let store = open(&lab, Some(WEEK));
    done(&store, "delete sn2 method=pull");
    let path = lab.store.put(".chainfs/trash/mine", b"somebody's");
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let store = open(&lab, Some(Duration::ZERO));
    std::thread::sleep(Duration::from_millis(1100));
    store.sweep_trash().unwrap();
    assert!(path.exists(), "nobody can tell whose it is");
    assert_eq!(store.trash().unwrap().len(), 1, "what is ours has gone");
}
