#!/usr/bin/env bash
# Compares writes with qemu-storage-daemon's writable FUSE export of an equal image, in both of its aio modes,
# interleaved in one run.
#
#   benches/writers.sh [SIZE-IN-MIB [ROUNDS]]      (default 256 and 5)
#
# Each round measures all targets in turn with fio (psync):
#   seq          1 MiB writes from beginning to end, one writer
#   seq+sync     the same, and fdatasync before the last write
#   rand x1, x4  4 KiB writes in random order, one writer and four
#   rand+sync    the same with fdatasync before the last write of each writer
#   each x1, x4  4 KiB writes, each followed by fdatasync
# once on allocated clusters ("old"), once on an unwritten range of the disk ("new", another range in each
# round). Each number is a median. CHAINFS_OPTIONS is passed to mount -o.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need qemu-img qemu-io fio jq

if ! command -v qemu-storage-daemon >/dev/null; then
    echo "bench: qemu-storage-daemon is missing" >&2
    exit 1
fi

size_mib=${1:-256}
rounds=${2:-5}
store=$SCRATCH/store
mnt=$SCRATCH/mnt
mkdir -p "$store" "$mnt"
cd "$store"

kinds=(seq seq+sync rand1 rand4 rand1+sync rand4+sync each1 each4)
# Each run on new clusters has a range of its own.
virtual_mib=$((size_mib * (${#kinds[@]} * (rounds + 1) + 1)))
targets=(chainfs threads io_uring)
echo "making 3 images with $size_mib MiB allocated ..." >&2
for target in "${targets[@]}"; do
    qemu-img create -q -f qcow2 "$target.qcow2" "${virtual_mib}M"
    qemu-io -f qcow2 "$target.qcow2" -c "write -q -P 1 0 ${size_mib}M"
done

"$CHAINFS" mount "$store" "$mnt" ${CHAINFS_OPTIONS:+-o "$CHAINFS_OPTIONS"}
declare -A path server
path[chainfs]=$mnt/chainfs/active.raw
server[chainfs]=$(server_of "$mnt")
for aio in threads io_uring; do
    path[$aio]=$SCRATCH/qsd-$aio
    : >"${path[$aio]}"
    qemu-storage-daemon --blockdev "driver=file,node-name=f0,filename=$store/$aio.qcow2,aio=$aio" \
        --blockdev driver=qcow2,node-name=q0,file=f0 \
        --export "type=fuse,id=e,node-name=q0,mountpoint=${path[$aio]},writable=on" &
    SERVERS+=($!)
    server[$aio]=$!
    for ((try = 0; try < 200; try++)); do
        [ "$(stat -c %s "${path[$aio]}")" -gt 0 ] && break
        sleep 0.05
    done
done

# cpu NAME: CPU time of the target's server, in clock ticks.
cpu() {
    awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/${server[$1]}/stat"
}

declare -A values costs
ticks=$(getconf CLK_TCK)
# run NAME KIND PLACE OFFSET-IN-MIB
run() {
    local jobs=1 words value before after total=$((size_mib * 256)) each
    case $2 in *4 | *4+sync) jobs=4 ;; esac
    # fio counts the time of a sync only if a write follows it: the last one does.
    # Few small writes with a sync each: their speed depends on the disk.
    case $2 in
        seq*) words=(--rw=write --bs=1M "--size=${size_mib}M") total=$size_mib ;;
        rand*) words=(--rw=randwrite --bs=4k "--size=$((size_mib / jobs))M" --norandommap=0) ;;
        each*) total=1024 words=(--rw=randwrite --bs=4k "--size=$((size_mib / jobs))M" "--number_ios=$((total / jobs))" --fdatasync=1) ;;
    esac
    each=$((total / jobs))
    case $2 in *+sync) words+=("--fdatasync=$((each - 1))") ;; esac
    before=$(cpu "$1")
    value=$(fio --name=x --thread --ioengine=psync --group_reporting --numjobs=$jobs "--offset=${4}M" \
        "--offset_increment=$((size_mib / jobs))M" --filename="${path[$1]}" --randseed=7 --file_append=0 --overwrite=1 \
        "${words[@]}" --output-format=json |
        jq --arg kind "$2" '.jobs[0].write | if ($kind | startswith("seq")) then .bw_bytes / 1048576 else .iops end')
    after=$(cpu "$1")
    values[$1.$2.$3]+=" $value"
    costs[$1.$2.$3]+=" $(awk -v t=$((after - before)) -v hz="$ticks" -v n="$total" -v kind="$2" \
        'BEGIN { s = t / hz; print kind ~ /^seq/ ? s * 1024 / n : s * 1e6 / n }')"
}

stretch=0
for ((round = 0; round <= rounds; round++)); do
    # The first round is discarded: memory that was unused for a while is slow to allocate.
    [ "$round" -eq 1 ] && { values=(); costs=(); }
    echo "round $round of $rounds" >&2
    for kind in "${kinds[@]}"; do
        stretch=$((stretch + 1))
        for place in old new; do
            for ((n = 0; n < ${#targets[@]}; n++)); do
                target=${targets[(n + round) % ${#targets[@]}]}
                # Writes back the dirty pages of the previous run first.
                sync
                run "$target" "$kind" "$place" $([ $place = old ] && echo 0 || echo $((stretch * size_mib)))
            done
        done
    done
done

for target in "${targets[@]}"; do
    [ "$target" = chainfs ] && timeout 60 "$CHAINFS" umount "$mnt"
    [ "$target" = chainfs ] || { kill "${server[$target]}"; wait "${server[$target]}" || true; }
    qemu-img check -q "$target.qcow2" || { echo "bench: $target.qcow2 is not clean" >&2; exit 1; }
done

m() { median ${values[$1]}; }
ratio() { awk -v a="$1" -v b="$2" 'BEGIN { printf "%.2f", a / b }'; }
echo
echo "$size_mib MiB, medians of $rounds rounds, $(nproc) CPUs, kernel $(uname -r), $(qemu-img --version | sed -n 1p)"
echo "seq in MiB/s (server CPU s/GiB), others in IOPS (server CPU us/op); ratio: chainfs / the better of the others"
echo
echo "| | chainfs | qemu-storage-daemon, threads | io_uring | ratio |"
echo "|---|---|---|---|---|"
for place in old new; do
    for kind in "${kinds[@]}"; do
        printf '| %s, %s clusters ' "$kind" $place
        for target in "${targets[@]}"; do
            key=$target.$kind.$place
            printf '| %.0f [%s] (%.2f) ' "$(m "$key")" "$(range ${values[$key]})" "$(median ${costs[$key]})"
        done
        best=$(printf '%s\n' "$(m "threads.$kind.$place")" "$(m "io_uring.$kind.$place")" | sort -g | tail -1)
        printf '| %s |\n' "$(ratio "$(m "chainfs.$kind.$place")" "$best")"
    done
done
