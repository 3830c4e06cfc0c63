//! Smaller disks: the rest keeps its bytes, clusters beyond the end are freed and never visible again after a
//! growth, and a crash leaves the old size or the new one.

use chainfs::error::ErrorKind;
use chainfs::image::check::check;
use chainfs::image::write::{Writer, WriterOptions};
use support::first_difference;
use support::oracle::{COPIED, OFFSET, Scratch};
use support::sim::change::Change;
use support::sim::guest::new_snapshot;
use support::sim::images::{DATA_FILE, Opened, compressible};
use support::sim::ledger::{Ledger, Tolerance, judge, judge_by_qemu};
use support::sim::{
    IMAGE, KIB, MIB, Machine, Pages, Random, SECTOR, SimDisk, Start, StartImage, in_turn, is_long, mix, seed,
};

/// States of each run that are judged where not all are.
const STATES: usize = 35;
const LITTLE: WriterOptions = WriterOptions { cache: 32 << 10 };

fn scribbled(options: &str) -> Start {
    Start::scribbled(options, MIB)
}

fn with_snapshots(start: Start) -> Start {
    start.then(|scratch| {
        scratch.img(&format!("snapshot -c first {IMAGE}"));
        scratch.io(IMAGE, &["write -q -P 99 0 300k", "discard -q 500k 64k", "write -q -z 700k 64k"]);
        scratch.img(&format!("snapshot -c second {IMAGE}"));
        scratch.io(IMAGE, &["write -q -P 98 250k 90k", "write -q -P 97 900k 9k"]);
    })
}

fn compressed(options: &'static str) -> Start {
    Start::made(move |scratch| {
        compressible(&scratch.path("source.raw"), MIB);
        scratch.img(&format!("convert -c -f raw -O qcow2 -o {options} source.raw {IMAGE}"));
    })
}

fn full(scratch: &Scratch) {
    scratch.io(IMAGE, &["write -q -P 77 0 1M"]);
}

fn kinds() -> Vec<(&'static str, Start)> {
    vec![
        ("512", scribbled("cluster_size=512").then(full)),
        ("4k over", Start::over(MIB, "cluster_size=4k", MIB)),
        ("4k over a shorter", Start::over(300 * KIB, "cluster_size=4k", MIB).then(full)),
        ("64k", scribbled("").then(full)),
        ("2M", scribbled("cluster_size=2M").then(full)),
        ("version 2", scribbled("compat=0.10,cluster_size=4k").then(full)),
        ("version 2 over", Start::over(MIB, "compat=0.10", MIB).then(full)),
        ("extended", scribbled("extended_l2=on,cluster_size=16k")),
        ("extended over", Start::over(MIB, "extended_l2=on,cluster_size=64k", MIB)),
        ("1-bit counts", scribbled("refcount_bits=1,cluster_size=1k").then(full)),
        ("64-bit counts", scribbled("refcount_bits=64,cluster_size=512").then(full)),
        ("snapshots", with_snapshots(scribbled("cluster_size=4k"))),
        ("snapshots 512", with_snapshots(scribbled("cluster_size=512"))),
        ("snapshots 64k", with_snapshots(scribbled(""))),
        ("snapshots extended", with_snapshots(scribbled("extended_l2=on,cluster_size=32k"))),
        ("snapshots over", with_snapshots(Start::over(MIB, "cluster_size=4k", MIB))),
        ("compressed", compressed("cluster_size=4k")),
        ("compressed snapshots", with_snapshots(compressed("compression_type=zstd"))),
        ("preallocated", Start::new("preallocation=metadata,cluster_size=4k", MIB)),
        ("data file", scribbled("data_file=data.raw,cluster_size=4k").then(full)),
        ("raw data file", scribbled("data_file=data.raw,data_file_raw=on").then(full)),
    ]
}

/// The active tables name nothing beyond the end of the disk.
fn nothing_behind(files: &[Pages]) -> Result<(), String> {
    let header = Opened::new(files)?.header;
    let word = |at: u64| u64::from_be_bytes(files[0].bytes(at, 8).try_into().unwrap());
    let entry_len = if header.extended_l2() { 16 } else { 8 };
    for index in 0..u64::from(header.l1.entries) {
        let table = word(header.l1.offset.0 + index * 8) & OFFSET;
        for number in (0..header.cluster.size() / entry_len).filter(|_| table != 0) {
            let guest = index * header.l1_entry_span() + number * header.cluster.size();
            let entry = word(table + number * entry_len);
            if guest >= header.virtual_size && entry & !COPIED != 0 {
                return Err(format!("{guest:#x} behind the end has the entry {entry:#x}"));
            }
        }
    }
    Ok(())
}

