//! Possible uses: images that a file may use, although that is unknown.
//!
//! A file that could be an image, and cannot be read or whose names cannot be followed, counts as a user of
//! every image that it could use. Such images are shown and read as usual; they are not written, and no
//! command changes them, until the possible use is gone. Messages name the file, and the remedy.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::io::ObjectId;

use super::catalog::{ImageEntry, ImageIndex};
use super::file_names::shown;

/// A possible user of an image.
#[derive(Clone, Debug)]
pub struct PossibleUse {
    /// The file or directory, relative to the store.
    pub by: PathBuf,
    /// The identity of the file, if it was checked.
    pub(super) owner: Option<ObjectId>,
    /// Its owner: it counts for the files that this user may read.
    pub(super) uid: u32,
    /// The images that it may use.
    pub(super) reach: UseReach,
    /// What is wrong with it, and the remedy, to follow its name.
    pub why: Arc<str>,
}

/// The images that a file may use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum UseReach {
    /// That image.
    Image(ImageIndex),
    /// Every image whose file name is the last component of this path.
    Named(Vec<u8>),
    /// Every image whose file name occurs in this text.
    Mentioned(Vec<u8>),
    /// Any image.
    All,
}

/// The possible uses of a store, by image.
#[derive(Debug, Default)]
pub(super) struct PossibleUses {
    all: Vec<PossibleUse>,
    /// Uses of one image each.
    by_image: HashMap<ImageIndex, Vec<usize>>,
    /// Uses of any image.
    wide: Vec<usize>,
    /// By image: files that name it like this and whose owners may not read it. They are no possible users,
    /// but no command breaks them either.
    uncounted: Vec<(ImageIndex, ObjectId)>,
}

impl PossibleUses {
    /// Finds the images of each possible use among `images`. Uses of none are dropped.
    pub(super) fn new(
        claims: Vec<PossibleUse>,
        images: &[ImageEntry],
        counts: &dyn Fn(&PossibleUse, ImageIndex) -> bool,
    ) -> Self {
        let mut by_name: HashMap<&[u8], Vec<ImageIndex>> = HashMap::new();
        if claims.iter().any(|claim| matches!(claim.reach, UseReach::Named(_))) {
            for (index, image) in images.iter().enumerate() {
                by_name.entry(file_name(&image.place.path)).or_default().push(index);
            }
        }
        let mut found = Self::default();
        for claim in claims {
            let number = found.all.len();
            let is_other = |index: &ImageIndex| claim.owner != Some(images[*index].stat.id);
            let mentions = |text: &[u8], index: &ImageIndex| {
                let name = file_name(&images[*index].place.path);
                !name.is_empty() && text.windows(name.len()).any(|part| part == name)
            };
            let on: Vec<ImageIndex> = match &claim.reach {
                // Another user's counts for some images only.
                UseReach::All if claim.uid != 0 => (0..images.len()).collect(),
                UseReach::All => {
                    found.wide.push(number);
                    found.all.push(claim);
                    continue;
                }
                UseReach::Image(index) => vec![*index],
                UseReach::Named(path) => by_name.get(last_part(path)).cloned().unwrap_or_default(),
                UseReach::Mentioned(text) => {
                    (0..images.len()).filter(|index| mentions(text, index)).collect()
                }
            };
            let (on, others): (Vec<ImageIndex>, Vec<ImageIndex>) =
                on.into_iter().filter(is_other).partition(|index| counts(&claim, *index));
            // A file that may use every image has named none.
            if let Some(by) = claim.owner.filter(|_| claim.reach != UseReach::All) {
                found.uncounted.extend(others.into_iter().map(|index| (index, by)));
            }
            if !on.is_empty() {
                for index in on {
                    found.by_image.entry(index).or_default().push(number);
                }
                found.all.push(claim);
            }
        }
        found
    }

    /// All of them.
    pub(super) fn all(&self) -> &[PossibleUse] {
        &self.all
    }

    /// Images, and files that name them without counting.
    pub(super) fn uncounted(&self) -> &[(ImageIndex, ObjectId)] {
        &self.uncounted
    }

    /// The possible uses of an image.
    pub(super) fn on<'a>(
        &'a self,
        index: ImageIndex,
        image: &'a ImageEntry,
    ) -> impl Iterator<Item = &'a PossibleUse> {
        let own = self.by_image.get(&index).into_iter().flatten();
        let claims = own.chain(&self.wide).map(|number| &self.all[*number]);
        claims.filter(|claim| claim.owner != Some(image.stat.id))
    }
}

impl PossibleUse {
    /// The problem of the file that may use images.
    pub(super) fn problem(&self) -> String {
        let consequence = match &self.reach {
            UseReach::All => {
                "so every image of the store may be in use by it, and none is written or changed"
            }
            UseReach::Image(_) | UseReach::Named(_) | UseReach::Mentioned(_) => {
                "so the images that it names are neither written nor changed"
            }
        };
        let (fact, remedy) = self.why.split_once("; ").unwrap_or((&self.why, ""));
        format!("{fact}, {consequence}; {remedy}")
    }

    /// Why an image, which the sentence begins with, must not be changed.
    pub fn sentence(&self, image: &ImageEntry) -> String {
        format!("{} may be in use by {}, which {}", image.shown(), shown(&self.by), self.why)
    }
}

/// The remedy that always ends a possible use, for a file that uses no other image.
pub(super) fn standalone_remedy(path: &Path) -> String {
    format!("if it uses no other image, say so with -o standalone={}", pattern(path))
}

/// A pattern that matches only this path.
pub(super) fn pattern(path: &Path) -> String {
    let text = if path.as_os_str().is_empty() { ".".to_owned() } else { shown(path) };
    crate::error::shell_word(&glob::Pattern::escape(&text))
}

fn file_name(path: &Path) -> &[u8] {
    path.file_name().map_or(b"", OsStrExt::as_bytes)
}

/// The last component, also with the separator of other systems.
fn last_part(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| matches!(byte, b'/' | b'\\')).next().unwrap_or_default()
}
