//! Conversions to FUSE's types: attributes, file types and TTLs.

use std::time::{Duration, SystemTime};

use fuser::{Errno, FileAttr, FileType, INodeNo, ReplyXattr, Request};

use super::super::access::Caller;
use super::super::attributes::Attributes;
use super::super::node::NodeKind;
use super::super::tree::MountTree;

/// TTL of names and attributes. Changes of the store become visible within a second; this TTL is the larger
/// part of it.
const TTL: Duration = Duration::from_millis(500);
/// TTL of guests' files.
const GUEST_TTL: Duration = Duration::from_hours(1);

/// Replies with an extended attribute, or a list of names; with the size alone if `room` is 0.
pub(super) fn reply_xattr(reply: ReplyXattr, room: u32, bytes: &[u8]) {
    match room as usize {
        0 => reply.size(bytes.len() as u32),
        room if bytes.len() > room => reply.error(Errno::ERANGE),
        _ => reply.data(bytes),
    }
}

/// The client of a request.
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

/// The TTL of `found` in a reply about `by`, the parent directory or the node itself. Writable files have
/// none, because commands change them: after a resize or revert, the client must see the new attributes.
pub(super) fn ttl(tree: &MountTree, by: u64, found: &Attributes) -> Duration {
    // A guest's inode never changes, nor do the entries of its directories. The entry of a volume's root can
    // change, and has the short TTL.
    if MountTree::is_guest(by) {
        return GUEST_TTL;
    }
    let is_written = found.kind == NodeKind::File && found.permissions & 0o222 != 0;
    // A result that depends on the caller must not be cached for other users.
    if is_written || tree.depends_on_caller(found.inode) { Duration::ZERO } else { TTL }
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
