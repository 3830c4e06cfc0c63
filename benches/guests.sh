#!/usr/bin/env bash
# Guests' files: time to the first byte, and whole trees compared with the kernel's loop mount of the same
# view.
#
#   benches/guests.sh [ROUNDS] [--guestfish]
#
# Installs a Debian root file system (debootstrap) on a chain of four layers, with snapshots while it is
# written. Needs root. Each round times all methods in turn. Quote ratios of medians, because other load
# varies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rounds=5
guestfish=
for word in "$@"; do
    case $word in
        --guestfish) guestfish=yes ;;
        *) rounds=$word ;;
    esac
done

cargo build --release --locked
. benches/common.sh
need debootstrap sgdisk qemu-img mkfs.ext4 losetup

work=$SCRATCH
mkdir "$work"/{store,mnt,guest,kernel,tree}
loop=
put_back() {
    cd /
    umount "$work/guest" 2>/dev/null || true
    umount "$work/kernel" 2>/dev/null || true
    [ -z "$loop" ] || losetup -d "$loop" 2>/dev/null || true
    clean_up
}
trap put_back EXIT
trap 'exit 130' INT TERM

echo "installing Debian"
debootstrap --variant=minbase bookworm "$work/tree" >"$work/debootstrap.log" 2>&1

cd "$work"
qemu-img create -q -f qcow2 store/vm.qcow2 4G
"$CHAINFS" mount store mnt
sgdisk -n1:2048:+64M -t1:ef00 -n2:0:0 mnt/vm/active.raw >/dev/null
mkfs.ext4 -q -F mnt/vm/partitions/active/p2.raw
loop=$(losetup -f --show mnt/vm/partitions/active/p2.raw)
mount "$loop" guest
cp -a tree/. guest/
echo vm01 >guest/etc/hostname
sync -f guest
echo base >mnt/vm/control/snapshot
mkdir guest/srv/data
for number in $(seq 1500); do echo "$number" >"guest/srv/data/$number"; done
rm guest/etc/issue
sync -f guest
echo first >mnt/vm/control/snapshot
echo vm02 >guest/etc/hostname
rm -r guest/usr/share/doc/perl-base
sync guest/etc/hostname
echo second >mnt/vm/control/snapshot
echo three >>guest/etc/motd
sync guest/etc/motd
umount guest
losetup -d "$loop"
loop=
cp --sparse=always mnt/vm/partitions/second/p2.raw copy.raw
"$CHAINFS" umount mnt
# The kernel replays the journal once here, so that the timed mounts are of a clean file system.
mount -o loop copy.raw kernel
files=$(find kernel | wc -l)
umount kernel
echo "$files files"

# timed NAME COMMAND...: appends its milliseconds to times.NAME.
timed() {
    local name=$1 begin end
    shift
    begin=$(date +%s%N)
    "$@" >/dev/null
    end=$(date +%s%N)
    awk "BEGIN { print ($end - $begin) / 1e6 }" >>"times.$name"
}
tree() { ls -lR "$1" | cat; }
archive() { tar cf - "$1" | cat; }

for _ in $(seq "$rounds"); do
    echo 3 >/proc/sys/vm/drop_caches
    timed mount-cold "$CHAINFS" mount store mnt
    timed first-byte-cold cat mnt/vm/files/second/p2/etc/hostname
    timed first-byte-other-view cat mnt/vm/files/first/p2/etc/hostname
    timed first-byte-warm cat mnt/vm/files/second/p2/etc/hostname
    "$CHAINFS" umount mnt
    "$CHAINFS" mount store mnt
    timed first-byte-fresh-mount cat mnt/vm/files/second/p2/etc/hostname
    timed first-byte-root cat mnt/vm/files/second/root/etc/hostname
    "$CHAINFS" umount mnt
    timed first-byte-command "$CHAINFS" cat store/second.qcow2:/p2/etc/hostname
    [ -z "$guestfish" ] || timed guestfish guestfish --ro -i -a store/second.qcow2 cat /etc/hostname
    cat copy.raw store/* >/dev/null
    for kind in tree archive; do
        mount -o loop,ro copy.raw kernel
        timed "$kind-kernel" "$kind" kernel
        timed "$kind-kernel-again" "$kind" kernel
        umount kernel
        "$CHAINFS" mount store mnt
        ls mnt/vm/files/second/p2 >/dev/null
        timed "$kind-chainfs" "$kind" mnt/vm/files/second/p2
        timed "$kind-chainfs-again" "$kind" mnt/vm/files/second/p2
        "$CHAINFS" umount mnt
    done
    timed diff-files "$CHAINFS" diff --files store/base.qcow2 store/second.qcow2 || true
done

for times in times.*; do
    sort -g "$times" | awk -v name="${times#times.}" '
        { all[NR] = $1 }
        END { printf "%-24s median %9.1f ms  (%.1f - %.1f, %d rounds)\n", name, all[int((NR + 1) / 2)], all[1], all[NR], NR }'
done
"$CHAINFS" diff --files store/base.qcow2 store/second.qcow2 | tail -1
