//! Dirty logs: a disk copied while the kernel works on it is shown as the kernel shows the copy after its own
//! replay.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use chainfs::error::ErrorKind;
use chainfs::guest::xfs::Xfs;
use chainfs::guest::{FileSystem as _, Source};

use crate::content::*;
use crate::disk::*;
use crate::ext::journals::{small_changes, work};
use support::{Outcome as _, Rng, tool};

use super::{SIZE, long, open};

/// Disks copied after each step of a kernel's work.
fn copies(mkfs: &str, steps: u64, step: impl Fn(&Path, u64)) -> Vec<Disk> {
    let disk = Disk::format(mkfs, SIZE);
    disk.mounted("rw", |dir| {
        let copy = |number| {
            step(dir, number);
            disk.snapshot()
        };
        (0..steps).map(copy).collect()
    })
}

/// Compares a copy with what the kernel shows of it. Returns whether the log held anything that matters.
fn replayed_as_by_the_kernel(what: &str, copy: &Disk) -> bool {
    let ours = open(copy);
    assert_eq!(ours.remarks(), Vec::<String>::new(), "{what}");
    let tree = our_tree(&ours, &copy.image);
    let counted = ours.statistics();
    let old = copy.snapshot();
    let theirs = copy.mounted("rw", kernel_tree);
    assert_same_trees(what, &theirs, &tree);
    // Behind the kernel's replay, the numbers are those of a clean file system.
    let after = open(copy).statistics();
    assert_eq!((counted.blocks, counted.inodes), (after.blocks, after.inodes), "{what}");
    let without = old.mounted("ro,norecovery", |dir| {
        // What was not replayed may be inconsistent.
        std::panic::catch_unwind(|| kernel_tree(dir)).ok()
    });
    without.as_ref() != Some(&tree)
}

fn all_replayed(mkfs: &str, steps: u64, step: impl Fn(&Path, u64)) {
    let copies = copies(mkfs, steps, step);
    let dirty = copies
        .iter()
        .enumerate()
        .map(|(number, copy)| replayed_as_by_the_kernel(&format!("{mkfs}, copy {number}"), copy));
    assert!(dirty.filter(|dirty| *dirty).count() > 0, "{mkfs}: no log held anything that mattered");
}

#[test]
fn a_log_is_replayed() {
    for mkfs in [
        "mkfs.xfs",
        "mkfs.xfs -m rmapbt=1 -i nrext64=1,size=1024",
        "mkfs.xfs -m bigtime=0,finobt=0,inobtcount=0,reflink=0 -b size=1024",
        "mkfs.xfs -s size=4096 -l su=32k",
    ] {
        all_replayed(mkfs, 3, work);
    }
}

#[test]
fn small_changes_are_replayed() {
    all_replayed("mkfs.xfs", 4, small_changes);
}

/// A log that has wrapped around several times.
#[test]
fn a_log_that_has_wrapped_around() {
    all_replayed("mkfs.xfs", 4, |dir, number| {
        for round in 0..3 {
            let sub = dir.join(format!("round {number} {round}"));
            fs::create_dir(&sub).expect("a directory");
            for part in 0..6 {
                many_names(&sub.join(format!("part {part}")), 2500);
            }
            tool("sync").arg("-f").arg(dir).succeeds();
            if round > 0 {
                fs::remove_dir_all(&sub).expect("a removal");
            }
        }
        work(dir, number);
    });
}

/// Files that were removed or cut while open, forks that grow trees and lose them, shared extents.
#[test]
fn forks_and_orphans_are_replayed() {
    let held = RefCell::new(Vec::new());
    all_replayed("mkfs.xfs", 3, |dir, number| {
        let mut rng = Rng::new(number);
        let path = dir.join(format!("fragmented {number}"));
        let file = File::create(&path).expect("a file");
        for piece in 0..400 {
            file.write_all_at(&rng.bytes(4096), piece * 8192).expect("a piece");
        }
        file.sync_all().expect("fsync");
        for value in 0..60 {
            set_xattr(&path, &format!("user.value {value}"), &rng.bytes(300));
        }
        file.sync_all().expect("fsync");
        let clone = dir.join(format!("clone {number}"));
        tool("cp").arg("--reflink=always").arg(&path).arg(&clone).succeeds();
        let clone = File::options().write(true).open(&clone).expect("a file");
        clone
            .write_all_at(&rng.bytes(100_000), 50_000)
            .and_then(|()| clone.sync_all())
            .expect("its own part");
        let removed = File::create(dir.join("removed")).expect("a file");
        removed.write_all_at(&rng.bytes(50_000), 0).expect("content");
        fs::remove_file(dir.join("removed")).expect("a removal");
        if number == 1 {
            file.set_len(1001).and_then(|()| file.sync_all()).expect("a shorter file");
            held.borrow_mut().clear();
        } else if number == 0 {
            held.borrow_mut().push(removed);
        }
        File::open(dir).and_then(|dir| dir.sync_all()).expect("fsync");
    });
}

