//! How inodes are open: through the page cache, or handed to a raw file that the kernel reads itself.
//!
//! All openings of one inode agree, as the kernel wants it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use fuser::{BackingId, ReplyOpen};

use super::super::handles::Handle;
use super::Adapter;

/// How an inode is open now. The kernel wants all openings of one inode to agree.
#[derive(Default)]
pub(super) struct OpenMode {
    /// Openings through the kernel's page cache.
    cached: usize,
    /// Openings handed to the file itself, and that file.
    passed: usize,
    backing: Option<Arc<BackingId>>,
    /// What the page cache was filled from.
    fingerprint: Option<u64>,
}

impl Adapter {
    /// Whether this opening is handed to the raw file itself. `None` if it is not.
    pub(super) fn pass(&self, reply: &ReplyOpen, inode: u64, handle: &Handle) -> Option<Arc<BackingId>> {
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
            // Only where the file is the disk to the last byte.
            let same_size = file.stat().is_ok_and(|stat| stat.signature.size == disk.view.size());
            let own = file.open_again().ok().filter(|_| same_size)?;
            match reply.open_backing(own) {
                Ok(backing) => mode.backing = Some(Arc::new(backing)),
                Err(error) => {
                    tracing::info!("raw disks are served by the daemon, for the kernel says: {error}");
                    self.passthrough.store(false, Ordering::Relaxed);
                    return None;
                }
            }
        }
        mode.passed += 1;
        mode.backing.clone()
    }

    /// Notes an opening through the page cache; whether what it holds is still good.
    pub(super) fn cache(&self, inode: u64, fingerprint: u64) -> bool {
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
        if mode.passed > 0 {
            mode.passed -= 1;
            if mode.passed == 0 {
                mode.backing = None;
            }
        } else {
            mode.cached = mode.cached.saturating_sub(1);
        }
    }
}
