//! chainfs: every backing chain of a store of disk images, read through one mount.
//!
//! The engine is usable without FUSE. Layers, each knowing only those to its right:
//! `cli -> fs -> report -> { ops, browse } -> store -> chain -> image -> { format, io, guest }`, with
//! [`error`], [`units`] and [`cache`] below all; docs/ARCHITECTURE.md says what each may know.

pub mod browse;
pub mod cache;
pub mod chain;
pub mod cli;
pub mod codec;
pub mod error;
pub mod format;
pub mod fs;
pub mod guest;
pub mod image;
pub mod io;
pub mod ops;
pub mod report;
pub mod store;
pub mod units;
