//! Transactions: the operations of the records, joined to the items that each transaction changes.
//!
//! An operation of a record is a part of an item, of at most the record's length; a longer part goes on in
//! the next record. Transactions may be interleaved. Only those count whose commit operation is there.

use std::collections::HashMap;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::{be32, corrupt};

use super::machine::Machine;
use super::ring::Lsn;

/// Bytes of the header of an operation.
const HEADER_LEN: usize = 12;
/// Bytes of the header of a transaction.
const TRANSACTION_HEADER_LEN: usize = 16;
/// Bytes of the operations of unfinished transactions. A log reserves less.
const PENDING_LIMIT: usize = 128 << 20;
/// Memory that an operation takes beside its bytes.
const OVERHEAD: usize = 64;
/// `XFS_TRANSACTION`.
const CLIENT: u8 = 0x69;

/// Flags of an operation.
const START: u8 = 1;
const COMMIT: u8 = 2;
const CONTINUES: u8 = 4;
const CONTINUED: u8 = 8;
const UNMOUNT: u8 = 0x20;

/// An item: what a transaction changes of one object.
#[derive(Debug, Default)]
pub(super) struct Item {
    /// The first one says which object and what of it; the others are the new bytes.
    pub(super) regions: Vec<Vec<u8>>,
}

/// A committed transaction.
#[derive(Debug)]
pub(super) struct Transaction {
    /// The record in which it begins.
    pub(super) lsn: Lsn,
    pub(super) items: Vec<Item>,
}

#[derive(Debug)]
struct Pending {
    lsn: Lsn,
    regions: Vec<Vec<u8>>,
    /// Bytes that it takes.
    len: usize,
}

/// The transactions whose commit was not seen yet.
#[derive(Debug, Default)]
pub(super) struct Pendings {
    all: HashMap<u32, Pending>,
    len: usize,
}

impl Pendings {
    /// Takes the operations of a record, and gives each transaction that is committed by them to `each`.
    pub(super) fn take(
        &mut self,
        lsn: Lsn,
        content: &[u8],
        operation_count: u32,
        machine: Machine,
        each: &mut dyn FnMut(Transaction) -> Result<()>,
    ) -> Result<()> {
        let mut rest = content;
        for _ in 0..operation_count {
            let damaged = || corrupt("a record's operations are damaged");
            let (header, after) = rest.split_at_checked(HEADER_LEN).ok_or_else(damaged)?;
            let (id, len) = (be32(header, 0), be32(header, 4) as usize);
            let (client, flags) = (header[8], header[9]);
            let (data, after) = after.split_at_checked(len).ok_or_else(damaged)?;
            rest = after;
            if client != CLIENT || flags & UNMOUNT != 0 {
                continue;
            }
            if flags & COMMIT != 0 {
                if let Some(pending) = self.all.remove(&id) {
                    self.len -= pending.len;
                    each(Transaction { lsn: pending.lsn, items: items(pending.regions, machine)? })?;
                }
                continue;
            }
            if flags & START != 0 {
                self.forget(id);
                self.all.insert(id, Pending { lsn, regions: Vec::new(), len: 0 });
            }
            // One whose beginning is before the tail is on the disk already.
            let Some(pending) = self.all.get_mut(&id) else { continue };
            let taken = data.len() + OVERHEAD;
            pending.len += taken;
            self.len += taken;
            if self.len > PENDING_LIMIT {
                return Err(Error::new(ErrorKind::Limit, "its transactions are larger than a log allows"));
            }
            match pending.regions.last_mut() {
                Some(last) if flags & CONTINUED != 0 => last.extend(data),
                _ if flags & START != 0 && data.is_empty() => {}
                _ if data.is_empty() && flags & CONTINUES == 0 => {}
                _ => pending.regions.push(data.to_vec()),
            }
        }
        Ok(())
    }

    fn forget(&mut self, id: u32) {
        if let Some(old) = self.all.remove(&id) {
            self.len -= old.len;
        }
    }
}

/// The items of a transaction's regions.
fn items(regions: Vec<Vec<u8>>, machine: Machine) -> Result<Vec<Item>> {
    let mut regions = regions.into_iter();
    let header = regions.next().unwrap_or_default();
    if header.len() < TRANSACTION_HEADER_LEN || machine.u32(&header, 0) != 0x5452_414e {
        return Err(corrupt("a transaction has a damaged header"));
    }
    let mut items: Vec<Item> = Vec::new();
    while let Some(first) = regions.next() {
        let count = usize::from(machine.u16(&first, 2));
        if count == 0 {
            return Err(corrupt("an item of a transaction is damaged"));
        }
        let mut item = Item { regions: vec![first] };
        item.regions.extend(regions.by_ref().take(count - 1));
        if item.regions.len() != count {
            return Err(corrupt("an item of a transaction is incomplete"));
        }
        items.push(item);
    }
    Ok(items)
}
