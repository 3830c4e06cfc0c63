//! News of changes in directories: what a backend tells of itself, and how that is waited for.
//!
//! First implementation: inotify. News are hints; who gets one looks again. A lost one is told as a change of
//! which nothing is known.

use std::ffi::OsStr;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, Reader, WatchFlags};
use rustix::io::Errno;

use super::backend::OpenDirectory;
use super::local::path_of;

/// A directory that is watched. A directory that is watched twice has one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WatchId(i32);

/// What happened to an entry of a watched directory.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// The directory; an unwatched one if events were lost.
    pub watch: WatchId,
    /// What happened.
    pub kind: ChangeKind,
    /// The entry's name; empty if it is the directory itself, or if it is not known.
    pub name: &'a OsStr,
}

/// The kinds of changes that callers distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChangeKind {
    /// The directory is not watched any more: it was removed.
    Gone,
    /// Bytes of the entry were written, and nothing else.
    Written,
    /// It was made, renamed, removed or closed after writing, or its attributes changed; or news were lost.
    Other,
}

/// The news of one store.
pub trait Changes: Send + Sync {
    /// Watches a directory from now on. An error if it cannot be watched: then changes in it are not told.
    fn watch(&self, directory: &dyn OpenDirectory) -> std::io::Result<WatchId>;

    /// Takes all news that are there.
    fn take(&self, each: &mut dyn FnMut(Change<'_>));

    /// Waits until there are news, until `patience` ends, or until the interrupt is raised; whether it is.
    fn wait(&self, interrupt: &Interrupt, patience: Duration) -> bool;
}

/// Ends all waiting, for good.
#[derive(Debug)]
pub struct Interrupt(OwnedFd);

impl Interrupt {
    /// One that is not raised.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::CLOEXEC)?))
    }

    /// Raises it.
    pub fn raise(&self) {
        // It can only fail if it is raised more often than a counter can count.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Waits until `patience` ends, or until it is raised; whether it is.
    pub fn wait(&self, patience: Duration) -> bool {
        wait_for(self, None, patience)
    }
}

fn wait_for(interrupt: &Interrupt, news: Option<&OwnedFd>, patience: Duration) -> bool {
    let timeout =
        Timespec { tv_sec: patience.as_secs().cast_signed(), tv_nsec: i64::from(patience.subsec_nanos()) };
    let mut fds = vec![PollFd::new(&interrupt.0, PollFlags::IN)];
    fds.extend(news.map(|news| PollFd::new(news, PollFlags::IN)));
    match poll(&mut fds, Some(&timeout)) {
        Ok(_) => !fds[0].revents().is_empty(),
        Err(Errno::INTR) => false,
        Err(_) => true,
    }
}

const INTEREST: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::DELETE)
    .union(WatchFlags::MOVED_FROM)
    .union(WatchFlags::MOVED_TO)
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::MODIFY)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::DELETE_SELF)
    .union(WatchFlags::MOVE_SELF)
    .union(WatchFlags::ONLYDIR);

/// What the kernel tells of local directories.
#[derive(Debug)]
pub(super) struct Inotify(OwnedFd);

impl Inotify {
    /// `None` if the system has none to give.
    pub(super) fn new() -> Option<Self> {
        inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).ok().map(Self)
    }
}

impl Changes for Inotify {
    fn watch(&self, directory: &dyn OpenDirectory) -> std::io::Result<WatchId> {
        let local = directory.local_file().ok_or(std::io::ErrorKind::Unsupported)?;
        Ok(WatchId(inotify::add_watch(&self.0, path_of(&local), INTEREST)?))
    }

    fn take(&self, each: &mut dyn FnMut(Change<'_>)) {
        let mut buf = [MaybeUninit::uninit(); 16 * 1024];
        let mut reader = Reader::new(&self.0, &mut buf);
        loop {
            match reader.next() {
                Ok(event) => {
                    let flags = event.events();
                    let kind = if flags.contains(ReadFlags::IGNORED) {
                        ChangeKind::Gone
                    } else if flags == ReadFlags::MODIFY {
                        ChangeKind::Written
                    } else {
                        ChangeKind::Other
                    };
                    let name = event.file_name().map_or(&[][..], |name| name.to_bytes());
                    each(Change { watch: WatchId(event.wd()), kind, name: OsStr::from_bytes(name) });
                }
                Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn wait(&self, interrupt: &Interrupt, patience: Duration) -> bool {
        wait_for(interrupt, Some(&self.0), patience)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{LocalDirectory, MountPoints};
    use super::*;
    use std::path::Path;

    #[test]
    fn a_change_is_told_and_an_interrupt_ends_every_wait() {
        let place = tempfile::tempdir().unwrap();
        let backend = LocalDirectory::open(place.path()).unwrap();
        let (news, interrupt) = (backend.changes().unwrap(), Interrupt::new().unwrap());
        let directory = backend.open_directory(Path::new(""), MountPoints::Skip).unwrap().unwrap();
        let watch = news.watch(&*directory).unwrap();
        assert_eq!(news.watch(&*directory).unwrap(), watch);
        std::fs::write(place.path().join("a"), "a").unwrap();
        assert!(!news.wait(&interrupt, Duration::from_mins(1)), "there are news");
        let mut found = Vec::new();
        news.take(&mut |change| found.push((change.watch, change.kind, change.name.to_owned())));
        assert_eq!(found[0], (watch, ChangeKind::Other, "a".into()));
        interrupt.raise();
        for _ in 0..2 {
            assert!(news.wait(&interrupt, Duration::from_mins(1)) && interrupt.wait(Duration::from_mins(1)));
        }
    }
}
