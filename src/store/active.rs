//! Active disks in use: one for each leaf image, shared by all handles of its `active.raw`.
//!
//! Promises: the image is opened for writing, and has QEMU's writer locks, from the first writable handle to
//! the last, and no longer. While it is written, all handles, the read-only ones too, use the one writer, so
//! that they see each other's bytes. Writes are flushed before the locks are released, and a failure is
//! logged as an error.

mod before_images;
mod handle;
mod job;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::{Mutex, RwLock};

use crate::chain::View;
use crate::error::{Error, ErrorKind, Result};
use crate::image::write::{BackingDisk, Writer, WriterOptions, check_writable};
use crate::io::{Expect, ObjectId, ObjectStat, Storage, StoreFile, WriteLock, WriterKind};
use crate::units::Stability;

use super::Store;
use super::catalog::{Catalog, ImageEntry, ImageIndex};
use super::describe::{DetectedContent, describe, header_digest};
use super::open::{OpenImage, changed};
use super::open_view::{OpenView, ViewPart};
use super::options::Format;

use before_images::BeforeImages;

pub use before_images::PointInTimeView;
pub use handle::ActiveHandle;
pub use job::{ActiveJob, FormerTop, Mirror, NewTopFile, PreparedActiveCommit, PreparedOverlay, Quiesced};

/// Maximum and minimum memory for the tables of one writer; in between, a share of `cache=`.
const WRITER_CACHE: (u64, u64) = (1 << 20, 16 << 20);

/// The access that a handle of an active disk has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read.
    Read,
    /// To write; such a handle cannot be mapped.
    Write,
    /// To read and write, perhaps through a mapping.
    ReadWrite,
}

impl Access {
    /// Whether the disk is going to be written.
    pub fn writes(self) -> bool {
        self != Access::Read
    }
}

/// The attributes of an active disk in use.
#[derive(Clone, Copy, Debug)]
pub struct ActiveAttributes {
    /// Its image's file.
    pub stat: ObjectStat,
    /// Blocks of 512 bytes of its external data file.
    pub data_blocks: u64,
    /// Size of the disk.
    pub size: u64,
}

/// The active disks in use.
#[derive(Default)]
pub(super) struct ActiveDisks {
    /// A leaf among locks.
    disks: Mutex<Numbered>,
    /// Images whose writing has failed, until the store is reopened.
    poisoned: Mutex<HashMap<ObjectId, Error>>,
    flush_count: AtomicU64,
}

/// Disks by number, and the number of the disk whose top each image is. A job may change a disk's top image;
/// the disk, and its number, stay.
#[derive(Default)]
struct Numbered {
    last: u64,
    by_image: HashMap<ObjectId, u64>,
    disks: HashMap<u64, Weak<ActiveDisk>>,
}

impl Numbered {
    fn number(&mut self, image: ObjectId) -> u64 {
        if let Some(number) = self.by_image.get(&image) {
            return *number;
        }
        self.last += 1;
        self.by_image.insert(image, self.last);
        self.last
    }
}

/// One active disk in use.
struct ActiveDisk {
    number: u64,
    /// Its top image and the name of that image. A leaf.
    top: Mutex<(ObjectId, String)>,
    /// Held while writing begins or ends, which may take long; readers continue meanwhile. Taken before every
    /// other lock of a store.
    openings: Mutex<Openings>,
    // W3: all handles read and write through this.
    /// Held shared during a read or write, exclusively only to change the state.
    state: RwLock<DiskState>,
    /// Number of handles that may have dirty pages of a mapping.
    mappable: AtomicUsize,
    /// Whether a command keeps it closed: an opener is refused at once, since it would wait for long.
    is_closed: AtomicBool,
    /// Whether the warning that the image is no longer in the store has been logged.
    is_gone: AtomicBool,
    /// Why nothing more is written: after a crash the disk might have another name.
    unsettled: OnceLock<Error>,
    /// Whether a bug interrupted a change: tables in memory may be wrong, and must not be written.
    has_panicked: AtomicBool,
    before_images: BeforeImages,
}

