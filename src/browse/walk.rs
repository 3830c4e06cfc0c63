//! A volume's tree of files, walked without a kernel mount.
//!
//! Promises: every walk ends, for any guest data. Links are followed a bounded number of times, a directory
//! has a bounded number of entries, and [`VisitedDirectories`] recognises directories that were visited
//! before. Names are bytes.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::{ExtendedAttribute, FileAttributes, FileKind, Ino, TreeId};
use crate::store::shown;

use super::{DiskContents, DiskLease, FoundEntry, ListedEntry};

/// Symbolic links that one path may follow at most; Linux' limit.
const LINKS: usize = 40;
/// Entries of one directory at most.
const ENTRIES: usize = 1 << 22;
/// Nesting of directories at most.
pub const DEPTH: usize = 512;

/// The files of one tree of a volume. Its disks are leased until it is dropped.
#[derive(Debug)]
pub struct GuestTree {
    pub(super) contents: Arc<DiskContents>,
    pub(super) tree: TreeId,
    root: GuestEntry,
    _lease: DiskLease,
}

/// An entry of a tree.
#[derive(Clone, Copy, Debug)]
pub struct GuestEntry {
    /// Its inode number.
    pub ino: Ino,
    /// Its stat(2) attributes.
    pub attributes: FileAttributes,
    /// Whether it is the root of a subvolume. Links in it do not lead above it.
    pub is_root: bool,
}

/// An entry of a directory.
#[derive(Clone, Debug)]
pub struct NamedEntry {
    /// Its name: not empty, without `/` and NUL, never `.` or `..`.
    pub name: Vec<u8>,
    /// The entry, or the error of reading it.
    pub entry: Result<GuestEntry>,
}

/// The meaning of a path whose last name is a symbolic link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinalSymlink {
    /// The link's target.
    Followed,
    /// The link itself.
    Itself,
}

/// The visited directories: a damaged one may contain itself, or appear many times.
#[derive(Debug, Default)]
pub struct VisitedDirectories(HashSet<Ino>);

impl VisitedDirectories {
    /// Records that a directory is entered; an error if it must not be.
    pub fn enter(&mut self, directory: Ino, depth: usize) -> Result<()> {
        if !self.0.insert(directory) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "this directory was already visited at another path; it is skipped",
            ));
        }
        if depth >= DEPTH {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("directories are nested more than {DEPTH} deep"),
            ));
        }
        Ok(())
    }
}

impl GuestTree {
    /// The files of a tree.
    pub fn open(contents: &Arc<DiskContents>, tree: TreeId) -> Result<Self> {
        let lease = contents.lease()?;
        let ino = contents.mount(tree)?.root;
        let root = GuestEntry { ino, attributes: contents.attributes(tree, ino)?, is_root: true };
        Ok(Self { contents: Arc::clone(contents), tree, root, _lease: lease })
    }

    /// The root directory.
    pub fn root(&self) -> GuestEntry {
        self.root
    }

    /// Resolves a path from the root by the guest's own rules: absolute links, and `..` in links, stay in
    /// their subvolume. `..` of `path` itself stays in the tree.
    pub fn resolve(&self, path: &[u8], last: FinalSymlink) -> Result<GuestEntry> {
        let mut left: Vec<PathName> = Vec::new();
        push_names(&mut left, path, false);
        if path.ends_with(b"/") {
            // A path with a trailing slash is a directory, through a link or not.
            left.insert(0, PathName { name: b".".to_vec(), of_link: false });
        }
        let mut parents = vec![self.root];
        let mut link_count = 0;
        while let Some(PathName { name, of_link }) = left.pop() {
            let here = parents[parents.len() - 1];
            if here.attributes.kind != FileKind::Directory {
                return Err(Error::new(ErrorKind::NotFound, "a part of the path is not a directory"));
            }
            match name.as_slice() {
                b"." => continue,
                b".." => {
                    if parents.len() > 1 && !(of_link && here.is_root) {
                        parents.pop();
                    }
                    continue;
                }
                _ => {}
            }
            let found = self.contents.lookup(self.tree, here.ino, &name)?;
            let FoundEntry { ino, attributes, crossing } = found.ok_or_else(|| {
                let name = shown(Path::new(OsStr::from_bytes(&name)));
                Error::new(ErrorKind::NotFound, format!("there is no {name}"))
            })?;
            if attributes.kind == FileKind::Symlink && (last == FinalSymlink::Followed || !left.is_empty()) {
                link_count += 1;
                if link_count > LINKS {
                    return Err(Error::new(ErrorKind::NotFound, "the path follows too many symbolic links"));
                }
                let target = self.contents.read_link(self.tree, ino)?;
                if target.starts_with(b"/") {
                    let root = parents.iter().rposition(|entry| entry.is_root).unwrap_or(0);
                    parents.truncate(root + 1);
                }
                push_names(&mut left, &target, true);
                continue;
            }
            parents.push(GuestEntry { ino, attributes, is_root: crossing.is_some() });
        }
        Ok(parents[parents.len() - 1])
    }

