//! ext2, ext3 and ext4, judged by the kernel: whole trees as its mount shows them, dirty journals as it replays them,
//! damage as far as it goes and no further. Needs root and loop devices.

#[allow(dead_code, unused_imports, reason = "each test binary uses its part")]
#[path = "common/tools.rs"]
mod tools;

#[allow(dead_code, reason = "each test binary uses its part")]
#[path = "common/rng.rs"]
mod rng;

#[path = "guest_common/ext.rs"]
mod ext;

#[path = "guest_common/ext_content.rs"]
mod ext_content;

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use chainfs::error::ErrorKind;
use chainfs::guest::ext::{Ext, probe};
use chainfs::guest::{FileKind, FileSystem as _, Source, Time};

use ext::*;
use ext_content::*;
use rng::Rng;
use tools::{Outcome as _, tool};

const MIB: u64 = 1 << 20;

fn long() -> bool {
    std::env::var_os("CHAINFS_LONG").is_some()
}

/// Fills a disk of that kind, and compares all of it.
fn shown_as_by_the_kernel(mkfs: &str, size: u64, content: &Content) -> Disk {
    let disk = Disk::format(mkfs, size);
    disk.mounted("rw", |dir| content.fill(dir));
    compare(&disk, mkfs);
    disk
}

fn compare(disk: &Disk, what: &str) -> Ext {
    let ours = disk.open();
    let tree = our_tree(&ours, &disk.image);
    let (theirs, sizes) = disk.mounted("ro", |dir| (kernel_tree(dir), rustix::fs::statvfs(dir).expect("statvfs")));
    assert_same_trees(what, &theirs, &tree);
    let counted = ours.statistics();
    let our = (counted.blocks, counted.free_blocks, counted.available_blocks, counted.inodes, counted.free_inodes);
    assert_eq!(our, (sizes.f_blocks, sizes.f_bfree, sizes.f_bavail, sizes.f_files, sizes.f_ffree), "{what}");
    assert_eq!(ours.remarks(), Vec::<String>::new(), "{what}");
    ours
}

#[test]
fn ext2_of_all_kinds() {
    for mkfs in
        ["mkfs.ext2", "mkfs.ext2 -b 1024", "mkfs.ext2 -b 4096 -I 128", "mkfs.ext2 -O ^filetype,^dir_index -b 2048"]
    {
        shown_as_by_the_kernel(mkfs, 96 * MIB, &Content::small());
    }
}

#[test]
fn ext3_of_all_kinds() {
    for mkfs in ["mkfs.ext3", "mkfs.ext3 -b 1024 -I 256 -N 5000", "mkfs.ext3 -b 4096 -O ^dir_index"] {
        shown_as_by_the_kernel(mkfs, 96 * MIB, &Content::small());
    }
}

#[test]
fn ext4_of_the_usual_kinds() {
    for mkfs in [
        "mkfs.ext4 -b 1024",
        "mkfs.ext4 -b 2048 -O ^64bit,^metadata_csum",
        "mkfs.ext4 -b 4096 -O ^64bit,^metadata_csum,uninit_bg",
        "mkfs.ext4 -b 4096 -I 128",
        "mkfs.ext4 -b 4096 -I 1024 -O metadata_csum_seed",
    ] {
        shown_as_by_the_kernel(mkfs, 128 * MIB, &Content::ext4());
    }
    let mapped = Content { punched: false, ..Content::ext4() };
    shown_as_by_the_kernel("mkfs.ext4 -b 4096 -O ^extent,^64bit,^metadata_csum", 128 * MIB, &mapped);
}

#[test]
fn ext4_with_seldom_features() {
    let long_values = Content { value_len: 40_000, ..Content::ext4() };
    for (mkfs, content) in [
        ("mkfs.ext4 -b 4096 -O inline_data", Content::ext4()),
        ("mkfs.ext4 -b 1024 -I 512 -O inline_data,metadata_csum", Content::ext4()),
        ("mkfs.ext4 -b 4096 -O ea_inode", long_values),
        ("mkfs.ext4 -b 1024 -O bigalloc -C 16384", Content::ext4()),
        ("mkfs.ext4 -b 4096 -O bigalloc -C 65536", Content::ext4()),
        ("mkfs.ext4 -b 1024 -O meta_bg,^resize_inode", Content::ext4()),
        ("mkfs.ext4 -b 1024 -O sparse_super2,^resize_inode", Content::ext4()),
        ("mkfs.ext4 -b 4096 -O large_dir,fast_commit,orphan_file,mmp", Content::ext4()),
        ("mkfs.ext4 -b 4096 -O verity,stable_inodes", Content::ext4()),
    ] {
        shown_as_by_the_kernel(mkfs, 128 * MIB, &content);
    }
}

