//! The log: what a machine that was not shut down had changed and not yet written to its place.
//!
//! It is replayed in memory, as the kernel does when it mounts the file system: `ends` finds the records that
//! count, `ring` reads them, `transaction` joins their operations, and `items` applies what is changed. Two
//! passes: the first one finds the blocks that were freed and must not be changed by older items. Intents,
//! which say what was begun and not finished, are kept for the file system to finish (`intents`).

mod buffer;
mod ends;
mod inode;
mod intents;
mod machine;
mod ring;
mod transaction;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::{corrupt, unsupported};
use crate::guest::source::Source;

use super::blocks::LogOverlay;
use super::superblock::Superblock;

pub(super) use intents::Unfinished;

use buffer::Cancelled;
use intents::Intents;
use machine::Machine;
use ring::{Header, Ring, UNIT};
use transaction::{Item, Pendings, Transaction};

/// Types of items (`XFS_LI_*`).
mod kind {
    pub(super) const EXTENT_FREE: u16 = 0x1236;
    pub(super) const EXTENT_FREE_DONE: u16 = 0x1237;
    pub(super) const INODE: u16 = 0x123b;
    pub(super) const BUFFER: u16 = 0x123c;
    pub(super) const QUOTA: u16 = 0x123d;
    pub(super) const QUOTA_OFF: u16 = 0x123e;
    pub(super) const INODE_CREATE: u16 = 0x123f;
    pub(super) const REVERSE_MAP: u16 = 0x1240;
    pub(super) const REFCOUNT_DONE: u16 = 0x1243;
    pub(super) const MAP: u16 = 0x1244;
    pub(super) const MAP_DONE: u16 = 0x1245;
    pub(super) const ATTRIBUTE: u16 = 0x1246;
    pub(super) const ATTRIBUTE_DONE: u16 = 0x1247;
    pub(super) const EXCHANGE: u16 = 0x1248;
    pub(super) const EXCHANGE_DONE: u16 = 0x1249;
    /// The last of those that concern the free space of the realtime device.
    pub(super) const LAST: u16 = 0x124f;
}

/// The result of a replay.
#[derive(Default)]
pub(super) struct Replayed {
    /// What the log has changed.
    pub(super) overlay: LogOverlay,
    /// Changes that were begun and not finished, in their order.
    pub(super) unfinished: Vec<Unfinished>,
    /// Facts that make the shown state incomplete.
    pub(super) remarks: Vec<String>,
}

/// Replays the log of a file system; `None` if it was unmounted cleanly, or never mounted.
pub(super) fn replay(source: &dyn Source, superblock: &Superblock) -> Result<Option<Replayed>> {
    let count = (u64::from(superblock.log_blocks) << superblock.block_bits) / UNIT as u64;
    let start = superblock.offset(superblock.log_start, superblock.log_blocks.into());
    let start = start.filter(|_| count > 0).ok_or_else(|| corrupt("it is outside of the file system"))?;
    let ring = Ring { source, start, count };
    let Some(ends) = ends::find(&ring, superblock.has_checksums)? else { return Ok(None) };
    if ends.newest.uuid != superblock.uuid {
        return Err(corrupt("it belongs to another file system"));
    }
    if is_unmounted(&ring, &ends.newest)? {
        return Ok(None);
    }
    let mut cancelled = Cancelled::default();
    each_transaction(&ring, superblock, &ends, &mut |transaction, machine| {
        for item in &transaction.items {
            if item.kind(machine) == kind::BUFFER {
                cancelled.note(item, machine)?;
            }
        }
        Ok(())
    })?;
    let mut replay =
        Replay { source, superblock, overlay: LogOverlay::default(), cancelled, intents: Intents::default() };
    each_transaction(&ring, superblock, &ends, &mut |transaction, machine| {
        replay.apply(&transaction, machine)
    })?;
    let (unfinished, remarks) = replay.intents.end();
    Ok(Some(Replayed { overlay: replay.overlay, unfinished, remarks }))
}

