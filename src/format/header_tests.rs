//! Each rule of the header, by changing a valid one.

use super::super::extension::{BACKING_FORMAT, FEATURE_NAMES};
use super::super::feature::name_row;
use super::super::frozen::FROZEN_MAGIC;
use super::super::testing::{Image, extension};
use super::*;

const BITMAPS_MAGIC: u32 = 0x2385_2875;
const CRYPTO_MAGIC: u32 = 0x0537_BE77;
const DATA_FILE_MAGIC: u32 = 0x4441_5441;

fn bitmaps(count: u32, reserved: u32, len: u64, offset: u64) -> Vec<u8> {
    let words = [u64::from(count) << 32 | u64::from(reserved), len, offset];
    extension(BITMAPS_MAGIC, &words.map(u64::to_be_bytes).concat())
}

fn crypto(offset: u64, len: u64) -> Vec<u8> {
    extension(CRYPTO_MAGIC, &[offset, len].map(u64::to_be_bytes).concat())
}

#[test]
fn a_plain_header_parses_to_its_fields() {
    let header = Image::v3().u32(60, 2).u64(64, 0x20000).parse().unwrap();
    assert_eq!((header.version, header.cluster.bits(), header.virtual_size), (Version::V3, 16, 1 << 30));
    assert_eq!(header.l1, L1Table { offset: HostOffset(0x30000), entries: 2 });
    assert_eq!(header.refcount_table, RefcountTable { offset: HostOffset(0x10000), clusters: 1 });
    assert_eq!(header.snapshots, SnapshotTable { offset: HostOffset(0x20000), count: 2 });
    assert_eq!((header.refcount_order, header.header_len), (4, 112));
    assert_eq!(
        (header.compression, header.encryption, header.unsupported),
        (Compression::Deflate, None, None)
    );
    assert_eq!((header.backing, header.data_file, header.bitmaps, header.frozen), (None, None, None, None));
}

#[test]
fn a_version_2_header_has_72_bytes_and_may_have_extensions() {
    let header =
        Image::v2().at(72, &extension(BACKING_FORMAT, b"raw")).backing(200, b"base").parse().unwrap();
    assert_eq!((header.version, header.header_len, header.refcount_order), (Version::V2, 72, 4));
    assert_eq!(header.backing, Some(BackingFile { name: b"base".to_vec(), format: Some("raw".into()) }));
    // Its bytes from 72 on are not feature bits.
    assert_eq!((header.incompatible, header.compatible, header.autoclear), (0, 0, 0));
}

#[test]
fn magic_version_and_cluster_size() {
    assert_eq!(Image::v3().u32(0, 0x5146_49fa).reason(), Malformed::Magic(0x5146_49fa));
    for version in [0, 1, 4] {
        assert_eq!(Image::v3().u32(4, version).reason(), Malformed::Version(version));
    }
    for bits in [0, 8, 22, 64] {
        assert_eq!(Image::v3().u32(20, bits).reason(), Malformed::ClusterBits(bits));
    }
    assert!(has_magic(b"QFI\xfb") && !has_magic(b"QFI") && !has_magic(b"QFI\xfa"));
}

#[test]
fn a_truncated_header_is_refused() {
    let short = |bytes: &[u8]| Header::parse(bytes, bytes.len() as u64).unwrap_err();
    let (v3, v2) = (Image::v3().u32(100, 120).bytes, Image::v2().bytes);
    assert_eq!(short(&[]), Malformed::Truncated { what: "header", need: 72, have: 0 });
    assert_eq!(short(b"other"), Malformed::Magic(u32::from_be_bytes(*b"othe")));
    assert_eq!(short(&v2[..71]), Malformed::Truncated { what: "header", need: 72, have: 71 });
    assert_eq!(short(&v3[..103]), Malformed::Truncated { what: "header", need: 104, have: 103 });
    assert_eq!(short(&v3[..119]), Malformed::Truncated { what: "header", need: 120, have: 119 });
}

#[test]
fn needed_len_ends_with_the_backing_name_or_the_cluster() {
    assert_eq!(needed_len(&Image::v3().bytes[..PROBE_LEN]), Ok(65_536));
    assert_eq!(needed_len(&Image::v3().backing(500, b"base").bytes[..PROBE_LEN]), Ok(504));
    assert_eq!(needed_len(&Image::v2().backing(72, b"base").bytes[..72]), Ok(112));
    assert_eq!(needed_len(&Image::v3().u64(8, u64::MAX).u32(16, 9).bytes[..PROBE_LEN]), Ok(65_536));
    assert_eq!(needed_len(&[0; 10]), Err(Malformed::Magic(0)));
    let image = Image::v3().backing(500, b"base");
    assert!(Header::parse(&image.bytes[..504], image.file_len).is_ok());
}

