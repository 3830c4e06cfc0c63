//! References of the L1 and L2 tables, and the COPIED flags of the active ones.

use super::audited::{Audited, Pass, beyond_end};
use super::ranges::{Weight, WeightedRange};
use super::refcounts::Refcounts;
use super::report::{CheckReport, FindingKind};
use crate::error::{Error, ErrorKind, Result};
use crate::format::entry::{Allocation, COPIED, EntryFormat, Mapping, ZERO};
use crate::format::refcount::refcount;
use crate::format::{Malformed, RawL2Entry, Version};
use crate::units::{GuestOffset, HostOffset};

/// Bytes of an L1 table read at a time.
const CHUNK: u64 = 256 << 10;
/// Maximum number of distinct L2 tables: 512 MiB, for 16 PiB of data in 64 KiB clusters.
const MAX_L2_TABLES: usize = 16 << 20;

/// An L2 table, or a cluster that an entry names as one.
pub(super) struct L2Table {
    /// As in the L1 entry, even if it is not aligned or names the header: such a table's content is
    /// meaningless, but QEMU counts it, too.
    pub(super) at: HostOffset,
    /// The guest offset of its first cluster, by the active L1 table.
    guest: GuestOffset,
    pub(super) weight: Weight,
}

/// Every L2 table once, in the order of the file.
pub(super) struct L2List(Vec<L2Table>);

impl L2List {
    /// Reads the L1 tables.
    pub(super) fn read(
        audited: &Audited<'_>,
        l1_tables: &[WeightedRange],
        refcounts: &Refcounts,
        report: &mut CheckReport,
    ) -> Result<Self> {
        let mut list = Self(Vec::new());
        let mut merge_at = 1 << 20;
        for table in l1_tables {
            let mut at = table.start;
            // Bytes beyond the end of the file read as zero: no entries.
            while at < table.end.min(audited.file_len) {
                let mut bytes = vec![0; CHUNK.min(table.end - at) as usize];
                audited.read(at, &mut bytes)?;
                for (position, entry) in (at..).step_by(8).zip(bytes.chunks_exact(8)) {
                    list.add(audited, refcounts, report, position, refcount(entry, 0, 6), table.weight)?;
                }
                if list.0.len() > merge_at {
                    list.merge();
                    merge_at = (list.0.len() * 2).max(merge_at);
                    if list.0.len() > MAX_L2_TABLES {
                        let fact = format!(
                            "{}: more than {MAX_L2_TABLES} L2 tables, too many to check",
                            audited.name
                        );
                        return Err(Error::new(ErrorKind::Limit, fact));
                    }
                }
                at += bytes.len() as u64;
            }
        }
        list.merge();
        Ok(list)
    }

    /// Adds the L1 entry at byte `position` of the file.
    fn add(
        &mut self,
        audited: &Audited<'_>,
        refcounts: &Refcounts,
        report: &mut CheckReport,
        position: u64,
        entry: u64,
        weight: Weight,
    ) -> Result<()> {
        if entry == 0 {
            return Ok(());
        }
        let header = &audited.header;
        if let Err(reason) = header.entry_format().l1(entry) {
            report.corruptions(FindingKind::Doubt, weight.total, || {
                format!("L1 entry at {position:#x}: {}", reason.fact())
            });
            let offset = EntryFormat::raw_offset(entry);
            if matches!(reason, Malformed::Reserved { .. }) && !header.cluster.aligned(offset) {
                let unaligned =
                    Malformed::Unaligned { what: "L2 table", offset, unit: header.cluster.size() };
                report.corruptions(FindingKind::Doubt, weight.total, || {
                    format!("L1 entry at {position:#x}: {}", unaligned.fact())
                });
            }
        }
        let at = EntryFormat::raw_offset(entry);
        if weight.active > 0 && at != 0 {
            let stored = refcounts.stored(audited, header.cluster.index(at))?;
            if stored.is_some_and(|count| (count == 1) != EntryFormat::copied(entry)) {
                report.corruptions(FindingKind::Flag, weight.active, || {
                    let count = stored.unwrap_or(0);
                    format!("OFLAG_COPIED L2 cluster: l1_entry={entry:x} refcount={count}")
                });
            }
        }
        if audited.is_beyond_end(at, header.cluster.size()) {
            report.corruptions(FindingKind::Dangling, weight.total, || beyond_end(at, header.cluster.size()));
            return Ok(());
        }
        let index = position.saturating_sub(header.l1.offset.0) / 8;
        let guest = GuestOffset(index.saturating_mul(header.l1_entry_span()));
        self.0.push(L2Table { at: HostOffset(at), guest, weight });
        Ok(())
    }

