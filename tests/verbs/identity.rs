//! After a crash, a file is taken for the intended one only if that is proven; an unknown intent hides its
//! views; and a resumed command checks all its refusals again.

use std::fs;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use chainfs::error::ErrorKind;
use chainfs::ops::{Engine, JobState, Request};
use chainfs::store::{
    CommitOperation, NewTop, Operation, PullOperation, SnapshotOperation, Store, StoreOptions, ViewPart,
};
use chainfs::units::Stability;
use support::intents::{leave, witness};
use support::lab::{Kind, Lab, run};
use support::*;

const SIZE: u64 = 4 << 20;

/// A kind of damage, and its name.
type Spoiling = (&'static str, fn(&Path));

fn options() -> StoreOptions {
    StoreOptions { notify: false, ..StoreOptions::default() }
}

fn open(root: &Path) -> Arc<Store> {
    Store::open(root, options()).unwrap()
}

/// The bytes of each listed view of the store, by the file of its top layer.
fn shown(store: &Arc<Store>) -> Vec<(String, Vec<u8>)> {
    let catalog = store.catalog();
    let mut all = Vec::new();
    for (_, leaf) in catalog.chains() {
        let views = store.chain_views(&catalog, leaf);
        for view in views.views.iter().filter(|view| view.snapshot.is_none()) {
            let layers = &views.layers[view.layer..];
            let open = store.open_view(&catalog, layers, ViewPart::Active, Stability::Frozen).unwrap();
            let mut bytes = vec![0; open.view.size() as usize];
            open.view.read_at(0, &mut bytes).unwrap();
            all.push((catalog.images[layers[0]].shown(), bytes));
        }
    }
    all.sort();
    all.dedup();
    all
}

/// Resumes interrupted commands; returns how they ended.
fn taken_up(store: &Arc<Store>) -> Option<String> {
    let engine = Engine::new(store);
    let chains: Vec<PathBuf> =
        store.catalog().intents.iter().map(|found| found.intent.chain.clone()).collect();
    engine.resume();
    let mut error = None;
    for chain in chains {
        let mut status = engine.status(&chain);
        while status.state == JobState::Running {
            status = engine.wait(&chain, status.version, Duration::from_millis(50));
        }
        error = error.or(status.error);
    }
    engine.stop();
    store.rescan().unwrap();
    error
}

/// base <- sn1 <- sn2 <- sn3 <- web, with an interrupted commit of sn2 into base.
struct Commit {
    lab: Lab,
    before: Vec<(String, Vec<u8>)>,
}

impl Commit {
    fn new() -> Self {
        let lab = Lab::new(Kind { raw_base: true, ..Kind::PLAIN });
        let before = shown(&lab.open());
        let deed = Operation::Commit(CommitOperation {
            top: witness(&lab.store, "sn2.qcow2", true),
            base: Self::base(&lab),
            between: vec![witness(&lab.store, "sn1.qcow2", true)],
            children: vec![witness(&lab.store, "sn3.qcow2", false)],
            keep: false,
            is_copied: false,
            rename: None,
        });
        leave(&lab.store, "commit top=sn2 base=base", "web", deed);
        // A part of sn2's data is in base already.
        let bytes = before.iter().find(|(name, _)| name == "sn2.qcow2").unwrap().1.clone();
        let base = fs::File::options().write(true).open(lab.store.path("base.raw")).unwrap();
        base.write_all_at(&bytes[..SIZE as usize / 2], 0).unwrap();
        Self { lab, before }
    }

    /// With the future content of its sectors, as the command itself records it.
    fn base(lab: &Lab) -> chainfs::store::FileRef {
        let store = lab.open();
        let catalog = store.catalog();
        let leaf = catalog.chain(Path::new("web")).unwrap();
        let top = store
            .open_view(&catalog, &catalog.layers(leaf)[2..], ViewPart::Active, Stability::Frozen)
            .unwrap();
        let mut base = witness(&lab.store, "base.raw", true);
        base.will_be_written();
        let Some(chainfs::store::Evidence::Raw { samples, .. }) = &mut base.evidence else {
            unreachable!("it is raw")
        };
        assert!(!samples.is_empty());
        for sample in samples {
            let mut bytes = [0; 512];
            top.view.read_at(sample.at, &mut bytes).unwrap();
            sample.becomes = Some(chainfs::store::Digest::of(&bytes));
        }
        base
    }

    fn of<'a>(views: &'a [(String, Vec<u8>)], name: &str) -> Option<&'a [u8]> {
        views.iter().find(|(file, _)| file == name).map(|(_, bytes)| bytes.as_slice())
    }

    /// The views through sn2 and above have their bytes; invalidated ones are not listed.
    fn assert_hidden(&self, root: &Path) {
        for (name, bytes) in &Self::listed(root) {
            assert!(Self::of(&self.before, name) == Some(bytes), "{name} has other bytes");
        }
    }

    /// The views of a read-only mount; invalidated ones are not listed.
    fn listed(root: &Path) -> Vec<(String, Vec<u8>)> {
        let views = shown(&Store::open(root, StoreOptions { read_only: true, ..options() }).unwrap());
        let names: Vec<&str> = views.iter().map(|(name, _)| name.as_str()).collect();
        assert!(!names.contains(&"base.raw") && !names.contains(&"sn1.qcow2"), "{names:?}");
        views
    }

    /// It was resumed, and is complete.
    fn assert_done(&self, root: &Path) {
        let store = open(root);
        let views = shown(&store);
        let of = |name: &str| Self::of(&views, name);
        assert!(store.catalog().intents.is_empty() && of("sn1.qcow2").is_none() && of("sn2.qcow2").is_none());
        assert!(of("base.raw") == Self::of(&self.before, "sn2.qcow2"));
        for name in ["sn3.qcow2", "web.qcow2"] {
            assert!(of(name) == Self::of(&self.before, name), "{name}");
        }
    }

    fn root(&self) -> PathBuf {
        self.lab.store.root()
    }

    /// It is not resumed, for a reported reason that contains `word`; nothing is changed.
    fn assert_refused(&self, word: &str) {
        let files = contents(&self.root());
        let store = open(&self.root());
        let error = taken_up(&store).expect("a refusal");
        assert!(error.contains(word), "{word}: {error}");
        // A program that another test starts has a copy of the intent's lock until it runs.
        eventually("the problem is listed", || {
            store.rescan().unwrap();
            store.catalog().problems.iter().any(|problem| problem.sentence.contains(word))
        });
        assert_eq!(store.catalog().intents.len(), 1);
        assert!(contents(&self.root()) == files, "nothing is written or removed");
    }
}

