//! Commands on chains of a real mount that are interrupted, stopped, or conflict: every view is right
//! afterwards, and each command is complete or has not happened. Needs root and loop devices.

use std::fs::{self, File};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use support::active::rw;
use support::block_guest::{BLOCK, BlockGuest as Guest, PLACE};
use support::command::Control;
use support::foreign::{Loop, Mounted, Qemu, amount};
use support::jobs::{Paused, assert_snapshots, at_work, contents, intents, interrupted, kill, settled, slow};
use support::lab::{Kind, Lab, extension};
use support::*;

/// QEMU finds nothing in an image but leaks, and clusters with a count of 1 and without a flag, which are
/// copied before they are written.
fn assert_sound(lab: &Lab, name: &str, context: &str) {
    let (code, out, err) = tool("qemu-img").args(["check", name]).current_dir(lab.store.root()).outcome();
    let errors = err.lines().filter(|line| line.starts_with("ERROR"));
    let is_flag = |line: &str| line.starts_with("ERROR OFLAG_COPIED") && line.contains("refcount=1");
    let is_sound =
        matches!(code, 0 | 3) || (code == 2 && errors.clone().count() > 0 && errors.clone().all(is_flag));
    assert!(is_sound, "{context}: {name}: {code}: {out}\n{}", errors.take(5).collect::<Vec<_>>().join("\n"));
}

#[test]
fn a_command_of_a_killed_daemon_resumes_at_the_next_mount() {
    let commands: [(&str, Option<(&str, &str)>); 13] = [
        ("commit top=sn2 base=base", Some(("sn2", "base"))),
        ("commit top=sn3 base=sn1", Some(("sn3", "sn1"))),
        ("commit", None),
        ("commit base=sn1", None),
        ("pull into=sn3 base=base", None),
        ("pull", None),
        ("delete sn2 method=pull", None),
        ("delete sn1 method=commit", None),
        ("delete sn3 method=commit", None),
        ("rebase base=sn1", None),
        ("rebase layer=sn3 base=none", None),
        ("clone new from=sn2@inner", None),
        ("delete sn2@inner", None),
    ];
    let rounds = amount(9, 200);
    let mut met = 0;
    for round in 0..rounds {
        let mut rng = Rng::new(round * 7 + 1);
        // Every other time a snapshot comes first, and may be the interrupted command.
        let (command, merged) = commands[round as usize % commands.len()];
        let raw_base = round % 4 >= 2;
        let inner: &[&str] = if command.contains('@') { &["sn2"] } else { &[] };
        let kind = Kind { raw_base, options: "cluster_size=512", sizes: [8 << 20; 5], inner };
        // The first one is certainly interrupted while running: its chain takes long.
        let is_slow = round == 0;
        let lab = if is_slow { Lab::slow(raw_base) } else { Lab::new(kind) };
        let mut before = contents(&lab);
        if !inner.is_empty() {
            before.insert("sn2@inner".to_owned(), lab.content("sn2.qcow2@inner"));
        }
        let mount = Mount::new(&lab.store);
        let active = mount.path("web/active.raw");
        let mut guest = Guest::new(&active, 64);
        let context = format!("round {round}, {command}, raw base {raw_base}");
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let disk = rw(&active);
            let (guest, stop) = (&mut guest, &stop);
            let writing = scope.spawn(move || guest.work(&disk, round, stop));
            let control = Control::of(&mount, "web");
            let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process");
            let giving = scope.spawn(move || {
                if round % 3 == 2 {
                    // The daemon may be unable to answer.
                    let _ = control.give("snapshot monday");
                }
                let _ = control.give(command);
            });
            let is_waiting = round % 2 == 0;
            if is_slow {
                Control::of(&mount, "web").begun();
            } else {
                while is_waiting && intents(&lab) == 0 && !giving.is_finished() {
                    thread::sleep(Duration::from_micros(100));
                }
                thread::sleep(Duration::from_micros(rng.below(if is_waiting { 3_000 } else { 60_000 })));
            }
            kill_process(daemon, Signal::KILL).expect("the daemon is ours");
            giving.join().expect("a command");
            writing.join().expect("a writer");
            stop.store(true, Ordering::Relaxed);
        });
        mount.abandon();
        met += intents(&lab);
        let mount = Mount::new(&lab.store);
        settled(&lab, &mount, &context);
        assert_snapshots(&mount, &before, merged, &context);
        guest.assert_there(&mount.path("web/active.raw"), &context);
        // The rest of the disk is unchanged.
        let shown = fs::read(mount.path("web/active.raw")).expect("the disk");
        let (from, to) = (PLACE as usize, (PLACE + 64 * BLOCK) as usize);
        assert!(shown[..from] == before["web"][..from] && shown[to..] == before["web"][to..], "{context}");
        mount.umount();
        for name in lab.files().iter().filter(|name| extension(name) == "qcow2") {
            assert_sound(&lab, name, &context);
        }
        let names = mount::names_in(&lab.store.root());
        assert!(names.iter().all(|name| extension(name) != "new"), "{context}: {names:?}");
    }
    println!("{met} of {rounds} rounds were cut off in the midst of a command");
    assert!(met > 0, "no command was met at work");
}

