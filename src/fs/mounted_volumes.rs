//! The guests' file systems that the mount shows, and the inode numbers of what is in them.
//!
//! A number says by itself what it stands for: which file system, how deep below its root (for directories and links, whose
//! targets depend on that), and which inode. So nothing is remembered for each of a million files. A file system is
//! remembered for as long as the kernel knows anything of it, or whoever looks next would find it; then its place is empty,
//! and when all others have been given, others get its numbers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};

use crate::browse::{DiskContents, Mounted};
use crate::cache::Weighted;
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{ExtendedAttribute, Ino};

/// Set in every number of a guest's file; the highest bit stays free, for programs that take numbers for signed.
const GUEST: u64 = 1 << 62;
const SLOT_BITS: u32 = 15;
const DEPTH_BITS: u32 = 7;
const INO_BITS: u32 = 40;
const _: () = assert!(SLOT_BITS + DEPTH_BITS + INO_BITS == 62 && 1 << INO_BITS == Ino::LIMIT);

/// File systems that are shown at the same time, at most.
const SLOTS: usize = 1 << SLOT_BITS;
/// Bytes of extended attributes that are kept: `ls -l` asks for several of each file. One inode may have megabytes.
const ATTRIBUTES_KEPT: usize = 256 << 10;
/// For how long one that nobody knows of keeps its place all the same: whoever lists a directory is told of what is in it
/// some time later.
const GRACE: Duration = Duration::from_mins(1);
/// Inodes that are known to have none.
const PLAIN_KEPT: usize = 1 << 16;

/// Directories and links of which is kept what holds them: some targets of links depend on that.
const PARENTS_KEPT: usize = 1 << 14;

/// A file of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestNode {
    /// Which file system.
    pub(super) slot: u16,
    /// Directories from the root down to this one, or to the one that holds this link; 0 for all other files.
    pub(super) depth: u8,
    /// Which inode of it.
    pub(super) ino: Ino,
}

impl GuestNode {
    /// The deepest that is counted; whatever is deeper has this, too.
    pub(super) const DEEPEST: u8 = (1 << DEPTH_BITS) - 1;

    /// Its number in the mount.
    pub(super) fn number(self) -> u64 {
        GUEST | u64::from(self.slot) << (DEPTH_BITS + INO_BITS) | u64::from(self.depth) << INO_BITS | self.ino.0
    }

    /// What a number stands for, if it is a guest's file.
    pub(super) fn from_number(number: u64) -> Option<Self> {
        (number & GUEST != 0).then_some(Self {
            slot: (number >> (DEPTH_BITS + INO_BITS)) as u16 & (SLOTS - 1) as u16,
            depth: (number >> INO_BITS) as u8 & Self::DEEPEST,
            ino: Ino(number & (Ino::LIMIT - 1)),
        })
    }
}

/// A file system that is shown.
pub(super) struct MountedVolume {
    pub(super) inside: Arc<DiskContents>,
    pub(super) volume: usize,
    pub(super) mounted: Mounted,
    since: Instant,
    /// How often the kernel has been told of anything of it, and has not forgotten it.
    known: AtomicI64,
    attributes: InodeCache<Arc<[ExtendedAttribute]>>,
    plain: InodeCache<()>,
    parents: InodeCache<Ino>,
}

impl std::fmt::Debug for MountedVolume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("inside", &self.inside).field("volume", &self.volume).finish_non_exhaustive()
    }
}

/// Something of inodes, the least recently used of which are forgotten.
struct InodeCache<T>(Mutex<Weighted<Ino, T>>);

impl<T: Clone> InodeCache<T> {
    /// What weighs so much together, at most.
    fn new(most: usize) -> Self {
        Self(Mutex::new(Weighted::new(most)))
    }

    fn get(&self, ino: Ino) -> Option<T> {
        self.0.lock().get(&ino)
    }

    /// Keeps something that weighs so much; nothing, if that is too much by itself.
    fn put(&self, ino: Ino, value: T, weight: usize) {
        let mut kept = self.0.lock();
        if weight <= kept.budget() {
            kept.put(ino, value, weight);
        }
    }
}

impl MountedVolume {
    /// Whether nobody knows of it, if `this` is all there is of it.
    fn is_forgotten(this: &Arc<Self>) -> bool {
        this.known.load(Ordering::Relaxed) <= 0 && Arc::strong_count(this) == 1
    }

