//! The mark of a frozen layer: whether it can be set, setting it, and removing it.
//!
//! A qcow2 image has the mark in its header, a raw image in the store's list.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::image::write::Writer;
use crate::image::{HeaderChange, change_header};
use crate::store::{FileRef, Format, ImageIndex, Store};

use super::refusals;
use super::scanned_store::ScannedStore;

/// Whether a layer that becomes a leaf is marked as frozen: not a read-only one, nor one with hard links,
/// whose header would change under another name as well, nor the disk of a domain.
pub(super) fn may_be_marked(scan: &ScannedStore, index: ImageIndex) -> bool {
    let image = scan.image(index);
    let is_its_own = image.format == Some(Format::Raw) || image.stat.link_count == 1;
    // Without a store around it the owner of the layer is unknown.
    let is_disk = image.domains().next().is_some();
    image.place.root == 0 && !image.readonly && !is_disk && is_its_own && scan.store.guard().is_whole
}

/// Refuses a header without room for the mark, unless the mark is set.
pub(super) fn check_freeze(scan: &ScannedStore, index: ImageIndex, refusals: &mut Vec<Error>) {
    if scan.image(index).format == Some(Format::Raw) {
        refusals.extend(scan.store.check_notes().err());
    }
    if scan.image(index).frozen.is_none() {
        let change = HeaderChange { backing: None, frozen: Some(Some(Frozen::now(""))) };
        refusals::check_header(scan, index, &change, refusals);
    }
}

/// Marks an image as frozen, durably, unless it is marked.
pub(super) fn freeze(
    store: &Arc<Store>,
    scan: &ScannedStore,
    index: ImageIndex,
    frozen: &Frozen,
) -> Result<()> {
    let image = scan.image(index);
    if image.frozen.is_some() {
        return Ok(());
    }
    let format = image.format.unwrap_or(Format::Qcow2);
    mark(store, format, &scan.guarded(&image.place.path), frozen, |change| {
        let job = store.take_image(&scan.catalog, index)?;
        change_header(job.name(), &*job.file()?, change)?;
        job.finish()
    })
}

/// Writes the mark of a frozen layer: for a raw image into the store's list, for a qcow2 image into its
/// header, by `change`. A header without room for the description gets the mark without it. `Unsupported` if
/// the header has no room for the mark.
pub(super) fn mark(
    store: &Store,
    format: Format,
    path: &Path,
    frozen: &Frozen,
    change: impl Fn(&HeaderChange) -> Result<()>,
) -> Result<()> {
    // C5: durably, or the command fails.
    if format == Format::Raw {
        return store.note_frozen(path, Some(frozen));
    }
    let set = |frozen: Frozen| change(&HeaderChange { backing: None, frozen: Some(Some(frozen)) });
    match set(frozen.clone()) {
        Err(error) if error.kind() == ErrorKind::Unsupported && !frozen.description.is_empty() => {
            set(Frozen { description: String::new(), ..frozen.clone() })
        }
        done => done,
    }
}

/// A header without room for the mark is no reason to lose a snapshot, or to stop halfway.
pub(super) fn unless_unsupported(marked: Result<()>) -> Result<()> {
    match marked {
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            tracing::warn!("{error}: only its overlay protects it from being written");
            Ok(())
        }
        done => done,
    }
}

/// Removes the mark from a layer that is about to become the active layer.
pub(super) fn thaw(
    store: &Arc<Store>,
    scan: &ScannedStore,
    writer: &Writer,
    format: Format,
    base: &FileRef,
) -> Result<()> {
    match (format, scan.find(base)) {
        (Format::Raw, _) => store.note_frozen(&base.path, None),
        (Format::Qcow2, Some(index)) if scan.image(index).frozen.is_some() => {
            writer.change_header(&HeaderChange { backing: None, frozen: Some(None) })
        }
        (Format::Qcow2, _) => Ok(()),
    }
}
