//! The catalog: every image of the store, its backing file, and the resulting chains.
//!
//! Immutable once built; a rescan builds a new one. Built from the files' own headers and the user's options,
//! never from content that a guest may have written: a format is decided by the user, by a name ending in
//! `.raw`, by the header of an overlay of the file, and by qcow2's magic only for files that no header names.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::chain::MAX_DEPTH;
use crate::error::{printable, shell_word};
use crate::format::Frozen;
use crate::image::unreadable;
use crate::io::{ObjectId, ObjectStat};
use crate::units::round_up_to_sector;

use super::describe::{DetectedContent, Qcow2Description};
use super::domains::{DomainSnapshot, ManagedFile, ManagedFiles};
use super::evidence::FileRef;
use super::file_names::{has_kind, shown};
use super::intent::Intent;
use super::intents::{FoundIntent, UNTRUSTED};
use super::names::{self, README, STORE_DIRECTORY};
use super::operation::{AffectedFile, Effects, FileLookup, Operation};
use super::options::{Format, StoreOptions};
use super::owners::Owners;
use super::possible_uses::{PossibleUse, PossibleUses, UseReach};
use super::resolve::{BrokenLink, StorePath, UnresolvedName};
use super::scan::Problem;

/// Index of an image in its catalog.
pub type ImageIndex = usize;

/// One image file.
#[derive(Clone, Debug)]
pub struct ImageEntry {
    /// Its path.
    pub place: StorePath,
    /// Its attributes as of the scan.
    pub stat: ObjectStat,
    /// Changes whenever the file's content may have changed.
    pub version: u64,
    /// Its detected content.
    pub content: DetectedContent,
    /// Its format; `None` if that is undecided or it cannot be read.
    pub format: Option<Format>,
    /// Why it cannot be read.
    pub problem: Option<Arc<str>>,
    /// Its backing file.
    pub below: BackingLink,
    /// Its overlays.
    pub users: Vec<ImageIndex>,
    /// The external data file with its guest data.
    pub data_file: Option<(StorePath, ObjectStat)>,
    /// When it was frozen by chainfs, if it was.
    pub frozen: Option<Frozen>,
    /// Whether a user option or its mode makes it read-only.
    pub readonly: bool,
    /// Its other name, from which alone its backing file is found: a new overlay has to name it like that.
    pub found_by: Option<StorePath>,
    /// What libvirt's definitions say of it.
    pub managed: Option<Arc<ManagedFile>>,
    /// Whether an unfinished command merges it into another image: meanwhile nothing may be backed by it.
    pub(super) is_merged: bool,
    /// The number of chains that contain it.
    pub chain_count: usize,
}

/// The backing file of an image.
#[derive(Clone, Debug)]
pub enum BackingLink {
    /// None: it is a base.
    Nothing,
    /// That image.
    Image(ImageIndex),
    /// A file that is missing or may not be used.
    Broken {
        /// The kind of failure.
        reason: BrokenLink,
        /// The intended image, if there is one: it is readable by itself.
        image: Option<ImageIndex>,
        /// Why, to follow the overlay's name.
        sentence: Arc<str>,
    },
}

impl BackingLink {
    /// The image that it is or was intended to be, if there is one.
    pub fn image(&self) -> Option<ImageIndex> {
        match self {
            BackingLink::Image(below) | BackingLink::Broken { image: Some(below), .. } => Some(*below),
            BackingLink::Nothing | BackingLink::Broken { image: None, .. } => None,
        }
    }

    /// What is wrong with it, to follow the overlay's name.
    fn sentence(&self) -> Option<&Arc<str>> {
        match self {
            BackingLink::Broken { sentence, .. } => Some(sentence),
            BackingLink::Nothing | BackingLink::Image(_) => None,
        }
    }
}

/// The content of one directory of the mount.
#[derive(Clone, Debug, Default)]
pub struct CatalogDirectory {
    /// Sub-directories.
    pub directories: BTreeSet<OsString>,
    /// Chains, by name.
    pub chains: BTreeMap<OsString, ImageIndex>,
    /// Names that chains had before, and the present ones.
    pub former: BTreeMap<OsString, OsString>,
}

