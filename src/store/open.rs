//! Opening a view: its images, QEMU's reader locks on them, and the resulting disk.
//!
//! An image stays open (without costing a descriptor) while its file is unchanged; its serial number then
//! tells all upper layers that their caches are still valid.

use std::collections::HashMap;
use std::num::NonZero;
use std::path::Path;
use std::sync::{Arc, Weak};

use lru::LruCache;
use parking_lot::Mutex;

use crate::chain::View;
use crate::error::{Error, ErrorKind, Result};
use crate::format::{Header, Snapshot};
use crate::image::{Image, Layer, unreadable};
use crate::io::{Expect, LockKind, ObjectId, ReadLock, Storage, StoreFile};
use crate::units::Stability;

use super::Store;
use super::catalog::{BackingLink, Catalog, ImageEntry, ImageIndex};
use super::describe::{DetectedContent, describe};
use super::intents::FoundIntent;
use super::open_view::{NewView, OpenState, OpenView, ViewKey, ViewPart, ViewStack};
use super::options::Format;
use super::resolve::StorePath;

/// Retries of opening an image when a writer of this process closes meanwhile.
const OPEN_TRIES: usize = 16;

/// What becomes of a view of which a layer is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loss {
    /// It is not opened.
    Refuse,
    /// It is opened, and what is lost is an error.
    Salvage,
}

/// Images and views that are open.
pub(super) struct OpenImages {
    images: Mutex<HashMap<ObjectId, OpenImage>>,
    pub(super) views: Mutex<LruCache<ViewKey, Arc<View>>>,
    /// Views that are open now. A leaf.
    shown: Mutex<Vec<Weak<OpenState>>>,
    /// Internal snapshots, by image and id, that must not be opened any more. A leaf.
    leaving: Mutex<Vec<(ObjectId, Vec<u8>)>>,
}

/// Keeps an internal snapshot from being opened, until dropped.
pub struct DeletionGuard<'a> {
    store: &'a Store,
    image: ObjectId,
    id: Vec<u8>,
}

impl Drop for DeletionGuard<'_> {
    fn drop(&mut self) {
        let mut leaving = self.store.opened.leaving.lock();
        if let Some(place) = leaving.iter().position(|(image, id)| (*image, id) == (self.image, &self.id)) {
            leaving.swap_remove(place);
        }
    }
}

/// An image in use or cached for its next use.
#[derive(Clone, Debug)]
pub(super) struct OpenImage {
    pub(super) image: Arc<Image>,
    pub(super) file: Arc<StoreFile>,
    pub(super) data_file: Option<Arc<StoreFile>>,
    /// The paths of the files, for opening them again.
    pub(super) places: (StorePath, Option<StorePath>),
    /// The format it was opened as: an option of the user may have changed it.
    pub(super) format: Format,
}

fn places(entry: &ImageEntry) -> (StorePath, Option<StorePath>) {
    (entry.place.clone(), entry.data_file.as_ref().map(|(place, _)| place.clone()))
}

impl OpenImage {
    /// The image's file and its data file.
    pub(super) fn files(&self) -> impl Iterator<Item = &Arc<StoreFile>> {
        std::iter::once(&self.file).chain(&self.data_file)
    }

    /// Whether this still matches the catalog's entry of the image.
    fn is_current(&self, entry: &ImageEntry) -> bool {
        // A file that this process writes is ahead of every scan, and no other file can have its identity.
        let data = entry.data_file.as_ref().map(|(_, stat)| Some(stat.version));
        let is_unchanged = self.file.expected() == Some(entry.stat.version)
            && self.data_file.as_ref().map(|file| file.expected()) == data;
        self.file.is_written() || (is_unchanged && self.is_at(entry))
    }

    /// Follows it to the name that its file has by now, at `path` beneath the store.
    pub(super) fn renamed(&mut self, path: &Path) {
        self.file.renamed(path);
        self.places.0 = StorePath { root: 0, path: path.to_path_buf() };
    }

