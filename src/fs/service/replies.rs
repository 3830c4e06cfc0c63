//! Replies in plain types, how long they stay valid, and what a transport does with them.

use std::ffi::OsStr;
use std::io;
use std::time::Duration;

use crate::io::LocalFile;

use super::super::attributes::Attributes;
use super::super::node::NodeKind;
use super::super::tree::MountTree;
use super::errno::{Errno, Failure, Refusal};
use super::opening::Opened;

/// TTL of names and attributes. Changes of the store become visible within a second; this TTL is the larger
/// part of it.
const TTL: Duration = Duration::from_millis(500);
/// TTL of guests' files.
const GUEST_TTL: Duration = Duration::from_hours(1);

/// The size of reads and writes that stat(2) recommends.
pub const STAT_BLOCK_SIZE: u32 = 65_536;

/// Takes the reply of one call.
pub trait Responder<T>: Send + Sized + 'static {
    /// Sends the reply.
    fn finish(self, reply: std::result::Result<T, Errno>);

    /// Whether the transport's thread may wait for a worker: no other request waits for this very thread.
    fn may_wait(&self) -> bool {
        true
    }
}

/// Takes bytes. They are read straight into the transport's buffer; the reply is their number.
pub trait BytesResponder: Responder<usize> {
    /// A buffer of that many bytes, of any content. Called in the thread that serves the call.
    fn buffer(&mut self, len: usize) -> &mut [u8];
}

/// Takes the reply of an open.
pub trait OpenResponder<B>: Responder<Opened<B>> {
    /// Registers a file that the kernel is to read itself, until the result is dropped.
    fn register(&mut self, file: LocalFile) -> io::Result<B>;
}

/// Takes names of a directory, then the reply.
pub trait NameResponder: Responder<()> {
    /// Adds an entry. `true`: there is no room for it, and it was not added.
    fn add(&mut self, entry: &DirectoryEntry<'_>) -> bool;
}

/// Takes entries of a directory with attributes, then the reply.
pub trait EntryResponder: Responder<()> {
    /// Adds an entry. `true`: there is no room for it, and it was not added.
    fn add(&mut self, entry: &DirectoryEntry<'_>, found: &TimedAttributes) -> bool;
}

/// An entry of a directory.
#[derive(Clone, Copy, Debug)]
pub struct DirectoryEntry<'a> {
    /// The name.
    pub name: &'a OsStr,
    /// The inode number.
    pub inode: u64,
    /// The file type.
    pub kind: NodeKind,
    /// The offset at which a listing continues after this entry.
    pub next: u64,
}

/// Attributes, and how long the kernel may use them and the name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TimedAttributes {
    /// The attributes.
    pub attributes: Attributes,
    /// Zero: they are asked for each time.
    pub ttl: Duration,
    /// Of the inode number: handles of another mount, which may have given the number to another file, are
    /// stale.
    pub generation: u32,
}

impl TimedAttributes {
    /// Those of a listed node of which only number and type are known: a later lookup returns the error.
    pub(super) fn unknown(tree: &MountTree, inode: u64, kind: NodeKind) -> Self {
        let attributes = Attributes::unknown(inode, kind);
        Self { attributes, ttl: Duration::ZERO, generation: tree.generation(inode) }
    }
}

/// The TTL of `found` in a reply about `by`, the parent directory or the node itself. Writable files have
/// none, because commands change them: after a resize or revert, the client must see the new attributes.
pub(super) fn ttl(tree: &MountTree, by: u64, found: &Attributes) -> Duration {
    // A guest's inode never changes, nor do the entries of its directories. The entry of a volume's root can
    // change, and has the short TTL.
    if MountTree::is_guest(by) {
        return GUEST_TTL;
    }
    let is_written = found.kind == NodeKind::File && found.permissions & 0o222 != 0;
    // A result that depends on the caller must not be cached for other users.
    if is_written || tree.depends_on_caller(found.inode) { Duration::ZERO } else { TTL }
}

/// An extended attribute, or the names of all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum XattrReply {
    /// Only the size was asked for.
    Size(u32),
    /// The value, or the names, each terminated by NUL.
    Bytes(Vec<u8>),
}

impl XattrReply {
    pub(super) fn new(bytes: Vec<u8>, room: u32) -> std::result::Result<Self, Failure> {
        match room as usize {
            0 => Ok(Self::Size(bytes.len() as u32)),
            room if bytes.len() > room => Err(Refusal::ShortBuffer.into()),
            _ => Ok(Self::Bytes(bytes)),
        }
    }
}
