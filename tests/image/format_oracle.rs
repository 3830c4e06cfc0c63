//! The format layer reads QEMU's output: headers over the options of `qemu-img create`.

use std::fs;
use std::path::Path;

use chainfs::format::header::{BackingFile, Compression, PROBE_LEN, needed_len};
use chainfs::format::snapshot::SnapshotParser;
use chainfs::format::{Header, Version, bitmap};
use support::oracle::Scratch;

fn header(path: impl AsRef<Path>) -> Header {
    let file = fs::read(path).unwrap();
    let need = needed_len(&file[..file.len().min(PROBE_LEN)]).unwrap();
    Header::parse(&file[..file.len().min(need as usize)], file.len() as u64).unwrap()
}

#[test]
fn every_geometry_that_qemu_creates_parses() {
    let scratch = Scratch::new();
    let path = scratch.path("image.qcow2");
    for cluster_bits in 9..=21 {
        for (refcount_order, size) in
            (0..=6).zip([0u64, 512, 1 << 20, (1 << 30) + 512, 3 << 20, 1 << 24, 1 << 28])
        {
            let options =
                format!("cluster_size={},refcount_bits={}", 1u32 << cluster_bits, 1 << refcount_order);
            scratch.create("image.qcow2", &options, &size.to_string());
            let header = header(&path);
            let found = (header.cluster.bits(), header.refcount_order, header.virtual_size);
            assert_eq!(found, (cluster_bits, refcount_order, size), "{options}");
            // QEMU leaves the feature names out of small clusters.
            let named = fs::read(&path).unwrap().windows(11).take(4096).any(|bytes| bytes == b"corrupt bit");
            assert_eq!(!header.feature_names.is_empty(), named, "{options}");
            assert!(header.unsupported.is_none());
        }
    }
}

#[test]
fn every_option_that_qemu_creates_parses() {
    let scratch = Scratch::new();
    let (path, data) = (scratch.path("image.qcow2"), scratch.path("data.raw"));
    let create = |options: &str| {
        scratch.create("image.qcow2", options, "64M");
        header(&path)
    };
    let v2 = create("compat=0.10");
    assert_eq!((v2.version, v2.header_len), (Version::V2, 72));
    let v3 = create("compat=1.1,lazy_refcounts=on,compression_type=zstd");
    assert_eq!((v3.version, v3.compression, v3.lazy_refcounts()), (Version::V3, Compression::Zstd, true));
    assert!(create("extended_l2=on").extended_l2());
    let external = create(&format!("data_file={data},data_file_raw=on")).data_file.unwrap();
    assert_eq!((external.name, external.raw), (Some(data.clone().into_bytes()), true));
    for preallocation in ["metadata", "falloc", "full"] {
        create(&format!("preallocation={preallocation}"));
    }
}

#[test]
fn backing_names_of_both_versions_parse() {
    let scratch = Scratch::new();
    let (base, path) = (scratch.path("base.raw"), scratch.path("top.qcow2"));
    fs::write(&base, [0; 1024]).unwrap();
    for compat in ["0.10", "1.1"] {
        let options = format!("compat={compat}");
        scratch.img(&format!("create -q -f qcow2 -o {options} -F raw -b {base} {path}"));
        let expected = BackingFile { name: base.clone().into_bytes(), format: Some("raw".into()) };
        assert_eq!(header(&path).backing, Some(expected));
    }
}

#[test]
fn snapshots_and_bitmaps_parse() {
    let scratch = Scratch::new();
    let path = scratch.path("image.qcow2");
    scratch.create("image.qcow2", "", "64M");
    for name in ["monday", "tuesday", "monday"] {
        scratch.img(&format!("snapshot -c {name} {path}"));
    }
    scratch.img(&format!("bitmap --add -g 64K {path} dirty"));
    let (file, header) = (fs::read(&path).unwrap(), header(&path));
    let mut parser = SnapshotParser::new(&header);
    for chunk in file[header.snapshots.offset.0 as usize..].chunks(50) {
        if parser.feed(chunk).unwrap() {
            break;
        }
    }
    let snapshots = parser.finish().unwrap();
    let names: Vec<_> = snapshots.iter().map(|found| (found.id.as_slice(), found.name.as_slice())).collect();
    assert_eq!(names, [(b"1".as_slice(), b"monday".as_slice()), (b"2", b"tuesday"), (b"3", b"monday")]);
    assert!(snapshots.iter().all(|found| found.virtual_size == Some(64 << 20) && found.icount == Some(0)));

    assert!(header.bitmaps_consistent());
    let place = header.bitmaps.unwrap();
    let start = place.directory.0 as usize;
    let directory = &file[start..start + place.directory_len as usize];
    let bitmaps = bitmap::parse_directory(directory, place.count, header.cluster).unwrap();
    assert_eq!(
        (bitmaps.len(), bitmaps[0].name.as_slice(), bitmaps[0].granularity_bits),
        (1, b"dirty".as_slice(), 16)
    );
    assert!(bitmaps[0].auto && !bitmaps[0].in_use);
}
