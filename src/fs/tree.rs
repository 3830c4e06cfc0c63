//! The tree of the mount: serves the kernel's requests in plain types.
//!
//! Requests wait only for the store's files. Names are looked up in the current catalog; a node whose chain
//! or layer was removed since is stale.

mod directories;
mod file_handles;
mod files;
mod guests;
mod labels;
mod volumes;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use crate::browse::Browser;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{Expect, ObjectStat, Storage, directory_of};
use crate::ops::Engine;
use crate::report::store::Live;
use crate::store::{
    ActiveAttributes, Catalog, ImageEntry, ImageIndex, Store, TrashItem, ViewId, ViewIdentity, stale,
};
use crate::units::{BlockStatus, Run};

use super::access::{Caller, Rights, Viewer};
use super::attributes::{Attributes, Ownership, Statistics, frozen, modified, taken};
use super::control::{ControlScope, Controls};
use super::disk_labels::DiskLabels;
use super::handles::Handles;
use super::info_files::{Counters, InfoFiles, metrics};
use super::kernel_map::KernelMaps;
use super::mounted_volumes::MountedVolumes;
use super::node::{ChainDocument, Inodes, Node, NodeKind, PartitionNode, StoreDocument};
use super::progress::PendingReads;

use directories::Directory;
pub use guests::GuestOptions;

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeEntry {
    /// The name.
    pub name: OsString,
    /// The node.
    pub node: Node,
    /// The inode number.
    pub inode: u64,
}

/// The mount's tree.
#[derive(Debug)]
pub struct MountTree {
    store: Arc<Store>,
    ownership: Ownership,
    rights: Arc<Rights>,
    labels: DiskLabels,
    inodes: Inodes,
    handles: Handles,
    documents: InfoFiles,
    controls: Controls,
    browser: Arc<Browser>,
    guest_options: GuestOptions,
    slots: MountedVolumes,
    maps: Option<Arc<KernelMaps>>,
    progress: PendingReads,
    counters: Counters,
    started: SystemTime,
    /// Of the inode numbers of this mount.
    /// Whether its disks may lie on another machine, which may not answer.
    is_elsewhere: bool,
    generation: u32,
    /// The options of the mount, as they were given.
    options: Vec<u8>,
}

/// The maximum length of a name in bytes, as statfs(2) says.
const NAME_LEN: u32 = 255;

/// Prefix of the names of a disk's extended attributes.
const ATTRIBUTE_PREFIX: &[u8] = b"user.chainfs.";

impl MountTree {
    /// The tree of `store`.
    pub fn new(
        store: &Arc<Store>,
        ownership: Ownership,
        browser: &Arc<Browser>,
        guest_options: GuestOptions,
    ) -> Self {
        let engine = Engine::new(store);
        Self {
            store: Arc::clone(store),
            ownership,
            rights: Arc::new(Rights::new(store, ownership, false)),
            labels: DiskLabels::default(),
            inodes: Inodes::new(),
            handles: Handles::default(),
            documents: InfoFiles::new(),
            browser: Arc::clone(browser),
            guest_options,
            slots: MountedVolumes::default(),
            maps: None,
            progress: PendingReads::new({
                let engine = Arc::clone(&engine);
                move |chain| engine.status(chain)
            }),
            controls: Controls::new(engine),
            counters: Counters::default(),
            started: SystemTime::now(),
            generation: file_handles::generation_of_mount(),
            is_elsewhere: store.roots().iter().any(|root| root.has_remote_writers()),
            options: Vec::new(),
        }
    }

    /// The same tree, which tells the options of its mount.
    #[must_use]
    pub fn described(mut self, options: Vec<u8>) -> Self {
        self.options = options;
        self
    }

    /// The same tree, whose frozen disks the kernel may read through these maps.
    #[must_use]
    pub fn with_kernel_maps(mut self, maps: Arc<KernelMaps>) -> Self {
        self.maps = Some(maps);
        self
    }

    /// The maps through which the kernel may read its frozen disks.
    pub(super) fn kernel_maps(&self) -> Option<&Arc<KernelMaps>> {
        self.maps.as_ref()
    }

    /// The same tree for a mount with `allow_other`.
    #[must_use]
    pub fn shared(mut self) -> Self {
        self.rights = Arc::new(Rights::new(&self.store, self.ownership, true));
        self
    }

    pub(super) fn rights(&self) -> &Rights {
        &self.rights
    }