/// The whole store, as of one scan.
#[derive(Debug, Default)]
pub struct Catalog {
    /// Different for every catalog of a process.
    pub serial: u64,
    /// All images.
    pub images: Vec<ImageEntry>,
    /// Directories of the mount, by path; the root's path is empty.
    pub directories: BTreeMap<PathBuf, CatalogDirectory>,
    /// Files that could not be shown, with reasons.
    pub problems: Vec<Problem>,
    /// For a store that is one image, its chain.
    pub single: Option<ImageIndex>,
    /// The unfinished commands of the store.
    pub intents: Vec<FoundIntent>,
    /// Possible users of images.
    claims: PossibleUses,
    /// Intents that cannot be parsed: the files that they name are unknown.
    pub senseless: Vec<PathBuf>,
    /// Stands for those: it hides everything.
    unknown: Option<FoundIntent>,
    /// Drafts of images: of a running command, or of one that was interrupted before its intent was written.
    pub(super) drafts: Vec<PathBuf>,
    /// For images, those that name them and whose owners may not read them: they are no users, but no command
    /// breaks them either.
    uncounted: HashMap<ImageIndex, Vec<ImageIndex>>,
    /// Images whose own bytes an intent invalidates, and the images above which they are not visible.
    pub(super) invalidated: HashMap<ImageIndex, Vec<Invalidation>>,
}

/// Whether the file at a place, of that identity, is the named one.
pub(super) type IsFile<'a> = dyn Fn(&StorePath, ObjectId, &FileRef) -> bool + 'a;

/// The effect of an intent on an image.
#[derive(Debug)]
pub(super) struct Invalidation {
    /// Index of the intent.
    intent: usize,
    /// Above this image nothing of it is visible.
    top: Option<ImageIndex>,
    /// Nor above these, which are backed by top or, already, by the finished base.
    children: Vec<ImageIndex>,
}

/// The images of a catalog, for queries of operations.
struct ListedImages<'a> {
    images: &'a [ImageEntry],
    by_id: HashMap<ObjectId, ImageIndex>,
    /// The path from the guarded directory to the store's own.
    prefix: &'a Path,
    is_it: &'a IsFile<'a>,
}

impl<'a> ListedImages<'a> {
    fn new(images: &'a [ImageEntry], prefix: &'a Path, is_it: &'a IsFile<'a>) -> Self {
        let by_id = images.iter().enumerate().map(|(index, image)| (image.stat.id, index)).collect();
        Self { images, by_id, prefix, is_it }
    }

    fn find(&self, file: &FileRef) -> Option<ImageIndex> {
        let index = *self.by_id.get(&file.file.id())?;
        let image = &self.images[index];
        (self.is_it)(&image.place, image.stat.id, file).then_some(index)
    }

    /// The image that has this path relative to the guarded directory.
    fn named(&self, path: &Path) -> Option<ImageIndex> {
        let has_path =
            |image: &ImageEntry| image.place.root == 0 && *self.prefix.join(&image.place.path) == *path;
        self.images.iter().position(has_path)
    }
}

impl FileLookup for ListedImages<'_> {
    fn is_there(&self, file: &FileRef) -> bool {
        self.find(file).is_some()
    }

    fn is_at(&self, file: &FileRef, name: &Path) -> bool {
        self.find(file).is_some_and(|index| *name == *self.prefix.join(&self.images[index].place.path))
    }
}

impl ImageEntry {
    /// The path by which a header is to name it.
    pub fn named_place(&self) -> &StorePath {
        self.found_by.as_ref().unwrap_or(&self.place)
    }

    /// The qcow2 description, if it could be parsed.
    pub fn qcow2(&self) -> Option<&Arc<Qcow2Description>> {
        match (&self.content, self.format) {
            (DetectedContent::Qcow2(qcow2), Some(Format::Qcow2)) => Some(qcow2),
            _ => None,
        }
    }

    /// Size of its disk, if known.
    pub fn virtual_size(&self) -> Option<u64> {
        match self.format? {
            Format::Raw => Some(round_up_to_sector(self.stat.size)),
            Format::Qcow2 => self.qcow2().map(|qcow2| qcow2.header.virtual_size),
        }
    }

    /// Whether it stays read-only even without an overlay.
    pub fn is_frozen(&self) -> bool {
        self.frozen.is_some() || self.readonly || self.is_merged || self.is_kept_by_domain()
    }

    /// Whether a domain needs it as it is, or left it behind: then nobody writes it.
    fn is_kept_by_domain(&self) -> bool {
        self.managed.as_ref().is_some_and(|file| {
            file.left_behind_by.is_some() || file.domains.is_empty() && !file.states.is_empty()
        })
    }

    /// The snapshots of domains whose state it holds.
    pub fn domain_snapshots(&self) -> impl Iterator<Item = &DomainSnapshot> {
        self.managed.iter().flat_map(|managed| &managed.states)
    }

