//! Commands that look into guests' disks without a mount: `ls`, `cat`, `cp`, `diff` and `versions`.
//!
//! Promise: images are only read, and what guests have written is parsed in other processes.

pub(super) mod cat;
pub(super) mod copy;
pub(super) mod diff;
mod images;
pub(super) mod ls;
mod operands;
mod out;
pub(super) mod versions;
mod view_ref;

use std::ffi::OsStr;

use super::warn;
use crate::browse::walk::GuestTree;
use crate::error::{Error, Result};
use crate::report::safe::terminal_bytes;

use images::OpenStores;
use operands::DiskPath;

/// What a user's word says, with the files that it means.
struct OpenedPath {
    tree: GuestTree,
    /// The path within the volume.
    path: Vec<u8>,
    /// Files of several hard links are told apart by the disk they are on, too.
    volume: (crate::store::ViewId, usize),
}

/// The volume that a word names, and the path in it. A word that names none is `Err` of its own.
fn open(images: &mut OpenStores, word: &OsStr) -> Result<OpenedPath> {
    let place = operands::parse(word)?;
    let disk = images.disk(&place)?;
    let Some(DiskPath { volume, path }) = &place.inner else {
        return Err(operands::no_volume(word));
    };
    let inside = disk.inside()?;
    let index = operands::volume(&inside, volume)?;
    Ok(OpenedPath { tree: GuestTree::open(&inside, index)?, path: path.clone(), volume: (inside.id().clone(), index) })
}

/// An error, with the place that it is about in front.
fn about(word: &OsStr, error: Error) -> Error {
    error.within(shown(word))
}

/// A word as part of a sentence.
fn shown(word: &OsStr) -> String {
    use std::os::unix::ffi::OsStrExt;
    terminal_bytes(word.as_bytes())
}

/// Says what went wrong with one of several things; the others go on.
fn complain(failed: &mut bool, error: &Error) {
    *failed = true;
    warn(&error.to_string());
}