    fn is_at(&self, entry: &ImageEntry) -> bool {
        // A renamed directory moves its files without changing them.
        Some(self.format) == entry.format && self.places == places(entry)
    }

    /// Whether the catalog is older: the file is as a writer of this process has left it.
    fn is_ahead(&self, entry: &ImageEntry) -> bool {
        let as_expected = |file: &Arc<StoreFile>| file.is_as_expected().unwrap_or(false);
        self.is_at(entry) && self.files().all(as_expected)
    }

    /// Whether an older catalog entry of the image is still right in the fields that commands use: a guest
    /// that writes it moves its tables and marks its bitmaps, and changes nothing else.
    fn is_as_told(&self, entry: &ImageEntry) -> bool {
        let now = self.image.header();
        match (now, entry.qcow2()) {
            (None, None) => self.image.virtual_size().ok() == entry.virtual_size(),
            (Some(now), Some(told)) => {
                let told = Header {
                    l1: now.l1,
                    refcount_table: now.refcount_table,
                    autoclear: now.autoclear,
                    ..(*told.header).clone()
                };
                told == **now
            }
            (None, Some(_)) | (Some(_), None) => false,
        }
    }
}

impl OpenImages {
    pub(super) fn new(views: NonZero<usize>) -> Self {
        Self {
            images: Mutex::default(),
            views: Mutex::new(LruCache::new(views)),
            shown: Mutex::default(),
            leaving: Mutex::default(),
        }
    }

    /// Caches an image for its next opening.
    pub(super) fn keep(&self, open: &OpenImage) {
        self.images.lock().insert(open.file.id(), open.clone());
    }

    /// The present opening of an image, if it is open.
    pub(super) fn image(&self, id: ObjectId) -> Option<Arc<Image>> {
        self.images.lock().get(&id).map(|open| Arc::clone(&open.image))
    }

    /// Registers an open view.
    pub(super) fn show(&self, state: OpenState) -> Arc<OpenState> {
        let state = Arc::new(state);
        let mut all = self.shown.lock();
        all.retain(|shown| shown.strong_count() > 0);
        all.push(Arc::downgrade(&state));
        state
    }

    /// Refuses an internal snapshot that a command has begun to delete.
    fn check_not_leaving(&self, image: ObjectId, inner: &Snapshot, name: &str) -> Result<()> {
        let is_leaving = |(other, id): &(ObjectId, Vec<u8>)| *other == image && *id == inner.id;
        if !self.leaving.lock().iter().any(is_leaving) {
            return Ok(());
        }
        let fact = "is an internal snapshot that is being deleted";
        let id = String::from_utf8_lossy(&inner.id);
        Err(Error::new(ErrorKind::Busy, format!("{name}@{id} {fact}")))
    }

    /// The names of open views to which a change of `base` would be visible: those without all of `cover`
    /// above it, or that have opened it before its last change.
    pub(super) fn exposed(&self, base: ObjectId, cover: &[ObjectId]) -> Vec<String> {
        let serial = self.images.lock().get(&base).map(|open| open.image.serial());
        let all = self.shown.lock();
        let exposed = all.iter().filter_map(Weak::upgrade).filter(|shown| {
            let Some(depth) = shown.layers.iter().position(|(id, _)| *id == base) else { return false };
            let above = &shown.layers[usize::from(shown.inner.is_some()).min(depth)..depth];
            let is_covered = cover.iter().all(|id| above.iter().any(|(layer, _)| layer == id));
            !is_covered || cover.is_empty() || serial.is_some_and(|serial| serial != shown.layers[depth].1)
        });
        let mut names: Vec<String> = exposed.map(|shown| shown.name.clone()).collect();
        names.sort();
        names.dedup();
        names
    }