    /// The domain that left it behind: it uses another file as this disk. Stays read-only, and can be deleted.
    pub fn left_behind_by(&self) -> Option<&str> {
        self.managed.as_ref().and_then(|managed| managed.left_behind_by.as_deref())
    }

    /// The domains whose disk it is.
    pub fn domains(&self) -> impl Iterator<Item = &str> {
        self.managed.iter().flat_map(|managed| &managed.domains).map(String::as_str)
    }

    /// The path beneath its root, safe to print.
    pub fn shown(&self) -> String {
        shown(&self.place.path)
    }
}

/// That a domain left a leaf behind, to follow its name.
fn left_behind(domain: &str) -> String {
    let domain = printable(domain);
    let fact = "has another file as this disk, and no definition of libvirt mentions this one";
    let remedy =
        "it stays read-only; remove it with chainfs delete, or give it a name of its own with -o name=";
    format!("was left behind: the domain {domain} {fact}; {remedy}")
}

const MARKED_CORRUPT: &str = "is marked as corrupt, so it is read-only; run chainfs check --repair all";

impl Catalog {
    /// A catalog without images.
    pub(super) fn empty(serial: u64) -> Self {
        Self { serial, ..Self::default() }
    }

    /// The layers of the chain of this leaf, top first. Ends at the base, or at a broken link.
    pub fn layers(&self, leaf: ImageIndex) -> Vec<ImageIndex> {
        let mut layers = vec![leaf];
        let mut at = leaf;
        // Links that would close a loop have been cut when the catalog was built.
        while let Some(next) = self.images[at].below.image() {
            assert!(layers.len() <= self.images.len(), "a loop was not cut");
            layers.push(next);
            at = next;
        }
        layers
    }

    /// The problems of an image and of its backing link, as whole sentences.
    pub fn sentences(&self, index: ImageIndex) -> Vec<String> {
        let image = &self.images[index];
        let within = image.qcow2().into_iter();
        let within = within.flat_map(|qcow2| qcow2.snapshot_problem.iter().chain(&qcow2.refcount_problem));
        let own = image
            .problem
            .iter()
            .chain(image.below.sentence())
            .map(|sentence| format!("{} {sentence}", image.shown()));
        let left = image.left_behind_by().map(|domain| format!("{} {}", image.shown(), left_behind(domain)));
        let is_corrupt = image.qcow2().is_some_and(|qcow2| qcow2.header.corrupt());
        let corrupt = is_corrupt.then_some(MARKED_CORRUPT);
        let within = within.map(String::as_str).chain(corrupt);
        own.chain(within.map(|sentence| format!("{} {sentence}", image.shown()))).chain(left).collect()
    }

    /// Why a view cannot be read; unlike [`Catalog::sentences`] without problems that concern only others.
    pub fn view_problem(&self, layers: &[ImageIndex]) -> Option<String> {
        layers.iter().find_map(|index| {
            let image = &self.images[*index];
            image
                .problem
                .as_ref()
                .or(image.below.sentence())
                .map(|sentence| format!("{} {sentence}", image.shown()))
        })
    }

    /// The possible users of an image.
    pub fn claims_on(&self, index: ImageIndex) -> impl Iterator<Item = &PossibleUse> {
        self.claims.on(index, &self.images[index])
    }

    /// Adds the possible users; a file whose names cannot be read is a problem.
    pub(super) fn note_claims(&mut self, claims: Vec<PossibleUse>, owners: &Owners<'_>) {
        // Files whose names cannot be followed have their problem already.
        let known: BTreeSet<PathBuf> = self.problems.iter().map(|problem| problem.path.clone()).collect();
        let counts = |claim: &PossibleUse, index: ImageIndex| {
            let from = StorePath { root: 0, path: claim.by.clone() };
            owners.refuse(claim.uid, &from, &self.images[index].place).is_none()
        };
        self.claims = PossibleUses::new(claims, &self.images, &counts);
        for (target, by) in self.claims.uncounted() {
            let Some(user) = self.images.iter().position(|image| image.stat.id == *by) else { continue };
            self.uncounted.entry(*target).or_default().push(user);
        }
        let is_news = |claim: &&PossibleUse| claim.reach == UseReach::All || !known.contains(&claim.by);
        let problem = |claim: &PossibleUse| Problem { path: claim.by.clone(), sentence: claim.problem() };
        let problems: Vec<Problem> = self.claims.all().iter().filter(is_news).map(problem).collect();
        self.problems.extend(problems);
        self.problems.sort();
        self.problems.dedup();
    }