/// The commands that need the disk closed.
#[test]
fn a_daemon_killed_during_a_revert_leaves_the_old_disk_or_the_new() {
    let commands = [
        "revert to=sn1",
        "revert to=sn2 save=kept",
        "revert to=active@inner",
        "revert to=active@inner save=then",
        "revert to=sn2@inner discard-internal",
        "resize 3M shrink",
        "rebase base=sn2 unsafe drop-layers",
    ];
    for round in 0..amount(6, 200) {
        let command = commands[round as usize % commands.len()];
        let kind =
            Kind { options: "cluster_size=512", sizes: [8 << 20; 5], inner: &["sn2", "web"], ..Kind::PLAIN };
        let lab = Lab::new(kind);
        let mut before = contents(&lab);
        for inner in ["sn2", "web"] {
            before.insert(format!("{inner}@inner"), lab.content(&format!("{inner}.qcow2@inner")));
        }
        before.insert("kept".to_owned(), before["web"].clone());
        // The allowed states of the disk afterwards.
        let unsafely = if command.contains("unsafe") {
            let twin = Lab::new(kind);
            twin.store.img(["rebase", "-u", "-b", "sn2.qcow2", "-F", "qcow2", "web.qcow2"]);
            twin.content("web.qcow2")
        } else {
            Vec::new()
        };
        let after: &[u8] = match command {
            "revert to=sn1" => &before["sn1"],
            "revert to=sn2 save=kept" => &before["sn2"],
            "revert to=sn2@inner discard-internal" => &before["sn2@inner"],
            "resize 3M shrink" => &before["web"][..3 << 20],
            "rebase base=sn2 unsafe drop-layers" => &unsafely,
            _ => &before["web@inner"],
        };
        let mount = Mount::new(&lab.store);
        let context = format!("round {round}, {command}");
        let control = Control::of(&mount, "web");
        let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process");
        thread::scope(|scope| {
            let giving = scope.spawn(|| control.give(command));
            thread::sleep(Duration::from_micros(Rng::new(round * 11 + 3).below(40_000)));
            kill_process(daemon, Signal::KILL).expect("the daemon is ours");
            // The daemon may be unable to answer.
            let _ = giving.join().expect("a command");
        });
        mount.abandon();
        let mount = Mount::new(&lab.store);
        settled(&lab, &mount, &context);
        assert_snapshots(&mount, &before, None, &context);
        let shown = fs::read(mount.path("web/active.raw")).expect("the disk");
        assert!(shown == before["web"] || shown == after, "{context}: neither the old disk nor the new one");
        mount.umount();
        for name in lab.files().iter().filter(|name| extension(name) == "qcow2") {
            assert_sound(&lab, name, &context);
        }
    }
}

