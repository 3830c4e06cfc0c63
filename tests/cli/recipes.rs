//! Runs the examples of docs/recipes, each page in a directory with the README's store.

use std::fs;
use std::path::Path;

use support::examples::{Ending, blocks, document, examples};
use support::{Outcome as _, chainfs_binary, project, tool};

/// Runs the blocks of a page that are marked with these words, in their order.
fn run(page: &str, marks: &[&str]) {
    run_prepared(page, marks, |_| ());
}

/// The same in a directory in which something was prepared.
fn run_prepared(page: &str, marks: &[&str], prepare: impl FnOnce(&Path)) {
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path().canonicalize().expect("its path");
    let _ending = Ending(place.clone());
    for name in ["images", "mnt"] {
        fs::create_dir(place.join(name)).expect("a directory");
    }
    tool(project().join("examples/store.sh").to_str().expect("text")).arg(place.join("images")).succeeds();
    // The first mount says that it makes the directory for its notes.
    let (images, mnt) = (place.join("images"), place.join("mnt"));
    tool(chainfs_binary()).arg("mount").args([&images, &mnt]).succeeds();
    tool(chainfs_binary()).arg("umount").arg(&mnt).succeeds();
    prepare(&place);
    let text = document(&format!("docs/recipes/{page}"));
    for (mark, lines) in blocks(&text) {
        if let Some(name) = mark.strip_prefix("file ") {
            let text = lines.join("\n").replace("/mnt/images", &mnt.display().to_string());
            fs::write(place.join(name), text.replace("/srv", &place.display().to_string())).expect("a file");
        }
    }
    let chosen: Vec<String> = blocks(&text)
        .into_iter()
        .filter(|(mark, _)| marks.contains(mark))
        .map(|(_, lines)| format!("```console\n{}\n```\n", lines.join("\n")))
        .collect();
    // A stand-in of the test's own, where there is one.
    let is_prepared = place.join("podman").exists();
    let chosen = chosen.concat();
    let chosen = if is_prepared { chosen.replace("$ podman ", "$ ./podman ") } else { chosen };
    let examples = examples(&chosen, "console");
    assert!(!examples.is_empty(), "{page} has lost its examples");
    for example in examples {
        example.run(&place);
    }
}

#[test]
fn old_states_are_looked_at_restored_and_reverted_to() {
    run("old-states.md", &["console"]);
}

#[test]
fn a_store_is_moved() {
    run("move-a-store.md", &["console"]);
}

#[test]
fn work_goes_on_after_a_crash() {
    run("after-a-crash.md", &["console"]);
}

#[test]
fn disks_and_files_are_backed_up() {
    run("backup.md", &["console"]);
}

#[test]
#[ignore = "needs restic and borg; see --long"]
fn restic_and_borg_read_snapshots() {
    run("backup.md", &["console", "console restic", "console borg"]);
}

#[test]
fn a_mount_is_shared() {
    run("sharing.md", &["console"]);
}

#[test]
fn containers_see_a_mount_and_make_one() {
    run("containers.md", &["console"]);
}

/// As user 65534, in namespaces that end with the command: podman leaves processes. crun wants a single
/// hierarchy of control groups. The user has no further users, about which podman warns.
const PODMAN: &str = r#"#!/bin/bash
place=$(dirname "$(realpath "$0")")
export HOME=$place/home XDG_RUNTIME_DIR=$place/run TMPDIR=$place/home
exec unshare --mount --pid --fork --kill-child --mount-proc --propagation private bash -ec '
    if ! test -e /sys/fs/cgroup/cgroup.controllers; then
        umount -l /sys/fs/cgroup
        mount -t cgroup2 cgroup2 /sys/fs/cgroup
    fi
    rm -rf "$XDG_RUNTIME_DIR"
    install -d -o 65534 -g 65534 -m 700 "$HOME" "$XDG_RUNTIME_DIR"
    test "$1" != run || { shift; set -- run --cgroups disabled "$@"; }
    set -o pipefail
    setpriv --reuid=65534 --regid=65534 --clear-groups podman --storage-driver vfs --cgroup-manager cgroupfs \
        --events-backend file "$@" 2>&1 | { grep -v "^time=" || true; }' bash "$@"
"#;

/// The image of the page, of busybox, chainfs and its libraries.
fn image_with_chainfs(place: &Path) {
    let script = r#"
        mkdir -p image/bin image/usr/bin image/mnt image/srv image/proc image/dev image/tmp
        cp "$(command -v busybox)" image/bin/busybox
        for name in sh cat ls; do ln -s busybox image/bin/$name; done
        cp "$0" image/usr/bin/chainfs
        for library in $(ldd "$0" | grep -o '/[^ ]*'); do install -D -m 755 "$library" "image$library"; done
        tar --owner=0 --group=0 -C image -cf image.tar .
        chmod 755 podman . image.tar
        ./podman import image.tar tools
    "#;
    fs::write(place.join("podman"), PODMAN).expect("a program");
    let mut command = tool("bash");
    command.args(["-ec", script, chainfs_binary()]).current_dir(place).succeeds();
}

#[test]
#[ignore = "needs podman and bubblewrap; see --long"]
fn podman_and_bubblewrap_mount_without_root() {
    run_prepared("containers.md", &["console", "console podman"], image_with_chainfs);
}

#[test]
#[ignore = "needs nfs-ganesha; see --long"]
fn a_mount_is_exported_by_nfs() {
    run("network.md", &["console nfs"]);
}

#[test]
#[ignore = "needs Samba; see --long"]
fn a_mount_is_exported_by_samba() {
    run("network.md", &["console samba"]);
}

#[test]
fn other_programs_read_views() {
    run("other-programs.md", &["console"]);
}

#[test]
#[ignore = "needs nbdkit, libnbd and ddrescue; see --long"]
fn more_programs_read_views() {
    run("other-programs.md", &["console long"]);
}

#[test]
fn every_page_is_listed_and_run() {
    let list = document("docs/recipes/README.md");
    let tests = document("tests/cli/recipes.rs");
    for entry in fs::read_dir(project().join("docs/recipes")).expect("the pages") {
        let name = entry.expect("a page").file_name().into_string().expect("text");
        if name != "README.md" {
            assert!(list.contains(&format!("[{name}]({name})")), "{name} is not listed");
            // libvirt's page is run with a libvirt of its own, in tests/live/libvirt.rs.
            assert!(name == "libvirt.md" || tests.contains(&format!("run(\"{name}\"")), "{name} is not run");
        }
    }
}
