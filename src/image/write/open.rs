//! Opening a qcow2 image for writing: the refusals, and the steps before the first write.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, ErrorKind, Result};
use crate::format::feature;
use crate::format::header::{AUTOCLEAR_AT, INCOMPATIBLE_AT};
use crate::format::{EntryFormat, Header, Malformed, Snapshot, Version};
use crate::image::check::{repair_dirty, repair_flags};
use crate::image::header::{self, HeaderChange};
use crate::image::{read_bitmaps, read_header_with, read_snapshots, unreadable};
use crate::io::{Storage, WriteStorage};
use crate::units::{BlockStatus, HostOffset, Run};

use super::cluster_roles::ClusterRoles;
use super::flush::Flushes;
use super::qcow2::Qcow2Writer;
use super::ranges::Ranges;
use super::slices::{Slices, TableClass};
use super::tables::{ImageFile, SnapshotRoot, Tables};
use super::{BackingDisk, WriterOptions, where_possible};

impl Qcow2Writer {
    /// Opens an image. A sound image is not written before the first change.
    pub(super) fn open(
        name: &str,
        file: Arc<dyn WriteStorage>,
        data_file: Option<Arc<dyn WriteStorage>>,
        backing: Option<Arc<dyn BackingDisk>>,
        options: WriterOptions,
    ) -> Result<Self> {
        let mut header = read_header(name, &*file)?;
        refuse(name, &header)?;
        if header.dirty() {
            // The last writer did not close it properly.
            repair_dirty(&*file, name)?;
            header = read_header(name, &*file)?;
        } else if header.version == Version::V2 && header.data_file.is_none() {
            // Version 2 has no dirty bit.
            repair_flags(&*file, name)?;
        }
        let (image, tables) = inspect(name, &header, file, data_file, options)?;
        Ok(Self {
            compression: header.compression,
            raw_data: header.data_file.as_ref().is_some_and(|data_file| data_file.raw),
            size: AtomicU64::new(header.virtual_size),
            backing: RwLock::new(backing),
            ranges: Ranges::default(),
            reuse_gate: RwLock::new(()),
            flushes: Flushes::default(),
            tables: RwLock::new(tables),
            data_dirty: AtomicBool::new(false),
            has_synced: AtomicBool::new(false),
            reserved_end: AtomicU64::new(0),
            prepared: AtomicBool::new(false),
            is_told: AtomicBool::new(false),
            preparing: Mutex::new(()),
            has_lost_writes: AtomicBool::new(false),
            poison: OnceLock::new(),
            decompressed: Self::decompressed_cache(),
            image,
        })
    }

    /// Opens an image in undoable mode.
    pub(super) fn open_undoable(
        name: &str,
        file: Arc<dyn WriteStorage>,
        backing: Option<Arc<dyn BackingDisk>>,
        options: WriterOptions,
    ) -> Result<Self> {
        if read_header(name, &*file)?.data_file.is_some() {
            let fact = "its data is in an external file, where writes cannot be undone";
            return Err(Error::new(ErrorKind::Unsupported, format!("{name}: {fact}")));
        }
        let writer = Self::open(name, file, None, backing, options)?;
        writer.begin_undoable()?;
        Ok(writer)
    }

    /// The steps that have to be on disk before the first change of the disk's content: bitmaps are marked as
    /// stale. Commands that keep every byte use [`Self::prepare`] instead.
    pub(super) fn prepare_content(&self) -> Result<()> {
        self.prepare()?;
        // In undoable mode the image does not change until it is published.
        if self.is_told.load(Ordering::Acquire) || self.is_undoable() {
            return Ok(());
        }
        let _one = self.preparing.lock();
        if self.is_told.load(Ordering::Acquire) {
            return Ok(());
        }
        // M12: marked, and synced, before the first change.
        if self.mark_bitmaps(&read_header(&self.image.name, &*self.image.file)?)? {
            self.image.file.sync().map_err(|error| self.poisoned_by(error))?;
        }
        self.is_told.store(true, Ordering::Release);
        Ok(())
    }