#[test]
fn header_length() {
    for len in [0, 72, 103, 105, 109, 111, 65_544] {
        assert_eq!(Image::v3().u32(100, len).reason(), Malformed::HeaderLength(len));
    }
    assert_eq!(Image::v3().u32(100, 104).parse().unwrap().header_len, 104);
    assert_eq!(Image::v3().u32(100, 65_536).parse().unwrap().header_len, 65_536);
    // Fields that a later version adds are ignored.
    assert!(Image::v3().u32(100, 120).at(105, &[1; 15]).parse().is_ok());
}

#[test]
fn backing_name() {
    let header = Image::v3().backing(65_536 - 4, b"base").parse().unwrap();
    assert_eq!(header.backing, Some(BackingFile { name: b"base".to_vec(), format: None }));
    assert_eq!(Image::v3().backing(112, b"base").parse().unwrap().backing.unwrap().name, b"base");
    assert_eq!(Image::v3().u64(8, 112).parse().unwrap().backing, None);
    assert_eq!(Image::v3().u64(8, 65_536).parse().unwrap().backing, None);
    assert_eq!(Image::v3().u32(16, 4).parse().unwrap().backing, None);

    assert_eq!(Image::v3().u64(8, 65_537).reason(), Malformed::BackingOffset(65_537));
    let inside = Malformed::BackingInHeader { offset: 111, header_len: 112 };
    assert_eq!(Image::v3().backing(111, b"base").reason(), inside);
    assert_eq!(Image::v3().backing(500, b"ba\0e").reason(), Malformed::BackingNul);
    let what = "length of the backing file name";
    let long = Image::v3().u64(8, 200).u32(16, 1024).reason();
    assert_eq!(long, Malformed::TooLarge { what, found: 1024, max: 1023 });
    let long = Image::v3().u64(8, 65_533).u32(16, 4).reason();
    assert_eq!(long, Malformed::TooLarge { what, found: 4, max: 3 });
    let cut = Image::v3().u32(36, 0).u64(24, 0).backing(500, b"base").file_len(503).reason();
    assert_eq!(cut, Malformed::Truncated { what: "backing file name", need: 504, have: 503 });
}

#[test]
fn extensions_end_where_the_backing_name_starts() {
    let image = Image::v3().at(112, &extension(BACKING_FORMAT, b"qcow2")).backing(128, b"base");
    assert_eq!(image.parse().unwrap().backing.unwrap().format.as_deref(), Some("qcow2"));
    let inside = image.backing(124, b"base").reason();
    assert_eq!(inside, Malformed::ExtensionTooLong { magic: BACKING_FORMAT, len: 5, left: 4 });
}

#[test]
fn encryption() {
    assert_eq!(Image::v3().u32(32, 3).reason(), Malformed::CryptMethod(3));
    assert_eq!(Image::v3().u32(32, 1).parse().unwrap().encryption, Some(Encryption::AesCbc));
    let luks = Image::v3().u32(32, 2);
    assert_eq!(luks.reason(), Malformed::CryptoHeaderMissing);
    let header = luks.clone().at(112, &crypto(0x20000, 4096)).parse().unwrap();
    assert_eq!(header.encryption, Some(Encryption::Luks));
    assert_eq!(header.crypto_header, Some(CryptoHeader { offset: HostOffset(0x20000), len: 4096 }));
    let (what, unit) = ("LUKS header", 65_536);
    let reason = luks.at(112, &crypto(0x20200, 4096)).reason();
    assert_eq!(reason, Malformed::Unaligned { what, offset: 0x20200, unit });
    for method in [0, 1] {
        let reason = Image::v3().u32(32, method).at(112, &crypto(0x20000, 4096)).reason();
        assert_eq!(reason, Malformed::CryptoHeaderUnexpected);
    }
}

#[test]
fn the_l1_table_covers_the_disk_within_its_limits() {
    let small = Image::v3().u32(36, 1).reason();
    assert_eq!(small, Malformed::L1TooSmall { entries: 1, need: 2 });
    let one_more_byte = Image::v3().u64(24, (1 << 30) + 1).reason();
    assert_eq!(one_more_byte, Malformed::L1TooSmall { entries: 2, need: 3 });
    let extended = Image::v3().u64(72, feature::EXTENDED_L2).reason();
    assert_eq!(extended, Malformed::L1TooSmall { entries: 2, need: 4 });
    let huge = Image::v3().u64(24, u64::MAX).reason();
    assert_eq!(huge, Malformed::L1TooSmall { entries: 2, need: 1 << 35 });
    let (what, found, max) = ("length of the L1 table", (32 << 20) + 8, 32 << 20);
    assert_eq!(Image::v3().u32(36, (4 << 20) + 1).reason(), Malformed::TooLarge { what, found, max });
    assert!(Image::v3().u64(24, 0).u32(36, 0).parse().is_ok());
}

