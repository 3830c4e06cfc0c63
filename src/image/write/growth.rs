//! Larger tables: the refcount table when clusters outnumber it, the L1 table when the disk grows.
//!
//! A new table is written completely, beside the old one, and made durable; then one write within a sector of
//! the header names it. The old one's clusters are free only after that.

use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::format::entry::HOST_OFFSET_END;
use crate::format::header::{
    MAX_L1_LEN, MAX_REFCOUNT_TABLE_LEN, REFCOUNT_TABLE_AT, RefcountTable, SNAPSHOTS_AT,
};
use crate::format::refcount::{block_entries, set_refcount};
use crate::format::{L1Table, Version};
use crate::units::{HostOffset, SECTOR_SIZE};

use super::Zeroing;
use super::allocate::ClusterCount;
use super::qcow2::Qcow2Writer;
use super::reservation::{ClusterRange, Reservation};
use super::slices::TableClass;
use super::tables::{ImageFile, Tables};

// Offsets of header fields, from the specification; fields written at once are in the first sector.
/// Size of the disk (8), encryption method (4), then the L1 table as at [`L1_AT`].
const SIZE_AT: u64 = 24;
/// Entries of the L1 table (4), its offset (8).
const L1_AT: u64 = 36;

/// A future refcount table, with the blocks that count it.
pub(super) struct TableGrowth {
    first: u64,
    blocks: Vec<Vec<u8>>,
    table: Vec<u8>,
    new: RefcountTable,
}

impl TableGrowth {
    /// Writes the new table and its blocks to the file, where nothing refers to them.
    pub(super) fn write(&self, image: &ImageFile) -> Result<()> {
        let bytes = self.blocks.concat();
        image.file.write_at(self.first * image.cluster().size(), &bytes)?;
        image.file.write_at(self.new.offset.0, &self.table)
    }

    /// Lets the header name the new table.
    pub(super) fn switch(&self, image: &ImageFile) -> Result<()> {
        let mut field = self.new.offset.0.to_be_bytes().to_vec();
        field.extend(self.new.clusters.to_be_bytes());
        image.file.write_at(REFCOUNT_TABLE_AT, &field)
    }
}

impl Tables {
    /// A larger refcount table. It and its blocks are at offsets where no cluster can be counted yet, so that
    /// none of them is in use.
    pub(super) fn plan_refcount_table(&mut self, image: &ImageFile) -> Result<TableGrowth> {
        let size = image.cluster().size();
        let per_block = block_entries(image.cluster(), image.order);
        let entries = self.refcount_table_entries(image);
        let first = entries * per_block;
        // Half as much again, so that growing stays rare.
        let grown = u64::from(self.refcount_table.clusters) * 3 / 2 + 1;
        let (mut clusters, mut blocks) = (grown, 1);
        loop {
            let more_blocks = (clusters + blocks).div_ceil(per_block);
            let more_clusters = grown.max(((entries + more_blocks) * 8).div_ceil(size));
            if (more_blocks, more_clusters) == (blocks, clusters) {
                break;
            }
            (blocks, clusters) = (more_blocks, more_clusters);
        }
        let end = (first + blocks + clusters) * size;
        if clusters * size > MAX_REFCOUNT_TABLE_LEN || end > HOST_OFFSET_END {
            let fact =
                format!("{}: its refcount table has reached the size that the format allows", image.name);
            return Err(Error::new(ErrorKind::TooLarge, fact));
        }
        if (first..first + blocks + clusters).any(|cluster| self.roles.contains(cluster)) {
            return Err(image
                .corrupt(format_args!("tables lie past {:#x}, where no cluster is counted", first * size)));
        }
        let mut table =
            self.table_bytes(image, self.refcount_table.offset, entries, TableClass::RefcountTable)?;
        (0..blocks).for_each(|index| table.extend(((first + index) * size).to_be_bytes()));
        table.resize((clusters * size) as usize, 0);
        let mut contents = vec![vec![0; size as usize]; blocks as usize];
        for index in 0..blocks + clusters {
            let block = &mut contents[(index / per_block) as usize];
            set_refcount(block, (index % per_block) as usize, image.order, 1);
        }
        let offset = HostOffset((first + blocks) * size);
        let new = RefcountTable { offset, clusters: clusters as u32 };
        Ok(TableGrowth { first, blocks: contents, table, new })
    }

