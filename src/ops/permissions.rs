//! What the user whose command is served may not do, and what a refusal may disclose to that user.
//!
//! Every file that a plan reads and every name that it changes is judged. A file that the user may not read
//! is not named.

use std::path::{Path, PathBuf};

use crate::error::{Error, ErrorKind, Result};
use crate::store::{ImageEntry, ImageIndex, StorePath, shown};

use super::plan::Plan;
use super::scanned_store::ScannedStore;

impl ScannedStore {
    /// Why the user may not write an image, if so.
    pub(super) fn unwritable(&self, index: ImageIndex) -> Option<Error> {
        let asker = self.asker.as_ref()?;
        let image = self.image(index);
        if asker.judge.may_write(&asker.subject, image) {
            return None;
        }
        let name = self.called(image);
        let fact = "would be changed by this, and you may not write it; ask its owner, or root";
        Some(Error::new(ErrorKind::Denied, format!("{name} {fact}")))
    }

    /// Why the user may not reach a file, if so: checked before any fact about it is disclosed.
    pub(super) fn unreachable(&self, place: &StorePath) -> Option<Error> {
        let asker = self.asker.as_ref()?;
        let may = asker.judge.may_read_place(&asker.subject, place);
        (!may).then(|| {
            Error::new(ErrorKind::Denied, "you may not read the file that this names; ask its owner, or root")
        })
    }

    /// Why the user may not carry out a plan: any layer before and after may be copied, and every added or
    /// removed name changes a directory.
    pub(super) fn not_permitted(&self, plan: &Plan) -> Vec<Error> {
        // A2: every file that is read, and every name that changes.
        let Some(asker) = &self.asker else { return Vec::new() };
        let layers: Vec<&Path> =
            plan.before.iter().chain(&plan.after).map(|layer| layer.path.as_path()).collect();
        let mut refusals = Vec::new();
        for image in self.catalog.images.iter().filter(|image| layers.contains(&image.place.path.as_path())) {
            if !asker.judge.may_read(&asker.subject, image) {
                let fact = "the chain has layers that you may not read; ask their owners, or root";
                refusals.push(Error::new(ErrorKind::Denied, fact));
                break;
            }
        }
        let renamed = plan.renamed.iter().flat_map(|(old, new)| [old, new]);
        let is_new = |path: &&PathBuf| !plan.before.iter().any(|layer| layer.path == **path);
        let made = plan.after.iter().map(|layer| &layer.path).filter(is_new);
        let is_known = |path: &PathBuf| self.catalog.images.iter().any(|image| image.place.path == *path);
        let overlays = made.filter(|path| !is_known(path));
        for path in plan.removed.iter().chain(renamed).chain(overlays) {
            refusals.extend(self.not_renamable(path));
        }
        refusals
    }

    /// Why the user may not add or remove that name, if so.
    pub(super) fn not_renamable(&self, path: &Path) -> Option<Error> {
        let asker = self.asker.as_ref()?;
        let place = StorePath { root: 0, path: path.to_path_buf() };
        if asker.judge.may_change_name(&asker.subject, &place) {
            return None;
        }
        let fact = "cannot be made, renamed or removed by you: you may not change its directory, or that \
            lets only owners \
                    do it; ask the owner of the directory, or root";
        Some(Error::new(ErrorKind::Denied, format!("{} {fact}", shown(path))))
    }

    /// An image's name in a sentence: disclosed only to users who may read the image.
    pub(super) fn called(&self, image: &ImageEntry) -> String {
        let Some(asker) = &self.asker else { return image.shown() };
        // Nothing is known here of a store above a single image.
        let may = self.whole.is_none() && asker.judge.may_read(&asker.subject, image);
        if may { image.shown() } else { "an image that you may not read".to_owned() }
    }

    /// The same for any file at this path of the store.
    pub(super) fn called_at(&self, path: &Path) -> String {
        let Some(asker) = &self.asker else { return shown(path) };
        let may = self.whole.is_none() && asker.judge.may_read_in_store(&asker.subject, path);
        if may { shown(path) } else { "a file that you may not read".to_owned() }
    }

    /// The first reason why a plan cannot be carried out.
    pub(super) fn accept(&self, plan: &Plan) -> Result<()> {
        let refusals = plan.refusals.iter().cloned().chain(self.not_permitted(plan));
        refusals.into_iter().next().map_or(Ok(()), Err)
    }
}
