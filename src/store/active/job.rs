//! An active disk that a job changes while guests read and write it.
//!
//! Promises: the layers below the disk, and even its top image, are replaced in one moment, between two
//! requests; open handles do not notice. While it is [`Quiesced`] no request runs, so that lasts no longer
//! than a flush and a rename. The job itself guarantees that the bytes stay the same.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::RwLockWriteGuard;

use crate::chain::View;
use crate::error::{Error, ErrorKind, Result};
use crate::image::write::{BackingDisk, Writer, Zeroing};
use crate::image::{Image, Layer};
use crate::io::{Expect, ObjectId, ReadLock, Storage, WriteLock, WriterKind};
use crate::units::Stability;

use super::super::catalog::{Catalog, ImageIndex};
use super::super::describe::{DetectedContent, describe};
use super::super::file_names::shown as shown_path;
use super::super::open::OpenImage;
use super::super::open_view::{NewView, OpenView, ViewPart, ViewStack};
use super::super::options::Format;
use super::super::resolve::StorePath;
use super::super::{JobImage, Store};
use super::{Access, ActiveDisk, ActiveHandle, DiskState, WritingDisk, writer_options};

/// Repeats every change of an active disk elsewhere.
pub trait Mirror: Send + Sync {
    /// Writes `bytes` at `at`.
    fn write_at(&self, disk: &Writer, at: u64, bytes: &[u8]) -> Result<()>;
    /// Makes a range read as zeroes.
    fn zero(&self, disk: &Writer, at: u64, len: u64, zeroing: Zeroing) -> Result<()>;
    /// Extends the disk.
    fn grow(&self, disk: &Writer, size: u64) -> Result<()>;
}

impl WritingDisk {
    /// Writes `bytes` at `at`, to the disk and to the mirror.
    pub(super) fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        match &self.mirror {
            None => self.writer.write_at(at, bytes),
            Some(mirror) => mirror.write_at(&self.writer, at, bytes),
        }
    }

    /// Makes a range read as zeroes.
    pub(super) fn zero(&self, at: u64, len: u64, zeroing: Zeroing) -> Result<()> {
        match &self.mirror {
            None => self.writer.zero(at, len, zeroing),
            Some(mirror) => mirror.zero(&self.writer, at, len, zeroing),
        }
    }

    /// Extends the disk.
    pub(super) fn grow(&self, size: u64) -> Result<()> {
        match &self.mirror {
            None => self.writer.grow(size),
            Some(mirror) => mirror.grow(&self.writer, size),
        }
    }
}

/// An active disk that a job holds open for writing.
#[derive(Debug)]
pub struct ActiveJob {
    handle: ActiveHandle,
    has_mirror: AtomicBool,
}

impl Drop for ActiveJob {
    fn drop(&mut self) {
        // However the job ends, its target receives no more changes.
        if self.has_mirror.load(Ordering::Acquire) {
            self.set_mirror(None);
        }
    }
}

/// A disk without reads or writes until this is dropped.
pub struct Quiesced<'a> {
    store: &'a Arc<Store>,
    disk: &'a ActiveDisk,
    state: RwLockWriteGuard<'a, DiskState>,
}

/// A file that is to become the top of an active disk.
#[derive(Debug)]
pub struct NewTopFile {
    writer: Arc<Writer>,
    lock: WriteLock,
    read_lock: ReadLock,
    image: OpenImage,
}

/// The former top of an active disk, which is frozen from now on. Its files are still locked.
pub struct FormerTop {
    store: Arc<Store>,
    /// Its writer; guests no longer write to it.
    pub writer: Arc<Writer>,
    locks: Vec<WriteLock>,
    image: OpenImage,
}

/// The resources that a disk needs for a new top, prepared before any rename.
pub struct PreparedOverlay {
    overlay: NewTopFile,
    fallen: OpenImage,
    open: OpenView,
}

/// The resources for an active commit, prepared before any rename.
pub struct PreparedActiveCommit {
    locks: Vec<WriteLock>,
    writer: Arc<Writer>,
    open: OpenView,
}

impl Store {
    /// Opens the active disk of the chain of `layers` (leaf first) for a job. `Stale` as for a view.
    pub fn take_active(self: &Arc<Self>, catalog: &Catalog, layers: &[ImageIndex]) -> Result<ActiveJob> {
        let handle = self.open_active(catalog, layers, Access::Write)?;
        Ok(ActiveJob { handle, has_mirror: AtomicBool::new(false) })
    }

