//! The versions of one file in many disks: the disks grouped by equal content.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::guest::{FileAttributes, TreeId};

use super::DiskContents;
use super::difference::{Counted, differing};
use super::walk::{FinalSymlink, GuestEntry, GuestTree};

/// What a disk has at a path.
#[derive(Debug)]
pub enum PathState {
    /// An entry.
    There(Box<(GuestTree, GuestEntry)>),
    /// No entry, or not even the volume.
    Absent,
    /// It cannot be read.
    Unreadable(Error),
}

/// A version, and the disks that have it.
#[derive(Debug)]
pub struct PathVersion {
    /// Its attributes; `None` if the file is absent.
    pub state: Option<Result<FileAttributes>>,
    /// The target, of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// Indices of the disks, in their order.
    pub disks: Vec<usize>,
}

/// What a disk has at `path` of a tree; a symbolic link in the last place is not followed.
pub fn find(contents: &Arc<DiskContents>, tree: TreeId, path: &[u8]) -> PathState {
    let found = GuestTree::open(contents, tree).and_then(|tree| {
        let entry = tree.resolve(path, FinalSymlink::Itself)?;
        Ok((tree, entry))
    });
    match found {
        Ok(found) => PathState::There(Box::new(found)),
        Err(error) if error.kind() == crate::error::ErrorKind::NotFound => PathState::Absent,
        Err(error) => PathState::Unreadable(error),
    }
}

/// The versions of one path in several disks, in the order of their first appearance.
pub fn versions(found: &[PathState]) -> Vec<PathVersion> {
    // The first disk of each version represents it.
    let mut all: Vec<(usize, PathVersion)> = Vec::new();
    for (index, one) in found.iter().enumerate() {
        // Most often a version equals that of the next lower layer.
        match all.iter_mut().rev().find(|(first, version)| is_same(&found[*first], one, version)) {
            Some((_, version)) => version.disks.push(index),
            None => all.push((index, version(one, index))),
        }
    }
    all.into_iter().map(|(_, version)| version).collect()
}

fn is_same(a: &PathState, b: &PathState, version: &PathVersion) -> bool {
    match (a, b) {
        (PathState::Absent, PathState::Absent) => true,
        (PathState::There(one), PathState::There(other)) => {
            let ((tree, entry), (other_tree, other)) = (&**one, &**other);
            let counted = Counted { directory_times: true, changed: false };
            let is_good = matches!(version.state, Some(Ok(_)));
            is_good
                && differing((tree, entry), (other_tree, other), counted).is_ok_and(|what| what.is_empty())
        }
        _ => false,
    }
}

fn version(found: &PathState, index: usize) -> PathVersion {
    let (state, target) = match found {
        PathState::Absent => (None, None),
        PathState::Unreadable(error) => (Some(Err(error.clone())), None),
        PathState::There(there) => {
            let (tree, GuestEntry { ino, attributes, .. }) = &**there;
            let is_link = attributes.kind == crate::guest::FileKind::Symlink;
            match is_link.then(|| tree.read_link(*ino)).transpose() {
                Ok(target) => (Some(Ok(*attributes)), target),
                Err(error) => (Some(Err(error)), None),
            }
        }
    };
    PathVersion { state, target, disks: vec![index] }
}
