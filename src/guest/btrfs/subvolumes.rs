//! The roots of trees, and the paths of subvolumes.

use crate::error::Result;
use crate::guest::bytes::{array, le32, le64};

use super::Shared;
use super::entry::{NameRef, RootRef, is_name};
use super::format::{Key, corrupt, is_subvolume, kind, limit, object};
use super::node::NodePointer;
use super::nodes::Nodes;
use super::tree::Tree;

/// Directories and subvolumes above a subvolume at most.
const MAX_DEPTH: usize = 256;
const MAX_PATH_LEN: usize = 4096;
/// Bytes of a root's item that every version has.
const ROOT_ITEM_LEN: usize = 239;

/// The item of a tree's root (`btrfs_root_item`).
#[derive(Clone, Copy, Debug)]
pub(super) struct RootItem {
    pub(super) pointer: NodePointer,
    pub(super) bytes_used: u64,
    directory: u64,
    /// 0: it is being deleted.
    references: u32,
}

impl RootItem {
    pub(super) fn parse(id: u64, item: &[u8]) -> Result<Self> {
        if item.len() < ROOT_ITEM_LEN {
            return Err(corrupt(format!("the root of tree {id} is too short")));
        }
        let [level] = array(item, 238);
        let pointer = NodePointer { at: le64(item, 176), level, generation: le64(item, 160) };
        let (directory, bytes_used) = (le64(item, 168), le64(item, 192));
        Ok(Self { pointer, bytes_used, directory, references: le32(item, 216) })
    }
}

/// A tree of files.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) id: u64,
    /// Its root directory.
    pub(super) directory: u64,
    pub(super) tree: Tree,
}

/// The item of a tree's root; snapshots have the transaction that made them as an offset in its key.
pub(super) fn root_item(roots: &Tree, nodes: &Nodes, id: u64) -> Result<Option<RootItem>> {
    let first = Key::new(id, kind::ROOT, 0);
    let found = roots.items_beside(nodes, first).next().transpose()?;
    found.map(|item| RootItem::parse(id, item.data())).transpose()
}

/// All trees of files that are not being deleted, up to `most`; with an error if some cannot be found.
pub(super) fn all(roots: &Tree, nodes: &Nodes, most: usize) -> (Vec<Root>, Result<()>) {
    let mut found: Vec<Root> = Vec::new();
    let mut failed = Ok(());
    let mut next = Some(Key::new(object::FS_TREE, kind::ROOT, 0));
    while let Some(key) = next {
        // Between two roots lie other items: each is searched, not walked to.
        let item = match roots.first_from(nodes, key) {
            Ok(Some(item)) if item.key.object <= object::LAST_FREE => item,
            Ok(_) => break,
            Err(error) => return (found, Err(error)),
        };
        let Key { object: id, kind, .. } = item.key;
        if kind < kind::ROOT {
            next = Some(Key::new(id, kind::ROOT, 0));
            continue;
        }
        next = id.checked_add(1).map(|id| Key::new(id, kind::ROOT, 0));
        if kind > kind::ROOT || !is_subvolume(id) {
            continue;
        }
        match RootItem::parse(id, item.data()) {
            Ok(root) if root.references > 0 => {
                let directory = if root.directory == 0 { object::FIRST_FREE } else { root.directory };
                found.push(Root { id, directory, tree: Tree::new(root.pointer) });
            }
            Ok(_) => {}
            Err(error) => failed = Err(error),
        }
        if found.len() == most {
            return (found, Err(limit("it has too many subvolumes; the first are shown")));
        }
    }
    (found, failed)
}

impl Shared {
    /// The item of a tree's root.
    pub(super) fn root_of(&self, id: u64) -> Result<Option<RootItem>> {
        root_item(&self.roots, &self.nodes, id)
    }

    /// The path of a subvolume from the top level; `None` if it has none, because it is being deleted.
    pub(super) fn path(&self, subvolume: usize) -> Result<Option<Vec<u8>>> {
        let mut names: Vec<Vec<u8>> = Vec::new();
        let mut id = self.subvolumes[subvolume].id;
        let mut len = 0;
        let mut add = |name: &[u8]| {
            len += name.len() + 1;
            names.push(name.to_vec());
            if names.len() > MAX_DEPTH || len > MAX_PATH_LEN || !is_name(name) {
                return Err(corrupt("a subvolume has an impossible path"));
            }
            Ok(())
        };
        while id != object::FS_TREE {
            let first = Key::new(id, kind::ROOT_BACKREF, 0);
            let record = self.roots.items_beside(&self.nodes, first).next().transpose()?;
            let Some(record) = record else { return Ok(None) };
            let RootRef { mut directory, name } = RootRef::parse(record.data());
            add(name)?;
            id = record.key.offset;
            let Some(parent) = self.index_of(id) else { return Ok(None) };
            let root = &self.subvolumes[parent];
            while directory != root.directory {
                let first = Key::new(directory, kind::INODE_REF, 0);
                let item = root.tree.items_beside(&self.nodes, first).next().transpose()?;
                let Some(item) = item else { return Ok(None) };
                let name = NameRef::all(item.key, item.data()).next();
                let name = name.ok_or_else(|| corrupt("a directory without a name"))?;
                add(name.name)?;
                directory = name.parent;
            }
        }
        names.reverse();
        Ok(Some(names.join(&b'/')))
    }
}
