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
use crate::store::{MappedView, OpenView, StillThere, Store};

use super::super::handles::Handle;
use super::super::kernel_map::KernelMaps;
use super::errno::Refusal;
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
    /// The daemon, and the kernel keeps nothing. Other opens of the inode are served by the kernel from this
    /// registered file, which has to be named.
    BesidePassthrough(Arc<B>),
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
    store: Arc<Store>,
    maps: Option<Arc<KernelMaps>>,
    by_inode: Mutex<HashMap<u64, InodeOpens<B>>>,
}

/// The present opens of an inode.
struct InodeOpens<B> {
    /// Opens through the kernel's page cache.
    cached: usize,
    /// Passthrough opens, and their registered file.
    passthrough: usize,
    backing: Option<Backing<B>>,
    /// Whether a client wanted direct reads that the kernel could not make.
    wants_daemon: bool,
    /// The fingerprint of the content in the page cache.
    fingerprint: Option<u64>,
}

/// A registered file, which the kernel reads instead of asking the daemon.
struct Backing<B> {
    registered: Arc<B>,
    source: Source,
}

/// What the kernel reads.
struct Source {
    kind: SourceKind,
    /// Whether it takes reads with `O_DIRECT`.
    takes_direct_reads: bool,
    /// What is read stays as it is: locks, and what jobs see of it.
    view: Arc<MappedView>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SourceKind {
    /// The file of a raw layer.
    RawFile,
    /// A map.
    Map,
}

impl<B> Default for InodeOpens<B> {
    fn default() -> Self {
        Self { cached: 0, passthrough: 0, backing: None, wants_daemon: false, fingerprint: None }
    }
}

impl<B> InodeOpens<B> {
    /// Whether an open may decide that the kernel serves the inode.
    fn is_undecided(&self) -> bool {
        self.cached == 0 && self.backing.is_none() && !self.wants_daemon
    }

    /// Counts an open through the page cache.
    fn cached(&mut self, open: &OpenView) -> CacheMode {
        self.cached += 1;
        // X1: pages are kept only if no file of the view has changed.
        let is_same = self.fingerprint.replace(open.fingerprint) == Some(open.fingerprint);
        if is_same { CacheMode::KeepCache } else { CacheMode::Cached }
    }
}

impl<B> Opens<B> {
    pub(super) fn new(features: Features, store: &Arc<Store>, maps: Option<Arc<KernelMaps>>) -> Self {
        Self {
            passthrough: AtomicBool::new(features.passthrough),
            parallel_writes: features.parallel_writes,
            store: Arc::clone(store),
            maps,
            by_inode: Mutex::default(),
        }
    }

    pub(super) fn has_passthrough(&self) -> bool {
        self.passthrough.load(Ordering::Relaxed)
    }

    pub(super) fn without_passthrough(&self) {
        self.passthrough.store(false, Ordering::Relaxed);
    }

    /// Decides who serves a file that was opened as `handle`, with `flags`. `register`: gives the kernel a
    /// file to read.
    pub(super) fn served_by(
        &self,
        inode: u64,
        handle: &Handle,
        flags: i32,
        register: impl FnOnce(LocalFile) -> io::Result<B>,
    ) -> Result<ServedBy<B>, Refusal> {
        Ok(ServedBy::Daemon(match handle {
            Handle::Disk(disk) => return self.open_disk(inode, &disk.view(), flags, register),
            Handle::Active(_) if self.parallel_writes => CacheMode::DirectParallel,
            // A partition has the mode of its disk.
            Handle::Partition(range) => match &*range.disk {
                Handle::Active(_) if self.parallel_writes => CacheMode::DirectParallel,
                Handle::Disk(disk) => self.by_inode.lock().entry(inode).or_default().cached(&disk.view()),
                _ => CacheMode::Direct,
            },
            // The content of a guest's inode number never changes.
            Handle::GuestFile(_) => CacheMode::Immutable,
            Handle::Progress(_) => CacheMode::Stream,
            // An active disk changes, and each open of a text file has its own text: neither may be cached.
            Handle::Active(_)
            | Handle::Text(_)
            | Handle::Pieces(_)
            | Handle::Control(_)
            | Handle::Directory(_)
            | Handle::GuestDirectory(_) => CacheMode::Direct,
        }))
    }

