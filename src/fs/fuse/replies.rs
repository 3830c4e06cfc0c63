//! What the kernel is told, in its own words: attributes, kinds, and for how long to believe them.

use std::time::{Duration, SystemTime};

use fuser::{Errno, FileAttr, FileType, INodeNo, ReplyXattr, Request};

use super::super::access::Caller;
use super::super::attributes::Attributes;
use super::super::node::NodeKind;
use super::super::tree::MountTree;

/// For how long the kernel believes a name or an attribute. Changes of the store are noticed
/// within a second; this is their larger part.
const BELIEF: Duration = Duration::from_millis(500);
/// The same for guests' files.
const GUEST_BELIEF: Duration = Duration::from_hours(1);

/// An extended attribute, or their names: as large as there is room for, or how large it is if no room is offered.
pub(super) fn give(reply: ReplyXattr, room: u32, bytes: &[u8]) {
    match room as usize {
        0 => reply.size(bytes.len() as u32),
        room if bytes.len() > room => reply.error(Errno::ERANGE),
        _ => reply.data(bytes),
    }
}

/// Who asks.
pub(super) fn caller(request: &Request) -> Caller {
    Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() }
}

pub(super) fn file_type(kind: NodeKind) -> FileType {
    match kind {
        NodeKind::Directory => FileType::Directory,
        NodeKind::File => FileType::RegularFile,
        NodeKind::Symlink => FileType::Symlink,
        NodeKind::CharDevice => FileType::CharDevice,
        NodeKind::BlockDevice => FileType::BlockDevice,
        NodeKind::Fifo => FileType::NamedPipe,
        NodeKind::Socket => FileType::Socket,
    }
}

/// For how long the kernel believes what it was told of `found` when it asked `by`, the directory or the thing itself. What commands change
/// is asked for each time: who has resized a disk, or reverted it, looks at it next.
pub(super) fn belief(tree: &MountTree, by: u64, found: &Attributes) -> Duration {
    // What a guest's number stands for never changes, and what it leads to does not; what leads to it does, and is
    // believed for a moment only.
    if MountTree::is_guest(by) {
        return GUEST_BELIEF;
    }
    let is_written = found.kind == NodeKind::File && found.permissions & 0o222 != 0;
    // Nor is one user told what another has found.
    if is_written || tree.asks_who(found.inode) { Duration::ZERO } else { BELIEF }
}

pub(super) fn attr(found: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(found.inode),
        size: found.size,
        blocks: found.blocks,
        atime: found.accessed,
        mtime: found.modified,
        ctime: found.changed,
        crtime: SystemTime::UNIX_EPOCH,
        kind: file_type(found.kind),
        perm: found.permissions,
        nlink: found.links,
        uid: found.uid,
        gid: found.gid,
        rdev: found.device,
        blksize: 65_536,
        flags: 0,
    }
}
