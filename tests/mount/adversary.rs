//! Hostile or unlucky input: guest writes, overlapping tables, indirect names, files that change at the worst
//! moment.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, symlink};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::SeekFrom;
use support::damage::header;
use support::*;

const COPIED: u64 = 1 << 63;

/// Where the only entry of an image's snapshot table has its VM state's size and its disk's size.
fn snapshot_sizes(image: &Damage) -> (u64, u64) {
    let entry = image.u64(header::SNAPSHOTS_OFFSET);
    (entry + 40, entry + 48)
}

#[test]
fn saved_vm_state_is_whole_whatever_its_length() {
    let store = Store::new();
    // VM state is at the first L1 entry past the disk: here at 512 MiB.
    let state_at = 512 * MIB;
    store.create("web.qcow2", state_at + MIB, "");
    store.io("web.qcow2", "qcow2", [format!("write -q -P 0x57 {state_at} 64k")]);
    store.img(["snapshot", "-c", "saved", "web.qcow2"]);
    for len in [1000, 512, 511, 513, 65_536 - 1] {
        let image = Damage::to(store.path("web.qcow2"));
        let (state_size, disk_size) = snapshot_sizes(&image);
        image.put_u64(disk_size, MIB);
        image.put_u64(state_size, len);
        let mount = Mount::new(&store);
        let state = fs::read(mount.path("web/snapshots/active@saved.vmstate")).expect("VM state");
        assert!(state.len() as u64 == len && state.iter().all(|byte| *byte == 0x57), "{len}");
        mount.umount();
    }
}

#[test]
fn tables_may_overlap() {
    let store = Store::new();
    store.create("web.qcow2", 4 * MIB, "cluster_size=4k");
    let image = Damage::to(store.path("web.qcow2"));
    // The L1 table is its own L2 table, whose first entry is the table as data.
    image.put_u64(image.l1_at(), COPIED | image.l1_at());
    image.set_len(image.len().next_multiple_of(image.cluster_size()));
    drop(image);
    let expected = store.oracle("web.qcow2", "qcow2");
    let mount = Mount::new(&store);
    assert_same(&mount.path("web/active.raw"), &expected);
    mount.umount();
}

#[test]
fn guest_data_in_a_raw_disk_claims_no_other_image() {
    let store = Store::new();
    store.create("victim.qcow2", MIB, "");
    store.scribble("victim.qcow2", "qcow2", 1);
    store.raw("notes.txt", 8192, 2);
    // Two raw disks, stated by the user and by a header, with guest-written headers in them.
    store.overlay_unchecked("guest.img", "victim.qcow2", "raw");
    store.overlay_unchecked("below", "notes.txt", "raw");
    store.overlay("above.qcow2", "below", "raw", "");
    // A guest disk in an external data file, which names the victim as its own data file's owner would.
    store.img(["create", "-q", "-f", "qcow2", "-o", "data_file=outside", "inside.qcow2", "1M"]);
    store.overlay_unchecked("outside", "victim.qcow2", "raw");
    let mount = Mount::with(&store, "format=guest.img:raw");
    assert_eq!(mount.top(), ["above", "guest", "inside", "victim"]);
    assert_chain(&store, &mount, "victim", "victim.qcow2", "qcow2");
    assert_same(&mount.path("above/snapshots/below.raw"), &store.oracle("below", "raw"));
    // A user may run them as qcow2 all the same: their named files are in use until the user states their
    // format.
    let problems = mount.text(".chainfs/problems.txt");
    let said: Vec<&str> = problems.lines().map(|line| line.split(':').next().unwrap_or_default()).collect();
    assert!(said == ["below", "outside"] && problems.contains("-o format=below:raw"), "{problems}");
    mount.umount();
    let mount = Mount::with(&store, "format=guest.img:raw,format=below:raw,format=outside:raw");
    assert_eq!(mount.text(".chainfs/problems.txt"), "");
    mount.umount();
}

#[test]
fn a_header_in_a_raw_base_does_not_affect_its_overlay() {
    let store = Store::new();
    store.raw("base.img", MIB, 3);
    store.overlay("web.qcow2", "base.img", "raw", "");
    store.scribble("web.qcow2", "qcow2", 4);
    // Now the guest's disk holds a header that states its overlay as raw.
    store.overlay_unchecked("fake", "web.qcow2", "raw");
    let fake = fs::read(store.path("fake")).expect("a header");
    fs::remove_file(store.path("fake")).expect("an unlink");
    Damage::to(store.path("base.img")).put(0, &fake);
    let expected = store.oracle("web.qcow2", "qcow2");
    let mount = Mount::new(&store);
    assert_eq!(mount.top(), ["web"]);
    assert_same(&mount.path("web/active.raw"), &expected);
    mount.umount();
}

