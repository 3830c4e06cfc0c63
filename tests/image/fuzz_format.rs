//! Any bytes as an image: no panic, no endless loop, and parsed values keep their invariants.
//!
//! Seeded mutations of good structures, on stable Rust; fuzz/mod.rs says how to replay them. The
//! directory fuzz at the project's root has the same for cargo-fuzz.

use std::io::Write;

use chainfs::format::entry::{EntryFormat, Mapping};
use chainfs::format::header::{Compression, PROBE_LEN, needed_len};
use chainfs::format::snapshot::{SnapshotParser, parse_table};
use chainfs::format::{Frozen, Header, Version, bitmap, compressed, refcount};
use chainfs::image::check::check;
use chainfs::image::create::{CreateOptions, NewBacking, initial_image};
use chainfs::units::{ClusterBits, GuestOffset};

use support::fuzz::fuzz;

fn options(cluster_bits: u32, size: u64) -> CreateOptions {
    let mark = Frozen { seconds: 1_700_000_000, nanoseconds: 7, description: "before the upgrade".into() };
    let backing = Some(NewBacking { name: b"base.raw".to_vec(), format: "raw".into() });
    CreateOptions { size: Some(size), cluster_bits, backing, frozen: Some(mark), ..CreateOptions::default() }
}

/// Headers of both versions, with the features that change how the rest is read.
fn headers() -> Vec<Vec<u8>> {
    let plain = initial_image(&CreateOptions { size: Some(1 << 20), ..CreateOptions::default() }).unwrap();
    let full = initial_image(&options(12, 1 << 20)).unwrap();
    let flagged = |at: usize, value: u8| {
        let mut image = full.clone();
        image[at] = value;
        image
    };
    vec![full.clone(), plain, flagged(7, 2), flagged(79, 1), flagged(79, 4), flagged(95, 1)]
}

#[test]
fn any_header_parses_or_has_a_reason() {
    fuzz("header", &headers(), |bytes, random| {
        let file_len = if random.below(2) == 0 { bytes.len() as u64 } else { random.number() };
        let need = needed_len(&bytes[..bytes.len().min(PROBE_LEN)]);
        let have = need.as_ref().map_or(bytes.len(), |need| bytes.len().min(*need as usize));
        for header in [Header::parse(&bytes[..have], file_len), Header::parse_for_check(bytes, file_len)] {
            match header {
                Ok(header) => {
                    let covered = u128::from(header.l1.entries) * u128::from(header.l1_entry_span());
                    assert!(covered >= header.virtual_size.into());
                    assert!(header.cluster.aligned(header.l1.offset.0));
                    assert!(header.backing.is_none_or(|backing| !backing.name.is_empty()));
                    if let Some(mark) = header.frozen {
                        assert_eq!(Frozen::parse(&mark.encode()), Ok(mark));
                    }
                }
                Err(reason) => {
                    assert!(
                        !reason.to_string().is_empty() && reason.fact().len() <= reason.to_string().len()
                    );
                }
            }
        }
    });
}

#[test]
fn any_entry_decodes_or_has_a_reason() {
    fuzz("entries", &[vec![0; 16]], |_, random| {
        let format = EntryFormat {
            version: if random.below(4) == 0 { Version::V2 } else { Version::V3 },
            cluster: ClusterBits::new(9 + random.below(13) as u32).unwrap(),
            extended: random.below(2) == 0,
            data_file: random.below(4) == 0,
        };
        for _ in 0..100 {
            let (entry, bitmap, guest) = (random.number(), random.number(), GuestOffset(random.number()));
            if let Ok(l1) = format.l1(entry) {
                assert!(l1.l2.is_none_or(|at| at.0 < 1 << 56 && format.cluster.aligned(at.0)));
            }
            if let Ok(l2) = format.l2(entry, guest) {
                check_mapping(format, l2.mapping);
            }
            if let Ok(l2) = format.l2_extended(entry, bitmap, guest) {
                let mut at = 0;
                while at < 32 {
                    let (mapping, run) = l2.run(at);
                    assert!((at..at + run).all(|other| kind(l2.mapping(other)) == kind(mapping)));
                    at += run;
                }
                assert_eq!(at, 32);
            }
            if let Ok(Some(block)) = refcount::table_entry(entry, format.cluster) {
                assert!(format.cluster.aligned(block.0));
            }
            drop(bitmap::table_entry(entry, format.cluster));
        }
    });
}

fn kind(mapping: Mapping) -> std::mem::Discriminant<Mapping> {
    std::mem::discriminant(&mapping)
}

fn check_mapping(format: EntryFormat, mapping: Mapping) {
    match mapping {
        Mapping::Data(at) | Mapping::Zero(Some(at)) => {
            assert!(at.0 < 1 << 56 && format.cluster.aligned(at.0));
        }
        Mapping::Compressed(compressed) => {
            assert!(compressed.at.0 < 1 << 56 && u64::from(compressed.len) <= 2 * format.cluster.size());
            assert!(compressed.len > 0);
        }
        Mapping::Zero(None) | Mapping::Hole => {}
    }
}

