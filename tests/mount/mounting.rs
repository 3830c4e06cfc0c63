//! Mounting and unmounting as users, mount(8), fstab and scripts do it, and the tree's own files.

use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use support::mount::{connection_of, daemon_of, unmounting};
use support::*;

fn send(signal: Signal, pid: u32) {
    let pid = Pid::from_raw(pid.cast_signed()).expect("a process number");
    kill_process(pid, signal).expect("a process");
}

fn errno<T>(result: std::io::Result<T>) -> Option<Errno> {
    result.err().map(|e| Errno::from_io_error(&e).unwrap_or_else(|| panic!("{e} has no errno")))
}

fn chainfs(args: &[&str]) -> Command {
    let mut command = tool(chainfs_binary());
    command.args(args);
    command
}

// ---- coming and going ---------------------------------------------------------------------------

#[test]
fn the_tree_can_be_used_when_the_command_returns() {
    let store = small_chain();
    for _ in 0..10 {
        let mount = Mount::new(&store);
        assert_eq!(fs::metadata(mount.path("web/active.raw")).expect("no waiting").len(), 2 * MIB);
        mount.umount();
    }
}

/// `$(chainfs mount …)` in a script must not wait for the daemon's end.
#[test]
fn the_daemon_keeps_no_descriptor_and_no_directory_of_its_caller() {
    let store = small_chain();
    let cwd = store.beside("cwd");
    fs::create_dir(&cwd).expect("a directory");
    let mut command = tool(chainfs_binary());
    command.arg("mount").arg(store.root()).arg(store.beside("mnt")).current_dir(&cwd);
    // Reads both pipes to their end.
    command.succeeds();
    let daemon = daemon_of(&store.beside("mnt")).expect("a daemon");
    let its_cwd = fs::read_link(format!("/proc/{daemon}/cwd")).expect("a directory");
    assert_ne!(its_cwd, cwd, "the daemon would keep a file system busy");
    assert!(unmounting(chainfs(&["umount"]).arg(store.beside("mnt"))).status.success());
}

#[test]
fn relative_paths_mean_what_they_mean_to_the_caller() {
    let store = small_chain();
    tool(chainfs_binary()).args(["mount", "store", "./mnt"]).current_dir(store.beside("")).succeeds();
    assert_same(&store.beside("mnt/web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    let unmounted = unmounting(tool(chainfs_binary()).args(["umount", "mnt"]).current_dir(store.beside("")));
    assert!(unmounted.status.success(), "{unmounted:?}");
    assert_eq!(connection_of(&store.beside("mnt")), None);
}

#[test]
fn umount_returns_when_the_daemon_is_gone() {
    let store = small_chain();
    for _ in 0..5 {
        let mount = Mount::new(&store);
        let daemon = mount.daemon();
        drop(fs::read(mount.path("web/active.raw")).expect("a view"));
        mount.umount();
        assert!(!Path::new(&format!("/proc/{daemon}/fd/0")).exists(), "process {daemon} is still there");
        assert_eq!(connection_of(&store.beside("mnt")), None);
    }
}

#[test]
fn umount_8_ends_the_daemon_as_well() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let daemon = mount.daemon();
    tool("umount").arg(mount.dir()).succeeds();
    eventually("the daemon ends", || !alive(daemon));
}

/// Zombies are no longer alive.
fn alive(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|s| !s.contains(") Z "))
}

#[test]
fn in_the_foreground_the_command_lives_as_long_as_the_mount() {
    let store = small_chain();
    for signal in [Signal::TERM, Signal::INT] {
        let mut mount = Mount::foreground(&store, Command::new(chainfs_binary()), "");
        assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
        assert_eq!(mount.exit_code(), None);
        send(signal, mount.daemon());
        eventually("the command ends", || mount.exit_code().is_some());
        assert_eq!(mount.exit_code(), Some(0), "{signal:?} is an orderly end");
        assert_eq!(connection_of(mount.dir()), None, "{signal:?} leaves no mount");
        let said = fs::read(store.beside("mount.output")).expect("its output");
        assert!(!said.contains(&0x1b), "colours in a file: {}", String::from_utf8_lossy(&said));
    }
}

