//! Internal snapshots deleted and applied by the writer: the others and the disk keep their bytes, wherever a
//! crash comes and whatever call fails, and the result equals QEMU's.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use chainfs::error::ErrorKind;
use chainfs::image::check::check;
use chainfs::image::write::{Writer, WriterOptions};
use support::oracle::Scratch;
use support::sim::change::Change;
use support::sim::guest::{new_snapshot, open_writer};
use support::sim::images::{Opened, compressible};
use support::sim::ledger::{Ledger, Tolerance, Views, judge, judge_by_qemu};
use support::sim::value::pattern_range;
use support::sim::{
    IMAGE, KIB, MIB, Machine, Pages, Random, SECTOR, SimDisk, Start, StartImage, in_turn, is_long, mix, seed,
};

/// States of each run that are judged where not all are.
const STATES: usize = 20;
const LITTLE: WriterOptions = WriterOptions { cache: 32 << 10 };

fn with_snapshots(start: Start, resize: bool) -> Start {
    start.then(move |scratch| {
        scratch.img(&format!("snapshot -c first {IMAGE}"));
        scratch.io(IMAGE, &["write -q -P 99 0 100k", "discard -q 300k 64k", "write -q -z 128k 64k"]);
        if resize {
            scratch.img(&format!("resize -q {IMAGE} +70k"));
        }
        scratch.img(&format!("snapshot -c second {IMAGE}"));
        scratch.io(IMAGE, &["write -q -P 98 50k 9k", "write -q -P 97 400k 9k"]);
        if resize {
            scratch.img(&format!("resize -q --shrink {IMAGE} 450k"));
        }
        scratch.img(&format!("snapshot -c third {IMAGE}"));
        scratch.io(IMAGE, &["write -q -P 96 200k 50k"]);
    })
}

fn compressed(options: &'static str) -> Start {
    let start = Start::made(move |scratch| {
        compressible(&scratch.path("source.raw"), 512 * KIB);
        scratch.img(&format!("convert -c -f raw -O qcow2 -o {options} source.raw {IMAGE}"));
    });
    with_snapshots(start, true)
}

/// An internal snapshot with the state of a machine, taken by QEMU.
fn save_machine(scratch: &Scratch) {
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-nodefaults", "-nographic", "-S", "-machine", "none", "-monitor", "stdio", "-drive"])
        .arg(format!("if=none,id=d,format=qcow2,file={}", scratch.path(IMAGE)))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("qemu-system-x86_64 is needed: install qemu-system-x86");
    qemu.stdin.take().unwrap().write_all(b"savevm machine\nquit\n").unwrap();
    assert!(qemu.wait().unwrap().success());
    assert!(scratch.img(&format!("snapshot -l {IMAGE}")).contains("machine"));
}

fn with_machine(options: &str) -> Start {
    with_snapshots(Start::scribbled(options, 512 * KIB), false).then(|scratch| {
        save_machine(scratch);
        scratch.io(IMAGE, &["write -q -P 95 20k 30k"]);
    })
}

/// Kinds of image, each with several snapshots, and the length of the longest write.
fn starts() -> Vec<(&'static str, Start, u64)> {
    let scribbled = |options: &str| Start::scribbled(options, 512 * KIB);
    vec![
        ("512", with_snapshots(scribbled("cluster_size=512"), true), 24 * KIB),
        ("4k over", with_snapshots(Start::over(500 * KIB, "cluster_size=4k", 512 * KIB), true), 60 * KIB),
        ("64k", with_snapshots(scribbled(""), true), 200 * KIB),
        ("2M", with_snapshots(Start::scribbled("cluster_size=2M", 5 * MIB), false), 3 * MIB),
        ("version 2", with_snapshots(scribbled("compat=0.10,cluster_size=4k"), false), 60 * KIB),
        ("version 2, 512", with_snapshots(scribbled("compat=0.10,cluster_size=512"), false), 24 * KIB),
        ("extended", with_snapshots(scribbled("extended_l2=on,cluster_size=16k"), true), 90 * KIB),
        (
            "extended over",
            with_snapshots(Start::over(500 * KIB, "extended_l2=on,cluster_size=32k", 512 * KIB), true),
            90 * KIB,
        ),
        ("4-bit counts", with_snapshots(scribbled("refcount_bits=4,cluster_size=1k"), true), 40 * KIB),
        ("64-bit counts", with_snapshots(scribbled("refcount_bits=64,cluster_size=512"), true), 24 * KIB),
        ("compressed", compressed("cluster_size=4k"), 40 * KIB),
        ("zstd", compressed("compression_type=zstd"), 100 * KIB),
        ("machine", with_machine("cluster_size=4k"), 40 * KIB),
        ("machine, 512", with_machine("cluster_size=512"), 24 * KIB),
    ]
}

