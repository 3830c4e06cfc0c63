//! btrfs, read from any [`Source`]s without a kernel.
//!
//! Promises:
//! - The file system is shown as the kernel would show it after mounting it: the log trees, which hold what
//!   was synced since the last commit, are replayed in memory.
//! - Nodes are verified by their checksums, and so is data that is read here. Another copy is used where one
//!   is wrong or on a device that is missing.
//! - Damage is an error of the requested entry; everything else stays readable.
//! - Opening reads the superblocks, the chunk tree, the roots of subvolumes and the logs; everything else is
//!   read on demand.
//!
//! Every subvolume is a tree of its own. As for the kernel, a nested subvolume is also a directory of the
//! tree that holds it. Its inodes have numbers of their own there: see `number`.
//!
//! Permissions and the resolution of symbolic links are left to the callers.

mod checksum;
mod chunks;
mod compression;
mod data;
mod devices;
mod directory;
mod entry;
mod extents;
mod format;
mod inode;
mod log;
mod node;
mod nodes;
mod number;
mod open;
mod statistics;
mod subvolumes;
mod sums;
mod superblock;
mod tree;
mod xattr;

use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::cache::Cache;
use crate::error::{Error, Result};

use super::bytes::uuid;
use super::filesystem::{
    Crossing, DirectoryEntry, ExtendedAttribute, FileAttributes, FileKind, FileRun, FileSystem, Ino,
    Statistics,
};
use super::readers::Subvolume;
use super::source::Source;

use format::{Key, corrupt, kind};
use inode::Inode;
use nodes::Nodes;
use number::Object;
use statistics::DeviceSpace;
use subvolumes::Root;
use sums::Sums;
use superblock::Superblock;
use tree::Tree;

/// Remarks that are kept.
const REMARK_LIMIT: usize = 100;

/// What all trees of a file system share.
struct Shared {
    superblock: Superblock,
    nodes: Nodes,
    /// The tree of the trees' roots.
    roots: Tree,
    sums: Sums,
    /// The trees of files, by their numbers.
    subvolumes: Vec<Root>,
    /// For each of them, its index among the trees that [`Btrfs::open`] returns.
    trees: Vec<Option<u32>>,
    devices: Vec<DeviceSpace>,
    /// Decompressed extents, by where they are.
    extents: Cache<u64, Arc<[u8]>>,
    statistics: OnceLock<Statistics>,
    /// Facts about the file system that the user should know. Held briefly; no other lock is taken under it.
    remarks: Mutex<Vec<String>>,
    /// The remarks that say that the shown state is not the last one. Known at open.
    stale: Vec<String>,
}

/// A device of a btrfs file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BtrfsDevice {
    /// The UUID of the file system, as users know it.
    pub fsid: String,
    /// The UUID of the device.
    pub id: String,
}

/// A subvolume of a btrfs file system, with the subvolumes in it.
pub struct Btrfs {
    shared: Arc<Shared>,
    /// Which of the subvolumes is the root.
    subvolume: usize,
}

impl Btrfs {
    /// All trees of the file system on `sources`, its devices; the default one is the first. Subvolumes that
    /// no path leads to are being deleted, and are left out. A log that cannot be replayed is no error:
    /// [`FileSystem::stale`] says that the shown state is old.
    pub fn open(sources: &[Arc<dyn Source>]) -> Result<Vec<Subvolume>> {
        open::open(sources)
    }

    /// The device of a file system that is on this source, if there is one.
    pub fn device(source: &dyn Source) -> Option<BtrfsDevice> {
        let (superblock, _) = superblock::find(source).ok()?;
        Some(BtrfsDevice { fsid: uuid(superblock.fsid)?, id: uuid(superblock.device.uuid)? })
    }

    /// The identities of devices that are not among `sources`, as far as those name them.
    pub fn absent_devices(sources: &[Arc<dyn Source>]) -> Result<Vec<String>> {
        Ok(open::absent(sources)?.into_iter().filter_map(|(_, id)| uuid(id)).collect())
    }
}

