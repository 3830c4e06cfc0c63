//! Internal snapshots taken by the writer: each keeps the disk's bytes, whatever is written afterwards and
//! wherever a crash comes, and QEMU accepts them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use chainfs::error::ErrorKind;
use chainfs::image::write::{Writer, WriterOptions};
use support::oracle::Scratch;
use support::sim::guest::{new_snapshot, open_writer};
use support::sim::images::{Opened, compressible};
use support::sim::value::pattern;
use support::sim::{Guest, IMAGE, KIB, MIB, Machine, Pages, Random, SECTOR, Start, Workload, in_turn, seed};

/// Writes, zeroes and snapshots all over the disk.
fn mixed(guest: &Guest, random: &mut Random, snapshots: usize, operations: usize, longest: u64) {
    let size = guest.size();
    for number in 0..snapshots {
        for _ in 0..operations {
            let at = random.next() % size / SECTOR * SECTOR;
            let len = ((1 + random.next() % (longest / SECTOR)) * SECTOR).min(size - at);
            match random.below(10) {
                0..=5 => guest.write(at, len),
                6 => guest.zero(at, len),
                7 => guest.discard(at, len),
                8 => guest.allocate(at, len),
                _ => guest.flush(),
            }
        }
        guest.snapshot(&format!("ours {number}"));
    }
    guest.write(0, longest);
    guest.discard(size / 2, longest);
    guest.close();
}

fn by_qemu(scratch: &Scratch) {
    scratch.img(&format!("snapshot -c one {IMAGE}"));
    scratch.io(IMAGE, &["write -q -P 9 0 20k"]);
    scratch.img(&format!("snapshot -c two {IMAGE}"));
}

fn compressed(cluster: u64) -> Start {
    Start::made(move |scratch| {
        compressible(&scratch.path("source.raw"), MIB);
        scratch.img(&format!("convert -c -f raw -O qcow2 -o cluster_size={cluster} source.raw {IMAGE}"));
    })
}

/// Kinds of image, with the length of the longest write.
fn kinds() -> Vec<(&'static str, Start, u64)> {
    vec![
        ("64 KiB", Start::scribbled("", 4 * MIB), 200 * KIB),
        ("512 bytes", Start::scribbled("cluster_size=512", 512 * KIB), 8 * KIB),
        ("over a backing image", Start::over(3 * MIB, "cluster_size=4k", 4 * MIB), 64 * KIB),
        ("subclusters", Start::over(MIB, "extended_l2=on,cluster_size=16k", 2 * MIB), 40 * KIB),
        ("version 2", Start::over(MIB, "compat=0.10,cluster_size=4k", 2 * MIB), 40 * KIB),
        ("refcounts of 4 bits", Start::scribbled("refcount_bits=4,cluster_size=1k", MIB), 16 * KIB),
        ("refcounts of 64 bits", Start::scribbled("refcount_bits=64,cluster_size=1k", MIB), 16 * KIB),
        ("compressed", compressed(4 * KIB), 40 * KIB),
        ("beside QEMU's", Start::scribbled("cluster_size=4k", MIB).then(by_qemu), 40 * KIB),
    ]
}

#[test]
fn a_crash_leaves_the_whole_snapshot_or_none() {
    for (name, start, longest) in in_turn(kinds(), 1) {
        Workload::new(name, start).states(350).survives(|guest| {
            mixed(guest, &mut Random::new(seed() ^ longest), 2, 6, longest);
        });
    }
}

#[test]
fn tables_larger_than_the_cache_are_shared() {
    let start = Start::scribbled("cluster_size=512", 2 * MIB);
    Workload::new("little memory", start).cache(16 << 10).states(300).survives(|guest| {
        mixed(guest, &mut Random::new(seed()), 2, 10, 60 * KIB);
    });
}

