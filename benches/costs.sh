#!/usr/bin/env bash
# Compares two builds of chainfs, run alternately: mounting 10,000 images, the first write to a disk, and each
# command on a small chain. Prints medians in milliseconds, and the ratio of the second build to the first.
#
#   benches/costs.sh OTHER-CHAINFS [ROUNDS]      (default 7; the second build is CHAINFS or
# target/release/chainfs)
set -euo pipefail
[ -x "${1:-}" ] || { echo "usage: benches/costs.sh OTHER-CHAINFS [ROUNDS]" >&2; exit 2; }
OTHER=$(realpath "$1")
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need qemu-img qemu-io perl

rounds=${2:-7}
store=$SCRATCH/store
mnt=$SCRATCH/mnt
mkdir -p "$mnt"
declare -A times

# timed KEY COMMAND...: appends the milliseconds of the command to the times of KEY.
timed() {
    local key=$1 start end
    shift
    start=$(date +%s%N)
    "$@"
    end=$(date +%s%N)
    times[$key]+=" $(((end - start) / 1000))"
}

many_images() {
    echo "making 10,000 images: half of them qcow2 in chains of ten, half raw ..." >&2
    mkdir "$SCRATCH/many"
    qemu-img create -q -f qcow2 -u -F qcow2 -b c0000-000.qcow2 "$SCRATCH/overlay" 10G
    qemu-img create -q -f qcow2 "$SCRATCH/base" 10G
    perl -e '
        my ($store, $overlay, $base) = @ARGV;
        sub slurp { open my $f, "<:raw", $_[0] or die "$_[0]: $!"; local $/; <$f> }
        sub spill {
            my ($path, $head, $len) = @_;
            open my $f, ">:raw", $path or die "$path: $!";
            print $f $head; truncate $f, $len; close $f or die "$path: $!";
        }
        my ($over, $low) = (slurp($overlay), slurp($base));
        my $at = index $over, "c0000-000.qcow2";
        for my $chain (0 .. 499) {
            mkdir(my $dir = sprintf "%s/d%02d", $store, $chain % 50);
            for my $layer (0 .. 9) {
                my $bytes = $layer ? $over : $low;
                substr $bytes, $at, 15, sprintf "c%04d-%03d.qcow2", $chain, $layer - 1 if $layer;
                spill(sprintf("%s/c%04d-%03d.qcow2", $dir, $chain, $layer), substr($bytes, 0, 1024), length $bytes);
                spill(sprintf("%s/r%04d-%03d.%s", $dir, $chain, $layer, $layer % 2 ? "raw" : "img"), "", 1 << 20);
            }
        }
    ' "$SCRATCH/many" "$SCRATCH/overlay" "$SCRATCH/base"
}

mounted() { "$1" mount "$2" "$mnt" -o nofiles >/dev/null; }
unmounted() { "$1" umount "$mnt" >/dev/null; }

# first_write DISK: opens it, writes 4 KiB, syncs, closes.
first_write() {
    perl -e '
        use Fcntl;
        sysopen my $f, $ARGV[0], O_RDWR or die "$ARGV[0]: $!";
        sysseek $f, 12345 << 12, 0; syswrite $f, "x" x 4096 or die "write: $!";
        use IO::Handle; $f->sync or die "sync: $!"; close $f;
    ' "$1"
}

# given CHAIN VERB ARGUMENTS: runs a command and waits for its end.
given() {
    echo "$3" >"$mnt/$1/control/$2" || { grep error: "$mnt/$1/control/status" >&2; exit 1; }
    local last
    last=$(tail -n 1 "$mnt/$1/control/progress")
    [ "$last" = done ] || { echo "bench: $2 $3: $last" >&2; exit 1; }
}

small_chain() {
    rm -rf "$store"
    mkdir "$store"
    cp --sparse=always "$SCRATCH"/chain/* "$store"
}

commands() {
    local build=$1 name=$2
    small_chain
    mounted "$build" "$store"
    timed "$name first-write" first_write "$mnt/vm/active.raw"
    timed "$name snapshot" given vm snapshot s3
    timed "$name snapshot-internal" given vm snapshot 'inner internal'
    timed "$name delete-internal" given vm delete active@inner
    timed "$name commit" given vm commit 'top=s3 base=s2'
    timed "$name commit-active" given vm commit ''
    timed "$name pull" given vm pull 'base=base'
    timed "$name clone" given vm clone 'new from=base'
    timed "$name rebase" given new rebase 'base=none'
    timed "$name resize" given new resize '+1M'
    timed "$name snapshot-again" given vm snapshot s4
    timed "$name delete" given vm delete s4
    timed "$name snapshot-more" given vm snapshot s5
    timed "$name revert" given vm revert 'to=base'
    unmounted "$build"
}

large_image() {
    qemu-img create -q -f qcow2 "$SCRATCH/large.qcow2" 64G
    perl -e 'for my $n (0 .. 63) { print "write -q -z ${n}G 1G\n" }
        for my $n (0 .. 2047) { printf "write -q %d 4k\n", $n << 25 }' |
        qemu-io -t unsafe -f qcow2 "$SCRATCH/large.qcow2" >/dev/null
}

mkdir "$SCRATCH/chain"
qemu-img create -q -f qcow2 "$SCRATCH/chain/base.qcow2" 256M
below=base
for layer in s1 s2 vm; do
    qemu-io -t unsafe -f qcow2 -c "write -q 0 16M" -c "write -q 100M 4M" "$SCRATCH/chain/$below.qcow2"
    qemu-img create -q -f qcow2 -F qcow2 -b "$below.qcow2" "$SCRATCH/chain/$layer.qcow2"
    below=$layer
done
many_images
large_image
for ((round = 0; round < rounds; round++)); do
    for build in "$OTHER" "$CHAINFS"; do
        name=$([ "$build" = "$CHAINFS" ] && echo new || echo old)
        timed "$name mount-10000" mounted "$build" "$SCRATCH/many"
        unmounted "$build"
        rm -rf "$store"
        mkdir "$store"
        cp --sparse=always "$SCRATCH/large.qcow2" "$store/large.qcow2"
        mounted "$build" "$store"
        timed "$name first-write-64G" first_write "$mnt/large/active.raw"
        unmounted "$build"
        commands "$build" "$name"
    done
done

printf '\n| what | old ms | new ms | ratio |\n|---|---|---|---|\n'
for key in mount-10000 first-write-64G first-write snapshot snapshot-internal delete-internal commit commit-active pull \
    clone rebase resize delete revert; do
    read -ra old <<<"${times[old $key]}"
    read -ra new <<<"${times[new $key]}"
    a=$(median "${old[@]}")
    b=$(median "${new[@]}")
    awk -v k="$key" -v a="$a" -v b="$b" 'BEGIN { printf "| %s | %.1f | %.1f | %.2f |\n", k, a / 1000, b / 1000, b / a }'
done
