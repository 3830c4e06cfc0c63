//! Nodes without their names: a client has a file handle, such as an NFS client, and the kernel has forgotten
//! the node or never knew it since.
//!
//! The kernel then looks up `.` in the node, and `..` until it has reached a directory that it knows. The
//! number of a node is that of its content, so a number either leads to the same content or is stale.

use std::ffi::OsStr;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::sync::Arc;

use crate::error::Result;
use crate::store::stale;

use super::super::access::Caller;
use super::super::attributes::Attributes;
use super::super::control::ControlScope;
use super::super::guest_numbers::GuestNode;
use super::super::node::{Node, ROOT};
use super::MountTree;

/// The generation of a mount: no mount gives its numbers to the same files as another. Never that of the
/// root, 0, and positive as the kernel's signed number.
pub(super) fn generation_of_mount() -> u32 {
    ((RandomState::new().hash_one(0) as u32) >> 1).max(1)
}

impl MountTree {
    /// The generation of an inode number. A handle with another one is stale: it is of another mount, or of a
    /// guest's file system that had the number before.
    pub fn generation(&self, inode: u64) -> u32 {
        if inode == ROOT {
            // The kernel knows the root without a reply.
            return 0;
        }
        let turn = self.inodes.guests().node(inode).and_then(|guest| self.slots.get(guest.slot).ok());
        // X1: the slots of guests' file systems are given again.
        let generation = self.generation.wrapping_add(turn.map_or(0, |slot| slot.turn));
        (generation & (u32::MAX >> 1)).max(1)
    }

    /// The node of `.` or `..` in a node; `None` for all other names.
    pub(super) fn without_name(
        &self,
        caller: &Caller,
        inode: u64,
        name: &OsStr,
    ) -> Option<Result<Attributes>> {
        let node = || match name.as_encoded_bytes() {
            b"." => self.node(inode),
            _ => self.above(&self.node(inode)?),
        };
        matches!(name.as_encoded_bytes(), b"." | b"..").then(|| {
            let node = node()?;
            if let Node::Directory(path) = &node {
                let is_there = self.store.catalog().directories.contains_key(path.as_path());
                is_there.then_some(()).ok_or_else(|| stale("the directory was removed"))?;
            }
            self.check_read(&self.rights.viewer(caller), &node, false)?;
            self.attributes_of(caller, &node, self.inodes.number(&node))
        })
    }

    /// The directory that a directory is in.
    fn above(&self, node: &Node) -> Result<Node> {
        let directory = |path: &Path| match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => Node::Directory(Arc::new(parent.to_owned())),
            _ => Node::Root,
        };
        let chain = |path: &Arc<_>| {
            // The only chain of a mounted image is the root.
            if self.store.catalog().single.is_some() { Node::Root } else { Node::Chain(Arc::clone(path)) }
        };
        Ok(match node {
            Node::Root | Node::Store => Node::Root,
            Node::Directory(path) | Node::Chain(path) => directory(path),
            Node::Control(ControlScope::Store) => Node::Store,
            Node::Snapshots(path)
            | Node::Info(path)
            | Node::Control(ControlScope::Chain(path))
            | Node::Partitions(path)
            | Node::Files(path) => chain(path),
            Node::PartitionsOf(view) => Node::Partitions(Arc::clone(&view.chain)),
            Node::FilesOf(view) => Node::Files(Arc::clone(&view.chain)),
            Node::Guest(guest) => return self.above_guest(*guest),
            Node::StoreDocument(_)
            | Node::ChainDocument(..)
            | Node::ControlFile(..)
            | Node::View(_)
            | Node::Partition(_)
            | Node::VolumeList(_)
            | Node::VolumeProblem(..)
            | Node::FormerName(_)
            | Node::RootLink(_) => return Err(stale("only directories know what they are in")),
        })
    }

    /// That of a guest's directory, if it was looked up or listed not too long ago: not every file system of
    /// guests can tell it.
    fn above_guest(&self, node: GuestNode) -> Result<Node> {
        let unknown = || stale("the parent of the guest's directory is no longer known");
        let slot = self.slots.get(node.slot)?;
        if node.depth == 0 {
            let is_root = node.ino == slot.mounted.root;
            return is_root
                .then(|| slot.above())
                .flatten()
                .map_or_else(|| Err(unknown()), |above| self.node(above));
        }
        // Nodes that are deeper than that have one depth.
        if node.depth == GuestNode::DEEPEST {
            return Err(unknown());
        }
        let ino = slot.parent(node.ino).ok_or_else(unknown)?;
        Ok(Node::Guest(GuestNode { slot: node.slot, depth: node.depth - 1, ino }))
    }
}
