//! A guest's disk, held still while somebody looks into it.
//!
//! A frozen disk is what it is. An active one is held as it was when it was first looked into. Either is
//! opened, and its files are locked as for any reader, only while somebody has something open in it or is being
//! answered: whoever else wants the files gets them as soon as nobody looks.

use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::chain::Origin;
use crate::error::{ErrorKind, Result};
use crate::guest::source::within;
use crate::store::{Access, ActiveHandle, OpenDisk, PointInTimeView, Store, ViewId};

use super::worker::protocol::{CHUNK, ChunkKey};

/// For how long the bytes of an active disk are put aside after its last use.
const LINGER: Duration = Duration::from_secs(10);

/// A disk that is looked into.
pub(super) struct BrowsedDisk {
    store: Arc<Store>,
    id: ViewId,
    size: u64,
    /// What an active disk was when it was first opened here.
    still: Option<Arc<PointInTimeView>>,
    /// Whether another process writes it, so that nothing is known of what it was.
    is_forced: bool,
    /// Tells this active disk's chunks from all others'.
    number: u64,
    /// Bytes that have been read of all disks.
    read: Arc<AtomicU64>,
    open: Mutex<OpenDiskFn>,
}

struct OpenDiskFn {
    holders: usize,
    bytes: Option<Arc<DiskBytes>>,
    left: Instant,
}

/// Where a disk's bytes come from while it is held.
pub(super) enum DiskBytes {
    Frozen(Arc<OpenDisk>),
    Active(ActiveHandle, Arc<PointInTimeView>),
}

/// A disk that is held: open, and locked.
pub(super) struct LeasedDisk<'a> {
    disk: &'a BrowsedDisk,
    bytes: Arc<DiskBytes>,
}

impl Drop for LeasedDisk<'_> {
    fn drop(&mut self) {
        self.disk.release();
    }
}

/// What tells chunks apart.
#[derive(Debug)]
pub(super) struct Digests(RandomState, RandomState);

impl Digests {
    pub(super) fn new() -> Self {
        Self(RandomState::new(), RandomState::new())
    }

    fn key(&self, of: &impl Hash) -> ChunkKey {
        // Never the one that stands for zeroes.
        ChunkKey(self.0.hash_one(of).max(1), self.1.hash_one(of))
    }
}

impl BrowsedDisk {
    /// Opens a disk for the first time. What is read of it is added to `read`.
    pub(super) fn new(store: &Arc<Store>, id: &ViewId, read: &Arc<AtomicU64>) -> Result<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let (mut is_forced, mut bytes) = (false, None);
        let (size, still) = if id.is_active() {
            let handle = store.open_writable(id, Access::Read)?;
            let still = handle.hold_still()?;
            is_forced = handle.is_forced();
            if is_forced {
                // Another opening would be another disk: this one is kept, until it rests.
                bytes = Some(Arc::new(DiskBytes::Active(handle, Arc::clone(&still))));
            }
            (still.size(), Some(still))
        } else {
            (store.open_frozen(id)?.view().view.size(), None)
        };
        let open = Mutex::new(OpenDiskFn { holders: 0, bytes, left: Instant::now() });
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let (store, id, read) = (Arc::clone(store), id.clone(), Arc::clone(read));
        Ok(Self { store, id, size, still, is_forced, number, read, open })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn id(&self) -> &ViewId {
        &self.id
    }