fn snapshot_table() -> Vec<u8> {
    let mut out = Vec::new();
    for (id, name, extra) in [("1", "monday", 24usize), ("22", "a longer name", 16), ("3", "", 40)] {
        let mut entry = vec![0; 40 + extra];
        entry[5] = 1;
        entry[11] = 2;
        (entry[13], entry[15], entry[39]) = (id.len() as u8, name.len() as u8, extra as u8);
        entry.extend(id.bytes().chain(name.bytes()));
        entry.resize(entry.len().next_multiple_of(8), 0);
        out.extend(entry);
    }
    out
}

#[test]
fn any_snapshot_table_parses_or_has_a_reason() {
    let image = initial_image(&CreateOptions { size: Some(1 << 20), ..CreateOptions::default() }).unwrap();
    let mut header = Header::parse(&image, image.len() as u64).unwrap();
    header.snapshots.count = 3;
    fuzz("snapshots", &[snapshot_table()], |bytes, random| {
        let whole = parse_table(bytes, header.snapshots.count, header.cluster, header.version);
        let mut parser = SnapshotParser::new(&header);
        let fed = bytes.chunks(1 + random.below(50)).try_for_each(|chunk| parser.feed(chunk).map(drop));
        assert!(parser.table_len() <= bytes.len() as u64);
        // In chunks or at once: the same answer.
        assert_eq!(fed.and_then(|()| parser.finish()).ok(), whole.ok());
    });
}

#[test]
fn any_bitmap_directory_parses_or_has_a_reason() {
    let mut entry = vec![0; 24];
    (entry[5], entry[11], entry[16], entry[17], entry[19]) = (7, 1, 1, 16, 5);
    entry.extend(b"dirty\0\0\0");
    let directory = [entry.clone(), entry].concat();
    fuzz("bitmaps", &[directory], |bytes, random| {
        let count = if random.below(4) == 0 { random.number() as u32 } else { 2 };
        if let Ok(bitmaps) = bitmap::parse_directory(bytes, count, ClusterBits::new(16).unwrap()) {
            assert!(bitmaps.iter().all(|bitmap| !bitmap.name.is_empty() && bitmap.name.len() <= 1023));
        }
    });
}

#[test]
fn any_compressed_cluster_unpacks_or_has_a_reason() {
    const CLUSTER: usize = 65_536;
    let text: Vec<u8> = (0..CLUSTER).map(|at| (at * at / 7 % 61) as u8).collect();
    let mut deflate = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    deflate.write_all(&text).unwrap();
    let corpus = [deflate.finish().unwrap(), zstd::encode_all(text.as_slice(), 3).unwrap()];
    fuzz("compressed", &corpus, |bytes, _| {
        for kind in [Compression::Deflate, Compression::Zstd] {
            let mut out = vec![0; CLUSTER];
            drop(compressed::decompress(kind, bytes, &mut out));
        }
        let mut empty = [];
        assert_eq!(compressed::decompress(Compression::Deflate, bytes, &mut empty), Ok(()));
    });
}

/// A small image with data in each of its tables, so that there is something to damage.
fn populated(cluster_bits: u32) -> Vec<u8> {
    let mut image = initial_image(&options(cluster_bits, 64 << cluster_bits)).unwrap();
    let cluster = 1usize << cluster_bits;
    let l1 = Header::parse(&image, image.len() as u64).unwrap().l1.offset.0 as usize;
    let l2 = image.len();
    image.resize(l2 + 10 * cluster, 0);
    let copied = |at: usize| (at as u64 | 1 << 63).to_be_bytes();
    image[l1..l1 + 8].copy_from_slice(&copied(l2));
    for index in 0..8 {
        let data = copied(l2 + (1 + index) * cluster);
        image[l2 + index * 8..][..8].copy_from_slice(&data);
    }
    let snapshots = image.len() - cluster;
    let table = snapshot_table();
    image[snapshots..snapshots + table.len()].copy_from_slice(&table);
    image[60..64].copy_from_slice(&3u32.to_be_bytes());
    image[64..72].copy_from_slice(&(snapshots as u64).to_be_bytes());
    image
}

#[test]
fn any_image_is_checked_or_has_a_reason() {
    let mut corpus = vec![populated(9), populated(12)];
    // Extended entries; an external data file.
    corpus.extend([(14, 16), (12, 4)].map(|(cluster_bits, flags)| {
        let mut image = populated(cluster_bits);
        image[79] = flags;
        image
    }));
    corpus.extend(headers());
    fuzz("check", &corpus, |bytes, random| {
        // Tables lie at cluster starts: damage some there, too.
        let mut bytes = bytes.to_vec();
        for _ in 0..random.below(4) {
            let clusters = (bytes.len() / 512).max(1);
            let at = random.below(clusters) * 512 + 8 * random.below(8);
            if at + 8 <= bytes.len() {
                random.put(&mut bytes, at, 8);
            }
        }
        if let Ok(report) = check(&bytes, "image") {
            assert_eq!(report.exit_code() == 0, report.findings.is_empty());
            assert!(report.findings.len() <= 1000 && !report.to_string().is_empty());
        }
    });
}