    fn place(&self) -> (usize, usize) {
        (Arc::as_ptr(&self.inside) as usize, self.volume)
    }

    /// Notes that an inode has no extended attributes.
    pub(super) fn note_plain(&self, ino: Ino) {
        self.plain.put(ino, (), 1);
    }

    /// Notes which directory holds a directory or a link.
    pub(super) fn held_by(&self, ino: Ino, parent: Ino) {
        self.parents.put(ino, parent, 1);
    }

    /// The directory that holds a directory or a link, if that was noted.
    pub(super) fn parent(&self, ino: Ino) -> Option<Ino> {
        self.parents.get(ino)
    }

    /// All extended attributes of an inode.
    pub(super) fn extended_attributes(&self, ino: Ino) -> Result<Arc<[ExtendedAttribute]>> {
        if self.plain.get(ino).is_some() {
            return Ok(Arc::default());
        }
        if let Some(known) = self.attributes.get(ino) {
            return Ok(known);
        }
        let found: Arc<[ExtendedAttribute]> = self.inside.extended_attributes(self.volume, ino)?.into();
        let bytes = |attribute: &ExtendedAttribute| attribute.name.len() + attribute.value.len() + 64;
        self.attributes.put(ino, Arc::clone(&found), found.iter().map(bytes).sum::<usize>() + 64);
        Ok(found)
    }
}

/// All file systems that are shown.
#[derive(Debug, Default)]
pub(super) struct MountedVolumes {
    table: RwLock<VolumeTable>,
}

#[derive(Debug, Default)]
struct VolumeTable {
    /// `None` where there was one.
    slots: Vec<Option<Arc<MountedVolume>>>,
    /// By address of the inside, which lives as long as its slot, and volume.
    places: HashMap<(usize, usize), u16>,
    /// Where the search for one that is free begins.
    next: usize,
}

impl MountedVolumes {
    /// The slot of a volume; a new one if it has none.
    pub(super) fn of(&self, inside: &Arc<DiskContents>, volume: usize) -> Result<(u16, Arc<MountedVolume>)> {
        let place = (Arc::as_ptr(inside) as usize, volume);
        if let Some(found) = self.table.read().find(place) {
            return Ok(found);
        }
        let mounted = inside.mount(volume)?;
        let slot = Arc::new(MountedVolume {
            inside: Arc::clone(inside),
            volume,
            mounted,
            since: Instant::now(),
            known: AtomicI64::new(0),
            attributes: InodeCache::new(ATTRIBUTES_KEPT),
            plain: InodeCache::new(PLAIN_KEPT),
            parents: InodeCache::new(PARENTS_KEPT),
        });
        let mut table = self.table.write();
        if let Some(found) = table.find(place) {
            return Ok(found);
        }
        let gone = table.vacate(GRACE);
        let number = table.free()?;
        if number == table.slots.len() {
            table.slots.push(None);
        }
        let old = table.slots[number].replace(Arc::clone(&slot));
        if let Some(old) = &old {
            table.places.remove(&old.place());
        }
        table.places.insert(place, number as u16);
        drop(table);
        // Not under the lock: a disk may be closed with it.
        drop((gone, old));
        Ok((number as u16, slot))
    }

    /// The slot of that number.
    pub(super) fn get(&self, slot: u16) -> Result<Arc<MountedVolume>> {
        let found = self.table.read().get(slot).cloned();
        found.ok_or_else(|| crate::store::stale("a number that was never given, or that was forgotten"))
    }

