//! The running commands and their progress: the status of every chain's last command, and the locks that keep
//! two commands from one chain.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, ErrorKind, Result};
use crate::store::shown;

use super::status::{JobState, Status};

/// A running command.
#[derive(Debug, Default)]
pub(super) struct JobProgress {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: AtomicBool,
    stopped: AtomicBool,
    /// It has passed the point after which it cannot be rolled back.
    settled: AtomicBool,
}

impl JobProgress {
    /// Sets the total number of bytes.
    pub(super) fn set_total(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Adds to the number of bytes done.
    pub(super) fn advance(&self, bytes: u64) {
        self.done.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Called between two pieces: `Cancelled` if the job is to end here.
    pub(super) fn check(&self) -> Result<()> {
        // J3: every job calls this between its pieces.
        if self.is_stopped() {
            let fact = "stopped; it is resumed when the store is mounted again";
            return Err(Error::new(ErrorKind::Cancelled, fact));
        }
        if self.cancelled.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Cancelled, "cancelled"));
        }
        Ok(())
    }

    /// Whether the job ends because of an unmount: its intent is kept.
    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Passes the point of no return; `Cancelled` if the job was cancelled before.
    pub(super) fn forbid_cancel(&self) -> Result<()> {
        self.settled.store(true, Ordering::SeqCst);
        self.check()
    }

    fn cancel(&self) -> Result<()> {
        let busy = || Err(Error::new(ErrorKind::Busy, "it is being finished and cannot be cancelled"));
        if self.settled.load(Ordering::SeqCst) {
            return busy();
        }
        // One of the two sees the other's store.
        self.cancelled.store(true, Ordering::SeqCst);
        if self.settled.load(Ordering::SeqCst) { busy() } else { Ok(()) }
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }
}

/// The last command of a chain.
#[derive(Default)]
struct LastCommand {
    status: Status,
    progress: Option<Arc<JobProgress>>,
}

#[derive(Default)]
struct JobTableState {
    numbers: u64,
    version: u64,
    chains: HashMap<PathBuf, LastCommand>,
    locks: HashSet<PathBuf>,
}

/// All commands of a store.
#[derive(Default)]
pub(super) struct JobTable {
    state: Mutex<JobTableState>,
    changed: Condvar,
}

/// The locks of some chains, held until dropped.
pub(super) struct ChainLocks {
    jobs: Arc<JobTable>,
    chains: Vec<PathBuf>,
    /// Notes for the caller who gave the command.
    pub(super) notes: Vec<String>,
}

impl Drop for ChainLocks {
    fn drop(&mut self) {
        let mut state = self.jobs.state.lock();
        for chain in &self.chains {
            state.locks.remove(chain);
        }
    }
}

impl ChainLocks {
    /// Locks more chains.
    pub(super) fn extend(&mut self, chains: &[PathBuf]) -> Result<()> {
        let more: Vec<PathBuf> =
            chains.iter().filter(|chain| !self.chains.contains(chain)).cloned().collect();
        let mut taken = self.jobs.take(&more)?;
        self.chains.append(&mut taken.chains);
        Ok(())
    }
}

impl JobTable {
    /// Locks all these chains, or none: `Busy`.
    pub(super) fn take(self: &Arc<Self>, chains: &[PathBuf]) -> Result<ChainLocks> {
        let mut state = self.state.lock();
        // J1: all locks or none.
        if let Some(taken) = chains.iter().find(|chain| state.locks.contains(*chain)) {
            let command =
                state.chains.get(taken).map_or("another command", |last| last.status.command.as_str());
            let fact = format!(
                "{} is in use by a command ({command}); wait until it is done, or cancel it",
                shown(taken)
            );
            return Err(Error::new(ErrorKind::Busy, fact));
        }
        state.locks.extend(chains.iter().cloned());
        Ok(ChainLocks { jobs: Arc::clone(self), chains: chains.to_vec(), notes: Vec::new() })
    }

    /// Records that a command begins; returns its number and its progress.
    pub(super) fn begin(&self, chain: &Path, command: &str) -> (u64, Arc<JobProgress>) {
        let progress = Arc::new(JobProgress::default());
        let mut state = self.state.lock();
        state.numbers += 1;
        let number = state.numbers;
        let status =
            Status { number, command: command.to_owned(), state: JobState::Running, ..Status::default() };
        state.set(chain, LastCommand { status, progress: Some(Arc::clone(&progress)) });
        self.changed.notify_all();
        (number, progress)
    }

    /// Adds notes to the status of the command that has just begun.
    pub(super) fn note(&self, chain: &Path, notes: Vec<String>) {
        if let Some(last) = self.state.lock().chains.get_mut(chain) {
            last.status.notes = notes;
        }
    }

