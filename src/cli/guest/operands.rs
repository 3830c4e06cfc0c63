//! Parses `IMAGE[@VIEW]:/VOLUME/PATH`.
//!
//! File names may contain colons and at signs: the longest prefix that is the name of a file is the image.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::super::target::place_in_mount;
use crate::browse::DiskContents;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::TreeId;
use crate::io::is_address;

/// The name of the volume with the operating system.
const ROOT: &[u8] = b"root";

/// A parsed operand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct GuestOperand {
    pub(super) disk: DiskName,
    /// A volume and a path in it.
    pub(super) inner: Option<DiskPath>,
    /// Whether the operand has a colon after the image's name: `IMAGE:` is not `IMAGE`.
    pub(super) has_inner: bool,
}

/// The name of a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum DiskName {
    /// The disk of an image, or of one of its snapshots.
    Image { path: PathBuf, snapshot: Option<Vec<u8>> },
    /// A disk in a mount of the store at `store`; `address` is the part after an at sign.
    Mounted { store: PathBuf, chain: PathBuf, view: Option<Vec<u8>>, address: Option<Vec<u8>> },
}

/// A path on a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct DiskPath {
    pub(super) volume: Vec<u8>,
    /// The path within the volume, as written.
    pub(super) path: Vec<u8>,
}

impl DiskPath {
    /// Parses `/VOLUME/PATH`; `None` if it has no volume.
    fn of(text: &[u8]) -> Option<Self> {
        let text = &text[text.iter().position(|byte| *byte != b'/')?..];
        let end = text.iter().position(|byte| *byte == b'/').unwrap_or(text.len());
        Some(Self { volume: text[..end].to_vec(), path: text[end..].to_vec() })
    }
}

/// Parses an operand.
pub(super) fn parse(word: &OsStr) -> Result<GuestOperand> {
    let bytes = word.as_bytes();
    if is_address(Path::new(word)) {
        return address(bytes);
    }
    let ends =
        (1..=bytes.len()).rev().filter(|end| bytes.get(*end).is_none_or(|byte| matches!(byte, b':' | b'@')));
    for end in ends {
        let path = Path::new(OsStr::from_bytes(&bytes[..end]));
        if !path.metadata().is_ok_and(|found| found.is_file()) {
            continue;
        }
        let Some((snapshot, inner)) = split(&bytes[end..]) else { continue };
        if let Some((store, rest)) = place_in_mount(path)? {
            return mounted(word, &store, &rest, snapshot, inner);
        }
        let disk = DiskName::Image { path: path.to_path_buf(), snapshot: snapshot.map(<[u8]>::to_vec) };
        return Ok(GuestOperand { disk, inner: inner.and_then(DiskPath::of), has_inner: inner.is_some() });
    }
    if let Some((store, rest)) = place_in_mount(Path::new(word))? {
        return mounted(word, &store, &rest, None, None);
    }
    // Probably the user meant the part before the first colon.
    let end = bytes.iter().position(|byte| *byte == b':').unwrap_or(bytes.len());
    let path = Path::new(OsStr::from_bytes(&bytes[..end]));
    if path.is_dir() {
        let fact = format!("{} is a directory; name one of its images", shown(path.as_os_str()));
        return Err(Error::new(ErrorKind::Usage, fact));
    }
    let fact = format!(
        "there is no image {}; write a path in an image as IMAGE:/VOLUME/PATH",
        shown(path.as_os_str())
    );
    Err(Error::new(ErrorKind::NotFound, fact))
}

/// Parses `ADDRESS[@VIEW]:/VOLUME/PATH`. A colon or at sign in the name of an object is written as `%3A` or
/// `%40`.
fn address(word: &[u8]) -> Result<GuestOperand> {
    // The server's name may have a port.
    let start = word.windows(3).position(|part| part == b"://").map_or(0, |at| at + 3);
    let name = word[start..].iter().position(|byte| *byte == b'/').map_or(word.len(), |at| start + at);
    let end =
        word[name..].iter().position(|byte| matches!(byte, b':' | b'@')).map_or(word.len(), |at| name + at);
    let Some((snapshot, inner)) = split(&word[end..]) else {
        let fact =
            format!("{}: write a path in an image as ADDRESS:/VOLUME/PATH", shown(OsStr::from_bytes(word)));
        return Err(Error::new(ErrorKind::Usage, fact));
    };
    let path = PathBuf::from(OsStr::from_bytes(&word[..end]));
    let disk = DiskName::Image { path, snapshot: snapshot.map(<[u8]>::to_vec) };
    Ok(GuestOperand { disk, inner: inner.and_then(DiskPath::of), has_inner: inner.is_some() })
}

/// Whether an address is that of a store or of an image alone.
pub(super) fn names_no_view(word: &OsStr) -> bool {
    address(word.as_bytes()).is_ok_and(|operand| {
        !operand.has_inner && matches!(operand.disk, DiskName::Image { snapshot: None, .. })
    })
}

/// A snapshot's name, and the part after the colon.
type Split<'a> = (Option<&'a [u8]>, Option<&'a [u8]>);

/// Splits `[@SNAPSHOT][:INNER]`; `None` for other text.
fn split(rest: &[u8]) -> Option<Split<'_>> {
    match rest {
        [] => Some((None, None)),
        [b':', inner @ ..] => Some((None, Some(inner))),
        [b'@', rest @ ..] => {
            // Snapshots are often named after times, which have colons.
            let end = rest.windows(2).position(|pair| pair == b":/");
            let end = end.or_else(|| rest.len().checked_sub(1).filter(|last| rest[*last] == b':'));
            let (snapshot, inner) = match end {
                Some(end) => (&rest[..end], Some(&rest[end + 1..])),
                None => (rest, None),
            };
            (!snapshot.is_empty()).then_some((Some(snapshot), inner))
        }
        _ => None,
    }
}