#[test]
fn the_l1_table_lies_in_the_file_and_not_on_other_tables() {
    let (what, unit) = ("L1 table", 65_536);
    assert_eq!(Image::v3().u64(40, 0x30200).reason(), Malformed::Unaligned { what, offset: 0x30200, unit });
    let offset = 0x7fff_ffff_ffff_0000;
    let range = Image::v3().u64(40, offset).u32(36, 8192).reason();
    assert_eq!(range, Malformed::OutOfRange { what, offset, len: 65_536 });
    let offset = 0xffff_ffff_ffff_0000;
    assert_eq!(Image::v3().u64(40, offset).reason(), Malformed::OutOfRange { what, offset, len: 16 });
    assert!(Image::v3().file_len(0x30010).parse().is_ok());
    let cut = Image::v3().file_len(0x3000f);
    assert_eq!(cut.reason(), Malformed::BeyondEnd { what, end: 0x30010, file_len: 0x3000f });
    assert!(Header::parse_for_check(&cut.bytes, cut.file_len).is_ok());
    assert_eq!(Image::v3().u64(40, 0).reason(), Malformed::Overlap { first: "header", second: "L1 table" });
    let both = Image::v3().u64(40, 0x10000).reason();
    assert_eq!(both, Malformed::Overlap { first: "L1 table", second: "refcount table" });
}

#[test]
fn the_refcount_table_is_there_within_its_limits() {
    // Readers do without it; a writer checks it.
    let damage = |image: &Image| image.parse().unwrap().refcount_damage.expect("damage");
    let (what, unit) = ("refcount table", 65_536);
    let unaligned = Image::v3().u64(48, 0x10200);
    assert_eq!(damage(&unaligned), Malformed::Unaligned { what, offset: 0x10200, unit });
    let counted_anew = Header::parse_for_check(&unaligned.bytes, unaligned.file_len).unwrap().refcount_table;
    assert_eq!(counted_anew.clusters, 0);
    let offset = 0x7fff_ffff_ffff_0000;
    assert_eq!(damage(&Image::v3().u64(48, offset)), Malformed::OutOfRange { what, offset, len: 65_536 });
    let none = Image::v3().u32(56, 0);
    assert_eq!(damage(&none), Malformed::NoRefcountTable);
    assert!(Header::parse_for_check(&none.bytes, none.file_len).is_ok());
    let on_header = Malformed::Overlap { first: "header", second: what };
    assert_eq!(damage(&Image::v3().u64(48, 0)), on_header);
    let (what, found, max) = ("length of the refcount table", 129 << 16, 8 << 20);
    assert_eq!(damage(&Image::v3().u32(56, 129)), Malformed::TooLarge { what, found, max });
    // Its location in the file is checked by the checker.
    assert!(Image::v3().u64(48, 0x100_0000).parse().is_ok());
    for order in [7, 64, u32::MAX] {
        let image = Image::v3().u32(96, order);
        assert_eq!(damage(&image), Malformed::RefcountOrder(order));
        let checked = Header::parse_for_check(&image.bytes, image.file_len);
        assert_eq!(checked.unwrap_err(), Malformed::RefcountOrder(order));
    }
}

#[test]
fn the_snapshot_table_is_aligned_even_without_snapshots() {
    let (what, unit) = ("snapshot table", 65_536);
    assert_eq!(Image::v3().u64(64, 1).reason(), Malformed::Unaligned { what, offset: 1, unit });
    let overlap = Malformed::Overlap { first: "header", second: "snapshot table" };
    assert_eq!(Image::v3().u32(60, 1).reason(), overlap);
    let (what, max) = ("number of snapshots", 65_536);
    assert_eq!(Image::v3().u32(60, 65_537).reason(), Malformed::TooLarge { what, found: 65_537, max });
}

#[test]
fn compression_type_and_its_bit_agree() {
    let image = |bit: bool, kind: u8| Image::v3().u64(72, u64::from(bit) << 3).at(104, &[kind]);
    assert_eq!(image(true, 1).parse().unwrap().compression, Compression::Zstd);
    assert_eq!(image(true, 0).reason(), Malformed::CompressionType { bit: true, kind: 0 });
    assert_eq!(image(false, 1).reason(), Malformed::CompressionType { bit: false, kind: 1 });
    assert_eq!(image(true, 2).parse().unwrap().unsupported, Some(Unsupported::CompressionType(2)));
    // A header of 104 bytes has no such field, whatever follows it.
    let short = image(true, 1).u32(100, 104).u32(104, 0).reason();
    assert_eq!(short, Malformed::CompressionType { bit: true, kind: 0 });
}

