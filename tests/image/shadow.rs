//! Undoable writing: before publishing nothing is visible and nothing is lost, afterwards everything is
//! there, in between it is the old or the new state as a whole. Crashes at every point, faults at every call,
//! any operations against a vector of bytes; and copies from file to file.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;

use chainfs::error::ErrorKind;
use chainfs::image::check::check;
use chainfs::image::write::{BackingDisk, UndoableWriter, Writer, WriterOptions, Zeroing};
use chainfs::io::{Descriptors, Expect, LocalDirectory, LockSupport, StoreFile, WriterKind};
use support::oracle::Scratch;
use support::sim::crash::each_state;
use support::sim::disk::{Calls, Event};
use support::sim::images::{Opened, compressible, scribble};
use support::sim::value::pattern_range;
use support::sim::{
    Failure, Fault, IMAGE, KIB, MIB, Machine, Pages, Random, SECTOR, SimDisk, Start, StartImage, SyncRule,
    in_turn, is_long, mix, seed,
};

/// States of each run that are judged where not all are.
const STATES: usize = 110;
/// One of so many is shown to QEMU.
const QEMU_ONE_IN: u64 = 25;

/// An undoable disk, and its expected bytes.
struct Shadow {
    disk: Arc<SimDisk>,
    writer: UndoableWriter,
    bytes: Vec<u8>,
    tag: u64,
}

fn content(pages: &Pages, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    pages.fill(0, &mut bytes);
    bytes
}

fn open(
    image: &StartImage,
    disk: &Arc<SimDisk>,
    options: WriterOptions,
) -> chainfs::error::Result<UndoableWriter> {
    let below = image.backing.as_ref().map(|backing| Arc::new(backing.clone()) as Arc<dyn BackingDisk>);
    UndoableWriter::open(IMAGE, Arc::clone(disk) as _, below, options)
}

impl Shadow {
    fn new(image: &StartImage, machine: &Arc<Machine>, options: WriterOptions) -> Self {
        let disk = SimDisk::new(machine, 0, image.files[0].clone());
        let writer = open(image, &disk, options).unwrap();
        let bytes = content(&image.initial, image.initial_size);
        Self { disk, writer, bytes, tag: 5000 }
    }

    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    /// Does one thing of any kind; the error of the writer if it has one.
    fn step(&mut self, random: &mut Random, longest: u64) -> chainfs::error::Result<()> {
        let size = self.bytes.len() as u64;
        let unit = if random.once_in(4) { 1 } else { SECTOR };
        let at = random.next() % size / unit * unit;
        let len = (1 + random.next() % longest.div_ceil(unit)) * unit;
        let len = len.min(size - at);
        self.tag += 1;
        match random.below(14) {
            0 => self.writer.flush(),
            1 => {
                let new = (size + random.next() % (96 * KIB)).next_multiple_of(SECTOR);
                match self.writer.grow(new) {
                    Err(error) if error.kind() == ErrorKind::Unsupported => Ok(()),
                    Err(error) => Err(error),
                    Ok(()) => {
                        self.bytes.resize(new as usize, 0);
                        Ok(())
                    }
                }
            }
            kind @ 2..=4 => {
                let zeroing = if kind == 2 { Zeroing::Keep } else { Zeroing::Unmap };
                self.writer.zero(at, len, zeroing)?;
                self.put(at, &vec![0; len as usize]);
                Ok(())
            }
            5..=7 => {
                let from = random.next() % 5000;
                let source = pattern_range(self.tag, 0, from + len);
                self.writer.copy_from(at, len, &source, from)?;
                self.put(at, &source[from as usize..]);
                Ok(())
            }
            8 => {
                let mut have = vec![0; len as usize];
                self.writer.read_at(at, &mut have)?;
                assert!(
                    have == self.bytes[at as usize..][..len as usize],
                    "reading {at:#x}+{len:#x} shows other bytes"
                );
                Ok(())
            }
            9 => self.writer.allocate(at, len),
            _ => {
                let bytes = pattern_range(self.tag, at, len);
                self.writer.write_at(at, &bytes)?;
                self.put(at, &bytes);
                Ok(())
            }
        }
    }

