//! Translates the service's replies into those of the protocol. All numbers are in the machine's byte order.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;
use std::time::SystemTime;

use fuse_ring::{Request, ShortReply};

use crate::io::LocalFile;

use super::super::attributes::Attributes;
use super::super::fuse::Backing;
use super::super::node::NodeKind;
use super::super::service::{
    BytesResponder, CacheMode, DirectoryEntry, EntryResponder, Errno, NameResponder, OpenResponder, Opened,
    OpenedDirectory, Responder, STAT_BLOCK_SIZE, ServedBy, Statistics, TimedAttributes, XattrReply,
};

/// `FOPEN_*`: flags of an opened file or directory.
mod open {
    pub(super) const DIRECT_IO: u32 = 1 << 0;
    pub(super) const KEEP_CACHE: u32 = 1 << 1;
    pub(super) const NONSEEKABLE: u32 = 1 << 2;
    pub(super) const CACHE_DIR: u32 = 1 << 3;
    pub(super) const STREAM: u32 = 1 << 4;
    pub(super) const NOFLUSH: u32 = 1 << 5;
    pub(super) const PARALLEL_DIRECT_WRITES: u32 = 1 << 6;
    pub(super) const PASSTHROUGH: u32 = 1 << 7;
}

/// Bytes of the longest structure, `struct fuse_direntplus`.
const LONGEST: usize = 152;
/// Directory entries are aligned to that many bytes.
const ALIGN: usize = 8;

/// The structure of a reply, field by field.
struct Fields {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Fields {
    fn new() -> Self {
        Self { bytes: [0; LONGEST], len: 0 }
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        self.bytes[self.len..][..bytes.len()].copy_from_slice(bytes);
        self.len += bytes.len();
        self
    }

    fn u32(self, value: u32) -> Self {
        self.put(&value.to_ne_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.put(&value.to_ne_bytes())
    }

    /// `struct fuse_attr`.
    fn attributes(self, found: &Attributes) -> Self {
        let [accessed, modified, changed] = [found.accessed, found.modified, found.changed].map(since_epoch);
        self.u64(found.inode)
            .u64(found.size)
            .u64(found.blocks)
            .u64(accessed.0.cast_unsigned())
            .u64(modified.0.cast_unsigned())
            .u64(changed.0.cast_unsigned())
            .u32(accessed.1)
            .u32(modified.1)
            .u32(changed.1)
            .u32(file_type(found.kind) << 12 | u32::from(found.permissions))
            .u32(found.links)
            .u32(found.uid)
            .u32(found.gid)
            .u32(found.device)
            .u32(STAT_BLOCK_SIZE)
            .u32(0)
    }

    /// `struct fuse_entry_out`.
    fn entry(self, found: &TimedAttributes) -> Self {
        self.u64(found.attributes.inode)
            .u64(found.generation.into())
            .u64(found.ttl.as_secs())
            .u64(found.ttl.as_secs())
            .u32(found.ttl.subsec_nanos())
            .u32(found.ttl.subsec_nanos())
            .attributes(&found.attributes)
    }

    /// `struct fuse_open_out`.
    fn opened(self, handle: u64, flags: u32, backing: u32) -> Self {
        self.u64(handle).u32(flags).u32(backing)
    }

    /// `struct fuse_dirent`, without the name.
    fn dirent(self, (inode, next): (u64, u64), kind: NodeKind, name: &OsStr) -> Self {
        self.u64(inode).u64(next).u32(name.len() as u32).u32(file_type(kind))
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// Seconds and nanoseconds since 1970; the seconds of an earlier time are negative.
fn since_epoch(time: SystemTime) -> (i64, u32) {
    let (is_before, distance) = match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => (false, since),
        Err(error) => (true, error.duration()),
    };
    let seconds = i64::try_from(distance.as_secs()).unwrap_or(i64::MAX);
    match (is_before, distance.subsec_nanos()) {
        (false, nanoseconds) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, nanoseconds) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    }
}

/// The type of a file, as in `d_type` and in the upper bits of a mode.
fn file_type(kind: NodeKind) -> u32 {
    match kind {
        NodeKind::Fifo => 1,
        NodeKind::CharDevice => 2,
        NodeKind::Directory => 4,
        NodeKind::BlockDevice => 6,
        NodeKind::File => 8,
        NodeKind::Symlink => 10,
        NodeKind::Socket => 12,
    }
}

/// Sends the bytes of a structure, or an errno.
fn send(request: Request, reply: Result<Fields, Errno>) {
    match reply {
        Ok(fields) => request.finish_with(fields.bytes()),
        Err(errno) => request.finish(Err(errno.raw_os_error())),
    }
}

/// The reply to a lookup.
pub(super) struct EntryReply(pub(super) Request);
/// Attributes.
pub(super) struct AttributesReply(pub(super) Request);
/// A reply without payload.
pub(super) struct EmptyReply(pub(super) Request);
/// An offset.
pub(super) struct OffsetReply(pub(super) Request);
/// The sizes of a file system.
pub(super) struct StatisticsReply(pub(super) Request);
/// The length of a write.
pub(super) struct WriteReply(pub(super) ShortReply);
/// Bytes, which are read into the memory of the request.
pub(super) struct BytesReply(pub(super) Request);
/// An extended attribute, or the names of all.
pub(super) struct XattrsReply(pub(super) Request);

/// An opened file or directory.
pub(super) struct OpenReply {
    pub(super) request: Request,
    /// Where the files are registered that the kernel reads itself.
    pub(super) device: Arc<OwnedFd>,
}

impl Responder<TimedAttributes> for EntryReply {
    fn may_wait(&self) -> bool {
        self.0.may_wait()
    }

