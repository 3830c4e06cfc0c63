//! Jobs that wait for the store's lock, or whose intents and files are removed by others: they can be
//! cancelled, the mount can be unmounted, another mount resumes them, and no half-written layer is shown.
//! Needs root.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use chainfs::io::{LocalDirectory, LockKind};
use rustix::process::{Pid, Signal, kill_process};
use support::command::Control;
use support::foreign::amount;
use support::jobs::{Paused, assert_snapshots, at_work, intents, interrupted, kill, settled, slow};
use support::lab::Lab;
use support::*;

/// A stopped process that holds the store's lock.
struct Stopped(Child);

impl Stopped {
    fn holding(lab: &Lab) -> Self {
        let directory = LocalDirectory::open(&lab.store.root()).expect("the store");
        let file = directory.open_file_for_writing(Path::new(".chainfs/lock")).expect("the store's lock");
        // The lock belongs to the open file, which the child shares: this opening is closed, not unlocked.
        let local = file.local_file().expect("a file of this machine");
        let shared = local.as_fd().try_clone_to_owned().expect("two of a descriptor");
        eventually("nobody holds it for long", || file.locks().take(LockKind::Exclusive).is_ok());
        let child = Command::new("sleep").arg("600").stdin(Stdio::from(shared)).spawn().expect("sleep(1)");
        drop(file);
        kill_process(Pid::from_child(&child), Signal::STOP).expect("a child of ours");
        Self(child)
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until a job has copied all that it has to, and so waits for the lock.
fn all_copied(control: &Control) {
    eventually("all is copied", || {
        control.status("state") == "running" && control.status("done") == control.status("total")
    });
}

fn active(mount: &Mount) -> Vec<u8> {
    fs::read(mount.path("web/active.raw")).expect("the disk")
}

const JOBS: [(&str, Option<(&str, &str)>); 3] =
    [("commit top=sn3 base=base", Some(("sn3", "base"))), ("commit", None), ("pull", None)];

#[test]
fn a_job_that_waits_for_a_stopped_process_can_be_cancelled() {
    for (command, _) in JOBS {
        let (lab, before) = slow(false);
        let mount = at_work(&lab, command);
        let control = Control::of(&mount, "web");
        let stopped = Stopped::holding(&lab);
        all_copied(&control);
        assert_eq!(control.give("cancel"), None, "{command}: {}", control.status("error"));
        assert_eq!(control.wait(), "cancelled", "{command}: {}", control.status("error"));
        assert_snapshots(&mount, &before, None, command);
        assert!(active(&mount) == before["web"], "{command}");
        drop(stopped);
        // It is as if it had never been given.
        control.done(command);
        mount.umount();
        lab.assert_clean();
    }
}

#[test]
fn an_unmount_leaves_a_waiting_job_to_the_next_mount() {
    for (command, merged) in JOBS {
        let (lab, before) = slow(false);
        let mount = at_work(&lab, command);
        let stopped = Stopped::holding(&lab);
        all_copied(&Control::of(&mount, "web"));
        mount.umount();
        assert_eq!(intents(&lab), 1, "{command}");
        // The next mount cannot resume it yet either; it can be used, and unmounted.
        let mount = Mount::new(&lab.store);
        assert_snapshots(&mount, &before, None, command);
        assert!(active(&mount) == before["web"], "{command}");
        mount.umount();
        let mount = Mount::new(&lab.store);
        drop(stopped);
        settled(&lab, &mount, command);
        assert_snapshots(&mount, &before, merged, command);
        assert!(active(&mount) == before["web"], "{command}");
        mount.umount();
        lab.assert_clean();
    }
}

#[test]
fn a_command_that_finds_the_lock_held_by_a_stopped_process_names_it() {
    let lab = Lab::slow(false);
    let mount = Mount::new(&lab.store);
    let control = Control::of(&mount, "web");
    control.done("snapshot monday");
    let stopped = Stopped::holding(&lab);
    let sentence = control.refused("snapshot tuesday", rustix::io::Errno::BUSY);
    assert!(sentence.contains(&format!("sleep[{}]", stopped.pid())), "{sentence}");
    drop(stopped);
    control.done("snapshot tuesday");
    mount.umount();
}

/// Whether a case is tried with that kind of base: with both where time is taken, else with them in turn.
fn is_in_turn(case: usize, raw_base: bool) -> bool {
    amount(0, 1) == 1 || (case + usize::from(raw_base)).is_multiple_of(2)
}

/// A second mount of the store of `lab`.
fn second(lab: &Lab) -> Mount {
    let directory = lab.store.beside("second");
    fs::create_dir_all(&directory).expect("a directory");
    Mount::try_new(&lab.store, &lab.store.root(), &directory, "").expect("a second mount")
}

#[test]
fn another_live_mount_resumes_the_job_of_a_killed_one() {
    for raw_base in [true, false] {
        for (number, (command, merged)) in JOBS.into_iter().enumerate() {
            if !is_in_turn(number, raw_base) {
                continue;
            }
            let context = format!("{command}, raw base {raw_base}");
            let (lab, before) = slow(raw_base);
            // It is there before the first of all commands is given, and before there is any note.
            let other = second(&lab);
            let mount = at_work(&lab, command);
            let _paused = Paused::at_work(&lab, &mount);
            eventually("the other shows only what is right", || {
                command.contains("pull") || !raw_base || other.names("web/snapshots").len() < 4
            });
            kill(mount);
            assert_eq!(intents(&lab), 1, "{context}");
            watch_until_over(&[&other], &before, || intents(&lab) == 0, &context);
            settled(&lab, &other, &context);
            eventually("the other shows what has become", || {
                let names = if other.path("web/snapshots").exists() {
                    other.names("web/snapshots")
                } else {
                    Vec::new()
                };
                let is_over = |layer: &str| !names.contains(&format!("{layer}.raw"));
                merged.map_or_else(|| is_over("sn3"), |(top, _)| is_over(top))
            });
            assert_snapshots(&other, &before, merged, &context);
            assert!(active(&other) == before["web"], "{context}");
            other.umount();
            lab.assert_clean();
        }
    }
}

/// Every listed snapshot has its bytes, checked repeatedly until a job is over. They are read at least once:
/// a job may be over before the first check.
fn watch_until_over(
    mounts: &[&Mount],
    before: &support::jobs::Contents,
    is_over: impl Fn() -> bool,
    context: &str,
) {
    let (start, mut looks) = (Instant::now(), 0);
    loop {
        let is_last = is_over() || start.elapsed() > hang();
        for mount in mounts {
            // The last one disappears with the directory.
            let Ok(entries) = fs::read_dir(mount.path("web/snapshots")) else { continue };
            for name in entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()) {
                let layer = name.strip_suffix(".raw").expect("a disk");
                // A snapshot that is hidden meanwhile cannot be opened any more.
                let Ok(shown) = fs::read(mount.path("web/snapshots").join(&name)) else { continue };
                let is_right = shown == before[layer] || (layer == "base" && is_over());
                assert!(is_right, "{context}: {} shows other bytes of {name}", mount.dir().display());
                looks += 1;
            }
        }
        if is_last {
            break;
        }
    }
    assert!(is_over(), "{context}: {looks} looks; {}", mounts[0].text(".chainfs/problems.txt"));
}

/// Removes files of chainfs, all of them: their owner may be writing one again meanwhile.
fn remove_notes(lab: &Lab) {
    let start = Instant::now();
    while let Err(error) = fs::remove_dir_all(lab.store.path(".chainfs")) {
        let is_filled_again = error.kind() == std::io::ErrorKind::DirectoryNotEmpty;
        assert!(is_filled_again && start.elapsed() < hang(), "{error}");
    }
}

#[test]
fn no_half_merged_layer_is_shown_when_an_intent_is_removed() {
    let (lab, before) = slow(true);
    let other = second(&lab);
    let mount = at_work(&lab, "commit top=sn3 base=base");
    let spoilt = |mount: &Mount| !mount.names("web/snapshots").contains(&"base.raw".to_owned());
    let paused = Paused::at_work(&lab, &mount);
    eventually("the other hides it", || spoilt(&other));
    drop(paused);
    assert!(spoilt(&mount));
    remove_notes(&lab);
    let control = Control::of(&mount, "web");
    watch_until_over(&[&mount, &other], &before, || control.status("state") != "running", "removed");
    assert_eq!(control.wait(), "done", "{}", control.status("error"));
    eventually("the note has gone", || intents(&lab) == 0);
    for mount in [&mount, &other] {
        eventually("it is shown again", || !spoilt(mount) && mount.names("web/snapshots").len() == 1);
        assert_snapshots(mount, &before, Some(("sn3", "base")), "done");
    }
    other.umount();
    mount.umount();
    lab.assert_clean();
}

#[test]
fn a_killed_job_with_a_removed_intent_is_resumed() {
    // Killed so many milliseconds after the removal, or once the intent has been written again.
    for pause in [Some(0), Some(20), None] {
        let context = format!("killed {pause:?} ms after that");
        let (lab, before) = slow(true);
        // A process that sees the intent and its removal knows of it even if its owner had no time to write
        // it again.
        let other = pause.is_some().then(|| second(&lab));
        let mount = at_work(&lab, "commit top=sn3 base=base");
        let spoilt = |mount: &Mount| !mount.names("web/snapshots").contains(&"base.raw".to_owned());
        if let Some(other) = &other {
            let _paused = Paused::at_work(&lab, &mount);
            eventually("the other hides it", || spoilt(other));
        }
        remove_notes(&lab);
        match pause {
            Some(pause) => std::thread::sleep(Duration::from_millis(pause)),
            None => eventually("the intent is written again", || {
                let names = fs::read_dir(lab.store.path(".chainfs/intents")).into_iter().flatten().flatten();
                names.map(|entry| entry.path()).any(|path| path.extension().is_none_or(|last| last != "new"))
            }),
        }
        kill(mount);
        let mount = other.unwrap_or_else(|| Mount::new(&lab.store));
        let is_over = || !spoilt(&mount);
        watch_until_over(&[&mount], &before, is_over, &context);
        settled(&lab, &mount, &context);
        eventually("all is done", || mount.names("web/snapshots").len() == 1);
        assert_snapshots(&mount, &before, Some(("sn3", "base")), &context);
        assert!(active(&mount) == before["web"], "{context}");
        mount.umount();
        lab.assert_clean();
    }
}

/// Files or directories that no user, not even root, may change or remove.
struct Immutable(Vec<std::path::PathBuf>);

impl Immutable {
    fn new(lab: &Lab, names: &[&str]) -> Self {
        let paths: Vec<_> = names.iter().map(|name| lab.store.path(name)).collect();
        for path in &paths {
            tool("chattr").arg("+i").arg(path).succeeds();
        }
        Self(paths)
    }
}

impl Drop for Immutable {
    fn drop(&mut self) {
        for path in self.0.iter().filter(|path| path.exists()) {
            let _ = tool("chattr").arg("-i").arg(path).status();
        }
    }
}

/// A command, the file that it may not change, and the top and base that it merges where snapshots show that.
type Protected<'a> = (&'a str, &'a [&'a str], Option<(&'a str, &'a str)>);

