//! The freeze mark: chainfs' own header extension, which says that a layer is a snapshot.
//!
//! A frozen layer never becomes writable again by becoming a leaf. QEMU keeps unknown extensions, so the mark
//! survives QEMU's writes to the file.
//!
//! Payload, big-endian: version u32 = 1, flags u32, seconds i64, nanoseconds u32, description length u32,
//! description in UTF-8. Bytes after the description are ignored, so that a mark may replace a longer one.
//!
//! Flag bit 0, thawed: this is no mark, and nothing after the flags is interpreted. A mark in the middle of
//! other extensions can be set and removed by one write to its flags; the space is for the next mark. All
//! other flags are reserved and 0.

use super::bytes::{be_i64, be_u32};
use super::malformed::Malformed;

/// Magic of the extension: `CHFS`.
pub const FROZEN_MAGIC: u32 = 0x4348_4653;
/// Limit of a description, in bytes. chainfs' own; small enough for header and name in 4 KiB.
pub const MAX_DESCRIPTION_LEN: usize = 1024;

/// Offset of the flags in the payload.
pub const FLAGS_AT: usize = 4;
/// The flag of a mark that was removed.
pub const THAWED: u32 = 1;

const VERSION: u32 = 1;
const FIXED_LEN: usize = 24;

/// Whether the extension with this payload is only the space of a removed mark.
pub fn is_thawed(payload: &[u8]) -> bool {
    payload.len() >= FLAGS_AT + 4 && be_u32(payload, 0) == VERSION && be_u32(payload, FLAGS_AT) == THAWED
}

/// When a layer was frozen, with the user's description.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frozen {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Below 1,000,000,000.
    pub nanoseconds: u32,
    /// The user's description, at most [`MAX_DESCRIPTION_LEN`] bytes.
    pub description: String,
}

impl Frozen {
    /// A mark of that time without a description.
    pub fn of_time((seconds, nanoseconds): (i64, u32)) -> Self {
        Self { seconds, nanoseconds, description: String::new() }
    }

    /// Reads the payload of the extension.
    pub fn parse(payload: &[u8]) -> Result<Self, Malformed> {
        let have = payload.len() as u64;
        if payload.len() < FIXED_LEN {
            return Err(Malformed::FrozenLength { have, need: FIXED_LEN as u64 });
        }
        match (be_u32(payload, 0), be_u32(payload, FLAGS_AT)) {
            (VERSION, 0) => {}
            (VERSION, reserved) => {
                return Err(Malformed::Reserved { what: "freeze mark", found: reserved.into() });
            }
            (version, _) => return Err(Malformed::FrozenVersion(version)),
        }
        let (nanoseconds, len) = (be_u32(payload, 16), be_u32(payload, 20) as usize);
        if nanoseconds >= 1_000_000_000 {
            return Err(Malformed::FrozenNanoseconds(nanoseconds));
        }
        if len > MAX_DESCRIPTION_LEN {
            let (found, max) = (len as u64, MAX_DESCRIPTION_LEN as u64);
            return Err(Malformed::TooLarge { what: "length of the freeze mark's description", found, max });
        }
        let need = FIXED_LEN + len;
        let description = payload.get(FIXED_LEN..need);
        let description = description.ok_or(Malformed::FrozenLength { have, need: need as u64 })?;
        let description = std::str::from_utf8(description).map_err(|_| Malformed::FrozenDescription)?;
        Ok(Self { seconds: be_i64(payload, 8), nanoseconds, description: description.to_owned() })
    }

    /// The payload of the extension.
    ///
    /// # Panics
    /// If a field is beyond its limit: commands are checked when they are parsed.
    pub fn encode(&self) -> Vec<u8> {
        assert!(self.nanoseconds < 1_000_000_000 && self.description.len() <= MAX_DESCRIPTION_LEN);
        let mut out = Vec::with_capacity(FIXED_LEN + self.description.len());
        out.extend(VERSION.to_be_bytes());
        out.extend(0u32.to_be_bytes());
        out.extend(self.seconds.to_be_bytes());
        out.extend(self.nanoseconds.to_be_bytes());
        out.extend((self.description.len() as u32).to_be_bytes());
        out.extend(self.description.as_bytes());
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Vec<u8> {
        Frozen { seconds: -5, nanoseconds: 999_999_999, description: "before the upgrade \u{2603}".into() }
            .encode()
    }

    fn poked(at: usize, value: u32) -> Result<Frozen, Malformed> {
        let mut bytes = good();
        bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
        Frozen::parse(&bytes)
    }

    #[test]
    fn an_encoded_mark_parses_to_the_same_value() {
        let mark = Frozen::parse(&good()).unwrap();
        assert_eq!((mark.seconds, mark.nanoseconds), (-5, 999_999_999));
        assert_eq!(mark.encode(), good());
        let empty = Frozen { seconds: i64::MAX, nanoseconds: 0, description: String::new() };
        assert_eq!(Frozen::parse(&empty.encode()), Ok(empty));
    }

    #[test]
    fn a_mark_may_replace_a_longer_one_and_may_be_thawed() {
        let mut longer = good();
        longer.extend(b"what was there before");
        assert_eq!(Frozen::parse(&longer), Frozen::parse(&good()));
        assert!(!is_thawed(&longer) && !is_thawed(&longer[..7]) && !is_thawed(&[]));
        longer[FLAGS_AT..FLAGS_AT + 4].copy_from_slice(&THAWED.to_be_bytes());
        assert!(is_thawed(&longer) && is_thawed(&longer[..8]));
    }

    #[test]
    fn each_violation_has_its_reason() {
        let have = good().len() as u64;
        assert_eq!(Frozen::parse(&good()[..23]), Err(Malformed::FrozenLength { have: 23, need: 24 }));
        assert_eq!(poked(0, 2), Err(Malformed::FrozenVersion(2)));
        assert_eq!(poked(4, 2), Err(Malformed::Reserved { what: "freeze mark", found: 2 }));
        assert_eq!(poked(16, 1_000_000_000), Err(Malformed::FrozenNanoseconds(1_000_000_000)));
        assert_eq!(poked(20, 99), Err(Malformed::FrozenLength { have, need: 24 + 99 }));
        let what = "length of the freeze mark's description";
        assert_eq!(poked(20, 1025), Err(Malformed::TooLarge { what, found: 1025, max: 1024 }));
        assert_eq!(poked(24, 0xffff_ffff), Err(Malformed::FrozenDescription));
    }
}