    fn verify(&self) {
        let mut have = vec![0; self.bytes.len()];
        assert_eq!(self.writer.size(), self.bytes.len() as u64);
        self.writer.read_at(0, &mut have).unwrap();
        assert!(have == self.bytes, "the disk shows other bytes than were written");
    }
}

/// The disk, or an internal snapshot, as the read path shows it.
fn shown(image: &StartImage, opened: &Opened, snapshot: Option<usize>, size: u64) -> Vec<u8> {
    let view = opened.view(snapshot, image.backing.as_ref()).unwrap();
    let mut bytes = vec![0; size as usize];
    view.read_at(0, &mut bytes).unwrap();
    bytes
}

/// The result is sound, and shows one of these, whose index is returned. `leaks`: the allowed number of
/// leaks.
fn judge(image: &StartImage, files: &[Pages], legal: &[&[u8]], leaks: u64) -> Result<usize, String> {
    let report = check(&files[0], IMAGE).map_err(|error| error.to_string())?;
    if report.corruptions > 0 || report.check_errors > 0 || report.leaks > leaks {
        return Err(format!("check: {report:?}"));
    }
    let opened = Opened::new(files)?;
    let disk = shown(image, &opened, None, opened.header.virtual_size);
    let found = legal.iter().position(|legal| **legal == *disk);
    for (index, expected) in image.snapshots.iter().enumerate() {
        if shown(image, &opened, Some(index), expected.len()) != content(expected, expected.len()) {
            return Err(format!("internal snapshot {index} has changed"));
        }
    }
    found.ok_or_else(|| format!("the disk of {} bytes shows neither before nor after", disk.len()))
}

/// The same by QEMU.
fn judge_by_qemu(image: &StartImage, files: &[Pages], expected: &[u8], may_leak: bool) {
    let scratch = &image.scratch;
    files[0].save(scratch.path("state.qcow2"));
    let output = scratch.run("qemu-img", &["check", "-f", "qcow2", "state.qcow2"]);
    let is_fine = matches!(output.status.code(), Some(0)) || may_leak && output.status.code() == Some(3);
    assert!(is_fine, "qemu-img check: {}", String::from_utf8_lossy(&output.stdout));
    scratch.img("convert -f qcow2 -O raw state.qcow2 content.raw");
    assert!(
        content(&Pages::load(scratch.path("content.raw")), expected.len() as u64) == *expected,
        "QEMU's view"
    );
    for (index, snapshot) in image.snapshots.iter().enumerate() {
        let id = index + 1;
        scratch.img(&format!("convert -l snapshot.id={id} -f qcow2 -O raw state.qcow2 content.raw"));
        let theirs = Pages::load(scratch.path("content.raw"));
        assert!(
            content(&theirs, snapshot.len()) == content(snapshot, snapshot.len()),
            "QEMU's snapshot {id}"
        );
    }
}

fn with_snapshots(options: &str, size: u64) -> Start {
    Start::scribbled(options, size).then(move |scratch| {
        scratch.img(&format!("snapshot -c first {IMAGE}"));
        scratch.io(IMAGE, &["write -q -P 99 0 100k", "discard -q 300k 64k"]);
        scratch.img(&format!("snapshot -c second {IMAGE}"));
        scratch.io(IMAGE, &["write -q -P 98 50k 9k"]);
    })
}

fn compressed(options: &str, cluster: u64) -> Start {
    let options = options.to_owned();
    Start::made(move |scratch| {
        compressible(&scratch.path("source.raw"), 24 * cluster + 512);
        scratch.img(&format!("convert -c -f raw -O qcow2 -o {options} source.raw {IMAGE}"));
    })
}

