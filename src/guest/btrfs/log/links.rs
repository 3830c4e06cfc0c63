//! References from inodes to their names during a replay, and link counts.
//!
//! A logged item of references is the whole truth of an inode's names in a directory: others are removed.

use crate::error::Result;

use super::super::entry::{Entry, NameRef};
use super::super::format::{Key, extref_hash, kind, name_hash};
use super::super::inode::{field, kind_of_item};
use super::super::tree::Item;
use super::replay::Replay;
use crate::guest::filesystem::FileKind;

impl Replay<'_> {
    /// An item of references in the log.
    pub(super) fn references(&mut self, item: &Item) -> Result<()> {
        let (key, number) = (item.key, item.key.object);
        let is_extended = key.kind == kind::INODE_EXTREF;
        // Not all directories above are logged; without one, the link count tells.
        if !self.exists(number)? || !is_extended && !self.exists(key.offset)? {
            return Ok(());
        }
        for logged in NameRef::all(key, item.data()) {
            if !self.exists(logged.parent)? || self.is_in_directory(number, &logged)? {
                continue;
            }
            if number == logged.parent {
                // The root directory.
                return Ok(());
            }
            self.remove_conflicts(number, &logged)?;
            self.add_name(logged.parent, number, logged.name, logged.index, false)?;
        }
        self.remove_old_references(item)?;
        self.put(key, item.data().to_vec())
    }

    /// Whether a directory has a name with its index, for the same inode.
    fn is_in_directory(&self, number: u64, logged: &NameRef<'_>) -> Result<bool> {
        let by_index = Key::new(logged.parent, kind::DIR_INDEX, logged.index);
        let by_name = Key::new(logged.parent, kind::DIR_ITEM, name_hash(logged.name));
        for key in [by_index, by_name] {
            let item = self.tree.get(self.nodes, key)?;
            let entry = item.as_ref().and_then(|item| Entry::find(item.data(), logged.name));
            if entry.is_none_or(|entry| entry.location.object != number) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes what is in the way of a name: the inode's older names in the directory, and other inodes.
    fn remove_conflicts(&mut self, number: u64, logged: &NameRef<'_>) -> Result<()> {
        let directory = logged.parent;
        let plain = Key::new(number, kind::INODE_REF, directory);
        let extended = Key::new(number, kind::INODE_EXTREF, extref_hash(directory, logged.name));
        for key in [plain, extended] {
            let Some(item) = self.tree.get(self.nodes, key)? else { continue };
            for old in NameRef::all(key, item.data()).filter(|old| old.parent == directory) {
                let key = match key.kind {
                    kind::INODE_REF => key,
                    _ => Key::new(number, kind::INODE_EXTREF, extref_hash(directory, old.name)),
                };
                if !self.log_has_name(key, directory, old.name)? {
                    self.unlink(directory, number, old.name, old.index)?;
                }
            }
        }
        let by_index = Key::new(directory, kind::DIR_INDEX, logged.index);
        let by_name = Key::new(directory, kind::DIR_ITEM, name_hash(logged.name));
        for key in [by_index, by_name] {
            let Some(item) = self.tree.get(self.nodes, key)? else { continue };
            if let Some(entry) = Entry::find(item.data(), logged.name) {
                self.drop_entry(directory, entry.location, entry.name, logged.index)?;
            }
        }
        Ok(())
    }

    /// Removes the names of the subvolume's item that the log's item lacks.
    fn remove_old_references(&mut self, logged: &Item) -> Result<()> {
        let key = logged.key;
        let Some(item) = self.tree.get(self.nodes, key)? else { return Ok(()) };
        for old in NameRef::all(key, item.data()) {
            let mut names = NameRef::all(key, logged.data());
            let is_kept = names.any(|name| (name.parent, name.name) == (old.parent, old.name));
            if !is_kept && self.exists(old.parent)? {
                self.unlink(old.parent, key.object, old.name, old.index)?;
            }
        }
        Ok(())
    }

    /// Counts the names of all inodes that the replay has touched. A directory without a name loses its own
    /// names, too.
    pub(super) fn settle(&mut self) -> Result<()> {
        while let Some(number) = self.unsettled.pop_last() {
            let Some(mut inode) = self.raw_inode(number)? else { continue };
            let mut links = 0u32;
            for kind in [kind::INODE_REF, kind::INODE_EXTREF] {
                for item in self.tree.items_beside(self.nodes, Key::new(number, kind, 0)) {
                    let item = item?;
                    let names = NameRef::all(item.key, item.data()).count();
                    links = links.saturating_add(u32::try_from(names).unwrap_or(u32::MAX));
                }
            }
            inode[field::LINKS..field::LINKS + 4].copy_from_slice(&links.to_le_bytes());
            let is_directory = kind_of_item(&inode) == Some(FileKind::Directory);
            self.put(Key::new(number, kind::INODE, 0), inode)?;
            if links == 0 && is_directory {
                self.remove_range(number, 0, u64::MAX, false)?;
            }
        }
        Ok(())
    }
}
