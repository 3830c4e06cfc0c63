//! A disk of an open store, and how it is found by its name.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::address;
use super::operands::{DiskName, shown};
use crate::browse::{Browser, DiskContents, PointInTime};
use crate::error::{Error, ErrorKind, Result};
use crate::store::{Catalog, ChainView, ChainViews, ImageIndex, OpenView, Store, ViewId, ViewPart};
use crate::units::Stability;

/// An open store, and the browser of its disks.
pub(super) struct OpenStore {
    pub(super) path: PathBuf,
    pub(super) store: Arc<Store>,
    pub(super) browser: Arc<Browser>,
}

/// A disk of an open store.
#[derive(Clone)]
pub(super) struct StoreDisk {
    pub(super) opened: Arc<OpenStore>,
    pub(super) view_ref: ViewRef,
    pub(super) id: ViewId,
}

impl StoreDisk {
    /// Its volumes and files.
    pub(super) fn contents(&self) -> Result<Arc<DiskContents>> {
        self.opened.browser.contents(&self.id, PointInTime::First)
    }

    /// The disk itself, open.
    pub(super) fn view(&self) -> Result<OpenView> {
        let catalog = self.opened.store.catalog();
        let is_live = self.id.is_active() || self.opened.store.options().force_share;
        self.opened.store.open_shown(
            &catalog,
            &self.view_ref.layers(),
            self.view_ref.part(),
            Stability::live_if(is_live),
        )
    }
}

/// A view of a chain.
#[derive(Clone, Debug)]
pub(super) struct ViewRef {
    views: Arc<ChainViews>,
    view: ChainView,
}

impl ViewRef {
    /// The layers of the view, top first.
    pub(super) fn layers(&self) -> Vec<ImageIndex> {
        self.views.layers[self.view.layer..].to_vec()
    }

    /// The state of the top layer.
    pub(super) fn part(&self) -> ViewPart {
        self.view.snapshot.map_or(ViewPart::Active, ViewPart::Snapshot)
    }
}

/// The disk of that name in a store; `None` if the store does not have the image.
pub(super) fn find(opened: &Arc<OpenStore>, image: &Path, name: &DiskName) -> Result<Option<StoreDisk>> {
    let DiskName::Image { path, snapshot } = name else { unreachable!("called only for images") };
    let catalog = opened.store.catalog();
    let Some(index) = catalog.images.iter().position(|entry| opened.store.host_path(&entry.place) == image)
    else {
        return Ok(None);
    };
    let Some((chain, leaf)) = chains_of(&catalog, index).into_iter().next() else {
        let fact = format!("{} is not part of a chain", shown(image.as_os_str()));
        return Err(Error::new(ErrorKind::Broken, fact));
    };
    let chain = Arc::new(chain);
    let views = opened.store.chain_views(&catalog, leaf);
    let layer = views.layers.iter().position(|layer| *layer == index).expect("the chain has it");
    let of_layer = |layer: usize, snapshot: Option<usize>| {
        views.views.iter().find(|view| view.layer == layer && view.snapshot == snapshot).cloned()
    };
    let view = match snapshot {
        None => of_layer(layer, None),
        Some(wanted) => {
            let meant = address::resolve(&opened.store, &catalog, index, path, wanted)?;
            of_layer(layer + meant.layer, meant.snapshot)
        }
    };
    let view = view.ok_or_else(|| unshown(&catalog, index))?;
    Ok(Some(disk(opened, &catalog, &chain, &views, view)))
}

/// A view of a chain by its path in a mount; without `view`, the active disk. `wanted` is the part after an
/// at sign.
pub(super) fn in_chain(
    opened: &Arc<OpenStore>,
    chain: &Path,
    view: Option<&[u8]>,
    wanted: Option<&[u8]>,
) -> Result<StoreDisk> {
    let catalog = opened.store.catalog();
    let leaf = catalog.chain(chain).ok_or_else(|| {
        let fact = format!("the mounted store has no chain {}", shown(chain.as_os_str()));
        Error::new(ErrorKind::NotFound, fact)
    })?;
    let views = opened.store.chain_views(&catalog, leaf);
    let found = match view {
        Some(name) => views.find(name),
        None => views.views.iter().find(|view| view.layer == 0 && view.snapshot.is_none()),
    };
    let unknown = || views.unknown(&shown(chain.as_os_str()), view.unwrap_or(b"active"), |_| true);
    let mut view = found.cloned().ok_or_else(unknown)?;
    if let Some(wanted) = wanted {
        let top = views.layers[view.layer];
        let meant = address::resolve(&opened.store, &catalog, top, chain, wanted)?;
        let layer = view.layer + meant.layer;
        let of_layer = |view: &&ChainView| view.layer == layer && view.snapshot == meant.snapshot;
        view = views
            .views
            .iter()
            .find(of_layer)
            .cloned()
            .ok_or_else(|| unshown(&catalog, views.layers[layer]))?;
    }
    Ok(disk(opened, &catalog, &Arc::new(chain.to_path_buf()), &views, view))
}