    /// Holds it while that lives. `Stale` if it is not what it was.
    pub(super) fn hold(&self) -> Result<LeasedDisk<'_>> {
        Ok(LeasedDisk { disk: self, bytes: self.keep()? })
    }

    /// Opens it, unless somebody has done so, until [`BrowsedDisk::release`].
    pub(super) fn keep(&self) -> Result<Arc<DiskBytes>> {
        let mut open = self.open.lock();
        let bytes = match &open.bytes {
            Some(bytes) => Arc::clone(bytes),
            None => Arc::clone(open.bytes.insert(Arc::new(self.open()?))),
        };
        open.holders += 1;
        Ok(bytes)
    }

    /// Lets go of it; the last one closes it.
    pub(super) fn release(&self) {
        let mut open = self.open.lock();
        open.holders -= 1;
        // G4: the last one closes it.
        if open.holders == 0 {
            open.left = Instant::now();
            let bytes = open.bytes.take_if(|_| !self.is_forced);
            drop(open);
            // Not under the lock: closing may let go of many files.
            drop(bytes);
        }
    }

    fn open(&self) -> Result<DiskBytes> {
        let Some(still) = &self.still else { return self.store.open_frozen(&self.id).map(DiskBytes::Frozen) };
        let handle = self.store.open_writable(&self.id, Access::Read)?;
        handle.hold_again(still)?;
        Ok(DiskBytes::Active(handle, Arc::clone(still)))
    }

    /// Whether it is still known what the disk was; asked only of disks that are not held.
    pub(super) fn is_good(&self) -> bool {
        self.hold().is_ok()
    }

    /// Whether it is what it was, and nothing has been changed since.
    pub(super) fn is_unchanged(&self) -> bool {
        let Some(still) = &self.still else { return self.is_good() };
        // One that has grown has the bytes that it had, and more.
        let is_as_long = |held: LeasedDisk<'_>| match &*held.bytes {
            DiskBytes::Frozen(_) => true,
            DiskBytes::Active(handle, still) => handle.size().is_ok_and(|size| size == still.size()),
        };
        !self.is_forced && still.is_unchanged() && self.hold().is_ok_and(is_as_long)
    }

    /// Lets go of what is put aside for an active disk that nobody has looked into for a while.
    pub(super) fn rest(&self) {
        let mut open = self.open.lock();
        let Some(still) = self.still.as_ref().filter(|_| open.holders == 0 && open.left.elapsed() > LINGER) else {
            return;
        };
        self.store.let_go_of_still(&self.id, still);
        let bytes = open.bytes.take();
        drop(open);
        drop(bytes);
    }
}

impl LeasedDisk<'_> {
    /// Fills `buf` with the bytes at `at`; `Corrupt` if the range does not lie within the disk.
    pub(super) fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.disk.size, at, buf.len())?;
        self.disk.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
        match &*self.bytes {
            DiskBytes::Frozen(open) => {
                let open = open.view();
                // A file that was replaced may make it shorter.
                within(open.view.size(), at, buf.len())?;
                open.view.read_at(at, buf)
            }
            DiskBytes::Active(handle, still) => handle.read_still(still, at, buf),
        }
    }

    /// Keys of chunks: the same one only where there are the same bytes.
    pub(super) fn keys(&self, digests: &Digests, first: u64, count: u64) -> Result<Vec<ChunkKey>> {
        let size = self.disk.size;
        (first..first.saturating_add(count))
            .take_while(|chunk| chunk.checked_mul(CHUNK).is_some_and(|start| start < size))
            .map(|chunk| {
                let start = chunk * CHUNK;
                let origins = match &*self.bytes {
                    DiskBytes::Frozen(open) => open.view().view.origins(start, CHUNK.min(size - start)).map(Some),
                    DiskBytes::Active(handle, still) => handle.origins_below(still, start, CHUNK.min(size - start)),
                };
                match origins {
                    Ok(Some(origins)) if origins.iter().all(|origin| origin.image == 0) => Ok(ChunkKey::ZERO),
                    Ok(Some(origins)) => Ok(digests.key(&origins)),
                    Ok(None) => Ok(digests.key(&(self.disk.number, chunk))),
                    // Whoever reads this chunk is told of the damage; its neighbours are good.
                    Err(error) if error.kind() == ErrorKind::Corrupt => Ok(digests.key(&(self.disk.number, chunk))),
                    Err(error) => Err(error),
                }
            })
            .collect()
    }

    /// Where the bytes from `at` on come from, for at most `max` of them; `None` where only reading can tell.
    pub(super) fn origin(&self, at: u64, max: u64) -> Result<Option<Origin>> {
        let found = match &*self.bytes {
            DiskBytes::Frozen(open) => {
                let open = open.view();
                if at >= open.view.size() {
                    return Ok(None);
                }
                open.view.origin(at, max).map(Some)
            }
            DiskBytes::Active(handle, still) => handle.origin_still(still, at, max),
        };
        match found {
            // Whoever reads there is told of the damage.
            Err(error) if error.kind() == ErrorKind::Corrupt => Ok(None),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::OneDisk;

    #[test]
    fn a_disk_that_has_grown_is_not_what_it_was() {
        let OneDisk { store, id, .. } = &OneDisk::new(1 << 20);
        let writer = store.open_writable(id, Access::Write).unwrap();
        let disk = BrowsedDisk::new(store, id, &Arc::default()).unwrap();
        assert!(disk.is_unchanged());
        writer.set_size(2 << 20).unwrap();
        assert!(disk.is_good() && !disk.is_unchanged());
        assert!(BrowsedDisk::new(store, id, &Arc::default()).unwrap().is_unchanged());
    }
}
