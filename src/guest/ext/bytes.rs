//! A number in two halves, and what is wrong with a structure.

use crate::error::{Error, ErrorKind};

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
