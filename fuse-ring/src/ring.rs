//! One `io_uring`, and the commands that are submitted to it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use io_uring::squeue::Entry128;
use io_uring::{IoUring, cqueue, opcode, types};

use crate::entry::{Armed, Entry};

/// Commands that are submitted at a time.
const SUBMISSIONS: u32 = 64;
/// Completions that are taken at a time; further ones are kept by the kernel.
const COMPLETIONS: u32 = 256;
/// The mark of the completion that tells of news for the thread.
const NEWS: u64 = u64::MAX;
/// `poll(2)`: there is something to read.
const POLLIN: u32 = 1;

/// `FUSE_IO_URING_CMD_REGISTER`: the memory of a new entry, which then waits for a request.
const REGISTER: u32 = 1;
/// `FUSE_IO_URING_CMD_COMMIT_AND_FETCH`: a reply, after which the entry waits for the next request.
const COMMIT_AND_FETCH: u32 = 2;
/// Offset of `len` in `struct io_uring_sqe`.
const LEN: usize = 24;
/// A registration points at two vectors.
const VECTOR_COUNT: u32 = 2;

/// A ring with the entries that wait in it.
pub(crate) struct Ring {
    io: IoUring<Entry128, cqueue::Entry>,
    /// By the mark of their command.
    armed: Vec<Option<Armed>>,
    armed_count: usize,
}

/// What has happened.
pub(crate) enum Event {
    /// A request is in this entry.
    Request(Entry),
    /// The command of an entry has failed with this errno; its memory is free.
    Failed(i32),
    /// There is news for the thread.
    News,
}

impl Ring {
    /// A ring for the calling thread only.
    pub(crate) fn new() -> io::Result<Self> {
        let io = IoUring::builder()
            .setup_cqsize(COMPLETIONS)
            .setup_single_issuer()
            // The kernel writes requests when this thread waits for them, and does not interrupt it.
            .setup_defer_taskrun()
            .build(SUBMISSIONS)?;
        Ok(Self { io, armed: Vec::new(), armed_count: 0 })
    }

    /// The number of entries that wait for a request, or whose reply is under way.
    pub(crate) fn armed_count(&self) -> usize {
        self.armed_count
    }

    /// Registers a new entry with a queue of the connection.
    pub(crate) fn register(&mut self, device: &OwnedFd, queue: u16, entry: Entry) -> io::Result<()> {
        let armed = entry.arm();
        let command = opcode::UringCmd80::new(types::Fd(device.as_raw_fd()), REGISTER)
            .cmd(argument(queue, 0))
            .addr(Some(armed.vectors()));
        let mut command = command.build();
        let start: *mut u8 = (&raw mut command).cast();
        // SAFETY: the offset is within the command, which is 128 bytes long.
        let len: *mut u32 = unsafe { start.add(LEN) }.cast();
        // SAFETY: `len` is a field of `struct io_uring_sqe`, with which the command begins (`repr(C)`). The
        // crate io-uring has no method that sets it for such commands.
        unsafe { len.write(VECTOR_COUNT) };
        self.push(&command, armed)
    }

    /// Sends the reply in an entry, which then waits for the next request.
    pub(crate) fn commit(&mut self, device: &OwnedFd, queue: u16, entry: Entry) -> io::Result<()> {
        let command = opcode::UringCmd80::new(types::Fd(device.as_raw_fd()), COMMIT_AND_FETCH)
            .cmd(argument(queue, entry.commit_id()))
            .build();
        self.push(&command, entry.arm())
    }

    fn push(&mut self, command: &Entry128, armed: Armed) -> io::Result<()> {
        let mark = self.armed.iter().position(Option::is_none).unwrap_or(self.armed.len());
        let command = command.clone().user_data(mark as u64);
        if self.io.submission().is_full() {
            self.submit(0, None)?;
        }
        // SAFETY: the memory that the command names is that of `armed`, which stays mapped until its
        // completion was seen (`next`). The device is open while its number is in use: the caller holds it
        // until the command was submitted, and the kernel from then on.
        unsafe { self.io.submission().push(&command) }.map_err(io::Error::other)?;
        if mark == self.armed.len() {
            self.armed.push(None);
        }
        self.armed[mark] = Some(armed);
        self.armed_count += 1;
        Ok(())
    }

    /// Asks for an [`Event::News`] when `news` can be read.
    pub(crate) fn watch(&mut self, news: &OwnedFd) -> io::Result<()> {
        let command = opcode::PollAdd::new(types::Fd(news.as_raw_fd()), POLLIN).build().user_data(NEWS);
        // SAFETY: it names no memory, and the kernel holds the descriptor once the command was submitted.
        unsafe { self.io.submission().push(&command.into()) }.map_err(io::Error::other)
    }

    /// Submits all commands. Waits for `count` events, but not longer than `most`.
    pub(crate) fn submit(&mut self, count: usize, most: Option<Duration>) -> io::Result<()> {
        let submitter = self.io.submitter();
        let result = match most {
            None => submitter.submit_and_wait(count),
            Some(most) => {
                let most = types::Timespec::from(most);
                submitter.submit_with_args(count, &types::SubmitArgs::new().timespec(&most))
            }
        };
        match result {
            Ok(_) => Ok(()),
            // A signal; the time is over; there are completions to take first.
            Err(error) if matches!(error.raw_os_error(), Some(4 | 62 | 16)) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The next event that has happened.
    pub(crate) fn next(&mut self) -> Option<Event> {
        loop {
            let completion = self.io.completion().next()?;
            if completion.user_data() == NEWS {
                return Some(Event::News);
            }
            let armed = self.armed.get_mut(completion.user_data() as usize).and_then(Option::take);
            let Some(armed) = armed else { continue };
            self.armed_count -= 1;
            // SAFETY: each entry that is armed is named by one command, and this is its completion: its mark
            // is given again only after that.
            let entry = unsafe { armed.completed() };
            return Some(match completion.result() {
                0.. => Event::Request(entry),
                error => Event::Failed(-error),
            });
        }
    }
}

/// `struct fuse_uring_cmd_req`.
fn argument(queue: u16, commit_id: u64) -> [u8; 80] {
    let mut bytes = [0; 80];
    bytes[8..16].copy_from_slice(&commit_id.to_ne_bytes());
    bytes[16..18].copy_from_slice(&queue.to_ne_bytes());
    bytes
}