/// A path in a mount: a disk, or a guest's file.
fn mounted(
    word: &OsStr,
    store: &Path,
    rest: &Path,
    snapshot: Option<&[u8]>,
    inner: Option<&[u8]>,
) -> Result<GuestOperand> {
    let nothing = || {
        let fact = format!("{} is neither a disk nor a guest's file of a mount", shown(word));
        Error::new(ErrorKind::Usage, fact)
    };
    let names: Vec<&[u8]> = rest.iter().map(OsStr::as_bytes).collect();
    let chain = |count: usize| names[..count].iter().map(|name| OsStr::from_bytes(name)).collect::<PathBuf>();
    let place = |chain, view: Option<&[u8]>, inner: Option<&[u8]>| {
        let (view, address) = (view.map(<[u8]>::to_vec), snapshot.map(<[u8]>::to_vec));
        let disk = DiskName::Mounted { store: store.to_path_buf(), chain, view, address };
        GuestOperand { disk, inner: inner.and_then(DiskPath::of), has_inner: inner.is_some() }
    };
    if let Some(at) = names.iter().position(|name| *name == b"files") {
        let view = *names.get(at + 1).ok_or_else(nothing)?;
        // The mount's path has lost a slash at the end. It means that a symbolic link is to be followed.
        let mut within = names[at + 2..].join(&b'/');
        if word.as_bytes().ends_with(b"/") {
            within.push(b'/');
        }
        return Ok(place(chain(at), Some(view), Some(&within)));
    }
    match names.as_slice() {
        [.., b"snapshots", file] => {
            let view = file.strip_suffix(b".raw").ok_or_else(nothing)?;
            Ok(place(chain(names.len() - 2), Some(view), inner))
        }
        [.., b"active.raw"] => Ok(place(chain(names.len() - 1), Some(b"active"), inner)),
        // A chain means its active disk.
        _ => Ok(place(chain(names.len()), None, inner)),
    }
}

/// The tree with this name: a volume's; its top level (`VOLUME.subvolumes`), which may be the same; or
/// `root`, that of the operating system.
pub(super) fn tree(inside: &DiskContents, name: &[u8]) -> Result<TreeId> {
    if let Some(volume) = inside.volume(name) {
        return Ok(TreeId::main(volume));
    }
    if let Some(volume) = inside.volume_of_top_level(name) {
        return Ok(inside.top_level(volume)?.unwrap_or(TreeId::main(volume)));
    }
    let is_root = name == ROOT;
    if is_root && let Some(found) = inside.operating_systems()?.first() {
        return Ok(found.tree);
    }
    let names: Vec<&str> = inside.layout().volumes.iter().map(|volume| volume.name.as_str()).collect();
    let fact = if is_root {
        "no operating system was found on the disk".to_owned()
    } else {
        format!("the disk has no volume {}", shown(OsStr::from_bytes(name)))
    };
    let remedy = if names.is_empty() {
        "it has no volumes".to_owned()
    } else {
        format!("its volumes: {}", names.join(", "))
    };
    Err(Error::new(ErrorKind::NotFound, format!("{fact}; {remedy}")))
}

/// The error for an operand that names a disk where a file is needed.
pub(super) fn no_volume(word: &OsStr) -> Error {
    let word = shown(word);
    let fact = format!(
        "{word} names no volume; chainfs ls {}: lists the volumes",
        word.trim_end_matches([':', '/'])
    );
    Error::new(ErrorKind::Usage, fact)
}

/// An operand, made safe for a message.
pub(super) fn shown(word: &OsStr) -> String {
    use std::os::unix::ffi::OsStrExt;
    crate::report::safe::terminal_bytes(word.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_prefix_that_is_a_file_is_the_image() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        for name in ["a", "a:", "b@c", "b"] {
            std::fs::write(at(name), "").unwrap();
        }
        let said = |word: &str| {
            let place = parse(at(word).as_os_str()).unwrap();
            let DiskName::Image { path, snapshot } = place.disk else { panic!() };
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
            let inner = place.inner.map(|inner| (text(inner.volume), text(inner.path)));
            (name, snapshot.map(text), inner, place.has_inner)
        };
        let inner = |volume: &str, path: &str| Some((volume.to_owned(), path.to_owned()));
        let name = |name: &str| name.to_owned();
        assert_eq!(said("a"), (name("a"), None, None, false));
        assert_eq!(said("a:"), (name("a:"), None, None, false));
        assert_eq!(said("a::"), (name("a:"), None, None, true));
        assert_eq!(said("a:/p1/x:y/@z"), (name("a"), None, inner("p1", "/x:y/@z"), true));
        assert_eq!(said("a:p1"), (name("a"), None, inner("p1", ""), true));
        assert_eq!(said("b@c:/p1/"), (name("b@c"), None, inner("p1", "/"), true));
        assert_eq!(said("b@d:/"), (name("b"), Some(name("d")), None, true));
        assert_eq!(said("b@12:30:/disk/e"), (name("b"), Some(name("12:30")), inner("disk", "/e"), true));
        assert_eq!(said("b@active@monday"), (name("b"), Some(name("active@monday")), None, false));
        let absent = |word: &str| parse(at(word).as_os_str()).unwrap_err();
        assert_eq!(absent("c:/p1").kind(), ErrorKind::NotFound);
        assert!(absent("c:/p1").to_string().contains("no image"), "{}", absent("c:/p1"));
        assert_eq!(absent(":/p1").kind(), ErrorKind::Usage, "the directory itself");
    }
}
