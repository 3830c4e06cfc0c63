//! Point-in-time views of an active disk: its bytes as of one moment, for readers that need it as a whole
//! while it is written.
//!
//! Before a change, the old bytes are saved as before-images, in memory and within a limit
//! (copy-before-write). A reader gets those, or else the disk's current bytes. Promise: a read returns the
//! bytes of that moment, or `Stale`, never anything else. A write is never refused because of a view.
//!
//! Changes are tracked only while the disk is in use in this process. After that, a view without changes can
//! be resumed as soon as the disk is opened again and is unchanged.

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

/// The size of one before-image.
const CHUNK: u64 = 1 << 16;
/// Maximum number of before-images of all views of one disk. A reader that is slower than the guest's changes
/// has to start again.
const IMAGES_MAX: usize = (256 << 20) / CHUNK as usize;

/// A disk as of one moment.
pub struct PointInTimeView {
    size: u64,
    content: Mutex<ViewContent>,
}

impl std::fmt::Debug for PointInTimeView {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Still").field("size", &self.size).finish_non_exhaustive()
    }
}

struct ViewContent {
    /// The before-images of chunks that have changed since.
    chunks: HashMap<u64, Box<[u8]>>,
    hold: ChangeTracking,
}

impl ViewContent {
    fn lose(&mut self) {
        self.hold = ChangeTracking::Lost;
        self.chunks = HashMap::new();
    }
}

/// Whether all changes are known.
enum ChangeTracking {
    /// They are: each change is reported first.
    Held,
    /// Changes are not tracked. There were none if the disk's version is still this one.
    Loose(WriteVersion),
    /// There were unknown changes.
    Lost,
}

/// The state of writes: equal only if nothing was written in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WriteVersion {
    fingerprint: u64,
    changes: u64,
}

/// The point-in-time views of one disk. Its lock is a leaf, except for the writer's own locks.
#[derive(Default)]
pub(super) struct BeforeImages {
    /// Whether there are any views: writers check this each time.
    any: AtomicBool,
    /// In the order of their creation. Taken before the lock of any of them.
    held: Mutex<Vec<Weak<PointInTimeView>>>,
    /// Number of changes since the disk began to be written.
    changes: AtomicU64,
}

impl PointInTimeView {
    /// The disk's size at that moment.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the disk is known to be unchanged.
    pub fn is_unchanged(&self) -> bool {
        let content = self.content.lock();
        content.chunks.is_empty() && !matches!(content.hold, ChangeTracking::Lost)
    }

    /// Whether this process has not changed the disk, and would know of any change.
    fn is_held_unchanged(&self) -> bool {
        let content = self.content.lock();
        content.chunks.is_empty() && matches!(content.hold, ChangeTracking::Held)
    }

    fn lose(&self) {
        self.content.lock().lose();
    }

    /// Ends the tracking; the disk is at `version`, or unknown.
    fn stop_tracking(&self, version: Option<WriteVersion>) {
        let mut content = self.content.lock();
        match version {
            Some(version) if content.chunks.is_empty() && !matches!(content.hold, ChangeTracking::Lost) => {
                content.hold = ChangeTracking::Loose(version);
            }
            _ => {
                content.hold = ChangeTracking::Lost;
                content.chunks = HashMap::new();
            }
        }
    }

    /// The chunks of the view that a range touches.
    fn touched(&self, at: u64, len: u64) -> Range<u64> {
        let end = at.saturating_add(len).min(self.size);
        if at < end { at / CHUNK..end.div_ceil(CHUNK) } else { 0..0 }
    }

    /// The number of before-images.
    fn image_count(&self) -> usize {
        self.content.lock().chunks.len()
    }

    /// The number of before-images after a change of `touched`; `usize::MAX`-like if that exceeds the limit.
    fn count_with(&self, touched: &Range<u64>) -> usize {
        let content = self.content.lock();
        if matches!(content.hold, ChangeTracking::Lost) {
            return content.chunks.len();
        }
        // Checked first: a discard of a whole disk need not count all of its chunks.
        if touched.end - touched.start > 2 * IMAGES_MAX as u64 {
            return usize::MAX;
        }
        content.chunks.len() + touched.clone().filter(|chunk| !content.chunks.contains_key(chunk)).count()
    }

    /// Saves before-images of the chunks that are about to change.
    fn save(&self, touched: Range<u64>, read: &dyn Fn(u64, &mut [u8]) -> Result<()>) {
        let mut content = self.content.lock();
        if matches!(content.hold, ChangeTracking::Lost) {
            return;
        }
        if !self.save_all(&mut content, touched, read) {
            content.lose();
        }
    }

