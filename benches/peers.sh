#!/usr/bin/env bash
# Compares reads with qemu-storage-daemon's FUSE export of the same chain, in both of its aio modes,
# interleaved in one run.
#
#   benches/peers.sh [SIZE-IN-MIB [ROUNDS]]      (default 512 and 5)
#
# Each round measures all targets in turn, so that a slow minute affects all of them.
#   seq        1 MiB reads from beginning to end, one reader
#   rand       4 KiB reads, 4 readers (psync), each block of the disk once
# The images are in the page cache ("warm"). The mount's cached pages are dropped before each run, so that the
# server does the work; "again" reads from the mount's page cache. Each number is a median; CPU is the
# server's. The disk has random bytes: raw, as one qcow2 (depth 1), and as 128 layers, with a hash that
# selects the layer of each cluster. All targets are read as snapshots: each has an empty overlay.
# CHAINFS_OPTIONS is passed to mount -o.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need qemu-img qemu-io fio jq perl

if ! command -v qemu-storage-daemon >/dev/null; then
    echo "bench: qemu-storage-daemon is missing" >&2
    exit 1
fi

size_mib=${1:-512}
rounds=${2:-5}
depth=128
store=$SCRATCH/store
mnt=$SCRATCH/mnt
mkdir -p "$store" "$mnt"
cd "$store"

echo "making $size_mib MiB at depth 1 and $depth ..." >&2
head -c "${size_mib}M" /dev/urandom >plain.raw
qemu-img convert -f raw -O qcow2 plain.raw one.qcow2
clusters=$((size_mib * 16))
head -c 65536 /dev/urandom >"$SCRATCH/cluster"
for ((layer = 0; layer < depth; layer++)); do
    backing=()
    [ "$layer" -gt 0 ] && backing=(-u -F qcow2 -b "l$((layer - 1)).qcow2")
    qemu-img create -q -f qcow2 "${backing[@]}" "l$layer.qcow2" "${size_mib}M"
done
# One process per layer, which opens the layer alone.
awk -v n="$clusters" -v depth="$depth" 'BEGIN { for (c = 0; c < n; c++) print int((c * 40503) / 7) % depth, c }' |
    sort -n -s -k1,1 >"$SCRATCH/placement"
for ((layer = 0; layer < depth; layer++)); do
    awk -v l="$layer" -v f="$SCRATCH/cluster" '$1 == l { printf "write -q -s %s %dk 64k\n", f, $2 * 64 }' \
        "$SCRATCH/placement" |
        qemu-io "json:{\"driver\":\"qcow2\",\"backing\":null,\"file\":{\"driver\":\"file\",\"filename\":\"l$layer.qcow2\"}}" >/dev/null
done
for top in one "l$((depth - 1))"; do
    qemu-img create -q -f qcow2 -F qcow2 -b "$top.qcow2" "above-$top.qcow2"
done
qemu-img create -q -f qcow2 -F raw -b plain.raw above-plain.qcow2

"$CHAINFS" mount "$store" "$mnt" ${CHAINFS_OPTIONS:+-o "$CHAINFS_OPTIONS"}
ours=$(server_of "$mnt")

# json_of LAYER AIO: the blockdev of a layer with its backing files, all in the same aio mode.
json_of() {
    local file below
    if [ "$1" = one ]; then
        printf '{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"%s/one.qcow2","aio":"%s"}}' "$store" "$2"
        return
    fi
    below=null
    for ((layer = 0; layer <= $1; layer++)); do
        file=$(printf '{"driver":"file","filename":"%s/l%s.qcow2","aio":"%s"}' "$store" "$layer" "$2")
        below=$(printf '{"driver":"qcow2","read-only":true,"file":%s,"backing":%s}' "$file" "$below")
    done
    printf '%s' "$below"
}

# serve NAME LAYER AIO: qemu-storage-daemon exports the layer as a file.
declare -A path server
serve() {
    local file=$SCRATCH/qsd-$1 json
    : >"$file"
    json=$(json_of "$2" "$3")
    qemu-storage-daemon --blockdev "{\"node-name\":\"q0\",${json#\{}" \
        --export "type=fuse,id=e,node-name=q0,mountpoint=$file" &
    SERVERS+=($!)
    server[$1]=$!
    path[$1]=$file
    for ((try = 0; try < 200; try++)); do
        [ "$(stat -c %s "$file")" -gt 0 ] && return
        sleep 0.05
    done
    echo "bench: qemu-storage-daemon does not serve $1" >&2
    exit 1
}
serve threads-1 one threads
serve io_uring-1 one io_uring
serve "threads-$depth" $((depth - 1)) threads
serve "io_uring-$depth" $((depth - 1)) io_uring
path[chainfs-1]=$mnt/above-one/snapshots/one.raw
path[chainfs-$depth]=$mnt/above-l$((depth - 1))/snapshots/l$((depth - 1)).raw
path[chainfs-raw]=$mnt/above-plain/snapshots/plain.raw
path[plain]=$store/plain.raw
server[chainfs-1]=$ours
server[chainfs-$depth]=$ours
server[chainfs-raw]=$ours

