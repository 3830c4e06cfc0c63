//! The tables of all views of an image, the active ones and those of its internal snapshots, grouped by the
//! L2 tables that they share.

use std::collections::HashMap;

use crate::error::{Error, ErrorKind, Result};
use crate::format::refcount::max_refcount;
use crate::format::{EntryFormat, L1Table, RawL2Entry};
use crate::units::HostOffset;

use super::allocate::{Attempt, ClusterCount};
use super::reservation::ClusterRange;
use super::slices::TableClass;
use super::tables::{ImageFile, Tables};

/// The active view; internal snapshots follow, from 1 on.
const ACTIVE: usize = 0;

/// Views whose L1 tables name the same L2 table at one index.
#[derive(Debug)]
pub(super) struct TableGroup {
    /// `None`: they have none. As many of them as may share a table form a group.
    pub(super) table: Option<HostOffset>,
    pub(super) roots: Vec<usize>,
    /// The end of the longest of their disks.
    pub(super) end: u64,
}

impl TableGroup {
    pub(super) fn is_active_alone(&self) -> bool {
        self.roots == [ACTIVE]
    }

    fn has_active(&self) -> bool {
        self.roots.first() == Some(&ACTIVE)
    }
}

impl Tables {
    /// Bytes of the longest disk; the active one has `size`.
    pub(super) fn longest(&self, size: u64) -> u64 {
        self.snapshots.iter().filter_map(|snapshot| snapshot.size).fold(size, u64::max)
    }

    fn root(&self, root: usize) -> L1Table {
        if root == ACTIVE { self.l1 } else { self.snapshots[root - 1].l1 }
    }

    /// The views whose disks reach as far as the L2 table of `at`, grouped by that table. VM state lies
    /// beyond a disk's last table and belongs to no group.
    pub(super) fn groups(&mut self, image: &ImageFile, at: u64, size: u64) -> Result<Vec<TableGroup>> {
        let index = at / image.l1_span();
        let start = index * image.l1_span();
        let most = usize::try_from(max_refcount(image.order)).unwrap_or(usize::MAX);
        let mut groups: Vec<TableGroup> = Vec::new();
        let mut by_table: HashMap<Option<HostOffset>, usize> = HashMap::new();
        for root in 0..=self.snapshots.len() {
            let end = if root == ACTIVE { size } else { self.snapshots[root - 1].size.unwrap_or(size) };
            if start >= end {
                continue;
            }
            let table = self.table_of(image, self.root(root), index)?;
            match by_table.get(&table).map(|found| &mut groups[*found]) {
                Some(group) if table.is_some() || group.roots.len() < most => {
                    group.roots.push(root);
                    group.end = group.end.max(end);
                }
                _ => {
                    by_table.insert(table, groups.len());
                    groups.push(TableGroup { table, roots: vec![root], end });
                }
            }
        }
        Ok(groups)
    }

    /// Whether the next flush takes references from a cluster.
    pub(super) fn is_pending(&mut self, image: &ImageFile, cluster: u64) -> Result<bool> {
        // M1: a cluster that is about to lose a reference in memory still has it on disk.
        let is_it = |freed: &ClusterRange| (freed.first..freed.first + freed.count).contains(&cluster);
        Ok(self.count(image, cluster)? > 1 && self.pending.iter().any(is_it))
    }

    /// Makes sure that the group has an L2 table for `at` that may be changed for all of it, and that no
    /// other view uses.
    pub(super) fn ready_table(&mut self, image: &ImageFile, group: &TableGroup, at: u64) -> Attempt<()> {
        if group.is_active_alone() {
            return self.own_l2_table(image, at).map(|_| ());
        }
        let count = group.roots.len() as u64;
        if let Some(table) = group.table {
            let cluster = image.cluster().index(table.0);
            if cluster >= self.fresh || self.roles.contains(cluster) != group.has_active() {
                let fact = format!("an internal snapshot names {table} as an L2 table, which it is not");
                return Err(image.corrupt(fact).into());
            }
            let counted = self.count(image, cluster)?;
            if counted < count {
                let fact = format!("the L2 table at {table} has {count} users, but a refcount of {counted}");
                return Err(image.corrupt(fact).into());
            }
            if counted == count {
                return Ok(());
            }
            // M1: unknown users keep the table as it is. More users than are known: a leak, a user at another
            // place of a disk, or one that has dropped it in memory, but not yet on disk. Nothing may change
            // for any of them.
        }
        self.move_group(image, group, at / image.l1_span())
    }

    /// Gives a group a new table, with the same entries.
    fn move_group(&mut self, image: &ImageFile, group: &TableGroup, index: u64) -> Attempt<()> {
        let size = image.cluster().size();
        for root in &group.roots {
            let l1 = self.root(*root);
            if index >= u64::from(l1.entries) {
                let name = String::from_utf8_lossy(&self.snapshots[*root - 1].name).into_owned();
                let sentence = format!(
                    "the L1 table of its internal snapshot \"{}\" does not cover its disk; delete the \
                        snapshot",
                    name.escape_debug()
                );
                return Err(Error::new(ErrorKind::Unsupported, format!("{}: {sentence}", image.name)).into());
            }
            self.word(image, l1.offset.0 + index * 8, TableClass::L1)?;
        }
        let reservation = self.allocate(image, ClusterCount::Exactly(1))?;
        let table = reservation.clusters().start(image);
        self.fill_l2_table(image, table, group.table)?;
        let count = group.roots.len() as u64;
        let new = reservation.commit().first;
        self.set_count(image, new, count)?;
        let entry = EntryFormat::owned(table);
        let entry = if count == 1 { entry } else { EntryFormat::shared(entry) };
        for root in &group.roots {
            self.set_word(image, self.root(*root).offset.0 + index * 8, TableClass::L1, entry)?;
        }
        if group.has_active() {
            self.roles.add(new, 1);
        }
        if let Some(old) = group.table {
            let first = image.cluster().index(old.0);
            if group.has_active() {
                self.roles.remove(first, 1);
            }
            self.slices.forget(old.0, old.0 + size, image.slice_len());
            self.pending.extend(group.roots.iter().map(|_| ClusterRange { first, count: 1 }));
        }
        Ok(())
    }

    /// The entry of a table for an offset of the disk; unallocated without a table.
    pub(super) fn entry_in(
        &mut self,
        image: &ImageFile,
        table: Option<HostOffset>,
        at: u64,
    ) -> Result<RawL2Entry> {
        let Some(table) = table else { return Ok(RawL2Entry::default()) };
        let (words, index) = self.slice(image, Self::l2_place(image, table, at), TableClass::L2)?;
        Ok(RawL2Entry::new(image.format, &words[index..]))
    }

    /// Sets the entry of a table for an offset of the disk.
    pub(super) fn set_entry_in(
        &mut self,
        image: &ImageFile,
        table: HostOffset,
        at: u64,
        words: RawL2Entry,
    ) -> Result<()> {
        let place = Self::l2_place(image, table, at);
        // Both words are in one slice: 16-byte entries are aligned.
        self.set_word(image, place, TableClass::L2, words.entry)?;
        if image.format.extended {
            self.set_word(image, place + 8, TableClass::L2, words.bitmap)?;
        }
        Ok(())
    }
}
