//! The trees of a store: each base with all its overlays.
//!
//! A missing backing file is drawn as a base of its own, under every image that refers to it. The chain with
//! the most layers is drawn straight and names the tree.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::time::{Duration, SystemTime};

use crate::format::Snapshot;
use crate::io::{LockHolder, ObjectId, WRITER_BYTE, all_lock_holders};
use crate::report::safe;
use crate::report::tree::{BackingTree, Forest, NodeMark, TreeNode, TreeNodeKind, TreeOrder};
use crate::store::{
    ACTIVE, BackingLink, BrokenLink, Catalog, DetectedContent, DomainSnapshot, Effects, Format, FoundIntent,
    ImageEntry, ImageIndex, Store, layer_name, shown,
};

use super::{ListingBudget, chain_name, path_text};

/// The progress of a chain's running command in percent, if known.
pub type Shares<'a> = dyn Fn(&Path) -> Option<u64> + 'a;

/// Every tree of the store.
pub fn forest(store: &Store, catalog: &Catalog) -> Forest {
    forest_with_progress(store, catalog, &|_| None)
}

/// The same, with the progress of running commands.
pub fn forest_with_progress(store: &Store, catalog: &Catalog, shares: &Shares<'_>) -> Forest {
    let mut bases: Vec<TreeRoot> = Vec::new();
    let mut missing: HashMap<MissingBacking<'_>, usize> = HashMap::new();
    for index in 0..catalog.images.len() {
        if catalog.images[index].chain_count == 0 || catalog.images[index].below.image().is_some() {
            continue;
        }
        match MissingBacking::of(catalog, index) {
            None => bases.push(TreeRoot { missing: None, images: vec![index] }),
            Some(wanted) => {
                let place = *missing.entry(wanted).or_insert_with(|| {
                    bases.push(TreeRoot { missing: Some(wanted), images: Vec::new() });
                    bases.len() - 1
                });
                bases[place].images.push(index);
            }
        }
    }
    draw(store, catalog, shares, &bases)
}

/// The tree that contains this chain.
pub fn chain_forest(store: &Store, catalog: &Catalog, leaf: ImageIndex) -> Forest {
    chain_forest_with_progress(store, catalog, leaf, &|_| None)
}

/// The same, with the progress of running commands.
pub fn chain_forest_with_progress(
    store: &Store,
    catalog: &Catalog,
    leaf: ImageIndex,
    shares: &Shares<'_>,
) -> Forest {
    let base = *catalog.layers(leaf).last().expect("a chain has its leaf");
    let missing = MissingBacking::of(catalog, base);
    let images = match missing {
        None => vec![base],
        Some(wanted) => (0..catalog.images.len())
            .filter(|index| MissingBacking::of(catalog, *index) == Some(wanted))
            .collect(),
    };
    draw(store, catalog, shares, &[TreeRoot { missing, images }])
}

/// The root of a tree.
struct TreeRoot<'a> {
    /// The missing base file, if any.
    missing: Option<MissingBacking<'a>>,
    /// The base, or all images that refer to the missing file.
    images: Vec<ImageIndex>,
}

/// A backing file that is no image of the store. Equal for all images that refer to the same file by the same
/// name.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct MissingBacking<'a> {
    root: usize,
    /// The directory of a relative name.
    directory: Option<&'a Path>,
    name: &'a [u8],
    word: &'static str,
}

impl<'a> MissingBacking<'a> {
    fn of(catalog: &'a Catalog, index: ImageIndex) -> Option<Self> {
        let image = &catalog.images[index];
        let BackingLink::Broken { image: None, reason, .. } = image.below else { return None };
        let name = &image.qcow2()?.header.backing.as_ref()?.name;
        let word = link_word(image)?;
        let directory = if name.starts_with(b"/") { None } else { image.place.path.parent() };
        // All files of a loop exist.
        (reason != BrokenLink::Loop).then_some(Self { root: image.place.root, directory, name, word })
    }
}

