//! Access rights to the images of a store, as of one moment: the rule of [`rights`](super::rights), applied
//! to every directory of the path as well.
//!
//! Promises: a file that cannot be checked is accessible to the administrator only. Files are opened with
//! `O_PATH` only.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::io::{Backend, Permissions};

use super::catalog::{Catalog, ImageEntry, ImageIndex};
use super::resolve::StorePath;
use super::rights::{Class, READ, SEARCH, Subject, WRITE};
use super::trash::TrashItem;
use super::users::groups_of;

/// The permissions on the path to a file, and the file's own; `None` where unknown.
type PathRights = Option<Arc<PathPermissions>>;

#[derive(Debug)]
struct PathPermissions {
    directories: Vec<Arc<Permissions>>,
    file: Arc<Permissions>,
}

/// Reads permissions once and caches them: for one query, or for a moment.
#[derive(Debug)]
pub struct AccessJudge {
    roots: Vec<Arc<dyn Backend>>,
    above: Vec<Option<Vec<Arc<Permissions>>>>,
    kept: Mutex<HashMap<StorePath, Option<Arc<Permissions>>>>,
    ways: Mutex<HashMap<StorePath, PathRights>>,
}

impl AccessJudge {
    /// For files beneath these roots.
    pub(super) fn new(roots: &[Arc<dyn Backend>]) -> Self {
        let above = |root: &Arc<dyn Backend>| {
            let found = root.permissions_above().inspect_err(|error| tracing::warn!("{error}")).ok()?;
            Some(found.into_iter().map(Arc::new).collect())
        };
        Self {
            above: roots.iter().map(above).collect(),
            roots: roots.to_vec(),
            kept: Mutex::default(),
            ways: Mutex::default(),
        }
    }

    fn permissions(&self, root: usize, path: &Path) -> Option<Arc<Permissions>> {
        let place = StorePath { root, path: path.to_path_buf() };
        if let Some(kept) = self.kept.lock().get(&place) {
            return kept.clone();
        }
        let found = self.roots.get(root).and_then(|root| root.permissions(path).ok()).map(Arc::new);
        self.kept.lock().insert(place, found.clone());
        found
    }

    /// The directories that are searched to reach `place`, and the file at the end.
    fn steps(&self, place: &StorePath) -> Option<(Vec<Arc<Permissions>>, std::path::PathBuf)> {
        let (searched, plain) = self.roots.get(place.root)?.steps(&place.path).ok()?;
        let mut directories = self.above.get(place.root)?.clone()?;
        for directory in searched.iter().filter(|path| !path.as_os_str().is_empty()) {
            directories.push(self.permissions(place.root, directory)?);
        }
        Some((directories, plain))
    }

    fn way(&self, place: &StorePath) -> PathRights {
        if let Some(way) = self.ways.lock().get(place) {
            return way.clone();
        }
        let found = self.steps(place).and_then(|(directories, plain)| {
            Some(Arc::new(PathPermissions { directories, file: self.permissions(place.root, &plain)? }))
        });
        self.ways.lock().insert(place.clone(), found.clone());
        found
    }

    fn may(&self, who: &Subject, place: &StorePath, want: u32) -> bool {
        // A1: each directory on the path, and the file.
        let is_met = |way: Arc<PathPermissions>| {
            way.directories.iter().all(|directory| who.may(directory, SEARCH)) && who.may(&way.file, want)
        };
        who.is_root() || self.way(place).is_some_and(is_met)
    }

    /// Whether a user may reach the path of a file, existing or not.
    pub(crate) fn may_reach(&self, who: &Subject, place: &StorePath) -> bool {
        let is_open = |(directories, _): (Vec<Arc<Permissions>>, _)| {
            directories.iter().all(|step| who.may(step, SEARCH))
        };
        who.is_root() || self.steps(place).is_some_and(is_open)
    }

    /// Whether a user may read a file.
    pub(crate) fn may_read_place(&self, who: &Subject, place: &StorePath) -> bool {
        self.may(who, place, READ)
    }

    /// Whether a user may read the file at this path of the store.
    pub fn may_read_in_store(&self, who: &Subject, path: &Path) -> bool {
        self.may_read_place(who, &StorePath { root: 0, path: path.to_path_buf() })
    }

