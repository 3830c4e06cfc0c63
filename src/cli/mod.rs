//! The command line: what people type, before anything is done about it.

pub mod args;
pub mod config;
pub mod manual;
pub mod mount_options;