/// Kinds of image: name, how it is made, bytes of the longest operation.
fn kinds() -> Vec<(&'static str, Start, u64)> {
    vec![
        ("512", Start::scribbled("cluster_size=512", 512 * KIB), 24 * KIB),
        ("64k", Start::scribbled("", 2 * MIB), 300 * KIB),
        ("4k over", Start::over(700 * KIB, "cluster_size=4k", MIB + 512), 90 * KIB),
        (
            "extended",
            Start::new("extended_l2=on,cluster_size=16k", MIB).then(|scratch| scribble(scratch, MIB)),
            90 * KIB,
        ),
        ("extended over", Start::over(MIB, "extended_l2=on,cluster_size=64k", MIB), 200 * KIB),
        ("1-bit counts", Start::scribbled("refcount_bits=1,cluster_size=1k", 512 * KIB), 40 * KIB),
        ("64-bit counts", Start::scribbled("refcount_bits=64,cluster_size=512", 512 * KIB), 60 * KIB),
        ("version 2", Start::scribbled("compat=0.10,cluster_size=4k", MIB), 60 * KIB),
        ("version 2 over", Start::over(MIB, "compat=0.10,cluster_size=4k", MIB), 60 * KIB),
        ("snapshots", with_snapshots("", 2 * MIB), 300 * KIB),
        ("snapshots 512", with_snapshots("cluster_size=512", 512 * KIB), 24 * KIB),
        ("snapshots version 2", with_snapshots("compat=0.10,cluster_size=4k", MIB), 60 * KIB),
        ("snapshots extended", with_snapshots("extended_l2=on,cluster_size=16k", MIB), 90 * KIB),
        ("compressed", compressed("cluster_size=4k", 4 * KIB), 20 * KIB),
        (
            "compressed snapshots",
            compressed("cluster_size=4k", 4 * KIB).then(|scratch| {
                scratch.img(&format!("snapshot -c first {IMAGE}"));
            }),
            20 * KIB,
        ),
        (
            "nothing",
            Start::new("cluster_size=4k", 0)
                .then(|scratch| drop(scratch.img(&format!("resize -q {IMAGE} 64k")))),
            9 * KIB,
        ),
    ]
}

/// Writes, publishes or abandons, writes on; a crash at every point.
fn crash_everywhere(name: &str, start: &Start, longest: u64, publish: bool) {
    let image = start.load();
    let machine = Machine::honest();
    let mut random = Random::new(mix(seed() ^ name.len() as u64 ^ u64::from(publish) << 8));
    let mut shadow = Shadow::new(&image, &machine, WriterOptions { cache: 64 << 10 });
    for _ in 0..25 {
        shadow.step(&mut random, longest).unwrap();
    }
    shadow.verify();
    let old = content(&image.initial, image.initial_size);
    let new = if publish { shadow.bytes.clone() } else { old.clone() };
    let start_leaks = check(&image.files[0], IMAGE).unwrap().leaks;
    let begun = machine.mark(Event::Mark);
    if publish {
        shadow.writer.publish().unwrap();
        shadow.verify();
    } else {
        shadow.writer.abandon().unwrap();
    }
    let ended = machine.mark(Event::Flushed);
    let files = vec![shadow.disk.snapshot()];
    judge(&image, &files, &[&new], start_leaks)
        .unwrap_or_else(|sentence| panic!("{name}, at the end: {sentence}"));
    judge_by_qemu(&image, &files, &new, start_leaks > 0);

    let (judged, by_qemu) = (Cell::new(0), Cell::new(0));
    let limit = if is_long() { usize::MAX } else { STATES };
    each_state(&machine.tape(), &image.files, limit, |cut, files| {
        let legal: &[&[u8]] = match cut {
            cut if cut <= begun => &[&old],
            cut if cut > ended => &[&new],
            _ => &[&old, &new],
        };
        let found = judge(&image, &files, legal, u64::MAX);
        let found = found.unwrap_or_else(|sentence| {
            files[0].save(std::env::temp_dir().join("chainfs-shadow-state.qcow2"));
            panic!("{name}, cut after {cut} (published {begun} to {ended}): {sentence}")
        });
        if mix(judged.get()).is_multiple_of(QEMU_ONE_IN) {
            judge_by_qemu(&image, &files, legal[found], true);
            by_qemu.set(by_qemu.get() + 1);
        }
        judged.set(judged.get() + 1);
    });
    println!("{name}, publish {publish}: {} states, {} by QEMU", judged.get(), by_qemu.get());
    assert!(judged.get() > 20, "{name}");
}

