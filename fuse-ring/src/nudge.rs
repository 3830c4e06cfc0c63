//! A request that the kernel makes on our behalf, so that there is something to reply to.
//!
//! The kernel has one notification that is answered by a request: `FUSE_NOTIFY_RETRIEVE`, for cached pages of
//! a file. Asked for no byte of the root directory, it answers with an empty `FUSE_NOTIFY_REPLY`, in the
//! queue of the processor on which it was asked.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};

/// The opcode of the request: `FUSE_NOTIFY_REPLY`.
pub(crate) const REPLY: u32 = 41;
/// The notification: `FUSE_NOTIFY_RETRIEVE`.
const RETRIEVE: i32 = 5;
/// The root directory.
const ROOT: u64 = 1;
/// Of `struct fuse_out_header` and `struct fuse_notify_retrieve_out`.
const LEN: usize = 16 + 32;

/// Asks for the request. It fails only if the connection has ended.
pub(crate) fn send(device: &OwnedFd) {
    /// The kernel's own numbers are even and smaller.
    static NEXT: AtomicU64 = AtomicU64::new(1 << 63);
    let unique = NEXT.fetch_add(2, Ordering::Relaxed);
    let mut bytes = [0; LEN];
    bytes[..4].copy_from_slice(&(LEN as u32).to_ne_bytes());
    bytes[4..8].copy_from_slice(&RETRIEVE.to_ne_bytes());
    bytes[16..24].copy_from_slice(&unique.to_ne_bytes());
    bytes[24..32].copy_from_slice(&ROOT.to_ne_bytes());
    let _ = rustix::io::write(device, &bytes);
}
