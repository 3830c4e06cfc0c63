//! Logical volumes of every type that needs the kernel to be made: RAID, snapshots, thin pools, caches, and
//! volume groups on arrays.

use super::{Judged, Scenario, is_wanted, judge, matches};
use support::*;

const MODULES: [&str; 11] = [
    "md-mod",
    "raid0",
    "raid1",
    "raid456",
    "raid10",
    "dm-raid",
    "dm-snapshot",
    "dm-thin-pool",
    "dm-cache",
    "dm-cache-smq",
    "dm-mirror",
];

/// A RAID type: LVM's words, its disks, and how many may be missing.
type Kind = (&'static str, &'static str, usize, usize);

const KINDS: [Kind; 17] = [
    ("raid1", "--type raid1 -m 2", 3, 2),
    ("raid10", "--type raid10 -i 2 -m 1 -I 16k", 4, 1),
    ("raid4", "--type raid4 -i 2 -I 16k", 3, 1),
    ("raid5_ls", "--type raid5_ls -i 3 -I 16k", 4, 1),
    ("raid5_la", "--type raid5_la -i 3 -I 16k", 4, 1),
    ("raid5_rs", "--type raid5_rs -i 3 -I 16k", 4, 1),
    ("raid5_ra", "--type raid5_ra -i 3 -I 16k", 4, 1),
    ("raid5_n", "--type raid5_n -i 3 -I 16k", 4, 1),
    ("raid6_zr", "--type raid6_zr -i 3 -I 16k", 5, 2),
    ("raid6_nr", "--type raid6_nr -i 3 -I 16k", 5, 2),
    ("raid6_nc", "--type raid6_nc -i 3 -I 16k", 5, 2),
    ("raid6_n_6", "--type raid6_n_6 -i 3 -I 16k", 5, 2),
    ("raid6_ls_6", "--type raid6_ls_6 -i 3 -I 16k", 5, 2),
    ("raid6_la_6", "--type raid6_la_6 -i 3 -I 16k", 5, 2),
    ("raid6_rs_6", "--type raid6_rs_6 -i 3 -I 16k", 5, 2),
    ("raid6_ra_6", "--type raid6_ra_6 -i 3 -I 16k", 5, 2),
    ("raid0", "--type raid0 -i 3 -I 16k", 3, 0),
];

const USUAL: [&str; 4] = ["raid6_zr", "snapshots", "thin", "stack"];

/// Shell functions: LVM restricted to the devices in `$PVS`, a new group of them, and a write of `$4` blocks
/// of 4 KiB at block `$3` with the pattern's from block `$2`.
pub(super) const BEFORE: &str = "mkdir -p /etc/lvm /run/lock/lvm /run/lvm\n\
    cat >/etc/lvm/lvm.conf <<END\n\
    devices { use_devicesfile = 0 obtain_device_list_from_udev = 0 external_device_info_source = \"none\" \
        md_component_detection = 1 issue_discards = 0 }\n\
    activation { udev_sync = 0 udev_rules = 0 monitoring = 0 verify_udev_operations = 0 \
        snapshot_autoextend_threshold = 100 thin_pool_autoextend_threshold = 100 }\n\
    backup { backup = 0 archive = 0 }\n\
    allocation { cache_pool_max_chunks = 100000 }\n\
    global { event_activation = 0 use_lvmpolld = 0 thin_check_executable = \"\" cache_check_executable = \
        \"\" }\n\
    END\n\
    export LVM_SUPPRESS_FD_WARNINGS=1 MDADM_NO_UDEV=1 MDADM_NO_SYSTEMCTL=1; mkdir -p /run/mdadm /dev/md\n\
    L() { verb=$1; shift; try lvm $verb --devices $PVS -q -y \"$@\"; }\n\
    group() { PVS=$(echo $* | tr ' ' ,); L pvcreate $*; L vgcreate -s 128k vg $*; }\n\
    put() { dd if=/dev/vdg of=$1 bs=4k skip=$2 seek=$3 count=$4 conv=notrunc 2>/dev/null; sync; }\n\
    synced() { for n in $(seq 200); do lvm lvs --devices $PVS --noheadings -o sync_percent vg/$1 | grep -q \
        100.00 && return; sleep 0.2; done; echo FAILED $scenario is never in sync; }\n\
    echo 200000 >/proc/sys/dev/raid/speed_limit_min\n";

const END: &str = "L vgchange -an vg\n";