    /// Whether an active disk's view (its layers are `layers` by now) has an old opening of any of `changed`
    /// below its top layer.
    pub(super) fn is_behind(
        &self,
        open: &OpenView,
        catalog: &Catalog,
        layers: &[ImageIndex],
        changed: &[ObjectId],
    ) -> bool {
        let images = self.images.lock();
        let is_other =
            |(id, serial): &(ObjectId, u64)| images.get(id).is_some_and(|now| now.image.serial() != *serial);
        let old = open.lower_images();
        let now = layers.get(1..).unwrap_or_default().iter().map(|index| catalog.images[*index].stat.id);
        open.shows(changed) && (old.iter().any(is_other) || !old.iter().map(|(id, _)| *id).eq(now))
    }

    /// Drops the cached opening of an image.
    pub(super) fn forget(&self, id: ObjectId) {
        self.images.lock().remove(&id);
    }

    /// Drops images that have changed or are gone, and the views that show them.
    pub(super) fn retire(&self, catalog: &Catalog) {
        let mut images = self.images.lock();
        if images.is_empty() {
            return;
        }
        let current: HashMap<ObjectId, &ImageEntry> =
            catalog.images.iter().map(|image| (image.stat.id, image)).collect();
        let before = images.len();
        // A scan may be older than a rename by a job. An image in use has the locks of this process, and
        // stays; its next opening checks it against the entry again.
        let is_needed = |id: &ObjectId, open: &OpenImage| {
            let is_good = |entry: &&ImageEntry| open.is_current(entry) || open.is_ahead(entry);
            open.file.is_locked() || current.get(id).is_some_and(is_good)
        };
        images.retain(|id, open| is_needed(id, open));
        if images.len() != before {
            self.views.lock().clear();
        }
    }
}

impl Store {
    /// Opens the view of `layers` (top first) for a client. If a layer is lost and the user wants to salvage
    /// the rest, ranges that are unallocated in the layers above it are errors, and the rest can be read.
    pub fn open_shown(
        &self,
        catalog: &Catalog,
        layers: &[ImageIndex],
        part: ViewPart,
        stability: Stability,
    ) -> Result<OpenView> {
        let is_whole = matches!(part, ViewPart::VmState(_)) || catalog.view_problem(layers).is_none();
        if is_whole {
            return self.open_view(catalog, layers, part, stability);
        }
        if self.options.salvage {
            return self.open_stack(catalog, layers, part, stability, Loss::Salvage);
        }
        self.open_view(catalog, layers, part, stability).map_err(|error| match error.kind() {
            ErrorKind::Broken => {
                let remedy = "or read what its other layers hold with -o salvage";
                Error::new(ErrorKind::Broken, format!("{error}, {remedy}"))
            }
            _ => error,
        })
    }

    /// Opens the view of `layers` (top first). `stability` is that of the top layer.
    /// `Stale` if a file is no longer what the catalog says: look again, then open again.
    pub fn open_view(
        &self,
        catalog: &Catalog,
        layers: &[ImageIndex],
        part: ViewPart,
        stability: Stability,
    ) -> Result<OpenView> {
        self.open_stack(catalog, layers, part, stability, Loss::Refuse)
    }

