//! The mark of a frozen layer: whether it can be set, setting it, and taking it away.
//!
//! A qcow2 image bears the mark in its header, a raw one in the store's list.

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::format::Frozen;
use crate::image::write::Writer;
use crate::image::{HeaderChange, change_header};
use crate::store::{FileRef, Format, ImageIndex, Store};

use super::refusals;
use super::scanned_store::ScannedStore;

/// Whether a layer that nobody stands on any more is marked as frozen: not one that is only read, or whose
/// header would change under another name as well.
pub(super) fn may_be_marked(world: &ScannedStore, index: ImageIndex) -> bool {
    let image = world.image(index);
    let is_its_own = image.format == Some(Format::Raw) || image.stat.link_count == 1;
    // Without a store around it nobody can tell whose layer it is.
    image.place.root == 0 && !image.readonly && is_its_own && world.store.guard().is_whole
}

/// The same for a mark of being frozen, unless there is one.
pub(super) fn check_freeze(world: &ScannedStore, index: ImageIndex, refusals: &mut Vec<Error>) {
    if world.image(index).format == Some(Format::Raw) {
        refusals.extend(world.store.check_notes().err());
    }
    if world.image(index).frozen.is_none() {
        let change = HeaderChange { backing: None, frozen: Some(Some(Frozen::now(""))) };
        refusals::check_header(world, index, &change, refusals);
    }
}

/// Marks an image as frozen, durably, unless it is.
pub(super) fn freeze(
    store: &Arc<Store>,
    world: &ScannedStore,
    index: ImageIndex,
    frozen: &Frozen,
) -> Result<()> {
    let image = world.image(index);
    if image.frozen.is_some() {
        return Ok(());
    }
    // C5: durably, or the command fails.
    if image.format == Some(Format::Raw) {
        return store.note_frozen(&world.guarded(&image.place.path), Some(frozen));
    }
    let job = store.take_image(&world.catalog, index)?;
    let change = HeaderChange { backing: None, frozen: Some(Some(frozen.clone())) };
    change_header(job.name(), &*job.file()?, &change)?;
    job.finish()
}

/// Takes the mark away from what is about to become the active layer.
pub(super) fn thaw(
    store: &Arc<Store>,
    world: &ScannedStore,
    writer: &Writer,
    format: Format,
    base: &FileRef,
) -> Result<()> {
    match (format, world.find(base)) {
        (Format::Raw, _) => store.note_frozen(&base.path, None),
        (Format::Qcow2, Some(index)) if world.image(index).frozen.is_some() => {
            writer.change_header(&HeaderChange { backing: None, frozen: Some(None) })
        }
        (Format::Qcow2, _) => Ok(()),
    }
}
