//! Filling from below: with any writes, snapshots and fills in between, no view of an image changes, and at
//! the end none needs the layers below any more.
//!
//! The image is backed by a backing image. Its future backing is a [`Lower`] disk, which is equal in some
//! ranges, zero in others, and different elsewhere.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use chainfs::error::Result;
use chainfs::image::check::check;
use chainfs::image::write::{Fill, WriterOptions};
use chainfs::units::{BlockStatus, Run, are_zero};
use support::first_difference;
use support::oracle::Scratch;
use support::sim::guest::{new_snapshot, open_writer};
use support::sim::images::Opened;
use support::sim::value::{pattern, pattern_range};
use support::sim::{
    Backing, Guest, IMAGE, KIB, MIB, Machine, Pages, Random, SECTOR, Start, StartImage, Workload, in_turn,
    is_long, mix, seed,
};

/// The tag of bytes that only the new layer below has.
const LOWER_TAG: u64 = 0x10;

/// The future backing of the image.
struct Lower {
    now: Backing,
    then: Backing,
}

impl Lower {
    /// Runs of odd lengths: equal, zero, or different.
    fn new(now: &Backing, seed: u64) -> Self {
        let mut random = Random::new(mix(seed));
        let (mut then, mut at) = (Pages::default(), 0);
        let len = now.0.len();
        while at < len {
            let piece = ((1 + random.next() % 200) * SECTOR).min(len - at);
            match random.below(3) {
                0 => then.write(at, &now.0.bytes(at, piece)),
                1 => {}
                _ => then.write(at, &pattern_range(LOWER_TAG, at, piece)),
            }
            at += piece;
        }
        then.set_len(len);
        Self { now: now.clone(), then: Backing(Arc::new(then)) }
    }

    /// Always zero.
    fn none(now: &Backing) -> Self {
        Self { now: now.clone(), then: Backing(Arc::new(Pages::default())) }
    }

    fn wanted_of(&self, sector: u64) -> Option<BlockStatus> {
        let now = self.now.0.bytes(sector * SECTOR, SECTOR);
        if now == self.then.0.bytes(sector * SECTOR, SECTOR) {
            None
        } else if are_zero(&now) {
            Some(BlockStatus::Zero)
        } else {
            Some(BlockStatus::Data)
        }
    }
}

impl Fill for Lower {
    fn wanted(&self, at: u64, len: u64) -> Result<Run<Option<BlockStatus>>> {
        assert!(at.is_multiple_of(SECTOR) && len > 0);
        let wanted = self.wanted_of(at / SECTOR);
        let mut sector = at / SECTOR + 1;
        while sector * SECTOR < at + len && self.wanted_of(sector) == wanted {
            sector += 1;
        }
        Ok(Run::new(wanted, (sector * SECTOR).min(at + len) - at))
    }
}

fn by_qemu(scratch: &Scratch) {
    scratch.io(IMAGE, &["write -q -P 8 30k 3k", "write -q -P 7 300k 10k"]);
    scratch.img(&format!("snapshot -c one {IMAGE}"));
    scratch.io(IMAGE, &["write -q -P 9 0 20k", "write -q -z 100k 64k"]);
    scratch.img(&format!("snapshot -c two {IMAGE}"));
    scratch.img(&format!("snapshot -c three {IMAGE}"));
    scratch.io(IMAGE, &["write -q -P 11 4k 2k"]);
}

/// The active disk has half a MiB, one internal snapshot as much, another one a whole.
fn of_two_sizes(scratch: &Scratch) {
    scratch.img(&format!("snapshot -c short {IMAGE}"));
    scratch.img(&format!("resize -q {IMAGE} 1M"));
    scratch.io(IMAGE, &["write -q -P 5 700k 20k"]);
    scratch.img(&format!("snapshot -c long {IMAGE}"));
    scratch.img(&format!("snapshot -a short {IMAGE}"));
}