/// The same, made once for all tests; each of them has them in directories of its own.
fn kinds() -> Vec<(&'static str, StartImage, u64)> {
    static MADE: LazyLock<Vec<(&str, StartImage, u64)>> = LazyLock::new(|| {
        starts().into_iter().map(|(name, start, longest)| (name, start.load().kept(), longest)).collect()
    });
    MADE.iter().map(|(name, image, longest)| (*name, image.elsewhere(), *longest)).collect()
}

/// Rounds for the kind of this number where not all four are: both kinds of options, and some kinds with
/// each.
fn rounds(number: usize) -> Vec<u64> {
    if is_long() { (0..4).collect() } else { (0..2).map(|round| (number as u64 + round) % 4).collect() }
}

/// The files are sound, without leaks, and show the expected bytes; also by QEMU if there is time for that.
fn judge_between(name: &str, image: &StartImage, ledger: &Ledger) {
    ledger.verify().unwrap_or_else(|sentence| panic!("{name}: {sentence}"));
    ledger.writer.close().unwrap();
    judge(image, &ledger.files(), &[&ledger.views], Tolerance::default()).unwrap_or_else(|sentence| {
        ledger.files()[0].save(std::env::temp_dir().join("chainfs-changes-end.qcow2"));
        panic!("{name}, at the end: {sentence}")
    });
    if is_long() {
        judge_by_qemu(image, &ledger.files(), &ledger.views);
    }
}

/// The same, always by QEMU as well.
fn judge_end(name: &str, image: &StartImage, ledger: &Ledger) {
    judge_between(name, image, ledger);
    if !is_long() {
        judge_by_qemu(image, &ledger.files(), &ledger.views);
    }
}

#[test]
fn deleting_a_snapshot_changes_no_other_view() {
    for (number, (name, image, longest)) in in_turn(kinds(), 1).enumerate() {
        for round in rounds(number) {
            let mut random = Random::new(mix(seed() ^ round << 8 ^ longest));
            let options = if round % 2 == 0 { WriterOptions::default() } else { LITTLE };
            let mut ledger = Ledger::new(&image, &Machine::forgetful(), options);
            for _ in 0..round * 5 {
                ledger.step(&mut random, longest).unwrap();
            }
            while !ledger.views.snapshots.is_empty() {
                let index = random.below(ledger.views.snapshots.len());
                ledger.delete(index).unwrap_or_else(|error| panic!("{name}, {index}: {error}"));
                judge_between(name, &image, &ledger);
                for _ in 0..round * 4 {
                    ledger.step(&mut random, longest).unwrap();
                }
            }
            // As if there had never been one: even version 2 grows again, and all is written in place.
            let size = ledger.views.disk.len() as u64 + 100 * KIB;
            ledger.grow(size).unwrap_or_else(|error| panic!("{name}: {error}"));
            ledger.write(0, size).unwrap();
            judge_end(name, &image, &ledger);
            let (len, again) = (ledger.files()[0].len(), ledger.listed().len());
            ledger.write(0, size).unwrap();
            ledger.writer.close().unwrap();
            assert_eq!((ledger.files()[0].len(), again), (len, 0), "{name}: written elsewhere");
            ledger.take("new").unwrap();
            judge_end(name, &image, &ledger);
        }
    }
}

