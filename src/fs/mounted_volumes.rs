//! The guests' file systems in the mount.
//!
//! Each tree of a file system has a slot, whose number is a part of the inode numbers of its files (see
//! [`guest_numbers`](super::guest_numbers)). A tree keeps its slot while the kernel's lookup count is
//! positive, or while the browser still has the disk. Freed slots are reused only when all others have been
//! used.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use crate::browse::{DiskContents, Mounted};
use crate::cache::Weighted;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{ExtendedAttribute, Ino, TreeId};

use super::guest_numbers::SLOT_BITS;

/// Maximum number of file systems at a time.
const SLOTS: usize = 1 << SLOT_BITS;
/// Bytes of extended attributes in the cache: `ls -l` reads several of each file. One inode may have
/// megabytes.
const ATTRIBUTES_CACHED_LEN: usize = 256 << 10;
/// How long an unreferenced file system keeps its slot: a listing in progress may add lookups later.
const GRACE: Duration = Duration::from_mins(1);
/// Number of inodes in the cache of those without extended attributes.
const PLAIN_CACHED: usize = 1 << 16;

/// Number of cached parents of directories and symbolic links: some link targets depend on them.
const PARENTS_CACHED: usize = 1 << 14;

/// A guest's file system in the mount.
pub(super) struct MountedVolume {
    pub(super) inside: Arc<DiskContents>,
    pub(super) tree: TreeId,
    /// The tree through which it was reached: the same one, or one that has it in it. The same directory in
    /// two places would be one inode, which the kernel moves from one to the other.
    entry: u32,
    pub(super) mounted: Mounted,
    since: Instant,
    /// The sum of the lookup counts of its inodes.
    lookup_count: AtomicI64,
    attributes: InodeCache<Arc<[ExtendedAttribute]>>,
    plain: InodeCache<()>,
    parents: InodeCache<Ino>,
    /// The inode number of the directory that it was last reached in; 0: not yet.
    above: AtomicU64,
    /// How many file systems had the slot before.
    pub(super) turn: u32,
}

impl std::fmt::Debug for MountedVolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MountedVolume")
            .field("inside", &self.inside)
            .field("tree", &self.tree)
            .finish_non_exhaustive()
    }
}

/// An LRU cache of values by inode.
struct InodeCache<T>(Mutex<Weighted<Ino, T>>);

impl<T: Clone> InodeCache<T> {
    /// A cache with this total weight.
    fn new(max_weight: usize) -> Self {
        Self(Mutex::new(Weighted::new(max_weight)))
    }

    fn get(&self, ino: Ino) -> Option<T> {
        self.0.lock().get(&ino)
    }

    /// Adds a value, unless it alone exceeds the total weight.
    fn put(&self, ino: Ino, value: T, weight: usize) {
        let mut cache = self.0.lock();
        if weight <= cache.budget() {
            cache.put(ino, value, weight);
        }
    }
}

impl MountedVolume {
    /// Whether the kernel has no lookups of it, and `this` is the only reference.
    fn is_unreferenced(this: &Arc<Self>) -> bool {
        this.lookup_count.load(Ordering::Relaxed) <= 0 && Arc::strong_count(this) == 1
    }

    fn place(&self) -> TreePlace {
        (Arc::as_ptr(&self.inside) as usize, self.tree, self.entry)
    }

    /// Records that an inode has no extended attributes.
    pub(super) fn note_plain(&self, ino: Ino) {
        self.plain.put(ino, (), 1);
    }

    /// Records the parent of a directory or symbolic link.
    pub(super) fn note_parent(&self, ino: Ino, parent: Ino) {
        self.parents.put(ino, parent, 1);
    }

    /// The parent of a directory or symbolic link, if it was recorded.
    pub(super) fn parent(&self, ino: Ino) -> Option<Ino> {
        self.parents.get(ino)
    }

    /// Records the inode number of the directory that has the root as an entry.
    pub(super) fn note_above(&self, inode: u64) {
        self.above.store(inode, Ordering::Relaxed);
    }

    /// The inode number of the directory that has the root as an entry, if it was recorded.
    pub(super) fn above(&self) -> Option<u64> {
        Some(self.above.load(Ordering::Relaxed)).filter(|inode| *inode != 0)
    }