/// Records a panic of the change that it guards.
struct PanicWatch<'a>(&'a AtomicBool);

impl Drop for PanicWatch<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.store(true, Ordering::Release);
        }
    }
}

#[derive(Default)]
struct Openings {
    count: usize,
    writers: usize,
}

enum DiskState {
    /// The disk is closed; its last attributes, until the next scan has seen the file.
    Closed(Option<ActiveAttributes>),
    Reading(OpenView),
    Writing(WritingDisk),
    /// It was written, and cannot be read since.
    Failed(Error),
}

/// In the order in which they are dropped.
struct WritingDisk {
    writer: Arc<Writer>,
    locks: Vec<WriteLock>,
    open: OpenView,
    /// The target of a mirror: all changes are repeated there, while a job merges the disk into a layer
    /// below.
    mirror: Option<Arc<dyn Mirror>>,
}

/// Checks that no file may use an image without being known as its user.
fn is_unclaimed(catalog: &Catalog, id: ObjectId) -> Result<()> {
    let Some(index) = catalog.images.iter().position(|image| image.stat.id == id) else { return Ok(()) };
    match catalog.claims_on(index).next() {
        None => Ok(()),
        Some(claim) => Err(Error::new(ErrorKind::ReadOnly, claim.sentence(&catalog.images[index]))),
    }
}

impl Store {
    /// Opens the active disk of the chain of `layers` (leaf first). `Stale` as for a view.
    pub fn open_active(
        self: &Arc<Self>,
        catalog: &Catalog,
        layers: &[ImageIndex],
        access: Access,
    ) -> Result<ActiveHandle> {
        let leaf = &catalog.images[layers[0]];
        if access.writes() {
            self.may_be_written(catalog, leaf)?;
            self.is_nobodys_base(leaf)?;
            if self.options.salvage
                && let Some(problem) = catalog.view_problem(layers)
            {
                return Err(Error::new(
                    ErrorKind::ReadOnly,
                    format!("{problem}; its remaining layers are read-only"),
                ));
            }
        }
        let disk = self.active.disk(leaf);
        if disk.is_closed.load(Ordering::Acquire) {
            let fact = "is kept closed by a running command; try again";
            return Err(Error::new(ErrorKind::Busy, format!("{} {fact}", leaf.shown())));
        }
        let mut openings = disk.openings.lock();
        let is_written = matches!(&*disk.state.read(), DiskState::Writing(_));
        if is_written {
            // One more for the writer, unless it has failed.
            if let Some(poison) =
                disk.writer().filter(|_| access.writes()).and_then(|writer| disk.poison(&writer))
            {
                return Err(poison);
            }
        } else {
            // The same view as before, unless the files have changed since.
            let open = self.open_shown(catalog, layers, ViewPart::Active, Stability::Live)?;
            let fingerprint = open.fingerprint;
            let old = std::mem::replace(&mut *disk.state.write(), DiskState::Reading(open));
            if matches!(&old, DiskState::Reading(old) if old.fingerprint != fingerprint) {
                disk.before_images.lose();
            }
            drop(old);
            if access.writes() {
                disk.begin_writing(self, leaf)?;
                // A command may have frozen the layer since the catalog was built: it held the lock until a
                // scan had seen that.
                if let Err(error) = self.is_still_leaf(catalog, leaf) {
                    disk.end_writing(self, openings.count > 0);
                    return Err(error);
                }
            }
        }
        openings.count += 1;
        openings.writers += usize::from(access.writes());
        disk.mappable.fetch_add(usize::from(access == Access::ReadWrite), Ordering::AcqRel);
        drop(openings);
        Ok(ActiveHandle::new(self, disk, access))
    }

    fn is_still_leaf(&self, catalog: &Catalog, leaf: &ImageEntry) -> Result<()> {
        let now = self.catalog();
        if now.serial == catalog.serial {
            return Ok(());
        }
        match now.images.iter().find(|image| image.stat.id == leaf.stat.id) {
            Some(image) => self.may_be_written(&now, image),
            None => Ok(()),
        }
    }

