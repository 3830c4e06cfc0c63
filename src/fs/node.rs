//! What the mount shows, and the numbers under which the kernel knows it.
//!
//! Node and number are one to one for the life of a mount. A node's identity includes what it
//! shows, so that a number never stands for other content: a layer whose file was changed by
//! somebody else is another node.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use parking_lot::RwLock;

use crate::store::ViewId;

use super::control::{ControlFile, ControlScope};
use super::mounted_volumes::GuestNode;

/// One thing in the tree.
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
    /// What stands there for one view.
    PartitionsOf(ViewId),
    /// A partition, as a disk.
    Partition(PartitionNode),
    /// A chain's `files` directory.
    Files(Arc<PathBuf>),
    /// What stands there for one view.
    FilesOf(ViewId),
    /// The list of a view's volumes.
    VolumeList(ViewId),
    /// Why what is shown of a volume is not what was written last.
    VolumeProblem(ViewId, Arc<str>),
    /// The link to the volume that holds the operating system.
    RootLink(ViewId),
    /// A guest's own file.
    Guest(GuestNode),
}

/// A partition of a view, and where it lies: another place is another disk.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PartitionNode {
    /// The disk.
    pub view: ViewId,
    /// As Linux numbers it.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Bytes.
    pub len: u64,
}

/// The files of `.chainfs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum StoreDocument {
    /// The branching tree as text.
    TreeText,
    /// The same as a picture.
    TreeSvg,
    /// All chains for programs.
    Chains,
    /// What could not be shown.
    Problems,
    /// Counters.
    Metrics,
    /// Removed layers that can be had back.
    Trash,
}

/// The files of `info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ChainDocument {
    /// As `qemu-img info --backing-chain`.
    Chain,
    /// The chain's part of the store's tree.
    TreeText,
    /// The same as a picture.
    TreeSvg,
    /// What is wrong; only where something is.
    Problem,
    /// Which operating system there is on the disk; only where guests are shown.
    OperatingSystem,
}

/// File types that the mount has.
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
    /// All of them with their names.
    pub const ALL: [(StoreDocument, &'static str); 6] = [
        (StoreDocument::Chains, "chains.json"),
        (StoreDocument::Metrics, "metrics"),
        (StoreDocument::Problems, "problems.txt"),
        (StoreDocument::Trash, "trash.txt"),
        (StoreDocument::TreeSvg, "tree.svg"),
        (StoreDocument::TreeText, "tree.txt"),
    ];
}

impl ChainDocument {
    /// All of them with their names.
    pub const ALL: [(ChainDocument, &'static str); 5] = [
        (ChainDocument::Chain, "chain.json"),
        (ChainDocument::OperatingSystem, "os.txt"),
        (ChainDocument::Problem, "problem.txt"),
        (ChainDocument::TreeSvg, "tree.svg"),
        (ChainDocument::TreeText, "tree.txt"),
    ];
}

impl Node {
    /// What it is; `None` for a guest's file, which has to be asked for.
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
            Node::RootLink(_) => NodeKind::Symlink,
            Node::Guest(_) => return None,
        })
    }
}

/// The root's number, by FUSE's convention.
pub(super) const ROOT: u64 = 1;

/// Numbers given so far.
#[derive(Debug)]
pub(super) struct Inodes {
    table: RwLock<InodeTable>,
}

#[derive(Debug)]
struct InodeTable {
    by_node: HashMap<Node, u64>,
    nodes: Vec<Node>,
}

impl Inodes {
    /// Only the root has a number.
    pub(super) fn new() -> Self {
        let table = InodeTable { by_node: HashMap::from([(Node::Root, ROOT)]), nodes: vec![Node::Root] };
        Self { table: RwLock::new(table) }
    }

    /// The number of a node; a new one if it has none yet.
    pub(super) fn number(&self, node: &Node) -> u64 {
        if let Node::Guest(guest) = node {
            return guest.number();
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

    /// The node of a number that was given.
    pub(super) fn node(&self, number: u64) -> Option<Node> {
        if let Some(guest) = GuestNode::from_number(number) {
            return Some(Node::Guest(guest));
        }
        let index = usize::try_from(number.checked_sub(1)?).ok()?;
        self.table.read().nodes.get(index).cloned()
    }

    /// How many numbers have been given.
    pub(super) fn count(&self) -> usize {
        self.table.read().nodes.len()
    }
}
