//! Flushes unwritten data every few seconds, and removes old items from the trash every hour.
//!
//! A program that calls fsync(2) does not need it; for all others it bounds the data that a crash can lose.
//! The kernel does not report sync(2) or syncfs(2) to a FUSE daemon.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::Store;

/// The same as the kernel's for the page cache (`vm.dirty_writeback_centisecs`).
const PERIOD: Duration = Duration::from_secs(5);

/// Periods between two checks of the trash: an hour.
const TRASH_PERIODS: u32 = 720;

/// The thread that flushes a store's writers, until dropped.
pub struct Flusher {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Flusher {
    /// Starts flushing the active disks of `store`.
    pub fn start(store: &Arc<Store>) -> std::io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let store = Arc::clone(store);
        let thread = thread::Builder::new().name("flusher".into()).spawn(move || {
            let mut periods: u32 = 0;
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                // A panic that one image causes is logged, and affects no other.
                let _ = catch_unwind(AssertUnwindSafe(|| store.flush_writers()));
                periods = (periods + 1) % TRASH_PERIODS;
                if periods == 0
                    && let Err(error) = store.sweep_trash()
                {
                    tracing::warn!("could not sweep the trash: {error}");
                }
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
