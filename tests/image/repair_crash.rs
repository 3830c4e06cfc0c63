//! Repairs that are interrupted, by a crash at any call or by an error of any call: no disk changes, and the
//! next repair completes.

use std::fs;

use chainfs::error::ErrorKind;
use chainfs::image::check::{Scope, check, repair};
use support::oracle::{Disk, Scratch};
use support::tape::{Tape, assert_unchanged, crash_states, views};

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
const COPIED: u64 = 1 << 63;
const NAME: &str = "image.qcow2";

/// Damaged images, each in need of another way to repair it.
fn victims(scratch: &Scratch) -> Vec<(String, Vec<u8>)> {
    let mut victims = Vec::new();
    for options in [
        "cluster_size=4k",
        "cluster_size=512,refcount_bits=8",
        "cluster_size=16k,extended_l2=on,lazy_refcounts=on",
    ] {
        scratch.create(NAME, options, "1M");
        scratch.io(NAME, &["write -P 1 0 100k", "write -c -P 2 512k 64k", "write -z 800k 64k"]);
        scratch.img(&format!("snapshot -c one {NAME}"));
        scratch.io(NAME, &["write -P 3 20k 50k"]);
        let good = fs::read(scratch.path(NAME)).unwrap();
        let disk = Disk::open(scratch.path(NAME));
        let (l1, table, snapshots) = (disk.u64(40), disk.u64(48), disk.u64(64));
        let (l2, block) = (disk.u64(l1) & OFFSET, disk.u64(table));
        let mut add = |case: &str, damage: &dyn Fn()| {
            fs::write(scratch.path(NAME), &good).unwrap();
            damage();
            victims.push((format!("{case}, {options}"), fs::read(scratch.path(NAME)).unwrap()));
        };
        add("counts too low and too high, flags", &|| {
            disk.poke(block + 4, &[0, 0, 9, 0, 7, 0, 0, 3]);
            disk.poke_u64(l1, l2 & !COPIED);
            disk.poke_u64(l2, disk.u64(l2) ^ COPIED);
            disk.poke_u64(72, disk.u64(72) | 1);
        });
        add("no refcounts", &|| disk.poke_u64(table, 0));
        add("a block on data", &|| disk.poke_u64(table + 8, disk.u64(l2) & OFFSET & !511));
        add("no extra data", &|| {
            let head: [u8; 40] = disk.bytes(snapshots);
            let extra = u64::from(u32::from_be_bytes(head[36..].try_into().unwrap()));
            let strings: [u8; 4] = disk.bytes(snapshots + 40 + extra);
            disk.poke(snapshots + 36, &[0; 4]);
            disk.poke(snapshots + 40, &strings);
        });
        // Where clusters have 512 bytes, every place is aligned.
        if !options.contains("=512") {
            add("a place kept for zeroes that cannot be", &|| {
                let zero = u64::from(!options.contains("extended"));
                disk.poke_u64(l2, disk.u64(l2) | 0x200 | zero);
                disk.poke_u64(l2 + 8, if zero == 1 { disk.u64(l2 + 8) } else { 0 });
            });
        }
        add("leaks", &|| disk.poke_u64(l1, 0));
        add("an entry that leads nowhere", &|| {
            disk.poke_u64(l2, 1 << 50);
            disk.poke(block + 4, &[0, 0]);
        });
    }
    victims
}

fn exit_code(file: &[u8]) -> u8 {
    check(&file.to_vec(), NAME).map_or(1, |report| report.exit_code())
}

/// Clusters with more references than their count: the next writer could allocate them.
fn too_low(file: &[u8]) -> usize {
    let report = check(&file.to_vec(), NAME).expect("an image that can be checked");
    report.findings.iter().filter(|finding| finding.starts_with("ERROR cluster")).count()
}

