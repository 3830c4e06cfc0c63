//! Opening a view: its images, QEMU's reader locks on them, and the disk they make.
//!
//! An image stays opened (without costing a descriptor) while its file is unchanged; its serial
//! number then says to everybody above that what they have cached of it still holds.

use std::collections::HashMap;
use std::num::NonZero;
use std::sync::Arc;

use lru::LruCache;
use parking_lot::Mutex;

use crate::chain::View;
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Image, Layer, unreadable};
use crate::io::{FileId, FileStat, ReadLock, Signature, Storage, StoreFile};

use super::Store;
use super::catalog::{Catalog, ImageEntry, ImageIndex};
use super::describe::Content;
use super::options::Format;
use super::resolve::Place;

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
    _locks: Vec<ReadLock>,
}

/// Images and views that are kept open.
pub(super) struct Opened {
    images: Mutex<HashMap<FileId, OpenImage>>,
    views: Mutex<LruCache<Vec<u64>, Arc<View>>>,
}

#[derive(Clone)]
struct OpenImage {
    image: Arc<Image>,
    file: Arc<StoreFile>,
    data_file: Option<Arc<StoreFile>>,
    /// Of the image's file and of its data file.
    signature: Signatures,
    /// Where the files were, for opening them again.
    places: (Place, Option<Place>),
    /// The format it was opened as: a user's header may have changed its mind.
    format: Format,
}

type Signatures = (Signature, Option<Signature>);

fn signatures(entry: &ImageEntry) -> Signatures {
    (entry.stat.signature, entry.data_file.as_ref().map(|(_, stat)| stat.signature))
}

fn places(entry: &ImageEntry) -> (Place, Option<Place>) {
    (entry.place.clone(), entry.data_file.as_ref().map(|(place, _)| place.clone()))
}

impl OpenImage {
    /// Whether this is still what a catalog says of the image.
    fn is_current(&self, entry: &ImageEntry) -> bool {
        // A directory that is renamed takes its files along and leaves no trace on them.
        self.signature == signatures(entry) && Some(self.format) == entry.format && self.places == places(entry)
    }
}

impl Opened {
    pub(super) fn new(views: NonZero<usize>) -> Self {
        Self { images: Mutex::default(), views: Mutex::new(LruCache::new(views)) }
    }

    /// Lets go of images that have changed or gone, and of the views that show them.
    pub(super) fn retire(&self, catalog: &Catalog) {
        let mut images = self.images.lock();
        if images.is_empty() {
            return;
        }
        let current: HashMap<FileId, &ImageEntry> = catalog.images.iter().map(|image| (image.stat.id, image)).collect();
        let before = images.len();
        images.retain(|id, open| current.get(id).is_some_and(|entry| open.is_current(entry)));
        if images.len() != before {
            self.views.lock().clear();
        }
    }
}

impl Store {
    /// Opens the view of `layers` (top first). `live`: the top layer may change while it is read.
    /// `Stale` if a file is no longer what the catalog says: look again, then open again.
    pub fn open_view(&self, catalog: &Catalog, layers: &[ImageIndex], part: ViewPart, live: bool) -> Result<OpenView> {
        let (top, below) = layers.split_first().expect("a view has a top layer");
        let top = &catalog.images[*top];
        let mut locks = Vec::with_capacity(layers.len());
        let open = self.open_image(top, &mut locks)?;
        let (first, key) = match part {
            ViewPart::Active => (Layer::active(&open.image)?, 0),
            ViewPart::Snapshot(index) => (Layer::snapshot(&open.image, snapshot(top, index)?)?, 1 + 2 * index as u64),
            ViewPart::VmState(index) => (Layer::vm_state(&open.image, snapshot(top, index)?)?, 2 + 2 * index as u64),
        };
        let mut key = vec![key, u64::from(live), open.image.serial()];
        let mut stack = vec![first];
        // VM state was never in a lower layer, and needs none.
        let below = if matches!(part, ViewPart::VmState(_)) { None } else { Some(below) };
        // An encrypted layer says more than "broken" does.
        for index in below.unwrap_or_default() {
            readable(&catalog.images[*index])?;
        }
        if let Some(problem) = below.and_then(|_| catalog.view_problem(layers)) {
            return Err(Error::new(ErrorKind::Broken, problem));
        }
        for index in below.unwrap_or_default() {
            let open = self.open_image(&catalog.images[*index], &mut locks)?;
            key.push(open.image.serial());
            stack.push(Layer::active(&open.image)?);
        }
        let frozen_raw = !live && stack.len() == 1 && part == ViewPart::Active && top.format == Some(Format::Raw);
        let view = {
            let mut views = self.opened.views.lock();
            Arc::clone(views.get_or_insert(key.clone(), || View::new(stack, live, &self.flat)))
        };
        Ok(OpenView { view, fingerprint: hash(&key), raw_file: frozen_raw.then_some(open.file), _locks: locks })
    }

