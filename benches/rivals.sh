#!/usr/bin/env bash
# Compares chainfs with other ways to read a guest's files in a snapshot, and to merge layers, on one store.
#
#   benches/rivals.sh [ROUNDS [BOOTING]]      (default 5 and 3: guestfish and guestmount boot a machine)
#
# Needs root, for loop mounts. Makes a chain of four layers of about 1 GiB with a Debian (debootstrap; GUEST may
# name a directory with the files of a system instead). The disk is a file system without a partition table, so
# that no method needs a kernel that reads tables. Each round takes all methods in turn; each number is a median.
# The images are in the page cache. Methods whose programs are missing are named, and so are those that fail.
#   first      from nothing to the first 4 KiB of a file in the oldest snapshot
#   second     4 KiB of another file, with what `first` has set up
#   etc        all differences of /etc between the oldest snapshot and the newest one
#   memory     memory (Pss) of all processes that serve, after `first` and `second`
#   merge      a snapshot, 512 MiB of changes (not measured), then these into the layer below
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. benches/common.sh
need qemu-img qemu-io mkfs.ext4 losetup

rounds=${1:-5}
booting=${2:-3}
store=$SCRATCH/store
mnt=$SCRATCH/mnt
disk=$SCRATCH/disk
at=$SCRATCH/at
mkdir "$store" "$mnt" "$at"
declare -A times verdict memory found

# Method, and the programs that it needs.
methods=("chainfs cat:" "chainfs mount:" "qemu-storage-daemon, loop mount:qemu-storage-daemon"
    "qemu-nbd, kernel's nbd:qemu-nbd nbd-client" "qemu-nbd, nbdfuse, loop mount:qemu-nbd nbdfuse"
    "qcowmount, loop mount:qcowmount" "qemu-img convert, loop mount:" "qemu-img convert, systemd-dissect:systemd-dissect"
    "guestfish --ro:guestfish" "guestmount --ro:guestmount")

