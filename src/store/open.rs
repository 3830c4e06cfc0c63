//! Opening a view: its images, QEMU's reader locks on them, and the disk they make.
//!
//! An image stays opened (without costing a descriptor) while its file is unchanged; its serial
//! number then says to everybody above that what they have cached of it still holds.

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
use crate::io::{ObjectId, ReadLock, Storage, StoreFile};

use super::Store;
use super::catalog::{BackingLink, Catalog, ImageEntry, ImageIndex};
use super::describe::{DetectedContent, describe};
use super::intents::FoundIntent;
use super::options::Format;
use super::resolve::StorePath;

/// How often an image is opened that our own writers leave meanwhile.
const OPEN_TRIES: usize = 16;

/// Which disk of a view's top layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ViewPart {
    /// Its active state.
    Active,
    /// An internal snapshot, by its place in the table.
    Snapshot(usize),
    /// The VM state of an internal snapshot.
    VmState(usize),
}

/// A view in use. While it lives, its layers carry QEMU's reader locks.
#[derive(Debug)]
pub struct OpenView {
    /// The disk.
    pub view: Arc<View>,
    /// Equal for two openings only if no file below has changed in between.
    pub fingerprint: u64,
    /// The file that may stand for the whole disk: that of a view which is one frozen raw image.
    pub raw_file: Option<Arc<StoreFile>>,
    /// Its top layer.
    pub(super) top: OpenImage,
    /// What of it another process writes, if that is read by force.
    pub(super) forced: Option<Error>,
    pub(super) locks: Vec<ReadLock>,
    /// Says to jobs what is open, for as long as this lives.
    pub(super) shown: Arc<OpenState>,
}

impl OpenView {
    /// Its images, top first.
    pub(super) fn images(&self) -> impl Iterator<Item = ObjectId> {
        self.shown.layers.iter().map(|(id, _)| *id)
    }

    /// Whether any of these images is among its layers.
    pub(super) fn shows(&self, images: &[ObjectId]) -> bool {
        self.shown.layers.iter().any(|(id, _)| images.contains(id))
    }
}

/// What an open view shows bytes of.
#[derive(Debug)]
pub(super) struct OpenState {
    /// Its images, top first, and the serial number of each one's opening.
    layers: Vec<(ObjectId, u64)>,
    /// The id of the internal snapshot by which the first is shown, whose tables hide other parts of those
    /// below.
    inner: Option<Vec<u8>>,
    /// The layer and, if so, that it is the active one, for sentences.
    name: String,
}

/// Images and views that are kept open.
pub(super) struct OpenImages {
    images: Mutex<HashMap<ObjectId, OpenImage>>,
    views: Mutex<LruCache<Vec<u64>, Arc<View>>>,
    /// Views that are open now. A leaf.
    shown: Mutex<Vec<Weak<OpenState>>>,
    /// Internal snapshots, by image and id, that nobody opens any more. A leaf.
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

/// An image in use or kept for its next.
#[derive(Clone, Debug)]
pub(super) struct OpenImage {
    pub(super) image: Arc<Image>,
    pub(super) file: Arc<StoreFile>,
    pub(super) data_file: Option<Arc<StoreFile>>,
    /// Where the files were, for opening them again.
    pub(super) places: (StorePath, Option<StorePath>),
    /// The format it was opened as: a user's header may have changed its mind.
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

    /// Whether this is still what a catalog says of the image.
    fn is_current(&self, entry: &ImageEntry) -> bool {
        // What we write ourselves is ahead of every scan, and no other file can have its identity.
        let data = entry.data_file.as_ref().map(|(_, stat)| Some(stat.version));
        let is_unchanged = self.file.expected() == Some(entry.stat.version)
            && self.data_file.as_ref().map(|file| file.expected()) == data;
        self.file.is_written() || (is_unchanged && self.is_at(entry))
    }

    fn is_at(&self, entry: &ImageEntry) -> bool {
        // A directory that is renamed takes its files along and leaves no trace on them.
        Some(self.format) == entry.format && self.places == places(entry)
    }

