//! An active disk through a real mount: it behaves like a block device, and synced data persists.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use support::active::{LEAVES, Model, assert_left_behind, chain, errno, rw};
use support::compare::runs_by_seek;
use support::*;

#[test]
fn writes_of_any_offset_and_length_are_read_back_and_persist() {
    let store = chain();
    let mount = Mount::new(&store);
    for (chain, image, format) in LEAVES {
        let active = mount.path(chain).join("active.raw");
        let mut model = Model::of(&active);
        let disk = rw(&active);
        let mut rng = Rng::new(10);
        for round in 0..60 {
            let at = rng.below(2 * MIB - 1);
            let len = 1 + rng.below((2 * MIB - at).min(300_000) - 1).min(if round % 2 == 0 {
                2000
            } else {
                u64::MAX
            });
            match round % 6 {
                4 => model.zero(&disk, FallocateFlags::ZERO_RANGE, at, len),
                5 => model.zero(&disk, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, len),
                _ => model.write(&disk, at, &rng.bytes(len)),
            }
        }
        model.assert_is(&active);
        disk.sync_all().expect("a sync");
        drop(disk);
        model.assert_is(&active);
        assert_left_behind(&store, image, format, &model);
    }
    mount.umount();
}

#[test]
// W3
fn concurrent_writers_each_read_back_their_own_bytes() {
    let store = chain();
    let mount = Mount::new(&store);
    for (chain, image, format) in LEAVES {
        let active = mount.path(chain).join("active.raw");
        let children: Vec<_> = (0..4)
            .map(|part: u64| {
                let script = format!(
                    "for round in 1 2 3; do head -c 524288 /dev/zero | tr '\\0' {part} | \
                     dd of={} bs=16k seek={} conv=notrunc,fsync status=none || exit 1; done",
                    active.display(),
                    part * 32
                );
                Command::new("sh").args(["-c", &script]).stdin(Stdio::null()).spawn().expect("a shell")
            })
            .collect();
        for mut child in children {
            assert!(child.wait().expect("a child").success());
        }
        let want: Vec<u8> = (0..4_u8).flat_map(|part| vec![b'0' + part; 512 << 10]).collect();
        let model = Model(want);
        model.assert_is(&active);
        assert_left_behind(&store, image, format, &model);
    }
    mount.umount();
}

#[test]
fn the_end_of_the_disk_is_that_of_a_block_device() {
    let store = chain();
    let mount = Mount::new(&store);
    for (chain, ..) in LEAVES {
        let disk = rw(&mount.path(chain).join("active.raw"));
        let mut buf = [0; 8192];
        assert_eq!(disk.read_at(&mut buf, 2 * MIB).expect("nothing"), 0);
        assert_eq!(disk.read_at(&mut buf, 2 * MIB - 4096).expect("a part"), 4096);
        assert_eq!(disk.write_at(&buf, 2 * MIB - 4096).expect("a part"), 4096);
        assert_eq!(errno(disk.write_at(&buf, 2 * MIB)), Some(Errno::NOSPC));
        assert_eq!(errno(disk.write_at(&buf, 1 << 40)), Some(Errno::NOSPC));
        assert_eq!(disk.metadata().expect("attributes").len(), 2 * MIB);
        // Nothing of it is beyond the end: that costs no space and changes nothing.
        fallocate(&disk, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, 1 << 40, 4096)
            .expect("nothing");
        fallocate(&disk, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, 2 * MIB - 512, MIB)
            .expect("a part");
        assert_eq!(disk.metadata().expect("attributes").len(), 2 * MIB);
    }
    mount.umount();
}