#[test]
fn sigterm_and_sigint_unmount_cleanly() {
    let store = small_chain();
    for signal in [Signal::TERM, Signal::INT] {
        let mount = Mount::new(&store);
        let daemon = mount.daemon();
        send(signal, daemon);
        eventually("the daemon ends", || !alive(daemon));
        assert_eq!(connection_of(mount.dir()), None, "{signal:?} leaves no mount");
        assert_eq!(fs::read_dir(mount.dir()).expect("a free directory").count(), 0);
        drop(mount);
    }
}

#[test]
fn a_mount_whose_daemon_was_killed_is_replaced_by_the_next() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let _reader = File::open(mount.path("web/active.raw")).expect("a view");
    send(Signal::KILL, mount.daemon());
    eventually("the mount is stale", || errno(fs::metadata(mount.path("web"))) == Some(Errno::NOTCONN));
    let again = Mount::new(&store);
    assert_same(&again.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    again.umount();
    drop(mount);
}

#[test]
fn a_second_mount_on_the_same_directory_is_refused_and_harms_nothing() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let mut second = chainfs(&["mount"]);
    let (code, _, err) = second.arg(store.root()).arg(mount.dir()).outcome();
    assert_eq!(code, 32, "{err}");
    assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    mount.umount();
}

#[test]
fn a_store_may_be_mounted_twice_elsewhere() {
    let store = small_chain();
    let other = store.beside("other");
    fs::create_dir(&other).expect("a directory");
    let first = Mount::new(&store);
    let second = Mount::try_new(&store, &store.root(), &other, "").expect("a second mount");
    let oracle = store.oracle("web.qcow2", "qcow2");
    let readers = (File::open(first.path("web/active.raw")), File::open(second.path("web/active.raw")));
    assert_same(&first.path("web/active.raw"), &oracle);
    assert_same(&second.path("web/active.raw"), &oracle);
    drop(readers);
    first.umount();
    assert_same(&second.path("web/active.raw"), &oracle);
    second.umount();
}

#[test]
fn a_busy_mount_names_its_users_and_stays_unless_lazy() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let view = File::open(mount.path("web/active.raw")).expect("a view");
    let mut reader = Command::new("sleep").arg("1000").stdin(view).spawn().expect("sleep starts");
    let (code, _, err) = chainfs(&["umount"]).arg(mount.dir()).outcome();
    let named = err.contains(&reader.id().to_string());
    let serves = fs::metadata(mount.path("web/active.raw")).is_ok();
    let daemon = mount.daemon();
    let (lazy, _, lazy_err) = chainfs(&["umount", "--lazy"]).arg(mount.dir()).outcome();
    let free = connection_of(mount.dir()).is_none();
    let still_read = alive(daemon);
    reader.kill().and_then(|()| reader.wait()).expect("a child of ours");
    assert_eq!(code, 1, "{err}");
    assert!(named, "the message names {}: {err}", reader.id());
    assert!(serves, "a refused umount changes nothing");
    assert_eq!(lazy, 0, "{lazy_err}");
    assert!(free && still_read, "out of the tree at once ({free}), served to its readers ({still_read})");
    eventually("the last reader is gone and so is the daemon", || !alive(daemon));
}

#[test]
fn a_mount_point_inside_the_store_is_not_scanned() {
    let store = small_chain();
    let inside = store.dir("mnt");
    let mount = Mount::try_new(&store, &store.root(), &inside, "rescan=1").expect("a mount inside its store");
    assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    // A search for new images must not scan the mount itself.
    store.create("later.qcow2", MIB, "");
    eventually("a new image", || mount.path("later/active.raw").exists());
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(mount.top(), ["later", "web"]);
    assert_eq!(mount.text(".chainfs/problems.txt"), "");
    mount.umount();
}