/// The defect of the link to an image's backing file, in a word.
fn link_word(image: &ImageEntry) -> Option<&'static str> {
    let BackingLink::Broken { reason, .. } = image.below else { return None };
    Some(match reason {
        BrokenLink::Missing => "missing",
        BrokenLink::OutsideStore => "outside of the store",
        BrokenLink::NotFollowed => "not followed",
        BrokenLink::Loop => "loop",
        BrokenLink::TooDeep => "too deep",
        BrokenLink::Format => "backing format",
    })
}

/// Why an image itself cannot be read, in a word.
fn own_word(image: &ImageEntry) -> Option<&'static str> {
    image.problem.as_ref()?;
    Some(match &image.content {
        DetectedContent::Qcow2(qcow2) if qcow2.header.encryption.is_some() => "encrypted",
        DetectedContent::Qcow2(qcow2) if qcow2.header.unsupported.is_some() => "unsupported",
        DetectedContent::Qcow2(_) if image.format.is_none() => "format unclear",
        DetectedContent::Qcow2(_) => "data file",
        DetectedContent::Malformed(_) => "malformed",
        DetectedContent::Foreign(_) => "not read",
        DetectedContent::Plain | DetectedContent::Unseen => "unreadable",
    })
}

/// An image of a tree, and its distance from the base.
struct PlacedImage {
    image: ImageIndex,
    /// The index of its backing file in the same list.
    parent: Option<usize>,
    depth: usize,
}

fn draw(store: &Store, catalog: &Catalog, shares: &Shares<'_>, bases: &[TreeRoot<'_>]) -> Forest {
    let commands = commands(store, catalog, shares);
    let mut trees = Vec::with_capacity(bases.len());
    let mut writers = Writers::default();
    for base in bases {
        let placed = place(catalog, &base.images);
        trees.push(Drawing { store, catalog, commands: &commands, placed: &placed }.tree(base, &mut writers));
    }
    writers.add_flags(&mut trees);
    let mut forest = Forest { trees };
    forest.sort(TreeOrder::Name);
    forest
}

/// All overlays of `bases`, backing files first.
fn place(catalog: &Catalog, bases: &[ImageIndex]) -> Vec<PlacedImage> {
    let mut placed: Vec<PlacedImage> =
        bases.iter().map(|image| PlacedImage { image: *image, parent: None, depth: 0 }).collect();
    let mut next = 0;
    while let Some(PlacedImage { image, depth, .. }) = placed.get(next) {
        let depth = depth + 1;
        let users = catalog.images[*image].users.iter().filter(|user| catalog.images[**user].chain_count > 0);
        let above: Vec<PlacedImage> =
            users.map(|image| PlacedImage { image: *image, parent: Some(next), depth }).collect();
        placed.extend(above);
        next += 1;
    }
    placed
}

/// One line for each active disk that another process writes and that therefore cannot be opened. This is not
/// a fault, but explains a refused open.
pub fn locked_text(store: &Store, catalog: &Catalog) -> String {
    if store.options().force_share {
        return String::new();
    }
    let is_written = |image: &&ImageEntry| {
        let file = store.roots()[image.place.root].open_file(&image.place.path);
        file.is_ok_and(|file| file.locks().is_written_by_others())
    };
    let leaves = catalog.chains().map(|(_, leaf)| leaf).filter(|leaf| catalog.is_active(*leaf));
    let written: Vec<&ImageEntry> = leaves.map(|leaf| &catalog.images[leaf]).filter(is_written).collect();
    let files: Vec<ObjectId> = written.iter().map(|image| image.stat.id).collect();
    let holders = all_lock_holders(&files, WRITER_BYTE);
    let line = |image: &&ImageEntry| {
        let names: Vec<String> = holders.get(&image.stat.id)?.iter().map(LockHolder::to_string).collect();
        let fact = "is being written by";
        let rest = "its active disk cannot be opened until that ends; its snapshots can be read";
        let sentence = format!("{}: {fact} {}: {rest}", path_text(&image.place.path), names.join(", "));
        // Disks that this mount itself writes can be opened.
        (!names.is_empty()).then(|| safe::terminal(&sentence) + "\n")
    };
    written.iter().filter_map(line).collect()
}