    fn open_image(&self, entry: &ImageEntry, locks: &mut Vec<ReadLock>) -> Result<OpenImage> {
        readable(entry)?;
        let format = entry.format.expect("a readable image has a format");
        let known = self.opened.images.lock().get(&entry.stat.id).cloned();
        let open = match known {
            Some(open) if open.is_current(entry) => open,
            _ => self.make(entry, format, true)?,
        };
        match lock(&open, locks) {
            Ok(()) => {}
            // Somebody writes it, and the user wants to see it all the same: nothing that is read
            // of it may be remembered for the next who opens it.
            Err(error) if error.kind() == ErrorKind::Busy && self.options.force_share => {
                return self.make(entry, format, false);
            }
            Err(error) => return Err(error),
        }
        // Still what was described? Asked only now: before the lock somebody may have written and closed.
        check_unchanged(&open.file, &entry.stat)?;
        if let (Some(file), Some((_, stat))) = (&open.data_file, &entry.data_file) {
            check_unchanged(file, stat)?;
        }
        self.opened.images.lock().insert(entry.stat.id, open.clone());
        Ok(open)
    }

    fn make(&self, entry: &ImageEntry, format: Format, fixed: bool) -> Result<OpenImage> {
        let file = self.file(&entry.place, &entry.stat, fixed);
        let data_file = entry.data_file.as_ref().map(|(place, stat)| self.file(place, stat, fixed));
        let name = entry.shown();
        let storage: Arc<dyn Storage> = Arc::clone(&file) as _;
        let image = match (format, &entry.content) {
            (Format::Raw, _) => Image::raw(&name, storage, fixed, &self.caches)?,
            (Format::Qcow2, Content::Qcow2(qcow2)) => {
                let data = data_file.as_ref().map(|file| Arc::clone(file) as Arc<dyn Storage>);
                Image::qcow2(&name, storage, data, Arc::clone(&qcow2.header), fixed, &self.caches)?
            }
            (Format::Qcow2, _) => unreachable!("a readable qcow2 image has a header"),
        };
        Ok(OpenImage { image, file, data_file, signature: signatures(entry), places: places(entry), format })
    }
}

/// Refuses an image that is known to be unreadable.
fn readable(entry: &ImageEntry) -> Result<()> {
    let Some(problem) = &entry.problem else { return Ok(()) };
    let unsupported = matches!(&entry.content, Content::Qcow2(qcow2) if unreadable(&qcow2.header).is_some());
    let kind = if unsupported { ErrorKind::Unsupported } else { ErrorKind::Broken };
    Err(Error::new(kind, format!("{} {problem}", entry.shown())))
}

/// Takes the reader's locks on an image and on its data file.
fn lock(open: &OpenImage, locks: &mut Vec<ReadLock>) -> Result<()> {
    let main = open.file.lock(true)?;
    if let Some(data_file) = &open.data_file {
        locks.push(data_file.lock(true)?);
    }
    locks.push(main);
    Ok(())
}

fn snapshot(entry: &ImageEntry, index: usize) -> Result<&crate::format::Snapshot> {
    entry
        .qcow2()
        .and_then(|qcow2| qcow2.snapshots.get(index))
        .ok_or_else(|| Error::new(ErrorKind::Stale, format!("{} has lost an internal snapshot", entry.shown())))
}

fn check_unchanged(file: &Arc<StoreFile>, seen: &FileStat) -> Result<()> {
    if file.stat()?.signature == seen.signature {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Stale,
        format!("{} has changed since it was looked up; open it again", file.path().display()),
    ))
}

fn hash(key: &[u64]) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}
