//! Listings of directories, and the offsets of their entries.
//!
//! `.` and `..` have the offsets 1 and 2. The entries of a directory of the store follow, as they were when
//! it was opened; those of a guest's directory have the positions of the guest's file system.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use crate::browse::{ListedEntry, Listing};
use crate::error::{Error, ErrorKind, Result};

use super::super::access::Caller;
use super::super::attributes::Attributes;
use super::super::guest_file::GuestDirectory;
use super::super::guest_numbers::GuestNode;
use super::super::handles::Handle;
use super::super::node::{Node, NodeKind};
use super::super::tree::{MountTree, NodeEntry};
use super::calls::OpenFile;
use super::replies::DirectoryEntry;

/// The first offsets are those of `.` and `..`.
const DOTS: u64 = 2;

/// An entry, with its attributes if the listing has them.
pub(super) struct ListedNode<'a> {
    shown: DirectoryEntry<'a>,
    attributes: Option<Attributes>,
}

impl<'a> ListedNode<'a> {
    /// The entry for the client.
    pub(super) fn shown(&self) -> &DirectoryEntry<'a> {
        &self.shown
    }

    /// Whether it is `.` or `..`, which are no lookups.
    pub(super) fn is_dots(&self) -> bool {
        matches!(self.shown.name.as_encoded_bytes(), b"." | b"..")
    }

    /// The attributes; `None` if the inode is damaged, or has another type than its number encodes.
    pub(super) fn attributes(&self, tree: &MountTree, caller: &Caller) -> Result<Option<Attributes>> {
        if self.attributes.is_some() {
            return Ok(self.attributes);
        }
        let DirectoryEntry { inode, kind, .. } = self.shown;
        match tree.attributes(caller, inode) {
            Ok(found) if MountTree::is_guest(inode) && found.kind != kind => Ok(None),
            Err(error) if MountTree::is_guest(inode) => match error.kind() {
                ErrorKind::Corrupt | ErrorKind::Unsupported => Ok(None),
                _ => Err(error),
            },
            found => found.map(Some),
        }
    }
}

/// An open directory.
enum OpenDirectory {
    Store(Arc<[NodeEntry]>),
    Guest(Arc<GuestDirectory>, GuestNode),
}

fn entries(tree: &MountTree, file: OpenFile) -> Result<OpenDirectory> {
    match (tree.handle(file.handle)?, tree.node(file.inode)?) {
        (Handle::Directory(listed), _) => Ok(OpenDirectory::Store(listed)),
        (Handle::GuestDirectory(directory), Node::Guest(node)) => Ok(OpenDirectory::Guest(directory, node)),
        _ => Err(Error::new(ErrorKind::Usage, "not a directory")),
    }
}

/// Calls `take` with the entries of an open directory from `offset` on, `.` and `..` first, until it returns
/// `true`. Entries are not copied: the kernel reads a large directory in hundreds of small parts.
pub(super) fn each(
    tree: &MountTree,
    file: OpenFile,
    offset: u64,
    take: &mut dyn FnMut(&ListedNode<'_>) -> bool,
) -> Result<()> {
    let entries = entries(tree, file)?;
    for (name, next) in [(".", 1), ("..", DOTS)] {
        let (name, inode, kind) = (OsStr::new(name), file.inode, NodeKind::Directory);
        let shown = DirectoryEntry { name, inode, kind, next };
        if offset < next && take(&ListedNode { shown, attributes: None }) {
            return Ok(());
        }
    }
    match entries {
        OpenDirectory::Store(listed) => {
            for (entry, next) in listed.iter().zip(DOTS + 1..).skip(offset.saturating_sub(DOTS) as usize) {
                // A node without a kind is the root of a guest's file system.
                let kind = entry.node.kind().unwrap_or(NodeKind::Directory);
                let shown = DirectoryEntry { name: &entry.name, inode: entry.inode, kind, next };
                if take(&ListedNode { shown, attributes: None }) {
                    break;
                }
            }
            Ok(())
        }
        OpenDirectory::Guest(directory, node) => {
            let mut place = offset.saturating_sub(DOTS);
            let mut has_entries = false;
            loop {
                let (listing, skip) = match directory.from(place) {
                    Ok(found) => found,
                    // Entries before the error are returned first; the next request returns the error.
                    Err(_) if has_entries => return Ok(()),
                    Err(error) => return Err(error),
                };
                if add_entries(tree, &directory, node, &listing, skip, take) || listing.ends {
                    return Ok(());
                }
                let Some(last) = listing.entries.last() else { return Ok(()) };
                has_entries |= listing.entries.len() > skip;
                place = last.entry.next;
            }
        }
    }
}

/// Adds a guest's entries; whether the reply is full.
fn add_entries(
    tree: &MountTree,
    directory: &GuestDirectory,
    parent: GuestNode,
    listing: &Listing,
    skip: usize,
    take: &mut dyn FnMut(&ListedNode<'_>) -> bool,
) -> bool {
    for ListedEntry { entry, attributes, is_plain, crossing } in &listing.entries[skip..] {
        if *is_plain {
            directory.slot.note_plain(entry.ino);
        }
        let kind = attributes.as_ref().map(|found| found.kind).or(entry.kind);
        // A damaged inode is listed as a file; a lookup returns the error.
        let kind_shown = kind.unwrap_or(crate::guest::FileKind::File);
        let node = tree.guest_node(&directory.slot, parent, entry.ino, kind_shown, *crossing);
        let attributes = attributes.as_ref().map(|found| tree.shown_attributes(node, found));
        let shown = DirectoryEntry {
            name: OsStr::from_bytes(&entry.name),
            inode: tree.guest_number(node),
            kind: attributes.map_or_else(|| tree.shown_kind(kind_shown), |found| found.kind),
            next: entry.next + DOTS,
        };
        if take(&ListedNode { shown, attributes }) {
            return true;
        }
    }
    false
}
