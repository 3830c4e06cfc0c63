#!/bin/bash
# Commit and pull against qemu-img commit and rebase, side by side, on two file systems: that of DIR, and an
# XFS with reflinks in a file there. Medians and ratios; every run begins with fresh copies.
#
# usage: benches/jobs.sh [MiB] [rounds] [DIR]
set -euo pipefail
cd "$(dirname "$0")/.."
mib=${1:-4096} rounds=${2:-3} dir=$(mktemp -d "${3:-/var/tmp}/chainfs-bench-XXXXXX")
program=${CHAINFS:-target/release/chainfs}
[ -x "$program" ] || cargo build --release --locked
program=$(realpath "$program")

cleanup() {
    mountpoint -q "$dir/xfs" && umount "$dir/xfs"
    rm -rf "$dir"
}
trap cleanup EXIT

# What is merged: every cluster of a disk, in an overlay over an empty base.
make_images() {
    mkdir -p "$1/pristine"
    qemu-img create -q -f qcow2 "$1/pristine/base.qcow2" "${mib}M"
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 "$1/pristine/web.qcow2"
    head -c 16M /dev/urandom >"$1/pattern"
    local commands=()
    for ((at = 0; at < mib; at += 16)); do commands+=(-c "write -q -s $1/pattern ${at}M 16M"); done
    qemu-io -f qcow2 "${commands[@]}" "$1/pristine/web.qcow2"
    # For pulls the data lies in the base.
    mkdir -p "$1/pulls"
    mv "$1/pristine/web.qcow2" "$1/pulls/base.qcow2"
    qemu-img rebase -u -b '' "$1/pulls/base.qcow2"
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 "$1/pulls/web.qcow2"
    cp "$1/pulls/base.qcow2" "$1/pristine/web.qcow2"
    qemu-img rebase -u -b base.qcow2 -F qcow2 "$1/pristine/web.qcow2"
}

# Seconds from the command to everything on disk.
timed() {
    local start end
    sync -f "$1"
    start=$(date +%s%N)
    (cd "$1" && "${@:2}" >/dev/null)
    sync -f "$1"
    end=$(date +%s%N)
    echo "scale=3; ($end - $start) / 1000000000" | bc
}

fresh() {
    rm -rf "$1/run"
    mkdir "$1/run"
    cp --sparse=always "$1/$2/"*.qcow2 "$1/run/"
    cat "$1/run/"*.qcow2 >/dev/null
}

median() { sort -n | awk '{ v[NR] = $1 } END { print (NR % 2) ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'; }

compare() { # NAME PLACE IMAGES ours -- theirs
    local name=$1 place=$2 images=$3 ours=() theirs=()
    shift 3
    while [ "$1" != -- ]; do ours+=("$1"); shift; done
    theirs=("${@:2}")
    local a=() b=()
    for ((n = 0; n < rounds; n++)); do
        fresh "$place" "$images"
        a+=("$(timed "$place/run" "${ours[@]}")")
        fresh "$place" "$images"
        b+=("$(timed "$place/run" "${theirs[@]}")")
    done
    local x y
    x=$(printf '%s\n' "${a[@]}" | median)
    y=$(printf '%s\n' "${b[@]}" | median)
    printf '%-24s chainfs %8.3f s   qemu-img %8.3f s   ratio %6.2f   (%s | %s)\n' "$name" "$x" "$y" \
        "$(echo "scale=4; $y / $x" | bc)" "${a[*]}" "${b[*]}"
}

measure() { # NAME PLACE
    make_images "$2"
    compare "$1 commit" "$2" pristine "$program" commit web.qcow2 --store . -- qemu-img commit -q -d web.qcow2
    compare "$1 pull" "$2" pulls "$program" pull web.qcow2 --store . -- qemu-img rebase -q -b '' web.qcow2
    rm -rf "${2:?}/"*
}

mkdir "$dir/plain"
measure "$(findmnt -no FSTYPE -T "$dir")" "$dir/plain"
truncate -s $((mib * 4 + 2048))M "$dir/xfs.img"
mkfs.xfs -q -m reflink=1 "$dir/xfs.img"
mkdir "$dir/xfs"
mount -o loop "$dir/xfs.img" "$dir/xfs"
measure "xfs, reflinks" "$dir/xfs"