#[test]
fn a_single_image_is_a_chains_directory() {
    let store = Store::new();
    store.dir("low");
    store.raw("low/base.raw", MIB, 4);
    store.overlay("web.qcow2", "low/base.raw", "raw", "");
    store.scribble("web.qcow2", "qcow2", 5);
    store.create("unrelated.qcow2", MIB, "");
    let mount = Mount::try_new(&store, &store.path("web.qcow2"), &store.beside("mnt"), "").expect("a mount");
    assert_chain(&store, &mount, ".", "web.qcow2", "qcow2");
    let names = mount.top();
    for name in ["active.raw", "snapshots", "info"] {
        assert!(names.contains(&name.to_owned()), "{name} in {names:?}");
    }
    assert!(!names.contains(&"unrelated".to_owned()), "{names:?}");
    mount.umount();
}

#[test]
fn backing_files_of_a_single_image_may_be_elsewhere_if_the_user_says_so() {
    let store = Store::new();
    let elsewhere = store.beside("elsewhere");
    fs::create_dir(&elsewhere).expect("a directory");
    store.raw("base.raw", MIB, 6);
    fs::rename(store.path("base.raw"), elsewhere.join("base.raw")).expect("a move");
    let backing = elsewhere.join("base.raw");
    store.overlay("web.qcow2", backing.to_str().expect("a plain path"), "raw", "");
    store.scribble("web.qcow2", "qcow2", 7);
    let image = store.path("web.qcow2");
    let mount = Mount::try_new(&store, &image, &store.beside("mnt"), "").expect("a mount");
    assert!(fs::read(mount.path("active.raw")).is_err(), "the base is outside");
    assert!(mount.text("info/problem.txt").contains("base.raw"));
    mount.umount();
    let option = format!("backing_dir={}", elsewhere.display());
    for source in [&image, &store.root()] {
        let mount = Mount::try_new(&store, source, &store.beside("mnt"), &option).expect("a mount");
        let chain = if source == &image { "." } else { "web" };
        assert_chain(&store, &mount, chain, "web.qcow2", "qcow2");
        mount.umount();
    }
    // An absolute name of another machine, translated.
    store.img(["rebase", "-u", "-b", "/srv/elsewhere/base.raw", "-F", "raw", "web.qcow2"]);
    let option = format!("backing_dir={0},map=/srv/elsewhere={0}", elsewhere.display());
    let mount = Mount::with(&store, &option);
    store.img(["rebase", "-u", "-b", backing.to_str().expect("a plain path"), "-F", "raw", "web.qcow2"]);
    let oracle = store.oracle("web.qcow2", "qcow2");
    assert_same(&mount.path("web/active.raw"), &oracle);
    mount.umount();
}

// ---- options and exit codes ---------------------------------------------------------------------

#[test]
fn mountinfo_shows_the_type_and_the_store_as_source() {
    let store = small_chain();
    let mount = Mount::with(&store, "ro");
    let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
    let line = mounts.lines().find(|l| l.split(' ').nth(1) == mount.dir().to_str()).expect("our mount");
    let fields: Vec<&str> = line.split(' ').collect();
    assert_eq!((Some(fields[0]), fields[2]), (store.root().to_str(), "fuse.chainfs"));
    let options: Vec<&str> = fields[3].split(',').collect();
    for option in ["ro", "nosuid", "nodev"] {
        assert!(options.contains(&option), "{option} in {options:?}");
    }
    mount.umount();
}