/// QEMU lists, reads, applies and deletes chainfs' snapshots.
#[test]
// M2
fn qemu_accepts_internal_snapshots_of_chainfs() {
    for (name, start, longest) in in_turn(kinds(), 0) {
        let image = start.load();
        let guest = Guest::new(&Machine::forgetful(), &image, WriterOptions::default());
        let mut expected = image.snapshots.clone();
        let mut random = Random::new(seed());
        for number in 0..3 {
            for _ in 0..8 {
                let at = random.next() % guest.size() / SECTOR * SECTOR;
                guest.write(at, longest.min(guest.size() - at));
            }
            expected.push(guest.content().unwrap());
            guest.snapshot(&format!("ours {number}"));
        }
        guest.write(0, longest);
        let active = guest.content().unwrap();
        guest.close();
        let scratch = &image.scratch;
        guest.files()[0].save(scratch.path(IMAGE));
        let clean = || drop(scratch.img(&format!("check -q {IMAGE}")));
        clean();
        let listed = scratch.img(&format!("snapshot -l {IMAGE}"));
        let snapshots = Opened::new(&guest.files()).unwrap().snapshots;
        assert_eq!(snapshots, guest.writer().snapshots().unwrap());
        for (index, expected) in expected.iter().enumerate() {
            let id = String::from_utf8(snapshots[index].id.clone()).unwrap();
            assert_eq!(id, (index + 1).to_string(), "{name}");
            let line = listed.lines().find(|line| line.starts_with(&id));
            assert!(line.is_some(), "{name}: {listed}");
            let converted = || {
                scratch.img(&format!("convert -f qcow2 -O raw -l snapshot.id={id} {IMAGE} content.raw"));
                Pages::load(scratch.path("content.raw"))
            };
            same(&converted(), expected, &format!("{name}, snapshot {id}"));
        }
        let current = |expected: &Pages, what: &str| {
            scratch.img(&format!("convert -f qcow2 -O raw {IMAGE} content.raw"));
            same(&Pages::load(scratch.path("content.raw")), expected, &format!("{name}: {what}"));
        };
        current(&active, "the active disk");
        let last = expected.len();
        scratch.tool("qemu-img", &["snapshot", "-a", &last.to_string(), IMAGE]);
        clean();
        current(&expected[last - 1], "the last one applied");
        scratch.tool("qemu-img", &["snapshot", "-d", "ours 1", IMAGE]);
        clean();
        scratch.tool("qemu-img", &["snapshot", "-a", &(last - 2).to_string(), IMAGE]);
        clean();
        current(&expected[last - 3], "an older one applied");
        scratch.img(&format!("snapshot -c theirs {IMAGE}"));
        clean();
    }
}

fn same(have: &Pages, want: &Pages, what: &str) {
    assert_eq!(have.len(), want.len(), "{what}");
    for at in (0..want.len()).step_by(64 << 10) {
        let len = (want.len() - at).min(64 << 10);
        assert!(have.bytes(at, len) == want.bytes(at, len), "{what} differs in the 64 KiB from {at:#x}");
    }
}

