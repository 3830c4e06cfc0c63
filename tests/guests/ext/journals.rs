//! Journals of guests that were never unmounted, compared with the kernel's replay: transactions of all
//! forms, fast commits, orphans, torn ends, and the report where nothing can be replayed.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use chainfs::error::ErrorKind;
use chainfs::guest::ext::{Ext, probe};
use chainfs::guest::{FileKind, FileSystem as _, Time};

use super::damage::{find, victim};
use crate::content::*;
use crate::disk::*;
use support::Rng;
use support::{Outcome as _, tool};

use super::MIB;

/// The work of a guest that is never unmounted: `step` is repeated, and after each the current disk is shown
/// as the kernel shows it after replaying its journal.
fn replayed_as_by_the_kernel(
    what: &str,
    mkfs: &str,
    size: u64,
    options: &str,
    steps: u64,
    step: impl Fn(&Path, u64),
) {
    let disk = Disk::format(mkfs, size);
    // No commits and no write-back except those of the steps: the disk does not change while it is copied.
    let snapshots = disk.mounted(&format!("rw,commit=300,{options}"), |dir| {
        let snapshot = |number| {
            step(dir, number);
            disk.snapshot()
        };
        (0..steps).map(snapshot).collect::<Vec<_>>()
    });
    let mut dirty = 0;
    for (number, snapshot) in snapshots.iter().enumerate() {
        let ours = snapshot.open();
        assert_eq!(ours.remarks(), Vec::<String>::new(), "{what} {number}");
        let mut tree = our_tree(&ours, &snapshot.image);
        let stale = without_recovery(snapshot);
        dirty += usize::from(stale.as_ref() != Some(&tree));
        let begin = std::time::SystemTime::now();
        // The kernel replays only on a writable mount.
        let mut theirs = snapshot.mounted("rw", kernel_tree);
        forgive_times_of_the_replay(&mut theirs, &mut tree, begin);
        assert_same_trees(&format!("{what} {number}"), &theirs, &tree);
    }
    assert!(dirty > 0, "{what}: no journal held anything that mattered");
}

/// The disk without its journal; `None` if that cannot even be read.
fn without_recovery(disk: &Disk) -> Option<Tree> {
    let copy = disk.snapshot();
    let incompat = copy.read(1024 + 0x60, 1)[0];
    assert_eq!(incompat & 4, 4, "the disk has to be dirty");
    copy.debugfs("feature -needs_recovery");
    let ours = Ext::open(Arc::new(FileSource::open(&copy.image))).ok()?;
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| our_tree(&ours, &copy.image))).ok()
}

/// When the kernel replays fast commits, it touches directories and files, and they get the time of that.
fn forgive_times_of_the_replay(theirs: &mut Tree, ours: &mut Tree, begin: std::time::SystemTime) {
    // The clock of file systems lags by a tick.
    let begin = begin.duration_since(std::time::UNIX_EPOCH).expect("a time");
    let begin = begin.saturating_sub(Duration::from_millis(20));
    let begin = Time { seconds: begin.as_secs().cast_signed(), nanoseconds: begin.subsec_nanos() };
    for (path, node) in theirs.iter_mut() {
        let Some(our) = ours.get_mut(path) else { continue };
        let (their, our) = (&mut node.attributes, &our.attributes);
        // A fast commit does not record the size of a directory either.
        if their.kind == FileKind::Directory && their.changed >= begin {
            (their.size, their.blocks) = (our.size, our.blocks);
        }
        if their.changed >= begin && our.changed < begin {
            their.changed = our.changed;
            if their.modified >= begin {
                their.modified = our.modified;
            }
        }
    }
}

