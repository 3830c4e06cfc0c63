#!/usr/bin/env bash
# Compares reads of a snapshot: chainfs in each of its ways, its peers, and a plain file, interleaved in one
# run.
#
#   benches/reads.sh [SIZE-IN-MIB [ROUNDS [PICTURE.svg]]]      (default 512 and 5)
#
# The disk has random bytes, as one qcow2 image (depth 1), and as 128 layers with a hash that selects the
# layer of each cluster. A disk with the files of /usr is compressed with zlib and with zstd, and read from
# beginning to end. Everything is read as a snapshot that has an empty overlay. Each round measures all
# targets in turn, so that a slow minute affects all of them; the first round is discarded. It says so if the
# machine is not quiet.
#
#   plain       the plain raw file, in the page cache
#   map         chainfs with a kernel map, at the first touch: the layers are in the page cache, the disk not
#   map-again   the same, read a second time
#   daemon      chainfs' daemon, the layers in the page cache, the disk not
#   uring       the same over io_uring, if the kernel's parameter enable_uring is Y
#   qsd, qsd-u  qemu-storage-daemon's FUSE export, aio=threads and aio=io_uring, in the same state
#   nbdfuse     qemu-nbd behind nbdfuse, if that is installed
#   qcowmount   libqcow's, if that is installed, at depth 1: it reads no backing files
#   *-cold      after everything was dropped from the page cache
#
#   seq   1 MiB reads from beginning to end; MiB/s
#   r1    4 KiB reads at random places by one job, each block once (psync); reads a second
#   r4    the same by four jobs
#
# Each number is a median; the ranges follow. CPU is of client and server, in microseconds for each 4 KiB of
# r1; memory is the server's peak.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need qemu-img qemu-io qemu-storage-daemon qemu-nbd fio jq perl

size_mib=${1:-512}
rounds=${2:-5}
picture=$(realpath -m "${3:-/dev/null}")
deep=128
store=$SCRATCH/store
mkdir -p "$store"
cd "$store"

echo "making $size_mib MiB at depth 1 and $deep ..." >&2
head -c "${size_mib}M" /dev/urandom >plain.raw
qemu-img convert -f raw -O qcow2 plain.raw d1.qcow2
head -c 65536 plain.raw >"$SCRATCH/cluster"
clusters=$((size_mib * 16))
for ((layer = 0; layer < deep; layer++)); do
    backing=()
    [ "$layer" -gt 0 ] && backing=(-u -F qcow2 -b "l$((layer - 1)).qcow2")
    qemu-img create -q -f qcow2 "${backing[@]}" "l$layer.qcow2" "${size_mib}M"
done
awk -v n="$clusters" -v depth="$deep" \
    'BEGIN { for (c = 0; c < n; c++) print int((c * 40503) / 7) % depth, c }' |
    sort -n -s -k1,1 >"$SCRATCH/placement"
for ((layer = 0; layer < deep; layer++)); do
    # One process for each layer, which opens the layer alone.
    awk -v l="$layer" -v f="$SCRATCH/cluster" '$1 == l { printf "write -q -s %s %dk 64k\n", f, $2 * 64 }' \
        "$SCRATCH/placement" |
        qemu-io "json:$(printf '{"driver":"qcow2","backing":null,"file":%s}' \
            "{\"driver\":\"file\",\"filename\":\"l$layer.qcow2\"}")" >/dev/null
done
ln "l$((deep - 1)).qcow2" "d$deep.qcow2"
rm "l$((deep - 1)).qcow2"
# tar ends with an error when enough was read.
while tar -c --ignore-failed-read -C / usr 2>/dev/null; do :; done |
    head -c "${size_mib}M" >"$SCRATCH/files" || true
for kind in zlib zstd; do
    qemu-img convert -f raw -O qcow2 -c -o compression_type=$kind -m 4 -W "$SCRATCH/files" "d$kind.qcow2"
