//! Claims: images that somebody may stand on of whom that cannot be told for sure.
//!
//! An image, or whatever could be one, that cannot be read or whose names cannot be followed still counts as
//! a user of everything that it could stand on. Such images are shown and read as ever; they are not written,
//! and no command changes them, until the claim is gone. Who makes a claim is named, and what ends it.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::io::ObjectId;

use super::catalog::{ImageEntry, ImageIndex, shown};

/// Who may stand on an image.
#[derive(Clone, Debug)]
pub struct PossibleUse {
    /// The file or directory, beneath the store.
    pub by: PathBuf,
    /// Which file that is, where it is one that has been looked at.
    pub(super) owner: Option<ObjectId>,
    /// Whose it is: it counts for what that user may read.
    pub(super) uid: u32,
    /// What it may stand on.
    pub(super) reach: UseReach,
    /// What is wrong with it, and what helps, to follow its name.
    pub why: Arc<str>,
}

/// What somebody may stand on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum UseReach {
    /// That image.
    Image(ImageIndex),
    /// Every image whose file has the last part of this path as its name.
    Named(Vec<u8>),
    /// Every image whose file name occurs in this text.
    Mentioned(Vec<u8>),
    /// Any image.
    All,
}

/// The claims of a store, by the images that they are on.
#[derive(Debug, Default)]
pub(super) struct PossibleUses {
    all: Vec<PossibleUse>,
    /// Claims on one image each.
    by_image: HashMap<ImageIndex, Vec<usize>>,
    /// Claims on any image.
    wide: Vec<usize>,
    /// By image: files that name it in such a way and whose owners may not read it. They make no claim, but
    /// nothing is taken from them either.
    uncounted: Vec<(ImageIndex, ObjectId)>,
}

impl PossibleUses {
    /// Finds out on which of `images` each claim is. Those that are on none fall away.
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
                // Another user's counts for some only.
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
            // Who reaches everything has named nothing.
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

    /// Images, and files that name them without its counting.
    pub(super) fn uncounted(&self) -> &[(ImageIndex, ObjectId)] {
        &self.uncounted
    }

    /// Those on an image.
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
    /// As a problem of whoever makes it.
    pub(super) fn problem(&self) -> String {
        let consequence = match &self.reach {
            UseReach::All => {
                "so that every image of the store may be what it stands on, and none is written or changed"
            }
            UseReach::Image(_) | UseReach::Named(_) | UseReach::Mentioned(_) => {
                "so that what it names is neither written nor changed"
            }
        };
        let (fact, remedy) = self.why.split_once("; ").unwrap_or((&self.why, ""));
        format!("{fact}, {consequence}; {remedy}")
    }

    /// Why an image, which the sentence begins with, is left alone.
    pub fn sentence(&self, image: &ImageEntry) -> String {
        format!("{} may be what {} stands on, which {}", image.shown(), shown(&self.by), self.why)
    }
}

/// What ends a claim for sure, for a file that stands on nothing.
pub(super) fn standalone_remedy(path: &Path) -> String {
    format!("if it stands on nothing, say so with -o standalone={}", pattern(path))
}

/// A pattern that matches the path and nothing else.
pub(super) fn pattern(path: &Path) -> String {
    let text = if path.as_os_str().is_empty() { ".".to_owned() } else { shown(path) };
    super::catalog::shell_word(&glob::Pattern::escape(&text))
}

fn file_name(path: &Path) -> &[u8] {
    path.file_name().map_or(b"", OsStrExt::as_bytes)
}

/// What stands behind the last separator, also of a system that writes them the other way.
fn last_part(path: &[u8]) -> &[u8] {
    path.rsplit(|byte| matches!(byte, b'/' | b'\\')).next().unwrap_or_default()
}