#[test]
fn exit_codes_are_mount_8s() {
    let store = small_chain();
    let (root, dir) = (store.root(), store.beside("mnt"));
    let refused = |source: &Path, dir: &Path, options: &str| {
        Mount::try_new(&store, source, dir, options).err().expect("a refusal")
    };
    let file = store.put("plain.txt", b"x");
    for (source, dir, what) in [
        (store.beside("absent"), dir.clone(), "absent"),
        (root.clone(), store.beside("nowhere"), "nowhere"),
        (root.clone(), file.clone(), "plain.txt"),
        (PathBuf::from("/dev/null"), dir.clone(), "null"),
    ] {
        let refusal = refused(&source, &dir, "");
        assert_eq!(refusal.code, Some(32), "{what}: {refusal:?}");
        assert!(refusal.message.contains(what), "{refusal:?}");
    }
    for options in
        ["nonsense", "threads=many", "uid=-5x", "cache=lots", "format=*.img", "format=*.img:vmdk", "map=/a"]
    {
        let refusal = refused(&root, &dir, options);
        assert_eq!(refusal.code, Some(1), "{options}: {refusal:?}");
        let word = options.split('=').next().expect("a word");
        assert!(refusal.message.contains(word), "{refusal:?}");
    }
    for args in [&["mount"][..], &["mount", "onlyone"], &["mount", "--bogus", "a", "b"]] {
        assert_eq!(chainfs(args).outcome().0, 1, "{args:?}");
    }
    for args in [&[][..], &["frobnicate"], &["umount"], &["map"], &["tree", "--bogus"]] {
        assert_eq!(chainfs(args).outcome().0, 2, "{args:?}");
    }
    assert_eq!(chainfs(&["umount"]).arg(&dir).outcome().0, 1, "nothing is mounted there");
    assert_eq!(chainfs(&["--version"]).outcome().0, 0);
    assert_eq!(chainfs(&["help"]).outcome().0, 0);
}

#[test]
fn options_that_mount_8_passes_on_are_accepted() {
    let store = small_chain();
    for options in [
        "rw",
        "ro,nosuid,nodev,noexec,_netdev,nofail,user",
        "defaults,noauto,x-systemd.automount,x-systemd.idle-timeout=10min,X-mount.mkdir,comment=mine",
        "noatime,relatime,nodiratime,lazytime,auto,users,owner,group,exec",
        "threads=2,cache=64M,rescan=30,nofiles,symlinks=inside,probe,force_share",
        "threads=1,cache=1G,symlinks=verbatim",
    ] {
        let mount = Mount::with(&store, options);
        assert!(mount.path("web/active.raw").exists(), "{options}");
        mount.umount();
    }
}

#[test]
fn options_come_from_the_configuration_and_the_command_line_wins() {
    let store = small_chain();
    fs::create_dir(store.beside("config/chainfs")).expect("a directory");
    let config = store.beside("config/chainfs/config.toml");
    fs::write(&config, "uid = 1234\numask = \"077\"\n").expect("a file");
    let mount = Mount::new(&store);
    let shown = fs::metadata(mount.path("web/active.raw")).expect("a view");
    assert_eq!((shown.uid(), shown.mode() & 0o077), (1234, 0));
    mount.umount();
    let mount = Mount::with(&store, "uid=4321");
    assert_eq!(fs::metadata(mount.path("web/active.raw")).expect("a view").uid(), 4321);
    mount.umount();
    fs::write(&config, "uid = \"no toml").expect("a file");
    let refusal = Mount::try_new(&store, &store.root(), &store.beside("mnt"), "").err().expect("a refusal");
    assert!(refusal.message.contains("config.toml"), "{refusal:?}");
}

