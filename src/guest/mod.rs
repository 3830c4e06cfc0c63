//! The content of guests' disks: partition tables, volumes, and file systems.
//!
//! Promises: everything here only reads, from a [`Source`]. For any bytes there is an answer or an
//! [`Error`](crate::error::Error), never a panic, an endless loop, or unbounded memory. Nothing here knows
//! images, names of a store, FUSE or processes: the callers decide where it runs.

pub mod btrfs;
mod bytes;
pub mod content;
pub mod ext;
pub mod fat;
pub mod filesystem;
pub mod inspect;
pub mod luks;
pub mod lvm;
mod md;
pub mod partition;
mod raid;
mod readers;
mod runs;
pub mod source;
pub mod volumes;
pub mod xfs;

pub use filesystem::{
    Crossing, DirectoryEntry, ExtendedAttribute, FileAttributes, FileKind, FileRun, FileSystem, Ino, RunKind,
    Statistics, Time, TreeId,
};
pub use readers::{OpenTrees, READERS, Reader, SourceSet, Subvolume, TOP_LEVEL_SUFFIX, open};
pub use source::{Slice, Source};
