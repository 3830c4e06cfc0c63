//! The nodes of the mount and their inode numbers.
//!
//! Nodes and numbers map one to one for the life of a mount. A node's identity includes its content, so that
//! a number never stands for other content: a layer whose file another process has changed is another node.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::store::ViewId;

use super::control::{ControlFile, ControlScope};
use super::guest_numbers::{GuestNode, GuestNumbers};

/// A file or directory of the mount.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// The root of the mount.
    Root,
    /// A sub-directory of the store, by path.
    Directory(Arc<PathBuf>),
    /// `.chainfs`.
    Store,
    /// A file in `.chainfs`.
    StoreDocument(StoreDocument),
    /// A name that a chain had before, by path: a link to the present one.
    FormerName(Arc<PathBuf>),
    /// A chain's directory, by path.
    Chain(Arc<PathBuf>),
    /// A chain's `snapshots` directory.
    Snapshots(Arc<PathBuf>),
    /// A chain's `info` directory.
    Info(Arc<PathBuf>),
    /// A file in `info`.
    ChainDocument(Arc<PathBuf>, ChainDocument),
    /// A `control` directory.
    Control(ControlScope),
    /// A file in `control`.
    ControlFile(ControlScope, ControlFile),
    /// A disk, or saved VM state.
    View(ViewId),
    /// A chain's `partitions` directory.
    Partitions(Arc<PathBuf>),
    /// The entry there for one view.
    PartitionsOf(ViewId),
    /// A partition, as a disk.
    Partition(PartitionNode),
    /// A chain's `files` directory.
    Files(Arc<PathBuf>),
    /// The entry there for one view.
    FilesOf(ViewId),
    /// The list of a view's volumes.
    VolumeList(ViewId),
    /// The file that says why a volume is shown without its last writes.
    VolumeProblem(ViewId, Arc<str>),
    /// The link to the volume that holds the operating system.
    RootLink(ViewId),
    /// A guest's own file.
    Guest(GuestNode),
}

/// A partition of a view, with its position: at another position, it is another disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PartitionNode {
    /// The disk.
    pub view: ViewId,
    /// Its number in Linux.
    pub number: u32,
    /// Start in bytes.
    pub start: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The files of `.chainfs`, and the one in the root.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreDocument {
    /// The backing tree as text.
    TreeText,
    /// The same as SVG.
    TreeSvg,
    /// All chains as JSON.
    Chains,
    /// The problems of the store.
    Problems,
    /// Counters.
    Metrics,
    /// Removed layers that can be restored.
    Trash,
    /// All of it as a page for browsers.
    Page,
    /// What the mount is, in its root.
    Readme,
}

/// The files of `info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChainDocument {
    /// Like `qemu-img info --backing-chain`.
    Chain,
    /// The chain's part of the store's tree.
    TreeText,
    /// The same as SVG.
    TreeSvg,
    /// The chain's problem; only if there is one.
    Problem,
    /// The operating system on the disk; only if guests' files are shown.
    OperatingSystem,
    /// The chain as a page for browsers.
    Page,
}

/// The file types in the mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl StoreDocument {
    /// Those of `.chainfs` with their names.
    pub const ALL: [(StoreDocument, &'static str); 7] = [
        (StoreDocument::Chains, "chains.json"),
        (StoreDocument::Page, "index.html"),
        (StoreDocument::Metrics, "metrics"),
        (StoreDocument::Problems, "problems.txt"),
        (StoreDocument::Trash, "trash.txt"),
        (StoreDocument::TreeSvg, "tree.svg"),
        (StoreDocument::TreeText, "tree.txt"),
    ];
}

impl ChainDocument {
    /// All of them with their names.
    pub const ALL: [(ChainDocument, &'static str); 6] = [
        (ChainDocument::Chain, "chain.json"),
        (ChainDocument::Page, "index.html"),
        (ChainDocument::OperatingSystem, "os.txt"),
        (ChainDocument::Problem, "problem.txt"),
        (ChainDocument::TreeSvg, "tree.svg"),
        (ChainDocument::TreeText, "tree.txt"),
    ];
}

impl Node {
    /// The file type; `None` for a guest's file, whose type only the guest's file system has.
    pub fn kind(&self) -> Option<NodeKind> {
        Some(match self {
            Node::Root
            | Node::Directory(_)
            | Node::Store
            | Node::Chain(_)
            | Node::Snapshots(_)
            | Node::Info(_)
            | Node::Control(_)
            | Node::Partitions(_)
            | Node::PartitionsOf(_)
            | Node::Files(_)
            | Node::FilesOf(_) => NodeKind::Directory,
            Node::StoreDocument(_)
            | Node::ChainDocument(..)
            | Node::ControlFile(..)
            | Node::View(_)
            | Node::Partition(_)
            | Node::VolumeList(_)
            | Node::VolumeProblem(..) => NodeKind::File,
            Node::FormerName(_) | Node::RootLink(_) => NodeKind::Symlink,
            Node::Guest(_) => return None,
        })
    }
}

/// The root's inode number, by FUSE's convention.
pub(super) const ROOT: u64 = 1;

/// The assigned inode numbers.
#[derive(Debug)]
pub(super) struct Inodes {
    table: RwLock<InodeTable>,
    guests: GuestNumbers,
}

#[derive(Debug)]
struct InodeTable {
    by_node: HashMap<Node, u64>,
    nodes: Vec<Node>,
}

impl Inodes {
    /// A table with only the root.
    pub(super) fn new() -> Self {
        let table = InodeTable { by_node: HashMap::from([(Node::Root, ROOT)]), nodes: vec![Node::Root] };
        Self { table: RwLock::new(table), guests: GuestNumbers::default() }
    }

    /// The number of a node; assigns one if it has none.
    pub(super) fn number(&self, node: &Node) -> u64 {
        if let Node::Guest(guest) = node {
            return self.guests.number(*guest);
        }
        if let Some(number) = self.table.read().by_node.get(node) {
            return *number;
        }
        let mut table = self.table.write();
        if let Some(number) = table.by_node.get(node) {
            return *number;
        }
        // X1: a number is given once.
        table.nodes.push(node.clone());
        let number = table.nodes.len() as u64;
        table.by_node.insert(node.clone(), number);
        number
    }

    /// The node of an assigned number.
    pub(super) fn node(&self, number: u64) -> Option<Node> {
        if let Some(guest) = self.guests.node(number) {
            return Some(Node::Guest(guest));
        }
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        self.table.read().nodes.get(index).cloned()
    }

    /// The numbers of guests' files.
    pub(super) fn guests(&self) -> &GuestNumbers {
        &self.guests
    }

    /// The number of assigned numbers.
    pub(super) fn count(&self) -> usize {
        self.table.read().nodes.len()
    }
}
