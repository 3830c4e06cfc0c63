//! Writes a guest's files to the host.
//!
//! Promises: files are written only in directories that were opened or created here. No name from the guest
//! and no copied symbolic link leads elsewhere: each name is a single component, created in an open
//! directory. A file gets its name when it is complete.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{
    self, AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid, XattrFlags,
};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::{ExtendedAttribute, FileAttributes, FileKind};
use crate::store::shown;

/// Which attributes of a file are kept.
#[derive(Clone, Copy, Debug)]
pub(super) struct KeptAttributes {
    /// All permission bits, attributes and, where allowed, the owner.
    pub(super) all: bool,
    /// Set-ID bits and file capabilities: kept only by root, and with the owner.
    pub(super) set_id: bool,
    /// The umask for new files.
    pub(super) umask: u16,
}

/// An attribute that could not be kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LostAttributes {
    pub(super) what: String,
    pub(super) why: Errno,
    /// Whether the user requested it.
    pub(super) matters: bool,
}

/// A directory of the host that files are written to.
#[derive(Debug)]
pub(super) struct OutputDirectory(OwnedFd);

const FOLDER: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

impl OutputDirectory {
    /// Opens the directory given by the user; symbolic links are followed.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let opened = fs::openat(CWD, path, FOLDER, Mode::empty());
        opened.map(Self).map_err(|error| Error::io(format!("opening {}", shown(path)), error))
    }

    /// Opens the subdirectory of that name, or creates it; returns it with whether it is new. A file of
    /// another type, or a symbolic link to a directory, is an error.
    pub(super) fn enter(&self, name: &[u8]) -> Result<(Self, bool)> {
        let is_new = match fs::mkdirat(&self.0, name, Mode::RWXU) {
            Ok(()) => true,
            Err(Errno::EXIST) => false,
            Err(error) => return Err(failed("creating the directory", error)),
        };
        match fs::openat(&self.0, name, FOLDER | OFlags::NOFOLLOW, Mode::empty()) {
            Ok(opened) => Ok((Self(opened), is_new)),
            Err(Errno::NOTDIR | Errno::LOOP) => {
                let fact = "a file that is not a directory has this name; remove it first";
                Err(Error::new(ErrorKind::Exists, fact))
            }
            Err(error) => Err(failed("opening the directory", error)),
        }
    }

    /// Opens the directory at a path that was created here.
    fn below(&self, path: &Path) -> Result<Self> {
        if path.as_os_str().is_empty() {
            return self.0.try_clone().map(Self).map_err(|error| Error::io("opening the directory", error));
        }
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let opened = fs::openat2(&self.0, path, FOLDER, Mode::empty(), resolve);
        opened.map(Self).map_err(|error| failed("opening the directory of its first link", error))
    }

    /// Creates a regular file, which `fill` writes. Replaces an existing file, unless that is a directory.
    pub(super) fn file(
        &self,
        name: &[u8],
        found: &FileAttributes,
        extended: &[ExtendedAttribute],
        keep: KeptAttributes,
        fill: impl FnOnce(&File) -> Result<()>,
    ) -> Result<Vec<LostAttributes>> {
        self.placed(name, |draft| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = fs::openat(&self.0, draft, flags, Mode::RUSR | Mode::WUSR);
            let made = File::from(made.map_err(|error| failed("creating the file", error))?);
            fill(&made)?;
            Ok(finish(made.as_fd(), found, extended, keep))
        })
    }

    /// Creates a symbolic link.
    pub(super) fn link(
        &self,
        name: &[u8],
        target: &[u8],
        found: &FileAttributes,
        extended: &[ExtendedAttribute],
        keep: KeptAttributes,
    ) -> Result<Vec<LostAttributes>> {
        self.placed(name, |draft| {
            fs::symlinkat(target, &self.0, draft)
                .map_err(|error| failed("creating the symbolic link", error))?;
            Ok(self.finish_at(draft, found, extended, keep, false))
        })
    }

    /// Creates a device, FIFO or socket.
    pub(super) fn special(
        &self,
        name: &[u8],
        found: &FileAttributes,
        extended: &[ExtendedAttribute],
        keep: KeptAttributes,
    ) -> Result<Vec<LostAttributes>> {
        let kind = match found.kind {
            FileKind::CharDevice => FileType::CharacterDevice,
            FileKind::BlockDevice => FileType::BlockDevice,
            FileKind::Socket => FileType::Socket,
            FileKind::Fifo | FileKind::File | FileKind::Directory | FileKind::Symlink => FileType::Fifo,
        };
        self.placed(name, |draft| {
            let device = fs::makedev(found.device.0, found.device.1);
            let made = fs::mknodat(&self.0, draft, kind, Mode::RUSR | Mode::WUSR, device);
            made.map_err(|error| failed("creating it", error))?;
            Ok(self.finish_at(draft, found, extended, keep, true))
        })
    }

    /// Creates a hard link to a file that was created here, below `root`.
    pub(super) fn hard_link(&self, name: &[u8], root: &Self, first: &Path) -> Result<()> {
        let parent = root.below(first.parent().unwrap_or(Path::new("")))?;
        let old = first.file_name().unwrap_or_default();
        self.placed(name, |draft| {
            fs::linkat(&parent.0, old, &self.0, draft, AtFlags::empty())
                .map_err(|error| failed("linking it to its first name", error))
        })
    }

    /// Sets the source's attributes and times on the directory itself.
    pub(super) fn finish(
        &self,
        found: &FileAttributes,
        extended: &[ExtendedAttribute],
        keep: KeptAttributes,
    ) -> Vec<LostAttributes> {
        finish(self.0.as_fd(), found, extended, keep)
    }

    /// Creates a file under a temporary name, and renames it when it is complete.
    fn placed<T>(&self, name: &[u8], make: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        static DRAFTS: AtomicU64 = AtomicU64::new(0);
        // A temporary name that exists already is skipped.
        let draft = loop {
            let number = DRAFTS.fetch_add(1, Ordering::Relaxed);
            let draft = PathBuf::from(format!(".chainfs-{}-{number}", std::process::id()));
            if fs::statat(&self.0, &draft, AtFlags::SYMLINK_NOFOLLOW).is_err() {
                break draft;
            }
        };
        let placed = make(&draft).and_then(|made| {
            let renamed = fs::renameat(&self.0, &draft, &self.0, name);
            renamed.map(|()| made).map_err(|error| failed("renaming it", error))
        });
        // After a rename, the temporary name exists only if both names were links of one file.
        let _ = fs::unlinkat(&self.0, &draft, AtFlags::empty());
        placed
    }

    /// Like [`finish`], for a file that cannot be opened.
    fn finish_at(
        &self,
        name: &Path,
        found: &FileAttributes,
        extended: &[ExtendedAttribute],
        keep: KeptAttributes,
        has_mode: bool,
    ) -> Vec<LostAttributes> {
        let mut lost = Vec::new();
        let mut is_owned = false;
        if keep.all {
            let (uid, gid) = (Uid::from_raw(found.uid), Gid::from_raw(found.gid));
            let owned = fs::chownat(&self.0, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW);
            is_owned = owned.is_ok();
            note_owner(&mut lost, owned);
            // No system call takes a directory and a name. The name is temporary, and not followed.
            let path = PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd())).join(name);
            set_extended(&mut lost, extended, keep, is_owned, |name, value| {
                fs::lsetxattr(&path, name, value, XattrFlags::empty())
            });
        }
        if has_mode {
            // This process has just created the temporary name: it is not a symbolic link.
            note(
                &mut lost,
                "permission bits",
                fs::chmodat(&self.0, name, mode(found, keep, is_owned), AtFlags::empty()),
            );
        }
        note(&mut lost, "times", fs::utimensat(&self.0, name, &times(found), AtFlags::SYMLINK_NOFOLLOW));
        lost
    }
}

