//! The clusters that an L1 table reaches: checked before anything changes, counted once more for a new table,
//! freed with a removed one.
//!
//! A cluster has one count for each L1 table that reaches it, through any L2 table. So a cluster that only
//! one table reaches has a count of 1, and if that one is the active table, COPIED says so.

use std::collections::HashMap;

use crate::error::{Error, ErrorKind, Result};
use crate::format::refcount::max_refcount;
use crate::format::{EntryFormat, L1Table, RawL2Entry};
use crate::units::HostOffset;

use super::qcow2::Qcow2Writer;
use super::reservation::ClusterRange;
use super::slices::TableClass;
use super::tables::{ImageFile, Tables, entry_run, references};
use super::where_possible;

impl Qcow2Writer {
    /// Checks that the clusters that the first `entries` of an L1 table reach can be counted once more, and
    /// that this is allowed. Clusters that the active table reaches by the same L2 table are left out, unless
    /// this is the active table.
    pub(super) fn refuse_overflow(&self, l1: L1Table, entries: u64) -> Result<()> {
        let image = &self.image;
        // Several compressed clusters may be in one of the file.
        let mut more: HashMap<u64, u64> = HashMap::new();
        for index in 0..entries {
            if !self.tables.write().fits_once_more(image, l1, index, &mut more)? {
                let bits = 1 << image.order;
                let sentence = format!(
                    "its refcounts of {bits} bits cannot count one more internal snapshot; delete some, or \
                        give it \
                     wider ones (qemu-img amend -o refcount_bits=16, or qemu-img convert)"
                );
                return Err(Error::new(ErrorKind::Unsupported, format!("{}: {sentence}", image.name)));
            }
        }
        Ok(())
    }

    /// Punches clusters that are free; the caller holds all ranges, so that no other thread allocates them.
    pub(super) fn punch(&self, freed: &[ClusterRange]) {
        let size = self.image.cluster().size();
        for run in freed {
            if let Err(error) = where_possible(self.image.file.punch_hole(run.first * size, run.count * size))
            {
                // They are free all the same, and their next user writes them completely.
                tracing::warn!(
                    "{}: could not punch a hole, so freed clusters keep their space: {error}",
                    self.image.name
                );
            }
        }
    }
}

impl Tables {
    /// All entries of an L2 table.
    pub(super) fn all_words(&mut self, image: &ImageFile, table: HostOffset) -> Result<Vec<RawL2Entry>> {
        let mut all = Vec::with_capacity(image.format.l2_entries() as usize);
        let words_per_entry = image.format.l2_entry_words() as usize;
        for at in (table.0..table.0 + image.cluster().size()).step_by(image.slice_len() as usize) {
            if at > table.0 && at >= self.file_len {
                break; // the last table of a file may end with it
            }
            let (words, _) = self.slice(image, at, TableClass::L2)?;
            all.extend(words.chunks_exact(words_per_entry).map(|entry| RawL2Entry::new(image.format, entry)));
        }
        Ok(all)
    }

    /// Checks that an entry of an L1 table names a possible L2 table.
    fn may_be_l2(&mut self, image: &ImageFile, index: u64, table: HostOffset) -> Result<()> {
        let cluster = image.cluster().index(table.0);
        let is_active = self.table_of(image, self.l1, index)? == Some(table);
        if cluster >= self.fresh || self.roles.contains(cluster) != is_active {
            return Err(
                image.corrupt(format_args!("an L1 table names {table} as an L2 table, which it is not"))
            );
        }
        Ok(())
    }

    /// Checks that an entry of an L2 table is valid, and that its clusters have at least `least` references.
    fn check_references(
        &mut self,
        image: &ImageFile,
        words: RawL2Entry,
        guest: u64,
        least: u64,
    ) -> Result<()> {
        let Some(clusters) = references(image, words) else { return Ok(()) };
        entry_run(image, words, guest)?;
        self.may_be_clusters(image, clusters)?;
        (clusters.first..clusters.first + clusters.count)
            .try_for_each(|cluster| self.check_count(image, cluster, least))
    }

    fn check_count(&mut self, image: &ImageFile, cluster: u64, least: u64) -> Result<()> {
        let count = self.count(image, cluster)?;
        if count < least {
            let fact =
                format!("cluster {cluster:#x} has at least {least} users, but its refcount is {count}");
            return Err(image.corrupt(fact));
        }
        Ok(())
    }

    fn fits_once_more(
        &mut self,
        image: &ImageFile,
        l1: L1Table,
        index: u64,
        more: &mut HashMap<u64, u64>,
    ) -> Result<bool> {
        let most = max_refcount(image.order);
        let Some(table) = self.table_of(image, l1, index)? else { return Ok(true) };
        self.may_be_l2(image, index, table)?;
        if l1 != self.l1 && self.table_of(image, self.l1, index)? == Some(table) {
            return Ok(true);
        }
        let own = image.cluster().index(table.0);
        self.check_count(image, own, 1)?;
        let mut fits = self.count(image, own)? < most;
        for (number, words) in self.all_words(image, table)?.into_iter().enumerate() {
            let guest = index * image.l1_span() + number as u64 * image.cluster().size();
            self.check_references(image, words, guest, 1)?;
            let Some(clusters) = references(image, words) else { continue };
            for cluster in clusters.first..clusters.first + clusters.count {
                let mut count = self.count(image, cluster)?;
                if EntryFormat::is_compressed(words.entry) && count.saturating_mul(2) > most {
                    let more = more.entry(cluster).or_default();
                    count += *more;
                    *more += 1;
                }
                fits &= count < most;
            }
        }
        Ok(fits)
    }