/// QEMU's own deletions and applications of a twin leave the same views, as many clusters in use, and the
/// same snapshots.
#[test]
fn qemu_leaves_the_same_image() {
    for (name, image, _) in in_turn(kinds(), 0) {
        let names: Vec<String> = Opened::new(&image.files)
            .unwrap()
            .snapshots
            .iter()
            .map(|snapshot| String::from_utf8(snapshot.name.clone()).unwrap())
            .collect();
        for (index, one) in names.iter().enumerate() {
            for verb in ["-d", "-a"] {
                let scratch = &image.scratch;
                image.files[0].save(scratch.path(IMAGE));
                scratch.tool("qemu-img", &["snapshot", verb, one, IMAGE]);
                let theirs = vec![Pages::load(scratch.path(IMAGE))];
                let mut ledger = Ledger::new(&image, &Machine::forgetful(), WriterOptions::default());
                let done = if verb == "-d" { ledger.delete(index) } else { ledger.apply(index) };
                done.unwrap_or_else(|error| panic!("{name} {verb} {one}: {error}"));
                judge_end(name, &image, &ledger);
                let ours = ledger.files();
                let views = |files: &[Pages]| Views::read(&image, &Opened::new(files).unwrap()).unwrap();
                assert_eq!(views(&theirs).differ(&views(&ours)), None, "{name} {verb} {one}");
                let listed = |files: &[Pages]| {
                    let snapshots = Opened::new(files).unwrap().snapshots.into_iter();
                    snapshots
                        .map(|one| (one.id, one.name, one.vm_state_size, one.virtual_size))
                        .collect::<Vec<_>>()
                };
                assert_eq!(listed(&theirs), listed(&ours), "{name} {verb} {one}");
                let in_use = |files: &[Pages]| check(&files[0], IMAGE).unwrap().allocated_clusters;
                let (theirs, ours) = (in_use(&theirs), in_use(&ours));
                // Applying, QEMU takes the state of a machine along: its tables are no longer shared.
                let is_right = if verb == "-a" && one == "machine" { theirs > ours } else { theirs == ours };
                assert!(is_right, "{name} {verb} {one}: {ours} clusters, QEMU has {theirs}");
            }
        }
    }
}

#[test]
fn an_applied_snapshot_is_shown_and_writable() {
    for (number, (name, image, longest)) in in_turn(kinds(), 1).enumerate() {
        for round in rounds(number) {
            let mut random = Random::new(mix(seed() ^ round << 8 ^ longest));
            let options = if round % 2 == 0 { WriterOptions::default() } else { LITTLE };
            let mut ledger = Ledger::new(&image, &Machine::forgetful(), options);
            for _ in 0..5 {
                for _ in 0..round * 4 {
                    ledger.step(&mut random, longest).unwrap();
                }
                ledger.apply(random.below(ledger.views.snapshots.len())).unwrap();
                judge_between(name, &image, &ledger);
            }
            judge_end(name, &image, &ledger);
        }
    }
}

#[test]
fn any_operations_in_any_order() {
    let operations = if is_long() { 2000 } else { 60 };
    for (name, image, longest) in in_turn(kinds(), 0) {
        for round in 0..3u64 {
            let mut random = Random::new(mix(seed() ^ round << 20 ^ longest ^ name.len() as u64));
            let options = if round == 1 { LITTLE } else { WriterOptions::default() };
            let mut ledger = Ledger::new(&image, &Machine::forgetful(), options);
            for number in 0..operations {
                ledger
                    .any_step(&mut random, longest)
                    .unwrap_or_else(|error| panic!("{name}, {number}: {error}"));
                if number % 25 == 0 {
                    ledger.writer.close().unwrap();
                    let end = judge(&image, &ledger.files(), &[&ledger.views], Tolerance::default());
                    end.unwrap_or_else(|sentence| {
                        panic!("{name}, round {round}, after {number}: {sentence}")
                    });
                }
            }
            judge_end(name, &image, &ledger);
        }
    }
}

fn after_some_writes(random: u64, longest: u64) -> impl Fn(&mut Ledger) {
    move |ledger| {
        let mut random = Random::new(random);
        for _ in 0..6 {
            ledger.step(&mut random, longest).unwrap();
        }
    }
}

