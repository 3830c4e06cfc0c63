//! The names that chains had before in this mount. They stay as symbolic links for its life.
//!
//! A chain gets another name when a name clash comes or goes, or a leaf stops being the main one of its disk.
//! Programs that opened the old name find the same disk there: that leaf's, or an overlay's that virsh has made
//! of it. An overlay with another stem may be the disk of another virtual machine. A name that another chain
//! or a directory has taken is no link any more.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::catalog::{Catalog, ImageIndex};

/// Maximum number of names that are remembered.
const MAX_NAMES: usize = 10_000;

/// Former names: the chain's path in the mount, and the path of the leaf that had it last.
#[derive(Debug, Default)]
pub(super) struct FormerNames {
    names: BTreeMap<PathBuf, PathBuf>,
}

impl FormerNames {
    /// Takes over the names that `now` has no more, and adds links to `now`.
    pub(super) fn follow(&mut self, before: &Catalog, now: &mut Catalog) {
        if now.single.is_some() {
            return;
        }
        for (path, leaf) in before.chains() {
            if now.chain(&path).is_none() && (self.names.len() < MAX_NAMES || self.names.contains_key(&path))
            {
                self.names.insert(path, before.images[leaf].place.path.clone());
            }
        }
        if self.names.is_empty() {
            return;
        }
        let is_taken = |path: &Path| {
            let directory = path.parent().and_then(|parent| now.directories.get(parent));
            let name = path.file_name().unwrap_or_default();
            directory.is_some_and(|found| found.chains.contains_key(name) || found.directories.contains(name))
        };
        self.names.retain(|path, _| !is_taken(path));
        let in_store = now.images.iter().enumerate().filter(|(_, image)| image.place.root == 0);
        let by_path: HashMap<&Path, ImageIndex> =
            in_store.map(|(index, image)| (image.place.path.as_path(), index)).collect();
        let mut links: Vec<(PathBuf, OsString)> = Vec::new();
        for (path, file) in &self.names {
            let Some(leaf) = by_path.get(file.as_path()).and_then(|index| only_leaf(now, *index)) else {
                continue;
            };
            let Some(target) = now.chain_path(leaf) else { continue };
            // Links lead to a chain of the same directory: they stay right wherever the mount is.
            if target.parent() == path.parent()
                && let Some(name) = target.file_name()
            {
                links.push((path.clone(), name.to_os_string()));
            }
        }
        for (path, target) in links {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { continue };
            if let Some(directory) = now.directories.get_mut(parent) {
                directory.former.insert(name.to_os_string(), target);
            }
        }
    }
}

/// The leaf whose disk goes on where `image` was the leaf: itself, or its only overlay's, of the same stem.
fn only_leaf(catalog: &Catalog, mut image: ImageIndex) -> Option<ImageIndex> {
    let stem = |image: ImageIndex| catalog.images[image].place.path.with_extension("");
    for _ in 0..=catalog.images.len() {
        match catalog.images[image].users.as_slice() {
            [] => return Some(image),
            [overlay] if stem(*overlay) == stem(image) => image = *overlay,
            _ => return None,
        }
    }
    None
}
