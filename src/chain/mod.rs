//! Chains: layers from a top down to a base, seen as one disk.
//!
//! A [`View`] is an immutable list of layers; it stays valid whatever the store looks like by now.
//! This layer knows no names and no directories.

mod backing;
mod extent;
mod flat;
mod origin;
mod view;

pub use extent::Extent;
pub use flat::{FlatCache, FlatMap};
pub use origin::Origin;
pub use view::{MapRun, View};

/// Layers of a chain, at most: more is refused as broken.
pub const MAX_DEPTH: usize = 1024;
