//! What a transport passes to a call, in plain types.

use super::super::access::Caller;

/// The node that a call is about, and who calls.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// The inode number; for names, that of the parent directory.
    pub inode: u64,
    /// The client process.
    pub caller: Caller,
}

/// An open file or directory, by the node and the number of its handle.
#[derive(Clone, Copy, Debug)]
pub struct OpenFile {
    /// The inode number.
    pub inode: u64,
    /// The number from [`Opened`](super::Opened) or [`OpenedDirectory`](super::OpenedDirectory).
    pub handle: u64,
}

/// A write(2).
#[derive(Clone, Copy, Debug)]
pub struct Write<'a> {
    /// The file offset.
    pub offset: u64,
    /// The bytes, which stay the transport's.
    pub bytes: &'a [u8],
    /// The flags of the open file, as for open(2).
    pub flags: i32,
    /// Whether the kernel writes back a dirty page of a mapping.
    pub is_write_back: bool,
}

/// A change of attributes: chmod(2), chown(2), truncate(2), utimes(2).
#[derive(Clone, Copy, Debug, Default)]
pub struct AttributeChange {
    /// Whether the mode changes.
    pub changes_mode: bool,
    /// The new owner.
    pub uid: Option<u32>,
    /// The new group.
    pub gid: Option<u32>,
    /// The new size.
    pub size: Option<u64>,
    /// The open file, for ftruncate(2).
    pub handle: Option<u64>,
}
