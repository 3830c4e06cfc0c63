//! The refcounts that an image stores, and the references to the blocks that store them.

use super::audited::{Audited, Pass};
use super::report::FindingKind;
use crate::error::Result;
use crate::format::refcount::{block_entries, refcount, table_entry};
use crate::units::{ClusterBits, HostOffset};

/// The refcount table, in memory: at most 8 MiB.
pub(super) struct Refcounts {
    entries: Vec<u64>,
    cluster: ClusterBits,
    order: u32,
    /// Clusters that one block counts.
    per_block: u64,
}

impl Refcounts {
    pub(super) fn read(audited: &Audited<'_>) -> Result<Self> {
        let header = &audited.header;
        let cluster = header.cluster;
        let mut bytes = vec![0; header.refcount_table.clusters as usize * cluster.size() as usize];
        audited.read(header.refcount_table.offset.0, &mut bytes)?;
        let entries = bytes.chunks_exact(8).map(|entry| refcount(entry, 0, 6)).collect();
        let order = header.refcount_order;
        Ok(Self { entries, cluster, order, per_block: block_entries(cluster, order) })
    }

    /// The block that counts `cluster`. `Err` if its offset is unaligned, so that it cannot be read; a
    /// reserved bit alone does not hide it.
    pub(super) fn block(&self, cluster: u64) -> std::result::Result<Option<HostOffset>, ()> {
        let index = usize::try_from(cluster / self.per_block).unwrap_or(usize::MAX);
        let entry = self.entries.get(index).copied().unwrap_or(0);
        table_entry(entry & !0x1ff, self.cluster).map_err(|_| ())
    }

    /// Clusters that one block counts.
    pub(super) fn per_block(&self) -> u64 {
        self.per_block
    }

    /// The table's entries.
    pub(super) fn entries(&self) -> &[u64] {
        &self.entries
    }

    /// Reads the one count of `cluster`; `None` if its block cannot be read.
    pub(super) fn stored(&self, audited: &Audited<'_>, cluster: u64) -> Result<Option<u64>> {
        let Ok(block) = self.block(cluster) else { return Ok(None) };
        let Some(block) = block else { return Ok(Some(0)) };
        // Counts narrower than a byte: at most eight of them in one.
        let index = cluster % self.per_block;
        let width = 1u64 << self.order;
        let byte = index * width / 8;
        let mut bytes = [0; 8];
        audited.read(block.0 + byte, &mut bytes[..(width / 8).max(1) as usize])?;
        let within = if width < 8 { index % (8 / width) } else { 0 };
        Ok(Some(refcount(&bytes, within as usize, self.order)))
    }

    /// Fills in the stored counts of the pass's window.
    pub(super) fn load(&self, pass: &mut Pass<'_>) -> Result<()> {
        let clusters = pass.window.clusters();
        let mut block_bytes = vec![0; self.cluster.size() as usize];
        let mut at = clusters.start;
        while at < clusters.end {
            let next = ((at / self.per_block + 1) * self.per_block).min(clusters.end);
            match self.block(at) {
                Ok(None) => {}
                Err(()) => (at..next).for_each(|cluster| pass.window.set_stored(cluster, None)),
                Ok(Some(block)) => {
                    pass.audited.read(block.0, &mut block_bytes)?;
                    for cluster in at..next {
                        let count = refcount(&block_bytes, (cluster % self.per_block) as usize, self.order);
                        pass.window.set_stored(cluster, Some(count));
                    }
                }
            }
            at = next;
        }
        Ok(())
    }

    /// Counts the references to the blocks. Comes last: a block that anything else also refers to is reported
    /// as such.
    pub(super) fn count_blocks(&self, pass: &mut Pass<'_>, file_clusters: u64) {
        for (index, &entry) in self.entries.iter().enumerate() {
            let block = match table_entry(entry, self.cluster) {
                Ok(None) => continue,
                Ok(Some(block)) => block,
                Err(reason) => {
                    if pass.first {
                        pass.report.corruptions(FindingKind::Structure, 1, || {
                            format!("refcount table entry {index}: {}", reason.fact())
                        });
                    }
                    continue;
                }
            };
            let cluster = self.cluster.index(block.0);
            if cluster >= file_clusters {
                if pass.first {
                    pass.report.corruptions(FindingKind::Structure, 1, || {
                        format!("refcount block {index} is outside image")
                    });
                }
                continue;
            }
            if pass.window.clusters().contains(&cluster) {
                pass.window.count(block.0, self.cluster.size(), 1, pass.report);
                let references = pass.window.references(cluster);
                if references != Some(1) {
                    let count = references.unwrap_or(0);
                    pass.report.corruptions(FindingKind::Structure, 1, || {
                        format!("refcount block {index} refcount={count}")
                    });
                }
            }
        }
    }
}