/// A machine with several processes that make, move, cut, link and remove files, and sync at times.
const WORKER: &str = r#"
i=0
while [ ! -e "$1/stop" ]; do
    i=$((i + 1))
    d="$1/$2 $((i % 7))"
    rm -rf "$d"
    mkdir "$d"
    for j in 1 2 3 4 5 6 7 8 9; do head -c $((j * 3000)) /dev/urandom >"$d/$j"; done
    mv "$d/1" "$d/moved"
    truncate -s 1000 "$d/9"
    ln "$d/2" "$d/linked"
    cp --reflink=auto "$d/8" "$d/clone"
    setfattr -n user.x -v $i "$d/3"
    [ $((i % 3)) -ne 0 ] || sync -f "$d/4"
done
"#;

/// Moments that nothing chooses.
#[test]
fn copies_of_any_moment_are_shown_as_after_a_replay() {
    let count = if long() { 200 } else { 6 };
    let host = Disk::format("mkfs.xfs -m reflink=1", 8 << 30);
    host.mounted("rw", |host| {
        for mkfs in ["mkfs.xfs", "mkfs.xfs -m rmapbt=1 -i sparse=0"] {
            let disk = Disk::format_in(host, mkfs, SIZE);
            let copies: Vec<Disk> = disk.mounted("rw", |dir| {
                fs::write(dir.join("first"), "content").expect("a file");
                tool("sync").arg("-f").arg(dir).succeeds();
                let worker = |name| {
                    let mut worker = tool("sh");
                    worker.args(["-c", WORKER, "sh"]).arg(dir).arg(name).spawn().expect("a worker")
                };
                let workers = ["one", "two"].map(worker);
                let mut rng = Rng::new(3);
                let copy = |_| {
                    // Not always at the same point of the work.
                    std::thread::sleep(std::time::Duration::from_millis(rng.below(300)));
                    disk.instant()
                };
                let copies = (0..count).map(copy).collect();
                fs::write(dir.join("stop"), "").expect("a file");
                for mut worker in workers {
                    assert!(worker.wait().expect("a worker").success());
                }
                copies
            });
            for (number, copy) in copies.iter().enumerate() {
                replayed_as_by_the_kernel(&format!("{mkfs}, moment {number}"), copy);
            }
        }
    });
}

/// A log that cannot be replayed is reported, and the volume is shown anyway.
#[test]
fn an_old_state_is_never_shown_silently() {
    // Behind the last whole records, incomplete ones are no damage: a crash leaves them. So there have to be
    // more of them than the kernel writes side by side.
    let dirty = copies("mkfs.xfs", 3, small_changes).pop().expect("a copy");
    let is_old = |remark: &String| remark.contains("missing or old");
    let said = |ours: &Xfs| ours.remarks().iter().any(is_old) && ours.stale().iter().any(is_old);
    assert!(!said(&open(&dirty)));
    let field = |name: &str| -> u64 {
        let command = format!("p {name}");
        let shown = tool("xfs_db").args(["-r", "-c", "sb 0", "-c", &command]).arg(&dirty.image).succeeds();
        shown.trim().split(" = ").nth(1).expect("a value").parse().expect("a number")
    };
    let block = field("logstart");
    let (group, within) = (block >> field("agblklog"), block & ((1 << field("agblklog")) - 1));
    let start = (group * field("agblocks") + within) * field("blocksize");
    let len = field("logblocks") * field("blocksize");
    // Every record says that it is another file system's, or of an unknown machine.
    for (at, bytes) in [(304, &[9; 4][..]), (300, &[0, 0, 0, 9])] {
        let damaged = dirty.snapshot();
        for record in (0..len).step_by(512).filter(|at| dirty.read(start + at, 4) == [0xfe, 0xed, 0xba, 0xbe])
        {
            damaged.write(start + record + at, bytes);
        }
        let ours = open(&damaged);
        assert!(said(&ours), "{at}: {:?}", ours.remarks());
        assert!(ours.attributes(ours.root()).is_ok());
    }
}

/// A read error is no property of the log: an old state must not be shown for it.
#[test]
fn a_log_with_a_read_error_is_retried() {
    let dirty = copies("mkfs.xfs", 1, work).pop().expect("a copy");
    let size = FileSource::open(&dirty.image).size();
    let trouble = Troubled(FileSource::open(&dirty.image), 4096..size, ErrorKind::Io);
    assert_eq!(Xfs::open(Arc::new(trouble)).expect_err("not now").kind(), ErrorKind::Io);
    assert!(open(&dirty).stale().is_empty());
}
