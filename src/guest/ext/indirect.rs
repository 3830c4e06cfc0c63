//! Block maps with indirect blocks: the mapping of a file's blocks in ext2 and ext3.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::bytes::le32;

use super::blocks::{Block, Blocks};
use super::inode::{BLOCK_AREA, Inode};
use super::map::{ExtMapping, ExtSegment};

/// Blocks that the inode references directly.
const DIRECT: u64 = 12;
/// No file has more blocks.
const END: u64 = 1 << 32;

/// The segment at block `at` of a file, with its length within the same block of numbers.
pub(super) fn segment(inode: &Inode, blocks: &Blocks, at: u64) -> Result<ExtSegment> {
    let area = &inode.raw[BLOCK_AREA];
    if at < DIRECT {
        return Ok(run(&area[..DIRECT as usize * 4], at as usize));
    }
    if at >= END {
        return Ok(ExtSegment { count: u64::MAX - at, mapping: ExtMapping::Hole });
    }
    let per_block_bits = blocks.block_bits() - 2;
    let mut index = at - DIRECT;
    for level in 1..=3u32 {
        // Blocks of the file that one number of the inode covers.
        let covered = 1u64 << (per_block_bits * level);
        if index < covered {
            return descend(inode, blocks, le32(area, (11 + level as usize) * 4), index, level);
        }
        index -= covered;
    }
    Ok(ExtSegment { count: u64::MAX - at, mapping: ExtMapping::Hole })
}

/// Descends from a number through `level` levels of indirect blocks to the run at `index`.
fn descend(inode: &Inode, blocks: &Blocks, number: u32, mut index: u64, level: u32) -> Result<ExtSegment> {
    let bits = blocks.block_bits() - 2;
    let mut number = number;
    for level in (1..=level).rev() {
        if number == 0 {
            return Ok(ExtSegment { count: (1 << (bits * level)) - index, mapping: ExtMapping::Hole });
        }
        let bytes: Arc<[u8]> = blocks.read(Block(number.into())).map_err(|error| inode.about(error))?;
        let low_bits = bits * (level - 1);
        let slot = (index >> low_bits) as usize;
        if level == 1 {
            return Ok(run(&bytes, slot));
        }
        number = le32(&bytes, slot * 4);
        index &= (1 << low_bits) - 1;
    }
    unreachable!("the lowest level returns")
}

/// The run of consecutive numbers, or of zeroes, that begins at `slot`.
fn run(numbers: &[u8], slot: usize) -> ExtSegment {
    let first = le32(numbers, slot * 4);
    let rest = numbers[slot * 4..].chunks_exact(4).map(|number| le32(number, 0));
    if first == 0 {
        return ExtSegment {
            count: rest.take_while(|number| *number == 0).count() as u64,
            mapping: ExtMapping::Hole,
        };
    }
    let count =
        rest.zip(u64::from(first)..).take_while(|(number, expected)| u64::from(*number) == *expected).count();
    ExtSegment { count: count as u64, mapping: ExtMapping::Stored(Block(first.into())) }
}
