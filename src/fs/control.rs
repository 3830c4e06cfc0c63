//! Control files: a write runs a command, and a read returns its status.
//!
//! One write is one command, at any file offset. This module does not change the store: [`Request`] parses
//! the text, and the engine runs the command.

use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use lru::LruCache;
use parking_lot::{Condvar, Mutex};

use crate::error::{Error, ErrorKind, Result};
use crate::ops::{Engine, MAX_COMMAND_LEN, Request, Verb, as_user};
use crate::report;
use crate::store::STORE_DIRECTORY;

use super::access::Viewer;
use super::change::read_only;
use super::tree::MountTree;

/// Name of the directories that hold control files.
pub const CONTROL: &str = "control";

/// The number of plans in the cache, one per chain.
const PLANS_CACHED: usize = 256;
/// Characters of an invalid command that the status shows.
const SHOWN_LEN: usize = 200;

/// The scope of a control directory.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum ControlScope {
    /// The store: commands for several chains at once.
    Store,
    /// One chain, by path.
    Chain(Arc<PathBuf>),
}

/// The files of a `control` directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ControlFile {
    /// Takes commands of one verb; reads return the usage.
    Verb(Verb),
    /// Takes commands of all verbs without running them; reads return the plan.
    Plan,
    /// Reads return the status of the last command.
    Status,
    /// Reads return the progress until the command has ended.
    Progress,
}

impl ControlScope {
    /// The key of the status in the engine. No chain has the store's key.
    pub(super) fn key(&self) -> &Path {
        use std::ffi::OsStr;
        use std::os::unix::ffi::OsStrExt;
        match self {
            ControlScope::Store => Path::new(OsStr::from_bytes(STORE_DIRECTORY)),
            ControlScope::Chain(path) => path,
        }
    }