    /// Whether it is the catalog that is behind: the file is as our own writer has left it.
    fn is_ahead(&self, entry: &ImageEntry) -> bool {
        let as_expected = |file: &Arc<StoreFile>| file.is_as_expected().unwrap_or(false);
        self.is_at(entry) && self.files().all(as_expected)
    }

    /// Whether an older look at the image still tells of it what commands go by: a guest that writes it moves
    /// its tables and marks its bitmaps, and changes nothing else.
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

    /// Keeps an image for its next opening.
    pub(super) fn keep(&self, open: &OpenImage) {
        self.images.lock().insert(open.file.id(), open.clone());
    }

    /// Notes what is shown.
    pub(super) fn show(
        &self,
        view: &View,
        images: &[ObjectId],
        inner: Option<Vec<u8>>,
        name: &str,
    ) -> Arc<OpenState> {
        let serials = view.layers().iter().map(|layer| layer.image().serial());
        let layers = images.iter().copied().zip(serials).collect();
        let shown = Arc::new(OpenState { layers, inner, name: name.to_owned() });
        let mut all = self.shown.lock();
        all.retain(|shown| shown.strong_count() > 0);
        all.push(Arc::downgrade(&shown));
        shown
    }

    /// The names of open views to which a change of `base` would show: those that do not have all of `cover`
    /// above it, or that have opened it before it was last changed.
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

    /// Whether an active disk's view (its layers are `layers` by now) has any of `changed` below its top
    /// layer as that was before.
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
        let old = open.shown.layers.get(1..).unwrap_or_default();
        let now = layers.get(1..).unwrap_or_default().iter().map(|index| catalog.images[*index].stat.id);
        open.shows(changed) && (old.iter().any(is_other) || !old.iter().map(|(id, _)| *id).eq(now))
    }

    /// Lets go of an image of which nothing that is kept may be used any more.
    pub(super) fn forget(&self, id: ObjectId) {
        self.images.lock().remove(&id);
    }