    /// Runs `work` while the active disk of that leaf is closed, and keeps it closed. `Busy` if it is open.
    /// `work` must not open or inspect active disks.
    pub(crate) fn while_closed<T>(&self, leaf: &ImageEntry, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let disk = self.active.disk(leaf);
        let openings = disk.openings.lock();
        if openings.count > 0 {
            return Err(Error::new(ErrorKind::Busy, format!("the active disk of {} is open", leaf.shown())));
        }
        disk.is_closed.store(true, Ordering::Release);
        let done = work();
        // The next opening opens another disk, of another number.
        self.active.disks.lock().by_image.remove(&leaf.stat.id);
        disk.is_closed.store(false, Ordering::Release);
        drop(openings);
        done
    }

    /// Refuses writes to the active disk whose top is the image `id`, until the store is reopened: its name
    /// may not be durable.
    pub(crate) fn poison_active(&self, id: ObjectId, name: &str, error: &Error) {
        let fact = "takes no writes until it is mounted again, for its new name may not be durable";
        let poison = Error::new(ErrorKind::Poisoned, format!("{name} {fact}: {error}"));
        self.active.poisoned.lock().insert(id, poison);
    }

    /// Whether the active disk whose top is the image `id` is open.
    pub(crate) fn is_active_open(&self, id: ObjectId) -> bool {
        let number = self.active.disks.lock().by_image.get(&id).copied();
        number.and_then(|number| self.active.find(number)).is_some_and(|disk| disk.openings.lock().count > 0)
    }

    /// Why the disk of an image could not be written, if so. Locks and writes nothing. A disk that this
    /// process writes already has passed the check.
    pub(crate) fn check_writable(&self, catalog: &Catalog, index: ImageIndex) -> Result<()> {
        let image = &catalog.images[index];
        let number = self.active.disks.lock().by_image.get(&image.stat.id).copied();
        let is_written =
            number.and_then(|number| self.active.find(number)).is_some_and(|disk| disk.writer().is_some());
        if image.qcow2().is_none() || is_written {
            return Ok(());
        }
        let file = self.file(&image.place, &image.stat, Expect::AnyVersion);
        let data_file = image
            .data_file
            .as_ref()
            .map(|(place, stat)| self.file(place, stat, Expect::AnyVersion) as Arc<dyn Storage>);
        check_writable(&image.shown(), file, data_file, writer_options(self))
    }

    /// For a store within a store: whether other images of the outer one are, or may be, backed by the image.
    fn is_nobodys_base(&self, leaf: &ImageEntry) -> Result<()> {
        let Some(whole) = self.whole()? else { return Ok(()) };
        is_unclaimed(&whole, leaf.stat.id)?;
        let Some(image) = whole.images.iter().find(|image| image.stat.id == leaf.stat.id) else {
            return Ok(());
        };
        let users: Vec<String> = image.users.iter().map(|user| whole.images[*user].shown()).collect();
        if users.is_empty() {
            return Ok(());
        }
        let fact = "backs other images of its store, which would be invalidated";
        let sentence = format!("{} {fact}: {}; write to one of those", leaf.shown(), users.join(", "));
        Err(Error::new(ErrorKind::ReadOnly, sentence))
    }

    /// Whether the active disk of that number is being written.
    pub fn is_written(&self, number: u64) -> bool {
        self.active.find(number).is_some_and(|disk| disk.writer().is_some())
    }

    /// The number of the active disk whose top is the image `id`.
    pub fn active_number(&self, id: ObjectId) -> u64 {
        self.active.disks.lock().number(id)
    }

