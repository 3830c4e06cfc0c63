//! A writer that is interrupted anywhere: every crash leaves an image without corruption in which every
//! sector has its last flushed bytes or later ones.
//!
//! Each test is a workload; `support::sim::crash` makes the states, `support::sim::judge` checks them. The
//! last tests break the simulated disk's promises and require that to be detected.

use std::thread;

use support::oracle::Scratch;
use support::sim::images::{compressible, scribble};
use support::sim::{Guest, IMAGE, KIB, MIB, Random, Start, SyncRule, Workload, seed};

/// A few operations of every kind all over the disk.
fn mixed(guest: &Guest, random: &mut Random, operations: usize, longest: u64) {
    let size = guest.size();
    for _ in 0..operations {
        let at = random.next() % size / 512 * 512;
        let len = ((1 + random.next() % (longest / 512)) * 512).min(size - at);
        match random.below(20) {
            0..=9 => guest.write(at, len),
            // Any position, any length.
            10 => {
                let at = (at + random.next() % 512).min(size - 1);
                guest.write(at, (len / 3).clamp(1, 777).min(size - at));
            }
            11 | 12 => guest.zero(at, len),
            13..=15 => guest.discard(at, len),
            16 => guest.allocate(at, len),
            _ => guest.flush(),
        }
    }
}

fn mix_it(name: &'static str, start: Start, operations: usize, longest: u64) {
    Workload::new(name, start).survives(|guest| {
        mixed(guest, &mut Random::new(seed() ^ name.len() as u64), operations, longest);
        guest.close();
    });
}

#[test]
fn first_writes_into_an_empty_image() {
    Workload::new("first writes", Start::new("", 64 * MIB)).survives(|guest| {
        guest.write(0, 4 * KIB);
        guest.write(64 * KIB, 64 * KIB);
        guest.flush();
        guest.write(MIB + 512, 200 * KIB);
        guest.write(60 * MIB, 512);
        guest.flush();
        guest.write(63 * MIB + 5, 700);
        guest.close();
    });
}

#[test]
fn rewriting_in_place() {
    let start = Start::new("cluster_size=4k", MIB).then(|scratch| scratch.io(IMAGE, &["write -q -P 7 0 1M"]));
    Workload::new("in place", start).survives(|guest| {
        for turn in 0..6 {
            guest.write(turn * 64 * KIB, 10 * KIB);
            guest.write(turn * 64 * KIB + 1024, 512);
            guest.write(turn * 8 * KIB + 100, 9000);
            if turn % 2 == 1 {
                guest.flush();
            }
        }
        guest.close();
    });
}

#[test]
fn parts_of_clusters_over_a_backing_image() {
    Workload::new("copy on write", Start::over(8 * MIB, "", 8 * MIB)).survives(|guest| {
        guest.write(512, 512);
        guest.write(96 * KIB + 512, 64 * KIB);
        guest.flush();
        guest.write(MIB - 512, 1024);
        guest.write(4 * MIB + 60 * KIB, 300 * KIB);
        guest.write(4 * MIB, 512);
        guest.flush();
        guest.zero(5 * MIB + 4 * KIB, 4 * KIB);
        guest.discard(6 * MIB, 256 * KIB);
        guest.write(6 * MIB + 65 * KIB, KIB);
        guest.close();
    });
}

#[test]
fn small_clusters_over_a_shorter_backing_image() {
    Workload::new("short backing", Start::over(300 * KIB + 512, "cluster_size=1k", 600 * KIB)).survives(
        |guest| {
            mixed(guest, &mut Random::new(seed()), 60, 20 * KIB);
            guest.write(300 * KIB, 512);
            guest.write(599 * KIB, KIB);
            guest.close();
        },
    );
}

#[test]
fn a_disk_that_grows_needs_a_longer_l1_table() {
    // One L1 entry of 512-byte clusters covers 32 KiB.
    Workload::new("L1 growth", Start::scribbled("cluster_size=512", 2 * MIB)).survives(|guest| {
        guest.write(MIB, 3 * KIB);
        guest.grow(3 * MIB);
        guest.write(3 * MIB - KIB, KIB);
        guest.flush();
        guest.grow(16 * MIB);
        guest.write(15 * MIB, 2 * KIB);
        guest.write(2 * MIB - 512, KIB);
        guest.close();
    });
}

