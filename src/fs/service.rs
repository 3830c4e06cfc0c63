//! The service: what a transport may call, and what it gets back, in plain types.
//!
//! A transport translates: requests into calls, and replies into its own form. It decides nothing, so that
//! each transport behaves the same. What the service decides has one place each:
//!
//! - `threads`: which thread serves a call;
//! - `errno`: the number of each failure;
//! - `opening`: who serves the bytes of an open file, and what the kernel may keep of them;
//! - `replies`: how long names and attributes stay valid;
//! - `listing`: the offsets of directory entries.
//!
//! Each call is answered once: its [`Responder`] is consumed by [`Responder::finish`], also after a panic.

mod busy_retries;
mod calls;
mod errno;
mod features;
mod listing;
mod opening;
mod replies;
mod threads;

use std::ffi::OsStr;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;

use crate::error::{Error, ErrorKind};
use crate::image::write::Zeroing;
use crate::store::Access;
use crate::units::BlockStatus;

use super::attributes::Attributes;
use super::change::Fallocate;
use super::disk_labels::SetMode;
use super::handles::Handle;
use super::tree::MountTree;

pub use super::attributes::Statistics;
pub use calls::{AttributeChange, Call, OpenFile, Write};
pub use errno::{Errno, errno};
pub use features::{Capability, Features, MAX_BACKGROUND, MAX_REQUEST, RING_THREADS};
pub use opening::{CacheMode, Opened, OpenedDirectory, ServedBy};
pub use replies::{
    BytesResponder, DirectoryEntry, EntryResponder, NameResponder, OpenResponder, Responder, STAT_BLOCK_SIZE,
    TimedAttributes, XattrReply,
};

use busy_retries::BusyRetries;
use errno::{Failure, Refusal};
use listing::ListedNode;
use opening::Opens;
use replies::ttl;
use threads::Operation;

/// The calls that a transport makes. `B`: the transport's registration of a file that the kernel reads
/// itself.
pub struct Service<B> {
    tree: Arc<MountTree>,
    features: Features,
    opens: Opens<B>,
    busy_retries: BusyRetries,
    /// Serving threads that may be waiting for a worker.
    waiting: AtomicUsize,
}