done
rm "$SCRATCH/files"
for depth in 1 $deep zlib zstd; do
    qemu-img create -q -f qcow2 -F qcow2 -b "d$depth.qcow2" "above-$depth.qcow2"
done

# json_of DEPTH AIO: the blockdev of a layer with its backing files, all in the same aio mode.
json_of() {
    local below=null name layer first=$((deep - 1))
    [ "$1" = $deep ] && first=0
    for ((layer = first; layer < deep; layer++)); do
        name=l$layer
        [ "$layer" -eq $((deep - 1)) ] && name=d$1
        below=$(printf '{"driver":"qcow2","read-only":true,"backing":%s,%s}' "$below" \
            "$(printf '"file":{"driver":"file","filename":"%s/%s.qcow2","aio":"%s"}' "$store" "$name" "$2")")
    done
    printf '%s' "$below"
}

# eventually COMMAND...: runs it again and again until it succeeds.
eventually() {
    local try
    for ((try = 0; try < 200; try++)); do
        "$@" && return
        sleep 0.05
    done
    echo "bench: not within 10 s: $*" >&2
    exit 1
}

# begin TARGET DEPTH: serves the disk; sets `path` and `server`.
path='' server='' mnt=$SCRATCH/mnt
begin() {
    local options='' file=$SCRATCH/export
    server=''
    mkdir -p "$mnt"
    case ${1%-cold} in
        plain) path=$store/plain.raw; return ;;
        map | map-again) options=kernelmap=on ;;
        daemon) options=kernelmap=off,nopassthrough$without_uring ;;
        uring) options=kernelmap=off,nopassthrough ;;
        qsd | qsd-u)
            local aio=threads json
            [ "${1%-cold}" = qsd-u ] && aio=io_uring
            : >"$file"
            json=$(json_of "$2" $aio)
            qemu-storage-daemon --blockdev "{\"node-name\":\"q0\",${json#\{}" \
                --export "type=fuse,id=e,node-name=q0,mountpoint=$file" &
            server=$!
            path=$file
            eventually test -s "$file"
            return ;;
        nbdfuse)
            : >"$file"
            nbdfuse -r "$file" [ qemu-nbd -r -f qcow2 "$store/d$2.qcow2" ] &
            server=$!
            path=$file
            eventually test -s "$file"
            return ;;
        qcowmount)
            # It goes to the background by itself.
            qcowmount "$store/d$2.qcow2" "$mnt" >/dev/null
            path=$mnt/qcow1
            eventually test -s "$path"
            server=$(pgrep -n -x qcowmount)
            return ;;
    esac
    "$CHAINFS" mount "$store" "$mnt" -o "$options" 2>/dev/null
    server=$(server_of "$mnt")
    path=$mnt/above-$2/snapshots/d$2.raw
    # The first open may be too early for the map.
    case $1 in map*) eventually is_mapped ;; esac
}
has_ended() { ! kill -0 "$1" 2>/dev/null; }
is_mapped() {
    local file found
    exec {file}<"$path"
    found=$(getfattr --absolute-names --only-values -n user.chainfs.served-by "$path")
    exec {file}<&-
    [[ $found == *map* ]]
}

# end TARGET: ends the server.
end() {
    case ${1%-cold} in
        plain) ;;
        map* | daemon | uring)
            "$CHAINFS" umount "$mnt"
            # Its successor must not be taken for it.
            eventually has_ended "$server"
            ;;
        qcowmount)
            umount "$mnt"
            eventually has_ended "$server"
            ;;
        nbdfuse)
            umount "$path"
            wait "$server" || true
            ;;
        *)
            kill "$server"
            wait "$server" || true
            ;;
    esac
}

declare -A values cpus memory
ticks=$(getconf CLK_TCK)
server_ticks() {
    [ -n "$server" ] && awk '{ sub(/.*\) /, ""); print $12 + $13 }' "/proc/$server/stat" || echo 0
}

