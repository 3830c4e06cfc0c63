//! What a store says of itself: its trees, its images in QEMU's words, its chains and problems.
//!
//! Reads the catalog, and of files no more than bitmap directories and whether somebody writes
//! the active images. Every answer is made in one walk over what it shows.

mod forest;
mod info;

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde::Serialize;

use crate::store::{Catalog, ChainViews, Format, ImageIndex, Problem, Store};

use super::json::pretty;
use super::safe::{self, terminal};

pub use forest::{Shares, chain_forest, chain_forest_at_work, date, forest, forest_at_work, locked_text};
pub use info::{chain_info, chain_info_as, image_info, layer_files};

/// What a chain is called: its path in the mount, or the image's stem where the mount is one image.
pub fn chain_name(catalog: &Catalog, leaf: ImageIndex) -> String {
    match catalog.chain_path(leaf) {
        Some(path) if !path.as_os_str().is_empty() => path_text(&path),
        _ => {
            let path = &catalog.images[leaf].place.path;
            safe::text(path.file_stem().unwrap_or_default().as_bytes())
        }
    }
}

/// Every problem on a line of its own, `path: sentence`; empty if all is well.
pub fn problems_text(catalog: &Catalog) -> String {
    let line = |problem: &Problem| terminal(&format!("{}: {}", place_text(&problem.path), problem.sentence)) + "\n";
    catalog.problems.iter().map(line).collect()
}

/// All that is wrong with the layers of one chain, a line each; `None` if nothing is.
pub fn chain_problem(catalog: &Catalog, leaf: ImageIndex) -> Option<String> {
    let layers = catalog.layers(leaf);
    let mut sentences: Vec<_> = layers.iter().flat_map(|index| catalog.sentences(*index)).collect();
    // A break in a lower layer takes all above with it: say whom it hits.
    let breaks = (0..layers.len()).rfind(|top| catalog.view_problem(&layers[*top..=*top]).is_some());
    if let Some(lowest) = breaks.filter(|lowest| *lowest > 0) {
        let above: Vec<_> = layers[..lowest].iter().map(|index| catalog.images[*index].shown()).collect();
        let shown = if above.len() <= 8 {
            above.join(", ")
        } else {
            format!("{}, {} and {} more", above[0], above[1], above.len() - 2)
        };
        sentences.push(format!("so what stands on it cannot be read either: {shown}"));
    }
    (!sentences.is_empty()).then(|| sentences.iter().map(|sentence| terminal(sentence) + "\n").collect())
}

/// That a store shows no disk at all, and what may be done about it; `None` if it does.
pub fn no_images(store: &Store, catalog: &Catalog) -> Option<String> {
    if catalog.chains().next().is_some() {
        return None;
    }
    let is_plain = |image: &&crate::store::ImageEntry| image.format.is_none() && image.problem.is_none();
    let files: Vec<String> = catalog.images.iter().filter(is_plain).map(|image| image.shown()).collect();
    let shown = path_text(store.given());
    Some(match files.as_slice() {
        [] => format!("{shown} holds no disk images"),
        [first, ..] => {
            let count = if files.len() == 1 { "a file".to_owned() } else { format!("{} files", files.len()) };
            format!(
                "{shown} holds no disk images, but {count} of no known format ({}): if they are raw disks, say so with \
                 -o format=GLOB:raw, as in format={}:raw",
                terminal(first),
                terminal(&Path::new(first).file_name().unwrap_or_default().to_string_lossy())
            )
        }
    })
}

/// Every chain and layer, and every problem, for programs.
pub fn chains_json(store: &Store, catalog: &Catalog) -> String {
    let chains = catalog.chains().map(|(path, leaf)| {
        let views = store.chain_views(catalog, leaf);
        ChainObject {
            path: path_text(&path),
            active: catalog.is_active(leaf),
            problem: catalog.view_problem(&views.layers).map(|sentence| terminal(&sentence)),
            layers: LayerObject::all(store, catalog, &views),
        }
    });
    let problems = catalog
        .problems
        .iter()
        .map(|problem| ProblemObject { path: place_text(&problem.path), problem: terminal(&problem.sentence) });
    pretty(&StoreObject { store: path_text(store.given()), chains: chains.collect(), problems: problems.collect() })
}

#[derive(Serialize)]
struct StoreObject {
    store: String,
    chains: Vec<ChainObject>,
    problems: Vec<ProblemObject>,
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
    /// The view that shows it; none for an image that could not be understood.
    view: Option<String>,
    file: String,
    format: Option<&'static str>,
    virtual_size: Option<u64>,
    actual_size: u64,
    frozen: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<SnapshotObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<String>,
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
                    problem: (!sentences.is_empty()).then(|| terminal(&sentences.join("; "))),
                }
            })
            .collect();
        for view in &views.views {
            let object = &mut objects[view.layer];
            let name = safe::text(&view.name);
            match view.snapshot {
                None => object.view = Some(name),
                Some(place) => {
                    let qcow2 = catalog.images[views.layers[view.layer]].qcow2();
                    let snapshot = &qcow2.expect("only qcow2 images have snapshots").snapshots[place];
                    let (id, snapshot_name) = (safe::text(&snapshot.id), safe::text(&snapshot.name));
                    object.snapshots.push(SnapshotObject { view: name, id, name: snapshot_name });
                }
            }
        }
        objects
    }
}

fn path_text(path: &Path) -> String {
    safe::text(path.as_os_str().as_bytes())
}

/// A place beneath the store; the store itself has an empty path.
fn place_text(path: &Path) -> String {
    if path.as_os_str().is_empty() { ".".to_owned() } else { path_text(path) }
}

#[cfg(test)]
mod tests;
