//! The state of a store: its trees, its images in QEMU's terms, its chains and problems.
//!
//! Reads the catalog; of files, only bitmap directories and the write locks of active images. Every answer
//! takes one walk over what it shows.

mod examples;
mod forest;
mod info;
mod page;
mod readme;
mod sharing;

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;

use crate::format::Snapshot;
use crate::store::{Catalog, ChainViews, Format, ImageIndex, Problem, Store};

use super::json::pretty;
use super::safe::{self, terminal};

pub use examples::{Example, ExampleChain};
pub use forest::{
    Shares, chain_forest, chain_forest_with_progress, date, forest, forest_with_progress, locked_text,
    snapshot_date,
};
pub use info::{chain_info, chain_info_as, chain_info_in_short, image_info, layer_files};
pub use page::{Live, chain_page, share, store_page};
pub use readme::readme;
pub use sharing::add_sharing;

/// The name of a chain: its path in the mount, or the image's stem if the mount is a single image.
pub fn chain_name(catalog: &Catalog, leaf: ImageIndex) -> String {
    match catalog.chain_path(leaf) {
        Some(path) if !path.as_os_str().is_empty() => path_text(&path),
        _ => {
            let path = &catalog.images[leaf].place.path;
            safe::text(path.file_stem().unwrap_or_default().as_bytes())
        }
    }
}

/// Every problem on a line of its own, `path: sentence`; empty without problems.
pub fn problems_text(catalog: &Catalog) -> String {
    let line =
        |problem: &Problem| terminal(&format!("{}: {}", place_text(&problem.path), problem.sentence)) + "\n";
    catalog.problems.iter().map(line).collect()
}

/// All problems of the layers of one chain, one per line; `None` if there are none.
pub fn chain_problem(catalog: &Catalog, leaf: ImageIndex) -> Option<String> {
    let layers = catalog.layers(leaf);
    let mut sentences: Vec<_> = layers.iter().flat_map(|index| catalog.sentences(*index)).collect();
    // A broken layer makes all layers above it unreadable: list them.
    let breaks = (0..layers.len()).rfind(|top| catalog.view_problem(&layers[*top..=*top]).is_some());
    if let Some(lowest) = breaks.filter(|lowest| *lowest > 0) {
        let above: Vec<_> = layers[..lowest].iter().map(|index| catalog.images[*index].shown()).collect();
        let shown = if above.len() <= 8 {
            above.join(", ")
        } else {
            format!("{}, {} and {} more", above[0], above[1], above.len() - 2)
        };
        sentences.push(format!("its overlays cannot be read either: {shown}"));
    }
    (!sentences.is_empty()).then(|| sentences.iter().map(|sentence| terminal(sentence) + "\n").collect())
}

/// That a store has no disks, with the remedy; `None` if it has some.
pub fn no_images(store: &Store, catalog: &Catalog) -> Option<String> {
    if catalog.chains().next().is_some() {
        return None;
    }
    let is_plain = |image: &&crate::store::ImageEntry| image.format.is_none() && image.problem.is_none();
    let files: Vec<String> =
        catalog.images.iter().filter(is_plain).map(crate::store::ImageEntry::shown).collect();
    let shown = path_text(store.given());
    Some(match files.as_slice() {
        [] => format!("{shown} holds no disk images"),
        [first, ..] => {
            let count = if files.len() == 1 { "a file".to_owned() } else { format!("{} files", files.len()) };
            format!(
                "{shown} holds no disk images, but {count} of unknown format ({}): if they are raw disks, \
                    say so with \
                 -o format=GLOB:raw, as in format={}:raw",
                terminal(first),
                terminal(&Path::new(first).file_name().unwrap_or_default().to_string_lossy())
            )
        }
    })
}

/// Internal snapshots that are listed of the images of one chain, at most.
const MAX_SNAPSHOTS: usize = 1000;
/// Bytes of their names.
const MAX_NAMES_LEN: usize = 128 << 10;

/// The internal snapshots that may still be listed: an image can have 65,536, with names of 64 KiB.
#[derive(Clone, Copy, Debug)]
pub(super) struct ListingBudget {
    count: usize,
    len: usize,
}

impl Default for ListingBudget {
    fn default() -> Self {
        Self { count: MAX_SNAPSHOTS, len: MAX_NAMES_LEN }
    }
}

impl ListingBudget {
    /// Without a limit, for callers that print as they go.
    pub(super) fn endless() -> Self {
        Self { count: usize::MAX, len: usize::MAX }
    }

    /// Takes the space that a snapshot needs, if enough is left.
    pub(super) fn take(&mut self, snapshot: &Snapshot) -> bool {
        let len = snapshot.name.len() + snapshot.id.len();
        if self.count == 0 || self.len < len {
            // All later snapshots are omitted as well, so that one number describes them.
            self.count = 0;
            return false;
        }
        self.count -= 1;
        self.len -= len;
        true
    }
}

/// All chains, layers and problems as JSON, made piece by piece to bound the memory.
#[derive(Debug)]
pub struct ChainsJson {
    store: Arc<Store>,
    catalog: Arc<Catalog>,
    chains: Vec<(PathBuf, ImageIndex)>,
}

