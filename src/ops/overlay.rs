//! New qcow2 images, which nobody sees before they have their names.
//!
//! Promises: a draft lies in the directory of the name that it is going to get, under one that no scan takes
//! for an image's; it is durable, and has owner, mode and attributes of the file it is made after, before
//! anybody opens it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::image::create::{CreateOptions, NewBacking, initial_image};
use crate::io::directory_of;
use crate::store::{FileRef, Format, ImageEntry, ImageIndex, Store, StorePath, shown};

use super::refusals;
use super::scanned_store::{ScannedStore, beside};

/// An image that nobody sees yet.
pub(super) struct DraftImage {
    /// Beneath the store.
    pub(super) path: PathBuf,
    /// Beneath the guarded directory.
    pub(super) named: FileRef,
}

/// The name of a draft beside `name`, of the command or intent called `of`.
pub(super) fn draft_name(name: &Path, of: &str, number: usize) -> PathBuf {
    beside(name, crate::store::draft_name(of, number).as_bytes())
}

impl DraftImage {
    /// Makes an image at `path` beneath the store, after the file at `like`.
    pub(super) fn make(
        world: &ScannedStore,
        path: PathBuf,
        like: &Path,
        options: &CreateOptions,
    ) -> Result<Self> {
        let names = world.store.names();
        let bytes = initial_image(options)?;
        let file = names.create(&path, Some(like))?;
        let made = file
            .write_at(0, &bytes)
            .and_then(|()| file.sync())
            .and_then(|()| names.sync(&directory_of(&path)));
        drop(file);
        let made = made.and_then(|()| {
            let seen = FileRef::witness(&*world.store.roots()[0], &path, Format::Qcow2, false)?;
            Ok(FileRef { path: world.guarded(&path), ..seen })
        });
        match made {
            Ok(known) => Ok(Self { path, named: known }),
            Err(error) => {
                let _ = names.unlink(&path);
                Err(error)
            }
        }
    }

    /// Takes it away.
    pub(super) fn unmake(&self, store: &Arc<Store>) {
        // By identity: what others have put there stays. Else it is swept when the store is opened the next
        // time.
        if self.is_there(store) {
            let _ = store.names().unlink(&self.path);
        }
    }

    /// Whether it is what has its name.
    pub(super) fn is_there(&self, store: &Arc<Store>) -> bool {
        self.named.is_at(&*store.roots()[0], &self.path)
    }
}

/// What an empty image like `model` on `backing` is made of.
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

/// How a new image at `path` beneath the store is to name the image `to`.
pub(super) fn backing(world: &ScannedStore, path: &Path, to: ImageIndex) -> NewBacking {
    world.backing(&StorePath { root: 0, path: path.to_path_buf() }, to, false)
}

/// Refuses a name by which a file would be read in another format, or not at all.
pub(super) fn refuse_misread(
    world: &ScannedStore,
    path: &Path,
    format: Format,
    is_named: bool,
    refusals: &mut Vec<Error>,
) {
    if !world.store.options().reads_as(path, format, is_named) {
        let fact = format!("would not be read as {} by that name; choose another", format.name());
        refusals.push(Error::new(ErrorKind::Usage, format!("{} {fact}", shown(path))));
    }
}

/// Refuses a name for a file that is not there yet: one that is taken, misread, or of another image's stem,
/// for both would be shown by their full names then. `but`: the image that gets it, if that is there already.
pub(super) fn refuse_name(
    world: &ScannedStore,
    path: &Path,
    (format, is_named): (Format, bool),
    but: Option<ImageIndex>,
    refusals: &mut Vec<Error>,
) {
    let known = refusals.len();
    refusals::taken(world, path, refusals);
    refuse_misread(world, path, format, is_named, refusals);
    let but = but.map(|index| world.image(index).stat.id);
    let same_stem = |other: &ImageEntry| {
        but != Some(other.stat.id)
            && directory_of(&other.place.path) == directory_of(path)
            && other.place.path.file_stem() == path.file_stem()
    };
    if refusals.len() == known && world.catalog.images.iter().any(same_stem) {
        let fact = "is the name of another image already; choose another";
        let stem =
            String::from_utf8_lossy(path.file_stem().unwrap_or_default().as_encoded_bytes()).into_owned();
        refusals.push(Error::new(ErrorKind::Exists, format!("{stem} {fact}")));
    }
}