/// All files of a store and their content, without chainfs' own.
fn contents(root: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all: Vec<(PathBuf, Vec<u8>)> = fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .map(|path| (path.clone(), fs::read(&path).unwrap()))
        .collect();
    all.sort();
    all
}

/// The ways in which people copy a store as a whole.
fn copies() -> [&'static str; 3] {
    [
        "cp -a \"$1\" \"$2\"",
        "mkdir \"$2\" && tar -C \"$1\" -cf - . | tar -C \"$2\" -xf -",
        "cp -r \"$1\" \"$2\"",
    ]
}

fn copy(way: &str, from: &Path, to: &Path) {
    tool("bash").args(["-c", way, "copy"]).arg(from).arg(to).succeeds();
}

#[test]
fn a_copied_store_hides_invalid_views_and_resumes_like_the_original() {
    for way in copies() {
        let commit = Commit::new();
        let place = commit.lab.store.beside("copy");
        copy(way, &commit.root(), &place);
        commit.assert_hidden(&place);
        // Only the copy is left.
        fs::remove_dir_all(commit.root()).unwrap();
        fs::rename(&place, commit.root()).unwrap();
        commit.assert_hidden(&commit.root());
        let store = open(&commit.root());
        assert_eq!(taken_up(&store), None, "{way}");
        commit.assert_done(&commit.root());
    }
}

#[test]
fn an_unfinished_commit_is_resumed_where_it_was_begun() {
    let commit = Commit::new();
    commit.assert_hidden(&commit.root());
    assert_eq!(taken_up(&open(&commit.root())), None);
    commit.assert_done(&commit.root());
}

#[test]
fn a_copied_store_with_a_replaced_file_is_not_resumed() {
    let commit = Commit::new();
    let place = commit.lab.store.beside("copy");
    copy(copies()[0], &commit.root(), &place);
    fs::remove_dir_all(commit.root()).unwrap();
    fs::rename(&place, commit.root()).unwrap();
    commit.lab.store.raw("base.raw", SIZE, 99);
    commit.assert_refused("base.raw");
    Commit::listed(&commit.root());
}

#[test]
// I1
fn a_file_changed_in_place_is_not_the_recorded_one() {
    // The same file by all attributes of the file system.
    let commit = Commit::new();
    let base = fs::File::options().write(true).open(commit.lab.store.path("base.raw")).unwrap();
    base.write_all_at(&vec![0x5A; SIZE as usize], 0).unwrap();
    commit.assert_refused("base.raw");
    Commit::listed(&commit.root());
    let commit = Commit::new();
    let size = SIZE.to_string();
    commit.lab.store.img([
        "create",
        "-q",
        "-f",
        "qcow2",
        "-b",
        "sn1.qcow2",
        "-F",
        "qcow2",
        "sn2.qcow2",
        &size,
    ]);
    commit.assert_refused("sn2.qcow2");
}

#[test]
// I1
fn a_new_file_of_the_old_name_is_neither_written_nor_removed() {
    for name in ["sn2.qcow2", "sn1.qcow2", "base.raw"] {
        let commit = Commit::new();
        let path = commit.lab.store.path(name);
        fs::remove_file(&path).unwrap();
        fs::write(&path, format!("somebody's {name}")).unwrap();
        commit.assert_refused("restore it from a copy");
        assert_eq!(fs::read_to_string(&path).unwrap(), format!("somebody's {name}"));
    }
}

