//! References counted and compared with the stored refcounts, one window of the file's clusters at a time.
//!
//! A window bounds the memory of a check; the tables are walked once for each. Counts saturate
//! far above what any image reaches.

use super::report::{CheckReport, FindingKind};
use crate::units::ClusterBits;

/// Clusters of a window: two arrays of 32 MiB. 512 GiB of an image with clusters of 64 KiB.
pub(super) const WINDOW_CLUSTERS: u64 = 8 << 20;

/// A stored count whose block cannot be read.
const UNREADABLE: u32 = u32::MAX;
/// Counts are exact below this.
pub(super) const MANY: u32 = u32::MAX - 1;

/// Counts of the clusters `first..first + len`.
pub(super) struct Window {
    cluster: ClusterBits,
    first: u64,
    references: Vec<u32>,
    stored: Vec<u32>,
    /// The largest count that the image's refcounts can hold.
    max: u32,
}

impl Window {
    /// A window of at most [`WINDOW_CLUSTERS`] clusters; all counts are 0.
    pub(super) fn new(cluster: ClusterBits, first: u64, len: u64, max_refcount: u64) -> Self {
        assert!(len <= WINDOW_CLUSTERS);
        let max = max_refcount.min(MANY.into()) as u32;
        let zeros = || vec![0; len as usize];
        Self { cluster, first, references: zeros(), stored: zeros(), max }
    }

    pub(super) fn clusters(&self) -> std::ops::Range<u64> {
        self.first..self.first + self.references.len() as u64
    }

    fn index(&self, cluster: u64) -> Option<usize> {
        self.clusters().contains(&cluster).then(|| (cluster - self.first) as usize)
    }

    /// Records the count of `cluster` in the refcount block; `None` if it cannot be read.
    pub(super) fn set_stored(&mut self, cluster: u64, count: Option<u64>) {
        if let Some(index) = self.index(cluster) {
            self.stored[index] = count.map_or(UNREADABLE, |count| count.min(MANY.into()) as u32);
        }
    }

    /// Whether the stored count is exactly 1. `None`: unreadable, or not in this window.
    pub(super) fn stored_is_one(&self, cluster: u64) -> Option<bool> {
        let stored = self.stored[self.index(cluster)?];
        (stored != UNREADABLE).then_some(stored == 1)
    }

    /// The stored count, at most [`MANY`]; `None` if its block cannot be read. The cluster lies in the
    /// window.
    pub(super) fn stored(&self, cluster: u64) -> Option<u32> {
        let stored = self.stored[(cluster - self.first) as usize];
        (stored != UNREADABLE).then_some(stored)
    }

    /// References counted so far.
    pub(super) fn references(&self, cluster: u64) -> Option<u32> {
        self.index(cluster).map(|index| self.references[index])
    }

    /// Counts `times` references to each cluster that the bytes `at..at + len` touch.
    pub(super) fn count(&mut self, at: u64, len: u64, times: u64, report: &mut CheckReport) {
        if len == 0 {
            return;
        }
        let touched = self.cluster.index(at)..=self.cluster.index(at + len - 1);
        let clusters = self.clusters();
        for cluster in (*touched.start()).max(clusters.start)..(*touched.end() + 1).min(clusters.end) {
            let count = &mut self.references[(cluster - clusters.start) as usize];
            let wanted = u64::from(*count).saturating_add(times);
            *count = wanted.min(self.max.into()) as u32;
            if wanted > self.max.into() && self.max < MANY {
                report.corruptions(FindingKind::Doubt, wanted - u64::from(self.max), || {
                    let offset = cluster << self.cluster.bits();
                    format!(
                        "overflow cluster offset={offset:#x}: {wanted} references, refcounts hold {}",
                        self.max
                    )
                });
            }
        }
    }

    /// Compares, and returns the last cluster below `end` that is in use by either count.
    pub(super) fn compare(&self, end: u64, report: &mut CheckReport) -> Option<u64> {
        let mut last = None;
        for (cluster, (&references, &stored)) in self.clusters().zip(self.references.iter().zip(&self.stored))
        {
            // Beyond the file's end only referenced clusters are compared.
            if cluster >= end && references == 0 {
                continue;
            }
            if stored == UNREADABLE {
                report.check_errors(FindingKind::Structure, 1, || {
                    format!("can't get refcount for cluster {cluster}")
                });
                continue;
            }
            if stored > 0 || references > 0 {
                last = Some(cluster);
            }
            let finding = || format!("cluster {cluster} refcount={stored} reference={references}");
            match stored.cmp(&references) {
                std::cmp::Ordering::Less if stored == 0 => {
                    report.corruptions(FindingKind::Uncounted, 1, finding);
                }
                std::cmp::Ordering::Less => report.corruptions(FindingKind::TooLow, 1, finding),
                std::cmp::Ordering::Greater => report.leak(finding),
                std::cmp::Ordering::Equal => {}
            }
        }
        last
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(max: u64) -> Window {
        Window::new(ClusterBits::new(16).unwrap(), 4, 4, max)
    }

    #[test]
    fn bytes_touch_whole_clusters_within_the_window_only() {
        let (mut window, mut report) = (window(65_535), CheckReport::default());
        window.count(0x3ffff, 2, 1, &mut report);
        window.count(0x5_0000, 0x1_0001, 2, &mut report);
        window.count(0x7_0000, u64::MAX - 0x7_0000, 1, &mut report);
        let counts: Vec<_> = (3..9).map(|cluster| window.references(cluster)).collect();
        assert_eq!(counts, [None, Some(1), Some(2), Some(2), Some(1), None]);
        assert_eq!(report, CheckReport::default());
    }

    #[test]
    fn more_references_than_a_count_can_hold_are_corruptions() {
        let (mut window, mut report) = (window(1), CheckReport::default());
        window.count(0x40000, 1, 3, &mut report);
        assert_eq!((window.references(4), report.corruptions), (Some(1), 2));
    }

    #[test]
    fn too_low_is_corrupt_and_too_high_leaks() {
        let (mut window, mut report) = (window(65_535), CheckReport::default());
        window.count(0x40000, 0x20000, 1, &mut report);
        window.set_stored(5, Some(1));
        window.set_stored(6, Some(7));
        window.set_stored(7, None);
        assert_eq!(window.compare(8, &mut report), Some(6));
        assert_eq!((report.corruptions, report.leaks, report.check_errors), (1, 1, 1));
        assert_eq!(
            report.findings[..2],
            ["ERROR cluster 4 refcount=0 reference=1", "Leaked cluster 6 refcount=7 reference=0"]
        );
    }
}
