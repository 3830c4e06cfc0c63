//! The directories `partitions` and `files`: texts, attributes and files in them.
//!
//! The two directories and their entries for each view need no access to a disk. A lookup or open within the
//! directory of a view makes the browser read the view's disk.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use crate::browse::{FoundEntry, PointInTime};
use crate::error::{Error, ErrorKind, Result};
use crate::guest::{self, Crossing, FileKind, Ino, Time, TreeId};
use crate::report::safe::terminal;
use crate::report::{os, volumes};
use crate::store::{Access, ViewId, stale};

use super::super::access::Viewer;
use super::super::attributes::{Attributes, modified, time};
use super::super::guest_file::{GuestDirectory, GuestFile};
use super::super::guest_numbers::{self, GuestNode};
use super::super::handles::Handle;
use super::super::links;
use super::super::mounted_volumes::MountedVolume;
use super::super::node::{ChainDocument, Node, NodeKind, PartitionNode};
use super::super::partition_range::PartitionRange;
use super::{MountTree, former_target, leaf};

/// Attributes with the guest's text of a rewritten link. The kernel allows no `user.` attributes on symbolic
/// links.
const TARGETS: [&[u8]; 2] = [b"user.chainfs.target", b"system.chainfs.target"];

/// Options for guests' files.
#[derive(Clone, Copy, Debug)]
pub struct GuestOptions {
    /// Whether they are shown.
    pub shown: bool,
    /// Whether symbolic links and FIFOs are shown unchanged.
    pub verbatim: bool,
}

impl MountTree {
    /// The view of a chain that its guest is looked for in: the active disk, or the topmost readable one.
    fn first_view(&self, chain: &Arc<PathBuf>) -> Result<Option<ViewId>> {
        let catalog = self.store.catalog();
        let views = self.store.chain_views(&catalog, leaf(&catalog, chain)?);
        let first = views.views.first();
        Ok(first.map(|view| self.store.view_id(&catalog, chain, &views, view, false)))
    }

    /// The partitions of a view, with their names.
    pub(super) fn partitions(&self, view: &ViewId) -> Result<Vec<(OsString, PartitionNode)>> {
        let inside = self.browser.contents(view, PointInTime::Table)?;
        let shown =
            inside.layout().partitions.iter().filter(|partition| !partition.is_extended && partition.len > 0);
        Ok(shown
            .map(|partition| {
                let guest::volumes::Partition { number, start, len, .. } = *partition;
                (format!("p{number}.raw").into(), PartitionNode { view: view.clone(), number, start, len })
            })
            .collect())
    }

    /// Looks up an entry of a guest's directory. Number and attributes come from one response: the number of
    /// a symbolic link encodes its depth, so it depends on the file type.
    pub(super) fn guest_entry(&self, parent: GuestNode, name: &OsStr) -> Result<Option<Attributes>> {
        let slot = self.slots.get(parent.slot)?;
        let found = slot.inside.lookup(slot.tree, parent.ino, name.as_bytes())?;
        Ok(found.map(|FoundEntry { ino, attributes, crossing }| {
            let node = self.guest_node(&slot, parent, ino, attributes.kind, crossing);
            self.shown_attributes(node, &attributes)
        }))
    }

    /// The node of an entry of the directory `parent`. A tree that begins there has a slot of its own, as it
    /// has a device number of its own for the guest's kernel: its inode numbers are small, and links in it
    /// stay in it.
    pub(in crate::fs) fn guest_node(
        &self,
        slot: &MountedVolume,
        parent: GuestNode,
        ino: Ino,
        kind: FileKind,
        crossing: Option<Crossing>,
    ) -> GuestNode {
        if let Some(Crossing { subvolume, ino }) = crossing
            && let Ok((slot, inner)) = self.slots.within(slot, subvolume)
        {
            inner.note_above(self.guest_number(parent));
            return GuestNode { slot, depth: 0, ino };
        }
        let depth = match kind {
            FileKind::Directory => (parent.depth + 1).min(GuestNode::DEEPEST),
            FileKind::Symlink => parent.depth,
            _ => 0,
        };
        if matches!(kind, FileKind::Directory | FileKind::Symlink) {
            slot.note_parent(ino, parent.ino);
        }
        GuestNode { slot: parent.slot, depth, ino }
    }

    /// The attributes of a guest's file.
    pub(super) fn guest_attributes(&self, node: GuestNode) -> Result<Attributes> {
        let slot = self.slots.get(node.slot)?;
        let found = slot.inside.attributes(slot.tree, node.ino)?;
        Ok(self.shown_attributes(node, &found))
    }

    /// The file type in the mount for a guest's file type.
    pub(in crate::fs) fn shown_kind(&self, kind: FileKind) -> NodeKind {
        match kind {
            FileKind::File => NodeKind::File,
            FileKind::Directory => NodeKind::Directory,
            FileKind::Symlink => NodeKind::Symlink,
            FileKind::CharDevice => NodeKind::CharDevice,
            FileKind::BlockDevice => NodeKind::BlockDevice,
            FileKind::Socket => NodeKind::Socket,
            // Opening a FIFO would block in the kernel without a request to the daemon. Opening a socket
            // fails at once.
            FileKind::Fifo if !self.guest_options.verbatim => NodeKind::Socket,
            FileKind::Fifo => NodeKind::Fifo,
        }
    }