/// Leaves the intent of a commit of sn3 into sn2, with web on top.
fn leave_commit_of_sn3(lab: &Lab, is_copied: bool) {
    let deed = Operation::Commit(CommitOperation {
        top: witness(&lab.store, "sn3.qcow2", true),
        base: witness(&lab.store, "sn2.qcow2", false),
        between: Vec::new(),
        children: vec![witness(&lab.store, "web.qcow2", false)],
        keep: false,
        is_copied,
        rename: None,
    });
    leave(&lab.store, "commit top=sn3 base=sn2", "web", deed);
}

/// The remaining step of a commit whose copy is complete is to remove the layers.
#[test]
fn a_new_disk_with_the_name_of_a_merged_layer_stays() {
    let lab = Lab::new(Kind::PLAIN);
    leave_commit_of_sn3(&lab, true);
    lab.store.img(["rebase", "-u", "-b", "sn2.qcow2", "-F", "qcow2", "web.qcow2"]);
    let path = lab.store.path("sn3.qcow2");
    let mut inodes = Vec::new();
    // Until the number is given again, if it ever is.
    for round in 0..50 {
        inodes.push(fs::metadata(&path).unwrap().ino());
        fs::remove_file(&path).unwrap();
        lab.store.img(["create", "-q", "-f", "qcow2", "sn3.qcow2", &format!("{}M", 1 + round)]);
        if inodes[0] == fs::metadata(&path).unwrap().ino() {
            break;
        }
    }
    let disk = fs::read(&path).unwrap();
    let store = open(&lab.store.root());
    assert_eq!(taken_up(&store), None);
    assert!(store.catalog().intents.is_empty());
    assert!(fs::read(&path).unwrap() == disk, "it is somebody else's");
}

/// A commit of the active layer that was interrupted right after base had got its new name: from then on
/// guests write base.
#[test]
fn a_guest_may_have_rewritten_the_new_active_disk_before_the_crash() {
    // A base of the disk's own stem, one that gets its name, and one of another extension.
    for (base, rename) in [("web.raw", "web.raw"), ("base.qcow2", "web.qcow2"), ("base.raw", "web.raw")] {
        for is_copied in [false, true] {
            let at = format!("{base} as {rename}, {is_copied}");
            let store = support::Store::new();
            let format = if base.ends_with("raw") { "raw" } else { "qcow2" };
            store.img(["create", "-q", "-f", format, base, &SIZE.to_string()]);
            store.scribble(base, format, 5);
            store.overlay("web.qcow2", base, format, "");
            let mut written = witness(&store, base, format == "raw");
            written.will_be_written();
            let operation = Operation::Commit(CommitOperation {
                top: witness(&store, "web.qcow2", false),
                base: written,
                between: Vec::new(),
                children: Vec::new(),
                keep: false,
                is_copied: false,
                rename: Some(rename.into()),
            });
            leave(&store, "commit", "web", operation);
            if rename == base {
                fs::remove_file(store.path("web.qcow2")).unwrap();
            } else {
                fs::rename(store.path(base), store.path(rename)).unwrap();
            }
            let pattern = format!("write -q -P 0x5A 0 {SIZE}");
            store.io(rename, format, [pattern]);
            let root = if is_copied { store.beside("copy") } else { store.root() };
            if is_copied {
                copy(copies()[0], &store.root(), &root);
            }
            let opened = open(&root);
            assert_eq!(taken_up(&opened), None, "{at}");
            assert!(opened.catalog().intents.is_empty(), "{at}");
            let left = root.join("web.qcow2").exists();
            assert_eq!(left, rename == "web.qcow2", "{at}: the former active layer has gone");
        }
    }
}

#[test]
fn a_layer_rebased_by_another_process_stays_rebased() {
    for (is_copied, other) in [(true, "other.qcow2"), (true, ""), (false, "other.qcow2"), (false, "")] {
        let lab = Lab::new(Kind::PLAIN);
        lab.store.create("other.qcow2", SIZE, "");
        lab.store.scribble("other.qcow2", "qcow2", 77);
        leave_commit_of_sn3(&lab, is_copied);
        let format: &[&str] = if other.is_empty() { &[] } else { &["-F", "qcow2"] };
        lab.store.img([&["rebase", "-u", "-b", other], format, &["web.qcow2"]].concat());
        let content = lab.content("web.qcow2");
        assert_eq!(taken_up(&open(&lab.store.root())), None, "{is_copied} {other:?}");
        assert!(!lab.store.path("sn3.qcow2").exists(), "{is_copied} {other:?}");
        assert!(lab.content("web.qcow2") == content, "{is_copied} {other:?}");
    }
}