#[test]
fn unfinished_files_of_a_killed_daemon_are_removed_at_the_next_mount() {
    let lab = Lab::new(Kind::PLAIN);
    let mount = Mount::new(&lab.store);
    Control::of(&mount, "web").done("snapshot monday");
    mount.umount();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock").as_nanos();
    let (draft, hour) =
        (|when: u128, number| format!(".chainfs-{when:x}-4711-0-{number}.new"), 3_600_000_000_000);
    let begun = b"QFI\xfb\0\0\0\x03";
    let intent = format!(".chainfs/intents/{now:x}-4711-0.new");
    let drafts =
        [(draft(now, 0), &b""[..]), (draft(now, 1), begun), (draft(now, 2), &[0; 4096]), (intent, b"half")];
    let left = drafts.map(|(name, bytes)| lab.store.put(name, bytes));
    // Similar names, and foreign files with other content or of other types.
    let names = [".chainfs-notes", "mine.new", ".chainfs.new", ".chainfs-notes.new", ".chainfs-1-2-3-0.new"];
    let own = [".chainfs/mine.new", ".chainfs/intents/mine.new", ".chainfs/intents/1.new"];
    let mut kept: Vec<PathBuf> =
        names.iter().chain(&own).map(|name| lab.store.put(name, b"theirs")).collect();
    kept.push(lab.store.put(draft(now, 3), b"somebody's"));
    kept.push(lab.store.put(draft(now - hour, 4), begun));
    kept.push(lab.store.put(draft(now + hour, 5), begun));
    kept.push(lab.store.put(draft(now, 6), begun));
    fs::hard_link(lab.store.path(draft(now, 6)), lab.store.path("another-name")).expect("a link");
    kept.push(lab.store.dir(&draft(now, 7)));
    let mount = Mount::new(&lab.store);
    eventually("nothing is left", || left.iter().all(|path| !path.exists()));
    // A second sweep finds nothing more to remove.
    Control::of(&mount, "web").done("snapshot tuesday");
    let gone: Vec<_> = kept.iter().filter(|path| !path.exists()).collect();
    assert!(gone.is_empty(), "only what chainfs makes itself goes: {gone:?}");
    mount.umount();
}

#[test]
fn an_unmount_during_a_job_leaves_it_to_the_next_mount() {
    for (command, merged) in [("commit top=sn3 base=base", Some(("sn3", "base"))), ("pull", None)] {
        // Each of them in one of the ways, or in both.
        let ways = [merged.is_none(), merged.is_some()];
        for by_signal in &ways[..amount(1, 2) as usize] {
            let by_signal = *by_signal;
            let context = format!("{command}, by signal {by_signal}");
            let unmount = |mount: Mount| {
                if by_signal {
                    let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process");
                    kill_process(daemon, Signal::TERM).expect("the daemon is ours");
                    eventually("it ends", || mount::daemon_of(mount.dir()).is_none());
                    drop(mount);
                } else {
                    mount.umount();
                }
            };
            let (lab, before) = interrupted(|| slow(!by_signal), command, unmount);
            // A read-only mount does not resume it, and shows no invalidated view.
            let mount = Mount::with(&lab.store, "ro");
            assert_snapshots(&mount, &before, None, &context);
            assert!(fs::read(mount.path("web/active.raw")).expect("the disk") == before["web"], "{context}");
            assert_eq!(intents(&lab), 1, "{context}");
            mount.umount();
            let mount = Mount::new(&lab.store);
            settled(&lab, &mount, &context);
            assert_eq!(Control::of(&mount, "web").status("command"), command, "{context}");
            assert_snapshots(&mount, &before, merged, &context);
            assert!(fs::read(mount.path("web/active.raw")).expect("the disk") == before["web"], "{context}");
            mount.umount();
            lab.assert_clean();
        }
    }
}

