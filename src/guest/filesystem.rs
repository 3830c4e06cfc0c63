//! What every guest file system can be asked, whatever its format.
//!
//! Inodes are numbers, names are bytes, and everything takes `&self` and may be called by many threads. What is asked
//! of one entry and found damaged is an error of that entry (`Corrupt`); the others stay readable.

use serde::{Deserialize, Serialize};

use crate::error::Result;

/// The number of an inode within its file system. Below [`Ino::LIMIT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ino(pub u64);

impl Ino {
    /// Numbers are below this: a format that has larger ones must map them.
    pub const LIMIT: u64 = 1 << 40;
}

/// A point in time as file systems keep it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time {
    /// Since 1970 began (UTC); negative before.
    pub seconds: i64,
    /// Below 1,000,000,000; forward in time, also before 1970.
    pub nanoseconds: u32,
}

/// What an inode is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "they say it themselves")]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
}

/// What stat(2) says of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileAttributes {
    /// What it is.
    pub kind: FileKind,
    /// The twelve bits of permissions, set-ID and sticky bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes; of a symbolic link, its target's.
    pub size: u64,
    /// Blocks of 512 bytes, as the guest's kernel says.
    pub blocks: u64,
    /// Names it has.
    pub links: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Last access.
    pub accessed: Time,
    /// Last change of content.
    pub modified: Time,
    /// Last change of the inode.
    pub changed: Time,
    /// When it was made, where that is kept.
    pub created: Option<Time>,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryEntry {
    /// The name: not empty, without `/` and NUL, never `.` or `..`.
    pub name: Vec<u8>,
    /// What it names.
    pub ino: Ino,
    /// What that is, if the directory says so.
    pub kind: Option<FileKind>,
    /// Where the listing goes on after this entry; never 0, and below [`DirectoryEntry::NEXT_LIMIT`].
    pub next: u64,
}

impl DirectoryEntry {
    /// Places in a directory are below this, so that the kernel's signed offsets can hold them.
    pub const NEXT_LIMIT: u64 = 1 << 63;
}

/// An extended attribute as the guest's kernel shows it: `user.x`, `security.selinux`, and access control lists as
/// `system.posix_acl_access` in the form of getxattr(2).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExtendedAttribute {
    /// With its namespace.
    pub name: Vec<u8>,
    /// Any bytes.
    pub value: Vec<u8>,
}

/// A run of a file and where its bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRun {
    /// Bytes; never 0.
    pub len: u64,
    /// Where.
    pub kind: RunKind,
}

/// Where the bytes of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunKind {
    /// Nowhere: a hole, or space that was never written. They are zeroes.
    Hole,
    /// In the source, as they are, from this offset on.
    Stored(u64),
    /// Only [`FileSystem::read_at`] can tell: in an inode, in a journal, compressed. Data to `SEEK_DATA`.
    Asked,
}

/// What statfs(2) says of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub free_blocks: u64,
    /// Free blocks that anybody may use.
    pub available_blocks: u64,
    /// Inodes in all; 0 if there is no such limit.
    pub inodes: u64,
    /// Free inodes.
    pub free_inodes: u64,
    /// Bytes of a name, at most.
    pub name_len: u32,
}

/// A file system that can only be read.
pub trait FileSystem: Send + Sync {
    /// The root directory.
    fn root(&self) -> Ino;

    /// Sizes of the whole.
    fn statistics(&self) -> Statistics;

    /// What should be known of what is shown, a sentence each: that a journal could not be replayed, say.
    fn remarks(&self) -> Vec<String>;

    /// Those of them that say that what is shown is not what was written last: a journal could not be replayed, or not all of it.
    fn stale(&self) -> Vec<String> {
        Vec::new()
    }

    /// What a name in a directory stands for, by the file system's own rules (letters' case, say).
    fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Option<Ino>>;

    /// Calls `each` with the entries of a directory, without `.` and `..`, beginning at the place `from` (0: the beginning; else some
    /// entry's `next`), until it returns false or there are no more. An error may follow good entries: those have been given.
    fn list(&self, directory: Ino, from: u64, each: &mut dyn FnMut(DirectoryEntry) -> bool) -> Result<()>;

    /// What stat(2) says.
    fn attributes(&self, ino: Ino) -> Result<FileAttributes>;

    /// The target of a symbolic link.
    fn read_link(&self, ino: Ino) -> Result<Vec<u8>>;

    /// Where the bytes of a regular file are, from `at` on: runs without gaps that reach up to `at + len` or the end of the file,
    /// whichever comes first, but no more than `most` of them. Empty at and beyond the end of the file.
    fn runs(&self, ino: Ino, at: u64, len: u64, most: usize) -> Result<Vec<FileRun>>;

    /// Reads from `at` on what there is of a regular file before its end, and returns how much that is.
    fn read_at(&self, ino: Ino, at: u64, buf: &mut [u8]) -> Result<usize>;

    /// All extended attributes, in the order in which the guest's kernel lists them.
    fn extended_attributes(&self, ino: Ino) -> Result<Vec<ExtendedAttribute>>;
}