/// Crashes a change of every kind of image; the change gets the index of one of its snapshots.
fn cut_everywhere(
    act: &dyn Fn(&mut Ledger, usize) -> chainfs::error::Result<()>,
    again: bool,
    missing_flags: bool,
    limit: usize,
) {
    for (number, (name, image, longest)) in in_turn(kinds(), 1).enumerate() {
        let index = number % image.snapshots.len();
        let change = Change {
            name,
            image: &image,
            options: if number % 2 == 0 { WriterOptions::default() } else { LITTLE },
            before: &after_some_writes(mix(seed() ^ longest), longest),
            act: &|ledger| act(ledger, index),
            again,
            missing_flags,
        };
        let outcome = change.survives_crashes(limit);
        println!("{name}: {outcome:?}");
        assert!(outcome.old > 0 && outcome.states > outcome.old, "{name}");
    }
}

#[test]
// M1
fn a_crash_leaves_the_snapshot_or_none() {
    cut_everywhere(&Ledger::delete, false, true, STATES);
}

#[test]
fn a_crash_while_deleting_the_last_snapshot_leaves_it_or_none() {
    let (mut states, mut old) = (0, 0);
    for (name, image, longest) in kinds() {
        let change = Change {
            name,
            image: &image,
            options: LITTLE,
            before: &|ledger| {
                while ledger.views.snapshots.len() > 1 {
                    ledger.delete(0).unwrap();
                }
                after_some_writes(mix(seed()), longest)(ledger);
            },
            act: &|ledger| ledger.delete(0),
            again: false,
            missing_flags: true,
        };
        let outcome = change.survives_crashes(STATES);
        println!("{name}: {outcome:?}");
        (states, old) = (states + outcome.states, old + outcome.old);
    }
    assert!(old > 5 && states > 10 * old, "{states} states, {old} as before");
}

#[test]
fn a_crash_leaves_the_disk_or_the_applied_snapshot() {
    cut_everywhere(&Ledger::apply, true, false, STATES);
}

#[test]
fn a_crash_leaves_the_disk_or_the_applied_and_the_saved_snapshot() {
    cut_everywhere(&|ledger, index| ledger.apply_and_save(index, "then"), false, false, STATES / 2);
}

#[test]
fn a_saved_disk_is_an_ordinary_snapshot() {
    for (name, image, longest) in in_turn(kinds(), 1) {
        let mut random = Random::new(mix(seed() ^ longest));
        let mut ledger = Ledger::new(&image, &Machine::forgetful(), LITTLE);
        for round in 0..4 {
            for _ in 0..3 {
                ledger.step(&mut random, longest).unwrap();
            }
            ledger
                .apply_and_save(random.below(ledger.views.snapshots.len()), &format!("then {round}"))
                .unwrap();
            judge_between(name, &image, &ledger);
            for _ in 0..3 {
                ledger.step(&mut random, longest).unwrap();
            }
            ledger.delete(random.below(ledger.views.snapshots.len())).unwrap();
            judge_end(name, &image, &ledger);
        }
    }
}

#[test]
fn a_failing_call_leaves_the_old_or_the_new_state() {
    let start = |options| with_snapshots(Start::scribbled(options, 512 * KIB), true);
    for (name, start) in
        [("4k", start("cluster_size=4k")), ("extended", start("extended_l2=on,cluster_size=16k"))]
    {
        let image = start.load();
        for (apply, save) in [(false, false), (true, false), (true, true)] {
            let change = Change {
                name,
                image: &image,
                options: LITTLE,
                before: &after_some_writes(mix(seed()), 50 * KIB),
                act: &|ledger| match (apply, save) {
                    (false, _) => ledger.delete(1),
                    (true, false) => ledger.apply(1),
                    (true, true) => ledger.apply_and_save(1, "then"),
                },
                again: false,
                missing_flags: !apply,
            };
            let outcome = change.survives_faults();
            println!("{name}, apply {apply}, save {save}: {outcome:?}");
            assert!(
                outcome.poisoned > 2 && outcome.retried > 3,
                "{name}, apply {apply}, save {save}: {outcome:?}"
            );
        }
    }
}

