//! Clusters of the file: finding free ones, counting them, freeing them.
//!
//! Counts change in memory; [`super::flush`] writes them to disk before anything that refers to the clusters,
//! and lowers them only after nothing on disk refers to the clusters any more. So a count on disk is never
//! below the number of references.

use crate::error::{Error, ErrorKind, Result};
use crate::format::EntryFormat;
use crate::format::entry::HOST_OFFSET_END;
use crate::format::refcount::{block_entries, max_refcount, refcount, set_refcount};
use crate::units::HostOffset;

use super::reservation::{ClusterRange, ClusterUse, Reservation};
use super::slices::TableClass;
use super::tables::{ImageFile, Tables};

/// Why an allocation was not done.
#[derive(Debug)]
pub(super) enum AllocError {
    /// It is impossible.
    Failed(Error),
    /// The refcount table, which has this many entries, is too small: grow it, then try again.
    RefcountTableFull(u64),
}

impl From<Error> for AllocError {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

pub(super) type Attempt<T> = std::result::Result<T, AllocError>;

/// How many contiguous clusters are requested.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClusterCount {
    /// All of them.
    Exactly(u64),
    /// As many as are contiguous at the first free cluster: at least one.
    UpTo(u64),
}

impl Tables {
    /// Counts free contiguous clusters. The file covers them afterwards.
    pub(super) fn allocate(&mut self, image: &ImageFile, wanted: ClusterCount) -> Attempt<Reservation> {
        self.free_dropped(image)?;
        let (first, count) = self.find_free(image, wanted)?;
        if (first..first + count).any(|cluster| self.roles.contains(cluster)) {
            return Err(image
                .corrupt(format_args!(
                    "cluster {first:#x} holds a table, but its refcount says that it is free"
                ))
                .into());
        }
        let bytes = image.cluster().size();
        let end = (first + count) * bytes;
        if end > HOST_OFFSET_END {
            let fact = format!("{}: the file has reached the size that the format allows", image.name);
            return Err(Error::new(ErrorKind::TooLarge, fact).into());
        }
        if end > self.file_len {
            // Another process has no business here, but if it has extended the file, the file is not
            // truncated.
            let len = image.file.len()?;
            if len < self.file_len {
                let fact = format_args!("the file was cut short at {len:#x} by others while it was written");
                return Err(image.corrupt(fact).into());
            }
            if len < end {
                image.file.set_len(end)?;
            }
            self.file_len = end;
        }
        for cluster in first..first + count {
            self.set_count(image, cluster, 1)?;
            if let Some(shadow) = &mut self.shadow {
                shadow.made.add(cluster, 1);
            }
        }
        let is_fresh = first >= self.fresh;
        self.fresh = self.fresh.max(first + count);
        if first == self.free_hint {
            self.free_hint = first + count;
        }
        Ok(self.reserved(ClusterRange { first, count }, is_fresh, ClusterUse::Any))
    }

    /// Allocates clusters for a table that is written without the slices.
    pub(super) fn allocate_table(&mut self, image: &ImageFile, clusters: u64) -> Attempt<Reservation> {
        let reservation = self.allocate(image, ClusterCount::Exactly(clusters))?;
        let is_fresh = reservation.is_fresh();
        let clusters = reservation.commit();
        self.roles.add(clusters.first, clusters.count);
        // Slices of their former use may still be in memory.
        let start = clusters.start(image).0;
        self.slices.forget(start, start + clusters.len(image), image.slice_len());
        Ok(self.reserved(clusters, is_fresh, ClusterUse::Table))
    }

    /// Removes a reference from each cluster.
    pub(super) fn unreference(&mut self, image: &ImageFile, freed: ClusterRange) -> Result<()> {
        for cluster in freed.first..freed.first + freed.count {
            let count = self.count(image, cluster)?;
            if count == 0 {
                return Err(
                    image.corrupt(format_args!("cluster {cluster:#x} is in use, but its refcount is 0"))
                );
            }
            self.set_count(image, cluster, count - 1)?;
            if count == 1 {
                self.free_hint = self.free_hint.min(cluster);
                if let Some(shadow) = &mut self.shadow {
                    shadow.made.remove(cluster, 1);
                }
            }
        }
        Ok(())
    }

    fn find_free(&mut self, image: &ImageFile, wanted: ClusterCount) -> Attempt<(u64, u64)> {
        let (most, exact) = match wanted {
            ClusterCount::Exactly(count) => (count, true),
            ClusterCount::UpTo(count) => (count, false),
        };
        let (mut at, mut found) = (self.free_hint, 0);
        let mut hint_holds = true;
        loop {
            let Some(block) = self.refcount_block(image, at)? else {
                if found > 0 && !exact {
                    return Ok((at - found, found));
                }
                // A long run may cover any number of blocks if each block takes its first cluster from the
                // run.
                self.add_refcount_block(image, at, (found > 0).then(|| at - found))?;
                found = found.saturating_sub(1);
                continue;
            };
            let (place, index) = Self::count_place(image, block, at);
            let (words, word) = self.slice(image, place, TableClass::RefcountBlock)?;
            let per_word = 64usize >> image.order;
            let mut index = index;
            for word in &words[word..] {
                let bytes = word.to_be_bytes();
                while index < per_word {
                    if refcount(&bytes, index, image.order) == 0 {
                        found += 1;
                    } else if found > 0 && !exact {
                        return Ok((at - found, found));
                    } else {
                        hint_holds &= found == 0;
                        found = 0;
                        if hint_holds {
                            self.free_hint = at + 1;
                        }
                    }
                    at += 1;
                    if found == most {
                        return Ok((at - found, found));
                    }
                    index += 1;
                }
                index = 0;
            }
        }
    }

