//! Limits the number of running workers, and chooses which one is stopped for another.
//!
//! Promises:
//! - There are never more workers than the process has resources for (each takes three descriptors and some
//!   memory).
//! - An idle worker makes room for the next one, the one with the oldest request first.
//! - A busy worker is never stopped for another: if all are busy, the request waits.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{DescriptorReservation, Descriptors};

use super::process::{Worker, WorkerProgram};

/// Descriptors of the daemon per worker.
const DESCRIPTORS: usize = 3;
/// Running workers, as long as this needs no recently used worker to stop.
const USUAL: usize = 16;
/// Running workers at most.
const MOST: usize = 64;
/// A worker idle for this long is unlikely to get the next request.
const RECENT: Duration = Duration::from_millis(500);
/// How long a request waits while all workers are busy, and how often it retries.
const PATIENCE: Duration = Duration::from_secs(30);
const RETRY_PERIOD: Duration = Duration::from_millis(50);

/// The workers of one browser.
#[derive(Debug)]
pub(in crate::browse) struct Pool {
    pub(super) program: WorkerProgram,
    descriptors: Arc<Descriptors>,
    /// Workers that run or ran a moment ago, and the number of running ones.
    running: Mutex<(Vec<Weak<Worker>>, usize)>,
    stopped: Condvar,
}

/// The permission for one worker to run, until dropped.
#[derive(Debug)]
pub(super) struct Permit {
    pool: Arc<Pool>,
    _room: DescriptorReservation,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.pool.running.lock().1 -= 1;
        self.pool.stopped.notify_one();
    }
}

impl Pool {
    pub(in crate::browse) fn new(program: WorkerProgram, descriptors: Arc<Descriptors>) -> Arc<Self> {
        Arc::new(Self { program, descriptors, running: Mutex::default(), stopped: Condvar::new() })
    }

    /// The number of running workers.
    pub(in crate::browse) fn running(&self) -> usize {
        self.running.lock().1
    }

    /// Lets `worker` run, once there is room.
    pub(super) fn admit(self: &Arc<Self>, worker: &Arc<Worker>) -> Result<Permit> {
        let started = Instant::now();
        // A third of all descriptors, so that images can still be opened.
        let most = (self.descriptors.limit() / 3 / DESCRIPTORS).clamp(3, MOST);
        loop {
            if let Some(permit) = self.enter(worker, most.min(USUAL)) {
                return Ok(permit);
            }
            if self.stop_one_idle(RECENT) {
                continue;
            }
            if let Some(permit) = self.enter(worker, most) {
                return Ok(permit);
            }
            if self.stop_one_idle(Duration::ZERO) {
                continue;
            }
            if started.elapsed() > PATIENCE {
                let fact = "all file-system workers are busy; retry later, or raise the \
                            limit of open files (ulimit -n, LimitNOFILE=)";
                return Err(Error::new(ErrorKind::Exhausted, fact));
            }
            self.stopped.wait_for(&mut self.running.lock(), RETRY_PERIOD);
        }
    }

    fn enter(self: &Arc<Self>, worker: &Arc<Worker>, most: usize) -> Option<Permit> {
        let take = || {
            let mut running = self.running.lock();
            let is_free = running.1 < most;
            running.1 += usize::from(is_free);
            is_free
        };
        if !take() {
            return None;
        }
        // Not under the lock: another worker may be stopped to make room.
        let Some(room) = self.descriptors.try_reserve(DESCRIPTORS) else {
            self.running.lock().1 -= 1;
            return None;
        };
        let mut running = self.running.lock();
        running.0.retain(|known| known.upgrade().is_some_and(|known| known.may_be_running()));
        running.0.push(Arc::downgrade(worker));
        drop(running);
        self.descriptors.register(Arc::downgrade(worker) as _);
        Some(Permit { pool: Arc::clone(self), _room: room })
    }

    /// Stops the worker with the oldest request, if it has been idle for `idle`; returns whether there was
    /// one.
    pub(super) fn stop_one_idle(&self, idle: Duration) -> bool {
        let known: Vec<Arc<Worker>> = self.running.lock().0.iter().filter_map(Weak::upgrade).collect();
        let mut idle: Vec<(Duration, Arc<Worker>)> = known
            .into_iter()
            .filter_map(|worker| Some((worker.idle_for()?, worker)))
            .filter(|(since, _)| *since >= idle)
            .collect();
        idle.sort_by_key(|(since, _)| std::cmp::Reverse(*since));
        idle.iter().any(|(since, worker)| worker.stop_if_idle(since.saturating_sub(RECENT)))
    }
}
