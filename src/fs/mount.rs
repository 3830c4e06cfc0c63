//! mount(2) and umount(2), as root or through fusermount3.
//!
//! A mount has the type `fuse.chainfs` and the store as its source, and is always nosuid and nodev. A dead
//! mount of chainfs on the directory is unmounted first.

use std::ffi::OsString;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, FdFlags, fcntl_setfd};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{MountEntry, mounts};
use crate::units::join_list;

/// The type under which the kernel lists mounts of chainfs.
pub const KIND: &str = crate::io::OWN_KIND;
const DEVICE: &str = "/dev/fuse";

/// Options for the kernel.
#[derive(Clone, Debug, Default)]
pub struct MountOptions {
    /// Whether other users than the mounting one have access; the kernel then checks modes.
    pub allow_other: bool,
    /// Whether programs on it can be executed.
    pub exec: bool,
    /// Whether it is read-only.
    pub read_only: bool,
    /// The source in the list of mounts; `None`: the store's path.
    pub source: Option<PathBuf>,
    /// Options of `SELinux`, whole.
    pub contexts: Vec<Vec<u8>>,
}

/// A mount made by this process. Other mounts may cover or replace it later.
#[derive(Clone, Debug)]
pub struct OwnMount {
    directory: PathBuf,
    device: (u32, u32),
}

impl OwnMount {
    /// The mount of this process at a directory without symbolic links, by its device number.
    pub fn new(directory: &Path, device: (u32, u32)) -> Self {
        Self { directory: directory.to_path_buf(), device }
    }

    /// Its device number.
    pub fn device(&self) -> (u32, u32) {
        self.device
    }

    /// The mount point, without symbolic links.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Unmounts it. Without `lazy`: `Busy` while it is in use. `NotFound` if another mount, or none, is
    /// visible at its mount point: it was unmounted before, or is covered.
    pub fn unmount(&self, lazy: bool) -> Result<()> {
        if top_mount(&self.directory)?.is_some_and(|mount| mount.device == self.device) {
            return unmount(&self.directory, lazy);
        }
        let sentence = "is no longer this mount; it ends when its last file is closed";
        Err(Error::new(ErrorKind::NotFound, format!("{} {sentence}", self.directory.display())))
    }
}

/// Unmounts on drop, unless [`MountRollback::finished`] is called.
#[derive(Debug)]
pub struct MountRollback(Option<OwnMount>);

impl MountRollback {
    /// Guards `mount`.
    pub fn new(mount: &OwnMount) -> Self {
        Self(Some(mount.clone()))
    }

    /// Keeps the mount.
    pub fn finished(mut self) {
        self.0 = None;
    }
}

impl Drop for MountRollback {
    fn drop(&mut self) {
        if let Some(mount) = self.0.take() {
            let _ = mount.unmount(true);
        }
    }
}

/// Prepares the mount point and mounts there; returns the /dev/fuse descriptor.
pub fn mount(store: &Path, directory: &Path, options: &MountOptions) -> Result<(OwnedFd, OwnMount)> {
    let directory = mount_point(directory)?;
    let opened = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    if let Err(Errno::NOENT) = opened {
        let remedy = "modprobe fuse makes it; a container has it with --device /dev/fuse";
        return Err(Error::new(
            ErrorKind::Io,
            format!("mounting needs {DEVICE}, which is missing here; {remedy}"),
        ));
    }
    let device = match opened.and_then(|device| direct(device, store, &directory, options)) {
        // Not root, or not in this namespace: the set-uid helper may be permitted.
        Err(Errno::PERM | Errno::ACCESS) => by_helper(store, &directory, options)?,
        Err(Errno::NODEV) => {
            return Err(Error::new(ErrorKind::Io, "the kernel has no FUSE support; try modprobe fuse"));
        }
        other => other.map_err(|error| Error::io(format!("mounting on {}", directory.display()), error))?,
    };
    let device_number = top_mount(&directory)?.map_or((0, 0), |mount| mount.device);
    Ok((device, OwnMount { directory, device: device_number }))
}