#[test]
fn opening_with_o_trunc_changes_nothing() {
    let store = chain();
    let mount = Mount::new(&store);
    for (chain, ..) in LEAVES {
        let active = mount.path(chain).join("active.raw");
        let mut model = Model::of(&active);
        drop(File::create(&active).expect("a disk"));
        model.assert_is(&active);
        tool("sh").args(["-c", "printf shell > \"$1\"", "sh"]).arg(&active).succeeds();
        model.0[..5].copy_from_slice(b"shell");
        model.assert_is(&active);
        let small = store.beside("small");
        fs::write(&small, vec![7; 70_000]).expect("a file");
        tool("cp").arg(&small).arg(&active).succeeds();
        model.0[..70_000].fill(7);
        model.assert_is(&active);
        tool("dd")
            .arg("bs=64k")
            .arg("status=none")
            .arg(format!("if={}", small.display()))
            .arg(format!("of={}", active.display()))
            .succeeds();
        tool("truncate").args(["-s", "0"]).arg(&active).fails();
        model.assert_is(&active);
        tool("touch").arg(&active).succeeds();
    }
    mount.umount();
}

#[test]
fn a_disk_grows_by_truncate_and_never_shrinks_by_it() {
    let store = chain();
    let mount = Mount::new(&store);
    for (chain, image, format) in LEAVES {
        let active = mount.path(chain).join("active.raw");
        let mut model = Model::of(&active);
        let disk = rw(&active);
        assert_eq!(errno(disk.set_len(MIB)), Some(Errno::PERM));
        assert_eq!(errno(disk.set_len(0)), Some(Errno::PERM));
        disk.set_len(2 * MIB).expect("its own size");
        disk.set_len(3 * MIB).expect("a larger disk");
        assert_eq!(disk.metadata().expect("attributes").len(), 3 * MIB);
        disk.write_all_at(b"end", 3 * MIB - 3).expect("a write");
        // fallocate(2) grows it as well, unless it is asked not to.
        fallocate(&disk, FallocateFlags::ZERO_RANGE, 3 * MIB, MIB).expect("a larger disk");
        assert_eq!(disk.metadata().expect("attributes").len(), 4 * MIB);
        drop(disk);
        assert_eq!(fs::metadata(&active).expect("attributes").len(), 4 * MIB);
        tool("truncate").args(["-s", "1M"]).arg(&active).fails();
        // By name alone, while the disk is closed; an odd size becomes whole sectors.
        tool("truncate").args(["-s", "5242881"]).arg(&active).succeeds();
        assert_eq!(fs::metadata(&active).expect("attributes").len(), 5 * MIB + 512);
        model.0.resize(5 * MIB as usize + 512, 0);
        model.0[3 * MIB as usize - 3..][..3].copy_from_slice(b"end");
        model.assert_is(&active);
        assert_left_behind(&store, image, format, &model);
    }
    mount.umount();
}

#[test]
fn direct_and_synchronous_writes_work() {
    let store = chain();
    let mount = Mount::new(&store);
    let flushes = || {
        let metrics = mount.text(".chainfs/metrics");
        let line =
            metrics.lines().find(|line| line.starts_with("chainfs_flushes_total ")).expect("a counter");
        line.split(' ').nth(1).and_then(|n| n.parse::<u64>().ok()).expect("a number")
    };
    for (chain, ..) in LEAVES {
        let active = mount.path(chain).join("active.raw");
        for (flag, least) in [(libc::O_DSYNC, 3), (libc::O_SYNC, 3), (libc::O_DIRECT, 0)] {
            let disk = File::options().write(true).custom_flags(flag).open(&active).expect("a disk");
            let before = flushes();
            if flag == libc::O_DIRECT {
                drop(disk);
                tool("dd")
                    .args(["if=/dev/zero", "bs=4k", "count=3", "oflag=direct", "conv=notrunc", "status=none"])
                    .arg(format!("of={}", active.display()))
                    .succeeds();
                tool("dd")
                    .args(["of=/dev/null", "bs=4k", "iflag=direct", "status=none"])
                    .arg(format!("if={}", active.display()))
                    .succeeds();
                continue;
            }
            for round in 0..3 {
                disk.write_all_at(&[round; 4096], 4096).expect("a write");
            }
            assert!(flushes() >= before + least, "{chain}: every write is flushed");
        }
        let disk = rw(&active);
        let before = flushes();
        disk.write_all_at(b"x", 0).expect("a write");
        assert_eq!(flushes(), before, "nobody has asked for it");
        disk.sync_data().expect("a sync");
        disk.sync_all().expect("a sync");
        assert!(flushes() >= before + 2);
    }
    mount.umount();
}

