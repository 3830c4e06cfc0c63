//! The open modes of inodes: through the page cache, or passthrough to a raw file that the kernel reads
//! itself.
//!
//! The kernel requires that all opens of one inode use the same mode.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{BackingId, ReplyOpen};

use super::super::handles::Handle;
use super::Adapter;

/// The present open mode of an inode.
#[derive(Default)]
pub(super) struct OpenMode {
    /// Opens through the kernel's page cache.
    cached: usize,
    /// Passthrough opens, and their backing file.
    passthrough: usize,
    backing: Option<Arc<BackingId>>,
    /// The fingerprint of the content in the page cache.
    fingerprint: Option<u64>,
}

impl Adapter {
    /// Opens in passthrough mode; `None` if that is not possible.
    pub(super) fn open_passthrough(
        &self,
        reply: &ReplyOpen,
        inode: u64,
        handle: &Handle,
    ) -> Option<Arc<BackingId>> {
        let Handle::Disk(disk) = handle else { return None };
        let disk = disk.view();
        let file = disk.raw_file.as_ref()?;
        let mut modes = self.modes.lock();
        let mode = modes.entry(inode).or_default();
        if mode.cached > 0 {
            return None;
        }
        if mode.backing.is_none() {
            if !self.passthrough.load(Ordering::Relaxed) {
                return None;
            }
            // Only if file and disk have the same size.
            let same_size = file.stat().is_ok_and(|stat| stat.size == disk.view.size());
            let own = file.open_local().ok().flatten().filter(|_| same_size)?;
            match reply.open_backing(own) {
                Ok(backing) => mode.backing = Some(Arc::new(backing)),
                Err(error) => {
                    tracing::info!("no passthrough for raw disks: {error}");
                    self.passthrough.store(false, Ordering::Relaxed);
                    return None;
                }
            }
        }
        mode.passthrough += 1;
        mode.backing.clone()
    }

    /// Counts an open through the page cache; whether the cached pages are still valid.
    pub(super) fn open_cached(&self, inode: u64, fingerprint: u64) -> bool {
        let mut modes = self.modes.lock();
        let mode = modes.entry(inode).or_default();
        mode.cached += 1;
        // X1: pages are kept only if no file of the view has changed.
        mode.fingerprint.replace(fingerprint) == Some(fingerprint)
    }

    pub(super) fn closed(&self, inode: u64, handle: &Handle) {
        let Handle::Disk(_) = handle.disk() else { return };
        let mut modes = self.modes.lock();
        let Some(mode) = modes.get_mut(&inode) else { return };
        if mode.passthrough > 0 {
            mode.passthrough -= 1;
            if mode.passthrough == 0 {
                mode.backing = None;
            }
        } else {
            mode.cached = mode.cached.saturating_sub(1);
        }
    }
}
