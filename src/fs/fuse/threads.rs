//! In which thread a request is answered, so that none waits for what has nothing to do with it.
//!
//! The mount's own threads answer whatever only needs the store's files. What waits for a disk to be flushed, for a command, or for a
//! guest's file system to be looked into does not keep them all.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fuser::{Errno, ReplyEmpty};
use parking_lot::Mutex;

use crate::error::{Error, ErrorKind, Result, errno};

use super::super::tree::MountTree;
use super::Adapter;

/// Runs a handler; a bug in it becomes EIO for this request instead of an end of the thread.
pub(super) fn answer<T>(tree: &MountTree, work: impl FnOnce(&MountTree) -> Result<T>) -> std::result::Result<T, Errno> {
    let result = catch_unwind(AssertUnwindSafe(|| work(tree))).unwrap_or_else(|_| {
        Err(Error::new(ErrorKind::Io, "a bug in chainfs; please report what the log says before this line"))
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
    pub(super) fn answer<T>(&self, work: impl FnOnce(&MountTree) -> Result<T>) -> std::result::Result<T, Errno> {
        answer(&self.tree, work)
    }

    /// Runs a handler of which only success or failure is told.
    pub(super) fn done(&self, reply: ReplyEmpty, work: impl FnOnce(&MountTree) -> Result<()>) {
        match self.answer(work) {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        }
    }

    /// Runs a handler in a thread of its own: disks take their time, and the workers are for those who do not
    /// wait for one. Where there can be no thread, a worker waits after all.
    pub(super) fn aside<R: Send + 'static, T>(
        &self,
        name: &str,
        reply: R,
        work: impl FnOnce(&MountTree) -> Result<T> + Send + 'static,
        tell: impl FnOnce(R, std::result::Result<T, Errno>) + Send + 'static,
    ) {
        let tree = Arc::clone(&self.tree);
        // X2: what may wait has a thread of its own.
        in_a_thread(name, move || tell(reply, answer(&tree, work)));
    }

    /// Runs a handler that may have to wait until a guest's file system has been looked into: half of the workers at most do that, and
    /// from then on each such request has a thread of its own. Disks are served whatever a guest has written.
    pub(super) fn look(&self, inode: u64, work: impl FnOnce(&MountTree) + Send + 'static) {
        if !self.tree.may_wait(inode) {
            return work(&self.tree);
        }
        let waiting = Waiter::new(&self.waiting);
        if waiting.others < self.features.threads / 2 {
            return work(&self.tree);
        }
        drop(waiting);
        let tree = Arc::clone(&self.tree);
        in_a_thread("look", move || work(&tree));
    }
}

/// One who may be waiting.
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

/// Does it in a thread of its own, or, where there can be none, in this one after all.
fn in_a_thread(name: &str, work: impl FnOnce() + Send + 'static) {
    let task = Arc::new(Mutex::new(Some(work)));
    let run = {
        let task = Arc::clone(&task);
        move || {
            // Not while it is locked: it takes its time.
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
