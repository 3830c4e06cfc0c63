//! Names in directories during a replay: those that the log adds, and those that it lacks.
//!
//! A directory's log has ranges of its indexes. A name in such a range that the log lacks was removed.

use crate::error::Result;
use crate::guest::bytes::le64;

use super::super::entry::{Entry, NameRef};
use super::super::format::{Key, extref_hash, kind, name_hash};
use super::super::inode::{entry_type, kind_of_item};
use super::super::tree::Item;
use super::replay::Replay;

impl Replay<'_> {
    /// Removes the names of a directory that its log says were removed.
    pub(super) fn remove_names(&mut self, directory: u64) -> Result<()> {
        if !self.exists(directory)? {
            return Ok(());
        }
        let ranges = self.log.items_beside(self.nodes, Key::new(directory, kind::DIR_LOG_INDEX, 0));
        let ranges: Vec<(u64, u64)> = ranges
            .map(|item| item.map(|item| (item.key.offset, le64(item.data(), 0))))
            .collect::<Result<_>>()?;
        for (first, last) in ranges {
            self.remove_range(directory, first, last, true)?;
        }
        Ok(())
    }

    /// Removes the names in a range of indexes, except those in the log if there `is_logged` anything.
    pub(super) fn remove_range(
        &mut self,
        directory: u64,
        first: u64,
        last: u64,
        is_logged: bool,
    ) -> Result<()> {
        let mut next = Some(Key::new(directory, kind::DIR_INDEX, first));
        while let Some(key) = next {
            let found = self.tree.first_from(self.nodes, key)?;
            let Some(item) = found.filter(|i| i.key.is_beside(key) && i.key.offset <= last) else { break };
            next = item.key.next();
            let Some(entry) = Entry::all(item.data()).flatten().next() else { continue };
            let logged = if is_logged { self.log.get(self.nodes, item.key)? } else { None };
            if logged.is_some_and(|logged| Entry::find(logged.data(), entry.name).is_some()) {
                continue;
            }
            self.drop_entry(directory, entry.location, entry.name, item.key.offset)?;
        }
        Ok(())
    }

    /// A name of a directory in the log.
    pub(super) fn name(&mut self, item: &Item) -> Result<()> {
        let (directory, index) = (item.key.object, item.key.offset);
        let Some(logged) = Entry::all(item.data()).flatten().next() else { return Ok(()) };
        if !self.exists(directory)? {
            return Ok(());
        }
        let exists = self.tree.get(self.nodes, logged.location)?.is_some();
        let by_name = Key::new(directory, kind::DIR_ITEM, name_hash(logged.name));
        let has_name = self.is_same_or_dropped(by_name, &logged, exists)?;
        let by_index = Key::new(directory, kind::DIR_INDEX, index);
        let has_index = self.is_same_or_dropped(by_index, &logged, exists)?;
        if has_name && has_index {
            return Ok(());
        }
        // A reference in the log adds the name later.
        let target = logged.location.object;
        let reference = Key::new(target, kind::INODE_REF, directory);
        let extended = Key::new(target, kind::INODE_EXTREF, extref_hash(directory, logged.name));
        if self.log_has_name(reference, directory, logged.name)?
            || self.log_has_name(extended, directory, logged.name)?
        {
            return Ok(());
        }
        let is_added = logged.location.kind == kind::INODE
            && self.exists(target)?
            && self.add_name(directory, target, logged.name, index, true)?;
        if is_added && logged.kind != entry_type(crate::guest::FileKind::Directory) {
            self.unsettled.insert(target);
        }
        Ok(())
    }

    /// Whether the subvolume has the entry as it is logged. Another one of the same name is dropped, if the
    /// inode that is logged `exists`.
    fn is_same_or_dropped(&mut self, key: Key, logged: &Entry<'_>, exists: bool) -> Result<bool> {
        let Some(item) = self.tree.get(self.nodes, key)? else { return Ok(false) };
        let Some(found) = Entry::find(item.data(), logged.name) else { return Ok(false) };
        if (found.location, found.kind) == (logged.location, logged.kind) {
            return Ok(true);
        }
        if exists {
            self.drop_entry(key.object, found.location, found.name, key.offset)?;
        }
        Ok(false)
    }

    /// Removes a name whose inode may have no others.
    pub(super) fn drop_entry(
        &mut self,
        directory: u64,
        location: Key,
        name: &[u8],
        index: u64,
    ) -> Result<()> {
        self.unsettled.insert(location.object);
        self.unlink(directory, location.object, name, index)
    }

    /// Removes a name: both entries of the directory, and the reference of the inode, which knows the index.
    pub(super) fn unlink(&mut self, directory: u64, number: u64, name: &[u8], index: u64) -> Result<()> {
        let mut indexes = vec![index];
        let plain = Key::new(number, kind::INODE_REF, directory);
        let extended = Key::new(number, kind::INODE_EXTREF, extref_hash(directory, name));
        for key in [plain, extended] {
            let Some(item) = self.tree.get(self.nodes, key)? else { continue };
            let mut names = NameRef::all(key, item.data());
            let Some(found) = names.find(|found| (found.parent, found.name) == (directory, name)) else {
                continue;
            };
            indexes.push(found.index);
            let left = NameRef::without(key, item.data(), directory, name);
            self.change(key, left)?;
        }
        let mut is_removed = false;
        let by_name = Key::new(directory, kind::DIR_ITEM, name_hash(name));
        if let Some(item) = self.tree.get(self.nodes, by_name)?
            && Entry::find(item.data(), name).is_some()
        {
            self.change(by_name, Entry::without(item.data(), name))?;
            is_removed = true;
        }
        for index in indexes {
            let by_index = Key::new(directory, kind::DIR_INDEX, index);
            if let Some(item) = self.tree.get(self.nodes, by_index)?
                && Entry::find(item.data(), name).is_some()
            {
                self.change(by_index, Entry::without(item.data(), name))?;
                is_removed = true;
            }
        }
        if is_removed {
            self.change_size(directory, |size| size.saturating_sub(2 * name.len() as u64))?;
        }
        Ok(())
    }

    /// Adds a name to a directory, and a reference to the inode if it has none. False: the name or the index
    /// is taken.
    pub(super) fn add_name(
        &mut self,
        directory: u64,
        number: u64,
        name: &[u8],
        index: u64,
        needs_reference: bool,
    ) -> Result<bool> {
        let by_name = Key::new(directory, kind::DIR_ITEM, name_hash(name));
        let by_index = Key::new(directory, kind::DIR_INDEX, index);
        let mut entries = self.tree.get(self.nodes, by_name)?.map_or_else(Vec::new, |i| i.data().to_vec());
        let is_taken = self.tree.get(self.nodes, by_index)?.is_some();
        let inode = self.raw_inode(number)?;
        let Some(kind) = inode.and_then(|inode| kind_of_item(&inode)) else { return Ok(false) };
        if is_taken || Entry::find(&entries, name).is_some() {
            return Ok(false);
        }
        if needs_reference {
            let key = Key::new(number, kind::INODE_REF, directory);
            let mut names = self.tree.get(self.nodes, key)?.map_or_else(Vec::new, |i| i.data().to_vec());
            if NameRef::all(key, &names).any(|found| found.name == name) {
                return Ok(false);
            }
            names.extend(NameRef::encode(index, name));
            self.put(key, names)?;
        }
        let location = Key::new(number, kind::INODE, 0);
        let entry = Entry::encode(location, self.superblock.generation, entry_type(kind), name);
        self.put(by_index, entry.clone())?;
        entries.extend(entry);
        self.put(by_name, entries)?;
        self.change_size(directory, |size| size.saturating_add(2 * name.len() as u64))?;
        Ok(true)
    }

    /// Whether the log has a reference with a name.
    pub(super) fn log_has_name(&self, key: Key, directory: u64, name: &[u8]) -> Result<bool> {
        let item = self.log.get(self.nodes, key)?;
        Ok(item.is_some_and(|item| {
            NameRef::all(key, item.data()).any(|found| (found.parent, found.name) == (directory, name))
        }))
    }
}
