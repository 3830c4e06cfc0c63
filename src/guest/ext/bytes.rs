//! A number in two halves, and errors about a structure.

use crate::error::{Error, ErrorKind};

/// Joins the two halves of a number that grew.
pub(super) fn join(low: u32, high: impl Into<u64>) -> u64 {
    u64::from(low) | high.into() << 32
}

/// The error for a structure that violates its format.
pub(super) fn corrupt(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, fact)
}

/// The error for a valid structure that is not supported.
pub(super) fn unsupported(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, fact)
}
