//! Commands that read guests' disks without a mount: `ls`, `cat`, `cp`, `diff`, `find`, `log`,
//! `try` and `versions`.
//!
//! Promise: images are only read, and guests' data is parsed in worker processes.

pub(super) mod cat;
pub(super) mod copy;
pub(super) mod diff;
pub(super) mod find;
mod images;
pub(super) mod log;
pub(super) mod ls;
mod machine;
mod operands;
mod out;
mod store_disk;
pub(super) mod trial;
pub(super) mod versions;

use std::ffi::OsStr;

use super::warn;
use crate::browse::walk::GuestTree;
use crate::error::{Error, Result};
use crate::guest::TreeId;
use operands::shown;

use images::OpenStores;
use operands::DiskPath;

/// An operand with its tree opened.
struct OpenedPath {
    tree: GuestTree,
    /// The path within the tree.
    path: Vec<u8>,
    /// The disk and the tree: part of the key for hard links.
    place: (crate::store::ViewId, TreeId),
}

/// Opens the volume that an operand names. An operand without a volume has its own error.
fn open(images: &mut OpenStores, word: &OsStr) -> Result<OpenedPath> {
    let place = operands::parse(word)?;
    let disk = images.disk(&place)?;
    let Some(DiskPath { volume, path }) = &place.inner else {
        return Err(operands::no_volume(word));
    };
    let inside = disk.contents()?;
    let tree = operands::tree(&inside, volume)?;
    Ok(OpenedPath {
        tree: GuestTree::open(&inside, tree)?,
        path: path.clone(),
        place: (inside.id().clone(), tree),
    })
}

/// An error, prefixed with the operand that it is about.
fn about(word: &OsStr, error: Error) -> Error {
    error.within(shown(word))
}

/// Prints the error of one of several operands; the command continues with the others.
fn complain(failed: &mut bool, error: &Error) {
    *failed = true;
    warn(&error.to_string());
}
