//! The backing tree of a store as plain values.
//!
//! A [`BackingTree`] has one base. Its nodes reference each other by index, so that a chain of a thousand
//! layers needs no deep recursion. The renderings ([`super::text`], [`super::svg`], [`super::dot`],
//! [`super::json`]) accept any values: they skip duplicate and invalid indices, and never fail.

use std::cmp::Reverse;
use std::time::SystemTime;

/// Every tree of a store.
#[derive(Clone, Debug, Default)]
pub struct Forest {
    /// One for each base, in display order.
    pub trees: Vec<BackingTree>,
}

/// The order of trees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TreeOrder {
    /// By title.
    #[default]
    Name,
    /// The tree with the latest layer or internal snapshot first.
    Date,
    /// The tree with the most bytes on disk first.
    Size,
}

impl Forest {
    /// Sorts the trees; those that are equal in that, by title. The layers of a tree keep their order.
    pub fn sort(&mut self, order: TreeOrder) {
        let latest = |tree: &BackingTree| tree.nodes.iter().filter_map(|node| node.date).max();
        self.trees.sort_by(|a, b| a.title.cmp(&b.title));
        match order {
            TreeOrder::Name => {}
            TreeOrder::Date => self.trees.sort_by_key(|tree| Reverse(latest(tree))),
            TreeOrder::Size => self.trees.sort_by_key(|tree| Reverse(tree.on_disk)),
        }
    }
}

/// A base and all its overlays.
#[derive(Clone, Debug, Default)]
pub struct BackingTree {
    /// The chain that names the tree.
    pub title: String,
    /// Size of the titular chain's disk.
    pub virtual_size: u64,
    /// Bytes on disk of all files of the tree.
    pub on_disk: u64,
    /// Number of images.
    pub layer_count: usize,
    /// Number of leaves; internal snapshots do not count.
    pub branch_count: usize,
    /// Number of internal snapshots of all images.
    pub internal_count: usize,
    /// Images and internal snapshots in any order.
    pub nodes: Vec<TreeNode>,
    /// Index of the base in `nodes`.
    pub root: usize,
}

/// An image or an internal snapshot.
#[derive(Clone, Debug)]
pub struct TreeNode {
    /// Its role in the chain.
    pub mark: NodeMark,
    /// Its view's name, or the file name of a missing file.
    pub name: String,
    /// Its format.
    pub kind: TreeNodeKind,
    /// When it was frozen or taken, or else its file was last changed.
    pub date: Option<SystemTime>,
    /// Bytes on disk of its file; `None` for internal snapshots and missing files.
    pub own_size: Option<u64>,
    /// Its index among the images of the catalog; `None` for internal snapshots and missing files.
    pub image: Option<usize>,
    /// What sharing and deleting it means, if that was asked for.
    pub sharing: Option<Sharing>,
    /// Of an internal snapshot: the index of its image, and its own in that image's table.
    pub snapshot: Option<(usize, usize)>,
    /// Further properties: "writable", `locked by qemu[4711]`, "missing", "shared by 3".
    pub flags: Vec<String>,
    /// Whether it is a leaf that a domain left behind.
    pub is_left_behind: bool,
    /// The chain whose leaf it is.
    pub chain: Option<String>,
    /// Indices of its overlays and internal snapshots.
    pub children: Vec<usize>,
}

/// What other chains have of a layer, and what its deletion frees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// Bytes on disk of its file that other chains need as well.
    pub shared: u64,
    /// Bytes on disk that its deletion would free; negative if copies for several overlays need more. `None`
    /// if it cannot be deleted at present, or if that is not known.
    pub freed: Option<i64>,
}

/// The role of a node in its chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum NodeMark {
    /// A layer that never changes.
    Frozen,
    /// An internal snapshot of an image.
    Internal,
    /// The writable layer.
    Active,
    /// A layer that cannot be read.
    Broken,
}

/// The format of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TreeNodeKind {
    /// A raw image.
    Raw,
    /// A qcow2 image.
    Qcow2,
    /// An image of an unsupported format.
    Foreign(&'static str),
    /// An internal snapshot of a qcow2 image.
    Internal,
    /// A file that an image references and that does not exist.
    Missing,
}

impl BackingTree {
    /// A tree of one node; [`BackingTree::add`] adds more.
    pub fn new(title: impl Into<String>, base: TreeNode) -> Self {
        Self { title: title.into(), nodes: vec![base], ..Self::default() }
    }

    /// Adds `node` as a child of `parent` and returns its index.
    pub fn add(&mut self, parent: usize, node: TreeNode) -> usize {
        let index = self.nodes.len();
        self.nodes.push(node);
        self.nodes[parent].children.push(index);
        index
    }