    /// Makes a block for the counts around `cluster`, whose block is missing: at `place`, which is free, or
    /// as the first cluster that it counts itself, since none of these is in use.
    fn add_refcount_block(&mut self, image: &ImageFile, cluster: u64, place: Option<u64>) -> Attempt<()> {
        let per_block = block_entries(image.cluster(), image.order);
        let index = cluster / per_block;
        let entries = self.refcount_table_entries(image);
        if index >= entries {
            return Err(AllocError::RefcountTableFull(entries));
        }
        let place = place.unwrap_or(index * per_block);
        if self.roles.contains(place) {
            return Err(image
                .corrupt(format_args!("cluster {place:#x} holds a table, but is not counted"))
                .into());
        }
        let at = HostOffset(place * image.cluster().size());
        let entry_at = self.refcount_table.offset.0 + index * 8;
        // Steps that may fail come first: a block is added completely or not at all.
        self.word(image, entry_at, TableClass::RefcountTable)?;
        self.write_zeroed(image, at)?;
        self.set_word(image, entry_at, TableClass::RefcountTable, at.0)?;
        let zeroes = vec![0; image.slice_len() as usize / 8];
        self.slices.insert(at.0, TableClass::RefcountBlock, zeroes.into());
        self.roles.add(place, 1);
        self.fresh = self.fresh.max(place + 1);
        self.set_count(image, place, 1)?;
        Ok(())
    }

    /// Writes a cluster of zeroes to the file, so that no later write to it lacks space.
    fn write_zeroed(&mut self, image: &ImageFile, at: HostOffset) -> Result<()> {
        let zeros = vec![0; image.cluster().size() as usize];
        image.file.write_at(at.0, &zeros)?;
        self.file_len = self.file_len.max(at.0 + image.cluster().size());
        Ok(())
    }

    pub(super) fn set_count(&mut self, image: &ImageFile, cluster: u64, count: u64) -> Result<()> {
        assert!(count <= max_refcount(image.order), "a writer counts no higher than it found");
        let block = self.refcount_block(image, cluster)?.expect("a cluster that was found by its block");
        let (at, index) = Self::count_place(image, block, cluster);
        let mut bytes = self.word(image, at, TableClass::RefcountBlock)?.to_be_bytes();
        set_refcount(&mut bytes, index, image.order, count);
        self.set_word(image, at, TableClass::RefcountBlock, u64::from_be_bytes(bytes))
    }

    /// Makes sure that the L2 table of an offset exists and has no other reference.
    pub(super) fn own_l2_table(&mut self, image: &ImageFile, at: u64) -> Attempt<HostOffset> {
        let place = self.l1_place(image, at);
        let word = self.word(image, place, TableClass::L1)?;
        let entry = image.format.l1(word).map_err(|reason| image.corrupt(reason.fact()))?;
        if let Some(table) = entry.l2
            && entry.copied
        {
            return Ok(table);
        }
        let reservation = self.allocate(image, ClusterCount::Exactly(1))?;
        let table = reservation.clusters().start(image);
        self.fill_l2_table(image, table, entry.l2)?;
        // M2: the new table is counted once.
        self.set_word(image, place, TableClass::L1, EntryFormat::owned(table))?;
        self.roles.add(reservation.commit().first, 1);
        if let Some(old) = entry.l2 {
            let first = image.cluster().index(old.0);
            if self.shadow.is_none() {
                self.roles.remove(first, 1);
            }
            // Other references to it still need the old cluster.
            if self.shadow.is_some() || self.count(image, first)? == 1 {
                self.slices.forget(old.0, old.0 + image.cluster().size(), image.slice_len());
            }
            self.free_later(first);
        }
        Ok(table)
    }

    /// Writes a new L2 table: empty, or a copy of the one that is shared with an internal snapshot.
    pub(super) fn fill_l2_table(
        &mut self,
        image: &ImageFile,
        table: HostOffset,
        old: Option<HostOffset>,
    ) -> Result<()> {
        let Some(old) = old else { return self.write_zeroed(image, table) };
        let mut bytes = self.l2_table_bytes(image, old)?;
        for entry in bytes.chunks_exact_mut(image.format.l2_entry_len() as usize) {
            let (first, _) = entry.split_at_mut(8);
            let word = refcount(first, 0, 6);
            // A cluster that two tables name is shared, whatever the flag says.
            let host = image.cluster().index(EntryFormat::raw_offset(word));
            if EntryFormat::copied(word)
                && !EntryFormat::is_compressed(word)
                && image.data_file.is_none()
                && host != 0
                && (self.shadow.is_some() || self.count(image, host)? != 1)
            {
                set_refcount(first, 0, 6, EntryFormat::shared(word));
            }
        }
        image.file.write_at(table.0, &bytes)?;
        self.file_len = self.file_len.max(table.0 + image.cluster().size());
        Ok(())
    }

    /// An L2 table as it is in memory: a shared one may have changed there, too.
    fn l2_table_bytes(&mut self, image: &ImageFile, table: HostOffset) -> Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(image.cluster().size() as usize);
        for at in (table.0..table.0 + image.cluster().size()).step_by(image.slice_len() as usize) {
            // The last table of a file may end with the file; missing bytes are zero.
            if at > table.0 && at >= self.file_len {
                break;
            }
            let (words, _) = self.slice(image, at, TableClass::L2)?;
            bytes.extend(words.iter().flat_map(|word| word.to_be_bytes()));
        }
        bytes.resize(image.cluster().size() as usize, 0);
        Ok(bytes)
    }
}
