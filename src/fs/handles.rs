//! Open handles by number.

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

/// An open file or directory.
#[derive(Clone, Debug)]
pub enum Handle {
    /// An info file, with its text at the time of the open.
    Text(Arc<[u8]>),
    /// A long info file, with its text at the time of the open.
    Pieces(Arc<Pieces>),
    /// A snapshot; QEMU's locks are held until it is dropped.
    Disk(Arc<OpenDisk>),
    /// An active disk. The kernel sends all its reads and writes to the daemon.
    Active(Arc<ActiveHandle>),
    /// A control file.
    Control(Arc<ControlHandle>),
    /// A `control/progress`; [`MountTree::read_progress`](super::MountTree::read_progress) reads it.
    Progress(Arc<ProgressReader>),
    /// A directory, with its entries at the time of the open.
    Directory(Arc<[NodeEntry]>),
    /// A partition of a disk.
    Partition(PartitionRange),
    /// A guest's file.
    GuestFile(Arc<GuestFile>),
    /// A guest's directory.
    GuestDirectory(Arc<GuestDirectory>),
}

impl Handle {
    /// The handle of the disk, for a partition; else the handle itself.
    pub(super) fn disk(&self) -> &Handle {
        if let Handle::Partition(window) = self { &window.disk } else { self }
    }
}

/// All open handles.
#[derive(Debug, Default)]
pub(super) struct Handles {
    last: AtomicU64,
    open: RwLock<HashMap<u64, (Handle, Option<Attributes>)>>,
}

impl Handles {
    /// Adds a handle and returns its number. `seen`: attributes to keep with it.
    pub(super) fn add(&self, handle: Handle, seen: Option<Attributes>) -> u64 {
        let number = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.write().insert(number, (handle, seen));
        number
    }

    pub(super) fn get(&self, number: u64) -> Option<Handle> {
        self.open.read().get(&number).map(|(handle, _)| handle.clone())
    }

    /// The attributes that were kept for a node that is still open.
    pub(super) fn attributes(&self, inode: u64) -> Option<Attributes> {
        self.open.read().values().filter_map(|(_, seen)| *seen).find(|seen| seen.inode == inode)
    }

    pub(super) fn remove(&self, number: u64) {
        // Dropped after the lock is released: closing may release a thousand file locks.
        let handle = self.open.write().remove(&number);
        drop(handle);
    }

    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut *self.open.write());
        // Each on its own: a panic while one is closed must not keep the others from being flushed.
        for handle in all.into_values() {
            let _ = catch_unwind(AssertUnwindSafe(|| drop(handle)));
        }
    }

    pub(super) fn count(&self) -> usize {
        self.open.read().len()
    }
}
