//! A guest whose volume group spans several disks, each of them a chain of the store: assembled in every view
//! of the same moment, and never with another guest's disk. LVM itself makes the group.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::btrfs;
use crate::volumes::arrays::{Says, left_symmetric};
use chainfs::guest::Source;
use chainfs::guest::volumes::layout;
use support::command::give;
use support::foreign::Loop;
use support::*;

const DISK: u64 = 40 * MIB;

/// Two disks of one group, with one logical volume over both that holds a file system with the contents of
/// `tree`.
fn group(store: &Store, tree: &Path) -> [PathBuf; 2] {
    let disks = ["one", "two"].map(|name| store.beside(format!("{name}.disk")));
    for disk in &disks {
        File::create(disk).and_then(|file| file.set_len(DISK)).expect("a disk");
    }
    let devices = disks.each_ref().map(|disk| Loop::new(disk));
    let etc = store.beside("lvm");
    fs::create_dir(&etc).expect("a directory");
    let names = devices.each_ref().map(|device| device.0.display().to_string());
    let accepted = names.each_ref().map(|name| format!("\"a|^{name}$|\", ")).concat();
    let config = format!(
        "devices {{ use_devicesfile = 0 obtain_device_list_from_udev = 0 external_device_info_source \
            = \"none\"\n\
         filter = [ {accepted} \"r|.*|\" ] global_filter = [ {accepted} \"r|.*|\" ] }}\n\
         activation {{ udev_sync = 0 udev_rules = 0 monitoring = 0 }}\n\
         backup {{ backup = 0 archive = 0 }}\n\
         global {{ etc = \"{0}\" event_activation = 0 use_lvmpolld = 0 locking_dir = \"{0}/lock\" }}\n",
        etc.display()
    );
    fs::write(etc.join("lvm.conf"), config).expect("a configuration");
    let lvm = |words: &str| {
        let mut words = words.split_whitespace();
        let mut command = tool(words.next().expect("a program"));
        command.env("LVM_SYSTEM_DIR", &etc).env("LVM_SUPPRESS_FD_WARNINGS", "1");
        command.args(["--driverloaded", "n"]).args(words).succeeds()
    };
    lvm(&format!("pvcreate -q -y {} {}", names[0], names[1]));
    lvm(&format!("vgcreate -q -s 1m vg {} {}", names[0], names[1]));
    lvm("lvcreate -q -y -an -Zn -Wn -l 100%FREE -n root vg");
    devices.into_iter().for_each(Loop::detach);
    let sources =
        || disks.each_ref().map(|disk| Arc::new(fs::read(disk).expect("a disk")) as Arc<dyn Source>);
    let found = layout(&sources());
    let volume = found.volumes.iter().find(|volume| volume.name == "vg-root").expect("the volume");
    assert!(volume.size > DISK, "it needs both disks");
    let image = store.beside("volume");
    tool("mkfs.ext4")
        .args(["-q", "-F", "-d"])
        .arg(tree)
        .arg(&image)
        .arg(format!("{}k", volume.size / 1024))
        .succeeds();
    let bytes = fs::read(&image).expect("the file system");
    let mut at = 0;
    while at < volume.size {
        let stretch = volume.locate(at, volume.size - at).expect("a place");
        let place = stretch.on_disk().expect("a place on a disk");
        let disk = File::options().write(true).open(&disks[place.disk as usize]).expect("a disk");
        disk.write_all_at(&bytes[at as usize..][..stretch.len as usize], place.offset).expect("a write");
        at += stretch.len;
    }
    disks
}

/// A file large enough to be on both disks.
fn tree(store: &Store) -> (PathBuf, Vec<u8>) {
    let tree = store.beside("tree");
    fs::create_dir_all(tree.join("etc")).expect("a directory");
    let big = Rng::new(9).bytes(50 * MIB);
    fs::write(tree.join("big"), &big).expect("a file");
    fs::write(tree.join("etc/hostname"), "grouped\n").expect("a file");
    (tree, big)
}