#[test]
fn a_commit_without_cleanup_lists_no_invalid_layer() {
    let cases: [Protected<'_>; 7] = [
        // The layers between may not be removed, then top may not, then no name may be changed.
        ("commit top=sn3 base=base", &["sn1.qcow2"], Some(("sn3", "base"))),
        ("commit top=sn3 base=base", &["sn3.qcow2"], Some(("sn3", "base"))),
        ("commit top=sn3 base=base", &["."], Some(("sn3", "base"))),
        ("commit top=sn3 base=sn1 keep", &["."], None),
        ("delete sn2 method=commit", &["."], None),
        ("commit base=base", &["."], None),
        ("commit base=base", &["sn2.qcow2"], None),
    ];
    for raw_base in [true, false] {
        for (number, (command, protected, merged)) in cases.into_iter().enumerate() {
            if !is_in_turn(number, raw_base) {
                continue;
            }
            let context = format!("{command}, {protected:?} immutable, raw base {raw_base}");
            let (lab, before) = slow(raw_base);
            let mount = at_work(&lab, command);
            let immutable = Immutable::new(&lab, protected);
            let control = Control::of(&mount, "web");
            let (state, sentence) = control.ended();
            assert_eq!(state, "failed", "{context}");
            assert!(sentence.contains("denied") || sentence.contains("permitted"), "{context}: {sentence}");
            let judge = |mount: &Mount, context: &str| {
                for chain in &mount.top() {
                    assert!(
                        !mount.path(chain).join("info/problem.txt").exists(),
                        "{context}: {}",
                        mount.text(Path::new(chain).join("info/problem.txt"))
                    );
                }
                // A base with the merged bytes shows those, or is not listed.
                let names = mount.names("web/snapshots");
                for name in &names {
                    let layer = name.strip_suffix(".raw").expect("a disk");
                    let shown = fs::read(mount.path("web/snapshots").join(name));
                    let shown = shown.unwrap_or_else(|error| panic!("{context}: {name}: {error}"));
                    let is_merged = command.contains(&format!("base={layer}")) && shown == before["sn3"];
                    let is_deleted =
                        command.starts_with("delete") && layer == "sn2" && shown == before["sn2"];
                    assert!(
                        shown == before[layer] || is_merged || is_deleted,
                        "{context}: {name} of {names:?}"
                    );
                }
                assert!(active(mount) == before["web"], "{context}: the disk");
            };
            judge(&mount, &context);
            mount.umount();
            let mount = Mount::new(&lab.store);
            judge(&mount, &format!("{context}, mounted again"));
            drop(immutable);
            mount.umount();
            let mount = Mount::new(&lab.store);
            settled(&lab, &mount, &context);
            judge(&mount, &format!("{context}, once it may"));
            if merged.is_some() {
                assert_snapshots(&mount, &before, merged, &context);
            }
            mount.umount();
            assert!(
                !lab.files().iter().any(|name| name.starts_with(".chainfs-")),
                "{context}: {:?}",
                lab.files()
            );
            lab.assert_clean();
        }
    }
}

