//! The work of an accepted command in a thread of its own.

use crate::error::Result;

use super::context::Context;
use super::job_table::JobProgress;

/// The work of an accepted command: copying, the switch, and the end of its intent.
pub(super) trait Job: Send {
    /// Runs the job. When it returns, with or without an error, every listed view has its bytes.
    fn run(self: Box<Self>, context: &Context, progress: &JobProgress) -> Result<()>;
}

/// The result of beginning a command: a job, or nothing where no data has to be moved.
pub(super) type Begun = Option<Box<dyn Job>>;
