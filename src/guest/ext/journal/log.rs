//! The journal as a file: its superblock and the position of its blocks.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::bytes::{be32, corrupt, unsupported};
use crate::guest::filesystem::FileKind;
use crate::guest::source::Source;

use super::super::Ext;
use super::super::blocks::{Block, JOURNAL_MAGIC};
use super::super::checksum::{crc32c, crc32c_without_field};
use super::super::map::{ExtMapping, MapWalk};

pub(super) mod incompat {
    pub(in super::super) const SIXTY_FOUR: u32 = 0x2;
    pub(in super::super) const ASYNC_COMMIT: u32 = 0x4;
    pub(in super::super) const CSUM_V2: u32 = 0x8;
    pub(in super::super) const CSUM_V3: u32 = 0x10;
    pub(in super::super) const FAST_COMMIT: u32 = 0x20;
}

const KNOWN: u32 = 0x3f;
const COMPAT_CHECKSUM: u32 = 0x1;
const SUPERBLOCK_LEN: usize = 1024;
const CRC32C: u8 = 4;

/// Blocks of a journal; e2fsprogs' limit.
const MAX_BLOCKS: u32 = 10_240_000;
/// Extents of the journal on the disk at most.
const MAX_EXTENTS: usize = 1 << 16;
/// Blocks that a journal always reserves for transactions, however many blocks fast commits use.
const MIN_BLOCKS: u32 = 1024;
/// Blocks for fast commits where the journal does not state a number.
const FAST_BLOCKS: u32 = 256;

/// A journal with a valid superblock.
pub(in super::super) struct Log {
    source: Arc<dyn Source>,
    bits: u32,
    /// The first journal block of each extent, and its position; sorted.
    extents: Vec<(u32, Block)>,
    features: u32,
    checksums: bool,
    /// The initial state of the checksums of versions 2 and 3.
    pub(super) seed: u32,
    /// The first block that transactions use, and the one after the last.
    pub(super) first: u32,
    pub(super) last: u32,
    /// The first block of the oldest transaction, and its number.
    pub(super) start: u32,
    pub(super) sequence: u32,
    /// The blocks that fast commits use.
    pub(in super::super) fast: std::ops::Range<u32>,
}

impl Log {
    /// The journal in this inode; `None` if there is nothing to replay.
    pub(in super::super) fn open(ext: &Ext, number: u32) -> Result<Option<Self>> {
        let inode = ext.inode(number)?;
        if inode.kind != FileKind::File {
            return Err(inode.corrupt("is no journal"));
        }
        let bits = ext.superblock.block_bits;
        let count = u32::try_from(inode.size >> bits).unwrap_or(u32::MAX);
        if !(2..=MAX_BLOCKS).contains(&count) {
            return Err(inode.corrupt("is a journal of an impossible size"));
        }
        let mut log = Self {
            source: Arc::clone(ext.blocks.source()),
            bits,
            extents: Vec::new(),
            features: 0,
            checksums: false,
            seed: 0,
            first: 0,
            last: 0,
            start: 0,
            sequence: 0,
            fast: 0..0,
        };
        let (mut walk, mut at) = (MapWalk::new(ext, &inode), 0u64);
        while at < count.into() {
            let segment = walk.segment(at, u64::from(count) - at)?;
            let ExtMapping::Stored(block) = segment.mapping else {
                return Err(inode.corrupt("is a journal with holes"));
            };
            log.extents.push((at as u32, block));
            if log.extents.len() > MAX_EXTENTS {
                return Err(inode.corrupt("is a journal with too many extents"));
            }
            at += segment.count;
        }
        let mut raw = log.read(0)?;
        raw.truncate(SUPERBLOCK_LEN);
        Ok(log.parse(&raw, count)?.then_some(log))
    }