    fn open_stack(
        &self,
        catalog: &Catalog,
        layers: &[ImageIndex],
        part: ViewPart,
        stability: Stability,
        on_loss: Loss,
    ) -> Result<OpenView> {
        let (top, below) = layers.split_first().expect("a view has a top layer");
        let top = &catalog.images[*top];
        let mut locks = Vec::with_capacity(layers.len());
        let mut forced = None;
        // The active disk may change; an internal snapshot does not, whatever is written around it.
        let promised = match part {
            ViewPart::Active => stability,
            ViewPart::Snapshot(_) | ViewPart::VmState(_) => Stability::Live,
        };
        let open = self.open_image(top, promised, &mut locks, &mut forced)?;
        let (first, inner) = match part {
            ViewPart::Active => (Layer::active(&open.image)?, None),
            ViewPart::Snapshot(index) => {
                let inner = snapshot(top, index)?;
                (Layer::snapshot(&open.image, inner)?, Some(inner))
            }
            ViewPart::VmState(index) => {
                let inner = snapshot(top, index)?;
                (Layer::vm_state(&open.image, inner)?, Some(inner))
            }
        };
        let mut stack = vec![first];
        // VM state was never in a lower layer, and needs none.
        let below = if matches!(part, ViewPart::VmState(_)) { None } else { Some(below) };
        let (below, lost) = match below {
            Some(_) if on_loss == Loss::Salvage => left(catalog, layers),
            below => (below.unwrap_or_default(), None),
        };
        // The error of an encrypted layer says more than "broken".
        for index in below {
            readable(&catalog.images[*index])?;
        }
        if on_loss == Loss::Refuse
            && !matches!(part, ViewPart::VmState(_))
            && let Some(problem) = catalog.view_problem(layers)
        {
            return Err(Error::new(ErrorKind::Broken, problem));
        }
        for index in below {
            let open =
                self.open_image(&catalog.images[*index], Stability::Frozen, &mut locks, &mut forced)?;
            stack.push(Layer::active(&open.image)?);
        }
        if let Some(sentence) = lost {
            stack.push(Layer::active(&Image::lost(&sentence, &self.caches))?);
        }
        let images: Vec<ObjectId> = layers.iter().map(|index| catalog.images[*index].stat.id).collect();
        let name = top.shown();
        let stack = ViewStack { layers: stack, part, stability };
        let inner_id = inner.map(|inner| inner.id.clone());
        let made =
            NewView { stack, top: open, images: images.clone(), inner: inner_id, name: &name, locks, forced };
        let open = self.new_open_view(made);
        if let Some(inner) = inner {
            self.opened.check_not_leaving(images[0], inner, &name)?;
            self.is_still_there(top, inner)?;
        }
        // A job that has hidden the view since then has not seen this opening, or sees it from now on.
        if let Some(found) = self.catalog().files_hidden_by(&images, inner.is_some()) {
            return Err(hidden(&name, found));
        }
        Ok(open)
    }

    /// Why an image could not be opened now, for reading or for writing by a command, because of other
    /// processes' locks. Opens and locks nothing.
    pub(crate) fn locked_out(&self, entry: &ImageEntry, kind: LockKind) -> Option<Error> {
        if self.options.force_share && kind == LockKind::Reader {
            return None;
        }
        // If it is open, its descriptor has this process's own locks.
        let known = self
            .opened
            .images
            .lock()
            .get(&entry.stat.id)
            .map(|open| open.files().cloned().collect::<Vec<_>>());
        let files = known.unwrap_or_else(|| {
            let own = self.file(&entry.place, &entry.stat, Expect::AnyVersion);
            let data =
                entry.data_file.as_ref().map(|(place, stat)| self.file(place, stat, Expect::AnyVersion));
            std::iter::once(own).chain(data).collect()
        });
        files.iter().find_map(|file| file.locked_out(kind, self.options.lock_support()))
    }

    /// Whether the newest catalog still has an internal snapshot: else its clusters may be in use by others.
    fn is_still_there(&self, image: &ImageEntry, snapshot: &Snapshot) -> Result<()> {
        let catalog = self.catalog();
        let now = catalog.images.iter().find(|other| other.stat.id == image.stat.id);
        let listed = now.and_then(ImageEntry::qcow2).map_or(&[][..], |qcow2| &qcow2.snapshots);
        let is_it = |other: &Snapshot| other.id == snapshot.id && other.l1 == snapshot.l1;
        if now.is_none() || listed.iter().any(is_it) {
            return Ok(());
        }
        let name = String::from_utf8_lossy(&snapshot.name).into_owned();
        Err(Error::new(ErrorKind::Stale, format!("{}@{name} was deleted; look it up again", image.shown())))
    }

