//! Confinement: files are only opened beneath a root.
//!
//! Every path from an image header goes through [`Root`]. The kernel resolves it with
//! `openat2(RESOLVE_BENEATH)`: neither `..` nor a symbolic link leads out, even if the directory changes
//! between a check and the open. Only regular files are ever opened.

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{self, CWD, Dir, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};

use super::backend::{DirEntry, EntryKind, MountPoints};
use super::descriptors::with_descriptor;
use super::mountinfo::{MountEntry, mounts};
use super::object::{Identity, ObjectStat};

/// A directory beneath which files may be opened.
#[derive(Debug)]
pub(super) struct Root {
    directory: OwnedFd,
    given: PathBuf,
    canonical: PathBuf,
}

/// The type under which the kernel lists mounts of chainfs.
pub const OWN_KIND: &str = "fuse.chainfs";
/// Attempts at an open that races with renames.
const RESOLVE_ATTEMPTS: usize = 1000;

const BENEATH: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);

impl Root {
    /// Opens the directory `path` and follows symbolic links, because the user named it.
    pub(super) fn open(path: &Path) -> Result<Self> {
        let fail = |error: std::io::Error| Error::io(format!("opening directory {}", path.display()), error);
        let canonical = path.canonicalize().map_err(fail)?;
        let given = std::path::absolute(path).map_err(fail)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            fs::openat(CWD, &canonical, flags, Mode::empty()).map_err(|error| fail(error.into()))?;
        // Known now: later it would seem that there are no images.
        let tried = fs::openat2(&directory, ".", OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), BENEATH);
        if matches!(tried, Err(Errno::NOSYS | Errno::PERM)) {
            return Err(without_openat2());
        }
        Ok(Self { directory, given, canonical })
    }

    /// The directory as the user gave it, made absolute.
    pub(super) fn given(&self) -> &Path {
        &self.given
    }

    /// The directory without symbolic links.
    pub(super) fn canonical(&self) -> &Path {
        &self.canonical
    }

    /// Opens a regular file for reading. Errors: `NotFound`, `Escape` and `Io`.
    pub(super) fn open_file(&self, path: &Path) -> Result<OwnedFd> {
        self.open_regular(path, OFlags::RDONLY)
    }

    /// Opens a regular file for reading and writing, without creating or truncating it. Additional errors:
    /// `Denied` and `ReadOnly`.
    pub(super) fn open_file_for_writing(&self, path: &Path) -> Result<OwnedFd> {
        self.open_regular(path, OFlags::RDWR)
    }

    fn open_regular(&self, path: &Path, access: OFlags) -> Result<OwnedFd> {
        // Only regular files are opened: opening a FIFO would block or wake its writer, and opening a device
        // can have side effects. The check after the open is the reliable one.
        if !self.stat(path)?.is_file() {
            return Err(not_a_file(path));
        }
        let file = self.open_with(path, access | OFlags::NONBLOCK | OFlags::NOCTTY)?;
        if ObjectStat::of(&file)?.is_file() { Ok(file) } else { Err(not_a_file(path)) }
    }

    /// Attributes of the file at `path`; symbolic links are followed within the root.
    pub(super) fn stat(&self, path: &Path) -> Result<ObjectStat> {
        ObjectStat::of(&self.open_with(path, OFlags::PATH)?)
    }

    /// The descriptor of the root itself.
    pub(super) fn descriptor(&self) -> &OwnedFd {
        &self.directory
    }

    /// The identity of the file at `path`; symbolic links are followed within the root.
    pub(super) fn identify(&self, path: &Path) -> Result<Identity> {
        Identity::of(&self.open_with(path, OFlags::PATH)?)
    }

    pub(super) fn open_with(&self, path: &Path, flags: OFlags) -> Result<OwnedFd> {
        let open = |resolve| self.resolve(path, flags | OFlags::CLOEXEC, resolve);
        // S5: no request goes to the daemon's own mount.
        // On this file system first: another one may be this daemon's own mount, where a request would wait
        // for this thread.
        let found = match open(BENEATH | ResolveFlags::NO_XDEV) {
            Err(Errno::XDEV) => match self.crossing(path)? {
                Some(resolve) => {
                    open(resolve).map_err(|error| if error == Errno::LOOP { Errno::XDEV } else { error })
                }
                None => return Err(in_own_mount(path)),
            },
            found => found,
        };
        match found {
            Ok(fd) => Ok(fd),
            Err(Errno::XDEV) => Err(escapes(path)),
            Err(Errno::NOSYS) => Err(without_openat2()),
            Err(Errno::AGAIN) => Err(Error::new(
                ErrorKind::Busy,
                format!("{} cannot be opened now: another process holds a lease on it", path.display()),
            )),
            Err(error) => Err(Error::io(format!("opening {}", path.display()), error)),
        }
    }

    fn resolve(&self, path: &Path, flags: OFlags, resolve: ResolveFlags) -> rustix::io::Result<OwnedFd> {
        let mut found = Err(Errno::AGAIN);
        for _ in 0..RESOLVE_ATTEMPTS {
            found = with_descriptor(|| fs::openat2(&self.directory, path, flags, Mode::empty(), resolve));
            // EAGAIN: a rename raced with the resolution of "..", and the kernel could not prove that the
            // path stays inside. It also means a lease (of a file server), which may be held for long.
            if !matches!(found, Err(Errno::AGAIN | Errno::INTR)) {
                break;
            }
        }
        found
    }

    /// The resolve flags for a path that leads to another file system; `None` if that is a mount of chainfs.
    /// If a mount of chainfs is beneath the root, no symbolic link is followed, because it could lead there.
    fn crossing(&self, path: &Path) -> Result<Option<ResolveFlags>> {
        // A mount over the root itself does not matter: the root's descriptor is below it.
        let is_inside = |mount: &MountEntry| {
            mount.kind == OWN_KIND
                && mount.directory != self.canonical
                && mount.directory.starts_with(&self.canonical)
        };
        let inside: Vec<MountEntry> = mounts()?.into_iter().filter(is_inside).collect();
        if inside.is_empty() {
            return Ok(Some(BENEATH));
        }
        let place = self.canonical.join(path);
        let is_own = inside.iter().any(|mount| place.starts_with(&mount.directory));
        Ok((!is_own).then_some(BENEATH | ResolveFlags::NO_SYMLINKS))
    }

    /// Whether `path` is a directory, with no symbolic link in the path.
    pub(super) fn is_real_directory(&self, path: &Path) -> bool {
        self.open_real(path, OFlags::DIRECTORY).is_ok()
    }

    /// The target of the symbolic link `path`; no other part of the path may be a link. `None` if it is no
    /// link.
    pub(super) fn link_target(&self, path: &Path) -> Option<PathBuf> {
        let link = self.open_real(path, OFlags::NOFOLLOW).ok()?;
        let target = fs::readlinkat(&link, "", Vec::new()).ok()?;
        Some(PathBuf::from(OsStr::from_bytes(target.to_bytes())))
    }

    /// Attributes of `path` itself; a final symbolic link is not followed.
    pub(super) fn stat_itself(&self, path: &Path) -> Result<ObjectStat> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let file = self.open_real(path, OFlags::NOFOLLOW);
        ObjectStat::of(&file.map_err(|error| Error::io(format!("opening {}", path.display()), error))?)
    }

    /// Opens a path with `O_PATH`; no part of it may be a symbolic link. Other file systems are entered, but
    /// no mount of chainfs.
    fn open_real(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        match self.resolve(path, flags, resolve | ResolveFlags::NO_XDEV) {
            Err(Errno::XDEV) if matches!(self.crossing(path), Ok(Some(_))) => {
                self.resolve(path, flags, resolve)
            }
            found => found,
        }
    }

    /// Opens a sub-directory for listing and watching. `None` if it is the root of another mount, which
    /// is not to be entered: no request goes to that mount, so it may be this daemon's own.
    pub(super) fn open_directory(&self, path: &Path, mounts: MountPoints) -> Result<Option<OwnedFd>> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        let resolve = match mounts {
            MountPoints::Enter => resolve,
            MountPoints::Skip | MountPoints::SkipOwn => resolve | ResolveFlags::NO_XDEV,
        };
        match with_descriptor(|| fs::openat2(&self.directory, path, flags, Mode::empty(), resolve)) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::XDEV) if mounts != MountPoints::Enter => Ok(None),
            Err(error) => Err(Error::io(format!("opening directory {}", path.display()), error)),
        }
    }

    /// Entries of a directory opened by [`Root::open_directory`], without `.` and `..`, sorted by name.
    pub(super) fn list(directory: &OwnedFd) -> Result<Vec<DirEntry>> {
        let fail = |error: Errno| Error::io("listing a directory", error);
        let mut entries = Vec::new();
        for entry in with_descriptor(|| Dir::read_from(directory)).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            if name == "." || name == ".." {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    match fs::statat(directory, name, fs::AtFlags::SYMLINK_NOFOLLOW) {
                        Ok(stat) => kind_of(FileType::from_raw_mode(stat.st_mode)),
                        Err(_) => continue, // removed meanwhile
                    }
                }
                known => kind_of(known),
            };
            entries.push(DirEntry { name: name.to_os_string(), kind });
        }
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(entries)
    }

    /// Opens the regular file `name` of `directory` without following a link. `None` if it is missing or no
    /// longer a regular file.
    pub(super) fn open_entry(directory: &OwnedFd, name: &OsStr) -> Result<Option<OwnedFd>> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match with_descriptor(|| fs::openat(directory, name, flags, Mode::empty())) {
            Ok(file) => Ok(ObjectStat::of(&file)?.is_file().then_some(file)),
            Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => Ok(None),
            Err(error) => Err(Error::io("opening the file", error)),
        }
    }

    /// The magic number (statfs(2)) of the file system that holds this root.
    pub(super) fn file_system(&self) -> Result<u64> {
        let stat = fs::fstatfs(&self.directory)
            .map_err(|error| Error::io("reading the file system's type", error))?;
        Ok(stat.f_type.cast_unsigned() & 0xFFFF_FFFF)
    }

    /// The file system that holds this root, for `df`.
    pub(super) fn statvfs(&self) -> Result<fs::StatVfs> {
        // By descriptor: this daemon's mount may cover the path.
        fs::fstatvfs(&self.directory).map_err(|error| Error::io("reading the free space", error))
    }
}