    /// The steps that have to be on disk before the first change.
    pub(super) fn prepare(&self) -> Result<()> {
        self.check_poison()?;
        if self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let _one = self.preparing.lock();
        if self.prepared.load(Ordering::Acquire) {
            return Ok(());
        }
        let header = read_header(&self.image.name, &*self.image.file)?;
        // In undoable mode the image does not change until it is published.
        let is_changed = !self.is_undoable() && self.clear_unknown_features(&header)?;
        self.reserve_tables(&header)?;
        if is_changed {
            self.image.file.sync().map_err(|error| self.poisoned_by(error))?;
        }
        self.prepared.store(true, Ordering::Release);
        Ok(())
    }

    /// Clears the autoclear bits of unknown features, which are not kept valid here; returns whether there
    /// were any.
    pub(super) fn clear_unknown_features(&self, header: &Header) -> Result<bool> {
        let kept = header.autoclear & feature::KNOWN_AUTOCLEAR;
        if header.autoclear != kept {
            self.image.file.write_at(AUTOCLEAR_AT, &kept.to_be_bytes())?;
        }
        Ok(header.autoclear != kept)
    }

    /// Allocates space for the existing tables, which may be in holes of the file: a full file system then
    /// refuses a write, and no flush fails for lack of space.
    fn reserve_tables(&self, header: &Header) -> Result<()> {
        let image = &self.image;
        let size = image.cluster().size();
        let reserve = |at: HostOffset, len: u64| where_possible(image.file.allocate(at.0, len));
        if header.l1.entries > 0 {
            reserve(header.l1.offset, header.l1.len_bytes().next_multiple_of(size))?;
        }
        let mut tables = self.tables.write();
        let table = tables.refcount_table;
        reserve(table.offset, u64::from(table.clusters) * size)?;
        for index in 0..tables.refcount_table_entries(image) {
            if let Some(block) = tables.block_of_entry(image, index)? {
                reserve(block, size)?;
            }
        }
        tables.file_len = tables.file_len.max(image.file.len()?);
        Ok(())
    }

    /// Marks bitmaps that follow every write as stale, as a crash of QEMU would leave them. Disabled bitmaps
    /// stay valid.
    pub(super) fn mark_bitmaps(&self, header: &Header) -> Result<bool> {
        let Some((at, bitmaps)) = read_bitmaps(&self.image.name, &*self.image.file, header)? else {
            return Ok(false);
        };
        let mut is_changed = false;
        for bitmap in bitmaps.iter().filter(|bitmap| bitmap.auto && !bitmap.in_use) {
            self.image.file.write_at(at.0 + bitmap.flags_at as u64, &bitmap.flags_in_use().to_be_bytes())?;
            is_changed = true;
        }
        Ok(is_changed)
    }

    /// Bitmaps have the size of the disk, and chainfs does not resize them.
    pub(super) fn refuse_bitmaps(&self) -> Result<()> {
        let header = read_header(&self.image.name, &*self.image.file)?;
        let Some((_, bitmaps)) = read_bitmaps(&self.image.name, &*self.image.file, &header)? else {
            return Ok(());
        };
        let names: Vec<_> =
            bitmaps.iter().map(|bitmap| String::from_utf8_lossy(&bitmap.name).into_owned()).collect();
        let sentence = format!(
            "{}: it has persistent bitmaps ({}), which cannot change their size with it; remove them with \
                qemu-img bitmap --remove",
            self.image.name,
            names.join(", ")
        );
        Err(Error::new(ErrorKind::Unsupported, sentence))
    }

    /// An error on the way to a write. Damage is recorded in the image, and ends all writing.
    pub(super) fn damaged(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Corrupt || self.check_poison().is_err() {
            return error;
        }
        let error = self.poisoned_by(error);
        self.mark_corrupt();
        error
    }

    fn mark_corrupt(&self) {
        // Version 2 has no corrupt bit.
        if self.image.format.version == Version::V2 {
            return;
        }
        let marked = read_header(&self.image.name, &*self.image.file).and_then(|header| {
            let bits = header.incompatible | feature::CORRUPT;
            self.image.file.write_at(INCOMPATIBLE_AT, &bits.to_be_bytes())?;
            self.image.file.sync()
        });
        if let Err(error) = marked {
            tracing::error!("{}: could not mark it as corrupt: {error}", self.image.name);
        }
    }

