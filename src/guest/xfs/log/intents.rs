//! Intents: changes that take several transactions. One without its end is finished at the next mount.

use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::corrupt;

use super::kind;
use super::machine::Machine;
use super::transaction::Item;

/// Intents that are open at once: each thread of a machine has a few.
const LIMIT: usize = 1 << 12;
/// Bytes before the extents of an intent to map, and of an extent.
const MAP_HEADER_LEN: usize = 16;
const MAP_LEN: usize = 32;
/// Flags of an extent to map.
const TYPE: u32 = 0xff;
const MAP: u32 = 1;
const UNMAP: u32 = 2;
const ATTRIBUTES: u32 = 1 << 31;
const UNWRITTEN: u32 = 1 << 30;
/// Flags of an exchange: of attribute forks, and with the files' sizes.
const EXCHANGE_ATTRIBUTES: u64 = 1;
const EXCHANGE_SIZES: u64 = 1 << 1;
/// Operations on attributes that concern parent pointers.
const PARENT_OPERATIONS: std::ops::RangeInclusive<u32> = 4..=6;

/// A change of a file's mapping that was begun, in blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::guest::xfs) enum Unfinished {
    /// Blocks of a file get a place, or none.
    Map {
        inode: u64,
        start: u64,
        count: u64,
        /// The first block (`xfs_fsblock_t`), and whether it was never written; `None`: a hole.
        place: Option<(u64, bool)>,
    },
    /// Two files exchange a range.
    Exchange {
        inodes: [u64; 2],
        starts: [u64; 2],
        count: u64,
        /// Their sizes from then on.
        sizes: Option<[u64; 2]>,
    },
}

#[derive(Debug)]
struct Intent {
    kind: u16,
    id: u64,
    changes: Vec<Unfinished>,
    remark: Option<&'static str>,
}

/// The intents whose end was not seen yet, in their order.
#[derive(Debug, Default)]
pub(super) struct Intents(Vec<Intent>);

impl Intents {
    pub(super) fn begin(&mut self, item: &Item, machine: Machine) -> Result<()> {
        if self.0.len() >= LIMIT {
            return Err(Error::new(ErrorKind::Limit, "it has more unfinished changes than a log allows"));
        }
        let first = item.region(0)?;
        let kind = item.kind(machine);
        let mut intent = Intent { kind, id: machine.u64(first, 8), changes: Vec::new(), remark: None };
        match kind {
            kind::MAP => {
                let count = machine.u32(first, 4) as usize;
                let extents = count
                    .checked_mul(MAP_LEN)
                    .and_then(|len| first.get(MAP_HEADER_LEN..)?.get(..len))
                    .ok_or_else(|| corrupt("an intent to map is damaged"))?;
                for extent in extents.chunks_exact(MAP_LEN) {
                    let flags = machine.u32(extent, 28);
                    if flags & ATTRIBUTES != 0 {
                        intent.remark = Some("an extended attribute was being changed");
                        continue;
                    }
                    let place = match flags & TYPE {
                        MAP => Some((machine.u64(extent, 8), flags & UNWRITTEN != 0)),
                        UNMAP => None,
                        _ => return Err(corrupt("an intent to map is damaged")),
                    };
                    let (inode, start) = (machine.u64(extent, 0), machine.u64(extent, 16));
                    let count = machine.u32(extent, 24).into();
                    intent.changes.push(Unfinished::Map { inode, start, count, place });
                }
            }
            kind::EXCHANGE => {
                let field = |at: usize| machine.u64(first, at);
                let flags = field(64);
                if flags & EXCHANGE_ATTRIBUTES != 0 {
                    intent.remark = Some("extended attributes were being exchanged");
                } else {
                    intent.changes.push(Unfinished::Exchange {
                        inodes: [field(16), field(24)],
                        starts: [field(40), field(48)],
                        count: field(56),
                        sizes: (flags & EXCHANGE_SIZES != 0).then(|| [field(72), field(80)]),
                    });
                }
            }
            _ if PARENT_OPERATIONS.contains(&(machine.u32(first, 24) & TYPE)) => {}
            _ => intent.remark = Some("an extended attribute was being changed"),
        }
        self.0.push(intent);
        Ok(())
    }

    /// The end of an intent. The type of an end is the one of its beginning, plus one.
    pub(super) fn finish(&mut self, item: &Item, machine: Machine) {
        let (kind, id) = (item.kind(machine) - 1, machine.u64(&item.regions[0], 8));
        if let Some(index) = self.0.iter().position(|intent| intent.kind == kind && intent.id == id) {
            self.0.remove(index);
        }
    }

    /// What is unfinished when the log ends, and facts about what cannot be finished.
    pub(super) fn end(self) -> (Vec<Unfinished>, Vec<String>) {
        let mut remarks: Vec<String> = Vec::new();
        let mut changes = Vec::new();
        for intent in self.0 {
            if let Some(remark) = intent.remark.filter(|remark| !remarks.iter().any(|r| r == remark)) {
                remarks.push(remark.to_owned());
            }
            changes.extend(intent.changes);
        }
        (changes, remarks)
    }
}