    fn may_be_written(&self, catalog: &Catalog, leaf: &ImageEntry) -> Result<()> {
        let refuse = |image: &ImageEntry, fact: &str| {
            Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", image.shown())))
        };
        if let Some(fact) = self.read_only() {
            return refuse(leaf, &format!("is in a store that {fact}"));
        }
        if leaf.is_frozen() {
            return refuse(leaf, "is frozen or read-only; make a clone and write to that");
        }
        if !leaf.users.is_empty() {
            return refuse(leaf, "backs other images, which would be invalidated; write to one of those");
        }
        // S3: a possible user protects it like a user.
        is_unclaimed(catalog, leaf.stat.id)?;
        // A header may name any file as its data file: whatever protects an image from writes protects it
        // here, too.
        let is_data_file =
            |image: &&ImageEntry| leaf.data_file.as_ref().is_some_and(|(_, stat)| stat.id == image.stat.id);
        if let Some(data) = catalog.images.iter().find(is_data_file) {
            if data.stat.id == leaf.stat.id {
                return refuse(
                    leaf,
                    "is its own external data file, so that its tables would be overwritten",
                );
            }
            if data.is_frozen() {
                return refuse(
                    data,
                    "is frozen or read-only, and it is the external data file of what would be written",
                );
            }
            if !data.users.is_empty() {
                return refuse(data, "backs images, which would be invalidated: it is an external data file");
            }
            is_unclaimed(catalog, data.stat.id)?;
        }
        self.active.poisoned.lock().get(&leaf.stat.id).map_or(Ok(()), |poison| Err(poison.clone()))
    }

    /// The current attributes of the top image of the active disk of that number, if it is in use.
    pub fn active_attributes(&self, number: u64) -> Option<ActiveAttributes> {
        self.active.find(number)?.attributes()
    }

    /// Flushes active disks, and logs the ones that fail.
    pub fn flush_writers(&self) {
        for disk in self.active.all() {
            // Nothing may be written once the locks are released: until this is done, the disk's state stays.
            let state = disk.state.read();
            let DiskState::Writing(WritingDisk { writer, .. }) = &*state else { continue };
            if !writer.is_dirty() || disk.poison(writer).is_some() {
                continue;
            }
            let _watch = PanicWatch(&disk.has_panicked);
            self.active.flush_count.fetch_add(1, Ordering::Relaxed);
            if let Err(error) = writer.flush() {
                tracing::error!("{} could not be flushed, and data may be lost: {error}", disk.name());
            }
        }
    }

    /// Makes all images clean for a checker, even if they are still open; locks are released with the
    /// handles.
    pub fn close_writers(&self) {
        for disk in self.active.all() {
            if let DiskState::Writing(WritingDisk { writer, .. }) = &*disk.state.read() {
                disk.close_writer(writer);
            }
        }
    }

    /// Number of disks being written, and number of flushes so far.
    pub fn writer_usage(&self) -> (usize, u64) {
        let writers = self.active.all().iter().filter(|disk| disk.writer().is_some()).count();
        (writers, self.active.flush_count.load(Ordering::Relaxed))
    }
}

impl ActiveDisks {
    /// The disk of that leaf; a new one if it is closed.
    fn disk(&self, leaf: &ImageEntry) -> Arc<ActiveDisk> {
        let mut numbered = self.disks.lock();
        let number = numbered.number(leaf.stat.id);
        if let Some(disk) = numbered.disks.get(&number).and_then(Weak::upgrade) {
            return disk;
        }
        numbered.disks.retain(|_, disk| disk.strong_count() > 0);
        let disk = Arc::new(ActiveDisk {
            number,
            top: Mutex::new((leaf.stat.id, leaf.shown())),
            openings: Mutex::default(),
            state: RwLock::new(DiskState::Closed(None)),
            mappable: AtomicUsize::new(0),
            is_closed: AtomicBool::new(false),
            is_gone: AtomicBool::new(false),
            unsettled: OnceLock::new(),
            has_panicked: AtomicBool::new(false),
            before_images: BeforeImages::default(),
        });
        numbered.disks.insert(number, Arc::downgrade(&disk));
        disk
    }

    fn find(&self, number: u64) -> Option<Arc<ActiveDisk>> {
        self.disks.lock().disks.get(&number)?.upgrade()
    }

