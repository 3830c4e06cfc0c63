//! What an accepted command does in a thread of its own.

use crate::error::Result;

use super::context::Context;
use super::job_table::JobProgress;

/// The work of an accepted command: copying, the switch, and the end of its intent.
pub(super) trait Job: Send {
    /// Does it. When it returns, with or without an error, every view that is listed has its bytes.
    fn run(self: Box<Self>, context: &Context, progress: &JobProgress) -> Result<()>;
}

/// What beginning a command leaves to be done: a job, or nothing where no data has to be moved.
pub(super) type Begun = Option<Box<dyn Job>>;