    /// Changes the header's backing file or freeze mark, in the turn of a flush: no other thread changes a
    /// field of the header meanwhile.
    pub(super) fn change_header(&self, change: &HeaderChange) -> Result<()> {
        let _turn = self.flushes.turn();
        let _no_first_write = self.preparing.lock();
        self.check_poison()?;
        let steps = header::steps(&self.image.name, &*self.image.file, change)?;
        header::apply(&*self.image.file, &steps).map_err(|error| self.poisoned_by(error))?;
        // Any thread that finds damage records it in the header; the record must not have been overwritten.
        if self.poison.get().is_some_and(|poison| poison.kind() == ErrorKind::Corrupt) {
            self.mark_corrupt();
        }
        self.check_poison()
    }
}

/// Reads the header from the file.
pub(super) fn read_header(name: &str, file: &dyn WriteStorage) -> Result<Header> {
    read_header_with(name, file, Header::parse).map(|(header, _)| header)
}

/// Why an image with damaged refcounts is not written.
pub(in crate::image) fn refcounts_damaged(name: &str, reason: &Malformed) -> Error {
    let fact = format!("its refcounts are damaged: {}", reason.fact());
    let remedy = "it can be read; to write it, unmount it and run chainfs check --repair all";
    Error::new(ErrorKind::Corrupt, format!("{name}: {fact}; {remedy}"))
}

/// Why an image cannot be opened for writing, if so: the refusal of [`super::Writer::qcow2`]. Nothing is
/// written. An image that was not closed properly is repaired on opening, and can be checked only then.
pub fn check_writable(
    name: &str,
    file: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    options: WriterOptions,
) -> Result<()> {
    let file = Arc::new(ReadOnlyFile(file));
    let header = read_header(name, &*file)?;
    refuse(name, &header)?;
    if header.dirty() {
        return Ok(());
    }
    let data_file = data_file.map(|file| Arc::new(ReadOnlyFile(file)) as Arc<dyn WriteStorage>);
    inspect(name, &header, file, data_file, options).map(drop)
}

/// The state of an image before it is written. Fails if it may not be written.
fn inspect(
    name: &str,
    header: &Header,
    file: Arc<dyn WriteStorage>,
    data_file: Option<Arc<dyn WriteStorage>>,
    options: WriterOptions,
) -> Result<(ImageFile, Tables)> {
    if header.data_file.is_some() != data_file.is_some() {
        return Err(Error::new(ErrorKind::Broken, format!("{name}: its external data file is not there")));
    }
    let image = ImageFile {
        name: name.to_owned(),
        data_file,
        format: header.entry_format(),
        order: header.refcount_order,
        has_snapshots: AtomicBool::new(header.snapshots.count > 0),
        file,
    };
    let file_len = image.file.len()?;
    let mut tables = Tables {
        l1: header.l1,
        refcount_table: header.refcount_table,
        slices: Slices::new(options.cache / image.slice_len() as usize),
        roles: ClusterRoles::default(),
        free_hint: 0,
        fresh: file_len.div_ceil(image.cluster().size()),
        file_len,
        pending: Vec::new(),
        dropped: Arc::default(),
        snapshots: Vec::new(),
        has_damaged_snapshots: false,
        shadow: None,
    };
    tables.register_tables(&image, header)?;
    tables.refuse_loss(&image, header)?;
    Ok((image, tables))
}

/// A file for a reader that needs a writable type: all writes are refused.
struct ReadOnlyFile(Arc<dyn Storage>);

impl ReadOnlyFile {
    fn refuse<T>() -> Result<T> {
        Err(Error::new(ErrorKind::ReadOnly, "the file was opened to be checked only"))
    }
}

impl Storage for ReadOnlyFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.0.read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        self.0.len()
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        self.0.extent(at, end)
    }

    fn read_table_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.0.read_table_at(at, buf)
    }
}

impl WriteStorage for ReadOnlyFile {
    fn write_at(&self, _at: u64, _bytes: &[u8]) -> Result<()> {
        Self::refuse()
    }

    fn set_len(&self, _len: u64) -> Result<()> {
        Self::refuse()
    }

    fn punch_hole(&self, _at: u64, _len: u64) -> Result<()> {
        Self::refuse()
    }

    fn write_zeroes(&self, _at: u64, _len: u64) -> Result<()> {
        Self::refuse()
    }

    fn allocate(&self, _at: u64, _len: u64) -> Result<()> {
        Self::refuse()
    }

