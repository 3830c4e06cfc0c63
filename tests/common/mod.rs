//! What every test of the binary leans on: a store in a temporary directory, a mount that never
//! outlives its test, QEMU's tools as the judge of every byte, and the means to damage an image.
//!
//! Nothing here is skipped quietly: a tool that is missing or fails makes the test fail with that
//! tool's own words.

pub(crate) mod active;
pub(crate) mod block_guest;
pub(crate) mod chains;
pub(crate) mod command;
pub(crate) mod compare;
pub(crate) mod damage;
pub(crate) mod examples;
pub(crate) mod foreign;
pub(crate) mod intents;
pub(crate) mod jobs;
pub(crate) mod lab;
pub(crate) mod mount;
pub(crate) mod rng;
pub(crate) mod seeds;
pub(crate) mod store;
pub(crate) mod tools;
pub(crate) mod victims;

pub(crate) use chains::{Growth, deep_chain};
pub(crate) use compare::{View, assert_chain, assert_same, views_of};
pub(crate) use damage::Damage;
pub(crate) use mount::Mount;
pub(crate) use rng::Rng;
pub(crate) use store::Store;
pub(crate) use tools::{Outcome, eventually, tool};

/// The binary under test.
pub(crate) const CHAINFS: &str = env!("CARGO_BIN_EXE_chainfs");

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;