/// The directory without symbolic links. Unmounts a dead mount of chainfs; refuses a live one.
fn mount_point(directory: &Path) -> Result<PathBuf> {
    let fail = |error| Error::io(format!("opening mount point {}", directory.display()), error);
    if let Err(error) = std::fs::metadata(directory)
        && error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error())
    {
        let dead = canonical_parent(directory)?;
        if top_mount(&dead)?.is_some_and(|mount| mount.kind == KIND) {
            unmount(&dead, true)?;
        }
    }
    let canonical = directory.canonicalize().map_err(fail)?;
    if !std::fs::metadata(&canonical).map_err(fail)?.is_dir() {
        return Err(fail(Errno::NOTDIR.into()));
    }
    if top_mount(&canonical)?.is_some_and(|mount| mount.kind == KIND) {
        return Err(Error::new(
            ErrorKind::Busy,
            format!("{} already shows a store; unmount it first with chainfs umount", directory.display()),
        ));
    }
    Ok(canonical)
}

/// The path with symbolic links resolved in all but the last component, which may be a dead mount.
pub fn canonical_parent(directory: &Path) -> Result<PathBuf> {
    let fail = |error| Error::io(format!("opening {}", directory.display()), error);
    let absolute = std::path::absolute(directory).map_err(fail)?;
    let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else { return Ok(absolute) };
    Ok(parent.canonicalize().map_err(fail)?.join(name))
}

/// The visible mount at `directory`, if it is a mount point.
pub fn top_mount(directory: &Path) -> Result<Option<MountEntry>> {
    Ok(mounts()?.into_iter().rfind(|mount| mount.directory == directory))
}

fn direct(
    device: OwnedFd,
    store: &Path,
    directory: &Path,
    options: &MountOptions,
) -> rustix::io::Result<OwnedFd> {
    let (uid, gid) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let mut data =
        format!("fd={},rootmode=40000,user_id={uid},group_id={gid}", device.as_raw_fd()).into_bytes();
    if options.allow_other {
        data.extend_from_slice(b",allow_other,default_permissions");
    }
    for context in &options.contexts {
        data.push(b',');
        data.extend_from_slice(context);
    }
    let data = std::ffi::CString::new(data).map_err(|_| Errno::INVAL)?;
    let source = options.source.as_deref().unwrap_or(store);
    rustix::mount::mount(source, directory, KIND, flags(options), Some(data.as_c_str()))?;
    Ok(device)
}

fn flags(options: &MountOptions) -> MountFlags {
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV;
    flags.set(MountFlags::NOEXEC, !options.exec);
    flags.set(MountFlags::RDONLY, options.read_only);
    flags
}

/// Changes the flags of a mount that is there: read-only, and whether programs on it can be executed. `Busy` if
/// it is to become read-only while a file is open for writing.
pub fn remount(directory: &Path, options: &MountOptions) -> Result<()> {
    rustix::mount::mount_remount(directory, flags(options), "").map_err(|error| match error {
        Errno::PERM => {
            Error::new(ErrorKind::Denied, "only root can change a mount; unmount it and mount it again")
        }
        error => Error::io(format!("changing the mount {}", directory.display()), error),
    })
}

/// What the daemon of the mount at a directory says of it: `options` or `store`. `None` without an answer.
pub fn attribute(directory: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 64 << 10];
    let len = rustix::fs::getxattr(directory, format!("user.chainfs.{name}"), &mut value[..]).ok()?;
    value.truncate(len);
    Some(value)
}

/// The store that a mount of chainfs shows: its source, unless that was named otherwise.
pub fn store_of(mount: &MountEntry) -> PathBuf {
    if mount.source.is_absolute() {
        return mount.source.clone();
    }
    attribute(&mount.directory, "store")
        .map_or_else(|| mount.source.clone(), |path| OsString::from_vec(path).into())
}

