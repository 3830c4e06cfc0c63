//! An active disk, held still: what it was at one moment, for those who read it as a whole while it is
//! written.
//!
//! Before anything is changed, the bytes that it had are put aside, in memory and within a limit; whoever
//! reads is given those, or else what the disk still has. Promise: a read gives the bytes of that moment, or
//! `Stale`, never anything else. The one who writes is never refused because of it.
//!
//! A still is kept up only while the disk is in use in this process. Once it is not, what was not changed
//! before can go on as soon as somebody opens the disk and finds it unchanged.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use crate::chain::Origin;
use crate::error::Result;

use super::super::Store;
use super::super::identity::{ViewId, ViewIdentity, stale};
use super::{ActiveDisk, ActiveHandle, DiskState, WritingDisk};

/// Bytes that are put aside as one.
const CHUNK: u64 = 1 << 16;
/// Chunks that are put aside for all stills of one disk, at most. Whoever reads more slowly than the guest
/// changes that much has to begin again.
const KEPT_COUNT: usize = (256 << 20) / CHUNK as usize;

/// A disk as it was at one moment.
pub struct PointInTimeView {
    size: u64,
    kept: Mutex<ViewContent>,
}

impl std::fmt::Debug for PointInTimeView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Still").field("size", &self.size).finish_non_exhaustive()
    }
}

struct ViewContent {
    /// What the disk had where it has been changed since.
    chunks: HashMap<u64, Box<[u8]>>,
    hold: ChangeTracking,
}

impl ViewContent {
    fn lose(&mut self) {
        self.hold = ChangeTracking::Lost;
        self.chunks = HashMap::new();
    }
}

/// How sure it is that all changes are known of.
enum ChangeTracking {
    /// They are: each passes by here first.
    Held,
    /// Nobody looks. There were none as long as the disk's version is this one.
    Loose(WriteVersion),
    /// There were some that are not known.
    Lost,
}

/// What was written when: equal only if nothing was written in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WriteVersion {
    fingerprint: u64,
    changes: u64,
}

/// The stills of one disk. A leaf, but for the writer's own locks.
#[derive(Default)]
pub(super) struct BeforeImages {
    /// Whether there are any: writers ask each time.
    any: AtomicBool,
    /// In the order in which they began to be held. Taken before the lock of any of them.
    held: Mutex<Vec<Weak<PointInTimeView>>>,
    /// Changes since the disk began to be written.
    changes: AtomicU64,
}

impl PointInTimeView {
    /// Bytes of the disk then.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the disk is known to be still what it was.
    pub fn is_unchanged(&self) -> bool {
        let kept = self.kept.lock();
        kept.chunks.is_empty() && !matches!(kept.hold, ChangeTracking::Lost)
    }

    /// Whether the disk is what it was, as far as this process has a say, and any change would be known of.
    fn is_held_unchanged(&self) -> bool {
        let kept = self.kept.lock();
        kept.chunks.is_empty() && matches!(kept.hold, ChangeTracking::Held)
    }

    fn lose(&self) {
        self.kept.lock().lose();
    }

    /// Nobody looks from here on; the disk is at `version`, or nobody knows.
    fn loosen(&self, version: Option<WriteVersion>) {
        let mut kept = self.kept.lock();
        match version {
            Some(version) if kept.chunks.is_empty() && !matches!(kept.hold, ChangeTracking::Lost) => {
                kept.hold = ChangeTracking::Loose(version);
            }
            _ => {
                kept.hold = ChangeTracking::Lost;
                kept.chunks = HashMap::new();
            }
        }
    }

    /// The chunks of it that a range touches.
    fn touched(&self, at: u64, len: u64) -> Range<u64> {
        let end = at.saturating_add(len).min(self.size);
        if at < end { at / CHUNK..end.div_ceil(CHUNK) } else { 0..0 }
    }

    /// How many chunks are put aside.
    fn kept_count(&self) -> usize {
        self.kept.lock().chunks.len()
    }

