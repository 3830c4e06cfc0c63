//! From a name in a header to a place beneath the roots, or to the reason why not.
//!
//! Only the text is looked at here. Names with a protocol, `json:` descriptions and paths that
//! leave the roots are refused before anything is asked of the file system.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::io::Root;

/// A file's place: which root, and the path beneath it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Index of the root; 0 is the store itself.
    pub root: usize,
    /// Path beneath it, without `.` and `..`.
    pub path: PathBuf,
}

/// Resolves `name`, found in the header of the image at `from`. The error is the rest of a
/// sentence that begins with what the name is for.
pub(super) fn resolve(
    roots: &[Arc<Root>],
    maps: &[(PathBuf, PathBuf)],
    from: &Place,
    name: &[u8],
) -> Result<Place, String> {
    if name.starts_with(b"json:") {
        return Err("is a json: description, which is never followed; rebase it onto a plain file name".into());
    }
    if let Some(protocol) = protocol(name) {
        let protocol = String::from_utf8_lossy(protocol).into_owned();
        return Err(format!(
            "names the protocol \"{}\", which is never followed; if it is a file name, write it as ./NAME",
            protocol.escape_debug()
        ));
    }
    let (name, given) = (mapped(maps, name), Path::new(OsStr::from_bytes(name)));
    if name.is_relative() {
        let directory = from.path.parent().unwrap_or(Path::new(""));
        if let Some(path) = normal(&directory.join(&name)) {
            return Ok(Place { root: from.root, path });
        }
    }
    // Beneath another root, or in the store by its full path.
    let absolute = lexical(&absolute(roots, from, &name));
    for (root, directory) in roots.iter().enumerate() {
        if let Some(path) = directory.relative(&absolute) {
            return Ok(Place { root, path });
        }
    }
    if name != given {
        let directory = absolute.parent().unwrap_or(&absolute).display();
        return Err(format!(
            "leads out of the store to {} by a map=, and is never followed there; allow that as well with \
             -o backing_dir={directory}",
            absolute.display()
        ));
    }
    Err("leads out of the store, and is never followed; move the file into the store, or mount with -o backing_dir= or map=".into())
}

/// The directories from which `name` goes up again, as absolute paths: what `..` means there is
/// only plain where none of them is a symbolic link.
pub(super) fn climbed(roots: &[Arc<Root>], maps: &[(PathBuf, PathBuf)], from: &Place, name: &[u8]) -> Vec<PathBuf> {
    let mut climbed = Vec::new();
    let mut plain = PathBuf::from("/");
    for component in absolute(roots, from, &mapped(maps, name)).components() {
        match component {
            Component::Normal(part) => plain.push(part),
            Component::ParentDir => {
                climbed.push(plain.clone());
                plain.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    climbed
}

fn mapped(maps: &[(PathBuf, PathBuf)], name: &[u8]) -> PathBuf {
    let name = Path::new(OsStr::from_bytes(name));
    let mapped = maps.iter().find_map(|(old, new)| name.strip_prefix(old).ok().map(|rest| new.join(rest)));
    mapped.unwrap_or_else(|| name.to_path_buf())
}

/// `name` as an absolute path, with all its `..`.
fn absolute(roots: &[Arc<Root>], from: &Place, name: &Path) -> PathBuf {
    roots[from.root].canonical().join(from.path.parent().unwrap_or(Path::new(""))).join(name)
}

/// What QEMU takes for a protocol: what stands before the first `:`, if no `/` does.
fn protocol(name: &[u8]) -> Option<&[u8]> {
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    (name[end] == b':').then(|| &name[..end])
}

/// A relative path without `.` and `..`; `None` if it climbs above where it starts.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(part) => plain.push(part),
            Component::CurDir => {}
            Component::ParentDir => {
                if !plain.pop() {
                    return None;
                }
            }
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(plain)
}

/// An absolute path without `.` and `..`.
fn lexical(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(part) => plain.push(part),
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir | Component::RootDir | Component::Prefix(_) => {}
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(path: &str) -> Place {
        Place { root: 0, path: path.into() }
    }

    #[test]
    fn names_resolve_beneath_the_roots_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().canonicalize().unwrap();
        std::fs::create_dir_all(top.join("store/sub")).unwrap();
        std::fs::create_dir(top.join("golden")).unwrap();
        let roots =
            [Arc::new(Root::open(&top.join("store")).unwrap()), Arc::new(Root::open(&top.join("golden")).unwrap())];
        let maps = [(PathBuf::from("/old"), top.join("store"))];
        let from = place("sub/web.qcow2");
        let resolve = |name: &str| resolve(&roots, &maps, &from, name.as_bytes());
        assert_eq!(resolve("base.raw"), Ok(place("sub/base.raw")));
        assert_eq!(resolve("./we:ird.raw"), Ok(place("sub/we:ird.raw")));
        assert_eq!(resolve("../base.raw"), Ok(place("base.raw")));
        assert_eq!(resolve("../../store/base.raw"), Ok(place("base.raw")));
        assert_eq!(resolve("../../golden/g.raw"), Ok(Place { root: 1, path: "g.raw".into() }));
        assert_eq!(resolve(top.join("store/x/../b.raw").to_str().unwrap()), Ok(place("b.raw")));
        assert_eq!(resolve("/old/b.raw"), Ok(place("b.raw")));
        assert!(resolve("/etc/passwd").unwrap_err().contains("leads out of the store"));
        assert!(resolve("../../../x").unwrap_err().contains("leads out of the store"));
        assert!(resolve("json:{}").unwrap_err().contains("json:"));
        assert!(resolve("nbd://host/x").unwrap_err().contains("protocol \"nbd\""));
        assert!(resolve("we:ird.raw").unwrap_err().contains("protocol"));
    }
}
