//! The lookup that readers and the writer share: from an offset of a disk through an L1 and an L2 table to
//! the run of bytes with the same mapping, in one entry or in several contiguous ones.
//!
//! Every entry is treated as hostile. A run has at least one byte, and never more than was asked for. Tables
//! come by the slice from a [`TableSource`]; nothing is allocated, locked or read here.

use std::ops::Deref;
use std::sync::Arc;

use crate::format::{EntryFormat, L1Table, L2Entry, Malformed, Mapping, RawL2Entry};
use crate::units::{HostOffset, Run};

/// Bytes of a slice, the unit in which tables are read and cached. A shorter table is one slice.
pub(super) const SLICE_LEN: u64 = 4096;

/// The big-endian words of a slice, decoded.
pub(super) fn words_of(bytes: &[u8]) -> Arc<[u64]> {
    bytes.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).collect()
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
    let (format, span) = (source.format(), source.format().l1_span());
    let (index, entries) = (at / span, u64::from(source.l1().entries));
    let hole = L2Entry { mapping: Mapping::Hole, copied: false };
    if index >= entries {
        return Ok(Run::new(hole, max));
    }
    let (words, first) = source.l1_slice(index)?;
    let l2 = format.l1(words[first]).map_err(|reason| source.bad_l1(at, reason))?.l2;
    let rest = span - at % span;
    if let Some(table) = l2 {
        return lookup_in(source, format, table, at, max.min(rest));
    }
    // L1 entries without a table that follow in the slice make one long hole.
    let following = &words[first + 1..];
    let following = &following[..following.len().min((entries - index - 1) as usize)];
    let more =
        following.iter().take_while(|word| format.l1(**word).is_ok_and(|entry| entry.l2.is_none())).count();
    Ok(Run::new(hole, max.min(rest.saturating_add(span.saturating_mul(more as u64)))))
}

fn lookup_in<S: TableSource>(
    source: &S,
    format: EntryFormat,
    table: HostOffset,
    at: u64,
    max: u64,
) -> Result<Run<L2Entry>, S::Miss> {
    let (cluster, entry_words) = (format.cluster, format.l2_entry_words());
    let index = cluster.index(at) % format.l2_entries();
    let (words, first) = source.l2_slice(table, index * entry_words)?;
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
