//! Small text files of the host: the definitions that other programs keep in directories of their own.
//!
//! Only files count that no other user could have written: they belong to root or to this process's user, and
//! only their owner may write them. Symbolic links are not followed. Nothing here waits: what is no regular
//! file is not opened.

use std::fs::{self, File, Metadata};
use std::io::Read as _;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// Maximum length of a file, in bytes; longer ones are left out.
const MAX_LEN: u64 = 4 << 20;
/// Maximum number of files of one directory and its sub-directories.
const MAX_FILES: usize = 20_000;

/// A file in one version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostFileVersion {
    inode: (u64, u64),
    len: u64,
    changed: (i64, i64),
}

impl HostFileVersion {
    /// When it was written, in seconds and nanoseconds since 1970.
    pub fn written(&self) -> (i64, i64) {
        self.changed
    }

    fn of(found: &Metadata) -> Self {
        Self {
            inode: (found.dev(), found.ino()),
            len: found.len(),
            changed: (found.ctime(), found.ctime_nsec()),
        }
    }
}

/// The files with an extension in a directory and in its sub-directories, not further down, in order.
pub fn host_files(directory: &Path, extension: &str) -> Vec<(PathBuf, HostFileVersion)> {
    let mut found = Vec::new();
    let mut below = Vec::new();
    collect(directory, extension, &mut found, Some(&mut below));
    for directory in below {
        collect(&directory, extension, &mut found, None);
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

fn collect(
    directory: &Path,
    extension: &str,
    found: &mut Vec<(PathBuf, HostFileVersion)>,
    mut below: Option<&mut Vec<PathBuf>>,
) {
    let Ok(entries) = fs::read_dir(directory) else { return };
    let mut entries: Vec<_> = entries.flatten().take(MAX_FILES).collect();
    entries.sort_by_key(fs::DirEntry::ino);
    for entry in entries {
        let Ok(kind) = entry.file_type() else { continue };
        let path = entry.path();
        if kind.is_dir() {
            if let Some(below) = &mut below {
                below.push(path);
            }
        } else if kind.is_file()
            && path.extension().is_some_and(|own| own.as_bytes() == extension.as_bytes())
            && found.len() < MAX_FILES
            && let Ok(stat) = entry.metadata()
            && is_trusted(&stat)
        {
            found.push((path, HostFileVersion::of(&stat)));
        }
    }
}

/// The text of such a file. `None` if it is not trusted, too long, no text, or gone.
pub fn host_text(path: &Path) -> Option<String> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
    let stat = file.metadata().ok()?;
    if !stat.is_file() || !is_trusted(&stat) {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(MAX_LEN).read_to_end(&mut bytes).ok()?;
    String::from_utf8(bytes).ok()
}

fn is_trusted(stat: &Metadata) -> bool {
    let own = rustix::process::geteuid().as_raw();
    (stat.uid() == 0 || stat.uid() == own) && stat.mode() & 0o022 == 0 && stat.len() < MAX_LEN
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn only_files_that_no_other_user_could_write_are_read() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        fs::create_dir_all(path("sub/deep")).unwrap();
        for (name, mode) in [("a.xml", 0o600), ("open.xml", 0o666), ("sub/b.xml", 0o644), ("c.txt", 0o600)] {
            fs::write(path(name), name).unwrap();
            fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::write(path("sub/deep/d.xml"), "d").unwrap();
        std::os::unix::fs::symlink(path("a.xml"), path("link.xml")).unwrap();
        rustix::fs::mknodat(
            rustix::fs::CWD,
            path("fifo.xml"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR,
            0,
        )
        .unwrap();
        let names: Vec<PathBuf> = host_files(place.path(), "xml").into_iter().map(|(path, _)| path).collect();
        assert_eq!(names, [path("a.xml"), path("sub/b.xml")]);
        assert_eq!(host_text(&path("a.xml")).as_deref(), Some("a.xml"));
        for name in ["open.xml", "link.xml", "fifo.xml", "gone.xml", "sub"] {
            assert_eq!(host_text(&path(name)), None, "{name}");
        }
        assert!(host_files(&path("gone"), "xml").is_empty());
    }
}
