//! Systems in subvolumes: as Ubuntu, Debian and Fedora have them below the top level, and as SUSE has them
//! below a default subvolume that is a snapshot.

use std::fs::{self, File};
use std::path::Path;

use support::{MIB, Mount, Outcome as _, Store, tool};

use super::guest::{KernelMount, Placed, compare_views, four_layers};
use super::{VIEWS, assert_roots, assert_unique_numbers, chainfs};

/// Fills the root of a system.
pub(super) type Fill = fn(&Path);

const START: u64 = MIB;

fn btrfs(words: &[&str], path: &Path) {
    tool("btrfs").args(words).arg(path).succeeds();
}

fn snapshot(from: &Path, to: &Path, words: &[&str]) {
    tool("btrfs").args(["subvolume", "snapshot"]).args(words).arg(from).arg(to).succeeds();
}

/// A disk with one partition of btrfs, which `make` fills from its top level.
fn disk(store: &Store, size: u64, make: &dyn Fn(&Path)) -> Placed {
    let path = store.beside("disk");
    File::create(&path).and_then(|file| file.set_len(size)).expect("a disk");
    tool("sgdisk").args(["-n1:2048:0", "-t1:8300"]).arg(&path).succeeds();
    let placed = Placed { kind: "btrfs", options: "subvolid=5", offset: START, len: size - 2 * START };
    let volume = store.beside("volume");
    File::create(&volume).and_then(|file| file.set_len(placed.len)).expect("a volume");
    tool("mkfs.btrfs").args(["-q", "-L", "system"]).arg(&volume).succeeds();
    tool("dd")
        .args(["bs=1M", "seek=1", "conv=notrunc,sparse", "status=none"])
        .arg(format!("if={}", volume.display()))
        .arg(format!("of={}", path.display()))
        .succeeds();
    fs::remove_file(volume).expect("the volume");
    let mounted = KernelMount::new(&path, &placed, store.beside("making"));
    make(&mounted.dir);
    mounted.end();
    store.img(["convert", "-f", "raw", "-O", "qcow2", path.to_str().expect("a plain path"), "vm.qcow2"]);
    fs::remove_file(path).expect("the disk");
    placed
}

/// The top level is the default, and the root is `@`.
pub(super) fn below_the_top_level(size: u64, fill: Fill) {
    let store = Store::new();
    let placed = disk(&store, size, &|top| {
        for name in ["@", "@home"] {
            btrfs(&["subvolume", "create"], &top.join(name));
        }
        fill(&top.join("@"));
        fs::create_dir(top.join("timeshift")).expect("a directory");
        let fstab =
            "LABEL=system / btrfs defaults,subvol=@ 0 0\nLABEL=system /home btrfs subvol=/@home 0 0\n";
        fs::write(top.join("@/etc/fstab"), fstab).expect("a file");
        fs::write(top.join("@home/notes"), "0").expect("a file");
    });
    let mount = Mount::new(&store);
    four_layers(&store, &mount, &placed, &mut |top, layer| {
        fs::write(top.join("@home/notes"), format!("{layer}")).expect("a file");
        if layer > 1 {
            snapshot(&top.join("@"), &top.join(format!("timeshift/{layer}")), &[]);
        }
        top.join("@")
    });
    assert_roots(&mount, "vm", VIEWS, ["p1/@"; 4], &[]);
    // Links lead to the root of their subvolume, and not out of it.
    for place in ["root/usr/bin/awk", "p1/timeshift/3/usr/bin/awk"] {
        let path = mount.path("vm/files/active").join(place);
        assert_eq!(
            fs::read(&path).expect("a file"),
            fs::read(mount.path("vm/files/l1/p1/@/usr/bin/mawk")).expect("a file")
        );
        chainfs(&["cat", path.to_str().expect("a plain path")]);
    }
    let said = mount.text("vm/info/os.txt");
    for line in
        ["root: p1/@\n", "root-reason: its fstab", "mount: /home p1/@home btrfs", "\ncopy: p1/timeshift/2 "]
    {
        assert!(said.contains(line), "{line}: {said}");
    }
    let said = mount.text("vm/files/active/volumes.txt");
    assert!(said.contains("; subvolumes @, @home, timeshift/2, timeshift/3, timeshift/4"), "{said}");
    assert_eq!(mount.names("vm/files/active"), ["p1", "root", "volumes.txt"]);
    mount.umount();
    compare_views(&store, "vm", &placed, &|_| "p1".to_owned());
}

