//! What a store looks like to people and to programs: plain values in, text out.
//!
//! The models ([`tree`], [`info`], [`map`], [`metrics`]) and their renderings read no file and ask the
//! system nothing; [`store`] fills them in. Names come from images and from directories, so every
//! rendering treats them as hostile (see [`safe`]).

pub mod difference;
pub mod dot;
pub mod files;
pub mod info;
pub mod json;
mod layout;
pub mod map;
pub mod metrics;
pub mod os;
pub mod plan;
pub mod plan_tree;
pub mod safe;
pub mod status;
pub mod store;
pub mod svg;
pub mod text;
pub mod time;
pub mod trash;
pub mod tree;
pub mod versions;
pub mod volumes;