    fn save_all(
        &self,
        content: &mut ViewContent,
        touched: Range<u64>,
        read: &dyn Fn(u64, &mut [u8]) -> Result<()>,
    ) -> bool {
        for chunk in touched {
            if content.chunks.contains_key(&chunk) {
                continue;
            }
            let start = chunk * CHUNK;
            let mut bytes = vec![0; CHUNK.min(self.size - start) as usize].into_boxed_slice();
            if read(start, &mut bytes).is_err() {
                return false;
            }
            content.chunks.insert(chunk, bytes);
        }
        true
    }

    /// Fills `buf`, which lies within the disk and within one chunk.
    fn read_chunk(&self, at: u64, buf: &mut [u8], read: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
        let (chunk, within) = (at / CHUNK, (at % CHUNK) as usize);
        if !self.copy_image(chunk, within, buf)? {
            read(buf)?;
            // A chunk with a before-image by now may have changed during the read; one without has not.
            self.copy_image(chunk, within, buf)?;
        }
        Ok(())
    }

    fn copy_image(&self, chunk: u64, within: usize, buf: &mut [u8]) -> Result<bool> {
        let content = self.content.lock();
        if !matches!(content.hold, ChangeTracking::Held) {
            return Err(lost());
        }
        let Some(bytes) = content.chunks.get(&chunk) else { return Ok(false) };
        buf.copy_from_slice(&bytes[within..within + buf.len()]);
        Ok(true)
    }
}

fn lost() -> crate::error::Error {
    stale("the active disk has been changed too much since it was looked into")
}

impl BeforeImages {
    /// For a disk that begins to be written.
    pub(super) fn begin(&self) {
        self.changes.store(0, Ordering::Release);
    }

    /// Called before a change.
    pub(super) fn before_change(&self, writing: &WritingDisk, at: u64, len: u64) {
        self.changes.fetch_add(1, Ordering::AcqRel);
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        // Locked to the end: the room is reserved for all views, whatever other writers do.
        let held = self.held.lock();
        let all: Vec<Arc<PointInTimeView>> = held.iter().filter_map(Weak::upgrade).collect();
        self.any.store(!all.is_empty(), Ordering::Release);
        let mut total: usize = all.iter().map(|view| view.image_count()).sum();
        // The last first: if there is no room for all views, the oldest are lost.
        for (index, view) in all.iter().enumerate().rev() {
            let touched = view.touched(at, len);
            let (wanted, mut others) = (view.count_with(&touched), total - view.image_count());
            let is_too_much = |others: usize| wanted.saturating_add(others) > IMAGES_MAX;
            for older in &all[..index] {
                let count = older.image_count();
                if count > 0 && wanted <= IMAGES_MAX && is_too_much(others) {
                    older.lose();
                    others -= count;
                }
            }
            // G5: the view is lost; the write continues.
            if is_too_much(others) {
                view.lose();
            } else {
                view.save(touched, &|at, buf| writing.writer.read_at(at, buf));
            }
            total = others + view.image_count();
        }
    }

    /// For a disk that another process may have changed.
    pub(super) fn lose(&self) {
        for view in self.held.lock().drain(..).filter_map(|view| view.upgrade()) {
            view.lose();
        }
    }

    /// For a disk that is closed and at `version`.
    pub(super) fn end(&self, version: Option<WriteVersion>) {
        for view in self.held.lock().drain(..).filter_map(|view| view.upgrade()) {
            view.stop_tracking(version);
        }
    }

    fn add(&self, view: &Arc<PointInTimeView>) {
        let mut held = self.held.lock();
        held.retain(|other| other.strong_count() > 0 && !std::ptr::eq(other.as_ptr(), Arc::as_ptr(view)));
        held.push(Arc::downgrade(view));
        self.any.store(true, Ordering::Release);
    }

