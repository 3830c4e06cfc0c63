//! Chooses the thread that serves a call, so that calls do not wait for unrelated ones, and answers it.
//!
//! The transport's threads serve what needs only the store's files. Calls that wait for a flush, a command or
//! a guest's file system must not occupy all of them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use crate::error::{Error, ErrorKind};

use super::errno::{Errno, Failure};
use super::{Responder, Service};

/// The operations, by how long they may take. A write to a disk is none: it is served at once, because its
/// bytes are the transport's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Lookup,
    Attributes,
    SetAttributes,
    ReadLink,
    Access,
    Open,
    Read,
    Command,
    Seek,
    Fallocate,
    Flush,
    Sync,
    Release,
    OpenDirectory,
    List,
    Statistics,
    ExtendedAttributes,
}

/// The thread that serves a call.
enum Thread {
    /// The transport's.
    Calling,
    /// The transport's, unless half of them wait already.
    CallingOrOwn,
    /// One of its own.
    Own,
}

impl Operation {
    /// `may_block`: whether a worker, or another machine, may have to read a disk first.
    fn thread(self, may_block: impl FnOnce() -> bool) -> Thread {
        match self {
            // X2: a call that may wait gets a thread of its own.
            Operation::Command => Thread::Own,
            // A thread would take as long to make as a fast disk takes to sync.
            Operation::Sync => Thread::CallingOrOwn,
            Operation::Lookup
            | Operation::Attributes
            | Operation::ReadLink
            | Operation::Open
            | Operation::Read
            | Operation::Seek
            | Operation::OpenDirectory
            | Operation::List
            | Operation::ExtendedAttributes => {
                if may_block() {
                    Thread::CallingOrOwn
                } else {
                    Thread::Calling
                }
            }
            Operation::SetAttributes
            | Operation::Access
            | Operation::Fallocate
            | Operation::Flush
            | Operation::Release
            | Operation::Statistics => Thread::Calling,
        }
    }

    /// The name of a thread that serves nothing else.
    fn thread_name(self) -> &'static str {
        match self {
            Operation::Command => "command",
            Operation::Sync => "fsync",
            _ => "offload",
        }
    }
}

impl<B: Send + Sync + 'static> Service<B> {
    /// Serves a call in the right thread, and answers it.
    pub(super) fn serve<T, R: Responder<T>>(
        self: &Arc<Self>,
        operation: Operation,
        inode: u64,
        mut reply: R,
        work: impl FnOnce(&Self, &mut R) -> Result<T, Failure> + Send + 'static,
    ) {
        let may_wait = reply.may_wait();
        let task = move |service: &Self| {
            let outcome = service.answer(|| work(service, &mut reply));
            reply.finish(outcome);
        };
        match operation.thread(|| self.tree.may_block(inode)) {
            Thread::Calling => return task(self),
            Thread::CallingOrOwn => {
                // Neither a guest's data nor a slow disk can block access to others.
                let waiting = Waiter::new(&self.waiting);
                if may_wait && waiting.others < self.features.threads / 2 {
                    return task(self);
                }
            }
            Thread::Own => {}
        }
        let service = Arc::clone(self);
        in_a_thread(operation.thread_name(), move || task(&service));
    }

    /// Runs a handler. A panic becomes EIO for this call instead of ending the thread. Errors are counted and
    /// logged.
    pub(super) fn answer<T>(&self, work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Errno> {
        let result = catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
            let fact = "a bug in chainfs; please report the log before this line";
            Err(Error::new(ErrorKind::Io, fact).into())
        });
        result.map_err(|Failure { errno, error }| {
            if let Some(error) = error
                && error.kind() != ErrorKind::NotFound
            {
                self.tree.count_error();
                tracing::warn!(error = ?error.kind(), errno = errno.raw_os_error(), "refused: {error}");
            }
            errno
        })
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

/// Runs a task in a new thread, because disks are slow and the serving threads must stay available; in this
/// one if no thread can be created.
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