impl Shared {
    fn remark(&self, remark: String) {
        let mut remarks = self.remarks.lock();
        if remarks.len() < REMARK_LIMIT && !remarks.contains(&remark) {
            remarks.push(remark);
        }
    }

    fn tree(&self, subvolume: usize) -> &Tree {
        &self.subvolumes[subvolume].tree
    }

    /// An inode of a subvolume.
    fn inode(&self, subvolume: usize, object: u64) -> Result<Inode> {
        let item = self.tree(subvolume).get(&self.nodes, Key::new(object, kind::INODE, 0))?;
        let item =
            item.ok_or_else(|| corrupt(format!("inode {object} is referenced, but does not exist")))?;
        Inode::parse(object, item.data(), self.superblock.sector_len)
    }

    /// An inode that must be of one kind.
    fn inode_of(&self, subvolume: usize, object: u64, kind: FileKind) -> Result<Inode> {
        let inode = self.inode(subvolume, object)?;
        if inode.attributes.kind == kind {
            return Ok(inode);
        }
        let name = match kind {
            FileKind::Directory => "directory",
            FileKind::Symlink => "symbolic link",
            _ => "regular file",
        };
        Err(corrupt(format!("inode {object} is not a {name}")))
    }
}

/// Adds an inode's number to an error.
fn about(object: u64) -> impl Fn(Error) -> Error {
    move |error| error.within(format!("inode {object}"))
}

impl FileSystem for Btrfs {
    fn root(&self) -> Ino {
        Ino(self.shared.subvolumes[self.subvolume].directory)
    }

    fn statistics(&self) -> Statistics {
        *self.shared.statistics.get_or_init(|| self.shared.count())
    }

    fn remarks(&self) -> Vec<String> {
        self.shared.remarks.lock().clone()
    }

    fn stale(&self) -> Vec<String> {
        self.shared.stale.clone()
    }

    fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Option<Ino>> {
        match self.object(directory)? {
            Object::Inode { subvolume, object } => self.look_up(subvolume, object, name),
            Object::Stub { .. } => Ok(None),
        }
    }

    fn crossing(&self, ino: Ino) -> Option<Crossing> {
        let Ok(Object::Inode { subvolume, object }) = self.object(ino) else { return None };
        let is_root = subvolume != self.subvolume && object == self.shared.subvolumes[subvolume].directory;
        let tree = self.shared.trees[subvolume].filter(|_| is_root)?;
        Some(Crossing { subvolume: tree, ino: Ino(object) })
    }

    fn list(&self, directory: Ino, from: u64, each: &mut dyn FnMut(DirectoryEntry) -> bool) -> Result<()> {
        match self.object(directory)? {
            Object::Inode { subvolume, object } => self.list_directory(subvolume, object, from, each),
            Object::Stub { .. } => Ok(()),
        }
    }

    fn attributes(&self, ino: Ino) -> Result<FileAttributes> {
        match self.object(ino)? {
            Object::Inode { subvolume, object } => Ok(self.shared.inode(subvolume, object)?.attributes),
            Object::Stub { subvolume, target } => self.shared.stub(subvolume, target),
        }
    }

    fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        let (subvolume, object) = self.inode_object(ino)?;
        self.shared.target(subvolume, object)
    }

    fn runs(&self, ino: Ino, at: u64, len: u64, most: usize) -> Result<Vec<FileRun>> {
        let (subvolume, object) = self.inode_object(ino)?;
        self.shared.runs(subvolume, object, at, len, most)
    }

    fn read_at(&self, ino: Ino, at: u64, buf: &mut [u8]) -> Result<usize> {
        let (subvolume, object) = self.inode_object(ino)?;
        self.shared.read_file(subvolume, object, at, buf)
    }

    fn extended_attributes(&self, ino: Ino) -> Result<Vec<ExtendedAttribute>> {
        match self.object(ino)? {
            Object::Inode { subvolume, object } => self.shared.xattrs(subvolume, object),
            Object::Stub { .. } => Ok(Vec::new()),
        }
    }
}

impl std::fmt::Debug for Btrfs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let superblock = &self.shared.superblock;
        f.debug_struct("Btrfs").field("superblock", superblock).finish_non_exhaustive()
    }
}
