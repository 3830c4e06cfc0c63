//! A Debian in a virtual machine: XFS on a thin volume, on an array of two disks, each a chain of the store;
//! and ext4 on a logical volume in an encrypted one. The machine runs on the mount's active disks while
//! snapshots are taken. Only in long runs.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::SystemTime;

use support::command::{Control, give};
use support::{MIB, Mount, Outcome as _, Store, tool};
use tempfile::TempDir;

use super::debian::archive;
use super::guest::{KernelMount, Placed};
use super::{VERBATIM, VIEWS, assert_roots, assert_same_files};
use crate::volumes::kernel::machine::converse;

const DISK: u64 = 1100 * MIB;
const VOLUME: u64 = 900 * MIB;
const MODULES: [&str; 11] = [
    "md-mod",
    "raid1",
    "dm-thin-pool",
    "xfs",
    "crc32c_generic",
    "dm-crypt",
    "aesni-intel",
    "ecb",
    "xts",
    "trusted",
    "ext4",
];
const PROGRAMS: [&str; 7] = ["lvm", "mdadm", "dmsetup", "mkfs.xfs", "mkfs.ext4", "blkid", "cryptsetup"];

/// How a system's root volume, `/dev/vg/root`, lies on its disks.
struct Stack {
    chains: &'static [&'static str],
    /// Makes the device that LVM is on, `$PV`, from the disks `$D`.
    make: &'static str,
    /// Opens and closes it.
    open: &'static str,
    close: &'static str,
    pv: &'static str,
    /// Words for lvcreate.
    volume: &'static str,
    kind: &'static str,
    /// Options of the kernel's mount of the volume.
    options: &'static str,
    /// Lines of the system's crypttab.
    crypttab: &'static str,
}

const ARRAY: Stack = Stack {
    chains: &["a", "b"],
    make: "mdadm --create /dev/md0 --run --metadata=1.2 --name=system --homehost=guest --level=1 \
        --assume-clean --raid-devices=2 $D",
    open: "mdadm --assemble --run /dev/md0 $D",
    close: "mdadm --stop /dev/md0",
    pv: "/dev/md0",
    volume: "-V 900m -T vg/pool",
    kind: "xfs",
    options: "nouuid",
    crypttab: "",
};

