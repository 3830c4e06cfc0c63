//! The adapter to FUSE: requests to [`MountTree`], answers to replies, errors to errno. Nothing else
//! names fuser.

mod again;
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
    AccessFlags, BsdFileFlags, Config, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenAccMode, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory,
    ReplyDirectoryPlus, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    Session, SessionACL, TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind};
use crate::guest::Statistics;
use crate::image::write::Zeroing;
use crate::store::Access;

use super::attributes::Attributes;
use super::change::Fallocate;
use super::handles::Handle;
use super::tree::MountTree;

use again::Refusals;
use entries::{ListingEntry, each, known};
use modes::OpenMode;
use replies::{attr, belief, caller, file_type, give};
use threads::answer;

/// Bytes of a request, at most: what the kernel's limit of 256 pages allows.
const MAX_REQUEST: u32 = 1 << 20;
/// Read-ahead requests in flight, at most.
const MAX_BACKGROUND: u16 = 64;

/// Features of the kernel that can be done without.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a switch of its own")]
pub struct Features {
    /// Reads of frozen raw layers that never leave the kernel (Linux 6.9, root).
    pub passthrough: bool,
    /// Writes to one disk at the same time (Linux 6.2).
    pub parallel_writes: bool,
    /// Mappings of active disks that are shared and writable (Linux 6.6).
    pub shared_mapping: bool,
    /// Access control lists of guests' files, which the kernel goes by where it goes by modes.
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
    /// Answers the kernel's first request on `device`, a mounted /dev/fuse: from here on the
    /// mount can be used.
    pub fn connect(tree: &Arc<MountTree>, device: OwnedFd, features: Features) -> io::Result<Self> {
        let adapter = Adapter {
            tree: Arc::clone(tree),
            passthrough: AtomicBool::new(features.passthrough),
            features,
            modes: Mutex::default(),
            waiting: Arc::default(),
            refusals: Refusals::default(),
        };
        let mut config = Config::default();
        config.n_threads = Some(features.threads);
        config.clone_fd = features.threads > 1;
        // Who may come in has been said to the kernel, which holds to it.
        let session = Session::from_fd(adapter, device, SessionACL::All, config)?;
        Ok(Self { session, tree: Arc::clone(tree) })
    }

    /// Serves until the file system is unmounted, then lets go of all files and locks.
    pub fn run(self) -> io::Result<()> {
        let result = self.session.run();
        self.tree.close();
        result
    }
}

struct Adapter {
    tree: Arc<MountTree>,
    features: Features,
    /// Cleared when the kernel has refused it once.
    passthrough: AtomicBool,
    modes: Mutex<HashMap<u64, OpenMode>>,
    /// Threads of the mount that may be waiting for a worker.
    waiting: Arc<AtomicUsize>,
    refusals: Refusals,
}

