//! The verbs (`chainfs snapshot`, `commit` ...): through a mount's control files, or in this process if the
//! store is not mounted.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::args::Invocation;
use super::offline;
use super::outcome::{exit_code, print_plan};
use super::progress::Meter;
use super::target::place_in_mount;
use super::warn;
use crate::error::{Error, ErrorKind, Result};
use crate::fs::CONTROL;
use crate::ops::{JobState, Request, Status};
use crate::report::plan::is_refused;
use crate::report::status::parse_status;
use crate::store::shown;

/// Interval of status reads if `progress` cannot be read.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Limit of chains listed when the given one does not exist.
const MAX_CHAINS_LISTED: usize = 8;

/// Runs a verb.
pub(super) fn run(invocation: &Invocation<'_>) -> Result<u8> {
    let Invocation { target, request, run: args } = invocation;
    let Some((store, rest)) = place_in_mount(target)? else {
        if args.detach {
            let fact = "without a mount the command runs in this process; leave out --detach";
            return Err(Error::new(ErrorKind::Usage, fact));
        }
        return offline::run(target, request, args);
    };
    if args.store.is_some() || !args.options.is_empty() {
        let fact = "--store and -o are for unmounted images; the mount has its own options";
        return Err(Error::new(ErrorKind::Usage, fact));
    }
    let control = control_directory(target, request)?;
    if args.dry_run {
        return match planned(&control, request)? {
            Some(plan) => print_plan(&plan),
            // A read-only mount accepts no text.
            None => offline::plan_of_mounted(&store, &rest, request),
        };
    }
    // A revert may change the shape of the chain: its notes are shown first.
    if let (Request::Revert(_), Some(plan)) = (request, planned(&control, request)?) {
        plan.lines().filter_map(|line| line.strip_prefix("note: ")).for_each(warn);
    }
    let status = send_command(&control, request)?;
    if args.detach || *request == Request::Cancel {
        return Ok(0);
    }
    let status = follow(&control, status, Meter::new(args.progress))?;
    exit_code(&status)
}

/// The directory of the control files.
fn control_directory(target: &Path, request: &Request) -> Result<PathBuf> {
    let is_for_store = matches!(request, Request::Snapshot(snapshot) if !snapshot.chains.is_empty());
    let directory = if is_for_store { target.join(".chainfs").join(CONTROL) } else { target.join(CONTROL) };
    match std::fs::metadata(directory.join("status")) {
        Ok(_) => Ok(directory),
        Err(error)
            if matches!(error.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) =>
        {
            Err(takes_no_commands(target, is_for_store))
        }
        Err(error) => Err(Error::io(format!("opening {}", shown(&directory)), error)),
    }
}

/// Why a path in a mount takes no commands, with the nearest one that does.
fn takes_no_commands(target: &Path, is_for_store: bool) -> Error {
    let usage = |fact: String| Error::new(ErrorKind::Usage, format!("{} {fact}", shown(target)));
    if is_for_store {
        return usage("takes no commands for several chains; name the mount itself".into());
    }
    let takes = |place: &Path| place.join(CONTROL).join("status").exists();
    if let Some(chain) = target.ancestors().skip(1).find(|above| takes(above)) {
        return usage(format!("takes no commands; name its chain, {}", shown(chain)));
    }
    let directory = if target.is_dir() { target } else { target.parent().unwrap_or(target) };
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut chains: Vec<String> = entries
        .map(|entry| entry.path())
        .filter(|path| !path.ends_with(".chainfs") && takes(path))
        .map(|path| shown(&path))
        .take(MAX_CHAINS_LISTED)
        .collect();
    chains.sort();
    let remedy = if chains.is_empty() {
        "name a chain's directory".to_owned()
    } else {
        format!("name a chain, as in {}", chains.join(", "))
    };
    if target.is_dir() {
        return usage(format!("takes no commands; {remedy}"));
    }
    Error::new(ErrorKind::Usage, format!("there is no chain {}; {remedy}", shown(target)))
}

/// The plan of a command; `None` where the mount is read-only.
fn planned(control: &Path, request: &Request) -> Result<Option<String>> {
    let fail = |error| Error::io("asking for a plan", error);
    let mut file = match File::options().read(true).write(true).open(control.join("plan")) {
        Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => return Ok(None),
        other => other.map_err(fail)?,
    };
    let written = file.write(&request.command_line());
    let mut text = String::new();
    file.read_to_string(&mut text).map_err(fail)?;
    match written {
        // The plan's text contains the reason.
        Err(_) if is_refused(&text) => Ok(Some(text)),
        Err(error) => Err(fail(error)),
        Ok(_) => Ok(Some(text)),
    }
}

/// Writes the command to its control file; returns the status after that.
fn send_command(control: &Path, request: &Request) -> Result<Status> {
    let name = request.verb().name();
    let file = File::options().write(true).open(control.join(name));
    let mut file = file.map_err(|error| Error::io(format!("starting the command {name}"), error))?;
    let before = status(control)?;
    // A single write, so that the daemon gets the whole command or nothing.
    let written = file.write(&[&request.words()[..], b"\n"].concat());
    let now = match status(control) {
        // The command has removed or renamed the chain.
        Err(error) if written.is_ok() && error.kind() == ErrorKind::NotFound => {
            return Ok(Status { number: before.number + 1, state: JobState::Done, ..Status::default() });
        }
        read => read?,
    };
    match (written, &now.error) {
        (Ok(_), _) => Ok(now),
        (Err(error), Some(sentence)) if now.number != before.number => {
            let kind = if error.kind() == std::io::ErrorKind::InvalidInput {
                ErrorKind::Usage
            } else {
                ErrorKind::Io
            };
            Err(Error::new(kind, sentence.clone()))
        }
        // The status is that of the running command.
        (Err(error), _) if error.kind() == std::io::ErrorKind::ResourceBusy && !now.state.is_over() => {
            let fact = format!("{} is running on it; wait for its end, or cancel it", now.command);
            Err(Error::new(ErrorKind::Busy, fact))
        }
        (Err(error), _) => Err(Error::io(format!("starting the command {name}"), error)),
    }
}

fn status(control: &Path) -> Result<Status> {
    let text = std::fs::read_to_string(control.join("status"));
    Ok(parse_status(&text.map_err(|error| Error::io("reading the status of the command", error))?))
}

/// Waits until a command has ended. Ctrl-C ends only the wait.
fn follow(control: &Path, mut now: Status, mut meter: Meter) -> Result<Status> {
    let number = now.number;
    let mut progress = File::open(control.join("progress")).ok();
    let mut line = [0; 4096];
    while now.number == number && !now.state.is_over() {
        meter.draw(&now);
        match &mut progress {
            // Each read blocks until there is news. At end of file, `status` has the result.
            Some(file) => match file.read(&mut line) {
                Ok(0) => progress = None,
                Ok(_) if !meter.is_shown() => continue,
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    warn("the mount has gone; the next mount resumes the command");
                    return Err(Error::io("waiting for the command", error));
                }
            },
            None => std::thread::sleep(POLL_INTERVAL),
        }
        now = match status(control) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                Status { number, state: JobState::Done, ..now }
            }
            read => read?,
        };
    }
    if now.number != number {
        now.state = JobState::Idle;
    }
    meter.finish(&now);
    Ok(now)
}
