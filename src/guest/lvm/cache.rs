//! Caches (dm-cache): which blocks of a volume are newer in its cache.
//!
//! The metadata's superblock leads to an array with the volume's block of each cache block, and its flags.
//! In the second version of the metadata, the dirty ones are in a bit set of its own.

use std::sync::Arc;

use crate::guest::bytes::{le32, le64};
use crate::guest::volumes::{Device, DeviceDisks};
use crate::units::are_zero;

use super::btree::{BLOCK_LEN, BlockKind, MetadataBlocks};
use super::overlay::{self, MOVED_LIMIT, MovedChunk};

/// The kernel's number is octal.
const MAGIC: u64 = 0o6_142_003;
const SECTOR: u64 = 512;
/// The flag of a superblock whose dirty flags are those of all blocks.
const CLEAN_SHUTDOWN: u32 = 1;
/// The flags of a mapping; above them is the volume's block.
const IS_VALID: u64 = 1;
const IS_DIRTY: u64 = 2;
const BLOCK_SHIFT: u32 = 16;
/// Blocks of a cache; one of 1 TiB has that many.
const BLOCK_LIMIT: u64 = 1 << 24;

/// The origin with the blocks that are newer in the cache.
pub(super) fn device(
    origin: &Device,
    metadata: &Device,
    data: &Device,
    block_len: u64,
    is_writeback: bool,
    disks: &DeviceDisks,
) -> Result<Device, String> {
    if !is_writeback {
        // Every write reaches the origin, too.
        return Ok(origin.clone());
    }
    let says = |error: crate::error::Error| format!("its cache's metadata: {error}");
    let blocks = MetadataBlocks::new(metadata.source());
    let mut head = vec![0; BLOCK_LEN as usize];
    metadata.source().read_at(0, &mut head).map_err(says)?;
    if are_zero(&head) {
        // It was never used.
        return Ok(origin.clone());
    }
    if le64(&head, 32) != MAGIC {
        return Err("its cache's metadata have no superblock".to_owned());
    }
    let superblock: Arc<[u8]> = blocks.read(0, BlockKind::CacheSuperblock, 8).map_err(says)?;
    let (version, flags) = (le32(&superblock, 40), le32(&superblock, 4));
    if !(1..=2).contains(&version) {
        return Err(format!("its cache's metadata have the unknown version {version}"));
    }
    if u64::from(le32(&superblock, 232)) * SECTOR != block_len {
        return Err("its cache's metadata have another block length".to_owned());
    }
    // After a crash, the flags are old, and every block may be newer.
    let is_clean = flags & CLEAN_SHUTDOWN != 0;
    let dirty = if is_clean && version == 2 {
        let mut words: Vec<u64> = Vec::new();
        blocks
            .array(le64(&superblock, 284), &mut |index, word| {
                if index >= BLOCK_LIMIT / 64 {
                    return false;
                }
                words.resize(words.len().max(index as usize + 1), 0);
                words[index as usize] = word;
                true
            })
            .map_err(says)?;
        Some(words)
    } else {
        None
    };
    let is_dirty = |index: u64, flags: u64| match &dirty {
        _ if !is_clean => true,
        Some(words) => words.get((index / 64) as usize).is_some_and(|word| word & (1 << (index % 64)) != 0),
        None => flags & IS_DIRTY != 0,
    };
    let mut moved: Vec<MovedChunk> = Vec::new();
    let mut is_whole = true;
    blocks
        .array(le64(&superblock, 192), &mut |index, mapping| {
            is_whole = index < BLOCK_LIMIT && moved.len() < MOVED_LIMIT;
            if is_whole && mapping & IS_VALID != 0 && is_dirty(index, mapping) {
                moved.push((mapping >> BLOCK_SHIFT, index));
            }
            is_whole
        })
        .map_err(says)?;
    if !is_whole {
        return Err("its cache has too many blocks".to_owned());
    }
    overlay::device(origin, data, block_len, moved, disks)
}