#[test]
fn subclusters_need_clusters_of_16_kib() {
    let image = Image::v3().u64(72, feature::EXTENDED_L2).u64(24, 512);
    assert_eq!(image.clone().u32(20, 13).reason(), Malformed::SubclustersTooSmall(13));
    let header = image.u32(20, 14).parse().unwrap();
    assert!(header.extended_l2());
    assert_eq!((header.entry_format().l2_entries(), header.l1_entry_span()), (1024, 1024 << 14));
}

#[test]
fn unknown_features_leave_the_backing_name_readable() {
    let names = extension(FEATURE_NAMES, &name_row(0, 9, "warp"));
    let header = Image::v3().u64(72, 1 << 9 | 1).at(112, &names).backing(500, b"base").parse().unwrap();
    assert_eq!(header.unsupported, Some(Unsupported::Features(vec!["\"warp\" (bit 9)".into()])));
    assert_eq!(header.backing.unwrap().name, b"base");
    assert!(Image::v3().u64(80, !0).parse().unwrap().unsupported.is_none());
    assert!(Image::v3().u64(88, !3).parse().unwrap().unsupported.is_none());
}

#[test]
fn flags_have_their_bits() {
    let header = Image::v3().u64(72, feature::DIRTY).u64(80, feature::LAZY_REFCOUNTS).parse().unwrap();
    assert_eq!((header.dirty(), header.corrupt(), header.lazy_refcounts()), (true, false, true));
    assert!(Image::v3().u64(72, feature::CORRUPT).parse().unwrap().corrupt());
}

#[test]
fn external_data_file() {
    let image = Image::v3().u64(72, feature::DATA_FILE);
    assert_eq!(image.parse().unwrap().data_file, Some(DataFile { name: None, raw: false }));
    let named = image.clone().u64(88, feature::RAW_DATA).at(112, &extension(DATA_FILE_MAGIC, b"d.raw"));
    assert_eq!(named.parse().unwrap().data_file, Some(DataFile { name: Some(b"d.raw".to_vec()), raw: true }));
    assert_eq!(named.backing(500, b"base").reason(), Malformed::RawDataWithBacking);
    assert_eq!(Image::v3().u64(88, feature::RAW_DATA).reason(), Malformed::RawDataWithoutFile);
    assert!(image.parse().unwrap().entry_format().data_file);
    // The name alone is not the feature.
    assert_eq!(Image::v3().at(112, &extension(DATA_FILE_MAGIC, b"d")).parse().unwrap().data_file, None);
}

#[test]
fn bitmaps_are_checked_only_if_in_force() {
    let on = |extension: Vec<u8>| Image::v3().u64(88, feature::BITMAPS).at(112, &extension);
    let header = on(bitmaps(2, 0, 64, 0x20000)).parse().unwrap();
    assert!(header.bitmaps_consistent());
    let place = header.bitmaps.map(|bitmaps| (bitmaps.count, bitmaps.directory_len, bitmaps.directory));
    assert_eq!(place, Some((2, 64, HostOffset(0x20000))));

    let reserved = Malformed::Reserved { what: "bitmaps extension", found: 1 };
    assert_eq!(on(bitmaps(2, 1, 64, 0x20000)).reason(), reserved);
    assert_eq!(on(bitmaps(0, 0, 64, 0x20000)).reason(), Malformed::NoBitmaps);
    let (what, max) = ("number of bitmaps", 65_535);
    assert_eq!(
        on(bitmaps(65_536, 0, 64, 0x20000)).reason(),
        Malformed::TooLarge { what, found: 65_536, max }
    );
    let (what, max) = ("length of the bitmap directory", 64 << 20);
    assert_eq!(
        on(bitmaps(1, 0, max + 1, 0x20000)).reason(),
        Malformed::TooLarge { what, found: max + 1, max }
    );
    let (what, unit) = ("bitmap directory", 65_536);
    assert_eq!(on(bitmaps(1, 0, 64, 0x200)).reason(), Malformed::Unaligned { what, offset: 0x200, unit });

    let off = Image::v3().at(112, &bitmaps(0, 1, 64, 0x200)).parse().unwrap();
    assert!(!off.bitmaps_consistent() && off.bitmaps.is_some());
}

#[test]
fn a_freeze_mark_is_read_back() {
    let mark = Frozen { seconds: 1_700_000_000, nanoseconds: 1, description: "monday".into() };
    let header = Image::v3().at(112, &extension(FROZEN_MAGIC, &mark.encode())).parse().unwrap();
    assert_eq!(header.frozen, Some(mark));
}

#[test]
fn virtual_size_is_cut_to_sectors() {
    assert_eq!(Image::v3().u64(24, 1_000_001).parse().unwrap().virtual_size, 999_936);
    assert_eq!(Image::v3().u64(24, 511).parse().unwrap().virtual_size, 0);
}
