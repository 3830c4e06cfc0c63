//! The engine: accepts requests, runs their jobs, reports their state.
//!
//! Promises: at most one job works on a chain, and on every chain that contains a layer which the job writes,
//! renames or unlinks; a refused request has changed nothing; a bug in one job harms no other job, and leaves
//! an intent that can be resumed.

use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, ErrorKind, Result};
use crate::store::{FoundIntent, Intent, Operation, Store, shown};

use super::asker::without_user;
use super::branch;
use super::commit;
use super::context::Context;
use super::domain_notes::domain_notes;
use super::job::Job;
use super::job_table::{ChainLocks, JobProgress, JobTable};
use super::pull;
use super::scanned_store::{ScannedStore, of_chain};
use super::words::Discards;
use super::{Plan, Request, Status};
use super::{resize, snapshot, virsh};

/// The jobs of one store.
pub struct Engine {
    context: Arc<Context>,
    jobs: Arc<JobTable>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Whether the engine is stopping. Held shared while a command begins, so that none begins unseen.
    stopping: RwLock<bool>,
    /// Whether plans report the locks of other processes.
    reports_locks: bool,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("store", self.context.store()).finish_non_exhaustive()
    }
}

impl Engine {
    /// The engine of `store`; it does nothing until a command comes.
    pub fn new(store: &Arc<Store>) -> Arc<Self> {
        Self::with(store, true)
    }

    /// The same for plans of a mounted store: locks of the daemon do not block the daemon's own commands.
    pub fn beside_mount(store: &Arc<Store>) -> Arc<Self> {
        Self::with(store, false)
    }

