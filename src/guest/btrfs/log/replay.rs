//! The steps of a replay: inodes, names in directories, then references, attributes and extents, and link
//! counts last.

use std::collections::{BTreeSet, HashSet};

use crate::error::Result;
use crate::guest::bytes::{le32, le64};
use crate::guest::filesystem::FileKind;

use super::super::entry::Entry;
use super::super::format::{Key, kind, limit};
use super::super::inode::{self, field, kind_of_item};
use super::super::nodes::Nodes;
use super::super::superblock::Superblock;
use super::super::tree::{Item, Tree};

/// A subvolume while its log is replayed.
pub(super) struct Replay<'a> {
    pub(super) nodes: &'a Nodes,
    pub(super) superblock: &'a Superblock,
    /// The subvolume.
    pub(super) tree: Tree,
    pub(super) log: &'a Tree,
    /// Bytes of changes at most.
    room: usize,
    /// Inodes whose names are counted at the end.
    pub(super) unsettled: BTreeSet<u64>,
    /// Inodes without a name, which were synced while they were open.
    nameless: HashSet<u64>,
}

impl<'a> Replay<'a> {
    pub(super) fn new(
        nodes: &'a Nodes,
        superblock: &'a Superblock,
        tree: Tree,
        log: &'a Tree,
        room: usize,
    ) -> Self {
        let (unsettled, nameless) = (BTreeSet::new(), HashSet::new());
        Self { nodes, superblock, tree, log, room, unsettled, nameless }
    }

    /// Replays the log, and returns the tree with its changes.
    pub(super) fn run(mut self) -> Result<Tree> {
        let log = self.log;
        for item in log.items(self.nodes, Key::FIRST) {
            let item = item?;
            if item.key.kind == kind::INODE {
                self.inode(&item)?;
            }
        }
        for item in log.items(self.nodes, Key::FIRST) {
            let item = item?;
            if item.key.kind == kind::DIR_INDEX && !self.nameless.contains(&item.key.object) {
                self.name(&item)?;
            }
        }
        for item in log.items(self.nodes, Key::FIRST) {
            let item = item?;
            if self.nameless.contains(&item.key.object) {
                continue;
            }
            match item.key.kind {
                kind::XATTR => self.put(item.key, item.data().to_vec())?,
                kind::INODE_REF | kind::INODE_EXTREF => self.references(&item)?,
                kind::EXTENT_DATA => self.extent(&item)?,
                _ => {}
            }
        }
        self.settle()?;
        Ok(self.tree)
    }

    /// An inode's item. First what is not in the log any more is removed: attributes, names, extents.
    fn inode(&mut self, item: &Item) -> Result<()> {
        let number = item.key.object;
        let logged = item.data();
        if logged.len() < inode::LEN {
            return Err(super::super::format::corrupt(format!("inode {number} is too short in the log")));
        }
        if le32(logged, field::LINKS) == 0 {
            self.nameless.insert(number);
            return Ok(());
        }
        self.remove_xattrs(number)?;
        let kind = kind_of_item(logged);
        if kind == Some(FileKind::Directory) {
            self.remove_names(number)?;
        }
        self.overwrite_inode(item)?;
        if kind == Some(FileKind::File)
            && let Some(inode) = self.raw_inode(number)?
        {
            // Extents beyond the end, such as those of a file that was truncated.
            let end = self.superblock.whole_sectors(le64(&inode, field::SIZE));
            let removed = self.drop_extents(number, end, u64::MAX)?;
            self.change_bytes(number, 0, removed)?;
        }
        self.unsettled.insert(number);
        Ok(())
    }

