//! Opens the images that a command names, each in a store that is large enough.
//!
//! An image is opened alone, as in all other commands, unless that is not enough: a volume group may need
//! disks of other chains, and a comparison of two images skips their shared layers only if one store has
//! both.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::args::LookArgs;
use super::super::config;
use super::super::mount_options::{FormatRule, ImageFormat, MountOptions};
use super::super::store_options::{store_options, variable};
use super::super::warn;
use super::operands::{DiskName, GuestOperand};
use super::store_disk::{self, OpenStore, StoreDisk};
use crate::browse::worker::WorkerProgram;
use crate::browse::{Browser, Keyring};
use crate::error::{Error, ErrorKind, Result};
use crate::io::is_address;
use crate::report::safe::terminal;
use crate::store::{MARKER, Store, StoreOptions, shown};

/// The remedy for a journal that is not replayed.
const REPLAY_REMEDY: &str = "let the guest replay it, or run e2fsck on a clone";

/// The stores that a command has opened.
pub(super) struct OpenStores {
    options: StoreOptions,
    keyring: Arc<Keyring>,
    /// The store given with `--store`.
    store: Option<PathBuf>,
    open: Vec<Arc<OpenStore>>,
}

impl OpenStores {
    pub(super) fn new(args: &LookArgs, formats: &[(&Path, Option<ImageFormat>)]) -> Result<Self> {
        let mut options = config::load(MountOptions::parse(&args.image.options, false)?, variable)?;
        options.force_share |= args.image.force_share;
        for (path, format) in formats {
            if let (Some(format), Some(name)) = (format, path.file_name().and_then(|name| name.to_str())) {
                let glob =
                    glob::Pattern::new(&glob::Pattern::escape(name)).expect("an escaped pattern is one");
                options.formats.insert(0, FormatRule { glob, format: *format });
            }
        }
        let keyring = Keyring::open(options.keys.as_deref(), args.key_file.as_deref())?;
        // A single command: the store is not watched.
        let options = StoreOptions { notify: false, ..store_options(&options) };
        Ok(Self { options, keyring, store: args.store.clone(), open: Vec::new() })
    }

    /// Warns of each volume that was read without its journal, and so without its last writes; whether there
    /// are any.
    pub(super) fn warn_stale(&self) -> bool {
        let mut is_stale = false;
        for opened in &self.open {
            for (view, volume, sentence) in opened.browser.stale() {
                is_stale = true;
                let (store, view) =
                    (shown(&opened.path), shown(Path::new(std::ffi::OsStr::from_bytes(&view.name))));
                warn(&terminal(&format!("{store}: {volume} of {view}: {sentence}; {REPLAY_REMEDY}")));
            }
        }
        is_stale
    }

    /// The store at a path, opened once.
    pub(super) fn open(&mut self, path: &Path) -> Result<Arc<OpenStore>> {
        if let Some(known) = self.open.iter().find(|known| known.path == path) {
            return Ok(Arc::clone(known));
        }
        let store = Store::open(path, self.options.clone())?;
        let browser = Browser::with_keys(&store, WorkerProgram::this(true), Arc::clone(&self.keyring));
        let opened = Arc::new(OpenStore { path: path.to_path_buf(), store, browser });
        self.open.push(Arc::clone(&opened));
        Ok(opened)
    }

    /// The disk of an operand, in a store that has all layers and disks it needs.
    pub(super) fn disk(&mut self, place: &GuestOperand) -> Result<StoreDisk> {
        let DiskName::Image { path, .. } = &place.disk else { return self.mounted(&place.disk) };
        let image = canonical(path)?;
        if let Some(store) = self.store.clone() {
            return self.in_store(&store, &image, &place.disk);
        }
        let disk = self.alone(&image, &place.disk)?;
        // If the disk cannot be parsed, the caller's next access reports the error.
        let lacks =
            place.has_inner && disk.contents().is_ok_and(|inside| !inside.layout().missing.is_empty());
        match around(&image).filter(|_| lacks) {
            Some(directory) => Ok(self.within(&directory, &image, &place.disk)?.unwrap_or(disk)),
            None => Ok(disk),
        }
    }

