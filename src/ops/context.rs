//! The environment of a verb: the store, names for intents, and the processes that have disks of the mount
//! open.
//!
//! Verbs receive only this from the engine: they neither start other commands nor read the job table.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use crate::io::users_of;
use crate::store::{Store, command_name};

/// The store of an engine, and the services that its verbs use.
pub(super) struct Context {
    store: Arc<Store>,
    /// The mount point: processes that have its disks open are looked up there.
    mount: Mutex<Option<PathBuf>>,
    /// The number of intents named so far, so that each name is used once.
    intents: AtomicU64,
}

impl Context {
    /// The context of `store`, which is not mounted yet.
    pub(super) fn new(store: &Arc<Store>) -> Self {
        Self { store: Arc::clone(store), mount: Mutex::default(), intents: AtomicU64::new(0) }
    }

    /// The store.
    pub(super) fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Sets the mount point.
    pub(super) fn set_mount(&self, directory: &Path) {
        *self.mount.lock() = Some(directory.to_path_buf());
    }

    /// The mount point.
    pub(super) fn mount(&self) -> Option<PathBuf> {
        self.mount.lock().clone()
    }

    /// Whether the store is mounted.
    pub(super) fn is_mounted(&self) -> bool {
        self.mount.lock().is_some()
    }

    /// The processes that have disks of a chain open in the mount, as a part of a sentence; empty if there
    /// are none.
    pub(super) fn openers(&self, chain: &Path) -> String {
        let Some(mount) = self.mount() else { return String::new() };
        // Not the chain's directory itself: the process that gives a command has a control file open there.
        let places = [Path::new("snapshots"), Path::new("active.raw")];
        let users = places.iter().flat_map(|place| users_of(&mount.join(chain).join(place)));
        users.map(|user| user.to_string()).collect::<Vec<_>>().join(", ")
    }

    /// A name for an intent, different from all others.
    pub(super) fn intent_name(&self) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        command_name(now, std::process::id(), self.intents.fetch_add(1, Ordering::Relaxed))
    }
}
