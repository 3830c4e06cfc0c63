//! Claims: files of our own that one process at a time may hold.
//!
//! An OFD write lock on the whole file, on a description of its own, so that two holders in one process
//! exclude each other as two processes do. It goes with the process, however that ends.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use crate::error::{Error, ErrorKind, Result};

use super::file::FileStat;
use super::lock_holders::lock_holders;

/// How often a claim that is held is asked for again.
const PAUSE: Duration = Duration::from_millis(5);

/// A claim that is held until this is dropped.
#[derive(Debug)]
pub struct FileLock {
    file: OwnedFd,
}

impl FileLock {
    /// The file that it stands for.
    pub fn file(&self) -> &OwnedFd {
        &self.file
    }

    /// Takes the claim that `file` stands for; waits for at most `patience` while another holds it, then it is
    /// `Busy`, naming who. `path` is for the sentence.
    pub fn take(file: OwnedFd, path: &Path, patience: Duration) -> Result<Self> {
        Self::take_while(file, path, patience, &|| Ok(()))
    }

    /// The same; `go_on` is asked all the while, and what it fails with ends the waiting: the holder may be stopped.
    pub fn take_while(file: OwnedFd, path: &Path, patience: Duration, go_on: &dyn Fn() -> Result<()>) -> Result<Self> {
        let start = Instant::now();
        loop {
            match fcntl(file.as_fd(), FcntlArg::F_OFD_SETLK(&whole())) {
                Ok(_) => return Ok(Self { file }),
                Err(Errno::EAGAIN | Errno::EACCES) if start.elapsed() < patience => {
                    go_on()?;
                    thread::sleep(PAUSE);
                }
                Err(Errno::EAGAIN | Errno::EACCES) => {
                    let holders = lock_holders(FileStat::of(&file)?.id, 0);
                    let names: Vec<String> = holders.iter().map(ToString::to_string).collect();
                    let by = if names.is_empty() { "this process".to_owned() } else { names.join(", ") };
                    let fact = format!("{} is held by {by}; wait until it is done", path.display());
                    return Err(Error::new(ErrorKind::Busy, fact));
                }
                Err(error) => return Err(locking(path, error)),
            }
        }
    }

    /// Whether somebody holds the claim that `file` stands for: a look, nothing is taken.
    pub fn is_held(file: impl AsFd, path: &Path) -> Result<bool> {
        let mut question = whole();
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut question)).map_err(|error| locking(path, error))?;
        Ok(i32::from(question.l_type) != libc::F_UNLCK)
    }
}

fn locking(path: &Path, error: Errno) -> Error {
    if super::locks::is_unsupported(error) {
        let fact = "lies on a file system without file locks, where nothing keeps two who change a store apart";
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
    fn one_at_a_time_holds_it() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let open = || OwnedFd::from(std::fs::File::options().read(true).write(true).open(place.path()).unwrap());
        let take = || FileLock::take(open(), Path::new("lock"), Duration::from_millis(20));
        let first = take().unwrap();
        assert!(FileLock::is_held(open(), Path::new("lock")).unwrap());
        assert_eq!(take().unwrap_err().kind(), ErrorKind::Busy);
        drop(first);
        assert!(!FileLock::is_held(open(), Path::new("lock")).unwrap());
        take().unwrap();
    }
}