fn raid(words: &str, disks: usize) -> String {
    let parts: Vec<String> = (0..disks).map(|disk| format!("$P{disk}")).collect();
    let wait = if words.contains("raid0") { "" } else { "synced lv" };
    format!(
        "group {}\nL lvcreate {words} -n lv -L 3m vg\n{wait}\nfill /dev/vg/lv\njudge lv /dev/vg/lv\n{END}",
        parts.join(" ")
    )
}

fn check(judged: &Judged, scenario: &str, disks: &[usize], volume: &str, number: usize) {
    if !is_wanted(scenario, &USUAL) {
        return;
    }
    let parts: Vec<Vec<u8>> = disks.iter().map(|disk| judged.parts[scenario][*disk].clone()).collect();
    let result = matches(&parts, volume, &judged.sums[scenario][number]);
    result.unwrap_or_else(|fact| panic!("{scenario} of {disks:?}: {fact}"));
}

#[test]
fn logical_volumes_are_read_as_by_the_kernel() {
    let mut scenarios: Vec<Scenario> = KINDS
        .iter()
        .map(|(name, words, disks, _)| Scenario { name: (*name).to_owned(), script: raid(words, *disks) })
        .collect();
    let mut add = |name: &str, script: String| scenarios.push(Scenario { name: name.to_owned(), script });
    let snapshots = "group $P0 $P1\nL lvcreate -n lv -L 3m vg\nfill /dev/vg/lv\n\
        L lvcreate -s -n snap -c 4k -L 2m vg/lv\nL lvcreate -s -n later -c 16k -L 2m vg/lv\n\
        put /dev/vg/lv 5000 0 3; put /dev/vg/lv 5100 77 100; put /dev/vg/snap 6000 30 2; put /dev/vg/snap \
            6100 700 68\n\
        put /dev/vg/lv 6500 690 20; put /dev/vg/later 7000 1 1\n\
        judge lv /dev/vg/lv; judge snap /dev/vg/snap; judge later /dev/vg/later\n";
    add("snapshots", snapshots.to_owned() + END);
    add(
        "overflow",
        "group $P0\nL lvcreate -n lv -L 3m vg\nfill /dev/vg/lv\nL lvcreate -s -n snap -c 4k -L 256k vg/lv\n\
         fill /dev/vg/lv 100\njudge lv /dev/vg/lv\n"
            .to_owned()
            + END,
    );
    let thin = "group $P0 $P1 $P2\nL lvcreate -L 10m -T vg/pool -c 64k --poolmetadatasize 2m -Zn\n\
        L lvcreate -V 40m -T vg/pool -n one\nput /dev/vg/one 100 3 200; put /dev/vg/one 900 5000 300\n\
        L lvcreate -s -n two vg/one -kn\nput /dev/vg/one 2000 0 17; put /dev/vg/one 3000 9000 33\n\
        put /dev/vg/two 4000 100 40; put /dev/vg/two 4100 10200 40\nL lvcreate -s -n three vg/two -kn\n\
        put /dev/vg/three 4400 110 1\n\
        for n in $(seq 0 2 150); do dd if=/dev/vdg of=/dev/vg/three bs=512 skip=$n seek=$((n * 300)) count=1 \
            conv=notrunc 2>/dev/null; done; sync\n\
        L lvcreate -n outer -L 1m vg\nfill /dev/vg/outer 9\nL lvchange -an vg/outer\nL lvchange -pr \
            vg/outer\n\
        L lvcreate -s --thinpool vg/pool -n inner vg/outer -kn\nput /dev/vg/inner 5000 20 7\n\
        judge one /dev/vg/one; judge two /dev/vg/two; judge three /dev/vg/three; judge inner /dev/vg/inner\n";
    add("thin", thin.to_owned() + END);
    // Not deactivated: the pool is used on, and its metadata are those of the last flush.
    add("thin-live", thin.to_owned() + "lvm vgchange --devices $PVS -an vg >/dev/null 2>&1\n");
    // Blocks become cached when they are used often, for a while.
    let warm = "for n in $(seq 8); do for m in $(seq 4); do put /dev/vg/lv $((100 + m)) 8 8; \
        put /dev/vg/lv 300 304 16; dd if=/dev/vg/lv of=/dev/null bs=32k skip=1 count=2 iflag=direct \
            2>/dev/null; done; \
        sleep 0.5; done\n\
        put /dev/vg/lv 7000 8 40; put /dev/vg/lv 7700 350 12\necho \"CACHE $scenario $(dmsetup status \
            vg-lv)\"\njudge lv /dev/vg/lv\n";
    let cache = |words: &str| {
        format!(
            "group $P0 $P1\nL lvcreate -n lv -L 3m vg $P0\nfill /dev/vg/lv\n\
             L lvcreate --type cache-pool -n fast -L 2m -c 32k --poolmetadatasize 2m vg $P1\n\
             L lvconvert --type cache --cachepool vg/fast {words} vg/lv\n{warm}"
        )
    };
    add("writeback", cache("--cachemode writeback") + END);
    add("writethrough", cache("--cachemode writethrough") + END);
    add("format1", cache("--cachemode writeback --cachemetadataformat 1") + END);
    // The cache as a crash leaves it: what is on the devices while it is used.
    let keep = "for n in 0 1; do eval dd if=\\$P$n of=/tmp/p$n 2>/dev/null; done\n".to_owned();
    let restore = "for n in 0 1; do eval dd if=/tmp/p$n of=\\$P$n 2>/dev/null; done; sync\n";
    add("cache-live", cache("--cachemode writeback") + &keep + END + restore);
    add(
        "cachevol",
        format!(
            "group $P0 $P1\nL lvcreate -n lv -L 3m vg $P0\nfill /dev/vg/lv\nL lvcreate -n fast -L 5m vg $P1\n\
             L lvconvert --type cache --cachevol vg/fast -c 32k --cachemode writeback vg/lv\n{warm}{END}"
        ),
    );
    let stack = "try mdadm --create /dev/md9 --run --force --name=low --homehost=guest --level=1 \
        --raid-devices=2 $P0 $P1\n\
        try mdadm --create /dev/md8 --run --force --name=five --homehost=guest --level=5 --chunk=16 \
        --raid-devices=3 $P2 $P3 $P4\nmdadm --wait /dev/md8 >/dev/null 2>&1\n\
        group /dev/md9 /dev/md8\nL lvcreate -L 12m -T vg/pool -c 64k --poolmetadatasize 2m -Zn\n\
        L lvcreate -V 30m -T vg/pool -n one\nput /dev/vg/one 100 3 1500\nput /dev/vg/one 3000 6000 700\n\
        L lvcreate -n plain -i 2 -I 8k -l 100%FREE vg\nfill /dev/vg/plain\n\
        judge one /dev/vg/one; judge plain /dev/vg/plain\n";
    add("stack", stack.to_owned() + END + "try mdadm --stop /dev/md8; try mdadm --stop /dev/md9\n");
    scenarios.retain(|scenario| is_wanted(&scenario.name, &USUAL));
    let sizes = [12 * MIB, 12 * MIB, 8 * MIB, 8 * MIB, 8 * MIB, MIB];
    let judged = judge(&scenarios, sizes, &["lvm", "mdadm", "dmsetup"], &MODULES, BEFORE);

    for (kind, _, disks, spare) in KINDS.into_iter().filter(|(kind, ..)| is_wanted(kind, &USUAL)) {
        let all: Vec<usize> = (0..disks).collect();
        check(&judged, kind, &all, "vg-lv", 0);
        for set in 0..1u32 << disks {
            let left: Vec<usize> = all.iter().copied().filter(|disk| set & (1 << disk) != 0).collect();
            if left.len() < disks && left.len() + spare >= disks {
                check(&judged, kind, &left, "vg-lv", 0);
            }
        }
        println!("{kind}: as the kernel's, also degraded");
    }
    for (number, name) in ["vg-lv", "vg-snap", "vg-later"].into_iter().enumerate() {
        check(&judged, "snapshots", &[0, 1], name, number);
    }
    check(&judged, "overflow", &[0], "vg-lv", 0);
    for (number, name) in ["vg-one", "vg-two", "vg-three", "vg-inner"].into_iter().enumerate() {
        check(&judged, "thin", &[0, 1, 2], name, number);
        check(&judged, "thin-live", &[0, 1, 2], name, number);
    }
    for scenario in ["writeback", "writethrough", "format1", "cache-live", "cachevol"] {
        check(&judged, scenario, &[0, 1], "vg-lv", 0);
    }
    for (number, name) in ["vg-one", "vg-plain"].into_iter().enumerate() {
        for disks in [&[0, 1, 2, 3, 4][..], &[1, 2, 3, 4], &[0, 3, 4], &[4, 2, 1]] {
            check(&judged, "stack", disks, name, number);
        }
    }
}
