//! What the pages show of a store: from the catalog alone.
//!
//! No image is opened: a page that is looked at must not lock what a virtual machine is about to open, and
//! must not be slow. So what a deletion frees is given as far as sizes of files tell it: exactly for whole
//! chains, and as a bound for single snapshots. Only active images are asked for their locks, as for the
//! other trees.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

use jiff::tz::TimeZone;

use crate::ops::{JobState, Status};
use crate::report::html::{
    ChainLine, ChainSizes, GuestSystem, LayerCells, Listed, Page, PageTree, ProblemLine, RowContent,
    RowJoint, RowLines, RunningCommand, SnapshotLine, Totals, TreeRow, ViewLinks,
};
use crate::report::layout::{Joint, Row, RowItem, rows};
use crate::report::safe;
use crate::report::status::{per_mille, progress};
use crate::report::text::{Folded, TextOptions, flags, summary};
use crate::report::tree::{BackingTree, Forest, TreeNode};
use crate::store::{ACTIVE, Catalog, ChainViews, ImageIndex, Store};

use super::examples::Example;
use super::forest::{chain_forest_with_progress, date, forest_with_progress, snapshot_date};
use super::{chain_name, path_text, place_text};

/// How much of each list a page shows.
#[derive(Clone, Copy)]
struct Limits {
    chains: usize,
    problems: usize,
    trees: usize,
    /// Rows of all trees, without those in folds.
    rows: usize,
    /// Layers in one fold.
    folded: usize,
    snapshots: usize,
}

const OF_STORE: Limits =
    Limits { chains: 1000, problems: 100, trees: 50, rows: 1000, folded: 100, snapshots: 30 };
const OF_CHAIN: Limits =
    Limits { chains: 1, problems: 100, trees: 1, rows: 1000, folded: 1000, snapshots: 1000 };
/// Running commands that are shown.
const RUNNING: usize = 100;

/// What reports say that the catalog does not know.
pub struct Live<'a> {
    /// The mount point.
    pub mount: Option<&'a Path>,
    /// Whether the guests' files are shown.
    pub has_files: bool,
    /// The last command of a chain.
    pub status: &'a dyn Fn(&Path) -> Status,
    /// The systems of a chain's guest, if they are known already.
    pub system: &'a dyn Fn(&Path) -> Option<String>,
}

/// The page of the store.
pub fn store_page(store: &Store, catalog: &Catalog, live: &Live<'_>) -> Page {
    let forest = forest_with_progress(store, catalog, &|chain| share(live, chain));
    let example = Example::of(store, catalog, live.mount, None, live.has_files);
    let documents = documents(
        ".chainfs/",
        &[
            ("tree.txt", "the trees as text"),
            ("tree.svg", "the trees as a picture"),
            ("chains.json", "all chains, layers and problems"),
            ("problems.txt", "what cannot be shown, and why"),
            ("trash.txt", "removed layers that can be restored"),
            ("metrics", "counters, for Prometheus"),
        ],
    );
    let made = Builder::new(store, catalog, live, OF_STORE).page(&forest, &example);
    Page { to_root: "../".to_owned(), documents, ..made }
}

/// The page of one chain.
pub fn chain_page(store: &Store, catalog: &Catalog, leaf: ImageIndex, live: &Live<'_>) -> Page {
    let forest = chain_forest_with_progress(store, catalog, leaf, &|chain| share(live, chain));
    let example = Example::of(store, catalog, live.mount, Some(leaf), live.has_files);
    let mut builder = Builder::new(store, catalog, live, OF_CHAIN);
    builder.leaf = Some(leaf);
    let path = catalog.chain_path(leaf).unwrap_or_default();
    let chain_path = directory(&path);
    let info = format!("{chain_path}info/");
    let mut files = vec![
        ("tree.txt", "the tree as text"),
        ("tree.svg", "the tree as a picture"),
        ("chain.json", "as of qemu-img info"),
    ];
    if live.has_files && catalog.view_problem(&catalog.layers(leaf)).is_none() {
        files.push(("os.txt", "the guest's system; reads its disk"));
    }
    Page {
        chain: Some(chain_name(catalog, leaf)),
        to_root: "../".repeat(path.components().count() + 1),
        documents: documents(&info, &files),
        chain_path,
        ..builder.page(&forest, &example)
    }
}

