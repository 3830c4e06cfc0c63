//! What is open: numbers for the kernel, contents for us.

use std::collections::HashMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::RwLock;

use crate::store::{ActiveHandle, OpenDisk};

use super::attributes::Attributes;
use super::control::ControlHandle;
use super::guest_file::{GuestDirectory, GuestFile};
use super::partition_range::PartitionRange;
use super::pieces::Pieces;
use super::progress::ProgressReader;
use super::tree::NodeEntry;

/// Something open.
#[derive(Clone, Debug)]
pub enum Handle {
    /// A document, as of its opening.
    Text(Arc<[u8]>),
    /// A long document, as of its opening.
    Pieces(Arc<Pieces>),
    /// A snapshot; QEMU's locks are held as long as it lives.
    Disk(Arc<OpenDisk>),
    /// An active disk. The kernel hands every read and write of it to us.
    Active(Arc<ActiveHandle>),
    /// A control file.
    Control(Arc<ControlHandle>),
    /// A `control/progress`; [`MountTree::read_progress`](super::MountTree::read_progress) reads it.
    Progress(Arc<ProgressReader>),
    /// A directory, as of its opening.
    Directory(Arc<[NodeEntry]>),
    /// A partition of a disk.
    Partition(PartitionRange),
    /// A guest's file.
    GuestFile(Arc<GuestFile>),
    /// A guest's directory.
    GuestDirectory(Arc<GuestDirectory>),
}

impl Handle {
    /// What is really open: of a partition, its disk.
    pub(super) fn disk(&self) -> &Handle {
        if let Handle::Partition(window) = self { &window.disk } else { self }
    }
}

/// All that is open.
#[derive(Debug, Default)]
pub(super) struct Handles {
    last: AtomicU64,
    open: RwLock<HashMap<u64, (Handle, Option<Attributes>)>>,
}

impl Handles {
    /// Gives it a number. `seen`: what it looks like, where that is to be remembered.
    pub(super) fn add(&self, handle: Handle, seen: Option<Attributes>) -> u64 {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.write().insert(number, (handle, seen));
        number
    }

    pub(super) fn get(&self, number: u64) -> Option<Handle> {
        self.open.read().get(&number).map(|(handle, _)| handle.clone())
    }

    /// What a node looked like when it was opened, if it still is.
    pub(super) fn attributes(&self, inode: u64) -> Option<Attributes> {
        self.open.read().values().filter_map(|(_, seen)| *seen).find(|seen| seen.inode == inode)
    }

    pub(super) fn remove(&self, number: u64) {
        // Dropped outside of the lock: closing may let go of a thousand file locks.
        let handle = self.open.write().remove(&number);
        drop(handle);
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.open.write());
        // Each by itself: a bug that closing one brings out must not keep the others from being flushed.
        for handle in all.into_values() {
            let _ = catch_unwind(AssertUnwindSafe(|| drop(handle)));
        }
    }

    pub(super) fn count(&self) -> usize {
        self.open.read().len()
    }
}
