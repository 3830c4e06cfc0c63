//! The entries of an open directory, as the kernel takes them: piece by piece.

use std::ffi::OsStr;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};

use super::super::handles::Handle;
use super::super::node::NodeKind;
use super::super::tree::{Listed, Tree};

/// The entries of an open directory.
pub(super) struct Entries {
    inode: u64,
    listed: Arc<[Listed]>,
}

pub(super) fn entries(tree: &Tree, inode: u64, handle: u64) -> Result<Entries> {
    match tree.handle(handle)? {
        Handle::Directory(listed) => Ok(Entries { inode, listed }),
        Handle::Text(_) | Handle::Disk(_) | Handle::Active(_) | Handle::Control(_) | Handle::Progress(_) => {
            Err(Error::new(ErrorKind::Usage, "not a directory"))
        }
    }
}

impl Entries {
    /// Those from `offset` on, `.` and `..` being the first, each with the offset of the next.
    /// Without a copy: the kernel takes a large directory in hundreds of small pieces.
    pub(super) fn from(&self, offset: u64) -> impl Iterator<Item = (u64, u64, NodeKind, &OsStr)> {
        let dots = [".", ".."].map(|name| (self.inode, NodeKind::Directory, OsStr::new(name)));
        let listed = self.listed.iter().map(|entry| (entry.inode, entry.node.kind(), entry.name.as_os_str()));
        let all = dots.into_iter().chain(listed).zip(1..);
        all.skip(offset as usize).map(|((number, kind, name), next)| (next, number, kind, name))
    }
}