/// The running or unfinished command on each image.
fn commands(store: &Store, catalog: &Catalog, shares: &Shares<'_>) -> HashMap<ObjectId, String> {
    let flag = |found: &FoundIntent| {
        let file = found.intent.operation.progress_at()?.file.id();
        let verb = found.intent.command.split(' ').next().unwrap_or_default();
        let share = shares(&found.intent.chain);
        let is_running = share.is_some() || store.guard().is_owned(found);
        let share = share.map(|percent| format!(" {percent} %")).unwrap_or_default();
        Some((file, if is_running { format!("job: {verb}{share}") } else { format!("unfinished: {verb}") }))
    };
    catalog.intents.iter().filter_map(flag).collect()
}

struct Drawing<'a> {
    store: &'a Store,
    catalog: &'a Catalog,
    commands: &'a HashMap<ObjectId, String>,
    placed: &'a [PlacedImage],
}

impl Drawing<'_> {
    fn tree(&self, base: &TreeRoot<'_>, writers: &mut Writers) -> BackingTree {
        let titular = self.titular();
        let names = self.names(titular);
        let title = chain_name(self.catalog, titular);
        let mut tree = BackingTree { title, ..BackingTree::default() };
        if let Some(missing) = &base.missing {
            let node = TreeNode::new(NodeMark::Broken, TreeNodeKind::Missing, safe::text(missing.name));
            tree.nodes.push(TreeNode { flags: vec![missing.word.to_owned()], ..node });
        }
        // Internal snapshots are between the images, so the indices in the two lists differ.
        let mut nodes: Vec<usize> = Vec::with_capacity(self.placed.len());
        let mut room = ListingBudget::default();
        let paths = self.tell_apart(&names);
        let labels = names.into_iter().zip(paths);
        for (PlacedImage { image: index, parent, .. }, (name, path)) in self.placed.iter().zip(labels) {
            let image = &self.catalog.images[*index];
            let mut node = self.node(*index, name);
            node.flags.extend(path);
            if self.is_active(*index) {
                writers.record(self.store, image, tree.nodes.len());
            }
            let parent = match parent {
                Some(parent) => Some(nodes[*parent]),
                None => base.missing.is_some().then_some(0),
            };
            let place = if let Some(parent) = parent {
                tree.add(parent, node)
            } else {
                tree.nodes.push(node);
                tree.nodes.len() - 1
            };
            nodes.push(place);
            let snapshots = image.qcow2().map_or(&[][..], |qcow2| &qcow2.snapshots);
            let listed = snapshots.iter().take_while(|snapshot| room.take(snapshot)).count();
            for (number, snapshot) in snapshots[..listed].iter().enumerate() {
                tree.add(place, TreeNode { snapshot: Some((*index, number)), ..internal(snapshot) });
            }
            if listed < snapshots.len() {
                let name = format!("{} more", snapshots.len() - listed);
                tree.add(place, TreeNode::new(NodeMark::Internal, TreeNodeKind::Internal, name));
            }
        }
        writers.tree_count += 1;
        tree.count();
        tree.virtual_size = self.catalog.images[titular].virtual_size().unwrap_or(0);
        tree
    }

    fn is_leaf(&self, index: ImageIndex) -> bool {
        self.catalog.single == Some(index) || self.catalog.images[index].users.is_empty()
    }

    fn is_active(&self, index: ImageIndex) -> bool {
        self.is_leaf(index) && self.catalog.is_active(index)
    }

    /// The leaf farthest from the base that was not left behind; among equals an active one, then the first by
    /// name. The drawing's main column ends there by the same rule.
    fn titular(&self) -> ImageIndex {
        let leaves = self.placed.iter().filter(|placed| self.is_leaf(placed.image));
        let rank = |placed: &PlacedImage| {
            let is_used = self.catalog.images[placed.image].left_behind_by().is_none();
            (is_used, placed.depth, self.catalog.is_active(placed.image))
        };
        let best = leaves.clone().map(rank).max();
        let best = leaves.filter(|placed| Some(rank(placed)) == best).map(|placed| placed.image);
        best.min_by_key(|image| &self.catalog.images[*image].place).expect("a tree has a leaf")
    }

    /// The names of the views of the layers, as in the mount and for commands; of other leaves than the
    /// titular one, those of their files.
    fn names(&self, titular: ImageIndex) -> Vec<String> {
        let mut names: HashMap<ImageIndex, String> = HashMap::new();
        let leaves = self.placed.iter().map(|placed| placed.image).filter(|image| self.is_leaf(*image));
        for leaf in std::iter::once(titular).chain(leaves) {
            // Where one layer has its name, all below it have theirs.
            let mut below = self.catalog.layers(leaf).into_iter().skip(1);
            if below.next().is_none_or(|layer| names.contains_key(&layer)) {
                continue;
            }
            let views = self.store.chain_views(self.catalog, leaf);
            for view in views.views.iter().filter(|view| view.snapshot.is_none() && view.layer > 0) {
                names.entry(views.layers[view.layer]).or_insert_with(|| safe::text(&view.name));
            }
        }
        let name = |placed: &PlacedImage| {
            if placed.image == titular && self.catalog.is_active(titular) {
                return safe::text(ACTIVE);
            }
            let own = || safe::text(layer_name(&self.catalog.images[placed.image].place.path));
            names.get(&placed.image).cloned().unwrap_or_else(own)
        };
        self.placed.iter().map(name).collect()
    }

    /// Notes the paths of layers of different files with one name.
    fn tell_apart(&self, names: &[String]) -> Vec<Option<String>> {
        let mut count: HashMap<&str, usize> = HashMap::new();
        for name in names {
            *count.entry(name).or_default() += 1;
        }
        let path = |placed: &PlacedImage| path_text(&self.catalog.images[placed.image].place.path);
        let note = |(placed, name): (&PlacedImage, &String)| (count[name.as_str()] > 1).then(|| path(placed));
        self.placed.iter().zip(names).map(note).collect()
    }

    fn node(&self, index: ImageIndex, name: String) -> TreeNode {
        let image = &self.catalog.images[index];
        let is_active = self.is_active(index);
        let (own, link) = (own_word(image), link_word(image));
        let mark = match (own.or(link), is_active) {
            (Some(_), _) => NodeMark::Broken,
            (None, true) => NodeMark::Active,
            (None, false) => NodeMark::Frozen,
        };
        // The flag on the missing base is enough.
        let link = link.filter(|_| MissingBacking::of(self.catalog, index).is_none());
        let header = image.qcow2().map(|qcow2| &qcow2.header);
        let mut flags = Vec::new();
        let mut flag = |is_set: bool, word: &str| {
            if is_set {
                flags.push(word.to_owned());
            }
        };
        let user = self.catalog.claims_on(index).next().filter(|_| is_active);
        let user =
            user.map(|user| format!("not writable: {} may use it as its backing file", shown(&user.by)));
        flag(mark == NodeMark::Active && user.is_none(), "writable");
        flag(user.is_some(), user.as_deref().unwrap_or_default());
        flag(image.users.len() > 1, &format!("shared by {}", image.chain_count));
        flag(own.is_some(), own.unwrap_or_default());
        flag(link.is_some(), link.unwrap_or_default());
        flag(header.is_some_and(|header| header.corrupt()), "corrupt");
        flag(header.is_some_and(|header| header.dirty()), "dirty");
        flag(image.qcow2().is_some_and(|qcow2| qcow2.snapshot_problem.is_some()), "bad snapshot table");
        flags.extend(self.commands.get(&image.stat.id).cloned());
        flags.extend(managed_flags(image));
        let data_blocks = image.data_file.as_ref().map_or(0, |(_, stat)| stat.blocks);
        TreeNode {
            date: Some(date(image)),
            own_size: Some((image.stat.blocks + data_blocks) * 512),
            image: Some(index),
            flags,
            is_left_behind: image.left_behind_by().is_some(),
            chain: self.is_leaf(index).then(|| chain_name(self.catalog, index)),
            ..TreeNode::new(mark, kind(image), name)
        }
    }
}