    /// The attributes in the mount for a guest's attributes.
    pub(in crate::fs) fn shown_attributes(
        &self,
        node: GuestNode,
        found: &guest::FileAttributes,
    ) -> Attributes {
        let (uid, gid, permissions) = self.ownership.of_guest(found);
        Attributes {
            inode: self.guest_number(node),
            kind: self.shown_kind(found.kind),
            size: found.size,
            blocks: found.blocks,
            links: found.links,
            device: device_number(found.device),
            accessed: shown_time(found.accessed),
            modified: shown_time(found.modified),
            changed: shown_time(found.changed),
            permissions,
            uid,
            gid,
        }
    }

    /// The attributes of nodes about guests that are not guests' files.
    pub(super) fn guest_document_attributes(&self, node: &Node, inode: u64) -> Result<Attributes> {
        match node {
            Node::PartitionsOf(view) | Node::FilesOf(view) => {
                let found = self.store.find_view(view)?;
                let stat = self.store.stat_now(found.image());
                let owner =
                    self.rights.restrict(self.ownership.of_contents(&stat), &found.catalog, found.layers());
                let owner = self.with_way_to_given(node, owner);
                Ok(Attributes::plain(inode, NodeKind::Directory, (0, 0), modified(&stat), owner))
            }
            Node::Partition(partition) => {
                let whole = self.view_attributes(&partition.view, inode)?;
                let blocks = (partition.len / 512).min(whole.blocks);
                Ok(Attributes { size: partition.len, blocks, ..whole })
            }
            Node::VolumeList(view) => {
                let whole = self.view_attributes(view, inode)?;
                let size = self.volume_list(view)?.len() as u64;
                let permissions = whole.permissions & 0o444;
                Ok(Attributes { size, blocks: size.div_ceil(512), permissions, ..whole })
            }
            Node::VolumeProblem(view, volume) => {
                let whole = self.view_attributes(view, inode)?;
                let size = self.volume_problem(view, volume)?.len() as u64;
                let permissions = whole.permissions & 0o444;
                Ok(Attributes { size, blocks: size.div_ceil(512), permissions, ..whole })
            }
            Node::RootLink(view) => {
                let whole = self.view_attributes(view, inode)?;
                let size = self.root_target(view)?.len() as u64;
                Ok(Attributes { kind: NodeKind::Symlink, size, blocks: 0, permissions: 0o777, ..whole })
            }
            _ => Err(stale("the node is not about a guest")),
        }
    }

    pub(super) fn volume_list(&self, view: &ViewId) -> Result<Arc<[u8]>> {
        let inside = self.browser.contents(view, PointInTime::First)?;
        Ok(volumes::listed(&inside).into_bytes().into())
    }

    /// The reasons why a volume is shown without its last writes, one per line.
    pub(super) fn volume_problem(&self, view: &ViewId, volume: &str) -> Result<Arc<[u8]>> {
        let inside = self.browser.contents(view, PointInTime::First)?;
        let Some(index) = inside.volume(volume.as_bytes()) else {
            return Err(stale("the volume was removed"));
        };
        let lines =
            inside.mount(TreeId::main(index))?.stale.into_iter().map(|sentence| terminal(&sentence) + "\n");
        Ok(lines.collect::<String>().into_bytes().into())
    }

    /// The text of `info/os.txt`: about the active disk, or the topmost readable one.
    pub(super) fn os_text(&self, chain: &Arc<PathBuf>) -> Result<Arc<[u8]>> {
        let Some(view) = self.first_view(chain)? else {
            return Ok(Arc::from(&b"no disk of this chain can be read\n"[..]));
        };
        let inside = self.browser.contents(&view, PointInTime::First)?;
        Ok(os::text(inside.operating_systems()?).into_bytes().into())
    }

    /// Its length if it is known, else 0: listing a directory must not read disks.
    pub(super) fn os_text_len(&self, chain: &Arc<PathBuf>) -> u64 {
        let view = self.first_view(chain).ok().flatten();
        let inside = view.and_then(|view| self.browser.known_contents(&view));
        inside
            .and_then(|inside| inside.known_operating_systems().map(|found| os::text(found).len() as u64))
            .unwrap_or(0)
    }

    /// The first system of a chain's guest, in a few words, if it was looked for before and this user may
    /// read the disk.
    pub(super) fn known_system(&self, viewer: &Viewer, chain: &Path) -> Option<String> {
        let chain = Arc::new(chain.to_path_buf());
        let view = self.first_view(&chain).ok()??;
        let inside = self.browser.known_contents(&view)?;
        let name = os::brief(inside.known_operating_systems()?);
        self.check_read(viewer, &Node::FilesOf(view), false).ok()?;
        Some(name)
    }

