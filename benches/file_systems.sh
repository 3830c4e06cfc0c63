#!/usr/bin/env bash
# Guests' files by file system: first byte, listing, archive and search of one tree on each, compared with the
# kernel's loop mount of the same image. Ratios of medians, and the memory of the process that reads them.
#
#   benches/file_systems.sh [ROUNDS] [KIND...]
#
# The tree is a Debian root file system (debootstrap). Needs root. Each round times all methods in turn.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
rounds=${1:-5}
[ $# -eq 0 ] || shift
kinds=("$@")
[ ${#kinds[@]} -gt 0 ] || kinds=(ext4 xfs btrfs btrfs-zstd)

[ -n "${CHAINFS:-}" ] || cargo build --release --locked
. benches/common.sh
need debootstrap qemu-img mkfs.ext4 mkfs.xfs mkfs.btrfs losetup

work=$SCRATCH
mkdir "$work"/{store,mnt,kernel,tree}
put_back() {
    cd /
    umount "$work/kernel" 2>/dev/null || true
    clean_up
}
trap put_back EXIT
trap 'exit 130' INT TERM

echo "installing Debian"
debootstrap --variant=minbase bookworm "$work/tree" >"$work/debootstrap.log" 2>&1
cd "$work"
files=$(find tree | wc -l)
echo "$files files, $(du -sm tree | cut -f1) MiB"

for kind in "${kinds[@]}"; do
    truncate -s 2G "$kind.raw"
    options=noatime
    case $kind in
        ext4) mkfs.ext4 -q -F "$kind.raw" ;;
        xfs) mkfs.xfs -q "$kind.raw" ;;
        btrfs) mkfs.btrfs -q "$kind.raw" >/dev/null 2>&1 ;;
        btrfs-zstd) mkfs.btrfs -q "$kind.raw" >/dev/null 2>&1 && options=noatime,compress=zstd ;;
        *) echo "unknown kind $kind" >&2 && exit 1 ;;
    esac
    mount -o "loop,$options" "$kind.raw" kernel
    cp -a tree/. kernel/
    umount kernel
    qemu-img convert -f raw -O qcow2 "$kind.raw" "store/$kind.qcow2"
done

# timed NAME COMMAND...: appends its milliseconds to times.NAME.
timed() {
    local name=$1 begin end
    shift
    begin=$(date +%s%N)
    "$@" >/dev/null || true
    end=$(date +%s%N)
    awk "BEGIN { print ($end - $begin) / 1e6 }" >>"times.$name"
}
first() { cat "$1/etc/debian_version"; }
list() { ls -lR "$1" | cat; }
archive() { tar cf - "$1" | cat; }
search() { grep -r "no such words anywhere" "$1"; }

# Both sides find the images in the page cache, and nothing else.
for _ in $(seq "$rounds"); do
    for kind in "${kinds[@]}"; do
        for action in list archive search; do
            cat "$kind.raw" "store/$kind.qcow2" >/dev/null
            mount -o loop,ro "$kind.raw" kernel
            timed "$kind.first.kernel" first kernel
            timed "$kind.$action.kernel" "$action" kernel
            timed "$kind.$action-again.kernel" "$action" kernel
            umount kernel
            for options in plain noxattr; do
                words=()
                [ $options = plain ] || words=(-o noxattr)
                [ $options = plain ] || [ $action = list ] || continue
                "$CHAINFS" mount store mnt "${words[@]}"
                timed "$kind.first.$options" first "mnt/$kind/files/active/disk"
                timed "$kind.$action.$options" "$action" "mnt/$kind/files/active/disk"
                timed "$kind.$action-again.$options" "$action" "mnt/$kind/files/active/disk"
                if [ $options = plain ]; then
                    daemon=$(awk '$1 == "chainfs_process_id" { print $2 }' mnt/.chainfs/metrics)
                    awk '/^VmHWM/ { print $2 / 1024 }' "/proc/$(pgrep -P "$daemon" | head -1)/status" >>"memory.$kind"
                fi
                "$CHAINFS" umount mnt
            done
        done
    done
done

value() { median $(<"times.$1"); }
printf '%-12s %-14s %10s %10s %7s\n' "file system" action kernel chainfs ratio
for kind in "${kinds[@]}"; do
    for action in first list list-again archive archive-again search search-again; do
        for options in plain noxattr; do
            [ -e "times.$kind.$action.$options" ] || continue
            name=$action
            [ $options = plain ] || name="$action*"
            kernel=$(value "$kind.$action.kernel") ours=$(value "$kind.$action.$options")
            awk -v k="$kind" -v n="$name" -v a="$kernel" -v b="$ours" \
                'BEGIN { printf "%-12s %-14s %8.1fms %8.1fms %7.2f\n", k, n, a, b, b / a }'
        done
    done
    echo "$kind: memory of a worker at most $(sort -g "memory.$kind" | tail -1) MiB"
done
echo "*: with -o noxattr"
