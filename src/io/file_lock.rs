//! Exclusive locks on files of chainfs itself.
//!
//! A lock is an OFD write lock on the whole file, on an open file description of its own, so that two holders
//! in one process exclude each other as well. The kernel releases it when the process ends for any reason.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::error::{Error, ErrorKind, Result};

use super::lock_holders::lock_holders;
use super::object::ObjectStat;

/// Interval of attempts while another holder has the lock.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// A file lock that is held until this is dropped.
#[derive(Debug)]
pub struct FileLock {
    file: OwnedFd,
}

impl FileLock {
    /// The locked file.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Locks `file`; waits for at most `patience` while another holder has the lock, then fails with `Busy`
    /// and names the holder. `path` is for the message.
    pub fn take(file: OwnedFd, path: &Path, patience: Duration) -> Result<Self> {
        Self::take_while(file, path, patience, &|| Ok(()))
    }

    /// Like [`FileLock::take`]; an error of `go_on` ends the wait, so that the caller can be stopped.
    pub fn take_while(
        file: OwnedFd,
        path: &Path,
        patience: Duration,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let start = Instant::now();
        loop {
            match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&whole())) {
                Ok(_) => return Ok(Self { file }),
                Err(Errno::EAGAIN | Errno::EACCES) if start.elapsed() < patience => {
                    go_on()?;
                    thread::sleep(RETRY_INTERVAL);
                }
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    let holders = lock_holders(ObjectStat::of(&file)?.id, 0);
                    let names: Vec<String> = holders.iter().map(ToString::to_string).collect();
                    let by = if names.is_empty() { "this process".to_owned() } else { names.join(", ") };
                    let fact = format!("{} is locked by {by}; wait until that has finished", path.display());
                    return Err(Error::new(ErrorKind::Busy, fact));
                }
                Err(error) => return Err(locking(path, error)),
            }
        }
    }

    /// Whether `file` is locked. Takes no lock.
    pub fn is_held(file: impl AsFd, path: &Path) -> Result<bool> {
        let mut question = whole();
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut question)).map_err(|error| locking(path, error))?;
        Ok(i32::from(question.l_type) != libc::F_UNLCK)
    }
}

fn locking(path: &Path, error: Errno) -> Error {
    if super::locks::is_unsupported(error) {
        let fact = "is on a file system without file locks, so two processes could change the store at once";
        return Error::new(ErrorKind::ReadOnly, format!("{} {fact}", path.display()));
    }
    Error::io(format!("locking {}", path.display()), error)
}

fn whole() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_holder_has_the_lock() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let open =
            || OwnedFd::from(std::fs::File::options().read(true).write(true).open(place.path()).unwrap());
        let take = || FileLock::take(open(), Path::new("lock"), Duration::from_millis(20));
        let first = take().unwrap();
        assert!(FileLock::is_held(open(), Path::new("lock")).unwrap());
        assert_eq!(take().unwrap_err().kind(), ErrorKind::Busy);
        drop(first);
        assert!(!FileLock::is_held(open(), Path::new("lock")).unwrap());
        take().unwrap();
    }
}
