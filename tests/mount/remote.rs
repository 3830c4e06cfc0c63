//! A store on a server, mounted as users do: the same tree, guests' files, what is said of it, and what is
//! left after a crash or without a server.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use support::command::Control;
use support::mount::daemon_of;
use support::web::{Fault, WebServer};
use support::*;

/// A chain of three layers, and a chain whose base is a guest's disk.
fn images() -> Store {
    let store = small_chain();
    let tree = store.beside("tree");
    fs::create_dir_all(tree.join("etc")).expect("a directory");
    fs::write(tree.join("etc/hostname"), "golden\n").expect("a file");
    store.guest("guest.raw", &tree, 32);
    store.overlay("vm.qcow2", "guest.raw", "raw", "");
    store
}

fn mounted(store: &Store, address: &str, more: &str) -> Mount {
    let options = format!("cache_dir={},{more}", store.beside("cache").display());
    Mount::try_new(store, Path::new(address), &store.beside("mnt"), options.trim_end_matches(','))
        .unwrap_or_else(|refusal| panic!("mount failed: {refusal:?}"))
}

#[test]
fn a_store_on_a_server_is_mounted_like_a_directory() {
    let store = images();
    let server = WebServer::new(&store.root());
    let mount = mounted(&store, &server.address(), "");
    for (path, image, format) in [
        ("web/active.raw", "web.qcow2", "qcow2"),
        ("web/snapshots/mid.raw", "mid.qcow2", "qcow2"),
        ("web/snapshots/base.raw", "base.raw", "raw"),
        ("vm/active.raw", "vm.qcow2", "qcow2"),
    ] {
        assert_same(&mount.path(path), &store.oracle(image, format));
    }
    let hostname = mount.path("vm/files/active/p1/etc/hostname");
    assert_eq!(fs::read_to_string(&hostname).expect("a guest's file"), "golden\n");
    let refused = fs::File::options().write(true).open(mount.path("web/active.raw")).map(drop);
    assert_eq!(refused.expect_err("read-only").raw_os_error(), Some(rustix::io::Errno::ROFS.raw_os_error()));
    // Commands know the store by its address, also from within the mount.
    let tree = tool(chainfs_binary()).arg("tree").arg(mount.dir()).succeeds();
    assert!(tree.contains("● mid") && tree.contains("● guest"), "{tree}");
    let mounts = fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(mounts.lines().any(|line| line.contains(&server.address())), "{mounts}");
}

#[test]
fn commands_read_addresses_without_a_mount() {
    let store = images();
    let server = WebServer::new(&store.root());
    let chainfs = |args: &[&str]| {
        let mut command = tool(chainfs_binary());
        command.args(args).env("HOME", store.beside("home")).env("XDG_CACHE_HOME", store.beside("home"));
        command.args(["-o", &format!("cache_dir={}", store.beside("cache").display())]);
        command
    };
    let address = server.address();
    assert!(chainfs(&["tree", &address]).succeeds().contains("● mid"));
    let info = chainfs(&["info", &format!("{address}/web.qcow2")]).succeeds();
    assert!(info.contains("mid.qcow2"), "{info}");
    let guest = format!("{address}/vm.qcow2:/p1/etc/hostname");
    assert_eq!(chainfs(&["cat", &guest]).succeeds(), "golden\n");
    let of_layer = format!("{address}/vm.qcow2@guest:/p1/etc");
    assert!(chainfs(&["ls", &of_layer]).succeeds().contains("hostname"));
    let refused = chainfs(&["snapshot", &format!("{address}/web.qcow2"), "monday"]).fails();
    assert!(refused.contains("nothing can be made or renamed"), "{refused}");
    let missing = chainfs(&["tree", &format!("{address}/nothing")]).fails();
    assert!(missing.contains("/nothing"), "{missing}");
}

