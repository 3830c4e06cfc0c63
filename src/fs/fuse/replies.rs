//! Translates the service's replies into fuser's.

use std::cell::RefCell;
use std::convert::Infallible;
use std::io;
use std::time::SystemTime;

use fuser::{
    FileAttr, FileHandle, FileType, FopenFlags, Generation, INodeNo, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs,
    ReplyWrite, ReplyXattr,
};

use crate::io::LocalFile;

use super::super::node::NodeKind;
use super::super::service::{
    BytesResponder, CacheMode, DirectoryEntry, EntryResponder, Errno, NameResponder, OpenResponder, Opened,
    OpenedDirectory, Responder, STAT_BLOCK_SIZE, ServedBy, Statistics, TimedAttributes, XattrReply,
};
use super::Backing;

thread_local! {
    /// The read buffer of a serving thread; it grows to the largest request.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A reply of bytes, read into the buffer of the serving thread.
pub(super) struct BufferedData {
    reply: ReplyData,
    /// The thread's buffer, while it is in use.
    buffer: Vec<u8>,
}

impl BufferedData {
    pub(super) fn new(reply: ReplyData) -> Self {
        Self { reply, buffer: Vec::new() }
    }
}

impl BytesResponder for BufferedData {
    fn buffer(&mut self, len: usize) -> &mut [u8] {
        if self.buffer.is_empty() {
            self.buffer = BUFFER.take();
        }
        if self.buffer.len() < len {
            self.buffer.resize(len, 0);
        }
        &mut self.buffer[..len]
    }
}

impl Responder<usize> for BufferedData {
    fn finish(self, reply: Result<usize, Errno>) {
        match reply {
            Ok(len) => self.reply.data(&self.buffer[..len]),
            Err(errno) => self.reply.error(number(errno)),
        }
        if !self.buffer.is_empty() {
            BUFFER.set(self.buffer);
        }
    }
}

/// The reply of an opened directory; [`ReplyOpen`] itself is that of a file.
pub(super) struct OpenDirectoryReply(pub(super) ReplyOpen);

impl Responder<OpenedDirectory> for OpenDirectoryReply {
    fn finish(self, reply: Result<OpenedDirectory, Errno>) {
        match reply {
            Ok(OpenedDirectory { handle, is_immutable }) => {
                let flags = if is_immutable {
                    FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR
                } else {
                    FopenFlags::empty()
                };
                self.0.opened(FileHandle(handle), flags);
            }
            Err(errno) => self.0.error(number(errno)),
        }
    }
}

impl OpenResponder<Backing> for ReplyOpen {
    fn register(&mut self, file: LocalFile) -> io::Result<Backing> {
        self.open_backing(file).map(Backing::Fuser)
    }
}

impl Responder<Opened<Backing>> for ReplyOpen {
    fn finish(self, reply: Result<Opened<Backing>, Errno>) {
        match reply {
            Ok(Opened { handle, served_by: ServedBy::Passthrough(backing) }) => {
                passthrough(self, handle, FopenFlags::empty(), &backing);
            }
            Ok(Opened { handle, served_by: ServedBy::BesidePassthrough(backing) }) => {
                passthrough(self, handle, FopenFlags::FOPEN_DIRECT_IO, &backing);
            }
            Ok(Opened { handle, served_by: ServedBy::Daemon(mode) }) => {
                self.opened(FileHandle(handle), flags(mode));
            }
            Err(errno) => self.error(number(errno)),
        }
    }
}

fn passthrough(reply: ReplyOpen, handle: u64, flags: FopenFlags, backing: &Backing) {
    match backing {
        Backing::Fuser(backing) => reply.opened_passthrough(FileHandle(handle), flags, backing),
        // All opens come over io_uring, or none.
        Backing::Ring(_) => reply.error(fuser::Errno::EIO),
    }
}

fn flags(mode: CacheMode) -> FopenFlags {
    match mode {
        CacheMode::Direct => FopenFlags::FOPEN_DIRECT_IO,
        CacheMode::DirectParallel => FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES,
        CacheMode::Stream => {
            FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NONSEEKABLE | FopenFlags::FOPEN_STREAM
        }
        CacheMode::Cached => FopenFlags::empty(),
        CacheMode::KeepCache => FopenFlags::FOPEN_KEEP_CACHE,
        CacheMode::Immutable => FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
    }
}

/// Sends a reply, or its errno.
macro_rules! responder {
    ($reply:ty, $value:ty, |$own:ident, $found:pat_param| $send:expr) => {
        impl Responder<$value> for $reply {
            fn finish(self, reply: Result<$value, Errno>) {
                let $own = self;
                match reply {
                    Ok($found) => $send,
                    Err(errno) => $own.error(number(errno)),
                }
            }
        }
    };
}

responder!(ReplyEntry, TimedAttributes, |reply, found| {
    reply.entry(&found.ttl, &attributes(&found), Generation(found.generation.into()));
});
responder!(ReplyAttr, TimedAttributes, |reply, found| reply.attr(&found.ttl, &attributes(&found)));
responder!(ReplyData, Vec<u8>, |reply, bytes| reply.data(&bytes));
responder!(ReplyEmpty, (), |reply, ()| reply.ok());
responder!(ReplyCreate, Infallible, |reply, never| match never {});
responder!(ReplyWrite, usize, |reply, len| reply.written(len as u32));
responder!(ReplyLseek, u64, |reply, at| reply.offset(at.cast_signed()));
responder!(ReplyDirectory, (), |reply, ()| reply.ok());
responder!(ReplyDirectoryPlus, (), |reply, ()| reply.ok());
responder!(ReplyXattr, XattrReply, |reply, found| match found {
    XattrReply::Size(len) => reply.size(len),
    XattrReply::Bytes(bytes) => reply.data(&bytes),
});
responder!(ReplyStatfs, Statistics, |reply, found| {
    reply.statfs(
        found.blocks,
        found.free_blocks,
        found.available_blocks,
        found.inodes,
        found.free_inodes,
        found.block_size,
        found.name_len,
        found.fragment_size,
    );
});

impl NameResponder for ReplyDirectory {
    fn add(&mut self, entry: &DirectoryEntry<'_>) -> bool {
        let DirectoryEntry { name, inode, kind, next } = *entry;
        ReplyDirectory::add(self, INodeNo(inode), next, file_type(kind), name)
    }
}

impl EntryResponder for ReplyDirectoryPlus {
    fn add(&mut self, entry: &DirectoryEntry<'_>, found: &TimedAttributes) -> bool {
        let DirectoryEntry { name, inode, next, .. } = *entry;
        let (ttl, generation) = (found.ttl, Generation(found.generation.into()));
        ReplyDirectoryPlus::add(self, INodeNo(inode), next, name, &ttl, &attributes(found), generation)
    }
}

fn number(errno: Errno) -> fuser::Errno {
    fuser::Errno::from_i32(errno.raw_os_error())
}

fn file_type(kind: NodeKind) -> FileType {
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

fn attributes(found: &TimedAttributes) -> FileAttr {
    let found = &found.attributes;
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
        blksize: STAT_BLOCK_SIZE,
        flags: 0,
    }
}
