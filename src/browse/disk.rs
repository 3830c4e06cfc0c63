//! A guest's disk at one point in time.
//!
//! A frozen disk never changes. An active one is shown as it was when it was first opened here. Either is
//! opened, and its files are locked as for any reader, only while a client has something open on it or a
//! request is in progress; otherwise other processes can have the files.

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

/// How long the before-images of an active disk are kept after its last use.
const LINGER: Duration = Duration::from_secs(10);

/// A disk that is browsed.
pub(super) struct BrowsedDisk {
    store: Arc<Store>,
    id: ViewId,
    size: u64,
    /// The point in time of an active disk: its first open here.
    point_in_time: Option<Arc<PointInTimeView>>,
    /// Whether another process writes it, so that no before-images exist.
    is_forced: bool,
    /// Distinguishes this active disk's chunks from all others.
    number: u64,
    /// Counts the bytes read from all disks.
    read: Arc<AtomicU64>,
    open: Mutex<LeaseState>,
}

struct LeaseState {
    lease_count: usize,
    bytes: Option<Arc<DiskBytes>>,
    last_released: Instant,
}

/// The source of a disk's bytes while it is leased.
pub(super) enum DiskBytes {
    Frozen(Arc<OpenDisk>),
    Active(ActiveHandle, Arc<PointInTimeView>),
}

/// A leased disk: open, and locked.
pub(super) struct LeasedDisk<'a> {
    disk: &'a BrowsedDisk,
    bytes: Arc<DiskBytes>,
}

impl Drop for LeasedDisk<'_> {
    fn drop(&mut self) {
        self.disk.release();
    }
}

/// Computes the keys of chunks.
#[derive(Debug)]
pub(super) struct Digests(RandomState, RandomState);

impl Digests {
    pub(super) fn new() -> Self {
        Self(RandomState::new(), RandomState::new())
    }

    fn key(&self, of: &impl Hash) -> ChunkKey {
        // Never the key of a chunk of zeroes.
        ChunkKey(self.0.hash_one(of).max(1), self.1.hash_one(of))
    }
}

impl BrowsedDisk {
    /// Opens a disk for the first time. Bytes read from it are added to `read`.
    pub(super) fn new(store: &Arc<Store>, id: &ViewId, read: &Arc<AtomicU64>) -> Result<Self> {
        static NUMBERS: AtomicU64 = AtomicU64::new(1);
        let (mut is_forced, mut bytes) = (false, None);
        let (size, point_in_time) = if id.is_active() {
            let handle = store.open_writable(id, Access::Read)?;
            let point_in_time = handle.point_in_time_view()?;
            is_forced = handle.is_forced();
            if is_forced {
                // A second open would show another state: this one is kept open until the disk is idle.
                bytes = Some(Arc::new(DiskBytes::Active(handle, Arc::clone(&point_in_time))));
            }
            (point_in_time.size(), Some(point_in_time))
        } else {
            (store.open_frozen(id)?.view().view.size(), None)
        };
        let open = Mutex::new(LeaseState { lease_count: 0, bytes, last_released: Instant::now() });
        let number = NUMBERS.fetch_add(1, Ordering::Relaxed);
        let (store, id, read) = (Arc::clone(store), id.clone(), Arc::clone(read));
        Ok(Self { store, id, size, point_in_time, is_forced, number, read, open })
    }

    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn id(&self) -> &ViewId {
        &self.id
    }