#[test]
// J5
fn a_resumed_command_checks_all_refusals_again() {
    // Another image has become an overlay of the written file.
    let commit = Commit::new();
    commit.lab.store.overlay("second.qcow2", "base.raw", "raw", "");
    commit.assert_refused("second.qcow2");
    fs::remove_file(commit.lab.store.path("second.qcow2")).unwrap();
    // Or of the removed one.
    commit.lab.store.overlay("second.qcow2", "sn1.qcow2", "qcow2", "");
    commit.assert_refused("second.qcow2");
    fs::remove_file(commit.lab.store.path("second.qcow2")).unwrap();
    // It may not be written any more.
    let mode = |name: &str, mode| {
        fs::set_permissions(commit.lab.store.path(name), fs::Permissions::from_mode(mode)).unwrap();
    };
    for name in ["base.raw", "sn1.qcow2", "sn3.qcow2"] {
        mode(name, 0o444);
        commit.assert_refused("read-only");
        mode(name, 0o644);
    }
    let store = Store::open(
        &commit.root(),
        StoreOptions { readonly: vec![glob::Pattern::new("base*").unwrap()], ..options() },
    )
    .unwrap();
    assert!(taken_up(&store).unwrap().contains("read-only"));
    // It has another name besides.
    let link = commit.lab.store.beside("link.raw");
    fs::hard_link(commit.lab.store.path("base.raw"), &link).unwrap();
    commit.assert_refused("hard links");
    fs::remove_file(link).unwrap();
    // Nothing blocks it any more.
    assert_eq!(taken_up(&open(&commit.root())), None);
    commit.assert_done(&commit.root());
}

fn pull(lab: &Lab, remove: &[&str]) {
    let deed = Operation::Pull(PullOperation {
        into: vec![witness(&lab.store, "sn3.qcow2", false)],
        base: Some(witness(&lab.store, "sn1.qcow2", false)),
        remove: remove.iter().map(|name| witness(&lab.store, name, true)).collect(),
        between: vec![witness(&lab.store, "sn2.qcow2", false)],
    });
    leave(&lab.store, "delete sn2 method=pull", "web", deed);
}

/// Gives a file the bytes and the time that it had.
fn restore(lab: &Lab, name: &str, bytes: &[u8], written: std::time::SystemTime) {
    fs::write(lab.store.path(name), bytes).unwrap();
    fs::File::options().write(true).open(lab.store.path(name)).unwrap().set_modified(written).unwrap();
}

#[test]
fn a_resumed_pull_checks_again_and_removes_no_other_file() {
    let lab = Lab::new(Kind::PLAIN);
    let before = lab.contents(&["sn3.qcow2", "web.qcow2"]);
    pull(&lab, &["sn2.qcow2"]);
    let mode =
        |mode| fs::set_permissions(lab.store.path("sn3.qcow2"), fs::Permissions::from_mode(mode)).unwrap();
    mode(0o444);
    assert!(taken_up(&open(&lab.store.root())).unwrap().contains("read-only"));
    mode(0o644);
    // Written in place: no longer the file to remove.
    let sn2 = fs::read(lab.store.path("sn2.qcow2")).unwrap();
    let written = fs::metadata(lab.store.path("sn2.qcow2")).unwrap().modified().unwrap();
    lab.store.io("sn2.qcow2", "qcow2", ["write -q -P 7 0 4M".to_owned()]);
    assert!(taken_up(&open(&lab.store.root())).unwrap().contains("sn2.qcow2"));
    restore(&lab, "sn2.qcow2", &sn2, written);
    assert_eq!(taken_up(&open(&lab.store.root())), None);
    assert!(!lab.store.path("sn2.qcow2").exists());
    assert!(before == lab.contents(&["sn3.qcow2", "web.qcow2"]));
}

#[test]
fn a_resumed_snapshot_checks_again() {
    let lab = Lab::new(Kind::PLAIN);
    let overlay = ".chainfs-184f2a3b4c5d6e7f-1-0-0.new";
    lab.store.overlay_sized(overlay, "monday.qcow2", "qcow2", SIZE);
    let top = NewTop {
        old: witness(&lab.store, "web.qcow2", false),
        frozen: "monday.qcow2".into(),
        overlay: witness(&lab.store, overlay, false),
        name: "web.qcow2".into(),
        backing: None,
    };
    let deed = Operation::Snapshot(SnapshotOperation {
        seconds: 1,
        nanoseconds: 0,
        description: String::new(),
        disks: vec![top],
    });
    leave(&lab.store, "snapshot monday", "web", deed);
    let content = lab.content("web.qcow2");
    fs::hard_link(lab.store.path("web.qcow2"), lab.store.path("monday.qcow2")).unwrap();
    // Another image has become an overlay by the name that would be removed.
    lab.store.overlay("mine.qcow2", "monday.qcow2", "qcow2", "");
    assert!(taken_up(&open(&lab.store.root())).unwrap().contains("mine.qcow2"));
    assert!(lab.content("mine.qcow2") == content);
    fs::remove_file(lab.store.path("mine.qcow2")).unwrap();
    assert_eq!(taken_up(&open(&lab.store.root())), None);
    assert!(lab.content("web.qcow2") == content && !lab.store.path("monday.qcow2").exists());
}