    /// Extended attributes that are not in the log were removed.
    fn remove_xattrs(&mut self, number: u64) -> Result<()> {
        let mut next = Some(Key::new(number, kind::XATTR, 0));
        while let Some(key) = next {
            let Some(item) = self.tree.first_from(self.nodes, key)?.filter(|i| i.key.is_beside(key)) else {
                return Ok(());
            };
            let logged = self.log.get(self.nodes, item.key)?;
            let is_kept =
                |name: &[u8]| logged.as_ref().is_some_and(|l| Entry::find(l.data(), name).is_some());
            let removed: Vec<&[u8]> =
                Entry::all(item.data()).flatten().map(|entry| entry.name).filter(|n| !is_kept(n)).collect();
            if !removed.is_empty() {
                let mut left = Some(item.data().to_vec());
                for name in removed {
                    left = left.and_then(|left| Entry::without(&left, name));
                }
                self.change(item.key, left)?;
            }
            next = item.key.next();
        }
        Ok(())
    }

    fn overwrite_inode(&mut self, item: &Item) -> Result<()> {
        let mut new = item.data().to_vec();
        let is = |item: &[u8], kind| kind_of_item(item) == Some(kind);
        let Some(mut old) = self.raw_inode(item.key.object)? else {
            // Extents and names that follow are counted as they come.
            set(&mut new, field::BYTES, 0);
            if is(&new, FileKind::Directory) {
                set(&mut new, field::SIZE, 0);
            }
            if le64(&new, field::GENERATION) == 0 {
                set(&mut new, field::GENERATION, self.superblock.generation.saturating_add(1));
            }
            return self.put(item.key, new);
        };
        let size = le64(&new, field::SIZE);
        if le64(&new, field::GENERATION) == 0 {
            // The inode was only logged to exist; a size is that of a file which was synced before.
            if is(&new, FileKind::File) && is(&old, FileKind::File) && size != 0 {
                set(&mut old, field::SIZE, size);
                return self.put(item.key, old);
            }
            return Ok(());
        }
        set(&mut new, field::BYTES, le64(&old, field::BYTES));
        if is(&new, FileKind::Directory) {
            // Its size follows its names.
            let size = if is(&old, FileKind::Directory) { le64(&old, field::SIZE) } else { 0 };
            set(&mut new, field::SIZE, size);
        }
        self.put(item.key, new)
    }

    /// The item of an inode in the subvolume.
    pub(super) fn raw_inode(&self, number: u64) -> Result<Option<Vec<u8>>> {
        let item = self.tree.get(self.nodes, Key::new(number, kind::INODE, 0))?;
        Ok(item.map(|item| item.data().to_vec()).filter(|item| item.len() >= inode::LEN))
    }

    pub(super) fn exists(&self, number: u64) -> Result<bool> {
        Ok(self.raw_inode(number)?.is_some())
    }

    /// Changes the size of a directory by its names.
    pub(super) fn change_size(&mut self, directory: u64, change: impl Fn(u64) -> u64) -> Result<()> {
        let Some(mut inode) = self.raw_inode(directory)? else { return Ok(()) };
        let size = change(le64(&inode, field::SIZE));
        set(&mut inode, field::SIZE, size);
        self.put(Key::new(directory, kind::INODE, 0), inode)
    }

    /// Changes the space that an inode takes.
    pub(super) fn change_bytes(&mut self, number: u64, added: u64, removed: u64) -> Result<()> {
        if added == removed {
            return Ok(());
        }
        let Some(mut inode) = self.raw_inode(number)? else { return Ok(()) };
        let bytes = le64(&inode, field::BYTES).saturating_add(added).saturating_sub(removed);
        set(&mut inode, field::BYTES, bytes);
        self.put(Key::new(number, kind::INODE, 0), inode)
    }

    pub(super) fn put(&mut self, key: Key, data: Vec<u8>) -> Result<()> {
        self.change(key, Some(data))
    }

    /// Changes an item of the subvolume, or removes it.
    pub(super) fn change(&mut self, key: Key, data: Option<Vec<u8>>) -> Result<()> {
        self.tree.change(key, data);
        if self.tree.overlay_weight() > self.room {
            return Err(limit("it changes too much"));
        }
        Ok(())
    }
}

/// Sets a number in an item.
pub(super) fn set(item: &mut [u8], at: usize, value: u64) {
    item[at..at + 8].copy_from_slice(&value.to_le_bytes());
}
