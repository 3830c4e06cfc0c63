//! Directories: names by their hash, listings by index, subvolumes in them, and targets of links.
//!
//! An entry that means a subvolume shows its root directory, if the subvolume's own record says that it is
//! there. In a snapshot it is not: there it is an empty directory, as for the kernel.
//!
//! Damage costs the names in the damaged node. A listing gives the others first, and the error last. For
//! this, the positions that it returns record whether there was damage before them.

use crate::error::{Error, Result};
use crate::guest::filesystem::{DirectoryEntry, FileAttributes, FileKind, Ino};

use super::entry::{Entry, RootRef, is_name};
use super::format::{Key, corrupt, is_fact, kind, name_hash, object};
use super::inode::kind_of_entry;
use super::number::Object;
use super::{Btrfs, Shared, about};

/// Linux' limit of the length of a link's target.
const MAX_TARGET_LEN: u64 = 4095;
const MAX_NAME_LEN: usize = 255;
/// Set in a position of a listing after damage. The rest is an index.
const DAMAGED: u64 = 1 << 62;

impl Btrfs {
    pub(super) fn look_up(&self, subvolume: usize, directory: u64, name: &[u8]) -> Result<Option<Ino>> {
        let shared = &*self.shared;
        shared.inode_of(subvolume, directory, FileKind::Directory)?;
        if name.len() > MAX_NAME_LEN {
            return Ok(None);
        }
        let Some(location) = shared.location(subvolume, directory, name)? else { return Ok(None) };
        self.show(subvolume, directory, location, name).map(Some)
    }

    pub(super) fn list_directory(
        &self,
        subvolume: usize,
        directory: u64,
        from: u64,
        each: &mut dyn FnMut(DirectoryEntry) -> bool,
    ) -> Result<()> {
        let shared = &*self.shared;
        shared.inode_of(subvolume, directory, FileKind::Directory)?;
        let mut damage: Option<Error> = None;
        if from & DAMAGED != 0 {
            damage = Some(corrupt(format!("inode {directory} has damaged entries")));
        }
        let first = Key::new(directory, kind::DIR_INDEX, from & !DAMAGED);
        for item in shared.tree(subvolume).items_beside(&shared.nodes, first) {
            let entry = item.and_then(|item| self.entry(subvolume, directory, item.key.offset, item.data()));
            match entry {
                Ok(mut entry) => {
                    entry.next |= if damage.is_some() { DAMAGED } else { 0 };
                    if !each(entry) {
                        return Ok(());
                    }
                }
                Err(error) if is_fact(&error) => damage = Some(error.within(format!("inode {directory}"))),
                Err(error) => return Err(error),
            }
        }
        damage.map_or(Ok(()), Err)
    }

    /// The entry in an item of a directory.
    fn entry(&self, subvolume: usize, directory: u64, index: u64, item: &[u8]) -> Result<DirectoryEntry> {
        let found = Entry::all(item).flatten().next().filter(|entry| is_name(entry.name));
        let (Some(entry), true) = (found, index < DAMAGED - 1) else {
            return Err(corrupt(format!("a damaged entry (index {index})")));
        };
        let kind = match entry.location.kind {
            kind::ROOT => Some(FileKind::Directory),
            _ => kind_of_entry(entry.kind),
        };
        let ino = self.show(subvolume, directory, entry.location, entry.name)?;
        Ok(DirectoryEntry { name: entry.name.to_vec(), ino, kind, next: index + 1 })
    }

    /// The number of what an entry means.
    fn show(&self, subvolume: usize, directory: u64, location: Key, name: &[u8]) -> Result<Ino> {
        match location.kind {
            kind::INODE => self.number(Object::Inode { subvolume, object: location.object }),
            kind::ROOT => self.number(self.shared.nested(subvolume, directory, location.object, name)?),
            _ => Err(corrupt(format!("inode {directory} has an entry of an unknown kind"))),
        }
    }
}

impl Shared {
    /// What the entry of a name means.
    pub(super) fn location(&self, subvolume: usize, directory: u64, name: &[u8]) -> Result<Option<Key>> {
        let key = Key::new(directory, kind::DIR_ITEM, name_hash(name));
        let item = self.tree(subvolume).get(&self.nodes, key).map_err(about(directory))?;
        Ok(item.and_then(|item| Entry::find(item.data(), name).map(|entry| entry.location)))
    }

    /// What a directory shows for a subvolume in it.
    fn nested(&self, subvolume: usize, directory: u64, target: u64, name: &[u8]) -> Result<Object> {
        let key = Key::new(self.subvolumes[subvolume].id, kind::ROOT_REF, target);
        let record = self.roots.get(&self.nodes, key)?;
        let is_here =
            record.is_some_and(|record| RootRef::parse(record.data()) == RootRef { directory, name });
        let found = if is_here { self.index_of(target) } else { None };
        Ok(match found {
            Some(index) => Object::Inode { subvolume: index, object: self.subvolumes[index].directory },
            None => Object::Stub { subvolume, target },
        })
    }

    /// The attributes of the empty directory in place of a subvolume that is not here.
    pub(super) fn stub(&self, subvolume: usize, target: u64) -> Result<FileAttributes> {
        // The original's record names the directory, which has the same number in a snapshot.
        let first = Key::new(target, kind::ROOT_BACKREF, 0);
        let record = self.roots.items_beside(&self.nodes, first).next().transpose()?;
        let mut parent = self.subvolumes[subvolume].directory;
        if let Some(record) = record {
            let RootRef { directory, name } = RootRef::parse(record.data());
            let location = self.location(subvolume, directory, name)?;
            if location.is_some_and(|found| (found.object, found.kind) == (target, kind::ROOT)) {
                parent = directory;
            }
        }
        let parent = self.inode_of(subvolume, parent, FileKind::Directory)?.attributes;
        Ok(FileAttributes {
            kind: FileKind::Directory,
            mode: 0o755,
            size: 0,
            blocks: 0,
            links: 1,
            device: (0, 0),
            created: Some(parent.modified),
            ..parent
        })
    }

    /// The index of a subvolume.
    pub(super) fn index_of(&self, id: u64) -> Option<usize> {
        self.subvolumes.binary_search_by_key(&id, |root| root.id).ok()
    }

    /// The target of a symbolic link.
    pub(super) fn target(&self, subvolume: usize, object: u64) -> Result<Vec<u8>> {
        let inode = self.inode_of(subvolume, object, FileKind::Symlink)?;
        let size = inode.attributes.size;
        if size == 0 || size > MAX_TARGET_LEN {
            return Err(corrupt(format!("inode {object} is a link with a target of {size} bytes")));
        }
        let mut target = vec![0; size as usize];
        self.read_content(subvolume, object, size, 0, &mut target)?;
        let len = target.iter().position(|byte| *byte == 0).unwrap_or(target.len());
        target.truncate(len);
        Ok(target)
    }

    /// The subvolume that is shown by default.
    pub(super) fn default_subvolume(&self) -> Result<u64> {
        let name = b"default";
        let key = Key::new(self.superblock.root_directory, kind::DIR_ITEM, name_hash(name));
        let item = self.roots.get(&self.nodes, key)?;
        let found = item.and_then(|item| Entry::find(item.data(), name).map(|entry| entry.location));
        Ok(found.filter(|found| found.kind == kind::ROOT).map_or(object::FS_TREE, |found| found.object))
    }
}
