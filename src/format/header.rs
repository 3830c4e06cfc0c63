//! The header of a qcow2 image, versions 2 and 3, with its extensions and the backing name.
//!
//! A [`Header`] that exists is safe to compute with: offsets are aligned and in range, tables within their
//! limits and, where a reader needs them, within the file. Unknown incompatible features and encryption do
//! not fail the parse, because the backing name is useful anyway: a reader of guest data checks
//! [`Header::unsupported`] and [`Header::encryption`].

use super::bytes::{be_u32, be_u64};
use super::entry::EntryFormat;
use super::extension::{self, Extensions};
use super::feature::{self, FeatureName, Unsupported};
use super::frozen::Frozen;
use super::malformed::Malformed;
use crate::units::{ClusterBits, HostOffset, SECTOR_SIZE};

pub use super::extension::{BitmapsExtension, CryptoHeader, UnknownExtension};
pub use super::parts::{
    BackingFile, Compression, DataFile, Encryption, L1Table, RefcountTable, SnapshotTable, Version,
};

// Offsets of fields that are changed by themselves. Each lies, with its neighbours, in the first sector.
/// Offset of the refcount table (8 bytes), then its clusters (4).
pub const REFCOUNT_TABLE_AT: u64 = 48;
/// Offset of the number of snapshots and of the offset of their table, side by side.
pub const SNAPSHOTS_AT: u64 = 60;
/// Incompatible feature bits, 8 bytes; version 3.
pub const INCOMPATIBLE_AT: u64 = 72;
/// Autoclear feature bits, 8 bytes; version 3.
pub const AUTOCLEAR_AT: u64 = 88;

/// `QFI\xfb`.
pub const MAGIC: u32 = 0x5146_49FB;
/// How many bytes [`needed_len`] needs.
pub const PROBE_LEN: usize = 112;
/// Bytes of a version 2 header, and of the fields that both versions share.
pub const V2_LEN: usize = 72;
const V3_MIN_LEN: usize = 104;

// QEMU's limits.
// B1: limits of the sizes that an image can state.
/// Largest L1 table, in bytes.
pub const MAX_L1_LEN: u64 = 32 << 20;
/// Largest refcount table, in bytes.
pub const MAX_REFCOUNT_TABLE_LEN: u64 = 8 << 20;
/// Most internal snapshots.
pub const MAX_SNAPSHOTS: u64 = 65_536;
/// Longest backing file name, in bytes.
pub const MAX_BACKING_NAME_LEN: u64 = 1023;
const L1_TABLE: &str = "L1 table";
const REFCOUNT_TABLE: &str = "refcount table";
const MAX_BITMAPS: u64 = 65_535;
const MAX_BITMAP_DIRECTORY_LEN: u64 = 64 << 20;
/// The smallest entry of a snapshot table; bounds the table from below.
const MIN_SNAPSHOT_LEN: u64 = 40;

/// A parsed header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version 2 or 3.
    pub version: Version,
    /// The cluster size.
    pub cluster: ClusterBits,
    /// Size of the guest's disk in bytes, rounded down to whole sectors as QEMU does on opening.
    pub virtual_size: u64,
    /// The active L1 table. It covers at least the virtual size.
    pub l1: L1Table,
    /// The refcount table.
    pub refcount_table: RefcountTable,
    /// Refcounts are `1 << refcount_order` bits wide; 0 to 6.
    pub refcount_order: u32,
    /// The internal snapshots.
    pub snapshots: SnapshotTable,
    /// Incompatible feature bits as found; 0 in version 2.
    pub incompatible: u64,
    /// Compatible feature bits as found; 0 in version 2.
    pub compatible: u64,
    /// Autoclear feature bits as found; 0 in version 2.
    pub autoclear: u64,
    /// The method of compressed clusters. Undefined if [`Self::unsupported`].
    pub compression: Compression,
    /// The method of encryption, if guest data is encrypted.
    pub encryption: Option<Encryption>,
    /// The backing file. An offset with length 0 is no backing file.
    pub backing: Option<BackingFile>,
    /// The external data file.
    pub data_file: Option<DataFile>,
    /// The bitmap directory; checked only if [`Self::bitmaps_consistent`].
    pub bitmaps: Option<BitmapsExtension>,
    /// The LUKS header; always there with [`Encryption::Luks`], never without.
    pub crypto_header: Option<CryptoHeader>,
    /// The image's own names of feature bits.
    pub feature_names: Vec<FeatureName>,
    /// Extensions that chainfs does not interpret.
    pub unknown_extensions: Vec<UnknownExtension>,
    /// Bytes of the header without extensions.
    pub header_len: u32,
    /// chainfs' freeze mark.
    pub frozen: Option<Frozen>,
    /// What forbids reading guest data: features that chainfs does not know.
    pub unsupported: Option<Unsupported>,
    /// What is wrong with the refcounts. A reader does not need them.
    pub refcount_damage: Option<Malformed>,
}

