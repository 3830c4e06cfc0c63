//! Writes back every few seconds what is only in memory, and looks every hour whether anything in the trash
//! is too old.
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

/// Periods between two looks at the trash: an hour.
const TRASH_PERIODS: u32 = 720;

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
            let mut periods: u32 = 0;
            while stopped.recv_timeout(PERIOD) == Err(RecvTimeoutError::Timeout) {
                // A bug that one image brings out is told in the log, and harms no other.
                let _ = catch_unwind(AssertUnwindSafe(|| store.flush_writers()));
                periods = (periods + 1) % TRASH_PERIODS;
                if periods == 0
                    && let Err(error) = store.sweep_trash()
                {
                    tracing::warn!("the trash cannot be swept: {error}");
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