    /// Keeps an internal snapshot from being opened; `Busy` if it is open.
    pub(crate) fn leave_inner(&self, image: ObjectId, id: &[u8]) -> Result<DeletionGuard<'_>> {
        self.opened.leaving.lock().push((image, id.to_vec()));
        let leaving = DeletionGuard { store: self, image, id: id.to_vec() };
        let shows = |shown: Arc<OpenState>| shown.layers[0].0 == image && shown.inner.as_deref() == Some(id);
        let is_open = self.opened.shown.lock().iter().filter_map(Weak::upgrade).any(shows);
        if is_open {
            Err(Error::new(ErrorKind::Busy, "the internal snapshot is open; close it first"))
        } else {
            Ok(leaving)
        }
    }

    /// Runs `rename`, which gives the image a name at `path`: an opener that finds it there uses the same
    /// open image.
    pub(crate) fn rename_open(
        &self,
        id: ObjectId,
        path: &Path,
        rename: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut images = self.opened.images.lock();
        rename()?;
        if let Some(open) = images.get_mut(&id) {
            open.renamed(path);
        }
        Ok(())
    }

    /// An open image as its file is now, after this process has changed it. Through the same files: they have
    /// the locks.
    pub(super) fn described_anew(&self, open: &OpenImage) -> Result<OpenImage> {
        let OpenImage { image: old, file, data_file, format, .. } = open;
        let storage: Arc<dyn Storage> = Arc::clone(file) as _;
        let image = match format {
            Format::Raw => Image::raw(old.name(), storage, Expect::SameVersion, &self.caches)?,
            Format::Qcow2 => {
                let DetectedContent::Qcow2(qcow2) = describe(&**file, file.len()?)? else {
                    let fact = format!("{} is no qcow2 image any more", old.name());
                    return Err(Error::new(ErrorKind::Corrupt, fact));
                };
                let data = data_file.as_ref().map(|file| Arc::clone(file) as Arc<dyn Storage>);
                Image::qcow2(
                    old.name(),
                    storage,
                    data,
                    Arc::clone(&qcow2.header),
                    Expect::SameVersion,
                    &self.caches,
                )?
            }
        };
        Ok(OpenImage { image, ..open.clone() })
    }

    /// Opens an image and takes the reader's locks on it. `stability` is what they promise.
    /// `forced` becomes what force was needed against.
    pub(super) fn open_image(
        &self,
        entry: &ImageEntry,
        stability: Stability,
        locks: &mut Vec<ReadLock>,
        forced: &mut Option<Error>,
    ) -> Result<OpenImage> {
        readable(entry)?;
        for _ in 0..OPEN_TRIES {
            let mut own = Vec::new();
            if let Some(open) = self.try_open_image(entry, stability, &mut own, forced)? {
                locks.append(&mut own);
                return Ok(open);
            }
        }
        let fact = "is being opened and closed for writing; try again";
        Err(Error::new(ErrorKind::Stale, format!("{} {fact}", entry.shown())))
    }

    /// The same; `None` if the writer of this process has closed in between.
    fn try_open_image(
        &self,
        entry: &ImageEntry,
        stability: Stability,
        locks: &mut Vec<ReadLock>,
        forced: &mut Option<Error>,
    ) -> Result<Option<OpenImage>> {
        let format = entry.format.expect("a readable image has a format");
        let known = self.opened.images.lock().get(&entry.stat.id).cloned();
        let mut is_known = false;
        let open = match known {
            // A second open file beside this one would conflict with this process's own locks.
            Some(open) if open.is_current(entry) || open.is_ahead(entry) => {
                is_known = true;
                open
            }
            _ => self.make(entry, format, Expect::SameVersion)?,
        };
        match lock(&open, stability, locks) {
            Ok(()) => {}
            // Another process writes it, and the user wants to read it by force: nothing read from it may be
            // cached for its next opener.
            Err(error)
                if error.kind() == ErrorKind::Busy && self.options.force_share && !open.file.is_written() =>
            {
                *forced = Some(error);
                return self.make(entry, format, Expect::AnyVersion).map(Some);
            }
            Err(error) => return Err(error),
        }
        // Checked only now: before the lock another process may have written and closed it.
        for file in open.files() {
            if !file.is_as_expected()? {
                return Err(changed(file));
            }
        }
        let mut images = self.opened.images.lock();
        if !is_known {
            images.insert(entry.stat.id, open.clone());
        } else if !images.get(&entry.stat.id).is_some_and(|now| Arc::ptr_eq(&now.image, &open.image)) {
            // Cached tables are from before the writer.
            return Ok(None);
        }
        drop(images);
        // A catalog that is older than this process's last change is good enough, if the change concerns none
        // of the fields used here.
        if !open.file.is_written() && !open.is_current(entry) && !open.is_as_told(entry) {
            return Err(changed(&open.file));
        }
        Ok(Some(open))
    }

    fn make(&self, entry: &ImageEntry, format: Format, expect: Expect) -> Result<OpenImage> {
        let file = self.file(&entry.place, &entry.stat, expect);
        let data_file = entry.data_file.as_ref().map(|(place, stat)| self.file(place, stat, expect));
        let name = entry.shown();
        let storage: Arc<dyn Storage> = Arc::clone(&file) as _;
        let image = match (format, &entry.content) {
            (Format::Raw, _) => Image::raw(&name, storage, expect, &self.caches)?,
            (Format::Qcow2, DetectedContent::Qcow2(qcow2)) => {
                let data = data_file.as_ref().map(|file| Arc::clone(file) as Arc<dyn Storage>);
                Image::qcow2(&name, storage, data, Arc::clone(&qcow2.header), expect, &self.caches)?
            }
            (Format::Qcow2, _) => unreachable!("a readable qcow2 image has a header"),
        };
        Ok(OpenImage { image, file, data_file, places: places(entry), format })
    }
}

