//! How many workers run at the same time, and who is ended for another.
//!
//! Promises: there are never more than the process can feed (each takes three descriptors and some memory); one that
//! nobody asks anything makes room for the next, the one that was asked longest ago first; and one that is being asked is never ended
//! for another: who finds all of them at work waits.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{DescriptorReservation, Descriptors};

use super::process::{Worker, WorkerProgram};

/// Descriptors that a worker costs the daemon.
const DESCRIPTORS: usize = 3;
/// Workers that run at the same time, where none has to be ended that has just been asked.
const USUAL: usize = 16;
/// The same at most, whatever is asked.
const MOST: usize = 64;
/// Who has not been asked for so long is likely not to be asked next.
const LULL: Duration = Duration::from_millis(500);
/// For how long somebody waits for one of those that are all at work, and how often he looks.
const PATIENCE: Duration = Duration::from_secs(30);
const GLANCE: Duration = Duration::from_millis(50);

/// The workers of one browser.
#[derive(Debug)]
pub(in crate::browse) struct Pool {
    pub(super) program: WorkerProgram,
    descriptors: Arc<Descriptors>,
    /// Workers that run or did so a moment ago, and how many do.
    running: Mutex<(Vec<Weak<Worker>>, usize)>,
    ended: Condvar,
}

/// That one worker may run, until dropped.
#[derive(Debug)]
pub(super) struct Permit {
    pool: Arc<Pool>,
    _room: DescriptorReservation,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.pool.running.lock().1 -= 1;
        self.pool.ended.notify_one();
    }
}

impl Pool {
    pub(in crate::browse) fn new(program: WorkerProgram, descriptors: Arc<Descriptors>) -> Arc<Self> {
        Arc::new(Self { program, descriptors, running: Mutex::default(), ended: Condvar::new() })
    }

    /// How many workers run.
    pub(in crate::browse) fn running(&self) -> usize {
        self.running.lock().1
    }

    /// Lets `worker` run, once there is room.
    pub(super) fn admit(self: &Arc<Self>, worker: &Arc<Worker>) -> Result<Permit> {
        let begun = Instant::now();
        // A third of all descriptors, so that those of the images are left.
        let most = (self.descriptors.limit() / 3 / DESCRIPTORS).clamp(3, MOST);
        loop {
            if let Some(permit) = self.enter(worker, most.min(USUAL)) {
                return Ok(permit);
            }
            if self.end_one(LULL) {
                continue;
            }
            if let Some(permit) = self.enter(worker, most) {
                return Ok(permit);
            }
            if self.end_one(Duration::ZERO) {
                continue;
            }
            if begun.elapsed() > PATIENCE {
                let fact = "all processes that read guests' file systems are at work; try again in a while, or raise the \
                            limit of open files (ulimit -n, LimitNOFILE=)";
                return Err(Error::new(ErrorKind::Exhausted, fact));
            }
            self.ended.wait_for(&mut self.running.lock(), GLANCE);
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
        // Not under the lock: another worker may be ended to make room.
        let Some(room) = self.descriptors.try_reserve(DESCRIPTORS) else {
            self.running.lock().1 -= 1;
            return None;
        };
        let mut running = self.running.lock();
        running.0.retain(|known| known.upgrade().is_some_and(|known| known.may_run()));
        running.0.push(Arc::downgrade(worker));
        drop(running);
        self.descriptors.register(Arc::downgrade(worker) as _);
        Some(Permit { pool: Arc::clone(self), _room: room })
    }

    /// Ends the worker that was asked longest ago, if that is so long ago; whether there was one.
    pub(super) fn end_one(&self, idle: Duration) -> bool {
        let known: Vec<Arc<Worker>> = self.running.lock().0.iter().filter_map(Weak::upgrade).collect();
        let mut idle: Vec<(Duration, Arc<Worker>)> = known
            .into_iter()
            .filter_map(|worker| Some((worker.idle_for()?, worker)))
            .filter(|(since, _)| *since >= idle)
            .collect();
        idle.sort_by_key(|(since, _)| std::cmp::Reverse(*since));
        idle.iter().any(|(since, worker)| worker.rest(since.saturating_sub(LULL)))
    }
}