#[test]
fn layers_locked_by_qemu_are_refused_and_the_holder_named() {
    let lab = Lab::new(Kind::PLAIN);
    let before = contents(&lab);
    let mount = Mount::new(&lab.store);
    let control = Control::of(&mount, "web");
    for (held, read_only, command) in [
        ("base.qcow2", true, "commit top=sn2 base=base"),
        ("sn1.qcow2", true, "commit top=sn2 base=sn1"),
        ("web.qcow2", false, "commit"),
        ("web.qcow2", false, "pull"),
        ("web.qcow2", false, "snapshot monday"),
        ("sn3.qcow2", true, "pull into=sn3 base=base"),
        ("web.qcow2", false, "commit top=sn2 base=sn1"),
    ] {
        let files = lab.files();
        let holder = Qemu::running_on(&lab.store, held, if read_only { &["--read-only"] } else { &[] });
        let who = format!("qemu-nbd[{}]", holder.pid());
        // A process that has opened it within the last moments is found, and may not be named yet.
        let names_it = || control.refused(command, Errno::BUSY).contains(&who);
        eventually(&format!("{held}: {command} is refused, and {who} named"), names_it);
        assert_eq!((lab.files(), intents(&lab)), (files, 0), "{held}: {command}");
        holder.shut_down();
    }
    assert_snapshots(&mount, &before, None, "refused");
    for command in ["snapshot monday", "commit top=sn2 base=sn1", "commit", "pull"] {
        control.done(command);
    }
    assert!(fs::read(mount.path("web/active.raw")).expect("the disk") == before["web"]);
    mount.umount();
    lab.assert_clean();
}

#[test]
// J1
fn two_daemons_never_change_one_chain_at_once() {
    let (lab, before) = slow(false);
    let second = lab.store.beside("second");
    fs::create_dir(&second).expect("a directory");
    let other = Mount::try_new(&lab.store, &lab.store.root(), &second, "").expect("a second mount");
    let theirs = Control::of(&other, "web");
    let mount = at_work(&lab, "pull");
    let paused = Paused::at_work(&lab, &mount);
    for command in ["commit", "pull", "snapshot monday", "commit top=sn2 base=sn1"] {
        let sentence = theirs.refused(command, Errno::BUSY);
        assert!(!sentence.is_empty(), "{command}");
    }
    // The command line with a store of its own is one more.
    let web = lab.store.path("web.qcow2");
    for command in ["commit", "pull"] {
        let (code, _, err) = tool(chainfs_binary())
            .args([command, "--store"])
            .arg(lab.store.root())
            .arg(&web)
            .env("XDG_CONFIG_HOME", lab.store.beside("config"))
            .outcome();
        assert!(code != 0 && !err.is_empty(), "{command}: {code} {err}");
    }
    drop(paused);
    let ours = Control::of(&mount, "web");
    assert_eq!(ours.wait(), "done", "{}", ours.status("error"));
    // Now QEMU has it, and then the mount again.
    eventually("the second has noticed", || theirs.give("snapshot monday").is_none());
    eventually("the first has noticed", || mount.names("web/snapshots").contains(&"monday.raw".to_owned()));
    eventually("the first may", || ours.give("commit").is_none());
    assert_eq!(ours.wait(), "done", "{}", ours.status("error"));
    for mount in [&mount, &other] {
        eventually("both show the same", || {
            fs::read(mount.path("web/active.raw")).is_ok_and(|bytes| bytes == before["web"])
        });
        assert_snapshots(mount, &before, None, "two");
    }
    other.umount();
    mount.umount();
    lab.assert_clean();
}

/// A file system of this size where the store of a lab is about to be.
fn small(store: &Store, size: u64) -> (Mounted, Loop) {
    let file = store.beside("small.img");
    File::create(&file).and_then(|file| file.set_len(size)).expect("a file");
    tool("mke2fs").args(["-q", "-F", "-t", "ext4", "-m", "0", "-O", "^has_journal"]).arg(&file).succeeds();
    let device = Loop::new(&file);
    let mounted = Mounted::new(&device.0, store.root());
    let _ = fs::remove_dir(store.path("lost+found"));
    (mounted, device)
}

