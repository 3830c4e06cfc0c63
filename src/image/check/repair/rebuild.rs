//! Completely new refcounts, at the end of the file.
//!
//! No existing cluster is touched until they are durable; then one write of at most 24 bytes within the
//! header's first sector names them. The clusters of the old ones are free from then on.

use std::ops::Range;

use super::super::Without;
use super::stage::{CountPolicy, Stage};
use crate::error::{Error, ErrorKind, Result};
use crate::format::header::{MAX_REFCOUNT_TABLE_LEN, REFCOUNT_TABLE_AT};
use crate::format::refcount::{max_refcount, set_refcount};
use crate::format::snapshot::{MAX_TABLE_LEN, with_required_extra};
use crate::io::WriteStorage;

use super::super::window::Window;

/// Bytes that are written at a time.
const BUFFER_LEN: usize = 1 << 20;

/// The structures that are rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rebuilt {
    /// The refcounts.
    Refcounts,
    /// The snapshot table, too, with the fields that version 3 requires.
    RefcountsAndSnapshotTable,
}

/// The clusters of all new structures: the snapshot table, the refcount table, its blocks.
struct RebuildLayout {
    start: u64,
    snapshot_clusters: u64,
    table_clusters: u64,
    end: u64,
    /// Which blocks there will be.
    needed: Vec<bool>,
}

