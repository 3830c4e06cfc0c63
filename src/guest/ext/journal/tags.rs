//! Tags: the block of the file system of each block after a descriptor, in all four layouts.

use crate::error::Result;
use crate::guest::bytes::{be16, be32};

use super::super::blocks::Block;
use super::super::bytes::join;
use super::super::checksum::crc32c;
use super::log::{Log, incompat};

const HEADER_LEN: usize = 12;
const UUID_LEN: usize = 16;

const ESCAPED: u16 = 1;
const SAME_UUID: u16 = 2;
const LAST: u16 = 8;

pub(super) struct BlockTag {
    pub(super) block: Block,
    pub(super) escaped: bool,
    /// 16 bits of the checksum in version 2, all 32 in version 3.
    sum: u32,
}

/// The tags of a descriptor, in the order of the blocks that follow it.
pub(super) fn tags<'a>(log: &'a Log, descriptor: &'a [u8]) -> impl Iterator<Item = BlockTag> + 'a {
    let (third, wide) = (log.has(incompat::CSUM_V3), log.has(incompat::SIXTY_FOUR));
    let len = match (third, log.has(incompat::CSUM_V2), wide) {
        (true, ..) => 16,
        // Two bytes more than the checksum needs: a bug of the first version that became the format.
        (false, true, true) => 14,
        (false, true, false) => 10,
        (false, false, true) => 12,
        (false, false, false) => 8,
    };
    let end = descriptor.len() - log.tail_len();
    let mut at = HEADER_LEN;
    std::iter::from_fn(move || {
        if at + len > end {
            return None;
        }
        let raw = &descriptor[at..at + len];
        let flags = be16(raw, 6);
        at = if flags & LAST != 0 {
            end
        } else {
            at + len + if flags & SAME_UUID == 0 { UUID_LEN } else { 0 }
        };
        Some(BlockTag {
            block: Block(join(be32(raw, 0), if wide { be32(raw, 8) } else { 0 })),
            escaped: flags & ESCAPED != 0,
            sum: if third { be32(raw, 12) } else { be16(raw, 4).into() },
        })
    })
}

/// Whether the data block at `at` is the one that the tag describes.
pub(super) fn sum_is_right(log: &Log, tag: &BlockTag, transaction: u32, at: u32) -> Result<bool> {
    if log.tail_len() == 0 {
        return Ok(true);
    }
    let sum = crc32c(crc32c(log.seed, &transaction.to_be_bytes()), &log.read(at)?);
    Ok(tag.sum == if log.has(incompat::CSUM_V3) { sum } else { sum & 0xffff })
}
