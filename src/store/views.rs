//! The views of one chain: their names, and the layer and internal snapshot of each.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::{Error, ErrorKind};
use crate::format::Snapshot;

use super::catalog::{Catalog, ImageIndex};
use super::file_names::shown;
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

impl ChainView {
    /// Its name as part of a sentence.
    pub fn shown(&self) -> String {
        shown(Path::new(OsStr::from_bytes(&self.name)))
    }
}

/// All views of a chain.
#[derive(Debug)]
pub struct ChainViews {
    /// The chain's layers, leaf first.
    pub layers: Vec<ImageIndex>,
    /// Its views: layers first, from the leaf down, then internal snapshots.
    pub views: Vec<ChainView>,
    /// Indices of all views, by name.
    by_name: Vec<usize>,
    /// For each layer, a digest of the files from it down to the base, with their versions.
    states: Vec<u64>,
}

impl ChainViews {
    /// The views of the chain of that leaf. Unreadable images have none.
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
            let good = qcow2.snapshots.iter().enumerate().filter(|(_, snapshot)| snapshot.damage.is_none());
            for (snapshot, Snapshot { name, id, vm_state_size, .. }) in good {
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
        let mut by_name: Vec<usize> = (0..views.len()).collect();
        by_name.sort_unstable_by(|a, b| views[*a].name.cmp(&views[*b].name));
        let states = states(catalog, &layers);
        Self { layers, views, by_name, states }
    }

    /// A digest of the files from the layer (counted from the leaf) down to the base: it changes as soon as
    /// any of them does. 0 if there is no such layer.
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
        let place =
            self.by_name.binary_search_by(|index| self.views[*index].name.as_slice().cmp(name)).ok()?;
        Some(&self.views[self.by_name[place]])
    }

    /// Approximate memory use.
    pub(super) fn weight(&self) -> usize {
        let names: usize = self.views.iter().map(|view| view.name.len()).sum();
        names + 96 * self.views.len() + 16 * self.layers.len() + 128
    }

    /// Why there is no view of that name among those `wanted`; `subject` is where it was looked up.
    pub fn unknown(&self, subject: &str, name: &[u8], wanted: impl Fn(&ChainView) -> bool) -> Error {
        /// Maximum number of names that are listed.
        const TOLD: usize = 20;
        let all: Vec<&ChainView> = self.views.iter().filter(|view| wanted(view)).collect();
        let mut names: Vec<String> = all.iter().take(TOLD).map(|view| view.shown()).collect();
        if all.len() > TOLD {
            names.push(format!("{} more", all.len() - TOLD));
        }
        // As files of the mount or of the store, views have a suffix.
        let stem =
            [&b".raw"[..], b".qcow2", b".img"].into_iter().find_map(|suffix| name.strip_suffix(suffix));
        let remedy = match (stem.and_then(|stem| all.iter().find(|view| view.name == stem)), names.is_empty())
        {
            (Some(meant), _) => format!("write {}, without the suffix", meant.shown()),
            (None, true) => "there is none".to_owned(),
            (None, false) => format!("there is {}", names.join(", ")),
        };
        let name = shown(Path::new(OsStr::from_bytes(name)));
        Error::new(ErrorKind::NotFound, format!("{subject} has no view {name}; {remedy}"))
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
        let data_file = image.data_file.as_ref().map(|(_, stat)| (stat.id, stat.version));
        let mut hasher = DefaultHasher::new();
        (below, image.stat.id, image.version, data_file).hash(&mut hasher);
        below = hasher.finish();
        below
    });
    let mut states: Vec<u64> = upwards.collect();
    states.reverse();
    states
}
