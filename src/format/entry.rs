//! L1 and L2 entries: where a cluster is, or why it has no offset.
//!
//! A decoded entry is aligned, below 2^56 and free of reserved bits. The reader checks whether the offset
//! exists in the file.

use super::bytes::be_u64;
use super::header::Version;
use super::malformed::Malformed;
use crate::units::{ClusterBits, GuestOffset, HostOffset, Run};

/// Subclusters of a cluster, if L2 entries are extended.
pub const SUBCLUSTERS: u32 = 32;

/// Upper limit of host offsets; from the specification.
pub const HOST_OFFSET_END: u64 = 1 << 56;

/// In the active tables: the cluster has one reference, so that it may be written in place.
pub const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const OFFSET: u64 = 0x00FF_FFFF_FFFF_FE00;
/// In standard L2 entries of version 3: the cluster reads as zeroes.
pub const ZERO: u64 = 1;

/// What an image has at an offset of its guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The bytes are there.
    Data(HostOffset),
    /// Zeroes, whatever the layers below have; a cluster may be preallocated for them.
    Zero(Option<HostOffset>),
    /// They are part of a compressed cluster.
    Compressed(Compressed),
    /// Unallocated: a lower layer decides. Never taken for zeroes (R1).
    Hole,
}

impl Mapping {
    /// The mapping `within` bytes further on.
    #[must_use]
    pub fn advance(self, within: u64) -> Self {
        match self {
            Self::Data(host) => Self::Data(HostOffset(host.0 + within)),
            Self::Zero(place) => Self::Zero(place.map(|host| HostOffset(host.0 + within))),
            Self::Compressed(_) | Self::Hole => self,
        }
    }

    /// Whether `next`, `run` bytes further on, continues the same run.
    pub fn continues(self, next: Self, run: u64) -> bool {
        match (self, next) {
            (Self::Data(host), Self::Data(next)) | (Self::Zero(Some(host)), Self::Zero(Some(next))) => {
                host.0.checked_add(run) == Some(next.0)
            }
            (Self::Zero(None), Self::Zero(None)) | (Self::Hole, Self::Hole) => true,
            _ => false,
        }
    }
}

/// What an L2 entry refers to in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Nothing.
    None,
    /// A cluster, whether its bytes are visible or not.
    Cluster(HostOffset),
    /// A compressed cluster.
    Compressed(Compressed),
}

/// An L2 entry as it is in the table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawL2Entry {
    /// The first word.
    pub entry: u64,
    /// The second word, of extended L2 entries; else 0.
    pub bitmap: u64,
}

impl RawL2Entry {
    /// The entry that begins with `words`.
    pub fn new(format: EntryFormat, words: &[u64]) -> Self {
        Self { entry: words[0], bitmap: if format.extended { words[1] } else { 0 } }
    }

    /// The entry in these bytes.
    pub fn from_bytes(format: EntryFormat, bytes: &[u8]) -> Self {
        Self { entry: be_u64(bytes, 0), bitmap: if format.extended { be_u64(bytes, 8) } else { 0 } }
    }
}

/// A compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// Its first byte; not aligned.
    pub at: HostOffset,
    /// The maximum length: the stream may end earlier, and the file may, too.
    pub len: u32,
}

/// An entry of an L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry {
    /// The L2 table.
    pub l2: Option<HostOffset>,
    /// The COPIED flag: accurate in active tables only.
    pub copied: bool,
}

/// An 8-byte entry of an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Entry {
    /// Its mapping.
    pub mapping: Mapping,
    /// The COPIED flag: accurate in active tables only.
    pub copied: bool,
}

impl L2Entry {
    /// The offset of data with a single reference: it may be overwritten in place.
    pub fn own_data(self) -> Option<HostOffset> {
        match self.mapping {
            Mapping::Data(host) if self.copied => Some(host),
            _ => None,
        }
    }
}

/// The meaning of offset 0 in an entry with the COPIED flag, where data is in an external file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ZeroOffset {
    /// No offset.
    IsNone,
    /// The first cluster of the file.
    MayBePlace,
}

