//! Why bytes are not what the format allows: one variant per reason.
//!
//! Each message names the field, the value found and the allowed values. The caller that opened the file adds
//! its name. A reason never depends on the caller's intent: the checker itself finds what matters only to a
//! checker.

use std::fmt;

use crate::error::ErrorKind;

/// The exact reason why something cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The file or table ends within `what`.
    Truncated {
        /// The structure that is truncated.
        what: &'static str,
        /// Bytes it needs.
        need: u64,
        /// Bytes that are there.
        have: u64,
    },
    /// The first four bytes are not `QFI\xfb`.
    Magic(u32),
    /// Neither version 2 nor 3.
    Version(u32),
    /// Not 9 to 21.
    ClusterBits(u32),
    /// `header_length` is below 104, not a multiple of 8 or beyond the first cluster.
    HeaderLength(u32),
    /// The backing file name starts beyond the first cluster.
    BackingOffset(u64),
    /// The backing file name starts within the header or its extensions.
    BackingInHeader {
        /// Where the name starts.
        offset: u64,
        /// Where the header ends.
        header_len: u64,
    },
    /// The backing file name holds a NUL byte.
    BackingNul,
    /// The format of the backing file is not a printable word.
    BackingFormat,
    /// Neither 0, 1 (AES) nor 2 (LUKS).
    CryptMethod(u32),
    /// LUKS encryption without the extension with the location of its header.
    CryptoHeaderMissing,
    /// A pointer to a LUKS header in an image that is not encrypted with LUKS.
    CryptoHeaderUnexpected,
    /// An offset that has to be a multiple of `unit` is not.
    Unaligned {
        /// The structure at the offset.
        what: &'static str,
        /// The offset as found.
        offset: u64,
        /// The unit, in bytes.
        unit: u64,
    },
    /// A number or length above its limit.
    TooLarge {
        /// What it counts.
        what: &'static str,
        /// The value as found.
        found: u64,
        /// The largest allowed.
        max: u64,
    },
    /// Offset and length together exceed what a file can hold.
    OutOfRange {
        /// The structure there.
        what: &'static str,
        /// Its offset.
        offset: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// A table that the reader needs lies beyond the end of the file.
    BeyondEnd {
        /// The table.
        what: &'static str,
        /// Where it ends.
        end: u64,
        /// Where the file ends.
        file_len: u64,
    },
    /// Two structures overlap.
    Overlap {
        /// The first one.
        first: &'static str,
        /// The second one.
        second: &'static str,
    },
    /// The L1 table covers less than the virtual size.
    L1TooSmall {
        /// Its entries.
        entries: u32,
        /// Entries that the virtual size needs.
        need: u64,
    },
    /// `refcount_table_clusters` is zero.
    NoRefcountTable,
    /// Above 6 (64 bits).
    RefcountOrder(u32),
    /// Incompatible feature bit 3 and `compression_type` contradict each other.
    CompressionType {
        /// Whether the bit is set.
        bit: bool,
        /// The type as found.
        kind: u8,
    },
    /// Extended L2 entries with clusters below 16 KiB.
    SubclustersTooSmall(u32),
    /// A header extension runs over the end of the extension area.
    ExtensionTooLong {
        /// Its magic.
        magic: u32,
        /// Its length.
        len: u32,
        /// Bytes left in the area.
        left: u64,
    },
    /// A header extension of fixed length has another.
    ExtensionLength {
        /// The extension.
        what: &'static str,
        /// Its length.
        found: u32,
        /// The length of the specification.
        expected: u32,
    },
    /// The raw external data bit without an external data file.
    RawDataWithoutFile,
    /// The raw external data bit together with a backing file.
    RawDataWithBacking,
    /// The name of the external data file holds a NUL byte.
    DataFileNul,
    /// A bitmaps extension that counts no bitmap.
    NoBitmaps,
    /// A reserved field is not zero.
    Reserved {
        /// The structure with the field.
        what: &'static str,
        /// The value or entry as found.
        found: u64,
    },
    /// A freeze mark of an unknown version.
    FrozenVersion(u32),
    /// A freeze mark with a billion nanoseconds or more.
    FrozenNanoseconds(u32),
    /// A freeze mark whose length does not fit its description.
    FrozenLength {
        /// Bytes of the extension.
        have: u64,
        /// Bytes that it should have.
        need: u64,
    },
    /// A freeze mark whose description is not UTF-8.
    FrozenDescription,
    /// A zero flag in an image of version 2.
    ZeroInVersion2(u64),
    /// Subclusters marked as allocated and as zero.
    SubclusterTwice(u32),
    /// Subclusters marked as allocated in a cluster that has no host offset.
    SubclusterWithoutCluster(u32),
    /// A compressed cluster with a subcluster bitmap.
    CompressedSubclusters(u64),
    /// A compressed cluster in an image with an external data file.
    CompressedInDataFile,
    /// A cluster of an external data file that is not at its guest offset.
    DataFileOffset {
        /// The offset in the entry.
        host: u64,
        /// The required offset.
        guest: u64,
    },
    /// A snapshot table entry of a version 3 image with less than 16 bytes of extra data.
    SnapshotExtraShort(u32),
    /// A bitmap type other than 1 (dirty tracking).
    BitmapType(u8),
    /// A bitmap granularity outside of 9 to 31 bits.
    BitmapGranularity(u8),
    /// A bitmap without a name.
    BitmapUnnamed,
    /// A bitmap with extra data that is marked as required.
    BitmapExtraData(u32),
    /// A bitmap table at offset 0.
    BitmapTableMissing,
    /// A compressed cluster that is no valid stream.
    CompressedInvalid(&'static str),
    /// A compressed cluster that ends before the cluster is full.
    CompressedShort {
        /// Bytes that came out.
        got: u64,
        /// Bytes of a cluster.
        want: u64,
    },
}

impl Malformed {
    /// How a user should see the file: damaged, or a valid one of an unknown kind.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Version(_)
            | Self::CryptMethod(_)
            | Self::FrozenVersion(_)
            | Self::BitmapType(_)
            | Self::BitmapExtraData(_) => ErrorKind::Unsupported,
            _ => ErrorKind::Corrupt,
        }
    }
}

