//! qcow2 as bytes and values: headers, tables and compressed clusters.
//!
//! Pure: bytes come in; a validated value or a [`Malformed`] with the exact reason comes out. Nothing here
//! reads a file, and nothing allocates more than its input or the specification's limits justify. Names are
//! those of the qcow2 specification.

pub mod bitmap;
mod bytes;
pub mod compressed;
pub mod entry;
pub mod extension;
pub mod feature;
pub mod foreign;
pub mod frozen;
pub mod header;
pub mod header_edit;
pub mod malformed;
mod parts;
pub mod refcount;
pub mod snapshot;
pub mod subcluster;

#[cfg(test)]
mod testing;

pub use entry::{Allocation, Compressed, EntryFormat, L1Entry, L2Entry, Mapping, RawL2Entry};
pub use frozen::Frozen;
pub use header::{Header, L1Table, Version};
pub use malformed::Malformed;
pub use parts::Compression;
pub use snapshot::{Snapshot, SnapshotParser};
pub use subcluster::SubclusterEntry;