    /// Records how a command has ended, unless a later one has begun.
    pub(super) fn end(&self, chain: &Path, number: u64, outcome: &Result<()>) {
        let mut state = self.state.lock();
        let Some(last) = state.chains.get_mut(chain).filter(|last| last.status.number == number) else {
            return;
        };
        let mut status = last.seen();
        match outcome {
            Ok(()) => {
                (status.state, status.done) = (JobState::Done, status.total);
            }
            Err(error) => {
                let is_cancelled = error.kind() == ErrorKind::Cancelled;
                status.state = if is_cancelled { JobState::Cancelled } else { JobState::Failed };
                status.error = Some(error.to_string());
            }
        }
        state.set(chain, LastCommand { status, progress: None });
        self.changed.notify_all();
    }

    /// Records that a command was refused; the status of a running command stays.
    pub(super) fn refused(&self, chain: &Path, command: &str, error: &Error) {
        let mut state = self.state.lock();
        state.numbers += 1;
        let number = state.numbers;
        if state.chains.get(chain).is_some_and(|last| last.status.state == JobState::Running) {
            return;
        }
        let (state_now, error) = (JobState::Failed, Some(error.to_string()));
        let status =
            Status { number, command: command.to_owned(), state: state_now, error, ..Status::default() };
        state.set(chain, LastCommand { status, progress: None });
        self.changed.notify_all();
    }

    /// The state of a chain's last command.
    pub(super) fn status(&self, chain: &Path) -> Status {
        self.state.lock().chains.get(chain).map(LastCommand::seen).unwrap_or_default()
    }

    /// The commands that are running, by chain.
    pub(super) fn running(&self) -> Vec<(PathBuf, Status)> {
        let state = self.state.lock();
        let running = state.chains.iter().filter(|(_, last)| last.progress.is_some());
        let mut running: Vec<_> = running.map(|(chain, last)| (chain.clone(), last.seen())).collect();
        running.sort_by(|one, other| one.0.cmp(&other.0));
        running
    }

    /// Waits until the status of a chain differs from `version`, for at most `patience`.
    pub(super) fn wait(&self, chain: &Path, version: u64, patience: Duration) -> Status {
        let end = Instant::now() + patience;
        let mut state = self.state.lock();
        loop {
            let status = state.chains.get(chain).map(LastCommand::seen).unwrap_or_default();
            let now = Instant::now();
            if status.version != version || now >= end {
                return status;
            }
            // Progress sends no notification; it is polled.
            let pause = (end - now).min(Duration::from_millis(100));
            self.changed.wait_for(&mut state, pause);
        }
    }

    /// Asks the running command of a chain to end.
    pub(super) fn cancel(&self, chain: &Path) -> Result<()> {
        let state = self.state.lock();
        match state.chains.get(chain).and_then(|last| last.progress.as_ref()) {
            Some(progress) => progress.cancel(),
            None => {
                Err(Error::new(ErrorKind::NotFound, format!("no command is running on {}", shown(chain))))
            }
        }
    }

    /// Asks all commands to end at their next piece and to keep their intents.
    pub(super) fn stop(&self) {
        let state = self.state.lock();
        state.chains.values().filter_map(|last| last.progress.as_ref()).for_each(|progress| progress.stop());
    }
}

impl JobTableState {
    fn set(&mut self, chain: &Path, mut last: LastCommand) {
        self.version += 1;
        // Leaves room for the number of bytes done, which is part of the version.
        last.status.version = self.version << 32;
        self.chains.insert(chain.to_path_buf(), last);
    }
}

impl LastCommand {
    /// The status with the current progress.
    fn seen(&self) -> Status {
        let mut status = self.status.clone();
        if let Some(progress) = &self.progress {
            status.done = progress.done.load(Ordering::Relaxed);
            status.total = progress.total.load(Ordering::Relaxed).max(status.done);
            // In units of 64 KiB, of which 32 bits count 256 TiB.
            status.version |= (status.done >> 16) & 0xFFFF_FFFF;
        }
        status
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_running_from_their_begin_to_their_end() {
        let table = JobTable::default();
        let (web, db) = (Path::new("web01"), Path::new("db01"));
        let (number, progress) = table.begin(web, "commit");
        table.begin(db, "pull");
        progress.set_total(8);
        progress.advance(2);
        let running: Vec<_> = table
            .running()
            .into_iter()
            .map(|(chain, status)| (chain, status.command, status.done, status.total))
            .collect();
        let expected =
            [("db01".into(), "pull".to_owned(), 0, 0), ("web01".into(), "commit".to_owned(), 2, 8)];
        assert_eq!(running, expected);
        table.end(web, number, &Ok(()));
        assert_eq!(table.running().len(), 1);
        table.refused(web, "commit", &Error::new(ErrorKind::Usage, "no"));
        assert_eq!(table.running().len(), 1);
    }
}
