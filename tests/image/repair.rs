//! Repairs against `qemu-img check -r` on a twin: both end with the same exit code, with an image that
//! `qemu-img check` finds no fault with, and with every disk as it was.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;

use chainfs::image::check::{Scope, check, repair, repair_dirty};
use serde_json::Value;
use support::oracle::{COPIED, Disk, NAME, OFFSET, Places, Random, Scratch, damaged_entry, places};
use support::tape::{Tape, assert_unchanged, views};

const TWIN: &str = "twin.qcow2";

/// Whether to take the time for everything.
fn is_long() -> bool {
    std::env::var_os("CHAINFS_LONG").is_some()
}

/// QEMU's reads of the active disk and of some snapshots; `None` where it fails.
fn seen_by_qemu(scratch: &Scratch, name: &str) -> Vec<Option<Vec<u8>>> {
    let read = |args: &[&str]| {
        let args = [&["convert", "-U", "-O", "raw"], args, &[name, "seen.raw"]].concat();
        scratch.run("qemu-img", &args).status.success().then(|| fs::read(scratch.path("seen.raw")).unwrap())
    };
    // An image without snapshots in its header needs no query.
    let has_snapshots = Disk::open(scratch.path(name)).bytes::<4>(60) != [0; 4];
    let snapshot = |words: &str| has_snapshots.then(|| read(&["-l", words])).flatten();
    vec![read(&[]), snapshot("snapshot.name=first"), snapshot("snapshot.name=second")]
}

/// Repairs the image here and its twin there. Returns both exit codes.
fn repaired(scratch: &Scratch, scope: Scope, case: &str) -> (i32, i32) {
    println!("== {case}, {scope:?}");
    fs::copy(scratch.path(NAME), scratch.path(TWIN)).unwrap();
    let bytes = fs::read(scratch.path(NAME)).unwrap();
    let (before, seen) = (views(&bytes), seen_by_qemu(scratch, NAME));
    let tape = Tape::new(bytes.clone());
    let mut told = None;
    let done = repair(&tape, NAME, scope, &mut |found| {
        assert!(tape.events().is_empty(), "{case}: changed before it was told");
        told = Some(found.clone());
        Ok(())
    });
    fs::write(scratch.path(NAME), tape.bytes()).unwrap();
    let ours: i32 = match &done {
        Ok(done) => done.report.exit_code().into(),
        Err(error) => {
            println!("{error}");
            assert_eq!(tape.bytes(), bytes, "{case}: an error, and yet a change");
            1
        }
    };
    let words = if scope == Scope::All { "all" } else { "leaks" };
    let theirs = scratch.run("qemu-img", &["check", "--output=json", "-r", words, TWIN]);
    print!("{}", String::from_utf8_lossy(&theirs.stderr[..theirs.stderr.len().min(2000)]));
    if let (Ok(done), Some(told)) = (&done, &told) {
        println!("{told}--\n{}--\n{:?}\n{}", done.actions, done.notes, done.report);
        let numbers: BTreeMap<String, Value> = serde_json::from_slice(&theirs.stdout).unwrap_or_default();
        let number = |key: &str| numbers.get(key).and_then(Value::as_u64).unwrap_or(0);
        // No cluster is freed while an entry is in doubt, and counts of clusters under QEMU's own new tables
        // are its own.
        if ours == 0 && theirs.status.code() == Some(0) {
            assert_eq!(done.report.leaks_fixed, number("leaks-fixed"), "{case}: leaks");
            if !case.contains("beyond") && !case.starts_with("table on") {
                assert_eq!(done.report.corruptions_fixed, number("corruptions-fixed"), "{case}: corruptions");
            }
        }
    }
    assert_unchanged(&before, &views(&tape.bytes()), case);
    for (seen, now) in seen.iter().zip(seen_by_qemu(scratch, NAME)) {
        assert!(seen.is_none() || *seen == now, "{case}: QEMU sees a change");
    }
    let judged = scratch.run("qemu-img", &["check", "-q", NAME]).status.code().unwrap();
    if ours == 0 {
        assert_eq!(judged, 0, "{case}: QEMU is not content");
        assert_eq!(tape.bytes()[79] & 3, 0, "{case}: still marked");
    }
    let now = check(&tape.bytes(), NAME).map_or(1, |report| report.exit_code().into());
    assert_eq!(now, if done.is_ok() { ours } else { now }, "{case}");
    // A second repair changes nothing.
    if done.is_ok() {
        let again = Tape::new(tape.bytes());
        let report = repair(&again, NAME, scope, &mut |_| Ok(())).unwrap().report;
        assert_eq!((report.exit_code().into(), again.events().len()), (ours, 0), "{case}, again");
    }
    (ours, theirs.status.code().unwrap())
}

