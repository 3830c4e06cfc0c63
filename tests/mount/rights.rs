//! No user gets access through a shared mount that the kernel would deny on the store itself. The kernel is
//! the reference on both sides: unprivileged users try to read, to write and to give commands.

use std::fs::{self, File};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _, chown};
use std::path::Path;
use std::sync::Arc;
use std::thread;

use chainfs::io::LocalDirectory;
use chainfs::ops::{Engine, as_user};
use chainfs::store::{Store as Opened, StoreOptions, Subject};
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};
use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde_json::Value;
use support::command::give;
use support::host::Mortal;
use support::*;

pub(crate) const A: u32 = 2001;
pub(crate) const B: u32 = 2002;

/// Does it with the rights of a user, and in these groups.
pub(crate) fn acting<T: Send>(uid: u32, groups: &[u32], work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let acting = scope.spawn(|| {
            let ids: Vec<Gid> = groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
            set_thread_groups(&ids).expect("groups");
            // Real and saved ids stay root's: only those for file access change.
            set_thread_res_gid(None, Gid::from_raw(groups.first().copied().unwrap_or(uid)), None)
                .expect("a group");
            set_thread_res_uid(None, Uid::from_raw(uid), None).expect("a user");
            work()
        });
        acting.join().expect("it does not panic")
    })
}

pub(crate) fn may_read(uid: u32, groups: &[u32], path: &Path) -> bool {
    acting(uid, groups, || File::open(path).and_then(|mut file| file.read(&mut [0])).is_ok())
}

pub(crate) fn mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
}

pub(crate) fn own(path: &Path, uid: u32, bits: u32) {
    chown(path, Some(uid), Some(uid)).expect("an owner");
    mode(path, bits);
}

/// A store that all users may enter, if its directories let them.
pub(crate) fn open_store() -> Store {
    let store = Store::new();
    mode(&store.beside(""), 0o755);
    mode(&store.root(), 0o755);
    store
}

/// Two users with a private directory each: `b/secret`, and `a/x`, which names it.
fn two_users() -> Store {
    let store = open_store();
    for (directory, uid) in [("a", A), ("b", B)] {
        fs::create_dir(store.path(directory)).expect("a directory");
        own(&store.path(directory), uid, 0o700);
    }
    store.create("b/secret.qcow2", MIB, "");
    store.speckle("b/secret.qcow2", MIB, 0x53);
    store.overlay("a/x.qcow2", "../b/secret.qcow2", "qcow2", "");
    own(&store.path("b/secret.qcow2"), B, 0o600);
    own(&store.path("a/x.qcow2"), A, 0o644);
    store
}

#[test]
fn the_rule_is_the_kernels() {
    let place = tempfile::tempdir().expect("a directory");
    mode(place.path(), 0o755);
    let (path, root) = (place.path().join("file"), LocalDirectory::open(place.path()).expect("a root"));
    let mut rng = Rng::new(11);
    let mut granted = 0;
    for turn in 0..1500 {
        let _ = fs::remove_file(&path);
        fs::write(&path, "x").expect("a file");
        let (owner, group) = (A + rng.below(3) as u32, 3000 + rng.below(3) as u32);
        chown(&path, Some(owner), Some(group)).expect("an owner");
        mode(&path, rng.below(0o1000) as u32);
        if turn % 2 == 0 {
            let mut list = Vec::new();
            for (kind, first) in [("u", A), ("g", 3000)] {
                for id in first..first + 3 {
                    if rng.below(3) == 0 {
                        list.push(format!("{kind}:{id}:{}", rng.below(8)));
                    }
                }
            }
            if !list.is_empty() {
                list.push(format!("m::{}", rng.below(8)));
                tool("setfacl").args(["-m", &list.join(",")]).arg(&path).succeeds();
            }
        }
        let user = A + rng.below(3) as u32;
        let groups: Vec<u32> = (3000..3003).filter(|_| rng.below(2) == 0).collect();
        let permissions = root.permissions(Path::new("file")).expect("permissions");
        let mut known = groups.clone();
        known.extend(groups.is_empty().then_some(user));
        let subject = Subject::new(user, known);
        for want in 1..8_u32 {
            let access = Access::from_bits_retain(want);
            let kernel = acting(user, &groups, || accessat(CWD, &path, access, AtFlags::EACCESS).is_ok());
            let ours = subject.may(&permissions, want);
            assert_eq!(ours, kernel, "{subject:?} {permissions:?} {want}");
            granted += u32::from(ours);
        }
    }
    assert!(granted > 500, "{granted}");
}