    fn finish(self, reply: Result<TimedAttributes, Errno>) {
        send(self.0, reply.map(|found| Fields::new().entry(&found)));
    }
}

impl Responder<TimedAttributes> for AttributesReply {
    fn may_wait(&self) -> bool {
        self.0.may_wait()
    }

    fn finish(self, reply: Result<TimedAttributes, Errno>) {
        // `struct fuse_attr_out`.
        let fields = reply.map(|found| {
            let TimedAttributes { attributes, ttl, .. } = found;
            Fields::new().u64(ttl.as_secs()).u32(ttl.subsec_nanos()).u32(0).attributes(&attributes)
        });
        send(self.0, fields);
    }
}

impl Responder<()> for EmptyReply {
    fn may_wait(&self) -> bool {
        self.0.may_wait()
    }

    fn finish(self, reply: Result<(), Errno>) {
        send(self.0, reply.map(|()| Fields::new()));
    }
}

impl Responder<u64> for OffsetReply {
    fn may_wait(&self) -> bool {
        self.0.may_wait()
    }

    fn finish(self, reply: Result<u64, Errno>) {
        send(self.0, reply.map(|at| Fields::new().u64(at)));
    }
}

impl Responder<Statistics> for StatisticsReply {
    fn finish(self, reply: Result<Statistics, Errno>) {
        // `struct fuse_kstatfs`; what follows is reserved.
        let fields = reply.map(|found| {
            Fields::new()
                .u64(found.blocks)
                .u64(found.free_blocks)
                .u64(found.available_blocks)
                .u64(found.inodes)
                .u64(found.free_inodes)
                .u32(found.block_size)
                .u32(found.name_len)
                .u32(found.fragment_size)
                .put(&[0; 28])
        });
        send(self.0, fields);
    }
}

impl Responder<usize> for WriteReply {
    fn finish(self, reply: Result<usize, Errno>) {
        // `struct fuse_write_out`.
        let fields = reply.map(|len| Fields::new().u32(len as u32).u32(0));
        self.0.finish(fields.as_ref().map(Fields::bytes).map_err(|errno| errno.raw_os_error()));
    }
}

impl BytesResponder for BytesReply {
    fn buffer(&mut self, len: usize) -> &mut [u8] {
        &mut self.0.buffer()[..len]
    }
}

impl Responder<usize> for BytesReply {
    fn may_wait(&self) -> bool {
        self.0.may_wait()
    }

    fn finish(self, reply: Result<usize, Errno>) {
        self.0.finish(reply.map_err(Errno::raw_os_error));
    }
}

impl Responder<Vec<u8>> for BytesReply {
    fn may_wait(&self) -> bool {
        self.0.may_wait()
    }

    fn finish(self, reply: Result<Vec<u8>, Errno>) {
        match reply {
            Ok(bytes) => self.0.finish_with(&bytes),
            Err(errno) => self.0.finish(Err(errno.raw_os_error())),
        }
    }
}

impl Responder<XattrReply> for XattrsReply {
    fn may_wait(&self) -> bool {
        self.0.may_wait()
    }

    fn finish(self, reply: Result<XattrReply, Errno>) {
        match reply {
            // `struct fuse_getxattr_out`.
            Ok(XattrReply::Size(len)) => send(self.0, Ok(Fields::new().u32(len).u32(0))),
            Ok(XattrReply::Bytes(bytes)) => self.0.finish_with(&bytes),
            Err(errno) => send(self.0, Err(errno)),
        }
    }
}

impl Responder<OpenedDirectory> for OpenReply {
    fn may_wait(&self) -> bool {
        self.request.may_wait()
    }

