#!/usr/bin/env bash
# Builds everything and runs every test. Leaves nothing behind, and fails if a test did.
#
#   tests/run.sh [--long] [WORDS FOR cargo test ...]
#
# --long sets CHAINFS_LONG=1, by which tests with seeds and budgets take more of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# About fifteen on two processors; more are left to busy ones.
minutes=25
if [ "${1:-}" = --long ]; then
    shift
    export CHAINFS_LONG=1
    minutes=60
fi

. tests/setup.sh
need "${ALL_PROGRAMS[@]}"
need_rust
need_fsx
need_guest
need_fuse

# All that tests create is beneath one directory, so that what they leave can be told from what others own.
TMPDIR=$(mktemp -d "${TMPDIR:-/tmp}/chainfs-tests.XXXXXX")
TMPDIR=$(realpath "$TMPDIR")
# Some tests are an ordinary user's.
chmod 755 "$TMPDIR"
export TMPDIR

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
    rm -rf --one-file-system "$TMPDIR"
    return $clean
}
trap 'clean_up || true' EXIT
trap 'exit 130' INT TERM

failed=0
# The build is not the tests' time. The profile is a release with all checks on.
cargo build --profile checked --workspace --locked
cargo test --profile checked --workspace --locked --no-run
timeout --kill-after=30 "${minutes}m" cargo test --profile checked --workspace --locked --no-fail-fast "$@" || failed=$?
if [ "$failed" -eq 124 ] || [ "$failed" -eq 137 ]; then
    echo "run.sh: the tests took more than $minutes minutes and were stopped" >&2
fi

trap - EXIT
clean_up || failed=1
exit "$failed"
