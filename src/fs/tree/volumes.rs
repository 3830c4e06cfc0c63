//! The directory of a view's volumes in `files`: a list of them, a link to the system's, and their roots.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use crate::browse::{DiskContents, PointInTime};
use crate::error::Result;
use crate::guest::{TOP_LEVEL_SUFFIX, TreeId};
use crate::store::ViewId;

use super::super::guest_numbers::GuestNode;
use super::super::node::Node;
use super::MountTree;
use super::directories::{Entries, NamedNode};

const VOLUME_LIST: &str = "volumes.txt";
const ROOT_LINK: &str = "root";
/// Suffix of the file beside a volume that says why the volume is shown without its last writes.
const PROBLEM: &str = ".problem.txt";

/// The volumes of a view. A listing shows the disk's present state; a lookup continues with the state shown
/// before.
pub(super) struct Volumes<'a> {
    pub(super) tree: &'a MountTree,
    pub(super) view: ViewId,
}

impl Volumes<'_> {
    /// The root of a tree; an error if it cannot be mounted.
    fn root(&self, inside: &Arc<DiskContents>, tree: TreeId) -> Result<Node> {
        let (slot, found) = self.tree.slots.of(inside, tree)?;
        found.note_above(self.tree.inodes.number(&Node::FilesOf(self.view.clone())));
        Ok(Node::Guest(GuestNode { slot, depth: 0, ino: found.mounted.root }))
    }

    /// The problem file of a volume; `None` if the volume is shown with its last writes.
    fn problem(&self, inside: &DiskContents, volume: usize) -> Option<Node> {
        let is_stale = inside.mount(TreeId::main(volume)).is_ok_and(|mounted| !mounted.stale.is_empty());
        let name = || inside.layout().volumes[volume].name.as_str().into();
        is_stale.then(|| Node::VolumeProblem(self.view.clone(), name()))
    }
}

impl Entries for Volumes<'_> {
    fn find(&self, name: &OsStr) -> Result<Option<Node>> {
        if name == VOLUME_LIST {
            return Ok(Some(Node::VolumeList(self.view.clone())));
        }
        let inside = self.tree.browser.contents(&self.view, PointInTime::First)?;
        if name == ROOT_LINK {
            let has_system = !inside.operating_systems()?.is_empty();
            return Ok(has_system.then(|| Node::RootLink(self.view.clone())));
        }
        if let Some(volume) = inside.volume(name.as_bytes()) {
            return self.root(&inside, TreeId::main(volume)).map(Some);
        }
        if let Some(volume) = inside.volume_of_top_level(name.as_bytes()) {
            let has_files = inside.layout().volumes[volume].problem.is_none();
            let top_level = if has_files { inside.top_level(volume)? } else { None };
            return top_level.map(|tree| self.root(&inside, tree)).transpose();
        }
        let volume = name.to_str().and_then(|name| name.strip_suffix(PROBLEM));
        let volume = volume.and_then(|volume| inside.volume(volume.as_bytes()));
        Ok(volume.and_then(|volume| self.problem(&inside, volume)))
    }

    fn list(&self, found: &mut Vec<NamedNode>) -> Result<()> {
        let inside = self.tree.browser.contents(&self.view, PointInTime::Now)?;
        found.push((VOLUME_LIST.into(), Node::VolumeList(self.view.clone())));
        if !inside.operating_systems()?.is_empty() {
            found.push((ROOT_LINK.into(), Node::RootLink(self.view.clone())));
        }
        for (volume, described) in inside.layout().volumes.iter().enumerate() {
            // A volume that cannot be mounted is in the list of volumes, with the reason.
            let Ok(root) = self.root(&inside, TreeId::main(volume)) else { continue };
            found.push((described.name.clone().into(), root));
            let name = format!("{}{TOP_LEVEL_SUFFIX}", described.name);
            if inside.volume(name.as_bytes()).is_none()
                && let Some(tree) = inside.top_level(volume)?
                && let Ok(root) = self.root(&inside, tree)
            {
                found.push((name.into(), root));
            }
            let name = format!("{}{PROBLEM}", described.name);
            // A volume of that name has precedence.
            if inside.volume(name.as_bytes()).is_none()
                && let Some(node) = self.problem(&inside, volume)
            {
                found.push((name.into(), node));
            }
        }
        Ok(())
    }
}
