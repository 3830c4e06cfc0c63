//! The checksums of data: in a tree of their own, and in the log for what was synced since the last commit.

use std::collections::BTreeMap;

use crate::error::Result;

use super::format::{Key, kind, object};
use super::nodes::Nodes;
use super::tree::{Item, Tree};

/// All checksums of data.
#[derive(Debug)]
pub(super) struct Sums {
    /// `None` if there are none, or if the tree cannot be found.
    tree: Option<Tree>,
    /// Those in the log: items by the address of their first sector.
    logged: BTreeMap<u64, Vec<u8>>,
    sum_len: usize,
    sector_len: u64,
}

/// The checksums of some sectors, as far as there are any.
pub(super) struct SectorSums {
    bytes: Vec<u8>,
    is_there: Vec<bool>,
    sum_len: usize,
}

impl SectorSums {
    /// The checksum of a sector, by its number.
    pub(super) fn get(&self, sector: usize) -> Option<&[u8]> {
        let is_there = self.is_there.get(sector).copied().unwrap_or_default();
        is_there.then(|| &self.bytes[sector * self.sum_len..][..self.sum_len])
    }
}

impl Sums {
    pub(super) fn new(tree: Option<Tree>, sum_len: usize, sector_len: u32) -> Self {
        Self { tree, logged: BTreeMap::new(), sum_len, sector_len: sector_len.into() }
    }

    /// Adds an item of the log.
    pub(super) fn add(&mut self, at: u64, sums: Vec<u8>) {
        self.logged.insert(at, sums);
    }

    /// The checksums of `count` sectors from the address `at` on.
    pub(super) fn of(&self, nodes: &Nodes, at: u64, count: usize) -> Result<SectorSums> {
        let sum_len = self.sum_len;
        let mut sums = SectorSums { bytes: vec![0; count * sum_len], is_there: vec![false; count], sum_len };
        let mut item: Option<Item> = None;
        for sector in 0..count {
            let at = at.saturating_add(sector as u64 * self.sector_len);
            let mut found =
                self.logged.range(..=at).next_back().and_then(|(start, s)| self.within(*start, s, at));
            if found.is_none() {
                let is_in = |item: &Item| self.within(item.key.offset, item.data(), at).is_some();
                if !item.as_ref().is_some_and(is_in) {
                    item = self.item(nodes, at)?;
                }
                found = item.as_ref().and_then(|item| self.within(item.key.offset, item.data(), at));
            }
            if let Some(found) = found {
                sums.bytes[sector * sum_len..][..sum_len].copy_from_slice(found);
                sums.is_there[sector] = true;
            }
        }
        Ok(sums)
    }

    /// Whether there may be a checksum of one of `len` bytes from `at` on.
    pub(super) fn has_some(&self, nodes: &Nodes, at: u64, len: u64) -> bool {
        let last = at.saturating_add(len.saturating_sub(1));
        let reaches = |start: u64, item: &[u8]| {
            let sectors = (item.len() / self.sum_len) as u64;
            start.saturating_add(sectors.saturating_mul(self.sector_len)) > at
        };
        let logged = self.logged.range(..=last).next_back();
        if logged.is_some_and(|(start, item)| reaches(*start, item)) {
            return true;
        }
        match self.item(nodes, last) {
            Ok(found) => found.is_some_and(|item| reaches(item.key.offset, item.data())),
            // Reading them gives the error.
            Err(_) => true,
        }
    }

    /// The checksum of the sector at `at` in an item whose first sector is at `start`.
    fn within<'a>(&self, start: u64, item: &'a [u8], at: u64) -> Option<&'a [u8]> {
        let index = usize::try_from(at.checked_sub(start)? / self.sector_len).ok()?;
        item.get(index.checked_mul(self.sum_len)?..)?.get(..self.sum_len)
    }

    /// The item that may hold the checksum of the sector at `at`.
    fn item(&self, nodes: &Nodes, at: u64) -> Result<Option<Item>> {
        let Some(tree) = &self.tree else { return Ok(None) };
        let key = Key::new(object::CHECKSUMS, kind::EXTENT_CSUM, at);
        Ok(tree.last_to(nodes, key)?.filter(|item| item.key.is_beside(key)))
    }
}
