//! Open files and directories of the tree: opened by node, then used by handle.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::store::{Access, ActiveHandle, OpenDisk, ViewId, stale};
use crate::units::BlockStatus;

use super::super::access::Caller;
use super::super::change::read_only;
use super::super::control::{ControlFile, ControlHandle};
use super::super::handles::Handle;
use super::super::node::{ChainDocument, Node, PartitionNode, StoreDocument};
use super::super::progress::{ProgressReader, ProgressReply};
use super::directories::Directory;
use super::{MountTree, NodeEntry};

impl MountTree {
    /// Opens a file; directories by [`MountTree::open_directory`]. The number is for [`MountTree::read`].
    pub fn open(&self, caller: &Caller, inode: u64, access: Access) -> Result<(u64, Handle)> {
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
        let viewer = self.rights.viewer(caller);
        self.check_read(&viewer, &node, true)?;
        if access.writes()
            && let Node::View(view) | Node::Partition(PartitionNode { view, .. }) = &node
        {
            self.check_write(caller, &node, view)?;
        }
        let handle = match node {
            Node::StoreDocument(StoreDocument::Chains) => {
                Handle::Pieces(self.documents.chains(&self.store, &self.rights.shown(&viewer, &catalog)))
            }
            Node::StoreDocument(document) => {
                Handle::Text(self.store_document(&viewer, &self.rights.shown(&viewer, &catalog), document))
            }
            Node::ChainDocument(chain, ChainDocument::OperatingSystem) => Handle::Text(self.os_text(&chain)?),
            Node::ChainDocument(chain, document) => {
                Handle::Text(self.chain_document(&viewer, &catalog, &chain, document)?)
            }
            Node::ControlFile(scope, file) => {
                self.control_owner(&catalog, &scope)?;
                match file {
                    ControlFile::Progress => Handle::Progress(Arc::new(ProgressReader::new(
                        &scope,
                        Some((Arc::clone(&self.rights), viewer)),
                    ))),
                    _ => Handle::Control(Arc::new(ControlHandle::new(scope, file, viewer))),
                }
            }
            Node::View(view) if is_active => Handle::Active(Arc::new(self.open_active(&view, access)?)),
            Node::View(view) => Handle::Disk(self.open_disk(&view)?),
            Node::Partition(partition) => self.open_partition(&partition, access)?,
            Node::VolumeList(view) => Handle::Text(self.volume_list(&view)?),
            Node::VolumeProblem(view, volume) => Handle::Text(self.volume_problem(&view, &volume)?),
            Node::Guest(node) => self.open_guest_file(node)?,
            _ => return Err(Error::new(ErrorKind::Usage, "this is a directory")),
        };
        let seen =
            if let Handle::Disk(_) = handle.disk() { self.attributes(caller, inode).ok() } else { None };
        Ok((self.handles.add(handle.clone(), seen), handle))
    }

    /// Checks that the caller may write a disk, or a partition of it.
    pub(in crate::fs) fn check_write(&self, caller: &Caller, node: &Node, id: &ViewId) -> Result<()> {
        let viewer = self.rights.viewer(caller);
        let Some(subject) = viewer.subject() else { return Ok(()) };
        if self.labels.is_given_to(node, subject.uid) {
            return Ok(());
        }
        let found = self.store.find_view(id)?;
        self.rights.check_write(&viewer, &found.catalog, found.layers())
    }

    pub(super) fn open_disk(&self, id: &ViewId) -> Result<Arc<OpenDisk>> {
        self.count_open(self.store.open_frozen(id))
    }

    pub(in crate::fs) fn open_active(&self, id: &ViewId, access: Access) -> Result<ActiveHandle> {
        self.count_open(self.store.open_writable(id, access))
    }

    fn count_open<T>(&self, opened: Result<T>) -> Result<T> {
        self.counters.opens.fetch_add(u64::from(opened.is_ok()), Ordering::Relaxed);
        opened
    }