#[test]
fn growing_does_not_let_a_longer_backing_image_show_through() {
    Workload::new("grow over backing", Start::over(4 * MIB, "cluster_size=4k", MIB + 512)).survives(
        |guest| {
            guest.write(MIB - 512, KIB);
            guest.flush();
            guest.grow(3 * MIB + 512);
            guest.write(2 * MIB + 512, 512);
            guest.flush();
            guest.write(MIB + 64 * KIB, 10 * KIB);
            guest.grow(5 * MIB);
            guest.write(5 * MIB - 512, 512);
            guest.close();
        },
    );
}

#[test]
fn the_refcount_table_grows() {
    // A block of 512 bytes counts 64 clusters of 64-bit counts: 32 KiB; a table cluster 2 MiB.
    Workload::new("refcount table", Start::new("cluster_size=512,refcount_bits=64", 16 * MIB)).survives(
        |guest| {
            for at in 0..18 {
                guest.write(at * 300 * KIB, 256 * KIB);
                if at % 4 == 0 {
                    guest.flush();
                }
            }
            guest.close();
        },
    );
}

#[test]
// M1, M4, M5
fn freed_clusters_are_used_again() {
    Workload::new("discard and reuse", Start::scribbled("cluster_size=4k", 4 * MIB)).survives(|guest| {
        for turn in 0..5 {
            guest.write(turn * 512 * KIB, 128 * KIB);
            guest.discard(turn * 512 * KIB + 4 * KIB, 64 * KIB);
            if turn % 2 == 0 {
                guest.flush();
            }
            guest.write(3 * MIB + turn * 64 * KIB, 60 * KIB);
            guest.flush();
        }
        guest.discard(0, 4 * MIB);
        guest.write(KIB, 40 * KIB);
        guest.close();
    });
}

#[test]
// M5
fn discard_and_reuse_where_holes_cannot_be_punched() {
    let start = Start::scribbled("cluster_size=2k", 2 * MIB);
    Workload::new("no holes", start).without_holes().survives(|guest| {
        for turn in 0..4 {
            guest.discard(turn * 256 * KIB, 200 * KIB);
            guest.write(turn * 300 * KIB + 512, 100 * KIB);
            guest.zero(turn * 300 * KIB + 8 * KIB, 9 * KIB);
            guest.flush();
            guest.write(turn * 10 * KIB, 7 * KIB);
        }
        guest.close();
    });
}

#[test]
fn zeroes_that_stay_preallocated() {
    Workload::new("zero", Start::scribbled("", 4 * MIB)).survives(|guest| {
        guest.zero(0, 256 * KIB);
        guest.write(64 * KIB + 512, 512);
        guest.zero(MIB + 512, 130 * KIB);
        guest.flush();
        guest.write(MIB + 64 * KIB, 64 * KIB);
        guest.zero(100 * KIB, 7);
        guest.zero(0, 4 * MIB);
        guest.write(2 * MIB, 10 * KIB);
        guest.close();
    });
}

fn compressed(kind: &str, cluster: u64) -> Start {
    let options = format!("compression_type={kind},cluster_size={cluster}");
    Start::made(move |scratch| {
        compressible(&scratch.path("source.raw"), 20 * cluster + 512);
        scratch.img(&format!("convert -c -f raw -O qcow2 -o {options} source.raw {IMAGE}"));
    })
}

fn overwrite_compressed(name: &'static str, start: Start, cluster: u64) {
    Workload::new(name, start).survives(|guest| {
        guest.write(512, 512);
        guest.write(2 * cluster, cluster);
        guest.flush();
        guest.write(3 * cluster + 512, 2 * cluster);
        guest.discard(7 * cluster, 3 * cluster);
        guest.zero(11 * cluster + 512, cluster);
        guest.flush();
        guest.write(8 * cluster, 3 * cluster);
        guest.write(20 * cluster, 512);
        guest.close();
    });
}