#[test]
fn reporting_commands_exit_as_qemu_imgs_do() {
    let store = small_chain();
    let code = |args: &[&str]| tool(chainfs_binary()).args(args).current_dir(store.root()).outcome();
    store.img(["convert", "-f", "qcow2", "-O", "qcow2", "web.qcow2", "same.qcow2"]);
    store.create("leaky.qcow2", MIB, "");
    store.create("corrupt.qcow2", MIB, "");
    for name in ["leaky.qcow2", "corrupt.qcow2"] {
        store.io(name, "qcow2", [store.write(&mut Rng::new(8), 0, MIB)]);
        let image = Damage::to(store.path(name));
        let entry = image.l2_entry_at(3 << 16);
        if name == "leaky.qcow2" {
            image.put_u64(entry, 0);
        } else {
            image.put_u64(entry, image.u64(image.l2_entry_at(0)));
        }
    }
    store.put("nonsense.qcow2", b"no image");
    for (image, expected) in [
        ("web.qcow2", 0),
        ("base.raw", 63),
        ("leaky.qcow2", 3),
        ("corrupt.qcow2", 2),
        ("nonsense.qcow2", 1),
        ("absent.qcow2", 1),
    ] {
        let (have, out, err) = code(&["check", image]);
        assert_eq!(have, expected, "check {image}\n{out}{err}");
    }
    for (one, other, expected) in [
        ("web.qcow2", "same.qcow2", 0),
        ("web.qcow2", "mid.qcow2", 1),
        ("web.qcow2", "leaky.qcow2", 1),
        ("web.qcow2", "absent.qcow2", 2),
        ("web.qcow2", "nonsense.qcow2", 2),
    ] {
        for verb in ["compare", "diff"] {
            let (have, out, err) = code(&[verb, one, other]);
            assert_eq!(have, expected, "{verb} {one} {other}\n{out}{err}");
        }
    }
    for verb in ["info", "map"] {
        assert_eq!(code(&[verb, "web.qcow2"]).0, 0);
        let (have, _, err) = code(&[verb, "absent.qcow2"]);
        assert_eq!(have, 1, "{verb}");
        assert!(err.contains("absent.qcow2"), "{err}");
    }
    assert_eq!(code(&["tree", "."]).0, 0);
}

#[test]
fn commands_understand_places_inside_a_mount() {
    let store = small_chain();
    let mount = Mount::new(&store);
    let web = mount.path("web");
    for verb in ["tree", "info", "map"] {
        let (code, out, err) = chainfs(&[verb]).arg(&web).outcome();
        assert_eq!(code, 0, "{verb}: {err}");
        assert!(!out.is_empty(), "{verb}");
    }
    let same = chainfs(&["compare"]).arg(web.join("active.raw")).arg(store.path("web.qcow2")).outcome();
    assert_eq!(same.0, 0, "{same:?}");
    let differs =
        chainfs(&["compare"]).arg(web.join("active.raw")).arg(web.join("snapshots/base.raw")).outcome();
    assert_eq!(differs.0, 1, "{differs:?}");
    mount.umount();
}

#[test]
fn info_in_json_uses_qemus_keys() {
    let store = small_chain();
    let theirs = store.info("web.qcow2", "qcow2");
    let text = chainfs(&["info", "--output", "json"]).arg(store.path("web.qcow2")).succeeds();
    let ours: serde_json::Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    let ours = if ours.is_array() { ours[0].clone() } else { ours };
    for key in [
        "virtual-size",
        "actual-size",
        "format",
        "cluster-size",
        "backing-filename",
        "backing-filename-format",
    ] {
        assert_eq!(ours.get(key), theirs.get(key), "{key}");
    }
    assert_eq!(ours["full-backing-filename"].as_str().map(|f| f.ends_with("mid.qcow2")), Some(true));
}

#[test]
fn an_ordinary_user_mounts_by_fusermount3_and_is_refused_what_only_root_may() {
    let store = small_chain();
    let oracle = store.oracle("web.qcow2", "qcow2");
    // All files that the user needs, readable by all users; /dev/fuse as udev would make it.
    let bin = store.beside("bin");
    fs::create_dir(&bin).expect("a directory");
    fs::copy(chainfs_binary(), bin.join("chainfs")).expect("a copy of the binary");
    for dir in [store.beside(""), store.beside("oracle"), bin] {
        fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).expect("permissions");
    }
    for file in [oracle.clone(), store.beside("bin/chainfs")] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).expect("permissions");
    }
    chown(store.beside("mnt"), Some(65534), Some(65534)).expect("an owner");
    let script = r#"
        set -e
        cd "$HOME"
        bin/chainfs mount store mnt
        grep " $HOME/mnt fuse.chainfs " /proc/self/mounts
        cmp mnt/web/active.raw "$ORACLE"
        cmp store/base.raw mnt/web/snapshots/base.raw
        bin/chainfs umount mnt
        ! grep " $HOME/mnt fuse.chainfs " /proc/self/mounts
        bin/chainfs mount -o allow_other store mnt 2> refused && exit 7
        test $? = 32 || test $? = 0
        grep user_allow_other refused
        echo all well
    "#;
    let outer = r#"
        set -e
        mknod "$HOME/fuse" c 10 229
        chmod 666 "$HOME/fuse"
        mount --bind "$HOME/fuse" /dev/fuse
        touch "$HOME/refused"
        chmod 666 "$HOME/refused"
        exec setpriv --reuid=65534 --regid=65534 --clear-groups sh -c "$SCRIPT"
    "#;
    // In its own mount namespace: nothing is left behind on the machine.
    let out = tool("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", outer])
        .env("HOME", store.beside("").canonicalize().expect("a path"))
        .env("SCRIPT", script)
        .env("ORACLE", &oracle)
        .env_remove("XDG_CONFIG_HOME")
        .succeeds();
    assert!(out.ends_with("all well\n"), "{out}");
}

