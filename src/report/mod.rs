//! What a store looks like to people and to programs: plain values in, text out.
//!
//! Nothing here reads a file or asks the system anything; whoever knows the store fills in the
//! models ([`tree`], [`info`], [`map`], [`metrics`]) and chooses a rendering. Names come from images
//! and from directories, so every rendering treats them as hostile (see [`safe`]).

pub mod dot;
pub mod info;
pub mod json;
mod layout;
pub mod map;
pub mod metrics;
pub mod safe;
pub mod size;
pub mod svg;
pub mod text;
pub mod time;
pub mod tree;