/// Whether these are the first bytes of a qcow2 image (or of qcow version 1).
pub fn has_magic(bytes: &[u8]) -> bool {
    bytes.len() >= 4 && be_u32(bytes, 0) == MAGIC
}

/// How many bytes of the file's start [`Header::parse`] wants, from its first [`PROBE_LEN`]
/// (or as many as the file has). At most one cluster, so at most 2 MiB.
pub fn needed_len(first_bytes: &[u8]) -> Result<u64, Malformed> {
    let (_, cluster) = version_and_cluster(first_bytes)?;
    let (offset, len) = (be_u64(first_bytes, 8), u64::from(be_u32(first_bytes, 16)));
    if offset == 0 {
        return Ok(cluster.size());
    }
    // Extensions end where the backing file name starts.
    Ok(offset.saturating_add(len).clamp(PROBE_LEN as u64, cluster.size()))
}

fn version_and_cluster(bytes: &[u8]) -> Result<(Version, ClusterBits), Malformed> {
    if bytes.len() >= 4 && !has_magic(bytes) {
        return Err(Malformed::Magic(be_u32(bytes, 0)));
    }
    need(bytes, V2_LEN)?;
    let version = match be_u32(bytes, 4) {
        2 => Version::V2,
        3 => Version::V3,
        other => return Err(Malformed::Version(other)),
    };
    let bits = be_u32(bytes, 20);
    Ok((version, ClusterBits::new(bits).ok_or(Malformed::ClusterBits(bits))?))
}

fn need(bytes: &[u8], len: usize) -> Result<(), Malformed> {
    let (need, have) = (len as u64, bytes.len() as u64);
    if have < need { Err(Malformed::Truncated { what: "header", need, have }) } else { Ok(()) }
}

/// Which damage of a header fails the parse.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Read,
    Check,
}

impl Header {
    /// Decodes and validates. `bytes` is the start of the file, [`needed_len`] bytes of it or
    /// the whole file if that is shorter; `file_len` is the length of the file.
    pub fn parse(bytes: &[u8], file_len: u64) -> Result<Self, Malformed> {
        Self::parse_for(Purpose::Read, bytes, file_len)
    }

    /// As [`Self::parse`], but leaves to the checker the damage that it reports as corruptions: a missing
    /// refcount table, tables that overlap or lie beyond the end of the file.
    pub fn parse_for_check(bytes: &[u8], file_len: u64) -> Result<Self, Malformed> {
        Self::parse_for(Purpose::Check, bytes, file_len)
    }

