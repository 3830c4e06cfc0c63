//! Requests that change a disk: write, flush, zero, grow.
//!
//! Only active disks can be changed, and names in the tree cannot. An active disk behaves like a block
//! device: opening it with `O_TRUNC` does not shorten it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::image::write::Zeroing;
use crate::store::{Access, ActiveHandle, ViewId};

use super::access::Caller;
use super::handles::Handle;
use super::node::{Node, NodeKind, PartitionNode};
use super::tree::MountTree;

/// The modes of fallocate(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Zero the range.
    Zero(Zeroing),
    /// Allocate space for the range.
    Space,
}

impl MountTree {
    /// Writes up to the end of the disk, and returns the number of bytes written. `sync`: makes them durable.
    /// A write to a control file runs one command, which may block.
    pub fn write(&self, handle: &Handle, at: u64, bytes: &[u8], sync: bool) -> Result<usize> {
        if let Handle::Control(control) = handle {
            return self.command(control, at, bytes);
        }
        let len = match handle {
            Handle::Partition(window) => window.write_at(at, bytes)?,
            _ => active(handle)?.write_at(at, bytes)?,
        };
        self.counters().writes.fetch_add(1, Ordering::Relaxed);
        self.counters().write_bytes.fetch_add(len as u64, Ordering::Relaxed);
        if sync {
            self.sync(handle)?;
        }
        Ok(len)
    }

    /// fsync(2) and fdatasync(2).
    pub fn sync(&self, handle: &Handle) -> Result<()> {
        match handle.disk() {
            Handle::Active(disk) => disk.flush(),
            _ => Ok(()),
        }
    }

    /// close(2): does not flush, as for other files, but returns an earlier write-back error.
    pub fn closing(&self, handle: &Handle) -> Result<()> {
        match handle.disk() {
            Handle::Active(disk) => disk.trouble(),
            _ => Ok(()),
        }
    }

    /// fallocate(2). Without `keep_size`, a shorter disk grows first.
    pub fn fallocate(
        &self,
        handle: &Handle,
        at: u64,
        len: u64,
        what: Fallocate,
        keep_size: bool,
    ) -> Result<()> {
        let end = at
            .checked_add(len)
            .ok_or_else(|| Error::new(ErrorKind::TooLarge, "the range ends beyond the maximum file size"))?;
        if let Handle::Partition(window) = handle {
            if !keep_size && end > window.len {
                return window.set_size(end);
            }
            return match what {
                Fallocate::Zero(zeroing) => window.zero(at, len, zeroing),
                Fallocate::Space => window.allocate(at, len),
            };
        }
        let disk = active(handle)?;
        if !keep_size && end > disk.size()? {
            if what == Fallocate::Space {
                disk.check_room(end)?;
            }
            disk.set_size(end)?;
        }
        match what {
            Fallocate::Zero(zeroing) => disk.zero(at, len, zeroing),
            Fallocate::Space => disk.allocate(at, len),
        }
    }

    /// truncate(2), and ftruncate(2) if there is a handle. `Forbidden` if `size` is less than the present
    /// size.
    pub fn set_size(&self, caller: &Caller, inode: u64, handle: Option<&Handle>, size: u64) -> Result<()> {
        if self.takes_commands(inode)? {
            // A shell's `>` truncates before it writes; control files have no content to truncate.
            return Ok(());
        }
        if let Node::Partition(partition) = self.node(inode)? {
            return set_partition_size(&partition, handle, size);
        }
        let node = self.active_node(inode)?;
        match handle {
            Some(handle) => active(handle)?.set_size(size),
            // open(2) with O_TRUNC does not change a disk, as for a block device.
            None if size == 0 => Ok(()),
            None => {
                self.check_write(caller, &Node::View(node.clone()), &node)?;
                self.open_active(&node, Access::Write)?.set_size(size)
            }
        }
    }

    /// utimes(2): succeeds without effect, because times are those of the image file. touch(1) and `cp -p`
    /// onto an active disk need it.
    pub fn set_times(&self, inode: u64) -> Result<()> {
        if self.takes_commands(inode)? {
            return Ok(());
        }
        self.active_node(inode).map(drop)
    }

    fn takes_commands(&self, inode: u64) -> Result<bool> {
        Ok(matches!(self.node(inode)?, Node::ControlFile(_, file) if file.takes_commands()))
    }

    /// access(2): whether a node may be written or executed.
    pub fn access(&self, inode: u64, write: bool, execute: bool) -> Result<()> {
        let node = self.node(inode)?;
        if write {
            if !self.takes_commands(inode)? {
                self.active_node(inode)?;
            }
            if self.store().options().read_only {
                return Err(read_only());
            }
        }
        // Guests' files keep their execute bits, though the mount does not execute them.
        if execute && node.kind() == Some(NodeKind::File) {
            return Err(Error::new(ErrorKind::Denied, "executing files on this mount is not supported"));
        }
        Ok(())
    }

    fn active_node(&self, inode: u64) -> Result<ViewId> {
        match self.node(inode)? {
            Node::View(view) | Node::Partition(PartitionNode { view, .. }) if view.is_active() => Ok(view),
            _ => Err(read_only()),
        }
    }
}

fn set_partition_size(partition: &PartitionNode, handle: Option<&Handle>, size: u64) -> Result<()> {
    match handle {
        Some(Handle::Partition(window)) => window.set_size(size),
        // open(2) with O_TRUNC.
        None if partition.view.is_active() && (size == 0 || size == partition.len) => Ok(()),
        _ if partition.view.is_active() => {
            Err(Error::new(ErrorKind::Forbidden, "a partition keeps its size; change the partition table"))
        }
        _ => Err(read_only()),
    }
}

fn active(handle: &Handle) -> Result<&Arc<ActiveHandle>> {
    match handle {
        Handle::Active(disk) => Ok(disk),
        _ => Err(read_only()),
    }
}

/// The error for opening a read-only node for writing.
pub(super) fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "only active disks and control files of verbs can be written")
}
