//! The adapter to FUSE: passes requests to [`MountTree`], results to replies, and errors to errno. Only this
//! module uses fuser.

mod busy_retries;
mod entries;
mod modes;
mod replies;
mod threads;

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use fuser::{
    AccessFlags, BsdFileFlags, Config, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo,
    InitFlags, KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate,
    ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen,
    ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session, SessionACL, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind};
use crate::guest::Statistics;
use crate::image::write::Zeroing;
use crate::store::Access;
use crate::units::BlockStatus;

use super::attributes::Attributes;
use super::change::Fallocate;
use super::handles::Handle;
use super::tree::MountTree;

use busy_retries::BusyRetries;
use entries::{ListingEntry, each, known};
use modes::OpenMode;
use replies::{attr, caller, file_type, reply_xattr, ttl};
use threads::answer;

/// Maximum size of a request in bytes: the kernel's limit of 256 pages.
const MAX_REQUEST: u32 = 1 << 20;
/// Maximum number of read-ahead requests in flight.
const MAX_BACKGROUND: u16 = 64;

/// Optional features of the kernel.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is an option of its own")]
pub struct Features {
    /// Passthrough: the kernel reads frozen raw layers itself (Linux 6.9, root).
    pub passthrough: bool,
    /// Parallel writes to one disk (Linux 6.2).
    pub parallel_writes: bool,
    /// Shared writable mappings of active disks (Linux 6.6).
    pub shared_mapping: bool,
    /// Access control lists of guests' files, enforced by the kernel like modes.
    pub access_lists: bool,
    /// Worker threads.
    pub threads: usize,
}

/// A connected mount.
pub struct Server {
    session: Session<Adapter>,
    tree: Arc<MountTree>,
}

impl Server {
    /// Replies to the kernel's first request on `device`, a mounted /dev/fuse. After that, the mount is
    /// usable.
    pub fn connect(tree: &Arc<MountTree>, device: OwnedFd, features: Features) -> io::Result<Self> {
        let adapter = Adapter {
            tree: Arc::clone(tree),
            passthrough: AtomicBool::new(features.passthrough),
            features,
            modes: Mutex::default(),
            waiting: Arc::default(),
            busy_retries: BusyRetries::default(),
        };
        let mut config = Config::default();
        config.n_threads = Some(features.threads);
        config.clone_fd = features.threads > 1;
        // The mount options tell the kernel which users have access.
        let session = Session::from_fd(adapter, device, SessionACL::All, config)?;
        Ok(Self { session, tree: Arc::clone(tree) })
    }

    /// Serves until the file system is unmounted, then closes all files and releases all locks.
    pub fn run(self) -> io::Result<()> {
        let result = self.session.run();
        self.tree.close();
        result
    }
}

struct Adapter {
    tree: Arc<MountTree>,
    features: Features,
    /// Cleared when the kernel has refused passthrough once.
    passthrough: AtomicBool,
    modes: Mutex<HashMap<u64, OpenMode>>,
    /// Serving threads that may be waiting for a worker.
    waiting: Arc<AtomicUsize>,
    busy_retries: BusyRetries,
}