# Not with cmp(1): it reads in units of st_blksize, which is a few bytes for qemu-storage-daemon.
same() {
    [ "$(sha256sum <"$1")" = "$(sha256sum <"$2")" ] || { echo "bench: $1 and $2 differ" >&2; exit 1; }
}
same "${path[chainfs-$depth]}" "${path[threads-$depth]}"
same "${path[chainfs-1]}" "$store/plain.raw"
same "${path[chainfs-raw]}" "$store/plain.raw"

# cpu NAME: CPU time of the target's server, in clock ticks.
cpu() {
    local pid=${server[$1]:-}
    if [ -n "$pid" ]; then
        awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$pid/stat"
    else
        echo 0
    fi
}

declare -A values costs
ticks=$(getconf CLK_TCK)
# run NAME KIND: one measurement. KIND: seq, rand, again.
run() {
    local words before after value kind=$2 invalidate=1
    case $kind in
        seq) words=(--rw=read --bs=1M --numjobs=1) ;;
        again) words=(--rw=read --bs=1M --numjobs=1) invalidate=0 ;;
        rand) words=(--rw=randread --bs=4k --numjobs=4 "--size=$((size_mib / 4))M" "--offset_increment=$((size_mib / 4))M") ;;
    esac
    # These targets have no page cache of their own: dropping it would measure the disk.
    case $1 in plain | chainfs-raw) invalidate=0 ;; esac
    [ $invalidate -eq 0 ] && cat "${path[$1]}" >/dev/null
    # On a virtual machine, memory that was unused for a while is slow to allocate, which would distort the
    # result: allocate as much as the run will need, and free it.
    perl -e '$x = "x" x ($ARGV[0] << 20)' $((size_mib * 3 / 2))
    before=$(cpu "$1")
    value=$(fio --name=x --readonly --thread --ioengine=psync --group_reporting --invalidate=$invalidate \
        --filename="${path[$1]}" "${words[@]}" --output-format=json |
        jq --arg kind "$kind" '.jobs[0].read | if $kind == "rand" then .iops else .bw_bytes / 1048576 end')
    after=$(cpu "$1")
    values[$1.$kind]+=" $value"
    costs[$1.$kind]+=" $(awk -v t=$((after - before)) -v hz="$ticks" -v mib="$size_mib" -v kind="$kind" \
        'BEGIN { s = t / hz; print kind == "rand" ? s * 1e6 / (mib * 256) : s * 1024 / mib }')"
}

targets=(chainfs-1 threads-1 io_uring-1 "chainfs-$depth" "threads-$depth" "io_uring-$depth" plain chainfs-raw)
for ((round = 0; round <= rounds; round++)); do
   # The first round is discarded: memory that was unused for a while is slow to allocate.
    [ "$round" -eq 1 ] && { values=(); costs=(); }
    echo "round $round of $rounds" >&2
    cat ./*.qcow2 plain.raw >/dev/null
    for ((n = 0; n < ${#targets[@]}; n++)); do
        target=${targets[(n + round) % ${#targets[@]}]}
        run "$target" seq
        run "$target" rand
    done
    for target in plain chainfs-1 "chainfs-$depth" chainfs-raw; do
        run "$target" again
    done
done

m() { median ${values[$1]}; }
line() {
    printf '| %s | %.0f [%s] | %.2f | %.0f [%s] | %.1f |\n' "$2" \
        "$(m "$1.seq")" "$(range ${values[$1.seq]})" "$(median ${costs[$1.seq]})" \
        "$(m "$1.rand")" "$(range ${values[$1.rand]})" "$(median ${costs[$1.rand]})"
}
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }

echo
echo "$size_mib MiB, medians of $rounds rounds, $(nproc) CPUs, kernel $(uname -r), $(qemu-img --version | sed -n 1p)"
echo
echo "| target | seq 1M MiB/s | server CPU s/GiB | rand 4k x4 IOPS | server CPU us/op |"
echo "|---|---|---|---|---|"
for d in 1 $depth; do
    line "chainfs-$d" "chainfs, depth $d"
    line "threads-$d" "qemu-storage-daemon, depth $d, aio=threads"
    line "io_uring-$d" "qemu-storage-daemon, depth $d, aio=io_uring"
done
line chainfs-raw "chainfs, raw layer"
line plain "the plain raw file"
echo
echo "| ratio | seq | rand |"
echo "|---|---|---|"
compare() { echo "| $3 | $(ratio "$(m "$1.seq")" "$(m "$2.seq")") | $(ratio "$(m "$1.rand")" "$(m "$2.rand")") |"; }
for d in 1 $depth; do
    for mode in threads io_uring; do
        compare "chainfs-$d" "$mode-$d" "chainfs / qemu-storage-daemon ($mode), depth $d"
    done
done
compare "chainfs-$depth" chainfs-1 "chainfs, depth $depth / depth 1"
compare "threads-$depth" threads-1 "qemu-storage-daemon (threads), depth $depth / depth 1"
compare "io_uring-$depth" io_uring-1 "qemu-storage-daemon (io_uring), depth $depth / depth 1"
compare chainfs-raw plain "chainfs, raw layer / the plain file"
echo
echo "| second reading | seq 1M MiB/s | / plain file |"
echo "|---|---|---|"
for target in plain chainfs-1 "chainfs-$depth" chainfs-raw; do
    echo "| $target | $(printf '%.0f [%s]' "$(m "$target.again")" "$(range ${values[$target.again]})") | $(ratio "$(m "$target.again")" "$(m plain.again)") |"
done
