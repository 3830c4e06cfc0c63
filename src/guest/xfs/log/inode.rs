//! Items of inodes: the core, in the byte order of the writing machine, and what changed in the forks.

use crate::error::Result;
use crate::guest::bytes::{array, be16, be64, corrupt};
use crate::guest::xfs::inode::{BIGTIME, CORE_V2_LEN, CORE_V3_LEN, MAGIC};

use super::Replay;
use super::machine::Machine;
use super::ring::Lsn;
use super::transaction::Item;

/// What of an inode is logged (`XFS_ILOG_*`).
mod fields {
    pub(super) const DATA: u32 = 1 << 1;
    pub(super) const DATA_EXTENTS: u32 = 1 << 2;
    pub(super) const DATA_ROOT: u32 = 1 << 3;
    pub(super) const DEVICE: u32 = 1 << 4;
    pub(super) const ATTRIBUTES: u32 = 1 << 6;
    pub(super) const ATTRIBUTE_EXTENTS: u32 = 1 << 7;
    pub(super) const ATTRIBUTE_ROOT: u32 = 1 << 8;
}

/// Offset and bytes of the fields of the core that have the same form in all inodes.
const FIELDS: [(usize, usize); 18] = [
    (0, 2),
    (2, 2),
    (6, 2),
    (8, 4),
    (12, 4),
    (16, 4),
    (20, 2),
    (22, 2),
    (56, 8),
    (64, 8),
    (72, 4),
    (84, 4),
    (88, 2),
    (90, 2),
    (92, 4),
    (104, 8),
    (120, 8),
    (128, 4),
];
/// The times; the last one is in version 3 only.
const TIMES: [usize; 4] = [32, 40, 48, 144];
/// Bytes of the item in the form of 32-bit machines.
const SHORT_LEN: usize = 52;
/// `NREXT64` of `di_flags2`.
const WIDE_COUNTS: u64 = 1 << 4;

/// An inode's place and what of it is logged.
struct Logged {
    fields: u32,
    number: u64,
    device: [u8; 4],
    /// The buffer of the inode: sector, sectors, and the inode's offset in it.
    sector: u64,
    sector_count: u32,
    offset: u32,
}

impl Logged {
    fn parse(first: &[u8], machine: Machine) -> Self {
        // Without the padding before the 64-bit number, everything is four bytes earlier.
        let back = if first.len() <= SHORT_LEN { 4 } else { 0 };
        Self {
            fields: machine.u32(first, 4),
            number: machine.u64(first, 16 - back),
            device: machine.disk_order(first, 24 - back),
            sector: machine.u64(first, 40 - back),
            sector_count: machine.u32(first, 48 - back) / 512,
            offset: machine.u32(first, 52 - back),
        }
    }
}