thread_local! {
    /// Where a worker puts what it reads; as large as its largest request.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Refusals only mean that the nearest possible value is taken, or that a kernel is older.
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(MAX_BACKGROUND);
        let wanted = InitFlags::FUSE_PARALLEL_DIROPS
            | InitFlags::FUSE_DO_READDIRPLUS
            | InitFlags::FUSE_READDIRPLUS_AUTO
            | InitFlags::FUSE_ASYNC_DIO
            | InitFlags::FUSE_ABORT_ERROR;
        let mapping =
            if self.features.shared_mapping { InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP } else { InitFlags::empty() };
        // Not where modes do not count: the kernel takes the one for the other.
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
        self.look(parent.0, move |tree| match answer(tree, |tree| tree.lookup(&caller, parent.0, &name)) {
            Ok(found) => {
                tree.told(found.inode);
                reply.entry(&belief(tree, parent.0, &found), &attr(&found), Generation(0));
            }
            Err(errno) => reply.error(errno),
        });
    }

    fn forget(&self, _req: &Request, inode: INodeNo, times: u64) {
        self.tree.forgotten(inode.0, times);
    }

    fn readlink(&self, _req: &Request, inode: INodeNo, reply: ReplyData) {
        self.look(inode.0, move |tree| match answer(tree, |tree| tree.read_link(inode.0)) {
            Ok(target) => reply.data(&target),
            Err(errno) => reply.error(errno),
        });
    }

    fn getattr(&self, req: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        let caller = caller(req);
        self.look(inode.0, move |tree| match answer(tree, |tree| tree.attributes(&caller, inode.0)) {
            Ok(found) => reply.attr(&belief(tree, inode.0, &found), &attr(&found)),
            Err(errno) => reply.error(errno),
        });
    }

    /// Asked only where the kernel does not enforce modes: for the one user who may come in at all.
    fn access(&self, _req: &Request, inode: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        self.done(reply, |tree| {
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
        if self.tree.may_wait(inode.0) {
            return self.look(inode.0, move |tree| match answer(tree, |tree| tree.open(&caller, inode.0, access)) {
                // What its number stands for never changes; and nothing is ever written that closing could tell of.
                Ok((number, Handle::GuestFile(_))) => {
                    let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH;
                    reply.opened(FileHandle(number), flags);
                }
                Ok((number, _)) => reply.opened(FileHandle(number), FopenFlags::FOPEN_DIRECT_IO),
                Err(errno) => reply.error(errno),
            });
        }
        let (number, handle) = match self.answer(|tree| tree.open(&caller, inode.0, access)) {
            Ok(opened) => opened,
            Err(errno) => return reply.error(self.refusals.tell(req.pid(), inode.0, errno)),
        };
        if let Some(backing) = self.pass(&reply, inode.0, &handle) {
            return reply.opened_passthrough(FileHandle(number), FopenFlags::empty(), &backing);
        }
        // A partition is open as its disk is.
        let flags = match handle.disk() {
            Handle::Active(_) if self.features.parallel_writes => {
                FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            }
            Handle::Disk(disk) if self.cache(inode.0, disk.view().fingerprint) => FopenFlags::FOPEN_KEEP_CACHE,
            Handle::Disk(_) => FopenFlags::empty(),
            // A disk that changes; and each opening has a text of its own, which no other may be served.
            Handle::Active(_)
            | Handle::Text(_)
            | Handle::Pieces(_)
            | Handle::Control(_)
            | Handle::Directory(_)
            | Handle::GuestFile(_)
            | Handle::GuestDirectory(_)
            | Handle::Partition(_) => FopenFlags::FOPEN_DIRECT_IO,
            // News has no places: nobody waits for another's read because of one.
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
                // The reply is kept by whoever knows when there is news.
                let answer = Box::new(move |line: &[u8]| reply.data(line));
                return self.tree.read_progress(&reader, size as usize, answer);
            }
            Ok(open) => open,
            Err(errno) => return reply.error(errno),
        };
        self.look(inode.0, move |tree| {
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

    fn lseek(&self, _req: &Request, inode: INodeNo, handle: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        let data = match whence {
            libc::SEEK_DATA => true,
            libc::SEEK_HOLE => false,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(at) = u64::try_from(offset) else { return reply.error(Errno::ENXIO) };
        self.look(inode.0, move |tree| match answer(tree, |tree| tree.seek(&tree.handle(handle.0)?, at, data)) {
            Ok(Some(found)) => reply.offset(found.cast_signed()),
            Ok(None) => reply.error(Errno::ENXIO),
            Err(errno) => reply.error(errno),
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
        let tell = |reply: ReplyWrite, outcome: std::result::Result<usize, Errno>| match outcome {
            Ok(len) => reply.written(len as u32),
            Err(errno) => reply.error(errno),
        };
        if let Handle::Control(_) = &open {
            // A page of a mapping is no command.
            if write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
                return reply.error(Errno::EINVAL);
            }
            let data = data.to_vec();
            return self.aside("command", reply, move |tree| tree.write(&open, offset, &data, sync), tell);
        }
        tell(reply, self.answer(|tree| tree.write(&open, offset, data, sync)));
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
        use libc::{FALLOC_FL_KEEP_SIZE as KEEP, FALLOC_FL_PUNCH_HOLE as PUNCH, FALLOC_FL_ZERO_RANGE as ZERO};
        let what = match mode & !KEEP {
            0 => Fallocate::Space,
            ZERO => Fallocate::Zero(Zeroing::Keep),
            PUNCH if mode & KEEP != 0 => Fallocate::Zero(Zeroing::Unmap),
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        let keep_size = mode & KEEP != 0;
        self.done(reply, |tree| tree.fallocate(&tree.handle(handle.0)?, offset, length, what, keep_size));
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
                let fact = "owner and mode are those of the image file; change them there";
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
            Ok(found) => reply.attr(&belief(&self.tree, inode.0, &found), &attr(&found)),
            Err(errno) => reply.error(errno),
        }
    }

    fn flush(&self, _req: &Request, _inode: INodeNo, handle: FileHandle, _owner: LockOwner, reply: ReplyEmpty) {
        self.done(reply, |tree| tree.closing(&tree.handle(handle.0)?));
    }

    fn fsync(&self, _req: &Request, _inode: INodeNo, handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let tell = |reply: ReplyEmpty, outcome| match outcome {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        };
        self.aside("fsync", reply, move |tree| tree.sync(&tree.handle(handle.0)?), tell);
    }

    // The tree is made of the store: nothing in it can be made, removed or renamed by its names.

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

    fn mkdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _mode: u32, _umask: u32, reply: ReplyEntry) {
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
        // The last who writes a disk flushes it here, and nobody is left to be told of an error.
        self.done(reply, |tree| {
            tree.release(handle.0);
            Ok(())
        });
    }

    fn opendir(&self, req: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        let caller = caller(req);
        self.look(inode.0, move |tree| match answer(tree, |tree| tree.open_directory(&caller, inode.0)) {
            // A guest's directory never changes, either.
            Ok(number) if MountTree::is_guest(inode.0) => {
                let flags = FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_CACHE_DIR;
                reply.opened(FileHandle(number), flags);
            }
            Ok(number) => reply.opened(FileHandle(number), FopenFlags::empty()),
            Err(errno) => reply.error(errno),
        });
    }

    fn readdir(&self, _req: &Request, inode: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        self.look(inode.0, move |tree| {
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
        self.look(inode.0, move |tree| {
            let mut take = |entry: &ListingEntry<'_>| {
                let known = entry
                    .attributes
                    .map_or_else(|| answer(tree, |tree| known(tree, &caller, entry)), |found| Ok(Some(found)));
                let (found, belief) = match known {
                    Ok(Some(found)) => (found, belief(tree, inode.0, &found)),
                    // It has its name, which is believed for no time: whoever asks for it is told what is wrong with it.
                    Ok(None) => (Attributes::unknown(entry.inode, entry.kind), Duration::ZERO),
                    // What has gone since it was listed is left out.
                    Err(_) => return false,
                };
                let (number, is_dots) = (INodeNo(entry.inode), matches!(entry.name.as_encoded_bytes(), b"." | b".."));
                let is_full = reply.add(number, entry.next, entry.name, &belief, &attr(&found), Generation(0));
                if !is_full && !is_dots {
                    tree.told(entry.inode);
                }
                is_full
            };
            match answer(tree, |tree| each(tree, inode.0, handle.0, offset, &mut take)) {
                Ok(()) => reply.ok(),
                Err(errno) => reply.error(errno),
            }
        });
    }

    fn releasedir(&self, _req: &Request, _inode: INodeNo, handle: FileHandle, _flags: OpenFlags, reply: ReplyEmpty) {
        self.tree.release(handle.0);
        reply.ok();
    }

    fn statfs(&self, _req: &Request, inode: INodeNo, reply: ReplyStatfs) {
        if let Ok(Some(found)) = self.answer(|tree| tree.guest_statistics(inode.0)) {
            let Statistics { blocks, free_blocks, available_blocks, inodes, free_inodes, block_size, name_len } = found;
            let (free, available) = (free_blocks, available_blocks);
            return reply.statfs(blocks, free, available, inodes, free_inodes, block_size, name_len, block_size);
        }
        match self.answer(|tree| tree.store().roots()[0].statvfs()) {
            Ok(stat) => reply.statfs(
                stat.f_blocks,
                stat.f_bfree,
                stat.f_bavail,
                stat.f_files,
                stat.f_ffree,
                stat.f_bsize as u32,
                255,
                stat.f_frsize as u32,
            ),
            Err(errno) => reply.error(errno),
        }
    }

    fn getxattr(&self, req: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let (name, caller) = (name.to_owned(), caller(req));
        self.look(inode.0, move |tree| match answer(tree, |tree| tree.extended_attribute(&caller, inode.0, &name)) {
            Ok(Some(value)) => give(reply, size, &value),
            Ok(None) => reply.error(Errno::ENODATA),
            Err(errno) => reply.error(errno),
        });
    }

    fn listxattr(&self, req: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        let to_root = req.uid() == 0;
        self.look(inode.0, move |tree| match answer(tree, |tree| tree.listed_attributes(inode.0, to_root)) {
            Ok(names) => give(reply, size, &names),
            Err(errno) => reply.error(errno),
        });
    }
}