    /// Whether lookups of the node depend on the caller, so that the kernel must not cache them.
    pub fn depends_on_caller(&self, inode: u64) -> bool {
        self.rights.is_judged()
            && matches!(
                self.node(inode),
                Ok(Node::View(_)
                    | Node::Partition(_)
                    | Node::PartitionsOf(_)
                    | Node::FilesOf(_)
                    | Node::StoreDocument(_)
                    | Node::ChainDocument(..))
            )
    }

    /// The mounted store.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// The engine that runs commands.
    pub fn engine(&self) -> &Arc<Engine> {
        self.controls.engine()
    }

    /// Counts an error for the metrics.
    pub fn count_error(&self) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Stops the jobs, flushes and closes all files, and releases all locks: the mount has ended.
    pub fn close(&self) {
        self.stop();
        self.progress.end();
        self.handles.clear();
        self.store.close_writers();
    }

    pub(super) fn counters(&self) -> &Counters {
        &self.counters
    }

    pub(super) fn controls(&self) -> &Controls {
        &self.controls
    }

    /// The present leaf of a chain.
    pub(super) fn leaf_of(&self, chain: &Path) -> Result<ImageIndex> {
        leaf(&self.store.catalog(), chain)
    }

    pub(super) fn node(&self, inode: u64) -> Result<Node> {
        self.inodes.node(inode).ok_or_else(|| stale("the inode number is unknown"))
    }

    /// The entry `name` of the directory `parent`. `.` is found in any node, and `..` in any directory.
    pub fn lookup(&self, caller: &Caller, parent: u64, name: &OsStr) -> Result<Attributes> {
        if let Some(found) = self.without_name(caller, parent, name) {
            return found;
        }
        let nothing = || Error::new(ErrorKind::NotFound, "no such name");
        let node = match self.directory(&self.node(parent)?)? {
            Directory::Nodes(entries) => entries.find(name)?.ok_or_else(nothing)?,
            Directory::Guest(parent) => return self.guest_entry(parent, name)?.ok_or_else(nothing),
            Directory::None => return Err(nothing()),
        };
        self.check_read(&self.rights.viewer(caller), &node, false)?;
        self.attributes_of(caller, &node, self.inodes.number(&node))
    }

    /// Attributes of a node.
    pub fn attributes(&self, caller: &Caller, inode: u64) -> Result<Attributes> {
        self.attributes_of(caller, &self.node(inode)?, inode)
    }

    /// Checks that a user may read a node; `now`: reads the permissions again instead of using cached ones.
    fn check_read(&self, viewer: &Viewer, node: &Node, now: bool) -> Result<()> {
        let Some(subject) = viewer.subject() else { return Ok(()) };
        if self.labels.is_given_to(node, subject.uid) || self.labels.leads_to_given(node, Some(subject.uid)) {
            return Ok(());
        }
        match node {
            Node::View(view)
            | Node::Partition(PartitionNode { view, .. })
            | Node::PartitionsOf(view)
            | Node::FilesOf(view)
            | Node::VolumeList(view)
            | Node::VolumeProblem(view, _)
            | Node::RootLink(view) => match self.store.find_view(view) {
                Ok(found) => self.rights.check_read(viewer, &found.catalog, found.layers(), now),
                // A later use of the node reports this error.
                Err(_) => Ok(()),
            },
            Node::Snapshots(chain)
            | Node::Info(chain)
            | Node::ChainDocument(chain, _)
            | Node::Control(ControlScope::Chain(chain))
            | Node::ControlFile(ControlScope::Chain(chain), _)
            | Node::Partitions(chain)
            | Node::Files(chain)
            | Node::Chain(chain) => {
                let catalog = self.store.catalog();
                self.rights.check_read(viewer, &catalog, &[leaf(&catalog, chain)?], now)
            }
            Node::Root
            | Node::Directory(_)
            | Node::FormerName(_)
            | Node::Store
            | Node::StoreDocument(_)
            | Node::Control(ControlScope::Store)
            | Node::ControlFile(ControlScope::Store, _)
            | Node::Guest(_) => Ok(()),
        }
    }