    /// Links that were cut to end loops: they count all the same. `targets`: the backing files that images
    /// name.
    pub(super) fn cut_links(&self, targets: &[Option<ImageIndex>]) -> Vec<PossibleUse> {
        let cut = |(index, target): (ImageIndex, &Option<ImageIndex>)| {
            let image = &self.images[index];
            let (None, Some(target), Some(sentence)) = (image.below.image(), target, image.below.sentence())
            else {
                return None;
            };
            let (by, owner, uid) = (image.place.path.clone(), Some(image.stat.id), image.stat.uid);
            Some(PossibleUse { by, owner, uid, reach: UseReach::Image(*target), why: Arc::clone(sentence) })
        };
        targets.iter().enumerate().filter_map(cut).collect()
    }

    /// Adds the intents; `prefix` leads from the guarded directory to the store's own, and `is_it` checks
    /// whether a file is the named one.
    pub(super) fn note_intents(&mut self, intents: Vec<FoundIntent>, prefix: &Path, is_it: &IsFile<'_>) {
        let now = ListedImages::new(&self.images, prefix, is_it);
        let index_of = |affected: &AffectedFile<'_>| {
            let found = now.find(affected.file);
            if affected.or_its_name { found.or_else(|| now.named(&affected.file.path)) } else { found }
        };
        let mut merged: Vec<ImageIndex> = Vec::new();
        for (number, found) in intents.iter().enumerate() {
            let affected = found.intent.operation.affected(&now);
            merged.extend(affected.frozen.iter().filter_map(index_of));
            for index in affected.invalidated.iter().filter_map(index_of) {
                let top = affected.cover.and_then(|cover| now.find(cover));
                let children = affected.overlays.iter().filter_map(|overlay| now.find(overlay)).collect();
                self.invalidated.entry(index).or_default().push(Invalidation {
                    intent: number,
                    top,
                    children,
                });
            }
        }
        for index in merged {
            self.images[index].is_merged = true;
        }
        self.intents = intents;
    }

    /// Hides everything, and refuses all writes, while there are intents whose effects are unknown.
    pub(super) fn hide_all(&mut self, senseless: &[(PathBuf, String)]) {
        // An intent that another user has put there is not one of the store.
        let is_ours = |(_, reason): &&(PathBuf, String)| !reason.starts_with(UNTRUSTED);
        let Some((path, reason)) = senseless.iter().find(is_ours) else { return };
        let command = format!("{}, which cannot be parsed ({reason}); see chainfs recover", shown(path));
        let name = path.file_name().unwrap_or_default().to_owned();
        // J4: its effects are unknown, so everything is hidden.
        let intent = Intent::new(&command, Path::new(""), Operation::Unknown);
        self.unknown = Some(FoundIntent { name, intent, is_copied: false, is_trusted: false });
        self.images.iter_mut().for_each(|image| image.is_merged = true);
    }

    /// The intent that hides a view (its layers, top first; `inner`: an internal snapshot of the first), if
    /// one does: it is changing visible bytes.
    pub fn hidden_by(&self, layers: &[ImageIndex], inner: bool) -> Option<&FoundIntent> {
        if self.unknown.is_some() {
            return self.unknown.as_ref();
        }
        if self.invalidated.is_empty() {
            return None;
        }
        layers.iter().enumerate().find_map(|(depth, index)| {
            let shows = |invalidated: &&Invalidation| {
                let is_cover = |(above, cover): (usize, &ImageIndex)| {
                    // The tables of an internal snapshot do not cover the written ranges.
                    invalidated.top == Some(*cover) && !(inner && above == 0)
                        || invalidated.children.contains(cover)
                };
                !layers[..depth].iter().enumerate().any(is_cover)
            };
            let invalidated = self.invalidated.get(index)?.iter().find(shows)?;
            Some(&self.intents[invalidated.intent])
        })
    }

    /// Hides in `visible` the images that are hidden here; `places`: their indices there.
    pub(super) fn copy_invalidated(&self, visible: &mut Catalog, places: &HashMap<ImageIndex, ImageIndex>) {
        let place = |index: &ImageIndex| places.get(index).copied();
        for (index, invalidated) in &self.invalidated {
            let Some(index) = place(index) else { continue };
            let moved = invalidated.iter().map(|Invalidation { intent, top, children }| Invalidation {
                intent: *intent,
                top: top.as_ref().and_then(place),
                children: children.iter().filter_map(place).collect(),
            });
            visible.invalidated.insert(index, moved.collect());
        }
    }

    /// As [`Catalog::hidden_by`], for a view that was opened from an earlier catalog.
    pub(super) fn files_hidden_by(&self, files: &[ObjectId], inner: bool) -> Option<&FoundIntent> {
        if self.invalidated.is_empty() && self.unknown.is_none() {
            return None;
        }
        let find = |id: &ObjectId| self.images.iter().position(|image| image.stat.id == *id);
        let layers: Vec<ImageIndex> = files.iter().map_while(find).collect();
        self.hidden_by(&layers, inner)
    }

    /// Records the names that do not count.
    pub(super) fn note_uncounted(&mut self, uncounted: &[(ImageIndex, ImageIndex)]) {
        for (user, target) in uncounted {
            self.uncounted.entry(*target).or_default().push(*user);
        }
    }

    /// The images that name this one and do not count as its users: no command removes the name that they
    /// use.
    pub fn uncounted_users(&self, index: ImageIndex) -> &[ImageIndex] {
        self.uncounted.get(&index).map_or(&[], Vec::as_slice)
    }

    /// Whether the leaf's disk is the active one of its chain: not if it is frozen.
    pub fn is_active(&self, leaf: ImageIndex) -> bool {
        !self.images[leaf].is_frozen()
    }

    /// All chains: path in the mount and leaf.
    pub fn chains(&self) -> impl Iterator<Item = (PathBuf, ImageIndex)> + '_ {
        let single = self.single.map(|leaf| (PathBuf::new(), leaf));
        let named = self.directories.iter().flat_map(|(directory, content)| {
            content.chains.iter().map(|(name, leaf)| (directory.join(name), *leaf))
        });
        single.into_iter().chain(named.filter(|_| self.single.is_none()))
    }

    /// The path in the mount of the chain of that leaf. `None` if it is no leaf.
    pub fn chain_path(&self, leaf: ImageIndex) -> Option<PathBuf> {
        if self.single.is_some() {
            return (self.single == Some(leaf)).then(PathBuf::new);
        }
        let place = &self.images[leaf].place.path;
        let chains = &self.directories.get(place.parent()?)?.chains;
        let usual = names::chain_forms(place, None).into_iter().map(OsString::from_vec);
        let usual = usual.into_iter().find(|name| chains.get(name) == Some(&leaf));
        // The user may have named it.
        let stated = || chains.iter().find(|(_, of)| **of == leaf).map(|(name, _)| name.clone());
        usual.or_else(stated).map(|name| place.with_file_name(name))
    }

    /// The chain at that path of the mount.
    pub fn chain(&self, path: &Path) -> Option<ImageIndex> {
        if self.single.is_some() {
            return self.single.filter(|_| path.as_os_str().is_empty());
        }
        self.directories.get(path.parent()?)?.chains.get(path.file_name()?).copied()
    }
}

