//! FUSE requests over `io_uring` (Linux 6.14): the queues of one connection, one for each processor.
//!
//! A request arrives in the memory of a queue's entry, and its reply goes back from there: one system call
//! for both. This crate knows rings, entries and the headers of
//! requests. What a request means is its [`Handler`]'s.
//!
//! /dev/fuse stays with its own reader: the first request (INIT) comes from there, and so do forgotten inodes
//! and interrupts. The kernel offers `FUSE_OVER_IO_URING` in INIT. Once that is accepted it sends nothing
//! else before each queue has an entry, or one was refused. So [`Rings::prepare`] comes before the reply to
//! INIT, takes all that can fail, and [`Rings::start`] comes right after it.
//!
//! **Each thread has one entry that waits for a request**, so a request never waits for a thread that serves
//! another one while a thread of its queue is idle. If a request is not answered when its handler returns,
//! its thread registers a further entry: any number of requests may be answered later by other threads, and
//! the queue never runs dry.
//!
//! **Unsafe code** is in this crate only. It is needed for memory that the kernel writes (`entry`), for
//! submitting commands that name this memory (`ring`), and for the ioctls of passthrough (`backing`). The
//! rule by which it is sound: an entry's memory is reachable either by a command that the kernel has not
//! completed (`Armed`, which has no access to it and never unmaps it), or by this process (`Entry`).

mod backing;
mod cpus;
mod entry;
mod nudge;
mod request;
mod ring;
mod thread;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread::JoinHandle;

pub use backing::Backing;
pub use request::{Header, Payload, Request, ShortReply};

use thread::{QueueThread, Shared, Start};

/// Takes requests.
pub trait Handler: Send + Sync + 'static {
    /// Answers a request, now or later. Called in a thread of the queue that the request came from. A request
    /// that is dropped, also by a panic, fails with EIO.
    fn handle(&self, request: Request);
}

/// How many threads and how much memory.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Threads of each queue.
    pub threads_per_queue: usize,
    /// The largest payload of a request or reply: the larger one of `max_write` and `max_pages` in the reply
    /// to INIT.
    pub payload_len: usize,
}

/// Whether the kernel has FUSE over `io_uring`, and its administrator permits it for new connections: the
/// parameter `enable_uring` of the module.
pub fn is_enabled() -> bool {
    std::fs::read(PARAMETER).is_ok_and(|text| text.starts_with(b"Y"))
}

const PARAMETER: &str = "/sys/module/fuse/parameters/enable_uring";

/// Threads with rings and memory, without a connection.
pub struct Rings {
    threads: Vec<(JoinHandle<()>, mpsc::Sender<Start>, Arc<Shared>)>,
}

impl Rings {
    /// Makes the rings, with the memory of their first entries. Fails if `io_uring` is missing or forbidden,
    /// or if a limit is in the way.
    pub fn prepare(limits: Limits) -> io::Result<Self> {
        let (ready, is_ready) = mpsc::channel();
        let mut threads = Vec::new();
        for queue in cpus::queues(limits.threads_per_queue)? {
            let (start, started) = mpsc::channel();
            let shared = Arc::new(Shared::new(queue)?);
            let own = Arc::clone(&shared);
            let ready = ready.clone();
            let work = move || match QueueThread::new(own, limits.payload_len) {
                Ok(thread) => {
                    let _ = ready.send(Ok(()));
                    drop(ready);
                    if let Ok(start) = started.recv() {
                        thread.run(start);
                    }
                }
                Err(error) => drop(ready.send(Err(error))),
            };
            let name = format!("fuse-ring-{queue}");
            threads.push((std::thread::Builder::new().name(name).spawn(work)?, start, shared));
        }
        drop(ready);
        // Ends when all threads have said how it went, or have ended.
        is_ready.into_iter().collect::<io::Result<Vec<()>>>()?;
        Ok(Self { threads })
    }

    /// The number of descriptors that they have open: each thread has its ring, and what wakes it.
    pub fn descriptor_count(&self) -> usize {
        self.threads.len() * 2
    }

    /// Registers the entries with the connection of `device`, whose INIT was answered with
    /// `FUSE_OVER_IO_URING`. If the kernel refuses one, all requests go on coming through the device: the
    /// error says why.
    pub fn start(self, device: &Arc<OwnedFd>, handler: &Arc<dyn Handler>) -> (Running, io::Result<()>) {
        let (registered, is_registered) = mpsc::channel();
        let mut running = Vec::new();
        for (thread, start, shared) in self.threads {
            let (device, handler) = (Arc::clone(device), Arc::clone(handler));
            let _ = start.send(Start { device, handler, registered: registered.clone() });
            running.push((thread, shared));
        }
        drop(registered);
        let result = is_registered.into_iter().collect();
        (Running { threads: running }, result)
    }
}

/// Threads that serve a connection.
pub struct Running {
    threads: Vec<(JoinHandle<()>, Arc<Shared>)>,
}

impl Running {
    /// Waits until all threads have ended. Called when the connection has ended.
    pub fn stop(self) {
        for (_, shared) in &self.threads {
            shared.stop();
        }
        for (thread, _) in self.threads {
            // A panic of a thread was reported when it happened.
            let _ = thread.join();
        }
    }
}