/// One step of a guest's work. Its last writes are on the disk in the journal only, or not at all.
pub(crate) fn work(dir: &Path, number: u64) {
    let mut rng = Rng::new(number);
    let sub = dir.join(format!("step {number}"));
    fs::create_dir(&sub).expect("a directory");
    for file in 0..30 {
        fs::write(sub.join(format!("file {file}")), rng.bytes(rng_len(file))).expect("a file");
    }
    symlink("x".repeat(80), sub.join("a long link")).expect("a link");
    set_xattr(&sub.join("file 1"), "user.step", &number.to_le_bytes().repeat(20));
    sync(&sub);
    if number > 0 {
        // Blocks of directories and of their files become blocks of other files: they have to be revoked.
        let before = dir.join(format!("step {}", number - 1));
        fs::remove_dir_all(&before).expect("a removal");
        fs::create_dir(&before).expect("a directory");
    }
    many_names(&sub.join("many"), 300);
    sync(&sub);
    fs::remove_dir_all(sub.join("many")).expect("a removal");
    let mut bytes = rng.bytes(300_000);
    for block in bytes.chunks_mut(4096) {
        // A block of a file that looks like one of the journal's own.
        block[..4].copy_from_slice(&[0xc0, 0x3b, 0x39, 0x98]);
    }
    fs::write(sub.join("magic"), &bytes).expect("a file");
    sync(&sub);
    fs::write(sub.join("never synced"), rng.bytes(9999)).expect("a file");
    fs::remove_file(sub.join("file 3")).expect("a removal");
}

fn rng_len(file: u64) -> u64 {
    [0, 100, 5000, 70_000, 1024][file as usize % 5]
}

/// Everything done so far is committed.
fn sync(path: &Path) {
    File::open(path).and_then(|file| file.sync_all()).expect("fsync");
}

#[test]
fn a_journal_is_replayed() {
    for (what, mkfs, options) in [
        ("ext3", "mkfs.ext3 -b 1024", "data=ordered"),
        ("data in the journal", "mkfs.ext4 -b 4096", "data=journal"),
        ("data in the journal, ext3", "mkfs.ext3 -b 1024 -J size=16", "data=journal"),
        ("no checksums", "mkfs.ext4 -b 1024 -O ^metadata_csum,64bit", "data=ordered"),
        ("checksums of transactions", "mkfs.ext4 -b 4096 -O ^metadata_csum,^64bit", "journal_checksum"),
        ("asynchronous commits", "mkfs.ext4 -b 1024", "data=writeback,journal_async_commit"),
        (
            "asynchronous commits without checksums",
            "mkfs.ext4 -b 4096 -O ^metadata_csum",
            "data=writeback,journal_async_commit",
        ),
    ] {
        replayed_as_by_the_kernel(what, mkfs, 96 * MIB, options, 3, work);
    }
}

/// A journal so small that it wraps around several times.
#[test]
fn a_journal_that_has_wrapped_around() {
    replayed_as_by_the_kernel("around", "mkfs.ext4 -b 1024 -J size=1", 96 * MIB, "data=journal", 6, work);
}

/// A file that was removed while open, and one whose truncation was interrupted, leave no trace.
#[test]
fn orphans_are_shown_as_after_recovery() {
    for mkfs in ["mkfs.ext4 -b 4096", "mkfs.ext4 -b 4096 -O orphan_file"] {
        let held = std::cell::RefCell::new(Vec::new());
        replayed_as_by_the_kernel("orphans", mkfs, 96 * MIB, "data=ordered", 2, |dir, number| {
            let path = dir.join(format!("file {number}"));
            fs::write(&path, vec![7; 100_000]).expect("a file");
            let file = File::options().write(true).open(&path).expect("the file");
            file.sync_all().and_then(|()| file.set_len(1001)).expect("a shorter file");
            let removed = File::create(dir.join("removed")).expect("a file");
            removed.write_all_at(&vec![1; 50_000], 0).expect("content");
            fs::remove_file(dir.join("removed")).expect("a removal");
            file.sync_all().expect("fsync");
            held.borrow_mut().push((file, removed));
            if number == 1 {
                // They must be closed before the disk is unmounted.
                held.borrow_mut().clear();
            }
        });
    }
}

