//! A node of a tree: its bytes, verified once, and the items or pointers in it.
//!
//! In a [`Node`] that exists the keys are in order, and the items lie within it.

use std::ops::Range;

use crate::error::Result;
use crate::guest::bytes::{array, le32, le64};

use super::format::{KEY_LEN, Key, corrupt};

const HEADER_LEN: usize = 101;
const ITEM_LEN: usize = KEY_LEN + 8;
const POINTER_LEN: usize = KEY_LEN + 16;
/// Levels of a tree at most.
pub(super) const MAX_LEVELS: u8 = 8;

/// Where a node is, and what it has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct NodePointer {
    /// Its logical address.
    pub(super) at: u64,
    /// 0: a leaf.
    pub(super) level: u8,
    /// The transaction that wrote it.
    pub(super) generation: u64,
}

/// A leaf or an inner node.
#[derive(Debug)]
pub(super) struct Node {
    bytes: Vec<u8>,
    pub(super) level: u8,
    /// Items or pointers.
    pub(super) count: usize,
    /// Where the first pointer or item is described.
    entry_len: usize,
}

impl Node {
    /// Decodes the node that `pointer` names. Its checksum has been verified.
    pub(super) fn parse(bytes: Vec<u8>, pointer: NodePointer, fsid: [u8; 16]) -> Result<Self> {
        let NodePointer { at, level, generation } = pointer;
        let wrong = |fact: String| corrupt(format!("the node at {at:#x} {fact}"));
        if array(&bytes, 0x20) != fsid {
            return Err(wrong("belongs to another file system".to_owned()));
        }
        if le64(&bytes, 0x30) != at {
            return Err(wrong(format!("belongs at {:#x}", le64(&bytes, 0x30))));
        }
        let [stored] = array(&bytes, 0x64);
        if stored != level || level >= MAX_LEVELS {
            return Err(wrong(format!("is of level {stored} instead of {level}")));
        }
        if le64(&bytes, 0x50) != generation {
            let fact = format!("is of generation {} instead of {generation}", le64(&bytes, 0x50));
            return Err(wrong(fact));
        }
        let entry_len = if level == 0 { ITEM_LEN } else { POINTER_LEN };
        let count = le32(&bytes, 0x60) as usize;
        if count > (bytes.len() - HEADER_LEN) / entry_len || count == 0 && level > 0 {
            return Err(wrong(format!("has an impossible number of entries ({count})")));
        }
        let node = Self { bytes, level, count, entry_len };
        for index in 0..count {
            if index > 0 && node.key(index - 1) >= node.key(index) {
                return Err(wrong("has keys out of order".to_owned()));
            }
            if level == 0 && node.range(index).end > node.bytes.len() {
                return Err(wrong("has an item outside of it".to_owned()));
            }
        }
        Ok(node)
    }

    /// The key of an entry.
    pub(super) fn key(&self, index: usize) -> Key {
        Key::parse(&self.bytes, HEADER_LEN + index * self.entry_len)
    }

    /// Where the data of an item is.
    fn range(&self, index: usize) -> Range<usize> {
        let at = HEADER_LEN + index * ITEM_LEN + KEY_LEN;
        let start = HEADER_LEN + le32(&self.bytes, at) as usize;
        start..start + le32(&self.bytes, at + 4) as usize
    }

    /// The data of an item of a leaf.
    pub(super) fn item(&self, index: usize) -> &[u8] {
        &self.bytes[self.range(index)]
    }

    /// The node below an entry of an inner node.
    pub(super) fn child(&self, index: usize) -> NodePointer {
        let at = HEADER_LEN + index * POINTER_LEN + KEY_LEN;
        NodePointer {
            at: le64(&self.bytes, at),
            level: self.level - 1,
            generation: le64(&self.bytes, at + 8),
        }
    }

    /// The number of entries whose keys are below `key`.
    pub(super) fn below(&self, key: Key) -> usize {
        self.partition(|found| found < key)
    }

    /// The number of entries whose keys are `key` or below.
    pub(super) fn up_to(&self, key: Key) -> usize {
        self.partition(|found| found <= key)
    }

    fn partition(&self, is_left: impl Fn(Key) -> bool) -> usize {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = usize::midpoint(low, high);
            if is_left(self.key(middle)) { low = middle + 1 } else { high = middle }
        }
        low
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POINTER: NodePointer = NodePointer { at: 0x4000, level: 0, generation: 7 };

    /// A leaf of 1 KiB with items of one byte.
    fn leaf(keys: &[u64]) -> Vec<u8> {
        let mut bytes = vec![0; 1024];
        bytes[0x30..0x38].copy_from_slice(&0x4000u64.to_le_bytes());
        bytes[0x50] = 7;
        bytes[0x60] = keys.len() as u8;
        for (index, offset) in keys.iter().enumerate() {
            let at = HEADER_LEN + index * ITEM_LEN;
            bytes[at..at + KEY_LEN].copy_from_slice(&Key::new(256, 1, *offset).to_bytes());
            let place = (1024 - HEADER_LEN - 1 - index) as u32;
            bytes[at + KEY_LEN..at + KEY_LEN + 4].copy_from_slice(&place.to_le_bytes());
            bytes[at + KEY_LEN + 4] = 1;
            bytes[1023 - index] = index as u8 + 1;
        }
        bytes
    }

    #[test]
    fn items_are_found_by_their_keys() {
        let node = Node::parse(leaf(&[1, 5, 9]), POINTER, [0; 16]).unwrap();
        let key = |offset| Key::new(256, 1, offset);
        assert_eq!([0, 1, 2].map(|index| node.item(index)[0]), [1, 2, 3]);
        assert_eq!([0, 1, 2, 5, 9, 10].map(|at| node.below(key(at))), [0, 0, 1, 1, 2, 3]);
        assert_eq!([0, 1, 2, 5, 9, 10].map(|at| node.up_to(key(at))), [0, 1, 1, 2, 3, 3]);
    }

    #[test]
    fn damaged_nodes_are_refused() {
        let parse = |bytes, pointer| Node::parse(bytes, pointer, [0; 16]).is_ok();
        assert!(parse(leaf(&[1, 5]), POINTER));
        assert!(!parse(leaf(&[5, 1]), POINTER));
        assert!(!parse(leaf(&[1, 5]), NodePointer { at: 0x8000, ..POINTER }));
        assert!(!parse(leaf(&[1, 5]), NodePointer { level: 1, ..POINTER }));
        assert!(!parse(leaf(&[1, 5]), NodePointer { generation: 8, ..POINTER }));
        let mut outside = leaf(&[1, 5]);
        outside[HEADER_LEN + KEY_LEN + 2] = 1;
        assert!(!parse(outside, POINTER));
        let mut full = leaf(&[1, 5]);
        full[0x60..0x64].fill(0xff);
        assert!(!parse(full, POINTER));
        assert!(Node::parse(leaf(&[1]), POINTER, [1; 16]).is_err());
    }
}
