//! A disk of an open store, and how it is found by its name.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::super::address;
use super::operands::{DiskName, shown};
use crate::browse::{Browser, DiskContents, PointInTime};
use crate::error::{Error, ErrorKind, Result};
use crate::report::store::{date, snapshot_date};
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

    /// Its name.
    pub(super) fn name(&self) -> &[u8] {
        &self.view_ref.view.name
    }

    /// Which disk it is, whatever the chain by which it was found: its top layer and internal snapshot.
    pub(super) fn key(&self) -> (ImageIndex, Option<usize>) {
        (self.view_ref.layers()[0], self.view_ref.view.snapshot)
    }

    /// The leaf of its chain.
    pub(super) fn leaf(&self) -> ImageIndex {
        self.view_ref.views.layers[0]
    }

    /// Whether it is the disk of the leaf itself.
    pub(super) fn is_active_layer(&self) -> bool {
        self.view_ref.view.layer == 0 && self.view_ref.view.snapshot.is_none()
    }

    /// Whether it is an active disk.
    pub(super) fn is_active(&self) -> bool {
        self.view_ref.view.active
    }

    /// Its path in the directory of its chain in a mount.
    pub(super) fn place_in_mount(&self) -> PathBuf {
        let file = OsStr::from_bytes(&[self.name(), b".raw"].concat()).to_owned();
        if self.is_active() { PathBuf::from(file) } else { Path::new("snapshots").join(file) }
    }

    /// When it was taken: its layer frozen or its internal snapshot made; else its file last changed.
    pub(super) fn taken(&self) -> SystemTime {
        let catalog = self.opened.store.catalog();
        let image = &catalog.images[self.view_ref.layers()[0]];
        let inner = self.view_ref.view.snapshot.and_then(|inner| image.qcow2()?.snapshots.get(inner));
        inner.map_or_else(|| date(image), snapshot_date)
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

/// The disk of the topmost layer of a chain that has one.
pub(super) fn top_of(opened: &Arc<OpenStore>, chain: &Path) -> Result<StoreDisk> {
    let catalog = opened.store.catalog();
    let missing =
        || Error::new(ErrorKind::NotFound, format!("there is no chain {}", shown(chain.as_os_str())));
    let leaf = catalog.chain(chain).ok_or_else(missing)?;
    let views = opened.store.chain_views(&catalog, leaf);
    let view = upwards(&views).last().map(|view| (*view).clone()).ok_or_else(|| unshown(&catalog, leaf))?;
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
    let mut met: HashSet<(ImageIndex, Option<usize>)> = HashSet::new();
    let mut all = Vec::new();
    for (chain, leaf) in &chains {
        let views = opened.store.chain_views(&catalog, *leaf);
        let chain = Arc::new(chain.clone());
        for view in upwards(&views) {
            if !met.insert((views.layers[view.layer], view.snapshot)) {
                continue;
            }
            // Active disks have the same name in each chain, so the chain's path is added.
            let is_shared = chains.len() > 1 && view.layer == 0;
            let prefix = if is_shared { [chain.as_os_str().as_bytes(), b"/"].concat() } else { Vec::new() };
            let name = [prefix.as_slice(), &view.name].concat();
            all.push((name, self::disk(opened, &catalog, &chain, &views, view.clone())));
        }
    }
    all
}

/// The views of a chain from the base upwards, each before those that were made of it.
fn upwards(views: &ChainViews) -> Vec<&ChainView> {
    let mut all: Vec<&ChainView> = views.views.iter().collect();
    // Internal snapshots are older than the layer's own state, and in the order of their table.
    all.sort_by_key(|view| (Reverse(view.layer), view.snapshot.is_none(), view.snapshot));
    all
}

/// The views of the disk's chain from the base up to the disk itself: name and disk.
pub(super) fn history(disk: &StoreDisk) -> Vec<(Vec<u8>, StoreDisk)> {
    let catalog = disk.opened.store.catalog();
    let ViewRef { views, view: last } = &disk.view_ref;
    let all = upwards(views);
    let end = all.iter().position(|view| *view == last).map_or(all.len(), |at| at + 1);
    let of = |view: &&ChainView| {
        (view.name.clone(), self::disk(&disk.opened, &catalog, &disk.id.chain, views, (*view).clone()))
    };
    all[..end].iter().map(of).collect()
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