    /// How many would be if `touched` were to be changed; as many as never are if that is more than can be.
    fn count_with(&self, touched: &Range<u64>) -> usize {
        let kept = self.kept.lock();
        if matches!(kept.hold, ChangeTracking::Lost) {
            return kept.chunks.len();
        }
        // Asked first: whoever discards a disk does not wait until all of its chunks have been counted.
        if touched.end - touched.start > 2 * KEPT_COUNT as u64 {
            return usize::MAX;
        }
        kept.chunks.len() + touched.clone().filter(|chunk| !kept.chunks.contains_key(chunk)).count()
    }

    /// Puts aside what is about to be changed.
    fn keep(&self, touched: Range<u64>, read: &dyn Fn(u64, &mut [u8]) -> Result<()>) {
        let mut kept = self.kept.lock();
        if matches!(kept.hold, ChangeTracking::Lost) {
            return;
        }
        if !self.keep_all(&mut kept, touched, read) {
            kept.lose();
        }
    }

    fn keep_all(
        &self,
        kept: &mut ViewContent,
        touched: Range<u64>,
        read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
    ) -> bool {
        for chunk in touched {
            if kept.chunks.contains_key(&chunk) {
                continue;
            }
            let start = chunk * CHUNK;
            let mut bytes = vec![0; CHUNK.min(self.size - start) as usize].into_boxed_slice();
            if read(start, &mut bytes).is_err() {
                return false;
            }
            kept.chunks.insert(chunk, bytes);
        }
        true
    }

    /// Fills `buf`, which lies within the disk and within one chunk.
    fn read_chunk(&self, at: u64, buf: &mut [u8], read: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        let (chunk, within) = (at / CHUNK, (at % CHUNK) as usize);
        if !self.copy_kept(chunk, within, buf)? {
            read(buf)?;
            // What has been put aside by now may have been changed while it was read; what has not, has not.
            self.copy_kept(chunk, within, buf)?;
        }
        Ok(())
    }

    fn copy_kept(&self, chunk: u64, within: usize, buf: &mut [u8]) -> Result<bool> {
        let kept = self.kept.lock();
        if !matches!(kept.hold, ChangeTracking::Held) {
            return Err(lost());
        }
        let Some(bytes) = kept.chunks.get(&chunk) else { return Ok(false) };
        buf.copy_from_slice(&bytes[within..within + buf.len()]);
        Ok(true)
    }
}

fn lost() -> crate::error::Error {
    stale("the active disk has been changed too much since it was looked into")
}

impl BeforeImages {
    /// Of a disk that begins to be written.
    pub(super) fn begin(&self) {
        self.changes.store(0, Ordering::Release);
    }

    /// A change is about to be made.
    pub(super) fn before_change(&self, writing: &WritingDisk, at: u64, len: u64) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        // Locked to the end: there is room for so much of all of them, whoever else writes.
        let held = self.held.lock();
        let all: Vec<Arc<PointInTimeView>> = held.iter().filter_map(Weak::upgrade).collect();
        self.any.store(!all.is_empty(), Ordering::Release);
        let mut total: usize = all.iter().map(|still| still.kept_count()).sum();
        // The last first: where there is no room for all of them, those go that have had the most time.
        for (index, still) in all.iter().enumerate().rev() {
            let touched = still.touched(at, len);
            let (wanted, mut others) = (still.count_with(&touched), total - still.kept_count());
            let is_too_much = |others: usize| wanted.saturating_add(others) > KEPT_COUNT;
            for older in &all[..index] {
                let count = older.kept_count();
                if count > 0 && wanted <= KEPT_COUNT && is_too_much(others) {
                    older.lose();
                    others -= count;
                }
            }
            // G5: the view is lost; the write goes on.
            if is_too_much(others) {
                still.lose();
            } else {
                still.keep(touched, &|at, buf| writing.writer.read_at(at, buf));
            }
            total = others + still.kept_count();
        }
    }

    /// Of a disk that others may have changed.
    pub(super) fn lose(&self) {
        for still in self.held.lock().drain(..).filter_map(|still| still.upgrade()) {
            still.lose();
        }
    }

    /// Of a disk that nobody uses any more and that is at `version`.
    pub(super) fn end(&self, version: Option<WriteVersion>) {
        for still in self.held.lock().drain(..).filter_map(|still| still.upgrade()) {
            still.loosen(version);
        }
    }

    fn add(&self, still: &Arc<PointInTimeView>) {
        let mut held = self.held.lock();
        held.retain(|other| other.strong_count() > 0 && !std::ptr::eq(other.as_ptr(), Arc::as_ptr(still)));
        held.push(Arc::downgrade(still));
        self.any.store(true, Ordering::Release);
    }

    /// Stops looking after a still.
    fn remove(&self, still: &Arc<PointInTimeView>, version: Option<WriteVersion>) {
        let mut held = self.held.lock();
        let before = held.len();
        held.retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(still)));
        if held.len() < before {
            still.loosen(version);
        }
    }

    fn version(&self, state: &DiskState) -> Option<WriteVersion> {
        match state {
            DiskState::Reading(open) => Some(WriteVersion { fingerprint: open.fingerprint, changes: 0 }),
            DiskState::Writing(writing) => Some(WriteVersion {
                fingerprint: writing.open.fingerprint,
                changes: self.changes.load(Ordering::Acquire),
            }),
            DiskState::Closed(_) | DiskState::Failed(_) => None,
        }
    }
}