    /// Leases the disk until the result is dropped. `Stale` if its point in time is no longer known.
    pub(super) fn lease(&self) -> Result<LeasedDisk<'_>> {
        Ok(LeasedDisk { disk: self, bytes: self.acquire()? })
    }

    /// Opens the disk, unless it is open, until [`BrowsedDisk::release`].
    pub(super) fn acquire(&self) -> Result<Arc<DiskBytes>> {
        let mut open = self.open.lock();
        let bytes = match &open.bytes {
            Some(bytes) => Arc::clone(bytes),
            None => Arc::clone(open.bytes.insert(Arc::new(self.open()?))),
        };
        open.lease_count += 1;
        Ok(bytes)
    }

    /// Ends one lease; the last one closes the disk.
    pub(super) fn release(&self) {
        let mut open = self.open.lock();
        open.lease_count -= 1;
        // G4: the last lease closes the disk.
        if open.lease_count == 0 {
            open.last_released = Instant::now();
            let bytes = open.bytes.take_if(|_| !self.is_forced);
            drop(open);
            // Not under the lock: closing may release many files.
            drop(bytes);
        }
    }

    fn open(&self) -> Result<DiskBytes> {
        let Some(point_in_time) = &self.point_in_time else {
            return self.store.open_frozen(&self.id).map(DiskBytes::Frozen);
        };
        let handle = self.store.open_writable(&self.id, Access::Read)?;
        handle.resume_view(point_in_time)?;
        Ok(DiskBytes::Active(handle, Arc::clone(point_in_time)))
    }

    /// Whether the disk's point in time is still known; called only for disks without a lease.
    pub(super) fn is_valid(&self) -> bool {
        self.lease().is_ok()
    }

    /// Whether the disk is the same as at its point in time.
    pub(super) fn is_unchanged(&self) -> bool {
        let Some(point_in_time) = &self.point_in_time else { return self.is_valid() };
        // A disk that has grown still has its earlier bytes.
        let is_as_long = |held: LeasedDisk<'_>| match &*held.bytes {
            DiskBytes::Frozen(_) => true,
            DiskBytes::Active(handle, point_in_time) => {
                handle.size().is_ok_and(|size| size == point_in_time.size())
            }
        };
        !self.is_forced && point_in_time.is_unchanged() && self.lease().is_ok_and(is_as_long)
    }

    /// Discards the before-images of an active disk that was not used for a while.
    pub(super) fn release_idle(&self) {
        let mut open = self.open.lock();
        let Some(point_in_time) = self
            .point_in_time
            .as_ref()
            .filter(|_| open.lease_count == 0 && open.last_released.elapsed() > LINGER)
        else {
            return;
        };
        self.store.release_view(&self.id, point_in_time);
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
                // A replaced file may have made the disk shorter.
                within(open.view.size(), at, buf.len())?;
                open.view.read_at(at, buf)
            }
            DiskBytes::Active(handle, point_in_time) => handle.read_view(point_in_time, at, buf),
        }
    }

    /// Keys of chunks: equal keys only for equal bytes.
    pub(super) fn keys(&self, digests: &Digests, first: u64, count: u64) -> Result<Vec<ChunkKey>> {
        let size = self.disk.size;
        (first..first.saturating_add(count))
            .take_while(|chunk| chunk.checked_mul(CHUNK).is_some_and(|start| start < size))
            .map(|chunk| {
                let start = chunk * CHUNK;
                let origins = match &*self.bytes {
                    DiskBytes::Frozen(open) => {
                        open.view().view.origins(start, CHUNK.min(size - start)).map(Some)
                    }
                    DiskBytes::Active(handle, point_in_time) => {
                        handle.origins_below(point_in_time, start, CHUNK.min(size - start))
                    }
                };
                match origins {
                    Ok(Some(origins)) if origins.iter().all(|origin| origin.image == 0) => Ok(ChunkKey::ZERO),
                    Ok(Some(origins)) => Ok(digests.key(&origins)),
                    Ok(None) => Ok(digests.key(&(self.disk.number, chunk))),
                    // Reading this chunk reports the damage; its neighbours are good.
                    Err(error) if error.kind() == ErrorKind::Corrupt => {
                        Ok(digests.key(&(self.disk.number, chunk)))
                    }
                    Err(error) => Err(error),
                }
            })
            .collect()
    }

    /// The origin of the bytes from `at` on, for at most `max` of them; `None` where it is unknown without
    /// reading.
    pub(super) fn origin(&self, at: u64, max: u64) -> Result<Option<Origin>> {
        let found = match &*self.bytes {
            DiskBytes::Frozen(open) => {
                let open = open.view();
                if at >= open.view.size() {
                    return Ok(None);
                }
                open.view.origin(at, max).map(Some)
            }
            DiskBytes::Active(handle, point_in_time) => handle.view_origin(point_in_time, at, max),
        };
        match found {
            // Reading there reports the damage.
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
    fn a_grown_disk_is_valid_but_changed() {
        let OneDisk { store, id, .. } = &OneDisk::new(1 << 20);
        let writer = store.open_writable(id, Access::Write).unwrap();
        let disk = BrowsedDisk::new(store, id, &Arc::default()).unwrap();
        assert!(disk.is_unchanged());
        writer.set_size(2 << 20).unwrap();
        assert!(disk.is_valid() && !disk.is_unchanged());
        assert!(BrowsedDisk::new(store, id, &Arc::default()).unwrap().is_unchanged());
    }
}