# run TARGET DEPTH KIND: one measurement.
run() {
    local words result before after key=$1.$2.$3 jobs=1 invalidate=0
    # What is read must be in the page cache, or nowhere. And on a virtual machine, memory that was unused for
    # a while is slow to allocate: as much as the run will need is allocated and freed.
    cat "$store"/*.qcow2 "$store/plain.raw" >/dev/null
    perl -e '$x = "x" x ($ARGV[0] << 20)' $((size_mib * 3 / 2))
    begin "$1" "$2"
    case $3 in
        seq) words=(--rw=read --bs=1M) ;;
        r1) words=(--rw=randread --bs=4k --runtime=4) ;;
        r4)
            jobs=4
            words=(--rw=randread --bs=4k --runtime=4)
            words+=("--size=$((size_mib / 4))M" "--offset_increment=$((size_mib / 4))M")
            ;;
    esac
    [ "$1" = map-again ] && cat "$path" >/dev/null
    case $1 in
        *-cold) sync; echo 3 >/proc/sys/vm/drop_caches ;;
    esac
    before=$(server_ticks)
    result=$(fio --name=x --readonly --thread --ioengine=psync --group_reporting --invalidate=$invalidate \
        --numjobs=$jobs --filename="$path" "${words[@]}" --output-format=json)
    after=$(server_ticks)
    values[$key]+=" $(jq --arg kind "$3" '.jobs[0].read
        | if $kind == "seq" then .bw_bytes / 1048576 else .iops end' <<<"$result")"
    cpus[$key]+=" $(jq --arg server $((after - before)) --arg hz "$ticks" \
        '.jobs[0] | ((.usr_cpu + .sys_cpu) / 100 * .job_runtime * 1000
            + ($server | tonumber) / ($hz | tonumber) * 1e6) / .read.total_ios' <<<"$result")"
    [ -n "$server" ] && memory[$1.$2]=$(awk '/VmHWM/ { print int($2 / 1024) }' "/proc/$server/status")
    end "$1"
}

# idle: the share of the machine that is idle over two seconds, in percent.
idle() {
    local a b
    a=$(awk '/^cpu / { print $5, $2 + $3 + $4 + $5 + $6 + $7 + $8 + $9 }' /proc/stat)
    sleep 2
    b=$(awk '/^cpu / { print $5, $2 + $3 + $4 + $5 + $6 + $7 + $8 + $9 }' /proc/stat)
    awk -v a="$a" -v b="$b" \
        'BEGIN { split(a, x); split(b, y); printf "%.0f", 100 * (y[1] - x[1]) / (y[2] - x[2]) }'
}

targets=(plain map map-again daemon)
without_uring=''
if [ "$(cat /sys/module/fuse/parameters/enable_uring 2>/dev/null)" = Y ]; then
    without_uring=,noiouring
    targets+=(uring)
fi
targets+=(qsd qsd-u)
command -v nbdfuse >/dev/null && targets+=(nbdfuse)
command -v qcowmount >/dev/null && targets+=(qcowmount)
compressed=(daemon qsd qsd-u)
cold=(plain-cold map-cold)

# All show the same bytes. Not with cmp(1): it reads in units of st_blksize, which is a few bytes for
# qemu-storage-daemon.
for depth in 1 $deep zlib zstd; do
    want=
    for target in map daemon qsd; do
        # What is compressed has no map.
        [[ $target$depth != mapz* ]] || continue
        begin "$target" "$depth"
        sum=$(sha256sum <"$path")
        end "$target"
        [ -z "$want" ] || [ "$sum" = "$want" ] || { echo "bench: $target shows other bytes" >&2; exit 1; }
        want=$sum
    done
done

least_idle=100
for ((round = 0; round <= rounds; round++)); do
    [ "$round" -eq 1 ] && { values=(); cpus=(); }
    now=$(idle)
    [ "$now" -lt "$least_idle" ] && least_idle=$now
    echo "round $round of $rounds; $now % of the machine are idle" >&2
    for depth in 1 $deep; do
        for ((n = 0; n < ${#targets[@]}; n++)); do
            target=${targets[(n + round) % ${#targets[@]}]}
            [ "$target" = qcowmount ] && [ "$depth" -ne 1 ] && continue
            for kind in seq r1 r4; do run "$target" "$depth" "$kind"; done
        done
        for target in "${cold[@]}"; do
            for kind in seq r1; do run "$target" "$depth" "$kind"; done
        done
    done
    for depth in zlib zstd; do
        for ((n = 0; n < ${#compressed[@]}; n++)); do
            run "${compressed[(n + round) % ${#compressed[@]}]}" $depth seq
        done
    done
done

m() { median ${values[$1]:-0}; }
over() { awk -v a="$(m "$1")" -v b="$(m "$2")" 'BEGIN { if (b > 0) printf "%.2f", a / b; else printf "-" }'; }
echo
printf '%s MiB, medians of %s rounds, %s CPUs, kernel %s, %s, %s\n' "$size_mib" "$rounds" "$(nproc)" \
    "$(uname -r)" "$(qemu-img --version | sed -n 1p)" "$("$CHAINFS" --version)"
[ "$least_idle" -ge 95 ] || echo "The machine was not quiet: down to $least_idle % idle between the rounds."
for depth in 1 $deep; do
    echo
    echo "| depth $depth | seq MiB/s | / plain | r1 | / plain | r4 | / plain | CPU us/4 KiB | server MiB |"
    echo "|---|---|---|---|---|---|---|---|---|"
    for target in "${targets[@]}" "${cold[@]}"; do
        [ -n "${values[$target.$depth.seq]:-}" ] || continue
        base=plain
        [[ $target == *-cold ]] && base=plain-cold
        printf '| %s' "$target"
        for kind in seq r1 r4; do
            key=$target.$depth.$kind
            if [ -n "${values[$key]:-}" ]; then
                printf ' | %.0f [%s] | %s' "$(m "$key")" "$(range ${values[$key]})" \
                    "$(over "$key" "$base.$depth.$kind")"
            else
                printf ' | | '
            fi
        done
        printf ' | %.1f | %s |\n' "$(median ${cpus[$target.$depth.r1]})" "${memory[$target.$depth]:-}"
    done
done
echo
echo "| ratio to the better mode of qemu-storage-daemon | seq | r1 | r4 |"
echo "|---|---|---|---|"
for depth in 1 $deep; do
    for target in map map-again daemon uring; do
        [ -n "${values[$target.$depth.seq]:-}" ] || continue
        printf '| %s, depth %s' "$target" "$depth"
        for kind in seq r1 r4; do
            awk -v ours="$(m "$target.$depth.$kind")" -v a="$(m "qsd.$depth.$kind")" \
                -v b="$(m "qsd-u.$depth.$kind")" 'BEGIN { printf " | %.2f", ours / (a > b ? a : b) }'
        done
        echo " |"
    done
done
echo
echo "| compressed, seq MiB/s | daemon | qsd | qsd-u | daemon / the better |"
echo "|---|---|---|---|---|"
for depth in zlib zstd; do
    printf '| %s' $depth
    for target in "${compressed[@]}"; do
        printf ' | %.0f [%s]' "$(m "$target.$depth.seq")" "$(range ${values[$target.$depth.seq]})"
    done
    awk -v ours="$(m "daemon.$depth.seq")" -v a="$(m "qsd.$depth.seq")" -v b="$(m "qsd-u.$depth.seq")" \
        'BEGIN { printf " | %.2f |\n", ours / (a > b ? a : b) }'
done

# The picture: bars on a logarithmic scale, as shares of the plain file.
[ "$picture" = /dev/null ] && exit
qemu=$(qemu-img --version | sed -n 's/ (.*//; s/qemu-img version/QEMU/; 1p')
versions="$(nproc) CPUs, Linux $(uname -r | cut -d- -f1), $qemu, $("$CHAINFS" --version)"
{
    for depth in 1 $deep; do
        for target in "${targets[@]}"; do
            for kind in seq r1 r4; do
                [ -n "${values[$target.$depth.$kind]:-}" ] || continue
                key=$depth.$kind
                echo "$depth $target $kind $(m "$target.$key") $(m "plain.$key")"
            done
        done
    done
} | perl -e '
    my ($date, $versions) = @ARGV;
    my (%of, @targets, %seen);
    while (<STDIN>) {
        my ($depth, $target, $kind, $value, $plain) = split;
        next if $target eq "plain";
        my $share = $value / $plain;
        push @targets, $target unless $seen{$target}++;
        $of{"$depth $kind"}{$target} = [$value, $share];
    }
    my %name = ("map" => "chainfs, kernel map, first touch", "map-again" => "chainfs, kernel map, again",
        "daemon" => "chainfs, daemon", "uring" => "chainfs, daemon, io_uring",
        "qsd" => "qemu-storage-daemon, threads", "qsd-u" => "qemu-storage-daemon, io_uring",
        "nbdfuse" => "nbdfuse", "qcowmount" => "qcowmount");
    my %kind = (seq => "sequential", r1 => "random 4 KiB, one job", r4 => "random 4 KiB, four jobs");
    my ($w, $row, $left) = (760, 18, 250);
    my $h = 60;
    my $body = "";
    for my $depth (1, 128) {
        for my $kind (qw(seq r1 r4)) {
            my $bars = $of{"$depth $kind"} or next;
            $body .= qq(<text class="h" x="10" y="@{[$h + 12]}">depth $depth, $kind{$kind}</text>\n);
            $h += 20;
            for my $target (grep { $bars->{$_} } @targets) {
                my ($value, $share) = @{$bars->{$target}};
                # From a thousandth of the plain file to twice as much.
                my $len = $share > 0.001 ? log($share / 0.001) / log(2000) * ($w - $left - 90) : 1;
                my $class = $target =~ /^(map|daemon|uring)/ ? "ours" : "theirs";
                my $middle = $h + 12;
                $body .= qq(<text x="10" y="$middle">$name{$target}</text>);
                $body .= sprintf(qq(<rect class="%s" x="%d" y="%d" width="%.0f" height="13"/>),
                    $class, $left, $h + 1, $len);
                $body .= sprintf(qq(<text x="%.0f" y="%d">%s</text>\n), $left + $len + 6, $middle,
                    sprintf($share >= 0.1 ? "%.2f" : "%.3f", $share));
                $h += $row;
            }
            $h += 8;
        }
    }
    my $plain = $left + log(1000) / log(2000) * ($w - $left - 90);
    print qq(<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 $w @{[$h + 24]}" );
    print qq(font-family="sans-serif" font-size="12">\n);
    print qq(<title>Reads of a snapshot as shares of a plain file</title>\n);
    print qq(<style>text { fill: #222 } .h { font-weight: bold } .ours { fill: #2a78b8 }\n);
    print qq(.theirs { fill: #b5b5b5 } line { stroke: #c33; stroke-dasharray: 3 3 }\n);
    print qq(\@media (prefers-color-scheme: dark) { text { fill: #ddd } .theirs { fill: #777 } }</style>\n);
    print qq(<text class="h" x="10" y="20" font-size="15">);
    print qq(Reading a snapshot, as a share of the plain file (logarithmic)</text>\n);
    print qq(<text x="10" y="40">$versions</text>\n<line x1="$plain" y1="50" x2="$plain" y2="$h"/>\n$body);
    print qq(<text x="10" y="@{[$h + 14]}">The dashed line is the plain file. );
    print qq(Measured on $date with benches/reads.sh.</text>\n</svg>\n);
' "$(date +%F)" "$versions" >"$picture"
echo "wrote $picture" >&2
