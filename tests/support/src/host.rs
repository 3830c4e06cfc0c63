//! The real machine, until its time is up: from then on no change of a store is done any more, as if the
//! process had been killed.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use chainfs::error::{Error, Result};
use chainfs::io::{Descriptors, Directory, Existing, Host, Root, Storage, StoreFile, ThisHost, WriteStorage};
use chainfs::units::{BlockStatus, Run};
use rustix::io::Errno;

/// A host that can be killed.
#[derive(Clone)]
pub struct Mortal {
    /// How many changes are left to it.
    left: Arc<AtomicI64>,
    /// How many changes of names.
    names_left: Arc<AtomicI64>,
}

impl Mortal {
    pub fn new() -> Self {
        let endless = || Arc::new(AtomicI64::new(i64::MAX));
        Self { left: endless(), names_left: endless() }
    }

    /// It does so many more changes.
    pub fn dies_after(&self, calls: u64) {
        self.left.store(calls.cast_signed(), Ordering::SeqCst);
    }

    /// It does so many more changes of names, and dies at the next.
    pub fn dies_after_names(&self, calls: u64) {
        self.names_left.store(calls.cast_signed(), Ordering::SeqCst);
    }

    /// Whether its time was up.
    pub fn is_dead(&self) -> bool {
        self.left.load(Ordering::SeqCst) < 0
    }

    fn name(&self) -> Result<()> {
        if self.names_left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            self.left.store(-1, Ordering::SeqCst);
        }
        self.breathe()
    }

    fn breathe(&self) -> Result<()> {
        if self.left.fetch_sub(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        self.left.store(-1, Ordering::SeqCst);
        Err(Error::io("a process that was killed: changing a file", Errno::IO))
    }
}

impl Host for Mortal {
    fn writable(&self, file: &Arc<StoreFile>) -> Result<Arc<dyn WriteStorage>> {
        Ok(Arc::new(MortalFile { inner: ThisHost.writable(file)?, host: self.clone() }))
    }

    fn directory(&self, root: &Arc<Root>, descriptors: &Arc<Descriptors>) -> Arc<dyn Directory> {
        Arc::new(MortalNames { inner: ThisHost.directory(root, descriptors), host: self.clone() })
    }
}

struct MortalFile {
    inner: Arc<dyn WriteStorage>,
    host: Mortal,
}

impl Storage for MortalFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.inner.read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        self.inner.extent(at, end)
    }

    fn read_table_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.inner.read_table_at(at, buf)
    }

    fn open_file(&self) -> Option<Arc<OwnedFd>> {
        self.inner.open_file()
    }
}

impl WriteStorage for MortalFile {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.host.breathe()?;
        self.inner.write_at(at, bytes)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.host.breathe()?;
        self.inner.set_len(len)
    }

    fn punch_hole(&self, at: u64, len: u64) -> Result<()> {
        self.host.breathe()?;
        self.inner.punch_hole(at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.host.breathe()?;
        self.inner.write_zeroes(at, len)
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.host.breathe()?;
        self.inner.allocate(at, len)
    }

    fn reserve(&self, at: u64, len: u64) -> Result<()> {
        self.host.breathe()?;
        self.inner.reserve(at, len)
    }

    fn write_table_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.host.breathe()?;
        self.inner.write_table_at(at, bytes)
    }

    fn copy_from(&self, at: u64, source: &dyn Storage, from: u64, len: u64) -> Result<()> {
        self.host.breathe()?;
        self.inner.copy_from(at, source, from, len)
    }

    fn sync(&self) -> Result<()> {
        // The kernel has the writes; losses by a power cut are tested elsewhere, and syncs cost time.
        self.host.breathe()
    }
}

struct MortalNames {
    inner: Arc<dyn Directory>,
    host: Mortal,
}

impl Directory for MortalNames {
    fn create(&self, path: &Path, like: Option<&Path>) -> Result<Arc<dyn WriteStorage>> {
        self.host.name()?;
        Ok(Arc::new(MortalFile { inner: self.inner.create(path, like)?, host: self.host.clone() }))
    }

    fn create_directory(&self, path: &Path) -> Result<()> {
        self.host.name()?;
        self.inner.create_directory(path)
    }

    fn link(&self, from: &Path, to: &Path) -> Result<()> {
        self.host.name()?;
        self.inner.link(from, to)
    }

    fn rename(&self, from: &Path, to: &Path, existing: Existing) -> Result<()> {
        self.host.name()?;
        self.inner.rename(from, to, existing)
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        self.host.name()?;
        self.inner.unlink(path)
    }

    fn sync(&self, _path: &Path) -> Result<()> {
        self.host.breathe()
    }
}