#[test]
fn compressed_clusters_are_overwritten() {
    overwrite_compressed("zlib", compressed("zlib", 64 * KIB), 64 * KIB);
    overwrite_compressed("zlib 4k", compressed("zlib", 4 * KIB), 4 * KIB);
}

#[test]
fn compressed_clusters_of_zstd_are_overwritten() {
    overwrite_compressed("zstd", compressed("zstd", 32 * KIB), 32 * KIB);
}

fn with_snapshots(options: &str, size: u64) -> Start {
    Start::scribbled(options, size).then(move |scratch| {
        scratch.img(&format!("snapshot -c first {IMAGE}"));
        scratch.io(IMAGE, &["write -q -P 99 0 100k", "discard -q 1M 64k"]);
        scratch.img(&format!("snapshot -c second {IMAGE}"));
    })
}

#[test]
fn internal_snapshots_keep_their_bytes() {
    for (name, options) in [
        ("snapshots", ""),
        ("snapshots of small clusters", "cluster_size=512"),
        ("snapshots v2", "compat=0.10"),
    ] {
        Workload::new(name, with_snapshots(options, 2 * MIB)).states(260).survives(|guest| {
            guest.write(512, 512);
            guest.write(10 * KIB, 70 * KIB);
            guest.flush();
            guest.discard(MIB, 256 * KIB);
            guest.zero(64 * KIB, 64 * KIB);
            guest.flush();
            guest.write(0, 200 * KIB);
            guest.write(MIB + KIB, 5 * KIB);
            guest.close();
        });
    }
}

#[test]
fn internal_snapshots_of_compressed_clusters() {
    let start = compressed("zlib", 4 * KIB).then(|scratch| {
        scratch.img(&format!("snapshot -c first {IMAGE}"));
    });
    overwrite_compressed("snapshots of zlib", start, 4 * KIB);
}

#[test]
fn every_cluster_size() {
    for (bits, name) in
        (9..=21).zip(["512", "1k", "2k", "4k", "8k", "16k", "32k", "64k", "128k", "256k", "512k", "1M", "2M"])
    {
        let cluster = 1u64 << bits;
        let start = Start::scribbled(&format!("cluster_size={cluster}"), 8 * cluster.max(32 * KIB));
        let states = if bits >= 20 { 40 } else { 100 };
        Workload::new(name, start).states(states).survives(|guest| {
            mixed(guest, &mut Random::new(seed() ^ bits), 25, 2 * cluster);
            guest.close();
        });
    }
}

#[test]
fn lazy_refcounts() {
    mix_it("lazy", Start::scribbled("lazy_refcounts=on,cluster_size=4k", 2 * MIB), 60, 40 * KIB);
}

#[test]
fn subclusters() {
    for (name, cluster) in [("extended 16k", 16 * KIB), ("extended 64k", 64 * KIB), ("extended 2M", 2 * MIB)]
    {
        let sub = cluster / 32;
        let start = Start::over(6 * cluster, &format!("extended_l2=on,cluster_size={cluster}"), 8 * cluster);
        let states = if cluster > MIB { 60 } else { 200 };
        Workload::new(name, start).states(states).survives(|guest| {
            guest.write(sub * 3, sub);
            guest.write(cluster + sub * 5 + 512, sub * 2);
            guest.flush();
            guest.discard(cluster + sub * 6, sub);
            guest.zero(sub * 2, sub * 2);
            guest.discard(2 * cluster + sub, sub * 3);
            guest.flush();
            guest.write(2 * cluster + sub * 2 + 512, 512);
            guest.discard(0, cluster);
            guest.write(sub * 7, sub / 2);
            guest.flush();
            mixed(guest, &mut Random::new(seed() ^ cluster), 20, cluster);
            guest.close();
        });
    }
}