/// Makes an image with 256 KiB of data, damages it, and has both repair it, in both scopes.
fn both(scratch: &Scratch, options: &str, case: &str, damage: impl Fn(&Places)) -> [(i32, i32); 2] {
    scratch.create(NAME, options, "64M");
    scratch.io(NAME, &["write -P 7 0 256k"]);
    let good = fs::read(scratch.path(NAME)).unwrap();
    [Scope::Leaks, Scope::All].map(|scope| {
        fs::write(scratch.path(NAME), &good).unwrap();
        damage(&places(scratch));
        repaired(scratch, scope, case)
    })
}

/// The same exit codes as QEMU.
const fn same(leaks: i32, all: i32) -> [(i32, i32); 2] {
    [(leaks, leaks), (all, all)]
}

#[test]
fn refcounts_that_are_wrong() {
    let scratch = Scratch::new();
    let both = |case: &str, damage: &dyn Fn(&Places)| both(&scratch, "", case, damage);
    assert_eq!(both("nothing", &|_| {}), same(0, 0));
    assert_eq!(
        both("leak of an unused cluster", &|p| {
            p.disk.set_len(0xb0000);
            p.count(10, 1);
        }),
        same(0, 0)
    );
    assert_eq!(both("data counted twice", &|p| p.count(6, 2)), same(0, 0));
    assert_eq!(both("data not counted", &|p| p.count(6, 0)), same(1, 0));
    assert_eq!(both("L2 not counted", &|p| p.count(4, 0)), same(1, 0));
    assert_eq!(both("header not counted", &|p| p.count(0, 0)), same(1, 0));
    assert_eq!(both("all counts zero", &|p| p.disk.poke(p.refcount_block, &[0; 64])), same(1, 0));
    assert_eq!(
        both("too low and too high", &|p| (5..8).for_each(|c| p.count(c, [9, 0, 3][c as usize - 5]))),
        same(1, 0)
    );
    assert_eq!(both("refcount block gone", &|p| p.disk.poke_u64(p.refcount_table, 0)), same(1, 0));
    assert_eq!(
        both("refcount block beyond the end", &|p| p.disk.poke_u64(p.refcount_table, 0x1000_0000)),
        same(1, 0)
    );
    assert_eq!(
        both("block named twice", &|p| p.disk.poke_u64(p.refcount_table + 8, p.refcount_block)),
        same(1, 0)
    );
    assert_eq!(both("block on data", &|p| p.disk.poke_u64(p.refcount_table + 8, 0x50000)), same(1, 0));
    assert_eq!(both("table of no clusters", &|p| p.disk.poke(56, &[0; 4])), same(1, 0));
    assert_eq!(both("table beyond the end", &|p| p.disk.poke_u64(48, 0x1000_0000)), same(1, 0));
    assert_eq!(both("table on the L1 table", &|p| p.disk.poke_u64(48, p.l1)).map(|(ours, _)| ours), [1, 0]);
    assert_eq!(both("count beyond the end of the file", &|p| p.count(500, 2)), same(0, 0));
    // Damage that QEMU cannot repair.
    let reserved = both("reserved bit", &|p| p.disk.poke_u64(p.refcount_table, p.refcount_block | 1));
    assert_eq!(reserved, [(1, 1), (0, 1)]);
    let unaligned = both("block unaligned", &|p| p.disk.poke_u64(p.refcount_table, p.refcount_block | 0x200));
    assert_eq!(unaligned, [(1, 1), (0, 1)]);
}