    fn finish(self, reply: Result<OpenedDirectory, Errno>) {
        let fields = reply.map(|OpenedDirectory { handle, is_immutable }| {
            let flags = if is_immutable { open::KEEP_CACHE | open::CACHE_DIR } else { 0 };
            Fields::new().opened(handle, flags, 0)
        });
        send(self.request, fields);
    }
}

impl OpenResponder<Backing> for OpenReply {
    fn register(&mut self, file: LocalFile) -> io::Result<Backing> {
        fuse_ring::Backing::open(&self.device, file).map(Backing::Ring)
    }
}

impl Responder<Opened<Backing>> for OpenReply {
    fn may_wait(&self) -> bool {
        self.request.may_wait()
    }

    fn finish(self, reply: Result<Opened<Backing>, Errno>) {
        let fields = reply.and_then(|Opened { handle, served_by }| {
            let (flags, backing) = match &served_by {
                ServedBy::Daemon(mode) => (flags(*mode), 0),
                ServedBy::Passthrough(backing) => (open::PASSTHROUGH, number(backing)?),
                ServedBy::BesidePassthrough(backing) => {
                    (open::PASSTHROUGH | open::DIRECT_IO, number(backing)?)
                }
            };
            Ok(Fields::new().opened(handle, flags, backing))
        });
        send(self.request, fields);
    }
}

fn number(backing: &Backing) -> Result<u32, Errno> {
    match backing {
        Backing::Ring(backing) => Ok(backing.id()),
        // All opens come over io_uring, or none.
        Backing::Fuser(_) => Err(Errno::IO),
    }
}

fn flags(mode: CacheMode) -> u32 {
    match mode {
        CacheMode::Direct => open::DIRECT_IO,
        CacheMode::DirectParallel => open::DIRECT_IO | open::PARALLEL_DIRECT_WRITES,
        CacheMode::Stream => open::DIRECT_IO | open::NONSEEKABLE | open::STREAM,
        CacheMode::Cached => 0,
        CacheMode::KeepCache => open::KEEP_CACHE,
        CacheMode::Immutable => open::KEEP_CACHE | open::NOFLUSH,
    }
}

/// Entries of a directory, put one after the other into the memory of the request.
struct Listing {
    request: Request,
    /// The length that the client has room for.
    room: usize,
    len: usize,
}

impl Listing {
    fn new(mut request: Request, size: u32) -> Self {
        let room = (size as usize).min(request.buffer().len());
        Self { request, room, len: 0 }
    }

    /// Adds a structure that ends with a name. `true`: there is no room for it.
    fn add(&mut self, fields: &Fields, name: &OsStr) -> bool {
        let (head, name) = (fields.bytes(), name.as_bytes());
        let len = head.len() + name.len();
        let padded = len.next_multiple_of(ALIGN);
        if self.len + padded > self.room {
            return true;
        }
        let place = &mut self.request.buffer()[self.len..][..padded];
        place[..head.len()].copy_from_slice(head);
        place[head.len()..len].copy_from_slice(name);
        place[len..].fill(0);
        self.len += padded;
        false
    }

    fn finish(self, reply: Result<(), Errno>) {
        self.request.finish(reply.map(|()| self.len).map_err(Errno::raw_os_error));
    }
}

/// A listing of names.
pub(super) struct NamesReply(Listing);

impl NamesReply {
    pub(super) fn new(request: Request, size: u32) -> Self {
        Self(Listing::new(request, size))
    }
}

impl NameResponder for NamesReply {
    fn add(&mut self, entry: &DirectoryEntry<'_>) -> bool {
        let DirectoryEntry { name, inode, kind, next } = *entry;
        self.0.add(&Fields::new().dirent((inode, next), kind, name), name)
    }
}

impl Responder<()> for NamesReply {
    fn may_wait(&self) -> bool {
        self.0.request.may_wait()
    }

    fn finish(self, reply: Result<(), Errno>) {
        self.0.finish(reply);
    }
}

/// A listing with attributes.
pub(super) struct EntriesReply(Listing);

impl EntriesReply {
    pub(super) fn new(request: Request, size: u32) -> Self {
        Self(Listing::new(request, size))
    }
}

impl EntryResponder for EntriesReply {
    fn add(&mut self, entry: &DirectoryEntry<'_>, found: &TimedAttributes) -> bool {
        // `struct fuse_direntplus`.
        let DirectoryEntry { name, next, .. } = *entry;
        let found_at = (found.attributes.inode, next);
        let fields = Fields::new().entry(found).dirent(found_at, found.attributes.kind, name);
        self.0.add(&fields, name)
    }
}

impl Responder<()> for EntriesReply {
    fn may_wait(&self) -> bool {
        self.0.request.may_wait()
    }

    fn finish(self, reply: Result<(), Errno>) {
        self.0.finish(reply);
    }
}
