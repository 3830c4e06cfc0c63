//! Tables in memory: 4 KiB slices by their offset in the file; changed ones stay until they are written.
//!
//! Only [`super::flush`] (and growth, in its turn) writes slices. One that is changed or being written is
//! never evicted: the file's bytes are older.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The table that a slice is part of; in the order in which changes reach the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TableClass {
    /// Refcounts: before any reference to the clusters that they count.
    RefcountBlock = 0,
    /// The table that names the refcount blocks.
    RefcountTable = 1,
    /// Mappings: after the data that they point at.
    L2 = 2,
    /// The table that names the L2 tables.
    L1 = 3,
}

/// All classes, in their order.
pub(super) const CLASSES: [TableClass; 4] =
    [TableClass::RefcountBlock, TableClass::RefcountTable, TableClass::L2, TableClass::L1];

struct TableSlice {
    words: Arc<[u64]>,
    class: TableClass,
    /// It is being written.
    writing: bool,
    used: AtomicBool,
}

/// The slices.
pub(super) struct Slices {
    limit: usize,
    by_place: HashMap<u64, TableSlice>,
    dirty: [BTreeSet<u64>; 4],
    /// In the order of the clock's hand; some have been removed since.
    clock: VecDeque<u64>,
}

/// Changed slices as of one moment, in the order of the file.
pub(super) type Batch = Vec<(u64, Arc<[u64]>)>;

impl Slices {
    /// Holds about `limit` slices; more only while more are changed.
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit: limit.max(16),
            by_place: HashMap::new(),
            dirty: Default::default(),
            clock: VecDeque::new(),
        }
    }

    /// The slice at `place`, if it is in memory.
    pub(super) fn get(&self, place: u64) -> Option<&Arc<[u64]>> {
        let slice = self.by_place.get(&place)?;
        slice.used.store(true, Ordering::Relaxed);
        Some(&slice.words)
    }

    /// Caches a slice as it is in the file.
    pub(super) fn insert(&mut self, place: u64, class: TableClass, words: Arc<[u64]>) {
        self.make_room();
        let slice = TableSlice { words, class, writing: false, used: AtomicBool::new(true) };
        if self.by_place.insert(place, slice).is_none() {
            self.clock.push_back(place);
        }
    }

    /// The words of a slice in memory, for a change.
    pub(super) fn change(&mut self, place: u64) -> Option<&mut [u64]> {
        let slice = self.by_place.get_mut(&place)?;
        self.dirty[slice.class as usize].insert(place);
        Some(Arc::make_mut(&mut slice.words))
    }

    /// Drops slices of `[start, end)`: their clusters hold no tables any more.
    pub(super) fn forget(&mut self, start: u64, end: u64, slice_len: u64) {
        for place in (start..end).step_by(slice_len as usize) {
            if let Some(slice) = self.by_place.remove(&place) {
                self.dirty[slice.class as usize].remove(&place);
            }
        }
    }

    /// Drops all slices of a class, changed or not.
    pub(super) fn forget_class(&mut self, class: TableClass) {
        self.by_place.retain(|_, slice| slice.class != class);
        self.dirty[class as usize].clear();
    }

    /// Whether any slice of a class has changed.
    pub(super) fn is_dirty(&self) -> bool {
        self.dirty.iter().any(|places| !places.is_empty())
    }

    /// Changed slices.
    pub(super) fn dirty_count(&self) -> usize {
        self.dirty.iter().map(BTreeSet::len).sum()
    }

    /// Whether it is time to write changed slices back.
    pub(super) fn is_pressed(&self) -> bool {
        self.dirty_count() > self.limit / 2
    }

    /// The changed slices of a class; they count as unchanged from here on, and stay until
    /// [`Slices::written`] is called.
    pub(super) fn take_dirty(&mut self, class: TableClass) -> Batch {
        let places = std::mem::take(&mut self.dirty[class as usize]);
        let take = |place: u64| {
            let slice = self.by_place.get_mut(&place).expect("a changed slice is in memory");
            slice.writing = true;
            (place, Arc::clone(&slice.words))
        };
        places.into_iter().map(take).collect()
    }

    /// The slices of a batch are in the file.
    pub(super) fn written(&mut self, batch: &Batch) {
        for (place, _) in batch {
            if let Some(slice) = self.by_place.get_mut(place) {
                slice.writing = false;
            }
        }
    }

    fn make_room(&mut self) {
        // Twice round at most: the first pass may find every slice used since the last.
        let mut steps = 2 * self.clock.len();
        while self.by_place.len() >= self.limit && steps > 0 {
            steps -= 1;
            let Some(place) = self.clock.pop_front() else { return };
            let Some(slice) = self.by_place.get(&place) else { continue };
            let is_needed = slice.writing || self.dirty[slice.class as usize].contains(&place);
            if is_needed || slice.used.swap(false, Ordering::Relaxed) {
                self.clock.push_back(place);
            } else {
                self.by_place.remove(&place);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(limit: usize, count: u64) -> Slices {
        let mut slices = Slices::new(limit);
        (0..count).for_each(|n| slices.insert(n * 4096, TableClass::L2, vec![n; 512].into()));
        slices
    }

    #[test]
    fn memory_is_bounded_and_changes_stay() {
        let mut slices = filled(16, 16);
        slices.change(0).unwrap()[5] = 77;
        (16..500).for_each(|n| slices.insert(n * 4096, TableClass::L2, vec![n; 512].into()));
        assert!(slices.by_place.len() <= 16 && slices.clock.len() <= 17);
        assert_eq!(slices.get(0).unwrap()[5], 77);
        let batch = slices.take_dirty(TableClass::L2);
        assert_eq!((batch.len(), slices.is_dirty()), (1, false));
        (500..600).for_each(|n| slices.insert(n * 4096, TableClass::L2, vec![n; 512].into()));
        assert!(slices.get(0).is_some(), "it is being written");
        slices.change(0).unwrap()[5] = 78;
        assert_eq!(batch[0].1[5], 77, "what is being written does not change");
        slices.written(&batch);
        assert!(slices.is_dirty());
    }

    #[test]
    fn a_dropped_slice_is_not_written() {
        let mut slices = filled(16, 4);
        slices.change(4096).unwrap()[0] = 9;
        slices.forget(4096, 8192, 4096);
        assert!(!slices.is_dirty() && slices.get(4096).is_none() && slices.get(0).is_some());
        slices.insert(1 << 20, TableClass::L1, vec![1; 512].into());
        slices.change(0).unwrap()[0] = 9;
        slices.forget_class(TableClass::L2);
        assert!(!slices.is_dirty() && slices.get(0).is_none() && slices.get(1 << 20).is_some());
    }
}
