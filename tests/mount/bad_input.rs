//! With any damage inside an image, the mount starts, reports the image by name, and shows the healthy chain
//! next to it unchanged. Wrong bytes are never shown: a range is as QEMU reads it, or an error.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;
use support::damage::header;
use support::victims::*;
use support::*;

// ---- damaged headers -------------------------------------------------------------------------

#[test]
fn every_impossible_header_field_is_a_problem_of_the_image() {
    let victims = Victims::new("");
    let l1 = u64::from(Damage::to(victims.store.path("good.qcow2")).u32(header::L1_ENTRY_COUNT));
    assert!(l1 >= 3, "the victim was to have several L2 tables");

    let narrow: &[(&str, u64, &[u32])] = &[
        ("version", header::VERSION, &[0, 1, 4, u32::MAX]),
        ("cluster-bits", header::CLUSTER_BITS, &[0, 8, 22, 31, 32, 63, 64, u32::MAX]),
        ("crypt", header::CRYPT_METHOD, &[3, u32::MAX]),
        ("l1-count", header::L1_ENTRY_COUNT, &[0, 1, (32 << 20) / 8 + 1, 0x7fff_ffff, 0x8000_0000, u32::MAX]),
        ("snapshot-count", header::SNAPSHOT_COUNT, &[65_537, 0x7fff_ffff, u32::MAX]),
        ("refcount-order", header::REFCOUNT_ORDER, &[7, 32, u32::MAX]),
        ("header-length", header::HEADER_LEN, &[0, 72, 103, 4104, 0x8000_0000, u32::MAX]),
        ("compression-type", header::COMPRESSION_TYPE, &[0x0100_0000, 0x0700_0000]),
    ];
    let wide: &[(&str, u64, &[u64])] = &[
        ("size", header::SIZE, &[u64::MAX, 1 << 63, 1 << 62, 1 << 40]),
        ("l1-offset", header::L1_OFFSET, &[u64::MAX, 1 << 63, (1 << 63) - 1, 0x3001]),
        ("snapshots-offset", header::SNAPSHOTS_OFFSET, &[u64::MAX, 1 << 63, 0x3008]),
        ("incompatible", header::INCOMPATIBLE, &[1 << 5, 1 << 63, 1 << 2, 1 << 3, u64::MAX]),
        ("backing-offset", header::BACKING_OFFSET, &[5000, u64::MAX, 1 << 63]),
    ];
    let mut bad = Vec::new();
    for (field, at, values) in narrow {
        for value in *values {
            let name = format!("{field}-{value:x}");
            victims.victim(&name).put_u32(*at, *value);
            bad.push(name);
        }
    }
    for (field, at, values) in wide {
        for value in *values {
            let name = format!("{field}-{value:x}");
            let image = victims.victim(&name);
            image.put_u64(*at, *value);
            if *at == header::BACKING_OFFSET {
                image.put_u32(header::BACKING_LEN, 8);
            }
            bad.push(name);
        }
    }
    // Offset and length of the backing file's name, each fine alone.
    for (name, offset, len) in [("backing-past-cluster", 4090, 8), ("backing-too-long", 200, 1024)] {
        let image = victims.victim(name);
        image.put_u64(header::BACKING_OFFSET, offset);
        image.put_u32(header::BACKING_LEN, len);
        bad.push(name.into());
    }
    let extension = |magic: u32, len: u32| [magic.to_be_bytes(), len.to_be_bytes()].concat();
    for (name, bytes) in [
        ("extension-too-long", extension(0x1234_5678, u32::MAX)),
        ("extension-past-cluster", extension(0x1234_5678, 4000)),
        ("backing-format-too-long", extension(0xe279_2aca, 200)),
        ("crypto-header-unasked", extension(0x0537_be77, 16)),
        ("bitmaps-of-wrong-length", extension(0x2385_2875, 23)),
    ] {
        victims.victim(name).put(header::V3_LEN, &bytes);
        bad.push(name.into());
    }

    // QEMU refuses all of these as well.
    let by_qemu = |name: &&String| {
        let mut info = tool("qemu-img");
        info.args(["map", "-f", "qcow2", &format!("{name}.qcow2")]).current_dir(victims.store.root());
        info.outcome().0 == 0
    };
    let readable: Vec<&String> = bad.iter().filter(by_qemu).collect();
    assert!(readable.is_empty(), "QEMU reads {readable:?}");

    victims.mounted(|mount| {
        read_everything(mount.dir());
        for name in &bad {
            problem_of(mount, name, &format!("{name}.qcow2"));
            if let Ok(bytes) = fs::read(mount.path(name).join("active.raw")) {
                assert!(bytes == victims.intact, "{name} shows wrong bytes");
            }
        }
    });
}