    fn open_disk(
        &self,
        inode: u64,
        open: &Arc<OpenView>,
        flags: i32,
        register: impl FnOnce(LocalFile) -> io::Result<B>,
    ) -> Result<ServedBy<B>, Refusal> {
        let is_direct = flags & libc::O_DIRECT != 0;
        // Not under the lock: a map takes time.
        let is_undecided = self.by_inode.lock().get(&inode).is_none_or(InodeOpens::is_undecided);
        let new = if is_undecided { self.source(open, is_direct) } else { None };
        // All opens of an inode agree: from here on to the count, no other open decides.
        let mut opens = self.by_inode.lock();
        let inode = opens.entry(inode).or_default();
        if inode.is_undecided()
            && let Some((file, source)) = new
        {
            match register(file) {
                Ok(registered) => inode.backing = Some(Backing { registered: Arc::new(registered), source }),
                Err(error) => {
                    tracing::info!("no passthrough: {error}");
                    self.without_passthrough();
                }
            }
        }
        let Some(Backing { registered, source }) = &inode.backing else {
            return Ok(ServedBy::Daemon(inode.cached(open)));
        };
        if is_direct && !source.takes_direct_reads {
            inode.wants_daemon = true;
            return Err(Refusal::NoDirectReads);
        }
        inode.passthrough += 1;
        let registered = Arc::clone(registered);
        // What a map shows is what its view was made of.
        let is_as_mapped = source.kind == SourceKind::RawFile || source.view.fingerprint == open.fingerprint;
        Ok(if is_as_mapped {
            ServedBy::Passthrough(registered)
        } else {
            ServedBy::BesidePassthrough(registered)
        })
    }

    /// The file that the kernel may read instead of asking the daemon for a disk.
    fn source(&self, open: &Arc<OpenView>, is_direct: bool) -> Option<(LocalFile, Source)> {
        if !self.has_passthrough() {
            return None;
        }
        let (kind, file, still_there): (_, _, StillThere) = match &open.raw_file {
            // Only if file and disk have the same size.
            Some(file) if file.stat().is_ok_and(|stat| stat.size == open.view.size()) => {
                let file = file.open_local().ok().flatten()?;
                (SourceKind::RawFile, file, Box::new(|_, _| Ok(true)))
            }
            // The kernel makes no direct reads from a map.
            _ if is_direct => return None,
            _ => {
                let map = self.maps.as_ref()?.get(open)?;
                let file = map.file();
                (SourceKind::Map, file, Box::new(move |index, layer| map.is_still_there(index, layer)))
            }
        };
        let takes_direct_reads = kind == SourceKind::RawFile && file.takes_direct_reads();
        if is_direct && !takes_direct_reads {
            return None;
        }
        match self.store.map_view(open, still_there) {
            Ok(view) => Some((file, Source { kind, takes_direct_reads, view })),
            Err(error) => {
                tracing::debug!("the daemon serves a disk: {error}");
                None
            }
        }
    }

    /// Who serves a disk that is open; `None` if it is not.
    pub(super) fn server(&self, inode: u64) -> Option<&'static str> {
        let opens = self.by_inode.lock();
        let inode = opens.get(&inode)?;
        match &inode.backing {
            Some(backing) => Some(match backing.source.kind {
                SourceKind::RawFile => "kernel, from a raw layer",
                SourceKind::Map => "kernel, from a map of all layers",
            }),
            None => (inode.cached > 0).then_some("daemon"),
        }
    }

    /// An open file was released.
    pub(super) fn closed(&self, inode: u64, handle: &Handle) {
        let Handle::Disk(_) = handle.disk() else { return };
        let mut opens = self.by_inode.lock();
        let Some(inode) = opens.get_mut(&inode) else { return };
        if inode.passthrough > 0 {
            inode.passthrough -= 1;
            let last = (inode.passthrough == 0).then(|| inode.backing.take()).flatten();
            // It may close a thousand files.
            drop(opens);
            drop(last);
        } else {
            inode.cached = inode.cached.saturating_sub(1);
        }
    }
}
