//! Owner, mode, size and times of nodes.

use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::format::{Frozen, Snapshot};
use crate::guest;
use crate::io::ObjectStat;

use super::node::NodeKind;

/// The attributes of a node for stat(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Inode number.
    pub inode: u64,
    /// File type.
    pub kind: NodeKind,
    /// Size in bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Link count.
    pub links: u32,
    /// Device number in FUSE's encoding.
    pub device: u32,
    /// Last access.
    pub accessed: SystemTime,
    /// Last change of content.
    pub modified: SystemTime,
    /// Last change of the inode.
    pub changed: SystemTime,
    /// Permission bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Attributes {
    /// The attributes of a node that is not a guest's: all times are the same, and the link count follows the
    /// type.
    pub(super) fn plain(
        inode: u64,
        kind: NodeKind,
        (size, blocks): (u64, u64),
        modified: SystemTime,
        (uid, gid, permissions): (u32, u32, u16),
    ) -> Self {
        let links = if kind == NodeKind::Directory { 2 } else { 1 };
        let (accessed, changed) = (modified, modified);
        Self {
            inode,
            kind,
            size,
            blocks,
            links,
            device: 0,
            accessed,
            modified,
            changed,
            permissions,
            uid,
            gid,
        }
    }

    /// The attributes of a text that is made when it is read.
    pub(super) fn of_text(inode: u64, text: &[u8], modified: SystemTime, owner: (u32, u32, u16)) -> Self {
        let len = text.len() as u64;
        Self::plain(inode, NodeKind::File, (len, len.div_ceil(512)), modified, owner).changed_with(&text)
    }

    /// The same with a ctime that is another one for other content, within the second after its mtime. NFS
    /// clients keep a text until its ctime changes, and tar(1) complains if it changes without need.
    pub(super) fn changed_with(self, content: &impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        content.hash(&mut hasher);
        let later = Duration::from_nanos(hasher.finish() % 1_000_000_000);
        Self { changed: self.modified.checked_add(later).unwrap_or(self.modified), ..self }
    }

    /// The attributes of a node of which only number and type are known.
    pub(super) fn unknown(inode: u64, kind: NodeKind) -> Self {
        Self::plain(inode, kind, (0, 0), UNIX_EPOCH, (0, 0, 0))
    }
}

/// The sizes of a file system, for statfs(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are those of statvfs(3), written out")]
pub struct Statistics {
    pub blocks: u64,
    pub free_blocks: u64,
    pub available_blocks: u64,
    pub inodes: u64,
    pub free_inodes: u64,
    pub block_size: u32,
    pub fragment_size: u32,
    pub name_len: u32,
}

impl From<guest::Statistics> for Statistics {
    fn from(found: guest::Statistics) -> Self {
        let guest::Statistics {
            blocks,
            free_blocks,
            available_blocks,
            inodes,
            free_inodes,
            block_size,
            name_len,
        } = found;
        Self {
            blocks,
            free_blocks,
            available_blocks,
            inodes,
            free_inodes,
            block_size,
            fragment_size: block_size,
            name_len,
        }
    }
}

/// The options `uid=`, `gid=` and `umask=`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ownership {
    /// Owner of all files.
    pub uid: Option<u32>,
    /// Group of all files.
    pub gid: Option<u32>,
    /// Permission bits to mask; all others are set.
    pub umask: Option<u32>,
}

impl Ownership {
    /// Whether owners and modes are shown as the images and the guests have them.
    pub fn is_the_images(&self) -> bool {
        matches!(self, Self { uid: None, gid: None, umask: None })
    }

    /// Owner, group and permissions of a node that stands for the file or directory `stat`.
    pub(super) fn apply(&self, stat: &ObjectStat, kind: NodeKind, writable: bool) -> (u32, u32, u16) {
        let bits = match (self.umask, kind) {
            (Some(umask), NodeKind::Directory) => 0o777 & !umask,
            (Some(umask), _) => 0o666 & !umask,
            (None, NodeKind::Directory) => stat.mode & 0o777,
            (None, _) => stat.mode & 0o666,
        };
        let bits = if writable { bits } else { bits & !0o222 };
        (self.uid.unwrap_or(stat.uid), self.gid.unwrap_or(stat.gid), bits as u16)
    }
}

impl Ownership {
    /// Owner, group and permissions of a guest's file. With `umask=`, the option decides on read and write
    /// bits, and the guest's mode on execute bits.
    pub(super) fn of_guest(&self, found: &guest::FileAttributes) -> (u32, u32, u16) {
        let bits = match (self.umask, found.kind) {
            (Some(umask), guest::FileKind::Directory) => 0o777 & !umask as u16,
            (Some(umask), _) => (0o666 | found.mode & 0o111) & !umask as u16,
            (None, _) => found.mode & 0o7777,
        };
        (self.uid.unwrap_or(found.uid), self.gid.unwrap_or(found.gid), bits)
    }

    /// Owner, group and permissions of a directory with the content of the image `stat`: readable by those
    /// who may read the image.
    pub(super) fn of_contents(&self, stat: &ObjectStat) -> (u32, u32, u16) {
        let (uid, gid, bits) = self.apply(stat, NodeKind::File, false);
        (uid, gid, bits & 0o444 | (bits & 0o444) >> 2)
    }
}

/// Permissions of control files: only the owner of an image may give commands.
const CONTROL_BITS: u16 = 0o600;

impl Ownership {
    /// Owner, group and permissions of a control file of the image or directory `stat`.
    pub(super) fn control(&self, stat: &ObjectStat) -> (u32, u32, u16) {
        let (uid, gid, bits) = self.apply(stat, NodeKind::File, true);
        (uid, gid, if self.umask.is_some() { bits & CONTROL_BITS } else { CONTROL_BITS })
    }
}

/// A file's own modification time.
pub(super) fn modified(stat: &ObjectStat) -> SystemTime {
    time(stat.modified.seconds, stat.modified.nanoseconds)
}

/// When a layer was frozen.
pub(super) fn frozen(frozen: &Frozen) -> SystemTime {
    time(frozen.seconds, frozen.nanoseconds)
}

/// When an internal snapshot was taken.
pub(super) fn taken(snapshot: &Snapshot) -> SystemTime {
    time(i64::from(snapshot.seconds), snapshot.nanoseconds)
}

/// Converts a file system's time.
pub(super) fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let start = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    // A damaged image may have more nanoseconds than a second.
    let nanoseconds = Duration::from_nanos(u64::from(nanoseconds.min(999_999_999)));
    start.and_then(|start| start.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}