    /// Counts layers, branches, internal snapshots and bytes on disk from the nodes.
    pub fn count(&mut self) {
        let internal = |node: &&TreeNode| node.kind == TreeNodeKind::Internal;
        self.internal_count = self.nodes.iter().filter(internal).count();
        self.layer_count = self.nodes.len() - self.internal_count;
        let is_layer =
            |child: &usize| self.nodes.get(*child).is_some_and(|node| node.kind != TreeNodeKind::Internal);
        let is_leaf =
            |node: &&TreeNode| node.kind != TreeNodeKind::Internal && !node.children.iter().any(is_layer);
        self.branch_count = self.nodes.iter().filter(is_leaf).count();
        self.on_disk = self.nodes.iter().filter_map(|node| node.own_size).fold(0, u64::saturating_add);
    }
}

impl TreeNode {
    /// A node without date, size, flags or children.
    pub fn new(mark: NodeMark, kind: TreeNodeKind, name: impl Into<String>) -> Self {
        Self {
            mark,
            name: name.into(),
            kind,
            date: None,
            own_size: None,
            image: None,
            sharing: None,
            snapshot: None,
            flags: Vec::new(),
            is_left_behind: false,
            chain: None,
            children: Vec::new(),
        }
    }
}

impl NodeMark {
    /// The word in JSON.
    pub fn word(self) -> &'static str {
        match self {
            NodeMark::Frozen => "frozen",
            NodeMark::Internal => "internal",
            NodeMark::Active => "active",
            NodeMark::Broken => "broken",
        }
    }
}

impl TreeNodeKind {
    /// The word in the format column.
    pub fn word(self) -> &'static str {
        match self {
            TreeNodeKind::Raw => "raw",
            TreeNodeKind::Qcow2 => "qcow2",
            TreeNodeKind::Internal => "int",
            TreeNodeKind::Foreign(name) => name,
            TreeNodeKind::Missing => "?",
        }
    }
}

#[cfg(test)]
pub(super) mod sample {
    //! The tree of the user's guide, for the tests of the renderings.

    use super::*;
    use std::time::Duration;

    /// 2026-01-01 00:00 UTC in seconds.
    pub(in crate::report) const NEW_YEAR: u64 = 1_767_225_600;

    /// A layer with a date `day` days and `hour` hours into 2026, and a size in tenths of a GiB.
    pub(in crate::report) fn layer(
        name: &str,
        kind: TreeNodeKind,
        day: u64,
        hour: u64,
        tenths: u64,
    ) -> TreeNode {
        let date = SystemTime::UNIX_EPOCH + Duration::from_secs(NEW_YEAR + day * 86_400 + hour * 3600);
        let own_size = Some(tenths * (1 << 30) / 10);
        TreeNode { date: Some(date), own_size, ..TreeNode::new(NodeMark::Frozen, kind, name) }
    }

    /// `web01` with a branch, an internal snapshot and a long run of nightly snapshots.
    pub(in crate::report) fn web01() -> BackingTree {
        let mut tree = BackingTree::new("web01", layer("base", TreeNodeKind::Raw, 2, 9, 31));
        let installed = tree.add(0, layer("installed", TreeNodeKind::Qcow2, 2, 11, 19));
        let php = tree.add(
            installed,
            TreeNode { chain: Some("web02".into()), ..layer("try-php9", TreeNodeKind::Qcow2, 41, 20, 7) },
        );
        let upgrade = TreeNode {
            own_size: None,
            mark: NodeMark::Internal,
            ..layer("before-upgrade", TreeNodeKind::Internal, 42, 8, 0)
        };
        tree.add(php, upgrade);
        let mut top = installed;
        for night in 1..=27 {
            top = tree.add(top, layer(&format!("nightly-{night:02}"), TreeNodeKind::Qcow2, 58 + night, 2, 2));
        }
        tree.nodes[top].flags.push("job: commit 43 %".into());
        let active = TreeNode {
            mark: NodeMark::Active,
            flags: vec!["writable".into(), "locked by qemu[4711]".into()],
            chain: Some("web01".into()),
            ..layer("active", TreeNodeKind::Qcow2, 86, 2, 10)
        };
        tree.add(top, active);
        tree.count();
        tree.virtual_size = 40 << 30;
        tree
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_branches_and_internal_snapshots_are_counted() {
        let tree = sample::web01();
        assert_eq!((tree.layer_count, tree.branch_count, tree.internal_count), (31, 2, 1));
    }

    #[test]
    fn trees_are_ordered_by_name_date_or_size() {
        let tree = |title: &str, day, tenths| {
            let mut tree = BackingTree::new(title, sample::layer("base", TreeNodeKind::Raw, day, 0, tenths));
            tree.count();
            tree
        };
        let mut forest = Forest { trees: vec![tree("c", 2, 1), tree("a", 1, 3), tree("b", 2, 2)] };
        for (order, titles) in [(TreeOrder::Date, "bca"), (TreeOrder::Size, "abc"), (TreeOrder::Name, "abc")]
        {
            forest.sort(order);
            assert_eq!(forest.trees.iter().map(|tree| tree.title.as_str()).collect::<String>(), titles);
        }
    }
}
