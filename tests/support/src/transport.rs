//! A transport in memory: plain calls to the mount's service, without a kernel.
//!
//! A call that is not answered within the limit, or whose responder is dropped, fails the test.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::Duration;

use chainfs::browse::Browser;
use chainfs::browse::worker::WorkerProgram;
use chainfs::fs::service::{
    BytesResponder, Call, DirectoryEntry, EntryResponder, Errno, Features, NameResponder, OpenFile,
    OpenResponder, Opened, OpenedDirectory, Responder, ServedBy, Service, TimedAttributes, Write,
};
use chainfs::fs::{Caller, GuestOptions, MountTree, NodeKind, Ownership};
use chainfs::io::LocalFile;
use chainfs::store::{Store, StoreOptions};

use super::chainfs_binary;

/// Longer than any call takes.
const LIMIT: Duration = Duration::from_mins(1);
/// The root's inode number.
pub const ROOT: u64 = 1;

/// What a call was answered.
pub type Answer<T> = Result<T, Errno>;

/// All features, and four threads.
pub const FEATURES: Features = Features {
    passthrough: true,
    kernel_maps: false,
    parallel_writes: true,
    shared_mapping: true,
    access_lists: false,
    extended_attributes: true,
    ring: false,
    threads: 4,
};

pub struct Transport {
    pub service: Arc<Service<File>>,
    pub store: Arc<Store>,
    /// Whether files can be registered for passthrough.
    pub registers: bool,
}

/// An entry of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: OsString,
    pub inode: u64,
    pub kind: NodeKind,
    pub next: u64,
    /// The attributes, if they were asked for.
    pub found: Option<TimedAttributes>,
}

/// An open file, as a kernel would have it.
#[derive(Debug)]
pub struct Open {
    pub file: OpenFile,
    pub served_by: ServedBy<File>,
}

impl Transport {
    /// Serves a directory of images, or one image.
    pub fn new(source: &Path, features: Features) -> Self {
        let options = StoreOptions { notify: false, ..StoreOptions::default() };
        let store = Store::open(source, options).expect("a store");
        let worker = WorkerProgram { path: chainfs_binary().into(), seccomp: true };
        let browser = Browser::new(&store, worker);
        let guests = GuestOptions { shown: true, verbatim: false };
        let tree = Arc::new(MountTree::new(&store, Ownership::default(), &browser, guests));
        Self { service: Service::new(&tree, features), store, registers: true }
    }

    pub fn call(inode: u64) -> Call {
        Call { inode, caller: Caller { pid: std::process::id(), ..Caller::ADMINISTRATOR } }
    }

    /// Makes a call and waits for its answer.
    pub fn ask<T: Send + 'static>(&self, call: impl FnOnce(&Arc<Service<File>>, Pending<T>)) -> Answer<T> {
        self.ask_with_thread(call).0
    }

    /// The same, with the name of the thread that answered.
    pub fn ask_with_thread<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Arc<Service<File>>, Pending<T>),
    ) -> (Answer<T>, Option<String>) {
        let (pending, answer) = Pending::new(self.registers);
        call(&self.service, pending);
        wait(&answer)
    }

    pub fn lookup(&self, parent: u64, name: impl AsRef<OsStr>) -> Answer<TimedAttributes> {
        self.ask(|service, reply| service.lookup(Self::call(parent), name.as_ref(), reply))
    }

    /// The inode of a path.
    pub fn inode(&self, path: &str) -> u64 {
        path.split('/').fold(ROOT, |at, name| {
            let found = self.lookup(at, name).unwrap_or_else(|errno| panic!("{path}: {errno}"));
            found.attributes.inode
        })
    }

    pub fn open(&self, inode: u64, flags: i32) -> Answer<Open> {
        let opened: Opened<File> =
            self.ask(|service, reply| service.open(Self::call(inode), flags, reply))?;
        Ok(Open { file: OpenFile { inode, handle: opened.handle }, served_by: opened.served_by })
    }

    /// Reads as a kernel would: from the registered file, if there is one.
    pub fn read(&self, open: &Open, offset: u64, size: u32) -> Answer<Vec<u8>> {
        if let ServedBy::Passthrough(file) = &open.served_by {
            let mut bytes = vec![0; size as usize];
            let len = file.read_at(&mut bytes, offset).expect("a registered file");
            bytes.truncate(len);
            return Ok(bytes);
        }
        let (pending, answer) = PendingBytes::new();
        self.service.read(open.file, offset, size, pending);
        wait(&answer).0
    }

    /// All bytes of an open file.
    pub fn read_all(&self, open: &Open) -> Answer<Vec<u8>> {
        let mut all = Vec::new();
        loop {
            match self.read(open, all.len() as u64, 128 << 10)? {
                bytes if bytes.is_empty() => return Ok(all),
                bytes => all.extend(bytes),
            }
        }
    }

    /// All bytes of a file, which is opened and released.
    pub fn content(&self, path: &str) -> Vec<u8> {
        let open =
            self.open(self.inode(path), libc_flags::READ).unwrap_or_else(|errno| panic!("{path}: {errno}"));
        let bytes = self.read_all(&open).unwrap_or_else(|errno| panic!("{path}: {errno}"));
        self.release(open.file);
        bytes
    }

    pub fn write(&self, file: OpenFile, offset: u64, bytes: &[u8]) -> Answer<usize> {
        let write = Write { offset, bytes, flags: libc_flags::READ_WRITE, is_write_back: false };
        self.ask(|service, reply| service.write(file, write, reply))
    }

    pub fn release(&self, file: OpenFile) {
        self.ask(|service, reply| service.release(file, reply)).expect("a release");
    }

    pub fn open_directory(&self, inode: u64) -> Answer<(OpenFile, OpenedDirectory)> {
        let opened: OpenedDirectory =
            self.ask(|service, reply| service.open_directory(Self::call(inode), reply))?;
        Ok((OpenFile { inode, handle: opened.handle }, opened))
    }

    /// At most `room` entries of an open directory.
    pub fn list(&self, file: OpenFile, offset: u64, room: usize) -> Answer<Vec<Listed>> {
        let (pending, answer) = PendingEntries::new(room);
        self.service.list(file, offset, pending);
        wait(&answer).0
    }

    /// The same, with attributes.
    pub fn list_with_attributes(&self, file: OpenFile, offset: u64, room: usize) -> Answer<Vec<Listed>> {
        let (pending, answer) = PendingEntries::new(room);
        self.service.list_with_attributes(Self::call(file.inode), file.handle, offset, pending);
        wait(&answer).0
    }

    /// All entries of an open directory, read in parts.
    pub fn list_all(&self, file: OpenFile, room: usize) -> Answer<Vec<Listed>> {
        let mut all: Vec<Listed> = Vec::new();
        loop {
            match self.list(file, all.last().map_or(0, |last| last.next), room)? {
                part if part.is_empty() => return Ok(all),
                part => all.extend(part),
            }
        }
    }

    /// The nodes of all directories beneath a node, by path, with their entries but for `.` and `..`.
    pub fn directories(&self, inode: u64, path: &Path, found: &mut BTreeMap<OsString, (u64, Vec<Listed>)>) {
        let (file, _) =
            self.open_directory(inode).unwrap_or_else(|errno| panic!("{}: {errno}", path.display()));
        let mut entries = self.list_all(file, usize::MAX).expect("a listing");
        entries.drain(..2);
        self.release(file);
        for entry in entries.iter().filter(|entry| entry.kind == NodeKind::Directory) {
            self.directories(entry.inode, &path.join(&entry.name), found);
        }
        found.insert(path.as_os_str().to_owned(), (inode, entries));
    }
}

