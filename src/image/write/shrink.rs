//! A smaller disk: the size first, durably; then the clusters beyond the new end are freed.
//!
//! A later growth finds none of the old data: mappings beyond the end are removed, and the last cluster,
//! where it is the disk's own, is zero beyond the end. If a crash comes after the size has changed, the rest
//! remains to be done; shrinking to the same size again does it.

use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{EntryFormat, Mapping, RawL2Entry};
use crate::units::{HostOffset, Run, SECTOR_SIZE};

use super::qcow2::Qcow2Writer;
use super::reservation::ClusterRange;
use super::slices::TableClass;
use super::tables::{ImageFile, Tables, references};
use super::{Writer, Zeroing, where_possible, zero_bytes};

impl Writer {
    /// Sets the disk's size to `size` bytes, rounded up to sectors, and frees the clusters beyond. No other
    /// thread reads or writes the disk. It is durable when this returns. With the disk's current size, it
    /// only frees the clusters that a crash has left beyond the end. Internal snapshots keep their sizes and
    /// their content.
    ///
    /// Refused: `Usage` (larger than now), `TooLarge` (an impossible size), `Unsupported` (bitmaps; version 2
    /// with internal snapshots). After any other failure [`Writer::size`] shows the progress: the new size,
    /// if only space remains to be freed.
    ///
    /// # Panics
    /// In undoable mode.
    pub fn shrink(&self, size: u64) -> Result<()> {
        self.format.shrink(size)
    }
}

/// A size in whole sectors to which a disk of `now` bytes can shrink.
pub(super) fn smaller(name: &str, size: u64, now: u64) -> Result<u64> {
    let Some(rounded) = size.checked_next_multiple_of(SECTOR_SIZE) else {
        return Err(Error::new(ErrorKind::TooLarge, format!("{name}: no disk is that large")));
    };
    if rounded > now {
        let fact = format!("{name} has {now} bytes and does not shrink to {rounded}");
        return Err(Error::new(ErrorKind::Usage, fact));
    }
    Ok(rounded)
}

impl Qcow2Writer {
    pub(super) fn shrink(&self, size: u64) -> Result<()> {
        assert!(!self.is_undoable(), "what is written can be undone");
        let _all = self.ranges.hold(0, u64::MAX);
        self.check_poison()?;
        let size = smaller(&self.image.name, size, self.size())?;
        if size < self.size() {
            self.refuse_unrecorded_sizes()?;
            self.refuse_bitmaps()?;
            self.prepare()?;
            let _turn = self.flushes.turn();
            self.check_poison()?;
            self.flush_in_turn()?;
            // M11: the size is on disk before a mapping is removed.
            self.name_size(size)?;
        }
        self.trim(size)?;
        self.close()
    }

    /// Frees the clusters beyond the end of the disk.
    fn trim(&self, size: u64) -> Result<()> {
        let image = &self.image;
        self.prepare()?;
        let end = size.next_multiple_of(image.cluster().size());
        self.zero_tail(size, end)?;
        if let Some(data_file) = &image.data_file {
            let len = data_file.len()?;
            if self.raw_data && len > size {
                data_file.set_len(size)?;
                self.data_dirty.store(true, Ordering::Release);
            } else if len > end {
                where_possible(data_file.punch_hole(end, len - end))?;
                self.data_dirty.store(true, Ordering::Release);
            }
        }
        let (first, l1) = (end / image.l1_span(), self.tables.read().l1);
        for index in first..l1.entries.into() {
            let from = end.saturating_sub(index * image.l1_span()) / image.cluster().size();
            let own = self.with_tables(|tables| Ok(tables.own_clusters_from(image, index, from)?))?;
            // No reader uses it by now; afterwards it could be allocated again.
            self.punch(&own);
            if from == 0 {
                self.with_tables(|tables| Ok(tables.drop_table(image, index)?))?;
            } else {
                self.with_tables(|tables| tables.drop_entries(image, index, from))?;
            }
            self.write_back_if_pressed()?;
        }
        Ok(())
    }

