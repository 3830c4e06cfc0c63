//! What every verb can do with its words.

use std::path::Path;

use crate::error::Result;

use super::context::Context;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::plan::Plan;
use super::scanned_store::ScannedStore;
use super::words::{Discards, LineBuilder, ParsedWords};

/// A request of one verb.
pub(super) trait Command {
    /// Reads its words.
    fn parse(words: &mut ParsedWords) -> Result<Self>
    where
        Self: Sized;

    /// Writes its words, without the verb.
    fn print(&self, line: &mut LineBuilder);

    /// Whether its words make sense by themselves.
    fn check(&self) -> Result<()>;

    /// What it may lose besides what it is for.
    fn discards(&self) -> Discards {
        Discards::default()
    }

    /// Makes files known that only its words name, before the store is looked at.
    fn introduce(&self, _context: &Context, _chain: &Path) {}

    /// What it would do to the chain, with every refusal, and the images that it would open.
    fn plan(&self, context: &Context, world: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)>;

    /// Does it, or begins the job that does. `command`: all its words; `locks`: those of the chain, to which
    /// more are added.
    fn begin(&self, context: &Context, chain: &Path, command: &str, locks: &mut ChainLocks) -> Result<Begun>;
}