    fn with(store: &Arc<Store>, reports_locks: bool) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::new(Context::new(store)),
            jobs: Arc::default(),
            threads: Mutex::default(),
            stopping: RwLock::default(),
            reports_locks,
        })
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        self.context.store()
    }

    /// Sets the directory at which the store is mounted.
    pub fn set_mount(&self, directory: &Path) {
        self.context.set_mount(directory);
    }

    /// Resumes interrupted commands that no other process runs, and removes drafts of commands that never
    /// began. Returns when their jobs run, or when they are done if no data has to be moved.
    pub fn resume(self: &Arc<Self>) {
        if self.store().options().read_only {
            return;
        }
        if let Err(error) = self.store().sweep_trash() {
            tracing::warn!("could not sweep the trash: {error}");
        }
        if let Err(error) = self.store().sweep() {
            tracing::warn!("could not remove the drafts of interrupted commands: {error}");
        }
        self.resume_interrupted();
    }

    /// Resumes interrupted commands that no process runs and that were not refused before. A process that
    /// stops or is killed while others have the store open leaves its commands to them.
    pub fn resume_interrupted(self: &Arc<Self>) {
        for found in self.store().catalog().intents.clone() {
            let stopping = self.stopping.read();
            if *stopping || self.store().options().read_only {
                return;
            }
            let guard = self.store().guard();
            if !found.is_trusted || guard.is_refused(&found.name) || guard.is_owned(&found) {
                continue;
            }
            if let Err(error) = self.resume_intent(&found)
                && error.kind() != ErrorKind::Busy
            {
                let Intent { chain, command, .. } = &found.intent;
                let _span = in_log(chain, command).entered();
                tracing::error!(error = ?error.kind(), "{command}{}: {error}", of_chain(chain));
            }
        }
    }

    /// Whether an interrupted command may be waiting to be resumed.
    pub fn has_interrupted(&self) -> bool {
        let catalog = self.store().catalog();
        let guard = self.store().guard();
        let is_left = |found: &FoundIntent| {
            found.is_trusted && !guard.is_refused(&found.name) && !guard.is_owned(found)
        };
        !self.store().options().read_only && catalog.intents.iter().any(is_left)
    }

    /// Resumes an intent even if it was refused before. Returns the command's number.
    pub fn recover(self: &Arc<Self>, found: &FoundIntent) -> Result<u64> {
        self.resume_intent(found)
    }

    fn resume_intent(self: &Arc<Self>, found: &FoundIntent) -> Result<u64> {
        // The command's rights were checked when it was accepted. Checked again by the rights of another
        // caller, it might be refused, and the views that it invalidated would stay hidden.
        let _without_user = without_user();
        // A3: not even if a user asks for it by name.
        if !found.is_trusted {
            let fact = "is not resumed: other users may have written its intent; see problems.txt";
            return Err(Error::new(ErrorKind::Denied, format!("{} {fact}", found.intent.command)));
        }
        let (chain, command) = (found.intent.chain.clone(), found.intent.command.clone());
        let _span = in_log(&chain, &command).entered();
        let mut locks = self.jobs.take(std::slice::from_ref(&chain))?;
        let names = self.store().guard_names();
        // The user may have removed all interrupted commands.
        self.store().guard().prepare(&*names)?;
        let lock = self.store().guard().lock(&*names)?;
        let owned = self.store().guard().take_up(&*names, found).map_err(|error| {
            // The process that runs it writes its own status.
            if error.kind() == ErrorKind::Busy { error } else { self.note_not_resumed(found, error) }
        });
        let owned = owned.inspect_err(|error| self.jobs.refused(&chain, &command, error))?;
        tracing::info!("resuming: {command}{}", of_chain(&chain));
        let (number, progress) = self.jobs.begin(&chain, &command);
        let discards = discards_of(&owned.intent.command);
        let begun = match owned.intent.operation.clone() {
            Operation::Snapshot(operation) => {
                snapshot::resume(&self.context, owned.with(operation), lock).map(|()| None)
            }
            Operation::Copy(operation) => {
                branch::resume(&self.context, owned.with(operation), lock).map(|()| None)
            }
            Operation::Shrink(operation) => {
                resize::resume(&self.context, owned.with(operation), lock).map(|()| None)
            }
            Operation::Commit(operation) => {
                commit::resume(&self.context, owned.with(operation), discards, lock, &mut locks)
            }
            Operation::Pull(operation) => {
                pull::resume(&self.context, owned.with(operation), discards, lock, &mut locks)
            }
            Operation::Unknown => {
                Err(Error::new(ErrorKind::Corrupt, "the intent does not say which command was begun"))
            }
        };
        if begun.is_ok() {
            self.store().guard().forget_refusal(&found.name);
        }
        match begun {
            Ok(Some(job)) => {
                self.start((&chain, &command), number, progress, locks, job)?;
            }
            Ok(None) => numbered(number).in_scope(|| end(&self.jobs, (&chain, &command), number, &Ok(()))),
            Err(error) => {
                let error = self.note_not_resumed(found, error);
                self.jobs.end(&chain, number, &Err(error.clone()));
                return Err(error);
            }
        }
        Ok(number)
    }

    /// Notes in the store's problems why a command was not resumed.
    fn note_not_resumed(&self, found: &FoundIntent, error: Error) -> Error {
        // Files that are open will be closed some time.
        let is_final = error.kind() != ErrorKind::Busy;
        if !self.store().guard().note_refusal(&found.name, error.to_string(), is_final) {
            return error;
        }
        match self.store().rescan() {
            Ok(_) => error,
            Err(trouble) => error.within(format!("{trouble}, and")),
        }
    }

    /// The outcome of resuming an intent now, in words, or why it cannot be resumed. Changes nothing.
    pub fn examine(&self, intent: &Intent, name: &OsStr) -> Result<&'static str> {
        let scan = ScannedStore::scan_for_resume(self.store(), name)?;
        let discards = discards_of(&intent.command);
        match intent.operation.clone() {
            Operation::Snapshot(operation) => snapshot::examine(&scan, &intent.with(operation))
                .map(|completes| if completes { "will be completed" } else { "will be rolled back" }),
            Operation::Copy(_) => Ok("the unfinished copy will be removed"),
            Operation::Shrink(operation) => {
                resize::examine(&self.context, &scan, &intent.with(operation)).map(|_| "will be completed")
            }
            Operation::Commit(operation) => {
                commit::examine(&scan, &intent.with(operation), discards).map(|_| "will be completed")
            }
            Operation::Pull(operation) => {
                pull::examine(&scan, &intent.with(operation), discards).map(|_| "will be completed")
            }
            Operation::Unknown => {
                Err(Error::new(ErrorKind::Corrupt, "the intent does not say which command was begun"))
            }
        }
    }

    /// The plan of `request` on the chain at `chain`; only malformed words are an error.
    pub fn plan(self: &Arc<Self>, chain: &Path, request: &Request) -> Result<Plan> {
        self.planned(chain, request, || ScannedStore::scan(self.store()).map(Arc::new))
    }

    /// The plans of several commands, each by itself, as of one scan of the store.
    pub fn plans(self: &Arc<Self>, requests: &[(PathBuf, Request)]) -> Result<Vec<Result<Plan>>> {
        let scan = Arc::new(ScannedStore::scan(self.store())?);
        let plan =
            |(chain, request): &(PathBuf, Request)| self.planned(chain, request, || Ok(Arc::clone(&scan)));
        Ok(requests.iter().map(plan).collect())
    }

    fn planned(
        self: &Arc<Self>,
        chain: &Path,
        request: &Request,
        scan: impl FnOnce() -> Result<Arc<ScannedStore>>,
    ) -> Result<Plan> {
        // A plan opens the same files as its command would; it must not run beside a command.
        let _tokens = match self.jobs.take(&[chain.to_path_buf()]) {
            Ok(locks) => locks,
            Err(busy) => {
                return Ok(Plan { command: request.to_string(), refusals: vec![busy], ..Plan::default() });
            }
        };
        let Some(asked) = request.command() else {
            return Ok(Plan { command: request.to_string(), ..Plan::default() });
        };
        asked.introduce(&self.context, chain);
        let scan = scan()?;
        let (mut plan, touched) = asked.plan(&self.context, &scan, chain)?;
        if self.reports_locks {
            touched.refuse(&scan, &mut plan);
        }
        plan.refusals.extend(scan.not_permitted(&plan));
        plan.notes.extend(domain_notes(&scan, &plan));
        if !self.store().options().read_only {
            plan.refusals.extend(self.store().guard().check_place().err());
        }
        virsh::help(&scan, chain, asked, &mut plan);
        plan.command = request.to_string();
        Ok(plan)
    }

    /// Begins a command. Returns the command's number: when it is done if no data has to be moved, else when
    /// its job runs. A refusal is in the status, too.
    pub fn run(self: &Arc<Self>, chain: &Path, request: &Request, command: &str) -> Result<u64> {
        let _span = in_log(chain, command).entered();
        let begun = self.begin(chain, request, command).map_err(|error| match error.domain() {
            // The plan names virsh's command.
            Some(domain) => {
                let plan = self.plan(chain, request).unwrap_or_default();
                let is_it = |refusal: &Error| refusal.domain() == Some(domain);
                plan.refusals.into_iter().find(is_it).unwrap_or(error)
            }
            None => error,
        });
        if let Err(error) = &begun {
            tracing::info!(error = ?error.kind(), "{command}{}: refused: {error}", of_chain(chain));
            self.jobs.refused(chain, command, error);
        }
        begun
    }

    fn begin(self: &Arc<Self>, chain: &Path, request: &Request, command: &str) -> Result<u64> {
        let Some(asked) = request.command() else {
            return self.jobs.cancel(chain).map(|()| self.jobs.status(chain).number);
        };
        let stopping = self.stopping.read();
        if *stopping {
            return Err(Error::new(ErrorKind::Busy, "the store is being unmounted; mount it again first"));
        }
        if let Some(fact) = self.store().read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, format!("the store {fact}")));
        }
        // An interrupted command continues when it is given again.
        let is_same = |found: &&FoundIntent| {
            found.intent.chain == chain
                && found.intent.command == command
                && !self.store().guard().is_owned(found)
        };
        if let Some(found) = self.store().catalog().intents.iter().find(is_same) {
            return self.resume_intent(found);
        }
        let mut locks = self.jobs.take(&[chain.to_path_buf()])?;
        asked.introduce(&self.context, chain);
        let job = asked.begin(&self.context, chain, command, &mut locks)?;
        let (number, progress) = self.jobs.begin(chain, command);
        // Without a mount the process that opened the store reports it.
        if self.context.is_mounted() {
            locks.notes.extend(self.store().guard().new_place_note());
        }
        self.jobs.note(chain, std::mem::take(&mut locks.notes));
        match job {
            Some(job) => self.start((chain, command), number, progress, locks, job)?,
            None => numbered(number).in_scope(|| end(&self.jobs, (chain, command), number, &Ok(()))),
        }
        Ok(number)
    }

    /// Runs a job in a thread of its own.
    fn start(
        self: &Arc<Self>,
        (chain, command): (&Path, &str),
        number: u64,
        progress: Arc<JobProgress>,
        locks: ChainLocks,
        job: Box<dyn Job>,
    ) -> Result<()> {
        let (context, jobs) = (Arc::clone(&self.context), Arc::clone(&self.jobs));
        let (of, asked) = (chain.to_path_buf(), command.to_owned());
        let work = move || {
            let _command = in_log(&of, &asked).entered();
            let _job = numbered(number).entered();
            let done = catch_unwind(AssertUnwindSafe(|| job.run(&context, &progress)));
            let done = done.unwrap_or_else(|_| {
                let fact = "a bug in chainfs aborted it; mount the store again, and report the log's message";
                Err(Error::new(ErrorKind::Io, fact))
            });
            drop(locks);
            end(&jobs, (&of, &asked), number, &done);
        };
        let thread = thread::Builder::new().name("job".into()).spawn(work);
        let thread = thread.map_err(|error| {
            let error = Error::beginning("starting a thread", error);
            self.jobs.end(chain, number, &Err(error.clone()));
            error
        })?;
        let mut threads = self.threads.lock();
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Records in the status of a chain that a command was refused before it reached [`Engine::run`].
    pub fn refused(&self, chain: &Path, command: &str, error: &Error) {
        self.jobs.refused(chain, command, error);
    }

    /// The mount point, if the store is mounted.
    pub fn mount(&self) -> Option<PathBuf> {
        self.context.mount()
    }

    /// The state of the chain's last command.
    pub fn status(&self, chain: &Path) -> Status {
        self.jobs.status(chain)
    }

    /// The commands that are running, by chain.
    pub fn running(&self) -> Vec<(PathBuf, Status)> {
        self.jobs.running()
    }

    /// Waits until the status differs from `version`, for at most `patience`.
    pub fn wait(&self, chain: &Path, version: u64, patience: Duration) -> Status {
        self.jobs.wait(chain, version, patience)
    }

    /// Whether it accepts no more commands.
    pub fn is_stopping(&self) -> bool {
        *self.stopping.read()
    }

    /// Stops all jobs at their next piece, and returns when they have stopped. Their commands continue at the
    /// next mount.
    pub fn stop(&self) {
        // A command that waits for the store's lock holds this lock.
        self.store().guard().leave();
        *self.stopping.write() = true;
        self.jobs.stop();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// What the log says of a command, for all that happens meanwhile in this thread.
fn in_log(chain: &Path, command: &str) -> tracing::Span {
    // An error's level: the span is there whatever the level of the log.
    tracing::error_span!("command", chain = %shown(chain), command)
}

/// The same of its number, which it has once it has begun.
fn numbered(number: u64) -> tracing::Span {
    tracing::error_span!("job", job = number)
}

/// Ends a command that has begun.
fn end(jobs: &JobTable, (chain, command): (&Path, &str), number: u64, done: &Result<()>) {
    match done {
        Ok(()) => tracing::info!("{command}{}: done", of_chain(chain)),
        Err(error) => tracing::warn!(error = ?error.kind(), "{command}{}: {error}", of_chain(chain)),
    }
    jobs.end(chain, number, done);
}

/// The discards that the command of an intent allowed; words that cannot be parsed allowed none.
fn discards_of(command: &str) -> Discards {
    Request::parse_command(command.as_bytes()).map(|request| request.discards()).unwrap_or_default()
}
