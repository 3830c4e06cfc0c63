//! FAT12, FAT16 and FAT32.
//!
//! [`Volume`] is what the boot sector says: sizes, and where the tables, the root directory and the clusters lie.

mod volume;

pub use volume::{Kind, Volume};
