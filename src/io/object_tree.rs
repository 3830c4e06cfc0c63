//! A read-only tree of named objects, as an object store has it: a [`Backend`] over any [`ObjectSource`].
//!
//! A directory is what the names of objects have in common. Versions are tags, which say nothing of time.
//! There are no names to change and no locks. An open object is one version: when another one is put in its
//! place, reads are `Stale`.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::units::{BlockStatus, Run};

use super::backend::{
    Backend, BackendCounter, DirEntry, EntryKind, MountPoints, NoLocks, ObjectLocks, OpenDirectory,
    OpenObject, Space, WriteObject, stale,
};
use super::object::{Identity, ObjectId, ObjectStat, ObjectVersion, Timestamp};
use super::permissions::Permissions;
use super::{Changes, Directory, LocalFile, Storage};

/// As if it could be written: that nothing can be is a matter of the tree, and no image is frozen for it.
const FILE_MODE: u32 = libc::S_IFREG | 0o644;
const DIRECTORY_MODE: u32 = libc::S_IFDIR | 0o555;

/// An object of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct ListedObject {
    /// Which object it is, among those of the source.
    pub number: u64,
    /// Its version.
    pub tag: u64,
    /// Length in bytes.
    pub len: u64,
    /// When it was changed last.
    pub modified: Timestamp,
}

/// The objects of a source at one moment.
#[derive(Debug, Default)]
pub(super) struct Listing {
    /// By their paths, which are in normal form.
    pub objects: BTreeMap<PathBuf, ListedObject>,
    /// A number that other listings of the source do not have.
    pub tag: u64,
}

impl Listing {
    fn has_directory(&self, path: &Path) -> bool {
        let is_beneath = |object: &PathBuf| object != path && object.starts_with(path);
        // What lies beneath a path comes right after it.
        path.as_os_str().is_empty()
            || self.objects.range(path.to_path_buf()..).map(|(at, _)| at).take(2).any(is_beneath)
    }
}

/// Where the objects of a tree come from.
pub(super) trait ObjectSource: Send + Sync {
    /// What messages call it, and what names in images may begin with.
    fn name(&self) -> &Path;

    /// In which its objects are numbered.
    fn space(&self) -> u64;

    /// The objects as they are known now. Sends no request.
    fn listing(&self) -> Arc<Listing>;

    /// Looks for changes, before a scan.
    fn look(&self) -> Result<()>;

    /// Opens one version of an object: reads of another one are `Stale`. Sends no request.
    fn open(&self, path: &Path, object: &ListedObject) -> Result<Arc<dyn Storage>>;

    /// See [`Backend::cached`].
    fn cached(&self, _path: &Path, _object: &ListedObject) -> Option<u64> {
        None
    }

    /// See [`Backend::counters`].
    fn counters(&self) -> Vec<BackendCounter> {
        Vec::new()
    }
}

/// The tree of a source's objects. Clones are the same tree.
#[derive(Clone)]
pub(super) struct ObjectTree(pub(super) Arc<dyn ObjectSource>);

impl ObjectTree {
    /// The normal form of a path. No path leads out.
    pub(super) fn normal(path: &Path) -> Result<PathBuf> {
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

    fn object(&self, path: &Path) -> Result<ListedObject> {
        let path = Self::normal(path)?;
        if let Some(found) = self.0.listing().objects.get(&path) {
            return Ok(found.clone());
        }
        // It may have come since. A tree of backing files is not scanned.
        if !self.0.listing().has_directory(&path) {
            self.0.look()?;
        }
        self.0.listing().objects.get(&path).cloned().ok_or_else(|| not_found(&path))
    }

    fn stat_of(&self, object: &ListedObject) -> ObjectStat {
        ObjectStat {
            id: ObjectId::new(self.0.space(), object.number),
            version: ObjectVersion::of_tag(object.tag),
            size: object.len,
            modified: object.modified,
            blocks: object.len.div_ceil(512),
            mode: FILE_MODE,
            uid: 0,
            gid: 0,
            link_count: 1,
        }
    }

    fn open(&self, path: &Path) -> Result<Arc<dyn OpenObject>> {
        let (path, object) = (Self::normal(path)?, self.object(path)?);
        let bytes = self.0.open(&path, &object)?;
        Ok(Arc::new(TreeObject { tree: self.clone(), path, object, bytes }))
    }
}

fn not_found(path: &Path) -> Error {
    Error::new(ErrorKind::NotFound, format!("{} does not exist", path.display()))
}

fn read_only<T>(path: &Path) -> Result<T> {
    let fact = "is in a store that cannot be written; copy it to a directory first";
    Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", path.display())))
}

impl Backend for ObjectTree {
    fn given(&self) -> &Path {
        self.0.name()
    }