/// A reader does not need reference counts: it may complain or read on, but not read wrongly.
#[test]
fn damaged_reference_counts_never_change_what_is_read() {
    let victims = Victims::new("");
    let mut bad = Vec::new();
    for value in [0, 1 << 40, u64::MAX, 0x3001, 1 << 63] {
        let name = format!("table-at-{value:x}");
        victims.victim(&name).put_u64(header::REFCOUNT_TABLE_OFFSET, value);
        bad.push(name);
    }
    for value in [0, 0x8001, u32::MAX] {
        let name = format!("table-clusters-{value:x}");
        victims.victim(&name).put_u32(header::REFCOUNT_TABLE_CLUSTERS, value);
        bad.push(name);
    }
    let table = Damage::to(victims.store.path("good.qcow2")).u64(header::REFCOUNT_TABLE_OFFSET);
    let garbage = Rng::new(3).bytes(VICTIM_CLUSTER);
    for (name, at) in [("table-garbage", 0), ("block-garbage", 1)] {
        let image = victims.victim(name);
        let at = if at == 0 { table } else { image.u64(table) };
        image.put(at, &garbage);
        bad.push(name.to_owned());
    }
    victims.mounted(|mount| {
        for name in &bad {
            match fs::read(mount.path(name).join("active.raw")) {
                Ok(bytes) => assert!(bytes == victims.intact, "{name} shows wrong bytes"),
                Err(_) => drop(problem_of(mount, name, &format!("{name}.qcow2"))),
            }
        }
    });
}

#[test]
fn a_damaged_snapshot_table_is_a_problem_and_changes_no_byte_of_the_disk() {
    let victims = Victims::new("");
    let entry = Damage::to(victims.store.path("good.qcow2")).u64(header::SNAPSHOTS_OFFSET);
    let mut bad = Vec::new();
    let mut damage = |name: &str, at: u64, bytes: &[u8]| {
        victims.victim(name).put(entry + at, bytes);
        bad.push(name.to_owned());
    };
    damage("l1-unaligned", 0, &0x3001_u64.to_be_bytes());
    damage("l1-count-huge", 8, &u32::MAX.to_be_bytes());
    damage("extra-long", 36, &u32::MAX.to_be_bytes());
    damage("extra-above-limit", 36, &1040_u32.to_be_bytes());
    let told = bad.len();
    let mut damage = |name: &str, at: u64, bytes: &[u8]| {
        victims.victim(name).put(entry + at, bytes);
        bad.push(name.to_owned());
    };
    // The table can be read; only the one snapshot is odd.
    damage("l1-far", 0, &(1_u64 << 40).to_be_bytes());
    damage("l1-count-zero", 8, &0_u32.to_be_bytes());
    damage("id-long", 12, &u16::MAX.to_be_bytes());
    damage("name-long", 14, &u16::MAX.to_be_bytes());
    damage("size-huge", 48, &(1_u64 << 62).to_be_bytes());
    damage("state-huge", 40, &u64::MAX.to_be_bytes());
    victims.mounted(|mount| {
        read_everything(mount.dir());
        for name in &bad[..told] {
            problem_of(mount, name, &format!("{name}.qcow2"));
        }
        for name in &bad {
            let disk = fs::read(mount.path(name).join("active.raw"));
            assert!(disk.is_ok_and(|bytes| bytes == victims.intact), "the disk of {name} is not to blame");
            let snapshot = mount.path(name).join("snapshots/active@kept.raw");
            let len = fs::metadata(&snapshot).map_or(0, |m| m.len());
            if len == victims.intact.len() as u64
                && let Ok(bytes) = fs::read(&snapshot)
            {
                let image = format!("{name}.qcow2");
                let by_qemu = victims.store.try_oracle(Path::new(&image), "qcow2", Some("1"));
                let want = by_qemu.map(|oracle| fs::read(oracle).expect("what QEMU reads"));
                assert!(want.as_ref() == Ok(&bytes), "{name} reads what QEMU does not: {:?}", want.err());
            }
        }
    });
}