fn judge_end(name: &str, image: &StartImage, ledger: &Ledger) {
    let fail = |sentence: String| panic!("{name}, {} bytes: {sentence}", ledger.views.disk.len());
    ledger.verify().unwrap_or_else(fail);
    ledger.writer.close().unwrap();
    judge(image, &ledger.files(), &[&ledger.views], Tolerance::default()).map_or_else(fail, drop);
    judge_by_qemu(image, &ledger.files(), &ledger.views);
}

/// Sizes within and at the end of sectors, subclusters, clusters and tables, each smaller than the one
/// before.
const SIZES: [u64; 12] = [
    MIB - SECTOR,
    MIB - 4 * KIB,
    960 * KIB,
    955 * KIB - 100,
    700 * KIB + SECTOR,
    512 * KIB,
    320 * KIB,
    319 * KIB,
    65 * KIB,
    32 * KIB,
    SECTOR,
    0,
];

#[test]
fn a_smaller_disk_keeps_its_remaining_bytes() {
    for (number, (name, start)) in in_turn(kinds(), 0).enumerate() {
        let image = start.load();
        // One of three rounds uses another kind, if there is no time for all.
        for round in (0..3u64).filter(|round| is_long() || *round != number as u64 % 3) {
            let mut random = Random::new(mix(seed() ^ round));
            let options = if round == 1 { LITTLE } else { WriterOptions::default() };
            let mut ledger = Ledger::new(&image, &Machine::forgetful(), options);
            let step = 1 + round as usize + usize::from(!is_long() && round == 0);
            for size in SIZES.into_iter().skip(round as usize).step_by(step) {
                ledger.shrink(size).unwrap_or_else(|error| panic!("{name}, {size}: {error}"));
                nothing_behind(&ledger.files())
                    .unwrap_or_else(|sentence| panic!("{name}, {size}: {sentence}"));
                judge_end(name, &image, &ledger);
                for _ in 0..round * 3 {
                    ledger.step(&mut random, 60 * KIB).unwrap();
                }
            }
            // And longer again.
            let size = ledger.views.disk.len() as u64;
            ledger.grow(size + 300 * KIB).unwrap();
            judge_end(name, &image, &ledger);
        }
    }
}

/// A growth shows zeroes: also one by QEMU, which writes none where nothing is visible.
#[test]
fn data_beyond_the_new_end_never_comes_back() {
    // Over a longer one, QEMU makes no image of version 2 longer.
    let kinds = kinds().into_iter().filter(|(name, _)| *name != "version 2 over");
    for (number, (name, start)) in kinds.enumerate() {
        let image = start.load();
        // Every other kind has every other size, if there is no time for all.
        let step = if is_long() { 1 } else { 2 };
        for size in SIZES.into_iter().skip(number % step).step_by(step) {
            let mut ledger = Ledger::new(&image, &Machine::forgetful(), LITTLE);
            ledger.shrink(size).unwrap();
            ledger.writer.close().unwrap();
            let scratch = &image.scratch;
            let files = ledger.files();
            files[0].save(scratch.path(IMAGE));
            if let Some(data) = files.get(1) {
                data.save(scratch.path(DATA_FILE));
            }
            scratch.img(&format!("resize -q {IMAGE} 1200k"));
            scratch.img(&format!("check -q {IMAGE}"));
            scratch.img(&format!("convert -f qcow2 -O raw {IMAGE} content.raw"));
            let mut expected = ledger.views.disk.clone();
            expected.resize(1200 << 10, 0);
            let theirs = Pages::load(scratch.path("content.raw")).bytes(0, 1200 << 10);
            assert_eq!(
                first_difference(&theirs, &expected),
                None,
                "{name}: shrunk to {size:#x}, then made longer by QEMU"
            );
        }
    }
}

/// As many clusters are in use as after QEMU's own shrinking, or fewer.
#[test]
fn shrinking_frees_as_much_as_qemu() {
    for (name, start) in in_turn(kinds(), 1) {
        let image = start.load();
        for size in [700 * KIB, 320 * KIB, 64 * KIB] {
            let scratch = &image.scratch;
            image.files[0].save(scratch.path(IMAGE));
            if let Some(data) = image.files.get(1) {
                data.save(scratch.path(DATA_FILE));
            }
            scratch.img(&format!("resize -q --shrink {IMAGE} {size}"));
            let theirs = Pages::load(scratch.path(IMAGE));
            let mut ledger = Ledger::new(&image, &Machine::forgetful(), WriterOptions::default());
            ledger.shrink(size).unwrap();
            judge_end(name, &image, &ledger);
            let used = |pages: &Pages| check(pages, IMAGE).unwrap().allocated_clusters;
            let (ours, theirs) = (used(&ledger.files()[0]), used(&theirs));
            // One more where a shared cluster has become the disk's own.
            assert!(ours <= theirs + 1, "{name}, {size}: {ours} clusters in use, QEMU leaves {theirs}");
            if let Some(data) = ledger.files().get(1).filter(|_| name.starts_with("raw")) {
                assert_eq!(data.len(), size, "{name}: the data file");
            }
        }
    }
}

