//! Operations: what a command that was begun does to the files of a store, one struct each.
//!
//! Promises: the store queries an unfinished operation through [`Effects`] only; no other file of this layer
//! interprets an operation. The structs are the text of an intent's file: renaming or removing a field
//! changes the format.

use crate::io::Existing;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::encoded;
use super::evidence::{AllowedChange, FileRef};
use super::file_names::INVALIDATED_EXTENSION;

/// The operation of a command, by its verb.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase")]
pub enum Operation {
    /// New overlays take the names of active layers.
    Snapshot(SnapshotOperation),
    /// Layers are merged down.
    Commit(CommitOperation),
    /// Layers are merged up.
    Pull(PullOperation),
    /// A new image is filled, which has no name before it is whole.
    Copy(CopyOperation),
    /// A disk becomes smaller.
    Shrink(ShrinkOperation),
    /// Unknown. Only in memory.
    #[serde(skip)]
    Unknown,
}

/// New overlays take the names of active layers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotOperation {
    /// When the snapshot was taken: seconds since 1970.
    pub seconds: i64,
    /// Nanoseconds of that second.
    pub nanoseconds: u32,
    /// The user's description.
    pub description: String,
    /// Each disk that is frozen.
    pub disks: Vec<NewTop>,
}

/// One disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewTop {
    /// The active layer, by the name that it has.
    pub old: FileRef,
    /// The name that it gets; the one it has if that stays.
    #[serde(with = "encoded")]
    pub frozen: PathBuf,
    /// The overlay, by the name under which it was made.
    pub overlay: FileRef,
    /// The name that the overlay gets.
    #[serde(with = "encoded")]
    pub name: PathBuf,
    /// The backing file of the old layer, where that layer is going to be removed: for the trash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<FileRef>,
}

impl NewTop {
    /// What becomes of the old layer's name: the overlay takes it, or it is another's.
    pub(crate) fn existing(&self) -> Existing {
        if self.name == self.old.path { Existing::Replace } else { Existing::Refuse }
    }
}

/// Layers are merged down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitOperation {
    /// The upper end; its view stays what it is throughout.
    pub top: FileRef,
    /// The layer that is written.
    pub base: FileRef,
    /// The layers between the two, top first. They are invalidated once base has changed.
    pub between: Vec<FileRef>,
    /// The overlays of top, which are rebased onto base.
    pub children: Vec<FileRef>,
    /// Whether top's file stays.
    pub keep: bool,
    /// Whether base holds everything, durably: from then on the commit goes to its end. Not set where base
    /// gets another name, which says the same.
    #[serde(default)]
    pub is_copied: bool,
    /// For the active layer: the name that base gets.
    #[serde(default, with = "encoded::option", skip_serializing_if = "Option::is_none")]
    pub rename: Option<PathBuf>,
}

/// Layers are merged up.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullOperation {
    /// The layers that are filled.
    pub into: Vec<FileRef>,
    /// Their backing file afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<FileRef>,
    /// Layers that are removed afterwards unless they are used, top first.
    pub remove: Vec<FileRef>,
    /// The layers between; those that have no overlay left are frozen afterwards.
    pub between: Vec<FileRef>,
}

/// A new image is filled, which has no name before it is whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopyOperation {
    /// The image, by the name under which it was made.
    pub draft: FileRef,
    /// The name that it gets.
    #[serde(with = "encoded")]
    pub name: PathBuf,
}

/// A disk becomes shorter: the clusters past its end are freed once its header says so.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShrinkOperation {
    /// Its image.
    pub image: FileRef,
    /// The size that it gets, in bytes.
    pub size: u64,
}

/// Where the files of an operation are now.
pub(crate) trait FileLookup {
    /// Whether the file is there by any of its names.
    fn is_there(&self, file: &FileRef) -> bool;
    /// Whether it is there by this one, beneath the guarded directory.
    fn is_at(&self, file: &FileRef, name: &Path) -> bool;
}

/// A file of an operation.
pub(crate) struct ExpectedFile<'a> {
    /// The file.
    pub(super) file: &'a mut FileRef,
    /// The names it may go by, beneath the guarded directory.
    pub(super) names: Vec<PathBuf>,
    /// What the operation may have changed in it.
    pub(super) allowed: AllowedChange,
}

/// An image that an operation freezes or invalidates.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AffectedFile<'a> {
    pub(super) file: &'a FileRef,
    /// Whether the image that has its name counts as it where the file itself is not found: the operation may
    /// be writing it.
    pub(super) or_its_name: bool,
}

impl<'a> AffectedFile<'a> {
    fn itself(file: &'a FileRef) -> Self {
        Self { file, or_its_name: false }
    }

    fn or_its_name(file: &'a FileRef) -> Self {
        Self { file, or_its_name: true }
    }
}