#[test]
fn a_name_that_has_gained_overlays_is_not_removed() {
    let lab = support::Store::new();
    let shows = |name: &str| fs::read(lab.try_oracle(Path::new(name), "qcow2", None).unwrap()).unwrap();
    lab.raw("vm.raw", SIZE, 5);
    lab.overlay("vm.qcow2", "vm.raw", "raw", "");
    lab.img(["rebase", "-u", "-F", "raw", "-b", "monday.raw", "vm.qcow2"]);
    let top = NewTop {
        old: witness(&lab, "vm.raw", false),
        frozen: "monday.raw".into(),
        overlay: witness(&lab, "vm.qcow2", false),
        name: "vm.qcow2".into(),
        backing: None,
    };
    let deed = Operation::Snapshot(SnapshotOperation {
        seconds: 1,
        nanoseconds: 0,
        description: String::new(),
        disks: vec![top],
    });
    leave(&lab, "snapshot monday", "vm", deed);
    fs::hard_link(lab.path("vm.raw"), lab.path("monday.raw")).unwrap();
    // The overlay has come; the raw disk still has both names.
    let content = fs::read(lab.path("vm.raw")).unwrap();
    let full = lab.path("vm.raw").display().to_string();
    std::os::unix::fs::symlink("vm.raw", lab.path("near.raw")).unwrap();
    std::os::unix::fs::symlink(&full, lab.path("far.raw")).unwrap();
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"vm.raw"}}"#;
    for backing in ["vm.raw", &full, "near.raw", "far.raw", json] {
        lab.overlay_sized("mine.qcow2", backing, "raw", SIZE);
        let said = taken_up(&open(&lab.root())).unwrap_or_else(|| panic!("{backing}: it is taken up"));
        assert!(said.contains("mine.qcow2"), "{backing}: {said}");
        assert!(shows("mine.qcow2") == content, "{backing}");
        fs::remove_file(lab.path("mine.qcow2")).unwrap();
    }
    fs::remove_file(lab.path("near.raw")).unwrap();
    fs::remove_file(lab.path("far.raw")).unwrap();
    // An owner whose names do not count loses nothing.
    lab.overlay_sized("theirs.qcow2", "vm.raw", "raw", SIZE);
    std::os::unix::fs::chown(lab.path("theirs.qcow2"), Some(2001), Some(2001)).unwrap();
    fs::set_permissions(lab.path("vm.raw"), fs::Permissions::from_mode(0o600)).unwrap();
    // By its new name it stays.
    lab.overlay("mine.qcow2", "monday.raw", "raw", "");
    let counting = StoreOptions { owners_count: true, ..options() };
    assert_eq!(taken_up(&Store::open(&lab.root(), counting).unwrap()), None);
    assert!(shows("mine.qcow2") == content && shows("vm.qcow2") == content);
    assert!(!lab.path("vm.raw").exists());
}

#[test]
// J4
fn an_unknown_intent_hides_all_views_it_may_have_invalidated() {
    let spoil: [Spoiling; 6] = [
        ("cut", |path| {
            let text = fs::read(path).unwrap();
            fs::write(path, &text[..text.len() / 2]).unwrap();
        }),
        ("empty", |path| fs::write(path, "").unwrap()),
        ("newer", |path| {
            let text = fs::read_to_string(path).unwrap();
            fs::write(path, text.replace("version = 2", "version = 3")).unwrap();
        }),
        ("older", |path| {
            let text = fs::read_to_string(path).unwrap();
            fs::write(path, text.replace("version = 2", "version = 1")).unwrap();
        }),
        ("directory", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        ("link", |path| {
            fs::remove_file(path).unwrap();
            std::os::unix::fs::symlink("nowhere-else/../../..", path).unwrap();
        }),
    ];
    for (how, spoil) in spoil {
        let commit = Commit::new();
        spoil(&commit.lab.store.path(".chainfs/intents/left.toml"));
        let files = contents(&commit.root());
        let store = open(&commit.root());
        taken_up(&store);
        assert!(shown(&store).is_empty(), "{how}");
        let catalog = store.catalog();
        let leaf = catalog.chain(Path::new("web")).unwrap();
        let opened = store.open_active(&catalog, &catalog.layers(leaf), chainfs::store::Access::Write);
        assert!(opened.is_err(), "{how}");
        let is_told = |problem: &chainfs::store::Problem| problem.sentence.contains("chainfs recover");
        assert!(catalog.problems.iter().any(is_told), "{how}: {:?}", catalog.problems);
        let refused = run(&Engine::new(&store), "web", "pull").unwrap_err();
        assert!(matches!(refused.kind(), ErrorKind::Busy | ErrorKind::Usage), "{how}: {refused}");
        assert!(contents(&commit.root()) == files, "{how}");
        // Until a user states explicitly that it does not count.
        let recover =
            |args: &[&str]| tool(chainfs_binary()).arg("recover").args(args).arg(commit.root()).outcome();
        let (code, out, _) = recover(&["--dry-run"]);
        assert!(code == 1 && out.contains("--forget left"), "{how}: {out}");
        let (code, out, err) = recover(&["--forget", "left"]);
        assert_eq!(code, 0, "{how}: {out}{err}");
        assert_eq!(shown(&open(&commit.root())).len(), 5, "{how}");
    }
}

#[test]
fn a_directory_of_intents_that_cannot_be_listed_hides_everything() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.dir(".chainfs");
    lab.store.put(".chainfs/intents", b"nobody can tell what was begun");
    let store = open(&lab.store.root());
    assert!(shown(&store).is_empty());
    assert!(store.catalog().problems.iter().any(|problem| problem.path == Path::new(".chainfs/intents")));
    tool(chainfs_binary()).args(["recover", "--forget", "intents"]).arg(lab.store.root()).succeeds();
    assert_eq!(shown(&open(&lab.store.root())).len(), 5);
}

