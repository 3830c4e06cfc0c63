//! Internal snapshots deleted and applied by the writer: the others and the disk show what they did,
//! wherever a crash cuts and whatever call fails, and QEMU finds what it would have left itself.

mod sim;

use std::io::Write as _;
use std::process::{Command, Stdio};

use chainfs::image::check::check;
use chainfs::image::write::WriterOptions;
use sim::images::{Opened, compressible};
use sim::ledger::{Ledger, Tolerance, Views, judge, judge_by_qemu};
use sim::oracle::Scratch;
use sim::{IMAGE, KIB, MIB, Machine, Pages, Random, Start, StartImage, is_long, mix, seed};

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
fn kinds() -> Vec<(&'static str, Start, u64)> {
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

/// What the files hold is sound, without leaks, for us and for QEMU.
fn judge_end(name: &str, image: &StartImage, ledger: &Ledger) {
    ledger.verify().unwrap_or_else(|sentence| panic!("{name}: {sentence}"));
    ledger.writer.close().unwrap();
    judge(image, &ledger.files(), &[&ledger.views], Tolerance::default()).unwrap_or_else(|sentence| {
        ledger.files()[0].save(std::env::temp_dir().join("chainfs-changes-end.qcow2"));
        panic!("{name}, at the end: {sentence}")
    });
    judge_by_qemu(image, &ledger.files(), &ledger.views);
}

#[test]
fn what_is_deleted_leaves_all_else_and_takes_nothing_along() {
    for (name, start, longest) in kinds() {
        let image = start.load();
        for round in 0..4u64 {
            let mut random = Random::new(mix(seed() ^ round << 8 ^ longest));
            let options = if round % 2 == 0 { WriterOptions::default() } else { LITTLE };
            let mut ledger = Ledger::new(&image, &Machine::forgetful(), options);
            for _ in 0..round * 5 {
                ledger.step(&mut random, longest).unwrap();
            }
            while !ledger.views.snapshots.is_empty() {
                let index = random.below(ledger.views.snapshots.len());
                ledger.delete(index).unwrap_or_else(|error| panic!("{name}, {index}: {error}"));
                judge_end(name, &image, &ledger);
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

/// QEMU's own deletions and applications of a twin leave the same views, as many clusters in use, and the same
/// snapshots.
#[test]
fn qemu_would_have_left_the_same() {
    for (name, start, _) in kinds() {
        let image = start.load();
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
                    snapshots.map(|one| (one.id, one.name, one.vm_state_size, one.virtual_size)).collect::<Vec<_>>()
                };
                assert_eq!(listed(&theirs), listed(&ours), "{name} {verb} {one}");
                let in_use = |files: &[Pages]| check(&files[0], IMAGE).unwrap().allocated_clusters;
                // Applying, QEMU takes the state of a machine along.
                let has_machine = verb == "-a" && one == "machine";
                let is_as_many = in_use(&theirs) == in_use(&ours) || has_machine && in_use(&theirs) > in_use(&ours);
                assert!(is_as_many, "{name} {verb} {one}: {} and {} clusters", in_use(&theirs), in_use(&ours));
            }
        }
    }
}

#[test]
fn what_is_applied_is_what_the_snapshot_shows_and_can_be_written() {
    for (name, start, longest) in kinds() {
        let image = start.load();
        for round in 0..4u64 {
            let mut random = Random::new(mix(seed() ^ round << 8 ^ longest));
            let options = if round % 2 == 0 { WriterOptions::default() } else { LITTLE };
            let mut ledger = Ledger::new(&image, &Machine::forgetful(), options);
            for _ in 0..5 {
                for _ in 0..round * 4 {
                    ledger.step(&mut random, longest).unwrap();
                }
                ledger.apply(random.below(ledger.views.snapshots.len())).unwrap();
                judge_end(name, &image, &ledger);
            }
        }
    }
}

#[test]
fn any_operations_in_any_order() {
    let operations = if is_long() { 2000 } else { 150 };
    for (name, start, longest) in kinds() {
        let image = start.load();
        for round in 0..3u64 {
            let mut random = Random::new(mix(seed() ^ round << 20 ^ longest ^ name.len() as u64));
            let options = if round == 1 { LITTLE } else { WriterOptions::default() };
            let mut ledger = Ledger::new(&image, &Machine::forgetful(), options);
            for number in 0..operations {
                ledger.any_step(&mut random, longest).unwrap_or_else(|error| panic!("{name}, {number}: {error}"));
                if number % 25 == 0 {
                    ledger.writer.close().unwrap();
                    let end = judge(&image, &ledger.files(), &[&ledger.views], Tolerance::default());
                    end.unwrap_or_else(|sentence| panic!("{name}, round {round}, after {number}: {sentence}"));
                }
            }
            judge_end(name, &image, &ledger);
        }
    }
}
