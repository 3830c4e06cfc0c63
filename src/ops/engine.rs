//! The engine: takes requests, runs their jobs, knows how they are doing.
//!
//! Promises: one job at a time works on a chain, and on every chain that contains a layer which it writes,
//! renames or unlinks; a request that is refused has changed nothing; a bug that one job brings out harms no
//! other, and leaves its intent to be taken up.

use std::ffi::OsStr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::error::{Error, ErrorKind, Result};
use crate::store::{FoundIntent, Intent, Operation, Store, shown};

use super::asker::as_nobody;
use super::branch;
use super::commit;
use super::context::Context;
use super::job::Job;
use super::job_table::{ChainLocks, JobProgress, JobTable};
use super::pull;
use super::scanned_store::{ScannedStore, of_chain};
use super::words::Discards;
use super::{Plan, Request, Status};
use super::{resize, snapshot};

/// The jobs of one store.
pub struct Engine {
    context: Arc<Context>,
    board: Arc<JobTable>,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Whether it is. Held shared while a command begins, so that none begins behind its back.
    stopping: RwLock<bool>,
    /// Whether plans say what other processes have locked.
    looks_at_locks: bool,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("store", self.context.store()).finish_non_exhaustive()
    }
}

impl Engine {
    /// The engine of `store`; nothing is done before somebody asks.
    pub fn new(store: &Arc<Store>) -> Arc<Self> {
        Self::with(store, true)
    }

    /// The same for plans of a store that is mounted: what the daemon has locked keeps no command of its own
    /// away.
    pub fn beside_mount(store: &Arc<Store>) -> Arc<Self> {
        Self::with(store, false)
    }

    fn with(store: &Arc<Store>, looks_at_locks: bool) -> Arc<Self> {
        Arc::new(Self {
            context: Arc::new(Context::new(store)),
            board: Arc::default(),
            threads: Mutex::default(),
            stopping: RwLock::default(),
            looks_at_locks,
        })
    }

    /// The store.
    pub fn store(&self) -> &Arc<Store> {
        self.context.store()
    }

    /// Says where the store is mounted.
    pub fn set_mount(&self, directory: &Path) {
        self.context.set_mount(directory);
    }

    /// Takes up what was begun before and is nobody else's, and clears away what was not even begun: returns
    /// when that runs, or is done if no data has to be moved.
    pub fn resume(self: &Arc<Self>) {
        if self.store().options().read_only {
            return;
        }
        if let Err(error) = self.store().sweep_trash() {
            tracing::warn!("the trash cannot be swept: {error}");
        }
        if let Err(error) = self.store().sweep() {
            tracing::warn!("what commands that were cut off have left was not removed: {error}");
        }
        self.take_up_what_is_left();
    }

    /// Takes up what nobody is at work on, and what was not refused before. Who stops or is killed while
    /// others have the store open leaves it to them.
    pub fn take_up_what_is_left(self: &Arc<Self>) {
        for found in self.store().catalog().intents.clone() {
            let stopping = self.stopping.read();
            if *stopping || self.store().options().read_only {
                return;
            }
            let guard = self.store().guard();
            if !found.is_trusted || guard.is_refused(&found.name) || guard.is_owned(&found) {
                continue;
            }
            if let Err(error) = self.take_up(&found)
                && error.kind() != ErrorKind::Busy
            {
                tracing::error!("{}{}: {error}", found.intent.command, of_chain(&found.intent.chain));
            }
        }
    }

    /// Whether something may be left to be taken up.
    pub fn has_work_left(&self) -> bool {
        let catalog = self.store().catalog();
        let guard = self.store().guard();
        let is_left = |found: &FoundIntent| {
            found.is_trusted && !guard.is_refused(&found.name) && !guard.is_owned(found)
        };
        !self.store().options().read_only && catalog.intents.iter().any(is_left)
    }

    /// Takes up an intent also if that was refused before. Returns the command's number.
    pub fn recover(self: &Arc<Self>, found: &FoundIntent) -> Result<u64> {
        self.take_up(found)
    }

