//! The versions of one file in many disks: which of them hold the same.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::guest::Attributes;

use super::Inside;
use super::difference::{Counted, differing};
use super::walk::{Entry, Last, Tree};

/// What a disk has at a path.
#[derive(Debug)]
pub enum Found {
    /// Something.
    There(Box<(Tree, Entry)>),
    /// Nothing, or not even the volume.
    Absent,
    /// That cannot be told.
    Unreadable(Error),
}

/// A version, and which of the disks have it.
#[derive(Debug)]
pub struct Version {
    /// What it is; `None` if there is nothing.
    pub state: Option<Result<Attributes>>,
    /// The target, of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// Indices of the disks, in their order.
    pub disks: Vec<usize>,
}

/// What `inside` has at `path` of a volume; the path's last name may be a link's, and means it.
pub fn find(inside: &Arc<Inside>, volume: Option<usize>, path: &[u8]) -> Found {
    let Some(volume) = volume else { return Found::Absent };
    let found = Tree::open(inside, volume).and_then(|tree| {
        let entry = tree.resolve(path, Last::Itself)?;
        Ok((tree, entry))
    });
    match found {
        Ok(found) => Found::There(Box::new(found)),
        Err(error) if error.kind() == crate::error::ErrorKind::NotFound => Found::Absent,
        Err(error) => Found::Unreadable(error),
    }
}

/// The versions of what was found in several disks, in the order in which they are first met.
pub fn versions(found: &[Found]) -> Vec<Version> {
    // The first disk of each version stands for it.
    let mut all: Vec<(usize, Version)> = Vec::new();
    for (index, one) in found.iter().enumerate() {
        // Most often it is what the disk below has.
        match all.iter_mut().rev().find(|(first, version)| is_same(&found[*first], one, version)) {
            Some((_, version)) => version.disks.push(index),
            None => all.push((index, version(one, index))),
        }
    }
    all.into_iter().map(|(_, version)| version).collect()
}

fn is_same(a: &Found, b: &Found, version: &Version) -> bool {
    match (a, b) {
        (Found::Absent, Found::Absent) => true,
        (Found::There(one), Found::There(other)) => {
            let ((tree, entry), (other_tree, other)) = (&**one, &**other);
            let counted = Counted { directory_times: true, changed: false };
            let is_good = matches!(version.state, Some(Ok(_)));
            is_good && differing((tree, entry), (other_tree, other), counted).is_ok_and(|what| what.is_empty())
        }
        _ => false,
    }
}

fn version(found: &Found, index: usize) -> Version {
    let (state, target) = match found {
        Found::Absent => (None, None),
        Found::Unreadable(error) => (Some(Err(error.clone())), None),
        Found::There(there) => {
            let (tree, Entry { ino, attributes }) = &**there;
            let is_link = attributes.kind == crate::guest::FileKind::Symlink;
            match is_link.then(|| tree.read_link(*ino)).transpose() {
                Ok(target) => (Some(Ok(*attributes)), target),
                Err(error) => (Some(Err(error)), None),
            }
        }
    };
    Version { state, target, disks: vec![index] }
}
