//! The journal, replayed in memory: which blocks are newer in it, and their positions.
//!
//! Nothing is written and no content is kept: the result is a [`JournalOverlay`] of positions. The replay
//! follows the kernel's, up to the first incomplete transaction. Where the kernel would refuse, this is an
//! error; the caller then shows the file system as of the last checkpoint and says so.

mod log;
mod scan;
mod tags;

use std::collections::HashMap;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::{be32, be64, corrupt};

use super::blocks::{Block, JournalOverlay, Journaled};

pub(super) use log::Log;
use scan::JournalScan;

/// Blocks in the overlay at most: 16 GiB of journal with blocks of 4 KiB.
const MAX_BLOCKS: usize = 4 << 20;

/// The result of a replay.
#[derive(Debug, Default)]
pub(super) struct Replayed {
    pub(super) overlay: JournalOverlay,
    /// The number of the first incomplete transaction: fast commits belong to it.
    pub(super) end: u32,
    pub(super) remarks: Vec<String>,
}

/// Replays all complete transactions.
pub(super) fn replay(log: &Log) -> Result<Replayed> {
    let JournalScan { descriptors, revokes, end, mut remarks } = scan::scan(log)?;
    let mut revoked = HashMap::new();
    for (at, transaction) in revokes {
        revoke(log, at, transaction, &mut revoked)?;
    }
    let mut newer: HashMap<Block, Journaled> = HashMap::new();
    let mut damaged = 0;
    for (at, transaction) in descriptors {
        let descriptor = log.read(at)?;
        let mut at = log.next(at);
        for tag in tags::tags(log, &descriptor) {
            let here = at;
            at = log.next(here);
            // A block that was freed in this transaction or a later one may now hold file content.
            if revoked.get(&tag.block).is_some_and(|last| !is_later(transaction, *last)) {
                continue;
            }
            if !tags::sum_is_right(log, &tag, transaction, here)? {
                damaged += 1;
                continue;
            }
            newer.insert(tag.block, Journaled { place: log.place(here)?, escaped: tag.escaped });
            if newer.len() > MAX_BLOCKS {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("its journal holds more than {MAX_BLOCKS} blocks"),
                ));
            }
        }
    }
    if damaged > 0 {
        remarks.push(format!("{damaged} blocks in the journal are damaged: their older versions are shown"));
    }
    Ok(Replayed { overlay: JournalOverlay::new(newer), end, remarks })
}

/// Records the blocks that a revoke block revokes.
fn revoke(log: &Log, at: u32, transaction: u32, revoked: &mut HashMap<Block, u32>) -> Result<()> {
    let bytes = log.read(at)?;
    let end = be32(&bytes, 12) as usize;
    if end > bytes.len() - log.tail_len() {
        return Err(corrupt("a block of revoked blocks is damaged"));
    }
    let wide = log.has(log::incompat::SIXTY_FOUR);
    for record in bytes[..end].get(16..).unwrap_or_default().chunks_exact(if wide { 8 } else { 4 }) {
        let block = Block(if wide { be64(record, 0) } else { be32(record, 0).into() });
        let last = revoked.entry(block).or_insert(transaction);
        if is_later(transaction, *last) {
            *last = transaction;
        }
        if revoked.len() > MAX_BLOCKS {
            return Err(Error::new(
                ErrorKind::Limit,
                format!("its journal revokes more than {MAX_BLOCKS} blocks"),
            ));
        }
    }
    Ok(())
}

/// Transaction numbers wrap at 32 bits.
fn is_later(one: u32, other: u32) -> bool {
    one.wrapping_sub(other).cast_signed() > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_transactions_wrap() {
        assert!(is_later(2, 1));
        assert!(!is_later(1, 1));
        assert!(is_later(3, u32::MAX - 3));
        assert!(!is_later(u32::MAX - 3, 3));
    }
}