#[test]
fn entries_that_are_wrong() {
    let scratch = Scratch::new();
    let both = |case: &str, damage: &dyn Fn(&Places)| both(&scratch, "", case, damage);
    assert_eq!(both("L1 without COPIED", &|p| p.disk.poke_u64(p.l1, p.l2)), same(0, 0));
    assert_eq!(both("L1 with a reserved bit", &|p| p.disk.poke_u64(p.l1, p.l2 | COPIED | 1)), same(2, 2));
    assert_eq!(both("L1 beyond the end", &|p| p.disk.poke_u64(p.l1, COPIED | 0x1000_0000)), same(2, 2));
    assert_eq!(both("L1 far beyond the end", &|p| p.disk.poke_u64(p.l1, COPIED | 1 << 55)), same(2, 2));
    assert_eq!(both("L1 unaligned", &|p| p.disk.poke_u64(p.l1, p.l2 | COPIED | 0x200)), same(2, 2));
    // QEMU takes the data for entries, and makes zeroes of them.
    assert_eq!(both("L1 on data", &|p| p.disk.poke_u64(p.l1, COPIED | 0x70000)), [(2, 2), (2, 0)]);
    assert_eq!(both("L1 table beyond the end", &|p| p.disk.poke_u64(40, 0x1000_0000)), same(2, 2));
    assert_eq!(both("L2 without COPIED", &|p| p.change_l2(1, |entry| entry & !COPIED)), same(0, 0));
    assert_eq!(both("L2 with a reserved bit", &|p| p.change_l2(1, |entry| entry | 2)), same(2, 2));
    assert_eq!(both("L2 unaligned", &|p| p.change_l2(1, |entry| entry | 0x200)), same(2, 2));
    assert_eq!(both("L2 unaligned and zero", &|p| p.change_l2(1, |entry| entry | 0x201)), same(2, 0));
    assert_eq!(both("L2 beyond the end", &|p| p.change_l2(1, |_| COPIED | 0x1000_0000)), same(2, 2));
    assert_eq!(both("L2 cleared", &|p| p.change_l2(1, |_| 0)), same(0, 0));
    assert_eq!(both("L2 COPIED only", &|p| p.change_l2(1, |_| COPIED)), same(0, 0));
    assert_eq!(both("data on data", &|p| p.change_l2(1, |entry| entry + 0x10000)), same(2, 0));
    assert_eq!(both("data on the L1 table", &|p| p.change_l2(1, |_| COPIED | p.l1)), same(2, 0));
    assert_eq!(both("file cut within the last cluster", &|p| p.disk.set_len(0x8ff00)), same(0, 0));
    assert_eq!(both("file cut by a cluster", &|p| p.disk.set_len(0x80000)), same(2, 2));
    assert_eq!(both("file longer", &|p| p.disk.set_len(0x23_4567)), same(0, 0));
    // QEMU leaves a flag that a compressed cluster must not have.
    let compressed = both("compressed and COPIED", &|p| p.change_l2(1, |_| COPIED | 1 << 62 | 0x60000));
    assert_eq!(compressed, [(2, 2), (0, 2)]);
}

/// A truncated file must not grow over lost data.
#[test]
fn nothing_is_appended_while_an_entry_points_beyond_the_end() {
    let scratch = Scratch::new();
    let codes = both(&scratch, "", "cut, and no refcounts beyond", |p| {
        p.disk.set_len(0x80000);
        p.disk.poke_u64(p.refcount_table, 0);
    });
    assert_eq!(codes.map(|(ours, _)| ours), [1, 2]);
    assert_eq!(fs::metadata(scratch.path(NAME)).unwrap().len(), 0x80000);
}

#[test]
fn shared_tables_are_not_written_in_place() {
    let scratch = Scratch::new();
    scratch.create(NAME, "", "1G");
    scratch.io(NAME, &["write -P 7 0 256k"]);
    let p = places(&scratch);
    p.disk.poke_u64(p.l1 + 8, p.l2 | COPIED);
    assert_eq!(repaired(&scratch, Scope::All, "L1 entry twice"), (0, 0));
    let p = places(&scratch);
    assert_eq!((p.disk.u64(p.l1), p.disk.u64(p.l2) & COPIED), (p.l2, 0));
}