/// An image that is being filled has no name yet; a foreign file in its place gets none, and stays.
#[test]
fn a_foreign_file_in_place_of_a_new_image_is_kept() {
    for is_cancelled in [false, true] {
        let lab = Lab::slow(false);
        lab.store.img(["snapshot", "-c", "inner", "sn3.qcow2"]);
        lab.store.speckle("sn3.qcow2", 64 << 20, 9);
        let mount = at_work(&lab, "clone new from=sn3@inner");
        let control = Control::of(&mount, "web");
        let is_draft = |name: &String| {
            name.starts_with(".chainfs-") && Path::new(name).extension().is_some_and(|end| end == "new")
        };
        let draft = mount::names_in(&lab.store.root()).into_iter().find(is_draft).expect("a draft");
        fs::remove_file(lab.store.path(&draft)).expect("the draft");
        let theirs = lab.store.put(&draft, b"somebody's");
        if is_cancelled {
            assert_eq!(control.give("cancel"), None);
        }
        let state = control.wait();
        assert_eq!(state, if is_cancelled { "cancelled" } else { "failed" }, "{}", control.status("error"));
        assert_eq!(fs::read(&theirs).expect("their file"), b"somebody's");
        assert!(!lab.store.path("new.qcow2").exists());
        mount.umount();
        let mount = Mount::new(&lab.store);
        Control::of(&mount, "web").done("snapshot monday");
        assert_eq!(fs::read(&theirs).expect("their file"), b"somebody's");
        mount.umount();
    }
}