    fn merge(&mut self) {
        self.0.sort_unstable_by_key(|table| table.at);
        self.0.dedup_by(|next, kept| {
            let same = next.at == kept.at;
            if same {
                kept.weight = kept.weight.plus(next.weight);
            }
            same
        });
    }

    /// The tables.
    pub(super) fn tables(&self) -> &[L2Table] {
        &self.0
    }

    /// Counts the references to the L2 tables and of their entries.
    pub(super) fn walk(&self, pass: &mut Pass<'_>, refcounts: &Refcounts) -> Result<()> {
        let header = &pass.audited.header;
        let (cluster, format) = (header.cluster, header.entry_format());
        let mut bytes = vec![0; cluster.size() as usize];
        for table in &self.0 {
            pass.window.count(table.at.0, cluster.size(), table.weight.total, pass.report);
            pass.audited.read(table.at.0, &mut bytes)?;
            let mut walk = EntryWalk { table, format, refcounts, expected_next: None };
            for (index, entry) in (0..).zip(bytes.chunks_exact(format.l2_entry_len() as usize)) {
                let raw = RawL2Entry::from_bytes(format, entry);
                if raw != RawL2Entry::default() {
                    walk.entry(pass, index, raw.entry, raw.bitmap)?;
                }
            }
        }
        Ok(())
    }
}

/// The possible repairs of an L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is valid and names a cluster of the image, to which a COPIED flag belongs.
    Cluster(HostOffset),
    /// It is valid and names a cluster of the external data file.
    DataFile,
    /// It is valid and can have no COPIED flag.
    Compressed,
    /// It is valid and names nothing.
    Nothing,
    /// It reads as zeroes, with an invalid preallocated cluster. This is the entry without that cluster.
    KeptPlace(u64),
    /// It is invalid.
    Nonsense,
}

impl L2Table {
    /// The guest offset of an entry's cluster.
    pub(super) fn guest_of(&self, index: u64, cluster_size: u64) -> u64 {
        self.guest.0.saturating_add(index.saturating_mul(cluster_size))
    }

    /// The verdict on an entry of this table, by its words and number.
    pub(super) fn verdict(
        &self,
        format: EntryFormat,
        refcounts: &Refcounts,
        entry: [u64; 2],
        index: u64,
    ) -> Verdict {
        let walk = EntryWalk { table: self, format, refcounts, expected_next: None };
        let (target, problems) = walk.judge(entry[0], entry[1], index);
        match (target, problems.as_slice()) {
            (Allocation::Cluster(_), []) if format.data_file => Verdict::DataFile,
            (Allocation::Cluster(at), []) => Verdict::Cluster(at),
            (Allocation::Compressed(_), []) => Verdict::Compressed,
            (Allocation::None, []) => Verdict::Nothing,
            (_, [Malformed::Unaligned { .. }]) if walk.is_zero_entry(entry[0], entry[1]) => {
                Verdict::KeptPlace(if format.extended { 0 } else { ZERO })
            }
            _ => Verdict::Nonsense,
        }
    }
}

/// A walk through one L2 table.
struct EntryWalk<'a> {
    table: &'a L2Table,
    format: EntryFormat,
    refcounts: &'a Refcounts,
    /// The offset of the next cluster if the file is not fragmented.
    expected_next: Option<u64>,
}