/// The properties of an image that decide how its entries are decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryFormat {
    /// Version 2 has no zero flag.
    pub version: Version,
    /// The cluster size.
    pub cluster: ClusterBits,
    /// Whether L2 entries have 16 bytes.
    pub extended: bool,
    /// Whether guest data is in an external file.
    pub data_file: bool,
}

impl EntryFormat {
    /// Bytes of an L2 entry.
    pub fn l2_entry_len(self) -> u64 {
        if self.extended { 16 } else { 8 }
    }

    /// Entries of an L2 table, which is one cluster.
    pub fn l2_entries(self) -> u64 {
        self.cluster.size() / self.l2_entry_len()
    }

    /// Decodes an L1 entry.
    pub fn l1(self, entry: u64) -> Result<L1Entry, Malformed> {
        if entry & !(OFFSET | COPIED) != 0 {
            return Err(Malformed::Reserved { what: "L1 entry", found: entry });
        }
        let l2 = self.place("L2 table", entry)?;
        Ok(L1Entry { l2, copied: entry & COPIED != 0 })
    }

    /// The entry's answer for the byte `at` of the disk, and the minimum length of that answer: at most to
    /// the end of its cluster.
    pub fn l2_run(self, raw: RawL2Entry, at: u64) -> Result<Run<L2Entry>, Malformed> {
        let (within, guest) = (self.cluster.within(at), GuestOffset(self.cluster.floor(at)));
        if !self.extended {
            let L2Entry { mapping, copied } = self.l2(raw.entry, guest)?;
            return Ok(Run::new(
                L2Entry { mapping: mapping.advance(within), copied },
                self.cluster.size() - within,
            ));
        }
        let entry = self.l2_extended(raw.entry, raw.bitmap, guest)?;
        let unit = self.cluster.size() / u64::from(SUBCLUSTERS);
        let from = within / unit;
        let (mapping, count) = entry.run(from as u32);
        let mapping = mapping.advance(within - from * unit);
        Ok(Run::new(L2Entry { mapping, copied: entry.copied }, (from + u64::from(count)) * unit - within))
    }

    /// Bytes of disk behind one L1 entry.
    pub fn l1_span(self) -> u64 {
        self.cluster.size() * self.l2_entries()
    }

    /// Words of an L2 entry.
    pub fn l2_entry_words(self) -> u64 {
        self.l2_entry_len() / 8
    }

    /// Decodes an 8-byte L2 entry, the one for the cluster at `guest`.
    pub fn l2(self, entry: u64, guest: GuestOffset) -> Result<L2Entry, Malformed> {
        let copied = entry & COPIED != 0;
        if entry & COMPRESSED != 0 {
            return Ok(L2Entry { mapping: Mapping::Compressed(self.compressed(entry)?), copied });
        }
        if entry & !(OFFSET | COPIED | ZERO) != 0 {
            return Err(Malformed::Reserved { what: "L2 entry", found: entry });
        }
        let zero = entry & ZERO != 0;
        if zero && self.version == Version::V2 {
            return Err(Malformed::ZeroInVersion2(entry));
        }
        let zero_offset = if zero { ZeroOffset::IsNone } else { ZeroOffset::MayBePlace };
        let mapping = match (self.data_place(entry, guest, zero_offset)?, zero) {
            (preallocated, true) => Mapping::Zero(preallocated),
            (Some(at), false) => Mapping::Data(at),
            (None, false) => Mapping::Hole,
        };
        Ok(L2Entry { mapping, copied })
    }

    /// The offset in a standard L1 or L2 entry, even if the entry is invalid: for a checker.
    pub fn raw_offset(entry: u64) -> u64 {
        entry & OFFSET
    }

    /// Whether the first word of an L2 entry marks the cluster as compressed.
    pub fn is_compressed(entry: u64) -> bool {
        entry & COMPRESSED != 0
    }

    /// The location of a compressed cluster.
    pub(super) fn compressed(self, entry: u64) -> Result<Compressed, Malformed> {
        if self.data_file {
            return Err(Malformed::CompressedInDataFile);
        }
        let compressed = self.raw_compressed(entry);
        let (found, max) = (compressed.at.0, HOST_OFFSET_END - 1);
        if found > max {
            return Err(Malformed::TooLarge { what: "offset of a compressed cluster", found, max });
        }
        Ok(compressed)
    }