    /// Attributes of a node.
    fn attributes_of(&self, caller: &Caller, node: &Node, inode: u64) -> Result<Attributes> {
        if let Node::Guest(node) = node {
            return self.guest_attributes(*node);
        }
        // All other nodes have a kind of their own.
        let kind = node.kind().unwrap_or(NodeKind::File);
        let catalog = self.store.catalog();
        let (stat, size, blocks, writable) = match node {
            Node::Root | Node::Store | Node::Control(ControlScope::Store) => {
                (self.store_stat()?, 0, 0, false)
            }
            Node::Directory(path) => (self.directory_stat(path)?, 0, 0, false),
            Node::FormerName(path) => {
                let stat = self.directory_stat(directory_of(path).as_path())?;
                let size = former_target(&catalog, path)?.len() as u64;
                let (uid, gid, _) = self.ownership.apply(&stat, kind, false);
                let owner = (uid, gid, 0o777);
                return Ok(Attributes::plain(inode, kind, (size, 0), modified(&stat), owner));
            }
            Node::Control(ControlScope::Chain(chain))
            | Node::Chain(chain)
            | Node::Snapshots(chain)
            | Node::Info(chain)
            | Node::Partitions(chain)
            | Node::Files(chain) => {
                let index = leaf(&catalog, chain)?;
                let leaf = &catalog.images[index].stat;
                if self.rights.is_judged() {
                    // The directory reveals data of the image: names of its layers and internal snapshots.
                    let owner = self.rights.restrict(self.ownership.of_contents(leaf), &catalog, &[index]);
                    let owner = self.with_way_to_given(node, owner);
                    return Ok(Attributes::plain(inode, kind, (0, 0), modified(leaf), owner));
                }
                (
                    ObjectStat {
                        modified: leaf.modified,
                        ..self.directory_stat(directory_of(chain).as_path())?
                    },
                    0,
                    0,
                    false,
                )
            }
            Node::StoreDocument(document) => {
                let viewer = self.rights.viewer(caller);
                let catalog = self.rights.shown(&viewer, &catalog);
                let owner = self.ownership.apply(&self.store_stat()?, kind, false);
                if *document == StoreDocument::Chains {
                    let len = self.documents.chains(&self.store, &catalog).len();
                    let found = Attributes::plain(inode, kind, (len, len.div_ceil(512)), self.started, owner);
                    return Ok(found.changed_with(&catalog.serial));
                }
                let text = self.store_document(&viewer, &catalog, *document);
                let found = Attributes::of_text(inode, &text, self.started, owner);
                // Counters change with each call, as they do in /proc, where no time does.
                let is_counting = *document == StoreDocument::Metrics;
                return Ok(if is_counting { Attributes { changed: self.started, ..found } } else { found });
            }
            Node::ChainDocument(chain, document) => {
                let index = leaf(&catalog, chain)?;
                let stat = &catalog.images[index].stat;
                let layers = match document {
                    // This file reveals the content of the disk.
                    ChainDocument::OperatingSystem => catalog.layers(index),
                    _ => vec![index],
                };
                let owner = self.rights.restrict(self.ownership.apply(stat, kind, false), &catalog, &layers);
                if *document == ChainDocument::OperatingSystem {
                    let len = self.os_text_len(chain);
                    let size = (len, len.div_ceil(512));
                    return Ok(Attributes::plain(inode, kind, size, modified(stat), owner));
                }
                let text = self.chain_document(&self.rights.viewer(caller), &catalog, chain, *document)?;
                return Ok(Attributes::of_text(inode, &text, modified(stat), owner));
            }
            Node::ControlFile(scope, file) => {
                let owner = self.ownership.control(&self.control_owner(&catalog, scope)?);
                let text = self.control_text(&self.rights.viewer(caller), scope, *file);
                return Ok(Attributes::of_text(inode, &text, self.started, owner));
            }
            Node::View(view) => return Ok(self.labelled(node, self.view_attributes(view, inode)?)),
            Node::Partition(_) => {
                return Ok(self.labelled(node, self.guest_document_attributes(node, inode)?));
            }
            _ => return self.guest_document_attributes(node, inode),
        };
        let owner = self.ownership.apply(&stat, kind, writable);
        Ok(Attributes::plain(inode, kind, (size, blocks), modified(&stat), owner))
    }

    /// The file or directory whose owner owns the control files of a scope.
    fn control_owner(&self, catalog: &Catalog, scope: &ControlScope) -> Result<ObjectStat> {
        match scope {
            ControlScope::Store => self.store_stat(),
            ControlScope::Chain(chain) => Ok(catalog.images[leaf(catalog, chain)?].stat),
        }
    }