    /// All entries of a directory, sorted by name, and the error that ended the listing, if any.
    pub fn entries(&self, directory: Ino) -> (Vec<NamedEntry>, Option<Error>) {
        let mut all = Vec::new();
        let trouble = self.list(directory, &mut all).err();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        // A damaged directory may have a name several times; one entry is kept.
        all.dedup_by(|a, b| a.name == b.name);
        (all, trouble)
    }

    fn list(&self, directory: Ino, all: &mut Vec<NamedEntry>) -> Result<()> {
        let mut from = 0;
        loop {
            let listing = self.contents.list(self.tree, directory, from)?;
            let Some(last) = listing.entries.last() else {
                let fact = "a directory's listing has no end";
                return if listing.ends { Ok(()) } else { Err(Error::new(ErrorKind::Corrupt, fact)) };
            };
            from = last.entry.next;
            for ListedEntry { entry: found, attributes, crossing, .. } in listing.entries {
                let attributes = match attributes {
                    Some(attributes) => Ok(attributes),
                    None => self.contents.attributes(self.tree, found.ino),
                };
                let (ino, is_root) = (found.ino, crossing.is_some());
                let entry = attributes.map(|attributes| GuestEntry { ino, attributes, is_root });
                all.push(NamedEntry { name: found.name, entry });
            }
            if listing.ends {
                return Ok(());
            }
            if all.len() > ENTRIES {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("a directory has more than {ENTRIES} entries"),
                ));
            }
        }
    }

    /// The target of a symbolic link, as the guest has it.
    pub fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        self.contents.read_link(self.tree, ino)
    }

    /// All extended attributes.
    pub fn extended_attributes(&self, ino: Ino) -> Result<Vec<ExtendedAttribute>> {
        self.contents.extended_attributes(self.tree, ino)
    }
}

/// A name that is still to be resolved.
#[derive(Debug, PartialEq, Eq)]
struct PathName {
    name: Vec<u8>,
    /// Whether it is of a link's target.
    of_link: bool,
}

/// Puts a path's names before the remaining ones; the last of the list is the next.
fn push_names(left: &mut Vec<PathName>, path: &[u8], of_link: bool) {
    let names = path.split(|byte| *byte == b'/').rev().filter(|name| !name.is_empty());
    left.extend(names.map(|name| PathName { name: name.to_vec(), of_link }));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_path_come_first_to_last() {
        let mut left = Vec::new();
        push_names(&mut left, b"rest", false);
        push_names(&mut left, b"//a/../b/", true);
        let mut order = Vec::new();
        while let Some(PathName { name, of_link }) = left.pop() {
            order.push((String::from_utf8(name).unwrap(), of_link));
        }
        let expected = [("a", true), ("..", true), ("b", true), ("rest", false)];
        assert_eq!(order, expected.map(|(name, of_link)| (name.to_owned(), of_link)));
    }

    #[test]
    fn directories_are_entered_once_and_up_to_a_depth() {
        let mut visited = VisitedDirectories::default();
        visited.enter(Ino(2), 0).unwrap();
        assert_eq!(visited.enter(Ino(2), 1).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(visited.enter(Ino(3), DEPTH).unwrap_err().kind(), ErrorKind::Limit);
    }
}