/// Threads write their own sectors all over the disk while snapshots are taken and deleted: each reads back
/// its writes, and nothing is lost, shared or leaked.
#[test]
fn reads_and_writes_continue_during_snapshot_changes() {
    const WRITERS: u64 = 3;
    for (name, start) in [
        ("512", with_snapshots(Start::scribbled("cluster_size=512", 512 * KIB), false)),
        ("64k", with_snapshots(Start::scribbled("", 512 * KIB), false)),
        (
            "extended",
            with_snapshots(Start::over(500 * KIB, "extended_l2=on,cluster_size=16k", 512 * KIB), false),
        ),
    ] {
        let image = start.load();
        let machine = Machine::new(support::sim::SyncRule::Honest, true, true).forget();
        let mut ledger = Ledger::new(&image, &machine, LITTLE);
        let writer = &*ledger.writer;
        let sectors = image.initial_size / SECTOR;
        let (done, turns) = (AtomicBool::new(false), AtomicU64::new(0));
        let written = thread::scope(|scope| {
            let work = |number: u64| {
                let mut random = Random::new(mix(seed() ^ number));
                let mut mine = vec![0; sectors as usize];
                for tag in 1_000_000 * (number + 1).. {
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                    let sector = random.next() % (sectors / WRITERS) * WRITERS + number;
                    writer.write_at(sector * SECTOR, &pattern_range(tag, sector * SECTOR, SECTOR)).unwrap();
                    mine[sector as usize] = tag;
                    let sector = random.next() % (sectors / WRITERS) * WRITERS + number;
                    let mut have = vec![0; SECTOR as usize];
                    writer.read_at(sector * SECTOR, &mut have).unwrap();
                    let tag = mine[sector as usize];
                    assert!(
                        tag == 0 || have == pattern_range(tag, sector * SECTOR, SECTOR),
                        "{name}: {sector:#x}"
                    );
                    if random.once_in(16) {
                        writer.flush().unwrap();
                    }
                    turns.fetch_add(1, Ordering::Relaxed);
                }
                mine
            };
            let threads: Vec<_> = (0..WRITERS).map(|number| scope.spawn(move || work(number))).collect();
            let mut random = Random::new(mix(seed()));
            for number in 0..if is_long() { 200 } else { 10 } {
                let start = turns.load(Ordering::Relaxed);
                while turns.load(Ordering::Relaxed) < start + 20
                    && threads.iter().all(|thread| !thread.is_finished())
                {
                    thread::yield_now();
                }
                let snapshots = writer.snapshots().unwrap();
                if number % 2 == 0 || snapshots.is_empty() {
                    writer.delete_snapshot(&snapshots[random.below(snapshots.len())]).unwrap();
                } else {
                    writer.take_snapshot(&new_snapshot("one more")).unwrap();
                }
            }
            done.store(true, Ordering::Relaxed);
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        for (sector, tag) in
            written.iter().flat_map(|mine| mine.iter().enumerate()).filter(|(_, tag)| **tag != 0)
        {
            let at = sector * SECTOR as usize;
            ledger.views.disk[at..at + SECTOR as usize]
                .copy_from_slice(&pattern_range(*tag, at as u64, SECTOR));
        }
        // The remaining ones, of unknown moments, only have to be sound.
        ledger.writer.close().unwrap();
        ledger.views.snapshots =
            Views::read(&image, &Opened::new(&ledger.files()).unwrap()).unwrap().snapshots;
        judge_end(name, &image, &ledger);
        while !ledger.views.snapshots.is_empty() {
            ledger.delete(0).unwrap();
        }
        judge_end(name, &image, &ledger);
    }
}

#[test]
fn deleted_snapshots_are_stale_and_impossible_ones_refused() {
    let image = with_snapshots(Start::scribbled("cluster_size=4k", 512 * KIB), true).load();
    let machine = Machine::honest();
    let mut ledger = Ledger::new(&image, &machine, WriterOptions::default());
    let listed = ledger.listed();
    ledger.write(0, SECTOR).unwrap();
    ledger.delete(1).unwrap();
    ledger.writer.close().unwrap();
    let changes = machine.changes();
    let renamed = chainfs::format::Snapshot { name: b"other".to_vec(), ..listed[0].clone() };
    for gone in [&listed[1], &renamed] {
        for refused in [ledger.writer.delete_snapshot(gone), ledger.writer.apply_snapshot(gone, None)] {
            assert_eq!((refused.unwrap_err().kind(), machine.changes()), (ErrorKind::Stale, changes));
        }
    }
    let raw = Writer::raw("disk.raw", SimDisk::new(&Machine::honest(), 0, Pages::default())).unwrap();
    let external = Start::scribbled("data_file=data.raw", MIB).load();
    let external = Ledger::new(&external, &Machine::honest(), WriterOptions::default());
    for writer in [&raw, &external.writer] {
        for refused in [writer.delete_snapshot(&listed[0]), writer.apply_snapshot(&listed[0], None)] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
        }
    }
}

#[test]
fn a_snapshot_whose_refcounts_overflow_is_not_applied() {
    let start = Start::scribbled("refcount_bits=2,cluster_size=4k", 512 * KIB);
    let image = start.then(|scratch| drop(scratch.img(&format!("snapshot -c first {IMAGE}")))).load();
    let machine = Machine::honest();
    let mut ledger = Ledger::new(&image, &machine, WriterOptions::default());
    // Each table and cluster of the first one is the second's as well, and after a write the disk has its own
    // tables for what all three share.
    ledger.take("second").unwrap();
    ledger.write(0, SECTOR).unwrap();
    ledger.writer.close().unwrap();
    let changes = machine.changes();
    let refused = ledger.apply(0).unwrap_err();
    assert_eq!((refused.kind(), machine.changes()), (ErrorKind::Unsupported, changes), "{refused}");
    assert!(refused.to_string().contains("refcount_bits=16"), "{refused}");
    judge_end("2 bits", &image, &ledger);
    // With one fewer, a count fits.
    ledger.delete(1).unwrap();
    ledger.apply(0).unwrap();
    judge_end("2 bits", &image, &ledger);
}

#[test]
fn a_disk_with_bitmaps_takes_snapshots_of_its_own_size_only() {
    let bitmap = |scratch: &Scratch| drop(scratch.img(&format!("bitmap --add {IMAGE} one")));
    let image = with_snapshots(Start::scribbled("", 512 * KIB), true).then(bitmap).load();
    let mut ledger = Ledger::new(&image, &Machine::honest(), WriterOptions::default());
    let refused = ledger.apply(0).unwrap_err();
    assert!(refused.kind() == ErrorKind::Unsupported && refused.to_string().contains("bitmap"), "{refused}");
    ledger.apply(2).unwrap();
    ledger.writer.close().unwrap();
    judge(&image, &ledger.files(), &[&ledger.views], Tolerance::default()).unwrap();
}

/// Each of them is a disk that QEMU opens and checks with no rest of another left in memory.
#[test]
fn the_writer_continues_as_if_newly_opened() {
    for (name, image, longest) in in_turn(kinds(), 0) {
        let mut ledger = Ledger::new(&image, &Machine::forgetful(), WriterOptions::default());
        ledger.apply(0).unwrap();
        ledger.delete(0).unwrap();
        ledger.writer.close().unwrap();
        // Its state in memory equals the state read again.
        let afresh = open_writer(&ledger.disks, image.backing.as_ref(), WriterOptions::default()).unwrap();
        let mut random = Random::new(mix(seed()));
        for _ in 0..40 {
            let at = random.next() % ledger.views.disk.len() as u64;
            let max = longest.min(ledger.views.disk.len() as u64 - at);
            assert_eq!(ledger.writer.map(at, max).unwrap(), afresh.map(at, max).unwrap(), "{name}: {at:#x}");
        }
        drop(afresh);
        judge_end(name, &image, &ledger);
    }
}