    /// Writes the L1 table, as it is in memory, to reserved clusters, followed by zeroes.
    pub(super) fn copy_l1(&mut self, image: &ImageFile, place: &Reservation) -> Result<()> {
        let (clusters, old) = (place.clusters(), self.l1);
        let mut table = self.table_bytes(image, old.offset, old.entries.into(), TableClass::L1)?;
        table.resize(clusters.len(image) as usize, 0);
        image.file.write_at(clusters.start(image).0, &table)
    }

    /// Switches to the new table, which the header names by now.
    pub(super) fn adopt(&mut self, image: &ImageFile, growth: &TableGrowth) -> Result<()> {
        let size = image.cluster().size();
        let old = std::mem::replace(&mut self.refcount_table, growth.new);
        let end = growth.new.offset.0 + u64::from(growth.new.clusters) * size;
        self.file_len = self.file_len.max(end);
        self.fresh = self.fresh.max(end / size);
        self.roles.add(growth.first, end / size - growth.first);
        let clusters = u64::from(old.clusters);
        self.slices.forget(old.offset.0, old.offset.0 + clusters * size, image.slice_len());
        let first = image.cluster().index(old.offset.0);
        self.roles.remove(first, clusters);
        // The header no longer names it, durably: only holders of the tables' lock ever read it.
        self.unreference(image, ClusterRange { first, count: clusters })
    }
}

impl Qcow2Writer {
    /// Sets the disk's size to `size` bytes, which is larger than now.
    pub(super) fn grow(&self, size: u64) -> Result<()> {
        let name = &self.image.name;
        let Some(size) = size.checked_next_multiple_of(SECTOR_SIZE) else {
            return Err(Error::new(ErrorKind::TooLarge, format!("{name}: no disk is that large")));
        };
        self.check_poison()?;
        // No mapping changes meanwhile.
        let _all = self.ranges.hold(0, u64::MAX);
        let old_size = self.size();
        if size == old_size {
            return Ok(());
        }
        if size < old_size {
            let sentence = "a disk in use does not shrink; use resize";
            return Err(Error::new(ErrorKind::Forbidden, format!("{name}: {sentence}")));
        }
        self.refuse_bitmaps()?;
        self.refuse_unrecorded_sizes()?;
        let entries = self.l1_entries_for(size)?;
        self.prepare()?;
        if entries > u64::from(self.tables.read().l1.entries) {
            if self.is_undoable() { self.extend_l1(entries as u32)? } else { self.grow_l1(entries as u32)? }
        }
        if self.raw_data
            && let Some(data_file) = &self.image.data_file
        {
            data_file.set_len(size)?;
        }
        // Bytes there, in the tables or below, have never been the disk's.
        let mut at = old_size;
        while at < size {
            let turn = self.image.rest_of_table(at, size - at);
            self.zero_held(at, turn, Zeroing::Unmap, size)?;
            self.write_back_if_pressed()?;
            at += turn;
        }
        if self.is_undoable() {
            // The header will state it when it names the new tables.
            self.size.store(size, Ordering::Release);
            return Ok(());
        }
        let _turn = self.flushes.turn();
        self.check_poison()?;
        self.flush_in_turn()?;
        self.name_size(size)
    }

