//! What `chainfs find` finds: a line for each version of a file, and JSON.

use jiff::tz::TimeZone;
use serde::Serialize;

use crate::guest::FileAttributes;

use super::files::{AttributesObject, time};
use super::safe::{terminal_bytes, text};

/// A version of a file in a chain.
#[derive(Debug)]
pub struct FoundFile<'a> {
    /// The chain.
    pub chain: &'a [u8],
    /// The views that have it, oldest first; not empty.
    pub views: &'a [Vec<u8>],
    /// `/VOLUME/PATH`.
    pub path: &'a [u8],
    /// Its attributes.
    pub attributes: &'a FileAttributes,
    /// What the other commands call the file, in the last view that has it.
    pub address: &'a [u8],
}

/// `web01  base..monday  /p1/etc/fstab  412  2026-03-02 09:12:00`.
pub fn line(found: &FoundFile<'_>, zone: &TimeZone) -> String {
    let views = match found.views {
        [only] => terminal_bytes(only),
        [first, .., last] => format!("{}..{}", terminal_bytes(first), terminal_bytes(last)),
        [] => String::new(),
    };
    let (chain, path) = (terminal_bytes(found.chain), terminal_bytes(found.path));
    let FileAttributes { size, modified, .. } = *found.attributes;
    format!("{chain}  {views}  {path}  {size}  {}\n", time(modified, zone))
}

/// The same as JSON.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct FoundObject {
    chain: String,
    views: Vec<String>,
    path: String,
    address: String,
    #[serde(flatten)]
    attributes: AttributesObject,
}

impl FoundObject {
    /// From a version.
    pub fn of(found: &FoundFile<'_>) -> Self {
        Self {
            chain: text(found.chain),
            views: found.views.iter().map(|view| text(view)).collect(),
            path: text(found.path),
            address: text(found.address),
            attributes: AttributesObject::of(found.attributes),
        }
    }
}