#[test]
// M9
fn a_crash_leaves_all_or_nothing_of_the_published_data() {
    for (name, start, longest) in in_turn(kinds(), 1) {
        crash_everywhere(name, &start, longest, true);
    }
}

#[test]
fn a_crash_leaves_nothing_of_abandoned_data() {
    for (name, start, longest) in in_turn(kinds(), 0) {
        crash_everywhere(name, &start, longest, false);
    }
}

#[test]
fn any_operations_then_published_or_abandoned() {
    let operations = if is_long() { 2000 } else { 100 };
    for (name, start, longest) in in_turn(kinds(), 1) {
        let image = start.load();
        let leaks = check(&image.files[0], IMAGE).unwrap().leaks;
        for round in 0..4 {
            let mut random = Random::new(mix(seed() ^ round << 20 ^ name.len() as u64));
            let cache = random.one_of(&[16 << 10, 256 << 10, 16 << 20]);
            let mut shadow = Shadow::new(&image, &Machine::forgetful(), WriterOptions { cache });
            for _ in 0..operations {
                shadow.step(&mut random, longest).unwrap_or_else(|error| panic!("{name}: {error}"));
                if shadow.bytes.len() as u64 > 3 * MIB {
                    break;
                }
            }
            shadow.verify();
            let old = content(&image.initial, image.initial_size);
            let before = judge(&image, &[shadow.disk.snapshot()], &[&old], u64::MAX);
            before.unwrap_or_else(|sentence| panic!("{name}, before: {sentence}"));
            if round == 3 {
                shadow.writer.abandon().unwrap();
                assert!(shadow.writer.write_at(0, &[1]).is_err(), "nothing is done with it any more");
                judge(&image, &[shadow.disk.snapshot()], &[&old], leaks)
                    .unwrap_or_else(|sentence| panic!("{name}, abandoned: {sentence}"));
                continue;
            }
            shadow.writer.publish().unwrap();
            shadow.verify();
            let files = [shadow.disk.snapshot()];
            judge(&image, &files, &[&shadow.bytes], leaks)
                .unwrap_or_else(|s| panic!("{name}, published: {s}"));
            judge_by_qemu(&image, &files, &shadow.bytes, leaks > 0);
            // From here on it is a writer like any other.
            for _ in 0..operations / 2 {
                shadow.step(&mut random, longest).unwrap_or_else(|error| panic!("{name}, after: {error}"));
            }
            shadow.verify();
            shadow.writer.close().unwrap();
            let files = [shadow.disk.snapshot()];
            judge(&image, &files, &[&shadow.bytes], leaks).unwrap_or_else(|s| panic!("{name}, at last: {s}"));
            judge_by_qemu(&image, &files, &shadow.bytes, leaks > 0);
        }
    }
}

