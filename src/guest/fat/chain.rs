//! The allocation tables: the successor of each cluster, and the free clusters.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::cache::Cache;
use crate::error::Result;
use crate::guest::Source;
use crate::guest::bytes::{corrupt, le16, le32};

use super::volume::{FIRST_CLUSTER, FatVolume, FatWidth};

/// Bytes of a table that are read at once. Entries of 12, 16 and 32 bits never cross its end.
const PAGE_LEN: u64 = 3 << 11;
const PAGES_BUDGET: usize = 1 << 20;
/// Of a chain, one cluster in so many is cached.
const MARK_EVERY: u64 = 1024;
const MARKS_BUDGET: usize = 1 << 20;

/// A run of contiguous clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ClusterRun {
    pub(super) first: u32,
    pub(super) count: u64,
}

/// The tables of a volume.
pub(super) struct Chains {
    pages: Cache<u64, Arc<[u8]>>,
    /// By a chain's first cluster: its clusters number 0, 1024, 2048 and so on.
    marks: Cache<u32, Arc<Mutex<Vec<u32>>>>,
}

impl Chains {
    pub(super) fn new() -> Self {
        Self { pages: Cache::new(PAGES_BUDGET), marks: Cache::new(MARKS_BUDGET) }
    }

    /// The clusters of a chain from number `from` on: up to `count` of them in up to `most` runs. There are
    /// fewer where the chain ends or breaks; an error if `from` is after that.
    pub(super) fn clusters(
        &self,
        place: (&FatVolume, &dyn Source),
        start: u32,
        from: u64,
        count: u64,
        most: usize,
    ) -> Result<Vec<ClusterRun>> {
        let mut walk = ChainWalk { chains: self, place, page: None };
        let mut cluster = self.seek(&mut walk, start, from)?;
        let mut runs: Vec<ClusterRun> = Vec::new();
        for left in (0..count).rev() {
            let run_count = runs.len();
            match runs.last_mut() {
                Some(last) if u64::from(last.first) + last.count == u64::from(cluster) => last.count += 1,
                _ if run_count == most => break,
                _ => runs.push(ClusterRun { first: cluster, count: 1 }),
            }
            if left > 0 {
                match walk.next(cluster) {
                    Ok(Some(next)) => cluster = next,
                    Ok(None) | Err(_) => break,
                }
            }
        }
        Ok(runs)
    }

    /// The successor of a cluster; `None` at the end of the chain.
    pub(super) fn next(&self, place: (&FatVolume, &dyn Source), cluster: u32) -> Result<Option<u32>> {
        ChainWalk { chains: self, place, page: None }.next(cluster)
    }

    /// The cluster number `index` of a chain.
    fn seek(&self, walk: &mut ChainWalk<'_>, start: u32, index: u64) -> Result<u32> {
        walk.check(start)?;
        let marks = self.marks.get(&start).unwrap_or_else(|| {
            let marks = Arc::new(Mutex::new(vec![start]));
            // Enough for a file of 4 GiB in clusters of 4 KiB.
            self.marks.put(start, Arc::clone(&marks), 4096);
            marks
        });
        let (mut number, mut cluster) = {
            let marks = marks.lock();
            let mark = (index / MARK_EVERY).min(marks.len() as u64 - 1);
            (mark * MARK_EVERY, marks[mark as usize])
        };
        while number < index {
            let Some(next) = walk.next(cluster)? else {
                return Err(corrupt(format!(
                    "the chain of cluster {start} ends after {} clusters",
                    number + 1
                )));
            };
            (number, cluster) = (number + 1, next);
            if number.is_multiple_of(MARK_EVERY) {
                let mut marks = marks.lock();
                if marks.len() as u64 == number / MARK_EVERY {
                    marks.push(cluster);
                }
            }
        }
        Ok(cluster)
    }

    /// Counts the free clusters.
    pub(super) fn free_count(&self, place: (&FatVolume, &dyn Source)) -> Result<u64> {
        let mut walk = ChainWalk { chains: self, place, page: None };
        let mut count = 0;
        for cluster in FIRST_CLUSTER..FIRST_CLUSTER + place.0.cluster_count {
            count += u64::from(walk.entry(cluster)? == 0);
        }
        Ok(count)
    }

    /// A page of the first table, or of the next one if that cannot be read.
    fn page(&self, (volume, source): (&FatVolume, &dyn Source), number: u64) -> Result<Arc<[u8]>> {
        if let Some(page) = self.pages.get(&number) {
            return Ok(page);
        }
        let at = number * PAGE_LEN;
        let mut page = vec![0; volume.table_len.saturating_sub(at).min(PAGE_LEN) as usize];
        let mut result = Ok(());
        for table in 0..u64::from(volume.table_count) {
            result = source.read_at(volume.table_at + table * volume.table_len + at, &mut page);
            if result.is_ok() {
                break;
            }
        }
        result?;
        let page: Arc<[u8]> = page.into();
        self.pages.put(number, Arc::clone(&page), page.len());
        Ok(page)
    }
}

/// A walk along a chain, with the last page of the table.
struct ChainWalk<'a> {
    chains: &'a Chains,
    place: (&'a FatVolume, &'a dyn Source),
    page: Option<(u64, Arc<[u8]>)>,
}

impl ChainWalk<'_> {
    fn next(&mut self, cluster: u32) -> Result<Option<u32>> {
        let entry = self.entry(cluster)?;
        // As in the kernel, a bad-cluster mark ends the chain, too.
        let end = match self.place.0.kind {
            FatWidth::Fat12 => 0xff7,
            FatWidth::Fat16 => 0xfff7,
            FatWidth::Fat32 => 0x0fff_fff7,
        };
        if entry >= end {
            return Ok(None);
        }
        self.check(entry)?;
        Ok(Some(entry))
    }

    fn check(&self, cluster: u32) -> Result<()> {
        match self.place.0.cluster_at(cluster) {
            Some(_) => Ok(()),
            None => Err(corrupt(format!("a chain references cluster {cluster}, which does not exist"))),
        }
    }

    fn entry(&mut self, cluster: u32) -> Result<u32> {
        let kind = self.place.0.kind;
        let at = match kind {
            FatWidth::Fat12 => u64::from(cluster / 2) * 3,
            FatWidth::Fat16 => u64::from(cluster) * 2,
            FatWidth::Fat32 => u64::from(cluster) * 4,
        };
        let number = at / PAGE_LEN;
        let page = match &self.page {
            Some((cached, page)) if *cached == number => page,
            _ => &self.page.insert((number, self.chains.page(self.place, number)?)).1,
        };
        let within = (at % PAGE_LEN) as usize;
        Ok(match kind {
            FatWidth::Fat12 if cluster % 2 == 1 => u32::from(le16(page, within + 1)) >> 4,
            // The last entry of a table may lack its second byte's neighbour.
            FatWidth::Fat12 => u32::from(le16(page, within)) & 0xfff,
            FatWidth::Fat16 => u32::from(le16(page, within)),
            FatWidth::Fat32 => le32(page, within) & 0x0fff_ffff,
        })
    }
}