/// Thousands of files, fifty thousand names in one directory, ten thousand extents of one file.
#[test]
fn a_large_tree() {
    let files = if long() { usize::MAX >> 1 } else { 2500 };
    let size = if long() { 12_000 } else { 700 };
    let content = Content { files, names: 50_000, pieces: 10_000, ..Content::ext4() };
    let disk = shown_as_by_the_kernel("mkfs.ext4 -b 4096", size * MIB, &content);
    let ours = disk.open();
    let many = ours.lookup(ours.root(), b"many").expect("it is whole").expect("it is there");
    let fragmented = ours.lookup(ours.root(), b"fragmented").expect("it is whole").expect("it is there");
    let start = Instant::now();
    for number in (1..50_000).filter(|number| (number - 3) % 7 != 0).step_by(50) {
        let name = format!("entry {number:06} with a name that is not short");
        assert!(ours.lookup(many, name.as_bytes()).expect("it is whole").is_some(), "{name}");
    }
    assert!(start.elapsed() < Duration::from_secs(1), "lookups must not read the whole directory each");
    let mut count = 0;
    let mut at = 0;
    loop {
        let runs = ours.runs(fragmented, at, u64::MAX, 512).expect("it is whole");
        if runs.is_empty() {
            break;
        }
        count += runs.len();
        at += runs.iter().map(|run| run.len).sum::<u64>();
    }
    assert_eq!(count, 20_000);
}

/// A directory of many names without an index gets one in memory.
#[test]
fn a_large_directory_without_an_index() {
    let disk = Disk::format("mkfs.ext2 -b 4096 -O ^dir_index -N 5000", 64 * MIB);
    disk.mounted("rw", |dir| many_names(&dir.join("many"), 20_000));
    let ours = compare(&disk, "a large directory without an index");
    let many = ours.lookup(ours.root(), b"many").expect("it is whole").expect("it is there");
    let start = Instant::now();
    for number in 1..10_000 {
        let name = format!("absent {number}");
        assert_eq!(ours.lookup(many, name.as_bytes()).expect("it is whole"), None);
    }
    assert!(start.elapsed() < Duration::from_secs(1), "lookups must not read the whole directory each");
}

/// Each hash that an index can be sorted by, with names of signed and unsigned bytes.
#[test]
fn every_hash_of_an_index() {
    for hash in ["legacy", "half_md4", "tea"] {
        for flags in [1u32, 2] {
            let disk = Disk::format("mkfs.ext4 -b 1024 -O ^metadata_csum,dir_index", 24 * MIB);
            disk.debugfs(&format!("set_super_value def_hash_version {hash}"));
            disk.debugfs(&format!("set_super_value flags {flags}"));
            disk.mounted("rw", |dir| {
                for number in 0..1500u32 {
                    let tail: &[u8] = if number % 2 == 0 { b"\xc3\xa4\xff\x80" } else { b"plain" };
                    let name = [format!("{number}-").repeat(1 + number as usize % 9).as_bytes(), tail].concat();
                    symlink("x", dir.join(std::ffi::OsStr::from_bytes(&name))).expect("a name");
                }
            });
            compare(&disk, hash);
            // An index that is not understood is no error: the directory is read instead. That would be seen here.
            let source = Arc::new(FileSource::open(&disk.image));
            let ours = Ext::open(Arc::clone(&source) as Arc<dyn Source>).expect("our reader opens it");
            assert_eq!(ours.lookup(ours.root(), b"absent").expect("it is whole"), None);
            assert!(source.bytes_read() < 10_000, "{hash} {flags}: {} bytes", source.bytes_read());
        }
    }
}

/// What this kernel cannot mount: the judge is the directory from which the disk was filled.
fn shown_as_filled(mkfs: &str, change: impl FnOnce(&Disk, &Path)) {
    let from = tempfile::Builder::new().prefix("chainfs-ext-").tempdir().expect("a directory");
    let content = Content { value_len: 200, ..Content::small() };
    content.fill(from.path());
    let disk = Disk::format(&format!("{mkfs} -d {}", from.path().display()), 256 * MIB);
    change(&disk, from.path());
    let (mut theirs, mut ours) = (kernel_tree(from.path()), our_tree(&disk.open(), &disk.image));
    ours.retain(|path, _| !path.starts_with(b"/lost+found"));
    // The copy makes two of a symbolic link with two names, and forgets the bits of times after 2038.
    let kept = |path: &[u8]| path != b"/links/the same link" && !path.starts_with(b"/times");
    theirs.retain(|path, _| kept(path));
    ours.retain(|path, _| kept(path));
    for tree in [&mut theirs, &mut ours] {
        for (path, node) in tree.iter_mut() {
            // What a copy does not keep, or keeps in its own way.
            node.ino = 0;
            node.data.clear();
            node.xattrs.sort();
            let own = &mut node.attributes;
            own.modified.nanoseconds = 0;
            (own.blocks, own.accessed, own.changed, own.created) = (0, own.modified, own.modified, None);
            if own.kind == FileKind::Symlink {
                own.links = 1;
            }
            if path.is_empty() || own.kind == FileKind::Directory {
                (own.size, own.links, own.modified, own.accessed, own.changed) = <_>::default();
            }
        }
    }
    assert_same_trees(mkfs, &theirs, &ours);
}

