//! A simulated machine: files in memory whose every change is recorded on a tape, calls that fail on request,
//! and every state in which a crash could have left those files.
//!
//! The base of the writer's tests. A [`Guest`] writes through a real `Writer` and records the allowed content
//! of each sector; [`crash`] cuts the tape at every point and has a [`Judge`] check the result: chainfs'
//! checker, its read path, its writer, and QEMU for some of them.
//!
//! `CHAINFS_SEED` replays random choices, `CHAINFS_LONG=1` takes the time for all of them.

pub mod action;
pub mod change;
pub mod crash;
pub mod disk;
pub mod guest;
pub mod history;
pub mod images;
pub mod judge;
pub mod ledger;
pub mod pages;
pub mod value;

pub use crate::fuzz::random::Random;
pub use crash::{Tally, Workload};
pub use disk::{Failure, Fault, Machine, SimDisk, SyncRule};
pub use guest::Guest;
pub use images::{Backing, IMAGE, Start, StartImage};
pub use judge::Judge;
pub use pages::Pages;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const SECTOR: u64 = 512;

/// A number from the environment.
pub fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

/// Whether to take the time for everything.
pub fn is_long() -> bool {
    from_environment("CHAINFS_LONG").is_some_and(|value| value != 0)
}

/// The kinds that a test tries: all of them where time is taken, else every other one, from the number
/// `first` on. Tests that begin differently try each kind between them.
pub fn in_turn<T>(kinds: impl IntoIterator<Item = T>, first: usize) -> impl Iterator<Item = T> {
    kinds.into_iter().skip(if is_long() { 0 } else { first }).step_by(if is_long() { 1 } else { 2 })
}

/// Where random choices start.
pub fn seed() -> u64 {
    from_environment("CHAINFS_SEED").unwrap_or(0x5eed)
}

/// Spreads the bits of a number over all 64.
pub fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