    /// All extended attributes of an inode.
    pub(super) fn extended_attributes(&self, ino: Ino) -> Result<Arc<[ExtendedAttribute]>> {
        if self.plain.get(ino).is_some() {
            return Ok(Arc::default());
        }
        if let Some(known) = self.attributes.get(ino) {
            return Ok(known);
        }
        let found: Arc<[ExtendedAttribute]> = self.inside.extended_attributes(self.tree, ino)?.into();
        let bytes = |attribute: &ExtendedAttribute| attribute.name.len() + attribute.value.len() + 64;
        self.attributes.put(ino, Arc::clone(&found), found.iter().map(bytes).sum::<usize>() + 64);
        Ok(found)
    }
}

/// The address of a disk's contents, which live as long as their slots, the tree, and that through which it
/// was reached.
type TreePlace = (usize, TreeId, u32);

/// All guests' file systems in the mount.
#[derive(Debug, Default)]
pub(super) struct MountedVolumes {
    table: RwLock<VolumeTable>,
}

#[derive(Debug, Default)]
struct VolumeTable {
    /// `None`: a freed slot.
    slots: Vec<Option<Arc<MountedVolume>>>,
    /// How often each slot was given again.
    turns: Vec<u32>,
    places: HashMap<TreePlace, u16>,
    /// Start of the search for a free slot.
    next: usize,
}

impl MountedVolumes {
    /// The slot of a tree; a new one if it has none.
    pub(super) fn of(&self, inside: &Arc<DiskContents>, tree: TreeId) -> Result<(u16, Arc<MountedVolume>)> {
        self.reached(inside, tree, tree.subvolume)
    }

    /// The slot of a tree that begins in a directory of another one.
    pub(super) fn within(&self, outer: &MountedVolume, subvolume: u32) -> Result<(u16, Arc<MountedVolume>)> {
        let tree = TreeId { volume: outer.tree.volume, subvolume };
        self.reached(&outer.inside, tree, outer.entry)
    }

    fn reached(
        &self,
        inside: &Arc<DiskContents>,
        tree: TreeId,
        entry: u32,
    ) -> Result<(u16, Arc<MountedVolume>)> {
        let place = (Arc::as_ptr(inside) as usize, tree, entry);
        if let Some(found) = self.table.read().find(place) {
            return Ok(found);
        }
        let mounted = inside.mount(tree)?;
        let mut slot = MountedVolume {
            inside: Arc::clone(inside),
            tree,
            entry,
            mounted,
            since: Instant::now(),
            lookup_count: AtomicI64::new(0),
            attributes: InodeCache::new(ATTRIBUTES_CACHED_LEN),
            plain: InodeCache::new(PLAIN_CACHED),
            parents: InodeCache::new(PARENTS_CACHED),
            above: AtomicU64::new(0),
            turn: 0,
        };
        let mut table = self.table.write();
        if let Some(found) = table.find(place) {
            return Ok(found);
        }
        let gone = table.vacate(GRACE);
        let number = table.free()?;
        if number == table.slots.len() {
            table.slots.push(None);
            table.turns.push(0);
        } else {
            table.turns[number] = table.turns[number].wrapping_add(1);
        }
        slot.turn = table.turns[number];
        let slot = Arc::new(slot);
        let old = table.slots[number].replace(Arc::clone(&slot));
        if let Some(old) = &old {
            table.places.remove(&old.place());
        }
        table.places.insert(place, number as u16);
        drop(table);
        // Dropped after the lock is released: this may close a disk.
        drop((gone, old));
        Ok((number as u16, slot))
    }

    /// The slot of that number.
    pub(super) fn get(&self, slot: u16) -> Result<Arc<MountedVolume>> {
        let found = self.table.read().get(slot).cloned();
        found.ok_or_else(|| crate::store::stale("the inode number is unknown or was forgotten"))
    }