#[test]
fn blocks_of_64_kib() {
    shown_as_filled("mkfs.ext4 -b 65536", |_, _| {});
    shown_as_filled("mkfs.ext2 -b 65536", |_, _| {});
}

#[test]
fn quotas_and_sealed_files() {
    let mkfs = "mkfs.ext4 -b 4096 -O quota,project,verity -E quotatype=usrquota:prjquota";
    shown_as_filled(mkfs, |disk, _| {
        // Extents, verity.
        disk.debugfs("set_inode_field /sizes/65537 flags 0x180000");
    });
}

#[test]
fn names_of_any_case() {
    shown_as_filled("mkfs.ext4 -b 4096 -O casefold -E encoding=utf8", |disk, from| {
        disk.debugfs("mkdir Folded");
        disk.debugfs("set_inode_field Folded flags 0x40080000");
        disk.debugfs(&format!("write {} Folded/Name", from.join("sizes/4097").display()));
        fs::create_dir(from.join("Folded")).expect("a directory");
        tool("cp").arg("-p").arg(from.join("sizes/4097")).arg(from.join("Folded/Name")).succeeds();
    });
}

/// The work of a guest that is never unmounted: `step` is done again and again, and after each the disk as it is at
/// that moment is shown as the kernel shows it after replaying its journal.
fn replayed_as_by_the_kernel(what: &str, mkfs: &str, size: u64, options: &str, steps: u64, step: impl Fn(&Path, u64)) {
    let disk = Disk::format(mkfs, size);
    // No commit and no writing back but what the steps ask for: the disk does not change while it is copied.
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
        // Only what may be written is replayed.
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
    // The clock of file systems lags behind by a tick.
    let begin = begin.duration_since(std::time::UNIX_EPOCH).expect("a time") - Duration::from_millis(20);
    let begin = Time { seconds: begin.as_secs().cast_signed(), nanoseconds: begin.subsec_nanos() };
    for (path, node) in theirs.iter_mut() {
        let Some(our) = ours.get_mut(path) else { continue };
        let (their, our) = (&mut node.attributes, &our.attributes);
        if their.changed >= begin && our.changed < begin {
            their.changed = our.changed;
            if their.modified >= begin {
                their.modified = our.modified;
            }
        }
    }
}

/// One step of a guest's work. What is written last is on the disk in the journal only, or not at all.
fn work(dir: &Path, number: u64) {
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
        // Blocks of directories and of what they named become blocks of files: they have to be revoked.
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

/// A journal so small that it is gone round several times.
#[test]
fn a_journal_that_has_been_around() {
    replayed_as_by_the_kernel("around", "mkfs.ext4 -b 1024 -J size=1", 96 * MIB, "data=journal", 6, work);
}

/// A file that was removed while open, and one whose truncation was cut short, have no trace in what is shown.
#[test]
fn orphans_are_as_after_their_recovery() {
    for mkfs in ["mkfs.ext4 -b 4096", "mkfs.ext4 -b 4096 -O orphan_file"] {
        let held = std::cell::RefCell::new(Vec::new());
        replayed_as_by_the_kernel("orphans", mkfs, 96 * MIB, "data=ordered", 2, |dir, number| {
            let path = dir.join(format!("file {number}"));
            fs::write(&path, vec![7; 100_000]).expect("a file");
            let file = File::options().write(true).open(&path).expect("the file");
            file.sync_all().and_then(|()| file.set_len(1001)).expect("a shorter file");
            let removed = File::create(dir.join("removed")).expect("a file");
            removed.write_all_at(&[1; 50_000], 0).expect("content");
            fs::remove_file(dir.join("removed")).expect("a removal");
            file.sync_all().expect("fsync");
            held.borrow_mut().push((file, removed));
            if number == 1 {
                // Nobody may hold them when the disk is unmounted.
                held.borrow_mut().clear();
            }
        });
    }
}

/// Many small commits, one after another: names, bytes, lengths, and nothing between them.
fn small_changes(dir: &Path, number: u64) {
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
    long.write_all_at(&rng.bytes(10_000), 1_000_000 * number).and_then(|()| long.sync_all()).expect("bytes far out");
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
    for mkfs in ["mkfs.ext4 -b 4096 -O fast_commit", "mkfs.ext4 -b 1024 -O fast_commit,^metadata_csum -J size=8"] {
        replayed_as_by_the_kernel("fast commits", mkfs, 128 * MIB, "data=ordered", 4, small_changes);
    }
    let inline = "mkfs.ext4 -b 4096 -O fast_commit,inline_data";
    replayed_as_by_the_kernel("fast commits, inline", inline, 128 * MIB, "data=ordered", 3, small_changes);
}

/// What is made by fast commits that is neither a file nor a name of one.
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
    replayed_as_by_the_kernel("fast commits of other things", mkfs, 128 * MIB, "data=ordered", 5, odd_changes);
}
