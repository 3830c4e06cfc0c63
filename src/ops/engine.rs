//! The engine: takes requests, runs their jobs, knows how they are doing.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::store::Store;

use super::{Plan, Request, Status};

/// The jobs of one store.
pub struct Engine {
    store: Arc<Store>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine").field("store", &self.store).finish_non_exhaustive()
    }
}

impl Engine {
    /// The engine of `store`; nothing is done before somebody asks.
    pub fn new(store: &Arc<Store>) -> Arc<Self> {
        Arc::new(Self { store: Arc::clone(store) })
    }

    /// Takes up what was begun before and is nobody else's: returns when that runs.
    pub fn resume(self: &Arc<Self>) {}

    /// What `request` on the chain at `chain` would do; only words that make no sense are an error.
    pub fn plan(self: &Arc<Self>, chain: &Path, request: &Request) -> Result<Plan> {
        let _ = (chain, request);
        Err(Error::new(ErrorKind::Unsupported, "no command is known yet"))
    }

    /// Begins what is asked. Returns the command's number: when it is done if no data has to be moved, else
    /// when its job runs. What is refused is in the status, too.
    pub fn run(self: &Arc<Self>, chain: &Path, request: &Request, command: &str) -> Result<u64> {
        let _ = (chain, request, command);
        Err(Error::new(ErrorKind::Unsupported, "no command is known yet"))
    }

    /// Notes for the status of a chain that a command was refused before it came to [`Engine::run`].
    pub fn refused(&self, chain: &Path, command: &str, error: &Error) {
        let _ = (chain, command, error);
    }

    /// How the last command of the chain is doing.
    pub fn status(&self, chain: &Path) -> Status {
        let _ = chain;
        Status::default()
    }

    /// Waits until the status is another than the one of `version`, for at most `patience`.
    pub fn wait(&self, chain: &Path, version: u64, patience: Duration) -> Status {
        let _ = (version, patience);
        self.status(chain)
    }

    /// Stops all jobs at their next chunk; what they have begun goes on at the next mount.
    pub fn stop(&self) {}
}
