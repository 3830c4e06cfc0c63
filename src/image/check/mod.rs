//! The audit of one qcow2 image, as `qemu-img check` does it: every reference is counted and
//! compared with the refcounts that the image stores.
//!
//! Read-only, except for [`repair`]. Terminates on any bytes, in time bounded by the file's size and in
//! bounded memory: overlapping and shared tables are read once with a weight, references are counted in
//! windows. Exit codes, and on all but badly damaged images the numbers, are those of QEMU 10.0.2. On purpose
//! it is stricter where an image cannot be read: a zero flag in version 2, a reserved bit of extended L2
//! entries, an external data cluster that is not at its guest offset.

mod audited;
mod bitmaps;
mod ranges;
mod refcounts;
mod repair;
mod report;
mod tables;
mod window;

use crate::error::Result;
use crate::format::refcount::max_refcount;
use crate::format::snapshot::check_l1;
use crate::format::{Malformed, Version};
use crate::io::Storage;
use audited::{Audited, Pass, ReferencedRanges};
use ranges::{Weight, WeightedRange, disjoint};
use refcounts::Refcounts;
use tables::L2List;
use window::{WINDOW_CLUSTERS, Window};

pub use repair::{Actions, Repaired, Scope, repair, repair_dirty, repair_flags};
use report::FindingKind;
pub use report::{CheckReport, MAX_FINDINGS};

/// Audits the image in `storage`. An `Err` means that it could not be checked: exit code 1.
pub fn check(storage: &dyn Storage, name: &str) -> Result<CheckReport> {
    check_in_windows(storage, name, WINDOW_CLUSTERS)
}

fn check_in_windows(storage: &dyn Storage, name: &str, window_clusters: u64) -> Result<CheckReport> {
    let audited = Audited::open(storage, name)?;
    let mut report = CheckReport { filename: name.to_owned(), format: "qcow2", ..CheckReport::default() };
    let cluster = audited.header.cluster;
    report.total_clusters = audited.header.virtual_size.div_ceil(cluster.size());

    let references = References::gather(&audited, &mut report)?;
    let file_clusters = audited.file_clusters();
    let mut last_cluster = 0;
    // One more than the file has: a region may cross its end by less than a cluster.
    for first in (0..=file_clusters).step_by(window_clusters as usize) {
        let len = window_clusters.min(file_clusters + 1 - first);
        let mut window = Window::new(cluster, first, len, max_refcount(audited.header.refcount_order));
        let mut pass =
            Pass { audited: &audited, first: first == 0, window: &mut window, report: &mut report };
        references.count(&mut pass, Without::default())?;
        last_cluster = window.compare(file_clusters, &mut report).unwrap_or(last_cluster);
    }
    report.image_end_offset = (last_cluster + 1) * cluster.size();
    Ok(report)
}

/// Everything in an image that refers to clusters.
struct References {
    places: ReferencedRanges,
    l2_list: L2List,
    refcounts: Refcounts,
}

/// References that are not counted, because they are about to be replaced.
#[derive(Clone, Copy, Default)]
struct Without {
    refcounts: bool,
    snapshot_table: bool,
}

impl References {
    fn gather(audited: &Audited<'_>, report: &mut CheckReport) -> Result<Self> {
        let mut places = ReferencedRanges::default();
        audited.collect_metadata(&mut places, report)?;
        places.regions = disjoint(&places.regions);
        places.bitmap_tables = disjoint(&places.bitmap_tables);
        let refcounts = Refcounts::read(audited)?;
        let l2_list = L2List::read(audited, &disjoint(&places.l1_tables), &refcounts, report)?;
        Ok(Self { places, l2_list, refcounts })
    }

    /// Fills the pass's window with the stored counts and the references.
    fn count(&self, pass: &mut Pass<'_>, without: Without) -> Result<()> {
        self.refcounts.load(pass)?;
        let places = &self.places;
        let snapshot_table = if without.snapshot_table { &[][..] } else { &places.snapshot_table };
        let refcount_table = if without.refcounts { &[][..] } else { &places.refcount_table };
        for region in places.regions.iter().chain(snapshot_table).chain(refcount_table) {
            pass.window.count(region.start, region.end - region.start, region.weight.total, pass.report);
        }
        self.l2_list.walk(pass, &self.refcounts)?;
        bitmaps::walk(pass, &places.bitmap_tables)?;
        if !without.refcounts {
            self.refcounts.count_blocks(pass, pass.audited.file_clusters());
        }
        Ok(())
    }
}

