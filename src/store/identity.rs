//! The identity of a disk of a chain: it never stands for other bytes.
//!
//! A name alone is not enough: a layer that another process has changed, or another one that has taken its
//! name, is another disk for every cache of the first.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Snapshot;
use crate::io::ObjectId;

use super::Store;
use super::active::{Access, ActiveHandle};
use super::catalog::{Catalog, ImageEntry, ImageIndex};
use super::disk::OpenDisk;
use super::open_view::ViewPart;
use super::views::{ChainView, ChainViews};

/// A disk of a chain.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct ViewId {
    /// The chain's path.
    pub chain: Arc<PathBuf>,
    /// The view's name, without suffix.
    pub name: Arc<[u8]>,
    /// The disk's identity.
    pub part: ViewIdentity,
}

/// The identity of a view's disk: the image that is its top layer, and the state of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ViewIdentity {
    /// The active disk, by its number in the store: its content changes, and so may its top image; its number
    /// stays.
    Active(u64),
    /// A frozen layer, by the versions of its file and of those below. All of them: two handles of one inode
    /// number share the kernel's page cache, even if one of them still reads a replaced file.
    Frozen(ObjectId, u64),
    /// An internal snapshot, by a digest of its entry in the table and of the files below.
    Snapshot(ObjectId, u64),
    /// The VM state of an internal snapshot, by a digest of its entry.
    VmState(ObjectId, u64),
}

/// A disk, found in the current catalog.
#[derive(Debug)]
pub struct FoundView {
    /// The catalog in which it was found.
    pub catalog: Arc<Catalog>,
    /// The views of its chain.
    pub views: Arc<ChainViews>,
    /// Its own.
    pub view: ChainView,
}

impl ViewId {
    /// Whether it is the writable disk.
    pub fn is_active(&self) -> bool {
        matches!(self.part, ViewIdentity::Active(_))
    }
}

impl FoundView {
    /// Its top layer's image.
    pub fn image(&self) -> &ImageEntry {
        &self.catalog.images[self.views.layers[self.view.layer]]
    }

    /// Its layers, top first.
    pub fn layers(&self) -> &[ImageIndex] {
        &self.views.layers[self.view.layer..]
    }

    /// The internal snapshot that it shows.
    pub fn snapshot(&self) -> Option<&Snapshot> {
        self.image().qcow2()?.snapshots.get(self.view.snapshot?)
    }
}

impl Store {
    /// The identity of a view of `chain`, as the catalog has it now.
    pub fn view_id(
        &self,
        catalog: &Catalog,
        chain: &Arc<PathBuf>,
        views: &ChainViews,
        view: &ChainView,
        vm_state: bool,
    ) -> ViewId {
        let image = &catalog.images[views.layers[view.layer]];
        let snapshot = view.snapshot.and_then(|index| image.qcow2()?.snapshots.get(index));
        let part = match snapshot {
            Some(snapshot) if vm_state => ViewIdentity::VmState(image.stat.id, digest(snapshot, 0)),
            Some(snapshot) => {
                ViewIdentity::Snapshot(image.stat.id, digest(snapshot, views.state(view.layer + 1)))
            }
            None if view.active => ViewIdentity::Active(self.active_number(image.stat.id)),
            // X3: the versions of its files are part of its identity.
            None => ViewIdentity::Frozen(image.stat.id, views.state(view.layer)),
        };
        ViewId { chain: Arc::clone(chain), name: view.name.as_slice().into(), part }
    }

    /// The disk of that identity; `Stale` if there is no such disk any more.
    pub fn find_view(&self, id: &ViewId) -> Result<FoundView> {
        let catalog = self.catalog();
        let leaf = catalog.chain(&id.chain).ok_or_else(|| stale("the chain was removed"))?;
        let views = self.chain_views(&catalog, leaf);
        let view =
            views.find(&id.name).cloned().ok_or_else(|| stale("the disk is no longer part of its chain"))?;
        let vm_state = matches!(id.part, ViewIdentity::VmState(..));
        if self.view_id(&catalog, &id.chain, &views, &view, vm_state) != *id {
            return Err(stale("another disk has taken its name"));
        }
        Ok(FoundView { catalog, views, view })
    }

    /// Opens a disk that does not change.
    pub fn open_frozen(&self, id: &ViewId) -> Result<Arc<OpenDisk>> {
        self.opening(id, |found| {
            let part = match (id.part, found.view.snapshot) {
                (ViewIdentity::VmState(..), Some(index)) => ViewPart::VmState(index),
                (_, Some(index)) => ViewPart::Snapshot(index),
                (_, None) => ViewPart::Active,
            };
            self.open_disk(&found.catalog, found.layers(), part)
        })
    }

    /// Opens an active disk.
    pub fn open_writable(self: &Arc<Self>, id: &ViewId, access: Access) -> Result<ActiveHandle> {
        // New overlays of it, or a freeze mark in the list, do not show in the image itself, and the change
        // notification may be late.
        if access.writes() && !matches!(id.part, ViewIdentity::Active(number) if self.is_written(number)) {
            self.rescan()?;
        }
        self.opening(id, |found| self.open_active(&found.catalog, found.layers(), access))
    }

    /// Opens what `open` finds; scans again where a file has changed since its lookup and the notification is
    /// late.
    fn opening<T>(&self, id: &ViewId, open: impl Fn(&FoundView) -> Result<T>) -> Result<T> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            let found = self.find_view(id)?;
            match open(&found) {
                Ok(open) => return Ok(open),
                Err(error) if matches!(error.kind(), ErrorKind::Stale | ErrorKind::NotFound) => {
                    self.rescan()?;
                    if attempts == 3 {
                        return Err(Error::new(ErrorKind::Stale, error.to_string()));
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// The error for an outdated lookup.
pub fn stale(fact: &str) -> Error {
    Error::new(ErrorKind::Stale, format!("{fact}; look it up again"))
}

fn digest(snapshot: &Snapshot, below: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    (&snapshot.id, &snapshot.name, snapshot.l1.offset, snapshot.l1.entries).hash(&mut hasher);
    (snapshot.seconds, snapshot.nanoseconds, snapshot.vm_state_size, snapshot.virtual_size).hash(&mut hasher);
    below.hash(&mut hasher);
    hasher.finish()
}
