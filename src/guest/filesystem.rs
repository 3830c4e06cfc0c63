//! The interface of every guest file system, whatever its format.
//!
//! Inodes are numbers, names are bytes. Everything takes `&self` and may be called by many threads. Damage is
//! an error of the requested entry (`Corrupt`); the other entries stay readable.

use serde::{Deserialize, Serialize};

use crate::error::Result;

/// A tree of files on a set of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct TreeId {
    /// Index of the volume in the layout of the disks.
    pub volume: usize,
    /// Index of the tree among those of the volume's file system.
    pub subvolume: u32,
}

impl TreeId {
    /// The tree that is shown as the volume.
    pub fn main(volume: usize) -> Self {
        Self { volume, subvolume: 0 }
    }
}

/// The root directory of a tree, as it is met in another tree of the same file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Crossing {
    /// Index of the tree among those of the file system.
    pub subvolume: u32,
    /// The number of the root directory there.
    pub ino: Ino,
}

/// The number of an inode within its tree: any 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Ino(pub u64);

impl Ino {
    /// Numbers below this cost the mount no memory.
    pub const SMALL_LIMIT: u64 = 1 << 40;
}

/// A point in time in a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time {
    /// Since 1970-01-01 00:00 UTC; negative before.
    pub seconds: i64,
    /// Below 1,000,000,000; forward in time, also before 1970.
    pub nanoseconds: u32,
}

/// The kind of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub enum FileKind {
    File,
    Directory,
    Symlink,
    CharDevice,
    BlockDevice,
    Fifo,
    Socket,
}

impl FileKind {
    /// The kind in the `st_mode` of stat(2), which Linux' file systems have on disk as well.
    pub(super) fn of_mode(mode: u32) -> Option<Self> {
        Some(match mode >> 12 {
            0o01 => Self::Fifo,
            0o02 => Self::CharDevice,
            0o04 => Self::Directory,
            0o06 => Self::BlockDevice,
            0o10 => Self::File,
            0o12 => Self::Symlink,
            0o14 => Self::Socket,
            _ => return None,
        })
    }
}

/// The stat(2) attributes of an inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileAttributes {
    /// Its kind.
    pub kind: FileKind,
    /// The twelve bits of permissions, set-ID and sticky bits.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes; of a symbolic link, its target's.
    pub size: u64,
    /// Blocks of 512 bytes, as the guest's kernel counts them.
    pub blocks: u64,
    /// Number of names.
    pub links: u32,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Last access.
    pub accessed: Time,
    /// Last change of content.
    pub modified: Time,
    /// Last change of the inode.
    pub changed: Time,
    /// Creation, where it is stored.
    pub created: Option<Time>,
}

/// One name in a directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DirectoryEntry {
    /// The name: not empty, without `/` and NUL, never `.` or `..`.
    pub name: Vec<u8>,
    /// The inode it names.
    pub ino: Ino,
    /// The inode's kind, if the directory stores it.
    pub kind: Option<FileKind>,
    /// The position where the listing continues after this entry; never 0, and below
    /// [`DirectoryEntry::NEXT_LIMIT`].
    pub next: u64,
}

impl DirectoryEntry {
    /// Positions in a directory are below this, so that the kernel's signed offsets can hold them.
    pub const NEXT_LIMIT: u64 = 1 << 63;
}

/// An extended attribute as the guest's kernel shows it: `user.x`, `security.selinux`, and access control
/// lists as
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
    /// Where its bytes are.
    pub kind: RunKind,
}

/// Where the bytes of a run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RunKind {
    /// Nowhere: a hole, or space that was never written. Reads as zeroes.
    Hole,
    /// In the source, unchanged, from this offset on.
    Stored(u64),
    /// In the source from this offset on, with a checksum or with copies: [`FileSystem::read_at`] returns
    /// what is right. The offset says only which files share bytes.
    Verified(u64),
    /// Only [`FileSystem::read_at`] can read them: they are in an inode, in a journal, or compressed.
    /// `SEEK_DATA` counts them as data.
    Opaque,
}

/// The statfs(2) numbers of a file system.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Bytes of a block.
    pub block_size: u32,
    /// Blocks in all.
    pub blocks: u64,
    /// Free blocks.
    pub free_blocks: u64,
    /// Free blocks without the reserve.
    pub available_blocks: u64,
    /// Inodes in all; 0: no limit.
    pub inodes: u64,
    /// Free inodes.
    pub free_inodes: u64,
    /// Bytes of a name at most.
    pub name_len: u32,
}

/// A read-only file system.
pub trait FileSystem: Send + Sync {
    /// The root directory.
    fn root(&self) -> Ino;

    /// The statfs(2) numbers.
    fn statistics(&self) -> Statistics;

    /// Facts about the shown state that the user should know, one sentence each, for example that a journal
    /// could not be replayed.
    fn remarks(&self) -> Vec<String>;

    /// The remarks that say that the shown state is not the last one: a journal could not be replayed, or
    /// only in part.
    fn stale(&self) -> Vec<String> {
        Vec::new()
    }

    /// The inode of a name in a directory, by the file system's own rules (such as case folding).
    fn lookup(&self, directory: Ino, name: &[u8]) -> Result<Option<Ino>>;

    /// The tree that begins at a directory of this one, if there is one. Its inodes are also inodes of this
    /// tree, with other numbers.
    fn crossing(&self, _: Ino) -> Option<Crossing> {
        None
    }

    /// Calls `each` with the entries of a directory, without `.` and `..`, from the position `from` on (0:
    /// the beginning; else some entry's `next`), until it returns false or the directory ends. An error may
    /// follow valid entries, which `each` has received by then.
    fn list(&self, directory: Ino, from: u64, each: &mut dyn FnMut(DirectoryEntry) -> bool) -> Result<()>;

    /// The stat(2) attributes.
    fn attributes(&self, ino: Ino) -> Result<FileAttributes>;

    /// The target of a symbolic link.
    fn read_link(&self, ino: Ino) -> Result<Vec<u8>>;

    /// Where the bytes of a regular file are, from `at` on: runs without gaps up to `at + len` or the end of
    /// the file, whichever comes first, but at most `most` of them. Empty at and beyond the end of the file.
    fn runs(&self, ino: Ino, at: u64, len: u64, most: usize) -> Result<Vec<FileRun>>;

    /// Reads a regular file from `at` on, up to its end, and returns the number of bytes read.
    fn read_at(&self, ino: Ino, at: u64, buf: &mut [u8]) -> Result<usize>;

    /// All extended attributes, in the order in which the guest's kernel lists them.
    fn extended_attributes(&self, ino: Ino) -> Result<Vec<ExtendedAttribute>>;
}