/// Five seconds: a program that never calls fsync loses no more.
#[test]
fn unsynced_writes_are_written_back_by_the_timer() {
    let store = chain();
    let mount = Mount::new(&store);
    let disk = rw(&mount.path("web/active.raw"));
    disk.write_all_at(&vec![0x5a; 65_536], MIB).expect("a write");
    let shows = || store.try_oracle(Path::new("web.qcow2"), "qcow2", None);
    eventually("QEMU sees it by force", || {
        shows().is_ok_and(|path| {
            fs::read(path).is_ok_and(|b| b[MIB as usize..][..65_536].iter().all(|b| *b == 0x5a))
        })
    });
    drop(disk);
    mount.umount();
}

#[test]
fn a_shared_mapping_can_write() {
    let store = chain();
    let mount = Mount::new(&store);
    // Rust's standard library maps nothing; the interpreter does.
    let script = "\
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
m = mmap.mmap(fd, 2 << 20)
m[4096:4100] = b'sync'
m.flush()
assert os.pread(fd, 4, 4096) == b'sync'
os.pwrite(fd, b'pwrite', 8192)
assert m[8192:8198] == b'pwrite', m[8192:8198]
os.close(fd)
m[1 << 20:(1 << 20) + 5] = b'later'
m.close()
";
    for (chain, image, format) in LEAVES {
        let active = mount.path(chain).join("active.raw");
        let mut model = Model::of(&active);
        tool("python3").args(["-c", script]).arg(&active).succeeds();
        for (at, bytes) in [(4096, &b"sync"[..]), (8192, b"pwrite"), (MIB as usize, b"later")] {
            model.0[at..][..bytes.len()].copy_from_slice(bytes);
        }
        model.assert_is(&active);
        assert_left_behind(&store, image, format, &model);
    }
    mount.umount();
}

#[test]
fn holes_are_reported_unless_dirty_pages_may_exist() {
    let store = Store::new();
    store.create("web.qcow2", 4 * MIB, "");
    fs::File::create(store.path("plain.raw")).and_then(|f| f.set_len(4 * MIB)).expect("a raw file");
    let mount = Mount::new(&store);
    for (chain, ..) in LEAVES {
        let active = mount.path(chain).join("active.raw");
        let holes = || runs_by_seek(&active).len();
        let whole = holes();
        let writing = File::options().write(true).open(&active).expect("a disk");
        writing.write_all_at(&vec![1; 65_536], MIB).expect("a write");
        assert!(holes() > whole, "a hole, data, a hole");
        let mappable = rw(&active);
        assert_eq!(holes(), 1, "one run of data");
        drop(mappable);
        eventually("holes again", || holes() > whole);
        drop(writing);
        eventually("holes still", || holes() > whole);
    }
    mount.umount();
}

