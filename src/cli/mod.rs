//! The command line: parses it, runs the command, and reports its result.

mod address;
pub mod args;
mod auto_unmount;
mod check;
mod compare;
mod complete;
pub mod config;
mod create;
mod doctor;
mod guest;
mod info;
mod journal;
mod log;
pub mod manual;
mod map;
pub mod mount;
pub mod mount_options;
mod offline;
mod outcome;
mod output;
mod progress;
mod recover;
mod remount;
pub mod store_options;
mod target;
mod trash;
mod tree;
mod tree_watch;
pub mod umount;
mod verbs;
mod who;

use std::io::Write;
use std::process::ExitCode;

use args::Command;

use crate::browse::worker::WorkerTask;
use crate::error::{Error, ErrorKind, Result};
use crate::report::safe::terminal;

/// Runs the program with the arguments of its process.
pub fn main() -> ExitCode {
    if auto_unmount::wait_and_unmount() {
        return ExitCode::SUCCESS;
    }
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(refusal) => {
            let _ = refusal.error.print();
            return ExitCode::from(refusal.code);
        }
    };
    let result = match &cli.command {
        Command::Mount(args) => return mount::run(args),
        Command::Worker { without_seccomp, unlocks } => {
            let task = if *unlocks { WorkerTask::Unlock } else { WorkerTask::Read };
            return crate::browse::worker::serve(!without_seccomp, task);
        }
        Command::Umount(args) => return umount::run(args),
        Command::Tree(args) => tree::run(args),
        Command::Info(args) => info::run(args),
        Command::Map(args) => map::run(args),
        Command::Check(args) => check::run(args),
        Command::Compare(args) => compare::run(args),
        Command::Diff(args) => guest::diff::run(args),
        Command::Ls(args) => guest::ls::run(args),
        Command::Cat(args) => guest::cat::run(args),
        Command::Cp(args) => guest::copy::run(args),
        Command::Versions(args) => guest::versions::run(args),
        Command::Find(args) => guest::find::run(args),
        Command::Log(args) => guest::log::run(args),
        Command::Try(args) => guest::trial::run(args),
        Command::Create(args) => create::run(args),
        Command::Verb(verb) => verb.invocation().and_then(|invocation| verbs::run(&invocation)),
        Command::Trash(args) => trash::run(args),
        Command::Who(args) => who::run(args),
        Command::Recover(args) => recover::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Complete { words } => complete::run(words),
        Command::Completions { shell } => completions(*shell),
        Command::Man { dir } => {
            let written = manual::manual_pages(dir);
            written.map(|()| 0).map_err(|error| Error::io(format!("writing into {}", dir.display()), error))
        }
    };
    ExitCode::from(result.unwrap_or_else(|error| {
        complain(&error);
        failure(&cli.command, error.kind())
    }))
}

/// The exit code of a command that has failed.
fn failure(command: &Command, kind: ErrorKind) -> u8 {
    match (command, kind) {
        // Its exit code 2 means "corrupt".
        (Command::Check(_), _) => 1,
        (Command::Compare(_) | Command::Diff(_) | Command::Who(_), _) | (_, ErrorKind::Usage) => 2,
        _ => 1,
    }
}

fn completions(shell: clap_complete::Shell) -> Result<u8> {
    let mut script = Vec::new();
    manual::completions(shell, &mut script).map_err(|error| Error::io("writing the completions", error))?;
    output::print(&String::from_utf8_lossy(&script))?;
    Ok(0)
}

/// Prints an error to stderr.
pub(crate) fn complain(error: &Error) {
    warn(&error.to_string());
}

/// Prints a warning to stderr.
fn warn(sentence: &str) {
    // If stderr is closed, there is no other place to report to.
    let _ = writeln!(std::io::stderr(), "chainfs: {}", terminal(sentence));
}
