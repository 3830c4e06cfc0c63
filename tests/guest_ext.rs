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
use chainfs::guest::{FileKind, FileSystem as _, Ino, Source, Time};

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

/// The comparison itself: one bit of anything is noticed.
#[test]
fn the_comparison_notices_a_change() {
    let disk = Disk::format("mkfs.ext4 -b 1024 -O ^metadata_csum", 32 * MIB);
    disk.mounted("rw", |dir| {
        fs::write(dir.join("file"), vec![1; 100_000]).expect("a file");
        set_xattr(&dir.join("file"), "user.name", b"value");
        symlink("target", dir.join("link")).expect("a link");
    });
    let theirs = disk.mounted("ro", kernel_tree);
    let noticed = |command: &str| {
        let changed = disk.snapshot();
        changed.debugfs(command);
        let lines = differences(&theirs, &our_tree(&changed.open(), &changed.image));
        assert!(!lines.is_empty(), "{command} is not noticed");
    };
    for field in ["mode 0100600", "uid 7", "gid 7", "size 99999", "links_count 2", "atime 1", "mtime 1", "ctime 1"] {
        noticed(&format!("set_inode_field file {field}"));
    }
    for command in
        ["set_inode_field file blocks 6", "set_inode_field link block[0] 0x41414141", "rm link", "ea_rm file user.name"]
    {
        noticed(command);
    }
    noticed("ea_set file user.name other");
    noticed("ln file another");
    noticed("punch file 3 3");
    let content = disk.snapshot();
    let block: u64 = content.debugfs("bmap file 5").trim().parse().expect("a block");
    content.write(block * 1024 + 5, b"x");
    assert_eq!(differences(&theirs, &our_tree(&content.open(), &content.image)).len(), 1);
}

/// A small disk with some files, for damage.
fn victim(mkfs: &str) -> Disk {
    let disk = Disk::format(mkfs, 40 * MIB);
    disk.mounted("rw", |dir| {
        fs::create_dir(dir.join("sub")).expect("a directory");
        for number in 0..20 {
            fs::write(dir.join(format!("sub/file {number}")), vec![number; 5000]).expect("a file");
        }
        many_names(&dir.join("many"), 600);
        set_xattr(&dir.join("sub/file 5"), "user.large", &[5; 700]);
        let pieces = File::create(dir.join("pieces")).expect("a file");
        for piece in 0..30u64 {
            pieces.write_all_at(&[1; 1024], piece * 9000).expect("a piece");
        }
    });
    disk
}

fn find(ours: &Ext, path: &str) -> Ino {
    let step = |at, name: &str| ours.lookup(at, name.as_bytes()).expect("it is whole").expect("it is there");
    path.split('/').fold(ours.root(), step)
}

fn names_in(ours: &Ext, directory: Ino) -> (usize, Option<ErrorKind>) {
    let mut count = 0;
    let listed = ours.list(directory, 0, &mut |_| {
        count += 1;
        true
    });
    (count, listed.err().map(|error| error.kind()))
}

