//! Chooses the thread that serves a request, so that requests do not wait for unrelated ones.
//!
//! The serving threads handle requests that need only the store's files. Requests that wait for a flush, a
//! command or a guest's file system must not occupy all of them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fuser::{Errno, ReplyEmpty};
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result, errno};

use super::super::tree::MountTree;
use super::Adapter;

/// Runs a handler; a panic becomes EIO for this request instead of ending the thread.
pub(super) fn answer<T>(
    tree: &MountTree,
    work: impl FnOnce(&MountTree) -> Result<T>,
) -> std::result::Result<T, Errno> {
    let result = catch_unwind(AssertUnwindSafe(|| work(tree))).unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Io, "a bug in chainfs; please report the log before this line"))
    });
    result.map_err(|error| {
        if error.kind() != ErrorKind::NotFound {
            tree.count_error();
            tracing::warn!("refused: {error}");
        }
        Errno::from_i32(errno(error.kind()).raw_os_error())
    })
}

impl Adapter {
    pub(super) fn answer<T>(
        &self,
        work: impl FnOnce(&MountTree) -> Result<T>,
    ) -> std::result::Result<T, Errno> {
        answer(&self.tree, work)
    }

    /// Runs a handler whose reply is only success or failure.
    pub(super) fn reply_empty(&self, reply: ReplyEmpty, work: impl FnOnce(&MountTree) -> Result<()>) {
        match self.answer(work) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    /// Offloads a handler to a new thread, because disks are slow and the serving threads must stay
    /// available. If no thread can be created, the serving thread runs it.
    pub(super) fn offload<R: Send + 'static, T>(
        &self,
        name: &str,
        reply: R,
        work: impl FnOnce(&MountTree) -> Result<T> + Send + 'static,
        send: impl FnOnce(R, std::result::Result<T, Errno>) + Send + 'static,
    ) {
        let tree = Arc::clone(&self.tree);
        // X2: a request that may block gets a thread of its own.
        in_a_thread(name, move || send(reply, answer(&tree, work)));
    }

    /// Runs a handler that may wait for a worker of a guest's file system. At most half of the serving
    /// threads wait; further requests are offloaded to new threads. So a guest's data cannot block access to
    /// disks.
    pub(super) fn offload_if_blocking(&self, inode: u64, work: impl FnOnce(&MountTree) + Send + 'static) {
        if !self.tree.may_block(inode) {
            return work(&self.tree);
        }
        let waiting = Waiter::new(&self.waiting);
        if waiting.others < self.features.threads / 2 {
            return work(&self.tree);
        }
        drop(waiting);
        let tree = Arc::clone(&self.tree);
        in_a_thread("offload", move || work(&tree));
    }
}

/// Counts a serving thread that may be waiting.
struct Waiter<'a> {
    all: &'a AtomicUsize,
    others: usize,
}

impl<'a> Waiter<'a> {
    fn new(all: &'a AtomicUsize) -> Self {
        Self { all, others: all.fetch_add(1, Ordering::AcqRel) }
    }
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Runs a task in a new thread, or in this one if no thread can be created.
fn in_a_thread(name: &str, work: impl FnOnce() + Send + 'static) {
    let task = Arc::new(Mutex::new(Some(work)));
    let run = {
        let task = Arc::clone(&task);
        move || {
            // The lock is released before the task runs.
            let task = task.lock().take();
            if let Some(task) = task {
                task();
            }
        }
    };
    if std::thread::Builder::new().name(name.into()).spawn(run).is_err() {
        let task = task.lock().take();
        if let Some(task) = task {
            task();
        }
    }
}