    fn store_stat(&self) -> Result<ObjectStat> {
        self.store.roots()[0].stat(Path::new("."))
    }

    /// The sizes of the file system that holds the store.
    pub(super) fn store_statistics(&self) -> Result<Statistics> {
        let found = self.store.roots()[0].space()?;
        Ok(Statistics {
            blocks: found.blocks,
            free_blocks: found.free,
            available_blocks: found.available,
            inodes: found.files,
            free_inodes: found.files_free,
            block_size: found.block_len,
            fragment_size: found.unit_len,
            name_len: NAME_LEN,
        })
    }

    /// Attributes of the store's directory for a directory of the mount.
    fn directory_stat(&self, path: &Path) -> Result<ObjectStat> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        self.store.roots()[0].stat(path).or_else(|_| self.store_stat())
    }

    fn view_attributes(&self, node: &ViewId, inode: u64) -> Result<Attributes> {
        let mut found = self.shown_attributes_of(node, inode)?;
        if self.rights.is_judged() {
            let owner = (found.uid, found.gid, found.permissions);
            (found.uid, found.gid, found.permissions) = match self.store.find_view(node) {
                Ok(view) => self.rights.restrict(owner, &view.catalog, view.layers()),
                // The view was removed: only its owner may use it until it is closed.
                Err(_) => (owner.0, owner.1, owner.2 & 0o700),
            };
        }
        Ok(found)
    }

    fn shown_attributes_of(&self, node: &ViewId, inode: u64) -> Result<Attributes> {
        if let ViewIdentity::Active(number) = node.part
            && let Some(active) = self.store.active_attributes(number)
        {
            return Ok(self.active_attributes(&active, inode));
        }
        let found = match self.store.find_view(node) {
            Ok(found) => found,
            // Removed while it is open: existing handles continue.
            Err(error) => return self.handles.attributes(inode).ok_or(error),
        };
        let image = found.image();
        // The file of an active disk changes all the time; that of a frozen one does not.
        let stat = if found.view.active { self.store.stat_now(image) } else { image.stat };
        let (size, mtime) = match (node.part, found.snapshot()) {
            (ViewIdentity::VmState(..), Some(snapshot)) => (snapshot.vm_state_size, taken(snapshot)),
            (_, Some(snapshot)) => {
                (snapshot.virtual_size.or(image.virtual_size()).unwrap_or(0), taken(snapshot))
            }
            _ => (image.virtual_size().unwrap_or(0), image.frozen.as_ref().map_or(modified(&stat), frozen)),
        };
        let own = stat.blocks + image.data_file.as_ref().map_or(0, |(_, stat)| stat.blocks);
        let blocks = if own == 0 && self.has_data(image) { 1 } else { own };
        let owner = self.ownership.apply(&stat, NodeKind::File, found.view.active);
        Ok(Attributes::plain(inode, NodeKind::File, (size, blocks), mtime, owner))
    }

    /// The attributes of an open active disk: the present ones, not those of the scan.
    fn active_attributes(&self, active: &ActiveAttributes, inode: u64) -> Attributes {
        let ActiveAttributes { stat, data_blocks, size } = active;
        let owner = self.ownership.apply(stat, NodeKind::File, true);
        // At least one block, so that programs do not treat it as one hole: data may have no blocks yet.
        let blocks = (stat.blocks + data_blocks).max(u64::from(stat.size > 0));
        Attributes::plain(inode, NodeKind::File, (*size, blocks), modified(stat), owner)
    }

    /// Whether a file without blocks has data, so that programs must not treat it as a hole: a small file may
    /// be stored in its inode, or not be allocated yet.
    fn has_data(&self, image: &ImageEntry) -> bool {
        let size = image.stat.size;
        size > 0
            && !self
                .store
                .file(&image.place, &image.stat, Expect::AnyVersion)
                .extent(0, size)
                .is_ok_and(|found| found == Run::new(BlockStatus::Zero, size))
    }

    /// An extended attribute; `None` if the node has none of that name.
    pub fn extended_attribute(
        &self,
        caller: &Caller,
        inode: u64,
        name: &OsStr,
        server: impl FnOnce() -> Option<&'static str>,
    ) -> Result<Option<Vec<u8>>> {
        if let Node::Guest(node) = self.node(inode)? {
            return self.guest_attribute(node, name.as_bytes());
        }
        if DiskLabels::is_kept(name) {
            return Ok(self.labels.attribute(&self.node(inode)?, name).filter(|_| caller.uid == 0));
        }
        let Some(name) = name.as_bytes().strip_prefix(ATTRIBUTE_PREFIX) else { return Ok(None) };
        let node = match self.node(inode)? {
            Node::View(node) => node,
            Node::Root => return Ok(self.mount_attribute(name)),
            _ => return Ok(None),
        };
        let found = self.store.find_view(&node)?;
        self.rights.check_read(&self.rights.viewer(caller), &found.catalog, found.layers(), true)?;
        let image = found.image();
        let header = image.qcow2().map(|qcow2| &qcow2.header);
        Ok(match name {
            b"format" => image.format.map(|format| format.name().as_bytes().to_vec()),
            b"backing" => {
                header.and_then(|header| header.backing.as_ref()).map(|backing| backing.name.clone())
            }
            b"served-by" if node.is_active() => Some(b"daemon".to_vec()),
            b"served-by" => Some(server().unwrap_or("nobody, it is not open").into()),
            b"depth" => Some(found.layers().len().to_string().into_bytes()),
            b"cluster-size" => header.map(|header| header.cluster.size().to_string().into_bytes()),
            b"allocated" => {
                let own = self.store.stat_now(image).blocks;
                let data = image.data_file.as_ref().map_or(0, |(_, stat)| stat.blocks);
                Some(((own + data) * 512).to_string().into_bytes())
            }
            b"cached" => {
                let places = found.layers().iter().map(|layer| &found.catalog.images[*layer].place);
                let mut cached =
                    places.filter_map(|place| self.store.roots()[place.root].cached(&place.path));
                let first = cached.next();
                first.map(|first| (first + cached.sum::<u64>()).to_string().into_bytes())
            }
            _ => None,
        })
    }

    /// An attribute of the mount's root.
    fn mount_attribute(&self, name: &[u8]) -> Option<Vec<u8>> {
        match name {
            b"options" => Some(self.options.clone()),
            b"store" => Some(self.store.given().as_os_str().as_bytes().to_vec()),
            _ => None,
        }
    }

    /// Calls `make` with what reports say that the catalog does not know.
    fn with_live<T>(&self, viewer: &Viewer, make: impl FnOnce(&Live<'_>) -> T) -> T {
        let mount = self.engine().mount();
        make(&Live {
            mount: mount.as_deref(),
            has_files: self.guest_options.shown,
            status: &|chain| self.engine().status(chain),
            system: &|chain| self.known_system(viewer, chain),
        })
    }

    fn store_document(&self, viewer: &Viewer, catalog: &Catalog, document: StoreDocument) -> Arc<[u8]> {
        let metrics = || {
            let maps = self.maps.as_ref().map(|maps| maps.statistics()).unwrap_or_default();
            let (open, inodes) = (self.handles.count(), self.inodes.count());
            metrics(&self.store, catalog, &self.counters, open, inodes, maps)
        };
        let may_see = |item: &TrashItem| {
            let Some(subject) = viewer.subject() else { return true };
            // The trash of a single image may belong to an enclosing store, whose content is not shown here.
            self.store.guard().prefix.as_os_str().is_empty()
                && self.rights.judge().may_see_item(subject, item)
        };
        self.with_live(viewer, |live| {
            self.documents.of_store(&self.store, catalog, document, live, metrics, &may_see)
        })
    }

    fn chain_document(
        &self,
        viewer: &Viewer,
        catalog: &Arc<Catalog>,
        chain: &Path,
        document: ChainDocument,
    ) -> Result<Arc<[u8]>> {
        let catalog = &*self.rights.shown(viewer, catalog);
        let leaf = leaf(catalog, chain)?;
        self.with_live(viewer, |live| self.documents.of_chain(&self.store, catalog, leaf, document, live))
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "the chain has no problem"))
    }
}

/// Where the link leads that a chain's former name has become.
fn former_target(catalog: &Catalog, path: &Path) -> Result<Vec<u8>> {
    let directory = path.parent().and_then(|parent| catalog.directories.get(parent));
    let target = directory.zip(path.file_name()).and_then(|(found, name)| found.former.get(name));
    target.map(|target| target.as_bytes().to_vec()).ok_or_else(|| stale("the name was given up"))
}

fn leaf(catalog: &Catalog, chain: &Path) -> Result<ImageIndex> {
    catalog.chain(chain).ok_or_else(|| stale("the chain was removed"))
}
