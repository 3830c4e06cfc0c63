//! A plan as two trees, before and after, in the model of the tree renderings.

use crate::ops::{Plan, PlanLayer};
use crate::store::{Catalog, Format, ImageEntry};

use super::safe;
use super::store::date;
use super::tree::{BackingTree, Forest, NodeMark, TreeNode, TreeNodeKind};

/// The chain of a command before and after it.
pub fn forest(plan: &Plan, catalog: &Catalog) -> Forest {
    let known = |layer: &PlanLayer| {
        let old = plan.renamed.iter().find(|(_, new)| *new == layer.path && !is_in(&plan.before, layer));
        let path = old.map_or(&layer.path, |(old, _)| old);
        catalog.images.iter().find(|image| image.place.root == 0 && image.place.path == *path)
    };
    let before = tree("before", &plan.before, &known);
    let after = tree(&format!("after {}", plan.command), &plan.after, &known);
    Forest { trees: [before, after].into_iter().flatten().collect() }
}

fn is_in(layers: &[PlanLayer], wanted: &PlanLayer) -> bool {
    layers.iter().any(|layer| layer.path == wanted.path && layer.name == wanted.name)
}

/// A straight tree of layers that are given top first; `None` without layers.
fn tree<'a>(
    title: &str,
    layers: &[PlanLayer],
    known: &impl Fn(&PlanLayer) -> Option<&'a ImageEntry>,
) -> Option<BackingTree> {
    let mut upwards = layers.iter().rev();
    let base = upwards.next()?;
    let mut tree = BackingTree::new(safe::terminal(title), node(base, known(base)));
    let mut top = 0;
    for layer in upwards {
        top = tree.add(top, node(layer, known(layer)));
    }
    tree.count();
    let size = layers.first().and_then(known).and_then(ImageEntry::virtual_size);
    tree.virtual_size = size.unwrap_or(0);
    Some(tree)
}

fn node(layer: &PlanLayer, image: Option<&ImageEntry>) -> TreeNode {
    let mark = if layer.active { NodeMark::Active } else { NodeMark::Frozen };
    let kind = match image.and_then(|image| image.format) {
        Some(Format::Raw) => TreeNodeKind::Raw,
        Some(Format::Qcow2) | None => TreeNodeKind::Qcow2,
    };
    let users = image.map_or(0, |image| image.users.len());
    let shared = (users > 1).then(|| format!("shared by {}", image.map_or(0, |image| image.chain_count)));
    let note = (!layer.note.is_empty()).then(|| safe::terminal(&layer.note));
    let is_new = layer.note == "new" || layer.note == "new and empty";
    let image = image.filter(|_| !is_new);
    TreeNode {
        date: image.map(date),
        own_size: image.map(|image| image.stat.blocks * 512),
        flags: shared.into_iter().filter(|_| !is_new).chain(note).collect(),
        ..TreeNode::new(mark, kind, safe::text(&layer.name))
    }
}
