//! A system with XFS on a logical volume, as RHEL and its like have it.

use std::fs::{self, File};
use std::path::Path;

use support::foreign::Loop;
use support::{MIB, Mount, Outcome as _, Store, tool};

use super::btrfs::Fill;
use super::guest::{KernelMount, Placed, compare_views, four_layers};
use super::{VIEWS, assert_roots};

/// The physical volume is the only partition, and the root is the first logical volume. LVM itself says where
/// that is.
fn disk(store: &Store, size: u64, fill: Fill) -> Placed {
    let path = store.beside("disk");
    File::create(&path).and_then(|file| file.set_len(size)).expect("a disk");
    tool("sgdisk").args(["-n1:2048:0", "-t1:8e00"]).arg(&path).succeeds();
    let part = tool("losetup").args(["--find", "--show", "--offset", "1048576"]).arg(&path).succeeds();
    let device = Loop(part.trim().into());
    let etc = store.beside("lvm");
    fs::create_dir(&etc).expect("a directory");
    let config = format!(
        "devices {{ use_devicesfile = 0 obtain_device_list_from_udev = 0\n\
         external_device_info_source = \"none\" }}\n\
         activation {{ udev_sync = 0 udev_rules = 0 monitoring = 0 }}\nbackup {{ backup = 0 archive = 0 }}\n\
         global {{ etc = \"{0}\" event_activation = 0 use_lvmpolld = 0 locking_dir = \"{0}/lock\" }}\n",
        etc.display()
    );
    fs::write(etc.join("lvm.conf"), config).expect("a configuration");
    let name = device.0.display().to_string();
    let lvm = |words: &str| {
        let mut words = words.split_whitespace();
        let mut command = tool(words.next().expect("a program"));
        command.env("LVM_SYSTEM_DIR", &etc).env("LVM_SUPPRESS_FD_WARNINGS", "1");
        command.args(["--driverloaded", "n", "--devices", &name]).args(words).succeeds()
    };
    lvm(&format!("pvcreate -q -y {name}"));
    lvm(&format!("vgcreate -q -s 1m vg-a {name}"));
    lvm("lvcreate -q -y -an -Zn -Wn -l 90%FREE -n root vg-a");
    lvm("lvcreate -q -y -an -Zn -Wn -l 100%FREE -n swap vg-a");
    let number = |text: String| -> u64 { text.trim().trim_end_matches('B').parse().expect("a number") };
    let begin = number(lvm("pvs --noheadings --units b -o pe_start"));
    let len = number(lvm("lvs --noheadings --units b -o lv_size vg-a/root"));
    let first = lvm("lvs --noheadings -o seg_pe_ranges vg-a/root");
    assert!(first.trim().starts_with(&format!("{name}:0-")), "{first}");
    device.detach();
    let placed = Placed { kind: "xfs", options: "nouuid", offset: MIB + begin, len };
    let volume = store.beside("volume");
    File::create(&volume).and_then(|file| file.set_len(len)).expect("a volume");
    tool("mkfs.xfs").arg("-q").arg(&volume).succeeds();
    let seek = format!("seek={}", placed.offset);
    tool("dd")
        .args(["bs=1M", "oflag=seek_bytes", &seek, "conv=notrunc,sparse", "status=none"])
        .arg(format!("if={}", volume.display()))
        .arg(format!("of={}", path.display()))
        .succeeds();
    fs::remove_file(volume).expect("the volume");
    let mounted = KernelMount::new(&path, &placed, store.beside("making"));
    fill(&mounted.dir);
    let fstab = "/dev/mapper/vg--a-root / xfs defaults 0 0\n/dev/vg-a/swap none swap sw 0 0\n";
    fs::write(mounted.dir.join("etc/fstab"), fstab).expect("a file");
    mounted.end();
    store.img(["convert", "-f", "raw", "-O", "qcow2", path.to_str().expect("a plain path"), "vm.qcow2"]);
    fs::remove_file(path).expect("the disk");
    placed
}

pub(super) fn xfs_on_a_logical_volume(size: u64, fill: Fill) {
    let store = Store::new();
    let placed = disk(&store, size, fill);
    let mount = Mount::new(&store);
    four_layers(&store, &mount, &placed, &mut |root: &Path, _| root.to_owned());
    assert_roots(&mount, "vm", VIEWS, ["vg--a-root"; 4], &[]);
    let said = mount.text("vm/info/os.txt");
    for line in ["root: vg--a-root\n", "mount: / vg--a-root xfs", "mount: none vg--a-swap swap"] {
        assert!(said.contains(line), "{line}: {said}");
    }
    assert!(!said.contains("root-reason"), "{said}");
    mount.umount();
    compare_views(&store, "vm", &placed, &|_| "vg--a-root".to_owned());
}

#[test]
fn a_root_on_xfs_on_a_logical_volume() {
    xfs_on_a_logical_volume(500 * MIB, super::system);
}
