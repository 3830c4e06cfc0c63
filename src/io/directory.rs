//! Changes of names in a store: create, link, rename, remove, and sync.
//!
//! Every change of a name goes through a [`Directory`], so that tests can simulate one.
//! Paths are relative to a root; no symbolic link in them is followed. Between two calls of
//! [`Directory::sync`] a crash of the machine may lose or keep each change independently.

use std::ffi::OsStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{self, AtFlags, Mode, OFlags, RenameFlags, XattrFlags};
use rustix::io::Errno;

use crate::error::{Error, ErrorKind, Result};

use super::backend::MountPoints;
use super::beneath::Root;
use super::descriptors::{Descriptors, with_descriptor};
use super::local::LocalOpenFile;
use super::object::ObjectStat;
use super::{WritableFile, WriteStorage};

/// What becomes of a file that has the new name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Existing {
    /// It is replaced.
    Replace,
    /// It stays, and the rename fails with `Exists`.
    Refuse,
}

/// The operations on names beneath one root.
pub trait Directory: Send + Sync {
    /// Creates a new, empty file; `Exists` if the name exists. It gets owner, mode and extended attributes
    /// (access lists and labels among them) of the file `like`, if given, before any data is written to it.
    /// Its owner may write it even if `like` is read-only.
    fn create(&self, path: &Path, like: Option<&Path>) -> Result<Arc<dyn WriteStorage>>;

    /// Creates a directory, unless it exists.
    fn create_directory(&self, path: &Path) -> Result<()>;

    /// Creates a hard link; `Exists` if the name exists.
    fn link(&self, from: &Path, to: &Path) -> Result<()>;

    /// Renames a file atomically. `existing` says what becomes of a file that has the name already.
    fn rename(&self, from: &Path, to: &Path, existing: Existing) -> Result<()>;

    /// Removes a name.
    fn unlink(&self, path: &Path) -> Result<()>;

    /// Makes all changes of names in the directory `path` durable.
    fn sync(&self, path: &Path) -> Result<()>;
}

/// The names beneath a root of this machine.
pub(super) fn names_beneath(root: &Arc<Root>, descriptors: &Arc<Descriptors>) -> Arc<dyn Directory> {
    Arc::new(RootDirectory { root: Arc::clone(root), descriptors: Arc::clone(descriptors) })
}

/// The names beneath a root of the real file system.
#[derive(Debug)]
struct RootDirectory {
    root: Arc<Root>,
    descriptors: Arc<Descriptors>,
}

impl RootDirectory {
    /// The directory that holds `path`, and the last part of it.
    fn parent<'a>(&self, path: &'a Path) -> Result<(OwnedFd, &'a OsStr)> {
        let name = path
            .file_name()
            .ok_or_else(|| Error::new(ErrorKind::Usage, format!("{} is not a file name", path.display())))?;
        Ok((self.directory(path.parent().unwrap_or(Path::new("")))?, name))
    }

    fn directory(&self, path: &Path) -> Result<OwnedFd> {
        let found = self.root.open_directory(path, MountPoints::Enter)?;
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{} does not exist", path.display())))
    }
}

fn fail(doing: &str, path: &Path, error: Errno) -> Error {
    if error == Errno::EXIST {
        let fact = "exists already; remove it or choose another name";
        return Error::new(ErrorKind::Exists, format!("{} {fact}", path.display()));
    }
    Error::io(format!("{doing} {}", path.display()), error)
}

impl Directory for RootDirectory {
    fn create(&self, path: &Path, like: Option<&Path>) -> Result<Arc<dyn WriteStorage>> {
        let room = self.descriptors.reserve(1)?;
        let (directory, name) = self.parent(path)?;
        // Only the owner has access until owner, mode and attributes are set.
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mode = if like.is_some() { Mode::RUSR | Mode::WUSR } else { Mode::from_raw_mode(0o644) };
        let file = with_descriptor(|| fs::openat(&directory, name, flags, mode));
        let file = file.map_err(|error| fail("creating", path, error))?;
        if let Some(like) = like {
            let resembles = self.root.open_file(like).and_then(|model| resemble(&file, &model, path));
            if let Err(error) = resembles {
                // The new file is empty; the first error is reported.
                let _ = fs::unlinkat(&directory, name, AtFlags::empty());
                return Err(error);
            }
        }
        Ok(WritableFile::new(Arc::new(LocalOpenFile::new(file, path)), room, &Arc::default()))
    }

    fn create_directory(&self, path: &Path) -> Result<()> {
        let (directory, name) = self.parent(path)?;
        match fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(error) => Err(fail("creating directory", path, error)),
        }
    }

    fn link(&self, from: &Path, to: &Path) -> Result<()> {
        let ((old, old_name), (new, new_name)) = (self.parent(from)?, self.parent(to)?);
        fs::linkat(&old, old_name, &new, new_name, AtFlags::empty())
            .map_err(|error| fail("linking", to, error))
    }

    fn rename(&self, from: &Path, to: &Path, existing: Existing) -> Result<()> {
        let ((old, old_name), (new, new_name)) = (self.parent(from)?, self.parent(to)?);
        let flags = match existing {
            Existing::Replace => RenameFlags::empty(),
            Existing::Refuse => RenameFlags::NOREPLACE,
        };
        match fs::renameat_with(&old, old_name, &new, new_name, flags) {
            // Some file systems lack RENAME_NOREPLACE. Link and unlink do the same in two steps.
            Err(Errno::INVAL | Errno::NOSYS) if existing == Existing::Refuse => {
                self.link(from, to)?;
                self.unlink(from)
            }
            done => done.map_err(|error| fail("renaming to", to, error)),
        }
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        let (directory, name) = self.parent(path)?;
        fs::unlinkat(&directory, name, AtFlags::empty()).map_err(|error| fail("removing", path, error))
    }

    fn sync(&self, path: &Path) -> Result<()> {
        let directory = self.directory(path)?;
        fs::fsync(&directory).map_err(|error| fail("syncing", path, error))
    }
}

