//! A read-only backend in memory, for tests: what a store needs at least.
//!
//! Objects are byte vectors by path; a directory is what paths have in common. Versions are tags: numbers
//! that say nothing of time. There are no names to change, no locks and no news. As in an object store, an
//! open object is one version: when another one is put in its place, reads are `Stale`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::error::{Error, ErrorKind, Result};

use super::backend::{
    Backend, DirEntry, EntryKind, MountPoints, NoLocks, ObjectLocks, OpenDirectory, OpenObject, Space,
    WriteObject, stale,
};
use super::object::{Identity, ObjectId, ObjectStat, ObjectVersion, Timestamp};
use super::permissions::Permissions;
use super::{Changes, Directory, LocalFile, Storage};

/// As if it could be written: that nothing can be is a matter of the tree, and no image is frozen for it.
const FILE_MODE: u32 = libc::S_IFREG | 0o644;
const DIRECTORY_MODE: u32 = libc::S_IFDIR | 0o555;

/// A tree of objects in memory. Clones are the same tree.
#[derive(Clone, Debug)]
pub struct MemoryDirectory {
    /// What messages call it.
    name: Arc<Path>,
    /// In which its objects are numbered.
    space: u64,
    /// A leaf.
    tree: Arc<RwLock<Tree>>,
}

#[derive(Debug, Default)]
struct Tree {
    objects: BTreeMap<PathBuf, Object>,
    /// The last number or tag that was given to anything.
    last: u64,
}

#[derive(Clone, Debug)]
struct Object {
    number: u64,
    tag: u64,
    bytes: Arc<Vec<u8>>,
}

impl Tree {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    fn has_directory(&self, path: &Path) -> bool {
        let is_beneath = |object: &PathBuf| object != path && object.starts_with(path);
        path.as_os_str().is_empty() || self.objects.keys().any(is_beneath)
    }
}

impl MemoryDirectory {
    /// An empty tree, which messages call `name`: an absolute path.
    pub fn new(name: impl AsRef<Path>) -> Self {
        // No device has such a number.
        static SPACES: AtomicU64 = AtomicU64::new(u64::MAX);
        let space = SPACES.fetch_sub(1, Ordering::Relaxed);
        Self { name: name.as_ref().into(), space, tree: Arc::default() }
    }

    /// Puts an object at `path`: a new one, or another version of the one that is there.
    pub fn put(&self, path: impl AsRef<Path>, bytes: Vec<u8>) {
        let mut tree = self.tree.write();
        let (path, tag) = (path.as_ref().to_path_buf(), tree.next());
        let number = tree.objects.get(&path).map_or(tag, |object| object.number);
        tree.objects.insert(path, Object { number, tag, bytes: Arc::new(bytes) });
    }

    /// Removes the object at `path`.
    pub fn remove(&self, path: impl AsRef<Path>) {
        let mut tree = self.tree.write();
        tree.objects.remove(path.as_ref());
        tree.next();
    }

    /// The normal form of a path. No path leads out.
    fn normal(path: &Path) -> Result<PathBuf> {
        let mut normal = PathBuf::new();
        for component in path.components() {
            let is_inside = match component {
                Component::Normal(name) => {
                    normal.push(name);
                    true
                }
                Component::CurDir => true,
                Component::ParentDir => normal.pop(),
                Component::RootDir | Component::Prefix(_) => false,
            };
            if !is_inside {
                let fact = format!("{} leads out of the store", path.display());
                return Err(Error::new(ErrorKind::Escape, fact));
            }
        }
        Ok(normal)
    }

    fn object(&self, path: &Path) -> Result<Object> {
        let found = self.tree.read().objects.get(&Self::normal(path)?).cloned();
        found.ok_or_else(|| not_found(path))
    }

