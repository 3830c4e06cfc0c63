//! Items of buffers: the changed parts of blocks of metadata, in units of 128 bytes.

use std::collections::HashMap;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::{array, be32, be64, corrupt};
use crate::guest::xfs::superblock::Superblock;

use super::Replay;
use super::machine::Machine;
use super::ring::Lsn;
use super::transaction::Item;

/// Flags of a buffer (`XFS_BLF_*`).
const INODES: u16 = 1;
const CANCEL: u16 = 1 << 1;
const QUOTAS: u16 = 1 << 2 | 1 << 3 | 1 << 4;
/// The unit of the bitmap.
const CHUNK_LEN: usize = 128;
/// Where the bitmap begins in the item.
const MAP_AT: usize = 20;
/// Bytes of the largest buffer of metadata (`XFS_MAX_BLOCKSIZE`).
const BUFFER_LIMIT: usize = 1 << 16;

/// Buffers that a log frees. The largest log has room for some millions.
const CANCELLED_LIMIT: usize = 1 << 22;

/// The place of a buffer: its first sector, and its length in sectors.
type Place = (u64, u16);

/// The buffers that were freed, and how often.
#[derive(Debug, Default)]
pub(super) struct Cancelled(HashMap<Place, u32>);

impl Cancelled {
    /// First pass: counts a cancellation.
    pub(super) fn note(&mut self, item: &Item, machine: Machine) -> Result<()> {
        if flags(item, machine) & CANCEL != 0 {
            *self.0.entry(place(item, machine)).or_default() += 1;
        }
        if self.0.len() > CANCELLED_LIMIT {
            return Err(Error::new(ErrorKind::Limit, "it frees more blocks than a log has room for"));
        }
        Ok(())
    }

    /// Second pass: behind the last cancellation of a buffer its items count again.
    pub(super) fn pass(&mut self, item: &Item, machine: Machine) {
        if flags(item, machine) & CANCEL == 0 {
            return;
        }
        let place = place(item, machine);
        if let Some(count) = self.0.get_mut(&place) {
            *count -= 1;
            if *count == 0 {
                self.0.remove(&place);
            }
        }
    }

    /// Whether items of a buffer do not count.
    pub(super) fn has(&self, place: Place) -> bool {
        self.0.contains_key(&place)
    }
}

fn flags(item: &Item, machine: Machine) -> u16 {
    machine.u16(&item.regions[0], 4)
}

fn place(item: &Item, machine: Machine) -> Place {
    let first = &item.regions[0];
    (machine.u64(first, 8), machine.u16(first, 6))
}

impl Replay<'_> {
    /// Applies an item of a buffer.
    pub(super) fn buffer(&mut self, item: &Item, machine: Machine, lsn: Lsn) -> Result<()> {
        let flags = flags(item, machine);
        // A buffer of inodes is logged only for the list of inodes without a name.
        if flags & (INODES | CANCEL | QUOTAS) != 0 || self.cancelled.has(place(item, machine)) {
            return Ok(());
        }
        let (sector, count) = place(item, machine);
        let len = usize::from(count) * 512;
        let damaged = || corrupt("an item of a block is damaged");
        let at = sector.checked_mul(512).ok_or_else(damaged)?;
        if len == 0 || len > BUFFER_LIMIT {
            return Err(damaged());
        }
        let mut bytes = vec![0; len];
        self.read(at, &mut bytes)?;
        if written_at(self.superblock, &bytes).is_some_and(|written| written >= lsn) {
            return Ok(());
        }
        let first = &item.regions[0];
        let bit_count = (machine.u32(first, 16) as usize).min(BUFFER_LIMIT / CHUNK_LEN / 32 + 1) * 32;
        let is_set = |bit: usize| machine.u32(first, MAP_AT + bit / 32 * 4) >> (bit % 32) & 1 != 0;
        let (mut bit, mut index) = (0, 1);
        while bit < bit_count {
            if !is_set(bit) {
                bit += 1;
                continue;
            }
            let region = item.region(index)?;
            // Adjacent parts may be regions of their own.
            let set = (bit..bit_count).take_while(|bit| is_set(*bit)).count();
            let chunks = set.min(region.len() / CHUNK_LEN);
            if chunks == 0 {
                return Err(damaged());
            }
            let from = bit * CHUNK_LEN;
            let target = bytes.get_mut(from..from + chunks * CHUNK_LEN).ok_or_else(damaged)?;
            target.copy_from_slice(&region[..chunks * CHUNK_LEN]);
            bit += chunks;
            index += 1;
        }
        self.write(at, &bytes)
    }
}

/// The position in the log at which a block was written to its place, if it says so: older items do not
/// count.
fn written_at(superblock: &Superblock, bytes: &[u8]) -> Option<Lsn> {
    if !superblock.has_checksums {
        return None;
    }
    let magic: [u8; 4] = array(bytes, 0);
    // Offsets of the position and of the UUID.
    let (at, uuid_at) = match &magic {
        // The trees of a group: free space, reverse mappings, references, inodes.
        b"AB3B" | b"AB3C" | b"RMB3" | b"R3FC" | b"IAB3" | b"FIB3" => (24, 32),
        b"BMA3" => (32, 40),
        b"XAGF" => (208, 64),
        b"XAFL" => (24, 8),
        b"XAGI" => (320, 296),
        b"XSLM" => (48, 16),
        b"XDB3" | b"XDD3" | b"XDF3" => (16, 24),
        b"XFSB" => (240, if superblock.uuid == superblock.meta_uuid { 32 } else { 248 }),
        _ => match be32(bytes, 8) >> 16 {
            // Nodes and leaves of directories and attributes.
            0x3df1 | 0x3dff | 0x3ebe | 0x3bee => (24, 32),
            _ => return None,
        },
    };
    let written = be64(bytes, at);
    let is_ours = array::<16>(bytes, uuid_at) == superblock.meta_uuid;
    (is_ours && written != 0 && written != u64::MAX).then_some(Lsn(written))
}
