//! Writing results: a reader that has seen enough ends nothing with an error.

use std::io::{self, Write};

use crate::error::{Error, Result};

/// Writes `text` to standard output.
pub(super) fn print(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // As with `| head`.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.map_err(|error| Error::io("writing the result", error)),
    }
}
