//! A tree of items: searched and walked on demand, with the changes of a log above it.
//!
//! A walk gives items in the order of their keys, each once: nodes that lead back are `Corrupt`. It continues
//! behind a damaged node, if the caller does.

use std::collections::BTreeMap;
use std::collections::btree_map::Range;
use std::iter::Peekable;
use std::sync::Arc;

use crate::error::Result;

use super::format::{Key, corrupt};
use super::node::{Node, NodePointer};
use super::nodes::Nodes;

/// Bytes of changed items in memory at most, for all logs of a file system together.
pub(super) const OVERLAY_LIMIT: usize = 64 << 20;
/// What an entry of the overlay takes beside its data.
const OVERLAY_ENTRY_LEN: usize = 96;

/// An item, wherever it is.
#[derive(Clone, Debug)]
pub(super) struct Item {
    pub(super) key: Key,
    data: ItemData,
}

#[derive(Clone, Debug)]
enum ItemData {
    /// An item of a leaf.
    Stored(Arc<Node>, usize),
    /// An item of the overlay.
    Changed(Arc<[u8]>),
}

impl Item {
    pub(super) fn data(&self) -> &[u8] {
        match &self.data {
            ItemData::Stored(node, index) => node.item(*index),
            ItemData::Changed(data) => data,
        }
    }
}

/// Items that a log has changed; `None`: removed.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    items: BTreeMap<Key, Option<Arc<[u8]>>>,
    /// Bytes of all of them.
    weight: usize,
}

/// A tree and what has changed in it since it was written.
#[derive(Debug)]
pub(super) struct Tree {
    root: NodePointer,
    overlay: Overlay,
}

impl Tree {
    pub(super) fn new(root: NodePointer) -> Self {
        Self { root, overlay: Overlay::default() }
    }

    /// Bytes of the items that have changed.
    pub(super) fn overlay_weight(&self) -> usize {
        self.overlay.weight
    }

    /// The tree without its changes.
    pub(super) fn as_stored(&self) -> Self {
        Self::new(self.root)
    }

    /// Changes an item, or removes it.
    pub(super) fn change(&mut self, key: Key, data: Option<Vec<u8>>) {
        let weigh = |data: &Option<Arc<[u8]>>| OVERLAY_ENTRY_LEN + data.as_ref().map_or(0, |data| data.len());
        let data: Option<Arc<[u8]>> = data.map(Into::into);
        self.overlay.weight += weigh(&data);
        if let Some(old) = self.overlay.items.insert(key, data) {
            self.overlay.weight -= weigh(&old);
        }
    }

    /// The item with a key.
    pub(super) fn get(&self, nodes: &Nodes, key: Key) -> Result<Option<Item>> {
        if let Some(changed) = self.overlay.items.get(&key) {
            return Ok(changed.clone().map(|data| Item { key, data: ItemData::Changed(data) }));
        }
        let leaf = self.leaf(nodes, key)?;
        let index = leaf.below(key);
        let is_there = index < leaf.count && leaf.key(index) == key;
        Ok(is_there.then_some(Item { key, data: ItemData::Stored(leaf, index) }))
    }

    /// The first item with this key or a larger one.
    pub(super) fn first_from(&self, nodes: &Nodes, key: Key) -> Result<Option<Item>> {
        self.items(nodes, key).next().transpose()
    }

    /// The last item with this key or a smaller one.
    pub(super) fn last_to(&self, nodes: &Nodes, mut key: Key) -> Result<Option<Item>> {
        loop {
            let leaf = self.leaf(nodes, key)?;
            let stored = leaf.up_to(key).checked_sub(1);
            let changed = self.overlay.items.range(..=key).next_back();
            match (stored.map(|index| leaf.key(index)), changed) {
                (stored, Some((changed_key, data))) if stored.is_none_or(|stored| stored <= *changed_key) => {
                    if let Some(data) = data {
                        let data = ItemData::Changed(Arc::clone(data));
                        return Ok(Some(Item { key: *changed_key, data }));
                    }
                    let Some(previous) = changed_key.previous() else { return Ok(None) };
                    key = previous;
                }
                (Some(found), _) => {
                    let index = stored.unwrap_or_default();
                    return Ok(Some(Item { key: found, data: ItemData::Stored(leaf, index) }));
                }
                (None, _) => return Ok(None),
            }
        }
    }

    /// The items from a key on.
    pub(super) fn items<'a>(&'a self, nodes: &'a Nodes, from: Key) -> Items<'a> {
        self.items_to(nodes, from, Key::LAST)
    }

    /// The items with the object and type of `from`, from its offset on.
    pub(super) fn items_beside<'a>(&'a self, nodes: &'a Nodes, from: Key) -> Items<'a> {
        self.items_to(nodes, from, Key { offset: u64::MAX, ..from })
    }

    /// The items from a key up to another one. Nodes behind that are not read.
    pub(super) fn items_to<'a>(&'a self, nodes: &'a Nodes, from: Key, last: Key) -> Items<'a> {
        let (root, path) = (self.root, Vec::new());
        Items {
            stored: StoredItems { nodes, root, path, from, last, state: WalkState::New },
            changed: self.overlay.items.range(from..=last.max(from)).peekable(),
        }
    }

