//! Reads the permissions of files and directories: owner, group, mode and POSIX access list.
//!
//! This module only reads them. `store::rights` decides what they allow.

use std::ffi::OsString;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self, Mode, OFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};

use super::beneath::Root;
use super::object::ObjectStat;

/// The attributes that the kernel checks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Type and permission bits.
    pub mode: u32,
    /// The access list, if there is one.
    pub list: Option<Vec<AccessEntry>>,
}

/// An entry of an access list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessEntry {
    /// Its subject.
    pub who: Who,
    /// The permission bits: 4 read, 2 write, 1 execute or search.
    pub bits: u32,
}

/// The subject of an entry of an access list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The owner.
    Owner,
    /// A user.
    User(u32),
    /// The file's group.
    Group,
    /// Another group.
    NamedGroup(u32),
    /// The mask: the upper bound for named users, the file's group and named groups.
    Mask,
    /// All others.
    Other,
}

/// Maximum size of an access list in bytes (the kernel's limit for any attribute).
const MAX_LIST: usize = 64 << 10;
/// Maximum depth of directories, and of symbolic links that lead to each other.
const MAX_STEPS: usize = 1024;
const MAX_LINKS: usize = 40;

impl Permissions {
    /// The permissions of an open file or directory, which may be opened with `O_PATH`.
    pub fn of(file: &OwnedFd) -> Result<Self> {
        let ObjectStat { uid, gid, mode, .. } = ObjectStat::of(file)?;
        let mut value = vec![0; MAX_LIST];
        // fgetxattr does not work on a descriptor of O_PATH.
        let place = format!("/proc/self/fd/{}", file.as_raw_fd());
        let list = match fs::getxattr(&place, "system.posix_acl_access", value.as_mut_slice()) {
            Ok(len) => Some(parse_list(&value[..len]).ok_or_else(|| {
                Error::new(ErrorKind::Denied, "the access list of a file is malformed, so access is denied")
            })?),
            Err(Errno::NODATA | Errno::OPNOTSUPP) => None,
            Err(error) => return Err(Error::io("reading an access list", error)),
        };
        Ok(Self { uid, gid, mode, list })
    }
}

/// Parses a list in the format of the attribute.
fn parse_list(bytes: &[u8]) -> Option<Vec<AccessEntry>> {
    let (version, entries) = bytes.split_at_checked(4)?;
    if version != 2_u32.to_le_bytes() || entries.len() % 8 != 0 {
        return None;
    }
    let entry = |bytes: &[u8]| {
        let bits = u32::from(u16::from_le_bytes([bytes[2], bytes[3]])) & 7;
        let id = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let who = match u16::from_le_bytes([bytes[0], bytes[1]]) {
            0x01 => Who::Owner,
            0x02 => Who::User(id),
            0x04 => Who::Group,
            0x08 => Who::NamedGroup(id),
            0x10 => Who::Mask,
            0x20 => Who::Other,
            _ => return None,
        };
        Some(AccessEntry { who, bits })
    };
    entries.chunks_exact(8).map(entry).collect()
}

