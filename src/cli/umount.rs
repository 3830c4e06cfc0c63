//! `chainfs umount`: returns when every file and lock has been let go, which umount(8) does not wait for.

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
use crate::io::namespaces_with;

/// How long a daemon may take to let go of everything once its mount has gone.
const PATIENCE: Duration = Duration::from_mins(1);
/// When it is said what is waited for.
const TOLD_AFTER: Duration = Duration::from_secs(2);

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
    // A trailing "." or a link in the last component; asking a dead mount fails, and is not needed.
    let directory = directory.canonicalize().unwrap_or(directory);
    let device = match mount::top_mount(&directory)? {
        Some(entry) if entry.kind == mount::KIND => entry.device,
        Some(entry) => {
            let sentence =
                format!("{} is a mount of {}, not of chainfs; use umount(8)", directory.display(), entry.kind);
            return Err(Error::new(ErrorKind::Usage, sentence));
        }
        None => {
            let fact = format!("{} is not a mount point", directory.display());
            let above = directory.ancestors().skip(1).find_map(|above| {
                mount::top_mount(above).ok().flatten().filter(|entry| entry.kind == mount::KIND).map(|_| above)
            });
            let remedy = above.map(|above| format!("; it lies in the mount at {}: name that", above.display()));
            return Err(Error::new(ErrorKind::NotFound, fact + &remedy.unwrap_or_default()));
        }
    };
    let daemon = daemon(&directory);
    match mount::unmount(&directory, lazy) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::Busy => {
            let sentence = format!("{}; let go of it, or unmount with --lazy", busy(&directory));
            return Err(Error::new(ErrorKind::Busy, sentence));
        }
        Err(error) => return Err(error),
    }
    // Taken away from its users, it ends with the last of them: nothing to wait for.
    if lazy {
        return Ok(());
    }
    let Some(daemon) = daemon else { return Ok(()) };
    if ends_within(&daemon, TOLD_AFTER) {
        return Ok(());
    }
    // Said while there is time to do something about it.
    let held = held_by(device);
    warn(&format!("waiting for the daemon of {} to end: {held}", directory.display()));
    if ends_within(&daemon, PATIENCE) {
        return Ok(());
    }
    let fact = format!("{} is no longer mounted here, but its daemon still runs after a minute", directory.display());
    Err(Error::new(ErrorKind::Busy, format!("{fact}: {held}")))
}

/// Waits for a process to end, for so long at most.
fn ends_within(process: &OwnedFd, limit: Duration) -> bool {
    let timeout = Timespec { tv_sec: limit.as_secs().cast_signed(), tv_nsec: 0 };
    !matches!(poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&timeout)), Ok(0))
}

/// What keeps the daemon of a mount that has been taken away here, as far as can be seen.
fn held_by(device: (u32, u32)) -> String {
    let holders: Vec<String> = namespaces_with(device).iter().map(ToString::to_string).collect();
    if holders.is_empty() {
        return "it writes back what it holds, or finishes a command".to_owned();
    }
    format!("the mount goes on in the mount namespace of {}; end that, or unmount there", holders.join(", "))
}

/// The process that serves the mount, if it lives and says who it is.
fn daemon(directory: &Path) -> Option<OwnedFd> {
    let mut value = [0; 16];
    let len = rustix::fs::getxattr(directory, "user.chainfs.pid", &mut value).ok()?;
    let pid = str::from_utf8(&value[..len]).ok()?.parse().ok()?;
    pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
}
