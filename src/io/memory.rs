//! Objects in memory, for tests: what a store needs at least.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::error::{ErrorKind, Result};

use super::object::Timestamp;
use super::object_tree::{ListedObject, Listing, ObjectSource, ObjectTree};
use super::{Backend, Storage};

/// A tree of objects in memory. Clones are the same tree.
#[derive(Clone, Debug)]
pub struct MemoryDirectory(Arc<MemoryObjects>);

#[derive(Debug)]
struct MemoryObjects {
    /// What messages call it.
    name: PathBuf,
    space: u64,
    /// A leaf.
    objects: RwLock<Objects>,
}

#[derive(Debug, Default)]
struct Objects {
    by_path: BTreeMap<PathBuf, (ListedObject, Arc<Vec<u8>>)>,
    /// The last number or tag that was given to anything.
    last: u64,
}

impl Objects {
    fn next(&mut self) -> u64 {
        self.last += 1;
        self.last
    }
}

impl MemoryDirectory {
    /// An empty tree, which messages call `name`: an absolute path.
    pub fn new(name: impl AsRef<Path>) -> Self {
        // No device has such a number.
        static SPACES: AtomicU64 = AtomicU64::new(u64::MAX);
        let space = SPACES.fetch_sub(1, Ordering::Relaxed);
        Self(Arc::new(MemoryObjects { name: name.as_ref().to_path_buf(), space, objects: RwLock::default() }))
    }

    /// It as what a store lives in.
    pub fn backend(&self) -> Arc<dyn Backend> {
        let source: Arc<dyn ObjectSource> = self.0.clone();
        Arc::new(ObjectTree(source))
    }

    /// Puts an object at `path`: a new one, or another version of the one that is there.
    pub fn put(&self, path: impl AsRef<Path>, bytes: Vec<u8>) {
        let mut objects = self.0.objects.write();
        let (path, tag) = (path.as_ref().to_path_buf(), objects.next());
        let number = objects.by_path.get(&path).map_or(tag, |(object, _)| object.number);
        let object = ListedObject { number, tag, len: bytes.len() as u64, modified: Timestamp::default() };
        objects.by_path.insert(path, (object, Arc::new(bytes)));
    }

    /// Removes the object at `path`.
    pub fn remove(&self, path: impl AsRef<Path>) {
        let mut objects = self.0.objects.write();
        objects.by_path.remove(path.as_ref());
        objects.next();
    }
}

impl ObjectSource for MemoryObjects {
    fn name(&self) -> &Path {
        &self.name
    }

    fn space(&self) -> u64 {
        self.space
    }

    fn listing(&self) -> Arc<Listing> {
        let objects = self.objects.read();
        let listed = objects.by_path.iter().map(|(path, (object, _))| (path.clone(), object.clone()));
        Arc::new(Listing { objects: listed.collect(), tag: objects.last })
    }

    fn look(&self) -> Result<()> {
        Ok(())
    }

    fn open(&self, path: &Path, object: &ListedObject) -> Result<Arc<dyn Storage>> {
        let objects = self.objects.read();
        match objects.by_path.get(path) {
            Some((now, bytes)) if now == object => Ok(bytes.clone()),
            _ => Err(crate::error::Error::new(ErrorKind::Stale, format!("{} was replaced", path.display()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{EntryKind, MountPoints};

    #[test]
    fn objects_have_directories_and_versions() {
        let memory = MemoryDirectory::new("/memory");
        memory.put("a", b"one".to_vec());
        memory.put("sub/deep/b", b"two".to_vec());
        let tree = memory.backend();
        let root = tree.open_directory(Path::new("."), MountPoints::Skip).unwrap().unwrap();
        let names: Vec<_> = root.list().unwrap().into_iter().map(|entry| (entry.name, entry.kind)).collect();
        assert_eq!(names, [("a".into(), EntryKind::File), ("sub".into(), EntryKind::Directory)]);
        let (open, seen) = (tree.open_file(Path::new("a")).unwrap(), tree.stat(Path::new("a")).unwrap());
        let before = root.version().unwrap();
        memory.put("a", b"another".to_vec());
        let now = tree.stat(Path::new("a")).unwrap();
        assert!(now.id == seen.id && now.version != seen.version && root.version().unwrap() != before);
        assert_eq!(open.read_at(0, &mut [0; 3]).unwrap_err().kind(), ErrorKind::Stale);
        memory.remove("a");
        memory.put("a", b"one".to_vec());
        assert_ne!(tree.stat(Path::new("a")).unwrap().id, seen.id, "another object");
    }

    #[test]
    fn no_path_leads_out_and_nothing_is_written() {
        let memory = MemoryDirectory::new("/memory");
        memory.put("sub/a", b"a".to_vec());
        let tree = memory.backend();
        for path in ["../a", "sub/../../a", "/sub/a"] {
            let refused = tree.open_file(Path::new(path)).map(drop).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::Escape, "{path}");
        }
        assert!(tree.open_file(Path::new("sub/../sub/a")).is_ok() && tree.names().is_none());
        let refused = tree.open_file_for_writing(Path::new("sub/a")).map(drop).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnly);
        let gone = tree.open_file(Path::new("b")).map(drop).unwrap_err();
        assert_eq!(gone.kind(), ErrorKind::NotFound);
    }
}