/// What an operation does to the images of a store at the moment.
#[derive(Debug, Default)]
pub(crate) struct Affected<'a> {
    /// Images that may no longer show what they did.
    pub(super) invalidated: Vec<AffectedFile<'a>>,
    /// A view through this image, or one of the overlays below, shows nothing of the invalidated ones.
    pub(super) cover: Option<&'a FileRef>,
    /// The overlays of that image, or already of the finished base.
    pub(super) overlays: &'a [FileRef],
    /// Images that count as frozen, whether they bear the mark or not.
    pub(super) frozen: Vec<AffectedFile<'a>>,
    /// Files that show nothing any more, and are about to be removed: no chain begins there.
    pub(super) superseded: Vec<&'a FileRef>,
    /// Files that are removed at its end, and are leaves for a moment before: they take no chain its name.
    pub(super) passing: Vec<&'a FileRef>,
}

/// What the store has to know of an operation.
pub(crate) trait Effects {
    /// All files that it changes, renames or removes, or that these rest on.
    fn files(&self) -> Vec<&FileRef>;

    /// The same files and those that it only remembers, with the names they may go by. `is_free`: whether no
    /// file has that name.
    fn expected(&mut self, is_free: &dyn Fn(&Path) -> bool) -> Vec<ExpectedFile<'_>>;

    /// What it does to the images of the store, as its files are `now`.
    fn affected(&self, _now: &dyn FileLookup) -> Affected<'_> {
        Affected::default()
    }

    /// The file beside which its progress is shown.
    fn progress_at(&self) -> Option<&FileRef> {
        None
    }

    /// The disks whose names change hands: for a while a file has two.
    fn new_tops(&self) -> &[NewTop] {
        &[]
    }
}

const AS_IT_WAS: AllowedChange =
    AllowedChange { growth: false, backing: false, any_size: false, any_bytes: false, is_copy: false };
const GROWN: AllowedChange = AllowedChange { growth: true, ..AS_IT_WAS };
const REBASED: AllowedChange = AllowedChange { backing: true, ..GROWN };

fn expect(
    file: &mut FileRef,
    others: impl IntoIterator<Item = PathBuf>,
    allowed: AllowedChange,
) -> ExpectedFile<'_> {
    let names = std::iter::once(file.path.clone()).chain(others).collect();
    ExpectedFile { file, names, allowed }
}

fn expect_all(files: &mut [FileRef], allowed: AllowedChange) -> impl Iterator<Item = ExpectedFile<'_>> {
    files.iter_mut().map(move |file| expect(file, None, allowed))
}

impl Effects for SnapshotOperation {
    fn files(&self) -> Vec<&FileRef> {
        self.disks.iter().flat_map(|disk| [&disk.old, &disk.overlay]).collect()
    }

    fn expected(&mut self, _: &dyn Fn(&Path) -> bool) -> Vec<ExpectedFile<'_>> {
        let resized = AllowedChange { any_size: true, ..AS_IT_WAS };
        let mut all = Vec::new();
        for NewTop { old, frozen, overlay, name, backing } in &mut self.disks {
            all.push(expect(old, [frozen.clone()], resized));
            all.push(expect(overlay, [name.clone()], GROWN));
            all.extend(backing.iter_mut().map(|backing| expect(backing, None, REBASED)));
        }
        all
    }

    fn new_tops(&self) -> &[NewTop] {
        &self.disks
    }

    fn affected(&self, now: &dyn FileLookup) -> Affected<'_> {
        // Under its new name it is a snapshot, though the mark may be yet to come, and it may have no
        // overlay.
        let is_frozen = |top: &&NewTop| top.frozen != top.old.path && now.is_at(&top.old, &top.frozen);
        let frozen = self.disks.iter().filter(is_frozen).map(|top| AffectedFile::itself(&top.old));
        Affected { frozen: frozen.collect(), ..Affected::default() }
    }
}

impl Effects for CommitOperation {
    fn files(&self) -> Vec<&FileRef> {
        [&self.top, &self.base].into_iter().chain(&self.between).chain(&self.children).collect()
    }

    fn expected(&mut self, is_free: &dyn Fn(&Path) -> bool) -> Vec<ExpectedFile<'_>> {
        let Self { top, base, between, children, keep, rename, .. } = self;
        // From the moment when base has its new name, guests may write it.
        let is_active = rename
            .as_ref()
            .is_some_and(|name| is_free(if *name == base.path { &top.path } else { &base.path }));
        let written = AllowedChange { any_bytes: is_active, any_size: is_active, ..GROWN };
        let merged = AllowedChange { backing: *keep, growth: rename.is_some(), ..AS_IT_WAS };
        let mut all = vec![expect(top, None, merged), expect(base, rename.clone(), written)];
        for file in between {
            let invalidated = invalidated_name(&file.path);
            all.push(expect(file, [invalidated], AS_IT_WAS));
        }
        all.extend(expect_all(children, REBASED));
        all
    }

    fn progress_at(&self) -> Option<&FileRef> {
        Some(&self.base)
    }

    fn affected(&self, now: &dyn FileLookup) -> Affected<'_> {
        let Self { top, base, between, children, keep, rename, .. } = self;
        // With its new name, or as the only one of its stem, the base is the active layer, and valid; the
        // former active layer is backed by a name that has gone.
        let has_its_name = rename.as_ref().is_some_and(|name| now.is_at(base, name));
        let is_active = has_its_name && (rename.as_ref() != Some(&base.path) || !now.is_there(top));
        let former = is_active.then_some(AffectedFile::itself(top));
        let written = (!is_active).then_some(AffectedFile::or_its_name(base));
        let between_all = || between.iter().map(AffectedFile::or_its_name);
        let frozen_top = if rename.is_none() { Some(AffectedFile::itself(top)) } else { former };
        Affected {
            invalidated: written.into_iter().chain(between_all()).chain(former).collect(),
            cover: Some(top),
            overlays: children,
            frozen: between_all().chain(frozen_top).collect(),
            superseded: if is_active { std::iter::once(top).chain(between).collect() } else { Vec::new() },
            passing: between.iter().chain((!keep).then_some(top)).collect(),
        }
    }
}