#[test]
fn lack_of_space_is_refused_or_fails_without_leftovers() {
    let store = Store::new();
    let (mounted, device) = small(&store, 64 << 20);
    store.create("base.qcow2", 48 << 20, "");
    for (name, below) in [("sn1", "base"), ("sn2", "sn1"), ("web", "sn2")] {
        store.overlay(&format!("{name}.qcow2"), &format!("{below}.qcow2"), "qcow2", "");
        store.io(&format!("{name}.qcow2"), "qcow2", [format!("write -q -P {} 0 10M", name.len())]);
    }
    let views = ["base.qcow2", "sn1.qcow2", "sn2.qcow2", "web.qcow2"];
    let all = || views.map(|view| fs::read(store.oracle(view, "qcow2")).expect("what QEMU reads"));
    let before = all();
    let mount = Mount::new(&store);
    let control = Control::of(&mount, "web");
    let full = |left: u64| {
        let file = File::create(store.path("ballast")).expect("a file");
        let free =
            rustix::fs::statvfs(store.root()).map(|stat| stat.f_bavail * stat.f_frsize).expect("statvfs");
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, free - left).expect("room");
    };
    full(2 << 20);
    for command in ["commit top=sn2 base=base", "commit base=base"] {
        let sentence = control.refused(command, Errno::NOSPC);
        assert!(sentence.contains("base.qcow2") && sentence.contains("free"), "{sentence}");
    }
    // There is room when it begins, and none later: a guest fills it.
    fs::remove_file(store.path("ballast")).expect("a file");
    full(1 << 20);
    assert_eq!(control.give("snapshot monday"), None, "{}", control.status("error"));
    control.done("commit");
    fs::remove_file(store.path("ballast")).expect("a file");
    full(64 << 10);
    for command in ["snapshot tuesday", "commit top=sn1", "pull base=sn1"] {
        let refused = control.give(command);
        let failed = refused == Some(Errno::NOSPC) || refused.is_none() && control.wait() == "failed";
        assert!(failed, "{command}: {refused:?} {} {}", control.status("state"), control.status("error"));
    }
    let names = names_of(&store);
    assert_eq!(names, ["ballast", "base.qcow2", "sn1.qcow2", "sn2.qcow2", "web.qcow2"]);
    assert!(fs::read_dir(store.path(".chainfs/intents")).expect("a directory").next().is_none());
    assert_eq!(mount.names("web/snapshots"), ["base.raw", "sn1.raw", "sn2.raw"]);
    fs::remove_file(store.path("ballast")).expect("a file");
    let (views_now, files) = (all(), views);
    assert!(views_now == before, "a view has changed");
    for name in files {
        store.img(["check", "-q", "-U", name]);
    }
    control.done("commit top=sn2 base=base");
    mount.umount();
    assert!(fs::read(store.oracle("web.qcow2", "qcow2")).expect("what QEMU reads") == before[3]);
    mounted.umount();
    device.detach();
}

fn names_of(store: &Store) -> Vec<String> {
    let mut names = mount::names_in(&store.root());
    names.retain(|name| !name.starts_with(".chainfs"));
    names
}

/// Commits into raw bases cannot be rolled back.
#[test]
fn a_read_only_mount_hides_views_of_an_interrupted_commit() {
    let (lab, before) = interrupted(|| slow(true), "commit top=sn2 base=base", kill);
    let mount = Mount::with(&lab.store, "ro");
    let names = mount.names("web/snapshots");
    assert_eq!(names, ["sn2.raw", "sn3.raw"]);
    assert_snapshots(&mount, &before, None, "read-only");
    let refused = fs::read(mount.path("web/snapshots/base.raw"));
    assert!(refused.is_err(), "what is spoilt can be read");
    mount.umount();
    let files: Vec<PathBuf> = lab.files().iter().map(|name| lab.store.path(name)).collect();
    assert_eq!(files.len(), 5, "nothing has gone: {files:?}");
    let mount = Mount::new(&lab.store);
    settled(&lab, &mount, "taken up");
    assert_snapshots(&mount, &before, Some(("sn2", "base")), "taken up");
    assert_eq!(mount.names("web/snapshots"), ["base.raw", "sn3.raw"]);
    mount.umount();
    lab.assert_clean();
}
