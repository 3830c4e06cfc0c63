//! The `chainfs` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    chainfs::cli::main()
}
