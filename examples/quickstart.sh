#!/usr/bin/env bash
# Shows chainfs at work: makes a small store with real file systems in it, mounts it, looks around,
# compares snapshots and unmounts. As root or as an ordinary user; nothing is left behind.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

. "$project/tests/setup.sh"
need qemu-img mke2fs debugfs cc
need_rust
need_fuse

target=${CARGO_TARGET_DIR:-$project/target}
(cd "$project" && cargo build --release --workspace --locked)
PATH=$(realpath "$target")/release:$PATH

work=$(mktemp -d "${TMPDIR:-/tmp}/chainfs-quickstart.XXXXXX")
store=$work/store
mnt=$work/mnt
mkdir "$store" "$mnt"

clean_up() {
    cd /
    if grep -qF " $mnt " /proc/self/mountinfo; then
        chainfs umount --lazy "$mnt" || fusermount3 -uz "$mnt" || umount -l "$mnt" || true
    fi
    # Should the mount still be there, its disks are not ours to remove.
    rm -rf --one-file-system "$work"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

say() { printf '\n# %s\n' "$*"; }
show() {
    printf '$ %s\n' "$*"
    "$@"
}
fail() {
    echo "quickstart: $*" >&2
    exit 1
}

# --- A store: base <- installed <- monday <- web01, and try-php9 beside monday -------------------

say "making a store in $store"
cd "$store"

# guest_at DISK MOTD: the guest writes its /etc/motd.
guest_at() {
    echo "$2" >"$work/motd"
    printf '%s\n' 'cd /etc' 'rm motd' "write $work/motd motd" >"$work/commands"
    debugfs -w -f "$work/commands" "$1" >"$work/debugfs.log" 2>&1 || {
        cat "$work/debugfs.log" >&2
        fail "debugfs could not write the guest's file"
    }
}

# guest MOTD: the same, on the disk that the layers are made from, $work/disk.raw.
guest() {
    guest_at "$work/disk.raw" "$1"
}

# layer NAME BASE FORMAT: what the guest's disk has and BASE has not becomes NAME.
layer() {
    qemu-img convert -f raw -O qcow2 -B "$2" -F "$3" "$work/disk.raw" "$1"
}

mkdir -p "$work/root/etc"
echo 'fresh' >"$work/root/etc/motd"
mke2fs -q -t ext4 -E root_owner="$(id -u):$(id -g)" -d "$work/root" "$work/disk.raw" 16M >"$work/mke2fs.log"
cp --sparse=always "$work/disk.raw" base.raw

guest 'installed'
layer installed.qcow2 base.raw raw
cp --sparse=always "$work/disk.raw" "$work/installed.raw"

guest 'monday: all is well'
layer monday.qcow2 installed.qcow2 qcow2
guest 'tuesday: before the upgrade'
layer web01.qcow2 monday.qcow2 qcow2
qemu-img snapshot -c before-upgrade web01.qcow2
guest 'tuesday: upgraded'
qemu-img convert -n -f raw -O qcow2 "$work/disk.raw" web01.qcow2

cp --sparse=always "$work/installed.raw" "$work/disk.raw"
guest 'trying php 9'
layer try-php9.qcow2 installed.qcow2 qcow2
show ls -ls

# --- The same as a tree of disks -----------------------------------------------------------------

say 'one command makes a tree of it'
show chainfs mount "$store" "$mnt"
show cat "$mnt/.chainfs/tree.txt"
show ls -ls "$mnt" "$mnt/web01" "$mnt/web01/snapshots"
[ ! -s "$mnt/.chainfs/problems.txt" ] || fail "there should be no problems: $(cat "$mnt/.chainfs/problems.txt")"

say 'every snapshot is a disk: any tool that reads disks reads the past'
# reads DISK TEXT: the guest's /etc/motd as of DISK.
reads() {
    local text
    text=$(show_motd "$1")
    printf '%-55s %s\n' "${1#"$mnt/"}" "$text"
    [ "$text" = "$2" ] || fail "$1 should say '$2'"
}
show_motd() { debugfs -R 'cat /etc/motd' "$1" 2>/dev/null; }
echo "\$ debugfs -R 'cat /etc/motd' DISK"
reads "$mnt/web01/snapshots/base.raw" 'fresh'
reads "$mnt/web01/snapshots/installed.raw" 'installed'
reads "$mnt/web01/snapshots/monday.raw" 'monday: all is well'
reads "$mnt/web01/snapshots/active@before-upgrade.raw" 'tuesday: before the upgrade'
reads "$mnt/web01/active.raw" 'tuesday: upgraded'
reads "$mnt/try-php9/active.raw" 'trying php 9'

say "the guests' own files, in every snapshot, with ordinary tools"
show ls "$mnt/web01/files" "$mnt/web01/files/monday" "$mnt/web01/files/monday/disk"
show cat "$mnt/web01/files/monday/disk/etc/motd"
show cat "$mnt/web01/files/monday/volumes.txt"
status=0
show diff -r "$mnt/web01/files/installed/disk" "$mnt/web01/files/active/disk" || status=$?
[ "$status" -eq 1 ] || fail "diff should exit 1 for files that differ, not $status"
status=0
show chainfs diff --files installed.qcow2 web01.qcow2 || status=$?
[ "$status" -eq 1 ] || fail "chainfs diff should exit 1 for files that differ, not $status"
show chainfs versions web01.qcow2:/disk/etc/motd
[ "$(show chainfs cat monday.qcow2:/disk/etc/motd | tail -1)" = 'monday: all is well' ] || fail 'the same without a mount'

say 'qemu-img sees the same'
show qemu-img compare -U -f raw -F qcow2 "$mnt/web01/snapshots/monday.raw" monday.qcow2

say 'what differs, what is stored where, and whether all is sound'
status=0
show chainfs compare "$mnt/web01/snapshots/installed.raw" "$mnt/web01/snapshots/monday.raw" || status=$?
[ "$status" -eq 1 ] || fail "compare should exit 1 for disks that differ, not $status"
show chainfs compare web01.qcow2@before-upgrade "$mnt/web01/snapshots/active@before-upgrade.raw"
show chainfs info --backing-chain web01.qcow2
show chainfs map web01.qcow2
show chainfs check web01.qcow2

say "the active disk is written like any disk, and nobody else's bytes change"
echo "\$ debugfs -w -R 'write motd /etc/motd' active.raw"
guest_at "$mnt/web01/active.raw" 'tuesday: mended from outside'
reads "$mnt/web01/active.raw" 'tuesday: mended from outside'
reads "$mnt/web01/snapshots/active@before-upgrade.raw" 'tuesday: before the upgrade'
reads "$mnt/web01/snapshots/monday.raw" 'monday: all is well'
show truncate -s 20M "$mnt/try-php9/active.raw"
show stat -c '%n %s' "$mnt/try-php9/active.raw"

say 'the state of the disk is kept, while it is in use'
before=$(sha256sum <"$mnt/web01/active.raw")
exec 3<>"$mnt/web01/active.raw"
show chainfs snapshot "$mnt/web01" tuesday --description 'before the second upgrade'
guest_at "$mnt/web01/active.raw" 'wednesday: upgraded again'
[ "$(sha256sum <"$mnt/web01/snapshots/tuesday.raw")" = "$before" ] || fail 'the snapshot is not what the disk was'
reads "$mnt/web01/snapshots/tuesday.raw" 'tuesday: mended from outside'
reads "$mnt/web01/active.raw" 'wednesday: upgraded again'

say 'what a commit would do, what keeps it from being done, and one that is done'
show chainfs commit "$mnt/web01" --top monday --base installed --dry-run || true
echo "\$ echo 'top=monday' > control/commit"
if echo 'top=monday base=installed' 2>/dev/null >"$mnt/web01/control/commit"; then
    fail 'try-php9 stands on installed, which must not be written'
fi
show grep error "$mnt/web01/control/status"
show chainfs commit "$mnt/web01" --top tuesday --base monday --discard-internal -p
show chainfs pull "$mnt/web01" --base base
exec 3<&-
reads "$mnt/web01/active.raw" 'wednesday: upgraded again'
reads "$mnt/try-php9/active.raw" 'trying php 9'
show cat "$mnt/.chainfs/tree.txt"

say 'a disk goes back, what it held is kept, and another one is made of the same snapshot'
show chainfs snapshot "$mnt/web01" thursday
guest_at "$mnt/web01/active.raw" 'thursday: broken'
show chainfs revert "$mnt/web01" thursday --save broken
reads "$mnt/web01/active.raw" 'wednesday: upgraded again'
reads "$mnt/broken/snapshots/broken.raw" 'thursday: broken'
show chainfs clone "$mnt/web01" web02 --from thursday
reads "$mnt/web02/active.raw" 'wednesday: upgraded again'

say 'a snapshot is deleted, and no other disk changes'
show chainfs tree "$mnt/web01" --dry-run delete thursday
show chainfs delete "$mnt/web01" thursday -p
reads "$mnt/web01/active.raw" 'wednesday: upgraded again'
reads "$mnt/web02/active.raw" 'wednesday: upgraded again'
reads "$mnt/broken/snapshots/broken.raw" 'thursday: broken'
show chainfs resize "$mnt/web01" +4M
show stat -c '%n %s' "$mnt/web01/active.raw"
show cat "$mnt/.chainfs/tree.txt"

say 'and away'
show chainfs umount "$mnt"
if grep -qF " $mnt " /proc/self/mountinfo; then
    fail "$mnt is still mounted"
fi
show qemu-img check web01.qcow2
show qemu-img check try-php9.qcow2
show qemu-img check web02.qcow2
say 'done'