    /// The offset in a compressed L2 entry, however large: for a checker.
    pub fn raw_compressed(self, entry: u64) -> Compressed {
        // The larger the cluster, the more bits hold the sector count and the fewer the offset.
        let offset_bits = 62 - (self.cluster.bits() - 8);
        let at = entry & ((1 << offset_bits) - 1);
        let more_sectors = (entry & (COMPRESSED - 1)) >> offset_bits;
        let len = (more_sectors + 1) * 512 - (at & 511);
        Compressed { at: HostOffset(at), len: len as u32 }
    }

    /// The host cluster of a standard entry. Offset 0 is the header, so it means "none", except in an
    /// external data file: there bit 63 distinguishes the first cluster from none.
    pub(super) fn data_place(
        self,
        entry: u64,
        guest: GuestOffset,
        zero: ZeroOffset,
    ) -> Result<Option<HostOffset>, Malformed> {
        let place = match self.place("data cluster", entry)? {
            None if self.data_file && zero == ZeroOffset::MayBePlace && entry & COPIED != 0 => {
                Some(HostOffset(0))
            }
            place => place,
        };
        match place {
            Some(at) if self.data_file && at.0 != guest.0 => {
                Err(Malformed::DataFileOffset { host: at.0, guest: guest.0 })
            }
            place => Ok(place),
        }
    }

    /// The entry that names a cluster with a refcount of 1: an L2 table, or data.
    pub fn owned(place: HostOffset) -> u64 {
        assert!(place.0 & !OFFSET == 0, "a place that an entry can name");
        place.0 | COPIED
    }

    /// An 8-byte L2 entry that reads as zeroes; a cluster may be preallocated. Version 3 only.
    pub fn zero(preallocated: Option<HostOffset>) -> u64 {
        preallocated.map_or(ZERO, |place| Self::owned(place) | ZERO)
    }

    /// The same entry without the COPIED flag: its cluster has another reference.
    pub fn shared(entry: u64) -> u64 {
        entry & !COPIED
    }

    /// The COPIED flag of an L1 entry or of the first word of an L2 entry.
    pub fn copied(entry: u64) -> bool {
        entry & COPIED != 0
    }

    pub(super) fn reserved(entry: u64) -> bool {
        // With subclusters, bit 0 is reserved as well.
        entry & !(OFFSET | COPIED) != 0
    }

