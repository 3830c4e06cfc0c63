//! The store as it is at one moment, and what the kernel lets somebody do with it then.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use rustix::fs::Access;

use super::image::backing;
use super::people::Person;

/// A regular file.
#[derive(Clone, Debug)]
pub(crate) struct SeenFile {
    /// Which file it is, by whatever name: inode numbers alone come again.
    pub(crate) inode: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
    pub(crate) has_list: bool,
    pub(crate) bytes: Vec<u8>,
    /// The file of the store that its header names.
    pub(crate) backing: Option<PathBuf>,
}

/// A directory.
#[derive(Clone, Debug)]
pub(crate) struct SeenDirectory {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
    pub(crate) has_list: bool,
}

/// Everything, by path; what chainfs keeps for itself is left out.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    pub(crate) files: BTreeMap<PathBuf, SeenFile>,
    pub(crate) directories: BTreeMap<PathBuf, SeenDirectory>,
    pub(crate) links: BTreeMap<PathBuf, PathBuf>,
}

fn identity(found: &fs::Metadata) -> u64 {
    let birth = found.created().ok().and_then(|birth| birth.duration_since(UNIX_EPOCH).ok());
    found.ino() ^ birth.map_or(0, |birth| (birth.as_nanos() as u64).rotate_left(20))
}

fn has_list(path: &Path) -> bool {
    rustix::fs::getxattr(path, "system.posix_acl_access", &mut [0_u8; 256][..]).is_ok()
}

impl Seen {
    pub(crate) fn of(root: &Path) -> Self {
        let mut seen = Self::default();
        seen.look(root, Path::new(""));
        for (path, file) in &mut seen.files {
            file.backing = backing(root, path, &file.bytes);
        }
        seen
    }

    fn look(&mut self, root: &Path, directory: &Path) {
        let at = root.join(directory);
        let found = fs::metadata(&at).expect("a directory");
        let (uid, gid, mode, has_list_too) = (found.uid(), found.gid(), found.mode() & 0o7777, has_list(&at));
        self.directories.insert(directory.to_path_buf(), SeenDirectory { uid, gid, mode, has_list: has_list_too });
        for entry in fs::read_dir(&at).expect("a directory") {
            let entry = entry.expect("an entry");
            let path = directory.join(entry.file_name());
            let (at, kind) = (entry.path(), entry.file_type().expect("its type"));
            if path == Path::new(".chainfs") {
                continue;
            }
            if kind.is_dir() {
                self.look(root, &path);
            } else if kind.is_symlink() {
                self.links.insert(path, fs::read_link(&at).expect("a link"));
            } else {
                let found = fs::metadata(&at).expect("a file");
                let file = SeenFile {
                    inode: identity(&found),
                    uid: found.uid(),
                    gid: found.gid(),
                    mode: found.mode() & 0o7777,
                    has_list: has_list(&at),
                    bytes: fs::read(&at).expect("a file"),
                    backing: None,
                };
                self.files.insert(path, file);
            }
        }
    }

    /// The path of a file by its inode.
    pub(crate) fn path_of(&self, inode: u64) -> Option<&PathBuf> {
        self.files.iter().find(|(_, file)| file.inode == inode).map(|(path, _)| path)
    }

    /// Those that name `path` as their backing file.
    pub(crate) fn overlays_of(&self, path: &Path) -> Vec<&PathBuf> {
        let names = self.files.iter().filter(|(_, file)| file.backing.as_deref() == Some(path));
        names.map(|(overlay, _)| overlay).collect()
    }

    /// All names of a directory, links and directories as well, each with its inode where it is a file.
    pub(crate) fn names(&self) -> BTreeMap<PathBuf, u64> {
        let files = self.files.iter().map(|(path, file)| (path.clone(), file.inode));
        let others = self.links.keys().chain(self.directories.keys());
        files.chain(others.map(|path| (path.clone(), 0))).collect()
    }

    /// The directories on the way to a path, the root first.
    pub(crate) fn way(&self, path: &Path) -> Vec<&SeenDirectory> {
        path.ancestors().skip(1).filter_map(|directory| self.directories.get(directory)).collect()
    }
}

/// What the kernel lets somebody do.
#[derive(Clone, Debug, Default)]
pub(crate) struct May {
    pub(crate) read: BTreeSet<PathBuf>,
    pub(crate) write: BTreeSet<PathBuf>,
    /// Directories in which names may be made and, where they are not sticky, taken away.
    pub(crate) change: BTreeSet<PathBuf>,
    pub(crate) search: BTreeSet<PathBuf>,
}

impl May {
    pub(crate) fn of(person: &Person, root: &Path, seen: &Seen) -> Self {
        let ask = |paths: Vec<PathBuf>, access: Access| -> BTreeSet<PathBuf> {
            let answers = person.may_all(&paths.iter().map(|path| root.join(path)).collect::<Vec<_>>(), access);
            paths.into_iter().zip(answers).filter(|(_, may)| *may).map(|(path, _)| path).collect()
        };
        let files = || seen.files.keys().cloned().collect();
        let directories = || seen.directories.keys().cloned().collect();
        Self {
            read: ask(files(), Access::READ_OK),
            write: ask(files(), Access::WRITE_OK),
            change: ask(directories(), Access::WRITE_OK | Access::EXEC_OK),
            search: ask(directories(), Access::EXEC_OK),
        }
    }
}
