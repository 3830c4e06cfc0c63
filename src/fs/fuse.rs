//! The transport over fuser: translates its requests into calls of the [`Service`], and replies into its
//! replies (`replies`). It decides nothing. Only this module uses fuser.
//!
//! If the kernel has FUSE over `io_uring`, that transport (`ring`) takes all requests but the first one,
//! forgotten inodes and interrupts. This one takes all of them without it, or if the kernel refuses a queue.

mod replies;

use std::convert::Infallible;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use fuse_ring::{Limits, Rings};
use fuser::{
    AccessFlags, BackingId, BsdFileFlags, Config, FileHandle, Filesystem, INodeNo, InitFlags, KernelConfig,
    LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request, Session,
    SessionACL, TimeOrNow, WriteFlags,
};
use rustix::process::{Resource, getrlimit};

use super::access::Caller;
use super::ring::RingTransport;
use super::service::{
    AttributeChange, Call, Capability, Features, MAX_BACKGROUND, MAX_REQUEST, OpenFile, RING_THREADS,
    Service, Write,
};
use super::tree::MountTree;

use replies::{BufferedData, OpenDirectoryReply};

/// A connected mount.
pub struct Server {
    session: Session<Adapter>,
    service: Arc<Service<Backing>>,
    /// The transport over `io_uring`.
    ring: Option<fuse_ring::Running>,
}

/// A file that the kernel reads itself, registered by one of the transports.
pub(super) enum Backing {
    Fuser(BackingId),
    Ring(fuse_ring::Backing),
}

impl Server {
    /// Replies to the kernel's first request on `device`, a mounted /dev/fuse. After that, the mount is
    /// usable.
    pub fn connect(tree: &Arc<MountTree>, device: OwnedFd, features: Features) -> io::Result<Self> {
        // Before the reply to INIT: the kernel waits for the queues that are promised in it.
        let rings = if features.ring { prepared_rings() } else { None };
        let mut config = Config::default();
        config.n_threads = Some(features.threads);
        config.clone_fd = features.threads > 1;
        let has_ring = rings.is_some();
        // A request over io_uring finds only the threads of its queue.
        let threads = if has_ring { RING_THREADS } else { features.threads };
        let service = Service::new(tree, Features { ring: has_ring, threads, ..features });
        let has_ring = Arc::new(AtomicBool::new(has_ring));
        let adapter = Adapter { service: Arc::clone(&service), has_ring: Arc::clone(&has_ring) };
        // The mount options tell the kernel which users have access.
        let session = Session::from_fd(adapter, device, SessionACL::All, config)?;
        let rings = rings.filter(|_| has_ring.load(Ordering::Relaxed));
        let ring = rings.map(|rings| start(rings, &session, &service)).transpose()?;
        Ok(Self { session, service, ring })
    }

    /// Whether the kernel reads registered files itself.
    pub fn has_passthrough(&self) -> bool {
        self.service.has_passthrough()
    }

    /// Serves until the file system is unmounted, then closes all files and releases all locks.
    pub fn run(self) -> io::Result<()> {
        let result = self.session.run();
        if let Some(ring) = self.ring {
            ring.stop();
        }
        self.service.close();
        result
    }
}

/// The rings, if this machine has them.
fn prepared_rings() -> Option<Rings> {
    if !fuse_ring::is_enabled() {
        return None;
    }
    let limits = Limits { threads_per_queue: RING_THREADS, payload_len: MAX_REQUEST as usize };
    let rings = Rings::prepare(limits);
    let rings = rings.inspect_err(|error| tracing::debug!("no FUSE over io_uring: {error}")).ok()?;
    // Most descriptors are for images.
    let most = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) / 4;
    let wanted = rings.descriptor_count() as u64;
    if wanted > most {
        tracing::debug!("no FUSE over io_uring: {wanted} descriptors are too many");
        return None;
    }
    Some(rings)
}

fn start(
    rings: Rings,
    session: &Session<Adapter>,
    service: &Arc<Service<Backing>>,
) -> io::Result<fuse_ring::Running> {
    let device = Arc::new(session.as_fd().try_clone_to_owned()?);
    let transport: Arc<dyn fuse_ring::Handler> = Arc::new(RingTransport::new(service, &device));
    let (running, result) = rings.start(&device, &transport);
    match result {
        Ok(()) => tracing::debug!("requests come over io_uring"),
        Err(error) => tracing::debug!("requests come through /dev/fuse: {error}"),
    }
    Ok(running)
}

struct Adapter {
    service: Arc<Service<Backing>>,
    /// Whether the reply to INIT promises queues.
    has_ring: Arc<AtomicBool>,
}

/// The call of a request.
fn call(request: &Request, inode: INodeNo) -> Call {
    let caller = Caller { uid: request.uid(), gid: request.gid(), pid: request.pid() };
    Call { inode: inode.0, caller }
}

fn open_file(inode: INodeNo, handle: FileHandle) -> OpenFile {
    OpenFile { inode: inode.0, handle: handle.0 }
}