    /// Adds a lookup of an inode in a slot.
    pub(super) fn add_lookup(&self, slot: u16) {
        if let Some(slot) = self.table.read().get(slot) {
            slot.lookup_count.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// FORGET: subtracts `times` lookups of an inode in a slot.
    pub(super) fn forget(&self, slot: u16, times: u64) {
        if let Some(slot) = self.table.read().get(slot) {
            slot.lookup_count.fetch_sub(times.cast_signed(), Ordering::Relaxed);
        }
    }
}

impl VolumeTable {
    fn get(&self, slot: u16) -> Option<&Arc<MountedVolume>> {
        self.slots.get(usize::from(slot))?.as_ref()
    }

    fn find(&self, place: TreePlace) -> Option<(u16, Arc<MountedVolume>)> {
        let slot = *self.places.get(&place)?;
        Some((slot, Arc::clone(self.get(slot)?)))
    }

    /// Frees the slots of unreferenced file systems whose disk the browser no longer has. An active disk has
    /// one for each point in time that was shown.
    fn vacate(&mut self, grace: Duration) -> Vec<Arc<MountedVolume>> {
        let mut own: HashMap<usize, usize> = HashMap::new();
        for slot in self.slots.iter().flatten() {
            *own.entry(slot.place().0).or_default() += 1;
        }
        let mut gone = Vec::new();
        for place in &mut self.slots {
            let is_over = |slot: &mut Arc<MountedVolume>| {
                let is_elsewhere = Arc::strong_count(&slot.inside) > own[&slot.place().0];
                MountedVolume::is_unreferenced(slot) && !is_elsewhere && slot.since.elapsed() >= grace
            };
            gone.extend(place.take_if(is_over));
        }
        for slot in &gone {
            self.places.remove(&slot.place());
        }
        gone
    }

    /// An unused slot, else one whose file system is unreferenced.
    fn free(&mut self) -> Result<usize> {
        if self.slots.len() < SLOTS {
            return Ok(self.slots.len());
        }
        let is_free =
            |slot: &Option<Arc<MountedVolume>>| slot.as_ref().is_none_or(MountedVolume::is_unreferenced);
        let found =
            (0..SLOTS).map(|step| (self.next + step) % SLOTS).find(|index| is_free(&self.slots[*index]));
        let Some(found) = found else {
            let fact = format!(
                "{SLOTS} file systems of guests are in use, which is the limit; close files in the mount"
            );
            return Err(Error::new(ErrorKind::Limit, fact));
        };
        self.next = found + 1;
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::testing::OneDisk;

    #[test]
    fn the_inode_cache_is_bounded_by_weight() {
        let kept = InodeCache::new(100);
        for number in 0..10 {
            kept.put(Ino(number), number, 30);
        }
        let known: Vec<u64> = (0..10).filter_map(|number| kept.get(Ino(number))).collect();
        assert_eq!(known, [7, 8, 9]);
        kept.put(Ino(10), 10, 101);
        assert_eq!(kept.get(Ino(10)), None);
        // A value that is put again counts with its new weight.
        kept.put(Ino(9), 99, 40);
        assert_eq!((kept.get(Ino(7)), kept.get(Ino(8)), kept.get(Ino(9))), (Some(7), Some(8), Some(99)));
        assert_eq!(kept.0.lock().weight(), 100);
    }

    #[test]
    fn unreferenced_volumes_are_freed() {
        let OneDisk { store, id, .. } = &OneDisk::new(1 << 20);
        let slots = MountedVolumes::default();
        // Four points in time of one disk: the kernel has lookups of the first, the second is being read, the
        // third is current in the browser.
        let [known, open, shown, gone] = [0; 4].map(|_| DiskContents::with_one_volume(store, id));
        let (kernels, _) = slots.of(&known, TreeId::main(0)).unwrap();
        let (_, _read) = slots.of(&open, TreeId::main(0)).unwrap();
        slots.of(&shown, TreeId::main(0)).unwrap();
        let (number, _) = slots.of(&gone, TreeId::main(0)).unwrap();
        slots.add_lookup(kernels);
        let [is_known, is_open, is_gone] = [known, open, gone].map(|inside| Arc::downgrade(&inside));
        assert!(slots.table.write().vacate(GRACE).is_empty(), "a listing may be about to add a lookup");
        assert_eq!(slots.table.write().vacate(Duration::ZERO).len(), 1);
        assert!(is_known.strong_count() == 1 && is_open.strong_count() == 1 && is_gone.strong_count() == 0);
        assert_eq!(slots.get(number).map(drop).unwrap_err().kind(), ErrorKind::Stale);
        slots.add_lookup(number);
        slots.forget(kernels, 1);
        assert_eq!(slots.table.write().vacate(Duration::ZERO).len(), 1);
        assert_eq!(is_known.strong_count(), 0);
        // A freed slot is not reused while there are unused ones.
        assert_eq!(
            slots.of(&DiskContents::with_one_volume(store, id), TreeId::main(0)).unwrap().0,
            number + 1
        );
        assert_eq!(slots.of(&shown, TreeId::main(0)).unwrap().0, number - 1);
    }
}