#[test]
fn a_private_disk_is_not_reached_by_naming_it() {
    let store = two_users();
    let mount = Mount::with(&store, "allow_other");
    assert!(!may_read(A, &[], &mount.path("a/x/active.raw")));
    assert!(!may_read(A, &[], &mount.path("b/secret/active.raw")));
    let commit = mount.path("a/x/control/commit");
    assert!(acting(A, &[], || give(&commit, b"\n")).is_some(), "it is refused");
    assert!(store.path("b/secret.qcow2").exists() && store.path("a/x.qcow2").exists());
    // It stays its owner's disk, whoever names it.
    let disk = mount.path("b/secret/active.raw");
    let written = acting(B, &[], || {
        let file = File::options().read(true).write(true).open(&disk)?;
        file.write_all_at(b"mine", 0)?;
        file.sync_all()
    });
    written.expect("its owner writes it");
    let problems = mount.text(".chainfs/problems.txt");
    assert!(
        problems.contains("a/x.qcow2")
            && problems.contains("uid 2001")
            && problems.contains("give the image to root")
    );
    mount.umount();
}

#[test]
fn an_uncounted_name_is_still_not_truncated() {
    let store = two_users();
    store.overlay("b/top.qcow2", "secret.qcow2", "qcow2", "");
    own(&store.path("b/top.qcow2"), B, 0o600);
    let mount = Mount::with(&store, "allow_other");
    let commit = mount.path("b/top/control/commit");
    assert_eq!(acting(B, &[], || give(&commit, b"\n")), Some(Errno::NOTEMPTY));
    let status = acting(B, &[], || fs::read_to_string(mount.path("b/top/control/status"))).expect("a status");
    assert!(status.contains("an image that you may not read") && !status.contains("x.qcow2"), "{status}");
    assert!(mount.text("b/top/control/status").contains("an image that you may not read"));
    mount.umount();
}

