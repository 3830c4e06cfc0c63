//! Exclusive locks on files of chainfs itself.
//!
//! A lock belongs to an opening of its own, so that two holders in one process exclude each other as well. It
//! ends with the process, for whatever reason that ends: in a local directory it is an OFD write lock on the
//! whole file. Dropping it ends it at once, also while a program that this process starts still has copies of
//! its descriptors.

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind, Result};

use super::backend::{LockConflict, LockKind, OpenObject, WriteObject};

/// Interval of attempts while another holder has the lock.
const RETRY_INTERVAL: Duration = Duration::from_millis(5);

/// A file lock that is held until this is dropped.
#[derive(Debug)]
pub struct FileLock {
    file: Arc<dyn WriteObject>,
}

impl FileLock {
    /// The locked file.
    pub fn file(&self) -> &Arc<dyn WriteObject> {
        &self.file
    }

    /// Locks `file`; waits for at most `patience` while another holder has the lock, then fails with `Busy`
    /// and names the holder. `path` is for the message.
    pub fn take(file: Arc<dyn WriteObject>, path: &Path, patience: Duration) -> Result<Self> {
        Self::take_while(file, path, patience, &|| Ok(()))
    }

    /// Like [`FileLock::take`]; an error of `go_on` ends the wait, so that the caller can be stopped.
    pub fn take_while(
        file: Arc<dyn WriteObject>,
        path: &Path,
        patience: Duration,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<Self> {
        let start = Instant::now();
        loop {
            match file.locks().take(LockKind::Exclusive) {
                Ok(()) => return Ok(Self { file }),
                Err(LockConflict::Held { .. }) if start.elapsed() < patience => {
                    go_on()?;
                    thread::sleep(RETRY_INTERVAL);
                }
                Err(LockConflict::Held { lock, .. }) => {
                    let holders = file.locks().holders(lock).processes;
                    let names: Vec<String> = holders.iter().map(ToString::to_string).collect();
                    let by = if names.is_empty() { "this process".to_owned() } else { names.join(", ") };
                    let fact = format!("{} is locked by {by}; wait until that has finished", path.display());
                    return Err(Error::new(ErrorKind::Busy, fact));
                }
                Err(conflict) => return Err(locking(path, conflict)),
            }
        }
    }

    /// Whether `file` is locked. Takes no lock.
    pub fn is_held(file: &dyn OpenObject, path: &Path) -> Result<bool> {
        match file.locks().conflict(LockKind::Exclusive) {
            Ok(()) => Ok(false),
            Err(LockConflict::Held { .. }) => Ok(true),
            Err(conflict) => Err(locking(path, conflict)),
        }
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        self.file.locks().release(LockKind::Exclusive);
    }
}

fn locking(path: &Path, conflict: LockConflict) -> Error {
    match conflict {
        LockConflict::Held { fact, .. } => Error::new(ErrorKind::Busy, format!("{} {fact}", path.display())),
        LockConflict::Unsupported(_) => {
            let fact =
                "is on a file system without file locks, so two processes could change the store at once";
            Error::new(ErrorKind::ReadOnly, format!("{} {fact}", path.display()))
        }
        LockConflict::System(error) => Error::io(format!("locking {}", path.display()), error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::local::LocalOpenFile;
    use super::*;

    #[test]
    fn only_one_holder_has_the_lock() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let open = || {
            let file = std::fs::File::options().read(true).write(true).open(place.path()).unwrap();
            Arc::new(LocalOpenFile::new(file.into(), place.path()))
        };
        let take = || FileLock::take(open(), Path::new("lock"), Duration::from_millis(20));
        let first = take().unwrap();
        assert!(FileLock::is_held(&*open(), Path::new("lock")).unwrap());
        assert_eq!(take().unwrap_err().kind(), ErrorKind::Busy);
        drop(first);
        assert!(!FileLock::is_held(&*open(), Path::new("lock")).unwrap());
        take().unwrap();
    }

    #[test]
    fn copies_of_the_descriptor_do_not_prolong_a_lock() {
        let place = tempfile::NamedTempFile::new().unwrap();
        let open = || std::fs::File::options().read(true).write(true).open(place.path()).unwrap();
        let file = open();
        // As a child has it between fork and exec.
        let copy = file.try_clone().unwrap();
        let object = Arc::new(LocalOpenFile::new(file.into(), place.path()));
        let lock = FileLock::take(object, Path::new("lock"), Duration::ZERO).unwrap();
        let other = LocalOpenFile::new(open().into(), place.path());
        assert!(FileLock::is_held(&other, Path::new("lock")).unwrap());
        drop(lock);
        assert!(!FileLock::is_held(&other, Path::new("lock")).unwrap());
        drop(copy);
    }
}