/// An image as far as it is known before the links are set.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub(super) struct UnlinkedImage {
    pub(super) entry: ImageEntry,
    /// The location and format of its backing file, by its header.
    pub(super) backing: Option<FileReference>,
    /// Whether a header names it as its external data file.
    pub(super) is_data_file: bool,
    /// Whether the user has stated its format.
    pub(super) is_stated: bool,
    /// Whether it was found by the scan, not only by its name in a header.
    pub(super) is_scanned: bool,
    /// Whether it cannot be read, but its backing file is known.
    pub(super) is_unreadable: bool,
    /// Whether an unfinished command removes it at its end.
    pub(super) is_passing: bool,
}

/// A file that a header names.
pub(super) struct FileReference {
    /// The file, or why there is none.
    pub(super) target: Result<ImageIndex, UnresolvedName>,
    /// Where there is none, the images that may be intended.
    pub(super) meant: Vec<UseReach>,
    /// The format that the header states.
    pub(super) format: Option<String>,
    /// The name in the header, safe to print.
    pub(super) name: String,
    /// The name's bytes.
    pub(super) raw_name: Vec<u8>,
    /// The path that it leads to.
    pub(super) via: Option<StorePath>,
}

impl UnlinkedImage {
    /// The backing file that it names.
    pub(super) fn target(&self) -> Option<ImageIndex> {
        self.backing.as_ref().and_then(|reference| reference.target.as_ref().ok()).copied()
    }
}