fn kind_of(file_type: FileType) -> EntryKind {
    match file_type {
        FileType::RegularFile => EntryKind::File,
        FileType::Directory => EntryKind::Directory,
        FileType::Symlink => EntryKind::Symlink,
        _ => EntryKind::Other,
    }
}

fn without_openat2() -> Error {
    let fact = "openat2 is missing or forbidden; chainfs needs Linux 5.6, and a container, a seccomp filter or a \
                unit that allows it (systemd's RestrictSUIDSGID= does not)";
    Error::new(ErrorKind::Unsupported, fact)
}

fn not_a_file(path: &Path) -> Error {
    Error::new(ErrorKind::Io, format!("{} is not a regular file", path.display()))
}

fn in_own_mount(path: &Path) -> Error {
    let sentence = "leads into a mount of chainfs, which is never entered; name the image itself";
    Error::new(ErrorKind::Io, format!("{} {sentence}", path.display()))
}

fn escapes(path: &Path) -> Error {
    Error::new(ErrorKind::Escape, format!("{} leads out of the store", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, Root) {
        let outer = tempfile::tempdir().unwrap();
        let inner = outer.path().join("store");
        std::fs::create_dir_all(inner.join("sub")).unwrap();
        std::fs::write(outer.path().join("secret"), "secret").unwrap();
        std::fs::write(inner.join("sub/image"), "image").unwrap();
        symlink("../secret", inner.join("out")).unwrap();
        symlink(outer.path().join("secret"), inner.join("absolute")).unwrap();
        symlink("sub/image", inner.join("inside")).unwrap();
        let root = Root::open(&inner).unwrap();
        (outer, root)
    }

    #[test]
    fn nothing_outside_the_root_can_be_opened() {
        let (_outer, root) = root();
        for path in ["../secret", "sub/../../secret", "out", "absolute", "/etc/passwd"] {
            assert_eq!(root.open_file(Path::new(path)).unwrap_err().kind(), ErrorKind::Escape, "{path}");
            assert_eq!(
                root.open_file_for_writing(Path::new(path)).unwrap_err().kind(),
                ErrorKind::Escape,
                "{path}"
            );
        }
        assert!(root.open_file(Path::new("inside")).is_ok());
        assert!(root.open_file(Path::new("sub/../sub/image")).is_ok());
    }

    #[test]
    fn only_regular_files_are_opened() {
        let (_outer, root) = root();
        fs::mknodat(CWD, root.canonical().join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        assert!(root.open_file(Path::new("fifo")).is_err());
        assert!(root.open_file(Path::new("sub")).is_err());
        assert!(root.open_file_for_writing(Path::new("fifo")).is_err());
        assert!(root.open_file_for_writing(Path::new("sub")).is_err());
    }

    #[test]
    fn entries_are_listed_by_kind_and_name() {
        let (_outer, root) = root();
        let directory = root.open_directory(Path::new(""), MountPoints::Skip).unwrap().unwrap();
        let names: Vec<_> = Root::list(&directory)
            .unwrap()
            .into_iter()
            .map(|e| (e.name.into_string().unwrap(), e.kind))
            .collect();
        let link = EntryKind::Symlink;
        let expected = [("absolute", link), ("inside", link), ("out", link), ("sub", EntryKind::Directory)];
        assert_eq!(names, expected.map(|(name, kind)| (name.to_string(), kind)));
    }
}
