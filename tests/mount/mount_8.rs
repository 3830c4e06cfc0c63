//! What users of mount(8) expect besides mounting: `remount`, `fsname`, `auto_unmount`, contexts of `SELinux`.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::process::Command;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process};
use support::command::give;
use support::mount::connection_of;
use support::*;

fn store() -> Store {
    let store = Store::new();
    store.create("base.qcow2", MIB, "");
    store.overlay("web.qcow2", "base.qcow2", "qcow2", "");
    store
}

fn writes(path: &Path) -> io::Result<File> {
    File::options().write(true).open(path)
}

fn errno<T>(result: io::Result<T>) -> Option<Errno> {
    result.err().and_then(|error| Errno::from_io_error(&error))
}

/// As mount(8) calls it: the options of the list of mounts come again.
fn remount(store: &Store, options: &str) -> Command {
    let mut command = tool(chainfs_binary());
    let options = format!("rw,user_id=0,group_id=0,{options},remount");
    command.arg("mount").arg(store.root()).arg(store.beside("mnt")).args(["-o", &options]);
    command.env("XDG_CONFIG_HOME", store.beside("config"));
    command
}

#[test]
fn a_remount_changes_the_kernels_flags_and_nothing_else() {
    let store = store();
    assert!(remount(&store, "ro").outcome().2.contains("shows no store"));
    let mount = Mount::with(&store, "cache=64M,trash=3");
    let disk = mount.path("web/active.raw");
    let open = writes(&disk).expect("a disk");
    let busy = remount(&store, "ro").outcome();
    assert_eq!(busy.0, 32, "{}", busy.2);
    mount.close(open);
    remount(&store, "ro,cache=64M").succeeds();
    assert_eq!(errno(writes(&disk)), Some(Errno::ROFS));
    assert_eq!(give(&mount.path("web/control/snapshot"), b"x"), Some(Errno::ROFS));
    assert!(fs::read(&disk).is_ok());
    remount(&store, "exec").succeeds();
    mount.close(writes(&disk).expect("a disk"));
    for (options, named) in [("cache=1M", "cache"), ("allow_other,trash=4", "allow_other, trash")] {
        let (code, _, said) = remount(&store, options).outcome();
        assert!(code == 32 && said.contains(&format!("cannot change {named} while")), "{options}: {said}");
    }
    mount.umount();
    let mount = Mount::with(&store, "ro");
    let (code, _, said) = remount(&store, "").outcome();
    assert!(code == 32 && said.contains("was mounted with ro"), "{said}");
    mount.umount();
}

#[test]
fn another_source_in_the_list_of_mounts_hides_no_store() {
    let store = store();
    let mount = Mount::with(&store, "fsname=images");
    let list = fs::read_to_string("/proc/self/mounts").expect("a list");
    let own = format!("images {} fuse.chainfs ", mount.dir().display());
    assert!(list.lines().any(|line| line.starts_with(&own)), "{list}");
    // Commands find the store by the mount all the same.
    let tree = tool(chainfs_binary()).arg("tree").arg(mount.path("web")).succeeds();
    assert!(tree.contains("active"), "{tree}");
    tool(chainfs_binary()).arg("snapshot").arg(mount.path("web")).arg("monday").succeeds();
    assert!(store.path("monday.qcow2").exists());
    mount.umount();
}

#[test]
fn a_mount_whose_daemon_was_killed_goes_by_itself_if_that_is_wanted() {
    for (options, goes) in [("auto_unmount", true), ("", false)] {
        let store = store();
        let mount = Mount::with(&store, options);
        let daemon = Pid::from_raw(mount.daemon().cast_signed()).expect("a process number");
        kill_process(daemon, Signal::KILL).expect("a process");
        if goes {
            eventually("the mount goes", || connection_of(mount.dir()).is_none());
            // mount -a leaves alone what is in the list of mounts. Now it mounts again.
            let again = Mount::with(&store, options);
            assert!(again.path("web/active.raw").exists());
            again.umount();
        } else {
            assert!(fs::metadata(mount.path("web")).is_err() && connection_of(mount.dir()).is_some());
        }
        mount.abandon();
    }
    // One that is unmounted as usual leaves no process behind.
    let store = store();
    let mount = Mount::with(&store, "auto_unmount");
    let wanted = format!("CHAINFS_AUTO_UNMOUNT={}", connection_device(mount.dir()));
    let waits = || {
        let processes = fs::read_dir("/proc").expect("processes").flatten();
        processes.into_iter().any(|process| {
            let environment = fs::read(process.path().join("environ")).unwrap_or_default();
            environment.split(|byte| *byte == 0).any(|variable| variable.starts_with(wanted.as_bytes()))
        })
    };
    eventually("a process waits", waits);
    mount.umount();
    eventually("no process waits", || !waits());
}

/// The device number of a mount.
fn connection_device(dir: &Path) -> String {
    use std::os::unix::fs::MetadataExt as _;
    let device = fs::metadata(dir).expect("a mount").dev();
    format!("{}:{}:", rustix::fs::major(device), rustix::fs::minor(device))
}

#[test]
fn contexts_of_selinux_are_the_kernels() {
    let store = store();
    // Without SELinux they have no effect, as with mount(8).
    let context = "context=\"system_u:object_r:virt_image_t:s0:c1,c2\",rootcontext=a:b:c:d";
    let mount = Mount::with(&store, context);
    assert!(mount.path("web/active.raw").exists());
    mount.umount();
}
