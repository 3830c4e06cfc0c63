//! XFS of versions 4 and 5, read from any [`Source`] without a kernel.
//!
//! Promises:
//! - The file system is shown as the kernel would show it after mounting it: the log is replayed in memory,
//!   and changes of mappings that were begun are finished.
//! - Damage is an error of the requested entry; everything else stays readable.
//! - Opening reads the superblock and the end of the log, and the log itself if it is not clean; everything
//!   else is read on demand, in bounded memory.
//!
//! Permissions and the resolution of symbolic links are left to the callers.

mod acl;
mod attributes;
mod blocks;
mod checksum;
mod directory;
mod extents;
mod inode;
mod log;
mod lookup;
mod map;
mod open;
mod statistics;
mod superblock;
mod symlink;
mod unfinished;

use std::sync::{Arc, OnceLock};

use crate::cache::Cache;
use crate::error::Result;

use super::bytes::corrupt;
use super::filesystem::{
    DirectoryEntry, ExtendedAttribute, FileAttributes, FileKind, FileRun, FileSystem, Ino, Statistics,
};
use super::source::Source;

use blocks::Blocks;
use inode::Inode;
use log::Unfinished;
use superblock::Superblock;

/// Bytes of cached inodes.
const INODE_CACHE_LEN: usize = 2 << 20;

/// An XFS file system.
pub struct Xfs {
    superblock: Superblock,
    blocks: Blocks,
    /// Whether the log was replayed.
    is_replayed: bool,
    /// Changes that the log has begun and not finished, in their order.
    unfinished: Vec<Unfinished>,
    inodes: Cache<u64, Arc<Inode>>,
    statistics: OnceLock<Statistics>,
    /// Facts about the file system that the user should know. Known at open.
    remarks: Vec<String>,
    /// Those that say that the shown state is not the last one.
    stale: Vec<String>,
}

impl Xfs {
    /// The file system that fills `source`. A log that cannot be replayed is no error:
    /// [`FileSystem::remarks`] says that the shown state is old.
    pub fn open(source: Arc<dyn Source>) -> Result<Self> {
        open::open(source)
    }

    fn inode(&self, number: u64) -> Result<Arc<Inode>> {
        if let Some(inode) = self.inodes.get(&number) {
            return Ok(inode);
        }
        let missing = || corrupt(format!("inode {number} is referenced, but does not exist"));
        let (at, skip) = self.superblock.inode_place(number).ok_or_else(missing)?;
        let block = self.blocks.metadata(&[(at, self.superblock.block_len())], |_| Ok(()))?;
        let raw = block.bytes[skip..skip + self.superblock.inode_len()].into();
        let mut inode = Inode::parse(&self.superblock, number, raw, block.is_replayed)?;
        if let Some(size) = self.exchanged_size(number) {
            inode.size = size;
        }
        let inode = Arc::new(inode);
        self.inodes.put(number, Arc::clone(&inode), inode.raw.len() + size_of::<Inode>() + 64);
        Ok(inode)
    }
}

impl FileSystem for Xfs {
    fn root(&self) -> Ino {
        Ino(self.superblock.root)
    }

    fn statistics(&self) -> Statistics {
        *self.statistics.get_or_init(|| self.count())
    }

    fn remarks(&self) -> Vec<String> {
        self.remarks.clone()
    }

    fn stale(&self) -> Vec<String> {
        self.stale.clone()
    }

    fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Option<Ino>> {
        Ok(self.look_up(directory.0, name)?.map(Ino))
    }

    fn list(&self, directory: Ino, from: u64, each: &mut dyn FnMut(DirectoryEntry) -> bool) -> Result<()> {
        self.list_directory(directory.0, from, each)
    }

    fn attributes(&self, ino: Ino) -> Result<FileAttributes> {
        let mut attributes = self.inode(ino.0)?.attributes(&self.superblock);
        if attributes.kind == FileKind::File && !self.unfinished.is_empty() {
            let sectors = self.superblock.block_bits - 9;
            let blocks = self.finished_blocks(ino.0, attributes.blocks >> sectors)?;
            attributes.blocks = blocks.saturating_mul(1 << sectors);
        }
        Ok(attributes)
    }

    fn read_link(&self, ino: Ino) -> Result<Vec<u8>> {
        self.target(ino.0)
    }

    fn runs(&self, ino: Ino, at: u64, len: u64, most: usize) -> Result<Vec<FileRun>> {
        self.runs_of(ino.0, at, len, most)
    }

    fn read_at(&self, ino: Ino, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.read_file(ino.0, at, buf)
    }

    fn extended_attributes(&self, ino: Ino) -> Result<Vec<ExtendedAttribute>> {
        self.attributes_of(ino.0)
    }
}

impl std::fmt::Debug for Xfs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Xfs").field("superblock", &self.superblock).finish_non_exhaustive()
    }
}
