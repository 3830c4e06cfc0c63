#!/usr/bin/env bash
# Compares commit and pull with qemu-img commit and rebase on two file systems: that of the scratch directory,
# and an XFS with reflinks in a file there. Prints medians and ratios. Each run starts with fresh copies in
# the page cache.
#
#   benches/jobs.sh [SIZE-IN-MIB [ROUNDS]]      (default 4096 and 3)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need qemu-img qemu-io mkfs.xfs bc

mib=${1:-4096}
rounds=${2:-3}

# The data to merge: every cluster of a disk, in an overlay of an empty base.
make_images() {
    mkdir -p "$1/pristine"
    qemu-img create -q -f qcow2 "$1/pristine/base.qcow2" "${mib}M"
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 "$1/pristine/web.qcow2"
    head -c 16M /dev/urandom >"$1/pattern"
    local commands=()
    for ((at = 0; at < mib; at += 16)); do commands+=(-c "write -q -s $1/pattern ${at}M 16M"); done
    qemu-io -f qcow2 "${commands[@]}" "$1/pristine/web.qcow2"
    # For pulls, the base has the data.
    mkdir -p "$1/pulls"
    mv "$1/pristine/web.qcow2" "$1/pulls/base.qcow2"
    qemu-img rebase -u -b '' "$1/pulls/base.qcow2"
    qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 "$1/pulls/web.qcow2"
    cp "$1/pulls/base.qcow2" "$1/pristine/web.qcow2"
    qemu-img rebase -u -b base.qcow2 -F qcow2 "$1/pristine/web.qcow2"
}

# Seconds from the start of the command until all data is on disk.
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
    x=$(median "${a[@]}")
    y=$(median "${b[@]}")
    printf '%-24s chainfs %8.3f s   qemu-img %8.3f s   ratio %6.2f   (%s | %s)\n' "$name" "$x" "$y" \
        "$(echo "scale=4; $y / $x" | bc)" "${a[*]}" "${b[*]}"
}

measure() { # NAME PLACE
    make_images "$2"
    compare "$1 commit" "$2" pristine "$CHAINFS" commit web.qcow2 --store . -- \
        sh -c 'qemu-img commit -q -d web.qcow2 && rm web.qcow2' # like chainfs
    compare "$1 pull" "$2" pulls "$CHAINFS" pull web.qcow2 --store . -- qemu-img rebase -q -b '' web.qcow2
    rm -rf "${2:?}/"*
}

mkdir "$SCRATCH/plain"
measure "$(findmnt -no FSTYPE -T "$SCRATCH")" "$SCRATCH/plain"
truncate -s $((mib * 4 + 2048))M "$SCRATCH/xfs.img"
mkfs.xfs -q -m reflink=1 "$SCRATCH/xfs.img"
mkdir "$SCRATCH/xfs"
mount -o loop "$SCRATCH/xfs.img" "$SCRATCH/xfs"
measure "xfs, reflinks" "$SCRATCH/xfs"
umount "$SCRATCH/xfs"