#[test]
fn an_uncounted_description_is_still_not_truncated() {
    let store = two_users();
    store.overlay("b/top.qcow2", "secret.qcow2", "qcow2", "");
    own(&store.path("b/top.qcow2"), B, 0o600);
    // Another way to name the same, which is never followed.
    for (name, target) in [("a/x.qcow2", "../b/secret.qcow2"), ("a/y.qcow2", "../b/top.qcow2")] {
        let path = store.path(name);
        let described =
            format!(r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{target}"}}}}"#);
        store.create(name, MIB, "");
        let rebased = ["rebase", "-u", "-f", "qcow2", "-F", "qcow2", "-b", &described];
        tool("qemu-img").args(rebased).arg(&path).succeeds();
        own(&path, A, 0o600);
    }
    let mount = Mount::with(&store, "allow_other");
    // It stays its owner's disk.
    let disk = mount.path("b/top/active.raw");
    let written = acting(B, &[], || {
        let file = File::options().read(true).write(true).open(&disk)?;
        file.write_all_at(b"mine", 0)?;
        file.sync_all()
    });
    written.expect("its owner writes it");
    let before = [fs::read(store.path("b/secret.qcow2")), fs::read(store.path("b/top.qcow2"))];
    // But no user, not even root, changes or removes the named file.
    for (verb, words) in [("commit", "\n"), ("revert", "to=secret"), ("delete", "secret method=commit")] {
        let control = mount.path("b/top/control").join(verb);
        for uid in [0, B] {
            let refused = acting(uid, &[], || give(&control, words.as_bytes()));
            assert_eq!(
                refused,
                Some(Errno::NOTEMPTY),
                "{verb} {words}: {}",
                mount.text("b/top/control/status")
            );
        }
        let status =
            acting(B, &[], || fs::read_to_string(mount.path("b/top/control/status"))).expect("a status");
        assert!(status.contains("an image that you may not read"), "{status}");
        assert!(!status.contains("x.qcow2") && !status.contains("y.qcow2"), "{status}");
    }
    let after = [fs::read(store.path("b/secret.qcow2")), fs::read(store.path("b/top.qcow2"))];
    assert!(
        before.iter().zip(&after).all(|(was, is)| was.as_ref().ok() == is.as_ref().ok()),
        "nothing is changed"
    );
    mount.umount();
}

#[test]
fn a_link_to_an_image_makes_no_name_count() {
    let store = open_store();
    for (directory, bits) in [("shut", 0o750), ("all", 0o755)] {
        fs::create_dir(store.path(directory)).expect("a directory");
        mode(&store.path(directory), bits);
    }
    store.create("shut/base.qcow2", MIB, "");
    mode(&store.path("shut/base.qcow2"), 0o644);
    store.overlay("all/x.qcow2", "../shut/base.qcow2", "qcow2", "");
    own(&store.path("all/x.qcow2"), A, 0o644);
    // The image is not in that directory, though another user has linked it there.
    std::os::unix::fs::symlink("../all/x.qcow2", store.path("shut/link.qcow2")).expect("a link");
    let mount = Mount::with(&store, "allow_other");
    assert!(mount.path("shut/base/active.raw").exists(), "{}", mount.text(".chainfs/tree.txt"));
    assert!(mount.text(".chainfs/problems.txt").contains("does not count"));
    mount.umount();
}

#[test]
fn usual_stores_of_libvirt_are_read_and_root_s_base_is_kept() {
    let store = open_store();
    store.raw("base.raw", MIB, 5);
    store.overlay("vm.qcow2", "base.raw", "raw", "");
    own(&store.path("vm.qcow2"), A, 0o600);
    mode(&store.path("base.raw"), 0o644);
    let mount = Mount::with(&store, "allow_other");
    assert!(
        may_read(A, &[], &mount.path("vm/active.raw"))
            && may_read(A, &[], &mount.path("vm/snapshots/base.raw"))
    );
    assert!(!may_read(B, &[], &mount.path("vm/active.raw")));
    let disk = mount.path("vm/active.raw");
    acting(A, &[], || File::options().write(true).open(&disk)?.write_all_at(b"x", 0))
        .expect("its owner writes it");
    let commit = mount.path("vm/control/commit");
    assert_eq!(acting(A, &[], || give(&commit, b"\n")), Some(Errno::ACCESS));
    let status = acting(A, &[], || fs::read_to_string(mount.path("vm/control/status"))).expect("a status");
    assert!(status.contains("base.raw would be changed by this, and you may not write it"), "{status}");
    let plan = mount.path("vm/control/plan");
    let planned = acting(A, &[], || {
        give(&plan, b"commit\n");
        fs::read_to_string(&plan)
    });
    assert!(planned.expect("a plan").contains("refused: base.raw would be changed"));
    mount.umount();
}

#[test]
// A2
fn commands_need_the_right_to_change_the_directory() {
    let store = open_store();
    fs::create_dir(store.path("d")).expect("a directory");
    for name in ["d/one.qcow2", "d/two.qcow2"] {
        store.create(name, MIB, "");
        own(&store.path(name), A, 0o644);
    }
    let mount = Mount::with(&store, "allow_other");
    let give = |verb: &str, words: &str| {
        let file = mount.path("d/one/control").join(verb);
        acting(A, &[], || give(&file, words.as_bytes()))
    };
    assert_eq!(give("snapshot", "monday"), Some(Errno::ACCESS), "the directory is root's");
    assert_eq!(give("snapshot", "monday internal"), None, "only the file changes");
    assert_eq!(give("resize", "2M"), None);
    // All users may write it, but only owners rename there.
    mode(&store.path("d"), 0o1777);
    assert_eq!(give("snapshot", "tuesday"), None, "it is the user's own file");
    assert!(store.path("d/tuesday.qcow2").exists());
    mount.umount();
}

#[test]
fn a_command_is_judged_by_the_opener_of_the_file() {
    let store = open_store();
    store.raw("base.raw", MIB, 5);
    store.overlay("vm.qcow2", "base.raw", "raw", "");
    own(&store.path("vm.qcow2"), A, 0o600);
    mode(&store.path("base.raw"), 0o644);
    let mount = Mount::with(&store, "allow_other");
    let commit = mount.path("vm/control/commit");
    // As a program of root's would that gets it as its output.
    let mut opened = acting(A, &[], || File::options().write(true).open(&commit)).expect("a control file");
    let refused = opened.write_all(b"\n").expect_err("it is a user's command");
    assert_eq!(Errno::from_io_error(&refused), Some(Errno::ACCESS));
    drop(opened);
    mount.umount();
}

#[test]
fn the_user_of_the_uid_option_has_the_administrators_rights() {
    let store = open_store();
    store.raw("base.raw", MIB, 5);
    store.overlay("vm.qcow2", "base.raw", "raw", "");
    for name in ["base.raw", "vm.qcow2"] {
        mode(&store.path(name), 0o600);
    }
    let mount = Mount::with(&store, "allow_other,uid=2001");
    assert!(
        may_read(A, &[], &mount.path("vm/active.raw")) && !may_read(B, &[], &mount.path("vm/active.raw"))
    );
    let snapshot = mount.path("vm/control/snapshot");
    assert_eq!(acting(A, &[], || give(&snapshot, b"monday")), None);
    mount.umount();
    let mount = Mount::with(&store, "allow_other,umask=022");
    assert!(may_read(B, &[], &mount.path("vm/active.raw")), "it is the administrator's word");
    let snapshot = mount.path("vm/control/snapshot");
    assert!(acting(B, &[], || give(&snapshot, b"tuesday")).is_some());
    mount.umount();
}

#[test]
fn a_directory_above_the_store_restricts_access() {
    let store = open_store();
    store.create("vm.qcow2", MIB, "");
    mode(&store.path("vm.qcow2"), 0o644);
    let mount = Mount::with(&store, "allow_other");
    assert!(may_read(A, &[], &mount.path("vm/active.raw")));
    mount.umount();
    // The mount point is elsewhere, and the store's own way is shut.
    let outer = tempfile::tempdir().expect("a directory");
    mode(outer.path(), 0o755);
    let dir = outer.path().join("at");
    fs::create_dir(&dir).expect("a directory");
    let mount = Mount::try_new(&store, &store.root(), &dir, "allow_other").expect("a mount");
    assert!(may_read(A, &[], &dir.join("vm/active.raw")));
    mode(&store.beside(""), 0o700);
    eventually("it is shut", || !may_read(A, &[], &dir.join("vm/active.raw")));
    mount.umount();
}

/// Gives a command that is interrupted after this many changes, and opens the store again; nothing is resumed
/// yet.
fn cut_off(store: &Store, chain: &str, command: &str, changes: u64) -> (Arc<Opened>, Arc<Engine>) {
    let options = || StoreOptions { notify: false, owners_count: true, ..StoreOptions::default() };
    let host = Mortal::new();
    let opened =
        Opened::open_on(&store.root(), options(), &|directory| host.open(directory)).expect("a store");
    let engine = Engine::new(&opened);
    host.dies_after(changes);
    let _ = lab::run(&engine, chain, command);
    engine.stop();
    drop((engine, opened));
    let opened = Opened::open(&store.root(), options()).expect("a store");
    let engine = Engine::new(&opened);
    (opened, engine)
}

fn assert_done(opened: &Opened) {
    eventually("it is done", || opened.rescan().is_ok() && opened.catalog().intents.is_empty());
}

#[test]
fn an_interrupted_command_continues_for_any_user() {
    let mut left = 0;
    for changes in (6..40).step_by(2) {
        let store = open_store();
        store.create("base.qcow2", MIB, "");
        store.overlay("vm.qcow2", "base.qcow2", "qcow2", "");
        for name in ["base.qcow2", "vm.qcow2"] {
            own(&store.path(name), A, 0o644);
        }
        let (opened, engine) = cut_off(&store, "vm", "commit", changes);
        left += opened.catalog().intents.len();
        // Another user, without the rights, comes before it is resumed.
        let asker = as_user(&opened, &Subject::new(B, vec![B]));
        let _ = lab::run(&engine, "vm", "commit");
        drop(asker);
        engine.resume();
        assert_done(&opened);
    }
    assert!(left > 3, "{left} were cut off");
}

#[test]
fn an_uncounted_name_does_not_block_a_snapshot() {
    let mut left = 0;
    for changes in 6..36 {
        let store = two_users();
        let (opened, engine) = cut_off(&store, "b/secret", "snapshot monday", changes);
        left += opened.catalog().intents.len();
        engine.resume();
        assert_done(&opened);
    }
    assert!(left > 3, "{left} were cut off");
}

#[test]
fn no_command_backs_an_image_by_a_file_its_owner_may_not_read() {
    let store = open_store();
    store.create("base.qcow2", MIB, "");
    store.overlay("mid.qcow2", "base.qcow2", "qcow2", "");
    store.overlay("vm.qcow2", "mid.qcow2", "qcow2", "");
    own(&store.path("base.qcow2"), 0, 0o600);
    own(&store.path("mid.qcow2"), 0, 0o644);
    own(&store.path("vm.qcow2"), A, 0o600);
    let mount = Mount::with(&store, "allow_other");
    let give = |verb: &str, words: &str| give(&mount.path("vm/control").join(verb), words.as_bytes());
    // Root's own commands: the names that they would write would not count, and the image would be broken.
    let all = [
        ("commit", "top=mid"),
        ("pull", "base=base"),
        ("delete", "mid method=pull"),
        ("rebase", "base=base.qcow2"),
        ("rebase", "base=base.qcow2 unsafe drop-layers"),
        ("revert", "to=base"),
        ("clone", "other from=base"),
    ];
    for (verb, words) in all {
        assert_eq!(give(verb, words), Some(Errno::ACCESS), "{verb} {words}");
        let status = mount.text("vm/control/status");
        assert!(
            status.contains("would be backed by base.qcow2, which does not count"),
            "{verb} {words}: {status}"
        );
    }
    mode(&store.path("base.qcow2"), 0o644);
    assert_eq!(give("clone", "other from=base"), None);
    mount.umount();
}

#[test]
fn reports_name_no_file_that_a_user_may_not_read() {
    let store = open_store();
    for (name, bits) in [("open.qcow2", 0o644), ("hidden.qcow2", 0o600)] {
        store.create(name, MIB, "");
        store.img(["snapshot", "-c", "inner-secret", name]);
        mode(&store.path(name), bits);
    }
    store.put("broken-hidden.qcow2", b"QFI\xfb\0\0\0\x09");
    mode(&store.path("broken-hidden.qcow2"), 0o600);
    let mount = Mount::with(&store, "allow_other");
    let read = |name: &str| acting(A, &[], || fs::read_to_string(mount.path(name))).expect("it can be read");
    for name in [
        ".chainfs/chains.json",
        ".chainfs/index.html",
        ".chainfs/tree.txt",
        ".chainfs/tree.svg",
        ".chainfs/problems.txt",
        ".chainfs/trash.txt",
        ".chainfs/metrics",
        "README.txt",
        "open/info/index.html",
    ] {
        // Two words of the pages' own.
        let text = read(name).replace("aria-hidden", "").replace("overflow:hidden", "");
        assert!(!text.contains("hidden"), "{name}: {text}");
    }
    assert!(read(".chainfs/chains.json").contains("inner-secret"), "what may be read is there");
    assert!(mount.text(".chainfs/chains.json").contains("hidden.qcow2"), "root sees all");
    assert!(mount.text(".chainfs/index.html").contains("hidden/info/index.html"), "root sees all");
    assert!(read(".chainfs/index.html").contains("open/files/active@inner-secret/"));
    assert!(acting(A, &[], || fs::read_to_string(mount.path("hidden/info/index.html"))).is_err());
    assert!(mount.text(".chainfs/problems.txt").contains("broken-hidden"));
    assert!(acting(A, &[], || fs::read_dir(mount.path("hidden/snapshots"))).is_err());
    assert!(acting(A, &[], || fs::read_to_string(mount.path("hidden/info/chain.json"))).is_err());
    mount.umount();
}

/// The files of a list that a user may read, in one process of that user.
fn readable(uid: u32, groups: &[u32], paths: &[std::path::PathBuf]) -> Vec<bool> {
    acting(uid, groups, || {
        paths.iter().map(|path| File::open(path).and_then(|mut file| file.read(&mut [0])).is_ok()).collect()
    })
}

#[test]
// A1
fn a_reader_of_a_view_can_read_all_its_layers() {
    let (mut granted, mut denied) = (0, 0);
    for seed in 0..12 {
        let mut rng = Rng::new(seed);
        let store = open_store();
        let directories = ["", "p", "q", "p/r"];
        for directory in &directories[1..] {
            fs::create_dir(store.path(directory)).expect("a directory");
        }
        let mut images: Vec<String> = Vec::new();
        for number in 0..9 {
            let directory = directories[rng.below(4) as usize];
            let name = Path::new(directory).join(format!("i{number}.qcow2")).display().to_string();
            if number < 3 || rng.below(4) == 0 {
                store.create(&name, MIB, "");
            } else {
                let below = images[rng.below(images.len() as u64) as usize].clone();
                let up = "../".repeat(Path::new(directory).components().count());
                store.overlay(&name, &format!("{up}{below}"), "qcow2", "");
            }
            images.push(name);
        }
        for name in images.iter().map(String::as_str).chain(directories[1..].iter().copied()) {
            let path = store.path(name);
            let is_directory = path.is_dir();
            let owner = [0, 0, A, B][rng.below(4) as usize];
            chown(&path, Some(owner), Some(3000 + rng.below(3) as u32)).expect("an owner");
            let modes =
                if is_directory { [0o755, 0o711, 0o750, 0o705] } else { [0o644, 0o640, 0o604, 0o600] };
            mode(&path, modes[rng.below(4) as usize]);
            if rng.below(4) == 0 {
                let bits = [0, 5, 7][rng.below(3) as usize];
                let who = ["u:2001", "u:2002", "g:3001"][rng.below(3) as usize];
                tool("setfacl").args(["-m", &format!("{who}:{bits}")]).arg(&path).succeeds();
            }
        }
        let mount = Mount::with(&store, "allow_other,nofiles");
        let chains: Value = serde_json::from_str(&mount.text(".chainfs/chains.json")).expect("JSON");
        let mut views = Vec::new();
        for chain in chains["chains"].as_array().expect("chains") {
            let path = chain["path"].as_str().expect("a path");
            let layers = chain["layers"].as_array().expect("layers");
            for (depth, layer) in layers.iter().enumerate() {
                let Some(view) = layer["view"].as_str() else { continue };
                let place =
                    if view == "active" { "active.raw".into() } else { format!("snapshots/{view}.raw") };
                let files = layers[depth..]
                    .iter()
                    .map(|layer| store.path(layer["file"].as_str().expect("a file")))
                    .collect::<Vec<_>>();
                views.push((mount.path(path).join(place), files));
            }
        }
        for (uid, groups) in
            [(A, vec![]), (B, vec![3000]), (A, vec![3001, 3002]), (2003, vec![3001]), (2003, vec![])]
        {
            let paths: Vec<_> = views.iter().map(|(view, _)| view.clone()).collect();
            let seen = readable(uid, &groups, &paths);
            for ((view, files), is_read) in views.iter().zip(seen) {
                let all = readable(uid, &groups, files).iter().all(|may| *may);
                assert!(
                    all || !is_read,
                    "seed {seed}, uid {uid} {groups:?}: {} of {files:?}",
                    view.display()
                );
                let described = acting(uid, &groups, || {
                    rustix::fs::getxattr(view, "user.chainfs.format", &mut [0_u8; 64][..]).is_ok()
                });
                assert!(
                    all || !described,
                    "seed {seed}, uid {uid} {groups:?}: attributes of {}",
                    view.display()
                );
                granted += u32::from(is_read);
                denied += u32::from(all && !is_read);
            }
            let report = acting(uid, &groups, || fs::read_to_string(mount.path(".chainfs/chains.json")));
            let report: Value = serde_json::from_str(&report.expect("a report")).expect("JSON");
            for chain in report["chains"].as_array().expect("chains") {
                for layer in chain["layers"].as_array().expect("layers") {
                    let file = store.path(layer["file"].as_str().expect("a file"));
                    assert!(
                        may_read(uid, &groups, &file),
                        "seed {seed}, uid {uid} {groups:?}: {} is told of",
                        file.display()
                    );
                }
            }
        }
        mount.umount();
    }
    assert!(granted > 40, "{granted} granted");
    // Modes apply to whole classes, so that some users are shut out unnecessarily: not most.
    assert!(denied < 3 * granted, "{granted} granted, {denied} denied without need");
}

#[test]
// A3
fn intents_of_other_users_are_not_resumed() {
    let store = open_store();
    store.create("base.qcow2", MIB, "");
    store.overlay("vm.qcow2", "base.qcow2", "qcow2", "");
    fs::create_dir_all(store.path(".chainfs/intents")).expect("a directory");
    let before = fs::read(store.path("base.qcow2")).expect("an image");
    let text = "version = 1\ncommand = \"commit\"\nchain = \"vm\"\n";
    fs::write(store.path(".chainfs/intents/1.toml"), text).expect("an intent");
    own(&store.path(".chainfs"), A, 0o755);
    own(&store.path(".chainfs/intents"), A, 0o755);
    let mount = Mount::new(&store);
    let problems = mount.text(".chainfs/problems.txt");
    assert!(problems.contains("belongs to uid 2001") && problems.contains("is not trusted"), "{problems}");
    let commit = mount.path("vm/control/commit");
    assert!(give(&commit, b"\n").is_some(), "nothing is begun where others may have written what was begun");
    assert_eq!(fs::read(store.path("base.qcow2")).expect("an image"), before);
    mount.umount();
}

#[test]
fn configuration_writable_by_others_is_refused() {
    let store = open_store();
    let (config, dir) = (store.beside("c.toml"), store.beside("at"));
    fs::write(&config, "nofiles = true\n").expect("a file");
    fs::create_dir(&dir).expect("a directory");
    let options = format!("config={}", config.display());
    for (uid, bits) in [(0, 0o666), (A, 0o644)] {
        own(&config, uid, bits);
        let (code, _, said) =
            tool(chainfs_binary()).args(["mount", "-o", &options]).arg(store.root()).arg(&dir).outcome();
        assert_eq!(code, 32, "{said}");
        assert!(said.contains("is not trusted") && said.contains("c.toml"), "{said}");
    }
}

#[test]
fn hostile_names_are_harmless_in_every_text() {
    let store = Store::new();
    let name = "gpj\u{202e}\u{2066}\u{200f}\u{61c}\u{1b}[2J";
    store.create(&format!("{name}.qcow2"), MIB, "");
    store.put(format!("bad{name}.qcow2"), b"QFI\xfb\0\0\0\x09");
    let mount = Mount::new(&store);
    let mut texts: Vec<String> = ["chains.json", "index.html", "tree.txt", "tree.svg", "problems.txt"]
        .map(|file| mount.text(format!(".chainfs/{file}")))
        .into();
    texts.push(mount.text("README.txt"));
    let chain = mount.dir().join(name);
    give(&chain.join("control/commit"), format!("top={name}").as_bytes());
    give(&chain.join("control/plan"), b"commit");
    for file in ["chain.json", "index.html", "tree.txt", "tree.svg"] {
        texts.push(fs::read_to_string(chain.join("info").join(file)).expect("a text"));
    }
    for file in ["control/status", "control/plan"] {
        texts.push(fs::read_to_string(chain.join(file)).expect("a text"));
    }
    for text in texts {
        let hostile = text.chars().find(|c| "\u{202e}\u{2066}\u{200f}\u{61c}\u{1b}".contains(*c));
        assert_eq!(hostile, None, "{text}");
    }
    let chains: Value = serde_json::from_str(&mount.text(".chainfs/chains.json")).expect("JSON");
    let paths: Vec<&str> =
        chains["chains"].as_array().expect("chains").iter().filter_map(|c| c["path"].as_str()).collect();
    assert!(paths.contains(&name), "programs get the name as it is: {paths:?}");
    mount.umount();
}

/// Gives an image so many internal snapshots, all of its one table, with names of so many odd bytes.
fn many_snapshots(path: &Path, count: u32, name_len: u16) {
    let mut file = File::options().read(true).write(true).open(path).expect("an image");
    let mut header = [0; 72];
    file.read_exact(&mut header).expect("a header");
    let at = file.metadata().expect("a size").len().next_multiple_of(65_536);
    let mut table = Vec::new();
    for number in 0..count {
        let id = number.to_string();
        let mut name = number.to_string().into_bytes();
        name.resize(usize::from(name_len), 1);
        table.extend_from_slice(&header[40..48]);
        table.extend_from_slice(&header[36..40]);
        table.extend_from_slice(&(id.len() as u16).to_be_bytes());
        table.extend_from_slice(&name_len.to_be_bytes());
        table.extend_from_slice(&[0; 20]);
        table.extend_from_slice(&16_u32.to_be_bytes());
        table.extend_from_slice(&[0; 8]);
        table.extend_from_slice(&MIB.to_be_bytes());
        table.extend_from_slice(id.as_bytes());
        table.extend_from_slice(&name);
        table.resize(table.len().next_multiple_of(8), 0);
    }
    file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(&table)).expect("a table");
    file.write_all_at(&count.to_be_bytes(), 60)
        .and_then(|()| file.write_all_at(&at.to_be_bytes(), 64))
        .expect("a header");
}