#[test]
fn extended_entries_and_data_files() {
    let scratch = Scratch::new();
    let extended = |case: &str, entry: &dyn Fn(u64) -> u64, bitmap: u64| {
        both(&scratch, "extended_l2=on", case, |p| {
            p.disk.poke_u64(p.l2, entry(p.disk.u64(p.l2)));
            p.disk.poke_u64(p.l2 + 8, bitmap);
        })
    };
    assert_eq!(extended("allocated and zero", &|entry| entry, 0x3_0000_0003), same(2, 2));
    assert_eq!(extended("allocated without a cluster", &|_| 0, 3), same(2, 2));
    assert_eq!(extended("unaligned", &|entry| entry | 0x200, 3), same(2, 2));
    assert_eq!(extended("unaligned without data", &|entry| entry | 0x200, 0), same(2, 0));
    assert_eq!(extended("without COPIED", &|entry| entry & !COPIED, 0xffff_ffff), same(0, 0));
    assert_eq!(extended("compressed with a bitmap", &|entry| entry & OFFSET | 1 << 62, 2), same(2, 2));
    let external = |case: &str, entry: u64| {
        both(&scratch, "data_file=data.raw", case, |p| p.disk.poke_u64(p.l2 + 8, entry))
    };
    assert_eq!(external("no COPIED", 0x10000), same(0, 0));
    assert_eq!(external("compressed in a data file", 1 << 62 | 0x10000), same(2, 2));
}

/// An image with two snapshots and 64 KiB written since.
fn with_snapshots(scratch: &Scratch, options: &str) {
    scratch.create(NAME, options, "16M");
    scratch.io(NAME, &["write -P 7 0 256k"]);
    scratch.img(&format!("snapshot -c first {NAME}"));
    scratch.io(NAME, &["write -P 8 128k 64k"]);
    scratch.img(&format!("snapshot -c second {NAME}"));
    scratch.io(NAME, &["write -P 9 64k 64k"]);
}

/// A copy of the snapshot table whose entries have less extra data.
fn shorten_extra(p: &Places) {
    let (mut out, mut at) = (Vec::new(), p.snapshots);
    for keep in [0u32, 8] {
        let head: [u8; 40] = p.disk.bytes(at);
        let extra = u64::from(u32::from_be_bytes(head[36..].try_into().unwrap()));
        let strings = u64::from(head[13]) + u64::from(head[15]);
        out.extend(&head[..36]);
        out.extend(keep.to_be_bytes());
        let all: [u8; 80] = p.disk.bytes(at + 40);
        out.extend(&all[..keep as usize]);
        out.extend(&all[extra as usize..(extra + strings) as usize]);
        out.resize(out.len().next_multiple_of(8), 0);
        at = (at + 40 + extra + strings).next_multiple_of(8);
    }
    p.disk.poke(p.snapshots, &out);
}

#[test]
fn counts_flags_and_tables_of_snapshots() {
    let scratch = Scratch::new();
    let both = |case: &str, damage: &dyn Fn(&Places)| {
        [Scope::Leaks, Scope::All].map(|scope| {
            with_snapshots(&scratch, "");
            damage(&places(&scratch));
            repaired(&scratch, scope, case)
        })
    };
    assert_eq!(both("nothing", &|_| {}), same(0, 0));
    assert_eq!(both("shared, counted once", &|p| p.count(5, 1)), same(2, 0));
    assert_eq!(both("shared, counted twice", &|p| p.count(5, 2)), same(2, 0));
    assert_eq!(both("shared, counted too often", &|p| p.count(5, 9)), same(0, 0));
    assert_eq!(both("shared, not counted", &|p| p.count(5, 0)), same(1, 0));
    assert_eq!(both("shared and COPIED", &|p| p.change_l2(0, |entry| entry | COPIED)), same(0, 0));
    assert_eq!(both("one forgotten", &|p| p.disk.poke(60, &1u32.to_be_bytes())), same(0, 0));
    assert_eq!(both("no extra data", &shorten_extra), same(2, 0));
    assert_eq!(both("no refcounts", &|p| p.disk.poke_u64(p.refcount_table, 0)), same(1, 0));
    assert_eq!(
        both("L1 of a snapshot unaligned", &|p| p
            .disk
            .poke_u64(p.snapshots, p.disk.u64(p.snapshots) | 0x200)),
        same(2, 2)
    );
    assert_eq!(
        both("L1 of a snapshot beyond the end", &|p| p.disk.poke_u64(p.snapshots, 0x1000_0000)),
        same(2, 2)
    );
    assert_eq!(
        both("table unaligned", &|p| p.disk.poke_u64(64, p.snapshots + 8)).map(|(ours, _)| ours),
        [1, 1]
    );
    // QEMU makes up two empty snapshots.
    assert_eq!(
        both("snapshot table beyond the end", &|p| p.disk.poke_u64(64, 0x1000_0000)),
        [(2, 2), (2, 0)]
    );
}