/// Damage is an error of the entry that it hits; everything else stays as it was.
#[test]
fn damage_goes_as_far_as_it_goes() {
    let disk = victim("mkfs.ext4 -b 1024 -g 8192");
    let whole = our_tree(&disk.open(), &disk.image);
    let block_of = |what: &str| -> u64 { disk.debugfs(&format!("bmap {what} 0")).trim().parse().expect("a block") };

    let inode = disk.snapshot();
    inode.debugfs("set_inode_field \"/sub/file 7\" checksum 0x1234");
    let ours = inode.open();
    assert_eq!(names_in(&ours, find(&ours, "sub")), (20, None));
    for number in 0..20 {
        let found = ours.attributes(find(&ours, &format!("sub/file {number}")));
        assert_eq!(found.err().map(|error| error.kind()), (number == 7).then_some(ErrorKind::Corrupt));
    }

    let directory = disk.snapshot();
    let block: u64 = directory.debugfs("bmap /many 3").trim().parse().expect("a block");
    directory.write(block * 1024 + 100, b"!");
    let ours = directory.open();
    let (names, error) = names_in(&ours, find(&ours, "many"));
    assert!(error == Some(ErrorKind::Corrupt) && names > 450, "{names} {error:?}");
    let mut last = None;
    ours.list(find(&ours, "many"), 0, &mut |entry| {
        last = Some(entry.next);
        true
    })
    .expect_err("the damage is told at the end");
    let again = ours.list(find(&ours, "many"), last.expect("there are names"), &mut |_| true);
    assert!(again.is_err(), "and by the rest of a listing that has gone by it");

    let attributes = disk.snapshot();
    let stat = attributes.debugfs("stat \"/sub/file 5\"");
    let block: u64 = stat
        .split("File ACL: ")
        .nth(1)
        .and_then(|rest| rest.split_whitespace().next())
        .expect("one")
        .parse()
        .expect("a block");
    attributes.write(block * 1024 + 900, b"!");
    let ours = attributes.open();
    let hit = find(&ours, "sub/file 5");
    assert_eq!(ours.extended_attributes(hit).expect_err("it is damaged").kind(), ErrorKind::Corrupt);
    assert_eq!(ours.read_at(hit, 0, &mut [0; 10]).expect("its content is whole"), 10);

    let extents = disk.snapshot();
    let dump = extents.debugfs("extents /pieces");
    let node = dump.lines().find(|line| line.trim_start().starts_with("0/")).expect("an index");
    let block: u64 = node.split_whitespace().nth(7).expect("its block").parse().expect("a number");
    extents.write(block * 1024 + 20, b"!");
    let ours = extents.open();
    assert_eq!(
        ours.read_at(find(&ours, "pieces"), 0, &mut [0; 10]).expect_err("it is damaged").kind(),
        ErrorKind::Corrupt
    );

    // The first group's descriptor: there is a copy in the second, and without that it is still good enough.
    let descriptor = disk.snapshot();
    descriptor.write(2 * 1024 + 0xc, b"\x11\x22");
    let ours = descriptor.open();
    assert_eq!(our_tree(&ours, &descriptor.image), whole);
    assert!(ours.remarks()[0].contains("group 0 is damaged"), "{:?}", ours.remarks());
    descriptor.write((8193 + 1) * 1024 + 0xc, b"\x11\x22");
    assert_eq!(our_tree(&descriptor.open(), &descriptor.image), whole);
    descriptor.write((8193 + 1) * 1024, &[0xff; 64]);
    assert_eq!(our_tree(&descriptor.open(), &descriptor.image), whole);
    descriptor.write(2 * 1024, &[0xff; 64]);
    assert!(descriptor.open().attributes(Ino(2)).is_err(), "nothing says any more where the inodes are");
    assert!(block_of("/sub") > 0);
}

/// Without its first superblock, a file system is found by a copy, and its journal is replayed.
#[test]
fn copies_of_the_superblock_are_found() {
    for mkfs in [
        "mkfs.ext4 -b 1024",
        "mkfs.ext2 -b 1024 -O ^sparse_super,^resize_inode",
        "mkfs.ext4 -b 2048",
        "mkfs.ext4 -b 1024 -O bigalloc -C 4096",
        "mkfs.ext4 -b 1024 -O sparse_super2,^resize_inode",
    ] {
        let disk = victim(mkfs);
        let whole = our_tree(&disk.open(), &disk.image);
        disk.write(1024, &[0; 1024]);
        let ours = disk.open();
        assert_eq!(our_tree(&ours, &disk.image), whole, "{mkfs}");
        assert!(ours.remarks()[0].contains("its copy in group 1 is used"), "{:?}", ours.remarks());
    }
    let disk = Disk::format("mkfs.ext4 -b 4096", 256 * MIB);
    let dirty = disk.mounted("rw,commit=300", |dir| {
        work(dir, 0);
        disk.snapshot()
    });
    let whole = our_tree(&dirty.open(), &dirty.image);
    dirty.write(1024, &[0; 1024]);
    assert_eq!(our_tree(&dirty.open(), &dirty.image), whole, "replayed");
}