#[test]
fn after_a_failing_call_the_writer_can_be_abandoned() {
    for (name, start, longest) in [
        ("4k", Start::scribbled("cluster_size=4k", 256 * KIB), 20 * KIB),
        ("snapshots", with_snapshots("cluster_size=1k,refcount_bits=64", 512 * KIB), 20 * KIB),
    ] {
        let image = start.load();
        let leaks = check(&image.files[0], IMAGE).unwrap().leaks;
        let old = content(&image.initial, image.initial_size);
        let (mut number, mut abandoned, mut published) = (0, 0, 0);
        loop {
            let machine = Machine::forgetful();
            let calls = if number % 5 == 4 { Calls::Reads } else { Calls::Changes };
            let failure = if number % 2 == 0 { Failure::Io } else { Failure::NoSpace };
            machine.arm(Some(Fault { calls, number: number * 4 / 5, failure, lasting: number % 3 == 0 }));
            let disk = SimDisk::new(&machine, 0, image.files[0].clone());
            let outcome = open(&image, &disk, WriterOptions { cache: 64 << 10 });
            let Ok(writer) = outcome else {
                judge(&image, &[disk.snapshot()], &[&old], u64::MAX)
                    .unwrap_or_else(|s| panic!("{name} {number}: {s}"));
                number += 1;
                continue;
            };
            let mut shadow = Shadow { disk, writer, bytes: old.clone(), tag: 7 };
            let mut random = Random::new(mix(seed()));
            let done = (0..12).try_for_each(|_| shadow.step(&mut random, longest));
            let hit = machine.hit();
            let published_now = done.and_then(|()| shadow.writer.publish());
            machine.arm(None);
            let new = shadow.bytes.clone();
            let at = |sentence: String| panic!("{name}, call {number}, hit {hit:?}: {sentence}");
            match (published_now, shadow.writer.poison()) {
                (Ok(()), _) => {
                    judge(&image, &[shadow.disk.snapshot()], &[&new], leaks).unwrap_or_else(at);
                    published += 1;
                    if hit.is_none() && calls == Calls::Changes {
                        break;
                    }
                }
                (Err(_), Some(_)) => {
                    // The old or the new state, with leaks: after the header's write, the outcome is unknown.
                    judge(&image, &[shadow.disk.snapshot()], &[&old, &new], u64::MAX).unwrap_or_else(at);
                }
                (Err(_), None) => {
                    judge(&image, &[shadow.disk.snapshot()], &[&old], u64::MAX).unwrap_or_else(at);
                    shadow.writer.abandon().unwrap_or_else(|error| panic!("{name}, call {number}: {error}"));
                    judge(&image, &[shadow.disk.snapshot()], &[&old], leaks).unwrap_or_else(at);
                    abandoned += 1;
                }
            }
            number += 1;
        }
        println!("{name}: {number} calls, {abandoned} abandoned, {published} published");
        assert!(abandoned > 10 && published > 0, "{name}: {abandoned}, {published}");
    }
}

