//! Who serves the bytes of an open file, and what the kernel may keep of them.
//!
//! [`Opens::served_by`] decides it at each open. The kernel requires that all opens of one inode use the page
//! cache, or all of them passthrough.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::io::LocalFile;

use super::super::handles::Handle;
use super::features::Features;

/// An opened file.
#[derive(Debug)]
pub struct Opened<B> {
    /// The number of the handle.
    pub handle: u64,
    /// Who serves its bytes.
    pub served_by: ServedBy<B>,
}

/// Who serves the bytes of an open file.
#[derive(Debug)]
pub enum ServedBy<B> {
    /// The daemon: reads and writes are calls.
    Daemon(CacheMode),
    /// The kernel reads a registered file itself. The registration lives until the file is released.
    Passthrough(Arc<B>),
}

/// What the kernel may keep of the bytes that the daemon serves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheMode {
    /// Nothing: each read and write is a call.
    Direct,
    /// Nothing, and writes to the file may come in parallel.
    DirectParallel,
    /// Nothing. The file has no positions: reads of one open file do not wait for each other.
    Stream,
    /// Pages, from this open on. Those of earlier opens are dropped.
    Cached,
    /// Pages, also those of earlier opens.
    KeepCache,
    /// Pages for good, of content that never changes. There is nothing to flush at close.
    Immutable,
}

/// An opened directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OpenedDirectory {
    /// The number of the handle.
    pub handle: u64,
    /// Whether the kernel may keep the listing for good.
    pub is_immutable: bool,
}

/// The open files of snapshots, by inode.
pub(super) struct Opens<B> {
    /// Cleared when the kernel has refused passthrough once.
    passthrough: AtomicBool,
    parallel_writes: bool,
    by_inode: Mutex<HashMap<u64, InodeOpens<B>>>,
}

/// The present opens of an inode.
struct InodeOpens<B> {
    /// Opens through the kernel's page cache.
    cached: usize,
    /// Passthrough opens, and their registered file.
    passthrough: usize,
    backing: Option<Arc<B>>,
    /// The fingerprint of the content in the page cache.
    fingerprint: Option<u64>,
}

impl<B> Default for InodeOpens<B> {
    fn default() -> Self {
        Self { cached: 0, passthrough: 0, backing: None, fingerprint: None }
    }
}

impl<B> Opens<B> {
    pub(super) fn new(features: Features) -> Self {
        Self {
            passthrough: AtomicBool::new(features.passthrough),
            parallel_writes: features.parallel_writes,
            by_inode: Mutex::default(),
        }
    }

    pub(super) fn without_passthrough(&self) {
        self.passthrough.store(false, Ordering::Relaxed);
    }

    /// Decides who serves a file that was opened as `handle`. `register`: gives the kernel a file to read.
    pub(super) fn served_by(
        &self,
        inode: u64,
        handle: &Handle,
        register: impl FnOnce(LocalFile) -> io::Result<B>,
    ) -> ServedBy<B> {
        if let Some(backing) = self.open_passthrough(inode, handle, register) {
            return ServedBy::Passthrough(backing);
        }
        // A partition has the mode of its disk.
        ServedBy::Daemon(match handle.disk() {
            Handle::Active(_) if self.parallel_writes => CacheMode::DirectParallel,
            Handle::Disk(disk) if self.open_cached(inode, disk.view().fingerprint) => CacheMode::KeepCache,
            Handle::Disk(_) => CacheMode::Cached,
            // The content of a guest's inode number never changes.
            Handle::GuestFile(_) => CacheMode::Immutable,
            Handle::Progress(_) => CacheMode::Stream,
            // An active disk changes, and each open of a text file has its own text: neither may be cached.
            Handle::Active(_)
            | Handle::Text(_)
            | Handle::Pieces(_)
            | Handle::Control(_)
            | Handle::Directory(_)
            | Handle::GuestDirectory(_)
            | Handle::Partition(_) => CacheMode::Direct,
        })
    }

    /// Opens in passthrough mode; `None` if that is not possible.
    fn open_passthrough(
        &self,
        inode: u64,
        handle: &Handle,
        register: impl FnOnce(LocalFile) -> io::Result<B>,
    ) -> Option<Arc<B>> {
        let Handle::Disk(disk) = handle else { return None };
        let disk = disk.view();
        let file = disk.raw_file.as_ref()?;
        let mut opens = self.by_inode.lock();
        let inode = opens.entry(inode).or_default();
        if inode.cached > 0 {
            return None;
        }
        if inode.backing.is_none() {
            if !self.passthrough.load(Ordering::Relaxed) {
                return None;
            }
            // Only if file and disk have the same size.
            let same_size = file.stat().is_ok_and(|stat| stat.size == disk.view.size());
            let own = file.open_local().ok().flatten().filter(|_| same_size)?;
            match register(own) {
                Ok(backing) => inode.backing = Some(Arc::new(backing)),
                Err(error) => {
                    tracing::info!("no passthrough for raw disks: {error}");
                    self.without_passthrough();
                    return None;
                }
            }
        }
        inode.passthrough += 1;
        inode.backing.clone()
    }

    /// Counts an open through the page cache; whether the cached pages are still valid.
    fn open_cached(&self, inode: u64, fingerprint: u64) -> bool {
        let mut opens = self.by_inode.lock();
        let inode = opens.entry(inode).or_default();
        inode.cached += 1;
        // X1: pages are kept only if no file of the view has changed.
        inode.fingerprint.replace(fingerprint) == Some(fingerprint)
    }

    /// An open file was released.
    pub(super) fn closed(&self, inode: u64, handle: &Handle) {
        let Handle::Disk(_) = handle.disk() else { return };
        let mut opens = self.by_inode.lock();
        let Some(inode) = opens.get_mut(&inode) else { return };
        if inode.passthrough > 0 {
            inode.passthrough -= 1;
            if inode.passthrough == 0 {
                inode.backing = None;
            }
        } else {
            inode.cached = inode.cached.saturating_sub(1);
        }
    }
}