/// Each thread writes its sectors repeatedly with growing numbers; a snapshot is of one moment, so it
/// contains all writes acknowledged before it, and none begun after it.
#[test]
// M8
fn a_snapshot_shows_one_moment_during_writes() {
    const WRITERS: u64 = 3;
    for options in ["cluster_size=64k", "cluster_size=512", "extended_l2=on,cluster_size=16k"] {
        let size = 512 * KIB;
        let image = Start::over(size, options, size).load();
        let machine = Machine::new(support::sim::SyncRule::Honest, true, true).forget();
        let disks: Vec<_> = image
            .files
            .iter()
            .enumerate()
            .map(|(n, pages)| support::sim::SimDisk::new(&machine, n, pages.clone()))
            .collect();
        let writer = open_writer(&disks, image.backing.as_ref(), WriterOptions { cache: 64 << 10 }).unwrap();
        // Rounds acknowledged by each thread; a round writes one sector of each of its 16 places.
        let rounds: Vec<_> = (0..WRITERS).map(|_| std::sync::atomic::AtomicU64::new(0)).collect();
        let done = AtomicBool::new(false);
        let place = |thread: u64, step: u64| (thread + WRITERS * step) * 10 * KIB;
        let bounds: Vec<(Vec<u64>, Vec<u64>)> = thread::scope(|scope| {
            for thread in 0..WRITERS {
                let (writer, rounds, done) = (&writer, &rounds, &done);
                scope.spawn(move || {
                    let mut number = 0;
                    while !done.load(Ordering::Relaxed) {
                        for step in 0..16 {
                            number += 1;
                            let at = place(thread, step);
                            writer.write_at(at, &pattern(FIRST_TAG + number, at / SECTOR)).unwrap();
                            rounds[thread as usize].store(number, Ordering::SeqCst);
                        }
                    }
                });
            }
            let now = || rounds.iter().map(|round| round.load(Ordering::SeqCst)).collect::<Vec<_>>();
            let bounds = (0..6).map(|number| {
                while now().iter().any(|round| *round < 40 * number) {
                    thread::yield_now();
                }
                let before = now();
                writer.take_snapshot(&new_snapshot(&number.to_string())).unwrap();
                (before, now())
            });
            let bounds = bounds.collect();
            done.store(true, Ordering::Relaxed);
            bounds
        });
        writer.close().unwrap();
        let files: Vec<_> = disks.iter().map(|disk| disk.snapshot()).collect();
        let opened = Opened::new(&files).unwrap();
        for (number, (before, after)) in bounds.iter().enumerate() {
            let view = opened.view(Some(number), image.backing.as_ref()).unwrap();
            for thread in 0..WRITERS {
                let seen: Vec<u64> = (0..16).map(|step| number_at(&view, place(thread, step))).collect();
                let (before, after) = (before[thread as usize], after[thread as usize]);
                let newest = *seen.iter().max().unwrap();
                assert!(newest >= before && newest <= after + 1, "{options}: {newest} of {before}..{after}");
                for step in 0..16 {
                    // The last write to this place up to the newest that is seen anywhere.
                    let expected =
                        (0..16).map(|back| newest.saturating_sub(back)).find(|n| n % 16 == (step + 1) % 16);
                    let expected = expected.filter(|n| *n > 0).unwrap_or(0);
                    assert_eq!(
                        seen[step as usize], expected,
                        "{options}: thread {thread}, step {step}: {seen:?}"
                    );
                }
            }
        }
        let report = chainfs::image::check::check(&files[0], IMAGE).unwrap();
        assert_eq!(report.exit_code(), 0, "{report}");
    }
}

/// Tags of writes begin behind it, so that none is that of the backing image.
const FIRST_TAG: u64 = 1 << 20;

/// The number that a thread wrote there; 0 where only the backing image shows.
fn number_at(view: &chainfs::chain::View, at: u64) -> u64 {
    let mut bytes = vec![0; SECTOR as usize];
    view.read_at(at, &mut bytes).unwrap();
    let tag = u64::from_be_bytes(bytes[..8].try_into().unwrap());
    let is_written = bytes == pattern(tag, at / SECTOR) && tag > FIRST_TAG;
    if is_written { tag - FIRST_TAG } else { 0 }
}

#[test]
fn a_refcount_overflow_is_refused_before_any_change() {
    for (options, fits) in [("refcount_bits=1", 0), ("refcount_bits=2", 2)] {
        let image = Start::scribbled(options, MIB).load();
        let machine = Machine::honest();
        let guest = Guest::new(&machine, &image, WriterOptions::default());
        guest.write(0, SECTOR);
        (0..fits).for_each(|number| guest.snapshot(&number.to_string()));
        guest.close();
        let changes = machine.changes();
        let error = guest.try_snapshot("one too many").unwrap_err();
        assert_eq!((error.kind(), machine.changes()), (ErrorKind::Unsupported, changes));
        assert!(error.to_string().contains("refcount_bits=16"), "{error}");
        guest.write(0, 100 * KIB);
        guest.close();
        let report = chainfs::image::check::check(&guest.files()[0], IMAGE).unwrap();
        assert_eq!(report.exit_code(), 0, "{report}");
    }
}

#[test]
fn images_without_internal_snapshots_are_refused_with_a_reason() {
    let image = Start::scribbled("data_file=data.raw", MIB).load();
    let guest = Guest::new(&Machine::honest(), &image, WriterOptions::default());
    let error = guest.try_snapshot("one").unwrap_err();
    assert!(error.kind() == ErrorKind::Unsupported && error.to_string().contains("external"), "{error}");
    let raw =
        Writer::raw("disk.raw", support::sim::SimDisk::new(&Machine::honest(), 0, Pages::default())).unwrap();
    assert_eq!(raw.take_snapshot(&new_snapshot("one")).unwrap_err().kind(), ErrorKind::Unsupported);
    assert!(raw.snapshots().unwrap().is_empty());
}