#[test]
fn header_flags_are_cleared_on_a_sound_image() {
    let scratch = Scratch::new();
    for flags in [1, 2, 3] {
        assert_eq!(both(&scratch, "", "flagged", |p| p.disk.poke_u64(72, flags)), same(0, 0));
    }
    let codes = both(&scratch, "", "flagged and not to be mended", |p| {
        p.disk.poke_u64(72, 3);
        p.change_l2(1, |entry| entry | 2);
    });
    assert_eq!(codes, same(2, 2));
    assert_eq!(places(&scratch).disk.u64(72), 3);
    both(&scratch, "", "unknown autoclear bit", |p| p.disk.poke_u64(88, 1 << 9));
    assert_eq!(places(&scratch).disk.u64(88), 0);
    assert_eq!(both(&scratch, "", "unknown feature", |p| p.disk.poke_u64(72, 1 << 9)), same(1, 1));
}

#[test]
fn references_beyond_the_refcount_width_are_kept() {
    let scratch = Scratch::new();
    let codes = both(&scratch, "refcount_bits=1", "overflow", |p| p.change_l2(1, |entry| entry + 0x10000));
    assert_eq!(codes, same(2, 2));
}

#[test]
fn every_geometry_and_width() {
    let scratch = Scratch::new();
    for (number, cluster_bits) in (0..).zip([9, 12, 16, 21u32]) {
        // Without much time, each size with every other width.
        for refcount_order in (0..=6u32).filter(|order| is_long() || (number + order).is_multiple_of(2)) {
            let options =
                format!("cluster_size={},refcount_bits={}", 1u32 << cluster_bits, 1 << refcount_order);
            scratch.create(NAME, &options, "4M");
            scratch.io(NAME, &["write -P 3 0 300k", "write -P 4 3M 500k", "write -z 1M 128k"]);
            if refcount_order > 1 {
                scratch.img(&format!("snapshot -c first {NAME}"));
                scratch.io(NAME, &["write -P 5 100k 200k"]);
            }
            let p = places(&scratch);
            // Counts of everything gone, of everything too high, and no block at all.
            let damage = (cluster_bits + refcount_order) % 3;
            match damage {
                0 => p.disk.poke(p.refcount_block, &[0; 16]),
                1 => p.disk.poke(p.refcount_block, &[if refcount_order > 5 { 0x7f } else { 0xff }; 8]),
                _ => p.disk.poke_u64(p.refcount_table, 0),
            }
            let case = format!("{options}, damage {damage}");
            assert_eq!(repaired(&scratch, Scope::All, &case), (0, 0), "{case}");
        }
    }
}

#[test]
fn compressed_clusters_and_bitmaps_are_counted_too() {
    let scratch = Scratch::new();
    let noise: Vec<u8> =
        (0..2_000_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8 ^ (i % 251) as u8).collect();
    fs::write(scratch.path("noise.raw"), noise).unwrap();
    for options in
        ["cluster_size=512", "cluster_size=64k", "compression_type=zstd,cluster_size=4k", "extended_l2=on"]
    {
        scratch.img(&format!("convert -c -f raw -O qcow2 -o {options} noise.raw {NAME}"));
        scratch.img(&format!("bitmap --add -g 64k {NAME} bits"));
        scratch.io(NAME, &["write -P 5 300k 40k"]);
        let good = fs::read(scratch.path(NAME)).unwrap();
        for damage in 0..2 {
            fs::write(scratch.path(NAME), &good).unwrap();
            let p = places(&scratch);
            if damage == 0 {
                p.disk.poke(p.refcount_block, &[0; 100]);
            } else {
                p.disk.poke_u64(p.refcount_table, 0);
            }
            assert_eq!(repaired(&scratch, Scope::All, &format!("{options}, damage {damage}")), (0, 0));
        }
    }
}