    fn all(&self) -> Vec<Arc<ActiveDisk>> {
        self.disks.lock().disks.values().filter_map(Weak::upgrade).collect()
    }

    /// Logs a warning for each image that was removed while being written, and drops the errors of images
    /// that can no longer be opened: another file may get their number.
    pub(super) fn tell_of_gone(&self, catalog: &Catalog) {
        let there: HashSet<ObjectId> = catalog.images.iter().map(|image| image.stat.id).collect();
        self.poisoned.lock().retain(|id, _| there.contains(id));
        let mut numbered = self.disks.lock();
        let Numbered { by_image, disks, .. } = &mut *numbered;
        // A disk in use keeps its number: its image may be newer than this scan.
        by_image.retain(|id, number| {
            there.contains(id) || disks.get(number).is_some_and(|disk| disk.strong_count() > 0)
        });
        drop(numbered);
        for disk in self.all() {
            let is_gone = disk.writer().is_some() && !there.contains(&disk.id());
            if is_gone && !disk.is_gone.swap(true, Ordering::Relaxed) {
                tracing::warn!(
                    "{} was removed or replaced while it is open for writing; what is written goes into the \
                        old file \
                     until it is closed",
                    disk.name()
                );
            }
        }
    }
}

impl ActiveDisk {
    /// Its top image.
    fn id(&self) -> ObjectId {
        self.top.lock().0
    }

    /// The name of its top image.
    fn name(&self) -> String {
        self.top.lock().1.clone()
    }

    fn writer(&self) -> Option<Arc<Writer>> {
        match &*self.state.read() {
            DiskState::Writing(writing) => Some(Arc::clone(&writing.writer)),
            DiskState::Closed(_) | DiskState::Reading(_) | DiskState::Failed(_) => None,
        }
    }

    fn attributes(&self) -> Option<ActiveAttributes> {
        let state = self.state.read();
        let (open, size) = match &*state {
            DiskState::Writing(WritingDisk { writer, open, .. }) => (open, writer.size()),
            DiskState::Reading(open) => (open, open.view.size()),
            DiskState::Closed(last) => return *last,
            DiskState::Failed(_) => return None,
        };
        let data_blocks = match &open.top.data_file {
            Some(file) => file.stat().ok()?.blocks,
            None => 0,
        };
        Some(ActiveAttributes { stat: open.top.file.stat().ok()?, data_blocks, size })
    }

    /// Switches from reading to writing. After a failure it is still reading.
    fn begin_writing(&self, store: &Store, leaf: &ImageEntry) -> Result<()> {
        let (top, view) = match &*self.state.read() {
            DiskState::Reading(OpenView { forced: Some(error), .. }) => return Err(error.clone()),
            DiskState::Reading(open) => (open.top.clone(), Arc::clone(&open.view)),
            DiskState::Closed(_) | DiskState::Writing(_) | DiskState::Failed(_) => {
                unreachable!("it has just been opened for reading")
            }
        };
        // M6: the locks come first; only then is the image opened read-write.
        let lock =
            |file: &Arc<StoreFile>| file.lock_for_writing(WriterKind::Guest, store.options.lock_support());
        let locks = top.files().map(lock).collect::<Result<Vec<_>>>()?;
        unchanged(&top, leaf)?;
        let writer = new_writer(store, &top, &view)?;
        let mut state = self.state.write();
        let DiskState::Reading(open) = std::mem::replace(&mut *state, DiskState::Closed(None)) else {
            unreachable!("only openings change the state, and they wait");
        };
        *state = DiskState::Writing(WritingDisk { writer, locks, open, mirror: None });
        self.before_images.begin();
        Ok(())
    }

