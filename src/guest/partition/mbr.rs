//! The table of the master boot record, and the chain of extended boot records.
//!
//! An MBR does not store its sector size. It is 512, unless the table is valid only with 4096.

use super::{MOST_PARTITIONS, Partition, PartitionTable, SECTOR_LENS, TableKind, fit, is_known, types};
use crate::guest::Source;
use crate::guest::bytes::{le32, slice};

const SIGNATURE: &[u8] = b"\x55\xaa";
const PROTECTIVE: u8 = 0xee;
/// Consecutive extended boot records without a partition; the kernel's limit.
const EMPTY_RECORDS_LIMIT: u32 = 100;

/// An entry of a table.
#[derive(Clone, Copy, Debug)]
struct MbrEntry {
    kind: u8,
    /// In sectors.
    start: u32,
    count: u32,
}

impl MbrEntry {
    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

/// A master or extended boot record.
pub(super) struct BootRecord {
    entries: [MbrEntry; 4],
    /// The disk's identifier.
    signature: u32,
}

impl BootRecord {
    /// The record in a sector; `None` if it has no signature or is another format's first sector.
    pub(super) fn parse(sector: &[u8]) -> Option<Self> {
        let record = Self::parse_chained(sector)?;
        // A byte other than a boot flag means code instead of entries.
        (0..4).all(|index| matches!(sector[446 + index * 16], 0 | 0x80)).then_some(record)
    }

    /// An extended record, whose boot flags mean nothing.
    fn parse_chained(sector: &[u8]) -> Option<Self> {
        if slice(sector, 510, 2) != SIGNATURE {
            return None;
        }
        let entry = |index: usize| {
            let at = 446 + index * 16;
            MbrEntry { kind: sector[at + 4], start: le32(sector, at + 8), count: le32(sector, at + 12) }
        };
        Some(Self { entries: [entry(0), entry(1), entry(2), entry(3)], signature: le32(sector, 440) })
    }

    /// Whether it protects a GPT.
    pub(super) fn protects(&self) -> bool {
        self.entries.iter().any(|entry| entry.kind == PROTECTIVE)
    }

    /// Whether it has partitions of its own.
    pub(super) fn has_others(&self) -> bool {
        self.entries.iter().any(|entry| entry.kind != PROTECTIVE && entry.count != 0)
    }
}

pub(super) fn read(disk: &dyn Source, record: &BootRecord, remarks: &mut Vec<String>) -> PartitionTable {
    let [(small, mut small_remarks), (large, mut large_remarks)] = SECTOR_LENS.map(|sector_len| {
        let mut remarks = Vec::new();
        (read_with(disk, record, sector_len, &mut remarks), remarks)
    });
    // A chain of extended records is valid with one sector size only; other partitions are judged by their
    // content.
    let is_large = large_remarks.is_empty()
        && if small.partitions.iter().any(|part| part.is_extended) {
            !small_remarks.is_empty()
        } else {
            let has_known_content = |table: &PartitionTable| {
                table.partitions.iter().any(|part| is_known(disk, part.start, part.len))
            };
            !has_known_content(&small) && has_known_content(&large)
        };
    let (table, found) = if is_large { (large, &mut large_remarks) } else { (small, &mut small_remarks) };
    remarks.append(found);
    for partition in &table.partitions {
        if matches!(partition.type_name.as_str(), "FreeBSD" | "OpenBSD" | "NetBSD" | "Solaris") {
            let (number, name) = (partition.number, &partition.type_name);
            remarks.push(format!("partition {number} may have a {name} disk label, which is not supported"));
        }
    }
    table
}

fn read_with(
    disk: &dyn Source,
    record: &BootRecord,
    sector_len: u64,
    remarks: &mut Vec<String>,
) -> PartitionTable {
    let mut partitions = Vec::new();
    let mut logical = ExtendedChain { disk, sector_len, signature: record.signature, found: Vec::new() };
    for (number, entry) in (1..).zip(record.entries) {
        if entry.count == 0 || entry.kind == PROTECTIVE {
            continue;
        }
        let start = u64::from(entry.start) * sector_len;
        let mut partition =
            partition(number, start, u64::from(entry.count) * sector_len, entry.kind, record.signature);
        fit(&mut partition, disk.size(), remarks);
        partitions.push(partition);
        if entry.is_extended() {
            logical.follow(start, u64::from(entry.count) * sector_len, number, remarks);
        }
    }
    for mut partition in logical.found {
        fit(&mut partition, disk.size(), remarks);
        partitions.push(partition);
    }
    PartitionTable { kind: TableKind::Dos, sector_len, partitions }
}

fn partition(number: u32, start: u64, len: u64, kind: u8, signature: u32) -> Partition {
    Partition {
        number,
        start,
        len,
        name: None,
        type_name: types::of_code(kind).map_or_else(|| format!("{kind:#04x}"), str::to_owned),
        uuid: (signature != 0).then(|| format!("{signature:08x}-{number:02x}")),
        is_extended: MbrEntry { kind, start: 0, count: 0 }.is_extended(),
    }
}

/// The logical partitions of an extended partition.
struct ExtendedChain<'a> {
    disk: &'a dyn Source,
    sector_len: u64,
    signature: u32,
    found: Vec<Partition>,
}

impl ExtendedChain<'_> {
    /// Follows the chain that begins with an extended partition, as the kernel does.
    fn follow(&mut self, first: u64, first_len: u64, number: u32, remarks: &mut Vec<String>) {
        let (mut here, mut here_len) = (first, first_len);
        let mut empty_count = 0;
        let mut sector = vec![0; 512];
        loop {
            let record = match self.disk.read_at(here, &mut sector) {
                Ok(()) => BootRecord::parse_chained(&sector),
                Err(_) => None,
            };
            let Some(record) = record else {
                remarks.push(format!("the chain of extended partition {number} is broken at {here:#x}"));
                return;
            };
            let before = self.found.len();
            for (index, entry) in record.entries.into_iter().enumerate() {
                let (start, len) =
                    (u64::from(entry.start) * self.sector_len, u64::from(entry.count) * self.sector_len);
                let is_outside = start + len > here_len || here + start + len > first + first_len;
                // The third and the fourth entry often hold garbage.
                if entry.count == 0 || entry.is_extended() || (index >= 2 && is_outside) {
                    continue;
                }
                if 4 + self.found.len() >= MOST_PARTITIONS {
                    remarks.push(format!("there are more than {MOST_PARTITIONS} partitions"));
                    return;
                }
                let number = 5 + self.found.len() as u32;
                self.found.push(partition(number, here + start, len, entry.kind, self.signature));
            }
            empty_count = if self.found.len() > before { 0 } else { empty_count + 1 };
            let next = record.entries.into_iter().find(|entry| entry.count != 0 && entry.is_extended());
            let Some(next) = next else { return };
            if empty_count > EMPTY_RECORDS_LIMIT {
                remarks.push(format!("the chain of extended partition {number} has no end"));
                return;
            }
            here = first + u64::from(next.start) * self.sector_len;
            here_len = u64::from(next.count) * self.sector_len;
        }
    }
}