#[test]
fn recover_shows_and_resumes_intents() {
    let commit = Commit::new();
    let recover =
        |args: &[&str]| tool(chainfs_binary()).arg("recover").args(args).arg(commit.root()).outcome();
    let files = contents(&commit.root());
    let (code, out, _) = recover(&["--dry-run"]);
    let words = ["commit top=sn2 base=base (chain web)", "base.raw is there", "would be resumed"];
    assert!(code == 0 && words.iter().all(|word| out.contains(word)), "{out}");
    assert!(contents(&commit.root()) == files, "it was only asked");
    commit.lab.store.overlay("second.qcow2", "base.raw", "raw", "");
    for args in [&["--dry-run"][..], &[]] {
        let (code, out, _) = recover(args);
        assert!(code == 1 && out.contains("second.qcow2") && out.contains("--forget left"), "{out}");
    }
    fs::remove_file(commit.lab.store.path("second.qcow2")).unwrap();
    let (code, out, err) = recover(&[]);
    assert!(code == 0 && out.contains("  done"), "{out}{err}");
    commit.assert_done(&commit.root());
    assert!(recover(&[]).1.contains("no interrupted commands"));
}

/// A raw disk that is a snapshot, and its list.
fn frozen() -> Lab {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.raw("vm.raw", SIZE, 5);
    let run = |chain: &str, command: &str| {
        let status = run(&Engine::new(&lab.open()), chain, command).unwrap();
        assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
    };
    run("vm", "snapshot gold");
    run("vm", "pull");
    lab
}

fn is_active(store: &Arc<Store>, chain: &str) -> bool {
    let catalog = store.catalog();
    catalog.is_active(catalog.chain(Path::new(chain)).unwrap())
}

#[test]
fn without_a_list_that_can_be_used_every_raw_image_counts_as_frozen() {
    let spoil: [Spoiling; 7] = [
        ("nonsense", |path| fs::write(path, "][").unwrap()),
        ("empty", |path| fs::write(path, "").unwrap()),
        ("cut", |path| {
            let text = fs::read_to_string(path).unwrap();
            fs::write(path, &text[..text.find("[[").unwrap()]).unwrap();
        }),
        ("one bad field", |path| {
            let text = fs::read_to_string(path).unwrap();
            fs::write(path, text.replace("seconds = ", "seconds = \"x\" # ")).unwrap();
        }),
        ("removed", |path| fs::remove_file(path).unwrap()),
        ("directory", |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        }),
        ("another count", |path| {
            let text = fs::read_to_string(path).unwrap();
            fs::write(path, text.replace("count = 1", "count = 2")).unwrap();
        }),
    ];
    for (how, spoil) in spoil {
        let lab = frozen();
        lab.store.raw("other.raw", SIZE, 6);
        assert!(!is_active(&lab.open(), "gold") && is_active(&lab.open(), "other"));
        spoil(&lab.store.path(".chainfs/frozen.toml"));
        let store = lab.open();
        assert!(!is_active(&store, "gold") && !is_active(&store, "other"), "{how}");
        let problems = &store.catalog().problems;
        let is_told = problems.iter().any(|problem| {
            problem.path == Path::new(".chainfs/frozen.toml") && problem.sentence.contains("chainfs recover")
        });
        assert!(is_told, "{how}: {problems:?}");
        let (code, out, _) = tool(chainfs_binary()).arg("recover").arg(lab.store.root()).outcome();
        assert!(code == 1 && out.contains("--forget frozen.toml"), "{how}: {out}");
        tool(chainfs_binary()).args(["recover", "--forget", "frozen.toml"]).arg(lab.store.root()).succeeds();
        assert!(is_active(&lab.open(), "gold"), "{how}");
    }
}

