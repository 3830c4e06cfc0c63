//! The order and columns of rows in a drawn tree; shared by text and picture.
//!
//! The base comes first. The child with the longest chain above it continues in the same column. The others
//! are side branches, drawn before it and one column further in. So the chain from a base to its disk is one
//! straight column, and the number of columns grows only with the number of nested branches. Long runs of
//! plain layers fold into one row.

use super::tree::{BackingTree, NodeMark, TreeNodeKind};

/// A run folds if it hides at least this many layers.
const FOLD_FROM: usize = 5;

/// One line of a drawing.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Row {
    /// What the row shows.
    pub(super) item: RowItem,
    /// How the row joins its parent.
    pub(super) joint: Joint,
    /// The row of the backing file; `None` for the base.
    pub(super) parent: Option<usize>,
    /// For each column to the left of the row's joint, whether its line continues.
    pub(super) bars: Vec<bool>,
}

/// What a row shows.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum RowItem {
    /// The node with this index.
    Node(usize),
    /// Folded layers of a straight run, lowest first.
    Fold(Vec<usize>),
}

/// How a row joins its parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Joint {
    /// In the same column.
    Straight,
    /// As a side branch; `last` if nothing follows in the parent's column.
    Side {
        /// Whether the parent's column ends here.
        last: bool,
    },
}

impl Row {
    /// The column of the row's mark.
    pub(super) fn column(&self) -> usize {
        match self.joint {
            Joint::Straight => self.bars.len(),
            Joint::Side { .. } => self.bars.len() + 1,
        }
    }
}

/// A node that is not drawn yet.
struct Pending {
    node: usize,
    joint: Joint,
    parent: Option<usize>,
    bars: Vec<bool>,
}

/// The rows of `tree` from its base up. With `full` nothing folds.
pub(super) fn rows(tree: &BackingTree, full: bool) -> Vec<Row> {
    let children = children(tree);
    let main = main_children(tree, &children);
    let mut rows = Vec::new();
    let mut pending: Vec<Pending> = Vec::new();
    if tree.root < tree.nodes.len() {
        pending.push(Pending { node: tree.root, joint: Joint::Straight, parent: None, bars: Vec::new() });
    }
    while let Some(Pending { node, joint, parent, bars }) = pending.pop() {
        let is_foldable = |node: usize| node != tree.root && is_plain(tree, node) && main[node].is_some();
        let mut run = Vec::new();
        if !full && is_foldable(node) {
            let mut above = main[node];
            while let Some(next) = above.filter(|next| is_foldable(*next)) {
                run.push(next);
                above = main[next];
            }
        }
        // The column in which the node's own line continues.
        let mut column = bars.clone();
        if let Joint::Side { last } = joint {
            column.push(!last);
        }
        rows.push(Row { item: RowItem::Node(node), joint, parent, bars });
        let mut top = node;
        if run.len() >= FOLD_FROM {
            top = run[run.len() - 1];
            let parent = Some(rows.len() - 1);
            rows.push(Row { item: RowItem::Fold(run), joint: Joint::Straight, parent, bars: column.clone() });
        }
        let here = Some(rows.len() - 1);
        if let Some(next) = main[top] {
            pending.push(Pending { node: next, joint: Joint::Straight, parent: here, bars: column.clone() });
        }
        // Pushed in reverse: the last one pushed is drawn first.
        let side = children[top].iter().copied().filter(|child| Some(*child) != main[top]).rev();
        let mut last = main[top].is_none();
        for child in side {
            pending.push(Pending {
                node: child,
                joint: Joint::Side { last },
                parent: here,
                bars: column.clone(),
            });
            last = false;
        }
    }
    rows
}

/// Each node's children, internal snapshots first, without invalid indices and nodes that were drawn before.
fn children(tree: &BackingTree) -> Vec<Vec<usize>> {
    let mut seen = vec![false; tree.nodes.len()];
    let mut children = vec![Vec::new(); tree.nodes.len()];
    let mut pending = Vec::from_iter((tree.root < tree.nodes.len()).then_some(tree.root));
    if let Some(root) = pending.first() {
        seen[*root] = true;
    }
    while let Some(node) = pending.pop() {
        for &child in &tree.nodes[node].children {
            if seen.get(child).is_some_and(|seen| !seen) {
                seen[child] = true;
                children[node].push(child);
                pending.push(child);
            }
        }
        children[node].sort_by_key(|child| tree.nodes[*child].kind != TreeNodeKind::Internal);
    }
    children
}

