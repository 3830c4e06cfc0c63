//! Finds the layers and views that the words of a command name, and describes layers for plans.

use crate::error::{Error, ErrorKind, Result};
use crate::format::Snapshot;
use crate::store::{ChainView, ImageIndex, layer_name};

use super::plan::PlanLayer;
use super::scanned_store::{ScannedChain, ScannedStore};

/// The layer that a view's name means, counted from the leaf.
pub(super) fn layer(scan: &ScannedStore, chain: &ScannedChain, name: &[u8]) -> Result<usize> {
    let view = chain.views.find(name);
    if view.is_some_and(|view| view.snapshot.is_some()) {
        let fact = "is an internal snapshot; name one of the layers";
        return Err(Error::new(ErrorKind::Usage, format!("{} {fact}", String::from_utf8_lossy(name))));
    }
    let is_layer = |view: &ChainView| view.snapshot.is_none();
    view.map(|view| view.layer).ok_or_else(|| chain.views.unknown(&chain.shown(scan), name, is_layer))
}

/// The same, and without a name the active layer; `key` is the word that could name another.
pub(super) fn layer_or_active(
    scan: &ScannedStore,
    chain: &ScannedChain,
    name: Option<&[u8]>,
    key: &str,
) -> Result<usize> {
    if let Some(name) = name {
        return layer(scan, chain, name);
    }
    chain.views.active().map(|active| active.layer).ok_or_else(|| {
        let fact = format!("{} has no active layer; say {key}= with one of its layers", chain.shown(scan));
        Error::new(ErrorKind::Usage, fact)
    })
}

/// The view of that name.
pub(super) fn view<'a>(scan: &ScannedStore, chain: &'a ScannedChain, name: &[u8]) -> Result<&'a ChainView> {
    chain.views.find(name).ok_or_else(|| chain.views.unknown(&chain.shown(scan), name, |_| true))
}

/// The layers of a chain, top first.
pub(super) fn tree(scan: &ScannedStore, chain: &ScannedChain) -> Vec<PlanLayer> {
    chain.views.layers.iter().map(|index| line(scan, chain, *index)).collect()
}

/// An image, under its name in the chain if it is one of its layers.
pub(super) fn line(scan: &ScannedStore, chain: &ScannedChain, index: ImageIndex) -> PlanLayer {
    let views = &chain.views;
    let depth = views.layers.iter().position(|layer| *layer == index);
    let view = views.views.iter().find(|view| Some(view.layer) == depth && view.snapshot.is_none());
    let path = scan.image(index).place.path.clone();
    let name = view.map_or_else(|| layer_name(&path).to_vec(), |v| v.name.clone());
    PlanLayer { name, path, active: view.is_some_and(|view| view.active), note: String::new() }
}

/// Names of the views that show one of these images, or an internal snapshot of it, at their top.
pub(super) fn views_of(chain: &ScannedChain, images: impl Iterator<Item = ImageIndex>) -> Vec<Vec<u8>> {
    let images: Vec<ImageIndex> = images.collect();
    let shows = |layer: usize| images.contains(&chain.views.layers[layer]);
    chain.views.views.iter().filter(|view| shows(view.layer)).map(|view| view.name.clone()).collect()
}

/// The internal snapshot at that index of an image's table.
pub(super) fn inner(scan: &ScannedStore, index: ImageIndex, place: usize) -> Result<Snapshot> {
    let image = scan.image(index);
    let snapshot = image.qcow2().and_then(|qcow2| qcow2.snapshots.get(place)).cloned();
    snapshot.ok_or_else(|| Error::new(ErrorKind::Stale, format!("{} has changed", image.shown())))
}
