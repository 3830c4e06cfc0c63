//! Renders a store for people and programs: plain values in, text out.
//!
//! The models ([`tree`], [`info`], [`map`], [`metrics`]) and their renderings read no files and call no
//! system functions; [`store`] builds the models. Names come from images and directories, so every rendering
//! treats them as hostile (see [`safe`]).

pub mod difference;
pub mod dot;
pub mod files;
pub mod find;
pub mod html;
pub mod info;
pub mod json;
mod layout;
pub mod log;
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
pub mod unified;
pub mod versions;
pub mod volumes;
pub mod who;
