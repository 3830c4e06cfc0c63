//! The tree of the mount: what the kernel asks, answered in plain types.
//!
//! Nothing here waits for anything but the store's files. Names are looked up in the catalog of
//! the moment; a node whose chain or layer has gone since is stale.

mod guests;
mod names;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use crate::browse::Browser;
use crate::error::{Error, ErrorKind, Result};
use crate::io::{FileStat, Storage};
use crate::ops::{Engine, JobState};
use crate::report::status::per_mille;
use crate::store::{
    Access, ActiveAttributes, ActiveHandle, Catalog, ImageEntry, ImageIndex, OpenDisk, Part, Store, ViewId, stale,
};

use super::attributes::{Attributes, Ownership, frozen, modified, taken};
use super::change::read_only;
use super::control::{ControlFile, ControlHandle, ControlScope, Controls};
use super::documents::{Counters, Documents, metrics};
use super::handles::{Handle, Handles};
use super::node::{ChainDocument, Inodes, Node, NodeKind, PartitionNode, ROOT, StoreDocument};
use super::progress::{Answer, Progress, ProgressReader};
use super::slots::Slots;

pub use guests::GuestOptions;
pub(super) use guests::guest_node;

/// One entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: OsString,
    /// What it is.
    pub node: Node,
    /// Its number.
    pub inode: u64,
}

/// The mount's tree.
#[derive(Debug)]
pub struct Tree {
    store: Arc<Store>,
    ownership: Ownership,
    inodes: Inodes,
    handles: Handles,
    documents: Documents,
    controls: Controls,
    browser: Arc<Browser>,
    guest_options: GuestOptions,
    slots: Slots,
    progress: Progress,
    counters: Counters,
    started: SystemTime,
}

/// Names of the attributes that disks have, after `user.chainfs.`.
const ATTRIBUTE_PREFIX: &[u8] = b"user.chainfs.";

impl Tree {
    /// The tree of `store`.
    pub fn new(store: &Arc<Store>, ownership: Ownership, browser: &Arc<Browser>, guest_options: GuestOptions) -> Self {
        let engine = Engine::new(store);
        Self {
            store: Arc::clone(store),
            ownership,
            inodes: Inodes::new(),
            handles: Handles::default(),
            documents: Documents::new(),
            browser: Arc::clone(browser),
            guest_options,
            slots: Slots::default(),
            progress: Progress::new({
                let engine = Arc::clone(&engine);
                move |chain| engine.status(chain)
            }),
            controls: Controls::new(engine),
            counters: Counters::default(),
            started: SystemTime::now(),
        }
    }

    /// The store that is shown.
    pub fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// What takes the commands.
    pub fn engine(&self) -> &Arc<Engine> {
        self.controls.engine()
    }