    fn canonical(&self) -> &Path {
        self.0.name()
    }

    fn open_directory(&self, path: &Path, _: MountPoints) -> Result<Option<Box<dyn OpenDirectory>>> {
        let path = Self::normal(path)?;
        if path.as_os_str().is_empty() {
            // A scan begins.
            self.0.look()?;
        }
        let listing = self.0.listing();
        if !listing.has_directory(&path) {
            return Err(not_found(&path));
        }
        Ok(Some(Box::new(TreeDirectory { tree: self.clone(), listing, path })))
    }

    fn stat(&self, path: &Path) -> Result<ObjectStat> {
        if let Ok(object) = self.object(path) {
            return Ok(self.stat_of(&object));
        }
        let (normal, listing) = (Self::normal(path)?, self.0.listing());
        if !listing.has_directory(&normal) {
            return Err(not_found(path));
        }
        Ok(ObjectStat {
            id: ObjectId::new(self.0.space(), 0),
            version: ObjectVersion::of_tag(listing.tag),
            size: 0,
            modified: Timestamp::default(),
            blocks: 0,
            mode: DIRECTORY_MODE,
            uid: 0,
            gid: 0,
            link_count: 1,
        })
    }

    fn stat_itself(&self, path: &Path) -> Result<ObjectStat> {
        self.stat(path)
    }

    fn identify(&self, path: &Path) -> Result<Identity> {
        Ok(Identity::of_id(self.stat(path)?.id))
    }

    fn is_real_directory(&self, path: &Path) -> bool {
        Self::normal(path).is_ok_and(|path| self.0.listing().has_directory(&path))
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

    fn cached(&self, path: &Path) -> Option<u64> {
        self.0.cached(path, &self.object(path).ok()?)
    }

    fn counters(&self) -> Vec<BackendCounter> {
        self.0.counters()
    }
}

/// A directory of one listing.
struct TreeDirectory {
    tree: ObjectTree,
    listing: Arc<Listing>,
    path: PathBuf,
}

impl OpenDirectory for TreeDirectory {
    fn list(&self) -> Result<Vec<DirEntry>> {
        let mut found = BTreeSet::new();
        for object in self.listing.objects.range(self.path.clone()..).map(|(path, _)| path) {
            let Ok(inner) = object.strip_prefix(&self.path) else { break };
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
        Ok(ObjectVersion::of_tag(self.tree.0.listing().tag))
    }

    fn stat_entry(&self, name: &OsStr) -> Result<Option<ObjectStat>> {
        match self.tree.stat(&self.path.join(name)) {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            found => found.map(Some),
        }
    }

    fn open_entry(&self, name: &OsStr) -> Result<Option<Arc<dyn OpenObject>>> {
        match self.tree.open(&self.path.join(name)) {
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
struct TreeObject {
    tree: ObjectTree,
    path: PathBuf,
    object: ListedObject,
    bytes: Arc<dyn Storage>,
}

impl OpenObject for TreeObject {
    fn stat(&self) -> Result<ObjectStat> {
        self.tree.stat(&self.path)
    }

    fn identity(&self) -> Result<Identity> {
        self.tree.identify(&self.path)
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

impl Storage for TreeObject {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        let is_same = |now: ListedObject| (now.number, now.tag) == (self.object.number, self.object.tag);
        if !self.tree.object(&self.path).is_ok_and(is_same) {
            return Err(stale(&self.path));
        }
        self.bytes.read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.object.len)
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        self.bytes.extent(at, end)
    }
}