impl Root {
    /// The permissions of the file at `path`; symbolic links are followed beneath the root.
    pub(super) fn permissions(&self, path: &Path) -> Result<Permissions> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        Permissions::of(&self.open_with(path, OFlags::PATH)?)
    }

    /// The permissions of the root and of all directories above it. They are read through the root's
    /// descriptor, because this daemon's mount may cover its path.
    pub(super) fn permissions_above(&self) -> Result<Vec<Permissions>> {
        let fail =
            |error: Errno| Error::io("reading the permissions of the directories above the store", error);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut at = fs::openat(self.descriptor(), ".", flags, Mode::empty()).map_err(fail)?;
        let mut found = Vec::new();
        for _ in 0..MAX_STEPS {
            found.push(Permissions::of(&at)?);
            let above = fs::openat(&at, "..", flags, Mode::empty()).map_err(fail)?;
            if ObjectStat::of(&above)?.id == ObjectStat::of(&at)?.id {
                return Ok(found);
            }
            at = above;
        }
        Err(Error::new(ErrorKind::Io, "the store is nested in too many directories"))
    }

    /// The paths of the directories beneath the root that are searched to resolve `path`, and the resolved
    /// path without symbolic links.
    pub(super) fn steps(&self, path: &Path) -> Result<(Vec<PathBuf>, PathBuf)> {
        let mut searched = Vec::new();
        let mut rest: Vec<PathBuf> = components(path);
        let mut plain = PathBuf::new();
        let mut links = 0;
        while let Some(next) = rest.pop() {
            searched.push(plain.clone());
            if next == Path::new("..") {
                plain.pop();
                continue;
            }
            let step = plain.join(&next);
            match fs::readlinkat(self.descriptor(), &step, Vec::new()) {
                Ok(target) => {
                    links += 1;
                    if links > MAX_LINKS || searched.len() > MAX_STEPS {
                        return Err(Error::new(
                            ErrorKind::Escape,
                            format!("{} has too many levels of symbolic links", path.display()),
                        ));
                    }
                    let target = PathBuf::from(OsString::from_vec(target.into_bytes()));
                    // A path that leads out is never opened, so its permissions do not matter.
                    rest.extend(components(&target));
                }
                // No link, or no such file, which the later open reports.
                Err(_) => plain = step,
            }
        }
        searched.dedup();
        Ok((searched, plain))
    }
}

/// The parts of a path, the last one first.
fn components(path: &Path) -> Vec<PathBuf> {
    let part = |component: Component<'_>| match component {
        Component::Normal(part) => Some(PathBuf::from(part)),
        Component::ParentDir => Some(PathBuf::from("..")),
        Component::CurDir | Component::RootDir | Component::Prefix(_) => None,
    };
    path.components().rev().filter_map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    #[test]
    fn the_walk_to_a_file_lists_each_directory_searched() {
        let outer = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(outer.path().join("a/b")).unwrap();
        std::fs::create_dir_all(outer.path().join("c")).unwrap();
        std::fs::write(outer.path().join("a/b/f"), "").unwrap();
        symlink("../a/b/f", outer.path().join("c/link")).unwrap();
        let root = Root::open(outer.path()).unwrap();
        let steps = |path: &str| {
            let (steps, end) = root.steps(Path::new(path)).unwrap();
            let steps: Vec<String> = steps.iter().map(|step| step.display().to_string()).collect();
            (steps.join(" "), end.display().to_string())
        };
        assert_eq!(steps("a/b/f"), (" a a/b".into(), "a/b/f".into()));
        assert_eq!(steps("c/link"), (" c  a a/b".into(), "a/b/f".into()));
        assert_eq!(steps("gone/x"), (" gone".into(), "gone/x".into()));
        std::fs::set_permissions(outer.path().join("a"), std::fs::Permissions::from_mode(0o750)).unwrap();
        assert_eq!(root.permissions(Path::new("a")).unwrap().mode & 0o777, 0o750);
        assert!(root.permissions_above().unwrap().len() > 1);
    }

    #[test]
    fn access_lists_are_parsed_in_the_kernels_format() {
        let bytes = |tag: u16, bits: u16, id: u32| {
            [tag.to_le_bytes().as_slice(), &bits.to_le_bytes(), &id.to_le_bytes()].concat()
        };
        let list =
            [2_u32.to_le_bytes().to_vec(), bytes(1, 6, !0), bytes(2, 4, 7), bytes(0x20, 1, !0)].concat();
        let entry = |who, bits| AccessEntry { who, bits };
        let expected = vec![entry(Who::Owner, 6), entry(Who::User(7), 4), entry(Who::Other, 1)];
        assert_eq!(parse_list(&list), Some(expected));
        for bad in [&list[..3], &list[..11], &[1, 0, 0, 0], &[list.as_slice(), &bytes(3, 0, 0)].concat()] {
            assert_eq!(parse_list(bad), None);
        }
    }
}