/// The root is the default subvolume, a snapshot; from the third layer on, the guest is rolled back.
pub(super) fn below_a_default_subvolume(size: u64, fill: Fill) {
    let store = Store::new();
    let number = |top: &Path, path: &str| {
        tool("btrfs").args(["inspect-internal", "rootid"]).arg(top.join(path)).succeeds().trim().to_owned()
    };
    let placed = disk(&store, size, &|top| {
        for name in ["@", "@/home", "@/.snapshots"] {
            btrfs(&["subvolume", "create"], &top.join(name));
        }
        fs::create_dir(top.join("@/.snapshots/1")).expect("a directory");
        btrfs(&["subvolume", "create"], &top.join("@/.snapshots/1/snapshot"));
        let root = top.join("@/.snapshots/1/snapshot");
        fill(&root);
        let fstab = "LABEL=system / btrfs defaults 0 0\nLABEL=system /home btrfs subvol=/@/home 0 0\n";
        fs::write(root.join("etc/fstab"), fstab).expect("a file");
        fs::write(top.join("@/home/notes"), "0").expect("a file");
        tool("btrfs")
            .args(["subvolume", "set-default"])
            .arg(number(top, "@/.snapshots/1/snapshot"))
            .arg(top)
            .succeeds();
    });
    let mount = Mount::new(&store);
    let root_in = |layer: usize| format!("@/.snapshots/{}/snapshot", if layer > 2 { 3 } else { 1 });
    four_layers(&store, &mount, &placed, &mut |top, layer| {
        fs::write(top.join("@/home/notes"), format!("{layer}")).expect("a file");
        let snapshots = top.join("@/.snapshots");
        if layer == 2 {
            fs::create_dir(snapshots.join("2")).expect("a directory");
            snapshot(&snapshots.join("1/snapshot"), &snapshots.join("2/snapshot"), &["-r"]);
        }
        if layer == 3 {
            fs::create_dir(snapshots.join("3")).expect("a directory");
            snapshot(&snapshots.join("2/snapshot"), &snapshots.join("3/snapshot"), &[]);
            // Removed after this snapshot, and there again.
            fs::write(snapshots.join("3/snapshot/var/lib/2"), "back").expect("a file");
            tool("btrfs")
                .args(["subvolume", "set-default"])
                .arg(number(top, &root_in(3)))
                .arg(top)
                .succeeds();
            // Another default is on the disk with the next commit, and not with a file that is synced.
            btrfs(&["filesystem", "sync"], top);
        }
        top.join(root_in(layer))
    });
    assert_roots(&mount, "vm", VIEWS, ["p1"; 4], &[]);
    assert_eq!(mount.names("vm/files/active"), ["p1", "p1.subvolumes", "root", "volumes.txt"]);
    assert_unique_numbers(&mount.path("vm/files"));
    let said = mount.text("vm/info/os.txt");
    for line in [
        "root: p1\n",
        "root-reason: its fstab",
        "mount: /home p1.subvolumes/@/home btrfs",
        "\ncopy: p1.subvolumes/@/.snapshots/2/snapshot Debian",
    ] {
        assert!(said.contains(line), "{line}: {said}");
    }
    let said = mount.text("vm/files/active/volumes.txt");
    let expected = "; subvolume @/.snapshots/3/snapshot; others in p1.subvolumes: @, @/home, @/.snapshots, ";
    assert!(said.contains(expected), "{said}");
    println!("{}{said}", mount.text("vm/info/os.txt"));
    // The link of a snapshot leads to the snapshot's own file.
    let linked = "vm/files/active/p1.subvolumes/@/.snapshots/1/snapshot/usr/bin";
    assert_eq!(mount.text(format!("{linked}/awk")), mount.text(format!("{linked}/mawk")));
    assert_eq!(mount.text("vm/files/l2/p1.subvolumes/@/home/notes"), "2");
    let image = store.path("vm.qcow2").display().to_string();
    let home = chainfs(&["versions", &format!("{image}:/p1.subvolumes/@/home/notes")]);
    assert_eq!(home.lines().count(), 4, "{home}");
    let diff = |words: [String; 2]| {
        let (code, out, err) =
            tool(support::chainfs_binary()).args(["diff", "--files"]).args(words).outcome();
        assert_eq!(code, 1, "{err}");
        println!("{out}");
        out
    };
    let of_root = diff([format!("{image}@l2:/root/etc"), format!("{image}@l3:/root/etc")]);
    assert!(of_root.contains("/root/etc/hostname"), "{of_root}");
    let of_all = diff([format!("{image}@l1"), format!("{image}@l2")]);
    for line in [
        "~ /p1.subvolumes/@/home/notes ",
        "~ /p1.subvolumes/@/.snapshots/1/snapshot/etc/hostname ",
        "+ /p1.subvolumes/@/.snapshots/2/snapshot   the whole subvolume\n",
    ] {
        assert!(of_all.contains(line), "{of_all}");
    }
    assert!(!of_all.contains("2/snapshot/etc"), "{of_all}");
    mount.umount();
    compare_views(&store, "vm", &placed, &|_| "p1.subvolumes".to_owned());
}

#[test]
fn a_root_below_the_top_level() {
    below_the_top_level(300 * MIB, super::system);
}

#[test]
fn a_root_that_is_the_default_subvolume() {
    below_a_default_subvolume(300 * MIB, super::system);
}
