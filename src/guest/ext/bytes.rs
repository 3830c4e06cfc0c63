//! A number in two halves.

/// Joins the two halves of a number that grew.
pub(super) fn join(low: u32, high: impl Into<u64>) -> u64 {
    u64::from(low) | high.into() << 32
}