#[test]
fn only_active_disks_can_be_written_and_the_tree_cannot_be_changed() {
    let store = chain();
    store.create("done.qcow2", MIB, "");
    fs::set_permissions(store.path("done.qcow2"), std::os::unix::fs::PermissionsExt::from_mode(0o444))
        .expect("a mode");
    let mount = Mount::new(&store);
    let write = |name: &str| errno(File::options().write(true).open(mount.path(name)));
    assert_eq!(write("web/snapshots/base.raw"), Some(Errno::ROFS));
    assert_eq!(write("web/info/chain.json"), Some(Errno::ROFS));
    assert_eq!(write(".chainfs/metrics"), Some(Errno::ROFS));
    assert_eq!(write("done/snapshots/done.raw"), Some(Errno::ROFS));
    assert!(!mount.path("done/active.raw").exists());
    assert_eq!(write("web/active.raw"), None);
    let active = mount.path("web/active.raw");
    assert_eq!(errno(fs::write(mount.path("web/new"), "x")), Some(Errno::PERM));
    assert_eq!(errno(fs::create_dir(mount.path("new"))), Some(Errno::PERM));
    let may = |word: &str, name: &str| tool("test").arg(word).arg(mount.path(name)).outcome().0 == 0;
    assert!(may("-w", "web/active.raw") && may("-r", "web/snapshots/base.raw") && may("-x", "web"));
    assert!(!may("-w", "web/snapshots/base.raw") && !may("-w", "web") && !may("-x", "web/active.raw"));
    assert_eq!(errno(fs::remove_file(&active)), Some(Errno::PERM));
    assert_eq!(errno(fs::remove_dir(mount.path("web/snapshots"))), Some(Errno::PERM));
    assert_eq!(errno(fs::rename(&active, mount.path("web/new"))), Some(Errno::PERM));
    assert_eq!(errno(fs::hard_link(&active, mount.path("web/new"))), Some(Errno::PERM));
    assert_eq!(errno(std::os::unix::fs::symlink("x", mount.path("web/new"))), Some(Errno::PERM));
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    assert_eq!(errno(fs::set_permissions(&active, mode)), Some(Errno::PERM));
    assert_eq!(errno(std::os::unix::fs::chown(&active, Some(1), None)), Some(Errno::PERM));
    let frozen = File::open(mount.path("web/snapshots/base.raw")).expect("a snapshot");
    assert_eq!(
        errno(frozen.set_times(fs::FileTimes::new().set_modified(std::time::SystemTime::now()))),
        Some(Errno::ROFS)
    );
    drop(frozen);
    assert_eq!(fs::metadata(&active).expect("attributes").mode() & 0o777, 0o644);
    mount.umount();
}

#[test]
fn a_read_only_mount_never_opens_an_image_to_write() {
    let store = chain();
    let mount = Mount::with(&store, "ro");
    for name in ["web/active.raw", "web/snapshots/base.raw", "web/new"] {
        assert_eq!(
            errno(File::options().write(true).create(true).truncate(false).open(mount.path(name))),
            Some(Errno::ROFS)
        );
    }
    assert_eq!(errno(fs::remove_file(mount.path("web/active.raw"))), Some(Errno::ROFS));
    assert_same(&mount.path("web/active.raw"), &store.oracle("web.qcow2", "qcow2"));
    mount.umount();
}

#[test]
fn two_chains_on_one_base_are_written_side_by_side() {
    let store = Store::new();
    store.raw("base.raw", 2 * MIB, 1);
    let base = fs::read(store.path("base.raw")).expect("the base");
    for name in ["one", "two"] {
        store.overlay(&format!("{name}.qcow2"), "base.raw", "raw", "cluster_size=4k");
    }
    let mount = Mount::new(&store);
    let mut models: Vec<_> = ["one", "two"].map(|name| (name, Model(base.clone()))).into();
    std::thread::scope(|scope| {
        for (name, model) in &mut models {
            let path = mount.path(*name).join("active.raw");
            scope.spawn(move || {
                let disk = rw(&path);
                let mut rng = Rng::new(path.as_os_str().len() as u64 + u64::from(name.as_bytes()[0]));
                for _ in 0..100 {
                    let at = rng.below(2 * MIB - 20_000);
                    let len = 1 + rng.below(20_000);
                    model.write(&disk, at, &rng.bytes(len));
                }
                model.assert_is(&path);
            });
        }
    });
    assert!(fs::read(mount.path("one/snapshots/base.raw")).expect("the base") == base);
    mount.umount();
    for (name, model) in &models {
        assert_left_behind(&store, &format!("{name}.qcow2"), "qcow2", model);
    }
    assert!(fs::read(store.path("base.raw")).expect("the base") == base);
}

