//! File systems that the kernel reads from files, mounted where no path leads. A descriptor is the only way
//! to one: when it is closed, and all files that were opened through it, nothing of the mount is left.
//!
//! Needs root (`CAP_SYS_ADMIN` of the machine), and /proc.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use super::local::LocalFile;

/// The only one of its kind.
pub const EROFS: &str = "erofs";

/// Whether the kernel knows a kind of file system, and this process may mount it. Loads its module.
pub fn can_mount(kind: &str) -> io::Result<()> {
    fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    Ok(())
}

/// Mounts the image in a file, read-only, and opens the file `name` in it. `devices`: the further files that
/// the image refers to, in its order. The kernel opens all of them anew, so that they may be closed
/// afterwards.
pub fn open_in_image(
    kind: &str,
    image: BorrowedFd<'_>,
    devices: &[BorrowedFd<'_>],
    name: &str,
) -> io::Result<LocalFile> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let told = |error: rustix::io::Errno| told(&context, error);
    let path = |file: &BorrowedFd<'_>| format!("/proc/self/fd/{}", file.as_raw_fd());
    fsconfig_set_flag(&context, "ro")?;
    fsconfig_set_string(&context, "source", path(&image)).map_err(told)?;
    for device in devices {
        fsconfig_set_string(&context, "device", path(device)).map_err(told)?;
    }
    fsconfig_create(&context).map_err(told)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_RDONLY;
    let root = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let file = rustix::fs::openat(&root, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    Ok(LocalFile::new(&Arc::new(file)))
}

/// The error, with what the kernel says about it.
fn told(context: &OwnedFd, error: rustix::io::Errno) -> io::Error {
    let mut text = [0; 1024];
    match rustix::io::read(context, &mut text) {
        Ok(len) if len > 0 => {
            let text = String::from_utf8_lossy(&text[..len]);
            io::Error::new(io::Error::from(error).kind(), format!("{} ({error})", text.trim_end()))
        }
        _ => error.into(),
    }
}