/// The readable layers below the top of a chain (top first), and why some are missing.
fn left<'a>(catalog: &Catalog, layers: &'a [ImageIndex]) -> (&'a [ImageIndex], Option<String>) {
    for (depth, index) in layers.iter().enumerate() {
        let image = &catalog.images[*index];
        if depth > 0
            && let Some(problem) = &image.problem
        {
            return (&layers[1..depth], Some(format!("{} {problem}", image.shown())));
        }
        if matches!(image.below, BackingLink::Broken { .. }) {
            return (&layers[1..=depth], catalog.view_problem(&[*index]));
        }
    }
    (&layers[1..], None)
}

/// Refuses an image that is known to be unreadable.
fn readable(entry: &ImageEntry) -> Result<()> {
    let Some(problem) = &entry.problem else { return Ok(()) };
    let unsupported =
        matches!(&entry.content, DetectedContent::Qcow2(qcow2) if unreadable(&qcow2.header).is_some());
    let kind = if unsupported { ErrorKind::Unsupported } else { ErrorKind::Broken };
    Err(Error::new(kind, format!("{} {problem}", entry.shown())))
}

/// Takes the reader's locks on an image and on its data file.
fn lock(open: &OpenImage, stability: Stability, locks: &mut Vec<ReadLock>) -> Result<()> {
    let main = open.file.lock(stability)?;
    if let Some(data_file) = &open.data_file {
        locks.push(data_file.lock(stability)?);
    }
    locks.push(main);
    Ok(())
}

fn snapshot(entry: &ImageEntry, index: usize) -> Result<&crate::format::Snapshot> {
    entry.qcow2().and_then(|qcow2| qcow2.snapshots.get(index)).ok_or_else(|| {
        Error::new(ErrorKind::Stale, format!("{} has lost an internal snapshot", entry.shown()))
    })
}

pub(super) fn changed(file: &StoreFile) -> Error {
    Error::new(
        ErrorKind::Stale,
        format!("{} has changed since it was looked up; open it again", file.path().display()),
    )
}

/// Why a view cannot be opened now.
fn hidden(name: &str, found: &FoundIntent) -> Error {
    let fact = format!(
        "{name} is not shown while this command runs, or until it is resumed: {}",
        found.intent.command
    );
    Error::new(ErrorKind::Busy, fact)
}