#[test]
fn what_cannot_be_shown_says_so() {
    let refused = |disk: &Disk| Ext::open(Arc::new(FileSource::open(&disk.image))).expect_err("it cannot be opened");
    let disk = victim("mkfs.ext4 -b 1024 -O ^metadata_csum");
    disk.write(1024 + 0x63, &[0x80]);
    let error = refused(&disk);
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("ext4 with features that chainfs does not know: 0x80000000"), "{error}");
    let nothing = Disk::format("mkfs.ext4", 8 * MIB);
    nothing.write(0, &[0; 4096]);
    assert_eq!(refused(&nothing).kind(), ErrorKind::Corrupt);

    // An encrypted directory: its files can be told, its names and contents cannot.
    let disk = victim("mkfs.ext4 -b 1024 -O encrypt");
    disk.debugfs("set_inode_field /sub flags 0x80800");
    disk.debugfs("set_inode_field \"/pieces\" flags 0x80800");
    let ours = disk.open();
    let (sub, pieces) = (find(&ours, "sub"), find(&ours, "pieces"));
    assert_eq!(ours.lookup(sub, b"file 1").expect_err("it is encrypted").kind(), ErrorKind::Unsupported);
    assert_eq!(names_in(&ours, sub), (0, Some(ErrorKind::Unsupported)));
    assert_eq!(ours.read_at(pieces, 0, &mut [0; 9]).expect_err("it is encrypted").kind(), ErrorKind::Unsupported);
    assert_eq!(ours.runs(pieces, 0, 9, 9).expect_err("it is encrypted").kind(), ErrorKind::Unsupported);
    assert!(ours.attributes(pieces).is_ok() && names_in(&ours, find(&ours, "many")).1.is_none());

    // What is cut off is told, and what is there is shown.
    let disk = victim("mkfs.ext4 -b 1024");
    File::options().write(true).open(&disk.image).and_then(|file| file.set_len(20 * MIB)).expect("a shorter disk");
    let ours = disk.open();
    assert!(ours.remarks()[0].contains("the rest is cut off"), "{:?}", ours.remarks());
    assert!(names_in(&ours, find(&ours, "many")).0 > 0);
}

/// A journal that cannot be replayed is no reason to show nothing, and none to keep silent.
#[test]
fn an_old_state_is_never_shown_silently() {
    let elsewhere = Disk::format("mke2fs -b 4096 -O journal_dev", 16 * MIB);
    let error = Ext::open(Arc::new(FileSource::open(&elsewhere.image))).expect_err("there are no files in it");
    assert!(error.to_string().contains("on another device"), "{error}");
    assert_eq!(probe(&elsewhere.read(0, 4096)), None);

    let disk = Disk::format("mkfs.ext4 -b 4096", 96 * MIB);
    let dirty = disk.mounted("rw,commit=300", |dir| {
        work(dir, 0);
        disk.snapshot()
    });
    let said = |ours: &Ext| ours.remarks().iter().any(|remark| remark.contains("missing or old"));
    assert!(!said(&dirty.open()));
    let external = dirty.snapshot();
    external.debugfs("set_super_value journal_inum 0");
    assert!(said(&external.open()));
    let journal: u64 = dirty.debugfs("bmap <8> 0").trim().parse().expect("a block");
    for (at, value) in [(0, 0u8), (0x28, 0x80), (0x12, 0xff), (0x30, 1), (0x50, 1)] {
        let damaged = dirty.snapshot();
        damaged.write(journal * 4096 + at, &[value]);
        let ours = damaged.open();
        assert!(said(&ours), "{at:#x}: {:?}", ours.remarks());
        assert!(ours.attributes(ours.root()).is_ok());
    }
}

/// A transaction that did not come to the disk as a whole is as if it had never been.
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
    // A damaged block within a transaction is left out and told of; the kernel would refuse the whole.
    let descriptor = journal[1..].iter().position(|block| kind(block) == Some(1)).expect("a descriptor") + 1;
    let copy = dirty.snapshot();
    copy.write(journal[descriptor + 1] * 4096 + 50, b"damage");
    assert!(copy.open().remarks()[0].contains("1 blocks in the journal are damaged"), "{:?}", copy.open().remarks());
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
                "jo -c -v {version}\njw -b {block},{revoked} {bytes}\njw -r {revoked}\njw -b {block} {bytes}\njc\n",
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

#[test]
fn a_probe_tells_version_label_and_identity() {
    for (mkfs, version) in [("mkfs.ext2", "ext2"), ("mkfs.ext3", "ext3"), ("mkfs.ext4", "ext4")] {
        let uuid = "01234567-89ab-cdef-0123-456789abcdef";
        let disk = Disk::format(&format!("{mkfs} -L a-label -U {uuid}"), 16 * MIB);
        let found = probe(&disk.read(0, 2048)).expect("a file system");
        assert_eq!((found.version, found.label.as_slice()), (version, b"a-label".as_slice()));
        assert_eq!(
            found.uuid,
            [0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef, 0x01, 0x23, 0x45, 0x67, 0x89, 0xab, 0xcd, 0xef]
        );
    }
    assert_eq!(probe(&[0; 4096]), None);
    assert_eq!(probe(&[0xff; 2047]), None);
}

