//! The interface that every verb implements.

use std::path::Path;

use crate::error::Result;

use super::context::Context;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::plan::Plan;
use super::scanned_store::ScannedStore;
use super::virsh::DomainDisk;
use super::words::{Discards, LineBuilder, ParsedWords};

/// The request of one verb.
pub(super) trait Command {
    /// Reads its words.
    fn parse(words: &mut ParsedWords) -> Result<Self>
    where
        Self: Sized;

    /// Writes its words, without the verb.
    fn print(&self, line: &mut LineBuilder);

    /// Checks what can be checked without looking at the store.
    fn check(&self) -> Result<()>;

    /// What the command may discard beyond its purpose.
    fn discards(&self) -> Discards {
        Discards::default()
    }

    /// Adds files to the scan that only the command names, before the store is scanned.
    fn introduce(&self, _context: &Context, _chain: &Path) {}

    /// The effect on the chain, with every refusal, and the images that the command would open.
    fn plan(&self, context: &Context, scan: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)>;

    /// virsh's command that does the same while a domain of libvirt runs on the disk; `None` if there is
    /// none.
    fn virsh(&self, _disk: &DomainDisk<'_>) -> Option<String> {
        None
    }

    /// Carries the command out, or begins its job. `command`: all its words; `locks`: those of the chain, to
    /// which more are added.
    fn begin(&self, context: &Context, chain: &Path, command: &str, locks: &mut ChainLocks) -> Result<Begun>;
}
