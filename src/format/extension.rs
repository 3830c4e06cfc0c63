//! Header extensions: the list between the header and the backing file name.
//!
//! Only reads the list; the header decides what the extensions mean together with its fields (whether one is
//! required or forbidden).

use super::bytes::{be_u32, be_u64};
use super::feature::{self, FeatureName};
use super::frozen::{self, FROZEN_MAGIC, Frozen};
use super::malformed::Malformed;
use crate::units::HostOffset;

/// Magic of the end mark.
pub const END: u32 = 0;
/// Magic of the backing format string.
pub const BACKING_FORMAT: u32 = 0xE279_2ACA;
/// Magic of the feature name table.
pub const FEATURE_NAMES: u32 = 0x6803_F857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO_HEADER: u32 = 0x0537_BE77;
const DATA_FILE: u32 = 0x4441_5441;

/// Longest backing format string; QEMU's limit.
const MAX_BACKING_FORMAT_LEN: u64 = 15;

/// An extension that chainfs does not interpret; a writer keeps it as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownExtension {
    /// Its magic.
    pub magic: u32,
    /// Its data without padding.
    pub data: Vec<u8>,
}

/// The location of the bitmap directory. As found: [`super::Header`] checks it if it is in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BitmapsExtension {
    /// Bitmaps in the directory.
    pub count: u32,
    /// Bytes of the directory.
    pub directory_len: u64,
    /// Its place.
    pub directory: HostOffset,
    pub(super) reserved: u32,
}

/// The location of the LUKS header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CryptoHeader {
    /// Its place, cluster aligned.
    pub offset: HostOffset,
    /// Its bytes.
    pub len: u64,
}

#[derive(Debug, Default)]
pub(super) struct Extensions {
    pub(super) backing_format: Option<String>,
    pub(super) feature_names: Vec<FeatureName>,
    pub(super) bitmaps: Option<BitmapsExtension>,
    pub(super) crypto_header: Option<CryptoHeader>,
    pub(super) data_file: Option<Vec<u8>>,
    pub(super) frozen: Option<Frozen>,
    pub(super) unknown: Vec<UnknownExtension>,
}

