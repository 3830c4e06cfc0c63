//! The inode numbers of guests' files.
//!
//! A number encodes the tree (its slot), the depth below its root (for directories and symbolic links, whose
//! targets depend on it) and the object, the guest's own number. So most files need no state. An object of
//! more than 40 bits does not fit: it gets a number from a counter, and an entry in a table. Promises: a
//! number from the table is given once; its entry stays while the kernel has lookups of it, and afterwards
//! until [`IDLE_KEPT`] others were given; FORGET gives it back.

use std::collections::HashMap;
use std::num::NonZero;

use lru::LruCache;
use parking_lot::Mutex;

use crate::guest::Ino;

/// Set in all numbers that encode their file. The highest bit stays clear for programs that use signed
/// numbers.
const ENCODED: u64 = 1 << 62;
/// Set in all numbers of the table, and in no number of another node of the mount.
const TABLED: u64 = 1 << 61;
pub(super) const SLOT_BITS: u32 = 15;
const DEPTH_BITS: u32 = 7;
const INO_BITS: u32 = 40;
const _: () = assert!(SLOT_BITS + DEPTH_BITS + INO_BITS == 62 && 1 << INO_BITS == Ino::SMALL_LIMIT);

/// Entries of the table without lookups that are kept: a number of a listing, or of an answer that is on its
/// way to the kernel.
const IDLE_KEPT: NonZero<usize> = NonZero::new(1 << 16).expect("not zero");

/// A file of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct GuestNode {
    /// The slot of the file's tree: a subvolume of a file system.
    pub(super) slot: u16,
    /// Depth of the directory, or of the directory that contains the symbolic link; 0 for all other files.
    pub(super) depth: u8,
    /// The object: the guest's inode number, in its tree.
    pub(super) ino: Ino,
}

impl GuestNode {
    /// The maximum depth; deeper nodes have this value.
    pub(super) const DEEPEST: u8 = (1 << DEPTH_BITS) - 1;

    /// The number that encodes it; `None` if its object is too large.
    fn encoded(self) -> Option<u64> {
        let head = u64::from(self.slot) << DEPTH_BITS | u64::from(self.depth);
        (self.ino.0 < Ino::SMALL_LIMIT).then_some(ENCODED | head << INO_BITS | self.ino.0)
    }

    /// The file that a number encodes, if it does.
    fn decoded(number: u64) -> Option<Self> {
        (number & ENCODED != 0).then_some(Self {
            slot: (number >> (DEPTH_BITS + INO_BITS)) as u16 & ((1 << SLOT_BITS) - 1),
            depth: (number >> INO_BITS) as u8 & Self::DEEPEST,
            ino: Ino(number & (Ino::SMALL_LIMIT - 1)),
        })
    }
}

/// Whether a number is that of a guest's file.
pub(super) fn is_guest(number: u64) -> bool {
    number & (ENCODED | TABLED) != 0
}

/// All numbers of guests' files.
#[derive(Debug)]
pub(super) struct GuestNumbers {
    /// A leaf.
    table: Mutex<NumberTable>,
}

#[derive(Debug)]
struct NumberTable {
    by_node: HashMap<GuestNode, u64>,
    files: HashMap<u64, TabledFile>,
    /// Numbers without lookups, by their last use.
    idle: LruCache<u64, ()>,
    given: u64,
}

#[derive(Debug)]
struct TabledFile {
    node: GuestNode,
    lookup_count: u64,
}

impl Default for GuestNumbers {
    fn default() -> Self {
        Self::keeping(IDLE_KEPT)
    }
}

impl GuestNumbers {
    fn keeping(idle: NonZero<usize>) -> Self {
        let (by_node, files, idle) = (HashMap::new(), HashMap::new(), LruCache::new(idle));
        Self { table: Mutex::new(NumberTable { by_node, files, idle, given: 0 }) }
    }

    /// The number of a file.
    pub(super) fn number(&self, node: GuestNode) -> u64 {
        node.encoded().unwrap_or_else(|| self.table.lock().number(node))
    }

    /// The file of a number; `None` if there is no such number, or it was released.
    pub(super) fn node(&self, number: u64) -> Option<GuestNode> {
        let tabled = || self.table.lock().files.get(&number).map(|file| file.node);
        GuestNode::decoded(number).or_else(|| if number & TABLED == 0 { None } else { tabled() })
    }

