//! Resolves a name in a header to a path beneath the roots, or to the reason for a refusal.
//!
//! Only the text is examined here. Names with a protocol, `json:` descriptions and paths that leave the roots
//! are refused before any access to the file system.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::io::{Backend, is_address};

/// The path of a file: a root, and the path beneath it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct StorePath {
    /// Index of the root; 0 is the store itself.
    pub root: usize,
    /// Path beneath it, without `.` and `..`.
    pub path: PathBuf,
}

/// Why an image's backing file cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BrokenLink {
    /// There is no such file.
    Missing,
    /// The name leads out of the store.
    OutsideStore,
    /// The name is not followed, or the file may not be opened.
    NotFollowed,
    /// The backing files form a loop.
    Loop,
    /// The chain has too many layers.
    TooDeep,
    /// The header states another format than the file's, or none.
    Format,
}

/// Why a name in a header leads to no usable file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnresolvedName {
    /// The kind of failure.
    pub reason: BrokenLink,
    /// The rest of a sentence that begins with the name's purpose.
    pub sentence: String,
}

impl UnresolvedName {
    pub(super) fn new(reason: BrokenLink, sentence: impl Into<String>) -> Self {
        Self { reason, sentence: sentence.into() }
    }

    pub(super) fn not_followed(sentence: impl Into<String>) -> Self {
        Self::new(BrokenLink::NotFollowed, sentence)
    }
}

impl std::fmt::Display for UnresolvedName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.sentence)
    }
}

/// Resolves `name`, found in the header of the image at `from`.
pub(super) fn resolve(
    roots: &[Arc<dyn Backend>],
    maps: &[(PathBuf, PathBuf)],
    from: &StorePath,
    name: &[u8],
) -> Result<StorePath, UnresolvedName> {
    // S1: the text decides first, without access to the file system.
    if name.starts_with(b"json:") {
        let sentence = "is a json: description, which is never followed; rebase it onto a plain file name";
        return Err(UnresolvedName::not_followed(sentence));
    }
    let (name, given) = (mapped(maps, name), Path::new(OsStr::from_bytes(name)));
    // A root may be the address of a store elsewhere, which looks like a name with a protocol.
    if let Some(place) = beneath_address(roots, &name) {
        return Ok(place);
    }
    if let Some(protocol) = protocol(name.as_os_str().as_bytes()) {
        let protocol = String::from_utf8_lossy(protocol).into_owned();
        return Err(UnresolvedName::not_followed(format!(
            "names the protocol \"{}\", which is never followed; if it is a file name, write it as ./NAME; if \
             it is a store's address, mount with -o backing_dir=ADDRESS",
            protocol.escape_debug()
        )));
    }
    if name.is_relative() {
        let directory = from.path.parent().unwrap_or(Path::new(""));
        if let Some(path) = normal(&directory.join(&name)) {
            return Ok(StorePath { root: from.root, path });
        }
    }
    // Beneath another root, or in the store by its full path.
    let absolute = lexical(&absolute(roots, from, &name));
    if let Some(place) = beneath(roots, &absolute) {
        return Ok(place);
    }
    if name != given {
        let directory = absolute.parent().unwrap_or(&absolute).display();
        let sentence = format!(
            "leads out of the store to {} by a map=, and is never followed there; allow that as well with \
             -o backing_dir={directory}",
            absolute.display()
        );
        return Err(UnresolvedName::new(BrokenLink::OutsideStore, sentence));
    }
    let sentence = "leads out of the store, and is never followed; move the file into the store, or mount \
                    with -o backing_dir= or map=";
    Err(UnresolvedName::new(BrokenLink::OutsideStore, sentence))
}

