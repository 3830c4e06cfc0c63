//! The lookup that readers and the writer share: from an offset of a disk through an L1 and an L2 table to
//! the run of bytes with the same mapping, in one entry or in several contiguous ones.
//!
//! Every entry is treated as hostile. A run has at least one byte, and never more than was asked for. Tables
//! come by the slice from a [`TableSource`]; nothing is allocated, locked or read here.

use std::ops::Deref;
use std::sync::Arc;

use crate::format::{EntryFormat, L1Table, L2Entry, Malformed, Mapping, RawL2Entry};
use crate::units::{HostOffset, Run, are_zero};

/// Bytes of a slice, the unit in which tables are read and cached. A shorter table is one slice.
pub(super) const SLICE_LEN: u64 = 4096;

/// The big-endian words of a slice, decoded.
pub(super) fn words_of(bytes: &[u8]) -> Arc<[u64]> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
}

/// Words that are looked at together: most parts of most tables are empty.
const PART: usize = 16;

/// The same into memory that is as long.
pub(super) fn decode(bytes: &[u8], words: &mut [u64]) {
    for (words, bytes) in words.chunks_mut(PART).zip(bytes.chunks(PART * 8)) {
        if are_zero(bytes) {
            words.fill(0);
        } else {
            for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
                *word = u64::from_be_bytes(*bytes);
            }
        }
    }
}

/// How many words at the beginning are zero.
fn empty_count(words: &[u64]) -> usize {
    // Without an end at the first other word, so that several are looked at by one instruction.
    let is_empty = |part: &&[u64]| part.iter().fold(0, |any, word| any | word) == 0;
    let parts = words.chunks_exact(PART).take_while(is_empty).count();
    let rest = &words[parts * PART..];
    parts * PART + rest.iter().take_while(|word| **word == 0).count()
}

/// The tables of a lookup.
pub(super) trait TableSource {
    /// Words of a slice.
    type Words: Deref<Target = [u64]>;
    /// The reason for no answer.
    type Miss;

    /// How entries are read.
    fn format(&self) -> EntryFormat;

    /// The L1 table of the disk.
    fn l1(&self) -> L1Table;

    /// The slice that holds word `index` of the L1 table, and the index of that word in it.
    fn l1_slice(&self, index: u64) -> Result<(Self::Words, usize), Self::Miss>;

    /// The same of an L2 table.
    fn l2_slice(&self, table: HostOffset, index: u64) -> Result<(Self::Words, usize), Self::Miss>;

    /// The error for an invalid L1 entry of `at`.
    fn bad_l1(&self, at: u64, reason: Malformed) -> Self::Miss;

    /// The same of the L2 entry.
    fn bad_l2(&self, at: u64, reason: Malformed) -> Self::Miss;

    /// The fields of an entry that matter here: entries with equal ones are joined into one run.
    fn relevant(&self, entry: L2Entry) -> L2Entry;
}

/// The entry for `at`, for at most `max` bytes.
pub(super) fn lookup<S: TableSource>(source: &S, at: u64, max: u64) -> Result<Run<L2Entry>, S::Miss> {
    let span = source.format().l1_span();
    let (index, entries) = (at / span, u64::from(source.l1().entries));
    let hole = L2Entry { mapping: Mapping::Hole, copied: false };
    if index >= entries {
        return Ok(Run::new(hole, max));
    }
    let (words, first) = source.l1_slice(index)?;
    let format = source.format();
    let l2 = format.l1(words[first]).map_err(|reason| source.bad_l1(at, reason))?.l2;
    let rest = span - at % span;
    if let Some(table) = l2 {
        return lookup_in(source, table, at, max);
    }
    // L1 entries without a table that follow in the slice make one long hole.
    let following = &words[first + 1..];
    let following = &following[..following.len().min((entries - index - 1) as usize)];
    let more =
        following.iter().take_while(|word| format.l1(**word).is_ok_and(|entry| entry.l2.is_none())).count();
    Ok(Run::new(hole, max.min(rest.saturating_add(span.saturating_mul(more as u64)))))
}

/// The same within the L2 table of `at`.
pub(super) fn lookup_in<S: TableSource>(
    source: &S,
    table: HostOffset,
    at: u64,
    max: u64,
) -> Result<Run<L2Entry>, S::Miss> {
    let format = source.format();
    let max = max.min(format.l1_span() - at % format.l1_span());
    let (cluster, entry_words) = (format.cluster, format.l2_entry_words());
    let index = cluster.index(at) % format.l2_entries();
    let (words, first) = source.l2_slice(table, index * entry_words)?;
    // Most entries of most tables are empty, and need no decoding. Entries of two words end with whole ones.
    let empty = empty_count(&words[first..]) as u64 / entry_words;
    if empty > 0 {
        let len = (empty * cluster.size()).saturating_sub(cluster.within(at));
        return Ok(Run::new(L2Entry { mapping: Mapping::Hole, copied: false }, len.min(max)));
    }
    let mut entries = words[first..].chunks_exact(entry_words as usize);
    let mut next = |at: u64| {
        let found = format.l2_run(RawL2Entry::new(format, entries.next()?), at);
        Some(found.map(|run| run.map(|entry| source.relevant(entry))))
    };
    let found = next(at).expect("the slice holds the entry").map_err(|reason| source.bad_l2(at, reason))?;
    let (entry, mut len) = (found.value, found.len);
    // Entries that continue where the last ended make one run.
    while len < max && cluster.aligned(at + len) {
        match next(at + len) {
            Some(Ok(other))
                if entry.copied == other.value.copied
                    && entry.mapping.continues(other.value.mapping, len) =>
            {
                len += other.len;
            }
            _ => break,
        }
    }
    Ok(Run::new(entry, len.min(max)))
}