/// Sets the links, cuts loops, finds leaves and names them.
pub(super) fn link(
    drafts: Vec<UnlinkedImage>,
    problems: Vec<Problem>,
    single: bool,
    (options, managed): (&StoreOptions, &ManagedFiles),
    serial: u64,
) -> Catalog {
    let is_image: Vec<bool> = drafts
        .iter()
        .map(|d| !d.is_data_file && (d.entry.format.is_some() || d.entry.problem.is_some()))
        .collect();
    let is_scanned: Vec<bool> = drafts.iter().map(|d| d.is_scanned).collect();
    let is_passing: Vec<bool> = drafts.iter().map(|d| d.is_passing).collect();
    let belows: Vec<BackingLink> = drafts.iter().map(|draft| below(draft, &drafts, options.probe)).collect();
    let mut images: Vec<ImageEntry> = drafts.into_iter().map(|draft| draft.entry).collect();
    for (image, below) in images.iter_mut().zip(belows) {
        image.below = below;
    }
    cut_loops(&mut images, single.then_some(0));
    for index in 0..images.len() {
        if let Some(next) = images[index].below.image() {
            images[next].users.push(index);
        }
    }
    cut_depth(&mut images);
    // A file that only a header names, and that backs no image in the end, is no chain of this store.
    let is_leaf = |index: usize| is_image[index] && is_scanned[index] && images[index].users.is_empty();
    let leaves: Vec<ImageIndex> =
        if single { vec![0] } else { (0..images.len()).filter(|index| is_leaf(*index)).collect() };
    for leaf in &leaves {
        images[*leaf].chain_count = 1;
    }
    note_managed(&mut images, &leaves, options, managed, single);
    let mut catalog = Catalog { serial, images, single: single.then_some(0), problems, ..Catalog::default() };
    count_chains(&mut catalog);
    catalog.directories = name_chains(&catalog, if single { &[] } else { &leaves }, &is_passing, options);
    for (index, is_image) in is_image.iter().enumerate() {
        if *is_image && (is_scanned[index] || !catalog.images[index].users.is_empty()) {
            let path = catalog.images[index].place.path.clone();
            let prefix = catalog.images[index].shown().len() + 1;
            let found = catalog.sentences(index).into_iter();
            catalog
                .problems
                .extend(found.map(|s| Problem { path: path.clone(), sentence: s[prefix..].to_string() }));
        }
    }
    catalog.problems.sort();
    catalog.problems.dedup();
    catalog
}

/// The backing file of an image, and whether it may be used.
fn below(draft: &UnlinkedImage, drafts: &[UnlinkedImage], probe: bool) -> BackingLink {
    let Some(FileReference { target, format, name, .. }) = &draft.backing else {
        return BackingLink::Nothing;
    };
    let broken =
        |image, reason, sentence: String| BackingLink::Broken { image, reason, sentence: sentence.into() };
    let target = match target {
        Ok(target) => *target,
        // Images that may be intended have possible users.
        Err(UnresolvedName { reason, sentence }) => {
            return broken(None, *reason, format!("cannot be read: its backing file \"{name}\" {sentence}"));
        }
    };
    if draft.is_unreadable {
        return BackingLink::Image(target);
    }
    let lower = &drafts[target].entry;
    let Some(format) = format else {
        // The user has stated the format, or wants it probed.
        if probe || drafts[target].is_stated {
            return BackingLink::Image(target);
        }
        let guess = if matches!(lower.content, DetectedContent::Qcow2(_)) { "qcow2" } else { "raw" };
        return broken(
            Some(target),
            BrokenLink::Format,
            format!(
                "cannot be read: its header does not say the format of its backing file \"{name}\", which is \
                    never \
                 guessed; if it is {guess}: qemu-img rebase -u -b {} -F {guess} {}, or mount with -o format=",
                shell_word(name),
                shell_word(&draft.entry.shown())
            ),
        );
    };
    match Format::from_name(format) {
        None => broken(
            Some(target),
            BrokenLink::Format,
            format!(
                "cannot be read: the format of its backing file \"{name}\" is \"{}\", and chainfs reads raw \
                    and qcow2",
                format.escape_debug()
            ),
        ),
        Some(format) if lower.format.is_some_and(|found| found != format) => broken(
            Some(target),
            BrokenLink::Format,
            format!(
                "cannot be read: its header says that its backing file \"{name}\" is {}, but it is taken for \
                    {}; \
                 mend the header with qemu-img rebase -u, or mount with -o format=",
                format.name(),
                lower.format.map_or("neither", Format::name)
            ),
        ),
        Some(_) => BackingLink::Image(target),
    }
}