/// The same two disks, as views of one chain if a chain has both: then one worker reads both.
pub(super) fn in_one_chain((a, b): (StoreDisk, StoreDisk)) -> (StoreDisk, StoreDisk) {
    let catalog = a.opened.store.catalog();
    let top = |disk: &StoreDisk| disk.view_ref.layers()[0];
    for (chain, leaf) in chains_of(&catalog, top(&a)) {
        let views = a.opened.store.chain_views(&catalog, leaf);
        let same = |disk: &StoreDisk| {
            let is_it = |view: &&ChainView| {
                views.layers[view.layer] == top(disk) && view.snapshot == disk.view_ref.view.snapshot
            };
            views.views.iter().find(is_it).cloned()
        };
        if let (Some(view_a), Some(view_b)) = (same(&a), same(&b)) {
            let chain = Arc::new(chain);
            let of = |view| disk(&a.opened, &catalog, &chain, &views, view);
            return (of(view_a), of(view_b));
        }
    }
    (a, b)
}

/// All views of the chains that contain the disk's top layer, or of the chain `alone`, from the bases
/// upwards: name and disk. Each view occurs once.
pub(super) fn all_around(disk: &StoreDisk, alone: Option<&Path>) -> Vec<(Vec<u8>, StoreDisk)> {
    let opened = &disk.opened;
    let catalog = opened.store.catalog();
    let mut chains = chains_of(&catalog, disk.view_ref.layers()[0]);
    chains.retain(|(chain, _)| alone.is_none_or(|alone| alone == chain));
    let mut met: Vec<(ImageIndex, Option<usize>)> = Vec::new();
    let mut all = Vec::new();
    for (chain, leaf) in &chains {
        let views = opened.store.chain_views(&catalog, *leaf);
        let chain = Arc::new(chain.clone());
        for layer in (0..views.layers.len()).rev() {
            let of_layer = |view: &&ChainView| view.layer == layer;
            // Internal snapshots are older than the layer's own state.
            let (inner, own): (Vec<_>, Vec<_>) =
                views.views.iter().filter(of_layer).partition(|view| view.snapshot.is_some());
            for view in inner.into_iter().chain(own) {
                let key = (views.layers[layer], view.snapshot);
                if met.contains(&key) {
                    continue;
                }
                met.push(key);
                // Active disks have the same name in each chain, so the chain's path is added.
                let is_shared = chains.len() > 1 && layer == 0;
                let prefix =
                    if is_shared { [chain.as_os_str().as_bytes(), b"/"].concat() } else { Vec::new() };
                let name = [prefix.as_slice(), &view.name].concat();
                all.push((name, self::disk(opened, &catalog, &chain, &views, view.clone())));
            }
        }
    }
    all
}

/// The chains that contain an image; the chain of which it is the leaf comes first.
fn chains_of(catalog: &Catalog, index: ImageIndex) -> Vec<(PathBuf, ImageIndex)> {
    let mut chains: Vec<_> =
        catalog.chains().filter(|(_, leaf)| catalog.layers(*leaf).contains(&index)).collect();
    chains.sort_by(|(a, leaf_a), (b, leaf_b)| ((*leaf_a != index), a).cmp(&(*leaf_b != index, b)));
    chains
}

fn disk(
    opened: &Arc<OpenStore>,
    catalog: &Catalog,
    chain: &Arc<PathBuf>,
    views: &Arc<ChainViews>,
    view: ChainView,
) -> StoreDisk {
    let id = opened.store.view_id(catalog, chain, views, &view, false);
    let view_ref = ViewRef { views: Arc::clone(views), view };
    StoreDisk { opened: Arc::clone(opened), view_ref, id }
}

/// The reason why an image has no view.
fn unshown(catalog: &Catalog, index: ImageIndex) -> Error {
    let sentences = catalog.sentences(index);
    let fact = sentences
        .first()
        .cloned()
        .unwrap_or_else(|| format!("{} cannot be read", catalog.images[index].shown()));
    Error::new(ErrorKind::Broken, fact)
}