impl Malformed {
    /// The fact alone, without the remedy: for a list of many.
    pub fn fact(&self) -> String {
        let text = self.to_string();
        text.strip_suffix(CHECK).and_then(|text| text.strip_suffix("; ")).map_or(text.clone(), str::to_owned)
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { what, need, have } => {
                write!(
                    f,
                    "{what} needs {need} bytes, but only {have} are there: the file is cut off; restore it \
                        from a backup"
                )
            }
            Self::Magic(found) => {
                write!(f, "magic is {found:#010x}, not 0x514649fb: this is not a qcow2 image")
            }
            Self::Version(found) => write!(f, "qcow2 version is {found}; versions 2 and 3 are supported"),
            Self::ClusterBits(found) => write!(f, "cluster_bits is {found}; 9 to 21 are allowed"),
            Self::HeaderLength(found) => {
                write!(
                    f,
                    "header_length is {found}; it has to be a multiple of 8 from 104 up to the cluster size"
                )
            }
            Self::BackingOffset(found) => {
                write!(f, "backing_file_offset is {found:#x}; the name has to lie within the first cluster")
            }
            Self::BackingInHeader { offset, header_len } => {
                write!(
                    f,
                    "backing_file_offset is {offset:#x}, which lies within the header of {header_len} bytes"
                )
            }
            Self::BackingNul => {
                f.write_str("the backing file name contains a NUL byte; set it again with qemu-img rebase -u")
            }
            Self::BackingFormat => f.write_str(
                "the backing format is not a printable word; set it again with qemu-img rebase -u -F FORMAT",
            ),
            Self::CryptMethod(found) => {
                write!(f, "crypt_method is {found}; 0 (none), 1 (AES) and 2 (LUKS) are known")
            }
            Self::CryptoHeaderMissing => {
                f.write_str("crypt_method is LUKS, but no header extension says where the LUKS header is")
            }
            Self::CryptoHeaderUnexpected => {
                f.write_str("a header extension points to a LUKS header, but crypt_method is not LUKS")
            }
            Self::Unaligned { what, offset, unit } => {
                write!(f, "the offset of the {what} is {offset:#x}, not a multiple of {unit}; {CHECK}")
            }
            Self::TooLarge { what, found, max } => {
                write!(f, "the {what} is {found}; at most {max} is allowed")
            }
            Self::OutOfRange { what, offset, len } => {
                write!(
                    f,
                    "the {what} at {offset:#x} of {len} bytes lies beyond what a file can hold; {CHECK}"
                )
            }
            Self::BeyondEnd { what, end, file_len } => {
                write!(
                    f,
                    "the {what} ends at {end:#x}, but the file at {file_len:#x}: the file is cut off; \
                        restore it from a backup"
                )
            }
            Self::Overlap { first, second } => {
                write!(f, "the {first} and the {second} claim the same bytes; restore the file from a backup")
            }
            Self::L1TooSmall { entries, need } => {
                write!(f, "the L1 table has {entries} entries, but the virtual size needs {need}")
            }
            Self::NoRefcountTable => {
                write!(f, "refcount_table_clusters is 0: there is no refcount table; {CHECK}")
            }
            Self::RefcountOrder(found) => {
                write!(f, "refcount_order is {found}; at most 6 (64 bits) is allowed")
            }
            Self::CompressionType { bit, kind } => {
                let state = if *bit { "set" } else { "not set" };
                write!(
                    f,
                    "compression_type is {kind}, but incompatible feature bit 3 is {state}; it is set for \
                        every type but 0"
                )
            }
            Self::SubclustersTooSmall(bits) => {
                write!(f, "cluster_bits is {bits} with extended L2 entries, which need at least 14")
            }
            Self::ExtensionTooLong { magic, len, left } => {
                write!(f, "header extension {magic:#010x} has {len} bytes, but only {left} are left for it")
            }
            Self::ExtensionLength { what, found, expected } => {
                write!(f, "the {what} extension has {found} bytes; it has to have {expected}")
            }
            Self::RawDataWithoutFile => f.write_str(
                "the autoclear bit for raw external data is set, but the image has no external data file",
            ),
            Self::RawDataWithBacking => {
                f.write_str("an image with a raw external data file has a backing file, which is not allowed")
            }
            Self::DataFileNul => f.write_str("the name of the external data file contains a NUL byte"),
            Self::NoBitmaps => f.write_str("the bitmaps extension counts no bitmap; at least 1 is required"),
            Self::Reserved { what, found } => {
                write!(f, "the {what} has reserved bits set ({found:#x}), which have to be zero; {CHECK}")
            }
            Self::FrozenVersion(found) => {
                write!(
                    f,
                    "the freeze mark has version {found}; this chainfs knows version 1, use a newer one"
                )
            }
            Self::FrozenNanoseconds(found) => {
                write!(f, "the freeze mark has {found} nanoseconds; less than 1000000000 are allowed")
            }
            Self::FrozenLength { have, need } => {
                write!(f, "the freeze mark has {have} bytes; its content needs {need}")
            }
            Self::FrozenDescription => f.write_str("the description in the freeze mark is not UTF-8"),
            Self::ZeroInVersion2(entry) => {
                write!(f, "the L2 entry {entry:#x} has the zero flag, which version 2 does not have; {CHECK}")
            }
            Self::SubclusterTwice(mask) => {
                write!(f, "the L2 entry marks subclusters {mask:#010x} as allocated and as zero; {CHECK}")
            }
            Self::SubclusterWithoutCluster(mask) => {
                write!(
                    f,
                    "the L2 entry marks subclusters {mask:#010x} as allocated, but has no host cluster; \
                        {CHECK}"
                )
            }
            Self::CompressedSubclusters(bitmap) => {
                write!(
                    f,
                    "the L2 entry of a compressed cluster has the subcluster bitmap {bitmap:#x}, which has \
                        to be zero; {CHECK}"
                )
            }
            Self::CompressedInDataFile => f.write_str(
                "the L2 entry is compressed, which an image with an external data file cannot have",
            ),
            Self::DataFileOffset { host, guest } => {
                write!(
                    f,
                    "the cluster lies at {host:#x} of the external data file; it has to lie at its guest \
                        offset {guest:#x}"
                )
            }
            Self::SnapshotExtraShort(found) => {
                write!(
                    f,
                    "a snapshot table entry has {found} bytes of extra data; version 3 requires 16; {CHECK}"
                )
            }
            Self::BitmapType(found) => {
                write!(f, "a bitmap has type {found}; only 1 (dirty tracking) is known")
            }
            Self::BitmapGranularity(found) => {
                write!(f, "a bitmap has granularity_bits {found}; 9 to 31 are allowed")
            }
            Self::BitmapUnnamed => f.write_str("a bitmap has no name"),
            Self::BitmapExtraData(found) => {
                write!(f, "a bitmap has {found} bytes of extra data of an unknown kind")
            }
            Self::BitmapTableMissing => {
                f.write_str("a bitmap has its table at offset 0, where the header is")
            }
            Self::CompressedInvalid(kind) => {
                write!(f, "a compressed cluster is not a valid {kind} stream; restore the file from a backup")
            }
            Self::CompressedShort { got, want } => {
                write!(
                    f,
                    "a compressed cluster ends after {got} of {want} bytes; restore the file from a backup"
                )
            }
        }
    }
}

/// The remedy for damage that QEMU's checker can repair.
const CHECK: &str = "restore the file from a backup or try qemu-img check -r all on a copy";

impl std::error::Error for Malformed {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_names_field_value_and_rule() {
        assert_eq!(Malformed::ClusterBits(8).to_string(), "cluster_bits is 8; 9 to 21 are allowed");
        let text = Malformed::Unaligned { what: "L1 table", offset: 0x1200, unit: 65_536 }.to_string();
        assert!(
            text.starts_with("the offset of the L1 table is 0x1200, not a multiple of 65536; "),
            "{text}"
        );
        let fact = Malformed::Unaligned { what: "L1 table", offset: 0x1200, unit: 65_536 }.fact();
        assert_eq!(fact, "the offset of the L1 table is 0x1200, not a multiple of 65536");
    }

    #[test]
    fn an_unknown_version_is_unsupported_and_not_corrupt() {
        assert_eq!(Malformed::Version(4).kind(), ErrorKind::Unsupported);
        assert_eq!(Malformed::ClusterBits(8).kind(), ErrorKind::Corrupt);
    }
}
