//! Numbers at known positions: little-endian in the file system, big-endian in its journal.
//!
//! Callers have checked the length before: a position outside of the bytes is our own bug and panics, it is never
//! the disk's fault.

use crate::error::{Error, ErrorKind};

/// The `N` bytes at `at`.
fn field<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[at..at + N]);
    out
}

pub(super) fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(field(bytes, at))
}

pub(super) fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(field(bytes, at))
}

pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes(field(bytes, at))
}

pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(field(bytes, at))
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(field(bytes, at))
}

/// Two halves of a number that grew.
pub(super) fn join(low: u32, high: impl Into<u64>) -> u64 {
    u64::from(low) | high.into() << 32
}

/// A structure that breaks the format's rules.
pub(super) fn corrupt(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, fact)
}

/// A good structure of a kind that is not read here.
pub(super) fn unsupported(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, fact)
}
