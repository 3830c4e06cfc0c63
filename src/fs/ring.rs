//! The transport over `io_uring`: translates the kernel's requests into calls of the [`Service`]. It decides
//! nothing, and knows nothing of rings: those are of the crate `fuse_ring`.
//!
//! It stands beside `fuse`, which has the connection, replies to INIT, and takes forgotten inodes. A request
//! that this module does not know fails with ENOSYS, as there.

mod replies;

use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use fuse_ring::{Handler, Header, Request};

use super::access::Caller;
use super::fuse::Backing;
use super::service::{AttributeChange, Call, Errno, OpenFile, Service, Write};

use replies::{
    AttributesReply, BytesReply, EmptyReply, EntriesReply, EntryReply, NamesReply, OffsetReply, OpenReply,
    StatisticsReply, WriteReply, XattrsReply,
};

/// Opcodes of the protocol.
mod opcode {
    pub(super) const LOOKUP: u32 = 1;
    pub(super) const GETATTR: u32 = 3;
    pub(super) const SETATTR: u32 = 4;
    pub(super) const READLINK: u32 = 5;
    pub(super) const SYMLINK: u32 = 6;
    pub(super) const MKNOD: u32 = 8;
    pub(super) const MKDIR: u32 = 9;
    pub(super) const UNLINK: u32 = 10;
    pub(super) const RMDIR: u32 = 11;
    pub(super) const RENAME: u32 = 12;
    pub(super) const LINK: u32 = 13;
    pub(super) const OPEN: u32 = 14;
    pub(super) const READ: u32 = 15;
    pub(super) const WRITE: u32 = 16;
    pub(super) const STATFS: u32 = 17;
    pub(super) const RELEASE: u32 = 18;
    pub(super) const FSYNC: u32 = 20;
    pub(super) const SETXATTR: u32 = 21;
    pub(super) const GETXATTR: u32 = 22;
    pub(super) const LISTXATTR: u32 = 23;
    pub(super) const REMOVEXATTR: u32 = 24;
    pub(super) const FLUSH: u32 = 25;
    pub(super) const OPENDIR: u32 = 27;
    pub(super) const READDIR: u32 = 28;
    pub(super) const RELEASEDIR: u32 = 29;
    pub(super) const ACCESS: u32 = 34;
    pub(super) const CREATE: u32 = 35;
    pub(super) const DESTROY: u32 = 38;
    pub(super) const FALLOCATE: u32 = 43;
    pub(super) const READDIRPLUS: u32 = 44;
    pub(super) const RENAME2: u32 = 45;
    pub(super) const LSEEK: u32 = 46;
}

/// Bits of `fuse_setattr_in.valid`.
mod change {
    pub(super) const MODE: u32 = 1 << 0;
    pub(super) const UID: u32 = 1 << 1;
    pub(super) const GID: u32 = 1 << 2;
    pub(super) const SIZE: u32 = 1 << 3;
    pub(super) const HANDLE: u32 = 1 << 6;
}

/// `FUSE_WRITE_CACHE` of `fuse_write_in.write_flags`.
const WRITE_BACK: u32 = 1 << 0;

/// Takes the requests of one connection.
pub(super) struct RingTransport {
    service: Arc<Service<Backing>>,
    device: Arc<OwnedFd>,
}

impl RingTransport {
    pub(super) fn new(service: &Arc<Service<Backing>>, device: &Arc<OwnedFd>) -> Self {
        Self { service: Arc::clone(service), device: Arc::clone(device) }
    }
}

impl Handler for RingTransport {
    fn handle(&self, request: Request) {
        // A request that is too short for its opcode is one of no protocol that this module knows.
        self.call(request).unwrap_or_else(|request| request.finish(Err(Errno::NOSYS.raw_os_error())));
    }
}

/// The arguments of a request, in the order of its structure.
struct Arguments<'a>(&'a [u8]);

impl Arguments<'_> {
    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(*self.0[at..].first_chunk().expect("all structures are shorter"))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(*self.0[at..].first_chunk().expect("all structures are shorter"))
    }
}

/// The first name of a payload, and what follows it.
fn name(payload: &[u8]) -> Option<(&OsStr, &[u8])> {
    let len = payload.iter().position(|byte| *byte == 0)?;
    Some((OsStr::from_bytes(&payload[..len]), &payload[len + 1..]))
}

fn call(header: &Header) -> Call {
    let caller = Caller { uid: header.uid, gid: header.gid, pid: header.pid };
    Call { inode: header.inode, caller }
}