/// Many small commits, one after another: names, bytes, lengths, and nothing between them.
pub(crate) fn small_changes(dir: &Path, number: u64) {
    let mut rng = Rng::new(number + 50);
    let file = |name: &str| dir.join(format!("{name} {number}"));
    let write = |path: &Path, len: u64, rng: &mut Rng| {
        fs::write(path, rng.bytes(len)).expect("a file");
        sync(path);
    };
    if number == 0 {
        fs::write(dir.join("there before"), "content").expect("a file");
        fs::create_dir(dir.join("sub")).expect("a directory");
        fs::write(dir.join("sub/in it"), "content").expect("a file");
        let long = File::create(dir.join("long")).expect("a file");
        long.write_all_at(&rng.bytes(400_000), 0).and_then(|()| long.sync_all()).expect("content");
        tool("sync").arg("-f").arg(dir).succeeds();
        return;
    }
    for size in [0, 10, 5000, 200_000] {
        write(&file(&format!("made {size}")), size, &mut rng);
    }
    fs::hard_link(dir.join("there before"), file("linked")).expect("a hard link");
    sync(&dir.join("there before"));
    fs::rename(file("made 10"), file("moved")).expect("a new name");
    sync(&file("moved"));
    fs::remove_file(file("made 0")).expect("a removal");
    fs::rename(file("made 5000"), dir.join("sub").join("replaced")).expect("a new name");
    sync(&dir.join("sub/replaced"));
    let long = File::options().write(true).open(dir.join("long")).expect("a file");
    long.write_all_at(&rng.bytes(10_000), 1_000_000 * number)
        .and_then(|()| long.sync_all())
        .expect("bytes far out");
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(&long, punch, 40_960 * number, 8192).expect("a hole");
    long.sync_all().expect("fsync");
    let shorter = File::options().write(true).open(file("made 200000")).expect("a file");
    shorter.set_len(100_001).and_then(|()| shorter.sync_all()).expect("a shorter file");
    let reserved = File::create(file("reserved")).expect("a file");
    rustix::fs::fallocate(&reserved, rustix::fs::FallocateFlags::empty(), 0, 100_000).expect("space");
    reserved.write_all_at(b"written", 50_000).and_then(|()| reserved.sync_all()).expect("a part");
    for many in 0..40 {
        write(&file(&format!("many {many}")), many, &mut rng);
    }
    fs::write(file("never synced"), rng.bytes(9999)).expect("a file");
}

#[test]
fn fast_commits_are_replayed() {
    for mkfs in
        ["mkfs.ext4 -b 4096 -O fast_commit", "mkfs.ext4 -b 1024 -O fast_commit,^metadata_csum -J size=8"]
    {
        replayed_as_by_the_kernel("fast commits", mkfs, 128 * MIB, "data=ordered", 4, small_changes);
    }
    let inline = "mkfs.ext4 -b 4096 -O fast_commit,inline_data";
    replayed_as_by_the_kernel("fast commits, inline", inline, 128 * MIB, "data=ordered", 3, small_changes);
}

/// Fast commits of things other than files and their names.
fn odd_changes(dir: &Path, number: u64) {
    if number == 0 {
        fs::create_dir_all(dir.join("old/empty")).expect("directories");
        fs::write(dir.join("plain"), "plain").expect("a file");
        tool("sync").arg("-f").arg(dir).succeeds();
        return;
    }
    let sub = dir.join(format!("directory {number}"));
    fs::create_dir(&sub).expect("a directory");
    fs::write(sub.join("first"), "first").expect("a file");
    sync(&sub.join("first"));
    fs::create_dir(sub.join("deeper")).expect("a directory");
    fs::write(sub.join("deeper/second"), "second").expect("a file");
    sync(&sub.join("deeper/second"));
    if number == 2 {
        fs::remove_dir(dir.join("old/empty")).expect("a removal");
        fs::remove_file(dir.join("plain")).expect("a removal");
        fs::remove_file(dir.join("directory 1/first")).expect("a removal");
        sync(&sub.join("first"));
    }
    if number == 3 {
        // The kernel has no fast commit of these: it makes a whole transaction.
        symlink("short", sub.join("short link")).expect("a link");
        symlink("l".repeat(100), sub.join("long link")).expect("a link");
        rustix::fs::mknodat(rustix::fs::CWD, sub.join("fifo"), rustix::fs::FileType::Fifo, 0o600.into(), 0)
            .expect("a fifo");
        let device = rustix::fs::makedev(1, 3);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            sub.join("null"),
            rustix::fs::FileType::CharacterDevice,
            0o600.into(),
            device,
        )
        .expect("a device");
        fs::write(sub.join("third"), "third").expect("a file");
        sync(&sub.join("third"));
    }
}

