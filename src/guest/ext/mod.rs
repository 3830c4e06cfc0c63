//! ext2, ext3 and ext4, read from any [`Source`] without a kernel.
//!
//! Promises:
//! - The file system is shown as the kernel would show it after mounting it: the journal and fast commits are
//!   replayed in memory.
//! - Damage is an error of the requested entry; everything else stays readable.
//! - Opening reads the superblock and, if needed, the journal; everything else is read on demand.
//!
//! Permissions and the resolution of symbolic links are left to the callers.

mod acl;
mod blocks;
mod bytes;
mod checksum;
mod directory;
mod extents;
mod fast;
mod groups;
mod hash;
mod htree;
mod indirect;
mod inline;
mod inode;
mod journal;
mod map;
mod nokey;
mod statistics;
mod superblock;
mod symlink;
mod xattr;

mod open;

use std::hash::RandomState;
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::bytes::{corrupt, unsupported};
use crate::cache::Cache;
use crate::error::{Error, Result};

use super::filesystem::{
    DirectoryEntry, ExtendedAttribute, FileAttributes, FileKind, FileRun, FileSystem, Ino, Statistics,
};
use super::source::Source;

pub use superblock::{SuperblockProbe, probe};

use blocks::{Block, Blocks};
use directory::NameIndex;
use fast::FastCommits;
use inode::{Inode, flags};
use superblock::Superblock;

const ROOT: u64 = 2;
/// Bytes of cached inodes, and of in-memory indexes of directories without an index.
const INODE_CACHE_LEN: usize = 2 << 20;
const NAME_CACHE_LEN: usize = 2 << 20;
/// Remarks that are kept: a disk can have millions of groups, each of them damaged.
const REMARK_LIMIT: usize = 100;

/// An ext2, ext3 or ext4 file system.
pub struct Ext {
    superblock: Superblock,
    blocks: Blocks,
    fast: FastCommits,
    inodes: Cache<u32, Arc<Inode>>,
    name_indexes: Cache<u32, Arc<NameIndex>>,
    name_hasher: RandomState,
    statistics: OnceLock<Statistics>,
    /// Facts about the file system that the user should know. Held briefly; no other lock is taken under it.
    remarks: Mutex<Vec<String>>,
    /// The remarks that say that the shown state is not the last one. Known at open.
    stale: Vec<String>,
}

impl Ext {
    /// The file system that fills `source`. A journal that cannot be replayed is no error:
    /// [`FileSystem::remarks`] says that the shown state is old.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        open::open(source)
    }

    fn remark(&self, remark: String) {
        let mut remarks = self.remarks.lock();
        if remarks.len() < REMARK_LIMIT && !remarks.contains(&remark) {
            remarks.push(remark);
        }
    }

    /// Adds a remark that says that the shown state is old.
    fn stale_remark(&mut self, remark: String) {
        self.remark(remark.clone());
        self.stale.push(remark);
    }

    fn number(&self, ino: Ino) -> Result<u32> {
        let number =
            u32::try_from(ino.0).ok().filter(|number| (1..=self.superblock.inode_count).contains(number));
        number.ok_or_else(|| corrupt(format!("inode {} is referenced, but does not exist", ino.0)))
    }

    fn inode(&self, number: u32) -> Result<Arc<Inode>> {
        if let Some(inode) = self.inodes.get(&number) {
            return Ok(inode);
        }
        let inode = match self.fast.inode(number) {
            // Its checksum was computed before its block mapping was added.
            Some(raw) => Inode::parse(&self.superblock, number, raw.into(), false)?,
            None => Inode::parse(&self.superblock, number, self.raw_inode(number)?, true)?,
        };
        let inode = Arc::new(inode);
        self.inodes.put(number, Arc::clone(&inode), inode.raw.len() + size_of::<Inode>() + 64);
        Ok(inode)
    }

    /// An inode's bytes on the disk or in the journal's transactions.
    fn raw_inode(&self, number: u32) -> Result<Box<[u8]>> {
        let superblock = &self.superblock;
        if !(1..=superblock.inode_count).contains(&number) {
            return Err(corrupt(format!("inode {number} is referenced, but does not exist")));
        }
        let index = u64::from(number - 1);
        let (group, index) =
            (index / u64::from(superblock.inodes_per_group), index % u64::from(superblock.inodes_per_group));
        let found = groups::group(superblock, &self.blocks, group)?;
        if !found.sound {
            self.remark(format!("the descriptor of group {group} is damaged; its inodes are read anyway"));
        }
        let at = index * superblock.inode_len as u64;
        let block = Block(found.inode_table.0 + (at >> superblock.block_bits));
        let at = at as usize & (superblock.block_len() - 1);
        Ok(self.blocks.read(block)?[at..][..superblock.inode_len].into())
    }
}

impl Inode {
    /// The error for a damaged inode.
    fn corrupt(&self, fact: &str) -> Error {
        corrupt(format!("inode {} {fact}", self.number))
    }

    /// Adds the inode's number to an error.
    fn about(&self, error: Error) -> Error {
        error.within(format!("inode {}", self.number))
    }

    fn refuse_encrypted(&self) -> Result<()> {
        if self.is(flags::ENCRYPT) {
            return Err(unsupported(format!("inode {} is encrypted by the file system", self.number)));
        }
        Ok(())
    }
}

impl FileSystem for Ext {
    fn root(&self) -> Ino {
        Ino(ROOT)
    }

    fn statistics(&self) -> Statistics {
        *self.statistics.get_or_init(|| self.count())
    }

    fn remarks(&self) -> Vec<String> {
        self.remarks.lock().clone()
    }

    fn stale(&self) -> Vec<String> {
        self.stale.clone()
    }

    fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Option<Ino>> {
        Ok(self.look_up(self.number(directory)?, name)?.map(|number| Ino(number.into())))
    }

    fn list(&self, directory: Ino, from: u64, each: &mut dyn FnMut(DirectoryEntry) -> bool) -> Result<()> {
        self.list_directory(self.number(directory)?, from, each)
    }

    fn attributes(&self, ino: Ino) -> Result<FileAttributes> {
        let inode = self.inode(self.number(ino)?)?;
        let mut attributes = inode.attributes();
        // The length of the target as it is shown.
        if inode.kind == FileKind::Symlink && inode.is(flags::ENCRYPT) {
            attributes.size = self.target(inode.number).map_or(attributes.size, |target| target.len() as u64);
        }
        Ok(attributes)
    }

    fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        self.target(self.number(ino)?)
    }

    fn runs(&self, ino: Ino, at: u64, len: u64, most: usize) -> Result<Vec<FileRun>> {
        self.runs_of(self.number(ino)?, at, len, most)
    }

    fn read_at(&self, ino: Ino, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.read_file(self.number(ino)?, at, buf)
    }

    fn extended_attributes(&self, ino: Ino) -> Result<Vec<ExtendedAttribute>> {
        self.attributes_of(self.number(ino)?)
    }
}

impl std::fmt::Debug for Ext {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ext").field("superblock", &self.superblock).finish_non_exhaustive()
    }
}