    /// Opens a new qcow2 image at `path` relative to the store, which is to become the top of a disk under
    /// the name `name`.
    pub fn open_new_top(&self, path: &Path, name: &str) -> Result<NewTopFile> {
        let place = StorePath { root: 0, path: path.to_path_buf() };
        let stat = self.roots[0].stat(path)?;
        let file = self.file(&place, &stat, Expect::SameVersion);
        let lock = file.lock_for_writing(WriterKind::Guest, self.options.lock_support())?;
        let read_lock = file.lock(Stability::Live)?;
        let DetectedContent::Qcow2(qcow2) = describe(&*file, file.len()?)? else {
            return Err(Error::new(ErrorKind::Corrupt, format!("{} is no qcow2 image", path.display())));
        };
        let storage: Arc<dyn Storage> = Arc::clone(&file) as _;
        let image =
            Image::qcow2(name, storage, None, Arc::clone(&qcow2.header), Expect::SameVersion, &self.caches)?;
        let writer = Writer::qcow2(name, file.open_for_writing()?, None, None, writer_options(self))?;
        let image = OpenImage { image, file, data_file: None, places: (place, None), format: Format::Qcow2 };
        Ok(NewTopFile { writer, lock, read_lock, image })
    }
}

impl NewTopFile {
    /// Its writer.
    pub fn writer(&self) -> &Arc<Writer> {
        &self.writer
    }
}

impl ActiveJob {
    /// The disk's current writer.
    pub fn writer(&self) -> Result<Arc<Writer>> {
        let writer = self.disk().writer();
        let writer = writer
            .ok_or_else(|| Error::new(ErrorKind::Stale, format!("{} is closed", self.disk().name())))?;
        match self.disk().poison(&writer) {
            Some(poison) => Err(poison),
            None => Ok(writer),
        }
    }

    /// The disk's top image.
    pub fn top(&self) -> ObjectId {
        self.disk().id()
    }

    /// The view of the layers below its top image.
    pub fn below(&self) -> Option<Arc<View>> {
        match &*self.disk().state.read() {
            DiskState::Writing(writing) => self.store().view_below(&writing.open.view),
            DiskState::Closed(_) | DiskState::Reading(_) | DiskState::Failed(_) => None,
        }
    }

    fn disk(&self) -> &Arc<ActiveDisk> {
        &self.handle.disk
    }

    fn store(&self) -> &Arc<Store> {
        &self.handle.store
    }

    /// Waits until no request runs, and lets none begin.
    pub fn seal(&self) -> Quiesced<'_> {
        Quiesced { store: self.store(), disk: self.disk(), state: self.disk().state.write() }
    }

    /// Reopens its top image, because its snapshots have changed: tables cached by snapshot index are stale.
    pub fn describe_anew(&self) -> Result<()> {
        let (store, disk) = (self.store(), self.disk());
        let mut state = disk.state.write();
        let DiskState::Writing(writing) = &mut *state else {
            unreachable!("a job holds the disk open for writing")
        };
        let new = store.with_top_described_anew(&mut writing.open, &disk.name())?;
        let old = std::mem::replace(&mut writing.open, new);
        drop(state);
        drop(old);
        Ok(())
    }

    /// Only its top image is the disk's from now on: a scan has seen the changes of the former ones.
    pub fn settle(&self) {
        let (store, disk) = (self.store(), self.disk());
        let top = disk.id();
        store.active.disks.lock().by_image.retain(|id, number| *number != disk.number || *id == top);
    }

    /// Sends all changes from now on through `mirror`; `None` ends that.
    pub fn set_mirror(&self, mirror: Option<Arc<dyn Mirror>>) {
        self.has_mirror.store(mirror.is_some(), Ordering::Release);
        self.seal().set_mirror(mirror);
    }

    /// Replaces the layers below the disk (top first) by others with the same bytes.
    pub fn stand_on(&self, catalog: &Catalog, below: &[ImageIndex]) -> Result<()> {
        self.disk().stand_on(self.store(), catalog, below)
    }
}

impl Store {
    /// Replaces the layers below active disks in use, where any of `changed` is among them: the bytes are the
    /// same, but the open images were opened before a job changed the files.
    pub(in crate::store) fn refresh_active(&self, catalog: &Catalog, changed: &[ObjectId]) {
        for disk in self.active.all() {
            // From here on writing neither begins nor ends.
            let openings = disk.openings.lock();
            if openings.count > 0
                && let Err(error) = disk.look_again(self, catalog, changed)
            {
                tracing::info!("{} keeps its layers as they were opened: {error}", disk.name());
            }
        }
    }
}