loops=()
put_back() {
    cd /
    set +e
    for dir in "$at" "$at"/* "$disk".*; do mountpoint -q "$dir" && umount "$dir"; done 2>/dev/null
    for loop in "${loops[@]}"; do losetup -d "$loop" 2>/dev/null; done
    clean_up
}
trap put_back EXIT

milliseconds() { awk -v from="$1" -v to="$2" 'BEGIN { print (to - from) / 1e6 }'; }

# timed KEY COMMAND...: appends the milliseconds to times[KEY]; fails with the command.
timed() {
    local key=$1 from to code=0
    shift
    rm -f "$SCRATCH/copied"
    from=$(date +%s%N)
    "$@" >"$SCRATCH/out" 2>"$SCRATCH/err" || code=$?
    to=$(date +%s%N)
    [ $code -eq 0 ] && times[$key]+=" $(milliseconds "$from" "$to")"
    return $code
}

make_store() {
    local tree=${GUEST:-$SCRATCH/tree} number loop
    if [ -z "${GUEST:-}" ]; then
        need debootstrap
        echo "installing a Debian ..." >&2
        debootstrap --variant=minbase bookworm "$tree" >"$SCRATCH/debootstrap.log" 2>&1
    fi
    echo "making the store ..." >&2
    truncate -s 3G "$SCRATCH/base.raw"
    mkfs.ext4 -q -F -d "$tree" "$SCRATCH/base.raw"
    qemu-img convert -f raw -O qcow2 "$SCRATCH/base.raw" "$store/base.qcow2"
    rm "$SCRATCH/base.raw"
    for number in 1 2 3; do
        local below=base
        [ $number -eq 1 ] || below=layer$((number - 1))
        (cd "$store" && qemu-img create -q -f qcow2 -F qcow2 -b "$below.qcow2" "layer$number.qcow2")
        "$CHAINFS" mount "$store" "$mnt" 2>/dev/null
        loop=$(losetup -f --show "$mnt/layer$number/active.raw")
        mount "$loop" "$at"
        head -c 256M /dev/urandom >"$at/srv/data$number"
        echo "machine$number" >"$at/etc/hostname"
        echo "$number" >"$at/etc/new$number"
        umount "$at"
        losetup -d "$loop"
        "$CHAINFS" umount "$mnt"
    done
    cat "$store"/*.qcow2 >/dev/null
}

oldest=$store/base.qcow2
newest=$store/layer2.qcow2
first=usr/bin/bash
second=usr/bin/dpkg

# attach NAME: mounts the file $disk.NAME, or NAME, read-only on $at/NAME.
attach() {
    local file=$2 loop
    mkdir -p "$at/$1"
    # The server may be busy for a moment.
    for _ in $(seq 200); do [ "$(stat -c %s "$file" 2>/dev/null || echo 0)" -gt 4096 ] && break; sleep 0.01; done
    loop=$(losetup -r -f --show "$file")
    loops+=("$loop")
    mount -o ro,noload "$loop" "$at/$1"
}
detach() {
    local loop
    mountpoint -q "$at/$1" || return 0
    loop=$(findmnt -n -o SOURCE "$at/$1")
    umount "$at/$1"
    losetup -d "$loop"
    # A loop device ends some time later.
    for _ in $(seq 100); do losetup "$loop" >/dev/null 2>&1 || break; sleep 0.02; done
}
read4k() { head -c 4096 "$1"; }

storage_daemon() {
    : >"$disk.$1"
    qemu-storage-daemon --blockdev "driver=qcow2,node-name=q,read-only=on,file.driver=file,file.filename=$2" \
        --export "type=fuse,id=e,node-name=q,mountpoint=$disk.$1" >/dev/null 2>"$SCRATCH/err" &
    served=$!
    attach "$1" "$disk.$1"
}
nbdfused() {
    mkdir -p "$disk.$1"
    nbdfuse --readonly "$disk.$1" --socket-activation qemu-nbd -t -r -f qcow2 "$2" >/dev/null 2>"$SCRATCH/err" &
    served=$!
    attach "$1" "$disk.$1/nbd"
}
qcowmounted() {
    mkdir -p "$disk.$1"
    qcowmount "$2" "$disk.$1" >/dev/null 2>"$SCRATCH/err" || return 1
    attach "$1" "$disk.$1/qcow1"
}
converted() {
    qemu-img convert -f qcow2 -O raw "$2" "$disk.$1"
    attach "$1" "$disk.$1"
}

# What `first` is with each method.
first_of() {
    case $1 in
        "chainfs cat") "$CHAINFS" cat "$oldest:/root/$first" | read4k /dev/stdin ;;
        "chainfs mount") "$CHAINFS" mount "$store" "$mnt" && read4k "$mnt/layer3/files/base/root/$first" ;;
        qemu-storage-daemon*) storage_daemon old "$oldest" && read4k "$at/old/$first" ;;
        *kernel\'s*) qemu-nbd -r -f qcow2 -c /dev/nbd0 "$oldest" && mkdir -p "$at/old" && mount -o ro,noload /dev/nbd0 "$at/old" && read4k "$at/old/$first" ;;
        *nbdfuse*) nbdfused old "$oldest" && read4k "$at/old/$first" ;;
        qcowmount*) qcowmounted old "$oldest" && read4k "$at/old/$first" ;;
        *convert,\ loop*) converted old "$oldest" && read4k "$at/old/$first" ;;
        *systemd-dissect) qemu-img convert -f qcow2 -O raw "$oldest" "$disk.old" &&
            systemd-dissect --copy-from "$disk.old" "/$first" "$SCRATCH/copied" && read4k "$SCRATCH/copied" ;;
        guestfish*) guestfish --ro --format=qcow2 -a "$oldest" -m /dev/sda download-offset "/$first" "$SCRATCH/copied" 0 4096 && read4k "$SCRATCH/copied" ;;
        guestmount*) mkdir -p "$at/old" && guestmount --ro --format=qcow2 -a "$oldest" -m /dev/sda "$at/old" && read4k "$at/old/$first" ;;
    esac
}
second_of() {
    case $1 in
        "chainfs mount") read4k "$mnt/layer3/files/base/root/$second" ;;
        *systemd-dissect | guestfish* | "chainfs cat") return 1 ;;
        *) read4k "$at/old/$second" ;;
    esac
}
# The differences of /etc; diff's answer 1 is a success.
differences() { diff -r --no-dereference "$1" "$2" || [ $? -eq 1 ]; }
etc_of() {
    case $1 in
        "chainfs cat") "$CHAINFS" diff --files "$oldest:/root/etc" "$newest:/root/etc" || [ $? -eq 1 ] ;;
        "chainfs mount") "$CHAINFS" mount "$store" "$mnt" && differences "$mnt/layer3/files/base/root/etc" "$mnt/layer3/files/layer2/root/etc" ;;
        qemu-storage-daemon*) storage_daemon old "$oldest" && old=$served && storage_daemon new "$newest" && differences "$at/old/etc" "$at/new/etc" ;;
        *nbdfuse*) nbdfused old "$oldest" && old=$served && nbdfused new "$newest" && differences "$at/old/etc" "$at/new/etc" ;;
        qcowmount*) qcowmounted old "$oldest" && qcowmounted new "$newest" && differences "$at/old/etc" "$at/new/etc" ;;
        *convert,\ loop*) converted old "$oldest" && converted new "$newest" && differences "$at/old/etc" "$at/new/etc" ;;
        *) return 2 ;;
    esac
}
take_down() {
    local pid
    case $1 in
        "chainfs mount") "$CHAINFS" umount "$mnt" ;;
        guestmount*) guestunmount "$at/old"; sleep 1 ;;
        *kernel\'s*) umount "$at/old" || true; qemu-nbd -d /dev/nbd0 >/dev/null || true ;;
        *) detach old; detach new ;;
    esac
    for pid in ${old:-} ${served:-}; do kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null || true; done
    old='' served=''
    for dir in "$disk.old" "$disk.new"; do mountpoint -q "$dir" && { umount "$dir" || fusermount3 -u "$dir"; }; done 2>/dev/null || true
    rm -rf --one-file-system "$disk".*
}

# resident METHOD: MiB of all its processes: those begun since the set-up that name a place of this run.
resident() {
    local pid sum=0 rss
    for pid in /proc/[0-9]*; do
        [ "${pid#/proc/}" != $$ ] && { tr '\0' '\n' <"$pid/cmdline"; } 2>/dev/null | grep -qE "^(.*/)?(chainfs|qemu-[a-z0-9_-]*|qcowmount|nbdfuse|guestmount)$" || continue
        [[ " $before " == *" ${pid#/proc/} "* ]] && continue
        rss=$(awk '$1 == "Pss:" { print $2 }' "$pid/smaps_rollup" 2>/dev/null || true)
        sum=$((sum + ${rss:-0}))
    done
    awk -v sum="$sum" 'BEGIN { printf "%.0f", sum / 1024 }'
}

