//! New qcow2 images, which are hidden until they have their names.
//!
//! Promises: a draft lies in the directory of its final name, under a name that no scan takes for an image.
//! It is durable, and has owner, mode and attributes of the file it is made after, before any process opens
//! it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::image::create::{CreateOptions, NewBacking, initial_image};
use crate::io::{Existing, directory_of};
use crate::store::{FileRef, Format, ImageEntry, ImageIndex, Store, StorePath, shown};

use super::refusals;
use super::scanned_store::{ScannedStore, beside};

/// An image that is not visible yet.
pub(super) struct DraftImage {
    /// Relative to the store.
    pub(super) path: PathBuf,
    /// Relative to the guarded directory.
    pub(super) named: FileRef,
}

/// The name of a draft beside `name`, of the command or intent called `of`.
pub(super) fn draft_name(name: &Path, of: &str, number: usize) -> PathBuf {
    beside(name, crate::store::draft_name(of, number).as_bytes())
}

impl DraftImage {
    /// Makes an image at `path` relative to the store, after the file at `like`.
    pub(super) fn make(
        scan: &ScannedStore,
        path: PathBuf,
        like: &Path,
        options: &CreateOptions,
    ) -> Result<Self> {
        let names = scan.store.names();
        let bytes = initial_image(options)?;
        let file = names.create(&path, Some(like))?;
        let made = file
            .write_at(0, &bytes)
            .and_then(|()| file.sync())
            .and_then(|()| names.sync(&directory_of(&path)));
        drop(file);
        let made = made.and_then(|()| {
            let seen = FileRef::witness(&*scan.store.roots()[0], &path, Format::Qcow2, false)?;
            Ok(FileRef { path: scan.guarded(&path), ..seen })
        });
        match made {
            Ok(known) => Ok(Self { path, named: known }),
            Err(error) => {
                let _ = names.unlink(&path);
                Err(error)
            }
        }
    }

    /// Removes it.
    pub(super) fn remove(&self, store: &Arc<Store>) {
        // By identity: a file that another process has put there stays. What remains is swept at the next
        // opening of the store.
        if self.is_there(store) {
            let _ = store.names().unlink(&self.path);
        }
    }

    /// Renames the complete image to its final name, durably.
    pub(super) fn give_name(&self, scan: &ScannedStore, name: &Path) -> Result<()> {
        let store = &scan.store;
        let names = store.guard_names();
        let name = scan.guarded(name);
        if !self.is_there(store) {
            let fact = "has been replaced by another process; give the command again";
            return Err(Error::new(ErrorKind::Stale, format!("{} {fact}", shown(&self.path))));
        }
        names.rename(&self.named.path, &name, Existing::Refuse).inspect_err(|_| self.remove(store))?;
        names.sync(&directory_of(&name))
    }

    /// Whether the file of its name is still this draft.
    pub(super) fn is_there(&self, store: &Arc<Store>) -> bool {
        self.named.is_at(&*store.roots()[0], &self.path)
    }
}

/// Options of an empty image like `model` on `backing`.
pub(super) fn options(model: &ImageEntry, size: u64, backing: Option<NewBacking>) -> CreateOptions {
    let header = model.qcow2().map(|qcow2| &qcow2.header);
    CreateOptions {
        size: Some(size),
        backing,
        cluster_bits: header.map_or(16, |header| header.cluster.bits()),
        extended_l2: header.is_some_and(|header| header.extended_l2()),
        frozen: None,
    }
}

/// How a new image at `path` relative to the store names the image `to`.
pub(super) fn backing(scan: &ScannedStore, path: &Path, to: ImageIndex) -> NewBacking {
    scan.backing(&StorePath { root: 0, path: path.to_path_buf() }, to, false)
}

/// Refuses a name that would make a reader probe another format, or skip the file.
pub(super) fn refuse_misread(
    scan: &ScannedStore,
    path: &Path,
    format: Format,
    is_named: bool,
    refusals: &mut Vec<Error>,
) {
    if !scan.store.options().reads_as(path, format, is_named) {
        let fact = format!("would not be read as {} by that name; choose another", format.name());
        refusals.push(Error::new(ErrorKind::Usage, format!("{} {fact}", shown(path))));
    }
}

/// Refuses a name for a new file: one that exists, is misread, or has another image's stem, since both would
/// then be shown by their full names. `but`: the image that gets the name, if it exists already.
pub(super) fn refuse_name(
    scan: &ScannedStore,
    path: &Path,
    (format, is_named): (Format, bool),
    but: Option<ImageIndex>,
    refusals: &mut Vec<Error>,
) {
    let known = refusals.len();
    refusals::taken(scan, path, refusals);
    refuse_misread(scan, path, format, is_named, refusals);
    let but = but.map(|index| scan.image(index).stat.id);
    let same_stem = |other: &ImageEntry| {
        but != Some(other.stat.id)
            && directory_of(&other.place.path) == directory_of(path)
            && other.place.path.file_stem() == path.file_stem()
    };
    if refusals.len() == known && scan.catalog.images.iter().any(same_stem) {
        let fact = "is already the name of another image; choose another";
        let stem =
            String::from_utf8_lossy(path.file_stem().unwrap_or_default().as_encoded_bytes()).into_owned();
        refusals.push(Error::new(ErrorKind::Exists, format!("{stem} {fact}")));
    }
}
