//! Root gives disks of a mount to other users, as libvirt does before it starts a virtual machine: chown(2)
//! and attributes `trusted.*` count in the mount, and never reach an image.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, chown};
use std::path::Path;

use rustix::fs::{XattrFlags, getxattr, listxattr, removexattr, setxattr};
use rustix::io::Errno;
use support::command::Control;
use support::*;

use crate::rights::{A, B, acting, may_read, mode, open_store, own};

fn may_write(uid: u32, path: &Path) -> bool {
    acting(uid, &[], || File::options().write(true).open(path)?.write_all_at(b"w", 0)).is_ok()
}

fn owner(path: &Path) -> (u32, u32, u32) {
    let found = fs::metadata(path).expect("attributes");
    (found.uid(), found.gid(), found.mode() & 0o777)
}

/// A chain of two layers that only root may read, with a partition.
fn private_chain() -> Store {
    let store = open_store();
    store.raw("base.raw", 4 * MIB, 5);
    tool("sh")
        .args(["-c", "printf 'label: dos\n2048,2048\n' | sfdisk -q \"$0\""])
        .arg(store.path("base.raw"))
        .succeeds();
    store.overlay("vm.qcow2", "base.raw", "raw", "");
    for name in ["base.raw", "vm.qcow2"] {
        own(&store.path(name), 0, 0o600);
    }
    store
}

#[test]
// A4
fn a_given_disk_can_be_used_by_its_user_alone() {
    let store = private_chain();
    let mount = Mount::with(&store, "allow_other");
    let (active, frozen) = (mount.path("vm/active.raw"), mount.path("vm/snapshots/base.raw"));
    let (part, of_frozen) =
        (mount.path("vm/partitions/active/p1.raw"), mount.path("vm/partitions/base/p1.raw"));
    for path in [&active, &frozen, &part, &of_frozen] {
        assert!(!may_read(A, &[], path), "{}", path.display());
        chown(path, Some(A), Some(A)).expect("root gives a disk");
        assert!(may_read(A, &[], path) && !may_read(B, &[A], path), "{}", path.display());
        let bits = if may_write(A, path) { 0o600 } else { 0o400 };
        assert_eq!(owner(path), (A, A, bits), "{}", path.display());
        let others = [&active, &frozen, &part, &of_frozen].into_iter().filter(|other| *other != path);
        assert_eq!(others.filter(|other| may_read(A, &[], other)).count(), 0, "only this one is given");
        // What is not on the way stays closed, names and control files, too.
        for closed in ["vm/info/chain.json", "vm/control/commit", "vm/control/status"] {
            assert!(!may_read(A, &[], &mount.path(closed)), "{closed}");
        }
        for closed in ["vm", "vm/snapshots", "vm/partitions"] {
            assert!(acting(A, &[], || fs::read_dir(mount.path(closed))).is_err(), "{closed}");
        }
        assert!(acting(B, &[], || fs::metadata(path)).is_err(), "{}", path.display());
        chown(path, Some(0), Some(0)).expect("root takes it back");
        assert!(!may_read(A, &[], path), "{}", path.display());
    }
    for name in ["base.raw", "vm.qcow2"] {
        assert_eq!(owner(&store.path(name)), (0, 0, 0o600), "the image keeps its owner");
    }
    mount.umount();
}

#[test]
fn a_given_active_disk_stays_given_while_commands_run() {
    let store = private_chain();
    let mount = Mount::with(&store, "allow_other");
    let (active, control) = (mount.path("vm/active.raw"), Control::of(&mount, "vm"));
    chown(&active, Some(A), None).expect("root gives a disk");
    let open = acting(A, &[], || File::options().read(true).write(true).open(&active)).expect("a disk");
    open.write_all_at(b"one", 0).expect("it is written");
    control.done("snapshot monday");
    open.write_all_at(b"two", 0).expect("it is written");
    assert!(may_write(A, &active) && !may_read(A, &[], &mount.path("vm/snapshots/monday.raw")));
    assert_eq!(owner(&store.path("vm.qcow2")), (0, 0, 0o600), "the new overlay takes the image's owner");
    control.done("commit");
    assert!(may_write(A, &active));
    mount.close(open);
    mount.umount();
    let mount = Mount::with(&store, "allow_other");
    assert!(!may_read(A, &[], &mount.path("vm/active.raw")), "it was given for the life of the mount");
    mount.umount();
}