#[test]
fn every_refcount_width() {
    for (bits, name) in [
        (1, "refcounts 1"),
        (2, "refcounts 2"),
        (4, "refcounts 4"),
        (8, "refcounts 8"),
        (16, "16"),
        (32, "32"),
        (64, "64"),
    ] {
        let start = Start::scribbled(&format!("refcount_bits={bits},cluster_size=1k"), MIB);
        let start = if bits >= 2 {
            start.then(|scratch| drop(scratch.img(&format!("snapshot -c a {IMAGE}"))))
        } else {
            start
        };
        Workload::new(name, start).states(100).survives(|guest| {
            mixed(guest, &mut Random::new(seed() ^ bits), 40, 30 * KIB);
            guest.close();
        });
    }
}

#[test]
fn version_2() {
    mix_it("version 2", Start::scribbled("compat=0.10,cluster_size=4k", MIB), 60, 20 * KIB);
}

#[test]
fn version_2_over_a_backing_image() {
    mix_it("version 2 over", Start::over(MIB, "compat=0.10,cluster_size=4k", 2 * MIB), 60, 20 * KIB);
}

#[test]
fn an_external_data_file() {
    mix_it("data file", Start::scribbled("data_file=data.raw,cluster_size=4k", 2 * MIB), 60, 30 * KIB);
    mix_it("data file 64k", Start::scribbled("data_file=data.raw", 2 * MIB), 40, 100 * KIB);
}

#[test]
fn a_raw_external_data_file() {
    mix_it("raw data file", Start::scribbled("data_file=data.raw,data_file_raw=on", 2 * MIB), 60, 100 * KIB);
}

#[test]
fn preallocated_tables() {
    mix_it("preallocated", Start::new("preallocation=metadata,cluster_size=4k", 2 * MIB), 60, 30 * KIB);
    mix_it(
        "preallocated extended",
        Start::new("preallocation=metadata,extended_l2=on", 2 * MIB),
        40,
        90 * KIB,
    );
}

#[test]
fn persistent_bitmaps() {
    let start = Start::scribbled("", 4 * MIB).then(|scratch| {
        scratch.img(&format!("bitmap --add -g 64k {IMAGE} one"));
        scratch.img(&format!("bitmap --add --disable {IMAGE} two"));
    });
    mix_it("bitmaps", start, 40, 100 * KIB);
}

/// The image of a QEMU that was killed with lazy refcounts.
fn dirty(scratch: &Scratch) {
    let words = ["-c", "write -P 3 0 50k", "-c", "write -P 4 700k 9k", "-c", "abort", IMAGE];
    assert!(!scratch.run("qemu-io", &words).status.success(), "abort ends it");
}

#[test]
fn an_image_that_was_not_closed() {
    let start = Start::scribbled("lazy_refcounts=on,cluster_size=4k", MIB).then(dirty);
    Workload::new("dirty", start).survives(|guest| {
        guest.write(3 * KIB, 9 * KIB);
        guest.flush();
        guest.discard(0, 16 * KIB);
        guest.write(500 * KIB, 30 * KIB);
        guest.close();
    });
}

#[test]
fn many_flushes() {
    Workload::new("many flushes", Start::over(2 * MIB, "cluster_size=4k", 2 * MIB)).survives(|guest| {
        for turn in 0..60 {
            guest.write(turn * 29 * KIB, 5 * KIB);
            if turn % 7 == 3 {
                guest.discard((turn - 2) * 29 * KIB, 8 * KIB);
            }
            guest.flush();
        }
    });
}

#[test]
fn closing_and_opening_again() {
    Workload::new("reopen", Start::scribbled("cluster_size=2k", MIB)).survives(|guest| {
        let mut random = Random::new(seed());
        for _ in 0..6 {
            mixed(guest, &mut random, 10, 20 * KIB);
            guest.reopen();
        }
        guest.grow(2 * MIB);
        guest.reopen();
        guest.write(MIB + KIB, 3 * KIB);
        guest.close();
    });
}

#[test]
fn tables_that_do_not_fit_into_memory() {
    // 32 KiB of tables are the L2 tables of 64 L1 entries, refcount blocks not counted.
    let start = Start::scribbled("cluster_size=512", 8 * MIB);
    Workload::new("small cache", start).cache(32 << 10).survives(|guest| {
        let mut random = Random::new(seed());
        for _ in 0..250 {
            let at = random.next() % (8 * MIB - KIB) / 512 * 512;
            guest.write(at, 512 + random.next() % 2 * 512);
            if random.once_in(12) {
                guest.discard(at, KIB);
            }
        }
        guest.flush();
        mixed(guest, &mut random, 60, 6 * KIB);
        guest.close();
    });
}