    /// Decodes the superblock; false if there is nothing to replay.
    fn parse(&mut self, raw: &[u8], count: u32) -> Result<bool> {
        let version = be32(raw, 4);
        if raw[..4] != JOURNAL_MAGIC || !matches!(version, 3 | 4) {
            return Err(corrupt("the journal has no superblock"));
        }
        let second = version == 4;
        self.features = if second { be32(raw, 0x28) } else { 0 };
        if self.features & !KNOWN != 0 {
            return Err(unsupported(format!(
                "the journal has unknown features ({:#x})",
                self.features & !KNOWN
            )));
        }
        self.checksums = second && be32(raw, 0x24) & COMPAT_CHECKSUM != 0;
        self.seed = crc32c(!0, &raw[0x30..0x40]);
        if self.tail_len() > 0
            && (raw[0x50] != CRC32C || crc32c_without_field(!0, raw, 0xfc, 4) != be32(raw, 0xfc))
        {
            return Err(corrupt("the journal's superblock has a wrong checksum"));
        }
        let max = be32(raw, 0x10);
        (self.first, self.sequence, self.start) = (be32(raw, 0x14), be32(raw, 0x18), be32(raw, 0x1c));
        if be32(raw, 0xc) != 1 << self.bits || max > count || self.first == 0 || self.first >= max {
            return Err(corrupt("the journal's superblock does not fit the journal"));
        }
        self.last = max;
        if self.has(incompat::FAST_COMMIT) {
            let wanted = match be32(raw, 0x54) {
                0 => FAST_BLOCKS,
                stated => stated,
            };
            if let Some(rest) = max.checked_sub(wanted).filter(|rest| *rest >= MIN_BLOCKS) {
                self.last = rest;
            }
            // The kernel does not use the block between the two areas.
            self.fast = (self.last + 1).min(max)..max;
        }
        if self.start != 0 && !(self.first..self.last).contains(&self.start) {
            return Err(corrupt("the journal's superblock names a block outside of it"));
        }
        Ok(self.start != 0)
    }

    pub(in super::super) fn has(&self, feature: u32) -> bool {
        self.features & feature != 0
    }

    /// Whether commit blocks hold a checksum of the whole transaction.
    pub(super) fn sums_transactions(&self) -> bool {
        self.checksums && self.tail_len() == 0
    }

    /// The length of the checksum at the end of the journal's own blocks.
    pub(super) fn tail_len(&self) -> usize {
        if self.has(incompat::CSUM_V2 | incompat::CSUM_V3) { 4 } else { 0 }
    }

    pub(in super::super) fn block_len(&self) -> usize {
        1 << self.bits
    }

    /// The block of the file system that holds block `at` of the journal.
    pub(super) fn place(&self, at: u32) -> Result<Block> {
        let extent = self.extents.partition_point(|(start, _)| *start <= at).checked_sub(1);
        let (start, block) =
            extent.map(|extent| self.extents[extent]).ok_or_else(|| corrupt("the journal is empty"))?;
        Ok(Block(block.0 + u64::from(at - start)))
    }

    pub(in super::super) fn read(&self, at: u32) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.block_len()];
        self.source.read_at(self.place(at)?.0 << self.bits, &mut bytes)?;
        Ok(bytes)
    }

    /// The block after `at`; the journal is circular.
    pub(super) fn next(&self, at: u32) -> u32 {
        self.skip(at, 1)
    }

    /// The block `count` after `at`.
    pub(super) fn skip(&self, at: u32, count: u32) -> u32 {
        let len = u64::from(self.last - self.first);
        (u64::from(self.first) + (u64::from(at - self.first) + u64::from(count)) % len) as u32
    }

    /// Whether the checksum at the end of one of the journal's own blocks is correct.
    pub(super) fn tail_is_right(&self, bytes: &[u8]) -> bool {
        let at = bytes.len() - 4;
        self.tail_len() == 0 || crc32c_without_field(self.seed, bytes, at, 4) == be32(bytes, at)
    }
}