/// Cuts each loop at one link, so that following links always ends. The image that the user named, else the
/// alphabetically first one, becomes the top of the remaining chain.
fn cut_loops(images: &mut [ImageEntry], wanted: Option<ImageIndex>) {
    // C1: no loop is left.
    #[derive(Clone, Copy, PartialEq)]
    enum Seen {
        No,
        Now(usize),
        Done,
    }
    let mut seen = vec![Seen::No; images.len()];
    for start in 0..images.len() {
        let mut path = Vec::new();
        let mut at = start;
        loop {
            match seen[at] {
                Seen::Done => break,
                Seen::Now(walk) if walk == start => {
                    let first = path.iter().position(|index| *index == at).expect("met on this walk");
                    cut_loop(images, &path[first..], wanted);
                    break;
                }
                _ => {}
            }
            seen[at] = Seen::Now(start);
            path.push(at);
            match images[at].below.image() {
                Some(next) => at = next,
                None => break,
            }
        }
        for index in path {
            seen[index] = Seen::Done;
        }
    }
}

fn cut_loop(images: &mut [ImageEntry], members: &[ImageIndex], wanted: Option<ImageIndex>) {
    let wanted = wanted.filter(|index| members.contains(index));
    let first = *members.iter().min_by_key(|index| &images[**index].place).expect("a loop has members");
    let top = wanted.unwrap_or(first);
    let position = members.iter().position(|index| *index == top).expect("its own member");
    let last = members[(position + members.len() - 1) % members.len()];
    let names: Vec<_> =
        members[position..].iter().chain(&members[..position]).map(|m| images[*m].shown()).collect();
    let sentence = format!(
        "cannot be read: its backing files form a loop ({} -> {}); point one of them elsewhere with qemu-img \
            rebase -u",
        names.join(" -> "),
        names[0]
    );
    images[last].below =
        BackingLink::Broken { image: None, reason: BrokenLink::Loop, sentence: sentence.into() };
}

/// Refuses views of more layers than are allowed.
fn cut_depth(images: &mut [ImageEntry]) {
    // Bases first, then their overlays: no recursion, whatever the depth.
    let mut order: Vec<(ImageIndex, usize)> = (0..images.len())
        .filter(|index| images[*index].below.image().is_none())
        .map(|index| (index, 1))
        .collect();
    while let Some((index, depth)) = order.pop() {
        order.extend(images[index].users.iter().map(|user| (*user, depth + 1)));
        // C1: no chain is deeper than can be read.
        if depth == MAX_DEPTH + 1
            && let BackingLink::Image(next) = images[index].below
        {
            let sentence = format!(
                "cannot be read: it is backed by more than {} layers; merge some of them",
                MAX_DEPTH - 1
            );
            images[index].below = BackingLink::Broken {
                image: Some(next),
                reason: BrokenLink::TooDeep,
                sentence: sentence.into(),
            };
        }
    }
}

/// Counts for each image the chains that it is part of.
pub(super) fn count_chains(catalog: &mut Catalog) {
    // Tops first: an image's count is complete when all its users have added theirs.
    let mut waiting: Vec<usize> = catalog.images.iter().map(|image| image.users.len()).collect();
    let mut ready: Vec<ImageIndex> = (0..catalog.images.len()).filter(|index| waiting[*index] == 0).collect();
    while let Some(index) = ready.pop() {
        if let Some(next) = catalog.images[index].below.image() {
            catalog.images[next].chain_count += catalog.images[index].chain_count;
            waiting[next] -= 1;
            if waiting[next] == 0 {
                ready.push(next);
            }
        }
    }
}

/// Notes what libvirt's definitions say of the images. A leaf was left behind if virsh named it after a disk
/// that a domain has in another file now, no definition mentions it, and the domain's was written later.
fn note_managed(
    images: &mut [ImageEntry],
    leaves: &[ImageIndex],
    options: &StoreOptions,
    managed: &ManagedFiles,
    single: bool,
) {
    if managed.is_empty() {
        return;
    }
    for image in images.iter_mut() {
        image.managed = managed.get(&image.place).cloned().map(Arc::new);
    }
    let stem = |path: &Path| path.with_extension("");
    let mut disks: HashMap<PathBuf, (String, (i64, i64))> = HashMap::new();
    for image in images.iter().filter(|image| image.place.root == 0) {
        if let (Some(domain), Some(file)) = (image.domains().next(), &image.managed) {
            disks.insert(stem(&image.place.path), (domain.to_owned(), file.defined));
        }
    }
    for leaf in leaves.iter().filter(|_| !single) {
        let image = &mut images[*leaf];
        let path = &image.place.path;
        let is_mentioned =
            image.managed.as_ref().is_some_and(|file| !file.domains.is_empty() || !file.states.is_empty());
        if is_mentioned || has_kind(path) || options.stated_name(path).is_some() {
            continue;
        }
        // A file that is newer than the definition may be what the domain uses in a moment.
        let written = (image.stat.modified.seconds, i64::from(image.stat.modified.nanoseconds));
        if let Some((domain, _)) = disks.get(&stem(path)).filter(|(_, defined)| *defined >= written) {
            let mut file = image.managed.as_deref().cloned().unwrap_or_default();
            file.left_behind_by = Some(domain.clone());
            image.managed = Some(Arc::new(file));
        }
    }
}

