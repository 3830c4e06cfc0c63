//! What a command of a verb comes to for this process: a plan that is printed, or an exit code.

use super::output::print;
use super::warn;
use crate::error::{Error, ErrorKind, Result};
use crate::ops::{JobState, Status};
use crate::report::plan::is_refused;

/// Prints a plan; 1 if the command would be refused.
pub(super) fn print_plan(plan: &str) -> Result<u8> {
    print(plan)?;
    Ok(u8::from(is_refused(plan)))
}

/// The exit code or error of this process for the final status of a command.
pub(super) fn exit_code(status: &Status) -> Result<u8> {
    let sentence = |otherwise: &str| status.error.clone().unwrap_or_else(|| otherwise.to_string());
    status.notes.iter().for_each(|note| warn(note));
    match status.state {
        JobState::Done => Ok(0),
        JobState::Cancelled => Err(Error::new(ErrorKind::Cancelled, sentence("the command was cancelled"))),
        JobState::Failed => Err(Error::new(ErrorKind::Io, sentence("the command failed"))),
        JobState::Idle | JobState::Running => Err(Error::new(
            ErrorKind::Stale,
            "another command has started since; the result of this one is unknown",
        )),
    }
}
