# What the benchmarks share: a scratch directory that goes away, a mount that goes away, medians.
# Sourced, not run.

. "$(dirname "${BASH_SOURCE[0]}")/../tests/setup.sh"

CHAINFS=${CHAINFS:-$(dirname "${BASH_SOURCE[0]}")/../target/release/chainfs}
if [ ! -x "$CHAINFS" ]; then
    echo "bench: $CHAINFS is missing; build it (cargo build --release) or name it in CHAINFS" >&2
    exit 1
fi
CHAINFS=$(realpath "$CHAINFS")

SCRATCH=$(mktemp -d "${TMPDIR:-/var/tmp}/chainfs-bench.XXXXXX")
SERVERS=()

# Whatever happens, no mount, no server and no file of ours stays behind.
clean_up() {
    local pid device dir
    for pid in "${SERVERS[@]}"; do
        kill "$pid" 2>/dev/null && wait "$pid" 2>/dev/null
    done
    while read -r device dir; do
        [ -n "$dir" ] || continue
        timeout 20 "$CHAINFS" umount "$dir" 2>/dev/null && continue
        # A server that hangs would make umount hang, too. Without the control file system, its death will do.
        echo 1 2>/dev/null >"/sys/fs/fuse/connections/${device#*:}/abort" || kill -KILL "$(server_of "$dir")" || true
        umount -l "$dir" || true
    done < <(awk -v root="$SCRATCH/" 'index($5, root) == 1 { print $3, $5 }' /proc/self/mountinfo | tac)
    rm -rf --one-file-system "$SCRATCH"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# server_of DIR: the process that serves our mount on DIR.
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
    echo "bench: nobody serves $1" >&2
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