    /// Zeroes the disk's own data between its end and the end of the cluster.
    fn zero_tail(&self, size: u64, end: u64) -> Result<()> {
        let image = &self.image;
        let (mut at, mut is_shared) = (size, false);
        while at < end && !self.raw_data {
            let Run { value: entry, len } = self.lookup_to_write(at, end - at)?;
            match entry.mapping {
                Mapping::Data(host) if entry.copied => {
                    let len = self.len_in_data_file(host, len)?;
                    zero_bytes(&**image.data(), host.0, len, Zeroing::Unmap)?;
                    self.data_dirty.store(true, Ordering::Release);
                }
                Mapping::Data(_) | Mapping::Compressed(_) => is_shared = true,
                // A growth of the disk covers the bytes of the layers below.
                Mapping::Zero(_) | Mapping::Hole => {}
            }
            at += len;
        }
        if is_shared {
            // A cluster of the disk's own: it becomes zero beyond the end.
            let at = size - SECTOR_SIZE;
            let mut sector = vec![0; SECTOR_SIZE as usize];
            self.read_inner(at, &mut sector)?;
            self.write_held(at, &sector)?;
        }
        Ok(())
    }

    /// How much of a run the data file has; no other file is extended.
    fn len_in_data_file(&self, host: HostOffset, run: u64) -> Result<u64> {
        match &self.image.data_file {
            Some(data_file) => Ok(run.min(data_file.len()?.saturating_sub(host.0))),
            None => Ok(run),
        }
    }
}

impl Tables {
    /// Clusters that only the active disk refers to, by the entries from `from` on of one of its L2 tables.
    fn own_clusters_from(&mut self, image: &ImageFile, index: u64, from: u64) -> Result<Vec<ClusterRange>> {
        let Some(table) = self.table_of(image, self.l1, index)? else { return Ok(Vec::new()) };
        let mut own: Vec<ClusterRange> = Vec::new();
        for words in self.all_words(image, table)?.into_iter().skip(from as usize) {
            let Some(clusters) = references(image, words) else { continue };
            self.may_be_clusters(image, clusters)?;
            if EntryFormat::is_compressed(words.entry) || self.count(image, clusters.first)? != 1 {
                continue;
            }
            match own.last_mut() {
                Some(last) if last.first + last.count == clusters.first => last.count += 1,
                _ => own.push(clusters),
            }
        }
        Ok(own)
    }

    /// Drops all clusters of an L1 entry.
    fn drop_table(&mut self, image: &ImageFile, index: u64) -> Result<()> {
        let Some(table) = self.table_of(image, self.l1, index)? else { return Ok(()) };
        let all = self.all_words(image, table)?;
        let cluster = image.cluster().index(table.0);
        let is_own = self.count(image, cluster)? == 1;
        self.set_word(image, self.l1.offset.0 + index * 8, TableClass::L1, 0)?;
        all.into_iter().try_for_each(|words| self.release(image, words))?;
        self.roles.remove(cluster, 1);
        if is_own {
            self.slices.forget(table.0, table.0 + image.cluster().size(), image.slice_len());
        }
        self.free_later(cluster);
        Ok(())
    }

    /// Drops the clusters of the entries from `from` on of an active L2 table.
    fn drop_entries(&mut self, image: &ImageFile, index: u64, from: u64) -> super::allocate::Attempt<()> {
        let Some(table) = self.table_of(image, self.l1, index)? else { return Ok(()) };
        let behind = self.all_words(image, table)?.into_iter().skip(from as usize);
        if behind.into_iter().all(|words| words == RawL2Entry::default()) {
            return Ok(());
        }
        let start = index * image.l1_span();
        let table = self.own_l2_table(image, start)?;
        for (number, words) in self.all_words(image, table)?.into_iter().enumerate().skip(from as usize) {
            if words != RawL2Entry::default() {
                let guest = start + number as u64 * image.cluster().size();
                self.set_entry_in(image, table, guest, RawL2Entry::default())?;
                self.release(image, words)?;
            }
        }
        Ok(())
    }
}
