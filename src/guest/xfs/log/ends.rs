//! The ends of the log: the newest whole record, and the oldest one that it needs.
//!
//! The cycle numbers of the blocks fall once in the ring, where the newest record ends. A binary search finds
//! that place; because records are written side by side, the blocks before it are checked for older ones.

use crate::error::Result;
use crate::guest::bytes::corrupt;

use super::ring::{Header, RECORD_LIMIT, Ring, UNIT, cycle_of};

/// Buffers that the kernel writes side by side: so many records may be incomplete at the end.
const BUFFERS: usize = 8;
/// Blocks before the end that may be out of order.
const UNORDERED: u64 = (BUFFERS * RECORD_LIMIT / 2 / UNIT) as u64;
/// Blocks read at once.
const BATCH: u64 = 128;

/// What must be replayed.
pub(super) struct Ends {
    /// The block of the oldest record.
    pub(super) tail: u64,
    /// The newest whole record.
    pub(super) newest: Header,
}

/// The ends of the log; `None` if it was never written. `must_match`: records have checksums.
pub(super) fn find(ring: &Ring<'_>, must_match: bool) -> Result<Option<Ends>> {
    let Some(head) = head(ring)? else { return Ok(None) };
    let mut candidates = before(ring, head)?;
    if candidates.is_empty() {
        return Err(corrupt("it holds no record"));
    }
    // From the oldest on: behind the first incomplete one nothing counts.
    let mut newest = None;
    while let Some(header) = candidates.pop() {
        let room = match (head + ring.count - header.block) % ring.count {
            0 => ring.count,
            room => room,
        };
        if header.block_count() > room || ring.content(&header, must_match).is_err() {
            break;
        }
        newest = Some(header);
    }
    let newest = newest.ok_or_else(|| corrupt("none of its last records is whole"))?;
    let tail = newest.tail.block();
    if tail >= ring.count {
        return Err(corrupt(format!("its oldest record is at block {tail}, which does not exist")));
    }
    Ok(Some(Ends { tail, newest }))
}

/// The block behind the newest record; `None` if the log was never written.
fn head(ring: &Ring<'_>) -> Result<Option<u64>> {
    let last_block = ring.count - 1;
    let (first, last) = (ring.cycle(0)?, ring.cycle(last_block)?);
    if first == 0 {
        return Ok(None);
    }
    // The blocks of the older cycle follow those of the newer one. In the first cycle, they are zeroes.
    let older = if first == last { first.wrapping_sub(1) } else { last };
    let mut head = if first == last {
        ring.count
    } else {
        let (mut newer, mut other) = (0, last_block);
        while newer + 1 < other {
            let middle = newer.midpoint(other);
            if ring.cycle(middle)? == last {
                other = middle;
            } else {
                newer = middle;
            }
        }
        other
    };
    // A block that a crash kept from being written ends the log before it.
    let scanned = UNORDERED.min(head);
    let mut at = head - scanned;
    'scan: while at < head {
        let count = BATCH.min(head - at);
        let mut blocks = vec![0; count as usize * UNIT];
        ring.read(at, &mut blocks)?;
        for (index, block) in (0..).zip(blocks.chunks_exact(UNIT)) {
            if cycle_of(block) == older {
                head = at + index;
                break 'scan;
            }
        }
        at += count;
    }
    Ok(Some(head))
}

/// The last records that begin before `head`, the newest first.
fn before(ring: &Ring<'_>, head: u64) -> Result<Vec<Header>> {
    let mut found = Vec::new();
    let mut left = ring.count.min(2 * UNORDERED);
    let mut end = head;
    while left > 0 && found.len() <= BUFFERS {
        if end == 0 {
            end = ring.count;
        }
        let count = BATCH.min(left).min(end);
        let mut blocks = vec![0; count as usize * UNIT];
        ring.read(end - count, &mut blocks)?;
        for (index, block) in blocks.chunks_exact(UNIT).enumerate().rev() {
            if block.starts_with(&0xfeed_babe_u32.to_be_bytes())
                && found.len() <= BUFFERS
                && let Some(header) = ring.header(end - count + index as u64)?
            {
                found.push(header);
            }
        }
        end -= count;
        left -= count;
    }
    Ok(found)
}