fn peak_memory(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("a status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * KIB
}

#[test]
fn reports_of_very_many_snapshots_stay_small() {
    let store = Store::new();
    store.create("vm.qcow2", MIB, "");
    many_snapshots(&store.path("vm.qcow2"), 60_000, 800);
    let mount = Mount::with(&store, "nofiles");
    let before = peak_memory(mount.daemon());
    for file in [
        ".chainfs/chains.json",
        ".chainfs/tree.txt",
        ".chainfs/tree.svg",
        "vm/info/chain.json",
        "vm/info/tree.txt",
    ] {
        let len = mount.text(file).len();
        assert!(len < 8 << 20, "{file} has {len} bytes");
    }
    let (chains, chain) = (mount.text(".chainfs/chains.json"), mount.text("vm/info/chain.json"));
    for text in [&chains, &chain] {
        let value: Value = serde_json::from_str(text).expect("JSON");
        assert!(text.contains("\"snapshots-left-out\": 59"), "{}", &text[text.len() - 2000..]);
        assert!(!value.is_null());
    }
    assert!(mount.text(".chainfs/tree.txt").contains(" more"));
    let grown = peak_memory(mount.daemon()).saturating_sub(before);
    assert!(grown < 100 * MIB, "the reports took {} MiB, over {} MiB", grown / MIB, before / MIB);
    mount.umount();
}

#[test]
fn a_long_report_is_the_same_from_any_offset() {
    let store = Store::new();
    store.create("base.qcow2", MIB, "");
    for number in 0..8 {
        let name = format!("vm{number}.qcow2");
        store.overlay(&name, "base.qcow2", "qcow2", "");
        many_snapshots(&store.path(&name), 1200, 90);
    }
    let mount = Mount::with(&store, "nofiles");
    let path = mount.path(".chainfs/chains.json");
    let whole = fs::read(&path).expect("a report");
    assert!(whole.len() > 3 << 20, "{}", whole.len());
    assert_eq!(fs::metadata(&path).expect("attributes").len(), whole.len() as u64);
    serde_json::from_slice::<Value>(&whole).expect("JSON");
    let file = File::open(&path).expect("a report");
    let mut rng = Rng::new(3);
    for _ in 0..60 {
        let (at, len) = (rng.below(whole.len() as u64), 1 + rng.below(300_000) as usize);
        let mut part = vec![0; len];
        let got = file.read_at(&mut part, at).expect("a part");
        let expected = &whole[at as usize..(at as usize + len).min(whole.len())];
        assert_eq!(&part[..got], &expected[..got], "{at}");
        assert!(got > 0);
    }
    drop(file);
    mount.umount();
}

#[test]
fn directories_above_an_image_do_not_restrict_its_owner() {
    let store = open_store();
    fs::create_dir(store.path("d")).expect("a directory");
    store.create("d/base.qcow2", MIB, "");
    store.overlay("d/vm.qcow2", "base.qcow2", "qcow2", "");
    own(&store.path("d/base.qcow2"), B, 0o644);
    own(&store.path("d/vm.qcow2"), A, 0o600);
    // A copy of another user's store that root keeps: the owner cannot even reach the image itself.
    for path in [store.path("d"), store.root()] {
        own(&path, 0, 0o700);
    }
    let mount = Mount::new(&store);
    assert_eq!(mount.text(".chainfs/problems.txt"), "");
    mount.umount();
}

#[test]
fn unreadable_files_are_not_reported_as_missing() {
    let store = two_users();
    store.overlay_unchecked("a/y.qcow2", "../b/gone.qcow2", "qcow2");
    store.overlay_unchecked("a/z.qcow2", "gone.qcow2", "qcow2");
    for name in ["a/y.qcow2", "a/z.qcow2"] {
        own(&store.path(name), A, 0o644);
    }
    let mount = Mount::with(&store, "allow_other");
    let said = |chain: &str| {
        let path = mount.path(chain).join("info/problem.txt");
        acting(A, &[], || fs::read_to_string(path)).expect("a problem")
    };
    let (there, gone) = (said("a/x"), said("a/y"));
    assert_eq!(there.replace("secret", "gone").replace("a/x", "a/y"), gone);
    assert!(said("a/z").contains("is missing"));
    mount.umount();
}

#[test]
fn a_refusal_does_not_disclose_whether_a_file_exists() {
    let store = two_users();
    store.create("a/mine.qcow2", MIB, "");
    own(&store.path("a/mine.qcow2"), A, 0o600);
    fs::write(store.path("b/letter.txt"), "x").expect("a file");
    let mount = Mount::with(&store, "allow_other");
    let rebase = mount.path("a/mine/control/rebase");
    // An image, another file and no file: a user who may not look there gets the same answer.
    let answers: Vec<(Option<Errno>, String)> = ["secret.qcow2", "letter.txt", "none.qcow2"]
        .iter()
        .map(|name| {
            let refused = acting(A, &[], || give(&rebase, format!("base=../b/{name}").as_bytes()));
            let status = acting(A, &[], || fs::read_to_string(mount.path("a/mine/control/status")));
            let status = status.expect("a status");
            let error = status.lines().find(|line| line.starts_with("error:")).unwrap_or_default();
            (refused, error.replace(name, "NAME"))
        })
        .collect();
    assert_eq!(answers[0].0, Some(Errno::ACCESS), "{answers:?}");
    assert!(answers.iter().all(|answer| *answer == answers[0]), "{answers:?}");
    mount.umount();
}
