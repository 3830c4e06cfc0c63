//! The entries of an open directory, as the kernel reads them: in parts.

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
use super::super::tree::{MountTree, NodeEntry, guest_node};

/// The first offsets are those of `.` and `..`.
const DOTS: u64 = 2;

/// One entry.
pub(super) struct ListingEntry<'a> {
    /// The offset of the next entry.
    pub(super) next: u64,
    pub(super) inode: u64,
    pub(super) kind: NodeKind,
    pub(super) name: &'a OsStr,
    /// The attributes, if they are known.
    pub(super) attributes: Option<Attributes>,
}

/// An open directory.
enum OpenDirectory {
    Store(Arc<[NodeEntry]>),
    Guest(Arc<GuestDirectory>, GuestNode),
}

fn entries(tree: &MountTree, inode: u64, handle: u64) -> Result<OpenDirectory> {
    match (tree.handle(handle)?, tree.node(inode)?) {
        (Handle::Directory(listed), _) => Ok(OpenDirectory::Store(listed)),
        (Handle::GuestDirectory(directory), Node::Guest(node)) => Ok(OpenDirectory::Guest(directory, node)),
        _ => Err(Error::new(ErrorKind::Usage, "not a directory")),
    }
}

/// Calls `take` with the entries of an open directory from `offset` on, `.` and `..` first, until it returns
/// `true`. Entries are not copied: the kernel reads a large directory in hundreds of small parts.
pub(super) fn each(
    tree: &MountTree,
    inode: u64,
    handle: u64,
    offset: u64,
    take: &mut dyn FnMut(&ListingEntry<'_>) -> bool,
) -> Result<()> {
    let entries = entries(tree, inode, handle)?;
    for (name, next) in [(".", 1), ("..", 2)] {
        let kind = NodeKind::Directory;
        if offset < next
            && take(&ListingEntry { next, inode, kind, name: OsStr::new(name), attributes: None })
        {
            return Ok(());
        }
    }
    match entries {
        OpenDirectory::Store(listed) => {
            for (entry, next) in listed.iter().zip(3..).skip(offset.saturating_sub(DOTS) as usize) {
                // A node without a kind is the root of a guest's file system.
                let kind = entry.node.kind().unwrap_or(NodeKind::Directory);
                if take(&ListingEntry { next, inode: entry.inode, kind, name: &entry.name, attributes: None })
                {
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
    take: &mut dyn FnMut(&ListingEntry<'_>) -> bool,
) -> bool {
    for ListedEntry { entry, attributes, is_plain } in &listing.entries[skip..] {
        if *is_plain {
            directory.slot.note_plain(entry.ino);
        }
        let kind = attributes.as_ref().map(|found| found.kind).or(entry.kind);
        // A damaged inode is listed as a file; a lookup returns the error.
        let kind_shown = kind.unwrap_or(crate::guest::FileKind::File);
        let node = guest_node(&directory.slot, parent, entry.ino, kind_shown);
        let shown = attributes.as_ref().map(|found| tree.shown_attributes(node, found));
        let entry = ListingEntry {
            next: entry.next + DOTS,
            inode: tree.guest_number(node),
            kind: shown.map_or_else(|| tree.shown_kind(kind_shown), |shown| shown.kind),
            name: OsStr::from_bytes(&entry.name),
            attributes: shown,
        };
        if take(&entry) {
            return true;
        }
    }
    false
}

/// The attributes of a listed entry; `None` if the inode is damaged, or has another type than its number
/// encodes.
pub(super) fn known(
    tree: &MountTree,
    caller: &Caller,
    entry: &ListingEntry<'_>,
) -> Result<Option<Attributes>> {
    match tree.attributes(caller, entry.inode) {
        Ok(found) if MountTree::is_guest(entry.inode) && found.kind != entry.kind => Ok(None),
        Err(error) if MountTree::is_guest(entry.inode) => match error.kind() {
            ErrorKind::Corrupt | ErrorKind::Unsupported => Ok(None),
            _ => Err(error),
        },
        found => found.map(Some),
    }
}
