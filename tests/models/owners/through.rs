//! The mount's tree as a user sees it: the kernel first checks the shown modes, then the tree checks rights.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use chainfs::browse::Browser;
use chainfs::browse::worker::WorkerProgram;
use chainfs::error::Result;
use chainfs::fs::{Attributes, Caller, GuestOptions, Handle, MountTree, Ownership};
use chainfs::ops::{JobState, Status};
use chainfs::store::{Access, Store};

use super::people::Person;

/// No job takes longer.
const LIMIT: Duration = Duration::from_mins(1);
/// The mount's root.
const ROOT: u64 = 1;

/// A tree without cached answers.
pub(crate) struct Through {
    pub(crate) tree: Arc<MountTree>,
}

impl Through {
    pub(crate) fn new(store: &Arc<Store>) -> Self {
        let browser = Browser::new(store, WorkerProgram::this(false));
        let guests = GuestOptions { shown: false, verbatim: false };
        Self { tree: Arc::new(MountTree::new(store, Ownership::default(), &browser, guests).shared()) }
    }

    /// The inode number of a path, with any rights.
    pub(crate) fn number(&self, path: &Path) -> Option<u64> {
        let mut at = ROOT;
        for part in path {
            at = self.tree.lookup(&Caller::ADMINISTRATOR, at, part).ok()?.inode;
        }
        Some(at)
    }

    /// The number of a path to which a kernel would let the person come by modes, and which may be used like
    /// that.
    pub(crate) fn walk(&self, person: &Person, path: &Path, want: u16) -> Option<u64> {
        let caller = person.caller();
        let shown = |found: &Attributes| (found.uid, found.gid, found.permissions);
        let mut at = self.tree.attributes(&caller, ROOT).ok()?;
        for part in path {
            if !person.is_let_in(shown(&at), 1) {
                return None;
            }
            at = self.tree.lookup(&caller, at.inode, part).ok()?;
        }
        person.is_let_in(shown(&at), want).then_some(at.inode)
    }

    /// Opens a file with the user's rights, whatever its mode.
    pub(crate) fn open<T>(
        &self,
        person: &Person,
        inode: u64,
        access: Access,
        work: impl FnOnce(&Handle) -> T,
    ) -> Result<T> {
        self.open_as(&person.caller(), inode, access, work)
    }

    fn open_as<T>(
        &self,
        caller: &Caller,
        inode: u64,
        access: Access,
        work: impl FnOnce(&Handle) -> T,
    ) -> Result<T> {
        let (number, handle) = self.tree.open(caller, inode, access)?;
        let done = work(&handle);
        drop(handle);
        self.tree.release(number);
        Ok(done)
    }

    /// All bytes of the open file.
    pub(crate) fn bytes(&self, handle: &Handle) -> Result<Vec<u8>> {
        let (mut bytes, mut part) = (Vec::new(), vec![0; 128 << 10]);
        loop {
            match self.tree.read(handle, bytes.len() as u64, &mut part)? {
                0 => return Ok(bytes),
                len => bytes.extend_from_slice(&part[..len]),
            }
        }
    }

    /// A text, if the person may read it.
    pub(crate) fn text(&self, person: &Person, path: &Path) -> Option<Vec<u8>> {
        let inode = self.number(path)?;
        self.open(person, inode, Access::Read, |handle| self.bytes(handle)).ok()?.ok()
    }

    /// The names in a directory, if the person may list it.
    pub(crate) fn list(&self, person: &Person, path: &Path) -> Option<Vec<u8>> {
        let inode = self.number(path)?;
        let number = self.tree.open_directory(&person.caller(), inode).ok()?;
        let Ok(Handle::Directory(listed)) = self.tree.handle(number) else { return None };
        self.tree.release(number);
        Some(listed.iter().flat_map(|entry| [entry.name.as_encoded_bytes(), b"\n"].concat()).collect())
    }

    /// Gives a command through a control file, with the rights of the control file's opener, and waits for
    /// its end.
    pub(crate) fn command(&self, caller: &Caller, chain: &Path, command: &str) -> Result<()> {
        let (verb, words) = command.split_once(' ').unwrap_or((command, ""));
        let Some(inode) = self.number(&chain.join("control").join(verb)) else {
            return Err(chainfs::error::Error::new(
                chainfs::error::ErrorKind::NotFound,
                "no such control file",
            ));
        };
        let (number, handle) = self.tree.open(caller, inode, Access::Write)?;
        let given = self.tree.write(&handle, 0, format!("{words}\n").as_bytes(), false);
        self.tree.release(number);
        given?;
        let status = self.wait(chain);
        match status.state {
            JobState::Done => Ok(()),
            _ => Err(chainfs::error::Error::new(
                chainfs::error::ErrorKind::Io,
                status.error.unwrap_or_else(|| "it was stopped".into()),
            )),
        }
    }

    /// The text of a plan for its reader.
    pub(crate) fn plan(&self, caller: &Caller, chain: &Path, command: &str) -> Option<Vec<u8>> {
        let inode = self.number(&chain.join("control/plan"))?;
        let said = self.open_as(caller, inode, Access::ReadWrite, |handle| {
            let _ = self.tree.write(handle, 0, command.as_bytes(), false);
            self.bytes(handle)
        });
        said.ok()?.ok()
    }

    pub(crate) fn wait(&self, chain: &Path) -> Status {
        let start = Instant::now();
        loop {
            let status = self.tree.engine().status(chain);
            if status.state != JobState::Running {
                return status;
            }
            assert!(start.elapsed() < LIMIT, "a job hangs: {status:?}");
            self.tree.engine().wait(chain, status.version, Duration::from_millis(100));
        }
    }

    /// Resumes interrupted commands, and waits for their end.
    pub(crate) fn resume(&self) {
        let store = self.tree.store();
        let chains: Vec<PathBuf> =
            store.catalog().intents.iter().map(|found| found.intent.chain.clone()).collect();
        self.tree.engine().resume();
        for chain in chains {
            self.wait(&chain);
        }
    }
}