#[test]
// R5
fn a_crash_changes_no_disk_and_the_next_repair_completes() {
    let scratch = Scratch::new();
    let (mut possible, mut visited) = (0, 0);
    for (case, start) in victims(&scratch) {
        let before = views(&start);
        let tape = Tape::new(start.clone());
        let report = repair(&tape, NAME, Scope::All, &mut |_| Ok(())).unwrap().report;
        let end = report.exit_code();
        assert_eq!(end, if case.contains("nowhere") { 2 } else { 0 }, "{case}\n{report}");
        assert!(
            matches!(tape.events().last(), Some(support::tape::Event::Sync)),
            "{case}: the last word is durable"
        );
        let count = crash_states(&start, &tape.events(), |state, file| {
            let case = format!("{case}, crash {state}");
            assert_unchanged(&before, &views(file), &case);
            assert!(too_low(file) <= too_low(&start), "{case}: counts are lost");
            // Clear bits vouch for the rest.
            let is_marked = |file: &[u8]| file[79] & 3 != 0;
            assert!(
                is_marked(file) || !is_marked(&start) || exit_code(file) != 2,
                "{case}: marked as sound too early"
            );
            let again = Tape::new(file.to_vec());
            let report = repair(&again, NAME, Scope::All, &mut |_| Ok(())).unwrap().report;
            assert_eq!(report.exit_code(), end, "{case}\n{report}");
            assert_unchanged(&before, &views(&again.bytes()), &case);
        });
        // And a crash of a repair after a crash.
        let events = tape.events();
        let mut half = start.clone();
        events[..events.len() / 2].iter().for_each(|event| event.apply(&mut half));
        let second = Tape::new(half.clone());
        repair(&second, NAME, Scope::All, &mut |_| Ok(())).unwrap();
        let again = crash_states(&half, &second.events(), |state, file| {
            let case = format!("{case}, second crash {state}");
            assert_unchanged(&before, &views(file), &case);
            let again = Tape::new(file.to_vec());
            assert_eq!(
                repair(&again, NAME, Scope::All, &mut |_| Ok(())).unwrap().report.exit_code(),
                end,
                "{case}"
            );
        });
        possible += count.possible + again.possible;
        visited += count.visited + again.visited;
    }
    // Each content is visited once.
    assert!(possible > 200 && visited > 100, "{visited} of {possible} states");
}

#[test]
fn an_error_of_any_call_is_reported_and_the_next_repair_completes() {
    let scratch = Scratch::new();
    for (case, start) in victims(&scratch) {
        let before = views(&start);
        let whole = Tape::new(start.clone());
        let end = repair(&whole, NAME, Scope::All, &mut |_| Ok(())).unwrap().report.exit_code();
        for number in 0..whole.events().len() {
            for lasting in [false, true] {
                let case = format!("{case}, call {number}, lasting {lasting}");
                let tape = Tape::failing(start.clone(), number, lasting);
                let error = repair(&tape, NAME, Scope::All, &mut |_| Ok(())).expect_err(&case);
                assert_eq!(error.kind(), ErrorKind::NoSpace, "{case}: {error}");
                assert_unchanged(&before, &views(&tape.bytes()), &case);
                let again = Tape::new(tape.bytes());
                let report = repair(&again, NAME, Scope::All, &mut |_| Ok(())).unwrap().report;
                assert_eq!(report.exit_code(), end, "{case}\n{report}");
                assert_unchanged(&before, &views(&again.bytes()), &case);
            }
        }
    }
}

#[test]
fn the_callback_may_stop_the_repair() {
    let scratch = Scratch::new();
    for (case, start) in victims(&scratch) {
        let tape = Tape::new(start.clone());
        let stop = || chainfs::error::Error::new(ErrorKind::Io, "the reader has gone");
        let error = repair(&tape, NAME, Scope::All, &mut |_| Err(stop())).unwrap_err();
        assert!(error.kind() == ErrorKind::Io && tape.events().is_empty(), "{case}");
    }
}
