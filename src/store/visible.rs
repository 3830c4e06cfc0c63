//! The catalog that one user may see: without the files that this user may not read.
//!
//! Reports are made from it, so that none of them can disclose more. Promises: a hidden image appears in no
//! text, neither its name, its size nor its content; its overlay is reported with an unreadable backing file,
//! by the name in the overlay's own header.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::build::next_serial;
use super::catalog::{BackingLink, Catalog, CatalogDirectory, ImageEntry, ImageIndex, count_chains};
use super::file_names::shown;
use super::judge::AccessJudge;
use super::resolve::{BrokenLink, StorePath};
use super::rights::Subject;
use super::scan::Problem;

impl Catalog {
    /// The part of the catalog that `who` may see.
    #[must_use]
    pub fn shown_to(&self, judge: &AccessJudge, who: &Subject) -> Catalog {
        let kept: Vec<ImageIndex> =
            (0..self.images.len()).filter(|index| judge.may_read(who, &self.images[*index])).collect();
        let places: HashMap<ImageIndex, ImageIndex> =
            kept.iter().enumerate().map(|(new, old)| (*old, new)).collect();
        let images = kept.iter().map(|index| self.image_shown(*index, &places)).collect();
        let mut visible = Catalog::empty(next_serial());
        visible.images = images;
        visible.single = self.single.and_then(|leaf| places.get(&leaf).copied());
        visible.problems = self.problems_shown(judge, who, &places);
        visible.intents.clone_from(&self.intents);
        visible.directories.insert(PathBuf::new(), CatalogDirectory::default());
        for (path, leaf) in self.chains() {
            let Some(leaf) = places.get(&leaf) else { continue };
            visible.images[*leaf].chain_count = 1;
            visible.add_chain(&path, *leaf);
        }
        for (path, content) in &self.directories {
            let Some(shown) = visible.directories.get_mut(path) else { continue };
            let links = content.former.iter().filter(|(_, target)| shown.chains.contains_key(*target));
            let links: Vec<_> = links.map(|(name, target)| (name.clone(), target.clone())).collect();
            shown.former.extend(links);
        }
        count_chains(&mut visible);
        self.copy_invalidated(&mut visible, &places);
        visible
    }

    fn image_shown(&self, index: ImageIndex, places: &HashMap<ImageIndex, ImageIndex>) -> ImageEntry {
        let mut image = self.images[index].clone();
        image.users = image.users.iter().filter_map(|user| places.get(user).copied()).collect();
        image.chain_count = 0;
        let below = image.below.image().map(|below| places.get(&below).copied());
        match (below, &mut image.below) {
            (None, _) => {}
            (Some(None), _) => image.below = hidden(&image),
            (
                Some(Some(place)),
                BackingLink::Image(below) | BackingLink::Broken { image: Some(below), .. },
            ) => {
                *below = place;
            }
            (Some(Some(_)), _) => unreachable!("it is one of the two that have an image"),
        }
        image
    }

    /// The problems of files that the user may read, or of missing files in a directory that the user may
    /// list.
    fn problems_shown(
        &self,
        judge: &AccessJudge,
        who: &Subject,
        places: &HashMap<ImageIndex, ImageIndex>,
    ) -> Vec<Problem> {
        let hidden: Vec<String> = (0..self.images.len())
            .filter(|index| !places.contains_key(index))
            .map(|index| self.images[index].shown())
            .collect();
        let by_path: HashMap<&Path, ImageIndex> = self
            .images
            .iter()
            .enumerate()
            .map(|(index, image)| (image.place.path.as_path(), index))
            .collect();
        let is_shown = |problem: &&Problem| {
            let place = StorePath { root: 0, path: problem.path.clone() };
            let may = match by_path.get(problem.path.as_path()) {
                Some(index) => places.contains_key(index),
                None => judge.may_read_place(who, &place) && judge.may_reach(who, &place),
            };
            may && !hidden.iter().any(|name| problem.sentence.contains(name.as_str()))
        };
        self.problems.iter().filter(is_shown).cloned().collect()
    }

    fn add_chain(&mut self, path: &Path, leaf: ImageIndex) {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return };
        self.directories.entry(parent.to_path_buf()).or_default().chains.insert(name.to_os_string(), leaf);
        let mut below = parent;
        while let (Some(parent), Some(name)) = (below.parent(), below.file_name()) {
            self.directories.entry(parent.to_path_buf()).or_default().directories.insert(name.to_os_string());
            below = parent;
        }
    }
}

/// The backing link of an image whose backing file is hidden.
fn hidden(image: &ImageEntry) -> BackingLink {
    let name = image
        .qcow2()
        .and_then(|qcow2| qcow2.header.backing.as_ref())
        .map_or(&b""[..], |backing| &backing.name);
    let name = shown(Path::new(super::catalog::os(name)));
    let fact = "may not be read by you; ask its owner, or root";
    BackingLink::Broken {
        image: None,
        reason: BrokenLink::NotFollowed,
        sentence: format!("cannot be read: its backing file \"{name}\" {fact}").into(),
    }
}