const ENCRYPTED: Stack = Stack {
    chains: &["vm"],
    make: "cryptsetup luksFormat -q --type luks2 --use-urandom --disable-locks --pbkdf pbkdf2 \
        --pbkdf-force-iterations 1000 --uuid 9c448801-9c28-427e-beaa-6c656f92b030 --key-file /key $D",
    open: "cryptsetup open --disable-keyring --disable-locks --key-file /key $D secret",
    close: "cryptsetup close --disable-locks secret",
    pv: "/dev/mapper/secret",
    volume: "-L 900m -Wn vg",
    kind: "ext4",
    options: "rw",
    crypttab: "secret UUID=9c448801-9c28-427e-beaa-6c656f92b030 none luks",
};

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
    L() { verb=$1; shift; try lvm $verb --devices $PV -q -y \"$@\"; }\n\
    export DM_DISABLE_UDEV=1; mkdir -p /run/cryptsetup; mknod /dev/urandom c 1 9 2>/dev/null\n\
    printf secret >/key\n";

/// Installs the system, and writes it on; between two layers it waits for an answer, and writes meanwhile.
const GUEST: &str = "L pvcreate $PV; L vgcreate -s 4m vg $PV\n\
    [ $KIND = ext4 ] || L lvcreate -l 90%FREE -T vg/pool -c 64k --poolmetadatasize 8m -Zn\n\
    L lvcreate $VOLUME -n root\n\
    try mkfs.$KIND -q /dev/vg/root\n\
    try mount -t $KIND -o noatime /dev/vg/root /m\n\
    try tar xf $ARCHIVE -C /m\n\
    echo \"/dev/mapper/vg-root / $KIND defaults 0 0\" >/m/etc/fstab; echo $CRYPTTAB >/m/etc/crypttab\n\
    for n in 1 2 3 4; do\n\
      mkdir /m/srv/$n; cp -a /m/etc /m/srv/$n/; rm -r /m/srv/$((n - 1))/etc/a* 2>/dev/null\n\
      mv /m/srv/$n/etc/fstab /m/srv/$n/moved\n\
      echo layer-$n | dd of=/m/etc/hostname conv=fsync 2>/dev/null\n\
      touch /tmp/writing\n\
      (i=0; while [ -e /tmp/writing ]; do i=$((i + 1)); \
        dd if=/dev/urandom of=/m/srv/live-$n-$((i % 200)) bs=5000 count=1 2>/dev/null; done) &\n\
      sleep 1; echo \"LAYER $n\"; read answer; rm /tmp/writing; wait\n\
    done\n";

fn device(number: usize) -> String {
    format!("/dev/vd{}", (b'a' + number as u8) as char)
}

/// The view of a chain that is the layer `view` of its guest.
fn view_of(stack: &Stack, chain: &str, view: &str) -> String {
    if view == "active" || stack.chains.len() == 1 { view.to_owned() } else { format!("{chain}-{view}") }
}

fn four_layers(stack: &Stack, options: &str) {
    let store = Store::new();
    let scratch = TempDir::new().expect("a directory");
    for chain in stack.chains {
        store.create(&format!("{chain}.qcow2"), DISK, "");
    }
    let keys = store.beside("keys.toml");
    fs::write(&keys, "[[key]]\nuuid = \"*\"\npassphrase = \"secret\"\n").expect("keys");
    fs::set_permissions(&keys, fs::Permissions::from_mode(0o600)).expect("their mode");
    let options = options.replace("KEYS", &keys.display().to_string());
    let mount = Mount::with(&store, &options);
    let count = stack.chains.len();
    let mut disks: Vec<PathBuf> =
        stack.chains.iter().map(|chain| mount.path(chain).join("active.raw")).collect();
    disks.push(archive());
    let Stack { make, open, pv, volume, kind, crypttab, .. } = stack;
    let own: Vec<String> = (0..count).map(device).collect();
    let (own, archive) = (own.join(" "), device(count));
    let script = format!(
        "{BEFORE}PV={pv} KIND={kind} VOLUME='{volume}' ARCHIVE={archive} CRYPTTAB='{crypttab}' D='{own}'\n\
         try {make}\n[ -b $PV ] || try {open}\n{GUEST}"
    );
    let mut layers = 0;
    let snapshot = mount.path(".chainfs/control/snapshot");
    let said = converse(&scratch, (&disks, "writeback"), &PROGRAMS, &MODULES, &script, &mut |line| {
        line.strip_prefix("LAYER ")?;
        layers += 1;
        if layers < 4 {
            let command = format!("l{layers} chains={}\n", stack.chains.join(","));
            match stack.chains {
                [chain] => Control::of(&mount, chain).done(&format!("snapshot l{layers}")),
                _ => assert_eq!(give(&snapshot, command.as_bytes()), None, "layer {layers}"),
            }
        }
        Some("on")
    });
    assert!(!said.contains("FAILED") && layers == 4, "{said}");
    let words: Vec<&str> = if options.is_empty() { Vec::new() } else { vec!["-o", &options] };
    for chain in stack.chains {
        let views = VIEWS.map(|view| view_of(stack, chain, view));
        assert_roots(&mount, chain, views.each_ref().map(String::as_str), ["vg-root"; 4], &words);
    }
    let chain = stack.chains[0];
    println!(
        "{}{}",
        mount.text(format!("{chain}/files/active/volumes.txt")),
        mount.text(format!("{chain}/info/os.txt"))
    );
    mount.umount();
    compare(stack, &store, &scratch, &options);
}

/// The machine's kernel reads the volume of each view, and this machine's kernel the file system in it.
fn compare(stack: &Stack, store: &Store, scratch: &TempDir, options: &str) {
    let options = if options.is_empty() { VERBATIM.to_owned() } else { format!("{VERBATIM},{options}") };
    let mount = Mount::with(store, &options);
    let mut disks: Vec<PathBuf> = Vec::new();
    let mut script = format!("{BEFORE}PV={}\n", stack.pv);
    let count = stack.chains.len();
    for (number, view) in VIEWS.into_iter().enumerate() {
        for chain in stack.chains {
            let disk = match view {
                "active" => mount.path(chain).join("active.raw"),
                _ => mount.path(chain).join(format!("snapshots/{}.raw", view_of(stack, chain, view))),
            };
            let copy = scratch.path().join(format!("{chain}-{view}"));
            tool("cp").arg("--sparse=always").arg(disk).arg(&copy).succeeds();
            disks.push(copy);
        }
        let own: Vec<String> = (number * count..(number + 1) * count).map(device).collect();
        let (own, out) = (own.join(" "), device(VIEWS.len() * count + number));
        let Stack { open, close, .. } = stack;
        let _ = write!(
            script,
            "D='{own}'; try {open}\nL vgchange -ay vg\ntry dd if=/dev/vg/root of={out} bs=1M\n\
             L vgchange -an vg\ntry {close}\n"
        );
    }
    let volumes = VIEWS.map(|view| scratch.path().join(format!("volume-{view}")));
    for volume in &volumes {
        File::create(volume).and_then(|file| file.set_len(VOLUME)).expect("a volume");
    }
    disks.extend(volumes.iter().cloned());
    let said = converse(scratch, (&disks, "unsafe"), &PROGRAMS, &MODULES, &script, &mut |_| None);
    assert!(!said.contains("FAILED"), "{said}");
    let placed = Placed { kind: stack.kind, options: stack.options, offset: 0, len: VOLUME };
    let chain = stack.chains[0];
    for (view, volume) in VIEWS.into_iter().zip(&volumes) {
        let began = SystemTime::now();
        let kernel = KernelMount::new(volume, &placed, store.beside("kernel"));
        let shown = mount.path(format!("{chain}/files/{}/vg-root", view_of(stack, chain, view)));
        assert_same_files(&format!("{} on {}, {view}", stack.kind, stack.pv), &shown, &kernel.dir, began);
        kernel.end();
    }
    mount.umount();
}

#[test]
#[ignore = "takes minutes"]
fn debian_on_xfs_on_a_thin_volume_on_an_array() {
    four_layers(&ARRAY, "");
}

#[test]
#[ignore = "takes minutes"]
fn debian_on_ext4_on_a_logical_volume_on_luks() {
    four_layers(&ENCRYPTED, "keys=KEYS");
}
