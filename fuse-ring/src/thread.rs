//! A thread of a queue: it takes requests, calls the handler, and sends replies.

use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};

use crate::Handler;
use crate::cpus;
use crate::entry::Entry;
use crate::nudge;
use crate::request::Request;
use crate::ring::{Event, Ring};

/// `ENOTCONN` and `ECONNABORTED`: the connection has ended. `ECANCELED`: the ring ends.
const ENDED: [i32; 3] = [107, 103, 125];
/// How long a thread waits for the kernel to let go of its entries when the connection has ended.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a thread shares with those who answer its requests later.
#[derive(Debug)]
pub(crate) struct Shared {
    queue: u16,
    inbox: Mutex<Inbox>,
    /// Written to wake the thread.
    news: OwnedFd,
}

#[derive(Debug, Default)]
struct Inbox {
    /// Replies to send.
    replies: Vec<Entry>,
    /// Requests that are not answered.
    unanswered: usize,
    /// Whether the thread looks into the inbox before it waits.
    is_awake: bool,
    is_stopping: bool,
    /// The thread has ended; replies go nowhere.
    has_ended: bool,
}

/// What a thread needs to begin.
pub(crate) struct Start {
    pub(crate) device: Arc<OwnedFd>,
    pub(crate) handler: Arc<dyn Handler>,
    /// Takes the result of the first registration.
    pub(crate) registered: mpsc::Sender<io::Result<()>>,
}

impl Shared {
    pub(crate) fn new(queue: u16) -> io::Result<Self> {
        let news = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { queue, inbox: Mutex::default(), news })
    }

    /// Sends the reply in an entry.
    pub(crate) fn commit(&self, entry: Entry) {
        let mut inbox = self.inbox.lock();
        inbox.unanswered -= 1;
        if !inbox.has_ended {
            inbox.replies.push(entry);
            self.wake(inbox.is_awake);
        }
    }

    /// Counts a request. `false`: others are not answered yet.
    fn begin(&self) -> bool {
        let mut inbox = self.inbox.lock();
        inbox.unanswered += 1;
        inbox.unanswered == 1
    }

    /// Lets the thread end: the connection has ended.
    pub(crate) fn stop(&self) {
        let mut inbox = self.inbox.lock();
        inbox.is_stopping = true;
        self.wake(inbox.is_awake);
    }

    fn wake(&self, is_awake: bool) {
        if !is_awake {
            // It fails only if so many are unread that the thread is woken anyhow.
            let _ = rustix::io::write(&self.news, &1_u64.to_ne_bytes());
        }
    }
}

/// A thread with its ring and the memory of an entry.
pub(crate) struct QueueThread {
    shared: Arc<Shared>,
    ring: Ring,
    first: Entry,
    payload_len: usize,
}

impl QueueThread {
    /// Called in the thread itself.
    pub(crate) fn new(shared: Arc<Shared>, payload_len: usize) -> io::Result<Self> {
        let mut ring = Ring::new()?;
        ring.watch(&shared.news)?;
        Ok(Self { shared, ring, first: Entry::new(payload_len)?, payload_len })
    }

    /// Serves until the connection has ended.
    pub(crate) fn run(self, start: Start) {
        let Self { shared, mut ring, first, payload_len } = self;
        let Start { device, handler, registered } = start;
        let result = ring.register(&device, shared.queue, first).and_then(|()| ring.submit(0, None));
        let mut requests = Vec::new();
        let mut loop_ = Loop { shared: &shared, ring: &mut ring, requests: &mut requests, ended: None };
        loop_.take_events();
        // A refused registration completes at once; without one, the kernel sends all through the device.
        let _ =
            registered.send(result.and_then(|()| match loop_.ring.armed_count() + loop_.requests.len() {
                0 => Err(io::Error::other("the kernel refused the queue")),
                _ => Ok(()),
            }));
        drop(registered);
        loop_.serve(&device, handler.as_ref(), payload_len);
        let mut inbox = shared.inbox.lock();
        inbox.has_ended = true;
        inbox.replies.clear();
    }
}

struct Loop<'a> {
    shared: &'a Arc<Shared>,
    ring: &'a mut Ring,
    /// Requests that have arrived.
    requests: &'a mut Vec<Entry>,
    /// When the end of the connection was seen.
    ended: Option<Instant>,
}

impl Loop<'_> {
    fn serve(&mut self, device: &OwnedFd, handler: &dyn Handler, payload_len: usize) {
        loop {
            let mut unanswered = None;
            if let Some(mut entry) = self.requests.pop() {
                if entry.header().opcode == nudge::REPLY {
                    entry.set_reply(Ok(0));
                    if self.ring.commit(device, self.shared.queue, entry).is_err() {
                        return;
                    }
                    continue;
                }
                unanswered = Some(entry.commit_id());
                // If this request takes long, no other request or reply may wait for it.
                let is_only = self.shared.begin() && self.requests.is_empty();
                let request = Request::new(entry, self.shared, is_only && self.ring.armed_count() == 0);
                // The default hook has reported the panic, and the request is answered.
                let _ = catch_unwind(AssertUnwindSafe(|| handler.handle(request)));
            }
            let replies = {
                let mut inbox = self.shared.inbox.lock();
                inbox.is_awake = false;
                if inbox.is_stopping {
                    self.ended.get_or_insert_with(Instant::now);
                }
                std::mem::take(&mut inbox.replies)
            };
            unanswered = unanswered.filter(|id| replies.iter().all(|entry| entry.commit_id() != *id));
            for entry in replies {
                if self.ring.commit(device, self.shared.queue, entry).is_err() {
                    return;
                }
            }
            if self.ended.is_none() && self.ring.armed_count() + self.requests.len() == 0 {
                // All entries are with those who answer later: another one, or the queue has none.
                let more = Entry::new(payload_len)
                    .and_then(|entry| self.ring.register(device, self.shared.queue, entry));
                if more.is_err() {
                    return;
                }
            }
            if unanswered.is_some() && self.ended.is_none() {
                // The kernel gives a request that found no entry to the next one that brings a reply, not to
                // one that is registered. So there has to be a reply in place of this one.
                if self.ring.submit(0, None).is_err() {
                    return;
                }
                // A processor that was not there at first is now, if a request came from it.
                cpus::on(self.shared.queue, || nudge::send(device));
            }
            let most = self.ended.map(|since| PATIENCE.saturating_sub(since.elapsed()));
            let is_done = self.ring.armed_count() + self.requests.len() == 0;
            if self.ended.is_some() && (is_done || most == Some(Duration::ZERO)) {
                return;
            }
            // Replies do not wait for requests that have arrived already.
            if self.ring.submit(usize::from(self.requests.is_empty()), most).is_err() {
                return;
            }
            self.shared.inbox.lock().is_awake = true;
            self.take_events();
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.ring.next() {
            match event {
                Event::Request(entry) => self.requests.push(entry),
                Event::Failed(errno) if ENDED.contains(&errno) => {
                    self.ended.get_or_insert_with(Instant::now);
                }
                // The entry is lost; the thread registers another one if it has none.
                Event::Failed(_) => {}
                Event::News => {
                    let _ = rustix::io::read(&self.shared.news, &mut [0; 8]);
                    if self.ring.watch(&self.shared.news).is_err() {
                        self.ended.get_or_insert_with(Instant::now);
                    }
                }
            }
        }
    }
}