#[test]
fn a_store_that_was_marked_by_hand_has_lost_no_list() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.raw("vm.raw", SIZE, 5);
    for place in [".chainfs", ".chainfs/intents"] {
        lab.store.dir(place);
        assert!(is_active(&lab.open(), "vm"), "{place}");
        assert_eq!(lab.open().catalog().problems, []);
    }
}

fn with_trash() -> StoreOptions {
    StoreOptions { trash: Some(Duration::from_hours(24)), ..options() }
}

#[test]
fn a_file_that_cannot_go_to_the_trash_is_not_removed() {
    let lab = Lab::new(Kind::PLAIN);
    let before = lab.contents(&["sn2.qcow2", "web.qcow2"]);
    let root = lab.store.root();
    lab.store.dir(".chainfs");
    lab.store.put(".chainfs/trash", b"no directory");
    let store = Store::open(&root, with_trash()).unwrap();
    let ended = run(&Engine::new(&store), "web", "delete sn2 method=pull");
    let error = ended.map_or_else(|error| error.to_string(), |status| status.error.unwrap_or_default());
    assert!(error.contains("trash"), "{error}");
    assert!(before == lab.contents(&["sn2.qcow2", "web.qcow2"]));
    assert!(store.catalog().intents.is_empty(), "nothing is left to be done");
    assert!(store.trash().is_err(), "nor is it said to be empty");
}

#[test]
fn an_overlay_of_a_changed_base_is_reported() {
    let lab = Lab::new(Kind::PLAIN);
    let store = Store::open(&lab.store.root(), with_trash()).unwrap();
    let done = |command: &str| {
        let status = run(&Engine::new(&store), "web", command).unwrap();
        assert_eq!(status.state, JobState::Done, "{command}: {:?}", status.error);
    };
    let before = lab.content("sn2.qcow2");
    done("delete sn2 method=pull");
    let item = || store.trash().unwrap().remove(0);
    assert_eq!(item().problem, None);
    // A command that keeps its bytes does no harm.
    done("pull into=sn1");
    assert_eq!(item().problem, None);
    // Others may.
    let kept = fs::read(lab.store.path("sn1.qcow2")).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    lab.store.io("sn1.qcow2", "qcow2", ["write -q -P 7 0 64k".to_owned()]);
    store.rescan().unwrap();
    let (id, problem) = (item().id, item().problem.expect("a word of warning"));
    assert!(problem.contains("sn1.qcow2"), "{problem}");
    assert_eq!(store.restore(&id, None).unwrap_err().kind(), ErrorKind::Stale);
    let listed = tool(chainfs_binary()).arg("trash").arg(lab.store.root()).succeeds();
    assert!(listed.contains("has been written since"), "{listed}");
    // Another file in its place, though it holds the same bytes.
    fs::remove_file(lab.store.path("sn1.qcow2")).unwrap();
    fs::write(lab.store.path("sn1.qcow2"), kept).unwrap();
    store.rescan().unwrap();
    assert!(item().problem.is_some());
    assert!(!lab.store.path("sn2.qcow2").exists() && !before.is_empty());
    // An unreadable note is not ignored.
    fs::write(lab.store.path(format!(".chainfs/trash/{id}.toml")), "").unwrap();
    assert!(item().problem.is_some_and(|problem| problem.contains("note")));
}

#[test]
fn losses_of_a_command_are_reported_before_and_after() {
    let lab = Lab::new(Kind { inner: &["sn2"], ..Kind::PLAIN });
    let store = Store::open(&lab.store.root(), with_trash()).unwrap();
    let plan = |command: &str| {
        let request = Request::parse_command(command.as_bytes()).unwrap();
        Engine::new(&store).plan(Path::new("web"), &request).unwrap().notes.join("\n")
    };
    let is_kept = plan("delete sn1 method=commit discard-internal").contains("shares its blocks");
    let kept = "not kept in the trash: ";
    assert!(is_kept || plan("delete sn3 method=commit").contains(&format!("{kept}sn3")));
    for command in ["commit top=sn2 base=sn1 discard-internal", "delete sn2@inner"] {
        let notes = plan(command);
        assert!(notes.contains(kept) && notes.contains("inner"), "{command}: {notes}");
    }
    let status = run(&Engine::new(&store), "web", "delete sn3 method=commit").unwrap();
    assert_eq!(status.state, JobState::Done, "{:?}", status.error);
    let said = status.notes.join("\n");
    assert!(is_kept || said.contains(&format!("{kept}sn3")), "{said}");
    assert_eq!(store.trash().unwrap().len(), usize::from(is_kept));
}