/// The directories from which `name` goes up again, as absolute paths: `..` is only unambiguous there if none
/// of them is a symbolic link.
pub(super) fn climbed(
    roots: &[Arc<dyn Backend>],
    maps: &[(PathBuf, PathBuf)],
    from: &StorePath,
    name: &[u8],
) -> Vec<PathBuf> {
    let mut climbed = Vec::new();
    // A store in object storage has an address, which does not begin at the root.
    let mut plain = PathBuf::new();
    for component in absolute(roots, from, &mapped(maps, name)).components() {
        match component {
            Component::Normal(part) => plain.push(part),
            Component::ParentDir => {
                climbed.push(plain.clone());
                plain.pop();
            }
            Component::RootDir => plain.push("/"),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    climbed
}

/// Maximum number of links that are followed, as in the kernel.
const MAX_LINKS: usize = 40;

/// The target of `name` in the header of the image at `from`, with links and `..` followed as the kernel
/// would, if it is beneath a root. Nothing is opened, and nothing outside of the roots is accessed: `None`
/// also if it is unknown.
pub(super) fn traced(
    roots: &[Arc<dyn Backend>],
    maps: &[(PathBuf, PathBuf)],
    from: &StorePath,
    name: &[u8],
) -> Option<StorePath> {
    // The components still to walk, the last one first.
    let parts = |path: &Path| path.iter().rev().map(OsStr::to_os_string).collect::<Vec<_>>();
    let mut at = roots[from.root].canonical().join(from.path.parent().unwrap_or(Path::new("")));
    let mut rest = parts(&mapped(maps, name));
    let mut links = 0;
    while let Some(part) = rest.pop() {
        match part.as_bytes() {
            b"/" => at = PathBuf::from("/"),
            b"." => {}
            b".." => {
                // Certainly no links: a root, the directories above it, and those that have been checked on
                // the way.
                let is_real = roots.iter().any(|root| root.canonical().starts_with(&at))
                    || beneath(roots, &at).is_some();
                if !is_real {
                    return None;
                }
                at.pop();
            }
            _ => {
                let next = at.join(&part);
                let inside = beneath(roots, &next).filter(|place| !place.path.as_os_str().is_empty());
                match inside.and_then(|place| roots[place.root].link_target(&place.path)) {
                    Some(target) => {
                        links += 1;
                        if links > MAX_LINKS {
                            return None;
                        }
                        rest.extend(parts(&target));
                    }
                    // The directories above a root are the same by whatever path it was reached.
                    None => at = root_at(roots, &next).map_or(next, Path::to_path_buf),
                }
            }
        }
    }
    beneath(roots, &at)
}

fn mapped(maps: &[(PathBuf, PathBuf)], name: &[u8]) -> PathBuf {
    let name = Path::new(OsStr::from_bytes(name));
    let mapped = maps.iter().find_map(|(old, new)| name.strip_prefix(old).ok().map(|rest| new.join(rest)));
    mapped.unwrap_or_else(|| name.to_path_buf())
}

/// `name` as an absolute path, with all its `..`.
fn absolute(roots: &[Arc<dyn Backend>], from: &StorePath, name: &Path) -> PathBuf {
    roots[from.root].canonical().join(from.path.parent().unwrap_or(Path::new(""))).join(name)
}

/// The path of an absolute path beneath the roots.
fn beneath(roots: &[Arc<dyn Backend>], absolute: &Path) -> Option<StorePath> {
    let inside = |(root, directory): (usize, &Arc<dyn Backend>)| {
        Some(StorePath { root, path: directory.relative(absolute)? })
    };
    roots.iter().enumerate().find_map(inside)
}

/// The path of an address beneath the roots that are addresses.
fn beneath_address(roots: &[Arc<dyn Backend>], name: &Path) -> Option<StorePath> {
    if !is_address(name) {
        return None;
    }
    let inside = |(root, backend): (usize, &Arc<dyn Backend>)| {
        let beneath = name.strip_prefix(backend.given()).ok().filter(|_| is_address(backend.given()))?;
        Some(StorePath { root, path: normal(beneath)? })
    };
    roots.iter().enumerate().find_map(inside)
}

/// The root that an absolute path names, without links.
fn root_at<'a>(roots: &'a [Arc<dyn Backend>], absolute: &Path) -> Option<&'a Path> {
    roots.iter().find(|root| root.given() == absolute).map(|root| root.canonical())
}

/// The file names in a `json:` description, if it has any; `None` if it cannot be parsed.
pub(super) fn names_in_json(name: &[u8]) -> Option<Vec<Vec<u8>>> {
    let value: serde_json::Value = serde_json::from_slice(name.strip_prefix(b"json:")?).ok()?;
    let mut names = Vec::new();
    let mut rest = vec![&value];
    while let Some(value) = rest.pop() {
        rest.extend(value.as_array().into_iter().flatten());
        for (key, value) in value.as_object().into_iter().flatten() {
            match value.as_str().filter(|_| key.rsplit('.').next() == Some("filename")) {
                Some(text) => names.push(text.as_bytes().to_vec()),
                None => rest.push(value),
            }
        }
    }
    Some(names)
}