#[test]
fn only_root_gives_disks_and_only_disks_are_given() {
    let store = private_chain();
    own(&store.path("vm.qcow2"), A, 0o640);
    mode(&store.path("base.raw"), 0o644);
    let mount = Mount::with(&store, "allow_other");
    let active = mount.path("vm/active.raw");
    let errno = |result: std::io::Result<()>| result.err().and_then(|e| Errno::from_io_error(&e));
    // The kernel would let an owner choose among his groups.
    assert_eq!(errno(acting(A, &[A, B], || chown(&active, None, Some(B)))), Some(Errno::PERM));
    for other in ["vm", "vm/info/chain.json", "vm/control/commit", ".", ".chainfs/tree.txt", "vm/snapshots"] {
        assert_eq!(errno(chown(mount.path(other), Some(A), None)), Some(Errno::PERM), "{other}");
    }
    // A group gains nothing that others do not have.
    assert!(may_read(A, &[], &active) && !may_read(B, &[B], &active));
    chown(&active, None, Some(B)).expect("root gives a disk");
    assert_eq!(owner(&active), (A, B, 0o600));
    assert!(!may_read(B, &[B], &active) && may_write(A, &active), "the image's owner keeps it");
    mount.umount();
    // Nobody else could use it in a mount of one user.
    let mount = Mount::new(&store);
    assert_eq!(errno(chown(mount.path("vm/active.raw"), Some(A), None)), Some(Errno::PERM));
    mount.umount();
}

#[test]
fn trusted_attributes_of_disks_are_kept_in_the_mount() {
    let store = private_chain();
    let mount = Mount::with(&store, "allow_other");
    let (active, name) = (mount.path("vm/active.raw"), "trusted.libvirt.security.dac");
    let get = |path: &Path| {
        let mut value = [0; 64];
        getxattr(path, name, &mut value[..]).map(|len| value[..len].to_vec())
    };
    assert_eq!(get(&active), Err(Errno::NODATA));
    assert_eq!(setxattr(&active, name, b"+1:+2", XattrFlags::REPLACE), Err(Errno::NODATA));
    setxattr(&active, name, b"+1:+2", XattrFlags::CREATE).expect("an attribute");
    assert_eq!(setxattr(&active, name, b"+3:+4", XattrFlags::CREATE), Err(Errno::EXIST));
    assert_eq!(get(&active).as_deref(), Ok(&b"+1:+2"[..]));
    assert_eq!(get(&mount.path("vm/snapshots/base.raw")), Err(Errno::NODATA));
    let mut list = [0; 64];
    assert_eq!(listxattr(&active, &mut list[..]), Ok(0), "a copy of the disk must not take them along");
    assert_eq!(setxattr(&active, name, &[0; 5000], XattrFlags::empty()), Err(Errno::NOSPC));
    // Linux says that users without the capability see none.
    acting(A, &[], || assert!(get(&active).is_err()));
    for (path, name) in [("vm/active.raw", "user.mine"), ("vm/active.raw", "security.mine"), ("vm", name)] {
        let set = setxattr(mount.path(path), name, b"x", XattrFlags::empty());
        assert_eq!(set, Err(Errno::OPNOTSUPP), "{path} {name}");
    }
    for image in ["vm.qcow2", "base.raw"] {
        assert_eq!(get(&store.path(image)), Err(Errno::NODATA), "{image}");
    }
    removexattr(&active, name).expect("it was there");
    assert_eq!(removexattr(&active, name), Err(Errno::NODATA));
    mount.umount();
}
