//! `chainfs umount`: returns when the daemon has closed all files and released all locks; umount(8) does not
//! wait.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::args::UmountArgs;
use super::{complain, mount::busy, warn};
use crate::error::{Error, ErrorKind, Result};
use crate::fs::mount;
use crate::fs::{METRICS_PATH, PROCESS_METRIC};
use crate::io::namespaces_with;

/// How long to wait for the daemon to end after unmounting.
const EXIT_TIMEOUT: Duration = Duration::from_mins(1);
/// After this time, a warning says what the command waits for.
const WARN_AFTER: Duration = Duration::from_secs(2);

/// Runs the command.
pub fn run(args: &UmountArgs) -> ExitCode {
    match umount(&args.dir, args.lazy) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            ExitCode::FAILURE
        }
    }
}

fn umount(directory: &Path, lazy: bool) -> Result<()> {
    let directory = mount::canonical_parent(directory)?;
    // Resolves a trailing "." or a link in the last component. It fails on a dead mount, which needs it not.
    let directory = directory.canonicalize().unwrap_or(directory);
    let device = match mount::top_mount(&directory)? {
        Some(entry) if entry.kind == mount::KIND => entry.device,
        Some(entry) => {
            let sentence = format!(
                "{} is a mount of {}, not of chainfs; use umount(8)",
                directory.display(),
                entry.kind
            );
            return Err(Error::new(ErrorKind::Usage, sentence));
        }
        None => {
            let fact = format!("{} is not a mount point", directory.display());
            let above = directory.ancestors().skip(1).find_map(|above| {
                mount::top_mount(above)
                    .ok()
                    .flatten()
                    .filter(|entry| entry.kind == mount::KIND)
                    .map(|_| above)
            });
            let remedy = above.map(|above| format!("; it is in the mount at {}: name that", above.display()));
            return Err(Error::new(ErrorKind::NotFound, fact + &remedy.unwrap_or_default()));
        }
    };
    let daemon = daemon(&directory);
    match mount::unmount(&directory, lazy) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::Busy => {
            let sentence = format!("{}; close its files, or unmount with --lazy", busy(&directory));
            return Err(Error::new(ErrorKind::Busy, sentence));
        }
        Err(error) => return Err(error),
    }
    // A detached mount ends when its last file is closed: do not wait.
    if lazy {
        return Ok(());
    }
    let Some(daemon) = daemon else { return Ok(()) };
    if ends_within(&daemon, WARN_AFTER) {
        return Ok(());
    }
    // Warns early, while the user can still act on it.
    let held = held_by(device);
    warn(&format!("waiting for the daemon of {} to end: {held}", directory.display()));
    if ends_within(&daemon, EXIT_TIMEOUT) {
        return Ok(());
    }
    let fact = format!(
        "{} is no longer mounted here, but its daemon still runs after a minute",
        directory.display()
    );
    Err(Error::new(ErrorKind::Busy, format!("{fact}: {held}")))
}

/// Waits for a process to end; `false` after `limit`.
fn ends_within(process: &OwnedFd, limit: Duration) -> bool {
    let timeout = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: 0 };
    !matches!(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout)), Ok(0))
}

/// Why the daemon still runs after the unmount, as far as this process can see.
fn held_by(device: (u32, u32)) -> String {
    let holders: Vec<String> = namespaces_with(device).iter().map(ToString::to_string).collect();
    if holders.is_empty() {
        return "it is writing back data, or finishing a command".to_owned();
    }
    format!(
        "the store is still mounted in the mount namespace of {}; end that process, or unmount there",
        holders.join(", ")
    )
}

/// The process that serves the mount, if it is alive.
fn daemon(directory: &Path) -> Option<OwnedFd> {
    let metrics = std::fs::read_to_string(directory.join(METRICS_PATH)).ok()?;
    let value = metrics.lines().find_map(|line| line.strip_prefix(PROCESS_METRIC)?.strip_prefix(' '))?;
    pidfd_open(Pid::from_raw(value.parse().ok()?)?, PidfdFlags::empty()).ok()
}