    /// Adds a lookup, and returns the file.
    pub(super) fn add_lookup(&self, number: u64) -> Option<GuestNode> {
        if let Some(node) = GuestNode::decoded(number) {
            return Some(node);
        }
        if number & TABLED == 0 {
            return None;
        }
        let table = &mut *self.table.lock();
        let file = table.files.get_mut(&number)?;
        file.lookup_count += 1;
        table.idle.pop(&number);
        Some(file.node)
    }

    /// FORGET: subtracts lookups, and returns the file.
    pub(super) fn forget(&self, number: u64, times: u64) -> Option<GuestNode> {
        if let Some(node) = GuestNode::decoded(number) {
            return Some(node);
        }
        if number & TABLED == 0 {
            return None;
        }
        let mut table = self.table.lock();
        let file = table.files.get_mut(&number)?;
        file.lookup_count = file.lookup_count.saturating_sub(times);
        let (node, is_idle) = (file.node, file.lookup_count == 0);
        if is_idle {
            table.make_idle(number);
        }
        Some(node)
    }
}

impl NumberTable {
    fn number(&mut self, node: GuestNode) -> u64 {
        if let Some(number) = self.by_node.get(&node) {
            self.idle.promote(number);
            return *number;
        }
        // X1: a number is given once.
        let number = TABLED | self.given;
        self.given += 1;
        self.by_node.insert(node, number);
        self.files.insert(number, TabledFile { node, lookup_count: 0 });
        self.make_idle(number);
        number
    }

    fn make_idle(&mut self, number: u64) {
        if let Some((oldest, ())) = self.idle.push(number, ())
            && oldest != number
            && let Some(file) = self.files.remove(&oldest)
        {
            self.by_node.remove(&file.node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inode_numbers_decode_to_their_node() {
        for slot in [0, 1, 0x7fff] {
            for depth in [0, 1, GuestNode::DEEPEST] {
                for ino in [0, 2, Ino::SMALL_LIMIT - 1] {
                    let node = GuestNode { slot, depth, ino: Ino(ino) };
                    assert_eq!(node.encoded().and_then(GuestNode::decoded), Some(node));
                }
            }
        }
        assert_eq!(GuestNode::decoded(1), None);
        assert_eq!(GuestNode::decoded(ENCODED - 1), None);
        assert!(!is_guest(1) && !is_guest(TABLED - 1) && is_guest(TABLED) && is_guest(ENCODED));
    }

    /// Files of two subvolumes, whose objects have up to 64 bits.
    fn files() -> impl Iterator<Item = GuestNode> {
        let objects = [256, Ino::SMALL_LIMIT - 1, Ino::SMALL_LIMIT, Ino::SMALL_LIMIT + 256, u64::MAX];
        let in_slot = move |slot| objects.map(move |ino| GuestNode { slot, depth: 1, ino: Ino(ino) });
        [3, 4].into_iter().flat_map(in_slot)
    }

    #[test]
    fn large_objects_of_two_subvolumes_have_numbers_of_their_own() {
        let numbers = GuestNumbers::default();
        let given: Vec<u64> = files().map(|node| numbers.number(node)).collect();
        let mut unique = given.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), given.len());
        for (node, number) in files().zip(given) {
            assert!(is_guest(number) && number.cast_signed() > 0);
            assert_eq!((numbers.node(number), numbers.number(node)), (Some(node), number));
        }
        assert_eq!(numbers.table.lock().files.len(), 6, "small objects need no entry");
    }

    #[test]
    fn a_number_stays_while_the_kernel_holds_it_and_is_then_given_back() {
        let numbers = GuestNumbers::keeping(NonZero::new(2).unwrap());
        let file = |ino: u64| GuestNode { slot: 0, depth: 0, ino: Ino(ino << 41) };
        let held = numbers.number(file(1));
        for _ in 0..3 {
            assert_eq!(numbers.add_lookup(held), Some(file(1)));
        }
        let crowd = |from: u64| {
            for ino in from..from + 100 {
                numbers.number(file(ino));
            }
        };
        crowd(100);
        assert_eq!((numbers.node(held), numbers.number(file(1))), (Some(file(1)), held));
        assert_eq!(numbers.forget(held, 2), Some(file(1)));
        crowd(300);
        assert_eq!(numbers.node(held), Some(file(1)), "one lookup is left");
        assert_eq!(numbers.forget(held, 1), Some(file(1)));
        assert_eq!(numbers.number(file(1)), held, "as long as few others were given");
        crowd(500);
        assert_eq!((numbers.node(held), numbers.add_lookup(held)), (None, None));
        assert_ne!(numbers.number(file(1)), held, "a number is given once");
        let table = numbers.table.lock();
        assert_eq!((table.files.len(), table.by_node.len(), table.idle.len()), (2, 2, 2));
    }
}