    /// Switches from writing to reading, or closes the disk if no handle is left.
    fn end_writing(&self, store: &Store, has_readers: bool) {
        let Some(writer) = self.writer() else { return };
        // W2: flushed while the locks are held.
        self.close_writer(&writer);
        if let Some(poison) = self.poison(&writer) {
            store.active.poisoned.lock().insert(self.id(), poison);
        }
        let size = writer.size();
        let last_look = self.attributes();
        // Readers wait from here on; the next steps are short.
        let mut state = self.state.write();
        let DiskState::Writing(WritingDisk { writer: last, locks, mut open, .. }) =
            std::mem::replace(&mut *state, DiskState::Closed(last_look))
        else {
            unreachable!("only openings change the state, and they wait");
        };
        // The descriptor is closed before the file's attributes are recorded: closing may change them.
        drop((writer, last));
        for file in open.top.files() {
            if let Err(error) = file.accept_changes() {
                tracing::warn!("{}: {error}", self.name());
            }
        }
        // Also without readers: the next opening must use the same descriptor.
        *state = match store.with_top_described_anew(&mut open, &self.name()) {
            Ok(open) if has_readers => DiskState::Reading(open),
            Ok(_) => DiskState::Closed(last_look),
            Err(error) => {
                // Cached tables are from before the writer.
                store.opened.forget(self.id());
                DiskState::Failed(error)
            }
        };
        drop(state);
        drop((open, locks));
        // The next lookup must find the size that the writer has set.
        let catalog = store.catalog();
        let id = self.id();
        let seen = catalog.images.iter().find(|image| image.stat.id == id).and_then(ImageEntry::virtual_size);
        if seen.is_some_and(|seen| seen != size)
            && let Err(error) = store.rescan()
        {
            tracing::warn!("could not scan the store: {error}");
        }
    }

    /// Why nothing more is written, if so.
    fn poison(&self, writer: &Writer) -> Option<Error> {
        let bug = || {
            let fact = "takes no more writes until it is mounted again, for a change was broken off by a bug \
                in chainfs";
            Error::new(
                ErrorKind::Poisoned,
                format!("{} {fact}; what was flushed before is safe", self.name()),
            )
        };
        writer
            .poison()
            .or_else(|| self.unsettled.get().cloned())
            .or_else(|| self.has_panicked.load(Ordering::Acquire).then(bug))
    }

    fn close_writer(&self, writer: &Writer) {
        // A poisoned writer has reported its error already.
        let _watch = PanicWatch(&self.has_panicked);
        if self.poison(writer).is_none()
            && let Err(error) = writer.close()
        {
            tracing::error!("{} could not be closed cleanly, and data may be lost: {error}", self.name());
        }
    }
}

/// Whether an image under the writer's locks still matches the catalog.
pub(super) fn unchanged(top: &OpenImage, leaf: &ImageEntry) -> Result<()> {
    let seen = std::iter::once(&leaf.stat).chain(leaf.data_file.as_ref().map(|(_, stat)| stat));
    for (file, seen) in top.files().zip(seen) {
        // The catalog may be older than the last writer of this process, whose changes are known.
        if file.stat()?.version != seen.version && !file.is_untouched()? {
            return Err(changed(file));
        }
    }
    let (Some(qcow2), Some(known)) = (leaf.qcow2(), top.image.header()) else { return Ok(()) };
    // Timestamps of files are coarse.
    if header_digest(&*top.file, leaf.stat.size)? == qcow2.digest {
        return Ok(());
    }
    match describe(&*top.file, top.file.stat()?.size)? {
        DetectedContent::Qcow2(now) if now.header == *known => Ok(()),
        _ => Err(changed(&top.file)),
    }
}

fn new_writer(store: &Store, top: &OpenImage, view: &View) -> Result<Arc<Writer>> {
    let open = |file: &Arc<StoreFile>| file.open_for_writing();
    let (name, file) = (top.image.name(), open(&top.file)?);
    match top.format {
        Format::Raw => Writer::raw(name, file),
        Format::Qcow2 => {
            let data_file = top.data_file.as_ref().map(open).transpose()?;
            let below = store.view_below(view).map(|view| view as Arc<dyn BackingDisk>);
            Writer::qcow2(name, file, data_file, below, writer_options(store))
        }
    }
}