    fn place(self, what: &'static str, entry: u64) -> Result<Option<HostOffset>, Malformed> {
        let offset = entry & OFFSET;
        if !self.cluster.aligned(offset) {
            return Err(Malformed::Unaligned { what, offset, unit: self.cluster.size() });
        }
        Ok((offset != 0).then_some(HostOffset(offset)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUEST: GuestOffset = GuestOffset(0x50000);

    fn format() -> EntryFormat {
        EntryFormat {
            version: Version::V3,
            cluster: ClusterBits::new(16).unwrap(),
            extended: false,
            data_file: false,
        }
    }

    fn l2(entry: u64) -> Result<Mapping, Malformed> {
        format().l2(entry, GUEST).map(|entry| entry.mapping)
    }

    #[test]
    fn an_l1_entry_is_a_table_or_nothing() {
        assert_eq!(format().l1(0), Ok(L1Entry { l2: None, copied: false }));
        assert_eq!(
            format().l1(COPIED | 0x40000),
            Ok(L1Entry { l2: Some(HostOffset(0x40000)), copied: true })
        );
        let last = HOST_OFFSET_END - 0x10000;
        assert_eq!(format().l1(last).unwrap().l2, Some(HostOffset(last)));
    }

    #[test]
    fn an_l1_entry_breaks_rules_with_a_reason() {
        for bit in (0..9).chain(56..63) {
            let found = 0x40000 | 1 << bit;
            assert_eq!(format().l1(found), Err(Malformed::Reserved { what: "L1 entry", found }));
        }
        let unaligned = Malformed::Unaligned { what: "L2 table", offset: 0x40200, unit: 65_536 };
        assert_eq!(format().l1(0x40200), Err(unaligned));
    }

    #[test]
    fn a_standard_entry_is_data_zero_or_a_hole() {
        let place = HostOffset(0x40000);
        assert_eq!(l2(0), Ok(Mapping::Hole));
        assert_eq!(l2(COPIED), Ok(Mapping::Hole));
        assert_eq!(l2(COPIED | 0x40000), Ok(Mapping::Data(place)));
        assert_eq!(l2(1), Ok(Mapping::Zero(None)));
        assert_eq!(l2(0x40001), Ok(Mapping::Zero(Some(place))));
        assert!(format().l2(COPIED | 0x40000, GUEST).unwrap().copied);
    }

    #[test]
    fn a_standard_entry_breaks_rules_with_a_reason() {
        for bit in (1..9).chain(56..62) {
            let found = 0x40000 | 1 << bit;
            assert_eq!(l2(found), Err(Malformed::Reserved { what: "L2 entry", found }));
        }
        let unaligned = Malformed::Unaligned { what: "data cluster", offset: 0x48000, unit: 65_536 };
        assert_eq!(l2(0x48000), Err(unaligned));
        let v2 = EntryFormat { version: Version::V2, ..format() };
        assert_eq!(v2.l2(1, GUEST), Err(Malformed::ZeroInVersion2(1)));
    }

    #[test]
    fn a_compressed_entry_counts_sectors_from_its_first_byte() {
        // 64 KiB clusters: 54 bits of offset, 8 bits of further sectors.
        let entry = COMPRESSED | 3 << 54 | 0x1_2345;
        assert_eq!(
            l2(entry),
            Ok(Mapping::Compressed(Compressed { at: HostOffset(0x1_2345), len: 4 * 512 - 0x145 }))
        );
        for (bits, most) in [(9, 2u64), (16, 256), (21, 8192)] {
            let format = EntryFormat { cluster: ClusterBits::new(bits).unwrap(), ..format() };
            let entry = COMPRESSED | (most - 1) << (62 - (bits - 8)) | 0x3ff;
            assert_eq!(
                format.compressed(entry),
                Ok(Compressed { at: HostOffset(0x3ff), len: (most * 512 - 511) as u32 })
            );
        }
    }

    #[test]
    fn a_compressed_entry_breaks_rules_with_a_reason() {
        let small = EntryFormat { cluster: ClusterBits::new(9).unwrap(), ..format() };
        let max = HOST_OFFSET_END - 1;
        assert_eq!(small.compressed(COMPRESSED | max).unwrap().at, HostOffset(max));
        let what = "offset of a compressed cluster";
        assert_eq!(
            small.compressed(COMPRESSED | (max + 1)),
            Err(Malformed::TooLarge { what, found: max + 1, max })
        );
        let external = EntryFormat { data_file: true, ..format() };
        assert_eq!(external.l2(COMPRESSED, GUEST), Err(Malformed::CompressedInDataFile));
    }

    #[test]
    fn in_an_external_data_file_a_cluster_lies_at_its_guest_offset() {
        let format = EntryFormat { data_file: true, ..format() };
        let at = |entry, guest| format.l2(entry, GuestOffset(guest)).map(|entry| entry.mapping);
        assert_eq!(at(COPIED, 0), Ok(Mapping::Data(HostOffset(0))));
        assert_eq!(at(0, 0), Ok(Mapping::Hole));
        assert_eq!(at(COPIED | 0x50000, 0x50000), Ok(Mapping::Data(HostOffset(0x50000))));
        assert_eq!(at(COPIED, 0x50000), Err(Malformed::DataFileOffset { host: 0, guest: 0x50000 }));
        assert_eq!(
            at(COPIED | 0x60000, 0x50000),
            Err(Malformed::DataFileOffset { host: 0x60000, guest: 0x50000 })
        );
        assert_eq!(at(COPIED | 1, 0), Ok(Mapping::Zero(None)));
    }

    #[test]
    fn tables_hold_as_many_entries_as_fit_a_cluster() {
        assert_eq!(format().l2_entries(), 8192);
        assert_eq!(EntryFormat { extended: true, ..format() }.l2_entries(), 4096);
    }
}
