#!/usr/bin/env bash
# Finds out whether the programs that tests and examples need are there, and installs them with
# apt-get where that is possible (Debian 12 and later, as root). Elsewhere it names them and stops.
#
#   tests/setup.sh              everything that the tests use
#   . tests/setup.sh; need qemu-img mke2fs ...

# mke2fs and its like are not on an ordinary user's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

ALL_PROGRAMS=(qemu-img qemu-io fusermount3 mke2fs debugfs mkfs.xfs mkfs.btrfs fio strace e2fsck fstrim cc pkg-config setfattr
    setfacl jq python3)

# The Debian package of a program.
package_of() {
    case $1 in
        qemu-img | qemu-io) echo qemu-utils ;;
        fusermount3) echo fuse3 ;;
        mke2fs | debugfs | e2fsck) echo e2fsprogs ;;
        mkfs.xfs) echo xfsprogs ;;
        mkfs.btrfs) echo btrfs-progs ;;
        fstrim) echo util-linux ;;
        cc) echo "gcc libc6-dev" ;;
        setfattr) echo attr ;;
        setfacl) echo acl ;;
        *) echo "$1" ;;
    esac
}

# need PROGRAM...: returns when all of them can be run.
need() {
    local program packages=()
    for program in "$@"; do
        command -v "$program" >/dev/null || packages+=($(package_of "$program"))
    done
    if [ ${#packages[@]} -gt 0 ]; then
        if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
            echo "setup: installing ${packages[*]}" >&2
            # stdout belongs to the caller.
            { apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
                apt-get -qq install -y --no-install-recommends "${packages[@]}"; } >&2 || exit 1
        else
            echo "setup: missing: ${packages[*]}; install them and try again:" >&2
            echo "    sudo apt-get install -y --no-install-recommends ${packages[*]}" >&2
            exit 1
        fi
        for program in "$@"; do
            command -v "$program" >/dev/null || { echo "setup: $program is still missing" >&2; exit 1; }
        done
    fi
}

# need_rust: cargo, of the version that Cargo.toml asks for; cargo itself says so if it is older.
need_rust() {
    command -v cargo >/dev/null || PATH=$PATH:$HOME/.cargo/bin
    if ! command -v cargo >/dev/null; then
        echo "setup: cargo is missing; install Rust from https://rustup.rs and try again" >&2
        exit 1
    fi
}

# need_fsx: the file system exerciser, built once beside the tests' own programs.
need_fsx() {
    local tools
    tools=$(dirname "${BASH_SOURCE[0]}")/../target/tools
    [ -x "$tools/bin/fsx" ] && return
    need_rust
    echo "setup: building fsx" >&2
    cargo install --quiet --locked fsx --version 0.3.2 --root "$tools" >&2 || exit 1
}

# need_fuse: the device that mounts are served through.
need_fuse() {
    need fusermount3
    if [ ! -c /dev/fuse ]; then
        echo "setup: /dev/fuse is missing; load the fuse module (modprobe fuse), or give the container the device" >&2
        exit 1
    fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    need "${ALL_PROGRAMS[@]}"
    need_rust
    need_fsx
    need_fuse
fi
