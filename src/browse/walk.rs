//! A volume's tree of files, for whoever walks it without a kernel.
//!
//! Promises: nothing here goes on for ever, whatever a guest has written: links are followed a bounded number of times, a
//! directory has a bounded number of entries, and [`VisitedDirectories`] tells which directories were met before. Names are bytes.

use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::{ExtendedAttribute, FileAttributes, FileKind, Ino};
use crate::store::shown;

use super::{DiskContents, DiskLease, ListedEntry};

/// Symbolic links that one path leads over, at most: as many as Linux follows.
const LINKS: usize = 40;
/// Entries of one directory, at most.
const ENTRIES: usize = 1 << 22;
/// Directories within each other, at most.
pub const DEPTH: usize = 512;

/// The files of one volume. Its disks are held while it lives.
#[derive(Debug)]
pub struct GuestTree {
    pub(super) inside: Arc<DiskContents>,
    pub(super) volume: usize,
    root: GuestEntry,
    _hold: DiskLease,
}

/// Something in a tree.
#[derive(Clone, Copy, Debug)]
pub struct GuestEntry {
    /// Its number.
    pub ino: Ino,
    /// What stat(2) says of it.
    pub attributes: FileAttributes,
}

/// Something in a directory.
#[derive(Clone, Debug)]
pub struct NamedEntry {
    /// Its name: not empty, without `/` and NUL, never `.` or `..`.
    pub name: Vec<u8>,
    /// What it names, or why that cannot be told.
    pub entry: Result<GuestEntry>,
}

/// What a path means whose last name is that of a symbolic link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinalSymlink {
    /// What it leads to.
    Followed,
    /// The link.
    Itself,
}

/// Directories that have been met: a damaged one may hold itself, or others the same one many times.
#[derive(Debug, Default)]
pub struct VisitedDirectories(HashSet<Ino>);

impl VisitedDirectories {
    /// Notes that a directory is entered; why it is not to be.
    pub fn enter(&mut self, directory: Ino, depth: usize) -> Result<()> {
        if !self.0.insert(directory) {
            return Err(Error::new(
                ErrorKind::Corrupt,
                "this directory is also somewhere else; it is not entered again",
            ));
        }
        if depth >= DEPTH {
            return Err(Error::new(ErrorKind::Limit, format!("more than {DEPTH} directories lie within each other")));
        }
        Ok(())
    }
}

impl GuestTree {
    /// The files of a volume, by index.
    pub fn open(inside: &Arc<DiskContents>, volume: usize) -> Result<Self> {
        let hold = inside.hold()?;
        let ino = inside.mount(volume)?.root;
        let root = GuestEntry { ino, attributes: inside.attributes(volume, ino)? };
        Ok(Self { inside: Arc::clone(inside), volume, root, _hold: hold })
    }

    /// The root directory.
    pub fn root(&self) -> GuestEntry {
        self.root
    }

    /// What a path from the root means, by the guest's own rules: links that are absolute, or climb, stay in the volume.
    pub fn resolve(&self, path: &[u8], last: FinalSymlink) -> Result<GuestEntry> {
        let mut left: Vec<Vec<u8>> = Vec::new();
        push_names(&mut left, path);
        if path.ends_with(b"/") {
            // What is written with a slash at its end is a directory, behind a link or not.
            left.insert(0, b".".to_vec());
        }
        let mut above = vec![self.root];
        let mut link_count = 0;
        while let Some(name) = left.pop() {
            let here = above[above.len() - 1];
            if here.attributes.kind != FileKind::Directory {
                return Err(Error::new(ErrorKind::NotFound, "a part of the path is not a directory"));
            }
            match name.as_slice() {
                b"." => continue,
                b".." => {
                    above.truncate((above.len() - 1).max(1));
                    continue;
                }
                _ => {}
            }
            let found = self.inside.lookup(self.volume, here.ino, &name)?;
            let (ino, attributes) = found.ok_or_else(|| {
                let name = shown(Path::new(OsStr::from_bytes(&name)));
                Error::new(ErrorKind::NotFound, format!("there is no {name}"))
            })?;
            if attributes.kind == FileKind::Symlink && (last == FinalSymlink::Followed || !left.is_empty()) {
                link_count += 1;
                if link_count > LINKS {
                    return Err(Error::new(ErrorKind::NotFound, "there are too many symbolic links on the way"));
                }
                let target = self.inside.read_link(self.volume, ino)?;
                if target.starts_with(b"/") {
                    above.truncate(1);
                }
                push_names(&mut left, &target);
                continue;
            }
            above.push(GuestEntry { ino, attributes });
        }
        Ok(above[above.len() - 1])
    }

    /// All entries of a directory, sorted by name, and why there are no more if something is wrong with it.
    pub fn entries(&self, directory: Ino) -> (Vec<NamedEntry>, Option<Error>) {
        let mut all = Vec::new();
        let trouble = self.list(directory, &mut all).err();
        all.sort_by(|a, b| a.name.cmp(&b.name));
        // By a name there is one thing, however often a damaged directory has it.
        all.dedup_by(|a, b| a.name == b.name);
        (all, trouble)
    }

    fn list(&self, directory: Ino, all: &mut Vec<NamedEntry>) -> Result<()> {
        let mut from = 0;
        loop {
            let listing = self.inside.list(self.volume, directory, from)?;
            let Some(last) = listing.entries.last() else {
                let fact = "a directory's listing does not end";
                return if listing.ends { Ok(()) } else { Err(Error::new(ErrorKind::Corrupt, fact)) };
            };
            from = last.entry.next;
            for ListedEntry { entry: found, attributes, .. } in listing.entries {
                let attributes = match attributes {
                    Some(attributes) => Ok(attributes),
                    None => self.inside.attributes(self.volume, found.ino),
                };
                let entry = attributes.map(|attributes| GuestEntry { ino: found.ino, attributes });
                all.push(NamedEntry { name: found.name, entry });
            }
            if listing.ends {
                return Ok(());
            }
            if all.len() > ENTRIES {
                return Err(Error::new(ErrorKind::Limit, format!("a directory has more than {ENTRIES} entries")));
            }
        }
    }

    /// The target of a symbolic link, as the guest has it.
    pub fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        self.inside.read_link(self.volume, ino)
    }

    /// All extended attributes.
    pub fn extended_attributes(&self, ino: Ino) -> Result<Vec<ExtendedAttribute>> {
        self.inside.extended_attributes(self.volume, ino)
    }
}

/// Puts a path's names in front of those that are left; the next one is the last of the list.
fn push_names(left: &mut Vec<Vec<u8>>, path: &[u8]) {
    left.extend(path.split(|byte| *byte == b'/').rev().filter(|name| !name.is_empty()).map(<[u8]>::to_vec));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_a_path_come_first_to_last() {
        let mut left = vec![b"rest".to_vec()];
        push_names(&mut left, b"//a/../b/");
        let mut order = Vec::new();
        while let Some(name) = left.pop() {
            order.push(String::from_utf8(name).unwrap());
        }
        assert_eq!(order, ["a", "..", "b", "rest"]);
    }

    #[test]
    fn a_directory_is_entered_once_and_not_too_deep() {
        let mut visited = VisitedDirectories::default();
        visited.enter(Ino(2), 0).unwrap();
        assert_eq!(visited.enter(Ino(2), 1).unwrap_err().kind(), ErrorKind::Corrupt);
        assert_eq!(visited.enter(Ino(3), DEPTH).unwrap_err().kind(), ErrorKind::Limit);
    }
}