impl ActiveDisk {
    pub(super) fn version(&self, state: &DiskState) -> Option<WriteVersion> {
        self.stills.version(state)
    }
}

impl Store {
    /// Stops looking after a still of that disk: writing costs nothing more because of it. It goes on with
    /// [`ActiveHandle::hold_again`], if nothing is changed meanwhile.
    pub fn let_go_of_still(&self, id: &ViewId, still: &Arc<PointInTimeView>) {
        let ViewIdentity::Active(number) = id.part else { return };
        // Whoever asks again and again keeps nobody waiting.
        if !matches!(still.kept.lock().hold, ChangeTracking::Held) {
            return;
        }
        if let Some(disk) = self.active.find(number) {
            let state = disk.state.write();
            disk.stills.remove(still, disk.version(&state));
        }
    }
}

impl ActiveHandle {
    /// The disk as it is now.
    pub fn hold_still(&self) -> Result<Arc<PointInTimeView>> {
        let size = self.size()?;
        // Alone: no write is under way that has not been seen.
        let state = self.disk.state.write();
        let still = Arc::new(PointInTimeView {
            size,
            kept: Mutex::new(ViewContent { chunks: HashMap::new(), hold: ChangeTracking::Held }),
        });
        self.disk.stills.add(&still);
        drop(state);
        Ok(still)
    }

    /// Goes on with a still that was let go of; `Stale` if the disk has been changed since.
    pub fn hold_again(&self, still: &Arc<PointInTimeView>) -> Result<()> {
        let state = self.disk.state.write();
        let version = self.disk.version(&state);
        let mut kept = still.kept.lock();
        match kept.hold {
            ChangeTracking::Held => {}
            ChangeTracking::Loose(then) if Some(then) == version => kept.hold = ChangeTracking::Held,
            ChangeTracking::Loose(_) | ChangeTracking::Lost => {
                kept.hold = ChangeTracking::Lost;
                return Err(lost());
            }
        }
        drop(kept);
        self.disk.stills.add(still);
        drop(state);
        Ok(())
    }

    /// Fills `buf` with what the disk had at `at`. The range must lie within the still.
    pub fn read_still(&self, still: &PointInTimeView, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut rest = buf;
        let mut at = at;
        while !rest.is_empty() {
            let len = rest.len().min((CHUNK - at % CHUNK) as usize);
            let (piece, more) = rest.split_at_mut(len);
            // G2: the before-image where there is one; `Stale` where it was lost.
            still.read_chunk(at, piece, |piece| {
                let mut done = 0;
                while done < len {
                    // Short where the rest is damaged: asked for that alone, it says so.
                    match self.read_at(at + done as u64, &mut piece[done..])? {
                        // A disk that was made shorter ends within the still.
                        0 => return Err(lost()),
                        more => done += more,
                    }
                }
                Ok(())
            })?;
            (rest, at) = (more, at + len as u64);
        }
        Ok(())
    }

