#!/usr/bin/env bash
# Makes packages in target/package: a .deb, an .rpm, and a tarball of programs that need no libraries.
#
#   packaging/build.sh [--profile PROFILE] [deb|rpm|musl|all]...
#
# The .deb and the .rpm need the C library of this machine or a later one: build on the oldest system that is to
# be served. cargo-deb and cargo-generate-rpm are installed into target/tools, at the versions below.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

CARGO_DEB=3.8.0
CARGO_GENERATE_RPM=0.21.1
MUSL=x86_64-unknown-linux-musl

. tests/setup.sh
need_rust

profile=release
formats=()
while [ $# -gt 0 ]; do
    case $1 in
        --profile) profile=${2:?--profile needs a name}; shift ;;
        deb | rpm | musl) formats+=("$1") ;;
        all) formats+=(deb rpm musl) ;;
        *) echo "usage: packaging/build.sh [--profile PROFILE] [deb|rpm|musl|all]..." >&2; exit 2 ;;
    esac
    shift
done
[ ${#formats[@]} -gt 0 ] || formats=(deb rpm musl)
directory=$profile
[ "$profile" != dev ] || directory=debug
target=${CARGO_TARGET_DIR:-target}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
out=target/package

# install_tool NAME VERSION: a program of cargo's, for this repository alone.
install_tool() {
    if [ "$("target/tools/bin/$1" --version 2>/dev/null | grep -o '[0-9][0-9.]*' | head -n 1)" != "$2" ]; then
        echo "package: building $1 $2" >&2
        cargo install --quiet --locked "$1" --version "$2" --root target/tools >&2
    fi
}

# stage BINARIES ROOT: everything that packages have, under ROOT as on a machine.
stage() {
    local binaries=$1 root=$2 page shell
    rm -rf "$root"
    mkdir -p "$root"
    install -D -m 755 "$binaries/chainfs" "$root/usr/bin/chainfs"
    install -D -m 755 "$binaries/mount-chainfs" "$root/usr/sbin/mount.chainfs"
    strip --strip-all "$root/usr/bin/chainfs" "$root/usr/sbin/mount.chainfs"
    ln -s mount.chainfs "$root/usr/sbin/mount.fuse.chainfs"
    install -D -m 644 packaging/systemd/chainfs@.service "$root/usr/lib/systemd/system/chainfs@.service"
    install -D -m 644 packaging/chainfs.toml "$root/etc/chainfs.toml"
    mkdir -p "$root/pages"
    "$binaries/chainfs" man "$root/pages"
    for page in "$root/pages"/*; do
        install -D -m 644 "$page" "$root/usr/share/man/man${page##*.}/${page##*/}"
    done
    rm -r "$root/pages"
    ln -s mount.chainfs.8.gz "$root/usr/share/man/man8/mount.fuse.chainfs.8.gz"
    find "$root/usr/share/man" -type f -exec gzip -9n {} +
    for shell in bash:bash-completion/completions/chainfs fish:fish/vendor_completions.d/chainfs.fish \
        zsh:zsh/vendor-completions/_chainfs zsh:zsh/site-functions/_chainfs; do
        mkdir -p "$root/usr/share/$(dirname "${shell#*:}")"
        "$binaries/chainfs" completions "${shell%%:*}" >"$root/usr/share/${shell#*:}"
        chmod 644 "$root/usr/share/${shell#*:}"
    done
    install -D -m 644 packaging/debian/lintian-overrides "$root/usr/share/lintian/overrides/chainfs"
    install -d -m 755 "$root/usr/share/doc/chainfs/examples"
    install -m 644 packaging/examples/* "$root/usr/share/doc/chainfs/examples/"
    install -m 644 packaging/debian/copyright README.md docs/SEMANTICS.md docs/NOTES.md CHANGELOG.md "$root/usr/share/doc/chainfs/"
    mv "$root/usr/share/doc/chainfs/CHANGELOG.md" "$root/usr/share/doc/chainfs/changelog"
    gzip -9n "$root/usr/share/doc/chainfs"/{SEMANTICS.md,NOTES.md,changelog}
}

build() {
    cargo build --profile "$profile" --workspace --locked "$@"
}

for format in "${formats[@]}"; do
    mkdir -p "$out"
    case $format in
        deb)
            need dpkg-shlibdeps
            install_tool cargo-deb $CARGO_DEB
            build
            stage "$target/$directory" "$out/root"
            target/tools/bin/cargo-deb --no-build --no-strip --locked --output "$out/"
            ;;
        rpm)
            install_tool cargo-generate-rpm $CARGO_GENERATE_RPM
            build
            stage "$target/$directory" "$out/root"
            target/tools/bin/cargo-generate-rpm --auto-req builtin --output "$out/"
            ;;
        musl)
            need musl-gcc
            rustup target add $MUSL >&2
            CC_x86_64_unknown_linux_musl=musl-gcc build --target $MUSL
            name=chainfs-$version-x86_64-musl
            stage "$target/$MUSL/$directory" "$out/$name"
            tar --owner=0 --group=0 --numeric-owner -C "$out" -czf "$out/$name.tar.gz" "$name"
            rm -rf "${out:?}/$name"
            ;;
    esac
done
ls -l "$out"/*.deb "$out"/*.rpm "$out"/*.tar.gz 2>/dev/null || true