    fn reserve(&self, _at: u64, _len: u64) -> Result<()> {
        Self::refuse()
    }

    fn sync(&self) -> Result<()> {
        Self::refuse()
    }
}

fn refuse(name: &str, header: &Header) -> Result<()> {
    if let Some(sentence) = unreadable(header) {
        return Err(Error::new(ErrorKind::Unsupported, format!("{name}: {sentence}")));
    }
    if let Some(reason) = &header.refcount_damage {
        return Err(refcounts_damaged(name, reason));
    }
    if header.corrupt() {
        let sentence =
            "it is marked as corrupt and is not written to; read it, or run chainfs check --repair all";
        return Err(Error::new(ErrorKind::Corrupt, format!("{name}: {sentence}")));
    }
    Ok(())
}

impl Tables {
    /// Finds the locations of all tables, and checks that each is counted: an image whose refcounts do not
    /// cover its own tables would overwrite them.
    fn register_tables(&mut self, image: &ImageFile, header: &Header) -> Result<()> {
        let size = image.cluster().size();
        self.register(image, "the header", 0, size)?;
        self.register(image, "the L1 table", header.l1.offset.0, header.l1.len_bytes())?;
        let table_len = u64::from(header.refcount_table.clusters) * size;
        self.register(image, "the refcount table", header.refcount_table.offset.0, table_len)?;
        for index in 0..self.refcount_table_entries(image) {
            if let Some(block) = self.block_of_entry(image, index)? {
                self.register(image, "a refcount block", block.0, size)?;
            }
        }
        if let Some(crypto) = header.crypto_header {
            self.register(image, "the encryption header", crypto.offset.0, crypto.len)?;
        }
        self.register_snapshots(image, header)?;
        if let Some((at, bitmaps)) = read_bitmaps(&image.name, &*image.file, header)? {
            self.register(
                image,
                "the bitmap directory",
                at.0,
                header.bitmaps.map_or(0, |found| found.directory_len),
            )?;
            for bitmap in bitmaps {
                self.register(image, "a bitmap", bitmap.table.0, u64::from(bitmap.table_entries) * 8)?;
            }
        }
        for index in 0..u64::from(self.l1.entries) {
            let at = self.l1.offset.0 + index * 8;
            let word = self.word(image, at, TableClass::L1)?;
            let entry = image.format.l1(word).map_err(|reason| image.corrupt(reason.fact()))?;
            let Some(table) = entry.l2 else { continue };
            self.register(image, "an L2 table", table.0, size)?;
            // Written in place, a shared table would change an internal snapshot.
            if entry.copied && self.count(image, image.cluster().index(table.0))? != 1 {
                self.set_word(image, at, TableClass::L1, EntryFormat::shared(word))?;
            }
        }
        Ok(())
    }

    fn register_snapshots(&mut self, image: &ImageFile, header: &Header) -> Result<()> {
        let (snapshots, table_len) = read_snapshots(&image.name, &*image.file, header)?;
        self.register(image, "the snapshot table", header.snapshots.offset.0, table_len)?;
        // Clusters that a damaged entry reaches are counted, so they are never allocated; their location is
        // unknown.
        let is_good = |snapshot: &&Snapshot| snapshot.damage.is_none();
        for snapshot in snapshots.iter().filter(is_good) {
            self.register(
                image,
                "the L1 table of an internal snapshot",
                snapshot.l1.offset.0,
                snapshot.l1.len_bytes(),
            )?;
        }
        self.snapshots = snapshots.iter().filter(is_good).map(SnapshotRoot::of).collect();
        self.has_damaged_snapshots = self.snapshots.len() < snapshots.len();
        Ok(())
    }

    fn register(&mut self, image: &ImageFile, what: &str, at: u64, len: u64) -> Result<()> {
        if len == 0 {
            return Ok(());
        }
        let (first, last) = (image.cluster().index(at), image.cluster().index(at + len - 1));
        if !self.roles.add(first, last - first + 1) {
            return Err(image.corrupt(format_args!("{what} at {at:#x} lies on another table")));
        }
        for cluster in first..=last {
            if self.count(image, cluster)? == 0 {
                return Err(image.corrupt(format_args!("{what} at {at:#x} has a refcount of 0")));
            }
        }
        Ok(())
    }
}