fn image(store: &Store, disk: &Path, name: &str) {
    store.img(["convert", "-f", "raw", "-O", "qcow2", disk.to_str().expect("a plain path"), name]);
}

#[test]
fn a_group_on_several_chains_is_whole_in_every_view_of_one_moment() {
    let store = Store::new();
    let (tree, big) = tree(&store);
    let [one, two] = group(&store, &tree);
    image(&store, &one, "vm-a.qcow2");
    image(&store, &two, "vm-b.qcow2");
    let mount = Mount::new(&store);
    assert_eq!(give(&mount.path(".chainfs/control/snapshot"), b"monday chains=vm-a,vm-b\n"), None);
    for (chain, view) in
        [("vm-a", "active"), ("vm-b", "active"), ("vm-a", "vm-a-monday"), ("vm-b", "vm-b-monday")]
    {
        let files = format!("{chain}/files/{view}");
        assert_eq!(mount.text(format!("{files}/vg-root/etc/hostname")), "grouped\n", "{files}");
        let found = fs::read(mount.path(format!("{files}/vg-root/big"))).expect("a file");
        assert!(found == big, "{files}");
    }
    // A disk of another moment is no part of it.
    assert_eq!(give(&mount.path("vm-a/control/snapshot"), b"tuesday\n"), None);
    let said = mount.text("vm-a/files/tuesday/volumes.txt");
    assert!(said.contains("vg-root") && said.contains("lacks the physical volumes"), "{said}");
    assert!(!mount.names("vm-a/files/tuesday").contains(&"vg-root".to_owned()));
    mount.umount();
}

#[test]
fn a_disk_of_another_guest_never_joins_a_group() {
    let store = Store::new();
    let (tree, _) = tree(&store);
    let [one, two] = group(&store, &tree);
    for guest in ["a", "b"] {
        store.dir(guest);
        image(&store, &one, &format!("{guest}/one.qcow2"));
    }
    // The second guest's other disk is not in the store; a clone's is.
    image(&store, &two, "a/two.qcow2");
    image(&store, &two, "a/two-copy.qcow2");
    let mount = Mount::new(&store);
    let said = mount.text("a/one/files/active/volumes.txt");
    assert!(said.contains("is on several disks") && said.contains("two-copy"), "{said}");
    assert_eq!(mount.names("a/one/files/active"), ["volumes.txt"]);
    mount.umount();
    fs::remove_file(store.path("a/two-copy.qcow2")).expect("a file");
    let mount = Mount::new(&store);
    assert_eq!(mount.text("a/one/files/active/vg-root/etc/hostname"), "grouped\n");
    assert_eq!(mount.text("a/two/files/active/vg-root/etc/hostname"), "grouped\n");
    mount.umount();
    // A user who may not read the one does not see it through the other.
    fs::set_permissions(store.path("a/two.qcow2"), fs::Permissions::from_mode(0o600)).expect("a mode");
    let mount = Mount::new(&store);
    assert_eq!(mount.names("a/one/files/active"), ["volumes.txt"]);
    mount.umount();
}

/// The disks of a RAID 5 with a file system that has the contents of `tree`.
fn array(store: &Store, tree: &Path) -> [PathBuf; 3] {
    let image = store.beside("volume");
    tool("mkfs.ext4").args(["-q", "-F", "-d"]).arg(tree).arg(&image).arg("96M").succeeds();
    let data = left_symmetric(&fs::read(&image).expect("the file system"), 3);
    [0, 1, 2].map(|number| {
        let says = Says { used: data[0].len(), ..Says::new(5, 3, number) };
        let disk = store.beside(format!("member{number}"));
        fs::write(&disk, says.disk(&data[number as usize])).expect("room");
        disk
    })
}