#[test]
fn several_threads() {
    for (name, options, sizes) in [
        ("threads", "cluster_size=4k", 2 * MIB),
        ("threads 64k", "", 8 * MIB),
        ("threads extended", "extended_l2=on,cluster_size=16k", 4 * MIB),
    ] {
        Workload::new(name, Start::over(sizes / 2, options, sizes)).threaded().survives(|guest| {
            thread::scope(|scope| {
                for number in 0..4u64 {
                    scope.spawn(move || {
                        let mut random = Random::new(seed() ^ (number + 1));
                        for turn in 0..25 {
                            // Sectors of its own, in clusters that all share.
                            let at = (random.next() % (sizes / 2048) * 4 + number) * 512;
                            match random.below(8) {
                                0 => guest.zero(at, 512),
                                1 => guest.discard(at, 512),
                                _ => guest.write(at, 512),
                            }
                            if turn % 9 == number {
                                guest.flush();
                            }
                        }
                    });
                }
            });
            guest.close();
        });
    }
}

#[test]
fn threads_that_allocate_and_free_whole_clusters() {
    Workload::new("threads discarding", Start::over(MIB, "cluster_size=1k", 2 * MIB)).threaded().survives(
        |guest| {
            thread::scope(|scope| {
                for number in 0..4u64 {
                    scope.spawn(move || {
                        let mut random = Random::new(seed() ^ (number + 77));
                        for _ in 0..25 {
                            let at = (random.next() % 512 * 4 + number) * KIB;
                            match random.below(5) {
                                0 => guest.flush(),
                                1 | 2 => guest.discard(at, KIB),
                                _ => guest.write(at + random.next() % 2 * 512, 512),
                            }
                        }
                    });
                }
            });
            guest.close();
        },
    );
}

#[test]
fn any_operations_in_any_order() {
    for turn in 0..6u64 {
        let cluster = 512u64 << (turn * 3 % 8);
        let start = match turn % 3 {
            0 => Start::over(700 * KIB + 512, &format!("cluster_size={cluster}"), MIB),
            1 => with_snapshots(&format!("cluster_size={cluster}"), 2 * MIB),
            _ => Start::new("extended_l2=on,cluster_size=16k", MIB).then(|scratch| scribble(scratch, MIB)),
        };
        Workload::new("random", start).cache(64 << 10).states(200).survives(|guest| {
            mixed(guest, &mut Random::new(seed() + turn), 80, 50 * KIB);
            guest.close();
        });
    }
}

/// A workload in which each broken promise shows.
fn on_a_disk_with(sync_rule: SyncRule) -> support::sim::Tally {
    Workload::new("broken promises", Start::over(2 * MIB, "cluster_size=4k", 2 * MIB))
        .with_syncs(sync_rule)
        .tally(|guest| {
            for turn in 0..10 {
                guest.write(turn * 90 * KIB, 20 * KIB);
                guest.flush();
                guest.discard(turn * 90 * KIB, 8 * KIB);
                guest.flush();
                guest.write(turn * 50 * KIB + MIB, 9 * KIB);
                guest.flush();
            }
        })
}

#[test]
fn the_crash_test_sees_flushes_that_do_nothing() {
    assert!(on_a_disk_with(SyncRule::Honest).failures.is_empty());
    assert!(!on_a_disk_with(SyncRule::Swallowed).failures.is_empty());
    assert!(!on_a_disk_with(SyncRule::SwallowedBut(2)).failures.is_empty(), "each second sync is missing");
    assert!(!on_a_disk_with(SyncRule::SwallowedBut(5)).failures.is_empty());
}

#[test]
fn the_crash_test_sees_writes_that_arrive_too_late() {
    assert!(!on_a_disk_with(SyncRule::Late(3)).failures.is_empty());
}