/// For each node the child that continues in its column: one that leads to more than leaves that were left
/// behind, with the longest chain above it. Among equals: the one that leads to the titular chain, then to an
/// active disk, then the first by name.
fn main_children(tree: &BackingTree, children: &[Vec<usize>]) -> Vec<Option<usize>> {
    let mut order = Vec::from_iter((tree.root < tree.nodes.len()).then_some(tree.root));
    let mut next = 0;
    while let Some(&node) = order.get(next) {
        order.extend(&children[node]);
        next += 1;
    }
    let mut rank = vec![(false, 0usize, false, false); tree.nodes.len()];
    let mut main = vec![None; tree.nodes.len()];
    for &node in order.iter().rev() {
        let best = children[node]
            .iter()
            .copied()
            .filter(|child| tree.nodes[*child].kind != TreeNodeKind::Internal)
            .max_by(|a, b| {
                rank[*a].cmp(&rank[*b]).then_with(|| tree.nodes[*b].name.cmp(&tree.nodes[*a].name))
            });
        let own = &tree.nodes[node];
        let (used, depth, titular, active) =
            best.map_or((!own.is_left_behind, 0, false, false), |best| rank[best]);
        let is_titular = own.chain.as_deref() == Some(tree.title.as_str());
        rank[node] = (used, depth + 1, titular || is_titular, active || own.mark == NodeMark::Active);
        main[node] = best;
    }
    main
}

/// Whether a layer has no property that a folded row would hide.
fn is_plain(tree: &BackingTree, node: usize) -> bool {
    let node = &tree.nodes[node];
    node.mark == NodeMark::Frozen && node.flags.is_empty() && node.chain.is_none() && node.children.len() == 1
}

#[cfg(test)]
mod tests {
    use super::super::tree::{TreeNode, sample};
    use super::*;

    fn plain(name: &str) -> TreeNode {
        TreeNode::new(NodeMark::Frozen, TreeNodeKind::Qcow2, name)
    }

    #[test]
    fn the_longest_chain_is_the_straight_column() {
        let tree = sample::web01();
        let rows = rows(&tree, true);
        assert_eq!(rows.len(), tree.nodes.len());
        let side: Vec<_> = rows.iter().filter(|row| row.column() > 0).collect();
        assert_eq!(side.len(), 2);
        assert_eq!(rows.last().unwrap().column(), 0);
    }

    #[test]
    fn a_thousand_layers_fold_into_a_few_rows() {
        let mut tree = BackingTree::new("deep", plain("base"));
        for layer in 0..1_000 {
            tree.add(layer, plain(&layer.to_string()));
        }
        assert_eq!(rows(&tree, true).len(), 1_001);
        let folded = rows(&tree, false);
        assert_eq!(folded.len(), 4);
        assert!(matches!(&folded[2].item, RowItem::Fold(run) if run.len() == 998));
    }

    #[test]
    fn short_runs_do_not_fold() {
        let mut tree = BackingTree::new("short", plain("base"));
        for layer in 0..=FOLD_FROM {
            tree.add(layer, plain("layer"));
        }
        assert!(rows(&tree, false).iter().all(|row| matches!(row.item, RowItem::Node(_))));
    }

    #[test]
    fn loops_and_invalid_indices_end_the_walk() {
        let mut tree = BackingTree::new("bad", plain("base"));
        let above = tree.add(0, plain("above"));
        tree.nodes[above].children = vec![0, above, 77];
        assert_eq!(rows(&tree, false).len(), 2);
        tree.root = 9;
        assert!(rows(&tree, false).is_empty());
        assert!(rows(&BackingTree::default(), false).is_empty());
    }

    #[test]
    fn equal_chains_are_ranked_by_title_activity_and_name() {
        let mut tree = BackingTree::new("b", plain("base"));
        tree.add(0, plain("c"));
        tree.add(0, plain("a"));
        let last = |tree: &BackingTree| match rows(tree, false).last().unwrap().item {
            RowItem::Node(node) => tree.nodes[node].name.clone(),
            RowItem::Fold(_) => unreachable!(),
        };
        assert_eq!(last(&tree), "a");
        tree.add(0, TreeNode { mark: NodeMark::Active, ..plain("x") });
        assert_eq!(last(&tree), "x");
        tree.add(0, TreeNode { chain: Some("b".into()), ..plain("y") });
        assert_eq!(last(&tree), "y");
        let deep = tree.add(0, plain("deep"));
        tree.add(deep, TreeNode { is_left_behind: true, ..plain("left") });
        assert_eq!(last(&tree), "y", "a leaf that was left behind is never the main one");
        tree.add(deep, plain("right"));
        assert_eq!(last(&tree), "right");
    }
}
