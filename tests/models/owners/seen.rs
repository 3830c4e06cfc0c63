//! The store at one moment, and a user's rights by the kernel at that moment.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::Access;

use super::image::backing_file;
use super::people::Person;

/// A regular file.
#[derive(Clone, Debug)]
pub(crate) struct SeenFile {
    /// The file's identity, under any name: inode numbers alone are reused.
    pub(crate) inode: u64,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
    pub(crate) has_list: bool,
    pub(crate) bytes: Rc<Vec<u8>>,
    /// The file of the store that its header names.
    pub(crate) backing: Option<PathBuf>,
}

/// A directory.
#[derive(Clone, Debug)]
pub(crate) struct SeenDirectory {
    pub(crate) uid: u32,
    pub(crate) mode: u32,
    pub(crate) has_list: bool,
}

/// All files, by path, without chainfs' own.
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

/// For repeated snapshots: a file that certainly has not changed is not read again.
#[derive(Debug, Default)]
pub(crate) struct Looker(RefCell<HashMap<u64, (Stamp, SeenFile)>>);

/// When a file was last changed, in any way, and its size.
type Stamp = (i64, i64, u64);

/// The granularity of the kernel's clock: two changes of one file within it have one time.
const TICK: Duration = Duration::from_millis(20);

impl Looker {
    pub(crate) fn look(&self, root: &Path) -> Seen {
        let mut seen = Seen::default();
        self.directory(&mut seen, root, Path::new(""));
        let named = |(path, file): (&PathBuf, &SeenFile)| {
            let name = backing_file(path, &file.bytes)?;
            Some((path.clone(), seen.follow(root, path.parent()?, &name)?))
        };
        let named: Vec<(PathBuf, PathBuf)> = seen.files.iter().filter_map(named).collect();
        for (path, backing) in named {
            seen.files.get_mut(&path).expect("a file").backing = Some(backing);
        }
        seen
    }

    fn directory(&self, seen: &mut Seen, root: &Path, directory: &Path) {
        let at = root.join(directory);
        let found = fs::metadata(&at).expect("a directory");
        let (uid, mode, has_list_too) = (found.uid(), found.mode() & 0o7777, has_list(&at));
        seen.directories.insert(directory.to_path_buf(), SeenDirectory { uid, mode, has_list: has_list_too });
        for entry in fs::read_dir(&at).expect("a directory") {
            let entry = entry.expect("an entry");
            let path = directory.join(entry.file_name());
            let (at, kind) = (entry.path(), entry.file_type().expect("its type"));
            if path == Path::new(".chainfs") {
                continue;
            }
            if kind.is_dir() {
                self.directory(seen, root, &path);
            } else if kind.is_symlink() {
                seen.links.insert(path, fs::read_link(&at).expect("a link"));
            } else {
                let file = self.file(&at);
                seen.files.insert(path, file);
            }
        }
    }

    fn file(&self, at: &Path) -> SeenFile {
        let found = fs::metadata(at).expect("a file");
        let (inode, stamp) = (identity(&found), (found.ctime(), found.ctime_nsec(), found.size()));
        if let Some((_, kept)) = self.0.borrow().get(&inode).filter(|(known, _)| *known == stamp) {
            return kept.clone();
        }
        let file = SeenFile {
            inode,
            uid: found.uid(),
            gid: found.gid(),
            mode: found.mode() & 0o7777,
            has_list: has_list(at),
            bytes: Rc::new(fs::read(at).expect("a file")),
            backing: None,
        };
        let changed = UNIX_EPOCH
            + Duration::new(
                found.ctime().cast_unsigned(),
                u32::try_from(found.ctime_nsec()).unwrap_or_default(),
            );
        if SystemTime::now().duration_since(changed).is_ok_and(|age| age > TICK) {
            self.0.borrow_mut().insert(inode, (stamp, file.clone()));
        }
        file
    }
}

impl Seen {
    /// The file that a name leads to from a directory, all links followed.
    fn follow(&self, root: &Path, directory: &Path, name: &Path) -> Option<PathBuf> {
        let parts =
            |path: &Path| path.components().map(|part| part.as_os_str().to_owned()).rev().collect::<Vec<_>>();
        let (mut at, mut left, mut links) = (directory.to_path_buf(), parts(name), 0);
        if name.is_absolute() {
            (at, left) = (PathBuf::new(), parts(name.strip_prefix(root).ok()?));
        }
        while let Some(part) = left.pop() {
            match Path::new(&part).components().next()? {
                Component::ParentDir if !at.pop() => return None,
                Component::Normal(part) => at.push(part),
                _ => continue,
            }
            if let Some(target) = self.links.get(&at) {
                links += 1;
                let beneath = target.strip_prefix(root).ok();
                if links > 20 || (target.is_absolute() && beneath.is_none()) {
                    return None;
                }
                at = beneath
                    .map_or_else(|| at.parent().unwrap_or(Path::new("")).to_path_buf(), |_| PathBuf::new());
                left.extend(parts(beneath.unwrap_or(target)));
            } else if !left.is_empty() && !self.directories.contains_key(&at) {
                return None;
            }
        }
        self.files.contains_key(&at).then_some(at)
    }

    /// Where a file is that was at `path`: there, if it has that name still.
    pub(crate) fn place_of(&self, path: &Path, inode: u64) -> Option<&PathBuf> {
        let same = self.files.get_key_value(path).filter(|(_, file)| file.inode == inode);
        same.map(|(path, _)| path).or_else(|| self.path_of(inode))
    }

    /// Whether a file has several names.
    pub(crate) fn is_linked(&self, path: &Path) -> bool {
        let inode = self.files.get(path).map(|file| file.inode);
        self.files.values().filter(|file| Some(file.inode) == inode).count() > 1
    }

    /// The path of a file by its inode.
    pub(crate) fn path_of(&self, inode: u64) -> Option<&PathBuf> {
        self.files.iter().find(|(_, file)| file.inode == inode).map(|(path, _)| path)
    }

    /// Those that name `path` as their backing file.
    pub(crate) fn overlays_of(&self, path: &Path) -> Vec<&PathBuf> {
        let is_it = |other: &Path| {
            self.files.get(other).map(|file| file.inode) == self.files.get(path).map(|f| f.inode)
        };
        let names = self.files.iter().filter(|(_, file)| file.backing.as_deref().is_some_and(is_it));
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

/// The kernel's answers for a user.
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
            let answers =
                person.may_all(&paths.iter().map(|path| root.join(path)).collect::<Vec<_>>(), access);
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