impl Replay<'_> {
    /// Applies an item of an inode.
    pub(super) fn inode(&mut self, item: &Item, machine: Machine, lsn: Lsn) -> Result<()> {
        let logged = Logged::parse(&item.regions[0], machine);
        let damaged = || corrupt(format!("its item of inode {} is damaged", logged.number));
        let count = u16::try_from(logged.sector_count).map_err(|_| damaged())?;
        if self.cancelled.has((logged.sector, count)) {
            return Ok(());
        }
        let place = self.superblock.inode_place(logged.number).ok_or_else(damaged)?;
        let at = place.0 + place.1 as u64;
        if logged.sector.checked_mul(512).map(|start| start + u64::from(logged.offset)) != Some(at) {
            return Err(damaged());
        }
        let mut raw = vec![0; self.superblock.inode_len()];
        self.read(at, &mut raw)?;
        let core = item.region(1)?;
        if machine.u16(core, 0) != MAGIC {
            return Err(damaged());
        }
        if self.is_newer(&raw, logged.number, core, machine, lsn) {
            return Ok(());
        }
        self.core(&mut raw, logged.number, core, machine, lsn).ok_or_else(damaged)?;
        let core_len = if self.superblock.has_checksums { CORE_V3_LEN } else { CORE_V2_LEN };
        let fork_at = core_len + usize::from(raw[82]) * 8;
        if fork_at > raw.len() {
            return Err(damaged());
        }
        let data_end = if raw[82] == 0 { raw.len() } else { fork_at };
        if logged.fields & fields::DEVICE != 0 {
            raw[core_len..core_len + 4].copy_from_slice(&logged.device);
        }
        let mut index = 2;
        for (content, root, area) in [
            (fields::DATA | fields::DATA_EXTENTS, fields::DATA_ROOT, core_len..data_end),
            (fields::ATTRIBUTES | fields::ATTRIBUTE_EXTENTS, fields::ATTRIBUTE_ROOT, fork_at..raw.len()),
        ] {
            if logged.fields & (content | root) == 0 {
                continue;
            }
            let region = item.region(index)?;
            index += 1;
            let area = &mut raw[area];
            if logged.fields & root != 0 {
                self.root(region, area).ok_or_else(damaged)?;
            } else {
                // A region is padded to four bytes.
                let len = region.len().min(area.len());
                area[..len].copy_from_slice(&region[..len]);
            }
        }
        self.write(at, &raw)
    }

    /// Whether the inode on the disk is newer than the item.
    fn is_newer(&self, raw: &[u8], number: u64, core: &[u8], machine: Machine, lsn: Lsn) -> bool {
        if be16(raw, 0) != MAGIC {
            return false;
        }
        if self.superblock.has_checksums {
            let written = be64(raw, 112);
            let is_it =
                raw[4] == 3 && be64(raw, 152) == number && array::<16>(raw, 160) == self.superblock.meta_uuid;
            return is_it && written != 0 && written != u64::MAX && Lsn(written) > lsn;
        }
        // di_flushiter counts writes to the disk, and begins again after its largest value.
        let (own, logged) = (be16(raw, 30), machine.u16(core, 30));
        let has_wrapped = own == u16::MAX && logged < u16::MAX >> 1;
        logged < own && !has_wrapped
    }

    /// Replaces the core of an inode; `None` if the item is too short.
    fn core(&self, raw: &mut [u8], number: u64, core: &[u8], machine: Machine, lsn: Lsn) -> Option<()> {
        let is_wide = self.superblock.has_checksums;
        let len = if is_wide { CORE_V3_LEN } else { 96 };
        let core = core.get(..len)?;
        let mut put = |at: usize, len: usize| {
            let field = &mut raw[at..at + len];
            field.copy_from_slice(&core[at..at + len]);
            if machine == Machine::Little {
                field.reverse();
            }
        };
        for (at, field) in FIELDS.into_iter().filter(|(at, field)| at + field <= len) {
            put(at, field);
        }
        let flags2 = if is_wide { machine.u64(core, 120) } else { 0 };
        for at in TIMES.into_iter().filter(|at| at + 8 <= len) {
            if flags2 & BIGTIME != 0 {
                put(at, 8);
            } else {
                put(at, 4);
                put(at + 4, 4);
            }
        }
        if flags2 & WIDE_COUNTS != 0 {
            put(24, 8);
            put(76, 4);
        } else {
            put(30, 2);
            put(76, 4);
            put(80, 2);
        }
        // di_version and di_format; di_forkoff and di_aformat.
        raw[4..6].copy_from_slice(&core[4..6]);
        raw[82..84].copy_from_slice(&core[82..84]);
        if is_wide {
            raw[112..120].copy_from_slice(&lsn.0.to_be_bytes());
            raw[152..160].copy_from_slice(&number.to_be_bytes());
            raw[160..176].copy_from_slice(&self.superblock.meta_uuid);
        } else {
            raw[30..32].fill(0);
        }
        Some(())
    }

    /// Replaces the root of a fork's tree. In the log it has the header of a block, and other room for keys
    /// than in the inode.
    fn root(&self, region: &[u8], area: &mut [u8]) -> Option<()> {
        let header_len = if self.superblock.has_checksums { 72 } else { 24 };
        let body = region.get(header_len..)?;
        let (level, count) = (be16(region, 4), be16(region, 6));
        let entries = usize::from(count);
        let (from, to) = (body.len() / 16, area.len().saturating_sub(4) / 16);
        if level == 0 || entries > from || entries > to {
            return None;
        }
        area[..2].copy_from_slice(&level.to_be_bytes());
        area[2..4].copy_from_slice(&count.to_be_bytes());
        area[4..4 + entries * 8].copy_from_slice(&body[..entries * 8]);
        area[4 + to * 8..][..entries * 8].copy_from_slice(&body[from * 8..][..entries * 8]);
        Some(())
    }
}