#[test]
fn fast_commits_of_other_things_than_files() {
    let mkfs = "mkfs.ext4 -b 4096 -O fast_commit";
    replayed_as_by_the_kernel(
        "fast commits of other things",
        mkfs,
        128 * MIB,
        "data=ordered",
        5,
        odd_changes,
    );
}

/// The content of fast commits is visible: without them, something is missing.
#[test]
fn the_tested_images_contain_fast_commits() {
    let disk = Disk::format("mkfs.ext4 -b 4096 -O fast_commit", 128 * MIB);
    let dirty = disk.mounted("rw,commit=300", |dir| {
        small_changes(dir, 0);
        small_changes(dir, 1);
        disk.snapshot()
    });
    let with = our_tree(&dirty.open(), &dirty.image);
    let journal = dirty.blocks_of("<8>", 1)[0];
    let number = |at: u64| {
        u64::from(u32::from_be_bytes(dirty.read(journal * 4096 + at, 4).try_into().expect("4 bytes")))
    };
    // An unused block follows the last block of transactions.
    let at = number(0x10) - number(0x54) + 1;
    let first = dirty.blocks_of("<8>", at as usize + 1)[at as usize];
    dirty.write(first * 4096, &[0; 4]);
    let without = our_tree(&dirty.open(), &dirty.image);
    assert!(differences(&with, &without).len() > 40, "{:?}", differences(&with, &without));
}

/// A journal that cannot be replayed is reported, and the volume is shown anyway.
#[test]
fn an_old_state_is_never_shown_silently() {
    let elsewhere = Disk::format("mke2fs -b 4096 -O journal_dev", 16 * MIB);
    let error =
        Ext::open(Arc::new(FileSource::open(&elsewhere.image))).expect_err("there are no files in it");
    assert!(error.to_string().contains("external journal"), "{error}");
    assert_eq!(probe(&elsewhere.read(0, 4096)), None);

    let disk = Disk::format("mkfs.ext4 -b 4096", 96 * MIB);
    let dirty = disk.mounted("rw,commit=300", |dir| {
        work(dir, 0);
        disk.snapshot()
    });
    let is_old = |remark: &String| remark.contains("missing or old");
    let said = |ours: &Ext| ours.remarks().iter().any(is_old) && ours.stale().iter().any(is_old);
    assert!(!said(&dirty.open()));
    let external = dirty.snapshot();
    external.debugfs("set_super_value journal_inum 0");
    assert!(said(&external.open()));
    let journal: u64 = dirty.debugfs("bmap <8> 0").trim().parse().expect("a block");
    for (at, value) in
        [(0, 0u8), (0x28, 0x80), (0x12, 0xff), (0xfc, !dirty.read(journal * 4096 + 0xfc, 1)[0]), (0x50, 1)]
    {
        let damaged = dirty.snapshot();
        damaged.write(journal * 4096 + at, &[value]);
        let ours = damaged.open();
        assert!(said(&ours), "{at:#x}: {:?}", ours.remarks());
        assert!(ours.attributes(ours.root()).is_ok());
    }
}

/// A read error is no property of the journal: an old state must not be shown for it.
#[test]
fn a_journal_with_a_read_error_is_retried() {
    let disk = Disk::format("mkfs.ext4 -b 4096", 96 * MIB);
    let dirty = disk.mounted("rw,commit=300", |dir| {
        work(dir, 0);
        disk.snapshot()
    });
    let journal = dirty.debugfs("bmap <8> 0").trim().parse::<u64>().expect("a block") * 4096;
    let open = |range, kind| Ext::open(Arc::new(Troubled(FileSource::open(&dirty.image), range, kind)));
    for range in [
        journal..journal + 1,
        journal + 4096..journal + 4097,
        journal + 5 * 4096..journal + 6 * 4096,
        0..4096,
    ] {
        for kind in [ErrorKind::Io, ErrorKind::Stale, ErrorKind::Exhausted] {
            assert_eq!(open(range.clone(), kind).expect_err("not now").kind(), kind, "{range:?}");
        }
        if range.start > 0 {
            let damaged =
                open(range.clone(), ErrorKind::Corrupt).expect("what is damaged is shown as far as it goes");
            assert!(!damaged.stale().is_empty(), "{range:?}");
        }
    }
    let ours = open(0..0, ErrorKind::Io).expect("it can be read again");
    assert!(ours.stale().is_empty());
}

