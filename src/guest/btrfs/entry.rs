//! Entries of directories and extended attributes (`btrfs_dir_item`), and the names that refer back from
//! inodes to directories (`btrfs_inode_ref`, `btrfs_inode_extref`).

use crate::guest::bytes::{le16, le64, slice};

use super::format::{KEY_LEN, Key, kind};

const ENTRY_LEN: usize = 30;
const REF_LEN: usize = 10;
const EXTREF_LEN: usize = 18;

/// An entry of a directory, or an extended attribute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    /// The key of the item that is meant: of an inode or of a subvolume's root.
    pub(super) location: Key,
    pub(super) kind: u8,
    pub(super) name: &'a [u8],
    /// The value of an extended attribute.
    pub(super) value: &'a [u8],
    /// All of its bytes.
    raw: &'a [u8],
}

impl<'a> Entry<'a> {
    /// The entries of an item: more than one if the hashes of their names are equal. `None` ends the entries
    /// of a damaged item.
    pub(super) fn all(mut item: &'a [u8]) -> impl Iterator<Item = Option<Self>> {
        std::iter::from_fn(move || {
            if item.is_empty() {
                return None;
            }
            let (value_len, name_len) = (usize::from(le16(item, 25)), usize::from(le16(item, 27)));
            let len = ENTRY_LEN + name_len + value_len;
            let Some((raw, rest)) = item.split_at_checked(len) else {
                item = &[];
                return Some(None);
            };
            item = rest;
            Some(Some(Self {
                location: Key::parse(raw, 0),
                kind: raw[29],
                name: slice(raw, ENTRY_LEN, name_len),
                value: slice(raw, ENTRY_LEN + name_len, value_len),
                raw,
            }))
        })
    }

    /// The entry with a name.
    pub(super) fn find(item: &'a [u8], name: &[u8]) -> Option<Self> {
        Self::all(item).flatten().find(|entry| entry.name == name)
    }

    /// The item without the entry of a name; `None` if nothing is left.
    pub(super) fn without(item: &[u8], name: &[u8]) -> Option<Vec<u8>> {
        let kept = Entry::all(item).flatten().filter(|entry| entry.name != name);
        let kept: Vec<u8> = kept.flat_map(|entry| entry.raw).copied().collect();
        (!kept.is_empty()).then_some(kept)
    }

    /// The bytes of a new entry of a directory.
    pub(super) fn encode(location: Key, generation: u64, kind: u8, name: &[u8]) -> Vec<u8> {
        let mut bytes = location.to_bytes().to_vec();
        bytes.extend(generation.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.push(kind);
        bytes.extend(name);
        bytes
    }
}

/// Whether a name can be shown as an entry of a directory.
pub(super) fn is_name(name: &[u8]) -> bool {
    !name.is_empty() && name != b"." && name != b".." && !name.contains(&b'/') && !name.contains(&0)
}

/// A name of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct NameRef<'a> {
    /// The directory.
    pub(super) parent: u64,
    /// The index in it.
    pub(super) index: u64,
    pub(super) name: &'a [u8],
    raw: &'a [u8],
}

impl<'a> NameRef<'a> {
    /// The names in an item; those of a damaged item end early.
    pub(super) fn all(key: Key, mut item: &'a [u8]) -> impl Iterator<Item = Self> {
        std::iter::from_fn(move || {
            let is_extended = key.kind == kind::INODE_EXTREF;
            let (parent, skip, head) =
                if is_extended { (le64(item, 0), 8, EXTREF_LEN) } else { (key.offset, 0, REF_LEN) };
            let (raw, rest) = item.split_at_checked(head + usize::from(le16(item, skip + 8)))?;
            item = rest;
            (raw.len() > head).then(|| Self { parent, index: le64(raw, skip), name: &raw[head..], raw })
        })
    }

    /// The item without a name; `None` if nothing is left.
    pub(super) fn without(key: Key, item: &[u8], parent: u64, name: &[u8]) -> Option<Vec<u8>> {
        let kept = NameRef::all(key, item).filter(|found| (found.parent, found.name) != (parent, name));
        let kept: Vec<u8> = kept.flat_map(|found| found.raw).copied().collect();
        (!kept.is_empty()).then_some(kept)
    }

    /// The bytes of a name in an item of type `INODE_REF`.
    pub(super) fn encode(index: u64, name: &[u8]) -> Vec<u8> {
        let mut bytes = index.to_le_bytes().to_vec();
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend(name);
        bytes
    }
}

/// The entry of a subvolume in its parent (`btrfs_root_ref`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RootRef<'a> {
    pub(super) directory: u64,
    pub(super) name: &'a [u8],
}

impl<'a> RootRef<'a> {
    pub(super) fn parse(item: &'a [u8]) -> Self {
        Self { directory: le64(item, 0), name: slice(item, 18, le16(item, 16).into()) }
    }
}

const _: () = assert!(KEY_LEN + 8 + 2 + 2 + 1 == ENTRY_LEN);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_with_one_hash_share_an_item() {
        let entry = |object, name: &[u8]| Entry::encode(Key::new(object, 1, 0), 9, 1, name);
        let item = [entry(257, b"one"), entry(258, b"two")].concat();
        assert_eq!(Entry::find(&item, b"two").unwrap().location.object, 258);
        assert_eq!(Entry::without(&item, b"one"), Some(entry(258, b"two")));
        assert_eq!(Entry::without(&entry(257, b"one"), b"one"), None);
        let cut: Vec<_> = Entry::all(&item[..item.len() - 1]).collect();
        assert!(cut.len() == 2 && cut[0].is_some() && cut[1].is_none());
        assert_eq!(Entry::all(&[1]).collect::<Vec<_>>(), [None]);
    }

    #[test]
    fn names_of_both_forms() {
        let key = Key::new(257, kind::INODE_REF, 256);
        let item = [NameRef::encode(2, b"a"), NameRef::encode(3, b"bc")].concat();
        let all: Vec<_> = NameRef::all(key, &item).map(|r| (r.parent, r.index, r.name.to_vec())).collect();
        assert_eq!(all, [(256, 2, b"a".to_vec()), (256, 3, b"bc".to_vec())]);
        assert_eq!(NameRef::without(key, &item, 256, b"a"), Some(NameRef::encode(3, b"bc")));
        let key = Key::new(257, kind::INODE_EXTREF, 5);
        let item = [&300u64.to_le_bytes()[..], &NameRef::encode(7, b"x")].concat();
        let all: Vec<_> = NameRef::all(key, &item).collect();
        assert_eq!((all.len(), all[0].parent, all[0].index, all[0].name), (1, 300, 7, &b"x"[..]));
        assert_eq!(NameRef::all(key, &item[..18]).count() + NameRef::all(key, &[]).count(), 0);
    }
}