    fn root_target(&self, view: &ViewId) -> Result<Vec<u8>> {
        let inside = self.browser.contents(view, PointInTime::First)?;
        let gone = || stale("the disk no longer has an operating system");
        Ok(inside.operating_systems()?.first().ok_or_else(gone)?.root.clone())
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, inode: u64) -> Result<Vec<u8>> {
        match self.node(inode)? {
            Node::RootLink(view) => self.root_target(&view),
            Node::FormerName(path) => former_target(&self.store.catalog(), &path),
            Node::Guest(node) => {
                let slot = self.slots.get(node.slot)?;
                let target = slot.inside.read_link(slot.tree, node.ino)?;
                if self.guest_options.verbatim { Ok(target) } else { links::confined(&slot, node, &target) }
            }
            _ => Err(Error::new(ErrorKind::Usage, "not a symbolic link")),
        }
    }

    pub(super) fn open_partition(&self, partition: &PartitionNode, access: Access) -> Result<Handle> {
        let disk = if partition.view.is_active() {
            Handle::Active(Arc::new(self.open_active(&partition.view, access)?))
        } else {
            Handle::Disk(self.open_disk(&partition.view)?)
        };
        Ok(Handle::Partition(PartitionRange {
            disk: Box::new(disk),
            start: partition.start,
            len: partition.len,
        }))
    }

    pub(super) fn open_guest_file(&self, node: GuestNode) -> Result<Handle> {
        let slot = self.slots.get(node.slot)?;
        Ok(Handle::GuestFile(Arc::new(GuestFile::open(&slot, node.ino)?)))
    }

    pub(super) fn open_guest_directory(&self, node: GuestNode) -> Result<Handle> {
        let slot = self.slots.get(node.slot)?;
        Ok(Handle::GuestDirectory(Arc::new(GuestDirectory::open(&slot, node.ino)?)))
    }

    /// An extended attribute of a guest's file.
    pub(super) fn guest_attribute(&self, node: GuestNode, name: &[u8]) -> Result<Option<Vec<u8>>> {
        let slot = self.slots.get(node.slot)?;
        if TARGETS.contains(&name) {
            let found = slot.inside.attributes(slot.tree, node.ino)?;
            let is_link = found.kind == FileKind::Symlink;
            return if is_link { slot.inside.read_link(slot.tree, node.ino).map(Some) } else { Ok(None) };
        }
        let found = slot.extended_attributes(node.ino)?;
        Ok(found.iter().find(|attribute| attribute.name == name).map(|attribute| attribute.value.clone()))
    }

    /// The names of all listed extended attributes, each terminated by NUL.
    pub fn listed_attributes(&self, inode: u64, to_root: bool) -> Result<Vec<u8>> {
        // Attributes of chainfs are not listed, because `cp -a` would try to copy them.
        let Node::Guest(node) = self.node(inode)? else { return Ok(Vec::new()) };
        let found = self.slots.get(node.slot)?.extended_attributes(node.ino)?;
        // Only root may read trusted attributes; for other users `cp -a` would report an error for each.
        let shown = found.iter().filter(|attribute| to_root || !attribute.name.starts_with(b"trusted."));
        Ok(shown.flat_map(|attribute| [attribute.name.as_slice(), b"\0"].concat()).collect())
    }

    /// The statistics of a guest's file system; `None` for other nodes.
    pub fn guest_statistics(&self, inode: u64) -> Result<Option<guest::Statistics>> {
        let Node::Guest(node) = self.node(inode)? else { return Ok(None) };
        Ok(Some(self.slots.get(node.slot)?.mounted.statistics))
    }

    /// Whether requests for an inode may block until a worker has read a disk, or another machine has
    /// answered.
    pub fn may_block(&self, inode: u64) -> bool {
        self.is_elsewhere
            || Self::is_guest(inode)
            || matches!(
                self.node(inode),
                Ok(Node::FilesOf(_)
                    | Node::PartitionsOf(_)
                    | Node::VolumeList(_)
                    | Node::VolumeProblem(..)
                    | Node::RootLink(_)
                    | Node::ChainDocument(_, ChainDocument::OperatingSystem))
            )
    }

    /// Whether an inode number is that of a guest's file.
    pub fn is_guest(inode: u64) -> bool {
        guest_numbers::is_guest(inode)
    }

    /// The inode number of a guest's file.
    pub(in crate::fs) fn guest_number(&self, node: GuestNode) -> u64 {
        self.inodes.guests().number(node)
    }

    /// Adds a lookup of an inode.
    pub fn add_lookup(&self, inode: u64) {
        if let Some(node) = self.inodes.guests().add_lookup(inode) {
            self.slots.add_lookup(node.slot);
        }
    }

    /// FORGET: subtracts `times` lookups of an inode.
    pub fn forget(&self, inode: u64, times: u64) {
        if let Some(node) = self.inodes.guests().forget(inode, times) {
            self.slots.forget(node.slot, times);
        }
    }
}

/// Linux' encoding of device numbers in FUSE, which is that of the 32-bit stat(2).
fn device_number((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major << 8) & 0xf_ff00 | (minor & !0xff) << 12
}

fn shown_time(Time { seconds, nanoseconds }: Time) -> SystemTime {
    time(seconds, nanoseconds)
}