/// The protocol as QEMU parses it: the text before the first `:`, if it contains no `/`.
pub(super) fn protocol(name: &[u8]) -> Option<&[u8]> {
    let end = name.iter().position(|byte| matches!(byte, b':' | b'/'))?;
    (name[end] == b':').then(|| &name[..end])
}

/// A relative path without `.` and `..`; `None` if it climbs above its start.
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
    use crate::io::LocalDirectory;

    fn place(path: &str) -> StorePath {
        StorePath { root: 0, path: path.into() }
    }

    #[test]
    fn names_resolve_beneath_the_roots_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().canonicalize().unwrap();
        std::fs::create_dir_all(top.join("store/sub")).unwrap();
        std::fs::create_dir(top.join("golden")).unwrap();
        let roots = [
            LocalDirectory::open(&top.join("store")).unwrap(),
            LocalDirectory::open(&top.join("golden")).unwrap(),
        ];
        let maps = [(PathBuf::from("/old"), top.join("store"))];
        let from = place("sub/web.qcow2");
        let resolve = |name: &str| resolve(&roots, &maps, &from, name.as_bytes());
        assert_eq!(resolve("base.raw"), Ok(place("sub/base.raw")));
        assert_eq!(resolve("./we:ird.raw"), Ok(place("sub/we:ird.raw")));
        assert_eq!(resolve("../base.raw"), Ok(place("base.raw")));
        assert_eq!(resolve("../../store/base.raw"), Ok(place("base.raw")));
        assert_eq!(resolve("../../golden/g.raw"), Ok(StorePath { root: 1, path: "g.raw".into() }));
        assert_eq!(resolve(top.join("store/x/../b.raw").to_str().unwrap()), Ok(place("b.raw")));
        assert_eq!(resolve("/old/b.raw"), Ok(place("b.raw")));
        assert!(resolve("/etc/passwd").unwrap_err().sentence.contains("leads out of the store"));
        assert!(resolve("../../../x").unwrap_err().sentence.contains("leads out of the store"));
        assert!(resolve("json:{}").unwrap_err().sentence.contains("json:"));
        assert!(resolve("nbd://host/x").unwrap_err().sentence.contains("protocol \"nbd\""));
        assert!(resolve("we:ird.raw").unwrap_err().sentence.contains("protocol"));
    }

    #[test]
    fn links_are_traced_to_where_the_kernel_would_follow_them() {
        let directory = tempfile::tempdir().unwrap();
        let top = directory.path().canonicalize().unwrap();
        std::fs::create_dir_all(top.join("store/sub/deep")).unwrap();
        let link = |to: &str, at: &str| std::os::unix::fs::symlink(to, top.join("store").join(at)).unwrap();
        link("../base.raw", "sub/near");
        link(top.join("store/base.raw").to_str().unwrap(), "absolute");
        link("sub/deep", "jump");
        link("../store/absolute", "around");
        link("loop", "loop");
        let roots = [LocalDirectory::open(&top.join("store")).unwrap()];
        let traced =
            |name: &str| traced(&roots, &[], &place("web.qcow2"), name.as_bytes()).map(|place| place.path);
        for name in
            ["sub/near", "absolute", "around", "jump/../../base.raw", "../store/sub/near", "./base.raw"]
        {
            assert_eq!(traced(name), Some("base.raw".into()), "{name}");
        }
        assert_eq!(traced("jump/x"), Some("sub/deep/x".into()));
        assert_eq!((traced("loop"), traced("/etc/passwd"), traced("../x")), (None, None, None));
    }

    #[test]
    fn the_names_in_a_json_description_are_found() {
        let names = |text: &str| names_in_json(text.as_bytes()).map(|names| names.len());
        assert_eq!(names(r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"b"}}"#), Some(1));
        assert_eq!(names(r#"json:{"file.filename":"b","backing":{"file":{"filename":"c"}}}"#), Some(2));
        assert_eq!(names(r#"json:{"driver":"nbd","host":"x"}"#), Some(0));
        assert_eq!(names("json:{"), None);
    }
}