    /// The leaf that holds a key, if it is in the tree.
    fn leaf(&self, nodes: &Nodes, key: Key) -> Result<Arc<Node>> {
        let mut node = nodes.get(self.root)?;
        while node.level > 0 {
            node = child(nodes, &node, node.up_to(key).saturating_sub(1))?;
        }
        Ok(node)
    }
}

/// The node below an entry; it begins with the entry's key.
fn child(nodes: &Nodes, node: &Node, index: usize) -> Result<Arc<Node>> {
    let pointer = node.child(index);
    let child = nodes.get(pointer)?;
    if child.count == 0 || child.key(0) != node.key(index) {
        return Err(corrupt(format!("the node at {:#x} does not begin with its key", pointer.at)));
    }
    Ok(child)
}

/// A walk through the items of a tree.
pub(super) struct Items<'a> {
    stored: StoredItems<'a>,
    changed: Peekable<Range<'a, Key, Option<Arc<[u8]>>>>,
}

impl Iterator for Items<'_> {
    type Item = Result<Item>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let stored = match self.stored.peek() {
                Ok(stored) => stored,
                Err(error) => return Some(Err(error)),
            };
            let changed = self.changed.peek().map(|(key, _)| **key);
            match (stored, changed) {
                (None, None) => return None,
                (stored, Some(key)) if stored.is_none_or(|stored| key <= stored) => {
                    if stored == Some(key) {
                        self.stored.advance();
                    }
                    if let Some((_, Some(data))) = self.changed.next() {
                        return Some(Ok(Item { key, data: ItemData::Changed(Arc::clone(data)) }));
                    }
                }
                _ => return self.stored.take().map(Ok),
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum WalkState {
    New,
    Within,
    Ended,
}

/// A walk through the items of a tree as they are on the disk.
struct StoredItems<'a> {
    nodes: &'a Nodes,
    root: NodePointer,
    /// Nodes from the root to the leaf, and the index in each.
    path: Vec<(Arc<Node>, usize)>,
    /// No item before this is given.
    from: Key,
    /// No item behind this is given.
    last: Key,
    state: WalkState,
}

impl StoredItems<'_> {
    /// The key of the next item. After an error the walk continues behind the damaged node.
    fn peek(&mut self) -> Result<Option<Key>> {
        let found = self.position();
        match found {
            Ok(Some(_)) => {}
            Ok(None) => self.state = WalkState::Ended,
            // No node is visited twice, damaged or not.
            Err(_) => match self.path.last().and_then(|(node, index)| node.key(*index).next()) {
                Some(next) => self.from = self.from.max(next),
                None => self.state = WalkState::Ended,
            },
        }
        found
    }

    fn position(&mut self) -> Result<Option<Key>> {
        match self.state {
            WalkState::Ended => return Ok(None),
            WalkState::Within => {}
            WalkState::New => {
                self.state = WalkState::Within;
                let root = self.nodes.get(self.root)?;
                self.descend(root)?;
            }
        }
        loop {
            match self.path.last() {
                None => return Ok(None),
                Some((leaf, index)) if leaf.level == 0 && *index < leaf.count => {
                    return Ok(Some(leaf.key(*index)).filter(|key| *key <= self.last));
                }
                Some((node, _)) if node.level == 0 => drop(self.path.pop()),
                // Below an inner node was damage.
                Some(_) => {}
            }
            // The next leaf: up to where there is a next entry, and down from it.
            loop {
                let Some((node, index)) = self.path.last_mut() else { return Ok(None) };
                if *index + 1 < node.count {
                    *index += 1;
                    break;
                }
                self.path.pop();
            }
            let Some((node, index)) = self.path.last() else { return Ok(None) };
            if node.key(*index) > self.last {
                return Ok(None);
            }
            // Shared nodes would make the walk longer than the tree.
            if node.key(*index) < self.from {
                return Err(corrupt("the nodes of a tree are out of order"));
            }
            let below = child(self.nodes, node, *index)?;
            self.descend(below)?;
        }
    }

    /// Adds the path from a node down to the leaf of the first key.
    fn descend(&mut self, mut node: Arc<Node>) -> Result<()> {
        while node.level > 0 {
            let index = node.up_to(self.from).saturating_sub(1);
            self.path.push((Arc::clone(&node), index));
            node = child(self.nodes, &node, index)?;
        }
        let index = node.below(self.from);
        self.path.push((node, index));
        Ok(())
    }

    fn advance(&mut self) {
        if let Some((leaf, index)) = self.path.last_mut() {
            // Keys of later leaves must be larger.
            match leaf.key(*index).next() {
                Some(next) => self.from = next,
                None => self.state = WalkState::Ended,
            }
            *index += 1;
        }
    }

    /// The item that was peeked at.
    fn take(&mut self) -> Option<Item> {
        let (leaf, index) = self.path.last()?;
        let item = Item { key: leaf.key(*index), data: ItemData::Stored(Arc::clone(leaf), *index) };
        self.advance();
        Some(item)
    }
}