/// Whether the newest record says that the file system was unmounted.
fn is_unmounted(ring: &Ring<'_>, newest: &Header) -> Result<bool> {
    const UNMOUNT: u8 = 0x20;
    if newest.operation_count != 1 {
        return Ok(false);
    }
    let content = ring.content(newest, false)?;
    Ok(content.get(9).is_some_and(|flags| flags & UNMOUNT != 0))
}

/// Gives the committed transactions from the oldest record to the newest to `each`, in the order of their
/// commits.
fn each_transaction(
    ring: &Ring<'_>,
    superblock: &Superblock,
    ends: &ends::Ends,
    each: &mut dyn FnMut(Transaction, Machine) -> Result<()>,
) -> Result<()> {
    let mut pendings = Pendings::default();
    let mut block = ends.tail;
    let mut passed = 0;
    loop {
        let header = ring.header(block)?;
        let header = header.ok_or_else(|| corrupt(format!("no record begins at its block {block}")))?;
        let machine = Machine::of(header.machine)
            .ok_or_else(|| unsupported(format!("it was written by a machine of kind {}", header.machine)))?;
        let content = ring.content(&header, superblock.has_checksums)?;
        pendings.take(header.lsn, &content, header.operation_count, machine, &mut |transaction| {
            each(transaction, machine)
        })?;
        if header.block == ends.newest.block {
            return Ok(());
        }
        passed += header.block_count();
        if passed >= ring.count {
            return Err(corrupt("its records form a circle"));
        }
        block = (header.block + header.block_count()) % ring.count;
    }
}

/// A replay at work: the second pass.
struct Replay<'a> {
    source: &'a dyn Source,
    superblock: &'a Superblock,
    overlay: LogOverlay,
    cancelled: Cancelled,
    intents: Intents,
}

impl Replay<'_> {
    fn apply(&mut self, transaction: &Transaction, machine: Machine) -> Result<()> {
        // The kernel's order: blocks, then everything else, then the ends of cancellations.
        let is_buffer = |item: &&Item| item.kind(machine) == kind::BUFFER;
        for item in transaction.items.iter().filter(is_buffer) {
            self.buffer(item, machine, transaction.lsn)?;
        }
        for item in transaction.items.iter().filter(|item| !is_buffer(item)) {
            match item.kind(machine) {
                kind::INODE => self.inode(item, machine, transaction.lsn)?,
                kind::MAP | kind::ATTRIBUTE | kind::EXCHANGE => self.intents.begin(item, machine)?,
                kind::MAP_DONE | kind::ATTRIBUTE_DONE | kind::EXCHANGE_DONE => {
                    self.intents.finish(item, machine);
                }
                // Free space, its trees, quotas, and inodes without content: nothing that files show.
                kind::EXTENT_FREE
                | kind::EXTENT_FREE_DONE
                | kind::QUOTA
                | kind::QUOTA_OFF
                | kind::INODE_CREATE
                | kind::REVERSE_MAP..=kind::REFCOUNT_DONE => {}
                other if (kind::EXCHANGE_DONE..=kind::LAST).contains(&other) => {}
                other => return Err(unsupported(format!("it has items of the unknown kind {other:#x}"))),
            }
        }
        for item in transaction.items.iter().filter(is_buffer) {
            self.cancelled.pass(item, machine);
        }
        Ok(())
    }

    /// Fills `buf` with metadata as the replay has them so far. Returns whether the log has changed them.
    fn read(&self, at: u64, buf: &mut [u8]) -> Result<bool> {
        self.source.read_at(at, buf)?;
        Ok(self.overlay.apply(at, buf))
    }

    fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        self.overlay.write(self.source, at, bytes)
    }
}

impl Item {
    fn kind(&self, machine: Machine) -> u16 {
        machine.u16(&self.regions[0], 0)
    }

    fn region(&self, index: usize) -> Result<&[u8]> {
        let region = self.regions.get(index);
        region.map(Vec::as_slice).ok_or_else(|| corrupt("an item of a transaction is incomplete"))
    }
}

/// Whether an error states a fact about the log. Any other error is temporary: a retry may succeed.
pub(super) fn is_fact(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Limit)
}
