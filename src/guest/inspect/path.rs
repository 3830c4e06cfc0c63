//! Paths within a tree.

use crate::error::{Error, ErrorKind, Result};
use crate::guest::{FileKind, FileSystem, Ino};

/// Symbolic links that one path may follow; Linux' own limit.
const LINK_LIMIT: u32 = 40;
/// Names that one path may have, with those of its links.
const NAME_LIMIT: usize = 4096;
/// Bytes of a link's target: Linux' limit of a path.
const TARGET_LIMIT: usize = 4096;

/// Resolves a path and follows all symbolic links, including the last. They stay within the tree: an
/// absolute target begins at its root directory, and `..` does not leave it. `NotFound` if a name does not
/// exist.
pub fn resolve_path(files: &dyn FileSystem, path: &[u8]) -> Result<Ino> {
    let not_found =
        || Error::new(ErrorKind::NotFound, format!("there is no {}", String::from_utf8_lossy(path)));
    // The directories from the root to the current one, and the names still to be resolved, the next one
    // last.
    let mut parents = vec![files.root()];
    let mut names = Vec::new();
    push(&mut names, path);
    let (mut link_count, mut name_count) = (0, 0);
    while let Some(name) = names.pop() {
        name_count += 1;
        if name_count > NAME_LIMIT || names.len() > NAME_LIMIT {
            return Err(Error::new(ErrorKind::Limit, "the path is too long"));
        }
        let here = parents.last().copied().unwrap_or(files.root());
        match name.as_slice() {
            b"." => continue,
            b".." => {
                if parents.len() > 1 {
                    parents.pop();
                }
                continue;
            }
            _ => {}
        }
        if files.attributes(here)?.kind != FileKind::Directory {
            return Err(not_found());
        }
        let next = files.lookup(here, &name)?.ok_or_else(not_found)?;
        let attributes = files.attributes(next)?;
        if attributes.kind != FileKind::Symlink {
            parents.push(next);
            continue;
        }
        link_count += 1;
        if link_count > LINK_LIMIT {
            return Err(Error::new(ErrorKind::Limit, "the path follows too many symbolic links"));
        }
        let target = files.read_link(next)?;
        if target.len() > TARGET_LIMIT {
            return Err(Error::new(ErrorKind::Limit, "a symbolic link is too long"));
        }
        if target.starts_with(b"/") {
            parents.truncate(1);
        }
        push(&mut names, &target);
    }
    Ok(parents.last().copied().unwrap_or(files.root()))
}

fn push(names: &mut Vec<Vec<u8>>, path: &[u8]) {
    names.extend(path.split(|byte| *byte == b'/').rev().filter(|name| !name.is_empty()).map(<[u8]>::to_vec));
}

/// The first names in a directory, in its order; none if it cannot be read.
pub(super) fn list_names(files: &dyn FileSystem, path: &str, limit: usize) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    let listed = resolve_path(files, path.as_bytes()).and_then(|directory| {
        files.list(directory, 0, &mut |entry| {
            names.push(entry.name);
            names.len() < limit
        })
    });
    // Names before the damage are good.
    drop(listed);
    names
}

/// The beginning of a regular file, up to `limit` bytes.
pub(super) fn read_bytes(files: &dyn FileSystem, path: &str, limit: usize) -> Option<Vec<u8>> {
    let ino = resolve_path(files, path.as_bytes()).ok()?;
    let attributes = files.attributes(ino).ok()?;
    if attributes.kind != FileKind::File {
        return None;
    }
    let mut bytes = vec![0; attributes.size.min(limit as u64) as usize];
    let len = files.read_at(ino, 0, &mut bytes).ok()?;
    bytes.truncate(len);
    Some(bytes)
}

/// The beginning of a regular file as text, up to `limit` bytes; `None` if it cannot be read.
pub fn read_text(files: &dyn FileSystem, path: &str, limit: usize) -> Option<String> {
    read_bytes(files, path, limit).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}