    /// Lets go of images that have changed or gone, and of the views that show them.
    pub(super) fn retire(&self, catalog: &Catalog) {
        let mut images = self.images.lock();
        if images.is_empty() {
            return;
        }
        let current: HashMap<ObjectId, &ImageEntry> =
            catalog.images.iter().map(|image| (image.stat.id, image)).collect();
        let before = images.len();
        // A scan may be older than a name that a job has given since. What is in use carries the locks of
        // this process, and stays; whether it is what an entry says is asked again when it is opened.
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
    /// Opens the view of `layers` (top first) for somebody who looks at it. Where a layer is lost and the
    /// user wants to salvage what is left, what the layers above it are silent on is an error, and the rest
    /// can be read.
    pub fn open_shown(
        &self,
        catalog: &Catalog,
        layers: &[ImageIndex],
        part: ViewPart,
        live: bool,
    ) -> Result<OpenView> {
        let is_whole = matches!(part, ViewPart::VmState(_)) || catalog.view_problem(layers).is_none();
        if is_whole {
            return self.open_view(catalog, layers, part, live);
        }
        if self.options.salvage {
            return self.open_stack(catalog, layers, part, live, true);
        }
        self.open_view(catalog, layers, part, live).map_err(|error| match error.kind() {
            ErrorKind::Broken => {
                let remedy = "or read what its other layers hold with -o salvage";
                Error::new(ErrorKind::Broken, format!("{error}, {remedy}"))
            }
            _ => error,
        })
    }

    /// Opens the view of `layers` (top first). `live`: the top layer may change while it is read.
    /// `Stale` if a file is no longer what the catalog says: look again, then open again.
    pub fn open_view(
        &self,
        catalog: &Catalog,
        layers: &[ImageIndex],
        part: ViewPart,
        live: bool,
    ) -> Result<OpenView> {
        self.open_stack(catalog, layers, part, live, false)
    }

    fn open_stack(
        &self,
        catalog: &Catalog,
        layers: &[ImageIndex],
        part: ViewPart,
        live: bool,
        is_salvage: bool,
    ) -> Result<OpenView> {
        let (top, below) = layers.split_first().expect("a view has a top layer");
        let top = &catalog.images[*top];
        let mut locks = Vec::with_capacity(layers.len());
        let mut forced = None;
        // The active disk may change, and an internal snapshot does not whatever is written around it.
        let frozen = !live && part == ViewPart::Active;
        let open = self.open_image(top, frozen, &mut locks, &mut forced)?;
        let (first, key) = match part {
            ViewPart::Active => (Layer::active(&open.image)?, 0),
            ViewPart::Snapshot(index) => {
                (Layer::snapshot(&open.image, snapshot(top, index)?)?, 1 + 2 * index as u64)
            }
            ViewPart::VmState(index) => {
                (Layer::vm_state(&open.image, snapshot(top, index)?)?, 2 + 2 * index as u64)
            }
        };
        let mut key = vec![key, u64::from(live), open.image.serial()];
        let mut stack = vec![first];
        // VM state was never in a lower layer, and needs none.
        let below = if matches!(part, ViewPart::VmState(_)) { None } else { Some(below) };
        let (below, lost) = match below {
            Some(_) if is_salvage => left(catalog, layers),
            below => (below.unwrap_or_default(), None),
        };
        // An encrypted layer says more than "broken" does.
        for index in below {
            readable(&catalog.images[*index])?;
        }
        if !is_salvage
            && !matches!(part, ViewPart::VmState(_))
            && let Some(problem) = catalog.view_problem(layers)
        {
            return Err(Error::new(ErrorKind::Broken, problem));
        }
        for index in below {
            let open = self.open_image(&catalog.images[*index], true, &mut locks, &mut forced)?;
            key.push(open.image.serial());
            stack.push(Layer::active(&open.image)?);
        }
        if let Some(sentence) = lost {
            let lost = Image::lost(&sentence, &self.caches);
            key.push(lost.serial());
            stack.push(Layer::active(&lost)?);
        }
        let frozen_raw =
            !live && stack.len() == 1 && part == ViewPart::Active && top.format == Some(Format::Raw);
        // What is read by force is never the same as for the next who opens it: kept, it would only keep its
        // files open.
        let view = if forced.is_some() {
            View::new(stack, live, &self.flat)
        } else {
            self.assemble(&key, stack, live)
        };
        let images: Vec<ObjectId> = layers.iter().map(|index| catalog.images[*index].stat.id).collect();
        let inner = match part {
            ViewPart::Active => None,
            ViewPart::Snapshot(index) | ViewPart::VmState(index) => Some(snapshot(top, index)?.id.clone()),
        };
        let is_inner = inner.is_some();
        let shown = self.opened.show(&view, &images, inner, &top.shown());
        if let Some(id) = &shown.inner
            && self.opened.leaving.lock().iter().any(|(image, leaving)| (*image, leaving) == (images[0], id))
        {
            let fact = "is an internal snapshot that is being deleted";
            return Err(Error::new(
                ErrorKind::Busy,
                format!("{}@{} {fact}", top.shown(), String::from_utf8_lossy(id)),
            ));
        }
        if let ViewPart::Snapshot(index) | ViewPart::VmState(index) = part {
            self.is_still_there(top, snapshot(top, index)?)?;
        }
        // A job that has hidden the view since then has not seen this opening, or sees it from now on.
        if let Some(found) = self.catalog().files_hidden_by(&images, is_inner) {
            return Err(hidden(&top.shown(), found));
        }
        Ok(OpenView {
            view,
            fingerprint: hash(&key),
            raw_file: frozen_raw.then(|| Arc::clone(&open.file)),
            top: open,
            forced,
            locks,
            shown,
        })
    }

    /// Why an image could not be opened now, to be read or to be written by a command, because of what other
    /// processes have locked. Nothing is opened for that and nothing locked.
    pub(crate) fn locked_out(&self, entry: &ImageEntry, for_writing: bool) -> Option<Error> {
        if self.options.force_share && !for_writing {
            return None;
        }
        // Where it is open, its descriptor carries this process' own locks.
        let known = self
            .opened
            .images
            .lock()
            .get(&entry.stat.id)
            .map(|open| open.files().cloned().collect::<Vec<_>>());
        let files = known.unwrap_or_else(|| {
            let own = self.file(&entry.place, &entry.stat, false);
            let data = entry.data_file.as_ref().map(|(place, stat)| self.file(place, stat, false));
            std::iter::once(own).chain(data).collect()
        });
        files.iter().find_map(|file| file.locked_out(for_writing, self.options.no_lock))
    }

    /// Whether the newest catalog still knows an internal snapshot: else what it held may be somebody else's
    /// by now.
    fn is_still_there(&self, image: &ImageEntry, snapshot: &Snapshot) -> Result<()> {
        let catalog = self.catalog();
        let now = catalog.images.iter().find(|other| other.stat.id == image.stat.id);
        let listed = now.and_then(ImageEntry::qcow2).map_or(&[][..], |qcow2| &qcow2.snapshots);
        let is_it = |other: &Snapshot| other.id == snapshot.id && other.l1 == snapshot.l1;
        if now.is_none() || listed.iter().any(is_it) {
            return Ok(());
        }
        let name = String::from_utf8_lossy(&snapshot.name).into_owned();
        Err(Error::new(ErrorKind::Stale, format!("{}@{name} has been deleted; look again", image.shown())))
    }

    /// Keeps everybody from opening an internal snapshot; `Busy` if somebody has it open.
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

    /// The view of that stack; `key` says which state of the top image it is, and the serial of each.
    pub(super) fn assemble(&self, key: &[u64], stack: Vec<Layer>, live: bool) -> Arc<View> {
        let mut views = self.opened.views.lock();
        Arc::clone(views.get_or_insert(key.to_vec(), || View::new(stack, live, &self.flat)))
    }

    /// What a view shows through its top layer: the view of the layers below. `None` if there are none.
    pub(super) fn view_below(&self, view: &View) -> Option<Arc<View>> {
        let below = &view.layers()[1..];
        let key: Vec<u64> =
            [0, 0].into_iter().chain(below.iter().map(|layer| layer.image().serial())).collect();
        (!below.is_empty()).then(|| self.assemble(&key, below.to_vec(), false))
    }

    /// The same opening of an active disk after our own writer has left: its top layer is
    /// described anew, everything else, the locks as well, stays.
    pub(super) fn look_again(&self, open: OpenView) -> Result<OpenView> {
        let top = self.described_anew(&open.top)?;
        let below = &open.view.layers()[1..];
        let serials = below.iter().map(|layer| layer.image().serial());
        let key: Vec<u64> = [0, 1, top.image.serial()].into_iter().chain(serials).collect();
        let stack = std::iter::once(Layer::active(&top.image)?).chain(below.iter().cloned()).collect();
        let view = self.assemble(&key, stack, true);
        self.opened.keep(&top);
        let images: Vec<ObjectId> = open.shown.layers.iter().map(|(id, _)| *id).collect();
        let shown = self.opened.show(&view, &images, None, &open.shown.name);
        Ok(OpenView { view, fingerprint: hash(&key), top, shown, ..open })
    }

    /// Does `rename`, which gives the image a name at `path`: whoever opens it by that finds it as we have it
    /// open.
    pub(crate) fn rename_open(
        &self,
        id: ObjectId,
        path: &Path,
        rename: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut images = self.opened.images.lock();
        rename()?;
        if let Some(open) = images.get_mut(&id) {
            open.file.renamed(path);
            open.places.0 = StorePath { root: 0, path: path.to_path_buf() };
        }
        Ok(())
    }

    /// An open image as its file describes it now, after we have changed it ourselves. Through the same
    /// files: they carry the locks.
    pub(super) fn described_anew(&self, open: &OpenImage) -> Result<OpenImage> {
        let OpenImage { image: old, file, data_file, format, .. } = open;
        let storage: Arc<dyn Storage> = Arc::clone(file) as _;
        let image = match format {
            Format::Raw => Image::raw(old.name(), storage, true, &self.caches)?,
            Format::Qcow2 => {
                let DetectedContent::Qcow2(qcow2) = describe(&**file, file.len()?)? else {
                    let fact = format!("{} is no qcow2 image any more", old.name());
                    return Err(Error::new(ErrorKind::Corrupt, fact));
                };
                let data = data_file.as_ref().map(|file| Arc::clone(file) as Arc<dyn Storage>);
                Image::qcow2(old.name(), storage, data, Arc::clone(&qcow2.header), true, &self.caches)?
            }
        };
        Ok(OpenImage { image, ..open.clone() })
    }

    /// Opens an image and takes the reader's locks on it. `frozen`: it is promised not to change.
    /// `forced` becomes what force was needed against.
    pub(super) fn open_image(
        &self,
        entry: &ImageEntry,
        frozen: bool,
        locks: &mut Vec<ReadLock>,
        forced: &mut Option<Error>,
    ) -> Result<OpenImage> {
        readable(entry)?;
        for _ in 0..OPEN_TRIES {
            let mut own = Vec::new();
            if let Some(open) = self.try_open_image(entry, frozen, &mut own, forced)? {
                locks.append(&mut own);
                return Ok(open);
            }
        }
        let fact = "is opened and closed for writing all the while; try again";
        Err(Error::new(ErrorKind::Stale, format!("{} {fact}", entry.shown())))
    }

    /// The same; `None` if our own writer has left in between.
    fn try_open_image(
        &self,
        entry: &ImageEntry,
        frozen: bool,
        locks: &mut Vec<ReadLock>,
        forced: &mut Option<Error>,
    ) -> Result<Option<OpenImage>> {
        let format = entry.format.expect("a readable image has a format");
        let known = self.opened.images.lock().get(&entry.stat.id).cloned();
        let mut is_known = false;
        let open = match known {
            // One more opening beside ours would be another process to our own locks.
            Some(open) if open.is_current(entry) || open.is_ahead(entry) => {
                is_known = true;
                open
            }
            _ => self.make(entry, format, true)?,
        };
        match lock(&open, frozen, locks) {
            Ok(()) => {}
            // Somebody writes it, and the user wants to see it all the same: nothing that is read
            // of it may be remembered for the next who opens it.
            Err(error)
                if error.kind() == ErrorKind::Busy && self.options.force_share && !open.file.is_written() =>
            {
                *forced = Some(error);
                return self.make(entry, format, false).map(Some);
            }
            Err(error) => return Err(error),
        }
        // Still what was described? Asked only now: before the lock somebody may have written and closed.
        for file in open.files() {
            if !file.is_as_expected()? {
                return Err(changed(file));
            }
        }
        let mut images = self.opened.images.lock();
        if !is_known {
            images.insert(entry.stat.id, open.clone());
        } else if !images.get(&entry.stat.id).is_some_and(|now| Arc::ptr_eq(&now.image, &open.image)) {
            // What is kept of the tables is from before the writer.
            return Ok(None);
        }
        drop(images);
        // A catalog that is older than our own last change will do, if that has changed nothing it is asked
        // about.
        if !open.file.is_written() && !open.is_current(entry) && !open.is_as_told(entry) {
            return Err(changed(&open.file));
        }
        Ok(Some(open))
    }

    fn make(&self, entry: &ImageEntry, format: Format, fixed: bool) -> Result<OpenImage> {
        let file = self.file(&entry.place, &entry.stat, fixed);
        let data_file = entry.data_file.as_ref().map(|(place, stat)| self.file(place, stat, fixed));
        let name = entry.shown();
        let storage: Arc<dyn Storage> = Arc::clone(&file) as _;
        let image = match (format, &entry.content) {
            (Format::Raw, _) => Image::raw(&name, storage, fixed, &self.caches)?,
            (Format::Qcow2, DetectedContent::Qcow2(qcow2)) => {
                let data = data_file.as_ref().map(|file| Arc::clone(file) as Arc<dyn Storage>);
                Image::qcow2(&name, storage, data, Arc::clone(&qcow2.header), fixed, &self.caches)?
            }
            (Format::Qcow2, _) => unreachable!("a readable qcow2 image has a header"),
        };
        Ok(OpenImage { image, file, data_file, places: places(entry), format })
    }
}

/// Of a chain (top first), what lies below its top and can be read, and why that is not all.
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
fn lock(open: &OpenImage, frozen: bool, locks: &mut Vec<ReadLock>) -> Result<()> {
    let main = open.file.lock(frozen)?;
    if let Some(data_file) = &open.data_file {
        locks.push(data_file.lock(frozen)?);
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
        "{name} is not shown while this goes on, or until it is taken up again: {}",
        found.intent.command
    );
    Error::new(ErrorKind::Busy, fact)
}

pub(super) fn hash(key: &[u64]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}