#[test]
fn shrinking_returns_space_to_the_file_system() {
    for options in ["", "cluster_size=4k", "data_file=data.raw"] {
        let image = Start::new(options, MIB).then(full).load();
        let mut ledger = Ledger::new(&image, &Machine::forgetful(), WriterOptions::default());
        let pages = |ledger: &Ledger| ledger.files().iter().map(Pages::page_count).sum::<u64>();
        let before = pages(&ledger);
        ledger.shrink(64 * KIB).unwrap();
        let gone = before - pages(&ledger);
        assert!(gone * 4 >= 900, "{options}: {gone} pages of 4 KiB of {before}");
    }
}

#[test]
// M11
fn a_crash_leaves_the_old_size_or_the_new_one() {
    for (number, (name, start)) in kinds().into_iter().enumerate() {
        let image = start.load();
        let size = SIZES[3 + number % 7];
        let change = Change {
            name,
            image: &image,
            options: if number % 2 == 0 { WriterOptions::default() } else { LITTLE },
            before: &|ledger| {
                let mut random = Random::new(mix(seed() ^ size));
                (0..6).for_each(|_| ledger.step(&mut random, 60 * KIB).unwrap());
            },
            act: &|ledger| {
                ledger.shrink(size)?;
                nothing_behind(&ledger.files()).unwrap();
                Ok(())
            },
            again: true,
            missing_flags: false,
        };
        let outcome = change.survives_crashes(STATES);
        println!("{name}: {outcome:?}");
        assert!(outcome.states > 3 && outcome.states > outcome.old, "{name}");
    }
}

#[test]
fn a_failing_call_leaves_a_disk_that_can_be_shrunk_again() {
    for (name, start) in [
        ("4k", with_snapshots(scribbled("cluster_size=4k"))),
        ("512", scribbled("cluster_size=512").then(full)),
        ("extended", with_snapshots(scribbled("extended_l2=on,cluster_size=16k"))),
        ("raw data file", scribbled("data_file=data.raw,data_file_raw=on").then(full)),
    ] {
        let image = start.load();
        let change = Change {
            name,
            image: &image,
            options: LITTLE,
            before: &|ledger| ledger.write(100 * KIB, 50 * KIB).unwrap(),
            act: &|ledger| ledger.shrink(319 * KIB),
            again: true,
            missing_flags: false,
        };
        let outcome = change.survives_faults();
        println!("{name}: {outcome:?}");
        assert!(outcome.poisoned > 3 && outcome.retried > 1, "{name}: {outcome:?}");
    }
}

#[test]
fn an_impossible_shrink_is_refused_before_any_change() {
    let refused = |start: &Start, size: u64| {
        let image = start.load();
        let machine = Machine::honest();
        let ledger = Ledger::new(&image, &machine, WriterOptions::default());
        let error = ledger.writer.shrink(size).unwrap_err();
        assert_eq!((machine.changes(), ledger.writer.size()), (0, image.initial_size));
        (error.kind(), error.to_string())
    };
    assert_eq!(refused(&scribbled(""), MIB + 1).0, ErrorKind::Usage);
    assert_eq!(refused(&scribbled(""), u64::MAX).0, ErrorKind::TooLarge);
    let bitmap = |scratch: &Scratch| drop(scratch.img(&format!("bitmap --add --disable {IMAGE} one")));
    let (kind, sentence) = refused(&scribbled("").then(bitmap), KIB);
    assert!(kind == ErrorKind::Unsupported && sentence.contains("bitmap"), "{sentence}");
    let (kind, sentence) = refused(&with_snapshots(scribbled("compat=0.10")), KIB);
    assert!(kind == ErrorKind::Unsupported && sentence.contains("version 2"), "{sentence}");
}

#[test]
fn a_raw_file_is_truncated() {
    let machine = Machine::honest();
    let mut pages = Pages::default();
    pages.write(0, &[7; 9000]);
    let disk = SimDisk::new(&machine, 0, pages);
    let writer = Writer::raw("disk.raw", std::sync::Arc::clone(&disk) as _).unwrap();
    writer.shrink(writer.size()).unwrap();
    assert_eq!((disk.snapshot().len(), writer.size()), (9000, 9216), "its own size changes nothing");
    writer.shrink(5000).unwrap();
    assert_eq!((disk.snapshot().len(), writer.size(), writer.is_dirty()), (5120, 5120, false));
    assert_eq!(writer.shrink(5121).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(writer.shrink(u64::MAX).unwrap_err().kind(), ErrorKind::TooLarge);
    writer.grow(6000).unwrap();
    let mut have = vec![1; 6144];
    writer.read_at(0, &mut have).unwrap();
    assert!(have[..5120] == [7; 5120] && have[5120..] == [0; 1024]);
    assert_eq!(writer.take_snapshot(&new_snapshot("one")).unwrap_err().kind(), ErrorKind::Unsupported);
}