/// Flags of open(2).
pub mod libc_flags {
    pub const READ: i32 = 0;
    pub const WRITE: i32 = 1;
    pub const READ_WRITE: i32 = 2;
}

/// An answer, and the name of the thread that gave it.
type Given<T> = (Answer<T>, Option<String>);

fn wait<T>(answer: &Receiver<Given<T>>) -> Given<T> {
    answer.recv_timeout(LIMIT).expect("each call is answered")
}

fn give<T>(to: &Sender<Given<T>>, answer: Answer<T>) {
    let thread = thread::current().name().map(str::to_owned);
    // Nobody waits for some answers.
    let _ = to.send((answer, thread));
}

/// A call that waits for its answer.
pub struct Pending<T> {
    answer: Sender<Given<T>>,
    registers: bool,
}

impl<T> Pending<T> {
    pub fn new(registers: bool) -> (Self, Receiver<Given<T>>) {
        let (answer, given) = channel();
        (Self { answer, registers }, given)
    }
}

impl<T: Send + 'static> Responder<T> for Pending<T> {
    fn finish(self, reply: Answer<T>) {
        give(&self.answer, reply);
    }
}

impl OpenResponder<File> for Pending<Opened<File>> {
    fn register(&mut self, file: LocalFile) -> io::Result<File> {
        if !self.registers {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(file.as_fd().try_clone_to_owned()?.into())
    }
}

/// A read that waits for its bytes.
pub struct PendingBytes {
    answer: Sender<Given<Vec<u8>>>,
    buffer: Vec<u8>,
    /// Whether the buffer is none.
    pub panics: bool,
}

impl PendingBytes {
    pub fn new() -> (Self, Receiver<Given<Vec<u8>>>) {
        let (answer, given) = channel();
        (Self { answer, buffer: Vec::new(), panics: false }, given)
    }
}

impl BytesResponder for PendingBytes {
    fn buffer(&mut self, len: usize) -> &mut [u8] {
        assert!(!self.panics, "a bug");
        // Not zeroes: what is read must be written.
        self.buffer.resize(len, 0xa5);
        &mut self.buffer
    }
}

impl Responder<usize> for PendingBytes {
    fn finish(mut self, reply: Answer<usize>) {
        let bytes = reply.map(|len| {
            self.buffer.truncate(len);
            self.buffer
        });
        give(&self.answer, bytes);
    }
}

/// A listing that waits for its entries.
pub struct PendingEntries {
    answer: Sender<Given<Vec<Listed>>>,
    room: usize,
    entries: Vec<Listed>,
}

impl PendingEntries {
    pub fn new(room: usize) -> (Self, Receiver<Given<Vec<Listed>>>) {
        let (answer, given) = channel();
        (Self { answer, room, entries: Vec::new() }, given)
    }

    fn push(&mut self, entry: &DirectoryEntry<'_>, found: Option<TimedAttributes>) -> bool {
        let DirectoryEntry { name, inode, kind, next } = *entry;
        let is_full = self.entries.len() == self.room;
        if !is_full {
            self.entries.push(Listed { name: name.to_owned(), inode, kind, next, found });
        }
        is_full
    }
}

impl NameResponder for PendingEntries {
    fn add(&mut self, entry: &DirectoryEntry<'_>) -> bool {
        self.push(entry, None)
    }
}

impl EntryResponder for PendingEntries {
    fn add(&mut self, entry: &DirectoryEntry<'_>, found: &TimedAttributes) -> bool {
        self.push(entry, Some(*found))
    }
}

impl Responder<()> for PendingEntries {
    fn finish(self, reply: Answer<()>) {
        give(&self.answer, reply.map(|()| self.entries));
    }
}