#[test]
fn unreadable_bitmaps_do_not_count_as_none() {
    let lab = Lab::new(Kind::PLAIN);
    lab.store.img(["bitmap", "--add", "sn3.qcow2", "b0"]);
    let info =
        tool("qemu-img").args(["info", "-U", "--output=json"]).arg(lab.store.path("sn3.qcow2")).succeeds();
    assert!(info.contains("b0"));
    assert_eq!(lab.refused("commit top=sn3 base=sn2").kind(), ErrorKind::NotEmpty);
    // Its directory is invalid: the offset in the extension stays, the entry is destroyed.
    let path = lab.store.path("sn3.qcow2");
    let bytes = fs::read(&path).unwrap();
    let at = bytes.windows(4).position(|bytes| bytes == 0x2385_2875_u32.to_be_bytes()).unwrap();
    let place = u64::from_be_bytes(bytes[at + 8 + 16..at + 8 + 24].try_into().unwrap());
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0xFF; 24], place).unwrap();
    let error = lab.refused("commit top=sn3 base=sn2");
    assert_eq!(error.kind(), ErrorKind::NotEmpty, "{error}");
    assert!(error.to_string().contains("unreadable"), "{error}");
}

#[test]
fn a_command_that_cannot_record_its_end_is_refused() {
    for command in ["commit base=base", "delete base"] {
        let lab = Lab::new(Kind { raw_base: true, ..Kind::PLAIN });
        lab.store.dir(".chainfs");
        lab.store.put(".chainfs/frozen.toml", b"][");
        let root = lab.store.root();
        let images = || -> Vec<_> {
            contents(&root).into_iter().filter(|(path, _)| !path.starts_with(".chainfs")).collect()
        };
        let before = images();
        let error = lab.refused(command);
        assert!(error.to_string().contains("frozen.toml"), "{command}: {error}");
        assert!(contents(&root) == before, "{command} has changed something");
    }
}

#[test]
fn hard_linked_and_read_only_layers_are_not_marked() {
    for (command, left) in
        [("pull into=sn3 base=base", "sn2"), ("rebase layer=sn3 base=base", "sn2"), ("revert to=sn1", "sn3")]
    {
        let commands = |protect: &dyn Fn(&Path)| {
            let lab = Lab::new(Kind::PLAIN);
            let file = lab.store.path(format!("{left}.qcow2"));
            protect(&file);
            let before = fs::read(&file).unwrap();
            let store = open(&lab.store.root());
            let engine = Engine::new(&store);
            let status = run(&engine, "web", command).unwrap();
            assert_eq!((status.state, status.error), (JobState::Done, None), "{command}");
            engine.stop();
            fs::read(&file).unwrap() == before
        };
        let kept = commands(&|file| {
            fs::hard_link(file, file.parent().unwrap().parent().unwrap().join("mine")).unwrap();
        });
        assert!(kept, "{command}: it has another name");
        let kept = commands(&|file| fs::set_permissions(file, fs::Permissions::from_mode(0o444)).unwrap());
        assert!(kept, "{command}: it is only read");
    }
}

#[test]
fn an_untrusted_intent_hides_views_and_is_not_resumed() {
    let spoils: [Spoiling; 3] = [
        ("everybody may write the directory", |root| {
            fs::set_permissions(root.join(".chainfs"), fs::Permissions::from_mode(0o777)).unwrap();
        }),
        ("the directory of notes is another's", |root| {
            std::os::unix::fs::chown(root.join(".chainfs/intents"), Some(2001), None).unwrap();
        }),
        ("all is another's but the store's own directory", |root| {
            tool("chown").args(["-R", "2001"]).arg(root).succeeds();
            std::os::unix::fs::chown(root, Some(0), None).unwrap();
        }),
    ];
    for (what, spoil) in spoils {
        let commit = Commit::new();
        let before = fs::read(commit.lab.store.path("base.raw")).unwrap();
        spoil(&commit.lab.store.root());
        let store = open(&commit.lab.store.root());
        assert_eq!(taken_up(&store), None, "{what}");
        let names: Vec<String> = shown(&store).into_iter().map(|(name, _)| name).collect();
        assert!(!names.iter().any(|name| name == "base.raw" || name == "sn1.qcow2"), "{what}: {names:?}");
        assert!(fs::read(commit.lab.store.path("base.raw")).unwrap() == before, "{what}");
        drop(store);
        let (code, out, err) = tool(chainfs_binary()).arg("recover").arg(commit.lab.store.root()).outcome();
        assert!(
            code != 0 && format!("{out}{err}").contains("other users could have written"),
            "{what}: {out}{err}"
        );
        assert!(fs::read(commit.lab.store.path("base.raw")).unwrap() == before, "{what}");
    }
}

#[test]
fn an_untrusted_intent_hides_no_image_of_other_users() {
    let commit = Commit::new();
    let intents = commit.lab.store.path(".chainfs/intents");
    tool("chown").args(["-R", "2001"]).arg(&intents).succeeds();
    let store = open(&commit.lab.store.root());
    let names: Vec<String> = shown(&store).into_iter().map(|(name, _)| name).collect();
    assert!(names.iter().any(|name| name == "base.raw"), "{names:?}");
    assert!(store.catalog().problems.iter().any(|problem| problem.sentence.contains("is not trusted")));
}