thread_local! {
    /// The read buffer of a serving thread; it grows to the largest request.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Errors are ignored: fuser then uses the nearest value, or the kernel is older.
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_ABORT_ERROR;
        let mapping = if self.features.shared_mapping {
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP
        } else {
            InitFlags::empty()
        };
        // Only if the kernel enforces modes: FUSE_POSIX_ACL implies default_permissions.
        let lists = if self.features.access_lists { InitFlags::FUSE_POSIX_ACL } else { InitFlags::empty() };
        for flag in (wanted | mapping | lists).iter() {
            let _ = config.add_capabilities(flag);
        }
        let possible = self.passthrough.load(Ordering::Relaxed)
            && config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
            && config.set_max_stack_depth(1).is_ok();
        self.passthrough.store(possible, Ordering::Relaxed);
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let (name, caller) = (name.to_owned(), caller(req));
        self.offload_if_blocking(parent.0, move |tree| {
            match answer(tree, |tree| tree.lookup(&caller, parent.0, &name)) {
                Ok(found) => {
                    tree.add_lookup(found.inode);
                    reply.entry(&ttl(tree, parent.0, &found), &attr(&found), Generation(0));
                }
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn forget(&self, _req: &Request, inode: INodeNo, times: u64) {
        self.tree.forget(inode.0, times);
    }

    fn readlink(&self, _req: &Request, inode: INodeNo, reply: ReplyData) {
        self.offload_if_blocking(inode.0, move |tree| match answer(tree, |tree| tree.read_link(inode.0)) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(errno),
        });
    }

    fn getattr(&self, req: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let caller = caller(req);
        self.offload_if_blocking(inode.0, move |tree| {
            match answer(tree, |tree| tree.attributes(&caller, inode.0)) {
                Ok(found) => reply.attr(&ttl(tree, inode.0, &found), &attr(&found)),
                Err(errno) => reply.error(errno),
            }
        });
    }

    /// Called only if the kernel does not enforce modes: without `allow_other`, for the mounting user.
    fn access(&self, _req: &Request, inode: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        self.reply_empty(reply, |tree| {
            tree.access(inode.0, mask.contains(AccessFlags::W_OK), mask.contains(AccessFlags::X_OK))
        });
    }

    fn open(&self, req: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        let caller = caller(req);
        let access = match flags.acc_mode() {
            OpenAccMode::O_RDONLY => Access::Read,
            OpenAccMode::O_WRONLY => Access::Write,
            OpenAccMode::O_RDWR => Access::ReadWrite,
        };
        if self.tree.may_block(inode.0) {
            return self.offload_if_blocking(inode.0, move |tree| {
                match answer(tree, |tree| tree.open(&caller, inode.0, access)) {
                    // The content of a guest's inode number never changes, and there are no writes to flush
                    // at close.
                    Ok((number, Handle::GuestFile(_))) => {
                        let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH;
                        reply.opened(FileHandle(number), flags);
                    }
                    Ok((number, _)) => reply.opened(FileHandle(number), FopenFlags::FOPEN_DIRECT_IO),
                    Err(errno) => reply.error(errno),
                }
            });
        }
        let (number, handle) = match self.answer(|tree| tree.open(&caller, inode.0, access)) {
            Ok(opened) => opened,
            Err(errno) => return reply.error(self.busy_retries.errno(req.pid(), inode.0, errno)),
        };
        if let Some(backing) = self.open_passthrough(&reply, inode.0, &handle) {
            return reply.opened_passthrough(FileHandle(number), FopenFlags::empty(), &backing);
        }
        // A partition has the open mode of its disk.
        let flags = match handle.disk() {
            Handle::Active(_) if self.features.parallel_writes => {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            }
            Handle::Disk(disk) if self.open_cached(inode.0, disk.view().fingerprint) => {
                FopenFlags::FOPEN_KEEP_CACHE
            }
            Handle::Disk(_) => FopenFlags::empty(),
            // An active disk changes, and each open of a text file has its own text: neither may be cached.
            Handle::Active(_)
            | Handle::Text(_)
            | Handle::Pieces(_)
            | Handle::Control(_)
            | Handle::Directory(_)
            | Handle::GuestFile(_)
            | Handle::GuestDirectory(_)
            | Handle::Partition(_) => FopenFlags::FOPEN_DIRECT_IO,
            // A stream without positions: reads of one open file do not wait for each other.
            Handle::Progress(_) => {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_NONSEEKABLE | FopenFlags::FOPEN_STREAM
            }
        };
        reply.opened(FileHandle(number), flags);
    }

    fn read(
        &self,
        _req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let open = match self.answer(|tree| tree.handle(handle.0)) {
            Ok(Handle::Progress(reader)) => {
                // `PendingReads` keeps the reply until there is news.
                let answer = Box::new(move |line: &[u8]| reply.data(line));
                return self.tree.read_progress(&reader, size as usize, answer);
            }
            Ok(open) => open,
            Err(errno) => return reply.error(errno),
        };
        self.offload_if_blocking(inode.0, move |tree| {
            BUFFER.with_borrow_mut(|buffer| {
                if buffer.len() < size as usize {
                    buffer.resize(size as usize, 0);
                }
                let buffer = &mut buffer[..size as usize];
                match answer(tree, |tree| tree.read(&open, offset, buffer)) {
                    Ok(len) => reply.data(&buffer[..len]),
                    Err(errno) => reply.error(errno),
                }
            });
        });
    }

    fn lseek(
        &self,
        _req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let wanted = match whence {
            libc::SEEK_DATA => BlockStatus::Data,
            libc::SEEK_HOLE => BlockStatus::Zero,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(at) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        self.offload_if_blocking(inode.0, move |tree| {
            match answer(tree, |tree| tree.seek(&tree.handle(handle.0)?, at, wanted)) {
                Ok(Some(found)) => reply.offset(found.cast_signed()),
                Ok(None) => reply.error(Errno::ENXIO),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn write(
        &self,
        _req: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        // O_SYNC includes O_DSYNC's bit.
        let sync = flags.0 & libc::O_DSYNC != 0;
        let open = match self.answer(|tree| tree.handle(handle.0)) {
            Ok(open) => open,
            Err(errno) => return reply.error(errno),
        };
        let send = |reply: ReplyWrite, outcome: std::result::Result<usize, Errno>| match outcome {
            Ok(len) => reply.written(len as u32),
            Err(errno) => reply.error(errno),
        };
        if let Handle::Control(_) = &open {
            // A dirty page of a mapping is not a command.
            if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
                return reply.error(Errno::EINVAL);
            }
            let data = data.to_vec();
            return self.offload("command", reply, move |tree| tree.write(&open, offset, &data, sync), send);
        }
        send(reply, self.answer(|tree| tree.write(&open, offset, data, sync)));
    }

    fn fallocate(
        &self,
        _req: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        use libc::{
            FALLOC_FL_KEEP_SIZE as KEEP, FALLOC_FL_PUNCH_HOLE as PUNCH, FALLOC_FL_ZERO_RANGE as ZERO,
        };
        let what = match mode & !KEEP {
            0 => Fallocate::Space,
            ZERO => Fallocate::Zero(Zeroing::Keep),
            PUNCH if mode & KEEP != 0 => Fallocate::Zero(Zeroing::Unmap),
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let keep_size = mode & KEEP != 0;
        self.reply_empty(reply, |tree| {
            tree.fallocate(&tree.handle(handle.0)?, offset, length, what, keep_size)
        });
    }

    fn setattr(
        &self,
        req: &Request,
        inode: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        _atime: Option<TimeOrNow>,
        _mtime: Option<TimeOrNow>,
        _ctime: Option<SystemTime>,
        handle: Option<FileHandle>,
        _crtime: Option<SystemTime>,
        _chgtime: Option<SystemTime>,
        _bkuptime: Option<SystemTime>,
        _flags: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let caller = caller(req);
        let changed = self.answer(|tree| {
            if mode.is_some() || uid.is_some() || gid.is_some() {
                let fact = "owner and mode are those of the image file; change them in the store";
                return Err(Error::new(ErrorKind::Forbidden, fact));
            }
            match size {
                Some(size) => {
                    let handle = handle.map(|handle| tree.handle(handle.0)).transpose()?;
                    tree.set_size(&caller, inode.0, handle.as_ref(), size)?;
                }
                None => tree.set_times(inode.0)?,
            }
            tree.attributes(&caller, inode.0)
        });
        match changed {
            Ok(found) => reply.attr(&ttl(&self.tree, inode.0, &found), &attr(&found)),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(
        &self,
        _req: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.reply_empty(reply, |tree| tree.closing(&tree.handle(handle.0)?));
    }

    fn fsync(&self, _req: &Request, _inode: INodeNo, handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let send = |reply: ReplyEmpty, outcome| match outcome {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        };
        self.offload("fsync", reply, move |tree| tree.sync(&tree.handle(handle.0)?), send);
    }

    // The tree is derived from the store: its names cannot be created, removed or renamed.

    fn create(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _flags: i32,
        reply: ReplyCreate,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mknod(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        _rdev: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn mkdir(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _mode: u32,
        _umask: u32,
        reply: ReplyEntry,
    ) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn rename(
        &self,
        _req: &Request,
        _parent: INodeNo,
        _name: &OsStr,
        _new_parent: INodeNo,
        _new_name: &OsStr,
        _flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(Errno::EPERM);
    }

    fn link(&self, _req: &Request, _inode: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn release(
        &self,
        _req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        _flush: bool,
        reply: ReplyEmpty,
    ) {
        if let Ok(open) = self.tree.handle(handle.0) {
            self.closed(inode.0, &open);
        }
        // The last release of a written disk flushes it; its result reaches no client.
        self.reply_empty(reply, |tree| {
            tree.release(handle.0);
            Ok(())
        });
    }

    fn opendir(&self, req: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let caller = caller(req);
        self.offload_if_blocking(inode.0, move |tree| {
            match answer(tree, |tree| tree.open_directory(&caller, inode.0)) {
                // A guest's directory never changes: its listing may be cached.
                Ok(number) if MountTree::is_guest(inode.0) => {
                    let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
                    reply.opened(FileHandle(number), flags);
                }
                Ok(number) => reply.opened(FileHandle(number), FopenFlags::empty()),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn readdir(
        &self,
        _req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        self.offload_if_blocking(inode.0, move |tree| {
            let mut take = |entry: &ListingEntry<'_>| {
                reply.add(INodeNo(entry.inode), entry.next, file_type(entry.kind), entry.name)
            };
            match answer(tree, |tree| each(tree, inode.0, handle.0, offset, &mut take)) {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn readdirplus(
        &self,
        req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let caller = caller(req);
        self.offload_if_blocking(inode.0, move |tree| {
            let mut take = |entry: &ListingEntry<'_>| {
                let known = entry.attributes.map_or_else(
                    || answer(tree, |tree| known(tree, &caller, entry)),
                    |found| Ok(Some(found)),
                );
                let (found, ttl) = match known {
                    Ok(Some(found)) => (found, ttl(tree, inode.0, &found)),
                    // The name is listed with a TTL of zero: a later lookup returns the error.
                    Ok(None) => (Attributes::unknown(entry.inode, entry.kind), Duration::ZERO),
                    // Entries that were removed after the listing are left out.
                    Err(_) => return false,
                };
                let (number, is_dots) =
                    (INodeNo(entry.inode), matches!(entry.name.as_encoded_bytes(), b"." | b".."));
                let is_full = reply.add(number, entry.next, entry.name, &ttl, &attr(&found), Generation(0));
                if !is_full && !is_dots {
                    tree.add_lookup(entry.inode);
                }
                is_full
            };
            match answer(tree, |tree| each(tree, inode.0, handle.0, offset, &mut take)) {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn releasedir(
        &self,
        _req: &Request,
        _inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.tree.release(handle.0);
        reply.ok();
    }

    fn statfs(&self, _req: &Request, inode: INodeNo, reply: ReplyStatfs) {
        if let Ok(Some(found)) = self.answer(|tree| tree.guest_statistics(inode.0)) {
            let Statistics {
                blocks,
                free_blocks,
                available_blocks,
                inodes,
                free_inodes,
                block_size,
                name_len,
            } = found;
            let (free, available) = (free_blocks, available_blocks);
            return reply.statfs(
                blocks,
                free,
                available,
                inodes,
                free_inodes,
                block_size,
                name_len,
                block_size,
            );
        }
        match self.answer(|tree| tree.store().roots()[0].space()) {
            Ok(space) => reply.statfs(
                space.blocks,
                space.free,
                space.available,
                space.files,
                space.files_free,
                space.block_len,
                255,
                space.unit_len,
            ),
            Err(errno) => reply.error(errno),
        }
    }

    fn getxattr(&self, req: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (name, caller) = (name.to_owned(), caller(req));
        self.offload_if_blocking(inode.0, move |tree| {
            match answer(tree, |tree| tree.extended_attribute(&caller, inode.0, &name)) {
                Ok(Some(value)) => reply_xattr(reply, size, &value),
                Ok(None) => reply.error(Errno::ENODATA),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn listxattr(&self, req: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let to_root = req.uid() == 0;
        self.offload_if_blocking(inode.0, move |tree| {
            match answer(tree, |tree| tree.listed_attributes(inode.0, to_root)) {
                Ok(names) => reply_xattr(reply, size, &names),
                Err(errno) => reply.error(errno),
            }
        });
    }
}