impl RingTransport {
    /// Makes the call of a request. Gives it back if it is none.
    fn call(&self, request: Request) -> Result<(), Request> {
        let service = &self.service;
        let header = request.header();
        let call = call(&header);
        let arguments = Arguments(request.arguments());
        // All structures of open files begin with the number of the handle.
        let file = OpenFile { inode: header.inode, handle: arguments.u64(0) };
        match header.opcode {
            opcode::LOOKUP => {
                let Some(name) = name(request.payload()).map(|(name, _)| name.to_owned()) else {
                    return Err(request);
                };
                service.lookup(call, &name, EntryReply(request));
            }
            opcode::GETATTR => service.attributes(call, AttributesReply(request)),
            opcode::SETATTR => {
                let valid = arguments.u32(0);
                let has = |bit: u32| valid & bit != 0;
                let change = AttributeChange {
                    changes_mode: has(change::MODE),
                    uid: has(change::UID).then(|| arguments.u32(76)),
                    gid: has(change::GID).then(|| arguments.u32(80)),
                    size: has(change::SIZE).then(|| arguments.u64(16)),
                    handle: has(change::HANDLE).then(|| arguments.u64(8)),
                };
                service.set_attributes(call, change, AttributesReply(request));
            }
            opcode::READLINK => service.read_link(call, BytesReply(request)),
            opcode::ACCESS => {
                let mask = arguments.u32(0).cast_signed();
                service.access(call, mask, EmptyReply(request));
            }
            opcode::OPEN => {
                let flags = arguments.u32(0).cast_signed();
                let device = Arc::clone(&self.device);
                service.open(call, flags, OpenReply { request, device });
            }
            opcode::READ => {
                let (offset, size) = (arguments.u64(8), arguments.u32(16));
                service.read(file, offset, size, BytesReply(request));
            }
            opcode::WRITE => {
                let (offset, size) = (arguments.u64(8), arguments.u32(16) as usize);
                let is_write_back = arguments.u32(20) & WRITE_BACK != 0;
                let flags = arguments.u32(32).cast_signed();
                let (payload, reply) = request.split();
                let bytes = &payload.bytes()[..size.min(payload.bytes().len())];
                service.write(file, Write { offset, bytes, flags, is_write_back }, WriteReply(reply));
            }
            opcode::LSEEK => {
                let (offset, whence) = (arguments.u64(8).cast_signed(), arguments.u32(16).cast_signed());
                service.seek(file, offset, whence, OffsetReply(request));
            }
            opcode::FALLOCATE => {
                let (offset, len) = (arguments.u64(8), arguments.u64(16));
                let mode = arguments.u32(24).cast_signed();
                service.fallocate(file, (offset, len), mode, EmptyReply(request));
            }
            opcode::FLUSH => service.flush(file, EmptyReply(request)),
            opcode::FSYNC => service.sync(file, EmptyReply(request)),
            opcode::RELEASE | opcode::RELEASEDIR => service.release(file, EmptyReply(request)),
            opcode::STATFS => service.statistics(call, StatisticsReply(request)),
            opcode::OPENDIR => {
                let device = Arc::clone(&self.device);
                service.open_directory(call, OpenReply { request, device });
            }
            opcode::READDIR => {
                let (offset, size) = (arguments.u64(8), arguments.u32(16));
                service.list(file, offset, NamesReply::new(request, size));
            }
            opcode::READDIRPLUS => {
                let (offset, size) = (arguments.u64(8), arguments.u32(16));
                service.list_with_attributes(call, file.handle, offset, EntriesReply::new(request, size));
            }
            opcode::GETXATTR => {
                let room = arguments.u32(0);
                let Some(name) = name(request.payload()).map(|(name, _)| name.to_owned()) else {
                    return Err(request);
                };
                service.extended_attribute(call, &name, room, XattrsReply(request));
            }
            opcode::LISTXATTR => {
                let room = arguments.u32(0);
                service.extended_attributes(call, room, XattrsReply(request));
            }
            opcode::SETXATTR => {
                let (size, flags) = (arguments.u32(0) as usize, arguments.u32(4).cast_signed());
                let pair = name(request.payload()).and_then(|(name, rest)| Some((name, rest.get(..size)?)));
                let Some((name, value)) = pair.map(|(name, value)| (name.to_owned(), value.to_vec())) else {
                    return Err(request);
                };
                service.set_extended_attribute(call, (&name, &value), flags, EmptyReply(request));
            }
            opcode::REMOVEXATTR => {
                let Some(name) = name(request.payload()).map(|(name, _)| name.to_owned()) else {
                    return Err(request);
                };
                service.remove_extended_attribute(call, &name, EmptyReply(request));
            }
            opcode::SYMLINK
            | opcode::MKNOD
            | opcode::MKDIR
            | opcode::UNLINK
            | opcode::RMDIR
            | opcode::RENAME
            | opcode::RENAME2
            | opcode::LINK
            | opcode::CREATE => service.change_names(EmptyReply(request)),
            opcode::DESTROY => request.finish(Ok(0)),
            _ => return Err(request),
        }
        Ok(())
    }
}
