//! References of persistent bitmaps: the directory, each bitmap's table, and the bits.
//!
//! Only if the extension is in force; else QEMU drops it, and its clusters are leaks.

use super::audited::{Audited, Pass, ReferencedRanges};
use super::ranges::{Weight, WeightedRange};
use super::report::{CheckReport, FindingKind};
use crate::error::Result;
use crate::format::bitmap::{BitmapCluster, parse_directory, table_entry};
use crate::format::refcount::refcount;

/// Bytes of a bitmap table read at a time.
const CHUNK: u64 = 256 << 10;

/// Finds the directory and the tables.
pub(super) fn collect(
    audited: &Audited<'_>,
    places: &mut ReferencedRanges,
    report: &mut CheckReport,
) -> Result<()> {
    let header = &audited.header;
    let Some(extension) = header.bitmaps.filter(|_| header.bitmaps_consistent()) else { return Ok(()) };
    audited.add_region(places, extension.directory.0, extension.directory_len, report);
    // At most 64 MiB, by the header's limit, and no more than the file has.
    let have = audited.file_len.saturating_sub(extension.directory.0).min(extension.directory_len);
    let mut directory = vec![0; have as usize];
    audited.read(extension.directory.0, &mut directory)?;
    // QEMU refuses to open such an image.
    let bitmaps = parse_directory(&directory, extension.count, header.cluster)
        .map_err(|reason| audited.malformed(&reason))?;
    for bitmap in bitmaps {
        let len = u64::from(bitmap.table_entries) * 8;
        audited.add_region(places, bitmap.table.0, len, report);
        let end = (bitmap.table.0 + len).min(audited.file_len);
        places.bitmap_tables.push(WeightedRange {
            start: bitmap.table.0.min(end),
            end,
            weight: Weight::OTHER,
        });
    }
    Ok(())
}

/// Counts the references of the tables' entries.
pub(super) fn walk(pass: &mut Pass<'_>, tables: &[WeightedRange]) -> Result<()> {
    let cluster = pass.audited.header.cluster;
    for table in tables {
        let mut at = table.start;
        while at < table.end {
            let mut bytes = vec![0; CHUNK.min(table.end - at) as usize];
            pass.audited.read(at, &mut bytes)?;
            for entry in bytes.chunks_exact(8).map(|entry| refcount(entry, 0, 6)) {
                match table_entry(entry, cluster) {
                    Ok(BitmapCluster::At(data)) => pass.count(data.0, cluster.size(), table.weight.total),
                    // QEMU cannot open such an image.
                    Err(reason) if pass.first => {
                        pass.report.check_errors(FindingKind::Doubt, table.weight.total, || reason.fact());
                    }
                    Ok(BitmapCluster::All(_)) | Err(_) => {}
                }
            }
            at += bytes.len() as u64;
        }
    }
    Ok(())
}
