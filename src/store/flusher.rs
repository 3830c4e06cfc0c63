//! Writes back every few seconds what is only in memory.
//!
//! Who calls fsync(2) does not need it; for all others it bounds what a crash can take. The kernel
//! does not tell a FUSE daemon of sync(2) or syncfs(2).

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::Store;

/// As the kernel's own for the page cache (`vm.dirty_writeback_centisecs`).
const PERIOD: Duration = Duration::from_secs(5);

/// The thread that flushes a store's writers, until dropped.
pub struct Flusher {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    /// Starts flushing what of `store` is written.
    pub fn start(store: &Arc<Store>) -> std::io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let store = Arc::clone(store);
        let thread = thread::Builder::new().name("flusher".into()).spawn(move || {
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                // A bug that one image brings out is told in the log, and harms no other.
                let _ = catch_unwind(AssertUnwindSafe(|| store.flush_writers()));
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