make_store
old='' served=''
for entry in "${methods[@]}"; do
    method=${entry%%:*}
    for program in ${entry##*:}; do
        command -v "$program" >/dev/null || verdict[$method]="$program is missing"
    done
    [[ $method == *kernel\'s* && ! -e /dev/nbd0 ]] && verdict[$method]="the kernel has no nbd (/dev/nbd0)"
    [ -z "${verdict[$method]:-}" ] || echo "bench: not measured: $method: ${verdict[$method]}" >&2
done

for ((round = 0; round <= rounds; round++)); do
    # The first round is not counted: guestfish builds its machine then.
    [ "$round" -eq 1 ] && { times=(); memory=(); }
    echo "round $round of $rounds" >&2
    for entry in "${methods[@]}"; do
        method=${entry%%:*}
        [ -z "${verdict[$method]:-}" ] || continue
        [[ $method == guest* ]] && { [ "$booting" -eq 0 ] || [ "$round" -gt "$booting" ]; } && continue
        before=$(cd /proc && echo [0-9]*)
        if timed "$method.first" first_of "$method"; then
            [ -e "$SCRATCH/expected" ] || cp "$SCRATCH/out" "$SCRATCH/expected"
            cmp -s "$SCRATCH/out" "$SCRATCH/expected" || verdict[$method]="gave other bytes"
            timed "$method.second" second_of "$method" || true
            memory[$method]+=" $(resident "$method")"
        else
            verdict[$method]="failed: $(grep -v '^$' "$SCRATCH/err" | head -n 1 | cut -c 1-120)"
            echo "bench: $method ${verdict[$method]}" >&2
        fi
        take_down "$method"
        code=0
        timed "$method.etc" etc_of "$method" || code=$?
        [ $code -eq 0 ] || [ $code -eq 2 ] || [[ -n ${verdict[$method.etc]:-} ]] || {
            verdict[$method.etc]="failed: $(grep -v '^$' "$SCRATCH/err" | head -n 1 | cut -c 1-120)"
            echo "bench: $method: etc ${verdict[$method.etc]}" >&2
        }
        [ $code -eq 2 ] || take_down "$method"
        # All that compare with diff(1) must find the same.
        [ $code -ne 0 ] || [ "$method" = "chainfs cat" ] || found[$method]=$({ grep -vE '^(diff|Only|Binary) ' "$SCRATCH/out" || true; } | sha256sum)
    done
    # Merging: each on a copy of its own.
    mkdir "$SCRATCH/ours" "$SCRATCH/theirs"
    for place in ours theirs; do
        (cd "$SCRATCH/$place" && qemu-img create -q -f qcow2 low.qcow2 2G && qemu-img create -q -f qcow2 -F qcow2 -b low.qcow2 disk.qcow2)
    done
    timed "snapshot.chainfs" "$CHAINFS" snapshot --store "$SCRATCH/ours" "$SCRATCH/ours/disk.qcow2" kept
    timed "snapshot.qemu-img" qemu-img create -q -f qcow2 -F qcow2 -b disk.qcow2 "$SCRATCH/theirs/above.qcow2"
    qemu-io -c 'write -q -P 7 0 512M' "$SCRATCH/ours/disk.qcow2"
    qemu-io -c 'write -q -P 7 0 512M' "$SCRATCH/theirs/above.qcow2"
    sync "$SCRATCH"/*/*.qcow2
    timed "merge.chainfs" "$CHAINFS" commit --store "$SCRATCH/ours" "$SCRATCH/ours/disk.qcow2" || { cat "$SCRATCH/err" >&2; exit 1; }
    timed "merge.qemu-img" qemu-img commit -q "$SCRATCH/theirs/above.qcow2" || { cat "$SCRATCH/err" >&2; exit 1; }
    rm -r "$SCRATCH/ours" "$SCRATCH/theirs"
done

for method in "${!found[@]}"; do
    [ "${found[$method]}" = "${found["chainfs mount"]}" ] || verdict[$method.etc]="found other differences"
done
cell() {
    if [ -n "${verdict[$1]:-}" ] || [ -z "${times[$1]:-}" ]; then
        echo "${verdict[$1]:--}"
    else
        printf '%.0f ms [%s]' "$(median ${times[$1]})" "$(range ${times[$1]})"
    fi
}
echo
echo "$(ls "$store" | grep -c qcow2) layers, $(du -sm "$store" | cut -f 1) MiB, medians of $rounds rounds, $(nproc) CPUs, kernel $(uname -r), $(qemu-img --version | sed -n 1p)"
echo
echo "| method | first 4 KiB | another file | diff of /etc | memory |"
echo "|---|---|---|---|---|"
for entry in "${methods[@]}"; do
    method=${entry%%:*}
    [ -n "${times[$method.first]:-}" ] || [ -n "${verdict[$method]:-}" ] || verdict[$method]="not measured"
    if [ -n "${verdict[$method]:-}" ]; then
        echo "| $method | ${verdict[$method]} | | | |"
    else
        kept=-
        [ "$method" = "chainfs cat" ] || [[ $method == *dissect || $method == guestfish* ]] || kept="$(median ${memory[$method]}) MiB"
        echo "| $method | $(cell "$method.first") | $(cell "$method.second") | $(cell "$method.etc") | $kept |"
    fi
done
echo
echo "| merge of 512 MiB, disk not in use | snapshot | commit |"
echo "|---|---|---|"
for who in chainfs qemu-img; do echo "| $who | $(cell snapshot.$who) | $(cell merge.$who) |"; done