    /// Sets the disk's size, in the header and in memory; the caller has the turn.
    pub(super) fn name_size(&self, size: u64) -> Result<()> {
        let written =
            self.image.file.write_at(SIZE_AT, &size.to_be_bytes()).and_then(|()| self.image.file.sync());
        written.map_err(|error| self.poisoned_by(error))?;
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Lets the header name another size and L1 table, durable by now, with one write; and with `snapshots`
    /// (count and offset) another snapshot table. The caller has the turn.
    pub(super) fn name_l1(&self, size: u64, l1: L1Table, snapshots: Option<(u32, HostOffset)>) -> Result<()> {
        let mut fields = size.to_be_bytes().to_vec();
        fields.extend(0u32.to_be_bytes()); // the method of encryption, between them: none
        fields.extend(l1.entries.to_be_bytes());
        fields.extend(l1.offset.0.to_be_bytes());
        if let Some((count, at)) = snapshots {
            // The refcount table, between them, stays.
            let RefcountTable { offset, clusters } = self.tables.read().refcount_table;
            fields.extend(offset.0.to_be_bytes());
            fields.extend(clusters.to_be_bytes());
            assert!(SIZE_AT + fields.len() as u64 == SNAPSHOTS_AT, "the fields lie side by side");
            fields.extend(count.to_be_bytes());
            fields.extend(at.0.to_be_bytes());
        }
        let switched = self.image.file.write_at(SIZE_AT, &fields).and_then(|()| self.image.file.sync());
        switched.map_err(|error| self.poisoned_by(error))
    }

    /// Refuses to resize a disk if the size of internal snapshots would change with it.
    pub(super) fn refuse_unrecorded_sizes(&self) -> Result<()> {
        if !self.image.has_snapshots() || self.image.format.version == Version::V3 {
            return Ok(());
        }
        let sentence = "its version 2 does not note the disk size of internal snapshots, which would change \
            with it; \
                        delete them, or amend the image to version 3 (qemu-img amend -o compat=1.1)";
        Err(Error::new(ErrorKind::Unsupported, format!("{}: {sentence}", self.image.name)))
    }

    /// Checks that an L1 table can map this many bytes; returns its entries.
    pub(super) fn l1_entries_for(&self, size: u64) -> Result<u64> {
        let entries = size.div_ceil(self.image.l1_span());
        if entries * 8 <= MAX_L1_LEN {
            return Ok(entries);
        }
        let fact = format!("{size} bytes are more than an L1 table of 32 MiB can map; use larger clusters");
        Err(Error::new(ErrorKind::TooLarge, format!("{}: {fact}", self.image.name)))
    }

    /// Replaces the L1 table by one of `entries` entries.
    fn grow_l1(&self, entries: u32) -> Result<()> {
        let image = &self.image;
        let size = image.cluster().size();
        let clusters = (u64::from(entries) * 8).div_ceil(size);
        let place = self.with_tables(|tables| tables.allocate(image, ClusterCount::Exactly(clusters)))?;
        let _turn = self.flushes.turn();
        self.check_poison()?;
        // All ranges are held, so the old table does not change from here on; this makes durable what it
        // names, and the counts of the new one.
        self.flush_in_turn()?;
        let mut tables = self.tables.write();
        let old = tables.l1;
        tables.copy_l1(image, &place)?;
        // The header may name it from here on, even if the write's outcome is unknown.
        let new = place.commit();
        let offset = new.start(image);
        let mut field = entries.to_be_bytes().to_vec();
        field.extend(offset.0.to_be_bytes());
        let switched = (|| {
            image.file.sync()?;
            image.file.write_at(L1_AT, &field)?;
            image.file.sync()
        })();
        switched.map_err(|error| self.poisoned_by(error))?;
        tables.l1 = L1Table { offset, entries };
        let (first, count) = (image.cluster().index(old.offset.0), old.len_bytes().div_ceil(size));
        tables.slices.forget(old.offset.0, old.offset.0 + count * size, image.slice_len());
        tables.roles.remove(first, count);
        tables.roles.add(new.first, clusters);
        if old.entries > 0 {
            tables
                .unreference(image, ClusterRange { first, count })
                .map_err(|error| self.poisoned_by(error))?;
        }
        Ok(())
    }
}
