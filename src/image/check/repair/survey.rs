//! The structures that may be written in place: those with no other reference.

use super::super::Without;
use super::super::tables::{L2Table, Verdict};
use super::stage::Stage;
use crate::error::Result;
use crate::format::refcount::{refcount, table_entry};

/// Which of an image's tables can be trusted.
pub(super) struct Survey {
    /// Every cluster in use has a count; table and blocks are at valid offsets, and nothing overlaps them.
    pub(super) is_sound: bool,
    /// The active L1 table shares its clusters with nothing.
    pub(super) l1_is_sole: bool,
    /// For each L2 table: whether only L1 entries refer to it and all of it is valid.
    pub(super) is_trusted: Vec<bool>,
}

impl Survey {
    pub(super) fn take(stage: &Stage<'_>) -> Result<Self> {
        let (header, references) = (&stage.audited.header, &stage.references);
        let (cluster, refcounts, tables) =
            (header.cluster, &references.refcounts, references.l2_list.tables());
        let file_clusters = stage.audited.file_clusters();
        let table_end = header.refcount_table.offset.0 + refcounts.entries().len() as u64 * 8;
        let table = cluster.index(header.refcount_table.offset.0)..table_end.div_ceil(cluster.size());
        let l1_end = header.l1.offset.0 + header.l1.len_bytes();
        let l1 = cluster.index(header.l1.offset.0)..l1_end.div_ceil(cluster.size());
        let mut blocks = Vec::new();
        let mut is_sound = header.refcount_table.clusters > 0 && table.end <= file_clusters;
        for &entry in refcounts.entries() {
            match table_entry(entry, cluster) {
                Ok(None) => {}
                Ok(Some(block)) if cluster.index(block.0) < file_clusters => {
                    blocks.push(cluster.index(block.0));
                }
                _ => is_sound = false,
            }
        }
        blocks.sort_unstable();
        let mut survey =
            Self { is_sound, l1_is_sole: l1.end <= file_clusters, is_trusted: vec![false; tables.len()] };
        for place in stage.windows() {
            let window = stage.window(place, Without::default())?;
            let is_sole = |at: &u64| window.references(*at) == Some(1);
            let within = window.clusters();
            let inside =
                |range: &std::ops::Range<u64>| range.start.max(within.start)..range.end.min(within.end);
            survey.l1_is_sole &= inside(&l1).all(|at| is_sole(&at));
            survey.is_sound &= inside(&table).all(|at| is_sole(&at));
            let own = blocks.partition_point(|at| *at < within.start)
                ..blocks.partition_point(|at| *at < within.end);
            survey.is_sound &= blocks[own].iter().all(is_sole);
            let is_used = |at: u64| window.references(at) != Some(0);
            for part in stage.block_parts(within.clone()) {
                let has_block = matches!(refcounts.block(part.start), Ok(Some(_)));
                survey.is_sound &= has_block || !part.clone().any(is_used);
            }
            // In the order of the file.
            let own = |at: u64| tables.partition_point(|table| table.at.0 < at << cluster.bits());
            let own = own(within.start)..own(within.end);
            for (table, is_trusted) in tables[own.clone()].iter().zip(&mut survey.is_trusted[own]) {
                let at = table.at.0;
                let is_whole =
                    cluster.aligned(at) && at != 0 && at + cluster.size() <= stage.audited.file_len;
                let users = window.references(cluster.index(at)).map(u64::from);
                *is_trusted = is_whole && users == Some(table.weight.total) && stage.is_valid(table)?;
            }
        }
        Ok(survey)
    }
}

impl Stage<'_> {
    fn is_valid(&self, table: &L2Table) -> Result<bool> {
        let bytes = self.table_bytes(table)?;
        Ok(self.verdicts(table, &bytes).all(|(_, _, verdict)| verdict != Verdict::Nonsense))
    }

    pub(super) fn table_bytes(&self, table: &L2Table) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.audited.header.cluster.size() as usize];
        self.audited.read(table.at.0, &mut bytes)?;
        Ok(bytes)
    }

    /// The entries of a table that are not empty: their offset in its bytes, first word, and verdict.
    pub(super) fn verdicts<'s>(
        &'s self,
        table: &'s L2Table,
        bytes: &'s [u8],
    ) -> impl Iterator<Item = (usize, u64, Verdict)> + 's {
        let format = self.audited.header.entry_format();
        let len = format.l2_entry_len() as usize;
        (0..).zip(bytes.chunks_exact(len)).filter_map(move |(index, entry)| {
            let words = [refcount(entry, 0, 6), if format.extended { refcount(entry, 1, 6) } else { 0 }];
            let verdict = || table.verdict(format, &self.references.refcounts, words, index);
            (words != [0, 0]).then(|| (index as usize * len, words[0], verdict()))
        })
    }
}