    /// Whether a name in the image at `from`, which the user owns, may lead that user to `place`: the user's
    /// own files count whatever their modes, and directories that contain the image itself do not restrict
    /// its owner. For a missing file, whether the user may see that.
    pub(super) fn counts_for(&self, who: &Subject, from: &StorePath, place: &StorePath) -> bool {
        let passes = |step: &Permissions, want| step.uid == who.uid || who.may(step, want);
        let Some((searched, plain)) =
            self.roots.get(place.root).and_then(|root| root.steps(&place.path).ok())
        else {
            return false;
        };
        let is_same_root = from.root == place.root;
        let above = self.above.get(place.root).and_then(Option::as_ref).filter(|_| !is_same_root);
        if !is_same_root && !above.is_some_and(|above| above.iter().all(|step| passes(step, SEARCH))) {
            return false;
        }
        let is_shared = |directory: &Path| is_same_root && from.path.starts_with(directory);
        let may_search = searched
            .iter()
            .filter(|directory| !directory.as_os_str().is_empty() && !is_shared(directory))
            .all(|directory| {
                self.permissions(place.root, directory).is_some_and(|step| passes(&step, SEARCH))
            });
        may_search && self.permissions(place.root, &plain).is_none_or(|file| passes(&file, READ))
    }

    /// Whether a user may read an item of the trash, and could reach its former path.
    pub fn may_see_item(&self, who: &Subject, item: &TrashItem) -> bool {
        let place = |path: &Path| StorePath { root: 0, path: path.to_path_buf() };
        self.may_read_place(who, &place(&item.file())) && self.may_reach(who, &place(&item.path))
    }

    /// Whether a user may read an image: all files of it.
    pub fn may_read(&self, who: &Subject, image: &ImageEntry) -> bool {
        places(image).all(|place| self.may(who, place, READ))
    }

    /// Whether a user may read all of these.
    pub fn may_read_all(&self, who: &Subject, catalog: &Catalog, layers: &[ImageIndex]) -> bool {
        who.is_root() || layers.iter().all(|index| self.may_read(who, &catalog.images[*index]))
    }

    /// Whether a user may read and write an image.
    pub fn may_write(&self, who: &Subject, image: &ImageEntry) -> bool {
        places(image).all(|place| self.may(who, place, READ | WRITE))
    }

    /// Whether a user may rename or remove a file of this directory, or, if it does not exist, create it.
    pub(crate) fn may_change_name(&self, who: &Subject, place: &StorePath) -> bool {
        if who.is_root() {
            return true;
        }
        let directory = place.path.parent().unwrap_or(Path::new(""));
        let Some((steps, _)) = self.steps(place) else { return false };
        let Some(parent) = self.permissions(place.root, directory) else { return false };
        let owner = self.permissions(place.root, &place.path).map_or(who.uid, |file| file.uid);
        steps.iter().all(|step| who.may(step, SEARCH)) && who.may_rename_in(&parent, owner)
    }

    /// The mode of a disk of these layers, top first: for the owner of the first, its group, and all others.
    pub fn mode(&self, catalog: &Catalog, layers: &[ImageIndex], is_writable: bool) -> u32 {
        let Some(top) = layers.first().map(|index| &catalog.images[*index]) else { return 0 };
        let Some(own) = self.way(&top.place) else { return 0 };
        let (uid, gid) = (own.file.uid, own.file.gid);
        let classes = [
            Class::Owner(Subject::new(uid, groups_of(uid))),
            Class::Group { uid, gid },
            Class::Other { uid, gid },
        ];
        let mut mode = 0;
        for (class, shift) in classes.iter().zip([6, 3, 0]) {
            if layers
                .iter()
                .all(|index| places(&catalog.images[*index]).all(|place| self.class_may(class, place, READ)))
            {
                mode |= READ << shift;
                if is_writable && places(top).all(|place| self.class_may(class, place, WRITE)) {
                    mode |= WRITE << shift;
                }
            }
        }
        mode
    }

    fn class_may(&self, class: &Class, place: &StorePath, want: u32) -> bool {
        self.way(place).is_some_and(|way| {
            way.directories.iter().all(|step| class.may(step, SEARCH)) && class.may(&way.file, want)
        })
    }
}

/// The files of an image.
fn places(image: &ImageEntry) -> impl Iterator<Item = &StorePath> {
    std::iter::once(&image.place).chain(image.data_file.as_ref().map(|(place, _)| place))
}