impl Stage<'_> {
    /// Rewrites all refcounts, and the other structures of `what`.
    pub(super) fn rebuild(&self, policy: CountPolicy, what: Rebuilt) -> Result<()> {
        let snapshots = what == Rebuilt::RefcountsAndSnapshotTable;
        let without = Without { refcounts: true, snapshot_table: snapshots };
        let table = if snapshots { self.snapshot_table()? } else { Vec::new() };
        let layout = self.lay_out(without, policy, table.len() as u64)?;
        let file_len = self.audited.file_len;
        let written = self.write_new(&layout, without, policy, &table).and_then(|()| self.storage.sync());
        if let Err(error) = written {
            // Nothing refers to it yet. If this fails, too, the first error is reported.
            drop(self.storage.set_len(file_len));
            return Err(error);
        }
        let cluster = self.audited.header.cluster;
        let mut fields = Vec::new();
        fields.extend(((layout.start + layout.snapshot_clusters) << cluster.bits()).to_be_bytes());
        fields.extend((layout.table_clusters as u32).to_be_bytes());
        if snapshots {
            fields.extend(self.audited.header.snapshots.count.to_be_bytes());
            fields.extend((layout.start << cluster.bits()).to_be_bytes());
        }
        self.storage.write_at(REFCOUNT_TABLE_AT, &fields)?;
        self.storage.sync()
    }

    /// The snapshot table with complete entries.
    fn snapshot_table(&self) -> Result<Vec<u8>> {
        let (_, len) = self.audited.read_snapshots()?;
        let mut bytes = vec![0; len as usize];
        self.audited.read(self.audited.header.snapshots.offset.0, &mut bytes)?;
        let table = with_required_extra(
            &bytes,
            self.audited.header.snapshots.count,
            self.audited.header.virtual_size,
        );
        if table.len() as u64 > MAX_TABLE_LEN {
            return Err(
                self.limit("its snapshot table would become too large; delete snapshots with qemu-img")
            );
        }
        Ok(table)
    }

    fn limit(&self, fact: &str) -> Error {
        Error::new(ErrorKind::Limit, format!("{}: {fact}", self.audited.name))
    }

    /// The future count of a cluster.
    fn new_count(&self, window: &Window, cluster: u64, policy: CountPolicy) -> u64 {
        let references = window.references(cluster).unwrap_or(0);
        let stored = match policy {
            CountPolicy::References => 0,
            CountPolicy::NeverLower => window.stored(cluster).unwrap_or(0),
        };
        u64::from(references.max(stored)).min(max_refcount(self.audited.header.refcount_order))
    }

    fn lay_out(&self, without: Without, policy: CountPolicy, snapshots_len: u64) -> Result<RebuildLayout> {
        let cluster = self.audited.header.cluster;
        let per_block = self.references.refcounts.per_block();
        let mut start = self.audited.file_clusters();
        let mut used = Vec::new();
        for place in self.windows() {
            let window = self.window(place, without)?;
            for part in self.block_parts(window.clusters()) {
                // From the back: the last cluster in use may be the one after the file's end.
                if let Some(last) = part.clone().rev().find(|at| self.new_count(&window, *at, policy) > 0) {
                    used.push(part.start / per_block);
                    if window.references(last) != Some(0) {
                        start = start.max(last + 1);
                    }
                }
            }
        }
        let snapshot_clusters = snapshots_len.div_ceil(cluster.size());
        // Table and blocks count themselves, too: they grow until they cover everything.
        let (mut table_clusters, mut block_count) = (1, 1);
        loop {
            let end = start + snapshot_clusters + table_clusters + block_count;
            let blocks = (end - 1) / per_block + 1;
            if blocks * 8 > MAX_REFCOUNT_TABLE_LEN {
                let fact = "its refcounts would need a larger table than there may be; copy it with qemu-img \
                    convert";
                return Err(self.limit(fact));
            }
            let mut needed = vec![false; blocks as usize];
            for index in &used {
                needed[*index as usize] = true;
            }
            needed[(start / per_block) as usize..].fill(true);
            let found = (
                (blocks * 8).div_ceil(cluster.size()),
                needed.iter().filter(|needed| **needed).count() as u64,
            );
            if found == (table_clusters, block_count) {
                return Ok(RebuildLayout { start, snapshot_clusters, table_clusters, end, needed });
            }
            // Both only grow, as the end does.
            (table_clusters, block_count) = found;
        }
    }

    fn write_new(
        &self,
        layout: &RebuildLayout,
        without: Without,
        policy: CountPolicy,
        snapshots: &[u8],
    ) -> Result<()> {
        let header = &self.audited.header;
        let (cluster, order) = (header.cluster, header.refcount_order);
        let per_block = self.references.refcounts.per_block();
        let mut out =
            Stream { storage: self.storage, at: layout.start << cluster.bits(), buffer: Vec::new() };
        out.push(snapshots)?;
        out.pad_to((layout.start + layout.snapshot_clusters) << cluster.bits())?;
        let first_block = layout.start + layout.snapshot_clusters + layout.table_clusters;
        let mut next = first_block;
        for needed in &layout.needed {
            let entry = if *needed { next << cluster.bits() } else { 0 };
            next += u64::from(*needed);
            out.push(&entry.to_be_bytes())?;
        }
        assert_eq!(next, layout.end, "the blocks are those that were counted");
        out.pad_to(first_block << cluster.bits())?;
        let counted = self.audited.file_clusters() + 1;
        let all = layout.needed.len() as u64 * per_block;
        let mut first = 0;
        while first < all {
            let len = self.window_clusters.min(all - first);
            // Beyond the file there are only the new tables.
            let window = if first < counted {
                self.window((first, len), without)?
            } else {
                Window::new(cluster, first, len, u64::MAX)
            };
            for part in self.block_parts(first..first + len) {
                if !layout.needed[(part.start / per_block) as usize] {
                    continue;
                }
                out.counts(&part, order, |at| {
                    if (layout.start..layout.end).contains(&at) {
                        1
                    } else {
                        self.new_count(&window, at, policy)
                    }
                })?;
            }
            first += len;
        }
        out.flush()
    }
}

/// Bytes that follow each other in the file.
struct Stream<'a> {
    storage: &'a dyn WriteStorage,
    at: u64,
    buffer: Vec<u8>,
}

impl Stream<'_> {
    fn push(&mut self, bytes: &[u8]) -> Result<()> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_LEN { self.flush() } else { Ok(()) }
    }

    /// Zeroes up to the byte `at` of the file.
    fn pad_to(&mut self, at: u64) -> Result<()> {
        let missing = at - self.at - self.buffer.len() as u64;
        self.push(&vec![0; missing as usize])
    }

    /// The counts of a run of clusters, which fills whole bytes.
    fn counts(&mut self, clusters: &Range<u64>, order: u32, count: impl Fn(u64) -> u64) -> Result<()> {
        for first in clusters.clone().step_by(4096) {
            let part = first..(first + 4096).min(clusters.end);
            let mut bytes = vec![0; (((part.end - part.start) << order) / 8) as usize];
            for (index, cluster) in part.enumerate() {
                set_refcount(&mut bytes, index, order, count(cluster));
            }
            self.push(&bytes)?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.storage.write_at(self.at, &self.buffer)?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}
