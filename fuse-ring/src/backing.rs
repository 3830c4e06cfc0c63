//! Files that the kernel reads itself: the ioctls of passthrough.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};

/// The type of the ioctls of /dev/fuse.
const GROUP: u8 = 229;

/// A file that is registered with a connection until this is dropped.
#[derive(Debug)]
pub struct Backing {
    device: Arc<OwnedFd>,
    id: u32,
}

impl Backing {
    /// Registers a file. The connection takes it only from root.
    pub fn open(device: &Arc<OwnedFd>, file: impl AsFd) -> io::Result<Self> {
        let map = BackingMap { fd: file.as_fd().as_raw_fd().cast_unsigned(), flags: 0, padding: 0 };
        // SAFETY: `Open` names the memory of a `struct fuse_backing_map`, as the ioctl expects it.
        let id = unsafe { ioctl(device, Open(map)) }?;
        Ok(Self { device: Arc::clone(device), id })
    }

    /// The number by which a reply to an open names it.
    pub fn id(&self) -> u32 {
        self.id
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        // It fails if the connection has ended, which has closed the file.
        // SAFETY: `Close` names the memory of a `u32`, as the ioctl expects it.
        let _ = unsafe { ioctl(&self.device, Close(self.id)) };
    }
}

/// `struct fuse_backing_map`.
#[repr(C)]
struct BackingMap {
    fd: u32,
    flags: u32,
    padding: u64,
}

/// `FUSE_DEV_IOC_BACKING_OPEN`, which returns the number.
struct Open(BackingMap);

// SAFETY: the opcode is that of the ioctl, which reads a `struct fuse_backing_map`.
unsafe impl Ioctl for Open {
    type Output = u32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::write::<BackingMap>(GROUP, 1)
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(
        output: IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        Ok(output.cast_unsigned())
    }
}

/// `FUSE_DEV_IOC_BACKING_CLOSE`.
struct Close(u32);

// SAFETY: the opcode is that of the ioctl, which reads a `u32`.
unsafe impl Ioctl for Close {
    type Output = ();
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        opcode::write::<u32>(GROUP, 2)
    }

    fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
        (&raw mut self.0).cast()
    }

    unsafe fn output_from_ptr(
        _: IoctlOutput,
        _: *mut rustix::ffi::c_void,
    ) -> rustix::io::Result<Self::Output> {
        Ok(())
    }
}