    fn parse_for(purpose: Purpose, bytes: &[u8], file_len: u64) -> Result<Self, Malformed> {
        let (version, cluster) = version_and_cluster(bytes)?;
        let (header_len, later) = match version {
            Version::V2 => (V2_LEN, LaterFields::of_version_2()),
            Version::V3 => LaterFields::parse(bytes, cluster)?,
        };
        let features = Features { incompatible: later.incompatible, autoclear: later.autoclear };

        let name_at = backing_place(bytes, header_len as u64, cluster)?;
        let area_end = if name_at.start == 0 { cluster.size() } else { name_at.start };
        let area = &bytes[header_len..(area_end as usize).clamp(header_len, bytes.len())];
        let extensions = extension::parse(area)?;
        let backing_name = backing_name(bytes, name_at)?;

        let encryption = match be_u32(bytes, 32) {
            0 => None,
            1 => Some(Encryption::AesCbc),
            2 => Some(Encryption::Luks),
            other => return Err(Malformed::CryptMethod(other)),
        };
        let unsupported = Unsupported::features(features.incompatible, &extensions.feature_names);
        let (compression, compression_unsupported) = features.compression(later.compression_type)?;
        if features.has(feature::EXTENDED_L2) && cluster.bits() < 14 {
            return Err(Malformed::SubclustersTooSmall(cluster.bits()));
        }
        let mut refcount_order = later.refcount_order;
        let mut refcount_damage = None;
        if refcount_order > 6 {
            let damage = Malformed::RefcountOrder(std::mem::replace(&mut refcount_order, 4));
            if purpose == Purpose::Check {
                return Err(damage);
            }
            refcount_damage = Some(damage);
        }
        check_crypto(encryption, extensions.crypto_header, cluster)?;
        check_bitmaps(features, extensions.bitmaps, cluster)?;
        let data_file = features.data_file(&extensions, backing_name.is_some())?;

        let size = be_u64(bytes, 24);
        let mut header = Self {
            version,
            cluster,
            virtual_size: size - size % SECTOR_SIZE,
            l1: L1Table { offset: HostOffset(be_u64(bytes, 40)), entries: be_u32(bytes, 36) },
            refcount_table: RefcountTable {
                offset: HostOffset(be_u64(bytes, 48)),
                clusters: be_u32(bytes, 56),
            },
            refcount_order,
            snapshots: SnapshotTable { offset: HostOffset(be_u64(bytes, 64)), count: be_u32(bytes, 60) },
            incompatible: features.incompatible,
            compatible: later.compatible,
            autoclear: features.autoclear,
            compression,
            encryption,
            backing: backing_name.map(|name| BackingFile { name, format: extensions.backing_format }),
            data_file,
            bitmaps: extensions.bitmaps,
            crypto_header: extensions.crypto_header,
            feature_names: extensions.feature_names,
            unknown_extensions: extensions.unknown,
            header_len: header_len as u32,
            frozen: extensions.frozen,
            unsupported: unsupported.or(compression_unsupported),
            refcount_damage,
        };
        header.check_tables(size)?;
        if let Err(damage) = header.check_refcount_table() {
            // Its location is unknown: a checker recounts.
            header.refcount_table = RefcountTable { offset: HostOffset(0), clusters: 0 };
            header.refcount_damage.get_or_insert(damage);
        }
        if purpose == Purpose::Read {
            header.check_places(file_len)?;
        }
        Ok(header)
    }

    /// Limits, alignment and range of the tables; that the L1 table covers the disk.
    fn check_tables(&self, size: u64) -> Result<(), Malformed> {
        let cluster = self.cluster;
        at_most("number of snapshots", self.snapshots.count.into(), MAX_SNAPSHOTS)?;
        let len = u64::from(self.snapshots.count) * MIN_SNAPSHOT_LEN;
        check_table("snapshot table", self.snapshots.offset, len, cluster)?;

        at_most("length of the L1 table", self.l1.len_bytes(), MAX_L1_LEN)?;
        check_table("L1 table", self.l1.offset, self.l1.len_bytes(), cluster)?;
        // By the size as found: QEMU, too, rounds it to sectors only after this check.
        let need = size.div_ceil(self.l1_entry_span());
        if u64::from(self.l1.entries) < need {
            return Err(Malformed::L1TooSmall { entries: self.l1.entries, need });
        }
        Ok(())
    }

    fn check_refcount_table(&self) -> Result<(), Malformed> {
        let len = u64::from(self.refcount_table.clusters) * self.cluster.size();
        at_most("length of the refcount table", len, MAX_REFCOUNT_TABLE_LEN)?;
        check_table("refcount table", self.refcount_table.offset, len, self.cluster)
    }