impl ChainsJson {
    /// For the chains of `catalog`.
    pub fn new(store: &Arc<Store>, catalog: &Arc<Catalog>) -> Self {
        Self { store: Arc::clone(store), catalog: Arc::clone(catalog), chains: catalog.chains().collect() }
    }

    /// The number of pieces: one for each chain and problem, and one for the end.
    pub fn count(&self) -> usize {
        self.chains.len() + self.catalog.problems.len() + 1
    }

    /// One piece. The concatenation of all pieces is the JSON text.
    pub fn piece(&self, index: usize) -> String {
        let (chain_count, problem_count) = (self.chains.len(), self.catalog.problems.len());
        let mut text = String::new();
        if index == 0 {
            text = format!(
                "{{\n    \"store\": {},\n    \"chains\": [",
                pretty(&path_text(self.store.given())).trim_end()
            );
        }
        if index < chain_count {
            let (path, leaf) = &self.chains[index];
            item(&mut text, index == 0, &self.chain(path, *leaf));
        }
        if index == chain_count {
            text.push_str(if chain_count == 0 {
                "],\n    \"problems\": ["
            } else {
                "\n    ],\n    \"problems\": ["
            });
        }
        if let Some(problem) =
            index.checked_sub(chain_count).and_then(|place| self.catalog.problems.get(place))
        {
            let problem =
                ProblemObject { path: place_text(&problem.path), problem: terminal(&problem.sentence) };
            item(&mut text, index == chain_count, &problem);
        }
        if index == chain_count + problem_count {
            text.push_str(if problem_count == 0 { "]\n}\n" } else { "\n    ]\n}\n" });
        }
        text
    }

    fn chain(&self, path: &Path, leaf: ImageIndex) -> ChainObject {
        let views = self.store.chain_views(&self.catalog, leaf);
        ChainObject {
            path: path_text(path),
            active: self.catalog.is_active(leaf),
            problem: self.catalog.view_problem(&views.layers).map(|sentence| terminal(&sentence)),
            layers: LayerObject::all(&self.store, &self.catalog, &views),
        }
    }
}

/// Adds an item of a list to `text`, in the layout of [`pretty`].
fn item<T: Serialize>(text: &mut String, is_first: bool, value: &T) {
    const INDENT: &str = "\n        ";
    text.push_str(if is_first { "" } else { "," });
    text.push_str(INDENT);
    text.push_str(&pretty(value).trim_end().replace('\n', INDENT));
}

#[derive(Serialize)]
struct ChainObject {
    path: String,
    /// Whether the leaf is the active disk.
    active: bool,
    /// Why the leaf's disk cannot be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
    /// Leaf first.
    layers: Vec<LayerObject>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct LayerObject {
    /// The view of the layer; none for an image that could not be parsed.
    view: Option<String>,
    file: String,
    format: Option<&'static str>,
    virtual_size: Option<u64>,
    actual_size: u64,
    frozen: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<SnapshotObject>,
    /// Snapshots that are not listed.
    #[serde(skip_serializing_if = "is_zero")]
    snapshots_left_out: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde's signature")]
fn is_zero(count: &usize) -> bool {
    *count == 0
}

#[derive(Serialize)]
struct SnapshotObject {
    view: String,
    id: String,
    name: String,
}

#[derive(Serialize)]
struct ProblemObject {
    path: String,
    problem: String,
}

impl LayerObject {
    fn all(store: &Store, catalog: &Catalog, views: &ChainViews) -> Vec<Self> {
        let mut objects: Vec<Self> = views
            .layers
            .iter()
            .map(|index| {
                let image = &catalog.images[*index];
                let sentences = catalog.sentences(*index);
                Self {
                    view: None,
                    file: if image.place.root == 0 {
                        path_text(&image.place.path)
                    } else {
                        path_text(&store.host_path(&image.place))
                    },
                    format: image.format.map(Format::name),
                    virtual_size: image.virtual_size(),
                    actual_size: image.stat.blocks * 512,
                    frozen: image.is_frozen(),
                    snapshots: Vec::new(),
                    snapshots_left_out: 0,
                    problem: (!sentences.is_empty()).then(|| terminal(&sentences.join("; "))),
                }
            })
            .collect();
        let mut room = ListingBudget::default();
        for view in &views.views {
            let object = &mut objects[view.layer];
            let name = || safe::text(&view.name);
            match view.snapshot {
                None => object.view = Some(name()),
                Some(place) => {
                    let qcow2 = catalog.images[views.layers[view.layer]].qcow2();
                    let snapshot = &qcow2.expect("only qcow2 images have snapshots").snapshots[place];
                    if !room.take(snapshot) {
                        object.snapshots_left_out += 1;
                        continue;
                    }
                    let (id, snapshot_name) = (safe::text(&snapshot.id), safe::text(&snapshot.name));
                    object.snapshots.push(SnapshotObject { view: name(), id, name: snapshot_name });
                }
            }
        }
        objects
    }
}

fn path_text(path: &Path) -> String {
    safe::text(path.as_os_str().as_bytes())
}

/// A path relative to the store; the store itself has an empty one.
fn place_text(path: &Path) -> String {
    if path.as_os_str().is_empty() { ".".to_owned() } else { path_text(path) }
}

#[cfg(test)]
mod tests;