    /// The kernel has been told of something in a slot.
    pub(super) fn told(&self, slot: u16) {
        if let Some(slot) = self.table.read().get(slot) {
            slot.known.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The kernel has forgotten something in a slot, of which it had been told that often.
    pub(super) fn forgotten(&self, slot: u16, times: u64) {
        if let Some(slot) = self.table.read().get(slot) {
            slot.known.fetch_sub(times.cast_signed(), Ordering::Relaxed);
        }
    }
}

impl VolumeTable {
    fn get(&self, slot: u16) -> Option<&Arc<MountedVolume>> {
        self.slots.get(usize::from(slot))?.as_ref()
    }

    fn find(&self, place: (usize, usize)) -> Option<(u16, Arc<MountedVolume>)> {
        let slot = *self.places.get(&place)?;
        Some((slot, Arc::clone(self.get(slot)?)))
    }

    /// Takes out those that nobody knows of, and whose disk nobody looks into any more: of an active disk, there is another one
    /// for each moment that somebody wanted to see.
    fn vacate(&mut self, grace: Duration) -> Vec<Arc<MountedVolume>> {
        let mut own: HashMap<usize, usize> = HashMap::new();
        for slot in self.slots.iter().flatten() {
            *own.entry(slot.place().0).or_default() += 1;
        }
        let mut gone = Vec::new();
        for place in &mut self.slots {
            let is_over = |slot: &mut Arc<MountedVolume>| {
                let is_elsewhere = Arc::strong_count(&slot.inside) > own[&slot.place().0];
                MountedVolume::is_forgotten(slot) && !is_elsewhere && slot.since.elapsed() >= grace
            };
            gone.extend(place.take_if(is_over));
        }
        for slot in &gone {
            self.places.remove(&slot.place());
        }
        gone
    }

    /// A slot that was never used, else one that nobody knows of any more.
    fn free(&mut self) -> Result<usize> {
        if self.slots.len() < SLOTS {
            return Ok(self.slots.len());
        }
        let is_free = |slot: &Option<Arc<MountedVolume>>| slot.as_ref().is_none_or(MountedVolume::is_forgotten);
        let found = (0..SLOTS).map(|step| (self.next + step) % SLOTS).find(|index| is_free(&self.slots[*index]));
        let Some(found) = found else {
            let fact = format!("{SLOTS} file systems of guests are in use; close some of what is open in the mount");
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
    fn what_is_kept_of_inodes_is_bounded_by_its_weight() {
        let kept = InodeCache::new(100);
        for number in 0..10 {
            kept.put(Ino(number), number, 30);
        }
        let known: Vec<u64> = (0..10).filter_map(|number| kept.get(Ino(number))).collect();
        assert_eq!(known, [7, 8, 9]);
        kept.put(Ino(10), 10, 101);
        assert_eq!(kept.get(Ino(10)), None);
        // Put once more, it weighs what it weighs now.
        kept.put(Ino(9), 99, 40);
        assert_eq!((kept.get(Ino(7)), kept.get(Ino(8)), kept.get(Ino(9))), (Some(7), Some(8), Some(99)));
        assert_eq!(kept.0.lock().weight(), 100);
    }

    #[test]
    fn a_number_says_what_it_stands_for() {
        for slot in [0, 1, 0x7fff] {
            for depth in [0, 1, GuestNode::DEEPEST] {
                for ino in [0, 2, Ino::LIMIT - 1] {
                    let node = GuestNode { slot, depth, ino: Ino(ino) };
                    assert_eq!(GuestNode::from_number(node.number()), Some(node));
                }
            }
        }
        assert_eq!(GuestNode::from_number(1), None);
        assert_eq!(GuestNode::from_number(GUEST - 1), None);
    }

    #[test]
    fn what_nobody_knows_of_any_more_is_not_kept() {
        let OneDisk { store, id, .. } = &OneDisk::new(1 << 20);
        let slots = MountedVolumes::default();
        // As many moments of one disk: the first is the kernel's, the second is being read, the third is shown to whoever looks next.
        let [known, open, shown, gone] = [0; 4].map(|_| DiskContents::with_one_volume(store, id));
        let (kernels, _) = slots.of(&known, 0).unwrap();
        let (_, _read) = slots.of(&open, 0).unwrap();
        slots.of(&shown, 0).unwrap();
        let (number, _) = slots.of(&gone, 0).unwrap();
        slots.told(kernels);
        let [is_known, is_open, is_gone] = [known, open, gone].map(|inside| Arc::downgrade(&inside));
        assert!(slots.table.write().vacate(GRACE).is_empty(), "somebody may just be about to be told of it");
        assert_eq!(slots.table.write().vacate(Duration::ZERO).len(), 1);
        assert!(is_known.strong_count() == 1 && is_open.strong_count() == 1 && is_gone.strong_count() == 0);
        assert_eq!(slots.get(number).map(drop).unwrap_err().kind(), ErrorKind::Stale);
        slots.told(number);
        slots.forgotten(kernels, 1);
        assert_eq!(slots.table.write().vacate(Duration::ZERO).len(), 1);
        assert_eq!(is_known.strong_count(), 0);
        // Its number is not given again as long as there are others.
        assert_eq!(slots.of(&DiskContents::with_one_volume(store, id), 0).unwrap().0, number + 1);
        assert_eq!(slots.of(&shown, 0).unwrap().0, number - 1);
    }
}