    /// That the tables are in the file, and do not overlap the header or each other.
    fn check_places(&mut self, file_len: u64) -> Result<(), Malformed> {
        if self.refcount_table.clusters == 0 {
            self.refcount_damage.get_or_insert(Malformed::NoRefcountTable);
        }
        let end = self.l1.offset.0 + self.l1.len_bytes();
        if self.l1.entries > 0 && end > file_len {
            return Err(Malformed::BeyondEnd { what: "L1 table", end, file_len });
        }
        let places = [
            ("header", 0, u64::from(self.header_len)),
            (L1_TABLE, self.l1.offset.0, self.l1.len_bytes()),
            (
                REFCOUNT_TABLE,
                self.refcount_table.offset.0,
                u64::from(self.refcount_table.clusters) * self.cluster.size(),
            ),
            ("snapshot table", self.snapshots.offset.0, u64::from(self.snapshots.count) * MIN_SNAPSHOT_LEN),
        ];
        for (index, &(first, start, len)) in places.iter().enumerate() {
            for &(second, other_start, other_len) in &places[index + 1..] {
                let apart = start + len <= other_start || other_start + other_len <= start;
                if len == 0 || other_len == 0 || apart {
                    continue;
                }
                let overlap = Malformed::Overlap { first, second };
                // Which of two overlapping structures is wrong is unknown: it must not be the mappings.
                if [first, second].contains(&REFCOUNT_TABLE) && ![first, second].contains(&L1_TABLE) {
                    self.refcount_damage.get_or_insert(overlap);
                } else {
                    return Err(overlap);
                }
            }
        }
        Ok(())
    }

    /// Refcounts may be stale: the image was not closed properly.
    pub fn dirty(&self) -> bool {
        self.incompatible & feature::DIRTY != 0
    }

    /// A writer has found the image damaged.
    pub fn corrupt(&self) -> bool {
        self.incompatible & feature::CORRUPT != 0
    }

    /// Refcounts are updated lazily.
    pub fn lazy_refcounts(&self) -> bool {
        self.compatible & feature::LAZY_REFCOUNTS != 0
    }

    /// L2 entries have 16 bytes and subclusters.
    pub fn extended_l2(&self) -> bool {
        self.incompatible & feature::EXTENDED_L2 != 0
    }

    /// Whether the bitmaps extension is in force.
    pub fn bitmaps_consistent(&self) -> bool {
        self.autoclear & feature::BITMAPS != 0
    }

    /// The format of the entries of the image's tables.
    pub fn entry_format(&self) -> EntryFormat {
        EntryFormat {
            version: self.version,
            cluster: self.cluster,
            extended: self.extended_l2(),
            data_file: self.incompatible & feature::DATA_FILE != 0,
        }
    }

    /// Bytes of guest disk behind one L1 entry.
    pub fn l1_entry_span(&self) -> u64 {
        // At most 2^21 * 2^18: cannot overflow.
        self.cluster.size() * self.entry_format().l2_entries()
    }
}

/// The fields that only version 3 has.
struct LaterFields {
    incompatible: u64,
    compatible: u64,
    autoclear: u64,
    refcount_order: u32,
    compression_type: u8,
}

impl LaterFields {
    fn of_version_2() -> Self {
        Self { incompatible: 0, compatible: 0, autoclear: 0, refcount_order: 4, compression_type: 0 }
    }

    /// Also returns the length of the header.
    fn parse(bytes: &[u8], cluster: ClusterBits) -> Result<(usize, Self), Malformed> {
        need(bytes, V3_MIN_LEN)?;
        let found = be_u32(bytes, 100);
        let len = found as usize;
        if len < V3_MIN_LEN || !found.is_multiple_of(8) || u64::from(found) > cluster.size() {
            return Err(Malformed::HeaderLength(found));
        }
        need(bytes, len)?;
        // Fields after compression_type are unknown: the specification lets readers ignore them.
        let compression_type = if len > V3_MIN_LEN { bytes[V3_MIN_LEN] } else { 0 };
        let fields = Self {
            incompatible: be_u64(bytes, 72),
            compatible: be_u64(bytes, 80),
            autoclear: be_u64(bytes, 88),
            refcount_order: be_u32(bytes, 96),
            compression_type,
        };
        Ok((len, fields))
    }
}

#[derive(Clone, Copy)]
struct Features {
    incompatible: u64,
    autoclear: u64,
}

impl Features {
    fn has(self, incompatible: u64) -> bool {
        self.incompatible & incompatible != 0
    }

    fn compression(self, kind: u8) -> Result<(Compression, Option<Unsupported>), Malformed> {
        let bit = self.has(feature::COMPRESSION);
        match kind {
            _ if bit != (kind != 0) => Err(Malformed::CompressionType { bit, kind }),
            0 => Ok((Compression::Deflate, None)),
            1 => Ok((Compression::Zstd, None)),
            other => Ok((Compression::Deflate, Some(Unsupported::CompressionType(other)))),
        }
    }

