//! The inode numbers that a tree of files shows.
//!
//! btrfs numbers the inodes of each subvolume from 256 on. A tree shows its own inodes with their own
//! numbers, and those of other subvolumes in it with a number of the subvolume above:
//!
//! | bits | are |
//! |---|---|
//! | 0-39 | the inode's own number |
//! | 40-62 | 0: the tree's own subvolume; else 1 + the index of another one, in the order of their numbers |
//! | 63 | a subvolume that is not here, as snapshots show those in their original: an empty directory |
//!
//! For such an empty directory, bits 0-39 are the number of the subvolume that is not here.

use crate::error::Result;
use crate::guest::filesystem::Ino;

use super::Btrfs;
use super::format::{corrupt, unsupported};

const OBJECT_BITS: u32 = 40;
const SUBVOLUME_BITS: u32 = 23;
const STUB: u64 = 1 << (OBJECT_BITS + SUBVOLUME_BITS);
/// Subvolumes of a file system at most.
pub(super) const MAX_SUBVOLUMES: usize = 1 << 18;

/// What a number means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Object {
    /// An inode of a subvolume.
    Inode { subvolume: usize, object: u64 },
    /// An empty directory in a subvolume, in place of the subvolume `target`.
    Stub { subvolume: usize, target: u64 },
}

/// Encodes an object for the tree of the subvolume `own`.
fn encode(own: usize, object: Object) -> Result<Ino> {
    let (subvolume, low, flag) = match object {
        Object::Inode { subvolume, object } => (subvolume, object, 0),
        Object::Stub { subvolume, target } => (subvolume, target, STUB),
    };
    if low >= 1 << OBJECT_BITS {
        return Err(unsupported(format!("number {low} is larger than this reader can show")));
    }
    let high = if subvolume == own { 0 } else { subvolume as u64 + 1 };
    Ok(Ino(flag | high << OBJECT_BITS | low))
}

/// The reverse, with `count` subvolumes.
fn decode(own: usize, count: usize, ino: Ino) -> Option<Object> {
    let low = ino.0 & ((1 << OBJECT_BITS) - 1);
    let high = (ino.0 & !STUB) >> OBJECT_BITS;
    let subvolume = if high == 0 { own } else { high as usize - 1 };
    (subvolume < count).then_some(if ino.0 & STUB == 0 {
        Object::Inode { subvolume, object: low }
    } else {
        Object::Stub { subvolume, target: low }
    })
}

impl Btrfs {
    /// The number that shows an object.
    pub(super) fn number(&self, object: Object) -> Result<Ino> {
        encode(self.subvolume, object)
    }

    /// What a number means.
    pub(super) fn object(&self, ino: Ino) -> Result<Object> {
        let found = decode(self.subvolume, self.shared.subvolumes.len(), ino);
        found.ok_or_else(|| corrupt(format!("inode {} is referenced, but does not exist", ino.0)))
    }

    /// The subvolume and the inode that a number means.
    pub(super) fn inode_object(&self, ino: Ino) -> Result<(usize, u64)> {
        match self.object(ino)? {
            Object::Inode { subvolume, object } => Ok((subvolume, object)),
            Object::Stub { .. } => Err(corrupt("it is a directory")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_unique_and_small_in_the_own_subvolume() {
        let objects = [
            Object::Inode { subvolume: 3, object: 257 },
            Object::Inode { subvolume: 0, object: 257 },
            Object::Inode { subvolume: 4, object: 257 },
            Object::Stub { subvolume: 3, target: 257 },
            Object::Stub { subvolume: 0, target: 257 },
        ];
        let numbers = objects.map(|object| encode(3, object).unwrap());
        assert_eq!(numbers[0], Ino(257));
        for (index, number) in numbers.iter().enumerate() {
            assert!(!numbers[..index].contains(number));
            assert_eq!(decode(3, 5, *number), Some(objects[index]));
        }
        assert_eq!(decode(3, 5, Ino(6 << OBJECT_BITS)), None);
        assert!(encode(0, Object::Inode { subvolume: 0, object: 1 << 40 }).is_err());
        const { assert!(MAX_SUBVOLUMES < 1 << SUBVOLUME_BITS) };
    }
}