/// An incomplete transaction is ignored.
#[test]
fn a_torn_transaction_is_not_replayed() {
    let disk = Disk::format("mkfs.ext4 -b 4096", 96 * MIB);
    let dirty = disk.mounted("rw,commit=300", |dir| {
        work(dir, 0);
        disk.snapshot()
    });
    let journal = dirty.blocks_of("<8>", 900);
    let kind = |block: &u64| {
        let head = dirty.read(block * 4096, 12);
        (head[..4] == [0xc0, 0x3b, 0x39, 0x98]).then(|| head[7])
    };
    let commits: Vec<u64> = journal[1..].iter().copied().filter(|block| kind(block) == Some(2)).collect();
    assert!(commits.len() >= 2, "{commits:?}");
    for torn in &commits[1..] {
        let copy = dirty.snapshot();
        copy.write(torn * 4096, &[0; 4096]);
        let mut ours = our_tree(&copy.open(), &copy.image);
        let begin = std::time::SystemTime::now();
        let mut theirs = copy.mounted("rw", kernel_tree);
        forgive_times_of_the_replay(&mut theirs, &mut ours, begin);
        assert_same_trees("torn", &theirs, &ours);
    }
    // A damaged block within a transaction is skipped and reported; the kernel would refuse the whole.
    let descriptor = journal[1..].iter().position(|block| kind(block) == Some(1)).expect("a descriptor") + 1;
    let copy = dirty.snapshot();
    copy.write(journal[descriptor + 1] * 4096 + 50, b"damage");
    assert!(
        copy.open().remarks()[0].contains("1 blocks in the journal are damaged"),
        "{:?}",
        copy.open().remarks()
    );
    // A damaged list of them ends the replay; earlier transactions are shown.
    let last = journal[1..].iter().rfind(|block| kind(block) == Some(1)).expect("a descriptor");
    let copy = dirty.snapshot();
    copy.write(last * 4096 + 4000, b"damage");
    let ours = copy.open();
    assert!(
        ours.remarks()[0].contains("in the journal is damaged: it and all later changes are not shown"),
        "{:?}",
        ours.remarks()
    );
    assert!(ours.lookup(ours.root(), b"step 0").expect("it is whole").is_some());
}

/// The layouts of the journal that no kernel of today writes.
#[test]
fn journals_of_older_kernels() {
    for version in ["2", "3"] {
        for wide in ["64bit", "^64bit"] {
            let disk = victim(&format!("mkfs.ext4 -b 1024 -O metadata_csum,{wide}"));
            let block = disk.debugfs("bmap \"/sub/file 3\" 1").trim().to_owned();
            let bytes = disk.image.with_file_name("bytes");
            fs::write(&bytes, [b"\xc0\x3b\x39\x98".as_slice(), &[b'n'; 1020]].concat()).expect("bytes");
            let script = disk.image.with_file_name("script");
            let revoked: u64 = disk.debugfs("bmap \"/sub/file 4\" 1").trim().parse().expect("a block");
            let text = format!(
                "jo -c -v {version}\njw -b {block},{revoked} {bytes}\njw -r {revoked}\njw -b {block} \
                    {bytes}\njc\n",
                bytes = bytes.display()
            );
            // Two blocks for the first transaction.
            fs::write(&bytes, [b"\xc0\x3b\x39\x98".as_slice(), &[b'n'; 2044]].concat()).expect("bytes");
            fs::write(&script, text).expect("a script");
            tool("debugfs").args(["-w", "-f"]).arg(&script).arg(&disk.image).succeeds();
            let ours = disk.open();
            assert_eq!(ours.remarks(), Vec::<String>::new());
            let tree = our_tree(&ours, &disk.image);
            let mut buf = [0; 1024];
            ours.read_at(find(&ours, "sub/file 3"), 1024, &mut buf).expect("it is whole");
            assert_eq!(&buf[..5], b"\xc0\x3b\x39\x98n", "{version} {wide}");
            let theirs = disk.mounted("rw", kernel_tree);
            assert_same_trees(&format!("version {version} {wide}"), &theirs, &tree);
        }
    }
}