    /// Two disks, in one store if a store has both.
    pub(super) fn pair(&mut self, a: &GuestOperand, b: &GuestOperand) -> Result<(StoreDisk, StoreDisk)> {
        let (DiskName::Image { path: path_a, .. }, DiskName::Image { path: path_b, .. }) = (&a.disk, &b.disk)
        else {
            return Ok((self.disk(a)?, self.disk(b)?));
        };
        let (image_a, image_b) = (canonical(path_a)?, canonical(path_b)?);
        if let Some(store) = self.store.clone() {
            let both = (self.in_store(&store, &image_a, &a.disk)?, self.in_store(&store, &image_b, &b.disk)?);
            return Ok(store_disk::in_one_chain(both));
        }
        // One may be a layer of the other; else a common directory may have both.
        let mut candidates = vec![image_a.clone(), image_b.clone()];
        let is_near =
            |above: &Path, other: &Path| other.parent().is_some_and(|parent| parent.starts_with(above));
        for (image, other) in [(&image_a, &image_b), (&image_b, &image_a)] {
            candidates.extend(around(image).filter(|above| is_near(above, other)));
        }
        for candidate in &candidates {
            // A candidate that cannot be opened is skipped; the fallback below reports real errors.
            let Ok(Some(found_a)) = self.within(candidate, &image_a, &a.disk) else { continue };
            let Ok(Some(found_b)) = self.within(candidate, &image_b, &b.disk) else { continue };
            let lacks =
                |disk: &StoreDisk| disk.contents().is_ok_and(|inside| !inside.layout().missing.is_empty());
            if candidate.is_file() && (a.has_inner || b.has_inner) && (lacks(&found_a) || lacks(&found_b)) {
                continue;
            }
            return Ok(store_disk::in_one_chain((found_a, found_b)));
        }
        Ok((self.disk(a)?, self.disk(b)?))
    }

    /// The disk, in the store that contains it.
    pub(super) fn in_its_store(&mut self, place: &GuestOperand) -> Result<StoreDisk> {
        let DiskName::Image { path, .. } = &place.disk else { return self.mounted(&place.disk) };
        let image = canonical(path)?;
        if let Some(store) = self.store.clone() {
            return self.in_store(&store, &image, &place.disk);
        }
        let found = match around(&image) {
            Some(directory) => self.within(&directory, &image, &place.disk)?,
            None => None,
        };
        match found {
            Some(disk) => Ok(disk),
            None => self.alone(&image, &place.disk),
        }
    }

    fn alone(&mut self, image: &Path, name: &DiskName) -> Result<StoreDisk> {
        let opened = self.open(image)?;
        store_disk::find(&opened, image, name)?.ok_or_else(|| not_in(image, image))
    }

    fn in_store(&mut self, store: &Path, image: &Path, name: &DiskName) -> Result<StoreDisk> {
        let opened = self.open(store)?;
        store_disk::find(&opened, image, name)?.ok_or_else(|| not_in(image, store))
    }

    /// The disk in the store at `path`; `None` if it has no such image.
    fn within(&mut self, path: &Path, image: &Path, name: &DiskName) -> Result<Option<StoreDisk>> {
        let opened = self.open(path)?;
        store_disk::find(&opened, image, name)
    }

    fn mounted(&mut self, name: &DiskName) -> Result<StoreDisk> {
        let DiskName::Mounted { store, chain, view, address } = name else {
            unreachable!("called only for paths in mounts")
        };
        let opened = self.open(store)?;
        store_disk::in_chain(&opened, chain, view.as_deref(), address.as_deref())
    }
}

/// Resolves symbolic links: the user named them, so they may lead anywhere.
fn canonical(path: &Path) -> Result<PathBuf> {
    if is_address(path) {
        return Ok(path.to_path_buf());
    }
    path.canonicalize().map_err(|error| Error::io(format!("opening {}", shown(path)), error))
}

/// The store that contains an image: the nearest marked directory above, or else the image's directory.
fn around(image: &Path) -> Option<PathBuf> {
    let marked = image.ancestors().skip(1).find(|above| above.join(MARKER).is_dir());
    marked.or(image.parent()).map(Path::to_path_buf)
}

fn not_in(image: &Path, store: &Path) -> Error {
    let fact = format!(
        "{} is not an image of the store {}; chainfs tree lists the images",
        shown(image),
        shown(store)
    );
    Error::new(ErrorKind::NotFound, fact)
}