    fn data_file(self, extensions: &Extensions, backing: bool) -> Result<Option<DataFile>, Malformed> {
        let raw = self.autoclear & feature::RAW_DATA != 0;
        if !self.has(feature::DATA_FILE) {
            return if raw { Err(Malformed::RawDataWithoutFile) } else { Ok(None) };
        }
        if raw && backing {
            return Err(Malformed::RawDataWithBacking);
        }
        Ok(Some(DataFile { name: extensions.data_file.clone(), raw }))
    }
}

/// The range of the backing file name; starts at 0 if there is none at all.
fn backing_place(
    bytes: &[u8],
    header_len: u64,
    cluster: ClusterBits,
) -> Result<std::ops::Range<u64>, Malformed> {
    let (offset, len) = (be_u64(bytes, 8), u64::from(be_u32(bytes, 16)));
    if offset == 0 {
        return Ok(0..0);
    }
    if offset > cluster.size() {
        return Err(Malformed::BackingOffset(offset));
    }
    if offset < header_len {
        return Err(Malformed::BackingInHeader { offset, header_len });
    }
    at_most("length of the backing file name", len, MAX_BACKING_NAME_LEN.min(cluster.size() - offset))?;
    Ok(offset..offset + len)
}

fn backing_name(bytes: &[u8], place: std::ops::Range<u64>) -> Result<Option<Vec<u8>>, Malformed> {
    if place.is_empty() {
        return Ok(None);
    }
    let have = bytes.len() as u64;
    let name = bytes.get(place.start as usize..place.end as usize);
    let name = name.ok_or(Malformed::Truncated { what: "backing file name", need: place.end, have })?;
    if name.contains(&0) { Err(Malformed::BackingNul) } else { Ok(Some(name.to_vec())) }
}

fn check_crypto(
    encryption: Option<Encryption>,
    pointer: Option<CryptoHeader>,
    cluster: ClusterBits,
) -> Result<(), Malformed> {
    match (encryption, pointer) {
        (Some(Encryption::Luks), None) => Err(Malformed::CryptoHeaderMissing),
        (Some(Encryption::Luks), Some(pointer)) => {
            check_table("LUKS header", pointer.offset, pointer.len, cluster)
        }
        (None | Some(Encryption::AesCbc), Some(_)) => Err(Malformed::CryptoHeaderUnexpected),
        (None | Some(Encryption::AesCbc), None) => Ok(()),
    }
}

fn check_bitmaps(
    features: Features,
    bitmaps: Option<BitmapsExtension>,
    cluster: ClusterBits,
) -> Result<(), Malformed> {
    let Some(bitmaps) = bitmaps.filter(|_| features.autoclear & feature::BITMAPS != 0) else { return Ok(()) };
    if bitmaps.reserved != 0 {
        return Err(Malformed::Reserved { what: "bitmaps extension", found: bitmaps.reserved.into() });
    }
    if bitmaps.count == 0 {
        return Err(Malformed::NoBitmaps);
    }
    at_most("number of bitmaps", bitmaps.count.into(), MAX_BITMAPS)?;
    at_most("length of the bitmap directory", bitmaps.directory_len, MAX_BITMAP_DIRECTORY_LEN)?;
    check_table("bitmap directory", bitmaps.directory, bitmaps.directory_len, cluster)
}

pub(super) fn at_most(what: &'static str, found: u64, max: u64) -> Result<(), Malformed> {
    if found > max { Err(Malformed::TooLarge { what, found, max }) } else { Ok(()) }
}

/// Alignment and range of a structure that starts on a cluster.
pub(super) fn check_table(
    what: &'static str,
    offset: HostOffset,
    len: u64,
    cluster: ClusterBits,
) -> Result<(), Malformed> {
    let offset = offset.0;
    if !cluster.aligned(offset) {
        return Err(Malformed::Unaligned { what, offset, unit: cluster.size() });
    }
    match offset.checked_add(len) {
        Some(end) if i64::try_from(end).is_ok() => Ok(()),
        _ => Err(Malformed::OutOfRange { what, offset, len }),
    }
}

#[cfg(test)]
#[path = "header_tests.rs"]
mod tests;
