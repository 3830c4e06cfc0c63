//! The views of one chain: their names, and which layer and internal snapshot each shows.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use crate::format::Snapshot;

use super::catalog::{Catalog, ImageIndex};
use super::names::{ViewForm, view_names};

/// One view of a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChainView {
    /// Its name, without suffix.
    pub name: Vec<u8>,
    /// Index of its top layer in the chain, from the leaf.
    pub layer: usize,
    /// Index of the internal snapshot in that layer's table.
    pub snapshot: Option<usize>,
    /// Whether it is the chain's active disk.
    pub active: bool,
    /// Whether VM state was saved with it.
    pub has_vm_state: bool,
}

/// All views of a chain.
#[derive(Debug)]
pub struct ChainViews {
    /// The chain's layers, leaf first.
    pub layers: Vec<ImageIndex>,
    /// Its views: layers first, from the leaf down, then internal snapshots.
    pub views: Vec<ChainView>,
    by_name: HashMap<Vec<u8>, usize>,
    /// For each layer, a digest of which files there are from it down to the base, and in what version.
    states: Vec<u64>,
}

impl ChainViews {
    /// The views of the chain of that leaf. Images that could not be understood have none.
    pub fn new(catalog: &Catalog, leaf: ImageIndex) -> Self {
        let layers = catalog.layers(leaf);
        let mut views = Vec::new();
        let mut forms = Vec::new();
        for (layer, index) in layers.iter().enumerate() {
            let image = &catalog.images[*index];
            if image.virtual_size().is_none() || catalog.hidden_by(&layers[layer..], false).is_some() {
                continue;
            }
            let active = layer == 0 && catalog.is_active(leaf);
            forms.push(ViewForm { path: &image.place.path, active, snapshot: None });
            views.push(ChainView { name: Vec::new(), layer, snapshot: None, active, has_vm_state: false });
        }
        for (layer, index) in layers.iter().enumerate() {
            let image = &catalog.images[*index];
            let Some(qcow2) = image.qcow2() else { continue };
            if catalog.hidden_by(&layers[layer..], true).is_some() {
                continue;
            }
            let active = layer == 0 && catalog.is_active(leaf);
            for (snapshot, Snapshot { name, id, vm_state_size, .. }) in qcow2.snapshots.iter().enumerate() {
                forms.push(ViewForm { path: &image.place.path, active, snapshot: Some((name, id)) });
                let has_vm_state = *vm_state_size > 0;
                views.push(ChainView {
                    name: Vec::new(),
                    layer,
                    snapshot: Some(snapshot),
                    active: false,
                    has_vm_state,
                });
            }
        }
        for (view, name) in views.iter_mut().zip(view_names(&forms)) {
            view.name = name;
        }
        let by_name = views.iter().enumerate().map(|(index, view)| (view.name.clone(), index)).collect();
        let states = states(catalog, &layers);
        Self { layers, views, by_name, states }
    }

    /// A digest of the files from the layer (counted from the leaf) down to the base: another one
    /// as soon as any of them has changed. 0 where there is no such layer.
    pub fn state(&self, layer: usize) -> u64 {
        self.states.get(layer).copied().unwrap_or(0)
    }

    /// Gives states their former digests.
    pub(super) fn rename_states(&mut self, former: &HashMap<u64, u64>) {
        for state in self.states.iter_mut().filter(|_| !former.is_empty()) {
            *state = former.get(state).copied().unwrap_or(*state);
        }
    }

    /// The view of that name.
    pub fn find(&self, name: &[u8]) -> Option<&ChainView> {
        self.by_name.get(name).map(|index| &self.views[*index])
    }

    /// The active disk, if the chain has one.
    pub fn active(&self) -> Option<&ChainView> {
        self.views.first().filter(|view| view.active)
    }

    /// All views but the active disk.
    pub fn snapshots(&self) -> impl Iterator<Item = &ChainView> {
        self.views.iter().filter(|view| !view.active)
    }
}

fn states(catalog: &Catalog, layers: &[ImageIndex]) -> Vec<u64> {
    let mut below = 0_u64;
    let upwards = layers.iter().rev().map(|index| {
        let image = &catalog.images[*index];
        let data_file = image.data_file.as_ref().map(|(_, stat)| (stat.id, stat.signature));
        let mut hasher = DefaultHasher::new();
        (below, image.stat.id, image.version, data_file).hash(&mut hasher);
        below = hasher.finish();
        below
    });
    let mut states: Vec<u64> = upwards.collect();
    states.reverse();
    states
}