impl Audited<'_> {
    fn collect_metadata(&self, places: &mut ReferencedRanges, report: &mut CheckReport) -> Result<()> {
        let header = &self.header;
        if let Some(damage) = &header.refcount_damage {
            report.corruptions(FindingKind::Structure, 1, || damage.fact());
        }
        self.add_region(places, 0, header.cluster.size(), report);
        self.add_l1(places, header.l1.offset.0, header.l1.len_bytes(), Weight::ACTIVE, report);
        let (snapshots, table_len) = self.read_snapshots()?;
        self.region(
            &mut places.snapshot_table,
            header.snapshots.offset.0,
            table_len,
            FindingKind::Dangling,
            report,
        );
        if header.data_file.is_some() && !snapshots.is_empty() {
            report.corruptions(FindingKind::Doubt, 1, || {
                format!("{} snapshots in image with data file", snapshots.len())
            });
        }
        for (index, snapshot) in snapshots.iter().enumerate() {
            if header.version == Version::V3 && snapshot.extra_len < 16 {
                report.corruptions(FindingKind::Incomplete, 1, || {
                    format!("snapshot table entry {index} is incomplete")
                });
            }
            let l1 = snapshot.l1;
            match check_l1(l1, header.cluster) {
                Ok(()) => self.add_l1(places, l1.offset.0, l1.len_bytes(), Weight::OTHER, report),
                // No file reaches that far, so there is nothing to read.
                Err(reason @ Malformed::OutOfRange { .. }) => {
                    report.check_errors(FindingKind::Doubt, 1, || {
                        format!("snapshot table entry {index}: {}", reason.fact())
                    });
                }
                Err(reason) => {
                    report.corruptions(FindingKind::Doubt, 1, || {
                        format!("snapshot table entry {index}: {}", reason.fact())
                    });
                }
            }
        }
        let table = header.refcount_table;
        let table_len = u64::from(table.clusters) * header.cluster.size();
        self.region(&mut places.refcount_table, table.offset.0, table_len, FindingKind::Structure, report);
        if let Some(luks) = header.crypto_header {
            self.add_region(places, luks.offset.0, luks.len, report);
        }
        bitmaps::collect(self, places, report)
    }

    fn add_l1(
        &self,
        places: &mut ReferencedRanges,
        at: u64,
        len: u64,
        weight: Weight,
        report: &mut CheckReport,
    ) {
        self.add_region(places, at, len, report);
        places.l1_tables.push(WeightedRange { start: at, end: at + len, weight });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::format::Header;
    use crate::format::refcount::set_refcount;
    use crate::image::create::{CreateOptions, initial_image};

    const CLUSTER: usize = 512;

    /// An image of 512-byte clusters with one L2 table whose entries all name data.
    fn image() -> Vec<u8> {
        let options = CreateOptions { size: Some(16 << 10), cluster_bits: 9, ..CreateOptions::default() };
        let mut image = initial_image(&options).unwrap();
        let header = Header::parse(&image, image.len() as u64).unwrap();
        image.resize(image.len().next_multiple_of(CLUSTER), 0);
        let l2 = image.len();
        let data = |index: usize| l2 + CLUSTER + index * CLUSTER;
        image.resize(data(64), 0);
        let mut put = |at: usize, value: usize| {
            image[at..at + 8].copy_from_slice(&(value as u64 | 1 << 63).to_be_bytes());
        };
        put(header.l1.offset.0 as usize, l2);
        (0..32).for_each(|index| put(l2 + index * 8, data(index)));
        let block = refcount_block(&image);
        let clusters = data(32) / CLUSTER;
        (0..clusters).for_each(|cluster| set_refcount(&mut image[block..block + CLUSTER], cluster, 4, 1));
        image
    }

    fn refcount_block(image: &[u8]) -> usize {
        let header = Header::parse(image, image.len() as u64).unwrap();
        let table = header.refcount_table.offset.0 as usize;
        u64::from_be_bytes(image[table..table + 8].try_into().unwrap()) as usize
    }

    #[test]
    fn a_sound_image_has_no_findings() {
        let report = check(&image(), "image").unwrap();
        assert_eq!((report.exit_code(), report.findings.as_slice()), (0, [].as_slice()));
        assert_eq!((report.allocated_clusters, report.total_clusters), (32, 32));
    }

    #[test]
    fn the_size_of_the_windows_does_not_matter() {
        let mut image = image();
        let block = refcount_block(&image);
        for (cluster, count) in [(0, 0), (2, 2), (9, 3), (12, 0), (30, 0), (40, 1)] {
            set_refcount(&mut image[block..block + CLUSTER], cluster, 4, count);
        }
        let whole = check(&image, "image").unwrap();
        assert!(whole.corruptions > 3 && whole.leaks > 1);
        for window in 1..50 {
            let mut parts = check_in_windows(&image, "image", window).unwrap();
            let mut findings = whole.findings.clone();
            findings.sort();
            parts.findings.sort();
            assert_eq!(parts, CheckReport { findings, ..whole.clone() }, "{window}");
        }
    }

    #[test]
    fn tables_that_thousands_of_snapshots_share_are_read_once() {
        let mut image = image();
        let header = Header::parse(&image, image.len() as u64).unwrap();
        let (l2, l1, entries) = (header.l1.offset.0 as usize, image.len() as u64, 100_000u32);
        // Every entry of one long L1 table names the same L2 table, for every snapshot.
        let entry: [u8; 8] = image[l2..l2 + 8].try_into().unwrap();
        image.extend((0..entries).flat_map(|_| entry));
        image.resize(image.len().next_multiple_of(CLUSTER), 0);
        let table = image.len() as u64;
        for _ in 0..65_536 {
            let mut snapshot = [0; 56];
            snapshot[..8].copy_from_slice(&l1.to_be_bytes());
            snapshot[8..12].copy_from_slice(&entries.to_be_bytes());
            snapshot[39] = 16;
            image.extend(snapshot);
        }
        image[60..64].copy_from_slice(&65_536u32.to_be_bytes());
        image[64..72].copy_from_slice(&table.to_be_bytes());
        let report = check(&image, "image").unwrap();
        assert_eq!(report.exit_code(), 2);
        // 16-bit refcounts overflow by almost as much as there are references.
        assert!(report.corruptions > 65_536 * u64::from(entries));
    }

    #[test]
    fn a_file_that_is_no_image_cannot_be_checked() {
        let empty = check(&Vec::new(), "empty").unwrap_err();
        assert_eq!(empty.kind(), ErrorKind::Corrupt);
        assert!(empty.to_string().starts_with("empty: header needs 72 bytes"), "{empty}");
        let mut future = image();
        future[79] = 0x80;
        assert_eq!(check(&future, "future").unwrap_err().kind(), ErrorKind::Unsupported);
    }
}
