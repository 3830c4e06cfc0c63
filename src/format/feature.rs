//! Feature bits: the known ones, their names, and the ones that chainfs lacks.

use std::fmt;

/// Incompatible bit 0: refcounts may be stale.
pub const DIRTY: u64 = 1 << 0;
/// Incompatible bit 1: something was found damaged; QEMU opens it read-only.
pub const CORRUPT: u64 = 1 << 1;
/// Incompatible bit 2: guest data is in an external file.
pub const DATA_FILE: u64 = 1 << 2;
/// Incompatible bit 3: `compression_type` is not deflate.
pub const COMPRESSION: u64 = 1 << 3;
/// Incompatible bit 4: L2 entries of 16 bytes with subclusters.
pub const EXTENDED_L2: u64 = 1 << 4;
/// Compatible bit 0: refcounts are updated lazily.
pub const LAZY_REFCOUNTS: u64 = 1 << 0;
/// Autoclear bit 0: the bitmaps extension is consistent.
pub const BITMAPS: u64 = 1 << 0;
/// Autoclear bit 1: the external data file is a raw image by itself.
pub const RAW_DATA: u64 = 1 << 1;

/// The incompatible bits that chainfs can read.
pub const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;

/// The autoclear bits that a writer here keeps valid; it clears all others.
pub const KNOWN_AUTOCLEAR: u64 = BITMAPS | RAW_DATA;

/// The set of feature bits in the header that a name belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeatureKind {
    /// A program that does not know the bit must not open the image.
    Incompatible,
    /// A program that does not know the bit may ignore it.
    Compatible,
    /// A program that does not know the bit clears it before writing.
    Autoclear,
}

/// One row of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FeatureName {
    /// The set.
    pub kind: FeatureKind,
    /// The bit, 0 to 63.
    pub bit: u8,
    /// The name that the image's writer gives it.
    pub name: String,
}

/// Bytes of a row: type, bit, and 46 bytes of name padded with zeros.
pub const FEATURE_NAME_LEN: usize = 48;

/// Reads the table. It only serves messages, so a malformed row is skipped.
pub(super) fn parse_names(bytes: &[u8]) -> Vec<FeatureName> {
    let row = |row: &[u8]| {
        let kind = match row[0] {
            0 => FeatureKind::Incompatible,
            1 => FeatureKind::Compatible,
            2 => FeatureKind::Autoclear,
            _ => return None,
        };
        let name = row[2..].split(|&byte| byte == 0).next().unwrap_or_default();
        (row[1] < 64).then(|| FeatureName {
            kind,
            bit: row[1],
            name: String::from_utf8_lossy(name).into_owned(),
        })
    };
    // Three sets of 64 bits: more rows than that can only repeat themselves.
    bytes.chunks_exact(FEATURE_NAME_LEN).take(3 * 64).filter_map(row).collect()
}

/// The features of a well-formed image that chainfs does not have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// Unknown incompatible feature bits, by the image's own names for them.
    Features(Vec<String>),
    /// A `compression_type` other than deflate and zstd.
    CompressionType(u8),
}

impl Unsupported {
    pub(super) fn features(incompatible: u64, names: &[FeatureName]) -> Option<Self> {
        let unknown = incompatible & !KNOWN_INCOMPATIBLE;
        let name = |bit: u8| {
            let row = names.iter().find(|row| row.kind == FeatureKind::Incompatible && row.bit == bit);
            row.map_or_else(
                || format!("bit {bit}"),
                |row| format!("\"{}\" (bit {bit})", row.name.escape_debug()),
            )
        };
        let unknown: Vec<String> = (0..64).filter(|bit| unknown >> bit & 1 == 1).map(name).collect();
        (!unknown.is_empty()).then_some(Self::Features(unknown))
    }
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Features(names) => {
                write!(
                    f,
                    "the image uses incompatible features that chainfs does not know: {}",
                    names.join(", ")
                )
            }
            Self::CompressionType(kind) => {
                write!(f, "the image uses compression type {kind}; chainfs knows 0 (deflate) and 1 (zstd)")
            }
        }
    }
}

/// One row of the table, for tests of its readers.
#[cfg(test)]
pub(super) fn name_row(kind: u8, bit: u8, name: &str) -> Vec<u8> {
    let mut row = vec![0; FEATURE_NAME_LEN];
    (row[0], row[1]) = (kind, bit);
    row[2..2 + name.len()].copy_from_slice(name.as_bytes());
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_bits_are_named_by_the_images_own_table() {
        let names = parse_names(&[name_row(1, 7, "other set"), name_row(0, 7, "holograms")].concat());
        let unsupported = Unsupported::features(DIRTY | 1 << 7 | 1 << 63, &names).unwrap();
        assert_eq!(unsupported, Unsupported::Features(vec!["\"holograms\" (bit 7)".into(), "bit 63".into()]));
        assert_eq!(
            unsupported.to_string(),
            "the image uses incompatible features that chainfs does not know: \"holograms\" (bit 7), bit 63"
        );
    }

    #[test]
    fn malformed_and_truncated_rows_are_skipped() {
        let mut bytes =
            [name_row(3, 0, "no such set"), name_row(0, 64, "no such bit"), name_row(2, 0, "bitmaps")]
                .concat();
        bytes.extend([0; 20]);
        assert_eq!(
            parse_names(&bytes),
            [FeatureName { kind: FeatureKind::Autoclear, bit: 0, name: "bitmaps".into() }]
        );
        assert_eq!(Unsupported::features(KNOWN_INCOMPATIBLE, &[]), None);
    }
}