    /// Checks that the clusters of an L1 entry can lose a reference, and that those of the active table at
    /// the same place keep one.
    pub(super) fn check_unreference(&mut self, image: &ImageFile, l1: L1Table, index: u64) -> Result<()> {
        let Some(table) = self.table_of(image, l1, index)? else { return Ok(()) };
        self.may_be_l2(image, index, table)?;
        let active = if l1 == self.l1 { None } else { self.table_of(image, self.l1, index)? };
        let is_shared = active == Some(table);
        self.check_count(image, image.cluster().index(table.0), 1 + u64::from(is_shared))?;
        let others = match active {
            Some(other) if !is_shared => self.all_words(image, other)?,
            _ => Vec::new(),
        };
        for (number, words) in self.all_words(image, table)?.into_iter().enumerate() {
            let guest = index * image.l1_span() + number as u64 * image.cluster().size();
            let other = others.get(number).and_then(|other| references(image, *other));
            let is_shared = is_shared || other.is_some() && other == references(image, words);
            self.check_references(image, words, guest, 1 + u64::from(is_shared))?;
        }
        Ok(())
    }

    /// Counts an L2 table, and every cluster that it refers to, once more; none of them belongs to one disk
    /// alone any more.
    pub(super) fn share_table(&mut self, image: &ImageFile, table: HostOffset) -> Result<()> {
        for (number, words) in self.all_words(image, table)?.into_iter().enumerate() {
            let Some(clusters) = references(image, words) else { continue };
            for cluster in clusters.first..clusters.first + clusters.count {
                // M1, M2: the count rises first, then the flag goes.
                self.count_once_more(image, cluster)?;
            }
            if EntryFormat::copied(words.entry) {
                let at = table.0 + number as u64 * image.format.l2_entry_len();
                self.set_word(image, at, TableClass::L2, EntryFormat::shared(words.entry))?;
            }
        }
        self.count_once_more(image, image.cluster().index(table.0))
    }

    /// The same with the active table of an L1 entry, and the entry itself.
    pub(super) fn share_active(&mut self, image: &ImageFile, index: u64) -> Result<()> {
        let Some(table) = self.table_of(image, self.l1, index)? else { return Ok(()) };
        self.share_table(image, table)?;
        let place = self.l1_place(image, index * image.l1_span());
        let word = self.word(image, place, TableClass::L1)?;
        self.set_word(image, place, TableClass::L1, EntryFormat::shared(word))
    }

    fn count_once_more(&mut self, image: &ImageFile, cluster: u64) -> Result<()> {
        let count = self.count(image, cluster)?;
        if count >= max_refcount(image.order) {
            return Err(
                image.corrupt(format_args!("cluster {cluster:#x} has more references than its refcount"))
            );
        }
        self.set_count(image, cluster, count + 1)
    }

    /// Removes a reference from an L2 table and from every cluster that it refers to, after an L1 table was
    /// removed durably. Returns the clusters that became free, in the order of the file.
    pub(super) fn unreference_table(
        &mut self,
        image: &ImageFile,
        table: HostOffset,
    ) -> Result<Vec<ClusterRange>> {
        let own = ClusterRange { first: image.cluster().index(table.0), count: 1 };
        let mut left: Vec<u64> = Vec::new();
        for words in self.all_words(image, table)? {
            if let Some(clusters) = references(image, words) {
                self.unreference(image, clusters)?;
                left.extend(clusters.first..clusters.first + clusters.count);
            }
        }
        self.unreference(image, own)?;
        left.push(own.first);
        left.sort_unstable();
        left.dedup();
        let mut freed: Vec<ClusterRange> = Vec::new();
        for cluster in left {
            if self.count(image, cluster)? > 0 {
                continue;
            }
            match freed.last_mut() {
                Some(last) if last.first + last.count == cluster => last.count += 1,
                _ => freed.push(ClusterRange { first: cluster, count: 1 }),
            }
        }
        if self.count(image, own.first)? == 0 {
            self.slices.forget(table.0, table.0 + image.cluster().size(), image.slice_len());
        }
        Ok(freed)
    }

    /// Marks clusters that now belong to the active disk alone, in the L2 table of an L1 entry and in the
    /// entry itself.
    pub(super) fn flag_own(&mut self, image: &ImageFile, index: u64) -> Result<()> {
        let Some(table) = self.table_of(image, self.l1, index)? else { return Ok(()) };
        if self.count(image, image.cluster().index(table.0))? != 1 {
            return Ok(()); // and so is everything behind it
        }
        let place = self.l1_place(image, index * image.l1_span());
        self.set_word(image, place, TableClass::L1, EntryFormat::owned(table))?;
        for (number, words) in self.all_words(image, table)?.into_iter().enumerate() {
            let host = EntryFormat::raw_offset(words.entry);
            if EntryFormat::is_compressed(words.entry) || EntryFormat::copied(words.entry) || host == 0 {
                continue;
            }
            // M2: what is counted once is flagged, and nothing else.
            if self.count(image, image.cluster().index(host))? == 1 {
                let at = table.0 + number as u64 * image.format.l2_entry_len();
                let owned = words.entry | EntryFormat::owned(HostOffset(host));
                self.set_word(image, at, TableClass::L2, owned)?;
            }
        }
        Ok(())
    }
}
