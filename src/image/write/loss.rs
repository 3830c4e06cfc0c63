//! References of an image to data that its file does not have.
//!
//! A truncated file is readable up to its end, and the rest is an error. The first cluster that a writer
//! allocates would extend the file, and from then on the lost data would read as zeroes, which no check could
//! tell from data. So before anything is written all references have to be within the file.
//!
//! A sound image costs next to nothing to check: if no cluster beyond the end of the file is counted, none is
//! referred to (the allocator uses the same counts). Only otherwise are all tables read, since such a count
//! may be a mere leak.

use std::collections::HashSet;

use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::{BitmapCluster, table_entry};
use crate::format::compressed::decompress;
use crate::format::entry::SUBCLUSTERS;
use crate::format::entry::ZERO;
use crate::format::refcount::block_entries;
use crate::format::{EntryFormat, Header, L1Table, RawL2Entry, Snapshot};
use crate::image::{read_bitmaps, read_snapshots};
use crate::units::HostOffset;

use super::slices::TableClass;
use super::tables::{ImageFile, Tables};

/// A state of the disk that tables of the file map.
struct LossRoot {
    name: String,
    l1: L1Table,
    /// Bytes of its disk.
    size: u64,
    /// The end of VM state that follows the disk.
    vm_state_end: u64,
}

impl Tables {
    /// `Corrupt` if the image's tables name something beyond the end of a file.
    pub(super) fn refuse_loss(&mut self, image: &ImageFile, header: &Header) -> Result<()> {
        if let Some(data_file) = &image.data_file {
            let len = data_file.len()?;
            if len < header.virtual_size
                && let Some(at) = LossWalk::new(image, header, len).lost_data(&active(header))?
            {
                let fact = format!(
                    "{}: its external data file ends at {len:#x}, before the data of guest offset {at:#x}; \
                        it can be \
                     read, but writing would turn what is lost into zeroes; restore the data file from a \
                     copy, or, if \
                     it is lost for good, say so by giving it its length: truncate -s {} FILE",
                    image.name, header.virtual_size
                );
                return Err(Error::new(ErrorKind::Corrupt, fact));
            }
        }
        // R4: whether the tables name something beyond the end of the file.
        if !self.may_be_truncated(image)? {
            return Ok(());
        }
        match self.find_loss(image, header)? {
            None => Ok(()),
            Some(lost) => {
                let fact = format!(
                    "{}: the file ends at {:#x}, before {lost}; it was cut short, and can be read, but \
                        writing would turn \
                     what is lost into zeroes; restore it from a copy, or unmount it and make the loss \
                     explicit with \
                     chainfs check --repair all",
                    image.name, self.file_len
                );
                Err(Error::new(ErrorKind::Corrupt, fact))
            }
        }
    }

    /// Whether any counted cluster is not completely in the file.
    fn may_be_truncated(&mut self, image: &ImageFile) -> Result<bool> {
        let size = image.cluster().size();
        let table_end = self.refcount_table.offset.0 + u64::from(self.refcount_table.clusters) * size;
        if table_end > self.file_len {
            return Ok(true);
        }
        let first = self.file_len / size;
        let per_block = block_entries(image.cluster(), image.order);
        for index in first / per_block..self.refcount_table_entries(image) {
            let Some(block) = self.block_of_entry(image, index)? else { continue };
            if block.0 + size > self.file_len {
                return Ok(true);
            }
            let (mut at, end) = (first.max(index * per_block), (index + 1) * per_block);
            while at < end && !at.is_multiple_of(64 >> image.order) {
                if self.count(image, at)? > 0 {
                    return Ok(true);
                }
                at += 1;
            }
            while at < end {
                let (place, _) = Self::count_place(image, block, at);
                let (words, word) = self.slice(image, place, TableClass::RefcountBlock)?;
                if words[word..].iter().any(|word| *word != 0) {
                    return Ok(true);
                }
                at += (words.len() - word) as u64 * (64 >> image.order);
            }
        }
        Ok(false)
    }

    /// The first missing thing, as part of a sentence.
    fn find_loss(&mut self, image: &ImageFile, header: &Header) -> Result<Option<String>> {
        let (size, len) = (image.cluster().size(), self.file_len);
        if self.refcount_table.offset.0 + u64::from(self.refcount_table.clusters) * size > len {
            return Ok(Some("the end of its refcount table".to_owned()));
        }
        for index in 0..self.refcount_table_entries(image) {
            if let Some(block) = self.block_of_entry(image, index)?
                && block.0 + size > len
            {
                return Ok(Some(format!("the end of the refcount block at {block}")));
            }
        }
        let (snapshots, _) = read_snapshots(&image.name, &*image.file, header)?;
        let mut walk = LossWalk::new(image, header, len);
        let good = snapshots.iter().filter(|snapshot| snapshot.damage.is_none());
        for root in std::iter::once(active(header)).chain(good.map(|snapshot| inner(snapshot, header))) {
            if root.l1.offset.0 + root.l1.len_bytes() > len {
                return Ok(Some(format!(
                    "the L1 table of {}; delete that with qemu-img snapshot -d",
                    root.name
                )));
            }
            if let Some(at) = walk.lost_data(&root)? {
                return Ok(Some(format!("the data of {} at guest offset {at:#x}", root.name)));
            }
        }
        lost_bitmap(image, header, len)
    }
}

