//! Owner, mode, size and times of what is shown.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::format::{Frozen, Snapshot};
use crate::io::FileStat;

use super::node::NodeKind;

/// What stat(2) says of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Number of the node.
    pub inode: u64,
    /// Directory or file.
    pub kind: NodeKind,
    /// Bytes.
    pub size: u64,
    /// Blocks of 512 bytes.
    pub blocks: u64,
    /// Last change of content.
    pub mtime: SystemTime,
    /// Permission bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What `-o uid=,gid=,umask=` say.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ownership {
    /// Owner of everything.
    pub uid: Option<u32>,
    /// Group of everything.
    pub gid: Option<u32>,
    /// Permission bits that nobody has; all others are given.
    pub umask: Option<u32>,
}

impl Ownership {
    /// Owner, group and permissions of something that belongs to the file or directory `stat`.
    pub(super) fn apply(&self, stat: &FileStat, kind: NodeKind, writable: bool) -> (u32, u32, u16) {
        let bits = match (self.umask, kind) {
            (Some(umask), NodeKind::Directory) => 0o777 & !umask,
            (Some(umask), NodeKind::File) => 0o666 & !umask,
            (None, NodeKind::Directory) => stat.mode & 0o777,
            (None, NodeKind::File) => stat.mode & 0o666,
        };
        let bits = if writable { bits } else { bits & !0o222 };
        (self.uid.unwrap_or(stat.uid), self.gid.unwrap_or(stat.gid), bits as u16)
    }
}

/// Permissions of control files: those who may write an image may change it, and nobody else.
const CONTROL_BITS: u16 = 0o600;

impl Ownership {
    /// Owner, group and permissions of a control file of the image or directory `stat`.
    pub(super) fn control(&self, stat: &FileStat) -> (u32, u32, u16) {
        let (uid, gid, bits) = self.apply(stat, NodeKind::File, true);
        (uid, gid, if self.umask.is_some() { bits & CONTROL_BITS } else { CONTROL_BITS })
    }
}

/// A file's own modification time.
pub(super) fn modified(stat: &FileStat) -> SystemTime {
    time(stat.signature.mtime.0, stat.signature.mtime.1)
}

/// When a layer was frozen.
pub(super) fn frozen(frozen: &Frozen) -> SystemTime {
    time(frozen.seconds, frozen.nanoseconds)
}

/// When an internal snapshot was taken.
pub(super) fn taken(snapshot: &Snapshot) -> SystemTime {
    time(i64::from(snapshot.seconds), snapshot.nanoseconds)
}

fn time(seconds: i64, nanoseconds: u32) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let start = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    // A bad image may say more nanoseconds than a second has.
    let nanoseconds = Duration::from_nanos(u64::from(nanoseconds.min(999_999_999)));
    start.and_then(|start| start.checked_add(nanoseconds)).unwrap_or(UNIX_EPOCH)
}
