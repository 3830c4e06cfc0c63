//! The guests' file systems that the mount shows, and the inode numbers of what is in them.
//!
//! A number says by itself what it stands for: which file system, how deep below its root (for directories and links, whose
//! targets depend on that), and which inode. So nothing is remembered for each of a million files. A file system is
//! remembered for as long as the kernel knows anything of it; only then may others get its numbers.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};

use lru::LruCache;
use parking_lot::{Mutex, RwLock};

use crate::browse::{Inside, Mounted};
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
/// Inodes whose extended attributes are kept: `ls -l` asks for several of each file.
const ATTRIBUTES_KEPT: usize = 256;
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
pub(super) struct Slot {
    pub(super) inside: Arc<Inside>,
    pub(super) volume: usize,
    pub(super) mounted: Mounted,
    /// How often the kernel has been told of anything of it, and has not forgotten it.
    known: AtomicI64,
    attributes: Kept<Arc<[ExtendedAttribute]>>,
    plain: Kept<()>,
    parents: Kept<Ino>,
}

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Slot").field("inside", &self.inside).field("volume", &self.volume).finish_non_exhaustive()
    }
}

/// Something of inodes, the least recently used of which are forgotten. Takes no memory before there is any.
struct Kept<T> {
    most: usize,
    found: Mutex<LruCache<Ino, T>>,
}

impl<T: Clone> Kept<T> {
    fn new(most: usize) -> Self {
        Self { most, found: Mutex::new(LruCache::unbounded()) }
    }

    fn get(&self, ino: Ino) -> Option<T> {
        self.found.lock().get(&ino).cloned()
    }

    fn put(&self, ino: Ino, value: T) {
        let mut found = self.found.lock();
        found.put(ino, value);
        if found.len() > self.most {
            found.pop_lru();
        }
    }
}

impl Slot {
    /// Notes that an inode has no extended attributes.
    pub(super) fn note_plain(&self, ino: Ino) {
        self.plain.put(ino, ());
    }

    /// Notes which directory holds a directory or a link.
    pub(super) fn held_by(&self, ino: Ino, parent: Ino) {
        self.parents.put(ino, parent);
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
        self.attributes.put(ino, Arc::clone(&found));
        Ok(found)
    }
}

/// All file systems that are shown.
#[derive(Debug, Default)]
pub(super) struct Slots {
    table: RwLock<Table>,
}

#[derive(Debug, Default)]
struct Table {
    slots: Vec<Arc<Slot>>,
    /// By address of the inside, which lives as long as its slot, and volume.
    places: HashMap<(usize, usize), u16>,
    /// Where the search for one that is free begins.
    next: usize,
}

impl Slots {
    /// The slot of a volume; a new one if it has none.
    pub(super) fn of(&self, inside: &Arc<Inside>, volume: usize) -> Result<(u16, Arc<Slot>)> {
        let place = (Arc::as_ptr(inside) as usize, volume);
        let table = self.table.read();
        if let Some(slot) = table.places.get(&place) {
            return Ok((*slot, Arc::clone(&table.slots[usize::from(*slot)])));
        }
        drop(table);
        let mounted = inside.mount(volume)?;
        let slot = Arc::new(Slot {
            inside: Arc::clone(inside),
            volume,
            mounted,
            known: AtomicI64::new(0),
            attributes: Kept::new(ATTRIBUTES_KEPT),
            plain: Kept::new(PLAIN_KEPT),
            parents: Kept::new(PARENTS_KEPT),
        });
        let mut table = self.table.write();
        if let Some(slot) = table.places.get(&place) {
            return Ok((*slot, Arc::clone(&table.slots[usize::from(*slot)])));
        }
        let number = table.free()?;
        if number == table.slots.len() {
            table.slots.push(Arc::clone(&slot));
        } else {
            let old = std::mem::replace(&mut table.slots[number], Arc::clone(&slot));
            table.places.remove(&(Arc::as_ptr(&old.inside) as usize, old.volume));
        }
        table.places.insert(place, number as u16);
        Ok((number as u16, slot))
    }

    /// The slot of that number.
    pub(super) fn get(&self, slot: u16) -> Result<Arc<Slot>> {
        let table = self.table.read();
        table.slots.get(usize::from(slot)).cloned().ok_or_else(|| crate::store::stale("a number that was never given"))
    }

    /// The kernel has been told of something in a slot.
    pub(super) fn told(&self, slot: u16) {
        if let Some(slot) = self.table.read().slots.get(usize::from(slot)) {
            slot.known.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// The kernel has forgotten something in a slot, of which it had been told that often.
    pub(super) fn forgotten(&self, slot: u16, times: u64) {
        if let Some(slot) = self.table.read().slots.get(usize::from(slot)) {
            slot.known.fetch_sub(times.cast_signed(), Ordering::Relaxed);
        }
    }
}

impl Table {
    /// A slot that was never used, else one that nobody knows of any more.
    fn free(&mut self) -> Result<usize> {
        if self.slots.len() < SLOTS {
            return Ok(self.slots.len());
        }
        let is_free = |slot: &Arc<Slot>| slot.known.load(Ordering::Relaxed) <= 0 && Arc::strong_count(slot) == 1;
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
}
