//! What changes a disk: writing, flushing, zeroing, growing.
//!
//! Only active disks can be changed, and of the tree itself nothing can: an active disk behaves as
//! a block device does, which nobody makes shorter by opening it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::error::{Error, ErrorKind, Result};
use crate::image::write::Zeroing;
use crate::store::{Access, ActiveHandle, ViewId};

use super::access::Caller;
use super::handles::Handle;
use super::node::{Node, NodeKind, PartitionNode};
use super::tree::MountTree;

/// What fallocate(2) asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// The range reads as zeroes.
    Zero(Zeroing),
    /// The range has its space.
    Space,
}

impl MountTree {
    /// Writes what there is room for before the end of the disk, and returns how much that is.
    /// `sync`: it is durable then. To a control file: gives one command, which may take its time.
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

    /// close(2): nothing is flushed, as for any file, but trouble of the past is told of.
    pub fn closing(&self, handle: &Handle) -> Result<()> {
        match handle.disk() {
            Handle::Active(disk) => disk.trouble(),
            _ => Ok(()),
        }
    }

    /// fallocate(2). Not `keep_size`: a disk that is shorter grows first.
    pub fn fallocate(&self, handle: &Handle, at: u64, len: u64, what: Fallocate, keep_size: bool) -> Result<()> {
        let end = at
            .checked_add(len)
            .ok_or_else(|| Error::new(ErrorKind::TooLarge, "no file is as large as this range reaches"))?;
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

    /// truncate(2), and ftruncate(2) if there is a handle. `Forbidden` if that is less than now.
    pub fn set_size(&self, caller: &Caller, inode: u64, handle: Option<&Handle>, size: u64) -> Result<()> {
        if self.takes_commands(inode)? {
            // `>` cuts a file before it writes; here nothing is kept that could be cut.
            return Ok(());
        }
        if let Node::Partition(partition) = self.node(inode)? {
            return set_partition_size(&partition, handle, size);
        }
        let node = self.active_node(inode)?;
        match handle {
            Some(handle) => active(handle)?.set_size(size),
            // open(2) with O_TRUNC, which changes a disk no more than it does a block device.
            None if size == 0 => Ok(()),
            None => {
                self.check_write(caller, &node)?;
                self.open_active(&node, Access::Write)?.set_size(size)
            }
        }
    }

    /// utimes(2): times are those of the image file, so this is taken and nothing comes of it; touch(1)
    /// and cp -p of an active disk are to work.
    pub fn set_times(&self, inode: u64) -> Result<()> {
        if self.takes_commands(inode)? {
            return Ok(());
        }
        self.active_node(inode).map(drop)
    }

    fn takes_commands(&self, inode: u64) -> Result<bool> {
        Ok(matches!(self.node(inode)?, Node::ControlFile(_, file) if file.takes_commands()))
    }

    /// access(2): whether something may be written or run, as opening it would find.
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
        // A guest's programs are the guest's: the mount does not let them run, but they are what they are.
        if execute && node.kind() == Some(NodeKind::File) {
            return Err(Error::new(ErrorKind::Denied, "a file of the mount is not a program"));
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

/// Why most of the tree cannot be opened to be written.
pub(super) fn read_only() -> Error {
    Error::new(ErrorKind::ReadOnly, "only active disks and control files of verbs can be written")
}