impl EntryWalk<'_> {
    fn entry(&mut self, pass: &mut Pass<'_>, index: u64, entry: u64, bitmap: u64) -> Result<()> {
        let weight = self.table.weight;
        let (target, problems) = self.judge(entry, bitmap, index);
        if pass.first {
            for problem in problems {
                let kind = match problem {
                    Malformed::Unaligned { .. } if self.is_zero_entry(entry, bitmap) => {
                        FindingKind::KeptPlace
                    }
                    _ => FindingKind::Doubt,
                };
                pass.report.corruptions(kind, weight.total, || {
                    format!("L2 table {}, entry {index}: {}", self.table.at, problem.fact())
                });
            }
            if EntryFormat::is_compressed(entry) && EntryFormat::copied(entry) {
                pass.report.corruptions(FindingKind::CompressedFlag, weight.total, || {
                    let coffset = self.format.raw_compressed(entry).at;
                    format!("coffset={coffset}: copied flag must never be set for compressed clusters")
                });
            }
        }
        match target {
            Allocation::None => Ok(()),
            Allocation::Compressed(compressed) => {
                if pass.first {
                    pass.report.allocated_clusters += weight.active;
                    pass.report.compressed_clusters += weight.active;
                    // By their nature: they do not start at sectors.
                    pass.report.fragmented_clusters += weight.active;
                }
                pass.count(compressed.at.0, compressed.len.into(), weight.total);
                Ok(())
            }
            Allocation::Cluster(at) => {
                let len = self.format.cluster.size();
                if pass.first {
                    pass.report.allocated_clusters += weight.active;
                    if self.expected_next.is_some_and(|expected| expected != at.0) {
                        pass.report.fragmented_clusters += weight.active;
                    }
                    self.expected_next = Some(at.0 + len);
                }
                if !self.format.data_file {
                    pass.count(at.0, len, weight.total);
                }
                // The header has no flags, even if an L1 entry names it as a table.
                if weight.active > 0 && self.table.at.0 != 0 {
                    self.copied_flag(pass, entry, at)
                } else {
                    Ok(())
                }
            }
        }
    }

    /// Whether the guest sees zeroes here, so that the preallocated cluster does not matter.
    fn is_zero_entry(&self, entry: u64, bitmap: u64) -> bool {
        let flags = entry & !EntryFormat::raw_offset(entry);
        let unallocated =
            if self.format.extended { bitmap as u32 == 0 } else { self.format.version == Version::V3 };
        let expected = if self.format.extended { 0 } else { ZERO };
        unallocated && !self.format.data_file && flags & !COPIED == expected
    }

    /// The allocation that the entry refers to, and its errors.
    fn judge(&self, entry: u64, bitmap: u64, index: u64) -> (Allocation, Vec<Malformed>) {
        let guest = GuestOffset(self.table.guest.0.saturating_add(index * self.format.cluster.size()));
        let decoded = if self.format.extended {
            self.format.l2_extended(entry, bitmap, guest).map(|entry| match entry.compressed() {
                Some(compressed) => Allocation::Compressed(compressed),
                None => entry.host_cluster().map_or(Allocation::None, Allocation::Cluster),
            })
        } else {
            self.format.l2(entry, guest).map(|entry| match entry.mapping {
                Mapping::Data(at) | Mapping::Zero(Some(at)) => Allocation::Cluster(at),
                Mapping::Compressed(compressed) => Allocation::Compressed(compressed),
                Mapping::Zero(None) | Mapping::Hole => Allocation::None,
            })
        };
        match decoded {
            Ok(target) => (target, Vec::new()),
            Err(reason) => self.judge_wrong(entry, bitmap, reason),
        }
    }

    /// A wrong entry is treated as if the wrong bits were clear, so that one error does not look like many.
    /// `reason` is the first; there may be more.
    fn judge_wrong(&self, entry: u64, bitmap: u64, reason: Malformed) -> (Allocation, Vec<Malformed>) {
        if EntryFormat::is_compressed(entry) {
            return match reason {
                // Reported as beyond the end of the file.
                Malformed::TooLarge { .. } => {
                    (Allocation::Compressed(self.format.raw_compressed(entry)), Vec::new())
                }
                reason => (Allocation::None, vec![reason]),
            };
        }
        let (at, unit) = (EntryFormat::raw_offset(entry), self.format.cluster.size());
        let (zero, allocated) = ((bitmap >> 32) as u32, bitmap as u32);
        let mut problems = Vec::new();
        if at == 0 && allocated != 0 {
            problems.push(Malformed::SubclusterWithoutCluster(allocated));
        } else if zero & allocated != 0 {
            problems.push(Malformed::SubclusterTwice(zero & allocated));
        }
        if !self.format.cluster.aligned(at) {
            problems.push(Malformed::Unaligned { what: "data cluster", offset: at, unit });
        }
        let later = matches!(
            reason,
            Malformed::SubclusterWithoutCluster(_)
                | Malformed::SubclusterTwice(_)
                | Malformed::Unaligned { .. }
        );
        if !later {
            problems.insert(0, reason);
        }
        let target = if at == 0 { Allocation::None } else { Allocation::Cluster(HostOffset(at)) };
        (target, problems)
    }

    /// COPIED says that the refcount is 1; a cluster of a data file counts as such.
    fn copied_flag(&self, pass: &mut Pass<'_>, entry: u64, at: HostOffset) -> Result<()> {
        let cluster = self.format.cluster.index(at.0);
        let is_one = if self.format.data_file {
            pass.first.then_some(true)
        } else if self.format.cluster.index(pass.audited.file_len) < cluster {
            // Beyond all windows.
            let stored = if pass.first { self.refcounts.stored(pass.audited, cluster)? } else { None };
            stored.map(|count| count == 1)
        } else {
            pass.window.stored_is_one(cluster)
        };
        if is_one.is_some_and(|is_one| is_one != EntryFormat::copied(entry)) {
            pass.report.corruptions(FindingKind::Flag, self.table.weight.active, || {
                let fact = if is_one == Some(true) { "refcount=1" } else { "refcount is not 1" };
                format!("OFLAG_COPIED data cluster: l2_entry={entry:x} {fact}")
            });
        }
        Ok(())
    }
}