#[test]
fn what_a_killed_daemon_has_fetched_needs_no_server() {
    let store = images();
    let server = WebServer::new(&store.root());
    let expected = store.oracle("web.qcow2", "qcow2");
    let mount = mounted(&store, &server.address(), "");
    assert_same(&mount.path("web/active.raw"), &expected);
    let pid = daemon_of(mount.dir()).expect("a daemon");
    kill_process(Pid::from_raw(pid.cast_signed()).expect("a number"), Signal::KILL).expect("a process");
    drop(mount);
    let (reads, requests) = (server.reads(), server.requests());
    // A mount with the server needs no byte of what was fetched.
    let mount = mounted(&store, &server.address(), "");
    assert_same(&mount.path("web/active.raw"), &expected);
    assert_eq!(server.reads(), reads);
    assert!(server.requests() > requests, "it was listed");
    mount.umount();
    server.set_down(true);
    let mount = mounted(&store, &server.address(), "offline");
    assert_same(&mount.path("web/active.raw"), &expected);
    // What was never read is an error, at once.
    let guest = fs::read(mount.path("vm/active.raw")).expect_err("it was not fetched");
    assert_eq!(guest.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
}

#[test]
fn a_mount_outlives_its_server() {
    let store = images();
    let server = WebServer::new(&store.root());
    let mount = mounted(&store, &server.address(), "timeout=2,rescan=1");
    let expected = store.oracle("web.qcow2", "qcow2");
    assert_same(&mount.path("web/active.raw"), &expected);
    server.set_down(true);
    // Scans fail meanwhile: the tree stays.
    std::thread::sleep(Duration::from_secs(3));
    assert!(mount.path("web/snapshots/mid.raw").exists());
    assert_same(&mount.path("web/active.raw"), &expected);
    let lost = fs::read(mount.path("vm/active.raw")).expect_err("it was not fetched");
    assert_eq!(lost.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    server.set_down(false);
    assert_same(&mount.path("vm/active.raw"), &store.oracle("vm.qcow2", "qcow2"));
}

/// The cache has the bytes of disks: no other user looks into it.
#[test]
fn the_cache_belongs_to_its_owner() {
    let store = images();
    let server = WebServer::new(&store.root());
    let mount = mounted(&store, &server.address(), "");
    assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    let mode = fs::metadata(store.beside("cache")).expect("a directory").permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o700);
}

#[test]
fn addresses_with_secrets_are_refused_without_showing_them() {
    let store = Store::new();
    for address in ["s3://key:hunter2@bucket/x", "https://host/x?sig=hunter2", "ftp://host/x"] {
        let mut command = Command::new(chainfs_binary());
        let said = command.args(["tree", address]).output().expect("chainfs");
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(!said.contains("hunter2") && said.starts_with("chainfs: "), "{said}");
    }
    drop(store);
}

/// A directory of this machine whose base lies on the server: all is as always, but that nothing there is
/// written.
#[test]
fn overlays_of_this_machine_are_backed_by_a_remote_base() {
    let golden = Store::new();
    golden.create("base.qcow2", 8 * MIB, "");
    golden.scribble("base.qcow2", "qcow2", 1);
    let base = fs::read(golden.oracle("base.qcow2", "qcow2")).expect("bytes");
    let server = WebServer::new(&golden.root());
    let store = Store::new();
    // QEMU opens no such base; with map= a name that it opens may lead there as well.
    for (name, backing) in [
        ("vm.qcow2", format!("{}/base.qcow2", server.address())),
        ("mapped.qcow2", "/srv/golden/base.qcow2".to_owned()),
    ] {
        store.img(["create", "-q", "-f", "qcow2", "-u", "-b", &backing, "-F", "qcow2", name, "8M"]);
    }
    let options = format!(
        "backing_dir={address},map=/srv/golden={address},cache_dir={cache},timeout=3",
        address = server.address(),
        cache = store.beside("cache").display()
    );
    let mount = Mount::with(&store, &options);
    assert_eq!(fs::read_to_string(mount.path(".chainfs/problems.txt")).expect("problems"), "");
    for chain in ["vm", "mapped"] {
        assert!(fs::read(mount.path(chain).join("active.raw")).expect("a disk") == base, "{chain}");
    }
    let control = Control::of(&mount, "vm");
    control.done("snapshot monday");
    let mut model = active::Model(base.clone());
    {
        let disk = active::rw(&mount.path("vm/active.raw"));
        model.write(&disk, 100_000, &[7; 5000]);
        disk.sync_all().expect("a sync");
    }
    model.assert_is(&mount.path("vm/active.raw"));
    assert!(fs::read(mount.path("vm/snapshots/monday.raw")).expect("a snapshot") == base);
    assert!(fs::read(mount.path("vm/snapshots/base.raw")).expect("a snapshot") == base);
    // The layers of this machine are merged. The base is not, and a plan says so before anything is done.
    let said = control.refused("commit top=active base=base", rustix::io::Errno::ROFS);
    assert!(said.contains("base"), "{said}");
    control.done("commit top=active base=monday");
    model.assert_is(&mount.path("vm/active.raw"));
    control.done("pull");
    // It needs no server any more, and QEMU opens it.
    server.set_down(true);
    model.assert_is(&mount.path("vm/active.raw"));
    mount.umount();
    assert!(fs::read(store.oracle("vm.qcow2", "qcow2")).expect("bytes") == model.0);
    assert!(fs::read(golden.oracle("base.qcow2", "qcow2")).expect("bytes") == base);
}

// X2
/// Reads that wait for a server occupy no thread that others need.
#[test]
fn a_silent_server_holds_up_no_other_request() {
    let store = images();
    store.raw("big.raw", 16 * MIB, 8);
    let server = WebServer::new(&store.root());
    let mount = mounted(&store, &server.address(), "threads=2,timeout=15");
    assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    let expected = fs::read(store.oracle("web.qcow2", "qcow2")).expect("bytes");
    server.fail(Fault::Stall, 1000);
    let before = server.reads();
    std::thread::scope(|scope| {
        for reader in 1..=6 {
            let path = mount.path("big/active.raw");
            scope.spawn(move || {
                let disk = fs::File::open(path).expect("a disk");
                let mut block = [0; 4096];
                let found = disk.read_at(&mut block, reader * 2 * MIB);
                assert_eq!(
                    found.expect_err("nothing").raw_os_error(),
                    Some(rustix::io::Errno::IO.raw_os_error())
                );
            });
        }
        eventually("all of them wait", || server.reads() >= before + 6);
        let begun = std::time::Instant::now();
        assert!(mount.path("vm/snapshots").is_dir());
        assert!(fs::read(mount.path("web/active.raw")).expect("a disk") == expected);
        // They have waited for less than one attempt.
        assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    });
}
