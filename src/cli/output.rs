//! Writes results to standard output. A closed pipe is not an error.

use std::io::{self, Write};

use crate::error::{Error, Result};

/// Writes `text` to standard output.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // The reader has closed the pipe, as `| head` does.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| Error::io("writing the result", error)),
    }
}