#[test]
fn tables_that_overlap_or_point_at_themselves_never_show_other_bytes_than_qemu() {
    let victims = Victims::new("");
    let good = Damage::to(victims.store.path("good.qcow2"));
    let (l1, refcounts) = (good.l1_at(), good.u64(header::REFCOUNT_TABLE_OFFSET));
    let l2 = good.l2_entry_at(0);
    let copied = 1 << 63;
    let mut bad = Vec::new();
    let mut damage = |name: &str, at: u64, value: u64| {
        victims.victim(name).put_u64(at, value);
        bad.push(name.to_owned());
    };
    damage("l1-is-header", header::L1_OFFSET, 0);
    damage("l1-is-refcounts", header::L1_OFFSET, refcounts);
    damage("l1-is-l2", header::L1_OFFSET, l2);
    damage("l1-entry-is-l1", l1, l1 | copied);
    damage("l1-entry-is-header", l1 + 8, copied);
    damage("l1-entries-equal", l1 + 8, good.u64(l1));
    damage("l2-entry-is-l2", l2, l2 | copied);
    damage("l2-entry-is-l1", l2 + 8, l1 | copied);
    damage("l2-entry-is-header", l2 + 16, copied);
    damage("l2-entries-equal", l2 + 24, good.u64(l2));
    damage("extended-unasked", header::INCOMPATIBLE, 1 << 4);
    damage("smaller", header::SIZE, 512);
    damage("empty", header::SIZE, 0);
    victims.mounted(|mount| {
        for name in &bad {
            let by_qemu = victims.store.try_oracle(Path::new(&format!("{name}.qcow2")), "qcow2", None);
            let shown = File::open(mount.path(name).join("active.raw"));
            match (shown, by_qemu) {
                (Ok(shown), Ok(oracle)) => {
                    assert_equal_or_error(name, &shown, &fs::read(oracle).expect("bytes"));
                }
                (Ok(shown), Err(_)) => {
                    // QEMU found an impossible entry; so must chainfs, somewhere.
                    let mut all = vec![0; shown.metadata().expect("metadata").len() as usize];
                    assert!(shown.read_exact_at(&mut all, 0).is_err(), "{name} reads where QEMU cannot");
                }
                (Err(_), _) => drop(problem_of(mount, name, &format!("{name}.qcow2"))),
            }
        }
    });
}

// ---- damaged tables: only what is hit fails ----------------------------------------------------

#[test]
fn an_impossible_l2_entry_is_an_error_for_its_cluster_alone() {
    let victims = Victims::new("");
    let hit: u64 = 700;
    let good = Damage::to(victims.store.path("good.qcow2"));
    let entry = good.u64(good.l2_entry_at(hit * VICTIM_CLUSTER));
    // 62 - (12 - 8): the sector count of a compressed descriptor begins here.
    let compressed = |at: u64, sectors: u64| 1 << 62 | sectors << 58 | at;
    let garbage = good.host_offset(0);
    for (name, value) in [
        ("unaligned", entry | 0x200),
        ("reserved-low", entry | 0x2),
        ("reserved-high", entry | 1 << 58),
        ("compressed-far", compressed(1 << 40, 3)),
        ("compressed-at-the-end-of-the-world", compressed((1 << 58) - 512, 15)),
        ("compressed-garbage", compressed(garbage, 3)),
        ("compressed-header", compressed(0, 0)),
    ] {
        victims.victim(name).put_u64(good.l2_entry_at(hit * VICTIM_CLUSTER), value);
    }
    let names = ["good"];
    victims.mounted(|mount| {
        for name in mount.top().iter().filter(|n| !names.contains(&n.as_str())) {
            let shown = File::open(mount.path(name).join("active.raw")).expect("only one cluster is bad");
            let errors = assert_equal_or_error(name, &shown, &victims.intact);
            assert_eq!(errors, [hit], "{name}: clusters that cannot be read");
            victims.store.overlay_sized(
                &format!("on-{name}.qcow2"),
                &format!("{name}.qcow2"),
                "qcow2",
                VICTIM_SIZE,
            );
        }
    });
    // As a frozen layer, through the kernel's page cache and its read-ahead, and from above.
    victims.mounted(|mount| {
        for name in mount.top().iter().filter(|n| !names.contains(&n.as_str())) {
            let below = name.strip_prefix("on-").expect("an overlay");
            for view in [format!("snapshots/{below}.raw"), "active.raw".to_owned()] {
                let shown = File::open(mount.path(name).join(&view)).expect("only one cluster is bad");
                for _ in 0..2 {
                    let errors = assert_equal_or_error(name, &shown, &victims.intact);
                    assert_eq!(errors, [hit], "{name}/{view}: clusters that cannot be read");
                }
            }
        }
    });
}

