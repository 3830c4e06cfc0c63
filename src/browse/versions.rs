//! The versions of one file in many disks: the disks grouped by equal content, or the changes from one disk
//! to the next.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::guest::{FileAttributes, TreeId};

use super::DiskContents;
use super::difference::{Aspect, Counted, differing};
use super::walk::{FinalSymlink, GuestEntry, GuestTree};

/// The differences that make two versions of a file.
pub(super) const SAME_VERSION: Counted = Counted { directory_times: true, changed: false };

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
    let is_good = !matches!(version.state, Some(Err(_)));
    is_good && matches!(change(a, b), Ok(None))
}

/// A change of a path from one disk to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathChange {
    /// It is there, and was not.
    Added,
    /// It is not there, and was.
    Removed,
    /// It is another version; in the order of [`Aspect`], not empty.
    Changed(Vec<Aspect>),
    /// One of them, or the bytes of one, cannot be read.
    Unknown,
}

/// A change, and the disks that have what it led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathRun {
    /// From the disk before to the first of these.
    pub change: PathChange,
    /// Indices of the disks.
    pub disks: Range<usize>,
}

/// The changes of one path along disks that are given oldest first. Disks before the first that has it are in
/// no run.
pub fn runs(found: &[PathState]) -> Vec<PathRun> {
    let mut all: Vec<PathRun> = Vec::new();
    for (index, one) in found.iter().enumerate() {
        let before = index.checked_sub(1).map_or(&PathState::Absent, |before| &found[before]);
        match change(before, one).unwrap_or(Some(PathChange::Unknown)) {
            Some(change) => all.push(PathRun { change, disks: index..index + 1 }),
            None => {
                if let Some(last) = all.last_mut() {
                    last.disks.end = index + 1;
                }
            }
        }
    }
    all
}

/// What changes a path from the state in one disk to that in another, if anything.
fn change(a: &PathState, b: &PathState) -> Result<Option<PathChange>> {
    match (a, b) {
        (PathState::Absent, PathState::Absent) => Ok(None),
        (PathState::Absent, PathState::There(_)) => Ok(Some(PathChange::Added)),
        (PathState::There(_), PathState::Absent) => Ok(Some(PathChange::Removed)),
        (PathState::There(one), PathState::There(other)) => {
            let ((tree, entry), (other_tree, other)) = (&**one, &**other);
            let what =
                differing((tree, entry), (other_tree, other), SAME_VERSION).map_err(|(_, error)| error)?;
            Ok((!what.is_empty()).then_some(PathChange::Changed(what)))
        }
        (PathState::Unreadable(_), _) | (_, PathState::Unreadable(_)) => Ok(Some(PathChange::Unknown)),
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
