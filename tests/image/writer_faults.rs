//! Failing storage: for every failing call, nothing panics, the error is reported, acknowledged data can be
//! read, flushed data is there after reopening, and no image is corrupt.
//!
//! Each workload runs once to count its calls, then once for each of them with that call failing.

use chainfs::error::{ErrorKind, Result};
use chainfs::fs::errno;
use chainfs::image::check::check;
use chainfs::image::write::{self, WriterOptions, Zeroing};
use chainfs::units::{BlockStatus, Run};
use rustix::io::Errno;
use support::sim::crash::random_crash;
use support::sim::disk::{Calls, Hit};
use support::sim::guest::open_writer;
use support::sim::images::compressible;
use support::sim::judge::State;
use support::sim::{
    Failure, Fault, Guest, IMAGE, Judge, KIB, MIB, Machine, Random, SimDisk, Start, StartImage, is_long, mix,
    seed,
};

/// Runs of each sweep where not all are made.
const RUNS: u64 = 85;

/// One thing that a guest asks for.
#[derive(Clone, Copy, Debug)]
enum Step {
    Write(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Allocate(u64, u64),
    Grow(u64),
    Snapshot,
    Fill(u64, u64),
    Flush,
    Close,
}

use Step::{Allocate, Close, Discard, Fill, Flush, Grow, Snapshot, Write, Zero};

impl Step {
    fn take(self, guest: &Guest) -> Result<()> {
        match self {
            Write(at, len) => guest.try_write(at, len),
            Zero(at, len) => guest.try_zero(at, len, Zeroing::Keep),
            Discard(at, len) => guest.try_zero(at, len, Zeroing::Unmap),
            Allocate(at, len) => guest.try_allocate(at, len),
            Grow(size) => guest.try_grow(size),
            Snapshot => guest.try_snapshot("taken"),
            Fill(at, len) => guest.try_fill(at, len, &All),
            Flush => guest.try_flush(),
            Close => guest.try_close(),
        }
    }
}

/// The result of a sweep.
#[derive(Default)]
struct Sweep {
    runs: u64,
    poisoned: u64,
    usable: u64,
}

/// Fails each call of the steps, one run for each.
fn sweep(name: &str, start: &Start, options: WriterOptions, steps: &[Step]) {
    let image = start.load();
    let machine = Machine::honest();
    let guest = Guest::new(&machine, &image, options);
    let first = (machine.changes(), machine.reads());
    for step in steps {
        step.take(&guest).unwrap_or_else(|error| panic!("{name}, without a fault: {step:?}: {error}"));
    }
    let last = (machine.changes(), machine.reads());
    guest.verify().unwrap_or_else(|sentence| panic!("{name}, without a fault: {sentence}"));
    let mut random = Random::new(mix(seed()));
    let mut total = Sweep::default();
    for (calls, from, to) in [(Calls::Changes, first.0, last.0), (Calls::Reads, first.1, last.1)] {
        let combinations = (to - from) * 8;
        for number in from..to {
            for variant in 0..8 {
                if !is_long() && random.next() % combinations > RUNS {
                    continue;
                }
                let failure = if calls == Calls::Reads { Failure::Io } else { Failure::ALL[variant % 4] };
                let fault = Fault { calls, number, failure, lasting: variant >= 4 };
                one_run(name, &image, options, steps, fault, &mut total);
            }
        }
    }
    println!(
        "{name}: {} changes, {} reads, {} runs, poisoned {}, usable {}",
        last.0 - first.0,
        last.1 - first.1,
        total.runs,
        total.poisoned,
        total.usable
    );
}

fn one_run(
    name: &str,
    image: &StartImage,
    options: WriterOptions,
    steps: &[Step],
    fault: Fault,
    total: &mut Sweep,
) {
    let machine = Machine::honest();
    let guest = Guest::new(&machine, image, options);
    machine.arm(Some(fault));
    let mut said = Vec::new();
    let complain = |what: &str, said: &[String]| -> ! {
        panic!("{name}: {fault:?} hit {:?}: {what}\nsaid: {said:#?}", machine.hit());
    };
    let mut done = 0;
    for step in steps {
        if let Err(error) = step.take(&guest) {
            said.push(format!("{step:?}: {error}"));
            let poison = guest.writer().poison();
            let expected = if poison.is_some() { ErrorKind::Poisoned } else { fault.failure.kind() };
            if error.kind() != expected {
                complain(&format!("a {:?} instead of {expected:?}", error.kind()), &said);
            }
            break;
        }
        done += 1;
    }
    let hit = machine.hit();
    if hit.is_none() {
        complain("the call never came", &said);
    }
    if said.is_empty() {
        complain("nobody heard of it", &said);
    }
    machine.arm(None);
    if let Err(sentence) = guest.verify() {
        complain(&format!("what was acknowledged cannot be read: {sentence}"), &said);
    }
    if guest.writer().poison().is_some() {
        total.poisoned += 1;
        stays_poisoned(&guest).unwrap_or_else(|sentence| complain(&sentence, &said));
    } else {
        total.usable += 1;
        if hit == Some(Hit::Sync) {
            complain("a sync failed, and the writer goes on", &said);
        }
        for step in steps[done..].iter().copied().chain([Write(0, 512), Flush, Close]) {
            if let Err(error) = step.take(&guest) {
                complain(&format!("the fault is over, yet {step:?}: {error}"), &said);
            }
        }
        if let Err(sentence) = guest.verify() {
            complain(&format!("after going on: {sentence}"), &said);
        }
        let leaks = |pages| check(pages, IMAGE).map_or(u64::MAX, |report| report.leaks);
        if leaks(&guest.files()[0]) > leaks(&image.files[0]) {
            complain("clusters have leaked", &said);
        }
    }
    total.runs += 1;
    guest.abandon();
    let tape = machine.tape();
    let history = guest.history();
    let judge = Judge::new(image, &history, options);
    for kind in 0..3 {
        let files = if kind == 0 {
            guest.files()
        } else {
            random_crash(&tape, &image.files, mix(fault.number) + kind)
        };
        let state = State { files, cut: usize::MAX, seed: kind };
        if let Err(sentence) = judge.judge(&state) {
            let kept = judge.keep(name, &state.files);
            complain(&format!("opened again (crash {kind}): {sentence}\n{kept}"), &said);
        }
    }
}

/// Writes and flushes fail with EIO, reads go on, and the files stay as they are.
fn stays_poisoned(guest: &Guest) -> std::result::Result<(), String> {
    let before = guest.machine.changes();
    for step in [Write(0, 512), Flush, Zero(0, 4096), Discard(0, 4096), Allocate(0, 512), Flush, Close] {
        match step.take(guest) {
            Ok(()) if matches!(step, Allocate(..)) => {}
            Ok(()) => return Err(format!("poisoned, yet {step:?} succeeds")),
            Err(error) if error.kind() == ErrorKind::Poisoned => assert_eq!(errno(error.kind()), Errno::IO),
            Err(error) => return Err(format!("poisoned, yet {step:?} says {:?}: {error}", error.kind())),
        }
    }
    if guest.machine.changes() != before {
        return Err("poisoned, yet something was written".into());
    }
    guest.verify()
}

fn small_cache() -> WriterOptions {
    WriterOptions { cache: 64 << 10 }
}

#[test]
fn copy_on_write() {
    sweep(
        "copy on write",
        &Start::over(2 * MIB, "", 2 * MIB),
        WriterOptions::default(),
        &[
            Write(512, 1024),
            Write(96 * KIB, 100 * KIB),
            Flush,
            Write(MIB, 512),
            Zero(MIB + 512, 70 * KIB),
            Discard(64 * KIB, 128 * KIB),
            Flush,
            Allocate(1500 * KIB, 64 * KIB),
            Write(70 * KIB, 5 * KIB),
            Close,
        ],
    );
}

#[test]
fn taking_internal_snapshots() {
    for (name, options, longest) in
        [("snapshots", "cluster_size=4k", 60 * KIB), ("small", "cluster_size=512", 9 * KIB)]
    {
        sweep(
            name,
            &Start::over(MIB, options, MIB),
            small_cache(),
            &[
                Write(512, longest),
                Snapshot,
                Write(64 * KIB, longest),
                Discard(0, 8 * KIB),
                Snapshot,
                Write(3 * KIB, longest),
                Flush,
                Close,
            ],
        );
    }
}

/// Every unallocated range gets the visible bytes.
struct All;

impl write::Fill for All {
    fn wanted(&self, _: u64, len: u64) -> Result<Run<Option<BlockStatus>>> {
        Ok(Run::new(Some(BlockStatus::Data), len))
    }
}

#[test]
fn filling_from_below() {
    for (name, options) in
        [("fill", "cluster_size=4k"), ("fill subclusters", "extended_l2=on,cluster_size=16k")]
    {
        let start = Start::over(MIB, options, 512 * KIB).then(|scratch| {
            scratch.io(IMAGE, &["write -q -P 8 30k 3k"]);
            scratch.img(&format!("snapshot -c one {IMAGE}"));
            scratch.io(IMAGE, &["write -q -P 9 8k 2k"]);
        });
        sweep(
            name,
            &start,
            small_cache(),
            &[
                Write(65 * KIB, 3 * KIB),
                Fill(0, 100 * KIB),
                Write(30 * KIB, KIB),
                Flush,
                Snapshot,
                Write(200 * KIB, KIB),
                Fill(50 * KIB, 300 * KIB),
                Close,
            ],
        );
    }
}

#[test]
fn tables_that_grow() {
    let start = Start::scribbled("cluster_size=512,refcount_bits=64", MIB);
    sweep(
        "growing tables",
        &start,
        small_cache(),
        &[
            Write(3 * KIB, 40 * KIB),
            Flush,
            Grow(8 * MIB),
            Write(7 * MIB, 900 * KIB),
            Flush,
            Write(2 * MIB, MIB),
            Discard(2 * MIB, 512 * KIB),
            Flush,
            Write(MIB, 64 * KIB),
            Close,
        ],
    );
}

#[test]
fn growing_over_a_longer_backing_image() {
    sweep(
        "grow over backing",
        &Start::over(2 * MIB, "cluster_size=4k", MIB + 512),
        WriterOptions::default(),
        &[
            Write(MIB - 512, KIB),
            Grow(3 * MIB),
            Write(2 * MIB - 512, KIB),
            Flush,
            Grow(8 * MIB + 512),
            Write(8 * MIB, 512),
            Close,
        ],
    );
}

#[test]
fn discarding_and_using_again() {
    sweep(
        "discard",
        &Start::scribbled("cluster_size=4k", MIB),
        WriterOptions::default(),
        &[
            Write(0, 128 * KIB),
            Flush,
            Discard(0, 64 * KIB),
            Write(200 * KIB, 40 * KIB),
            Flush,
            Write(300 * KIB, 60 * KIB),
            Discard(0, MIB),
            Flush,
            Write(0, 64 * KIB),
            Zero(4 * KIB, 9 * KIB),
            Close,
        ],
    );
}

#[test]
fn internal_snapshots() {
    let start = Start::scribbled("cluster_size=1k", MIB).then(|scratch| {
        scratch.img(&format!("snapshot -c one {IMAGE}"));
    });
    sweep(
        "snapshots",
        &start,
        WriterOptions::default(),
        &[
            Write(512, 10 * KIB),
            Flush,
            Zero(64 * KIB, 20 * KIB),
            Discard(320 * KIB, 80 * KIB),
            Write(330 * KIB, KIB),
            Flush,
            Write(512, 3 * KIB),
            Close,
        ],
    );
}

#[test]
fn subclusters() {
    let start = Start::over(MIB, "extended_l2=on,cluster_size=16k", 2 * MIB);
    sweep(
        "extended",
        &start,
        WriterOptions::default(),
        &[
            Write(512, 512),
            Write(20 * KIB, 30 * KIB),
            Flush,
            Discard(21 * KIB, 2 * KIB),
            Zero(0, 8 * KIB),
            Write(300 * KIB + 512, KIB),
            Flush,
            Write(22 * KIB, 512),
            Close,
        ],
    );
}

#[test]
fn compressed_clusters() {
    let start = Start::made(|scratch| {
        compressible(&scratch.path("source.raw"), 200 * KIB);
        scratch.img(&format!("convert -c -f raw -O qcow2 -o cluster_size=4k source.raw {IMAGE}"));
    });
    sweep(
        "compressed",
        &start,
        WriterOptions::default(),
        &[
            Write(512, 512),
            Write(8 * KIB, 4 * KIB),
            Discard(20 * KIB, 12 * KIB),
            Flush,
            Write(22 * KIB, 9 * KIB),
            Zero(40 * KIB + 512, 8 * KIB),
            Close,
        ],
    );
}

#[test]
fn external_data_files() {
    for options in ["data_file=data.raw,cluster_size=4k", "data_file=data.raw,data_file_raw=on"] {
        sweep(
            "data file",
            &Start::scribbled(options, MIB),
            WriterOptions::default(),
            &[
                Write(512, 10 * KIB),
                Flush,
                Zero(64 * KIB, 70 * KIB),
                Discard(0, 128 * KIB),
                Write(66 * KIB, KIB),
                Flush,
                Write(500 * KIB, 3 * KIB),
                Close,
            ],
        );
    }
}

#[test]
fn bitmaps_and_version_2() {
    let bitmaps =
        Start::scribbled("", MIB).then(|scratch| drop(scratch.img(&format!("bitmap --add {IMAGE} one"))));
    let steps = [Write(100 * KIB, 70 * KIB), Flush, Discard(64 * KIB, 128 * KIB), Write(0, KIB), Close];
    sweep("bitmaps", &bitmaps, WriterOptions::default(), &steps);
    let old = Start::over(MIB, "compat=0.10,cluster_size=4k", MIB);
    sweep("version 2", &old, WriterOptions::default(), &steps);
}

#[test]
fn an_image_that_cannot_be_read_is_not_opened() {
    let image = Start::scribbled("cluster_size=512", MIB)
        .then(|scratch| drop(scratch.img(&format!("snapshot -c one {IMAGE}"))))
        .load();
    let machine = Machine::honest();
    drop(Guest::new(&machine, &image, WriterOptions::default()));
    for number in 0..machine.reads() {
        let machine = Machine::honest();
        let disks: Vec<_> =
            image.files.iter().map(|pages| SimDisk::new(&machine, 0, pages.clone())).collect();
        machine.arm(Some(Fault { calls: Calls::Reads, number, failure: Failure::Io, lasting: false }));
        let opened = open_writer(&disks, image.backing.as_ref(), WriterOptions::default());
        let error = opened.err().unwrap_or_else(|| panic!("opened, though read {number} failed"));
        assert_eq!((error.kind(), machine.changes()), (ErrorKind::Io, 0), "{error}");
    }
}

/// A file system that is full, at each degree of fullness.
#[test]
fn a_full_file_system_fails_only_the_write() {
    for options in ["", "cluster_size=4k", "cluster_size=512", "extended_l2=on,cluster_size=16k"] {
        let image = Start::over(MIB, options, 4 * MIB).load();
        for free in (0..60).chain([90, 130, 200, 300]) {
            let machine = Machine::honest();
            let guest = Guest::new(&machine, &image, WriterOptions::default());
            machine.set_free(Some(free));
            let mut refused = 0;
            for turn in 0..24u64 {
                match guest.try_write(turn * 170 * KIB, 512 + turn * KIB) {
                    Ok(()) => {}
                    Err(error) if error.kind() == ErrorKind::NoSpace => refused += 1,
                    Err(error) => panic!("{options}, {free} pages free: {error}"),
                }
            }
            let poison = guest.writer().poison();
            assert!(poison.is_none(), "{options}, {free} pages free: {}", poison.unwrap());
            guest.verify().unwrap();
            guest
                .try_flush()
                .unwrap_or_else(|error| panic!("{options}, {free} pages free, {refused} refused: {error}"));
            machine.set_free(None);
            for turn in 0..24u64 {
                guest.write(turn * 170 * KIB, 512 + turn * KIB);
            }
            guest.close();
            guest.verify().unwrap();
            guest.abandon();
            let files = guest.files();
            let history = guest.history();
            let judge = Judge::new(&image, &history, WriterOptions::default());
            let state = State { files, cut: usize::MAX, seed: free };
            judge.judge(&state).unwrap_or_else(|sentence| panic!("{options}, {free} pages free: {sentence}"));
            let report = check(&state.files[0], IMAGE).unwrap();
            assert_eq!(report.leaks, 0, "{options}, {free} pages free, {refused} writes refused\n{report}");
        }
    }
}
