//! A request, from its arrival until its reply.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::entry::Entry;
use crate::thread::Shared;

/// The errno of a request that nobody answered: EIO.
const UNANSWERED: i32 = 5;

/// The common header of requests, but for what nobody needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What is asked.
    pub opcode: u32,
    /// The number of the request.
    pub unique: u64,
    /// The inode that is meant.
    pub inode: u64,
    /// The user of the client.
    pub uid: u32,
    /// The group of the client.
    pub gid: u32,
    /// The process of the client.
    pub pid: u32,
}

/// A request, in the memory in which the kernel put it. Dropping it answers with EIO.
#[derive(Debug)]
pub struct Request {
    /// `None` only after it was answered.
    entry: Option<Entry>,
    queue: Arc<Shared>,
    may_wait: bool,
}

impl Request {
    pub(crate) fn new(entry: Entry, queue: &Arc<Shared>, may_wait: bool) -> Self {
        Self { entry: Some(entry), queue: Arc::clone(queue), may_wait }
    }

    fn entry(&self) -> &Entry {
        self.entry.as_ref().expect("it is there until the reply")
    }

    fn entry_mut(&mut self) -> &mut Entry {
        self.entry.as_mut().expect("it is there until the reply")
    }

    /// Its header.
    pub fn header(&self) -> Header {
        self.entry().header()
    }

    /// The structure of its opcode, and bytes without meaning after that.
    pub fn arguments(&self) -> &[u8] {
        self.entry().arguments()
    }

    /// What follows the arguments: names, or the bytes of a write.
    pub fn payload(&self) -> &[u8] {
        self.entry().payload()
    }

    /// The memory for the payload of the reply, which takes the place of that of the request. It may have any
    /// content.
    pub fn buffer(&mut self) -> &mut [u8] {
        self.entry_mut().buffer_mut()
    }

    /// Whether its thread has no other request to serve if this one takes long.
    pub fn may_wait(&self) -> bool {
        self.may_wait
    }

    /// Sends the reply: the first bytes of the buffer, or an errno.
    pub fn finish(mut self, reply: Result<usize, i32>) {
        self.send(reply);
    }

    /// Sends a reply of a few bytes.
    pub fn finish_with(mut self, bytes: &[u8]) {
        self.buffer()[..bytes.len()].copy_from_slice(bytes);
        self.finish(Ok(bytes.len()));
    }

    /// Divides it into the payload and the right to reply, which may go separate ways. The reply is sent when
    /// both are done with: until then the payload stays as it is.
    pub fn split(self) -> (Payload, ShortReply) {
        let both = Arc::new(Divided { request: Some(self), reply: Mutex::new(Err(UNANSWERED)) });
        (Payload(Arc::clone(&both)), ShortReply(both))
    }

    fn send(&mut self, reply: Result<usize, i32>) {
        if let Some(mut entry) = self.entry.take() {
            entry.set_reply(reply);
            self.queue.commit(entry);
        }
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.send(Err(UNANSWERED));
    }
}

/// A request, and the reply that it gets when the last one who shares it is done.
#[derive(Debug)]
struct Divided {
    /// `None` only while it is dropped.
    request: Option<Request>,
    reply: Mutex<Result<Vec<u8>, i32>>,
}

impl Drop for Divided {
    fn drop(&mut self) {
        let Some(request) = self.request.take() else { return };
        match self.reply.get_mut() {
            Ok(bytes) => request.finish_with(bytes),
            Err(errno) => request.finish(Err(*errno)),
        }
    }
}

/// The payload of a request whose reply is elsewhere.
#[derive(Debug)]
pub struct Payload(Arc<Divided>);

impl Payload {
    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        self.0.request.as_ref().expect("it is there until the drop").payload()
    }
}

/// The reply to a request whose payload is elsewhere. Dropping it answers with EIO.
#[derive(Debug)]
pub struct ShortReply(Arc<Divided>);

impl ShortReply {
    /// Sends a reply of a few bytes, or an errno.
    pub fn finish(self, reply: Result<&[u8], i32>) {
        *self.0.reply.lock() = reply.map(<[u8]>::to_vec);
    }
}