    fn stat_of(&self, object: &Object) -> ObjectStat {
        let size = object.bytes.len() as u64;
        ObjectStat {
            id: ObjectId::new(self.space, object.number),
            version: ObjectVersion::of_tag(object.tag),
            size,
            modified: Timestamp::default(),
            blocks: size.div_ceil(512),
            mode: FILE_MODE,
            uid: 0,
            gid: 0,
            link_count: 1,
        }
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn OpenObject>> {
        let object = self.object(path)?;
        Ok(Arc::new(MemoryObject { directory: self.clone(), path: Self::normal(path)?, object }))
    }
}

fn not_found(path: &Path) -> Error {
    Error::new(ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

fn read_only<T>(path: &Path) -> Result<T> {
    let fact = "is in a store that cannot be written; copy it to a directory first";
    Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", path.display())))
}

impl Backend for MemoryDirectory {
    fn given(&self) -> &Path {
        &self.name
    }

    fn canonical(&self) -> &Path {
        &self.name
    }

    fn open_directory(&self, path: &Path, _: MountPoints) -> Result<Option<Box<dyn OpenDirectory>>> {
        let path = Self::normal(path)?;
        if !self.tree.read().has_directory(&path) {
            return Err(not_found(&path));
        }
        Ok(Some(Box::new(MemoryOpenDirectory { directory: self.clone(), path })))
    }

    fn stat(&self, path: &Path) -> Result<ObjectStat> {
        if let Ok(object) = self.object(path) {
            return Ok(self.stat_of(&object));
        }
        let (normal, tree) = (Self::normal(path)?, self.tree.read());
        if !tree.has_directory(&normal) {
            return Err(not_found(path));
        }
        let object = Object { number: 0, tag: tree.last, bytes: Arc::default() };
        Ok(ObjectStat { mode: DIRECTORY_MODE, ..self.stat_of(&object) })
    }

    fn stat_itself(&self, path: &Path) -> Result<ObjectStat> {
        self.stat(path)
    }

    fn identify(&self, path: &Path) -> Result<Identity> {
        Ok(Identity::of_id(self.stat(path)?.id))
    }

    fn is_real_directory(&self, path: &Path) -> bool {
        Self::normal(path).is_ok_and(|path| self.tree.read().has_directory(&path))
    }

    fn link_target(&self, _: &Path) -> Option<PathBuf> {
        None
    }

    fn open_file(&self, path: &Path) -> Result<Arc<dyn OpenObject>> {
        self.open(path)
    }

    fn open_file_for_writing(&self, path: &Path) -> Result<Arc<dyn WriteObject>> {
        read_only(path)
    }

    fn names(&self) -> Option<Arc<dyn Directory>> {
        None
    }

    fn changes(&self) -> Option<Arc<dyn Changes>> {
        None
    }

    fn permissions(&self, path: &Path) -> Result<Permissions> {
        let ObjectStat { uid, gid, mode, .. } = self.stat(path)?;
        Ok(Permissions { uid, gid, mode, list: None })
    }

    fn permissions_above(&self) -> Result<Vec<Permissions>> {
        Ok(vec![self.permissions(Path::new(""))?])
    }

    fn steps(&self, path: &Path) -> Result<(Vec<PathBuf>, PathBuf)> {
        let plain = Self::normal(path)?;
        let mut searched: Vec<PathBuf> = plain.ancestors().skip(1).map(Path::to_path_buf).collect();
        searched.reverse();
        Ok((searched, plain))
    }

    fn shares_blocks(&self) -> bool {
        false
    }

    fn has_remote_writers(&self) -> bool {
        true
    }

    fn space(&self) -> Result<Space> {
        Ok(Space { block_len: 512, unit_len: 512, ..Space::default() })
    }
}

#[derive(Debug)]
struct MemoryOpenDirectory {
    directory: MemoryDirectory,
    path: PathBuf,
}

impl OpenDirectory for MemoryOpenDirectory {
    fn list(&self) -> Result<Vec<DirEntry>> {
        let tree = self.directory.tree.read();
        let mut found = BTreeSet::new();
        for object in tree.objects.keys() {
            let Ok(inner) = object.strip_prefix(&self.path) else { continue };
            let mut parts = inner.iter();
            if let Some(name) = parts.next() {
                found.insert((name.to_os_string(), parts.next().is_some()));
            }
        }
        let kind = |is_directory| if is_directory { EntryKind::Directory } else { EntryKind::File };
        Ok(found
            .into_iter()
            .map(|(name, is_directory)| DirEntry { name, kind: kind(is_directory) })
            .collect())
    }

    fn version(&self) -> Result<ObjectVersion> {
        Ok(ObjectVersion::of_tag(self.directory.tree.read().last))
    }

    fn stat_entry(&self, name: &OsStr) -> Result<Option<ObjectStat>> {
        match self.directory.stat(&self.path.join(name)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            found => found.map(Some),
        }
    }

    fn open_entry(&self, name: &OsStr) -> Result<Option<Arc<dyn OpenObject>>> {
        match self.directory.open(&self.path.join(name)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            found => found.map(Some),
        }
    }

    fn check_writable(&self) -> std::io::Result<()> {
        Err(std::io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn local_file(&self) -> Option<LocalFile> {
        None
    }
}

/// One version of an object.
#[derive(Debug)]
struct MemoryObject {
    directory: MemoryDirectory,
    path: PathBuf,
    object: Object,
}

impl OpenObject for MemoryObject {
    fn stat(&self) -> Result<ObjectStat> {
        self.directory.stat(&self.path)
    }

    fn identity(&self) -> Result<Identity> {
        self.directory.identify(&self.path)
    }

    fn free_space(&self) -> Result<u64> {
        Ok(0)
    }

    fn locks(&self) -> &dyn ObjectLocks {
        &NoLocks
    }

    fn reopen_for_writing(&self) -> Result<Arc<dyn WriteObject>> {
        read_only(&self.path)
    }
}

impl Storage for MemoryObject {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let is_same = |now: Object| (now.number, now.tag) == (self.object.number, self.object.tag);
        if !self.directory.object(&self.path).is_ok_and(is_same) {
            return Err(stale(&self.path));
        }
        (*self.object.bytes).read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.object.bytes.len() as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_have_directories_and_versions() {
        let memory = MemoryDirectory::new("/memory");
        memory.put("a", b"one".to_vec());
        memory.put("sub/deep/b", b"two".to_vec());
        let root = memory.open_directory(Path::new("."), MountPoints::Skip).unwrap().unwrap();
        let names: Vec<_> = root.list().unwrap().into_iter().map(|entry| (entry.name, entry.kind)).collect();
        assert_eq!(names, [("a".into(), EntryKind::File), ("sub".into(), EntryKind::Directory)]);
        let (open, seen) = (memory.open_file(Path::new("a")).unwrap(), memory.stat(Path::new("a")).unwrap());
        let before = root.version().unwrap();
        memory.put("a", b"another".to_vec());
        let now = memory.stat(Path::new("a")).unwrap();
        assert!(now.id == seen.id && now.version != seen.version && root.version().unwrap() != before);
        assert_eq!(open.read_at(0, &mut [0; 3]).unwrap_err().kind(), ErrorKind::Stale);
        memory.remove("a");
        memory.put("a", b"one".to_vec());
        assert_ne!(memory.stat(Path::new("a")).unwrap().id, seen.id, "another object");
    }

    #[test]
    fn no_path_leads_out_and_nothing_is_written() {
        let memory = MemoryDirectory::new("/memory");
        memory.put("sub/a", b"a".to_vec());
        for path in ["../a", "sub/../../a", "/sub/a"] {
            let refused = memory.open_file(Path::new(path)).map(drop).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Escape, "{path}");
        }
        assert!(memory.open_file(Path::new("sub/../sub/a")).is_ok() && memory.names().is_none());
        let refused = memory.open_file_for_writing(Path::new("sub/a")).map(drop).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
        let gone = memory.open_file(Path::new("b")).map(drop).unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
    }
}