    /// Stops tracking changes for a view.
    fn remove(&self, view: &Arc<PointInTimeView>, version: Option<WriteVersion>) {
        let mut held = self.held.lock();
        let before = held.len();
        held.retain(|other| !std::ptr::eq(other.as_ptr(), Arc::as_ptr(view)));
        if held.len() < before {
            view.stop_tracking(version);
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
        self.before_images.version(state)
    }
}

impl Store {
    /// Stops tracking changes for a view of that disk: writes cost nothing more because of it.
    /// [`ActiveHandle::resume_view`] resumes the view if nothing has changed meanwhile.
    pub fn release_view(&self, id: &ViewId, view: &Arc<PointInTimeView>) {
        let ViewIdentity::Active(number) = id.part else { return };
        // The disk's other locks are not held: a reader that repeats this delays no one.
        if !matches!(view.content.lock().hold, ChangeTracking::Held) {
            return;
        }
        if let Some(disk) = self.active.find(number) {
            let state = disk.state.write();
            disk.before_images.remove(view, disk.version(&state));
        }
    }
}

impl ActiveHandle {
    /// A view of the disk as of now.
    pub fn point_in_time_view(&self) -> Result<Arc<PointInTimeView>> {
        let size = self.size()?;
        // Exclusive: no write is in flight that was not reported.
        let state = self.disk.state.write();
        let view = Arc::new(PointInTimeView {
            size,
            content: Mutex::new(ViewContent { chunks: HashMap::new(), hold: ChangeTracking::Held }),
        });
        self.disk.before_images.add(&view);
        drop(state);
        Ok(view)
    }

    /// Resumes a view whose tracking was stopped; `Stale` if the disk has changed since.
    pub fn resume_view(&self, view: &Arc<PointInTimeView>) -> Result<()> {
        let state = self.disk.state.write();
        let version = self.disk.version(&state);
        let mut content = view.content.lock();
        match content.hold {
            ChangeTracking::Held => {}
            ChangeTracking::Loose(then) if Some(then) == version => content.hold = ChangeTracking::Held,
            ChangeTracking::Loose(_) | ChangeTracking::Lost => {
                content.hold = ChangeTracking::Lost;
                return Err(lost());
            }
        }
        drop(content);
        self.disk.before_images.add(view);
        drop(state);
        Ok(())
    }