#[test]
fn an_array_on_several_chains_is_read_whole_and_degraded() {
    let store = Store::new();
    let (tree, big) = tree(&store);
    let disks = array(&store, &tree);
    for (disk, name) in disks.iter().zip(["vm-a.qcow2", "vm-b.qcow2", "vm-c.qcow2"]) {
        image(&store, disk, name);
    }
    let mount = Mount::new(&store);
    assert_eq!(give(&mount.path(".chainfs/control/snapshot"), b"monday chains=vm-a,vm-b,vm-c\n"), None);
    let check = |mount: &Mount, files: &str| {
        assert_eq!(mount.text(format!("{files}/md-data/etc/hostname")), "grouped\n", "{files}");
        let found = fs::read(mount.path(format!("{files}/md-data/big"))).expect("a file");
        assert!(found == big, "{files}");
    };
    check(&mount, "vm-a/files/active");
    check(&mount, "vm-c/files/vm-c-monday");
    let said = mount.text("vm-a/files/active/volumes.txt");
    assert!(said.contains("md-data") && !said.contains("degraded"), "{said}");
    mount.umount();
    // Without one of them, its chunks are computed of the others'.
    let files =
        fs::read_dir(store.path(".")).expect("the store").map(|entry| entry.expect("an entry").path());
    let of_b =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vm-b"));
    files.filter(of_b).for_each(|path| fs::remove_file(path).expect("a file"));
    let mount = Mount::new(&store);
    check(&mount, "vm-a/files/active");
    let said = mount.text("vm-a/files/active/volumes.txt");
    assert!(said.contains("degraded: 2 of 3 members") && said.contains("lacks the members"), "{said}");
    mount.umount();
    // A clone of the missing one, twice, is ambiguous.
    image(&store, &disks[1], "copy1.qcow2");
    image(&store, &disks[1], "copy2.qcow2");
    let mount = Mount::new(&store);
    check(&mount, "vm-c/files/active");
    let said = mount.text("vm-c/files/active/volumes.txt");
    assert!(said.contains("is on several disks") && said.contains("a directory of its own"), "{said}");
    mount.umount();
}

#[test]
fn a_btrfs_on_several_chains_is_read_whole_and_without_what_is_absent() {
    let store = Store::new();
    let (tree, big) = tree(&store);
    let disk = btrfs::disk::Disk::format("-d raid0 -m raid1", &[200 * MIB, 200 * MIB]);
    disk.mounted("rw", |dir| {
        tool("cp").arg("-a").arg(tree.join(".")).arg(dir).succeeds();
    });
    for (disk, name) in disk.images.iter().zip(["vm-a.qcow2", "vm-b.qcow2"]) {
        image(&store, disk, name);
    }
    let mount = Mount::new(&store);
    assert_eq!(give(&mount.path(".chainfs/control/snapshot"), b"monday chains=vm-a,vm-b\n"), None);
    for files in
        ["vm-a/files/active", "vm-b/files/active", "vm-a/files/vm-a-monday", "vm-b/files/vm-b-monday"]
    {
        assert_eq!(mount.text(format!("{files}/disk/etc/hostname")), "grouped\n", "{files}");
        let found = fs::read(mount.path(format!("{files}/disk/big"))).expect("a file");
        assert!(found == big, "{files}");
        let said = mount.text(format!("{files}/volumes.txt"));
        assert!(!said.contains("missing") && !said.contains("lacks"), "{said}");
    }
    // Two clones of the other device: neither is used, and what both devices have is shown.
    image(&store, &disk.images[1], "copy.qcow2");
    mount.umount();
    let mount = Mount::new(&store);
    assert_eq!(mount.text("vm-a/files/active/disk/etc/hostname"), "grouped\n");
    let failed = fs::read(mount.path("vm-a/files/active/disk/big")).expect_err("a half of it is absent");
    assert_eq!(failed.raw_os_error(), Some(rustix::io::Errno::IO.raw_os_error()));
    let said = mount.text("vm-a/files/active/volumes.txt");
    assert!(
        said.contains("is on several disks") && said.contains("1 of its 2 devices are missing"),
        "{said}"
    );
    mount.umount();
}