impl ActiveDisk {
    fn look_again(&self, store: &Store, catalog: &Catalog, changed: &[ObjectId]) -> Result<()> {
        let Some(leaf) = catalog.images.iter().position(|image| image.stat.id == self.id()) else {
            return Ok(());
        };
        let layers = catalog.layers(leaf);
        let is_written = match &*self.state.read() {
            DiskState::Writing(WritingDisk { open, .. })
                if store.opened.is_behind(open, catalog, &layers, changed) =>
            {
                true
            }
            DiskState::Reading(open) if store.opened.is_behind(open, catalog, &layers, changed) => false,
            DiskState::Closed(_) | DiskState::Reading(_) | DiskState::Writing(_) | DiskState::Failed(_) => {
                return Ok(());
            }
        };
        if is_written {
            return self.stand_on(store, catalog, &layers[1..]);
        }
        let open = store.open_shown(catalog, &layers, ViewPart::Active, Stability::Live)?;
        let old = std::mem::replace(&mut *self.state.write(), DiskState::Reading(open));
        // Not under the gate: it may close many files.
        drop(old);
        Ok(())
    }

    fn stand_on(&self, store: &Store, catalog: &Catalog, below: &[ImageIndex]) -> Result<()> {
        let mut locks = Vec::new();
        let mut stack = Vec::new();
        let mut files = vec![self.id()];
        for index in below {
            let mut forced = None;
            let open =
                store.open_image(&catalog.images[*index], Stability::Frozen, &mut locks, &mut forced)?;
            stack.push(Layer::active(&open.image)?);
            files.push(open.file.id());
        }
        let mut state = self.state.write();
        let DiskState::Writing(writing) = &mut *state else {
            unreachable!("who calls this keeps the disk from ending to be written")
        };
        let top = writing.open.top.clone();
        for file in top.files() {
            locks.push(file.lock(Stability::Live)?);
        }
        let stack = ViewStack::live(Layer::active(&top.image)?, stack);
        let name = self.name();
        let new = NewView { stack, top, images: files, inner: None, name: &name, locks, forced: None };
        let new = store.new_open_view(new);
        let lower = store.view_below(&new.view).map(|view| view as Arc<dyn BackingDisk>);
        writing.writer.set_backing(lower);
        let old = std::mem::replace(&mut writing.open, new);
        drop(state);
        // Not under the gate: it may close many files.
        drop(old);
        Ok(())
    }
}

