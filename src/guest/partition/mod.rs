//! Partition tables: GPT, and the MBR with logical partitions.
//!
//! Promises: partitions are numbered and delimited like Linux does it, with sectors of 512 or 4096 bytes. An
//! impossible field is a remark; ranges beyond the end of the disk are cut off.

mod gpt;
mod mbr;
mod types;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::guest::Source;
use crate::guest::bytes::{be16, le32, slice};
use crate::guest::content::{VolumeContent, probe};
use crate::guest::source::within;

/// Linux' limit of partitions on one disk.
const MOST_PARTITIONS: usize = 255;
/// The supported sector sizes.
const SECTOR_LENS: [u64; 2] = [512, 4096];

/// A partition of a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// As Linux numbers them: from 1, logical ones from 5.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Bytes; a range beyond the end of the disk is cut off.
    pub len: u64,
    /// Its name in the table (GPT), if it has one.
    pub name: Option<String>,
    /// Its purpose by the table: `Linux filesystem`, `EFI System`, or the type's code.
    pub type_name: String,
    /// Linux' `PARTUUID`.
    pub uuid: Option<String>,
    /// It only contains logical partitions.
    pub is_extended: bool,
}

/// The supported partition tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TableKind {
    /// GUID partition table.
    Gpt,
    /// The master boot record's table.
    Dos,
}

impl TableKind {
    /// The name in blkid(8).
    pub fn name(self) -> &'static str {
        match self {
            Self::Gpt => "gpt",
            Self::Dos => "dos",
        }
    }
}

/// A disk's partition table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartitionTable {
    /// Its kind.
    pub kind: TableKind,
    /// Bytes of a sector, as the table counts them.
    pub sector_len: u64,
    /// By number.
    pub partitions: Vec<Partition>,
}

/// The partition table of a disk, if it has one, and remarks for the user.
pub fn read(disk: &dyn Source) -> (Option<PartitionTable>, Vec<String>) {
    let mut remarks = Vec::new();
    let mut sector = vec![0; 512];
    if disk.read_at(0, &mut sector).is_err() {
        return (None, remarks);
    }
    let record = mbr::BootRecord::parse(&sector);
    // The kernel uses a GPT if an MBR protects it. Here it is also used if the MBR has no other entries.
    let protects = record.as_ref().is_some_and(mbr::BootRecord::protects);
    let has_others = record.as_ref().is_some_and(mbr::BootRecord::has_others);
    let table = if protects || !has_others { gpt::read(disk, protects, &mut remarks) } else { None };
    let table = table.or_else(|| match &record {
        Some(record) if has_others && !is_boot_sector(disk) => Some(mbr::read(disk, record, &mut remarks)),
        _ => None,
    });
    match &table {
        Some(table) => remark_overlaps(&table.partitions, &mut remarks),
        None => remark_others(disk, &mut remarks),
    }
    (table, remarks)
}

/// FAT and similar formats have a first sector that ends like an MBR.
fn is_boot_sector(disk: &dyn Source) -> bool {
    matches!(
        probe(disk).content,
        VolumeContent::Fat12
            | VolumeContent::Fat16
            | VolumeContent::Fat32
            | VolumeContent::Exfat
            | VolumeContent::Ntfs
            | VolumeContent::BitLocker
    )
}

/// Cuts a partition at the end of the disk.
fn fit(partition: &mut Partition, size: u64, remarks: &mut Vec<String>) {
    let left = size.saturating_sub(partition.start);
    if partition.len > left {
        let fact = if left == 0 { "lies beyond" } else { "reaches beyond" };
        remarks.push(format!("partition {} {fact} the end of the disk", partition.number));
        partition.len = left;
    }
}

fn remark_overlaps(partitions: &[Partition], remarks: &mut Vec<String>) {
    let mut order: Vec<&Partition> =
        partitions.iter().filter(|part| !part.is_extended && part.len > 0).collect();
    order.sort_by_key(|part| part.start);
    let mut last: Option<&Partition> = None;
    for part in order {
        match last {
            Some(before) if part.start < before.start.saturating_add(before.len) => {
                remarks.push(format!("partitions {} and {} overlap", before.number, part.number));
            }
            _ => {}
        }
        let end = |part: &Partition| part.start.saturating_add(part.len);
        last = last.filter(|before| end(before) > end(part)).or(Some(part));
    }
}

/// Adds a remark for a known but unsupported table.
fn remark_others(disk: &dyn Source, remarks: &mut Vec<String>) {
    let mut head = vec![0; 2048];
    if disk.read_at(0, &mut head).is_err() {
        return;
    }
    let other = if slice(&head, 0, 2) == b"ER" && slice(&head, 512, 2) == b"PM" {
        "an Apple partition map"
    } else if le32(&head, 512) == 0x8256_4557 || le32(&head, 64) == 0x8256_4557 {
        "a BSD disk label"
    } else if be16(&head, 508) == 0xdabe {
        "a Sun disk label"
    } else {
        return;
    };
    remarks.push(format!("the disk has {other}, which is not supported"));
}

/// Whether a range of a disk has known content.
fn is_known(disk: &dyn Source, start: u64, len: u64) -> bool {
    !matches!(probe(&DiskRange::new(disk, start, len)).content, VolumeContent::Empty | VolumeContent::Unknown)
}

/// A read-only range of a disk.
pub(super) struct DiskRange<'a> {
    disk: &'a dyn Source,
    start: u64,
    len: u64,
}

impl<'a> DiskRange<'a> {
    /// `len` bytes from `start` on, cut off at the end of the disk.
    pub(super) fn new(disk: &'a dyn Source, start: u64, len: u64) -> Self {
        Self { disk, start, len: len.min(disk.size().saturating_sub(start)) }
    }
}

impl Source for DiskRange<'_> {
    fn size(&self) -> u64 {
        self.len
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.len, at, buf.len())?;
        self.disk.read_at(self.start + at, buf)
    }
}