    /// The control files of this scope, with their names, sorted by name.
    pub fn files(&self) -> &'static [(ControlFile, &'static str)] {
        type Files = Vec<(ControlFile, &'static str)>;
        static OF_STORE: LazyLock<Files> = LazyLock::new(|| {
            let verbs = Verb::ALL.into_iter().filter(|verb| verb.is_for_store());
            sorted(verbs, [(ControlFile::Plan, "plan"), (ControlFile::Status, "status")])
        });
        static OF_CHAIN: LazyLock<Files> = LazyLock::new(|| {
            let others = [
                (ControlFile::Plan, "plan"),
                (ControlFile::Status, "status"),
                (ControlFile::Progress, "progress"),
            ];
            sorted(Verb::ALL, others)
        });
        fn sorted(
            verbs: impl IntoIterator<Item = Verb>,
            others: impl IntoIterator<Item = (ControlFile, &'static str)>,
        ) -> Files {
            let verbs = verbs.into_iter().map(|verb| (ControlFile::Verb(verb), verb.name()));
            let mut files: Files = verbs.chain(others).collect();
            files.sort_unstable_by_key(|(_, name)| *name);
            files
        }
        match self {
            ControlScope::Store => &OF_STORE,
            ControlScope::Chain(_) => &OF_CHAIN,
        }
    }

    fn check(&self, request: &Request) -> Result<()> {
        match self {
            ControlScope::Store => request.check_for_store(),
            ControlScope::Chain(_) => request.check_for_chain(),
        }
    }
}

impl ControlFile {
    /// Whether commands can be written to it.
    pub(super) fn takes_commands(self) -> bool {
        match self {
            ControlFile::Verb(_) | ControlFile::Plan => true,
            ControlFile::Status | ControlFile::Progress => false,
        }
    }
}

/// The engine, and the state of the control files.
#[derive(Debug)]
pub(super) struct Controls {
    engine: Arc<Engine>,
    plans: Mutex<LruCache<ControlScope, Arc<[u8]>>>,
    /// Whether interrupted jobs are still being resumed; commands wait for the end.
    resuming: Mutex<bool>,
    resumed: Condvar,
    /// Held while jobs are being stopped: a second caller must not return before they have stopped.
    stopping: Mutex<()>,
}

/// An open control file.
#[derive(Debug)]
pub struct ControlHandle {
    scope: ControlScope,
    file: ControlFile,
    /// The user who opened it. This user's rights apply to commands, whichever process writes them.
    viewer: Viewer,
    position: Mutex<Position>,
}

/// The position of the text in the file. A client that writes a command and then reads on, without seeking to
/// the start, gets the reply from its beginning.
#[derive(Debug, Default)]
struct Position {
    /// The text that reads return.
    text: Arc<[u8]>,
    /// The file offset at which it begins.
    origin: u64,
    /// The end of the last command, until the next read.
    written: Option<u64>,
    /// The end of a text that was too long: a write there is its continuation, and no command.
    refused: Option<u64>,
    /// The plan made through this handle.
    plan: Option<Arc<[u8]>>,
}

impl Controls {
    pub(super) fn new(engine: Arc<Engine>) -> Self {
        let plans = Mutex::new(LruCache::new(NonZero::new(PLANS_CACHED).expect("not zero")));
        Self {
            engine,
            plans,
            resuming: Mutex::default(),
            resumed: Condvar::new(),
            stopping: Mutex::default(),
        }
    }

    pub(super) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// The present text of a control file.
    fn text(&self, scope: &ControlScope, file: ControlFile) -> Arc<[u8]> {
        match file {
            ControlFile::Verb(verb) => verb.usage().as_bytes().into(),
            ControlFile::Status => {
                report::status::status(&self.engine.status(scope.key())).into_bytes().into()
            }
            ControlFile::Plan => {
                let last = self.plans.lock().get(scope).cloned();
                last.unwrap_or_else(|| PLAN_USAGE.as_bytes().into())
            }
            // The length is unknown in advance.
            ControlFile::Progress => Arc::default(),
        }
    }
}

const PLAN_USAGE: &str = "\
plan: a whole command, as in: commit top=sn3 base=sn1

Changes nothing. Read this file afterwards: it has the plan of the command, or the reason for a refusal.
";

impl ControlHandle {
    pub(super) fn new(scope: ControlScope, file: ControlFile, viewer: Viewer) -> Self {
        Self { scope, file, viewer, position: Mutex::default() }
    }

    /// Reads from `at`.
    pub(super) fn read(&self, tree: &MountTree, at: u64, buf: &mut [u8]) -> usize {
        let mut position = self.position.lock();
        let after_command = position.written.take() == Some(at);
        if at == 0 || after_command || at < position.origin {
            position.origin = if after_command { at } else { 0 };
            let text = position.plan.as_ref().map(|plan| tree.redacted(&self.viewer, plan));
            position.text = text.unwrap_or_else(|| tree.control_text(&self.viewer, &self.scope, self.file));
        }
        let from = usize::try_from(at - position.origin).ok();
        let rest = from.and_then(|from| position.text.get(from..)).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        len
    }

    /// The length of the text.
    pub(super) fn len(&self, tree: &MountTree) -> u64 {
        tree.control_text(&self.viewer, &self.scope, self.file).len() as u64
    }

    /// Whether `len` bytes at `at` continue a refused text. The kernel splits a long write: the parts are no
    /// commands of their own.
    fn is_rest(&self, at: u64, len: usize) -> bool {
        let mut position = self.position.lock();
        let is_rest = at > 0 && position.refused == Some(at);
        let end = at.saturating_add(len as u64);
        position.refused = (is_rest || len > MAX_COMMAND_LEN).then_some(end);
        position.written = (!is_rest).then_some(end);
        is_rest
    }
}

/// Interval of checks for interrupted jobs of other processes: no event reports the death of their owner.
const ORPHAN_CHECK_INTERVAL: std::time::Duration = std::time::Duration::from_secs(1);

/// Admits commands when it is dropped, also by a panic.
struct ResumeGuard(Arc<MountTree>);

impl Drop for ResumeGuard {
    fn drop(&mut self) {
        let controls = self.0.controls();
        *controls.resuming.lock() = false;
        controls.resumed.notify_all();
    }
}

impl MountTree {
    /// The present text of a control file for a user.
    pub(super) fn control_text(&self, viewer: &Viewer, scope: &ControlScope, file: ControlFile) -> Arc<[u8]> {
        let text = self.controls().text(scope, file);
        match file {
            ControlFile::Status | ControlFile::Plan => self.redacted(viewer, &text),
            ControlFile::Verb(_) | ControlFile::Progress => text,
        }
    }

    /// The text without names of images that the user may not read.
    fn redacted(&self, viewer: &Viewer, text: &Arc<[u8]>) -> Arc<[u8]> {
        if viewer.subject().is_none() {
            return Arc::clone(text);
        }
        self.rights().redact(viewer, &String::from_utf8_lossy(text)).into_bytes().into()
    }

    /// Resumes interrupted jobs in a thread. Only commands wait for it: resuming may access this mount
    /// itself, if it lies in its own store.
    pub fn resume(self: &Arc<Self>) {
        *self.controls().resuming.lock() = true;
        let resuming = ResumeGuard(Arc::clone(self));
        let engine = Arc::downgrade(resuming.0.engine());
        let work = move || {
            resuming.0.engine().resume();
            drop(resuming);
            while let Some(engine) = engine.upgrade().filter(|engine| !engine.is_stopping()) {
                if engine.has_interrupted() {
                    engine.resume_interrupted();
                }
                drop(engine);
                std::thread::sleep(ORPHAN_CHECK_INTERVAL);
            }
        };
        if let Err(error) = std::thread::Builder::new().name("resume".into()).spawn(work) {
            tracing::warn!("interrupted jobs are left to the next mount: {error}");
        }
    }

    /// Stops all jobs after their present step, and returns when they have stopped.
    pub fn stop(&self) {
        let _turn = self.controls().stopping.lock();
        self.engine().stop();
    }

    /// Runs the command of a write to a control file. On return, the command has finished or a job has
    /// started.
    pub(super) fn command(&self, handle: &ControlHandle, at: u64, text: &[u8]) -> Result<usize> {
        if handle.is_rest(at, text.len()) {
            return Err(Error::new(ErrorKind::Usage, "the start of this text was refused"));
        }
        let ControlHandle { scope, file, viewer, position } = handle;
        if let ControlScope::Chain(chain) = scope {
            let leaf = self.leaf_of(chain)?;
            let catalog = self.store().catalog();
            // A plan or an error would reveal layers that the user may not read.
            if let Err(error) = self.rights().check_read(viewer, &catalog, &catalog.layers(leaf), true) {
                if let ControlFile::Verb(verb) = file {
                    self.engine().refused(scope.key(), &shown(*verb, text), &error);
                }
                return Err(error);
            }
        }
        let _user = viewer.commander().map(|subject| as_user(self.store(), subject));
        match file {
            ControlFile::Verb(verb) => self.run(scope, *verb, text)?,
            ControlFile::Plan => {
                let (shown, outcome) = self.plan(scope, text);
                position.lock().plan = Some(Arc::clone(&shown));
                self.controls().plans.lock().put(scope.clone(), shown);
                outcome?;
            }
            ControlFile::Status | ControlFile::Progress => return Err(read_only()),
        }
        Ok(text.len())
    }

    fn run(&self, scope: &ControlScope, verb: Verb, text: &[u8]) -> Result<()> {
        let engine = self.controls().engine();
        let mut resuming = self.controls().resuming.lock();
        self.controls().resumed.wait_while(&mut resuming, |resuming| *resuming);
        drop(resuming);
        let request = Request::parse(verb, text).and_then(|request| {
            scope.check(&request)?;
            if self.store().options().read_only {
                return Err(Error::new(ErrorKind::ReadOnly, "the store is mounted read-only"));
            }
            Ok(request)
        });
        match request {
            Ok(request) => engine.run(scope.key(), &request, &request.to_string()).map(drop),
            Err(error) => {
                engine.refused(scope.key(), &shown(verb, text), &error);
                Err(error)
            }
        }
    }

    fn plan(&self, scope: &ControlScope, text: &[u8]) -> (Arc<[u8]>, Result<()>) {
        let planned = Request::parse_command(text).and_then(|request| {
            scope.check(&request)?;
            self.controls().engine().plan(scope.key(), &request)
        });
        let (shown, outcome) = match planned {
            Ok(plan) => (report::plan::plan(&plan), Ok(())),
            Err(error) => (report::plan::refusal(&error), Err(error)),
        };
        (shown.into_bytes().into(), outcome)
    }
}

/// An invalid command, shortened for a line of the status.
fn shown(verb: Verb, text: &[u8]) -> String {
    let line = text.strip_suffix(b"\n").unwrap_or(text);
    let start = String::from_utf8_lossy(&line[..line.len().min(SHOWN_LEN * 4)]).into_owned();
    let mut shown: String = start.chars().take(SHOWN_LEN).collect();
    if shown.len() < line.len() {
        shown.push_str("...");
    }
    report::safe::terminal(format!("{} {shown}", verb.name()).trim_end())
}
