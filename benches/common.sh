# Shared functions of the benchmarks: a scratch directory and a mount that are removed at exit, and medians.
# Source this file; do not run it.

. "$(dirname "${BASH_SOURCE[0]}")/../tests/setup.sh"

CHAINFS=${CHAINFS:-$(dirname "${BASH_SOURCE[0]}")/../target/release/chainfs}
if [ ! -x "$CHAINFS" ]; then
    echo "bench: $CHAINFS is missing; build it (cargo build --release) or name it in CHAINFS" >&2
    exit 1
fi
CHAINFS=$(realpath "$CHAINFS")

SCRATCH=$(mktemp -d "${TMPDIR:-/var/tmp}/chainfs-bench.XXXXXX")
SERVERS=()

# Removes all mounts, servers and files of this run, also after an error.
clean_up() {
    local pid device dir
    for pid in "${SERVERS[@]}"; do
        kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null
    done
    while read -r device dir; do
        [ -n "$dir" ] || continue
        timeout 20 "$CHAINFS" umount "$dir" 2>/dev/null && continue
        # umount would hang with a hanging server: abort the connection, or kill the server if fusectl is not
        # mounted.
        echo 1 2>/dev/null >"/sys/fs/fuse/connections/${device#*:}/abort" || kill -KILL "$(server_of "$dir")" || true
        umount -l "$dir" || true
    done < <(awk -v root="$SCRATCH/" 'index($5, root) == 1 { print $3, $5 }' /proc/self/mountinfo | tac)
    rm -rf --one-file-system "$SCRATCH"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# server_of DIR: the process that serves this run's mount on DIR.
server_of() {
    local cmdline words
    for cmdline in /proc/[0-9]*/cmdline; do
        mapfile -d '' -t words 2>/dev/null <"$cmdline" || continue
        if [[ ${words[0]:-} == *chainfs && " ${words[*]:1} " == *" $1 "* ]]; then
            cmdline=${cmdline#/proc/}
            echo "${cmdline%/cmdline}"
            return
        fi
    done
    echo "bench: no process serves $1" >&2
    exit 1
}

# median NUMBER...
median() {
    printf '%s\n' "$@" | sort -g | awk '{ v[NR] = $1 } END { print NR % 2 ? v[(NR + 1) / 2] : (v[NR / 2] + v[NR / 2 + 1]) / 2 }'
}

# range NUMBER...: "smallest-largest", whole numbers
range() {
    printf '%s\n' "$@" | sort -g | awk 'NR == 1 { low = $1 } { high = $1 } END { printf "%.0f-%.0f", low, high }'
}