#[test]
fn an_image_stated_as_qcow2_is_backed_by_the_file_in_its_header() {
    let store = Store::new();
    store.raw("base.img", MIB, 5);
    store.overlay("odd.raw", "base.img", "raw", "");
    let mount = Mount::with(&store, "format=odd.raw:qcow2");
    assert_same(&mount.path("odd/active.raw"), &store.oracle("odd.raw", "qcow2"));
    mount.umount();
}

#[test]
fn readers_of_a_replaced_base_share_no_page_with_readers_of_the_new_one() {
    let store = Store::new();
    store.raw("base.raw", MIB, 6);
    store.overlay("mid.qcow2", "base.raw", "raw", "");
    store.overlay("web.qcow2", "mid.qcow2", "qcow2", "");
    let old = fs::read(store.path("base.raw")).expect("the old base");
    let mount = Mount::new(&store);
    let early = File::open(mount.path("web/snapshots/mid.raw")).expect("a view");
    let next = store.beside("next.raw");
    fs::write(&next, vec![0x6e; MIB as usize]).expect("another base");
    fs::rename(&next, store.path("base.raw")).expect("a new file under the old name");
    let late = File::open(mount.path("web/snapshots/mid.raw")).expect("a view");
    let mut buf = vec![0; 65_536];
    for at in (0..MIB).step_by(buf.len()) {
        if early.read_exact_at(&mut buf, at).is_ok() {
            assert!(buf == old[at as usize..][..buf.len()], "new bytes in the old view at {at}");
        }
        late.read_exact_at(&mut buf, at).expect("the new base");
        assert!(buf.iter().all(|byte| *byte == 0x6e), "old bytes in the new view at {at}");
    }
    drop((early, late));
    mount.umount();
}

#[test]
fn a_truncated_raw_image_has_no_holes_to_skip() {
    let store = Store::new();
    store.raw("cut.raw", 4 * MIB, 7);
    store.overlay("top.qcow2", "cut.raw", "raw", "");
    let mount = Mount::new(&store);
    for view in ["top/active.raw", "top/snapshots/cut.raw"] {
        File::options()
            .write(true)
            .open(store.path("cut.raw"))
            .and_then(|f| f.set_len(4 * MIB))
            .expect("whole");
        let open = || File::open(mount.path(view));
        eventually("the file is noticed", || open().is_ok());
        let shown = open().expect("a view");
        File::options().write(true).open(store.path("cut.raw")).and_then(|f| f.set_len(4096)).expect("a cut");
        let found = rustix::fs::seek(&shown, SeekFrom::Data(2 * MIB)).expect("no hole to the end");
        assert_eq!(found, 2 * MIB, "{view}: what is gone was taken for a hole");
    }
    mount.umount();
}

#[test]
fn a_huge_sparse_disk_does_not_delay_a_seek() {
    let store = Store::new();
    let cluster = 2 * MIB;
    // 2^29 clusters, whose L1 entries all name one L2 table: alternately zero and unallocated.
    store.create("bomb.qcow2", cluster << 29, "cluster_size=2M");
    let image = Damage::to(store.path("bomb.qcow2"));
    let entries: Vec<u8> = (0..cluster / 8).flat_map(|n| (n % 2).to_be_bytes()).collect();
    let table = image.append(&entries);
    let l1: Vec<u8> =
        (0..image.u32(header::L1_ENTRY_COUNT)).flat_map(|_| (COPIED | table).to_be_bytes()).collect();
    image.put(image.l1_at(), &l1);
    drop(image);
    let mount = Mount::new(&store);
    let shown = File::open(mount.path("bomb/active.raw")).expect("a view");
    let mut at = 0;
    for _ in 0..2 {
        let found = rustix::fs::seek(&shown, SeekFrom::Data(at)).expect("somewhere");
        assert!(found > at, "no way forward");
        at = found;
    }
    let took = mount.processor_time();
    assert!(took < Duration::from_secs(45), "two seeks took {took:?}");
    drop(shown);
    mount.umount();
}

#[test]
// S5
fn a_backing_file_in_the_own_mount_is_never_opened() {
    let store = Store::new();
    store.raw("base.raw", MIB, 8);
    store.dir("mnt");
    symlink("mnt", store.path("corner")).expect("a link");
    for (name, way) in [("one.qcow2", "mnt"), ("two.qcow2", "corner")] {
        store.overlay_unchecked(name, &format!("{way}/base/active.raw"), "raw");
    }
    let mount = Mount::try_new(&store, &store.root(), &store.path("mnt"), "threads=1,nopassthrough")
        .expect("a mount");
    for round in 0..3 {
        // The scan that follows must not wait for an opening that waits for the scan.
        store.raw("base.raw", MIB, 9 + round);
        eventually("the new bytes", || {
            fs::read(mount.path("base/active.raw")).ok() == fs::read(store.path("base.raw")).ok()
        });
    }
    let problems = mount.text(".chainfs/problems.txt");
    assert!(problems.contains("one.qcow2: cannot") && problems.contains("two.qcow2: cannot"), "{problems}");
    mount.umount();
}

