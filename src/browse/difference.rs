//! The differences between the files of two volumes.
//!
//! Promises:
//! - Entries come in the order of their paths.
//! - An unreadable entry is a finding, and the comparison continues.
//! - Bytes that are known to be the same are not read (see [`content`](super::content)).
//! - Access times never count.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::{FileAttributes, FileKind};

use super::DiskContents;
use super::content::{Compared, OpenContent, same_bytes, same_origins, same_volumes};
use super::walk::{GuestEntry, GuestTree, NamedEntry, VisitedDirectories};

pub use super::content::Side;

/// One kind of difference between two entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Aspect {
    /// Their kinds, such as a file and a directory.
    Kind,
    /// The bytes of a file.
    Content,
    /// The number of bytes.
    Size,
    /// The target of a symbolic link.
    Target,
    /// The numbers of a device.
    Device,
    /// The permission bits.
    Mode,
    /// Owner or group.
    Owner,
    /// The time of the content's last change.
    Modified,
    /// Extended attributes, access control lists among them.
    Attributes,
    /// The time of the inode's last change.
    Changed,
}

impl Aspect {
    /// The name in one word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Kind => "type",
            Self::Content => "content",
            Self::Size => "size",
            Self::Target => "target",
            Self::Device => "device",
            Self::Mode => "mode",
            Self::Owner => "owner",
            Self::Modified => "time",
            Self::Attributes => "xattrs",
            Self::Changed => "ctime",
        }
    }
}

/// Which differences count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counted {
    /// Times of directories, which change with their entries.
    pub directory_times: bool,
    /// The times of inodes' last changes.
    pub changed: bool,
}

/// The difference at a path.
#[derive(Clone, Debug)]
pub enum PathDifference {
    /// Only the second has it.
    Added(FileAttributes),
    /// Only the first has it.
    Removed(FileAttributes),
    /// Both have it.
    Changed {
        /// In the first.
        before: FileAttributes,
        /// In the second.
        after: FileAttributes,
        /// In the order of [`Aspect`]; not empty.
        what: Vec<Aspect>,
    },
    /// A subvolume with everything in it that only one of them has, such as a new snapshot.
    Subvolume(Side, FileAttributes),
    /// A volume's bytes differ, and its files are not known.
    Bytes,
    /// It cannot be read.
    Unreadable(Side, crate::error::Error),
}

/// Receives each difference with its path, which begins with `/`, or is empty for the root of the comparison.
pub type DifferenceVisitor<'a> = dyn FnMut(&[u8], PathDifference) -> Result<()> + 'a;

/// Whether a whole volume is known to be the same in both, without reading.
pub fn is_surely_same(a: (&Arc<DiskContents>, usize), b: (&Arc<DiskContents>, usize)) -> bool {
    let held = (a.0.lease(), b.0.lease());
    held.0.is_ok() && held.1.is_ok() && same_origins((a.0, a.1), (b.0, b.1))
}

/// Whether two volumes without readable files are the same, byte for byte.
pub fn is_same_raw(a: (&Arc<DiskContents>, usize), b: (&Arc<DiskContents>, usize)) -> Compared<bool> {
    let _held =
        (a.0.lease().map_err(|error| (Side::A, error))?, b.0.lease().map_err(|error| (Side::B, error))?);
    same_volumes((a.0, a.1), (b.0, b.1))
}

