//! A Debian in a virtual machine: XFS on a thin volume, on an array of two disks, each a chain of the store. The
//! machine runs on the mount's active disks while snapshots of both chains are taken. Only in long runs.

use std::fmt::Write as _;
use std::fs::File;
use std::path::PathBuf;
use std::time::SystemTime;

use support::command::give;
use support::{MIB, Mount, Outcome as _, Store, tool};
use tempfile::TempDir;

use super::debian::{archive, is_long};
use super::guest::{KernelMount, Placed};
use super::{VERBATIM, VIEWS, assert_roots, assert_same_files};
use crate::volumes::kernel::machine::converse;

const DISK: u64 = 1100 * MIB;
const VOLUME: u64 = 1600 * MIB;
const MODULES: [&str; 5] = ["md-mod", "raid1", "dm-thin-pool", "xfs", "crc32c_generic"];
const PROGRAMS: [&str; 5] = ["lvm", "mdadm", "dmsetup", "mkfs.xfs", "blkid"];

/// Shell functions, and LVM on the array alone.
const BEFORE: &str = "mkdir -p /etc/lvm /run/lock/lvm /run/lvm /run/mdadm /dev/md /m\n\
    cat >/etc/lvm/lvm.conf <<END\n\
    devices { use_devicesfile = 0 obtain_device_list_from_udev = 0 external_device_info_source = \"none\" \
        issue_discards = 0 }\n\
    activation { udev_sync = 0 udev_rules = 0 monitoring = 0 verify_udev_operations = 0 }\n\
    backup { backup = 0 archive = 0 }\n\
    global { event_activation = 0 use_lvmpolld = 0 thin_check_executable = \"\" }\n\
    END\n\
    export LVM_SUPPRESS_FD_WARNINGS=1 MDADM_NO_UDEV=1 MDADM_NO_SYSTEMCTL=1\n\
    try() { \"$@\" >/tmp/out 2>&1 || { echo \"FAILED $*\"; cat /tmp/out; }; }\n\
    L() { verb=$1; shift; try lvm $verb --devices /dev/md0 -q -y \"$@\"; }\n";

/// Installs the system, and writes it on; between two layers it waits for an answer, and writes meanwhile.
const GUEST: &str = "try mdadm --create /dev/md0 --run --metadata=1.2 --name=system --homehost=guest --level=1 \
        --assume-clean --raid-devices=2 /dev/vda /dev/vdb\n\
    L pvcreate /dev/md0; L vgcreate -s 4m vg /dev/md0\n\
    L lvcreate -l 90%FREE -T vg/pool -c 64k --poolmetadatasize 8m -Zn\n\
    L lvcreate -V 1600m -T vg/pool -n root\n\
    try mkfs.xfs -q /dev/vg/root\n\
    try mount -t xfs -o noatime /dev/vg/root /m\n\
    try tar xf /dev/vdc -C /m\n\
    echo '/dev/mapper/vg-root / xfs defaults 0 0' >/m/etc/fstab\n\
    for n in 1 2 3 4; do\n\
      mkdir /m/srv/$n; cp -a /m/etc /m/srv/$n/; rm -r /m/srv/$((n - 1))/etc/a* 2>/dev/null\n\
      mv /m/srv/$n/etc/fstab /m/srv/$n/moved\n\
      echo layer-$n | dd of=/m/etc/hostname conv=fsync 2>/dev/null\n\
      touch /tmp/writing\n\
      (i=0; while [ -e /tmp/writing ]; do i=$((i + 1)); \
        dd if=/dev/urandom of=/m/srv/live-$n-$((i % 200)) bs=5000 count=1 2>/dev/null; done) &\n\
      sleep 1; echo \"LAYER $n\"; read answer; rm /tmp/writing; wait\n\
    done\n";

#[test]
fn debian_on_xfs_on_a_thin_volume_on_an_array() {
    if !is_long() {
        return;
    }
    let store = Store::new();
    let scratch = TempDir::new().expect("a directory");
    for chain in ["a", "b"] {
        store.create(&format!("{chain}.qcow2"), DISK, "");
    }
    let mount = Mount::new(&store);
    let disks = [mount.path("a/active.raw"), mount.path("b/active.raw"), archive()];
    let snapshot = mount.path(".chainfs/control/snapshot");
    let mut layers = 0;
    let said = converse(
        &scratch,
        (&disks, "writeback"),
        &PROGRAMS,
        &MODULES,
        &(BEFORE.to_owned() + GUEST),
        &mut |line| {
            let layer = line.strip_prefix("LAYER ")?;
            layers += 1;
            if layers < 4 {
                assert_eq!(
                    give(&snapshot, format!("l{layer} chains=a,b\n").as_bytes()),
                    None,
                    "layer {layer}"
                );
            }
            Some("on")
        },
    );
    assert!(!said.contains("FAILED") && layers == 4, "{said}");
    let views = |chain: &str| {
        VIEWS.map(|view| if view == "active" { view.to_owned() } else { format!("{chain}-{view}") })
    };
    for chain in ["a", "b"] {
        let views = views(chain);
        assert_roots(&mount, chain, views.each_ref().map(String::as_str), ["vg-root"; 4]);
    }
    println!("{}{}", mount.text("a/files/active/volumes.txt"), mount.text("a/info/os.txt"));
    mount.umount();

    // The machine's kernel reads the volume of each view, and this machine's kernel the file system in it.
    let mount = Mount::with(&store, VERBATIM);
    let mut disks: Vec<PathBuf> = Vec::new();
    let mut script = BEFORE.to_owned();
    let letter = |number: usize| (b'a' + number as u8) as char;
    for (number, view) in VIEWS.into_iter().enumerate() {
        for chain in ["a", "b"] {
            let disk = match view {
                "active" => mount.path(chain).join("active.raw"),
                _ => mount.path(chain).join(format!("snapshots/{chain}-{view}.raw")),
            };
            let copy = scratch.path().join(format!("{chain}-{view}"));
            tool("cp").arg("--sparse=always").arg(disk).arg(&copy).succeeds();
            disks.push(copy);
        }
        let (one, two, out) = (letter(2 * number), letter(2 * number + 1), letter(8 + number));
        let _ = write!(
            script,
            "try mdadm --assemble --run /dev/md0 /dev/vd{one} /dev/vd{two}\nL vgchange -ay vg\n\
             try dd if=/dev/vg/root of=/dev/vd{out} bs=1M\nL vgchange -an vg\ntry mdadm --stop /dev/md0\n"
        );
    }
    let volumes = VIEWS.map(|view| scratch.path().join(format!("volume-{view}")));
    for volume in &volumes {
        File::create(volume).and_then(|file| file.set_len(VOLUME)).expect("a volume");
    }
    disks.extend(volumes.iter().cloned());
    let said = converse(&scratch, (&disks, "unsafe"), &PROGRAMS, &MODULES, &script, &mut |_| None);
    assert!(!said.contains("FAILED"), "{said}");
    let placed = Placed { kind: "xfs", options: "nouuid", offset: 0, len: VOLUME };
    for (view, volume) in views("a").iter().zip(&volumes) {
        let began = SystemTime::now();
        let kernel = KernelMount::new(volume, &placed, store.beside("kernel"));
        let shown = mount.path(format!("a/files/{view}/vg-root"));
        assert_same_files(&format!("array, {view}"), &shown, &kernel.dir, began);
        kernel.end();
    }
    mount.umount();
}