/// What libvirt's definitions say of a file. An overlay of virsh bears the name of the snapshot before it.
fn managed_flags(image: &ImageEntry) -> Vec<String> {
    let Some(managed) = &image.managed else { return Vec::new() };
    let text = |name: &str| safe::text(name.as_bytes());
    let snapshots = |word: &str, of: &BTreeSet<DomainSnapshot>| {
        of.iter()
            .map(|of| format!("{word} {} of domain {}", text(&of.name), text(&of.domain)))
            .collect::<Vec<_>>()
    };
    let disks = managed.domains.iter().map(|domain| format!("domain {}", text(domain)));
    let left = managed.left_behind_by.iter().map(|domain| format!("left behind by domain {}", text(domain)));
    let states = snapshots("snapshot", &managed.states);
    let after = snapshots("after snapshot", &managed.made_after);
    disks.chain(left).chain(states).chain(after).collect()
}

/// When an internal snapshot was made.
pub fn snapshot_date(snapshot: &Snapshot) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::new(snapshot.seconds.into(), snapshot.nanoseconds.min(999_999_999))
}

fn internal(snapshot: &Snapshot) -> TreeNode {
    TreeNode {
        date: Some(snapshot_date(snapshot)),
        ..TreeNode::new(NodeMark::Internal, TreeNodeKind::Internal, safe::text(&snapshot.name))
    }
}