/// The differences of two entries, without the entries in them if they are directories.
pub fn differing(
    a: (&GuestTree, &GuestEntry),
    b: (&GuestTree, &GuestEntry),
    counted: Counted,
) -> Compared<Vec<Aspect>> {
    let (was, is) = (&a.1.attributes, &b.1.attributes);
    if was.kind != is.kind {
        return Ok(vec![Aspect::Kind]);
    }
    let on = |side| move |error| (side, error);
    let is_directory = was.kind == FileKind::Directory;
    let mut what = Vec::new();
    let mut note = |differs: bool, aspect| {
        if differs {
            what.push(aspect);
        }
    };
    match was.kind {
        FileKind::File => {
            let differs = was.size != is.size
                || !same_bytes(&mut OpenContent::new(a.0, a.1), &mut OpenContent::new(b.0, b.1))?;
            note(differs, Aspect::Content);
            note(was.size != is.size, Aspect::Size);
        }
        FileKind::Symlink => {
            let target = |(tree, entry): (&GuestTree, &GuestEntry)| tree.read_link(entry.ino);
            note(target(a).map_err(on(Side::A))? != target(b).map_err(on(Side::B))?, Aspect::Target);
        }
        FileKind::CharDevice | FileKind::BlockDevice => note(was.device != is.device, Aspect::Device),
        FileKind::Directory | FileKind::Fifo | FileKind::Socket => {}
    }
    note(was.mode != is.mode, Aspect::Mode);
    note((was.uid, was.gid) != (is.uid, is.gid), Aspect::Owner);
    note(was.modified != is.modified && (!is_directory || counted.directory_times), Aspect::Modified);
    // An inode with the same change time has the same attributes, unless its file system counts whole
    // seconds: then it may have changed twice in one.
    let is_same_inode = a.1.ino == b.1.ino && was.changed == is.changed && was.changed.nanoseconds != 0;
    if !is_same_inode {
        let all = |(tree, entry): (&GuestTree, &GuestEntry)| {
            let mut all = tree.extended_attributes(entry.ino)?;
            all.sort();
            Ok(all)
        };
        note(all(a).map_err(on(Side::A))? != all(b).map_err(on(Side::B))?, Aspect::Attributes);
    }
    note(was.changed != is.changed && counted.changed, Aspect::Changed);
    Ok(what)
}

/// Compares two entries, one of which may be absent, and everything in them.
pub fn compare(
    a: (&GuestTree, Option<GuestEntry>),
    b: (&GuestTree, Option<GuestEntry>),
    counted: Counted,
    each: &mut DifferenceVisitor<'_>,
) -> Result<()> {
    let mut walk = DifferenceWalk {
        a: a.0,
        b: b.0,
        counted,
        visited: Default::default(),
        frames: Vec::new(),
        path: Vec::new(),
    };
    walk.pair(a.1.map(Ok), b.1.map(Ok), each)?;
    loop {
        let depth = walk.frames.len();
        let Some(frame) = walk.frames.last_mut() else { return Ok(()) };
        let Some((name, of_a, of_b)) = frame.next() else {
            walk.frames.pop();
            continue;
        };
        walk.path.truncate(depth - 1);
        walk.path.push(name);
        walk.pair(of_a, of_b, each)?;
    }
}

/// The entries of two directories with the same name.
type EntryPair = (Vec<u8>, Option<Result<GuestEntry>>, Option<Result<GuestEntry>>);

struct DifferenceWalk<'a> {
    a: &'a GuestTree,
    b: &'a GuestTree,
    counted: Counted,
    visited: [VisitedDirectories; 2],
    /// The pairs still to be compared of each directory on the path.
    frames: Vec<std::vec::IntoIter<EntryPair>>,
    path: Vec<Vec<u8>>,
}