    /// Opens a directory with its present entries; returns the handle's number.
    pub fn open_directory(&self, caller: &Caller, inode: u64) -> Result<u64> {
        let node = self.node(inode)?;
        let viewer = self.rights.viewer(caller);
        self.check_read(&viewer, &node, false)?;
        let handle = match self.directory(&node)? {
            Directory::Nodes(entries) => {
                let mut found = Vec::new();
                entries.list(&mut found)?;
                if viewer.subject().is_some() && !matches!(node, Node::Root | Node::Directory(_)) {
                    found.retain(|(_, node)| self.check_read(&viewer, node, false).is_ok());
                }
                let entry = |(name, node)| NodeEntry { inode: self.inodes.number(&node), name, node };
                Handle::Directory(found.into_iter().map(entry).collect())
            }
            Directory::Guest(node) => self.open_guest_directory(node)?,
            Directory::None => return Err(Error::new(ErrorKind::Usage, "not a directory")),
        };
        Ok(self.handles.add(handle, None))
    }

    /// The open handle of a number.
    pub fn handle(&self, number: u64) -> Result<Handle> {
        self.handles.get(number).ok_or_else(|| stale("the handle is not open"))
    }

    /// Closes a handle.
    pub fn release(&self, number: u64) {
        self.handles.remove(number);
    }

    /// Reads from `at` into `buf`; returns the number of bytes before the end of the file.
    pub fn read(&self, handle: &Handle, at: u64, buf: &mut [u8]) -> Result<usize> {
        match handle {
            Handle::Text(text) => {
                let rest = usize::try_from(at).ok().and_then(|at| text.get(at..)).unwrap_or_default();
                let len = rest.len().min(buf.len());
                buf[..len].copy_from_slice(&rest[..len]);
                Ok(len)
            }
            Handle::Pieces(pieces) => Ok(pieces.read(at, buf)),
            Handle::Control(control) => Ok(control.read(self, at, buf)),
            Handle::Directory(_) | Handle::GuestDirectory(_) | Handle::Progress(_) => {
                Err(Error::new(ErrorKind::Usage, "this cannot be read as a file"))
            }
            Handle::Partition(window) => {
                let (place, len) = window.clip(at, buf.len() as u64);
                self.read(&window.disk, place, &mut buf[..len as usize])
            }
            Handle::GuestFile(file) => self.count_read(file.read_at(at, buf)),
            Handle::Disk(disk) => {
                let open = disk.view();
                let len = open.view.size().saturating_sub(at).min(buf.len() as u64) as usize;
                // All or nothing: the page cache would treat a short read as zeroes.
                self.count_read(open.view.read_at(at, &mut buf[..len]).map(|()| len))
            }
            Handle::Active(disk) => self.count_read(disk.read_at(at, buf)),
        }
    }

    /// Reads at most `most` bytes of a `control/progress`; `answer` is called when there is news.
    pub fn read_progress(&self, reader: &Arc<ProgressReader>, most: usize, answer: ProgressReply) {
        self.progress.read(reader, most, answer);
    }

    fn count_read(&self, done: Result<usize>) -> Result<usize> {
        self.counters.reads.fetch_add(1, Ordering::Relaxed);
        self.counters.read_bytes.fetch_add(done.as_ref().map_or(0, |len| *len as u64), Ordering::Relaxed);
        done
    }

    /// lseek(2) with `SEEK_DATA` or, for bytes that are zero, `SEEK_HOLE`; `None` is ENXIO.
    pub fn seek(&self, handle: &Handle, at: u64, wanted: BlockStatus) -> Result<Option<u64>> {
        let all_data = |at| (wanted == BlockStatus::Data).then_some(at);
        let (size, found) = match handle {
            Handle::Text(text) => (text.len() as u64, all_data(at)),
            Handle::Pieces(pieces) => (pieces.len(), all_data(at)),
            Handle::Disk(disk) => {
                let open = disk.view();
                let size = open.view.size();
                (size, if at < size { open.view.seek(at, wanted)? } else { None })
            }
            Handle::Active(disk) => (disk.size()?, disk.seek(at, wanted)?),
            Handle::Control(control) => (control.len(self), all_data(at)),
            Handle::GuestFile(file) => (file.size(), file.seek(at, wanted)?),
            Handle::Partition(window) => {
                let (place, _) = window.clip(at, 0);
                (
                    window.len,
                    if at < window.len {
                        window.found(self.seek(&window.disk, place, wanted)?, wanted)
                    } else {
                        None
                    },
                )
            }
            Handle::Directory(_) | Handle::GuestDirectory(_) | Handle::Progress(_) => {
                return Err(Error::new(ErrorKind::Usage, "this cannot be searched for holes"));
            }
        };
        // Every file ends with a hole.
        Ok(if at >= size { None } else { found.or((wanted == BlockStatus::Zero).then_some(size)) })
    }
}