fn kind(image: &ImageEntry) -> TreeNodeKind {
    match (image.format, &image.content) {
        (Some(Format::Qcow2), _) | (None, DetectedContent::Qcow2(_) | DetectedContent::Malformed(_)) => {
            TreeNodeKind::Qcow2
        }
        (None, DetectedContent::Foreign(foreign)) => TreeNodeKind::Foreign(foreign.kind.name()),
        (Some(Format::Raw) | None, _) => TreeNodeKind::Raw,
    }
}

/// When the image was frozen, or else last changed.
pub fn date(image: &ImageEntry) -> SystemTime {
    let (seconds, nanoseconds) = match &image.frozen {
        Some(frozen) => (frozen.seconds, frozen.nanoseconds),
        None => (image.stat.modified.seconds, image.stat.modified.nanoseconds),
    };
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(whole)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(whole)
    };
    second
        .and_then(|second| second.checked_add(Duration::from_nanos(nanoseconds.into())))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

/// Nodes whose files are being written; the writers are looked up once for all of them.
#[derive(Default)]
struct Writers {
    /// Trees drawn so far.
    tree_count: usize,
    /// Tree, node and file.
    locked: Vec<(usize, usize, ObjectId)>,
}

impl Writers {
    /// Records `image` if a process writes it; it is that node of the current tree.
    fn record(&mut self, store: &Store, image: &ImageEntry, node: usize) {
        let Ok(file) = store.roots()[image.place.root].open_file(&image.place.path) else { return };
        if file.locks().is_written_by_others() {
            self.locked.push((self.tree_count, node, image.stat.id));
        }
    }

    fn add_flags(&self, trees: &mut [BackingTree]) {
        if self.locked.is_empty() {
            return;
        }
        let files: Vec<ObjectId> = self.locked.iter().map(|(_, _, file)| *file).collect();
        let holders = all_lock_holders(&files, WRITER_BYTE);
        for (tree, node, file) in &self.locked {
            let names: Vec<_> = holders.get(file).into_iter().flatten().map(LockHolder::to_string).collect();
            let flag = if names.is_empty() {
                "locked".to_owned()
            } else {
                format!("locked by {}", names.join(", "))
            };
            trees[*tree].nodes[*node].flags.push(flag);
        }
    }
}