#[test]
fn reads_and_writes_continue_during_publishing() {
    for (name, start) in [
        ("4k", Start::scribbled("cluster_size=4k", MIB)),
        ("snapshots", with_snapshots("cluster_size=1k", MIB)),
        ("extended", Start::over(MIB, "extended_l2=on,cluster_size=16k", MIB)),
    ] {
        let image = start.load();
        for turn in 0..4 {
            let machine = Machine::new(SyncRule::Honest, true, true).forget();
            let mut shadow = Shadow::new(&image, &machine, WriterOptions { cache: 64 << 10 });
            let mut random = Random::new(mix(seed() ^ turn));
            for _ in 0..15 {
                shadow.step(&mut random, 60 * KIB).unwrap();
            }
            let writer = &shadow.writer;
            let sectors = shadow.bytes.len() as u64 / SECTOR;
            let written: Vec<Vec<u64>> = std::thread::scope(|scope| {
                // Sectors of its own for each, in clusters that all share.
                let work = |number: u64| {
                    let mut random = Random::new(mix(seed() ^ turn << 8 ^ number));
                    let mut mine = Vec::new();
                    for _ in 0..60 {
                        let sector = random.next() % (sectors / 4) * 4 + number;
                        let bytes = pattern_range(1, sector * SECTOR, SECTOR);
                        writer.write_at(sector * SECTOR, &bytes).unwrap();
                        let mut have = vec![0; SECTOR as usize];
                        writer.read_at(sector * SECTOR, &mut have).unwrap();
                        assert!(have == bytes, "{name}: sector {sector:#x}");
                        mine.push(sector);
                    }
                    mine
                };
                let threads: Vec<_> = (0..4).map(|number| scope.spawn(move || work(number))).collect();
                std::thread::sleep(std::time::Duration::from_millis(3));
                writer.publish().unwrap();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            for sector in written.concat() {
                shadow.put(sector * SECTOR, &pattern_range(1, sector * SECTOR, SECTOR));
            }
            shadow.verify();
            shadow.writer.close().unwrap();
            let files = [shadow.disk.snapshot()];
            judge(&image, &files, &[&shadow.bytes], 0)
                .unwrap_or_else(|sentence| panic!("{name}: {sentence}"));
            judge_by_qemu(&image, &files, &shadow.bytes, false);
        }
    }
}

/// A file of a directory, as the store opens it.
fn store_file(scratch: &Scratch, name: &str) -> Arc<StoreFile> {
    let root = LocalDirectory::open(Path::new(&scratch.path(""))).unwrap();
    let seen = root.stat(Path::new(name)).unwrap();
    StoreFile::new(&Descriptors::with_limit(8), &root, Path::new(name), &seen, Expect::SameVersion)
}

#[test]
fn copies_from_file_to_file_are_what_qemu_reads() {
    let scratch = Scratch::new();
    let size = 24 * MIB;
    compressible(&scratch.path("source.raw"), size);
    for (options, undoable) in
        [("", true), ("cluster_size=512", false), ("extended_l2=on", true), ("compat=0.10", false)]
    {
        scratch.create(IMAGE, options, &size.to_string());
        scratch.io(IMAGE, &["write -q -P 5 1M 3M", "write -q -z 9M 1M"]);
        let (image, source) = (store_file(&scratch, IMAGE), store_file(&scratch, "source.raw"));
        let lock = image.lock_for_writing(WriterKind::Guest, LockSupport::Required).unwrap();
        let file = image.open_for_writing().unwrap();
        let options = WriterOptions::default();
        let (writer, undoable) = if undoable {
            let undoable = UndoableWriter::open(IMAGE, file, None, options).unwrap();
            (Arc::clone(undoable.writer()), Some(undoable))
        } else {
            (Writer::qcow2(IMAGE, file, None, None, options).unwrap(), None)
        };
        writer.reserve(size).unwrap();
        // Pieces that begin and end anywhere, over each other.
        let mut random = Random::new(mix(seed()));
        for _ in 0..20 {
            let at = random.next() % size;
            let len = (1 + random.next() % (3 * MIB)).min(size - at);
            writer.copy_from(at, len, &*source, at).unwrap();
        }
        writer.copy_from(0, size, &*source, 0).unwrap();
        if let Some(undoable) = &undoable {
            undoable.publish().unwrap();
        }
        writer.close().unwrap();
        drop((writer, undoable, lock));
        scratch.img(&format!("check -q {IMAGE}"));
        scratch.img(&format!("compare -q -f raw -F qcow2 source.raw {IMAGE}"));
    }
    scratch.img(&format!("create -q -f raw raw.img {size}"));
    let (image, source) = (store_file(&scratch, "raw.img"), store_file(&scratch, "source.raw"));
    let _lock = image.lock_for_writing(WriterKind::Guest, LockSupport::Required).unwrap();
    let writer = Writer::raw("raw.img", image.open_for_writing().unwrap()).unwrap();
    writer.reserve(MIB).unwrap();
    writer.copy_from(0, size, &*source, 0).unwrap();
    writer.close().unwrap();
    assert_eq!(std::fs::metadata(scratch.path("raw.img")).unwrap().len(), size);
    scratch.img("compare -q -f raw -F raw source.raw raw.img");
    let error = writer.copy_from(0, size, &*source, 512).unwrap_err();
    assert!(error.to_string().contains("ends before"), "{error}");
}

#[test]
fn an_external_data_file_cannot_be_undone() {
    let image = Start::new("data_file=data.raw", MIB).load();
    let disk = SimDisk::new(&Machine::honest(), 0, image.files[0].clone());
    assert_eq!(open(&image, &disk, WriterOptions::default()).unwrap_err().kind(), ErrorKind::Unsupported);
}
