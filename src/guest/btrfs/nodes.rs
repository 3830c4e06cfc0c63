//! Nodes of all trees: verified, from any copy that is right, and kept in a bounded cache.

use std::sync::Arc;

use crate::cache::Cache;
use crate::error::{Error, Result};

use super::checksum::Checksum;
use super::devices::Volume;
use super::format::{corrupt, is_fact};
use super::node::{Node, NodePointer};

/// Bytes of nodes cached per file system. The chunks they come from are cached as well, for all views of a
/// chain together.
const CACHE_LEN: usize = 8 << 20;

/// The nodes of a file system.
pub(super) struct Nodes {
    pub(super) volume: Volume,
    pub(super) checksum: Checksum,
    node_len: u32,
    sector_len: u32,
    fsid: [u8; 16],
    cache: Cache<NodePointer, Arc<Node>>,
}

impl Nodes {
    pub(super) fn new(volume: Volume, superblock: &super::superblock::Superblock) -> Self {
        Self {
            volume,
            checksum: superblock.checksum,
            node_len: superblock.node_len,
            sector_len: superblock.sector_len,
            fsid: superblock.node_fsid,
            cache: Cache::new(CACHE_LEN),
        }
    }

    /// The node that `pointer` names.
    pub(super) fn get(&self, pointer: NodePointer) -> Result<Arc<Node>> {
        if let Some(found) = self.cache.get(&pointer) {
            return Ok(found);
        }
        if !pointer.at.is_multiple_of(u64::from(self.sector_len)) {
            return Err(corrupt(format!("a node at {:#x}, which is not aligned, is referenced", pointer.at)));
        }
        let node = Arc::new(self.read(pointer)?);
        self.cache.put(pointer, Arc::clone(&node), self.node_len as usize + size_of::<Node>());
        Ok(node)
    }

    /// Reads a node in each way until one is right.
    fn read(&self, pointer: NodePointer) -> Result<Node> {
        let len = u64::from(self.node_len);
        let first = self.volume.piece(pointer.at, len)?;
        let mut failed: Option<Error> = None;
        for way in 0..Volume::ways(&first) {
            let found = self.read_whole(pointer.at, way).and_then(|bytes| {
                if !self.checksum.fits_block(&bytes) {
                    return Err(corrupt(format!("the node at {:#x} has a wrong checksum", pointer.at)));
                }
                Node::parse(bytes, pointer, self.fsid)
            });
            match found {
                Ok(node) => return Ok(node),
                // A temporary error says more than damage: a retry may succeed.
                Err(error) if failed.as_ref().is_none_or(is_fact) => failed = Some(error),
                Err(_) => {}
            }
        }
        Err(failed.unwrap_or_else(|| corrupt(format!("the node at {:#x} has no copy", pointer.at))))
    }

    /// The bytes of a node; it can lie in several stripes.
    fn read_whole(&self, at: u64, way: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.node_len as usize];
        let mut done = 0;
        while done < bytes.len() {
            let piece = self.volume.piece(at + done as u64, (bytes.len() - done) as u64)?;
            let part = &mut bytes[done..][..piece.len as usize];
            self.volume.read(&piece, way.min(Volume::ways(&piece) - 1), 0, part)?;
            done += piece.len as usize;
        }
        Ok(bytes)
    }
}