/// Copies owner, mode and extended attributes of `model` to `file`.
fn resemble(file: &OwnedFd, model: &OwnedFd, path: &Path) -> Result<()> {
    let (stat, now) = (ObjectStat::of(model)?, ObjectStat::of(file)?);
    let owner = (stat.uid != now.uid).then(|| rustix::fs::Uid::from_raw(stat.uid));
    let group = (stat.gid != now.gid).then(|| rustix::fs::Gid::from_raw(stat.gid));
    if owner.is_some() || group.is_some() {
        fs::fchown(file, owner, group).map_err(|error| fail("setting the owner of", path, error))?;
    }
    // A new image is writable by its owner, even if the model is not.
    let write = if stat.mode & 0o222 == 0 { 0o200 } else { 0 };
    fs::fchmod(file, Mode::from_raw_mode(stat.mode & 0o7777 | write))
        .map_err(|error| fail("setting the mode of", path, error))?;
    for name in attribute_names(model).map_err(|error| fail("reading the attributes for", path, error))? {
        let copied = attribute(model, &name)
            .and_then(|value| fs::fsetxattr(file, &*name, &value, XattrFlags::empty()));
        match copied {
            // Security labels are set by the system's policy if this process may not set them.
            Err(Errno::OPNOTSUPP | Errno::NODATA) => {}
            Err(Errno::PERM | Errno::ACCESS) if !name.starts_with("system.") => {
                tracing::debug!("{}: could not set the attribute {name}", path.display());
            }
            done => done.map_err(|error| fail("setting the attributes of", path, error))?,
        }
    }
    Ok(())
}

fn attribute_names(file: impl AsFd) -> rustix::io::Result<Vec<String>> {
    let mut names = vec![0; 64 << 10];
    let len = match fs::flistxattr(&file, names.as_mut_slice()) {
        Ok(len) => len,
        Err(Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error),
    };
    let all = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    Ok(all.filter_map(|name| String::from_utf8(name.to_vec()).ok()).collect())
}

fn attribute(file: impl AsFd, name: &str) -> rustix::io::Result<Vec<u8>> {
    let mut value = vec![0; 64 << 10];
    let len = fs::fgetxattr(&file, name, value.as_mut_slice())?;
    value.truncate(len);
    Ok(value)
}

/// The directory that holds `path`.
pub fn directory_of(path: &Path) -> PathBuf {
    path.parent().unwrap_or(Path::new("")).to_path_buf()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn lab() -> (tempfile::TempDir, Arc<dyn Directory>) {
        let place = tempfile::tempdir().unwrap();
        std::fs::create_dir(place.path().join("sub")).unwrap();
        std::fs::write(place.path().join("sub/a"), "a").unwrap();
        let root = Arc::new(Root::open(place.path()).unwrap());
        let directory = names_beneath(&root, &Descriptors::with_limit(4));
        (place, directory)
    }

    #[test]
    fn names_are_created_and_removed() {
        let (place, directory) = lab();
        let kind = |result: Result<()>| result.unwrap_err().kind();
        directory.link(Path::new("sub/a"), Path::new("b")).unwrap();
        assert_eq!(kind(directory.link(Path::new("sub/a"), Path::new("b"))), ErrorKind::Exists);
        std::fs::write(place.path().join("c"), "c").unwrap();
        assert_eq!(
            kind(directory.rename(Path::new("c"), Path::new("b"), Existing::Refuse)),
            ErrorKind::Exists
        );
        directory.rename(Path::new("c"), Path::new("b"), Existing::Replace).unwrap();
        assert_eq!(std::fs::read(place.path().join("b")).unwrap(), b"c");
        directory.unlink(Path::new("sub/a")).unwrap();
        assert_eq!(kind(directory.unlink(Path::new("sub/a"))), ErrorKind::NotFound);
        directory.sync(Path::new("")).unwrap();
        directory.create_directory(Path::new("sub")).unwrap();
        assert!(directory.create(Path::new("../x"), None).is_err());
    }

    #[test]
    fn a_new_file_gets_the_attributes_of_its_model() {
        let (place, directory) = lab();
        let model = place.path().join("sub/a");
        std::fs::set_permissions(&model, std::fs::Permissions::from_mode(0o640)).unwrap();
        let file = std::fs::File::open(&model).unwrap();
        let has_attributes = fs::fsetxattr(&file, "user.note", b"x", XattrFlags::empty()).is_ok();
        let new = directory.create(Path::new("new"), Some(Path::new("sub/a"))).unwrap();
        new.write_at(0, b"bytes").unwrap();
        let made = std::fs::File::open(place.path().join("new")).unwrap();
        assert_eq!(made.metadata().unwrap().permissions().mode() & 0o7777, 0o640);
        assert_eq!(attribute(&made, "user.note").is_ok(), has_attributes);
        assert_eq!(directory.create(Path::new("new"), None).map(drop).unwrap_err().kind(), ErrorKind::Exists);
    }
}