/// Reads the list in `area`, which starts after the header and ends where the backing file name or the first
/// cluster does.
pub(super) fn parse(area: &[u8]) -> Result<Extensions, Malformed> {
    let mut found = Extensions::default();
    let mut rest = area;
    // Fewer than 8 bytes cannot hold an extension: the backing file name follows directly.
    while rest.len() >= 8 {
        let (magic, len) = (be_u32(rest, 0), be_u32(rest, 4));
        if magic == END {
            break;
        }
        rest = &rest[8..];
        let data = rest.get(..len as usize);
        let data = data.ok_or(Malformed::ExtensionTooLong { magic, len, left: rest.len() as u64 })?;
        // The last of several extensions of one kind counts, as in QEMU.
        found.take(magic, len, data)?;
        // The padding of the last one may be truncated by the end of the area.
        rest = rest.get(data.len().next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(found)
}

impl Extensions {
    /// Adds one.
    fn take(&mut self, magic: u32, len: u32, data: &[u8]) -> Result<(), Malformed> {
        match magic {
            BACKING_FORMAT => self.backing_format = backing_format(data)?,
            FEATURE_NAMES => self.feature_names = feature::parse_names(data),
            BITMAPS => self.bitmaps = Some(bitmaps(len, data)?),
            CRYPTO_HEADER => self.crypto_header = Some(crypto_header(len, data)?),
            DATA_FILE => {
                if data.contains(&0) {
                    return Err(Malformed::DataFileNul);
                }
                self.data_file = (!data.is_empty()).then(|| data.to_vec());
            }
            FROZEN_MAGIC if frozen::is_thawed(data) => {}
            FROZEN_MAGIC => self.frozen = Some(Frozen::parse(data)?),
            _ => self.unknown.push(UnknownExtension { magic, data: data.to_vec() }),
        }
        Ok(())
    }
}

fn backing_format(data: &[u8]) -> Result<Option<String>, Malformed> {
    let found = data.len() as u64;
    if found > MAX_BACKING_FORMAT_LEN {
        return Err(Malformed::TooLarge {
            what: "length of the backing format",
            found,
            max: MAX_BACKING_FORMAT_LEN,
        });
    }
    match std::str::from_utf8(data) {
        Ok(text) if text.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Ok((!text.is_empty()).then(|| text.to_owned()))
        }
        _ => Err(Malformed::BackingFormat),
    }
}

fn bitmaps(len: u32, data: &[u8]) -> Result<BitmapsExtension, Malformed> {
    if len != 24 {
        return Err(Malformed::ExtensionLength { what: "bitmaps", found: len, expected: 24 });
    }
    Ok(BitmapsExtension {
        count: be_u32(data, 0),
        reserved: be_u32(data, 4),
        directory_len: be_u64(data, 8),
        directory: HostOffset(be_u64(data, 16)),
    })
}

fn crypto_header(len: u32, data: &[u8]) -> Result<CryptoHeader, Malformed> {
    if len != 16 {
        return Err(Malformed::ExtensionLength { what: "LUKS header", found: len, expected: 16 });
    }
    Ok(CryptoHeader { offset: HostOffset(be_u64(data, 0)), len: be_u64(data, 8) })
}

#[cfg(test)]
mod tests {
    use super::super::testing::extension;
    use super::*;

    #[test]
    fn known_and_unknown_ones_are_read_up_to_the_end_mark() {
        let area = [
            extension(BACKING_FORMAT, b"qcow2"),
            extension(0x1234, b"kept"),
            extension(0x1234, b"kept twice"),
            extension(DATA_FILE, b"data.raw"),
            extension(END, b""),
            extension(0x9999, b"beyond the end"),
        ]
        .concat();
        let found = parse(&area).unwrap();
        assert_eq!(found.backing_format.as_deref(), Some("qcow2"));
        assert_eq!(found.data_file.as_deref(), Some(b"data.raw".as_slice()));
        let kept: Vec<_> =
            found.unknown.iter().map(|unknown| (unknown.magic, unknown.data.as_slice())).collect();
        assert_eq!(kept, [(0x1234, b"kept".as_slice()), (0x1234, b"kept twice".as_slice())]);
    }

    #[test]
    fn the_last_extension_may_end_with_the_area_without_padding() {
        let whole = extension(BACKING_FORMAT, b"raw");
        assert_eq!(parse(&whole).unwrap().backing_format.as_deref(), Some("raw"));
        assert_eq!(parse(&whole[..11]).unwrap().backing_format.as_deref(), Some("raw"));
        let cut = parse(&whole[..10]).unwrap_err();
        assert_eq!(cut, Malformed::ExtensionTooLong { magic: BACKING_FORMAT, len: 3, left: 2 });
    }

    #[test]
    fn each_violation_has_its_reason() {
        let reason = |magic, data: &[u8]| parse(&extension(magic, data)).unwrap_err();
        let what = "length of the backing format";
        assert_eq!(reason(BACKING_FORMAT, &[b'a'; 16]), Malformed::TooLarge { what, found: 16, max: 15 });
        assert_eq!(reason(BACKING_FORMAT, b"raw\0"), Malformed::BackingFormat);
        assert_eq!(reason(BACKING_FORMAT, b"\xff"), Malformed::BackingFormat);
        assert_eq!(reason(DATA_FILE, b"a\0b"), Malformed::DataFileNul);
        assert_eq!(
            reason(BITMAPS, &[0; 23]),
            Malformed::ExtensionLength { what: "bitmaps", found: 23, expected: 24 }
        );
        let what = "LUKS header";
        assert_eq!(
            reason(CRYPTO_HEADER, &[0; 17]),
            Malformed::ExtensionLength { what, found: 17, expected: 16 }
        );
        assert_eq!(reason(FROZEN_MAGIC, b""), Malformed::FrozenLength { have: 0, need: 24 });
    }

    #[test]
    fn the_last_of_two_extensions_of_a_kind_counts() {
        let twice = [extension(BACKING_FORMAT, b"qcow2"), extension(BACKING_FORMAT, b"raw")].concat();
        assert_eq!(parse(&twice).unwrap().backing_format.as_deref(), Some("raw"));
    }

    #[test]
    fn thawed_freeze_marks_are_ignored() {
        let mark = Frozen { seconds: 1, nanoseconds: 2, description: "kept".into() };
        let mut thawed = mark.encode();
        thawed[frozen::FLAGS_AT + 3] = frozen::THAWED as u8;
        let place = extension(FROZEN_MAGIC, &thawed);
        let found = parse(&[place.clone(), extension(FROZEN_MAGIC, &mark.encode()), place].concat()).unwrap();
        assert_eq!((found.frozen, found.unknown), (Some(mark), Vec::new()));
    }

    #[test]
    fn empty_strings_are_ignored() {
        let found = parse(&[extension(BACKING_FORMAT, b""), extension(DATA_FILE, b"")].concat()).unwrap();
        assert_eq!((found.backing_format, found.data_file), (None, None));
    }
}
