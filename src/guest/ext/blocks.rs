//! The blocks of the file system: from the disk, or from the journal where it has newer ones.
//!
//! Metadata is read block by block and kept in a bounded cache; file content bypasses the cache. The overlay
//! stores the block's position in the journal, not its content, so that a large journal costs little memory.

use std::sync::Arc;

use crate::cache::Cache;
use crate::error::Result;
use crate::guest::bytes::corrupt;
use crate::guest::source::Source;

/// Bytes of metadata cached per file system. The chunks they come from are cached as well, for all views of a
/// chain together.
const CACHE_LEN: usize = 4 << 20;

/// The magic of each of the journal's own blocks. The journal stores a data block that starts with it as
/// "escaped", with zeroes instead.
pub(super) const JOURNAL_MAGIC: [u8; 4] = [0xc0, 0x3b, 0x39, 0x98];

/// The number of a block of the file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Block(pub(super) u64);

/// The position of a block in the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Journaled {
    /// The block of the file system that holds the journal's copy.
    pub(super) place: Block,
    /// Its first four bytes are zeroes instead of the magic.
    pub(super) escaped: bool,
}

/// The blocks that are newer in the journal, sorted.
#[derive(Debug, Default)]
pub(super) struct JournalOverlay(Vec<(Block, Journaled)>);

impl JournalOverlay {
    pub(super) fn new(blocks: impl IntoIterator<Item = (Block, Journaled)>) -> Self {
        let mut blocks: Vec<_> = blocks.into_iter().collect();
        blocks.sort_unstable_by_key(|(block, _)| *block);
        Self(blocks)
    }

    /// The first of `count` blocks from `first` on that is in the overlay.
    pub(super) fn first_of(&self, first: Block, count: u64) -> Option<(Block, Journaled)> {
        let found = *self.0.get(self.0.partition_point(|(block, _)| *block < first))?;
        (found.0.0 - first.0 < count).then_some(found)
    }
}

pub(super) struct Blocks {
    source: Arc<dyn Source>,
    /// Block size as a power of two.
    bits: u32,
    /// Number of blocks.
    count: u64,
    overlay: JournalOverlay,
    cache: Cache<Block, Arc<[u8]>>,
}

impl Blocks {
    pub(super) fn new(source: Arc<dyn Source>, bits: u32, count: u64, overlay: JournalOverlay) -> Self {
        Self { source, bits, count, overlay, cache: Cache::new(CACHE_LEN) }
    }

    pub(super) fn overlay(&self) -> &JournalOverlay {
        &self.overlay
    }

    pub(super) fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// Sets the number of blocks: a replayed transaction may have resized the file system.
    pub(super) fn set_count(&mut self, count: u64) {
        self.count = count;
    }

    pub(super) fn block_bits(&self) -> u32 {
        self.bits
    }

    /// `Corrupt` unless these blocks are within the file system.
    pub(super) fn within(&self, first: Block, count: u64) -> Result<()> {
        if first.0.checked_add(count).is_some_and(|end| end <= self.count) {
            return Ok(());
        }
        let fact = format!(
            "block {} + {count} is referenced, but the file system has {} blocks",
            first.0, self.count
        );
        Err(corrupt(fact))
    }

    /// The byte offset on the disk at which a block within the file system begins.
    pub(super) fn offset(&self, block: Block) -> u64 {
        block.0 << self.bits
    }

    /// A block of metadata.
    pub(super) fn read(&self, block: Block) -> Result<Arc<[u8]>> {
        if let Some(found) = self.cache.get(&block) {
            return Ok(found);
        }
        self.within(block, 1)?;
        let mut bytes: Arc<[u8]> = std::iter::repeat_n(0, 1 << self.bits).collect();
        let buf = Arc::get_mut(&mut bytes).expect("it is not shared yet");
        self.read_at(block, 0, buf)?;
        self.cache.put(block, Arc::clone(&bytes), bytes.len());
        Ok(bytes)
    }

    /// Fills `buf` with bytes from `skip` bytes after the start of `block` on; the range may span many
    /// blocks.
    pub(super) fn read_at(&self, block: Block, skip: u64, mut buf: &mut [u8]) -> Result<()> {
        let len = 1 << self.bits;
        let (mut block, mut skip) = (Block(block.0 + skip / len), skip % len);
        self.within(block, (skip + buf.len() as u64).div_ceil(len))?;
        while !buf.is_empty() {
            let count = (skip + buf.len() as u64).div_ceil(len);
            let newer = self.overlay.first_of(block, count);
            // Everything before the first newer block is read at once.
            let plain = newer.map_or(count, |(newer, _)| newer.0 - block.0);
            let here = if plain == 0 { 1 } else { plain };
            let (now, rest) = buf.split_at_mut((here * len - skip).min(buf.len() as u64) as usize);
            match newer {
                Some((_, Journaled { place, escaped })) if plain == 0 => {
                    self.source.read_at(self.offset(place) + skip, now)?;
                    if escaped && skip < 4 {
                        let magic = &JOURNAL_MAGIC[skip as usize..];
                        let restored = magic.len().min(now.len());
                        now[..restored].copy_from_slice(&magic[..restored]);
                    }
                }
                _ => self.source.read_at(self.offset(block) + skip, now)?,
            }
            (block, skip, buf) = (Block(block.0 + here), 0, rest);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Eight blocks of 1 KiB, each filled with its number; block 2 is newer in block 6, block 4 in block 7
    /// (escaped).
    fn blocks() -> Blocks {
        let bytes: Vec<u8> = (0..8).flat_map(|block| [block; 1024]).collect();
        let newer = |place, escaped| Journaled { place: Block(place), escaped };
        let overlay = JournalOverlay::new([(Block(4), newer(7, true)), (Block(2), newer(6, false))]);
        Blocks::new(Arc::new(bytes), 10, 8, overlay)
    }

    #[test]
    fn the_newer_block_is_read_and_the_magic_restored() {
        let blocks = blocks();
        assert_eq!(blocks.read(Block(1)).unwrap()[..], [1; 1024]);
        assert_eq!(blocks.read(Block(2)).unwrap()[..], [6; 1024]);
        let escaped = blocks.read(Block(4)).unwrap();
        assert_eq!((&escaped[..4], &escaped[4..]), (&JOURNAL_MAGIC[..], &[7; 1020][..]));
    }

    #[test]
    fn a_long_read_takes_each_block_from_where_it_is_newest() {
        let blocks = blocks();
        let mut buf = vec![0xff; 4 * 1024];
        blocks.read_at(Block(0), 1024 + 2, &mut buf).unwrap();
        let mut expected: Vec<u8> = [1, 6, 3].into_iter().flat_map(|block| [block; 1024]).collect();
        expected.drain(..2);
        expected.extend(JOURNAL_MAGIC);
        expected.resize(4096 - 2, 7);
        expected.extend([5; 2]);
        assert_eq!(buf, expected);
        let mut two = [0; 2];
        blocks.read_at(Block(4), 3, &mut two).unwrap();
        assert_eq!(two, [0x98, 7]);
    }

    #[test]
    fn blocks_outside_are_corrupt() {
        let blocks = blocks();
        assert!(blocks.read(Block(8)).is_err());
        assert!(blocks.read(Block(u64::MAX)).is_err());
        assert!(blocks.read_at(Block(7), 1, &mut [0; 1024]).is_err());
        assert!(blocks.read_at(Block(7), 0, &mut [0; 1024]).is_ok());
    }
}