fn documents(directory: &str, files: &[(&str, &'static str)]) -> Vec<(String, &'static str)> {
    files.iter().map(|(file, what)| (format!("{directory}{file}"), *what)).collect()
}

/// The progress of a chain's running command in percent.
pub fn share(live: &Live<'_>, chain: &Path) -> Option<u64> {
    let status = (live.status)(chain);
    (status.state == JobState::Running).then(|| per_mille(&status) / 10)
}

/// A directory of the mount, as the beginning of a link.
fn directory(path: &Path) -> String {
    let path = safe::url(path.as_os_str().as_bytes());
    if path.is_empty() { path } else { path + "/" }
}

/// The leaf after which a tree is called.
fn titular(tree: &BackingTree) -> Option<ImageIndex> {
    tree.nodes.iter().find(|node| node.chain.as_ref() == Some(&tree.title)).and_then(|node| node.image)
}

struct Builder<'a> {
    store: &'a Store,
    catalog: &'a Catalog,
    live: &'a Live<'a>,
    limits: Limits,
    zone: TimeZone,
    /// The chain of the page.
    leaf: Option<ImageIndex>,
    /// Of each image on the main line of a tree, the leaf of that line.
    main: HashMap<ImageIndex, ImageIndex>,
    /// The views of chains that were needed so far.
    views: HashMap<ImageIndex, Arc<ChainViews>>,
}

impl<'a> Builder<'a> {
    fn new(store: &'a Store, catalog: &'a Catalog, live: &'a Live<'a>, limits: Limits) -> Self {
        let zone = TimeZone::system();
        let (main, views) = (HashMap::new(), HashMap::new());
        Self { store, catalog, live, limits, zone, leaf: None, main, views }
    }

    fn page(&mut self, forest: &Forest, example: &Example) -> Page {
        let catalog = self.catalog;
        let layers = self.leaf.map(|leaf| catalog.layers(leaf));
        let images: Vec<ImageIndex> = match &layers {
            Some(layers) => layers.clone(),
            None => {
                (0..catalog.images.len()).filter(|index| catalog.images[*index].chain_count > 0).collect()
            }
        };
        for leaf in forest.trees.iter().filter_map(titular) {
            self.main.extend(catalog.layers(leaf).into_iter().map(|layer| (layer, leaf)));
        }
        let snapshots = self.snapshots(&images);
        let totals = Totals {
            chains: catalog.chains().count(),
            images: images.len(),
            snapshots: snapshots.count,
            on_disk: images.iter().map(|index| self.own_size(*index)).fold(0, u64::saturating_add),
        };
        Page {
            chain: None,
            chain_path: String::new(),
            store: path_text(self.store.given()),
            to_root: String::new(),
            made: SystemTime::now(),
            zone: self.zone.clone(),
            totals,
            running: self.running(),
            problems: self.problems(layers.as_deref()),
            chains: self.chains(),
            trees: self.trees(forest),
            single_images: forest.trees.iter().filter(|tree| !self.is_drawn(tree)).count(),
            snapshots,
            commands: example.commands(),
            documents: Vec::new(),
        }
    }

    fn own_size(&self, index: ImageIndex) -> u64 {
        let image = &self.catalog.images[index];
        (image.stat.blocks + image.data_file.as_ref().map_or(0, |(_, stat)| stat.blocks)) * 512
    }

    fn running(&self) -> Vec<RunningCommand> {
        let chains = self.catalog.chains().filter(|(_, leaf)| self.leaf.is_none_or(|wanted| wanted == *leaf));
        let running = chains.filter_map(|(path, leaf)| {
            let status = (self.live.status)(&path);
            (status.state == JobState::Running).then(|| RunningCommand {
                chain: chain_name(self.catalog, leaf),
                progress: progress(&status),
                per_mille: per_mille(&status),
                status: format!("{}control/status", directory(&path)),
            })
        });
        running.take(RUNNING).collect()
    }

    fn problems(&self, layers: Option<&[ImageIndex]>) -> Listed<ProblemLine> {
        let of_store = self.catalog.problems.iter().map(|problem| ProblemLine {
            path: place_text(&problem.path),
            sentence: problem.sentence.clone(),
        });
        let Some(layers) = layers else { return Listed::of(of_store, self.limits.problems) };
        let of_layer = |index: &ImageIndex| {
            let path = self.catalog.images[*index].shown();
            self.catalog.sentences(*index).into_iter().map(move |sentence| {
                let rest = sentence.strip_prefix(path.as_str()).unwrap_or(&sentence).trim_start();
                ProblemLine { path: path.clone(), sentence: rest.to_owned() }
            })
        };
        Listed::of(layers.iter().flat_map(of_layer), self.limits.problems)
    }

    fn chains(&self) -> Listed<ChainLine> {
        let mut chains =
            self.catalog.chains().filter(|(_, leaf)| self.leaf.is_none_or(|wanted| wanted == *leaf));
        let shown: Vec<ChainLine> =
            chains.by_ref().take(self.limits.chains).map(|(path, leaf)| self.chain(&path, leaf)).collect();
        let count = shown.len() + chains.count();
        Listed { shown, count }
    }

    fn chain(&self, path: &Path, leaf: ImageIndex) -> ChainLine {
        let catalog = self.catalog;
        let layers = catalog.layers(leaf);
        let has_problem = layers.iter().any(|index| !catalog.sentences(*index).is_empty());
        let is_readable = catalog.view_problem(&layers).is_none();
        let system = match (self.live.system)(path).filter(|_| is_readable) {
            Some(system) => GuestSystem::Known(system),
            None if is_readable && self.live.has_files => GuestSystem::NotYet,
            None => GuestSystem::None,
        };
        let is_active = catalog.is_active(leaf);
        let dates = self.dates(&layers[usize::from(is_active)..], layers.first().filter(|_| is_active));
        ChainLine {
            name: chain_name(catalog, leaf),
            path: directory(path),
            is_active,
            virtual_size: catalog.images[leaf].virtual_size(),
            sizes: self.sizes(&layers),
            snapshot_count: dates.len(),
            latest: dates.into_iter().max(),
            system,
            has_files: self.live.has_files,
            has_problem,
            is_busy: share(self.live, path).is_some(),
        }
    }

    fn sizes(&self, layers: &[ImageIndex]) -> ChainSizes {
        let mut sizes = ChainSizes::default();
        for index in layers {
            let own = self.own_size(*index);
            let sum =
                if self.catalog.images[*index].chain_count > 1 { &mut sizes.shared } else { &mut sizes.own };
            *sum = sum.saturating_add(own);
        }
        sizes
    }

    /// The dates of frozen layers, and of all internal snapshots of these and of an active one.
    fn dates(&self, frozen: &[ImageIndex], active: Option<&ImageIndex>) -> Vec<SystemTime> {
        let images = &self.catalog.images;
        let internal = frozen.iter().chain(active).filter_map(|index| images[*index].qcow2());
        let internal = internal.flat_map(|qcow2| &qcow2.snapshots).filter(|found| found.damage.is_none());
        frozen.iter().map(|index| date(&images[*index])).chain(internal.map(snapshot_date)).collect()
    }

    /// The latest snapshots of some images.
    fn snapshots(&mut self, images: &[ImageIndex]) -> Listed<SnapshotLine> {
        let catalog = self.catalog;
        let mut all: Vec<(SystemTime, ImageIndex, Option<usize>)> = Vec::new();
        let mut count = 0;
        let most = self.limits.snapshots;
        for index in images {
            let image = &catalog.images[*index];
            let is_frozen = !image.users.is_empty() || !catalog.is_active(*index);
            if is_frozen && image.virtual_size().is_some() {
                all.push((date(image), *index, None));
                count += 1;
            }
            let inner = image.qcow2().into_iter().flat_map(|qcow2| qcow2.snapshots.iter().enumerate());
            for (number, snapshot) in inner.filter(|(_, snapshot)| snapshot.damage.is_none()) {
                all.push((snapshot_date(snapshot), *index, Some(number)));
                count += 1;
                // An image may have 65,536, and only the latest are shown.
                if all.len() > 8 * most.max(1000) {
                    all.sort_by_key(|(date, ..)| Reverse(*date));
                    all.truncate(most);
                }
            }
        }
        all.sort_by_key(|(date, index, number)| {
            (Reverse(*date), &catalog.images[*index].place, number.is_some(), *number)
        });
        all.truncate(most);
        let shown = all.into_iter().map(|(date, index, number)| self.snapshot(date, index, number)).collect();
        Listed { shown, count }
    }

    fn snapshot(&mut self, date: SystemTime, index: ImageIndex, number: Option<usize>) -> SnapshotLine {
        let leaf = self.leaf_above(index, self.leaf.or_else(|| self.main.get(&index).copied()));
        let name = self.view_name(leaf, index, number);
        let path = self.catalog.chain_path(leaf).unwrap_or_default();
        SnapshotLine {
            date,
            name: name.unwrap_or_else(|| self.catalog.images[index].shown()),
            chain: chain_name(self.catalog, leaf),
            chain_path: directory(&path),
            is_internal: number.is_some(),
            own_size: number.is_none().then(|| self.own_size(index)),
            links: self.links(leaf, index, number),
        }
    }

    /// A chain that has the image: the wanted one if it has it, else that of the first overlay each time.
    fn leaf_above(&self, index: ImageIndex, wanted: Option<ImageIndex>) -> ImageIndex {
        if let Some(wanted) = wanted.or(self.catalog.single)
            && self.catalog.layers(wanted).contains(&index)
        {
            return wanted;
        }
        let mut at = index;
        // Loops have been cut when the catalog was built.
        while let Some(user) =
            self.catalog.images[at].users.iter().find(|user| self.catalog.images[**user].chain_count > 0)
        {
            at = *user;
        }
        at
    }

    fn views(&mut self, leaf: ImageIndex) -> Arc<ChainViews> {
        let (store, catalog) = (self.store, self.catalog);
        Arc::clone(self.views.entry(leaf).or_insert_with(|| store.chain_views(catalog, leaf)))
    }

    fn view_name(&mut self, leaf: ImageIndex, index: ImageIndex, number: Option<usize>) -> Option<String> {
        let views = self.views(leaf);
        let layer = views.layers.iter().position(|layer| *layer == index)?;
        let found = views.views.iter().find(|view| view.layer == layer && view.snapshot == number)?;
        Some(safe::text(&found.name))
    }

    /// Where a view is in the mount; `None` if it cannot be read.
    fn links(&mut self, leaf: ImageIndex, index: ImageIndex, number: Option<usize>) -> Option<ViewLinks> {
        let views = self.views(leaf);
        let layer = views.layers.iter().position(|layer| *layer == index)?;
        if self.catalog.view_problem(&views.layers[layer..]).is_some() {
            return None;
        }
        let view = views.views.iter().find(|view| view.layer == layer && view.snapshot == number)?;
        let chain = directory(&self.catalog.chain_path(leaf)?);
        let name = safe::url(&view.name);
        let disk = if view.active {
            format!("{chain}{}.raw", safe::url(ACTIVE))
        } else {
            format!("{chain}snapshots/{name}.raw")
        };
        Some(ViewLinks { disk, files: self.live.has_files.then(|| format!("{chain}files/{name}/")) })
    }

    fn trees(&mut self, forest: &Forest) -> Listed<PageTree> {
        let mut left = self.limits.rows;
        let mut shown = Vec::new();
        let drawn: Vec<&BackingTree> = forest.trees.iter().filter(|tree| self.is_drawn(tree)).collect();
        for tree in drawn.iter().take(self.limits.trees) {
            if left == 0 {
                break;
            }
            let made = self.tree(tree, left);
            left -= made.rows.shown.len();
            shown.push(made);
        }
        Listed { shown, count: drawn.len() }
    }

    /// Whether a tree shows more than the line of its chain.
    fn is_drawn(&self, tree: &BackingTree) -> bool {
        tree.nodes.len() > 1 || self.leaf.is_some()
    }

    fn tree(&mut self, tree: &BackingTree, most: usize) -> PageTree {
        let titular = self.leaf.or_else(|| titular(tree));
        let page = titular.filter(|_| self.leaf.is_none()).and_then(|leaf| self.catalog.chain_path(leaf));
        let page = page.map(|path| format!("{}info/index.html", directory(&path)));
        let options = TextOptions { zone: self.zone.clone(), ..TextOptions::local() };
        let title = safe::terminal(&tree.title);
        let whole = summary(tree, &options);
        let rows = rows(tree, false);
        let mut continues = vec![false; rows.len()];
        for parent in rows.iter().filter_map(|row| row.parent) {
            continues[parent] = true;
        }
        let made = rows.iter().zip(continues).take(most);
        let shown = made.map(|(row, continues)| self.row(tree, row, continues, titular)).collect();
        PageTree {
            summary: whole.strip_prefix(&format!("{title} · ")).unwrap_or(&whole).to_owned(),
            title: tree.title.clone(),
            page,
            rows: Listed { shown, count: rows.len() },
        }
    }

    fn row(
        &mut self,
        tree: &BackingTree,
        row: &Row,
        continues: bool,
        titular: Option<ImageIndex>,
    ) -> TreeRow {
        let joint = match (row.parent, row.joint) {
            (None, _) => RowJoint::Base,
            (Some(_), Joint::Straight) => RowJoint::Straight,
            (Some(_), Joint::Side { last }) => RowJoint::Side(last),
        };
        let item = match &row.item {
            RowItem::Node(node) => RowContent::Layer(self.layer(tree, &tree.nodes[*node], titular)),
            RowItem::Fold(run) => {
                let folded = Folded::of(tree, run, &self.zone);
                let listed = run.iter().take(self.limits.folded);
                let shown = listed.map(|node| self.layer(tree, &tree.nodes[*node], titular)).collect();
                RowContent::Fold {
                    label: format!("{} layers", run.len()),
                    names: folded.names,
                    kind: folded.kind,
                    days: folded.days,
                    own_size: folded.own_size,
                    layers: Listed { shown, count: run.len() },
                }
            }
        };
        TreeRow { lines: RowLines { bars: row.bars.clone(), joint, continues }, item }
    }

    fn layer(&mut self, tree: &BackingTree, node: &TreeNode, titular: Option<ImageIndex>) -> LayerCells {
        let place = match (node.image, node.snapshot) {
            (Some(image), _) => Some((image, None)),
            (None, Some((image, number))) => Some((image, Some(number))),
            (None, None) => None,
        };
        let links = place.and_then(|(image, number)| {
            let leaf = self.leaf_above(image, titular);
            self.links(leaf, image, number)
        });
        LayerCells {
            mark: node.mark,
            name: node.name.clone(),
            kind: node.kind,
            date: node.date,
            own_size: node.own_size,
            flags: flags(tree, node),
            links,
        }
    }
}