impl Effects for PullOperation {
    fn files(&self) -> Vec<&FileRef> {
        self.into.iter().chain(&self.base).chain(&self.remove).chain(&self.between).collect()
    }

    fn expected(&mut self, _: &dyn Fn(&Path) -> bool) -> Vec<ExpectedFile<'_>> {
        let Self { into, base, remove, between } = self;
        let resized = AllowedChange { any_size: true, ..REBASED };
        let mut all: Vec<ExpectedFile<'_>> = expect_all(into, REBASED).collect();
        all.extend(base.iter_mut().map(|base| expect(base, None, resized)));
        all.extend(expect_all(remove, AS_IT_WAS).chain(expect_all(between, GROWN)));
        all
    }

    fn progress_at(&self) -> Option<&FileRef> {
        self.into.first()
    }

    fn affected(&self, _: &dyn FileLookup) -> Affected<'_> {
        // C5: left alone by a pull, it never becomes an active disk.
        Affected {
            frozen: self.between.iter().map(AffectedFile::itself).collect(),
            passing: self.remove.iter().collect(),
            ..Affected::default()
        }
    }
}

impl Effects for CopyOperation {
    fn files(&self) -> Vec<&FileRef> {
        vec![&self.draft]
    }

    fn expected(&mut self, _: &dyn Fn(&Path) -> bool) -> Vec<ExpectedFile<'_>> {
        vec![expect(&mut self.draft, None, GROWN)]
    }
}

impl Effects for ShrinkOperation {
    fn files(&self) -> Vec<&FileRef> {
        vec![&self.image]
    }

    fn expected(&mut self, _: &dyn Fn(&Path) -> bool) -> Vec<ExpectedFile<'_>> {
        vec![expect(&mut self.image, None, AllowedChange { any_size: true, ..AS_IT_WAS })]
    }

    fn progress_at(&self) -> Option<&FileRef> {
        Some(&self.image)
    }
}

impl Operation {
    fn effects(&self) -> Option<&dyn Effects> {
        match self {
            Self::Snapshot(operation) => Some(operation),
            Self::Commit(operation) => Some(operation),
            Self::Pull(operation) => Some(operation),
            Self::Copy(operation) => Some(operation),
            Self::Shrink(operation) => Some(operation),
            Self::Unknown => None,
        }
    }

    fn effects_mut(&mut self) -> Option<&mut dyn Effects> {
        match self {
            Self::Snapshot(operation) => Some(operation),
            Self::Commit(operation) => Some(operation),
            Self::Pull(operation) => Some(operation),
            Self::Copy(operation) => Some(operation),
            Self::Shrink(operation) => Some(operation),
            Self::Unknown => None,
        }
    }
}

impl Effects for Operation {
    fn files(&self) -> Vec<&FileRef> {
        self.effects().map(Effects::files).unwrap_or_default()
    }

    fn expected(&mut self, is_free: &dyn Fn(&Path) -> bool) -> Vec<ExpectedFile<'_>> {
        self.effects_mut().map(|effects| effects.expected(is_free)).unwrap_or_default()
    }

    fn affected(&self, now: &dyn FileLookup) -> Affected<'_> {
        self.effects().map(|effects| effects.affected(now)).unwrap_or_default()
    }

    fn progress_at(&self) -> Option<&FileRef> {
        self.effects()?.progress_at()
    }

    fn new_tops(&self) -> &[NewTop] {
        self.effects().map_or(&[], Effects::new_tops)
    }
}

macro_rules! into_operation {
    ($($name:ident($of:ty)),*) => {
        $(impl From<$of> for Operation {
            fn from(operation: $of) -> Self {
                Self::$name(operation)
            }
        })*
    };
}
into_operation!(
    Snapshot(SnapshotOperation),
    Commit(CommitOperation),
    Pull(PullOperation),
    Copy(CopyOperation),
    Shrink(ShrinkOperation)
);

/// The name that a layer gets which no longer shows what it did, and is kept.
pub fn invalidated_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".");
    name.push(INVALIDATED_EXTENSION);
    path.with_file_name(name)
}
