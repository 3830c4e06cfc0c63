//! A view that the kernel reads by itself from the files of its layers: what it keeps, and what jobs see of
//! it.
//!
//! Unlike an [`OpenView`], which is made anew when a job has changed a layer below it, it stays what it is
//! for as long as it is in use. So jobs see it as a view that was opened before the change, which keeps them
//! from changing the layer again (`OpenImages::exposed`). Unless nothing that it reads has moved: then it
//! counts as opened after the change.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::error::Result;
use crate::image::Layer;
use crate::io::{KeptOpen, ObjectId, ReadLock};

use super::Store;
use super::open_view::{OpenState, OpenView};

/// Whether everything that is read of a layer, by its index from the top, is still where it was, as its
/// present tables say.
pub type StillThere = Box<dyn Fn(usize, &Layer) -> Result<bool> + Send + Sync>;

/// A view in use by the kernel. While it lives, its layers carry QEMU's reader locks on descriptors that stay
/// open.
pub struct MappedView {
    /// The fingerprint of the view that it was made of.
    pub fingerprint: u64,
    /// Dropped in this order.
    _locks: Vec<ReadLock>,
    _kept: Vec<KeptOpen>,
    /// Replaced, never held while files are read.
    state: Mutex<Arc<OpenState>>,
    still_there: StillThere,
}

impl std::fmt::Debug for MappedView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MappedView").field("state", &self.state).finish_non_exhaustive()
    }
}

impl Store {
    /// Keeps what `open` shows as it is for the kernel, which reads it from the files. `Exhausted` if too
    /// many descriptors would have to stay open.
    pub fn map_view(&self, open: &OpenView, still_there: StillThere) -> Result<Arc<MappedView>> {
        let mut kept = Vec::with_capacity(open.locks.len());
        let mut locks = Vec::with_capacity(open.locks.len());
        // X4: where a descriptor is lost, the kernel reads on without the locks that it carried.
        for lock in &open.locks {
            locks.push(lock.file().lock(lock.stability())?);
            kept.push(lock.file().keep_open()?);
        }
        let state = Mutex::new(self.opened.show(open.state().clone()));
        let fingerprint = open.fingerprint;
        let mapped = Arc::new(MappedView { fingerprint, _locks: locks, _kept: kept, state, still_there });
        let mut all = self.mapped.lock();
        all.retain(|mapped| mapped.strong_count() > 0);
        all.push(Arc::downgrade(&mapped));
        Ok(mapped)
    }

    /// A job has changed these images: what the kernel reads of them is looked up in their new tables.
    pub(super) fn renew_mapped(&self, changed: &[ObjectId]) {
        let mapped: Vec<_> = self.mapped.lock().iter().filter_map(std::sync::Weak::upgrade).collect();
        for mapped in mapped {
            let old = Arc::clone(&mapped.state.lock());
            if !old.layers.iter().any(|(id, _)| changed.contains(id)) {
                continue;
            }
            let mut state = OpenState::clone(&old);
            // What its top layer shows has not changed, whatever the image is like.
            for (index, (id, serial)) in state.layers.iter_mut().enumerate().skip(1) {
                let Some(now) = self.opened.image(*id).filter(|now| now.serial() != *serial) else {
                    continue;
                };
                match Layer::active(&now).and_then(|layer| (mapped.still_there)(index, &layer)) {
                    Ok(true) => *serial = now.serial(),
                    Ok(false) => tracing::debug!("{}: parts of {} have moved", old.name, now.name()),
                    Err(error) => tracing::debug!("{}: {error}", old.name),
                }
            }
            let new = self.opened.show(state);
            *mapped.state.lock() = new;
        }
    }
}
