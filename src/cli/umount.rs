//! `chainfs umount`: returns when every file and lock has been let go, which umount(8) does not wait for.

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::args::UmountArgs;
use super::{complain, mount::busy};
use crate::error::{Error, ErrorKind, Result};
use crate::fs::mount;

/// How long a daemon may take to let go of everything once its mount has gone.
const PATIENCE: Duration = Duration::from_mins(1);

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
    match mount::top_mount(&directory)? {
        Some(entry) if entry.kind == mount::KIND => {}
        Some(entry) => {
            let sentence =
                format!("{} is a mount of {}, not of chainfs; use umount(8)", directory.display(), entry.kind);
            return Err(Error::new(ErrorKind::Usage, sentence));
        }
        None => return Err(Error::new(ErrorKind::NotFound, format!("{} is not a mount point", directory.display()))),
    }
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
    let timeout = Timespec { tv_sec: PATIENCE.as_secs().cast_signed(), tv_nsec: 0 };
    match poll(&mut [PollFd::new(&daemon, PollFlags::IN)], Some(&timeout)) {
        Ok(0) => Err(Error::new(ErrorKind::Busy, "the mount has gone, but its daemon still runs after a minute")),
        _ => Ok(()),
    }
}

/// The process that serves the mount, if it lives and says who it is.
fn daemon(directory: &Path) -> Option<std::os::fd::OwnedFd> {
    let mut value = [0; 16];
    let len = rustix::fs::getxattr(directory, "user.chainfs.pid", &mut value).ok()?;
    let pid = str::from_utf8(&value[..len]).ok()?.parse().ok()?;
    pidfd_open(Pid::from_raw(pid)?, PidfdFlags::empty()).ok()
}