impl DifferenceWalk<'_> {
    fn here(&self) -> Vec<u8> {
        self.path.iter().flat_map(|name| [b"/", name.as_slice()].concat()).collect()
    }

    fn pair(
        &mut self,
        a: Option<Result<GuestEntry>>,
        b: Option<Result<GuestEntry>>,
        each: &mut DifferenceVisitor<'_>,
    ) -> Result<()> {
        let path = self.here();
        let mut take = |side, found: Option<Result<GuestEntry>>| match found {
            Some(Err(error)) => each(&path, PathDifference::Unreadable(side, error)).map(|()| None),
            Some(Ok(entry)) => Ok(Some(entry)),
            None => Ok(None),
        };
        let is_there = (a.is_some(), b.is_some());
        let is_within = !self.frames.is_empty();
        let (a, b) = (take(Side::A, a)?, take(Side::B, b)?);
        match (a, b) {
            (Some(a), Some(b)) => match differing((self.a, &a), (self.b, &b), self.counted) {
                Ok(what) if what.is_empty() => {}
                Ok(what) => {
                    each(&path, PathDifference::Changed { before: a.attributes, after: b.attributes, what })?;
                }
                Err((side, error)) => each(&path, PathDifference::Unreadable(side, error))?,
            },
            // A snapshot has as many files as its original. It is entered if it was asked for.
            (Some(a), None) if a.is_root && is_within && !is_there.1 => {
                return each(&path, PathDifference::Subvolume(Side::A, a.attributes));
            }
            (None, Some(b)) if b.is_root && is_within && !is_there.0 => {
                return each(&path, PathDifference::Subvolume(Side::B, b.attributes));
            }
            (Some(a), None) if !is_there.1 => each(&path, PathDifference::Removed(a.attributes))?,
            (None, Some(b)) if !is_there.0 => each(&path, PathDifference::Added(b.attributes))?,
            _ => return Ok(()),
        }
        let mut listed = [Vec::new(), Vec::new()];
        let mut is_whole = [true; 2];
        for (number, (side, tree, entry)) in
            [(Side::A, self.a, a), (Side::B, self.b, b)].into_iter().enumerate()
        {
            let Some(entry) = entry.filter(|entry| entry.attributes.kind == FileKind::Directory) else {
                continue;
            };
            if let Err(error) = self.visited[number].enter(entry.ino, self.frames.len()) {
                is_whole[number] = false;
                each(&path, PathDifference::Unreadable(side, error))?;
                continue;
            }
            let (entries, trouble) = tree.entries(entry.ino);
            if let Some(error) = trouble {
                is_whole[number] = false;
                each(&path, PathDifference::Unreadable(side, error))?;
            }
            listed[number] = entries;
        }
        let [of_a, of_b] = listed;
        let is_directory = |entry: Option<GuestEntry>| {
            entry.is_some_and(|entry| entry.attributes.kind == FileKind::Directory)
        };
        if is_directory(a) || is_directory(b) {
            let mut pairs = merged(of_a, of_b);
            // An entry of one side may be in the unlisted part of the other.
            pairs.retain(|(_, a, b)| (a.is_some() || is_whole[0]) && (b.is_some() || is_whole[1]));
            self.frames.push(pairs.into_iter());
        }
        Ok(())
    }
}

/// Merges two sorted lists.
fn merged(a: Vec<NamedEntry>, b: Vec<NamedEntry>) -> Vec<EntryPair> {
    let mut all = Vec::with_capacity(a.len().max(b.len()));
    let (mut a, mut b) = (a.into_iter().peekable(), b.into_iter().peekable());
    loop {
        let name = match (a.peek(), b.peek()) {
            (Some(a), Some(b)) => a.name.as_slice().min(&b.name).to_vec(),
            (Some(one), None) | (None, Some(one)) => one.name.clone(),
            (None, None) => return all,
        };
        let of_a = a.next_if(|found| found.name == name).map(|found| found.entry);
        let of_b = b.next_if(|found| found.name == name).map(|found| found.entry);
        all.push((name, of_a, of_b));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};

    #[test]
    fn sorted_lists_meet_at_equal_names() {
        let named = |name: &str| NamedEntry { name: name.into(), entry: Err(Error::new(ErrorKind::Io, "")) };
        let list = |names: &[&str]| names.iter().map(|name| named(name)).collect();
        let all = merged(list(&["a", "c", "d"]), list(&["b", "c", "e"]));
        let found: Vec<(&str, bool, bool)> = all
            .iter()
            .map(|(name, a, b)| (std::str::from_utf8(name).unwrap(), a.is_some(), b.is_some()))
            .collect();
        let expected = [
            ("a", true, false),
            ("b", false, true),
            ("c", true, true),
            ("d", true, false),
            ("e", false, true),
        ];
        assert_eq!(found, expected);
    }
}