#[test]
fn an_impossible_l1_entry_is_an_error_for_its_clusters_alone() {
    let victims = Victims::new("");
    let good = Damage::to(victims.store.path("good.qcow2"));
    let entry = good.u64(good.l1_at() + 8);
    for (name, value) in
        [("unaligned", entry | 0x200), ("reserved-low", entry | 1), ("reserved-high", entry | 1 << 60)]
    {
        victims.victim(name).put_u64(good.l1_at() + 8, value);
    }
    let covered = VICTIM_CLUSTER / 8;
    victims.mounted(|mount| {
        for name in ["unaligned", "reserved-low", "reserved-high"] {
            let shown = File::open(mount.path(name).join("active.raw")).expect("only one table is bad");
            let errors = assert_equal_or_error(name, &shown, &victims.intact);
            assert_eq!(errors, (covered..2 * covered).collect::<Vec<_>>(), "{name}");
        }
    });
}

/// QEMU reads zeroes past the end of a file; an error is more honest. Other bytes are out of the question.
#[test]
// R2
fn references_past_the_end_of_the_file_read_as_zero_or_an_error() {
    let victims = Victims::new("");
    let good = Damage::to(victims.store.path("good.qcow2"));
    let far = good.len() + 64 * VICTIM_CLUSTER;
    let mut names = Vec::new();
    for (name, at, value) in [
        ("l2", good.l2_entry_at(0), far | 1 << 63),
        ("l1", good.l1_at(), far | 1 << 63),
        ("l1-table", header::L1_OFFSET, far),
        ("l1-table-very-far", header::L1_OFFSET, 1 << 40),
        ("snapshots", header::SNAPSHOTS_OFFSET, far),
    ] {
        victims.victim(name).put_u64(at, value);
        names.push(name.to_owned());
    }
    for len in
        [good.len() / 2, good.len() - 1, good.len() - 100, good.len() - VICTIM_CLUSTER, good.len() - 300_000]
    {
        let name = format!("cut-{len}");
        victims.victim(&name).set_len(len);
        names.push(name);
    }
    victims.mounted(|mount| {
        for name in &names {
            let oracle = victims.store.try_oracle(Path::new(&format!("{name}.qcow2")), "qcow2", None);
            match (File::open(mount.path(name).join("active.raw")), oracle) {
                (Ok(shown), Ok(oracle)) => {
                    assert_equal_or_error(name, &shown, &fs::read(oracle).expect("bytes"));
                }
                (Ok(shown), Err(why)) => {
                    let mut all = vec![0; victims.intact.len()];
                    assert!(shown.read_exact_at(&mut all, 0).is_err(), "{name} reads where QEMU says {why}");
                }
                (Err(_), _) => drop(problem_of(mount, name, &format!("{name}.qcow2"))),
            }
        }
    });
}

#[test]
fn files_cut_within_their_header_are_problems_or_no_images() {
    let victims = Victims::new("");
    for len in [0, 1, 3, 4, 8, 71, 72, 100, 103, 104, 111, 112, 500, 4095, 4096, 8192] {
        victims.victim(&format!("cut-{len}")).set_len(len);
    }
    victims.mounted(|mount| {
        read_everything(mount.dir());
        for len in [4, 8, 71, 72, 100, 103] {
            problem_of(mount, &format!("cut-{len}"), &format!("cut-{len}.qcow2"));
        }
    });
}