/// Asks the kernel for a capability; whether it has it.
fn add(config: &mut KernelConfig, capability: Capability) -> bool {
    let flag = match capability {
        Capability::ParallelDirectories => InitFlags::FUSE_PARALLEL_DIROPS,
        Capability::ListingsWithAttributes => InitFlags::FUSE_DO_READDIRPLUS,
        Capability::AdaptiveListings => InitFlags::FUSE_READDIRPLUS_AUTO,
        Capability::AsyncDirect => InitFlags::FUSE_ASYNC_DIO,
        Capability::AbortError => InitFlags::FUSE_ABORT_ERROR,
        Capability::SharedMapping => InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        Capability::AccessLists => InitFlags::FUSE_POSIX_ACL,
        Capability::FileHandles => InitFlags::FUSE_EXPORT_SUPPORT,
        Capability::Ring => InitFlags::FUSE_OVER_IO_URING,
        Capability::Passthrough { stack_depth } => {
            return config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_ok()
                && config.set_max_stack_depth(stack_depth).is_ok();
        }
    };
    config.add_capabilities(flag).is_ok()
}

impl Filesystem for Adapter {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        // Errors are ignored: fuser then uses the nearest value, or the kernel is older.
        let _ = config.set_max_write(MAX_REQUEST);
        let _ = config.set_max_background(MAX_BACKGROUND);
        for capability in self.service.capabilities() {
            if !add(config, capability) {
                self.service.lacks(capability);
                if capability == Capability::Ring {
                    self.has_ring.store(false, Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    fn lookup(&self, req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.service.lookup(call(req, parent), name, reply);
    }

    fn forget(&self, _req: &Request, inode: INodeNo, times: u64) {
        self.service.forget(inode.0, times);
    }

    fn readlink(&self, req: &Request, inode: INodeNo, reply: ReplyData) {
        self.service.read_link(call(req, inode), reply);
    }

    fn getattr(&self, req: &Request, inode: INodeNo, _handle: Option<FileHandle>, reply: ReplyAttr) {
        self.service.attributes(call(req, inode), reply);
    }

    fn access(&self, req: &Request, inode: INodeNo, mask: AccessFlags, reply: ReplyEmpty) {
        self.service.access(call(req, inode), mask.bits(), reply);
    }

    fn open(&self, req: &Request, inode: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        self.service.open(call(req, inode), flags.0, reply);
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
        self.service.read(open_file(inode, handle), offset, size, BufferedData::new(reply));
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
        self.service.seek(open_file(inode, handle), offset, whence, reply);
    }

    fn write(
        &self,
        _req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let is_write_back = write_flags.contains(WriteFlags::FUSE_WRITE_CACHE);
        let write = Write { offset, bytes: data, flags: flags.0, is_write_back };
        self.service.write(open_file(inode, handle), write, reply);
    }

    fn fallocate(
        &self,
        _req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        self.service.fallocate(open_file(inode, handle), (offset, length), mode, reply);
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
        let change = AttributeChange {
            changes_mode: mode.is_some(),
            uid,
            gid,
            size,
            handle: handle.map(|handle| handle.0),
        };
        self.service.set_attributes(call(req, inode), change, reply);
    }

    fn flush(
        &self,
        _req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _owner: LockOwner,
        reply: ReplyEmpty,
    ) {
        self.service.flush(open_file(inode, handle), reply);
    }

    fn fsync(&self, _req: &Request, inode: INodeNo, handle: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.service.sync(open_file(inode, handle), reply);
    }

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
        self.service.change_names::<Infallible>(reply);
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
        self.service.change_names(reply);
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
        self.service.change_names(reply);
    }

    fn unlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.service.change_names(reply);
    }

    fn rmdir(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, reply: ReplyEmpty) {
        self.service.change_names(reply);
    }

    fn symlink(&self, _req: &Request, _parent: INodeNo, _name: &OsStr, _target: &Path, reply: ReplyEntry) {
        self.service.change_names(reply);
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
        self.service.change_names(reply);
    }

    fn link(&self, _req: &Request, _inode: INodeNo, _parent: INodeNo, _name: &OsStr, reply: ReplyEntry) {
        self.service.change_names(reply);
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
        self.service.release(open_file(inode, handle), reply);
    }

    fn opendir(&self, req: &Request, inode: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        self.service.open_directory(call(req, inode), OpenDirectoryReply(reply));
    }

    fn readdir(
        &self,
        _req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.service.list(open_file(inode, handle), offset, reply);
    }

    fn readdirplus(
        &self,
        req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        offset: u64,
        reply: ReplyDirectoryPlus,
    ) {
        self.service.list_with_attributes(call(req, inode), handle.0, offset, reply);
    }

    fn releasedir(
        &self,
        _req: &Request,
        inode: INodeNo,
        handle: FileHandle,
        _flags: OpenFlags,
        reply: ReplyEmpty,
    ) {
        self.service.release(open_file(inode, handle), reply);
    }

    fn statfs(&self, req: &Request, inode: INodeNo, reply: ReplyStatfs) {
        self.service.statistics(call(req, inode), reply);
    }

    fn getxattr(&self, req: &Request, inode: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        self.service.extended_attribute(call(req, inode), name, size, reply);
    }

    fn setxattr(
        &self,
        req: &Request,
        inode: INodeNo,
        name: &OsStr,
        value: &[u8],
        flags: i32,
        _position: u32,
        reply: ReplyEmpty,
    ) {
        self.service.set_extended_attribute(call(req, inode), (name, value), flags, reply);
    }

    fn removexattr(&self, req: &Request, inode: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.service.remove_extended_attribute(call(req, inode), name, reply);
    }

    fn listxattr(&self, req: &Request, inode: INodeNo, size: u32, reply: ReplyXattr) {
        self.service.extended_attributes(call(req, inode), size, reply);
    }
}