#[test]
fn an_ambiguous_path_through_a_symbolic_link_is_refused() {
    let store = Store::new();
    store.dir("pool/deep");
    store.create("base.qcow2", MIB, "");
    store.create("pool/base.qcow2", MIB, "");
    store.io("pool/base.qcow2", "qcow2", ["write -q -P 0x70 0 64k"]);
    symlink("pool/deep", store.path("link")).expect("a link");
    store.overlay("web.qcow2", "link/../base.qcow2", "qcow2", "");
    store.overlay("plain.qcow2", "pool/deep/../base.qcow2", "qcow2", "");
    let mount = Mount::new(&store);
    assert!(mount.text("web/info/problem.txt").contains("symbolic link"), "QEMU reads pool/base.qcow2");
    assert!(fs::read(mount.path("web/active.raw")).is_err());
    assert_same(&mount.path("plain/active.raw"), &store.oracle("plain.qcow2", "qcow2"));
    mount.umount();
}

#[test]
fn a_backing_file_added_to_a_backing_directory_is_noticed() {
    let store = Store::new();
    let golden = store.beside("golden");
    fs::create_dir(&golden).expect("a directory");
    let base = golden.join("base.raw");
    store.overlay_unchecked("web.qcow2", base.to_str().expect("text"), "raw");
    let mount = Mount::with(&store, &format!("backing_dir={}", golden.display()));
    assert!(mount.text("web/info/problem.txt").contains("missing"));
    fs::write(&base, vec![0x67; MIB as usize]).expect("a base");
    eventually("the base", || !mount.path("web/info/problem.txt").exists());
    let bytes = fs::read(mount.path("web/active.raw")).expect("a disk");
    assert!(bytes.iter().all(|byte| *byte == 0x67));
    mount.umount();
}

#[test]
fn a_renamed_directory_is_followed_even_when_descriptors_are_short() {
    let store = Store::new();
    store.dir("old");
    store.raw("old/moved.raw", MIB, 12);
    let names: Vec<String> = (0..24).map(|n| format!("n{n}")).collect();
    for name in &names {
        store.raw(&format!("{name}.raw"), 4096, 13);
    }
    // As many descriptors as are kept for everything else, and eight.
    let mut command = Command::new("prlimit");
    command.args(["--nofile=136:136", chainfs_binary()]);
    let mount = Mount::by(&store, command, &store.root(), &store.beside("mnt"), "").expect("a mount");
    drop(File::open(mount.path("old/moved/active.raw")).expect("a view"));
    for name in names.iter().chain(&names) {
        fs::read(mount.path(format!("{name}/active.raw"))).expect("a disk");
    }
    fs::rename(store.path("old"), store.path("new")).expect("a rename");
    eventually("the new name", || mount.path("new/moved/active.raw").exists());
    assert_same(&mount.path("new/moved/active.raw"), &store.path("new/moved.raw"));
    mount.umount();
}

#[test]
fn a_daemon_that_ends_keeps_other_mounts() {
    let store = Store::new();
    store.create("web.qcow2", MIB, "");
    let other = Store::new();
    other.create("other.qcow2", MIB, "");
    let mount = Mount::new(&store);
    let daemon = mount.daemon();
    let shown = File::open(mount.path("web/active.raw")).expect("a view");
    tool("umount").arg("--lazy").arg(mount.dir()).succeeds();
    let stranger =
        Mount::try_new(&other, &other.root(), mount.dir(), "").expect("another mount at the same place");
    Command::new("kill").args(["-TERM", &daemon.to_string()]).status().expect("kill runs");
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(stranger.top(), ["other"]);
    assert_eq!(shown.metadata().expect("it is still served").size(), MIB);
    drop(shown);
    stranger.umount();
    eventually("the first daemon ends with its last user", || {
        fs::metadata(format!("/proc/{daemon}")).is_err()
    });
    drop(mount);
}

#[test]
fn an_abandoned_mount_is_removed_again() {
    let store = Store::new();
    store.create("web.qcow2", MIB, "");
    let dir = store.beside("mnt");
    let mut child = Command::new(chainfs_binary())
        .arg("mount")
        .args([store.root(), dir.clone()])
        .env("CHAINFS_SERVE", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the daemon starts");
    drop(child.stdout.take());
    child.wait().expect("it ends");
    let said = fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let is_left = said.contains(dir.to_str().expect("text"));
    if is_left {
        tool("umount").arg("--lazy").arg(&dir).succeeds();
    }
    assert!(!is_left, "a dead mount was left");
}
