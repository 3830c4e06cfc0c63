//! Finds the complete transactions; like the kernel, it separates them from remains of older ones.

use crate::error::Result;
use crate::guest::bytes::{be32, be64};

use super::super::blocks::JOURNAL_MAGIC;
use super::super::checksum::{crc32_be, crc32c, crc32c_without_field};
use super::log::{Log, incompat};
use super::tags;

const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const REVOKE: u32 = 5;

const COMMIT_HEADER_LEN: usize = 64;
const COMMIT_SUM_AT: usize = 16;

/// The journal's own blocks of complete transactions, each with the number of its transaction.
#[derive(Default)]
pub(super) struct JournalScan {
    pub(super) descriptors: Vec<(u32, u32)>,
    pub(super) revokes: Vec<(u32, u32)>,
    /// The number after that of the last complete transaction.
    pub(super) end: u32,
    pub(super) remarks: Vec<String>,
}

pub(super) fn scan(log: &Log) -> Result<JournalScan> {
    let mut found = JournalScan { end: log.sequence, ..JournalScan::default() };
    let (mut at, mut left) = (log.start, log.last - log.first);
    // Of the current transaction: its blocks, its checksum, and whether one of its blocks has a wrong
    // checksum.
    let (mut descriptors, mut revokes) = (Vec::new(), Vec::new());
    let (mut sum, mut doubtful) = (!0, false);
    let mut last_time = 0;
    while left > 0 {
        let bytes = log.read(at)?;
        if bytes[..4] != JOURNAL_MAGIC || be32(&bytes, 8) != found.end {
            break;
        }
        let (here, mut used) = (at, 1);
        match be32(&bytes, 4) {
            DESCRIPTOR => {
                doubtful |= !log.tail_is_right(&bytes);
                let count = tags::tags(log, &bytes).count() as u32;
                if log.sums_transactions() {
                    sum = crc32_be(sum, &bytes);
                    for block in 1..=count.min(left - 1) {
                        sum = crc32_be(sum, &log.read(log.skip(at, block))?);
                    }
                }
                used += count;
                descriptors.push((here, found.end));
            }
            REVOKE => {
                doubtful |= !log.tail_is_right(&bytes);
                revokes.push((here, found.end));
            }
            COMMIT => {
                let time = be64(&bytes, 48);
                // The commit time separates remains of an older round from damage. With asynchronous commits,
                // a commit block may reach the disk before the blocks it commits; that is no damage.
                let whole = !doubtful && commit_is_right(log, &bytes, sum);
                let torn = !doubtful && log.has(incompat::ASYNC_COMMIT);
                if !whole {
                    if time >= last_time && !torn {
                        let transaction = found.end;
                        found.remarks.push(format!(
                            "transaction {transaction} in the journal is damaged: it and all later changes \
                                are not shown"
                        ));
                    }
                    break;
                }
                found.descriptors.append(&mut descriptors);
                found.revokes.append(&mut revokes);
                found.end = found.end.wrapping_add(1);
                (sum, last_time) = (!0, time);
            }
            _ => break,
        }
        at = log.skip(at, used);
        left = left.saturating_sub(used);
    }
    Ok(found)
}

fn commit_is_right(log: &Log, bytes: &[u8], sum: u32) -> bool {
    let kept = be32(bytes, COMMIT_SUM_AT);
    if log.tail_len() > 0 {
        let whole = crc32c_without_field(log.seed, bytes, COMMIT_SUM_AT, 4);
        // A disk may write only the beginning of a block and keep old bytes in the rest.
        let padding = vec![0; bytes.len() - COMMIT_HEADER_LEN];
        let part =
            crc32c(crc32c_without_field(log.seed, &bytes[..COMMIT_HEADER_LEN], COMMIT_SUM_AT, 4), &padding);
        return kept == whole || kept == part;
    }
    if !log.sums_transactions() {
        return true;
    }
    match bytes[12..14] {
        [1, 4] => kept == sum,
        [0, 0] => kept == 0,
        _ => false,
    }
}
