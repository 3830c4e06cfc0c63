//! The plan of a command: the same value that its job runs.

use std::path::PathBuf;

use crate::error::Error;

/// A layer of a chain, before or after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlanLayer {
    /// The view's name.
    pub name: Vec<u8>,
    /// The file, relative to the store.
    pub path: PathBuf,
    /// Whether it is the active layer.
    pub active: bool,
    /// What happens to it or has happened, in a few words; may be empty.
    pub note: String,
}

/// All the effects of a command.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The command's words.
    pub command: String,
    /// The chain now, top first.
    pub before: Vec<PlanLayer>,
    /// The chain afterwards, top first.
    pub after: Vec<PlanLayer>,
    /// Bytes that would be copied.
    pub bytes: u64,
    /// Bytes of free space that are needed, at most.
    pub space: u64,
    /// Files that would be removed.
    pub removed: Vec<PathBuf>,
    /// Files that would be renamed: old and new name.
    pub renamed: Vec<(PathBuf, PathBuf)>,
    /// Views that would be removed.
    pub invalid: Vec<Vec<u8>>,
    /// Further notes, as sentences.
    pub notes: Vec<String>,
    /// Why the command would be refused; empty if it would not.
    pub refusals: Vec<Error>,
}
