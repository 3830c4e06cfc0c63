//! The common parts of all test binaries: a store in a temporary directory, a mount that never outlives its
//! test, QEMU's tools as the reference for every byte, and the means to damage an image.
//!
//! Nothing here is skipped silently: a tool that is missing or fails makes the test fail with that tool's own
//! words.

#![allow(missing_docs, reason = "only the tests call these")]
#![allow(
    clippy::len_without_is_empty,
    clippy::new_without_default,
    clippy::return_self_not_must_use,
    clippy::should_implement_trait,
    reason = "this is no library for others"
)]

pub mod active;
pub mod alone;
pub mod binary;
pub mod block_guest;
pub mod bytes;
pub mod chains;
pub mod command;
pub mod compare;
pub mod cpio;
pub mod crash;
pub mod damage;
pub mod examples;
pub mod foreign;
pub mod fuzz;
pub mod host;
pub mod intents;
pub mod jobs;
pub mod lab;
pub mod mount;
pub mod oracle;
pub mod rng;
pub mod seeds;
pub mod sim;
pub mod store;
pub mod tape;
pub mod tools;
pub mod transport;
pub mod victims;
pub mod web;

pub use alone::is_alone;
pub use binary::{chainfs_binary, project};
pub use bytes::first_difference;
pub use chains::{Growth, deep_chain, small_chain};
pub use compare::{View, assert_chain, assert_same, views_of};
pub use damage::Damage;
pub use mount::Mount;
pub use rng::Rng;
pub use store::Store;
pub use tools::{Outcome, eventually, hang, tool};

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