#[test]
fn invalid_subclusters_are_an_error_for_their_cluster_alone() {
    let store = Store::new();
    let cluster = 64 * KIB;
    for name in ["good", "both", "no-offset", "compressed"] {
        let name = format!("{name}.qcow2");
        store.create(&name, 2 * MIB, "extended_l2=on");
        store.io(&name, "qcow2", [store.write(&mut Rng::new(9), 0, 2 * MIB)]);
    }
    let want = fs::read(store.oracle("good.qcow2", "qcow2")).expect("what QEMU reads");
    let hit = 5;
    for (name, entry, bitmap) in [
        // A subcluster both allocated and zero; allocated nowhere; a bitmap where there can be none.
        ("both", None, 1_u64 << 35 | 1 << 3),
        ("no-offset", Some(0), 1),
        ("compressed", Some(1 << 62 | 0x50000), 1),
    ] {
        let image = Damage::to(store.path(format!("{name}.qcow2")));
        let at = (image.u64(image.l1_at()) & 0x00ff_ffff_ffff_fe00) + hit * 16;
        if let Some(entry) = entry {
            image.put_u64(at, entry);
        }
        image.put_u64(at + 8, bitmap);
    }
    let mount = Mount::new(&store);
    assert_chain(&store, &mount, "good", "good.qcow2", "qcow2");
    for name in ["both", "no-offset", "compressed"] {
        let shown = File::open(mount.path(name).join("active.raw")).expect("only one cluster is bad");
        for (number, want) in want.chunks(cluster as usize).enumerate() {
            let mut have = vec![0; want.len()];
            let result = shown.read_exact_at(&mut have, number as u64 * cluster);
            if number as u64 == hit {
                // Only the subclusters hit have to fail.
                let whole = errno(result).or_else(|| panic!("{name} reads its bad cluster"));
                assert_eq!(whole, Some(Errno::IO), "{name}");
            } else {
                result.unwrap_or_else(|e| panic!("{name}, cluster {number}: {e}"));
                assert!(have == want, "{name}, cluster {number}");
            }
        }
    }
    mount.umount();
}

#[test]
// B1
fn streams_that_unpack_to_far_more_than_a_cluster_stop_at_its_end() {
    let store = Store::new();
    let cluster = 64 * KIB as usize;
    let mut bomb = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
    for _ in 0..96 {
        bomb.write_all(&vec![b'A'; MIB as usize]).expect("memory");
    }
    let deflate = bomb.finish().expect("memory");
    let zstd = |window_log: u32| {
        let mut bomb = zstd::Encoder::new(Vec::new(), 19).expect("an encoder");
        bomb.window_log(window_log).expect("a window");
        for _ in 0..512 {
            bomb.write_all(&vec![b'A'; MIB as usize]).expect("memory");
        }
        bomb.finish().expect("memory")
    };
    let short = {
        let mut stream = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::best());
        stream.write_all(&[b'A'; 1000]).expect("memory");
        stream.finish().expect("memory")
    };
    for (name, stream, options) in [
        ("deflate", &deflate, ""),
        ("zstd", &zstd(21), "compression_type=zstd"),
        // QEMU would let an image make it allocate this window.
        ("greedy-zstd", &zstd(27), "compression_type=zstd"),
        ("ends-early", &short, ""),
        (
            "ends-early-zstd",
            &zstd::encode_all(&[b'A'; 1000][..], 3).expect("memory"),
            "compression_type=zstd",
        ),
    ] {
        let name = format!("{name}.qcow2");
        store.create(&name, MIB, options);
        store.io(&name, "qcow2", [store.write(&mut Rng::new(4), 0, MIB)]);
        let image = Damage::to(store.path(&name));
        let at = image.append(stream);
        let sectors = (stream.len() as u64).div_ceil(512) - 1;
        assert!(sectors < 256, "{} bytes are more than a descriptor can name", stream.len());
        image.put_u64(image.l2_entry_at(0), 1 << 62 | sectors << 54 | at);
    }
    let mount = Mount::new(&store);
    for name in ["deflate", "zstd", "greedy-zstd", "ends-early", "ends-early-zstd"] {
        let shown = File::open(mount.path(name).join("active.raw")).expect("only one cluster is odd");
        let mut have = vec![0; cluster];
        let first = shown.read_exact_at(&mut have, 0);
        if name.starts_with("ends") || name.starts_with("greedy") {
            assert_eq!(errno(first), Some(Errno::IO), "{name}");
        } else {
            first.unwrap_or_else(|e| panic!("{name}: {e}"));
            assert!(have.iter().all(|b| *b == b'A'), "{name}");
        }
        shown.read_exact_at(&mut have, cluster as u64).expect("the next cluster");
    }
    assert_memory_is_bounded(&mount);
    mount.umount();
}

