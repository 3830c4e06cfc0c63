//! The tree in Graphviz' language: `chainfs tree --output dot STORE | dot -Tpng`.

use super::layout::{Row, RowItem, rows};
use super::text::{Folded, flags};
use super::tree::{BackingTree, Forest, NodeMark};
use super::{safe, time};
use crate::units::brief_size;
use jiff::tz::TimeZone;
use std::fmt::Write as _;

/// All trees as one graph, with an edge from each layer to its backing file.
pub fn forest(forest: &Forest, zone: &TimeZone, full: bool) -> String {
    let mut dot = String::from(
        "digraph chainfs {\n  rankdir=BT;\n  node [shape=box, style=rounded, fontname=\"monospace\", \
            fontsize=10];\n",
    );
    for (number, tree) in forest.trees.iter().enumerate() {
        let _ = writeln!(dot, "  subgraph cluster_{number} {{\n    label=\"{}\";", safe::dot(&tree.title));
        let rows = rows(tree, full);
        for (index, row) in rows.iter().enumerate() {
            let (lines, style) = label(row, tree, zone);
            let lines: Vec<_> =
                lines.iter().filter(|line| !line.is_empty()).map(|line| safe::dot(line)).collect();
            let _ = writeln!(dot, "    n{number}_{index} [label=\"{}\"{style}];", lines.join("\\n"));
            if let Some(parent) = row.parent {
                let _ = writeln!(dot, "    n{number}_{index} -> n{number}_{parent};");
            }
        }
        dot.push_str("  }\n");
    }
    dot.push_str("}\n");
    dot
}

fn label(row: &Row, tree: &BackingTree, zone: &TimeZone) -> ([String; 4], &'static str) {
    match &row.item {
        RowItem::Node(node) => {
            let node = &tree.nodes[*node];
            let style = match node.mark {
                NodeMark::Frozen => "",
                NodeMark::Internal => ", shape=ellipse",
                NodeMark::Active => ", penwidth=2, color=darkgreen",
                NodeMark::Broken => ", color=red",
            };
            let size = node.own_size.map(|len| format!(" {}", brief_size(len))).unwrap_or_default();
            let date = node.date.map(|date| time::minute(date, zone)).unwrap_or_default();
            ([node.name.clone(), format!("{}{size}", node.kind.word()), date, flags(tree, node)], style)
        }
        RowItem::Fold(run) => {
            let folded = Folded::of(tree, run, zone);
            let size = format!("{} {}", folded.kind, brief_size(folded.own_size));
            let names = format!("{} .. {}", folded.names.0, folded.names.1);
            ([format!("{} layers", run.len()), size, folded.days, names], ", style=dashed")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::{TreeNode, TreeNodeKind};
    use super::*;

    #[test]
    fn edges_lead_to_the_backing_file_and_names_are_quoted() {
        let mut tree =
            BackingTree::new("t", TreeNode::new(NodeMark::Frozen, TreeNodeKind::Raw, "base\"]; x [label=\""));
        tree.add(
            0,
            TreeNode {
                own_size: Some(2048),
                ..TreeNode::new(NodeMark::Active, TreeNodeKind::Qcow2, "a\\N\n")
            },
        );
        let expected = r#"digraph chainfs {
  rankdir=BT;
  node [shape=box, style=rounded, fontname="monospace", fontsize=10];
  subgraph cluster_0 {
    label="t";
    n0_0 [label="base\"]; x [label=\"\nraw"];
    n0_1 [label="a\\N\\x0a\nqcow2 2.0 KiB", penwidth=2, color=darkgreen];
    n0_1 -> n0_0;
  }
}
"#;
        assert_eq!(forest(&Forest { trees: vec![tree] }, &TimeZone::UTC, false), expected);
    }
}
