//! A store that many hands change: commands, guests, other programs and accidents, beside a model of what each file
//! has to show.

pub(crate) mod damage;
pub(crate) mod host;
pub(crate) mod reader;
pub(crate) mod world;
