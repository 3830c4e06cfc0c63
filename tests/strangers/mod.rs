//! A store that many hands change: commands, guests, other programs and accidents, beside a model of what each file
//! has to show.

mod checks;
mod commands;
pub(crate) mod damage;
pub(crate) mod host;
mod kills;
mod others;
pub(crate) mod reader;
mod store;
pub(crate) mod world;
