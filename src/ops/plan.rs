//! What a command would do: the same value that its job runs.

use std::path::PathBuf;

use crate::error::Error;

/// A layer of a chain, before or after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanLayer {
    /// The view's name.
    pub name: Vec<u8>,
    /// The file, beneath the store.
    pub path: PathBuf,
    /// Whether it is the active layer.
    pub active: bool,
    /// What happens to it or has happened, in a few words; empty if nothing.
    pub note: String,
}

/// Everything a command would do.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The command's words.
    pub command: String,
    /// The chain as it is, top first.
    pub before: Vec<PlanLayer>,
    /// The chain as it would be, top first.
    pub after: Vec<PlanLayer>,
    /// Bytes that would be copied.
    pub bytes: u64,
    /// Bytes of free space that are needed, at most.
    pub space: u64,
    /// Files that would be removed.
    pub removed: Vec<PathBuf>,
    /// Files that would get another name: old and new.
    pub renamed: Vec<(PathBuf, PathBuf)>,
    /// Views that would be there no more.
    pub invalid: Vec<Vec<u8>>,
    /// What else is worth knowing beforehand, as sentences.
    pub notes: Vec<String>,
    /// Why it would not be done; empty if it would.
    pub refusals: Vec<Error>,
}
