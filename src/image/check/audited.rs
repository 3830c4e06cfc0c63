//! The image under audit, what its header leads to, and the pass over one window of it.

use super::ranges::{Weight, WeightedRange};
use super::report::{CheckReport, FindingKind};
use super::window::Window;
use crate::error::{Error, ErrorKind, Result};
use crate::format::snapshot::SnapshotParser;
use crate::format::{Header, Malformed, Snapshot};
use crate::image::{read_header_with, read_snapshots_with};
use crate::io::Storage;

/// More clusters than any real image has (256 TiB of 64 KiB clusters); bounds the time that a
/// sparse file of absurd length can take.
const MAX_CLUSTERS: u64 = 1 << 32;

/// The image under audit.
pub(super) struct Audited<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) name: &'a str,
    pub(super) header: Header,
    pub(super) file_len: u64,
}

/// Byte ranges found before counting starts.
#[derive(Default)]
pub(super) struct ReferencedRanges {
    /// Ranges that are referenced as a whole, cluster by cluster.
    pub(super) regions: Vec<WeightedRange>,
    /// The refcount table; a repair may replace it.
    pub(super) refcount_table: Vec<WeightedRange>,
    /// The snapshot table; so may it.
    pub(super) snapshot_table: Vec<WeightedRange>,
    /// L1 tables, by their bytes.
    pub(super) l1_tables: Vec<WeightedRange>,
    /// Bitmap tables, by their bytes.
    pub(super) bitmap_tables: Vec<WeightedRange>,
}

/// The pass over one window.
pub(super) struct Pass<'a> {
    pub(super) audited: &'a Audited<'a>,
    /// Findings that do not belong to a cluster of the window are reported in the first pass only.
    pub(super) first: bool,
    pub(super) window: &'a mut Window,
    pub(super) report: &'a mut CheckReport,
}

impl Pass<'_> {
    /// Counts references to the bytes `at..at + len`, or reports that they are beyond the file.
    pub(super) fn count(&mut self, at: u64, len: u64, times: u64) {
        if self.audited.is_beyond_end(at, len) {
            if self.first {
                self.report.corruptions(FindingKind::Dangling, times, || beyond_end(at, len));
            }
        } else {
            self.window.count(at, len, times, self.report);
        }
    }
}

pub(super) fn beyond_end(at: u64, len: u64) -> String {
    format!("reference to a region beyond the end of the file: offset {at:#x} size {len:#x}")
}

impl<'a> Audited<'a> {
    pub(super) fn open(storage: &'a dyn Storage, name: &'a str) -> Result<Self> {
        let (header, file_len) = read_header_with(name, storage, Header::parse_for_check)?;
        if let Some(unsupported) = &header.unsupported {
            return Err(Error::new(ErrorKind::Unsupported, format!("{name}: {unsupported}")));
        }
        if file_len.div_ceil(header.cluster.size()) >= MAX_CLUSTERS {
            let fact =
                format!("{name}: the file has {file_len} bytes, too many to check with clusters this small");
            return Err(Error::new(ErrorKind::Limit, fact));
        }
        Ok(Self { storage, name, header, file_len })
    }

    pub(super) fn file_clusters(&self) -> u64 {
        self.file_len.div_ceil(self.header.cluster.size())
    }

    pub(super) fn malformed(&self, reason: &Malformed) -> Error {
        Error::new(reason.kind(), format!("{}: {reason}", self.name))
    }

    /// Reads all of `buf`; bytes beyond the end of the file are zero.
    pub(super) fn read(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let have = self.storage.read_at(at, buf)?;
        buf[have..].fill(0);
        Ok(())
    }

    /// The last cluster may be truncated: a region may cross the end by less than one cluster.
    pub(super) fn is_beyond_end(&self, at: u64, len: u64) -> bool {
        let limit = self.file_len + self.header.cluster.size();
        at.checked_add(len).is_none_or(|end| end >= limit)
    }

    pub(super) fn add_region(
        &self,
        places: &mut ReferencedRanges,
        at: u64,
        len: u64,
        report: &mut CheckReport,
    ) {
        self.region(&mut places.regions, at, len, FindingKind::Dangling, report);
    }

    pub(super) fn region(
        &self,
        regions: &mut Vec<WeightedRange>,
        at: u64,
        len: u64,
        kind: FindingKind,
        report: &mut CheckReport,
    ) {
        if len == 0 {
            return;
        }
        if self.is_beyond_end(at, len) {
            report.corruptions(kind, 1, || beyond_end(at, len));
            return;
        }
        let cluster = self.header.cluster;
        let end = cluster.floor(at + len - 1) + cluster.size();
        regions.push(WeightedRange { start: cluster.floor(at), end, weight: Weight::OTHER });
    }

    /// The snapshots and the bytes of their table.
    pub(super) fn read_snapshots(&self) -> Result<(Vec<Snapshot>, u64)> {
        let found =
            read_snapshots_with(SnapshotParser::for_check(&self.header), &self.header, |at, piece| {
                self.read(at, piece).map(|()| piece.len())
            })?;
        found.map_err(|reason| self.malformed(&reason))
    }
}