#[test]
fn ten_thousand_internal_snapshots_are_listed_and_can_be_read() {
    const COUNT: u32 = 10_000;
    let store = Store::new();
    store.create("web.qcow2", MIB, "");
    store.io("web.qcow2", "qcow2", [store.write(&mut Rng::new(5), 0, MIB)]);
    let image = Damage::to(store.path("web.qcow2"));
    let mut table = Vec::new();
    for number in 1..=COUNT {
        let (id, name) = (number.to_string(), format!("s{number:05}"));
        table.extend(image.l1_at().to_be_bytes());
        table.extend(image.u32(header::L1_ENTRY_COUNT).to_be_bytes());
        table.extend((id.len() as u16).to_be_bytes());
        table.extend((name.len() as u16).to_be_bytes());
        table.extend((1_700_000_000 + number).to_be_bytes());
        table.extend([0; 12]);
        table.extend(0_u32.to_be_bytes());
        table.extend(16_u32.to_be_bytes());
        table.extend(0_u64.to_be_bytes());
        table.extend(MIB.to_be_bytes());
        table.extend(id.bytes().chain(name.bytes()));
        table.resize(table.len().next_multiple_of(8), 0);
    }
    let at = image.append(&table);
    image.put_u64(header::SNAPSHOTS_OFFSET, at);
    image.put_u32(header::SNAPSHOT_COUNT, COUNT);
    let info = store.info("web.qcow2", "qcow2");
    assert_eq!(info["snapshots"].as_array().map(Vec::len), Some(COUNT as usize), "QEMU reads the table");

    let mount = Mount::new(&store);
    let shown = mount.names("web/snapshots");
    let took = mount.processor_time();
    assert!(took < READY, "mounting and listing took {took:?}");
    assert_eq!(shown.len(), COUNT as usize);
    for name in [&shown[0], &shown[5000], &shown[9999]] {
        assert_same(&mount.path("web/snapshots").join(name), &store.oracle("web.qcow2", "qcow2"));
    }
    assert_memory_is_bounded(&mount);
    mount.umount();
}

/// A few MiB of L1 table that all name one L2 table make petabytes; a search for the next hole or the next
/// data must be answered, and must not delay other requests.
#[test]
fn petabytes_of_tables_do_not_delay_a_seek() {
    /// Of processor time, for all answers together.
    const LIMIT: Duration = Duration::from_secs(8);
    let store = Store::new();
    store.create("good.qcow2", MIB, "");
    store.scribble("good.qcow2", "qcow2", 9);
    let oracle = store.oracle("good.qcow2", "qcow2");
    let l1_entries = 4 << 20;
    for (name, entry) in [("zero", 1), ("nothing", 0), ("data", 1 << 63)] {
        let file = format!("{name}.qcow2");
        store.create(&file, MIB, "");
        store.io(&file, "qcow2", ["write -q -P 1 0 64k"]);
        let image = Damage::to(store.path(&file));
        let data = image.host_offset(0);
        let l2 = image.u64(image.l1_at());
        let value: u64 = if name == "data" { entry | data } else { entry };
        let table = image.l2_entry_at(0);
        image.put(table, &value.to_be_bytes().repeat(8192));
        let l1 = image.append(&l2.to_be_bytes().repeat(l1_entries));
        image.put_u64(header::L1_OFFSET, l1);
        image.put_u32(header::L1_ENTRY_COUNT, l1_entries as u32);
        image.put_u64(header::SIZE, (l1_entries as u64) << 29);
        store.overlay_sized(&format!("on-{name}.qcow2"), &file, "qcow2", MIB);
    }
    let mount = Mount::new(&store);
    let (done, finished) = mpsc::channel();
    let mut asked = 0;
    for name in ["zero", "nothing", "data"] {
        for (view, data) in [("active.raw", true), ("active.raw", false)] {
            // The overlay is small: the range past its end must cost nothing.
            let path = mount.path(format!("on-{name}")).join(view);
            let below = mount.path(format!("on-{name}/snapshots/{name}.raw"));
            for path in [path, below] {
                let done = done.clone();
                asked += 1;
                std::thread::spawn(move || {
                    let file = File::open(&path).expect("a view");
                    let at = if data { SeekFrom::Data(0) } else { SeekFrom::Hole(0) };
                    let _ = done.send((path, seek(&file, at)));
                });
            }
        }
    }
    assert_same(&mount.path("good/active.raw"), &oracle);
    for _ in 0..asked {
        let (path, found) = finished.recv_timeout(hang()).expect("an answer");
        assert!(matches!(found, Ok(_) | Err(Errno::NXIO)), "{}: {found:?}", path.display());
    }
    let took = mount.processor_time();
    assert!(took < LIMIT, "the answers took {took:?}");
    assert_memory_is_bounded(&mount);
    mount.umount();
}
