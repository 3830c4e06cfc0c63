//! Requests that label a disk: chown(2), setxattr(2) and removexattr(2), and what the labels change.

use std::ffi::OsStr;

use crate::error::{Error, ErrorKind, Result};

use super::super::access::Caller;
use super::super::attributes::Attributes;
use super::super::disk_labels::{DiskLabels, GivenOwner, SetMode};
use super::super::node::{Node, PartitionNode};
use super::MountTree;

impl MountTree {
    /// The attributes of a disk with the owner that it was given to.
    pub(super) fn labelled(&self, node: &Node, found: Attributes) -> Attributes {
        let Some(given) = self.labels.owner(node) else { return found };
        let is_active = match node {
            Node::View(view) | Node::Partition(PartitionNode { view, .. }) => view.is_active(),
            _ => false,
        };
        let is_writable = is_active && !self.store.options().read_only;
        let (uid, gid, permissions) = given.apply((found.uid, found.gid, found.permissions), is_writable);
        Attributes { permissions, uid, gid, ..found }
    }

    /// Lets users to whom a disk was given search the directories above it. Which names they find there is
    /// checked at each lookup.
    pub(super) fn with_way_to_given(
        &self,
        directory: &Node,
        (uid, gid, bits): (u32, u32, u16),
    ) -> (u32, u32, u16) {
        let search = if self.labels.leads_to_given(directory, None) { 0o011 } else { 0 };
        (uid, gid, bits | search)
    }

    /// chown(2): gives a disk to a user in this mount. The image keeps its owner.
    pub fn set_owner(
        &self,
        caller: &Caller,
        inode: u64,
        (uid, gid): (Option<u32>, Option<u32>),
    ) -> Result<()> {
        let node = self.node(inode)?;
        let refuse = |fact| Err(Error::new(ErrorKind::Forbidden, fact));
        if !DiskLabels::is_labelled_kind(&node) {
            return refuse("owner and mode are those of the image file; change them in the store");
        }
        if caller.uid != 0 {
            return refuse(
                "only root can give a disk of the mount to another user; change the image's owner",
            );
        }
        if !self.rights.is_shared() {
            return refuse("only the mounting user has access to this mount; mount with -o allow_other");
        }
        // A4: the label belongs to the node, and the image is not asked.
        self.labels.give(&node, GivenOwner { uid, gid }, |node| self.is_present(node));
        Ok(())
    }

    /// Whether a labelled disk is still there.
    fn is_present(&self, node: &Node) -> bool {
        match node {
            Node::View(view) | Node::Partition(PartitionNode { view, .. }) => {
                self.store.find_view(view).is_ok()
            }
            _ => false,
        }
    }

    /// setxattr(2). `Unsupported` for names and nodes that keep none. Returns false if there is none to
    /// replace.
    pub fn set_extended_attribute(
        &self,
        caller: &Caller,
        inode: u64,
        (name, value): (&OsStr, &[u8]),
        mode: SetMode,
    ) -> Result<bool> {
        let node = self.check_attribute_change(caller, inode, name)?;
        self.labels.set_attribute(&node, (name, value), mode, |node| self.is_present(node))
    }

    /// removexattr(2). Returns whether there was one.
    pub fn remove_extended_attribute(&self, caller: &Caller, inode: u64, name: &OsStr) -> Result<bool> {
        let node = self.check_attribute_change(caller, inode, name)?;
        Ok(self.labels.remove_attribute(&node, name))
    }

    fn check_attribute_change(&self, caller: &Caller, inode: u64, name: &OsStr) -> Result<Node> {
        let node = self.node(inode)?;
        if !DiskLabels::is_labelled_kind(&node) || !DiskLabels::is_kept(name) {
            let fact = "extended attributes of this kind cannot be set; those of the image are in the store";
            return Err(Error::new(ErrorKind::Unsupported, fact));
        }
        // The kernel asks for CAP_SYS_ADMIN, too.
        if caller.uid != 0 {
            return Err(Error::new(ErrorKind::Forbidden, "only root can set trusted attributes"));
        }
        Ok(node)
    }
}