    /// Where the bytes that a still shows from `at` on come from, for at most `max` of them; `None` where
    /// only reading can tell, as while the disk is written here. Of a disk that is read by force only what
    /// lies below its top layer is told.
    pub fn origin_still(&self, still: &PointInTimeView, at: u64, max: u64) -> Result<Option<Origin>> {
        // Held over the look: nobody begins to write meanwhile.
        let DiskState::Reading(open) = &*self.disk.state.read() else { return Ok(None) };
        if !still.is_held_unchanged() || at >= open.view.size() {
            return Ok(None);
        }
        let origin = open.view.origin(at, max)?;
        let may_change = open.forced.is_some() && origin.image == open.top.image.serial();
        Ok((!may_change).then_some(origin))
    }

    /// The origins of a range that a still shows, if all of it comes from below the disk's top layer: those
    /// places keep their bytes also when the disk is written later.
    pub fn origins_below(&self, still: &PointInTimeView, at: u64, len: u64) -> Result<Option<Vec<Origin>>> {
        let DiskState::Reading(open) = &*self.disk.state.read() else { return Ok(None) };
        if open.forced.is_some()
            || !still.is_held_unchanged()
            || at.checked_add(len).is_none_or(|end| end > open.view.size())
        {
            return Ok(None);
        }
        let origins = open.view.origins(at, len)?;
        let top = open.top.image.serial();
        Ok(Some(origins).filter(|origins| origins.iter().all(|origin| origin.image != top)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::image::write::Zeroing;
    use crate::store::Access;
    use crate::store::testing::OneDisk;

    const SIZE: u64 = 4 << 20;

    fn pattern(seed: u64, len: usize) -> Vec<u8> {
        let mut state = seed * 2 + 1;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u8
        };
        (0..len).map(|_| next()).collect()
    }

    #[test]
    fn what_is_read_is_what_the_disk_was_whoever_writes_meanwhile() {
        let OneDisk { store, id, .. } = &OneDisk::new(SIZE);
        let writer = store.open_writable(id, Access::ReadWrite).unwrap();
        let before = pattern(1, SIZE as usize / 2);
        writer.write_at(0, &before).unwrap();
        let reader = store.open_writable(id, Access::Read).unwrap();
        let still = reader.hold_still().unwrap();
        std::thread::scope(|scope| {
            for thread in 0..3_u64 {
                let writer = &writer;
                scope.spawn(move || {
                    for round in 0..200 {
                        let at = (round * 104_729 + thread * 611_953) % SIZE;
                        if round % 7 == 0 {
                            writer.zero(at, 100_000, Zeroing::Unmap).unwrap();
                        } else {
                            writer.write_at(at, &pattern(round + 100 * thread, 5_000)).unwrap();
                        }
                    }
                });
            }
            for round in 0..200_u64 {
                let mut buf = vec![0; 70_000];
                let at = (round * 15_485_863) % (SIZE - buf.len() as u64);
                reader.read_still(&still, at, &mut buf).unwrap();
                let expected = (at..at + 70_000).map(|at| before.get(at as usize).copied().unwrap_or(0));
                assert!(buf.iter().copied().eq(expected), "at {at:#x}");
            }
        });
        assert!(!still.is_unchanged());
        let mut now = [0; 5_000];
        writer.read_at(0, &mut now).unwrap();
        assert!(now[..] != before[..5_000], "it was written indeed");
    }

    #[test]
    fn a_still_goes_on_after_a_pause_only_if_nothing_was_changed() {
        let OneDisk { store, id, .. } = &OneDisk::new(SIZE);
        let read = |still: &Arc<PointInTimeView>| -> Result<()> {
            let reader = store.open_writable(id, Access::Read)?;
            reader.hold_again(still)?;
            reader.read_still(still, 0, &mut [0; 100])
        };
        let still = store.open_writable(id, Access::Read).unwrap().hold_still().unwrap();
        read(&still).unwrap();
        let writer = store.open_writable(id, Access::ReadWrite).unwrap();
        read(&still).unwrap();
        store.let_go_of_still(id, &still);
        read(&still).unwrap();
        // While it is looked after, changes pass by it; while it is not, they end it.
        writer.write_at(0, b"changed").unwrap();
        read(&still).unwrap();
        let second = store.open_writable(id, Access::Read).unwrap().hold_still().unwrap();
        store.let_go_of_still(id, &second);
        writer.write_at(0, b"once more").unwrap();
        for still in [&second, &second] {
            assert_eq!(read(still).unwrap_err().kind(), ErrorKind::Stale);
        }
        let third = store.open_writable(id, Access::Read).unwrap().hold_still().unwrap();
        drop(writer);
        // Of the first, what it was is put aside only while somebody has the disk open.
        assert_eq!(read(&still).unwrap_err().kind(), ErrorKind::Stale);
        let writer = store.open_writable(id, Access::Write).unwrap();
        writer.write_at(SIZE - 10, b"the end").unwrap();
        drop(writer);
        assert_eq!(read(&third).unwrap_err().kind(), ErrorKind::Stale);
    }

    #[test]
    fn what_is_damaged_is_an_error_of_its_own_and_not_a_disk_that_has_changed() {
        let OneDisk { directory, store, id } = &OneDisk::new(SIZE);
        let writer = store.open_writable(id, Access::Write).unwrap();
        writer.write_at(0, &pattern(1, 2 << 16)).unwrap();
        drop(writer);
        // The second cluster was the last to be taken: where the file ends now, it is cut off in its middle.
        let file = std::fs::File::options().write(true).open(directory.path().join("a.qcow2")).unwrap();
        file.set_len(file.metadata().unwrap().len() - (1 << 15)).unwrap();
        store.rescan().unwrap();
        let reader = store.open_writable(id, Access::Read).unwrap();
        let still = reader.hold_still().unwrap();
        let damaged = reader.read_still(&still, 1 << 16, &mut vec![0; 1 << 16]).unwrap_err();
        assert_ne!(damaged.kind(), ErrorKind::Stale, "{damaged}");
        reader.read_still(&still, 1 << 16, &mut vec![0; 1 << 15]).unwrap();
        assert!(still.is_unchanged());
    }

    #[test]
    // G5
    fn who_changes_too_much_ends_the_still_and_is_never_refused() {
        let OneDisk { store, id, .. } = &OneDisk::new(SIZE);
        let writer = store.open_writable(id, Access::ReadWrite).unwrap();
        writer.set_size(1 << 30).unwrap();
        let still = writer.hold_still().unwrap();
        writer.zero(0, 1 << 30, Zeroing::Unmap).unwrap();
        assert_eq!(writer.read_still(&still, 0, &mut [0; 10]).unwrap_err().kind(), ErrorKind::Stale);
        assert!(still.kept.lock().chunks.is_empty());
    }

    #[test]
    fn however_many_look_a_disk_costs_no_more_than_one_of_them_and_the_last_are_served() {
        let OneDisk { store, id, .. } = &OneDisk::new(SIZE);
        let writer = store.open_writable(id, Access::ReadWrite).unwrap();
        writer.set_size(1 << 30).unwrap();
        let stills: Vec<_> = (0..6).map(|_| writer.hold_still().unwrap()).collect();
        let kept = || stills.iter().map(|still| still.kept.lock().chunks.len()).sum::<usize>();
        for round in 0..10 {
            writer.zero(round * (10 << 20), 10 << 20, Zeroing::Unmap).unwrap();
            assert!(kept() <= KEPT_COUNT, "{} in round {round}", kept());
        }
        let is_good = |still: &&Arc<PointInTimeView>| writer.read_still(still, 0, &mut [0; 10]).is_ok();
        assert_eq!(stills.iter().rev().take_while(is_good).count(), 2);
        assert_eq!(stills.iter().filter(is_good).count(), 2);
    }
}