#[test]
fn a_guest_file_system_is_made_written_and_checked_through_the_mount() {
    let store = Store::new();
    store.create("web.qcow2", 64 * MIB, "");
    let mount = Mount::new(&store);
    let active = mount.path("web/active.raw");
    tool("mke2fs").args(["-q", "-F", "-t", "ext4"]).arg(&active).succeeds();
    let content = store.beside("content");
    fs::File::create(&content).and_then(|mut f| f.write_all(&Rng::new(7).bytes(3 * MIB))).expect("a file");
    tool("debugfs")
        .args(["-w", "-R"])
        .arg(format!("write {} content", content.display()))
        .arg(&active)
        .succeeds();
    tool("e2fsck").args(["-f", "-n"]).arg(&active).succeeds();
    mount.umount();
    store.img(["check", "-q", "web.qcow2"]);
    let mount = Mount::new(&store);
    let back = store.beside("back");
    tool("debugfs")
        .args(["-R"])
        .arg(format!("dump content {}", back.display()))
        .arg(mount.path("web/active.raw"))
        .succeeds();
    assert!(fs::read(&back).expect("a file") == fs::read(&content).expect("a file"));
    mount.umount();
}

/// Starting and stopping to write, rescans and reads run at once.
#[test]
fn files_are_opened_and_closed_while_the_store_changes() {
    let store = chain();
    store.img(["snapshot", "-c", "monday", "web.qcow2"]);
    let monday =
        fs::read(store.try_oracle(Path::new("web.qcow2"), "qcow2", Some("1")).expect("what QEMU reads"));
    let monday = monday.expect("bytes");
    let mount = Mount::new(&store);
    let ends = std::time::Instant::now()
        + Duration::from_secs(if std::env::var_os("CHAINFS_LONG").is_some() { 40 } else { 5 });
    std::thread::scope(|scope| {
        for worker in 0..3_u64 {
            let active = mount.path(if worker == 2 { "plain" } else { "web" }).join("active.raw");
            let snapshot = mount.path("web/snapshots/active@monday.raw");
            let (monday, base) = (&monday, worker * 512 * KIB);
            scope.spawn(move || {
                let mut rng = Rng::new(worker);
                let mut own = vec![None; 512];
                while std::time::Instant::now() < ends {
                    match rng.below(4) {
                        0 | 1 => {
                            let disk = rw(&active);
                            for _ in 0..rng.below(20) {
                                let (slot, byte) = (rng.below(512), rng.below(255) as u8);
                                disk.write_all_at(&[byte; 1024], base + slot * KIB).expect("a write");
                                own[slot as usize] = Some(byte);
                            }
                            if rng.below(3) == 0 {
                                disk.sync_data().expect("a sync");
                            }
                        }
                        2 => {
                            let disk = File::open(&active).expect("a disk");
                            let mut have = vec![0; 512 << 10];
                            disk.read_exact_at(&mut have, base).expect("a read");
                            for (slot, byte) in
                                own.iter().enumerate().filter_map(|(slot, byte)| Some((slot, (*byte)?)))
                            {
                                assert!(
                                    have[slot << 10..][..1024].iter().all(|b| *b == byte),
                                    "slot {slot} of {worker}"
                                );
                            }
                        }
                        _ => {
                            let have = fs::read(&snapshot).expect("a snapshot");
                            assert!(have == *monday, "the snapshot has changed");
                        }
                    }
                }
            });
        }
        scope.spawn(|| {
            for round in 0.. {
                if std::time::Instant::now() >= ends {
                    break;
                }
                let name = format!("extra{}.raw", round % 3);
                if round % 2 == 0 {
                    store.put(&name, &[1; 512]);
                } else {
                    let _ = fs::remove_file(store.path(&name));
                }
                let _ = fs::metadata(mount.path("web/active.raw"));
                std::thread::sleep(Duration::from_millis(7));
            }
        });
    });
    mount.umount();
    store.img(["check", "-q", "web.qcow2"]);
}