/// Sets owner, attributes, permission bits and times of an open file or directory, in an order in which no
/// step resets an earlier one.
fn finish(
    fd: std::os::fd::BorrowedFd<'_>,
    found: &FileAttributes,
    extended: &[ExtendedAttribute],
    keep: KeptAttributes,
) -> Vec<LostAttributes> {
    let mut lost = Vec::new();
    let mut is_owned = false;
    if keep.all {
        let owned = fs::fchown(fd, Some(Uid::from_raw(found.uid)), Some(Gid::from_raw(found.gid)));
        is_owned = owned.is_ok();
        note_owner(&mut lost, owned);
        set_extended(&mut lost, extended, keep, is_owned, |name, value| {
            fs::fsetxattr(fd, name, value, XattrFlags::empty())
        });
    }
    note(&mut lost, "permission bits", fs::fchmod(fd, mode(found, keep, is_owned)));
    note(&mut lost, "times", fs::futimens(fd, &times(found)));
    lost
}

fn set_extended(
    lost: &mut Vec<LostAttributes>,
    extended: &[ExtendedAttribute],
    keep: KeptAttributes,
    is_owned: bool,
    set: impl Fn(&std::ffi::OsStr, &[u8]) -> rustix::io::Result<()>,
) {
    for attribute in extended {
        // A file capability gives rights to the user who runs the file, like a set-ID bit.
        if attribute.name == b"security.capability" && !(keep.set_id && is_owned) {
            continue;
        }
        let name = std::ffi::OsStr::from_bytes(&attribute.name);
        if let Err(why) = set(name, &attribute.value) {
            let what = format!("the attribute {}", shown(Path::new(name)));
            lost.push(LostAttributes { what, why, matters: attribute.name.starts_with(b"user.") });
        }
    }
}

