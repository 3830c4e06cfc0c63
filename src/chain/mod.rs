//! Chains: layers from a top down to a base, seen as one disk.
//!
//! A [`View`] is an immutable list of layers, and stays valid when the store changes. This module knows no
//! names and no directories.

mod backing;
mod extent;
mod flat;
mod layout;
mod origin;
mod view;

pub use extent::Extent;
pub use flat::{FlatCache, FlatMap};
pub use layout::{Piece, Place, is_at};
pub use origin::Origin;
pub use view::{MapRun, View};

/// Maximum number of layers of a chain; a longer one is refused as broken.
pub const MAX_DEPTH: usize = 1024;
