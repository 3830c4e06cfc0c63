//! The tree as JSON.
//!
//! Nodes are a flat list and reference each other by index: after a hundred layers, nested objects would
//! exceed the depth limit of JSON parsers. Nothing is folded. Size keys are QEMU's.

use std::io::{self, Write};

use serde_json::ser::{Formatter, PrettyFormatter};

use crate::error::is_plain;

use super::time;
use super::tree::{BackingTree, Forest, TreeNode, TreeNodeKind};
use serde::Serialize;

/// `{"trees": [...]}`, with one object per tree.
pub fn forest(forest: &Forest) -> String {
    let trees = forest.trees.iter().map(TreeObject::of).collect();
    pretty(&ForestObject { trees })
}

/// Any value in qemu-img's layout: indented by four spaces, with a newline at the end.
///
/// # Panics
/// If the value cannot be written as JSON (such as a map with keys that are no strings): the models contain
/// none.
///
/// # Panics
/// If the value has something that JSON lacks (maps whose keys are no strings): the models have not.
pub fn pretty<T: Serialize>(value: &T) -> String {
    let mut text = Vec::new();
    let layout = TerminalSafe(PrettyFormatter::with_indent(b"    "));
    let mut serializer = serde_json::Serializer::with_formatter(&mut text, layout);
    value.serialize(&mut serializer).expect("the models can be written as JSON");
    text.push(b'\n');
    String::from_utf8(text).expect("serde_json writes UTF-8")
}

/// Like `PrettyFormatter`, but also escapes characters in strings that a terminal would interpret. For JSON
/// parsers the value is the same.
struct TerminalSafe(PrettyFormatter<'static>);

impl Formatter for TerminalSafe {
    fn begin_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_array(out)
    }

    fn end_array<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array(out)
    }

    fn begin_array_value<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_array_value(out, first)
    }

    fn end_array_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_array_value(out)
    }

    fn begin_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object(out)
    }

    fn end_object<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object(out)
    }

    fn begin_object_key<W: ?Sized + Write>(&mut self, out: &mut W, first: bool) -> io::Result<()> {
        self.0.begin_object_key(out, first)
    }

    fn begin_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.begin_object_value(out)
    }

    fn end_object_value<W: ?Sized + Write>(&mut self, out: &mut W) -> io::Result<()> {
        self.0.end_object_value(out)
    }

    fn write_string_fragment<W: ?Sized + Write>(&mut self, out: &mut W, text: &str) -> io::Result<()> {
        let mut rest = text;
        while let Some(at) = rest.find(|c| !is_plain(c)) {
            out.write_all(&rest.as_bytes()[..at])?;
            let c = rest[at..].chars().next().unwrap_or_default();
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(out, "\\u{unit:04x}")?;
            }
            rest = &rest[at + c.len_utf8()..];
        }
        out.write_all(rest.as_bytes())
    }
}

#[derive(Serialize)]
struct ForestObject<'a> {
    trees: Vec<TreeObject<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct TreeObject<'a> {
    title: &'a str,
    virtual_size: u64,
    actual_size: u64,
    layers: usize,
    branches: usize,
    internal: usize,
    root: usize,
    nodes: Vec<NodeObject<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct NodeObject<'a> {
    id: usize,
    name: &'a str,
    state: &'static str,
    format: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    date: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    shared_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    freed_if_deleted: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    chain: Option<&'a str>,
    #[serde(skip_serializing_if = "<[String]>::is_empty")]
    flags: &'a [String],
    children: &'a [usize],
}

impl<'a> TreeObject<'a> {
    fn of(tree: &'a BackingTree) -> Self {
        Self {
            title: &tree.title,
            virtual_size: tree.virtual_size,
            actual_size: tree.on_disk,
            layers: tree.layer_count,
            branches: tree.branch_count,
            internal: tree.internal_count,
            root: tree.root,
            nodes: tree.nodes.iter().enumerate().map(NodeObject::of).collect(),
        }
    }
}

impl<'a> NodeObject<'a> {
    fn of((id, node): (usize, &'a TreeNode)) -> Self {
        Self {
            id,
            name: &node.name,
            state: node.mark.word(),
            format: match node.kind {
                TreeNodeKind::Raw => Some("raw"),
                TreeNodeKind::Qcow2 | TreeNodeKind::Internal => Some("qcow2"),
                TreeNodeKind::Foreign(name) => Some(name),
                TreeNodeKind::Missing => None,
            },
            date: node.date.and_then(time::rfc3339),
            actual_size: node.own_size,
            shared_size: node.sharing.map(|sharing| sharing.shared),
            freed_if_deleted: node.sharing.and_then(|sharing| sharing.freed),
            chain: node.chain.as_deref(),
            flags: &node.flags,
            children: &node.children,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tree::sample;
    use super::*;

    #[test]
    fn json_has_every_layer_and_the_backing_tree() {
        let text = forest(&Forest { trees: vec![sample::web01()] });
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let tree = &value["trees"][0];
        assert_eq!((&tree["title"], &tree["virtual-size"]), (&"web01".into(), &(40u64 << 30).into()));
        assert_eq!(tree["nodes"].as_array().unwrap().len(), 32);
        let base = serde_json::json!({"id": 0, "name": "base", "state": "frozen", "format": "raw",
            "date": "2026-01-03T09:00:00Z", "actual-size": 3_328_599_654_u64, "children": [1]});
        assert_eq!(tree["nodes"][0], base);
        assert_eq!(
            (&tree["nodes"][2]["chain"], &tree["nodes"][3]["state"]),
            (&"web02".into(), &"internal".into())
        );
    }

    #[test]
    fn a_hostile_name_is_one_string() {
        let name = "\"},\u{0}\u{1b}\u{202e}";
        let text =
            forest(&Forest { trees: vec![BackingTree { title: name.into(), ..BackingTree::default() }] });
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["trees"][0]["title"], name);
        assert!(!text.contains('\u{1b}') && !text.contains('\u{202e}') && text.contains("\\u202e"));
    }
}
