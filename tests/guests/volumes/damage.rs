//! Damaged tables and metadata: for any bytes, there is an answer in time.

use std::fs;
use std::sync::Arc;

use chainfs::guest::Source;
use chainfs::guest::volumes::{RunPlace, assemble, set_members};
use tempfile::TempDir;

use super::persistent::{CACHE_KINDS, THIN_KINDS, seal};
use super::{blank, told};
use crate::counted::Counted;
use support::*;

fn survive(bytes: Vec<u8>) {
    let source = Arc::new(Counted::new(bytes));
    let disks: Vec<Arc<dyn Source>> = vec![Arc::clone(&source) as Arc<dyn Source>];
    let assembly = assemble(&disks, None);
    let layout = &assembly.layout;
    // Undamaged, it takes less than 200 requests. Damaged, there are at most 255 volumes, and probing one
    // takes less than 512 KiB: its beginning, its end and one offset in between.
    let (requests, bytes) = source.taken();
    assert!(requests <= 5000 && bytes <= 144 << 20, "{requests} requests, {bytes} bytes");
    assert!(layout.partitions.len() <= 255 && layout.remarks.len() <= 101);
    let _ = set_members(&disks[0]);
    let mut names: Vec<&str> = layout.volumes.iter().map(|volume| volume.name.as_str()).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), layout.volumes.len(), "names differ");
    for (index, volume) in layout.volumes.iter().enumerate() {
        assert!(volume.problem.is_some() || !volume.segments.is_empty());
        let mut end = 0;
        for segment in &volume.segments {
            assert_eq!(segment.at, end);
            end += segment.len;
        }
        assert!(volume.segments.is_empty() || end == volume.size, "{volume:?}");
        let source = assembly.source(index);
        for at in [0, volume.size / 2, volume.size.saturating_sub(512)] {
            let mut sector = [0; 512];
            let is_there = source.read_at(at, &mut sector).is_ok();
            // What is computed of damaged metadata may be an error.
            let place = volume.locate(at, 1).map(|run| run.place);
            let is_computed = matches!(place, Some(RunPlace::Computed));
            let may_fail = is_computed || volume.segments.is_empty() || volume.size < 512;
            assert!(is_there || may_fail, "{} at {at}", volume.name);
        }
    }
}

fn mutate(good: &[u8], first: usize, repair: impl Fn(&mut Vec<u8>)) {
    let count = if std::env::var_os("CHAINFS_LONG").is_some() { 2000 } else { 200 };
    let places: Vec<usize> = (0..good.len()).filter(|at| good[*at] != 0).take(9000).collect();
    for seed in 0..count {
        let mut rng = Rng::new(seed);
        let mut bytes = good.to_vec();
        for _ in 0..=rng.below(10) {
            let at = places[first + rng.below((places.len() - first) as u64) as usize];
            bytes[at] = [0, 0xff, 0x80, b'0' + rng.below(10) as u8, rng.next() as u8][rng.below(5) as usize];
        }
        // Half of them with valid checksums, or the checks after these are never reached.
        if rng.below(2) == 0 {
            repair(&mut bytes);
        }
        survive(bytes);
    }
}

/// A reflected CRC of 32 bits, a bit at a time, from `seed`, without an inversion at the end.
pub(super) fn crc(polynomial: u32, seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |crc, byte| {
        (0..8).fold(
            crc ^ u32::from(*byte),
            |crc, _| if crc & 1 == 1 { crc >> 1 ^ polynomial } else { crc >> 1 },
        )
    })
}

fn crc32(seed: u32, bytes: &[u8]) -> u32 {
    crc(0xedb8_8320, seed, bytes)
}

fn put(bytes: &mut [u8], at: usize, sum: u32) {
    bytes[at..at + 4].copy_from_slice(&sum.to_le_bytes());
}

#[test]
fn no_damage_to_partition_tables_makes_it_panic_or_hang() {
    let dir = TempDir::new().expect("a directory");
    let disk = dir.path().join("disk");
    let gpt = "label: gpt\nsize=1M, name=a\nsize=1M\nsize=1M, name=\"long name\"\n";
    let dos = "label: dos\nsize=1M\nsize=5M, type=5\n5: size=1M\n6: size=1M\n";
    for orders in [gpt, dos] {
        blank(&disk, 12 * MIB);
        told("sfdisk", &["-q", "--wipe=always"], &disk, orders);
        let good = fs::read(&disk).expect("the disk");
        mutate(&good, 0, |bytes| {
            if orders == gpt && bytes.len() > 17_408 {
                let sum = !crc32(!0, &bytes[1024..17_408]);
                put(bytes, 512 + 88, sum);
                put(bytes, 512 + 16, 0);
                let sum = !crc32(!0, &bytes[512..512 + 92]);
                put(bytes, 512 + 16, sum);
            }
        });
    }
}

#[test]
fn no_damage_to_a_volume_group_makes_it_panic_or_hang() {
    const SEED: u32 = 0xf597_a6cf;
    let good = super::groups::sample();
    mutate(&good, 0, |bytes| {
        let field = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let (at, len) = (field(bytes, 4096 + 40), field(bytes, 4096 + 48));
        if at < 1 << 20 && len < 1 << 20 {
            let text = crc32(SEED, &bytes[4096 + at as usize..][..len as usize]);
            put(bytes, 4096 + 56, text);
        }
        let header = crc32(SEED, &bytes[4100..4608]);
        put(bytes, 4096, header);
        let label = crc32(SEED, &bytes[512 + 20..1024]);
        put(bytes, 512 + 16, label);
    });
}

#[test]
fn no_damage_to_pools_caches_and_snapshots_makes_it_panic_or_hang() {
    let (good, places) = super::groups::pools();
    // The group's own metadata stay.
    let from = (0..good.len()).filter(|at| good[*at] != 0 && *at < MIB as usize).count();
    mutate(&good, from, |bytes| {
        let kinds: [(&str, &[u32]); 2] = [("tmeta", &THIN_KINDS), ("cmeta", &CACHE_KINDS)];
        for (name, kinds) in kinds {
            seal(&mut bytes[places[name] as usize..], kinds);
        }
    });
}

#[test]
fn no_damage_to_arrays_makes_it_panic_or_hang() {
    let good = super::arrays::sample();
    mutate(&good, 0, |bytes| super::arrays::seal(bytes));
}