    fn take_up(self: &Arc<Self>, found: &FoundIntent) -> Result<u64> {
        // What it may do was judged when it was accepted. By the rights of whoever gives it again it might be
        // refused, and what it has spoilt would stay hidden.
        let _nobody = as_nobody();
        // A3: not even if somebody asks for it by name.
        if !found.is_trusted {
            let fact = "is not carried out, for others may have written its note; see problems.txt";
            return Err(Error::new(ErrorKind::Denied, format!("{} {fact}", found.intent.command)));
        }
        let (chain, command) = (found.intent.chain.clone(), found.intent.command.clone());
        let mut tokens = self.board.take(std::slice::from_ref(&chain))?;
        let names = self.store().guard_names();
        // Somebody may have removed all there was.
        self.store().guard().prepare(&*names)?;
        let lock = self.store().guard().lock(&*names)?;
        let owned = self.store().guard().take_up(&*names, found).map_err(|error| {
            // Who is at work on it will say himself how it goes.
            if error.kind() == ErrorKind::Busy { error } else { self.not_taken_up(found, error) }
        });
        let owned = owned.inspect_err(|error| self.board.refused(&chain, &command, error))?;
        tracing::info!("taking up: {command}{}", of_chain(&chain));
        let (number, progress) = self.board.begin(&chain, &command);
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
                commit::resume(&self.context, owned.with(operation), discards, lock, &mut tokens)
            }
            Operation::Pull(operation) => {
                pull::resume(&self.context, owned.with(operation), discards, lock, &mut tokens)
            }
            Operation::Unknown => Err(Error::new(ErrorKind::Corrupt, "nobody can tell what was begun")),
        };
        if begun.is_ok() {
            self.store().guard().forget_refusal(&found.name);
        }
        match begun {
            Ok(Some(job)) => {
                self.start(&chain, number, progress, tokens, job)?;
            }
            Ok(None) => self.board.end(&chain, number, &Ok(())),
            Err(error) => {
                let error = self.not_taken_up(found, error);
                self.board.end(&chain, number, &Err(error.clone()));
                return Err(error);
            }
        }
        Ok(number)
    }

    /// Notes for all who look at the store why a command was not taken up.
    fn not_taken_up(&self, found: &FoundIntent, error: Error) -> Error {
        // What others have open they close some time.
        let is_final = error.kind() != ErrorKind::Busy;
        if !self.store().guard().note_refusal(&found.name, error.to_string(), is_final) {
            return error;
        }
        match self.store().rescan() {
            Ok(_) => error,
            Err(trouble) => error.within(format!("{trouble}, and")),
        }
    }

    /// What would become of an intent if it were taken up now: in words, or why it is not. Nothing is
    /// changed.
    pub fn examine(&self, intent: &Intent, name: &OsStr) -> Result<&'static str> {
        let world = ScannedStore::look_for(self.store(), name)?;
        let discards = discards_of(&intent.command);
        match intent.operation.clone() {
            Operation::Snapshot(operation) => snapshot::examine(&world, &intent.with(operation))
                .map(|goes_on| if goes_on { "goes on to its end" } else { "goes back to its beginning" }),
            Operation::Copy(_) => Ok("what was half made goes"),
            Operation::Shrink(operation) => {
                resize::examine(&self.context, &world, &intent.with(operation)).map(|_| "goes on to its end")
            }
            Operation::Commit(operation) => {
                commit::examine(&world, &intent.with(operation), discards).map(|_| "goes on to its end")
            }
            Operation::Pull(operation) => {
                pull::examine(&world, &intent.with(operation), discards).map(|_| "goes on to its end")
            }
            Operation::Unknown => Err(Error::new(ErrorKind::Corrupt, "nobody can tell what was begun")),
        }
    }

    /// What `request` on the chain at `chain` would do; only words that make no sense are an error.
    pub fn plan(self: &Arc<Self>, chain: &Path, request: &Request) -> Result<Plan> {
        // A plan opens what its command would; a command at work is not to meet that.
        let _tokens = match self.board.take(&[chain.to_path_buf()]) {
            Ok(tokens) => tokens,
            Err(busy) => {
                return Ok(Plan { command: request.to_string(), refusals: vec![busy], ..Plan::default() });
            }
        };
        let Some(asked) = request.command() else {
            return Ok(Plan { command: request.to_string(), ..Plan::default() });
        };
        asked.introduce(&self.context, chain);
        let world = ScannedStore::look(self.store())?;
        let (mut plan, touched) = asked.plan(&self.context, &world, chain)?;
        if self.looks_at_locks {
            touched.refuse(&world, &mut plan);
        }
        plan.refusals.extend(world.not_permitted(&plan));
        if !self.store().options().read_only {
            plan.refusals.extend(self.store().guard().check_place().err());
        }
        plan.command = request.to_string();
        Ok(plan)
    }

    /// Begins what is asked. Returns the command's number: when it is done if no data has to be moved, else
    /// when its job runs. What is refused is in the status, too.
    pub fn run(self: &Arc<Self>, chain: &Path, request: &Request, command: &str) -> Result<u64> {
        let begun = self.begin(chain, request, command);
        if let Err(error) = &begun {
            self.board.refused(chain, command, error);
        }
        begun
    }

    fn begin(self: &Arc<Self>, chain: &Path, request: &Request, command: &str) -> Result<u64> {
        let Some(asked) = request.command() else {
            return self.board.cancel(chain).map(|()| self.board.status(chain).number);
        };
        let stopping = self.stopping.read();
        if *stopping {
            return Err(Error::new(ErrorKind::Busy, "the store is being let go of; mount it again first"));
        }
        if let Some(fact) = self.store().read_only() {
            return Err(Error::new(ErrorKind::ReadOnly, format!("the store {fact}")));
        }
        // One that was cut off goes on when it is given again.
        let is_same = |found: &&FoundIntent| {
            found.intent.chain == chain
                && found.intent.command == command
                && !self.store().guard().is_owned(found)
        };
        if let Some(found) = self.store().catalog().intents.iter().find(is_same) {
            return self.take_up(found);
        }
        let mut tokens = self.board.take(&[chain.to_path_buf()])?;
        asked.introduce(&self.context, chain);
        let job = asked.begin(&self.context, chain, command, &mut tokens)?;
        let (number, progress) = self.board.begin(chain, command);
        // Without a mount whoever opened the store says so.
        if self.context.is_mounted() {
            tokens.notes.extend(self.store().guard().new_place_note());
        }
        self.board.note(chain, std::mem::take(&mut tokens.notes));
        match job {
            Some(job) => self.start(chain, number, progress, tokens, job)?,
            None => self.board.end(chain, number, &Ok(())),
        }
        Ok(number)
    }

    /// Lets a job run by itself.
    fn start(
        self: &Arc<Self>,
        chain: &Path,
        number: u64,
        progress: Arc<JobProgress>,
        tokens: ChainLocks,
        job: Box<dyn Job>,
    ) -> Result<()> {
        let (context, board, of) = (Arc::clone(&self.context), Arc::clone(&self.board), chain.to_path_buf());
        let work = move || {
            let done = catch_unwind(AssertUnwindSafe(|| job.run(&context, &progress)));
            let done = done.unwrap_or_else(|_| {
                let fact =
                    "a bug in chainfs broke it off; mount the store again, and report what the log says";
                Err(Error::new(ErrorKind::Io, fact))
            });
            if let Err(error) = &done {
                tracing::warn!("chain {}: {error}", shown(&of));
            }
            drop(tokens);
            board.end(&of, number, &done);
        };
        let thread = thread::Builder::new().name("job".into()).spawn(work);
        let thread = thread.map_err(|error| {
            let error = Error::beginning("starting a thread", error);
            self.board.end(chain, number, &Err(error.clone()));
            error
        })?;
        let mut threads = self.threads.lock();
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    /// Notes for the status of a chain that a command was refused before it came to [`Engine::run`].
    pub fn refused(&self, chain: &Path, command: &str, error: &Error) {
        self.board.refused(chain, command, error);
    }

    /// How the last command of the chain is doing.
    pub fn status(&self, chain: &Path) -> Status {
        self.board.status(chain)
    }

    /// Waits until the status is another than the one of `version`, for at most `patience`.
    pub fn wait(&self, chain: &Path, version: u64, patience: Duration) -> Status {
        self.board.wait(chain, version, patience)
    }

    /// Whether it takes no more commands.
    pub fn is_stopping(&self) -> bool {
        *self.stopping.read()
    }

    /// Stops all jobs at their next piece, and returns when they have; what they have begun goes on at the
    /// next mount.
    pub fn stop(&self) {
        // Who has begun to wait for the store's lock holds the other back.
        self.store().guard().leave();
        *self.stopping.write() = true;
        self.board.stop();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            let _ = thread.join();
        }
    }
}

/// What the command of an intent said of what it may lose; words that are not understood said nothing.
fn discards_of(command: &str) -> Discards {
    Request::parse_command(command.as_bytes()).map(|request| request.discards()).unwrap_or_default()
}
