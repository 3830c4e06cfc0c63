#!/usr/bin/env bash
# Creates the store of README.md: two machines with a common history and real file systems.
#
#   examples/store.sh STORE            STORE: an empty directory
#
#   base.raw <- installed <- monday <- tuesday <- web01 (has the internal snapshot before-upgrade)
#                         <- try-php9
#
# Needs qemu-img, mke2fs and debugfs, but no privileges and no mount.
set -euo pipefail
cd "$1"
work=$(mktemp -d "${TMPDIR:-/tmp}/chainfs-store.XXXXXX")
trap 'rm -rf "$work"' EXIT
disk=$work/disk.raw

# write PATH TEXT: writes a guest's file on the disk from which the layers are created, an hour after the one before.
moment=$(($(date +%s) - 86400))
write() {
    moment=$((moment + 3600))
    printf '%s\n' "$2" >"$work/text"
    printf '%s\n' "rm $1" "write $work/text $1" "sif $1 mtime @$moment" >"$work/commands"
    debugfs -w -f "$work/commands" "$disk?offset=1048576" >"$work/log" 2>&1 || {
        cat "$work/log" >&2
        exit 1
    }
}

# layer NAME BASE FORMAT: creates the overlay NAME with the difference between the disk and BASE.
layer() {
    qemu-img convert -f raw -O qcow2 -B "$2" -F "$3" "$disk" "$1"
}

mkdir -p "$work/root/etc" "$work/root/home/ann" "$work/root/bin" "$work/root/usr/bin"
echo 'fresh' >"$work/root/etc/motd"
echo 'NAME="Example Linux"
PRETTY_NAME="Example Linux 12"
ID=example' >"$work/root/etc/os-release"
echo '/dev/vda1 / ext4 defaults 0 1' >"$work/root/etc/fstab"
echo 'root:x:0:0:root:/root:/bin/sh' >"$work/root/etc/passwd"
echo 'remember the milk' >"$work/root/home/ann/notes"
find "$work/root" -exec touch -d "@$moment" {} +
truncate -s 24M "$disk"
# A partition table with one Linux partition of 45056 sectors (22 MiB) from sector 2048.
printf '\0\376\377\377\203\376\377\377\0\010\0\0\0\260\0\0' | dd of="$disk" bs=1 seek=446 conv=notrunc status=none
printf '\125\252' | dd of="$disk" bs=1 seek=510 conv=notrunc status=none
mke2fs -q -t ext4 -E "offset=1048576,root_owner=$(id -u):$(id -g)" -d "$work/root" "$disk" 22M 2>"$work/log"
cp --sparse=always "$disk" base.raw

write /etc/motd 'installed'
layer installed.qcow2 base.raw raw
cp --sparse=always "$disk" "$work/installed.raw"

write /etc/motd 'monday: all is well'
layer monday.qcow2 installed.qcow2 qcow2
write /etc/motd 'tuesday: a new user'
write /etc/passwd $'root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh'
layer tuesday.qcow2 monday.qcow2 qcow2
write /etc/motd 'wednesday: before the upgrade'
layer web01.qcow2 tuesday.qcow2 qcow2
qemu-img snapshot -c before-upgrade web01.qcow2
write /etc/motd 'wednesday: upgraded'
qemu-img convert -n -f raw -O qcow2 "$disk" web01.qcow2

cp --sparse=always "$work/installed.raw" "$disk"
write /etc/motd 'trying php 9'
layer try-php9.qcow2 installed.qcow2 qcow2