/// The options of a store's writers.
pub(super) fn writer_options(store: &Store) -> WriterOptions {
    WriterOptions { cache: (store.options.cache / 8).clamp(WRITER_CACHE.0, WRITER_CACHE.1) as usize }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::write::Zeroing;
    use crate::store::testing::OneDisk;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::path::Path;

    #[test]
    fn changes_by_the_own_writer_since_the_scan_are_not_foreign() {
        let OneDisk { directory, store, .. } = &OneDisk::new(1 << 20);
        let catalog = store.catalog();
        let leaf = catalog.chain(Path::new("a")).unwrap();
        for at in 0..8 {
            let disk = store.open_active(&catalog, &[leaf], Access::Write).unwrap();
            disk.write_at(at << 16, b"guest").unwrap();
            drop(disk);
            // With the same catalog, which is older than all of that.
            let job = store.take_active(&catalog, &[leaf]).unwrap();
            job.writer().unwrap().write_at(at << 16, b"a job").unwrap();
            drop(job);
            let mut image = store.take_image(&catalog, leaf).unwrap();
            image.open_writer(None).unwrap().close().unwrap();
            image.finish().unwrap();
            let disk = store.open_active(&catalog, &[leaf], Access::Read).unwrap();
            let mut have = [0; 5];
            disk.read_at(at << 16, &mut have).unwrap();
            assert_eq!(&have, b"a job");
        }
        // Changes by another process are.
        let place = directory.path().join("a.qcow2");
        let image = std::fs::read(&place).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&place, image).unwrap();
        let open = |access| store.open_active(&catalog, &[leaf], access).map(drop);
        for refused in [open(Access::Write), open(Access::Read), store.take_image(&catalog, leaf).map(drop)] {
            assert_eq!(refused.unwrap_err().kind(), ErrorKind::Stale);
        }
    }

    #[test]
    fn a_disk_that_has_grown_since_the_scan_is_rescanned() {
        let OneDisk { store, .. } = &OneDisk::new(1 << 20);
        let catalog = store.catalog();
        let leaf = catalog.chain(Path::new("a")).unwrap();
        let disk = store.open_active(&catalog, &[leaf], Access::Write).unwrap();
        disk.set_size(2 << 20).unwrap();
        drop(disk);
        let open = |catalog: &Catalog| store.open_active(catalog, &[leaf], Access::Read).map(drop);
        assert_eq!(open(&catalog).unwrap_err().kind(), ErrorKind::Stale);
        open(&store.catalog()).unwrap();
    }

    #[test]
    fn a_change_interrupted_by_a_panic_is_never_flushed() {
        let OneDisk { directory, store, .. } = &OneDisk::new(1 << 20);
        let place = directory.path().join("a.qcow2");
        let catalog = store.catalog();
        let leaf = catalog.chain(Path::new("a")).unwrap();
        let open = |access| store.open_active(&catalog, &[leaf], access);
        let (disk, reader) = (open(Access::ReadWrite).unwrap(), open(Access::Read).unwrap());
        disk.write_at(0, b"good").unwrap();
        disk.flush().unwrap();
        let flushed = std::fs::read(&place).unwrap();
        let broken = catch_unwind(AssertUnwindSafe(|| {
            disk.writing(|writing| -> Result<()> {
                writing.zero(0, 1 << 20, Zeroing::Unmap)?;
                panic!("a bug");
            })
        }));
        assert!(broken.is_err());
        store.flush_writers();
        let kinds = [
            disk.write_at(0, b"more").map(drop),
            disk.flush(),
            disk.trouble(),
            open(Access::Write).map(drop),
        ]
        .map(|refused| refused.unwrap_err().kind());
        assert_eq!(kinds, [ErrorKind::Poisoned; 4]);
        drop(disk);
        // The tables of the interrupted change are those that were flushed.
        let now = std::fs::read(&place).unwrap();
        assert!(now[..3 << 16] == flushed[..3 << 16], "header, counts and L1 table");
        assert_eq!(open(Access::Write).map(drop).unwrap_err().kind(), ErrorKind::Poisoned);
        reader.read_at(0, &mut [0; 4]).unwrap();
    }
}