impl Quiesced<'_> {
    fn writing(&mut self) -> &mut WritingDisk {
        match &mut *self.state {
            DiskState::Writing(writing) => writing,
            DiskState::Closed(_) | DiskState::Reading(_) | DiskState::Failed(_) => {
                unreachable!("a job holds the disk open for writing")
            }
        }
    }

    /// Sends all changes from now on through `mirror`; `None` ends that.
    pub fn set_mirror(&mut self, mirror: Option<Arc<dyn Mirror>>) {
        self.writing().mirror = mirror;
    }

    /// Makes all writes durable, and the image clean for a checker.
    pub fn close(&mut self) -> Result<()> {
        let disk = self.disk;
        let writer = &self.writing().writer;
        disk.poison(writer).map_or(Ok(()), Err)?;
        writer.close()
    }

    /// Prepares the switch to `overlay`; nothing has happened yet. The writes have to be durable.
    pub fn prepare(&mut self, mut overlay: NewTopFile) -> Result<PreparedOverlay> {
        let (store, disk) = (self.store, self.disk);
        let writing = self.writing();
        // The disk may have grown since the overlay was made.
        if overlay.writer.size() < writing.writer.size() {
            overlay.writer.grow(writing.writer.size())?;
            overlay.writer.close()?;
            overlay.image = store.described_anew(&overlay.image)?;
        }
        let fallen = store.described_anew(&writing.open.top)?;
        let top = overlay.image.clone();
        let below = std::iter::once(Layer::active(&fallen.image)?);
        let below = below.chain(writing.open.lower_layers().iter().cloned());
        let stack = ViewStack::live(Layer::active(&top.image)?, below);
        let images = std::iter::once(top.file.id()).chain(writing.open.images()).collect();
        let name = disk.name();
        let (locks, forced) = (Vec::new(), None);
        let mut open =
            store.new_open_view(NewView { stack, top, images, inner: None, name: &name, locks, forced });
        // A guest's file becomes a frozen one; a job may still write its header.
        for lock in &writing.locks {
            lock.become_for(WriterKind::Job)?;
        }
        let locks = fallen.files().map(|file| file.lock(Stability::Frozen)).collect::<Result<Vec<_>>>();
        open.locks = match locks {
            Ok(locks) => locks,
            Err(error) => {
                self.be_a_guests();
                return Err(error);
            }
        };
        Ok(PreparedOverlay { overlay, fallen, open })
    }

    /// Cancels a prepared switch.
    pub fn give_up(&mut self, prepared: PreparedOverlay) {
        drop(prepared);
        self.be_a_guests();
    }

    fn be_a_guests(&mut self) {
        for lock in &self.writing().locks {
            lock.become_for(WriterKind::Guest).expect("nobody else was promised that it stays as it is");
        }
    }

    /// Carries out a prepared switch: the overlay's file has the name `name` by now, the former top `frozen`.
    /// Unquiesces the disk.
    pub fn stand(mut self, prepared: PreparedOverlay, name: &Path, frozen: &Path) -> FormerTop {
        let (store, disk) = (self.store, self.disk);
        let PreparedOverlay { overlay, mut fallen, mut open } = prepared;
        let NewTopFile { writer, lock, read_lock, .. } = overlay;
        fallen.renamed(frozen);
        open.top.renamed(name);
        let image = open.top.clone();
        writer.set_backing(store.view_below(&open.view).map(|view| view as Arc<dyn BackingDisk>));
        let writing = self.writing();
        // The locks of the layers below stay as they are.
        open.locks.push(read_lock);
        let old = std::mem::replace(writing, WritingDisk { writer, locks: vec![lock], open, mirror: None });
        let WritingDisk { writer, locks, open: OpenView { locks: mut lower, .. }, .. } = old;
        writing.open.locks.append(&mut lower);
        store.opened.keep(&fallen);
        store.opened.keep(&image);
        disk.take_top(store, image.file.id(), name);
        drop(self);
        FormerTop { store: Arc::clone(store), writer, locks, image: fallen }
    }

    /// Prepares an active commit into `base`, which holds all the disk's bytes, durably; nothing has happened
    /// yet.
    pub fn prepare_fall(&mut self, base: JobImage) -> Result<PreparedActiveCommit> {
        let store = self.store;
        let (image, locks, writer) = base.into_parts()?;
        let writing = self.writing();
        let depth = writing.open.images().position(|id| id == image.file.id());
        let depth = depth.expect("the base is one of the disk's layers");
        let below = writing.open.view.layers()[depth + 1..].iter().cloned();
        let stack = ViewStack::live(Layer::active(&image.image)?, below);
        let images = writing.open.images().skip(depth).collect();
        let name = image.file.path();
        let name = name.to_string_lossy();
        let (kept, forced) = (Vec::new(), None);
        let open = store.new_open_view(NewView {
            stack,
            top: image,
            images,
            inner: None,
            name: &name,
            locks: kept,
            forced,
        });
        // Its reader, the disk, had it frozen: no longer.
        let is_base = |lock: &ReadLock| open.top.files().any(|file| file.id() == lock.file().id());
        writing.open.locks.iter_mut().filter(|lock| is_base(lock)).for_each(ReadLock::thaw);
        locks.iter().try_for_each(|lock| lock.become_for(WriterKind::Guest))?;
        Ok(PreparedActiveCommit { locks, writer, open })
    }

    /// Carries out a prepared active commit; the base's file has the name `name` by now. Unquiesces the disk.
    /// `settled`: whether the name is durable; if not, nothing more is written, since a crash might bring
    /// back the disk's former name.
    pub fn fall(mut self, prepared: PreparedActiveCommit, name: &Path, settled: &Result<()>) {
        let (store, disk) = (self.store, self.disk);
        let PreparedActiveCommit { locks, writer, mut open } = prepared;
        open.top.renamed(name);
        let image = open.top.clone();
        let writing = self.writing();
        let mut old = std::mem::replace(writing, WritingDisk { writer, locks, open, mirror: None });
        // The locks of the remaining layers stay as they are.
        let stays = |lock: &ReadLock| writing.open.images().any(|id| id == lock.file().id());
        let (kept, gone): (Vec<_>, Vec<_>) = std::mem::take(&mut old.open.locks).into_iter().partition(stays);
        writing.open.locks = kept;
        store.opened.keep(&image);
        disk.take_top(store, image.file.id(), name);
        if let Err(error) = settled {
            let fact = "takes no more writes until it is mounted again, for its new name may not be durable";
            let poison = Error::new(ErrorKind::Poisoned, format!("{} {fact}: {error}", shown_path(name)));
            let _ = disk.unsettled.set(poison);
        }
        drop(self);
        // Not under the gate: it may close many files.
        drop((old, gone));
    }
}

impl ActiveDisk {
    /// Makes another image the disk's top from now on, which is at `path`.
    fn take_top(&self, store: &Store, image: ObjectId, path: &Path) {
        store.follow_single(path);
        // Both are the disk's until a scan has seen the change of the old one.
        store.active.disks.lock().by_image.insert(image, self.number);
        *self.top.lock() = (image, shown_path(path));
    }
}

impl FormerTop {
    /// Its format.
    pub fn format(&self) -> Format {
        self.image.format
    }

    /// All writes of the job to it are done: it is an ordinary frozen layer.
    pub fn finish(self) -> Result<()> {
        let Self { store, writer, locks, image } = self;
        let closed = writer.close();
        drop(writer);
        for file in image.files() {
            file.accept_changes()?;
        }
        // The open image is still right: only its header has changed since.
        store.opened.keep(&image);
        drop(locks);
        closed
    }
}
