#!/usr/bin/env bash
# A store of 10,000 images in 1,000 chains: time until the mount is ready, cost of listing all files, and
# memory, with 1,024 descriptors.
#
#   benches/many.sh [CHAINS [LAYERS]]      (default 1000 and 10)
#
# CHAINFS_OPTIONS is passed to mount -o.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need qemu-img perl

chains=${1:-1000}
layers=${2:-10}
store=$SCRATCH/store
mnt=$SCRATCH/mnt
mkdir -p "$store" "$mnt"

echo "making $((chains * layers)) images in $chains chains ..." >&2
# qemu-img creates one overlay and one base; the others are copies with another name of the same length in the
# header. Blocks of zeroes stay holes.
qemu-img create -q -f qcow2 -u -F qcow2 -b c0000-000.qcow2 "$SCRATCH/overlay" 10G
qemu-img create -q -f qcow2 "$SCRATCH/base" 10G
perl -e '
    my ($store, $overlay, $base, $chains, $layers) = @ARGV;
    sub slurp { open my $f, "<:raw", $_[0] or die "$_[0]: $!"; local $/; <$f> }
    sub spill {
        my ($path, $bytes) = @_;
        open my $f, ">:raw", $path or die "$path: $!";
        for (my $at = 0; $at < length $bytes; $at += 4096) {
            my $block = substr $bytes, $at, 4096;
            next if $block !~ /[^\0]/;
            seek $f, $at, 0;
            print $f $block;
        }
        truncate $f, length $bytes;
        close $f or die "$path: $!";
    }
    my ($over, $low) = (slurp($overlay), slurp($base));
    my $at = index $over, "c0000-000.qcow2";
    die "no backing name" if $at < 0;
    for my $chain (0 .. $chains - 1) {
        my $dir = sprintf "%s/d%02d", $store, $chain % 50;
        mkdir $dir unless -d $dir;
        for my $layer (0 .. $layers - 1) {
            my $bytes = $low;
            if ($layer > 0) {
                $bytes = $over;
                substr $bytes, $at, 15, sprintf "c%04d-%03d.qcow2", $chain, $layer - 1;
            }
            spill(sprintf("%s/c%04d-%03d.qcow2", $dir, $chain, $layer), $bytes);
        }
    }
' "$store" "$SCRATCH/overlay" "$SCRATCH/base" "$chains" "$layers"
leaf=$(printf '%s/d%02d/c%04d-%03d.qcow2' "$store" $(((chains - 1) % 50)) $((chains - 1)) $((layers - 1)))
have=$(qemu-img info --backing-chain "$leaf" | grep -c '^image:')
[ "$have" -eq "$layers" ] || { echo "bench: $leaf has $have layers for QEMU" >&2; exit 1; }

now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f", b - a }'; }
peak() { awk '/^VmHWM/ { printf "%.0f", $2 / 1024 }' "/proc/$server/status"; }

ulimit -n 1024
start=$(now)
"$CHAINFS" mount "$store" "$mnt" ${CHAINFS_OPTIONS:+-o "$CHAINFS_OPTIONS"}
usable=$(since "$start")
server=$(server_of "$mnt")
peak_mounted=$(peak)

start=$(now)
lines=$(ls -lR "$mnt" | tee "$SCRATCH/listing" | wc -l)
listed=$(since "$start")
shown=$(grep -c 'active\.raw$' "$SCRATCH/listing")
snapshots=$(grep -c 'c[0-9]*-[0-9]*\.raw$' "$SCRATCH/listing")
start=$(now)
ls -lR "$mnt" >/dev/null
again=$(since "$start")
peak_listed=$(peak)

# Reads the first bytes of each disk, which opens all layers.
start=$(now)
find "$mnt" -name '*.raw' -type f -exec head -q -c 4096 {} + >/dev/null
opened=$(since "$start")
start=$(now)
cat "$mnt/.chainfs/tree.txt" "$mnt/.chainfs/chains.json" >/dev/null
told=$(since "$start")
descriptors=$(ls "/proc/$server/fd" | wc -l)
peak_all=$(peak)
start=$(now)
"$CHAINFS" umount "$mnt"
left=$(since "$start")

[ "$shown" -eq "$chains" ] || { echo "bench: $shown chains are shown, not $chains" >&2; exit 1; }
[ "$snapshots" -eq $((chains * (layers - 1))) ] || { echo "bench: $snapshots snapshots are shown" >&2; exit 1; }

cat <<TABLE

$((chains * layers)) images in $chains chains, 1024 descriptors, $(nproc) CPUs, kernel $(uname -r)

| what | seconds | daemon's peak MiB |
|---|---|---|
| from the command to a tree that can be used | $usable | $peak_mounted |
| ls -lR of everything ($lines lines) | $listed | $peak_listed |
| the same again | $again | |
| the first 4 KiB of every disk | $opened | $peak_all |
| tree.txt and chains.json | $told | |
| umount | $left | |

Descriptors open at the end: $descriptors
TABLE