/// mount(8) searches for helpers in /sbin only; an overlay of a private mount namespace puts the project's
/// there.
#[test]
fn mount_8_and_fstab_work_through_the_helper() {
    let store = small_chain();
    let oracle = store.oracle("web.qcow2", "qcow2");
    let programs = Path::new(chainfs_binary()).parent().expect("a directory");
    let mut build = tool(env!("CARGO"));
    build.args(["build", "--quiet", "--locked", "--package", "mount-chainfs"]);
    if programs.ends_with("release") {
        build.arg("--release");
    }
    build.succeeds();
    let sbin = store.beside("sbin");
    fs::create_dir(&sbin).expect("a directory");
    fs::copy(programs.join("mount-chainfs"), sbin.join("mount.chainfs")).expect("the helper");
    fs::copy(programs.join("mount-chainfs"), sbin.join("mount.fuse.chainfs")).expect("the helper");
    fs::copy(chainfs_binary(), sbin.join("chainfs")).expect("the binary");
    let script = r#"
        set -e
        mount -t overlay overlay -o "lowerdir=$S/sbin:/usr/sbin" /usr/sbin
        for type in chainfs fuse.chainfs; do
            mount -t $type "$S/store" "$S/mnt" -o ro,nofail,_netdev,x-systemd.automount,nosuid
            cmp "$S/mnt/web/active.raw" "$ORACLE"
            grep "^$S/store $S/mnt fuse.chainfs ro," /proc/self/mounts
            umount "$S/mnt"
        done
        echo "$S/store $S/mnt chainfs ro,noauto,nofail 0 0" > "$S/fstab"
        mount --fstab "$S/fstab" "$S/mnt"
        cmp "$S/mnt/web/active.raw" "$ORACLE"
        umount "$S/mnt"
        mount -f -t chainfs "$S/store" "$S/mnt"
        ! grep " $S/mnt fuse.chainfs " /proc/self/mounts
        set +e
        mount -t chainfs "$S/absent" "$S/mnt"; test $? = 32 || { echo "absent: $?"; exit 3; }
        mount -t chainfs "$S/store" "$S/mnt" -o bogus=1; test $? != 0 || { echo "bogus passed"; exit 4; }
        mount -s -t chainfs "$S/store" "$S/mnt" -o bogus=1 || { echo "sloppy: $?"; exit 5; }
        umount "$S/mnt"
        echo all well
    "#;
    let out = tool("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", script])
        .env(
            "S",
            store.beside("").canonicalize().expect("a path").to_str().expect("plain").trim_end_matches('/'),
        )
        .env("ORACLE", &oracle)
        .succeeds();
    assert!(out.ends_with("all well\n"), "{out}");
}

#[test]
fn help_names_every_verb_of_this_version() {
    let help = chainfs(&["--help"]).stdin(Stdio::null()).succeeds();
    for verb in [
        "mount", "umount", "tree", "info", "map", "check", "compare", "diff", "create", "snapshot", "commit",
        "pull", "cancel", "ls", "cat", "cp", "versions",
    ] {
        assert!(help.contains(verb), "{verb} in\n{help}");
    }
}
