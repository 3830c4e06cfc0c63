//! Keys, object numbers and item types of btrfs' trees, and the errors about them.

use crate::error::{Error, ErrorKind};
use crate::guest::bytes::{array, le64};

/// The error for a structure that violates its format.
pub(super) fn corrupt(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Corrupt, fact)
}

/// The error for a valid structure that is not supported.
pub(super) fn unsupported(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Unsupported, fact)
}

/// The error for what exceeds a bound of this reader.
pub(super) fn limit(fact: impl Into<String>) -> Error {
    Error::new(ErrorKind::Limit, fact)
}

/// Whether an error states a fact about the file system. Any other error is temporary: a retry may succeed.
pub(super) fn is_fact(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Limit)
}

/// Bytes of a key on the disk.
pub(super) const KEY_LEN: usize = 17;

/// Object numbers: of trees, and of items that belong to no inode.
pub(super) mod object {
    pub(in super::super) const EXTENT_TREE: u64 = 2;
    pub(in super::super) const FS_TREE: u64 = 5;
    pub(in super::super) const CSUM_TREE: u64 = 7;
    pub(in super::super) const FREE_SPACE_TREE: u64 = 10;
    pub(in super::super) const BLOCK_GROUP_TREE: u64 = 11;
    /// The first number of subvolumes and of inodes; the root directory of each tree.
    pub(in super::super) const FIRST_FREE: u64 = 256;
    /// The last number of subvolumes and of inodes.
    pub(in super::super) const LAST_FREE: u64 = 256u64.wrapping_neg();
    /// All chunks.
    pub(in super::super) const CHUNKS: u64 = 256;
    /// All devices.
    pub(in super::super) const DEVICES: u64 = 1;
    /// All checksums of data.
    pub(in super::super) const CHECKSUMS: u64 = 10u64.wrapping_neg();
    /// All log trees.
    pub(in super::super) const TREE_LOG: u64 = 6u64.wrapping_neg();
}

/// Types of items.
pub(super) mod kind {
    pub(in super::super) const INODE: u8 = 1;
    pub(in super::super) const INODE_REF: u8 = 12;
    pub(in super::super) const INODE_EXTREF: u8 = 13;
    pub(in super::super) const XATTR: u8 = 24;
    pub(in super::super) const DIR_LOG_INDEX: u8 = 72;
    pub(in super::super) const DIR_ITEM: u8 = 84;
    pub(in super::super) const DIR_INDEX: u8 = 96;
    pub(in super::super) const EXTENT_DATA: u8 = 108;
    pub(in super::super) const EXTENT_CSUM: u8 = 128;
    pub(in super::super) const ROOT: u8 = 132;
    pub(in super::super) const ROOT_BACKREF: u8 = 144;
    pub(in super::super) const ROOT_REF: u8 = 156;
    pub(in super::super) const BLOCK_GROUP: u8 = 192;
    pub(in super::super) const DEVICE: u8 = 216;
    pub(in super::super) const CHUNK: u8 = 228;
}

/// The key of an item (`btrfs_disk_key`): its order is that of the trees.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) object: u64,
    pub(super) kind: u8,
    pub(super) offset: u64,
}

impl Key {
    pub(super) const FIRST: Self = Self { object: 0, kind: 0, offset: 0 };
    pub(super) const LAST: Self = Self { object: u64::MAX, kind: u8::MAX, offset: u64::MAX };

    pub(super) fn new(object: u64, kind: u8, offset: u64) -> Self {
        Self { object, kind, offset }
    }

    /// The key at `at`; zeroes where the bytes end.
    pub(super) fn parse(bytes: &[u8], at: usize) -> Self {
        let [kind] = array(bytes, at + 8);
        Self { object: le64(bytes, at), kind, offset: le64(bytes, at + 9) }
    }

    pub(super) fn to_bytes(self) -> [u8; KEY_LEN] {
        let mut bytes = [0; KEY_LEN];
        bytes[..8].copy_from_slice(&self.object.to_le_bytes());
        bytes[8] = self.kind;
        bytes[9..].copy_from_slice(&self.offset.to_le_bytes());
        bytes
    }

    /// The next key, if there is one.
    pub(super) fn next(self) -> Option<Self> {
        if let Some(offset) = self.offset.checked_add(1) {
            return Some(Self { offset, ..self });
        }
        if let Some(kind) = self.kind.checked_add(1) {
            return Some(Self { kind, offset: 0, ..self });
        }
        self.object.checked_add(1).map(|object| Self { object, kind: 0, offset: 0 })
    }

    /// The key before, if there is one.
    pub(super) fn previous(self) -> Option<Self> {
        if let Some(offset) = self.offset.checked_sub(1) {
            return Some(Self { offset, ..self });
        }
        if let Some(kind) = self.kind.checked_sub(1) {
            return Some(Self { kind, offset: u64::MAX, ..self });
        }
        self.object.checked_sub(1).map(|object| Self { object, kind: u8::MAX, offset: u64::MAX })
    }

    /// Whether both keys have the same object and type.
    pub(super) fn is_beside(self, other: Self) -> bool {
        (self.object, self.kind) == (other.object, other.kind)
    }
}

/// The hash of a name in the keys of directory items and extended attributes.
pub(super) fn name_hash(name: &[u8]) -> u64 {
    raw_crc32c(!1, name).into()
}

/// The hash of a parent and a name in the keys of extended references.
pub(super) fn extref_hash(parent: u64, name: &[u8]) -> u64 {
    raw_crc32c(parent as u32, name).into()
}

/// CRC-32C without the inversions at its beginning and end.
fn raw_crc32c(seed: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!seed, bytes)
}

/// Whether a number is that of a tree of files.
pub(super) fn is_subvolume(object: u64) -> bool {
    object == object::FS_TREE || (object::FIRST_FREE..=object::LAST_FREE).contains(&object)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_the_hashes_of_the_format() {
        // The documented key of the directory item that names the default subvolume.
        assert_eq!(name_hash(b"default"), 2_378_154_706);
    }

    #[test]
    fn keys_have_neighbours() {
        let key = Key::new(5, 255, u64::MAX);
        assert_eq!(key.next(), Some(Key::new(6, 0, 0)));
        assert_eq!(Key::new(6, 0, 0).previous(), Some(key));
        assert_eq!(Key::new(5, 1, u64::MAX).next(), Some(Key::new(5, 2, 0)));
        assert_eq!((Key::FIRST.previous(), Key::new(u64::MAX, 255, u64::MAX).next()), (None, None));
        assert_eq!(Key::parse(&key.to_bytes(), 0), key);
    }
}
