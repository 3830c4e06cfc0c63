//! Reads fields of on-disk structures, computes the checksum that most of them use, and makes the errors
//! about them.
//!
//! A field outside the given bytes reads as 0. Parsers check lengths and checksums themselves.

use crate::error::{Error, ErrorKind};

/// The error for a structure that violates its format.
pub(super) fn corrupt(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, fact)
}

/// The error for a valid structure that is not supported.
pub(super) fn unsupported(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, fact)
}

/// `N` bytes at `at`.
pub(super) fn array<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..).and_then(|rest| rest.first_chunk()).copied().unwrap_or([0; N])
}

/// Up to `len` bytes at `at`.
pub(super) fn slice(bytes: &[u8], at: usize, len: usize) -> &[u8] {
    let rest = bytes.get(at..).unwrap_or_default();
    &rest[..len.min(rest.len())]
}

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array(bytes, at))
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array(bytes, at))
}

pub(super) fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array(bytes, at))
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(array(bytes, at))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(array(bytes, at))
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(array(bytes, at))
}

/// The reflected CRC-32 of Ethernet without the inversions: each format applies its own.
pub(super) fn crc32(seed: u32, bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = table();
    bytes.iter().fold(seed, |crc, byte| TABLE[usize::from((crc as u8) ^ byte)] ^ (crc >> 8))
}

const fn table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < table.len() {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 { (crc >> 1) ^ 0xedb8_8320 } else { crc >> 1 };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

/// Text up to its first NUL, without trailing spaces, safe for a terminal; `None` if it is empty.
pub(super) fn text(bytes: &[u8]) -> Option<String> {
    let len = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let text = String::from_utf8_lossy(&bytes[..len]);
    let text = text.trim_end();
    (!text.is_empty()).then(|| shown(text))
}

/// UTF-16 (little-endian) up to its first NUL, safe for a terminal; `None` if it is empty.
pub(super) fn utf16(bytes: &[u8]) -> Option<String> {
    let units = bytes.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]]));
    let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
    (!units.is_empty()).then(|| shown(&String::from_utf16_lossy(&units)))
}

/// Guest-controlled text must not move the terminal's cursor or start a new line in a list.
fn shown(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// A UUID whose bytes are in the order of its digits; `None` if it is all zero.
pub(super) fn uuid(bytes: [u8; 16]) -> Option<String> {
    if bytes == [0; 16] {
        return None;
    }
    let digits = hex(&bytes);
    let parts = [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]];
    Some(parts.join("-"))
}

/// A UUID as Microsoft and EFI store it: its first three fields little-endian.
pub(super) fn guid(mut bytes: [u8; 16]) -> Option<String> {
    bytes[..4].reverse();
    bytes[4..6].reverse();
    bytes[6..8].reverse();
    uuid(bytes)
}

pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_ethernet() {
        assert_eq!(!crc32(!0, b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn texts_end_at_nul_and_are_safe_for_a_terminal() {
        assert_eq!(text(b"a b  \0c").as_deref(), Some("a b"));
        assert_eq!(text(b"a\x1b[2J\n").as_deref(), Some("a\u{fffd}[2J"));
        assert_eq!(utf16(b"a\0\n\0\0\0b\0").as_deref(), Some("a\u{fffd}"));
        assert_eq!((text(b"  \0"), utf16(b"\0\0a\0")), (None, None));
    }

    #[test]
    fn fields_outside_the_bytes_are_zero() {
        assert_eq!(le32(&[1, 2, 3], 0), 0);
        assert_eq!(le16(&[1, 2, 3], 1), 0x0302);
        assert_eq!(le64(&[], usize::MAX), 0);
        assert_eq!(slice(&[1, 2, 3], 2, 9), [3]);
    }
}