fn some_compressed(scratch: &Scratch) {
    let commands: Vec<_> = (0..6).map(|n| format!("write -q -c -P {} {}k 4k", n + 1, n * 64)).collect();
    scratch.io(IMAGE, &commands.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Whether it may have internal snapshots.
fn takes_snapshots(name: &str) -> bool {
    !name.contains("1 bit") && !name.contains("data file")
}

/// Kinds of image, with the length of the longest write.
fn kinds() -> Vec<(&'static str, Start, u64)> {
    let over = |options: &str, size| Start::over(size * 3 / 4 + SECTOR, options, size);
    vec![
        ("64 KiB", over("", MIB), 100 * KIB),
        ("64 KiB, snapshots", over("", MIB).then(by_qemu), 100 * KIB),
        ("512 bytes", over("cluster_size=512", 500 * KIB).then(by_qemu), 12 * KIB),
        ("subclusters", over("extended_l2=on,cluster_size=16k", MIB), 20 * KIB),
        ("subclusters, snapshots", over("extended_l2=on,cluster_size=16k", MIB).then(by_qemu), 20 * KIB),
        ("version 2", over("compat=0.10,cluster_size=4k", 500 * KIB).then(by_qemu), 20 * KIB),
        ("refcounts of 1 bit", over("refcount_bits=1,cluster_size=4k", 500 * KIB), 20 * KIB),
        ("refcounts of 4 bits", over("refcount_bits=4,cluster_size=1k", 500 * KIB).then(by_qemu), 20 * KIB),
        (
            "refcounts of 64 bits",
            over("refcount_bits=64,cluster_size=512", 400 * KIB).then(by_qemu),
            20 * KIB,
        ),
        ("two sizes", Start::over(MIB, "cluster_size=4k", 500 * KIB).then(of_two_sizes), 20 * KIB),
        (
            "two sizes, subclusters",
            Start::over(MIB, "extended_l2=on", 500 * KIB).then(of_two_sizes),
            20 * KIB,
        ),
        ("compressed", over("cluster_size=4k", 500 * KIB).then(some_compressed).then(by_qemu), 20 * KIB),
        ("data file", over("data_file=data.raw,cluster_size=4k", 500 * KIB), 20 * KIB),
        ("data file, subclusters", over("data_file=data.raw,extended_l2=on", 500 * KIB), 60 * KIB),
        ("longer below", Start::over(2 * MIB, "cluster_size=8k", MIB - 3 * KIB).then(by_qemu), 20 * KIB),
    ]
}

/// The conditions at any time, checked on the files: sound, and all views right.
fn judge(files: &[Pages], active: &Pages, snapshots: &[Pages], below: &Backing, what: &str) {
    let report = check(&files[0], IMAGE).unwrap();
    assert!(report.corruptions == 0 && report.check_errors == 0 && report.leaks == 0, "{what}: {report}");
    assert_views(files, active, snapshots, below, what);
}

/// All views over `below` are as they should be.
fn assert_views(files: &[Pages], active: &Pages, snapshots: &[Pages], below: &Backing, what: &str) {
    let opened = Opened::new(files).unwrap();
    assert_eq!(opened.snapshots.len(), snapshots.len(), "{what}");
    let views = snapshots.iter().enumerate().map(|(index, expected)| (Some(index), expected));
    for (index, expected) in views.chain([(None, active)]) {
        let view = opened.view(index, Some(below)).unwrap();
        assert_eq!(view.size(), expected.len(), "{what}: {index:?}");
        let mut bytes = vec![0; 1 << 16];
        for at in (0..view.size()).step_by(bytes.len()) {
            let piece = &mut bytes[..(view.size() - at).min(1 << 16) as usize];
            view.read_at(at, piece).unwrap_or_else(|error| panic!("{what}: {index:?} at {at:#x}: {error}"));
            let want = expected.bytes(at, piece.len() as u64);
            if let Some(place) = first_difference(piece, &want) {
                let sector = place / 512 * 512;
                panic!(
                    "{what}: view {index:?}, {:#x}: {}, not {}",
                    at + sector as u64,
                    support::sim::value::describe(&piece[sector..sector + 512]),
                    support::sim::value::describe(&want[sector..sector + 512])
                );
            }
        }
    }
}

/// QEMU sees the same in all views once the backing file is another.
fn judge_by_qemu(
    image: &StartImage,
    files: &[Pages],
    active: &Pages,
    snapshots: &[Pages],
    below: &Backing,
    what: &str,
) {
    let scratch = &image.scratch;
    files[0].save(scratch.path(IMAGE));
    if let Some(data) = files.get(1) {
        data.save(scratch.path(support::sim::images::DATA_FILE));
    }
    below.0.save(scratch.path("backing.raw"));
    scratch.img(&format!("check -q {IMAGE}"));
    let opened = Opened::new(files).unwrap();
    let ids = opened.snapshots.iter().map(|snapshot| String::from_utf8(snapshot.id.clone()).unwrap());
    let words = ids.map(|id| format!("-l snapshot.id={id}")).chain([String::new()]);
    for (words, expected) in words.zip(snapshots.iter().chain([active])) {
        scratch.img(&format!("convert -f qcow2 -O raw {words} {IMAGE} content.raw"));
        let have = Pages::load(scratch.path("content.raw"));
        // QEMU shows as much of an internal snapshot as the active disk has.
        let end = have.len().min(expected.len());
        for at in (0..end).step_by(1 << 16) {
            let len = (end - at).min(1 << 16);
            assert!(
                have.bytes(at, len) == expected.bytes(at, len),
                "{what} {words}: QEMU differs from {at:#x} on"
            );
        }
    }
    if let (Some(first), Some(last)) = (opened.snapshots.first(), opened.snapshots.last()) {
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        scratch.tool("qemu-img", &["snapshot", "-a", &text(&last.id), IMAGE]);
        scratch.img(&format!("check -q {IMAGE}"));
        scratch.tool("qemu-img", &["snapshot", "-d", &text(&first.name), IMAGE]);
        scratch.img(&format!("check -q {IMAGE}"));
    }
}

/// The bytes of the internal snapshots before anything is done, to the ends of their own disks.
fn at_first(image: &StartImage) -> Vec<Pages> {
    let opened = Opened::new(&image.files).unwrap();
    let by_qemu = image.snapshots.iter().enumerate();
    let read = |(index, by_qemu): (usize, &Pages)| {
        let pages = whole(&opened, Some(index), image.backing.as_ref());
        let len = by_qemu.len().min(pages.len());
        assert!(pages.bytes(0, len) == by_qemu.bytes(0, len), "snapshot {index} as QEMU reads it");
        pages
    };
    by_qemu.map(read).collect()
}

/// All of a view.
fn whole(opened: &Opened, index: Option<usize>, backing: Option<&Backing>) -> Pages {
    let view = opened.view(index, backing).unwrap();
    let mut bytes = vec![0; view.size() as usize];
    view.read_at(0, &mut bytes).unwrap();
    let mut pages = Pages::default();
    pages.write(0, &bytes);
    pages
}

fn longest(snapshots: &[Pages], size: u64) -> u64 {
    snapshots.iter().map(Pages::len).fold(size, u64::max)
}

/// Random operations against a vector of bytes for each view.
fn model(name: &str, image: &StartImage, longest_write: u64, seed: u64, steps: usize) {
    let backing = image.backing.clone().unwrap();
    let mut random = Random::new(mix(seed));
    let lower = if random.once_in(3) { Lower::none(&backing) } else { Lower::new(&backing, seed) };
    let options = WriterOptions { cache: random.one_of(&[16 << 10, 16 << 20]) };
    let guest = Guest::new(&Machine::forgetful(), image, options);
    let mut snapshots = at_first(image);
    let most = if takes_snapshots(name) { snapshots.len() + 4 } else { 0 };
    let what = format!("{name}: CHAINFS_SEED={seed}");
    for _ in 0..steps {
        let all = longest(&snapshots, guest.size());
        let at = random.next() % guest.size() / SECTOR * SECTOR;
        let len = ((1 + random.next() % (longest_write / SECTOR)) * SECTOR).min(guest.size() - at);
        match random.below(24) {
            0..=6 => guest.write(at, len),
            7 => guest.zero(at, len),
            8..=10 => guest.discard(at, len),
            11 => guest.allocate(at, len),
            12 | 13 => guest.flush(),
            14 | 15 if snapshots.len() < most => {
                snapshots.push(guest.content().unwrap());
                guest.snapshot("ours");
            }
            16 => {
                let active = guest.content().unwrap();
                guest.reopen();
                judge(&guest.files(), &active, &snapshots, &backing, &what);
            }
            _ => {
                let at = random.next() % all;
                guest.fill(at, (1 + random.next() % (4 * longest_write)).min(all - at), &lower);
            }
        }
        guest.verify().unwrap_or_else(|sentence| panic!("{what}: {sentence}"));
    }
    let active = guest.content().unwrap();
    guest.fill(0, longest(&snapshots, guest.size()), &lower);
    assert_eq!(guest.writer().fill(0, u64::MAX, &lower).unwrap(), 0, "{what}: what is filled is not silent");
    guest.close();
    let files = guest.files();
    judge(&files, &active, &snapshots, &backing, &format!("{what}: over what was below"));
    judge(&files, &active, &snapshots, &lower.then, &format!("{what}: over what will be below"));
    judge_by_qemu(image, &files, &active, &snapshots, &lower.then, &what);
}

#[test]
// M8
fn no_view_changes_and_at_the_end_none_needs_the_layers_below() {
    println!("CHAINFS_SEED={}", seed());
    let rounds = if is_long() { 200 } else { 2 };
    for (name, start, longest) in in_turn(kinds(), 1) {
        let image = start.load();
        for round in 0..rounds {
            model(name, &image, longest, seed() + round, 60);
        }
    }
}

#[test]
fn a_crash_leaves_every_view_as_it_was() {
    for (name, start, longest) in in_turn(kinds(), 0) {
        Workload::new(name, start).states(130).survives(|guest| {
            let backing = guest.backing();
            let lower = Lower::new(&backing, seed());
            let size = guest.size();
            guest.write(size / 3 / SECTOR * SECTOR, longest);
            guest.fill(0, size / 2, &lower);
            guest.write(size / 4 / SECTOR * SECTOR, longest.min(40 * KIB));
            if takes_snapshots(name) {
                guest.snapshot("ours");
            }
            guest.fill(size / 4, size / 2, &lower);
            guest.discard(size / 8 / SECTOR * SECTOR, longest);
            guest.flush();
            guest.fill(0, 2 * MIB, &lower);
            guest.close();
        });
    }
}

/// A view that has dropped a table in memory still refers to it on disk: a fill must not be visible there.
#[test]
// M1
fn a_crash_between_dropping_a_table_and_filling_it_loses_nothing() {
    for options in ["cluster_size=4k", "extended_l2=on,cluster_size=16k"] {
        let start = Start::over(MIB, options, 512 * KIB).then(by_qemu);
        Workload::new("leaving", start).states(500).survives(|guest| {
            let lower = Lower::none(&guest.backing());
            guest.write(128 * KIB, 4 * KIB);
            guest.flush();
            guest.snapshot("ours");
            guest.write(200 * KIB, 5 * KIB);
            guest.write(129 * KIB, KIB);
            guest.fill(100 * KIB, 200 * KIB, &lower);
            guest.write(250 * KIB, KIB);
            guest.flush();
            guest.snapshot("another");
            guest.write(300 * KIB, 20 * KIB);
            guest.fill(0, 512 * KIB, &lower);
            guest.close();
        });
    }
}

/// After any crash, with leaks: reopened and filled, it needs the layers no more.
#[test]
fn filling_continues_after_a_crash() {
    for (name, start, longest) in in_turn(kinds(), 1) {
        let image = start.load();
        let backing = image.backing.clone().unwrap();
        for round in 0..if is_long() { 200 } else { 3 } {
            let seed = seed() + round;
            let what = format!("{name}: CHAINFS_SEED={seed}");
            let mut random = Random::new(mix(seed));
            let lower = Lower::new(&backing, seed);
            let machine = Machine::honest();
            let guest = Guest::new(&machine, &image, WriterOptions { cache: 16 << 10 });
            for _ in 0..12 {
                let at = random.next() % guest.size() / SECTOR * SECTOR;
                let len = longest.min(guest.size() - at);
                match random.below(8) {
                    0..=2 => guest.write(at, len),
                    3 => guest.discard(at, len),
                    4 => guest.flush(),
                    5 if takes_snapshots(name) => guest.snapshot("ours"),
                    _ => guest.fill(at, 4 * longest, &lower),
                }
            }
            guest.abandon();
            let tape = machine.tape();
            let cut = random.below(tape.len() + 1);
            let files = support::sim::crash::random_crash(&tape[..cut], &image.files, seed);
            let opened = Opened::new(&files).unwrap();
            let snapshots: Vec<_> = (0..opened.snapshots.len())
                .map(|index| whole(&opened, Some(index), Some(&backing)))
                .collect();
            let active = whole(&opened, None, Some(&backing));
            let machine = Machine::forgetful();
            let disks: Vec<_> = files
                .iter()
                .enumerate()
                .map(|(n, pages)| support::sim::SimDisk::new(&machine, n, pages.clone()))
                .collect();
            let writer = open_writer(&disks, Some(&backing), WriterOptions::default()).unwrap();
            writer.fill(0, u64::MAX, &lower).unwrap_or_else(|error| panic!("{what}: {error}"));
            writer.close().unwrap();
            let files: Vec<_> = disks.iter().map(|disk| disk.snapshot()).collect();
            let report = check(&files[0], IMAGE).unwrap();
            let is_leak = |finding: &String| finding.starts_with("Leaked");
            assert!(report.findings.iter().all(is_leak), "{what}: {report}: {:?}", report.findings);
            assert_views(&files, &active, &snapshots, &lower.then, &what);
            assert_views(&files, &active, &snapshots, &backing, &what);
        }
    }
}

/// While one thread fills and one takes snapshots, others write their own sectors.
#[test]
fn concurrent_writes_win() {
    const WRITERS: u64 = 3;
    for options in ["cluster_size=64k", "cluster_size=512", "extended_l2=on,cluster_size=16k"] {
        let size = 768 * KIB;
        let image = Start::over(size, options, size).then(by_qemu).load();
        let backing = image.backing.clone().unwrap();
        let lower = Lower::new(&backing, seed());
        let machine = Machine::new(support::sim::SyncRule::Honest, true, true).forget();
        let disks: Vec<_> = image
            .files
            .iter()
            .enumerate()
            .map(|(n, pages)| support::sim::SimDisk::new(&machine, n, pages.clone()))
            .collect();
        let writer = open_writer(&disks, Some(&backing), WriterOptions { cache: 64 << 10 }).unwrap();
        let done = AtomicBool::new(false);
        let tags: Vec<_> = thread::scope(|scope| {
            let threads: Vec<_> = (0..WRITERS)
                .map(|thread| {
                    let (writer, done) = (&writer, &done);
                    scope.spawn(move || {
                        let mut random = Random::new(mix(seed() ^ thread));
                        let (mut tags, mut tag) = (std::collections::HashMap::new(), 1000);
                        while !done.load(Ordering::Relaxed) {
                            let sector = random.next() % (size / SECTOR / WRITERS) * WRITERS + thread;
                            tag += 1;
                            writer.write_at(sector * SECTOR, &pattern(tag, sector)).unwrap();
                            tags.insert(sector, tag);
                        }
                        tags
                    })
                })
                .collect();
            for turn in 0..3 {
                for at in (0..size).step_by(100 << 10) {
                    writer.fill(at, 100 << 10, &lower).unwrap();
                }
                writer.take_snapshot(&new_snapshot(&turn.to_string())).unwrap();
            }
            done.store(true, Ordering::Relaxed);
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let mut active = image.initial.clone();
        for (sector, tag) in tags.iter().flatten() {
            active.write(sector * SECTOR, &pattern(*tag, *sector));
        }
        writer.fill(0, size, &lower).unwrap();
        writer.close().unwrap();
        let files: Vec<_> = disks.iter().map(|disk| disk.snapshot()).collect();
        let opened = Opened::new(&files).unwrap();
        // The bytes of the snapshots of a disk in use are those over the layers of that time.
        let mut snapshots = image.snapshots.clone();
        for index in snapshots.len()..opened.snapshots.len() {
            snapshots.push(whole(&opened, Some(index), Some(&backing)));
        }
        judge(&files, &active, &snapshots, &lower.then, options);
        judge(&files, &active, &snapshots, &backing, options);
    }
}