impl<B: Send + Sync + 'static> Service<B> {
    /// Serves `tree`.
    pub fn new(tree: &Arc<MountTree>, features: Features) -> Arc<Self> {
        Arc::new(Self {
            tree: Arc::clone(tree),
            features,
            opens: Opens::new(features, tree.store(), tree.kernel_maps().cloned()),
            busy_retries: BusyRetries::default(),
            waiting: AtomicUsize::new(0),
        })
    }

    /// The capabilities to ask the kernel for.
    pub fn capabilities(&self) -> impl Iterator<Item = Capability> {
        self.features.capabilities()
    }

    /// The kernel does not have a capability that was asked for.
    pub fn lacks(&self, capability: Capability) {
        if matches!(capability, Capability::Passthrough { .. }) {
            self.opens.without_passthrough();
        }
    }

    /// Whether the kernel reads registered files itself, as far as is known.
    pub fn has_passthrough(&self) -> bool {
        self.opens.has_passthrough()
    }

    /// The mount has ended: answers all waiting calls, flushes and closes all files, and releases all locks.
    pub fn close(&self) {
        self.tree.close();
    }

    /// Looks up a name. A found node counts as known to the kernel until [`Service::forget`].
    pub fn lookup(self: &Arc<Self>, call: Call, name: &OsStr, reply: impl Responder<TimedAttributes>) {
        let name = name.to_owned();
        self.serve(Operation::Lookup, call.inode, reply, move |service, _| {
            let found = service.tree.lookup(&call.caller, call.inode, &name)?;
            service.tree.add_lookup(found.inode);
            Ok(service.timed(call.inode, found))
        });
    }

    /// The kernel forgets `times` lookups of a node.
    pub fn forget(&self, inode: u64, times: u64) {
        self.tree.forget(inode, times);
    }

    /// stat(2).
    pub fn attributes(self: &Arc<Self>, call: Call, reply: impl Responder<TimedAttributes>) {
        self.serve(Operation::Attributes, call.inode, reply, move |service, _| {
            let found = service.tree.attributes(&call.caller, call.inode)?;
            Ok(service.timed(call.inode, found))
        });
    }

    /// Changes the attributes that can be changed: the size of an active disk, and the owner of a disk.
    pub fn set_attributes(
        self: &Arc<Self>,
        call: Call,
        change: AttributeChange,
        reply: impl Responder<TimedAttributes>,
    ) {
        self.serve(Operation::SetAttributes, call.inode, reply, move |service, _| {
            let tree = &service.tree;
            if change.changes_mode {
                let fact = "the mode is that of the image file; change it in the store";
                return Err(Error::new(ErrorKind::Forbidden, fact).into());
            }
            let owner = (change.uid, change.gid);
            if owner != (None, None) {
                tree.set_owner(&call.caller, call.inode, owner)?;
            }
            match change.size {
                Some(size) => {
                    let handle = change.handle.map(|handle| tree.handle(handle)).transpose()?;
                    tree.set_size(&call.caller, call.inode, handle.as_ref(), size)?;
                }
                None if owner == (None, None) => tree.set_times(call.inode)?,
                None => {}
            }
            Ok(service.timed(call.inode, tree.attributes(&call.caller, call.inode)?))
        });
    }

    /// access(2) with the bits `W_OK` and `X_OK` of `mask`. Called only if the kernel does not enforce modes:
    /// without `allow_other`, for the mounting user.
    pub fn access(self: &Arc<Self>, call: Call, mask: i32, reply: impl Responder<()>) {
        self.serve(Operation::Access, call.inode, reply, move |service, _| {
            Ok(service.tree.access(call.inode, mask & libc::W_OK != 0, mask & libc::X_OK != 0)?)
        });
    }

    /// readlink(2).
    pub fn read_link(self: &Arc<Self>, call: Call, reply: impl Responder<Vec<u8>>) {
        self.serve(Operation::ReadLink, call.inode, reply, move |service, _| {
            Ok(service.tree.read_link(call.inode)?)
        });
    }

    /// open(2) with these flags. The reply says who serves the file's bytes.
    pub fn open(self: &Arc<Self>, call: Call, flags: i32, reply: impl OpenResponder<B>) {
        let access = match flags & libc::O_ACCMODE {
            libc::O_WRONLY => Access::Write,
            libc::O_RDWR => Access::ReadWrite,
            _ => Access::Read,
        };
        self.serve(Operation::Open, call.inode, reply, move |service, reply| {
            let (handle, open) = match service.tree.open(&call.caller, call.inode, access) {
                Ok(opened) => opened,
                Err(error) => return Err(service.open_refused(call, error)),
            };
            match service.opens.served_by(call.inode, &open, flags, |file| reply.register(file)) {
                Ok(served_by) => Ok(Opened { handle, served_by }),
                Err(refusal) => {
                    service.tree.release(handle);
                    Err(refusal.into())
                }
            }
        });
    }

    /// `found` with its TTL, in a reply about `by`, the parent directory or the node itself.
    fn timed(&self, by: u64, found: Attributes) -> TimedAttributes {
        let generation = self.tree.generation(found.inode);
        TimedAttributes { attributes: found, ttl: ttl(&self.tree, by, &found), generation }
    }

    fn open_refused(&self, call: Call, error: Error) -> Failure {
        let is_disk = !self.tree.may_block(call.inode);
        if error.kind() == ErrorKind::Busy
            && is_disk
            && self.busy_retries.exceeded(call.caller.pid, call.inode)
        {
            return Failure::from(error).shown_as(Refusal::BusyRetried);
        }
        error.into()
    }

    /// Reads at most `size` bytes into the responder's buffer. The reply is the number of bytes before the
    /// end of the file.
    pub fn read(self: &Arc<Self>, file: OpenFile, offset: u64, size: u32, mut reply: impl BytesResponder) {
        let open = match self.answer(|| Ok(self.tree.handle(file.handle)?)) {
            Ok(Handle::Progress(reader)) => {
                // `PendingReads` keeps the responder until there is news.
                let answer = Box::new(move |line: &[u8]| {
                    reply.buffer(line.len()).copy_from_slice(line);
                    reply.finish(Ok(line.len()));
                });
                return self.tree.read_progress(&reader, size as usize, answer);
            }
            Ok(open) => open,
            Err(errno) => return reply.finish(Err(errno)),
        };
        self.serve(Operation::Read, file.inode, reply, move |service, reply| {
            Ok(service.tree.read(&open, offset, reply.buffer(size as usize))?)
        });
    }

    /// Writes bytes, or gives the command in them. The reply is the number of bytes written.
    pub fn write(self: &Arc<Self>, file: OpenFile, write: Write<'_>, reply: impl Responder<usize>) {
        // O_SYNC includes O_DSYNC's bit.
        let sync = write.flags & libc::O_DSYNC != 0;
        let open = match self.answer(|| Ok(self.tree.handle(file.handle)?)) {
            Ok(open) => open,
            Err(errno) => return reply.finish(Err(errno)),
        };
        let Handle::Control(_) = &open else {
            return reply
                .finish(self.answer(|| Ok(self.tree.write(&open, write.offset, write.bytes, sync)?)));
        };
        // A dirty page of a mapping is not a command.
        if write.is_write_back {
            return reply.finish(self.answer(|| Err(Refusal::CommandFromMapping.into())));
        }
        let (offset, text) = (write.offset, write.bytes.to_vec());
        self.serve(Operation::Command, file.inode, reply, move |service, _| {
            Ok(service.tree.write(&open, offset, &text, sync)?)
        });
    }

    /// lseek(2) with `SEEK_DATA` or `SEEK_HOLE`.
    pub fn seek(self: &Arc<Self>, file: OpenFile, offset: i64, whence: i32, reply: impl Responder<u64>) {
        self.serve(Operation::Seek, file.inode, reply, move |service, _| {
            let wanted = match whence {
                libc::SEEK_DATA => BlockStatus::Data,
                libc::SEEK_HOLE => BlockStatus::Zero,
                _ => return Err(Refusal::UnknownSeek.into()),
            };
            let at = u64::try_from(offset).map_err(|_| Refusal::NothingThere)?;
            let found = service.tree.seek(&service.tree.handle(file.handle)?, at, wanted)?;
            Ok(found.ok_or(Refusal::NothingThere)?)
        });
    }

    /// fallocate(2).
    pub fn fallocate(
        self: &Arc<Self>,
        file: OpenFile,
        (offset, len): (u64, u64),
        mode: i32,
        reply: impl Responder<()>,
    ) {
        use libc::{
            FALLOC_FL_KEEP_SIZE as KEEP, FALLOC_FL_PUNCH_HOLE as PUNCH, FALLOC_FL_ZERO_RANGE as ZERO,
        };
        self.serve(Operation::Fallocate, file.inode, reply, move |service, _| {
            let keep_size = mode & KEEP != 0;
            let what = match mode & !KEEP {
                0 => Fallocate::Space,
                ZERO => Fallocate::Zero(Zeroing::Keep),
                PUNCH if keep_size => Fallocate::Zero(Zeroing::Unmap),
                _ => return Err(Refusal::UnknownFallocate.into()),
            };
            let handle = service.tree.handle(file.handle)?;
            Ok(service.tree.fallocate(&handle, offset, len, what, keep_size)?)
        });
    }

    /// close(2) of one descriptor.
    pub fn flush(self: &Arc<Self>, file: OpenFile, reply: impl Responder<()>) {
        self.serve(Operation::Flush, file.inode, reply, move |service, _| {
            Ok(service.tree.closing(&service.tree.handle(file.handle)?)?)
        });
    }

    /// fsync(2) and fdatasync(2).
    pub fn sync(self: &Arc<Self>, file: OpenFile, reply: impl Responder<()>) {
        self.serve(Operation::Sync, file.inode, reply, move |service, _| {
            Ok(service.tree.sync(&service.tree.handle(file.handle)?)?)
        });
    }

    /// The last descriptor of a file or directory is closed.
    pub fn release(self: &Arc<Self>, file: OpenFile, reply: impl Responder<()>) {
        self.serve(Operation::Release, file.inode, reply, move |service, _| {
            if let Ok(open) = service.tree.handle(file.handle) {
                service.opens.closed(file.inode, &open);
            }
            // The last release of a written disk flushes it; its result reaches no client.
            service.tree.release(file.handle);
            Ok(())
        });
    }

    /// Names cannot be created, removed or renamed: the tree is derived from the store.
    pub fn change_names<T>(&self, reply: impl Responder<T>) {
        reply.finish(self.answer(|| Err(Refusal::FixedNames.into())));
    }

    /// The sizes of the file system that a node is in.
    pub fn statistics(self: &Arc<Self>, call: Call, reply: impl Responder<Statistics>) {
        self.serve(Operation::Statistics, call.inode, reply, move |service, _| {
            match service.answer(|| Ok(service.tree.guest_statistics(call.inode)?)) {
                Ok(Some(found)) => Ok(found.into()),
                // Without a guest's, those of the store's file system.
                Ok(None) | Err(_) => Ok(service.tree.store_statistics()?),
            }
        });
    }

    /// getxattr(2). `room`: the length of the client's buffer; 0 asks for the size.
    pub fn extended_attribute(
        self: &Arc<Self>,
        call: Call,
        name: &OsStr,
        room: u32,
        reply: impl Responder<XattrReply>,
    ) {
        let name = name.to_owned();
        self.serve(Operation::ExtendedAttributes, call.inode, reply, move |service, _| {
            service.need_attributes()?;
            let found = service
                .tree
                .extended_attribute(&call.caller, call.inode, &name, || service.opens.server(call.inode))?;
            XattrReply::new(found.ok_or(Refusal::NoAttribute)?, room)
        });
    }

    /// listxattr(2). `room`: as for [`Service::extended_attribute`].
    pub fn extended_attributes(self: &Arc<Self>, call: Call, room: u32, reply: impl Responder<XattrReply>) {
        self.serve(Operation::ExtendedAttributes, call.inode, reply, move |service, _| {
            service.need_attributes()?;
            XattrReply::new(service.tree.listed_attributes(call.inode, call.caller.uid == 0)?, room)
        });
    }

    /// setxattr(2).
    pub fn set_extended_attribute(
        self: &Arc<Self>,
        call: Call,
        (name, value): (&OsStr, &[u8]),
        flags: i32,
        reply: impl Responder<()>,
    ) {
        let (name, value) = (name.to_owned(), value.to_vec());
        self.serve(Operation::ExtendedAttributes, call.inode, reply, move |service, _| {
            service.need_attributes()?;
            let mode = match flags {
                libc::XATTR_CREATE => SetMode::Create,
                libc::XATTR_REPLACE => SetMode::Replace,
                _ => SetMode::Any,
            };
            let pair = (name.as_os_str(), value.as_slice());
            let is_set = service.tree.set_extended_attribute(&call.caller, call.inode, pair, mode)?;
            if is_set { Ok(()) } else { Err(Refusal::NoAttribute.into()) }
        });
    }

    /// removexattr(2).
    pub fn remove_extended_attribute(self: &Arc<Self>, call: Call, name: &OsStr, reply: impl Responder<()>) {
        let name = name.to_owned();
        self.serve(Operation::ExtendedAttributes, call.inode, reply, move |service, _| {
            service.need_attributes()?;
            let was_there = service.tree.remove_extended_attribute(&call.caller, call.inode, &name)?;
            if was_there { Ok(()) } else { Err(Refusal::NoAttribute.into()) }
        });
    }

    fn need_attributes(&self) -> Result<(), Refusal> {
        if self.features.extended_attributes { Ok(()) } else { Err(Refusal::WithoutAttributes) }
    }

    /// opendir(3).
    pub fn open_directory(self: &Arc<Self>, call: Call, reply: impl Responder<OpenedDirectory>) {
        self.serve(Operation::OpenDirectory, call.inode, reply, move |service, _| {
            let handle = service.tree.open_directory(&call.caller, call.inode)?;
            // A guest's directory never changes.
            Ok(OpenedDirectory { handle, is_immutable: MountTree::is_guest(call.inode) })
        });
    }

    /// Lists an open directory from an offset on: 0, or that of an entry that was listed.
    pub fn list(self: &Arc<Self>, file: OpenFile, offset: u64, reply: impl NameResponder) {
        self.serve(Operation::List, file.inode, reply, move |service, reply| {
            Ok(listing::each(&service.tree, file, offset, &mut |entry| reply.add(entry.shown()))?)
        });
    }

    /// As [`Service::list`], with attributes. Each node but `.` and `..` counts as looked up.
    pub fn list_with_attributes(
        self: &Arc<Self>,
        call: Call,
        handle: u64,
        offset: u64,
        reply: impl EntryResponder,
    ) {
        let file = OpenFile { inode: call.inode, handle };
        self.serve(Operation::List, call.inode, reply, move |service, reply| {
            let mut take = |entry: &ListedNode<'_>| {
                let (shown, tree) = (entry.shown(), &service.tree);
                let found = match service.answer(|| Ok(entry.attributes(tree, &call.caller)?)) {
                    Ok(Some(found)) => service.timed(call.inode, found),
                    Ok(None) => TimedAttributes::unknown(tree, shown.inode, shown.kind),
                    // Entries that were removed after the listing are left out.
                    Err(_) => return false,
                };
                let is_full = reply.add(shown, &found);
                if !is_full && !entry.is_dots() {
                    tree.add_lookup(shown.inode);
                }
                is_full
            };
            Ok(listing::each(&service.tree, file, offset, &mut take)?)
        });
    }
}
