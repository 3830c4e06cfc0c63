//! A store of several owners, and the kernel as the judge of what they do to it.

pub(crate) mod after;
pub(crate) mod checks;
pub(crate) mod commands;
pub(crate) mod hands;
#[path = "../strangers/host.rs"]
pub(crate) mod host;
pub(crate) mod image;
pub(crate) mod people;
pub(crate) mod seen;
pub(crate) mod through;
pub(crate) mod world;
