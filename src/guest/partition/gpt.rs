//! The GUID partition table: a header in the second sector and one in the last, each with its own array of
//! entries.

use super::{MOST_PARTITIONS, Partition, PartitionTable, SECTOR_LENS, TableKind, fit, types};
use crate::guest::Source;
use crate::guest::bytes::{array, crc32, guid, le32, le64, slice, utf16};

const SIGNATURE: &[u8] = b"EFI PART";
const HEADER_LEN: usize = 92;
/// Bytes of an array of entries at most; the usual one has 16 KiB.
const ENTRIES_LEN_LIMIT: u64 = 4 << 20;

/// Why a header is not used.
enum GptDefect {
    /// There is no header.
    Absent,
    /// There is a header, with this defect.
    Damaged(&'static str),
}

/// A header with correct checksums, and its entries.
struct GptHeader {
    sector_len: u64,
    entry_len: usize,
    entries: Vec<u8>,
}

pub(super) fn read(disk: &dyn Source, protected: bool, remarks: &mut Vec<String>) -> Option<PartitionTable> {
    let mut damage = None;
    for sector_len in SECTOR_LENS {
        match header(disk, sector_len, 1) {
            Ok(header) => {
                if !protected {
                    remarks.push("the GPT is used although no protective MBR exists".to_owned());
                }
                return Some(table(disk, &header, remarks));
            }
            Err(GptDefect::Damaged(defect)) => damage = damage.or(Some(defect)),
            Err(GptDefect::Absent) => {}
        }
    }
    // Without any trace of the first header, the one at the end of the disk may be a remain of an old table.
    if !protected && damage.is_none() {
        return None;
    }
    let first = damage.unwrap_or("it is missing");
    for sector_len in SECTOR_LENS {
        let last = (disk.size() / sector_len).checked_sub(1);
        // If the disk has grown, the second header is where the first one states.
        let stated = sector(disk, sector_len, 1).filter(|sector| sector.starts_with(SIGNATURE));
        for number in last.into_iter().chain(stated.map(|sector| le64(&sector, 32))) {
            if let Ok(header) = header(disk, sector_len, number) {
                remarks.push(format!(
                    "the first GPT header cannot be used ({first}); the second is used instead"
                ));
                return Some(table(disk, &header, remarks));
            }
        }
    }
    remarks.push(format!("the GPT cannot be used ({first}), nor can its copy at the end of the disk"));
    None
}

fn sector(disk: &dyn Source, sector_len: u64, number: u64) -> Option<Vec<u8>> {
    let mut sector = vec![0; sector_len as usize];
    disk.read_at(number.checked_mul(sector_len)?, &mut sector).ok()?;
    Some(sector)
}

fn header(disk: &dyn Source, sector_len: u64, number: u64) -> Result<GptHeader, GptDefect> {
    let sector = sector(disk, sector_len, number).ok_or(GptDefect::Absent)?;
    if !sector.starts_with(SIGNATURE) {
        return Err(GptDefect::Absent);
    }
    let len = le32(&sector, 12) as usize;
    if !(HEADER_LEN..=sector.len()).contains(&len) {
        return Err(GptDefect::Damaged("its length is wrong"));
    }
    // The checksum is computed with its own field as zero.
    let sum = crc32(crc32(crc32(!0, &sector[..16]), &[0; 4]), &sector[20..len]);
    if !sum != le32(&sector, 16) {
        return Err(GptDefect::Damaged("its checksum is wrong"));
    }
    if le64(&sector, 24) != number {
        return Err(GptDefect::Damaged("it states another position"));
    }
    let (count, entry_len) = (u64::from(le32(&sector, 80)), u64::from(le32(&sector, 84)));
    let entries_len = count * entry_len;
    if entry_len < 128 || !entry_len.is_multiple_of(8) || entries_len > ENTRIES_LEN_LIMIT {
        return Err(GptDefect::Damaged("its entries have impossible sizes"));
    }
    let mut entries = vec![0; entries_len as usize];
    let at = le64(&sector, 72).checked_mul(sector_len);
    if at.is_none_or(|at| disk.read_at(at, &mut entries).is_err()) {
        return Err(GptDefect::Damaged("its entries cannot be read"));
    }
    if !crc32(!0, &entries) != le32(&sector, 88) {
        return Err(GptDefect::Damaged("its entries' checksum is wrong"));
    }
    Ok(GptHeader { sector_len, entry_len: entry_len as usize, entries })
}

fn table(disk: &dyn Source, header: &GptHeader, remarks: &mut Vec<String>) -> PartitionTable {
    let mut partitions = Vec::new();
    let mut omitted = 0;
    for (index, entry) in header.entries.chunks_exact(header.entry_len).enumerate() {
        let Some(kind) = guid(array(entry, 0)) else { continue };
        if index >= MOST_PARTITIONS {
            omitted += 1;
            continue;
        }
        let number = index as u32 + 1;
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let start = first.checked_mul(header.sector_len);
        let len =
            last.checked_sub(first).and_then(|count| count.checked_add(1)?.checked_mul(header.sector_len));
        let (Some(start), Some(len)) = (start, len) else {
            remarks.push(format!("partition {number} ends before it begins"));
            continue;
        };
        let mut partition = Partition {
            number,
            start,
            len,
            name: utf16(slice(entry, 56, 72)),
            type_name: types::of_guid(&kind).map_or(kind, str::to_owned),
            uuid: guid(array(entry, 16)),
            is_extended: false,
        };
        fit(&mut partition, disk.size(), remarks);
        partitions.push(partition);
    }
    if omitted > 0 {
        remarks.push(format!("{omitted} partitions have numbers above {MOST_PARTITIONS} and are not shown"));
    }
    PartitionTable { kind: TableKind::Gpt, sector_len: header.sector_len, partitions }
}
