//! Stores whose changes go through a test's hands: counted, recorded, or broken.
//!
//! [`wrap`] stands around the local directory. Listings, and changes of images' bytes and of names, go
//! through the [`Hands`] of a test; all else is the directory's own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use chainfs::error::{Error, Result};
use chainfs::io::{
    Backend, Changes, Directory, Existing, Identity, LocalDirectory, LocalFile, MountPoints, ObjectLocks,
    ObjectStat, OpenDirectory, OpenObject, Permissions, Space, Storage, WriteObject, WriteStorage,
};
use chainfs::units::{BlockStatus, Run};
use rustix::io::Errno;

/// What a test does with the changes of a store.
pub trait Hands: Send + Sync + 'static {
    /// Stands around an image that is open for writing.
    fn image(&self, opened: Arc<dyn WriteObject>) -> Arc<dyn WriteStorage> {
        opened
    }

    /// Stands around the names.
    fn names(&self, names: Arc<dyn Directory>) -> Arc<dyn Directory> {
        names
    }

    /// Stands around a directory that is open for listing.
    fn listing(&self, opened: Box<dyn OpenDirectory>) -> Box<dyn OpenDirectory> {
        opened
    }
}

/// The directory, with its changes in these hands.
pub fn wrap(directory: &Path, hands: impl Hands) -> Result<Arc<dyn Backend>> {
    Ok(Arc::new(Wrapped { inner: LocalDirectory::open(directory)?, hands }))
}

struct Wrapped<H> {
    inner: Arc<dyn Backend>,
    hands: H,
}

impl<H: Hands> Backend for Wrapped<H> {
    fn given(&self) -> &Path {
        self.inner.given()
    }

    fn canonical(&self) -> &Path {
        self.inner.canonical()
    }

    fn open_directory(&self, path: &Path, mounts: MountPoints) -> Result<Option<Box<dyn OpenDirectory>>> {
        Ok(self.inner.open_directory(path, mounts)?.map(|opened| self.hands.listing(opened)))
    }

    fn stat(&self, path: &Path) -> Result<ObjectStat> {
        self.inner.stat(path)
    }

    fn stat_itself(&self, path: &Path) -> Result<ObjectStat> {
        self.inner.stat_itself(path)
    }

    fn identify(&self, path: &Path) -> Result<Identity> {
        self.inner.identify(path)
    }

    fn is_real_directory(&self, path: &Path) -> bool {
        self.inner.is_real_directory(path)
    }

    fn link_target(&self, path: &Path) -> Option<PathBuf> {
        self.inner.link_target(path)
    }

    fn open_file(&self, path: &Path) -> Result<Arc<dyn OpenObject>> {
        self.inner.open_file(path)
    }

    fn open_file_for_writing(&self, path: &Path) -> Result<Arc<dyn WriteObject>> {
        let opened = self.inner.open_file_for_writing(path)?;
        // Locks and notes of chainfs itself are no images.
        if [".chainfs", ".chainfs-intents", ".chainfs-lock"].iter().any(|own| path.starts_with(own)) {
            return Ok(opened);
        }
        Ok(Arc::new(WrappedObject { image: self.hands.image(Arc::clone(&opened)), opened }))
    }

    fn names(&self) -> Option<Arc<dyn Directory>> {
        Some(self.hands.names(self.inner.names()?))
    }

    fn changes(&self) -> Option<Arc<dyn Changes>> {
        self.inner.changes()
    }

    fn permissions(&self, path: &Path) -> Result<Permissions> {
        self.inner.permissions(path)
    }

    fn permissions_above(&self) -> Result<Vec<Permissions>> {
        self.inner.permissions_above()
    }

    fn steps(&self, path: &Path) -> Result<(Vec<PathBuf>, PathBuf)> {
        self.inner.steps(path)
    }

    fn shares_blocks(&self) -> bool {
        self.inner.shares_blocks()
    }

    fn has_remote_writers(&self) -> bool {
        self.inner.has_remote_writers()
    }

    fn space(&self) -> Result<Space> {
        self.inner.space()
    }
}

/// An image that is open for writing, and what stands around it.
struct WrappedObject {
    opened: Arc<dyn WriteObject>,
    image: Arc<dyn WriteStorage>,
}

impl OpenObject for WrappedObject {
    fn stat(&self) -> Result<ObjectStat> {
        self.opened.stat()
    }

    fn identity(&self) -> Result<Identity> {
        self.opened.identity()
    }

    fn free_space(&self) -> Result<u64> {
        self.opened.free_space()
    }

    fn locks(&self) -> &dyn ObjectLocks {
        self.opened.locks()
    }

    fn reopen_for_writing(&self) -> Result<Arc<dyn WriteObject>> {
        self.opened.reopen_for_writing()
    }
}

impl Storage for WrappedObject {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.image.read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        self.image.len()
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        self.image.extent(at, end)
    }

    fn read_table_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.image.read_table_at(at, buf)
    }

    fn local_file(&self) -> Option<LocalFile> {
        self.image.local_file()
    }
}

impl WriteStorage for WrappedObject {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.image.write_at(at, bytes)
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.image.set_len(len)
    }

    fn punch_hole(&self, at: u64, len: u64) -> Result<()> {
        self.image.punch_hole(at, len)
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.image.write_zeroes(at, len)
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.image.allocate(at, len)
    }

    fn reserve(&self, at: u64, len: u64) -> Result<()> {
        self.image.reserve(at, len)
    }

    fn write_table_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.image.write_table_at(at, bytes)
    }

    fn copy_from(&self, at: u64, source: &dyn Storage, from: u64, len: u64) -> Result<()> {
        self.image.copy_from(at, source, from, len)
    }

    fn sync(&self) -> Result<()> {
        self.image.sync()
    }
}

/// The real machine, until its time is up: from then on no change of a store is done any more, as if the
/// process had been killed.
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

    /// Opens a directory of a store in its hands.
    pub fn open(&self, directory: &Path) -> Result<Arc<dyn Backend>> {
        wrap(directory, self.clone())
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

impl Hands for Mortal {
    fn image(&self, opened: Arc<dyn WriteObject>) -> Arc<dyn WriteStorage> {
        Arc::new(MortalFile { inner: opened, host: self.clone() })
    }

    fn names(&self, inner: Arc<dyn Directory>) -> Arc<dyn Directory> {
        Arc::new(MortalNames { inner, host: self.clone() })
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

    fn local_file(&self) -> Option<LocalFile> {
        self.inner.local_file()
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