/// Of the leaves that share a stem in a directory, those that are not the main one of their disk: they have
/// their full names. The main one is a domain's disk, or backed by it, or is alone but for those that a command
/// is about to remove.
fn side_leaves(
    catalog: &Catalog,
    leaves: &[ImageIndex],
    is_passing: &[bool],
    options: &StoreOptions,
) -> BTreeSet<ImageIndex> {
    let mut by_stem: HashMap<PathBuf, Vec<ImageIndex>> = HashMap::new();
    for leaf in leaves {
        let path = &catalog.images[*leaf].place.path;
        if options.stated_name(path).is_none() {
            by_stem.entry(path.with_extension("")).or_default().push(*leaf);
        }
    }
    let mut side = BTreeSet::new();
    for leaves in by_stem.into_values().filter(|leaves| leaves.len() > 1) {
        let is_disk = |index: &ImageIndex| catalog.images[*index].domains().next().is_some();
        let is_backed_by_disk = |leaf: &ImageIndex| catalog.layers(*leaf).iter().any(is_disk);
        let disks: Vec<ImageIndex> = leaves.iter().copied().filter(is_disk).collect();
        let backed: Vec<ImageIndex> = leaves.iter().copied().filter(is_backed_by_disk).collect();
        let staying: Vec<ImageIndex> = leaves.iter().copied().filter(|leaf| !is_passing[*leaf]).collect();
        let main = match (disks.as_slice(), backed.as_slice(), staying.as_slice()) {
            ([main], _, _) | ([], [main], _) | ([], [], [main]) => *main,
            _ => continue,
        };
        side.extend(leaves.into_iter().filter(|leaf| *leaf != main));
    }
    side
}

/// Gives each leaf a name in the directory of its file.
fn name_chains(
    catalog: &Catalog,
    leaves: &[ImageIndex],
    is_passing: &[bool],
    options: &StoreOptions,
) -> BTreeMap<PathBuf, CatalogDirectory> {
    let images = &catalog.images;
    let side = side_leaves(catalog, leaves, is_passing, options);
    let mut by_directory: HashMap<&Path, Vec<ImageIndex>> = HashMap::new();
    let mut directories: BTreeMap<PathBuf, CatalogDirectory> = BTreeMap::new();
    directories.insert(PathBuf::new(), CatalogDirectory::default());
    for leaf in leaves {
        let directory = images[*leaf].place.path.parent().unwrap_or(Path::new(""));
        by_directory.entry(directory).or_default().push(*leaf);
        let mut below = directory;
        while let (Some(parent), Some(name)) = (below.parent(), below.file_name()) {
            directories.entry(parent.to_path_buf()).or_default().directories.insert(name.to_os_string());
            below = parent;
        }
    }
    for (directory, leaves) in by_directory {
        let content = directories.entry(directory.to_path_buf()).or_default();
        let mut taken: BTreeSet<Vec<u8>> =
            content.directories.iter().map(|name| name.as_bytes().to_vec()).collect();
        if directory.as_os_str().is_empty() {
            taken.extend([STORE_DIRECTORY, README].map(<[u8]>::to_vec));
        }
        let form = |leaf: &ImageIndex| {
            let path = images[*leaf].place.path.as_path();
            let mut forms = names::chain_forms(path, options.stated_name(path));
            if side.contains(leaf) {
                let stem = forms.len() - 2;
                forms.remove(stem);
            }
            forms
        };
        let forms: Vec<Vec<Vec<u8>>> = leaves.iter().map(form).collect();
        for (name, leaf) in names::chain_names(&forms, &taken).into_iter().zip(&leaves) {
            content.chains.insert(OsString::from_vec(name), *leaf);
        }
    }
    directories
}

/// Why an image of this header cannot be read, as the rest of a sentence.
pub(super) fn qcow2_problem(qcow2: &Qcow2Description) -> Option<Arc<str>> {
    unreadable(&qcow2.header).map(|sentence| format!("cannot be read: {sentence}").into())
}

/// The files of a catalog by identity, for looking up versions.
pub(super) fn versions(catalog: &Catalog) -> HashMap<ObjectId, (ObjectStat, u64)> {
    catalog.images.iter().map(|image| (image.stat.id, (image.stat, image.version))).collect()
}

/// A name of the mount from bytes.
pub(super) fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}
