#!/usr/bin/env bash
# Builds everything and runs every test. Leaves nothing behind, and fails if a test did.
#
#   tests/run.sh [--long | --servers] [OPTIONS OF cargo test] [-- NAMES OF TESTS]
#
# --long sets CHAINFS_LONG=1, by which tests with seeds and budgets take more of them, and runs those that
# are ignored otherwise. --servers runs of these the ones that need a server of object storage, which is
# downloaded. At the end it says which tests took longest. A test that hangs is named: when no test
# of a binary has ended for QUIET minutes, those at work are told, and the binary is stopped. How long all of
# them take together is no failure.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

QUIET=10
SLOWEST=25
included=()
if [ "${1:-}" = --long ]; then
    shift
    export CHAINFS_LONG=1
    included=(--include-ignored)
    QUIET=60
fi
servers=0
if [ "${1:-}" = --servers ]; then
    shift
    servers=1
fi
options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
[ $# -eq 0 ] || shift

# Tests wait for tools, the kernel and disks in a good part of their time.
export RUST_TEST_THREADS=${RUST_TEST_THREADS:-$(($(nproc) + 2))}

. tests/setup.sh
need "${ALL_PROGRAMS[@]}"
need_rust
need_fsx
need_guest
if [ -n "${CHAINFS_LONG:-}" ]; then
    need_debian
    need_seaweedfs
    need restic borg podman bwrap crun rpm ganesha.nfsd nfs-ls smbd smbclient nbdkit nbdcopy ddrescue
fi
[ $servers -eq 0 ] || need_seaweedfs
need_fuse

# All that tests create is beneath one directory, so that what they leave can be told from what others own.
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/chainfs-tests.XXXXXX")
TMPDIR=$(realpath "$TMPDIR")
# Some tests are an ordinary user's.
chmod 755 "$TMPDIR"
export TMPDIR
logs=$(mktemp -d "${TMPDIR%/*}/chainfs-logs.XXXXXX")
# The tests of images judge many thousand small files that no disk need ever see: in memory, if there is room.
memory=
if [ "$(df --output=avail -B1 /dev/shm 2>/dev/null | tail -n 1)" -gt $((4 << 30)) ] 2>/dev/null; then
    memory=$(mktemp -d /dev/shm/chainfs-tests.XXXXXX)
fi
running=

# left_mounts: "DEVICE DIR" of every mount beneath TMPDIR, innermost first.
left_mounts() {
    awk -v root="$TMPDIR/" 'index($5, root) == 1 { print $3, $5 }' /proc/self/mountinfo | tac
}

# left_loops: every loop device whose file is beneath TMPDIR.
left_loops() {
    local file
    for file in /sys/block/loop*/loop/backing_file; do
        if [ -r "$file" ] && [[ $(<"$file") == "$TMPDIR"/* ]]; then
            file=${file%/loop/backing_file}
            echo "/dev/${file##*/}"
        fi
    done
}

# clean_up: aborts, unmounts and removes what is left. Returns 1 if there were mounts or loop devices.
clean_up() {
    local device dir loop clean=0
    [ -z "$running" ] || kill -KILL -- "-$running" 2>/dev/null || true
    while read -r device dir; do
        [ -n "$dir" ] || continue
        dir=$(printf '%b' "$dir")
        echo "run.sh: left mounted: $dir" >&2
        clean=1
        # A daemon that hangs would make umount hang, too.
        echo 1 2>/dev/null >"/sys/fs/fuse/connections/${device#*:}/abort" || true
        umount -l "$dir" 2>/dev/null || fusermount3 -uz "$dir" || true
    done <<<"$(left_mounts)"
    for loop in $(left_loops); do
        echo "run.sh: left attached: $loop" >&2
        clean=1
        losetup -d "$loop" || true
    done
    rm -rf --one-file-system "$TMPDIR" "$logs" ${memory:+"$memory"}
    return $clean
}
trap 'clean_up || true' EXIT
trap 'exit 130' INT TERM

# run_tests NAME DIRECTORY BINARY [WORDS...]: runs the tests of a binary, with their times, and stops it when
# no test ends any more.
run_tests() {
    local name=$1 directory=$2 log="$logs/$1" place=$TMPDIR ended=0 now last=$SECONDS stopped=0 code=0 show
    shift 2
    [ "$name" != image ] || place=${memory:-$TMPDIR}
    echo "== $name" >&2
    : >"$log"
    # The times are an option that the test harness calls unstable; the variable lets it take that.
    RUSTC_BOOTSTRAP=1 setsid env -C "$directory" TMPDIR="$place" \
        "$@" -Zunstable-options --report-time >"$log" 2>&1 </dev/null &
    running=$!
    tail -q --pid="$running" -s 0.2 -n +1 -f "$log" &
    show=$!
    while kill -0 "$running" 2>/dev/null; do
        sleep 0.2
        now=$(grep -c '^test .* \.\.\. ' "$log" || true)
        [ "$now" -eq "$ended" ] || last=$SECONDS
        ended=$now
        if [ $((SECONDS - last)) -gt $((QUIET * 60)) ]; then
            stopped=1
            kill -KILL -- "-$running" 2>/dev/null || true
        fi
    done
    wait "$running" || code=$?
    running=
    wait "$show" || true
    if [ $stopped -eq 1 ]; then
        echo "run.sh: no test of $name has ended for $QUIET minutes; it was stopped. At work were:" >&2
        # The harness names each test that takes more than a minute.
        sed -n 's/^test \(.*\) has been running for over .*/\1/p' "$log" | sort -u |
            while read -r test; do grep -qF "test $test ... " "$log" || echo "    $test" >&2; done
    fi
    return "$code"
}

failed=0
# The build is not the tests' time. The profile is an optimised one with all checks on.
# All targets in one command first, so that both processors have work.
cargo test --profile checked --workspace --locked --no-run --message-format=json-render-diagnostics \
    "${options[@]}" >"$logs/built"
cargo build --profile checked --workspace --locked
binaries=$(jq -r 'select(.reason == "compiler-artifact" and .profile.test and .executable)
    | [.target.name + (if .target.kind == ["test"] then "" else " (unit tests)" end), .executable,
        (.manifest_path | rtrimstr("/Cargo.toml"))]
    | @tsv' "$logs/built")
began=$SECONDS
while IFS=$'\t' read -r name binary directory; do
    run_tests "$name" "$directory" "$binary" "${included[@]}" "$@" || failed=1
    if [ $servers -eq 1 ] && [ "$name" = mount ]; then
        run_tests "$name-servers" "$directory" "$binary" --ignored s3:: || failed=1
    fi
done <<<"$binaries"

echo "== $((SECONDS - began)) seconds; the slowest tests:" >&2
for log in "$logs"/*; do
    sed -n "s|^test \(.*\) \.\.\. [a-zA-Z]* <\([0-9.]*\)s>\$|\2 ${log##*/}::\1|p" "$log"
done | sort -rn | sed -n "1,${SLOWEST}p" >&2

trap - EXIT
clean_up || failed=1
exit "$failed"