fn note_owner(lost: &mut Vec<LostAttributes>, result: rustix::io::Result<()>) {
    match result {
        // Who is not root gives nothing away, and knows it.
        Err(Errno::PERM) if !rustix::process::geteuid().is_root() => {}
        Err(why) => lost.push(LostAttributes { what: "the owner".to_owned(), why, matters: false }),
        Ok(()) => {}
    }
}

fn note(lost: &mut Vec<LostAttributes>, what: &str, result: rustix::io::Result<()>) {
    if let Err(why) = result {
        lost.push(LostAttributes { what: what.to_owned(), why, matters: true });
    }
}

fn mode(found: &FileAttributes, keep: KeptAttributes, is_owned: bool) -> Mode {
    let bits = match (keep.all, keep.set_id && is_owned) {
        (true, true) => found.mode & 0o7777,
        (true, false) => found.mode & 0o1777,
        (false, _) => found.mode & 0o777 & !keep.umask,
    };
    Mode::from_raw_mode(bits.into())
}

fn times(found: &FileAttributes) -> Timestamps {
    let time = |at: crate::guest::Time| Timespec { tv_sec: at.seconds, tv_nsec: at.nanoseconds.into() };
    Timestamps { last_access: time(found.accessed), last_modification: time(found.modified) }
}

fn failed(what: &str, error: Errno) -> Error {
    Error::io(what, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Time;
    use std::os::unix::fs::symlink;

    fn attributes(kind: FileKind) -> FileAttributes {
        let time = Time { seconds: 1_000_000, nanoseconds: 5 };
        let (accessed, modified, changed) = (time, time, time);
        let device = (0, 0);
        FileAttributes {
            kind,
            mode: 0o6754,
            uid: 7,
            gid: 8,
            size: 1,
            blocks: 0,
            links: 1,
            device,
            accessed,
            modified,
            changed,
            created: None,
        }
    }

    #[test]
    fn an_existing_symbolic_link_is_replaced_and_never_followed() {
        let place = tempfile::tempdir().unwrap();
        let (inside, outside) = (place.path().join("in"), place.path().join("out"));
        for directory in [&inside, &outside] {
            std::fs::create_dir(directory).unwrap();
        }
        std::fs::write(outside.join("passwd"), "mine").unwrap();
        symlink(&outside, inside.join("a")).unwrap();
        symlink(outside.join("passwd"), inside.join("b")).unwrap();
        let folder = OutputDirectory::open(&inside).unwrap();
        let keep = KeptAttributes { all: false, set_id: false, umask: 0o022 };
        assert_eq!(folder.enter(b"a").unwrap_err().kind(), ErrorKind::Exists);
        let found = attributes(FileKind::File);
        let lost = folder.file(b"b", &found, &[], keep, |file| {
            std::io::Write::write_all(&mut &*file, b"the guest's").map_err(|error| Error::io("", error))
        });
        assert!(lost.unwrap().is_empty());
        assert_eq!(std::fs::read_to_string(outside.join("passwd")).unwrap(), "mine");
        assert_eq!(std::fs::read_to_string(inside.join("b")).unwrap(), "the guest's");
        let mode = std::os::unix::fs::PermissionsExt::mode(
            &std::fs::metadata(inside.join("b")).unwrap().permissions(),
        );
        assert_eq!(mode & 0o7777, 0o754, "no set-ID bits");
        // A failure leaves the existing file, and no temporary file.
        let refused = folder.file(b"b", &found, &[], keep, |_| Err(Error::new(ErrorKind::Io, "")));
        assert!(refused.is_err());
        assert_eq!(std::fs::read_to_string(inside.join("b")).unwrap(), "the guest's");
        folder.hard_link(b"c", &folder, Path::new("b")).unwrap();
        folder.hard_link(b"c", &folder, Path::new("b")).unwrap();
        assert_eq!(folder.hard_link(b"d", &folder, Path::new("a/passwd")).unwrap_err().kind(), ErrorKind::Io);
        let mut names: Vec<_> =
            std::fs::read_dir(&inside).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        assert_eq!(names, ["a", "b", "c"]);
    }

    #[test]
    fn a_temporary_name_that_exists_is_not_touched() {
        let place = tempfile::tempdir().unwrap();
        let folder = OutputDirectory::open(place.path()).unwrap();
        let theirs = |number: u64| place.path().join(format!(".chainfs-{}-{number}", std::process::id()));
        (0..40).for_each(|number| std::fs::write(theirs(number), "theirs").unwrap());
        let make = |draft: &Path| {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            fs::openat(&folder.0, draft, flags, Mode::RUSR)
                .map(drop)
                .map_err(|error| failed("making it", error))
        };
        for _ in 0..30 {
            folder.placed(b"made", make).unwrap();
        }
        assert!((0..40).all(|number| std::fs::read(theirs(number)).is_ok_and(|bytes| bytes == b"theirs")));
    }
}
