//! Overlays that get another backing file with the same bytes at the end of a commit.

use std::sync::Arc;

use crate::error::Result;
use crate::image::{HeaderChange, change_header};
use crate::store::{ActiveJob, FileRef, ImageIndex, JobImage, Store};

use super::scanned_store::ScannedStore;

/// An image that gets another backing file, opened by a job.
pub(super) enum OverlayToRebase {
    /// The top of an active disk, which may be in use.
    Active(ActiveJob, FileRef),
    /// A frozen layer.
    Image(JobImage),
}

impl OverlayToRebase {
    /// Opens and locks it: from here on no other process opens it.
    pub(super) fn open(store: &Arc<Store>, scan: &ScannedStore, index: ImageIndex) -> Result<Self> {
        if scan.is_active_disk(index) {
            let job = store.take_active(&scan.catalog, &scan.catalog.layers(index))?;
            return Ok(OverlayToRebase::Active(job, scan.named(index)));
        }
        Ok(OverlayToRebase::Image(store.take_image(&scan.catalog, index)?))
    }

    /// Changes its backing file to another one with the same bytes. An active disk is returned: in memory it
    /// still has the old backing.
    pub(super) fn change_backing(
        self,
        scan: &ScannedStore,
        index: ImageIndex,
        base: ImageIndex,
    ) -> Result<Option<(ActiveJob, FileRef)>> {
        let change = HeaderChange { backing: Some(Some(scan.backing_name(index, base))), frozen: None };
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

/// Switches the in-memory backing of disks to the one that their headers name.
pub(super) fn switch_backing(scan: &ScannedStore, jobs: &[(ActiveJob, FileRef)]) -> Result<()> {
    for (job, named) in jobs {
        let child = scan.expect(named)?;
        job.stand_on(&scan.catalog, &scan.catalog.layers(child)[1..])?;
    }
    Ok(())
}