/// The process dies: refcounts of lazy images are stale.
#[test]
fn interrupted_images_are_recounted_before_they_are_written() {
    let scratch = Scratch::new();
    for options in
        ["lazy_refcounts=on", "lazy_refcounts=on,cluster_size=4k", "lazy_refcounts=on,extended_l2=on"]
    {
        let interrupted = || {
            scratch.create(NAME, options, "64M");
            scratch.io(NAME, &["write -P 1 0 1M"]);
            scratch.img(&format!("snapshot -c first {NAME}"));
            scratch.run(
                "qemu-io",
                &["-c", "write -P 2 0 300k", "-c", "flush", "-c", "write 8M 300k", "-c", "abort", NAME],
            );
            assert_eq!(places(&scratch).disk.u64(72) & 1, 1, "{options}: dirty");
        };
        interrupted();
        assert_eq!(repaired(&scratch, Scope::All, options), (0, 0));
        interrupted();
        let bytes = fs::read(scratch.path(NAME)).unwrap();
        let tape = Tape::new(bytes.clone());
        assert_eq!(repair_dirty(&tape, NAME).unwrap().exit_code(), 0, "{options}");
        assert_unchanged(&views(&bytes), &views(&tape.bytes()), options);
        fs::write(scratch.path(NAME), tape.bytes()).unwrap();
        scratch.img(&format!("check {NAME}"));
        assert_eq!(places(&scratch).disk.u64(72) & 1, 0, "{options}: clean");
    }
}

/// For any damage: all readable bytes stay the same, and an image that chainfs calls sound is sound. Only
/// chainfs' own checks are used, so that there can be many.
#[test]
fn random_damage_never_changes_what_could_be_read() {
    let scratch = Scratch::new();
    let seed: u64 = std::env::var("CHAINFS_FUZZ_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1);
    let rounds: u64 = std::env::var("CHAINFS_CHECK_ROUNDS")
        .ok()
        .and_then(|rounds| rounds.parse().ok())
        .unwrap_or(if is_long() { 40 } else { 14 });
    let mut ended = [0; 4];
    for (kind, options) in
        ["cluster_size=4k", "cluster_size=512,refcount_bits=8", "cluster_size=16k,extended_l2=on"]
            .iter()
            .enumerate()
    {
        scratch.create(NAME, options, "4M");
        scratch.io(
            NAME,
            &["write -P 1 0 200k", "write -c -P 2 1M 64k", "write -c -P 3 2M 64k", "write -z 3M 64k"],
        );
        scratch.img(&format!("snapshot -c one {NAME}"));
        scratch.io(NAME, &["write -P 4 32k 32k", "write -P 5 3M 100k", "write -z 0 16k"]);
        let good = fs::read(scratch.path(NAME)).unwrap();
        let p = places(&scratch);
        for round in 0..rounds * 10 {
            let mut random = Random(seed + round * 3 + kind as u64 + 0x9e37_79b9_7f4a_7c15);
            let mut bad = good.clone();
            let mut case = format!("{options}, seed {seed}, round {round}:");
            for _ in 0..=random.below(3) {
                let at = match random.below(6) {
                    0 => p.l1 + 8 * random.below(8),
                    1 | 2 => p.l2 + 8 * random.below(64),
                    3 => p.refcount_table + 8 * random.below(4),
                    4 => p.refcount_block + 8 * random.below(60),
                    _ => p.snapshots + 8 * random.below(7),
                } as usize;
                let entry = u64::from_be_bytes(bad[at..at + 8].try_into().unwrap());
                let value = damaged_entry(&mut random, entry, good.len() as u64);
                bad[at..at + 8].copy_from_slice(&value.to_be_bytes());
                write!(case, " {at:#x}: {entry:#x} -> {value:#x}").unwrap();
            }
            let scope = if round % 4 == 0 { Scope::Leaks } else { Scope::All };
            let before = views(&bad);
            let tape = Tape::new(bad.clone());
            let done = repair(&tape, NAME, scope, &mut |_| Ok(()));
            assert_unchanged(&before, &views(&tape.bytes()), &case);
            let code = done.as_ref().map_or(1, |done| done.report.exit_code());
            ended[usize::from(code)] += 1;
            if scope == Scope::All && round < rounds {
                fs::write(scratch.path(NAME), tape.bytes()).unwrap();
                let judged = scratch.run("qemu-img", &["check", "-q", NAME]).status.code().unwrap();
                assert!(judged == i32::from(code) || code != 0, "{case}: {code} here, {judged} there");
                fs::write(scratch.path(TWIN), &bad).unwrap();
                let theirs =
                    scratch.run("qemu-img", &["check", "-q", "-r", "all", TWIN]).status.code().unwrap();
                if theirs == 0 && code != 0 {
                    println!("{case}: {code} here, 0 with QEMU");
                }
            }
        }
    }
    println!("repaired {}, errors {}, corrupt {}, leaks {}", ended[0], ended[1], ended[2], ended[3]);
    assert!(ended[0] > 100, "most damage can be repaired");
}