    /// Fills `buf` with the view's bytes at `at`. The range must lie within the view.
    pub fn read_view(&self, view: &PointInTimeView, at: u64, buf: &mut [u8]) -> Result<()> {
        let mut rest = buf;
        let mut at = at;
        while !rest.is_empty() {
            let len = rest.len().min((CHUNK - at % CHUNK) as usize);
            let (piece, more) = rest.split_at_mut(len);
            // G2: the before-image where there is one; `Stale` where it was lost.
            view.read_chunk(at, piece, |piece| {
                let mut done = 0;
                while done < len {
                    // Short where the rest is damaged: a read of the rest alone returns the error.
                    match self.read_at(at + done as u64, &mut piece[done..])? {
                        // A disk that has shrunk ends within the view.
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

    /// The origin of the view's bytes from `at` on, for at most `max` of them; `None` where only reading can
    /// tell, as while the disk is written here. For a disk that is read by force, only origins below its top
    /// layer are returned.
    pub fn view_origin(&self, view: &PointInTimeView, at: u64, max: u64) -> Result<Option<Origin>> {
        // Held during the lookup: no writing begins meanwhile.
        let DiskState::Reading(open) = &*self.disk.state.read() else { return Ok(None) };
        if !view.is_held_unchanged() || at >= open.view.size() {
            return Ok(None);
        }
        let origin = open.view.origin(at, max)?;
        let may_change = open.forced.is_some() && origin.image == open.top.image.serial();
        Ok((!may_change).then_some(origin))
    }

    /// The origins of a range of the view, if all of it is below the disk's top layer: those bytes stay even
    /// if the disk is written later.
    pub fn origins_below(&self, view: &PointInTimeView, at: u64, len: u64) -> Result<Option<Vec<Origin>>> {
        let DiskState::Reading(open) = &*self.disk.state.read() else { return Ok(None) };
        if open.forced.is_some()
            || !view.is_held_unchanged()
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
    fn a_view_reads_the_old_bytes_during_writes() {
        let OneDisk { store, id, .. } = &OneDisk::new(SIZE);
        let writer = store.open_writable(id, Access::ReadWrite).unwrap();
        let before = pattern(1, SIZE as usize / 2);
        writer.write_at(0, &before).unwrap();
        let reader = store.open_writable(id, Access::Read).unwrap();
        let view = reader.point_in_time_view().unwrap();
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
                reader.read_view(&view, at, &mut buf).unwrap();
                let expected = (at..at + 70_000).map(|at| before.get(at as usize).copied().unwrap_or(0));
                assert!(buf.iter().copied().eq(expected), "at {at:#x}");
            }
        });
        assert!(!view.is_unchanged());
        let mut now = [0; 5_000];
        writer.read_at(0, &mut now).unwrap();
        assert!(now[..] != before[..5_000], "it was written indeed");
    }

    #[test]
    fn a_view_resumes_after_a_pause_only_without_changes() {
        let OneDisk { store, id, .. } = &OneDisk::new(SIZE);
        let read = |view: &Arc<PointInTimeView>| -> Result<()> {
            let reader = store.open_writable(id, Access::Read)?;
            reader.resume_view(view)?;
            reader.read_view(view, 0, &mut [0; 100])
        };
        let view = store.open_writable(id, Access::Read).unwrap().point_in_time_view().unwrap();
        read(&view).unwrap();
        let writer = store.open_writable(id, Access::ReadWrite).unwrap();
        read(&view).unwrap();
        store.release_view(id, &view);
        read(&view).unwrap();
        // While changes are tracked, they are reported; without tracking, they end the view.
        writer.write_at(0, b"changed").unwrap();
        read(&view).unwrap();
        let second = store.open_writable(id, Access::Read).unwrap().point_in_time_view().unwrap();
        store.release_view(id, &second);
        writer.write_at(0, b"once more").unwrap();
        for view in [&second, &second] {
            assert_eq!(read(view).unwrap_err().kind(), ErrorKind::Stale);
        }
        let third = store.open_writable(id, Access::Read).unwrap().point_in_time_view().unwrap();
        drop(writer);
        // Before-images of the first view are saved only while the disk is open.
        assert_eq!(read(&view).unwrap_err().kind(), ErrorKind::Stale);
        let writer = store.open_writable(id, Access::Write).unwrap();
        writer.write_at(SIZE - 10, b"the end").unwrap();
        drop(writer);
        assert_eq!(read(&third).unwrap_err().kind(), ErrorKind::Stale);
    }

    #[test]
    fn damage_is_a_read_error_and_not_a_changed_disk() {
        let OneDisk { directory, store, id } = &OneDisk::new(SIZE);
        let writer = store.open_writable(id, Access::Write).unwrap();
        writer.write_at(0, &pattern(1, 2 << 16)).unwrap();
        drop(writer);
        // The second cluster was allocated last: the file's present end truncates it.
        let file = std::fs::File::options().write(true).open(directory.path().join("a.qcow2")).unwrap();
        file.set_len(file.metadata().unwrap().len() - (1 << 15)).unwrap();
        store.rescan().unwrap();
        let reader = store.open_writable(id, Access::Read).unwrap();
        let view = reader.point_in_time_view().unwrap();
        let damaged = reader.read_view(&view, 1 << 16, &mut vec![0; 1 << 16]).unwrap_err();
        assert_ne!(damaged.kind(), ErrorKind::Stale, "{damaged}");
        reader.read_view(&view, 1 << 16, &mut vec![0; 1 << 15]).unwrap();
        assert!(view.is_unchanged());
    }

    #[test]
    // G5
    fn a_writer_that_changes_too_much_ends_the_view_and_is_never_refused() {
        let OneDisk { store, id, .. } = &OneDisk::new(SIZE);
        let writer = store.open_writable(id, Access::ReadWrite).unwrap();
        writer.set_size(1 << 30).unwrap();
        let view = writer.point_in_time_view().unwrap();
        writer.zero(0, 1 << 30, Zeroing::Unmap).unwrap();
        assert_eq!(writer.read_view(&view, 0, &mut [0; 10]).unwrap_err().kind(), ErrorKind::Stale);
        assert!(view.content.lock().chunks.is_empty());
    }

    #[test]
    fn many_views_of_a_disk_share_one_limit_and_the_newest_survive() {
        let OneDisk { store, id, .. } = &OneDisk::new(SIZE);
        let writer = store.open_writable(id, Access::ReadWrite).unwrap();
        writer.set_size(1 << 30).unwrap();
        let views: Vec<_> = (0..6).map(|_| writer.point_in_time_view().unwrap()).collect();
        let content = || views.iter().map(|view| view.content.lock().chunks.len()).sum::<usize>();
        for round in 0..10 {
            writer.zero(round * (10 << 20), 10 << 20, Zeroing::Unmap).unwrap();
            assert!(content() <= IMAGES_MAX, "{} in round {round}", content());
        }
        let is_good = |view: &&Arc<PointInTimeView>| writer.read_view(view, 0, &mut [0; 10]).is_ok();
        assert_eq!(views.iter().rev().take_while(is_good).count(), 2);
        assert_eq!(views.iter().filter(is_good).count(), 2);
    }
}
