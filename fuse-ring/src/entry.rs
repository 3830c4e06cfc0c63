//! The memory of an entry: headers and payload, of which the kernel writes requests and reads replies.
//!
//! An [`Entry`] belongs to this process. An [`Armed`] one belongs to the kernel, from the submission of a
//! command until its completion. All numbers are in the machine's byte order.

use std::io;
use std::mem::ManuallyDrop;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

use crate::request::Header;

/// Bytes of `struct fuse_uring_req_header`: the header of the request or reply, its arguments, and the
/// header of the entry.
const HEADERS_LEN: usize = 288;
const ARGUMENTS: std::ops::Range<usize> = 128..256;
/// In the header of the entry.
const COMMIT_ID: usize = 256 + 8;
const PAYLOAD_LEN: usize = 256 + 16;
/// Where the two `struct iovec` are that a registration points at: addresses and lengths of headers and
/// payload.
const VECTORS: usize = 512;
const VECTORS_LEN: usize = 32;
/// Bytes of the part with the headers.
const PAGE: usize = 4096;
/// Where the payload begins. Not where a page does: the kernel copies page by page, and on some processors
/// its copying instruction is several times slower if both sides begin at the same place of a page.
const PAYLOAD: usize = PAGE + 64;

/// The memory of an entry that no command in flight names.
#[derive(Debug)]
pub(crate) struct Entry {
    memory: NonNull<u8>,
    payload_len: usize,
}

/// The memory of an entry that a command in flight names. It is never unmapped: if its completion is never
/// seen, it stays until the process ends.
#[derive(Debug)]
pub(crate) struct Armed(ManuallyDrop<Entry>);

// SAFETY: an entry is the only owner of its memory, like a `Box<[u8]>`; `&Entry` only reads.
unsafe impl Send for Entry {}
// SAFETY: as above.
unsafe impl Sync for Entry {}

impl Entry {
    /// Maps memory, which the kernel provides page by page when it is first written.
    pub(crate) fn new(payload_len: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: the kernel chooses an address that is not in use.
        let memory =
            unsafe { mmap_anonymous(std::ptr::null_mut(), PAYLOAD + payload_len, protection, flags) }?;
        let memory = NonNull::new(memory.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let mut entry = Self { memory, payload_len };
        let (headers, payload) = (memory.addr().get() as u64, (memory.addr().get() + PAYLOAD) as u64);
        let vectors = [headers, HEADERS_LEN as u64, payload, payload_len as u64];
        for (bytes, value) in entry.page_mut()[VECTORS..][..VECTORS_LEN].chunks_exact_mut(8).zip(vectors) {
            bytes.copy_from_slice(&value.to_ne_bytes());
        }
        Ok(entry)
    }

    /// Hands the memory to a command.
    pub(crate) fn arm(self) -> Armed {
        Armed(ManuallyDrop::new(self))
    }

    fn page(&self) -> &[u8; PAGE] {
        // SAFETY: the mapping is at least that long, lives as long as `self`, and is initialised: anonymous
        // memory is zero until it is written. Nobody writes it while it is borrowed: this process needs
        // `&mut self` for that, and the kernel an armed entry.
        unsafe { self.memory.cast().as_ref() }
    }

    fn page_mut(&mut self) -> &mut [u8; PAGE] {
        // SAFETY: as for `page`, and `self` is borrowed mutably.
        unsafe { self.memory.cast().as_mut() }
    }

    fn u32(&self, at: usize) -> u32 {
        u32::from_ne_bytes(*self.page()[at..].first_chunk().expect("it is within the headers"))
    }

    fn u64(&self, at: usize) -> u64 {
        u64::from_ne_bytes(*self.page()[at..].first_chunk().expect("it is within the headers"))
    }

    /// `struct fuse_in_header`.
    pub(crate) fn header(&self) -> Header {
        Header {
            opcode: self.u32(4),
            unique: self.u64(8),
            inode: self.u64(16),
            uid: self.u32(24),
            gid: self.u32(28),
            pid: self.u32(32),
        }
    }

    /// The arguments of a request: the structure of its opcode.
    pub(crate) fn arguments(&self) -> &[u8] {
        &self.page()[ARGUMENTS]
    }

    /// What follows the arguments: names, or the bytes of a write.
    pub(crate) fn payload(&self) -> &[u8] {
        &self.buffer()[..(self.u32(PAYLOAD_LEN) as usize).min(self.payload_len)]
    }

    fn buffer(&self) -> &[u8] {
        // SAFETY: the mapping is `PAYLOAD + payload_len` bytes long, so the address is within it.
        let start = unsafe { self.memory.add(PAYLOAD) };
        // SAFETY: as for `page`.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), self.payload_len) }
    }

    /// The memory for the payload of a reply; it still has that of the request.
    pub(crate) fn buffer_mut(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `PAYLOAD + payload_len` bytes long, so the address is within it.
        let start = unsafe { self.memory.add(PAYLOAD) };
        // SAFETY: as for `page`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), self.payload_len) }
    }

    /// The number by which the kernel knows the request in this entry.
    pub(crate) fn commit_id(&self) -> u64 {
        self.u64(COMMIT_ID)
    }

    /// Writes the headers of a reply: the length of its payload, or an errno.
    pub(crate) fn set_reply(&mut self, reply: Result<usize, i32>) {
        let (len, error) = match reply {
            Ok(len) => (len.min(self.payload_len) as u32, 0),
            Err(errno) => (0, -errno),
        };
        let unique = self.u64(8);
        let page = self.page_mut();
        // `struct fuse_out_header`.
        page[..4].copy_from_slice(&(len + 16).to_ne_bytes());
        page[4..8].copy_from_slice(&error.to_ne_bytes());
        page[8..16].copy_from_slice(&unique.to_ne_bytes());
        page[PAYLOAD_LEN..][..4].copy_from_slice(&len.to_ne_bytes());
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        // SAFETY: this is the mapping that `new` made; no borrow is left, and no command names it.
        let _ = unsafe { munmap(self.memory.as_ptr().cast(), PAYLOAD + self.payload_len) };
    }
}

impl Armed {
    /// The address of the two vectors that a registration points at.
    pub(crate) fn vectors(&self) -> u64 {
        (self.0.memory.addr().get() + VECTORS) as u64
    }

    /// Takes the memory back.
    ///
    /// # Safety
    ///
    /// Each command that names this memory has completed.
    pub(crate) unsafe fn completed(self) -> Entry {
        ManuallyDrop::into_inner(self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_is_in_the_headers() {
        let mut entry = Entry::new(8192).expect("memory");
        entry.page_mut()[8..16].copy_from_slice(&77_u64.to_ne_bytes());
        entry.set_reply(Ok(5000));
        assert_eq!((entry.u32(0), entry.u32(4), entry.u64(8), entry.u32(PAYLOAD_LEN)), (5016, 0, 77, 5000));
        assert_eq!(entry.payload().len(), 5000);
        entry.set_reply(Err(2));
        assert_eq!((entry.u32(0), entry.u32(4), entry.u64(8)), (16, 2_u32.wrapping_neg(), 77));
        entry.set_reply(Ok(usize::from(u16::MAX)));
        assert_eq!(entry.payload().len(), 8192, "never more than there is");
        entry.buffer_mut().fill(9);
        assert_eq!(entry.payload(), [9; 8192]);
    }
}