/// All bytes of the store's own files.
fn bytes_of(lab: &Lab) -> Vec<(String, Vec<u8>)> {
    bytes_in(lab, &lab.store.root())
}

/// The same of a copy of the store.
fn bytes_in(lab: &Lab, root: &Path) -> Vec<(String, Vec<u8>)> {
    let read = |name: String| (name.clone(), fs::read(root.join(name)).expect("a file"));
    lab.files().into_iter().map(read).collect()
}

/// Puts an image into the place of another that holds as much at the same places, and other bytes.
fn replace_by_one_alike(lab: &Lab, name: &str) {
    let (old, new) = (lab.store.path(name), lab.store.path("alike.qcow2"));
    fs::copy(&old, &new).expect("a copy");
    let map = lab.store.img(["map", "--output=json", name]);
    let map: serde_json::Value = serde_json::from_str(&map).expect("JSON");
    let own = map.as_array().expect("a list").iter().filter(|run| run["depth"] == 0 && run["data"] == true);
    lab.store.io(
        "alike.qcow2",
        "qcow2",
        own.map(|run| format!("write -q -P 85 {} {}", run["start"], run["length"])),
    );
    fs::rename(&new, &old).expect("its name");
}

/// In a copied store only names and content identify files.
#[test]
fn in_a_copied_store_an_image_made_alike_is_neither_written_nor_removed() {
    let command = "commit top=sn3 base=base";
    for replaced in ["base.qcow2", "sn2.qcow2", "sn3.qcow2"] {
        let context = format!("{replaced} replaced");
        let (lab, ()) = interrupted(|| (Lab::slow(false), ()), command, kill);
        replace_by_one_alike(&lab, replaced);
        let copy = lab.store.beside("copy");
        tool("cp").args(["-a", "--sparse=always"]).args([&lab.store.root(), &copy]).succeeds();
        let before = bytes_in(&lab, &copy);
        let at = lab.store.beside("mount-of-copy");
        fs::create_dir(&at).expect("a directory");
        let mount = Mount::try_new(&lab.store, &copy, &at, "").expect("a mount of the copy");
        let fact = format!("{replaced} holds other bytes than it did");
        eventually("it says so", || mount.text(".chainfs/problems.txt").contains(&fact));
        mount.umount();
        assert!(bytes_in(&lab, &copy) == before, "{context}: something was written or removed");
    }
}