/// Mounts with fusermount3, which sends the descriptor over a socket; an environment variable has its number.
fn by_helper(store: &Path, directory: &Path, options: &MountOptions) -> Result<OwnedFd> {
    let fail = |error: io::Error| Error::io("running fusermount3 (package fuse3)", error);
    let (ours, theirs) = UnixStream::pair().map_err(fail)?;
    fcntl_setfd(&theirs, FdFlags::empty()).map_err(|error| fail(error.into()))?;
    let mut words = OsString::from("subtype=chainfs,nosuid,nodev,fsname=");
    // A comma or backslash in the name would end the option.
    let source = options
        .source
        .as_deref()
        .unwrap_or(store)
        .to_string_lossy()
        .replace('\\', "\\\\")
        .replace(',', "\\,");
    words.push(source);
    for (wanted, word) in [
        (options.read_only, ",ro"),
        (!options.exec, ",noexec"),
        (options.allow_other, ",allow_other,default_permissions"),
    ] {
        if wanted {
            words.push(word);
        }
    }
    for context in &options.contexts {
        words.push(",");
        // A comma within one would end the option.
        words.push(OsString::from_vec(join_list([context.as_slice()])));
    }
    let child = Command::new("fusermount3")
        .arg("-o")
        .arg(words)
        .arg("--")
        .arg(directory)
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn();
    drop(theirs);
    let child = child.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Error::new(
            ErrorKind::Denied,
            format!(
                "mounting on {}: not permitted, and there is no fusermount3 (package fuse3){}",
                directory.display(),
                remedy("not permitted")
            ),
        ),
        _ => fail(error),
    })?;
    let received = receive(&ours);
    let output = child.wait_with_output().map_err(fail)?;
    match received {
        Ok(device) if output.status.success() => {
            fcntl_setfd(&device, FdFlags::CLOEXEC).map_err(|error| fail(error.into()))?;
            Ok(device)
        }
        _ => {
            let words = String::from_utf8_lossy(&output.stderr);
            let words = words.trim().trim_start_matches("fusermount3:").trim();
            let remedy = remedy(words);
            Err(Error::new(
                ErrorKind::Denied,
                format!("mounting on {}: fusermount3 says: {words}{remedy}", directory.display()),
            ))
        }
    }
}

/// What would help where fusermount3 has failed with these words.
fn remedy(words: &str) -> &'static str {
    let is_outermost = std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().eq(["0", "0", "4294967295"]));
    if words.contains("user_allow_other") {
        "; write user_allow_other into /etc/fuse.conf"
    } else if !words.contains("not permitted") {
        ""
    } else if !is_outermost {
        "; in a user namespace its root mounts, in a mount namespace that belongs to it: unshare --map-root-user \
         --mount (a container: --device /dev/fuse --cap-add SYS_ADMIN)"
    } else if rustix::thread::no_new_privs().unwrap_or(false) {
        "; this process may use no set-uid programs (no_new_privs): mount it outside, or in a namespace: unshare \
         --map-root-user --mount"
    } else {
        "; root needs CAP_SYS_ADMIN, which containers have with --cap-add SYS_ADMIN"
    }
}

fn receive(socket: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(socket, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    ancillary
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
}

/// Unmounts a directory. Without `lazy`: `Busy` while it is in use.
pub fn unmount(directory: &Path, lazy: bool) -> Result<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    flags.set(UnmountFlags::DETACH, lazy);
    match rustix::mount::unmount(directory, flags) {
        Ok(()) => Ok(()),
        Err(Errno::PERM) => by_helper_unmount(directory, lazy),
        Err(error) => Err(Error::io(format!("unmounting {}", directory.display()), error)),
    }
}

fn by_helper_unmount(directory: &Path, lazy: bool) -> Result<()> {
    let mut command = Command::new("fusermount3");
    command.arg("-u").args(lazy.then_some("-z")).arg("--").arg(directory).stdin(Stdio::null());
    let output = command.output().map_err(|error| Error::io("running fusermount3 (package fuse3)", error))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let kind = if words.contains("busy") { ErrorKind::Busy } else { ErrorKind::Denied };
    Err(Error::new(kind, format!("unmounting {}: {}", directory.display(), words.trim())))
}

/// Sets the kernel's read-ahead size of the mount. Only root is permitted.
pub fn read_ahead(directory: &Path, kib: u32) -> Result<()> {
    let Some(mount) = top_mount(directory)? else { return Ok(()) };
    let (major, minor) = mount.device;
    let place = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    std::fs::write(&place, kib.to_string()).map_err(|error| Error::io(format!("writing {place}"), error))
}
