//! The command line: what people type, before anything is done about it.

pub mod args;
pub mod config;
mod log;
pub mod manual;
pub mod mount;
pub mod mount_options;
pub mod store_options;
pub mod umount;

use std::process::ExitCode;

use args::Command;

use crate::error::Error;
use crate::report::safe::terminal;

/// Runs the program with the words of its command line.
pub fn main() -> ExitCode {
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(refusal) => {
            let _ = refusal.error.print();
            return ExitCode::from(refusal.code);
        }
    };
    match &cli.command {
        Command::Mount(args) => mount::run(args),
        Command::Umount(args) => umount::run(args),
        _ => ExitCode::from(2),
    }
}

/// Says on stderr what went wrong.
pub(crate) fn complain(error: &Error) {
    eprintln!("chainfs: {}", terminal(&error.to_string()));
}