#[test]
fn a_data_file_that_was_replaced_keeps_a_command_from_going_on() {
    let commit: fn(&Lab) = |lab| {
        let words = [
            "convert",
            "-O",
            "qcow2",
            "-o",
            "data_file=base.data,cluster_size=4k",
            "base.qcow2",
            "new.qcow2",
        ];
        lab.store.img(words);
        fs::rename(lab.store.path("new.qcow2"), lab.store.path("base.qcow2")).expect("a name");
    };
    let pull: fn(&Lab) = |lab| {
        fs::remove_file(lab.store.path("web.qcow2")).expect("the top");
        lab.store.overlay("web.qcow2", "sn3.qcow2", "qcow2", "data_file=web.data,cluster_size=4k");
        lab.store.io("web.qcow2", "qcow2", ["write -q -P 77 1M 3M"]);
    };
    for (make, command, data) in
        [(commit, "commit top=sn3 base=base", "base.data"), (pull, "pull", "web.data")]
    {
        for same_bytes in [true, false] {
            // Without much time, each command with one of them.
            if amount(0, 1) == 0 && same_bytes != (command == "pull") {
                continue;
            }
            let context = format!("{command}, with the same bytes: {same_bytes}");
            let made = || {
                let lab = Lab::slow(false);
                make(&lab);
                let web = lab.content("web.qcow2");
                (lab, web)
            };
            let (lab, web) = interrupted(made, command, kill);
            let (data, kept) = (lab.store.path(data), lab.store.beside("kept.data"));
            fs::rename(&data, &kept).expect("put aside");
            if same_bytes {
                tool("cp").args(["--sparse=always"]).args([&kept, &data]).succeeds();
            } else {
                let len = fs::metadata(&kept).expect("its length").len();
                File::create(&data).and_then(|file| file.set_len(len)).expect("another file");
            }
            let before = bytes_of(&lab);
            let mount = Mount::new(&lab.store);
            let told = || mount.text(".chainfs/problems.txt");
            eventually("it says so", || told().contains("is another file than it was"));
            let hidden = if command == "pull" { "nothing" } else { "base.raw" };
            assert!(!mount.names("web/snapshots").contains(&hidden.to_owned()), "{context}");
            mount.umount();
            let recover =
                tool(chainfs_binary()).args(["recover", "--dry-run"]).arg(lab.store.root()).outcome();
            let said = format!("{}{}", recover.1, recover.2);
            assert!(said.contains("is another file than it was"), "{context}: {said}");
            assert_eq!(intents(&lab), 1, "{context}");
            assert!(bytes_of(&lab) == before, "{context}: something was written or removed");
            fs::rename(&kept, &data).expect("put back");
            let mount = Mount::new(&lab.store);
            settled(&lab, &mount, &context);
            assert!(active(&mount) == web, "{context}");
            mount.umount();
            assert!(lab.content("web.qcow2") == web, "{context}");
        }
    }
}
