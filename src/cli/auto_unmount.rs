//! `auto_unmount`: a mount whose daemon was killed is unmounted.
//!
//! A small process of this program holds the reading end of a pipe whose writing end only the daemon has. When
//! the daemon has ended, for whatever reason, the pipe ends, and the process unmounts that very mount.

use std::ffi::OsString;
use std::io::{PipeWriter, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::error::{Error, Result};
use crate::fs::mount::OwnMount;

/// Set in the environment of the process that waits: the mount.
const WAIT: &str = "CHAINFS_AUTO_UNMOUNT";

/// Starts the process for a mount. The daemon keeps what this returns while it lives.
pub(super) fn start(mount: &OwnMount) -> Result<PipeWriter> {
    let fail = |error| Error::beginning("starting the process for auto_unmount", error);
    let (reader, writer) = std::io::pipe().map_err(fail)?;
    let (major, minor) = mount.device();
    let mut value = OsString::from(format!("{major}:{minor}:"));
    value.push(mount.directory());
    let mut child = Command::new(std::env::current_exe().map_err(fail)?)
        .env_clear()
        .env(WAIT, value)
        .stdin(reader)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .current_dir("/")
        .spawn()
        .map_err(fail)?;
    // Reaped if it ends before the daemon.
    std::thread::Builder::new().name("auto unmount".into()).spawn(move || child.wait()).map_err(fail)?;
    Ok(writer)
}

/// In the process that waits: waits, and unmounts. `false`: this is another process.
pub(super) fn wait_and_unmount() -> bool {
    let Some(value) = std::env::var_os(WAIT) else { return false };
    // A session of its own: signals of the terminal are for the daemon.
    let _ = rustix::process::setsid();
    let mut byte = [0];
    while std::io::stdin().read(&mut byte).is_ok_and(|len| len > 0) {}
    if let Some((device, directory)) = parse(value.as_bytes()) {
        // Another mount may be there by now. Most often the daemon has unmounted it.
        let _ = OwnMount::new(&directory, device).unmount(true);
    }
    true
}

fn parse(value: &[u8]) -> Option<((u32, u32), PathBuf)> {
    let mut parts = value.splitn(3, |byte| *byte == b':');
    let mut number = || std::str::from_utf8(parts.next()?).ok()?.parse().ok();
    let device = (number()?, number()?);
    let directory = Path::new(&OsString::from_vec(parts.next()?.to_vec())).to_path_buf();
    Some((device, directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_a_device_and_any_path() {
        assert_eq!(parse(b"0:57:/mnt/a:b"), Some(((0, 57), "/mnt/a:b".into())));
        assert_eq!(parse(b"0:x:/mnt"), None);
        assert_eq!(parse(b"0:5"), None);
    }
}
