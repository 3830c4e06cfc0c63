//! Overlays that get another backing file at the end of a commit, through which the same bytes show.

use std::sync::Arc;

use crate::error::Result;
use crate::image::{HeaderChange, change_header};
use crate::store::{ActiveJob, FileRef, ImageIndex, JobImage, Store};

use super::scanned_store::ScannedStore;

/// An image that is to stand on something else, in the hands of a job.
pub(super) enum OverlayToRebase {
    /// The top of an active disk, which may be in use.
    Active(ActiveJob, FileRef),
    /// A frozen layer.
    Image(JobImage),
}

impl OverlayToRebase {
    /// Takes it: from here on no other process opens it.
    pub(super) fn take(store: &Arc<Store>, world: &ScannedStore, index: ImageIndex) -> Result<Self> {
        if world.is_active_disk(index) {
            let job = store.take_active(&world.catalog, &world.catalog.layers(index))?;
            return Ok(OverlayToRebase::Active(job, world.named(index)));
        }
        Ok(OverlayToRebase::Image(store.take_image(&world.catalog, index)?))
    }

    /// Points it at another backing file, through which the same bytes show. An active disk is returned: in
    /// memory it does not stand on that yet.
    pub(super) fn put_on(
        self,
        world: &ScannedStore,
        index: ImageIndex,
        base: ImageIndex,
    ) -> Result<Option<(ActiveJob, FileRef)>> {
        let change = HeaderChange { backing: Some(Some(world.backing_name(index, base))), frozen: None };
        match self {
            OverlayToRebase::Active(job, named) => {
                job.writer()?.change_header(&change)?;
                Ok(Some((job, named)))
            }
            OverlayToRebase::Image(image) => {
                change_header(image.name(), &*image.file()?, &change)?;
                image.finish()?;
                Ok(None)
            }
        }
    }

    pub(super) fn is(&self, named: &FileRef) -> bool {
        match self {
            OverlayToRebase::Active(_, own) => own.is(named),
            OverlayToRebase::Image(image) => image.id() == named.file.id(),
        }
    }
}

/// Lets disks stand on what their headers name by now.
pub(super) fn stand_on_new(world: &ScannedStore, jobs: &[(ActiveJob, FileRef)]) -> Result<()> {
    for (job, named) in jobs {
        let child = world.expect(named)?;
        job.stand_on(&world.catalog, &world.catalog.layers(child)[1..])?;
    }
    Ok(())
}
