//! An open snapshot: the same bytes for as long as it is open, whatever happens to the files.
//!
//! When a job has changed the layers below it, its images are opened again, so that no reader uses stale
//! tables; the bytes stay the same. If that is impossible (its layer is gone), open handles keep the old
//! images.

use std::sync::{Arc, Weak};

use parking_lot::{Mutex, RwLock};

use crate::error::Result;
use crate::format::Snapshot;
use crate::io::ObjectId;
use crate::units::Stability;

use super::Store;
use super::catalog::{Catalog, ImageEntry, ImageIndex};
use super::open_view::{OpenView, ViewPart};

/// A handle of a snapshot.
#[derive(Debug)]
pub struct OpenDisk {
    top: ObjectId,
    part: ViewPart,
    /// The internal snapshot that is shown: its index in the table may change.
    inner: Option<Snapshot>,
    /// Replaced, never held during a read.
    view: RwLock<Arc<OpenView>>,
}

impl OpenDisk {
    /// Its current view, to be dropped soon.
    pub fn view(&self) -> Arc<OpenView> {
        Arc::clone(&self.view.read())
    }
}

/// All handles of snapshots. A leaf.
#[derive(Debug, Default)]
pub(super) struct OpenDisks {
    disks: Mutex<Vec<Weak<OpenDisk>>>,
}

impl Store {
    /// Opens the snapshot of `layers` (top first). `Stale` as for a view.
    pub fn open_disk(
        &self,
        catalog: &Catalog,
        layers: &[ImageIndex],
        part: ViewPart,
    ) -> Result<Arc<OpenDisk>> {
        let view = RwLock::new(Arc::new(self.open_shown(catalog, layers, part, Stability::Frozen)?));
        let top = &catalog.images[layers[0]];
        let inner = place(part).and_then(|index| snapshots(top).get(index).cloned());
        let disk = Arc::new(OpenDisk { top: top.stat.id, part, inner, view });
        let mut disks = self.disks.disks.lock();
        disks.retain(|disk| disk.strong_count() > 0);
        disks.push(Arc::downgrade(&disk));
        Ok(disk)
    }

    /// Refreshes all open snapshots and active disks with any of `changed` below them.
    pub(crate) fn refresh_disks(&self, changed: &[ObjectId]) {
        let disks: Vec<Arc<OpenDisk>> = self.disks.disks.lock().iter().filter_map(Weak::upgrade).collect();
        let catalog = self.catalog();
        for disk in disks.iter().filter(|disk| disk.view().shows(changed)) {
            match self.view_now(&catalog, disk) {
                Ok(Some(view)) if view.view.size() == disk.view().view.size() => {
                    let old = std::mem::replace(&mut *disk.view.write(), Arc::new(view));
                    // Not under the lock: it may close many files.
                    drop(old);
                }
                Ok(_) => {}
                Err(error) => tracing::info!("an open snapshot keeps its old images: {error}"),
            }
        }
        self.renew_mapped(changed);
        self.refresh_active(&catalog, changed);
    }

    fn view_now(&self, catalog: &Catalog, disk: &OpenDisk) -> Result<Option<OpenView>> {
        let Some(top) = catalog.images.iter().position(|image| image.stat.id == disk.top) else {
            return Ok(None);
        };
        let part = match (&disk.inner, disk.part) {
            (None, part) => part,
            (Some(inner), part) => {
                let Some(index) = snapshots(&catalog.images[top]).iter().position(|found| found == inner)
                else {
                    return Ok(None);
                };
                if matches!(part, ViewPart::VmState(_)) {
                    ViewPart::VmState(index)
                } else {
                    ViewPart::Snapshot(index)
                }
            }
        };
        self.open_shown(catalog, &catalog.layers(top), part, Stability::Frozen).map(Some)
    }
}

fn place(part: ViewPart) -> Option<usize> {
    match part {
        ViewPart::Active => None,
        ViewPart::Snapshot(index) | ViewPart::VmState(index) => Some(index),
    }
}

fn snapshots(image: &ImageEntry) -> &[Snapshot] {
    image.qcow2().map_or(&[][..], |qcow2| &qcow2.snapshots)
}
