//! The B-trees and arrays of dm-thin's and dm-cache's metadata ("persistent data").
//!
//! Blocks have 4096 bytes, a checksum, and their own number. Damage is an error of what lies below the
//! damaged block.
//!
//! Promise: walks end for any bytes; a tree is at most [`DEPTH_LIMIT`] deep. Blocks are cached, up to
//! [`CACHE_LEN`] bytes.

use std::sync::Arc;

use crate::cache::Cache;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::Source;
use crate::guest::bytes::{le32, le64};

/// Bytes of a block.
pub(super) const BLOCK_LEN: u64 = 4096;
/// Levels of a tree; the kernel's trees of 2^64 keys have fewer.
const DEPTH_LIMIT: usize = 16;
/// Bytes of cached blocks.
const CACHE_LEN: usize = 4 << 20;
/// Bytes of a node's header.
const NODE_HEADER: usize = 32;
/// Bytes of an array block's header.
const ARRAY_HEADER: usize = 24;

/// What a block's checksum is mixed with: `*_CSUM_XOR` of the kernel.
#[derive(Clone, Copy)]
pub(super) enum BlockKind {
    Node = 121_107,
    Array = 595_846_735,
    ThinSuperblock = 160_774,
    CacheSuperblock = 9_031_977,
}

/// The blocks of a metadata device.
pub(super) struct MetadataBlocks {
    source: Arc<dyn Source>,
    cache: Cache<u64, Arc<[u8]>>,
}

fn damaged(block: u64, what: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("metadata block {block} is damaged: {what}"))
}

/// The checksum of a block, whose first four bytes have it.
pub(super) fn has_checksum(block: &[u8], kind: BlockKind) -> bool {
    // The kernel's CRC-32C has no inversion at the end.
    le32(block, 0) == !crc32c::crc32c(&block[4..]) ^ kind as u32
}

impl MetadataBlocks {
    pub(super) fn new(source: &Arc<dyn Source>) -> Self {
        Self { source: Arc::clone(source), cache: Cache::new(CACHE_LEN) }
    }

    /// A block with a valid checksum; `number_at` is where it has its own number.
    pub(super) fn read(&self, block: u64, kind: BlockKind, number_at: usize) -> Result<Arc<[u8]>> {
        if let Some(known) = self.cache.get(&block) {
            return Ok(known);
        }
        let mut bytes = vec![0; BLOCK_LEN as usize];
        let at = block.checked_mul(BLOCK_LEN).ok_or_else(|| damaged(block, "it lies beyond the end"))?;
        self.source.read_at(at, &mut bytes)?;
        if !has_checksum(&bytes, kind) {
            return Err(damaged(block, "its checksum is wrong"));
        }
        if le64(&bytes, number_at) != block {
            return Err(damaged(block, "it has another number"));
        }
        let bytes: Arc<[u8]> = bytes.into();
        self.cache.put(block, Arc::clone(&bytes), bytes.len() + 64);
        Ok(bytes)
    }

    fn node(&self, block: u64) -> Result<Node> {
        let bytes = self.read(block, BlockKind::Node, 8)?;
        let (flags, count) = (le32(&bytes, 4), le32(&bytes, 16) as usize);
        let (most, value_len) = (le32(&bytes, 20) as usize, le32(&bytes, 24) as usize);
        let is_leaf = match flags & 3 {
            1 => false,
            2 => true,
            _ => return Err(damaged(block, "it is no node")),
        };
        let room = BLOCK_LEN as usize - NODE_HEADER;
        let fits = most.checked_mul(value_len.saturating_add(8)).is_some_and(|len| len <= room);
        if !fits || count > most || value_len < 8 {
            return Err(damaged(block, "it has impossible lengths"));
        }
        Ok(Node { bytes, is_leaf, count, most, value_len })
    }

    /// The value of a key: its first eight bytes.
    pub(super) fn lookup(&self, root: u64, key: u64) -> Result<Option<u64>> {
        let mut block = root;
        for _ in 0..DEPTH_LIMIT {
            let node = self.node(block)?;
            let Some(index) = node.last_until(key) else { return Ok(None) };
            if node.is_leaf {
                return Ok((node.key(index) == key).then(|| node.value(index)));
            }
            block = node.value(index);
        }
        Err(damaged(root, "its tree is too deep"))
    }

    /// Calls `each` with keys and values in order, until it returns false. Keys that are not in order are
    /// damage. Stops with an error where a block is damaged.
    pub(super) fn walk(&self, root: u64, each: &mut dyn FnMut(u64, u64) -> bool) -> Result<()> {
        let mut stack = vec![(self.node(root)?, 0)];
        let mut next = 0;
        while let Some((node, index)) = stack.last_mut() {
            if *index == node.count {
                stack.pop();
                continue;
            }
            let (key, value) = (node.key(*index), node.value(*index));
            *index += 1;
            if node.is_leaf {
                if key < next {
                    return Err(damaged(root, "its keys are not in order"));
                }
                next = key.saturating_add(1);
                if !each(key, value) {
                    return Ok(());
                }
            } else {
                if stack.len() >= DEPTH_LIMIT {
                    return Err(damaged(root, "its tree is too deep"));
                }
                let child = self.node(value)?;
                // Without entries, damage could make a walk endless that `each` never sees.
                if child.count == 0 || child.key(0) < next {
                    return Err(damaged(value, "its keys are not in order"));
                }
                stack.push((child, 0));
            }
        }
        Ok(())
    }

    /// Calls `each` with the numbers of an array, of eight bytes each, by index, until it returns false.
    pub(super) fn array(&self, root: u64, each: &mut dyn FnMut(u64, u64) -> bool) -> Result<()> {
        let most = (BLOCK_LEN as usize - ARRAY_HEADER) / 8;
        let mut failure = Ok(());
        self.walk(root, &mut |number, block| {
            let mut read = || -> Result<bool> {
                let bytes = self.read(block, BlockKind::Array, 16)?;
                let count = le32(&bytes, 8) as usize;
                if count > most || le32(&bytes, 12) != 8 {
                    return Err(damaged(block, "it has impossible lengths"));
                }
                let first = number.saturating_mul(most as u64);
                let values = (0..count).map(|index| le64(&bytes, ARRAY_HEADER + 8 * index));
                Ok((first..).zip(values).all(|(index, value)| each(index, value)))
            };
            read().unwrap_or_else(|error| {
                failure = Err(error);
                false
            })
        })?;
        failure
    }
}

/// A node, whose lengths are those of a block.
struct Node {
    bytes: Arc<[u8]>,
    is_leaf: bool,
    count: usize,
    most: usize,
    value_len: usize,
}

impl Node {
    fn key(&self, index: usize) -> u64 {
        le64(&self.bytes, NODE_HEADER + 8 * index)
    }

    fn value(&self, index: usize) -> u64 {
        le64(&self.bytes, NODE_HEADER + 8 * self.most + self.value_len * index)
    }

    /// The last entry whose key is not above `key`.
    fn last_until(&self, key: u64) -> Option<usize> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = usize::midpoint(low, high);
            if self.key(middle) <= key { low = middle + 1 } else { high = middle }
        }
        low.checked_sub(1)
    }
}