fn active(header: &Header) -> LossRoot {
    LossRoot { name: "the disk".to_owned(), l1: header.l1, size: header.virtual_size, vm_state_end: 0 }
}

fn inner(snapshot: &Snapshot, header: &Header) -> LossRoot {
    let size = snapshot.virtual_size.unwrap_or(header.virtual_size);
    let vm_state = Snapshot::vm_state_offset(size, header.l1_entry_span()).map_or(u64::MAX, |at| at.0);
    LossRoot {
        name: format!("its internal snapshot \"{}\"", String::from_utf8_lossy(&snapshot.name).escape_debug()),
        l1: snapshot.l1,
        size,
        vm_state_end: vm_state.saturating_add(snapshot.vm_state_size),
    }
}

/// A bitmap in force of which a part is missing.
fn lost_bitmap(image: &ImageFile, header: &Header, len: u64) -> Result<Option<String>> {
    let Some((_, bitmaps)) = read_bitmaps(&image.name, &*image.file, header)? else { return Ok(None) };
    for bitmap in bitmaps.iter().filter(|bitmap| !bitmap.in_use) {
        let fact = || format!("the bitmap \"{}\"", String::from_utf8_lossy(&bitmap.name).escape_debug());
        let table_len = u64::from(bitmap.table_entries) * 8;
        if bitmap.table.0.saturating_add(table_len) > len {
            return Ok(Some(fact()));
        }
        let mut table = vec![0; table_len as usize];
        image.file.read_at(bitmap.table.0, &mut table)?;
        for word in table.as_chunks::<8>().0 {
            if let Ok(BitmapCluster::At(bits)) = table_entry(u64::from_be_bytes(*word), image.cluster())
                && bits.0.saturating_add(image.cluster().size()) > len
            {
                return Ok(Some(fact()));
            }
        }
    }
    Ok(None)
}

/// A walk through all tables, without the slices: each table is read only once.
struct LossWalk<'a> {
    image: &'a ImageFile,
    header: &'a Header,
    /// The end of the file with the data.
    len: u64,
    /// L2 tables that were checked.
    seen: HashSet<u64>,
}

impl<'a> LossWalk<'a> {
    fn new(image: &'a ImageFile, header: &'a Header, len: u64) -> Self {
        Self { image, header, len, seen: HashSet::new() }
    }

    /// The first guest offset whose data, or whose table, is missing.
    fn lost_data(&mut self, root: &LossRoot) -> Result<Option<u64>> {
        let (image, size) = (self.image, self.image.cluster().size());
        let mut l1 = vec![0; root.l1.len_bytes() as usize];
        image.file.read_at(root.l1.offset.0, &mut l1)?;
        let file_len = if image.data_file.is_some() { image.file.len()? } else { self.len };
        let mut bytes = vec![0; size as usize];
        for (index, word) in (0..).zip(l1.as_chunks::<8>().0) {
            let table = EntryFormat::raw_offset(u64::from_be_bytes(*word));
            let start = index * image.l1_span();
            if table == 0 || !self.seen.insert(table) {
                continue;
            }
            if table.saturating_add(size) > file_len {
                return Ok(Some(start));
            }
            image.file.read_at(table, &mut bytes)?;
            let entries = bytes.chunks_exact(image.format.l2_entry_len() as usize);
            for (number, entry) in (0..).zip(entries) {
                let words = RawL2Entry::from_bytes(image.format, entry);
                let guest = start + number * size;
                if words != RawL2Entry::default() && self.is_lost(words, guest, root)? {
                    return Ok(Some(guest));
                }
            }
        }
        Ok(None)
    }

    fn is_lost(&self, words: RawL2Entry, guest: u64, root: &LossRoot) -> Result<bool> {
        let (image, size) = (self.image, self.image.cluster().size());
        let end = if guest < root.size { root.size } else { root.vm_state_end };
        let visible = end.saturating_sub(guest).min(size);
        if visible == 0 {
            return Ok(false);
        }
        if EntryFormat::is_compressed(words.entry) {
            let stream = image.format.raw_compressed(words.entry);
            if stream.at.0.saturating_add(stream.len.into()) <= self.len {
                return Ok(false);
            }
            // A count of whole sectors may cross the end of the last write.
            let mut input = vec![0; self.len.saturating_sub(stream.at.0) as usize];
            let have = image.file.read_at(stream.at.0, &mut input)?;
            let mut cluster = vec![0; size as usize];
            return Ok(decompress(self.header.compression, &input[..have], &mut cluster).is_err());
        }
        let used = if image.format.extended {
            let unit = size / u64::from(SUBCLUSTERS);
            let last = u64::from(u32::BITS - (words.bitmap as u32).leading_zeros());
            (last * unit).min(visible)
        } else if words.entry & ZERO != 0 {
            0
        } else {
            visible
        };
        let host = HostOffset(EntryFormat::raw_offset(words.entry));
        let is_named = host.0 != 0 || image.data_file.is_some();
        Ok(is_named && used > 0 && host.0.saturating_add(used) > self.len)
    }
}
