//! Without the machine's root: user namespaces, and the mounts of the host inside them.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use support::*;

/// A store of user 65534's, and a copy of the program that this user can run.
fn nobodys() -> Store {
    let store = Store::new();
    store.raw("base.raw", 2 * MIB, 1);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.scribble("mid.qcow2", "qcow2", 2);
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "");
    let disk = store.put("guest.raw", &[]);
    fs::File::options().write(true).open(&disk).expect("a disk").set_len(8 * MIB).expect("a size");
    let tree = store.dir("../guest");
    fs::write(tree.join("hello"), "of the guest\n").expect("a file");
    tool("mke2fs").args(["-q", "-F", "-t", "ext4", "-d"]).arg(&tree).arg(&disk).succeeds();
    fs::copy(chainfs_binary(), store.beside("chainfs")).expect("a copy of the program");
    for file in [store.beside(""), store.beside("chainfs")] {
        fs::set_permissions(file, fs::Permissions::from_mode(0o755)).expect("permissions");
    }
    tool("chown").args(["-R", "65534:65534"]).args([store.root(), store.beside("mnt")]).succeeds();
    store
}

/// Runs a script in the store's scratch directory, in namespaces that nothing outlives.
fn run(store: &Store, words: &[&str], script: &str) -> (i32, String, String) {
    let mut command = tool("unshare");
    // The first two belong to this process: mounts and processes end with the script.
    command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]);
    command.args(["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]).args(words);
    command.args(["sh", "-ec", script]).current_dir(store.beside(""));
    let home = store.beside("").canonicalize().expect("a path");
    command.env("HOME", home).env_remove("XDG_CONFIG_HOME").env("LC_ALL", "C").outcome()
}

const ROOT_OF_ITS_OWN: [&str; 3] = ["unshare", "--map-root-user", "--mount"];

#[test]
fn an_ordinary_user_does_everything_in_a_user_namespace() {
    let store = nobodys();
    let script = r#"
        ./chainfs mount store mnt
        cmp store/base.raw mnt/web/snapshots/base.raw
        cat mnt/guest/files/active/*/hello
        echo wednesday > mnt/web/control/snapshot
        printf written | dd of=mnt/web/active.raw conv=notrunc,fsync status=none
        test $(head -c 7 mnt/web/active.raw) = written
        echo 'top=wednesday base=mid' > mnt/web/control/commit
        while grep -q '^state: running' mnt/web/control/status; do sleep 0.05; done
        grep '^state:' mnt/web/control/status
        ./chainfs doctor mnt | grep '^problem' && exit 3
        ./chainfs umount mnt
        test -z "$(grep " $PWD/mnt " /proc/self/mountinfo)"
        # Others of the namespace need no line of fuse.conf.
        ./chainfs mount -o allow_other store mnt
        grep " $PWD/mnt " /proc/self/mountinfo | grep -o allow_other
        ./chainfs umount mnt
        echo all well
    "#;
    let (code, out, err) = run(&store, &ROOT_OF_ITS_OWN, script);
    assert_eq!((code, &*out), (0, "of the guest\nstate: done\nallow_other\nall well\n"), "{err}");
    // The files are the user's, as if there was no namespace.
    let owners = tool("find").arg(store.root()).args(["-not", "-uid", "65534"]).succeeds();
    assert_eq!(owners, "");
    store.img(["check", "-q", "web.qcow2"]);
}

/// A mount of the host, bound into a container of another user: with `allow_other` by the modes, without only
/// for the user who has mounted it.
#[test]
fn a_mount_of_the_host_is_seen_in_a_user_namespace() {
    let store = nobodys();
    let mount = Mount::with(&store, "allow_other");
    let script = r"
        mkdir -p inside
        mount --bind mnt/guest/files/active inside
        cat inside/*/hello
        cmp store/base.raw mnt/web/snapshots/base.raw
        stat -c %u mnt/web/active.raw
    ";
    tool("install").args(["-d", "-o", "65534"]).arg(store.beside("inside")).succeeds();
    let (code, out, err) = run(&store, &ROOT_OF_ITS_OWN, script);
    assert_eq!((code, &*out), (0, "of the guest\n0\n"), "{err}");
    // Another user's namespace has nobody's files, and reads what all may read.
    let words = ["unshare", "--map-user=1000", "--mount"];
    let (code, out, err) =
        run(&store, &words, "stat -c %u mnt/web/active.raw; head -c 1 mnt/web/active.raw | wc -c");
    assert_eq!((code, &*out), (0, "1000\n1\n"), "{err}");
    mount.umount();
    let mount = Mount::new(&store);
    let (code, out, err) = run(&store, &ROOT_OF_ITS_OWN, "cat mnt/guest/files/active/*/hello");
    assert_eq!((code, &*out), (1, ""), "{err}");
    assert!(err.contains("Permission denied"), "{err}");
    mount.umount();
}

#[test]
fn what_cannot_mount_in_a_namespace_is_told_what_can() {
    let store = nobodys();
    for (words, remedy) in [
        // Root of a user namespace, in the mount namespace of others.
        (&["unshare", "--map-root-user"][..], "unshare --map-root-user --mount"),
        (&["setpriv", "--no-new-privs"], "no_new_privs"),
    ] {
        let (code, out, err) = run(&store, words, "./chainfs mount store mnt");
        assert_eq!((code, &*out), (32, ""), "{err}");
        assert!(err.contains(remedy), "{words:?}: {err}");
    }
    // The doctor knows it beforehand.
    let (_, out, err) = run(&store, &["setpriv", "--no-new-privs"], "./chainfs doctor");
    assert!(out.contains("problem  no_new_privs: "), "{out}{err}");
    let (_, out, err) = run(&store, &ROOT_OF_ITS_OWN, "./chainfs doctor");
    let has = |words: &str| assert!(out.contains(words), "{words}: {out}{err}");
    has("note     user namespace: this is one: its first user is uid 65534 outside");
    has("ok       fusermount3: gives no rights in a user namespace; its root needs it not");
    assert!(!out.contains("chmod u+s"), "{out}");
    // Root without the right, as in a container without --cap-add.
    let words =
        ["unshare", "--map-root-user", "--mount", "setpriv", "--bounding-set=-sys_admin", "--inh-caps=-all"];
    let (_, out, err) = run(&store, &words, "./chainfs doctor || true; ./chainfs mount store mnt");
    assert!(out.contains("problem  CAP_SYS_ADMIN: is missing"), "{out}{err}");
    assert!(err.contains("--cap-add SYS_ADMIN"), "{err}");
}