    /// Counts an answer for the metrics.
    pub fn count_error(&self) {
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Stops the jobs, closes everything, which flushes it, and lets go of all locks: the mount has ended.
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

    /// The leaf of a chain, as of now.
    pub(super) fn leaf_of(&self, chain: &Path) -> Result<ImageIndex> {
        leaf(&self.store.catalog(), chain)
    }

    pub(super) fn node(&self, inode: u64) -> Result<Node> {
        self.inodes.node(inode).ok_or_else(|| stale("a number that was never given"))
    }

    /// The entry `name` of the directory `parent`.
    pub fn lookup(&self, parent: u64, name: &OsStr) -> Result<Attributes> {
        let parent = self.node(parent)?;
        let nothing = || Error::new(ErrorKind::NotFound, "no such name");
        if let Node::Guest(parent) = parent {
            return self.guest_entry(parent, name)?.ok_or_else(nothing);
        }
        let node = self.child(&parent, name)?.ok_or_else(nothing)?;
        self.attributes_of(&node, self.inodes.number(&node))
    }

    /// Attributes of a node.
    pub fn attributes(&self, inode: u64) -> Result<Attributes> {
        self.attributes_of(&self.node(inode)?, inode)
    }

    /// Attributes of an entry that was just listed.
    pub fn attributes_of(&self, node: &Node, inode: u64) -> Result<Attributes> {
        let Some(kind) = node.kind() else {
            let Node::Guest(node) = node else { unreachable!("everything else has a kind") };
            return self.guest_attributes(*node);
        };
        let catalog = self.store.catalog();
        let (stat, size, blocks, mtime, writable) = match node {
            Node::Root | Node::Directory(_) | Node::Store => (self.store_stat()?, 0, 0, None, false),
            Node::Chain(chain)
            | Node::Snapshots(chain)
            | Node::Info(chain)
            | Node::Partitions(chain)
            | Node::Files(chain) => {
                let leaf = &catalog.images[leaf(&catalog, chain)?];
                // Who may list a chain is who may list the store: names are no secret of an image's.
                let stat = FileStat { signature: leaf.stat.signature, ..self.store_stat()? };
                (stat, 0, 0, None, false)
            }
            Node::StoreDocument(document) => {
                let len = self.store_document(&catalog, *document).len() as u64;
                (self.store_stat()?, len, len.div_ceil(512), Some(self.started), false)
            }
            Node::ChainDocument(chain, document) => {
                let leaf = leaf(&catalog, chain)?;
                let len = match document {
                    ChainDocument::OperatingSystem => self.os_text_len(chain),
                    _ => self.chain_document(&catalog, leaf, *document)?.len() as u64,
                };
                (catalog.images[leaf].stat, len, len.div_ceil(512), None, false)
            }
            Node::Control(scope) => {
                let stat = self.control_owner(&catalog, scope)?;
                (FileStat { signature: stat.signature, ..self.store_stat()? }, 0, 0, None, false)
            }
            Node::ControlFile(scope, file) => {
                let owner = self.ownership.control(&self.control_owner(&catalog, scope)?);
                let size = self.controls.text(scope, *file).len() as u64;
                return Ok(Attributes::plain(inode, kind, (size, size.div_ceil(512)), self.started, owner));
            }
            Node::View(view) => return self.view_attributes(view, inode),
            _ => return self.guest_document_attributes(node, inode),
        };
        let mtime = mtime.unwrap_or_else(|| modified(&stat));
        Ok(Attributes::plain(inode, kind, (size, blocks), mtime, self.ownership.apply(&stat, kind, writable)))
    }

    /// Whose control files those of a scope are.
    fn control_owner(&self, catalog: &Catalog, scope: &ControlScope) -> Result<FileStat> {
        match scope {
            ControlScope::Store => self.store_stat(),
            ControlScope::Chain(chain) => Ok(catalog.images[leaf(catalog, chain)?].stat),
        }
    }

    fn store_stat(&self) -> Result<FileStat> {
        self.store.roots()[0].stat(Path::new("."))
    }

    fn view_attributes(&self, node: &ViewId, inode: u64) -> Result<Attributes> {
        if let Part::Active(number) = node.part
            && let Some(active) = self.store.active_attributes(number)
        {
            return Ok(self.active_attributes(&active, inode));
        }
        let found = match self.store.find_view(node) {
            Ok(found) => found,
            // Taken away from under those who have it open, who may go on.
            Err(error) => return self.handles.attributes(inode).ok_or(error),
        };
        let image = found.image();
        // The active disk's file changes all the time; a frozen one is as it was.
        let stat = if found.view.active { self.store.stat_now(image) } else { image.stat };
        let (size, mtime) = match (node.part, found.snapshot()) {
            (Part::VmState(..), Some(snapshot)) => (snapshot.vm_state_size, taken(snapshot)),
            (_, Some(snapshot)) => (snapshot.virtual_size.or(image.virtual_size()).unwrap_or(0), taken(snapshot)),
            _ => (image.virtual_size().unwrap_or(0), image.frozen.as_ref().map_or(modified(&stat), frozen)),
        };
        let own = stat.blocks + image.data_file.as_ref().map_or(0, |(_, stat)| stat.blocks);
        let blocks = if own == 0 && self.has_data(image) { 1 } else { own };
        let owner = self.ownership.apply(&stat, NodeKind::File, found.view.active);
        Ok(Attributes::plain(inode, NodeKind::File, (size, blocks), mtime, owner))
    }

    /// The attributes of an active disk that somebody has open: as it is, not as it was when scanned.
    fn active_attributes(&self, active: &ActiveAttributes, inode: u64) -> Attributes {
        let ActiveAttributes { stat, data_blocks, size } = active;
        let owner = self.ownership.apply(stat, NodeKind::File, true);
        // Never a hole as a whole: bytes may be there that have no blocks yet.
        let blocks = (stat.blocks + data_blocks).max(u64::from(stat.signature.size > 0));
        Attributes::plain(inode, NodeKind::File, (*size, blocks), modified(stat), owner)
    }

    /// Whether a file without blocks of its own holds data all the same: then it must not be
    /// taken for a hole (a file so small that it lies in its inode, or that is not allocated yet).
    fn has_data(&self, image: &ImageEntry) -> bool {
        let size = image.stat.signature.size;
        size > 0
            && !self
                .store
                .file(&image.place, &image.stat, false)
                .extent(0, size)
                .is_ok_and(|found| found == (false, size))
    }

    /// Opens a file; directories by [`Tree::open_directory`]. The number is for [`Tree::read`].
    pub fn open(&self, inode: u64, access: Access) -> Result<(u64, Handle)> {
        let catalog = self.store.catalog();
        let node = self.node(inode)?;
        let is_active = match &node {
            Node::View(view) | Node::Partition(PartitionNode { view, .. }) => view.is_active(),
            _ => false,
        };
        let takes_commands = matches!(&node, Node::ControlFile(_, file) if file.takes_commands());
        if access.writes() && !is_active && !takes_commands {
            return Err(read_only());
        }
        let handle = match node {
            Node::StoreDocument(document) => Handle::Text(self.store_document(&catalog, document)),
            Node::ChainDocument(chain, ChainDocument::OperatingSystem) => Handle::Text(self.os_text(&chain)?),
            Node::ChainDocument(chain, document) => {
                Handle::Text(self.chain_document(&catalog, leaf(&catalog, &chain)?, document)?)
            }
            Node::ControlFile(scope, file) => {
                self.control_owner(&catalog, &scope)?;
                match file {
                    ControlFile::Progress => Handle::Progress(Arc::new(ProgressReader::new(&scope))),
                    _ => Handle::Control(Arc::new(ControlHandle::new(scope, file))),
                }
            }
            Node::View(view) if is_active => Handle::Active(Arc::new(self.open_active(&view, access)?)),
            Node::View(view) => Handle::Disk(self.open_disk(&view)?),
            Node::Partition(partition) => self.open_partition(&partition, access)?,
            Node::VolumeList(view) => Handle::Text(self.volume_list(&view)?),
            Node::Guest(node) => self.open_guest_file(node)?,
            _ => return Err(Error::new(ErrorKind::Usage, "a directory is not opened as a file")),
        };
        let seen = if let Handle::Disk(_) = handle.disk() { self.attributes(inode).ok() } else { None };
        Ok((self.handles.add(handle.clone(), seen), handle))
    }

    fn open_disk(&self, id: &ViewId) -> Result<Arc<OpenDisk>> {
        self.count_open(self.store.open_frozen(id))
    }

    pub(super) fn open_active(&self, id: &ViewId, access: Access) -> Result<ActiveHandle> {
        self.count_open(self.store.open_writable(id, access))
    }

    fn count_open<T>(&self, opened: Result<T>) -> Result<T> {
        self.counters.opens.fetch_add(u64::from(opened.is_ok()), Ordering::Relaxed);
        opened
    }

    /// Opens a directory: its entries as of now, under a number of their own.
    pub fn open_directory(&self, inode: u64) -> Result<u64> {
        let handle = match self.node(inode)? {
            Node::Guest(node) => self.open_guest_directory(node)?,
            _ => Handle::Directory(self.list(inode)?.into()),
        };
        Ok(self.handles.add(handle, None))
    }

    /// What a number stands for.
    pub fn handle(&self, number: u64) -> Result<Handle> {
        self.handles.get(number).ok_or_else(|| stale("a handle that is not open"))
    }

    /// Forgets a number.
    pub fn release(&self, number: u64) {
        self.handles.remove(number);
    }

    /// Reads into `buf` from `at` on; returns how much there was before the end of the file.
    pub fn read(&self, handle: &Handle, at: u64, buf: &mut [u8]) -> Result<usize> {
        match handle {
            Handle::Text(text) => {
                let rest = usize::try_from(at).ok().and_then(|at| text.get(at..)).unwrap_or_default();
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(len)
            }
            Handle::Control(control) => Ok(control.read(&self.controls, at, buf)),
            Handle::Directory(_) | Handle::GuestDirectory(_) | Handle::Progress(_) => {
                Err(Error::new(ErrorKind::Usage, "this is not read as a file"))
            }
            Handle::Partition(window) => {
                let (place, len) = window.clip(at, buf.len() as u64);
                self.read(&window.disk, place, &mut buf[..len as usize])
            }
            Handle::GuestFile(file) => self.count_read(file.read_at(at, buf)),
            Handle::Disk(disk) => {
                let open = disk.view();
                let len = open.view.size().saturating_sub(at).min(buf.len() as u64) as usize;
                // As a whole or not at all: a page cache would take a short read for zeroes.
                self.count_read(open.view.read_at(at, &mut buf[..len]).map(|()| len))
            }
            Handle::Active(disk) => self.count_read(disk.read_at(at, buf)),
        }
    }

    /// Reads at most `most` bytes of a `control/progress`; `answer` is called when there is news.
    pub fn read_progress(&self, reader: &Arc<ProgressReader>, most: usize, answer: Answer) {
        self.progress.read(reader, most, answer);
    }

    fn count_read(&self, done: Result<usize>) -> Result<usize> {
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.counters.read_bytes.fetch_add(done.as_ref().map_or(0, |len| *len as u64), Ordering::Relaxed);
        done
    }

    /// lseek(2) with `SEEK_DATA` or `SEEK_HOLE`; `None` is ENXIO.
    pub fn seek(&self, handle: &Handle, at: u64, data: bool) -> Result<Option<u64>> {
        let (size, found) = match handle {
            Handle::Text(text) => (text.len() as u64, if data { Some(at) } else { None }),
            Handle::Disk(disk) => {
                let open = disk.view();
                let size = open.view.size();
                (size, if at < size { open.view.seek(at, data)? } else { None })
            }
            Handle::Active(disk) => (disk.size()?, disk.seek(at, data)?),
            Handle::Control(control) => (control.len(&self.controls), if data { Some(at) } else { None }),
            Handle::GuestFile(file) => (file.size(), file.seek(at, data)?),
            Handle::Partition(window) => {
                let (place, _) = window.clip(at, 0);
                (
                    window.len,
                    if at < window.len { window.found(self.seek(&window.disk, place, data)?, data) } else { None },
                )
            }
            Handle::Directory(_) | Handle::GuestDirectory(_) | Handle::Progress(_) => {
                return Err(Error::new(ErrorKind::Usage, "this has no holes"));
            }
        };
        // Every file ends with a hole.
        Ok(if at >= size { None } else { found.or((!data).then_some(size)) })
    }

    /// An extended attribute; `None` if the node has none of that name.
    pub fn extended_attribute(&self, inode: u64, name: &OsStr) -> Result<Option<Vec<u8>>> {
        if let Node::Guest(node) = self.node(inode)? {
            return self.guest_attribute(node, name.as_bytes());
        }
        let Some(name) = name.as_bytes().strip_prefix(ATTRIBUTE_PREFIX) else { return Ok(None) };
        if inode == ROOT && name == b"pid" {
            return Ok(Some(std::process::id().to_string().into_bytes()));
        }
        let Node::View(node) = self.node(inode)? else { return Ok(None) };
        let found = self.store.find_view(&node)?;
        let image = found.image();
        let header = image.qcow2().map(|qcow2| &qcow2.header);
        Ok(match name {
            b"format" => image.format.map(|format| format.name().as_bytes().to_vec()),
            b"backing" => header.and_then(|header| header.backing.as_ref()).map(|backing| backing.name.clone()),
            b"depth" => Some(found.layers().len().to_string().into_bytes()),
            b"cluster-size" => header.map(|header| header.cluster.size().to_string().into_bytes()),
            b"allocated" => {
                let own = self.store.stat_now(image).blocks;
                let data = image.data_file.as_ref().map_or(0, |(_, stat)| stat.blocks);
                Some(((own + data) * 512).to_string().into_bytes())
            }
            _ => None,
        })
    }

    /// How much of a chain's command is done, in percent, if one is at work.
    fn share(&self, chain: &Path) -> Option<u64> {
        let status = self.engine().status(chain);
        (status.state == JobState::Running).then(|| per_mille(&status) / 10)
    }

    fn store_document(&self, catalog: &Catalog, document: StoreDocument) -> Arc<[u8]> {
        let live = || metrics(&self.store, &self.counters, self.handles.count(), self.inodes.count());
        self.documents.of_store(&self.store, catalog, document, &|chain| self.share(chain), live)
    }

    fn chain_document(&self, catalog: &Catalog, leaf: ImageIndex, document: ChainDocument) -> Result<Arc<[u8]>> {
        self.documents
            .of_chain(&self.store, catalog, leaf, document, &|chain| self.share(chain))
            .ok_or_else(|| Error::new(ErrorKind::NotFound, "nothing is wrong with the chain any more"))
    }
}

fn leaf(catalog: &Catalog, chain: &Path) -> Result<ImageIndex> {
    catalog.chain(chain).ok_or_else(|| stale("the chain has gone"))
}