/// What fast commits hold is seen: without them, something is missing.
#[test]
fn fast_commits_are_what_is_tested() {
    let disk = Disk::format("mkfs.ext4 -b 4096 -O fast_commit", 128 * MIB);
    let dirty = disk.mounted("rw,commit=300", |dir| {
        small_changes(dir, 0);
        small_changes(dir, 1);
        disk.snapshot()
    });
    let with = our_tree(&dirty.open(), &dirty.image);
    let journal = dirty.blocks_of("<8>", 1)[0];
    let number =
        |at: u64| u64::from(u32::from_be_bytes(dirty.read(journal * 4096 + at, 4).try_into().expect("4 bytes")));
    // Behind the last block of transactions is one that nobody uses.
    let at = number(0x10) - number(0x54) + 1;
    let first = dirty.blocks_of("<8>", at as usize + 1)[at as usize];
    dirty.write(first * 4096, &[0; 4]);
    let without = our_tree(&dirty.open(), &dirty.image);
    assert!(differences(&with, &without).len() > 40, "{:?}", differences(&with, &without));
}

/// Random changes of metadata: an answer or an error, in time, and never a panic.
#[test]
fn whatever_the_disk_says_there_is_an_answer() {
    let rounds = if long() { 2000 } else { 60 };
    let with_journal = Disk::format("mkfs.ext4 -b 1024 -O fast_commit,^metadata_csum -J size=4", 32 * MIB);
    let dirty = with_journal.mounted("rw,commit=300", |dir| {
        small_changes(dir, 0);
        small_changes(dir, 1);
        with_journal.snapshot()
    });
    let disks = [
        victim("mkfs.ext4 -b 1024 -O ^metadata_csum"),
        victim("mkfs.ext4 -b 1024"),
        victim("mkfs.ext3 -b 1024"),
        victim("mkfs.ext4 -b 4096 -I 256 -O inline_data,^metadata_csum"),
        victim("mkfs.ext4 -b 1024 -O bigalloc,^metadata_csum,ea_inode,large_dir -C 4096"),
        dirty,
    ];
    let disks = disks.map(|disk| fs::read(&disk.image).expect("a disk"));
    let mut errors = 0;
    for round in 0..rounds {
        let mut rng = Rng::new(round + 4711);
        let mut bytes = disks[round as usize % disks.len()].clone();
        // Where something is, that is not only content.
        let used: Vec<usize> = (0..bytes.len() / 1024)
            .filter(|at| {
                let block = &bytes[at * 1024..][..1024];
                block.iter().any(|byte| *byte != 0) && block[..1000] != [block[0]; 1000]
            })
            .collect();
        for _ in 0..1 + rng.below(40) {
            let at = used[rng.below(used.len() as u64) as usize] * 1024 + rng.below(1024) as usize;
            match rng.below(4) {
                0 => bytes[at] ^= 1 << rng.below(8),
                1 => bytes[at] = [0, 0xff, 0x7f, 0x80][rng.below(4) as usize],
                2 => bytes[at & !3..][..4].copy_from_slice(&(rng.next() as u32).to_le_bytes()),
                _ => {
                    let from = rng.below(bytes.len() as u64 - 64) as usize;
                    let to = (at & !15).min(bytes.len() - 64);
                    bytes.copy_within(from..from + 64, to);
                }
            }
        }
        let start = Instant::now();
        let opened = Ext::open(Arc::new(bytes));
        assert!(start.elapsed() < Duration::from_secs(2), "round {round}: opening took {:?}", start.elapsed());
        let Ok(ours) = opened else {
            errors += 1;
            continue;
        };
        let mut last = Instant::now();
        errors += walk_everything(&ours, |what, ino| {
            let took = std::mem::replace(&mut last, Instant::now()).elapsed();
            assert!(took < Duration::from_secs(2), "round {round}: {what} of inode {} took {took:?}", ino.0);
        });
    }
    assert!(errors > rounds as usize / 4, "the changes hit nothing: {errors} errors");
}
