#!/usr/bin/env bash
# Demonstrates chainfs: creates a small store with real file systems, mounts it, reads and compares snapshots,
# runs commands and unmounts. Runs as root or as an ordinary user, and removes all its files.
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
    # If the mount is still there, its files must not be removed.
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

# --- The store of the README: base <- installed <- monday <- tuesday <- web01, and try-php9 on installed
# ------------

say "create a store in $store"
"$project/examples/store.sh" "$store"
cd "$store"

# guest_at PARTITION MOTD: the guest writes its /etc/motd.
guest_at() {
    echo "$2" >"$work/motd"
    printf '%s\n' 'cd /etc' 'rm motd' "write $work/motd motd" >"$work/commands"
    debugfs -w -f "$work/commands" "$1" >"$work/debugfs.log" 2>&1 || {
        cat "$work/debugfs.log" >&2
        fail "debugfs could not write the guest's file"
    }
}
show ls -ls

# --- The same as a tree of disks -----------------------------------------------------------------

say 'mount it with one command'
show chainfs mount "$store" "$mnt"
show cat "$mnt/.chainfs/tree.txt"
show ls -ls "$mnt" "$mnt/web01" "$mnt/web01/snapshots"
[ ! -s "$mnt/.chainfs/problems.txt" ] || fail "there should be no problems: $(cat "$mnt/.chainfs/problems.txt")"

say 'the mount explains itself, as text and as a page for any browser'
show head -n 12 "$mnt/README.txt"
show ls -l "$mnt/.chainfs/index.html"

say 'each snapshot and each of its partitions is a disk, for any tool that reads disks'
# reads PARTITION TEXT: checks the guest's /etc/motd in this partition.
reads() {
    local text
    text=$(show_motd "$1")
    printf '%-55s %s\n' "${1#"$mnt/"}" "$text"
    [ "$text" = "$2" ] || fail "$1 should say '$2'"
}
show_motd() { debugfs -R 'cat /etc/motd' "$1" 2>/dev/null; }
echo "\$ debugfs -R 'cat /etc/motd' PARTITION"
web01=$mnt/web01/partitions
reads "$web01/base/p1.raw" 'fresh'
reads "$web01/installed/p1.raw" 'installed'
reads "$web01/monday/p1.raw" 'monday: all is well'
reads "$web01/active@before-upgrade/p1.raw" 'wednesday: before the upgrade'
reads "$web01/active/p1.raw" 'wednesday: upgraded'
reads "$mnt/try-php9/partitions/active/p1.raw" 'trying php 9'

say "read the guests' files in each snapshot with ordinary tools"
show ls "$mnt/web01/files" "$mnt/web01/files/monday" "$mnt/web01/files/monday/p1"
show cat "$mnt/web01/files/monday/root/etc/motd"
show cat "$mnt/web01/files/monday/volumes.txt"
status=0
show diff -r "$mnt/web01/files/installed/p1" "$mnt/web01/files/active/p1" || status=$?
[ "$status" -eq 1 ] || fail "diff should exit 1 for files that differ, not $status"
status=0
show chainfs diff --files installed.qcow2 web01.qcow2 || status=$?
[ "$status" -eq 1 ] || fail "chainfs diff should exit 1 for files that differ, not $status"
show chainfs versions web01.qcow2:/root/etc/motd
show chainfs log -p web01.qcow2:/root/etc/passwd
show chainfs find motd "$store"
[ "$(show chainfs cat web01.qcow2@monday:/root/etc/motd | tail -1)" = 'monday: all is well' ] || fail 'the same without a mount'

say 'qemu-img reads the same data'
show qemu-img compare -U -f raw -F qcow2 "$mnt/web01/snapshots/monday.raw" monday.qcow2

say 'compare disks, show where data is stored, and check an image'
status=0
show chainfs compare "$mnt/web01/snapshots/installed.raw" "$mnt/web01/snapshots/monday.raw" || status=$?
[ "$status" -eq 1 ] || fail "compare should exit 1 for disks that differ, not $status"
show chainfs compare web01.qcow2@before-upgrade "$mnt/web01/snapshots/active@before-upgrade.raw"
show chainfs info --backing-chain web01.qcow2
show chainfs map web01.qcow2
show chainfs check web01.qcow2

say 'write to the active disk; no snapshot and no other disk changes'
echo "\$ debugfs -w -R 'write motd /etc/motd' partitions/active/p1.raw"
guest_at "$web01/active/p1.raw" 'wednesday: mended from outside'
reads "$web01/active/p1.raw" 'wednesday: mended from outside'
reads "$web01/active@before-upgrade/p1.raw" 'wednesday: before the upgrade'
reads "$web01/monday/p1.raw" 'monday: all is well'
show truncate -s 28M "$mnt/try-php9/active.raw"
show stat -c '%n %s' "$mnt/try-php9/active.raw"

say 'take a snapshot while the disk is in use'
before=$(sha256sum <"$mnt/web01/active.raw")
exec 3<>"$mnt/web01/active.raw"
show chainfs snapshot "$mnt/web01" wednesday --description 'before the second upgrade'
guest_at "$web01/active/p1.raw" 'thursday: upgraded again'
[ "$(sha256sum <"$mnt/web01/snapshots/wednesday.raw")" = "$before" ] || fail 'the snapshot differs from the disk'
reads "$web01/wednesday/p1.raw" 'wednesday: mended from outside'
reads "$web01/active/p1.raw" 'thursday: upgraded again'

say 'plan a commit, see one refused, and run one'
show chainfs commit "$mnt/web01" --top monday --base installed --dry-run || true
echo "\$ echo 'top=monday' > control/commit"
if echo 'top=monday base=installed' 2>/dev/null >"$mnt/web01/control/commit"; then
    fail 'installed backs try-php9 and must not be written'
fi
show grep error "$mnt/web01/control/status"
show chainfs commit "$mnt/web01" --top wednesday --base tuesday --discard-internal -p
show chainfs pull "$mnt/web01" --base base
exec 3<&-
reads "$web01/active/p1.raw" 'thursday: upgraded again'
reads "$mnt/try-php9/partitions/active/p1.raw" 'trying php 9'
show cat "$mnt/.chainfs/tree.txt"

say 'revert a disk and keep its content as a snapshot, then clone the same snapshot'
show chainfs snapshot "$mnt/web01" friday
guest_at "$web01/active/p1.raw" 'friday: broken'
show chainfs revert "$mnt/web01" friday --save broken
reads "$web01/active/p1.raw" 'thursday: upgraded again'
reads "$mnt/broken/partitions/broken/p1.raw" 'friday: broken'
show chainfs clone "$mnt/web01" web02 --from friday
reads "$mnt/web02/partitions/active/p1.raw" 'thursday: upgraded again'

say 'delete a snapshot; no other disk changes'
show chainfs tree "$mnt/web01" --dry-run delete friday
show chainfs delete "$mnt/web01" friday -p
reads "$web01/active/p1.raw" 'thursday: upgraded again'
reads "$mnt/web02/partitions/active/p1.raw" 'thursday: upgraded again'
reads "$mnt/broken/partitions/broken/p1.raw" 'friday: broken'
show chainfs resize "$mnt/web01" +4M
show stat -c '%n %s' "$mnt/web01/active.raw"
show cat "$mnt/.chainfs/tree.txt"

say 'unmount'
show chainfs umount "$mnt"
if grep -qF " $mnt " /proc/self/mountinfo; then
    fail "$mnt is still mounted"
fi
show qemu-img check web01.qcow2
show qemu-img check try-php9.qcow2
show qemu-img check web02.qcow2
say 'done'
