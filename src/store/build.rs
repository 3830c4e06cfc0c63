//! Builds a catalog from scanned files: follows names, and decides the format of each file.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::format::foreign::ForeignFormat;
use crate::io::{Backend, ObjectId};

use super::catalog::{
    self, BackingLink, Catalog, FileReference, ImageEntry, ImageIndex, IsFile, UnlinkedImage, qcow2_problem,
    versions,
};
use super::control_dir::ControlDir;
use super::describe::DetectedContent;
use super::domains::ManagedFiles;
use super::evidence::FileRef;
use super::file_names::{has_extension, shown};
use super::find_uses::{claims_of, foreign_kind, names_of};
use super::freeze_list::{FROZEN_NOTES, FreezeList};
use super::intents::FoundIntent;
use super::operation::{Effects, FileLookup, NewTop};
use super::options::{Format, StoreOptions};
use super::owners::Owners;
use super::possible_uses::{PossibleUse, UseReach, pattern};
use super::resolve::{BrokenLink, StorePath, UnresolvedName, climbed, resolve};
use super::scan::{KnownFiles, Problem, Scan, ScanContext, ScannedFile, describe_place, known_of};

/// The files of a scan, and those that headers name besides, while a catalog is built.
pub(super) struct CatalogBuilder<'a> {
    pub(super) roots: &'a [Arc<dyn Backend>],
    pub(super) options: &'a StoreOptions,
    ways: &'a ScanContext<'a>,
    pub(super) files: Vec<ScannedFile>,
    pub(super) by_place: HashMap<StorePath, ImageIndex>,
    pub(super) by_id: HashMap<ObjectId, ImageIndex>,
    pub(super) problems: Vec<Problem>,
    /// Possible users.
    pub(super) claims: Vec<PossibleUse>,
    is_single: bool,
    /// The link by which the user has named the single image.
    by_link: Option<StorePath>,
    /// Directories of files that headers name, and that no scan covers.
    directories: BTreeSet<StorePath>,
    owners: Owners<'a>,
    /// Images whose names do not count, and the images that they name.
    uncounted: Vec<(ImageIndex, ImageIndex)>,
    /// The other names from which alone images' backing files are found.
    found_by: HashMap<ImageIndex, StorePath>,
}

/// Builds the catalog. Also returns what the next scan need not read again, and the directories outside the
/// scan with files that headers name.
pub(super) fn build(
    roots: &[Arc<dyn Backend>],
    guard: &ControlDir,
    (options, managed): (&StoreOptions, &ManagedFiles),
    mut scan: Scan,
    ways: &ScanContext<'_>,
    previous: &Catalog,
    (is_single, by_link): (bool, Option<StorePath>),
) -> (Catalog, Arc<KnownFiles>, BTreeSet<StorePath>) {
    let (intents, senseless) = guard.read();
    scan.problems.extend(unreadable(&senseless));
    let unowned = intents.iter().filter(|found| !guard.is_owned(found));
    let mut unfinished: Vec<Problem> = unowned.map(|found| not_finished(guard, found)).collect();
    scan.problems.append(&mut unfinished);
    let is_it = |place: &StorePath, id: ObjectId, named: &FileRef| is_file(roots, place, id, named);
    drop_new_names(&mut scan, &intents, &guard.prefix, &is_it);
    let (superseded, passing) = removed_files(&scan, &intents, &guard.prefix, &is_it);
    let mut builder = CatalogBuilder {
        roots,
        options,
        ways,
        files: Vec::new(),
        by_place: HashMap::new(),
        by_id: HashMap::new(),
        problems: scan.problems,
        claims: Vec::new(),
        is_single,
        by_link,
        directories: BTreeSet::new(),
        owners: Owners::new(roots, options),
        uncounted: Vec::new(),
        found_by: HashMap::new(),
    };
    builder.add_scanned(scan.files);
    let scanned_count = builder.files.len();
    scan.links.into_iter().for_each(|path| builder.link(path));
    scan.unread.into_iter().for_each(|unread| builder.unread(unread));
    for place in scan.introduced {
        builder.introduce(place);
    }
    let mut references = builder.follow();
    let data_references = builder.data_files();
    // Data files that no scan has covered are included.
    builder.follow_rest(&mut references);
    let said = builder.listen(&references, &data_references);
    let next_known = known_of(&builder.files);
    let notes = FreezeList::read(guard);
    builder.problems.extend(notes.problem().map(|sentence| Problem { path: FROZEN_NOTES.into(), sentence }));
    let names = builder.other_names();
    let old = versions(previous);
    let mut drafts: Vec<UnlinkedImage> = Vec::with_capacity(builder.files.len());
    let (mut more, mut headless) = (Vec::new(), Vec::new());
    for ((index, file), backing) in builder.files.iter().enumerate().zip(references) {
        let stated = options.stated_format(&file.place.path);
        let (format, mut problem, content) = if said.is_doubtful[index] {
            (None, Some(DOUBTFUL.into()), file.content.clone())
        } else {
            builder.decide(file, &said.formats[index], is_single && index == 0)
        };
        let is_unreadable = format.is_none() && matches!(content, DetectedContent::Malformed(_));
        let is_drawn = !said.is_data_file[index]
            && (format == Some(Format::Qcow2) || is_unreadable && problem.is_some());
        let (backing, meant) = claims_of(file, backing, is_drawn, options);
        more.extend(meant.into_iter().map(|reach| (index, reach, is_drawn)));
        if problem.is_some() && matches!(content, DetectedContent::Plain) {
            headless.push(index);
        }
        let mut data_file = None;
        match data_references.get(&index).filter(|_| format == Some(Format::Qcow2)) {
            Some(Ok(target)) => {
                let target = &builder.files[*target];
                data_file = Some((target.place.clone(), target.stat));
            }
            Some(Err(sentence)) if problem.is_none() => problem = Some(sentence.as_str().into()),
            _ => {}
        }
        let version = match old.get(&file.stat.id) {
            Some((stat, version)) if stat.version == file.stat.version => *version,
            _ => next(&VERSION),
        };
        // An option for one name of a file applies to the file.
        let others = names.get(&index).map_or(&[][..], Vec::as_slice);
        let frozen: Option<Frozen> = match &content {
            DetectedContent::Qcow2(qcow2) if format == Some(Format::Qcow2) => qcow2.header.frozen.clone(),
            _ if format == Some(Format::Raw) && notes.problem().is_some() => {
                Some(Frozen::of_time((file.stat.modified.seconds, file.stat.modified.nanoseconds)))
            }
            _ => std::iter::once(&file.place).chain(others).find_map(|place| notes.frozen(place)),
        };
        let is_named_readonly = |place: &StorePath| place.root != 0 || options.is_readonly(&place.path);
        let readonly =
            !file.stat.has_write_bit() || std::iter::once(&file.place).chain(others).any(is_named_readonly);
        drafts.push(UnlinkedImage {
            entry: ImageEntry {
                place: file.place.clone(),
                stat: file.stat,
                version,
                content,
                format,
                problem,
                below: BackingLink::Nothing,
                users: Vec::new(),
                data_file,
                frozen,
                readonly,
                found_by: builder.found_by.get(&index).cloned(),
                managed: None,
                is_merged: false,
                chain_count: 0,
            },
            backing,
            is_data_file: said.is_data_file[index],
            is_stated: stated.is_some(),
            is_scanned: index < scanned_count && !file.is_hidden && !superseded.contains(&file.stat.id),
            is_unreadable,
            is_passing: passing.contains(&file.stat.id),
        });
    }
    for (index, reach, is_drawn) in more {
        builder.claim(index, reach, is_drawn);
    }
    for index in headless {
        builder.claim_without_magic(index);
    }
    builder.name_foreign(&drafts);
    let CatalogBuilder { problems, mut claims, directories, owners, uncounted, .. } = builder;
    let targets: Vec<Option<ImageIndex>> = drafts.iter().map(UnlinkedImage::target).collect();
    let mut catalog = catalog::link(drafts, problems, is_single, (options, managed), next(&SERIAL));
    claims.extend(catalog.cut_links(&targets));
    catalog.note_claims(claims, &owners);
    catalog.note_uncounted(&uncounted);
    catalog.note_intents(intents, &guard.prefix, &is_it);
    catalog.hide_all(&senseless);
    catalog.drafts = scan.drafts;
    catalog.senseless = senseless.into_iter().map(|(path, _)| path).collect();
    (catalog, next_known, directories)
}

/// Whether the file at a place is the one that an intent names. If it cannot be checked, it may be.
fn is_file(roots: &[Arc<dyn Backend>], place: &StorePath, id: ObjectId, named: &FileRef) -> bool {
    let is_born = || roots[place.root].identify(&place.path).map_or(true, |found| found.is(&named.file));
    id == named.file.id() && (named.file.birth().is_none() || is_born())
}

/// Problems for intents that cannot be parsed.
fn unreadable(senseless: &[(PathBuf, String)]) -> impl Iterator<Item = Problem> {
    let fact = "records a command that was begun, and cannot be parsed";
    let remedy = "nothing of the store is shown, because the views that it has invalidated are unknown; \
                  restore it, or see what chainfs recover STORE says of it";
    senseless.iter().map(move |(path, reason)| Problem {
        path: path.clone(),
        sentence: format!("{fact}: {reason}; {remedy}"),
    })
}

fn not_finished(guard: &ControlDir, found: &FoundIntent) -> Problem {
    if !found.is_trusted {
        let fact = "holds a chain with an unfinished command whose intent is not trusted";
        let remedy = "views that it may have invalidated are hidden until the intent is trusted or removed";
        return Problem {
            path: found.intent.chain.clone(),
            sentence: format!("{fact}; {remedy}: {}", found.intent.command),
        };
    }
    let state = match (guard.refusal(&found.name), found.is_copied) {
        (Some(refusal), _) => format!("could not be resumed ({refusal})"),
        (None, true) => "is not finished, in the store of which this is a copy".to_owned(),
        (None, false) => "is not finished".to_owned(),
    };
    let remedy = "the views that it has invalidated are hidden until the store is mounted without ro, or \
                  chainfs recover has resumed it";
    let sentence = format!("holds a chain whose command {state}; {remedy}: {}", found.intent.command);
    Problem { path: found.intent.chain.clone(), sentence }
}

/// The files of a scan, for queries of operations.
struct ScannedFiles<'a> {
    files: &'a [ScannedFile],
    /// The path from the guarded directory to the store's own.
    prefix: &'a Path,
    is_it: &'a IsFile<'a>,
}

impl ScannedFiles<'_> {
    fn is(&self, scanned: &ScannedFile, file: &FileRef) -> bool {
        (self.is_it)(&scanned.place, scanned.stat.id, file)
    }

    fn lies_at(&self, scanned: &ScannedFile, name: &Path) -> bool {
        self.prefix.join(&scanned.place.path) == name
    }
}

impl FileLookup for ScannedFiles<'_> {
    fn is_there(&self, file: &FileRef) -> bool {
        self.files.iter().any(|scanned| self.is(scanned, file))
    }

    fn is_at(&self, file: &FileRef, name: &Path) -> bool {
        self.files.iter().any(|scanned| self.lies_at(scanned, name) && self.is(scanned, file))
    }
}

/// While a snapshot gives an active layer its second name, the first one counts, until the overlay has its
/// name.
fn drop_new_names(scan: &mut Scan, intents: &[FoundIntent], prefix: &Path, is_it: &IsFile<'_>) {
    for NewTop { old, frozen, overlay, name, .. } in
        intents.iter().flat_map(|found| found.intent.operation.new_tops())
    {
        let now = ScannedFiles { files: &scan.files, prefix, is_it };
        if old.path == *frozen || !now.is_at(old, &old.path) || !now.is_at(old, frozen) {
            continue;
        }
        let dropped = if now.is_at(overlay, name) { &old.path } else { frozen };
        let is_dropped: Vec<bool> =
            scan.files.iter().map(|scanned| now.lies_at(scanned, dropped) && now.is(scanned, old)).collect();
        let mut is_dropped = is_dropped.into_iter();
        scan.files.retain(|_| !is_dropped.next().unwrap_or(false));
    }
}

/// Files that commands have left for removal, and those that they remove at their ends.
fn removed_files(
    scan: &Scan,
    intents: &[FoundIntent],
    prefix: &Path,
    is_it: &IsFile<'_>,
) -> (HashSet<ObjectId>, HashSet<ObjectId>) {
    let now = ScannedFiles { files: &scan.files, prefix, is_it };
    let (mut superseded, mut passing) = (HashSet::new(), HashSet::new());
    for affected in intents.iter().map(|found| found.intent.operation.affected(&now)) {
        superseded.extend(affected.superseded.into_iter().map(|file| file.file.id()));
        passing.extend(affected.passing.into_iter().map(|file| file.file.id()));
    }
    (superseded, passing)
}

const DOUBTFUL: &str = "cannot be read: its header and that of the file it names name each other, and a \
    guest may have \
                        written one of them; say what it is with -o format=NAME:raw or -o format=NAME:qcow2";

/// The references to other files in headers that are trusted.
struct StatedReferences {
    /// The formats that other images' headers state for a file.
    formats: Vec<Vec<Format>>,
    /// Whether it is the external data file of an image.
    is_data_file: Vec<bool>,
    /// Whether its format is unknown.
    is_doubtful: Vec<bool>,
}

static VERSION: AtomicU64 = AtomicU64::new(1);
static SERIAL: AtomicU64 = AtomicU64::new(1);

/// A number for a catalog, different from all others.
pub(super) fn next_serial() -> u64 {
    next(&SERIAL)
}

fn next(counter: &AtomicU64) -> u64 {
    counter.fetch_add(1, Ordering::Relaxed)
}

impl CatalogBuilder<'_> {
    /// Adds the files of the scan in the order of their paths: of several names of one file the first counts,
    /// and the others are a problem.
    fn add_scanned(&mut self, mut files: Vec<ScannedFile>) {
        files.sort_by(|a, b| a.place.cmp(&b.place));
        for file in files {
            if let Some(first) = self.by_id.get(&file.stat.id) {
                let first_name = self.files[*first].place.path.display();
                let sentence = format!(
                    "is another name of {first_name} (a hard link); they are one image, shown under the \
                        first name; remove one"
                );
                if super::scan::looks_like_image(&file.place.path)
                    || matches!(file.content, DetectedContent::Qcow2(_))
                {
                    self.problems.push(Problem { path: file.place.path.clone(), sentence });
                }
                self.by_place.insert(file.place, *first);
                continue;
            }
            self.add(file);
        }
    }

    /// Adds a file that a command has named, unless it is known. The command itself reports its errors.
    fn introduce(&mut self, place: StorePath) {
        if self.by_place.contains_key(&place) {
            return;
        }
        let Ok(file) = describe_place(&*self.roots[place.root], &place, self.ways) else { return };
        if let Some(index) = self.by_id.get(&file.stat.id) {
            self.by_place.insert(place, *index);
        } else {
            self.add(file);
        }
    }

    /// The names of each file besides the one under which it is shown.
    fn other_names(&self) -> HashMap<ImageIndex, Vec<StorePath>> {
        let mut names: HashMap<ImageIndex, Vec<StorePath>> = HashMap::new();
        for (place, index) in
            self.by_place.iter().filter(|(place, index)| self.files[**index].place != **place)
        {
            names.entry(*index).or_default().push(place.clone());
        }
        names
    }

    pub(super) fn add(&mut self, file: ScannedFile) -> ImageIndex {
        let index = self.files.len();
        self.by_place.insert(file.place.clone(), index);
        self.by_id.insert(file.stat.id, index);
        self.files.push(file);
        index
    }

    /// Follows the names in every header, and in those of the files found that way.
    fn follow(&mut self) -> Vec<Vec<FileReference>> {
        let mut references = Vec::new();
        self.follow_rest(&mut references);
        let doubtful = self.follow_other_names(&mut references);
        self.follow_rest(&mut references);
        for reference in references.iter_mut().flatten() {
            let Some(other) = reference.via.as_ref().and_then(|via| doubtful.get(via)) else { continue };
            if let Ok(target) = reference.target {
                reference.meant = vec![UseReach::Image(target)];
                let fact = "is another name of a file, and by that name QEMU finds another backing file";
                let sentence = format!("{fact} ({other}) than by the file's own; name the file itself");
                reference.target = Err(UnresolvedName::not_followed(sentence));
            }
        }
        references
    }

    fn follow_rest(&mut self, references: &mut Vec<Vec<FileReference>>) {
        while references.len() < self.files.len() {
            let file = &self.files[references.len()];
            let from = file.place.clone();
            let found = match &file.content {
                DetectedContent::Qcow2(qcow2) => {
                    let backing = qcow2.header.backing.clone();
                    backing.map(|backing| vec![(backing.name, backing.format)]).unwrap_or_default()
                }
                content => names_of(content).iter().map(|name| (name.clone(), None)).collect(),
            };
            let found = found.into_iter().map(|(name, format)| self.reference(&from, name, format)).collect();
            references.push(found);
        }
    }

    fn reference(&mut self, from: &StorePath, name: Vec<u8>, format: Option<String>) -> FileReference {
        let target = self.find(from, &name);
        let meant = if target.is_err() { self.meant(from, &name) } else { Vec::new() };
        let via = resolve(self.roots, &self.options.maps, from, &name).ok();
        FileReference { target, meant, format, name: printable(&name), via, raw_name: name }
    }

    /// A relative name is resolved from the directory of the name that QEMU was given, so a file of several
    /// names may have several backing files. Backing files found by its other names count if there is none by
    /// its own; if both exist, the backing file by the other name is doubtful: these are returned.
    fn follow_other_names(&mut self, references: &mut [Vec<FileReference>]) -> HashMap<StorePath, String> {
        let is_elsewhere = |place: &StorePath, own: &StorePath| {
            place.root != own.root || place.path.parent() != own.path.parent()
        };
        let mut others: Vec<(StorePath, ImageIndex)> =
            self.by_place.iter().map(|(place, index)| (place.clone(), *index)).collect();
        others.retain(|(place, index)| {
            let is_relative = |reference: &FileReference| !reference.raw_name.starts_with(b"/");
            *index < references.len()
                && references[*index].first().is_some_and(is_relative)
                && is_elsewhere(place, &self.files[*index].place)
        });
        others.sort();
        if let Some(link) = self.by_link.clone() {
            others.retain(|(place, index)| *index != 0 || *place != link);
            if references.first().is_some_and(|first| !first.is_empty()) {
                others.insert(0, (link, 0));
            }
        }
        let mut doubtful = HashMap::new();
        for (place, index) in others {
            let Some(own) = references[index].first() else { continue };
            let (own_target, format) = (own.target.clone(), own.format.clone());
            let other = self.reference(&place, own.raw_name.clone(), format);
            let Ok(target) = other.target else { continue };
            let is_given = self.by_link.as_ref() == Some(&place);
            match own_target {
                Ok(own_target) if own_target == target => {}
                Ok(_) if !is_given => {
                    let name = shown(&self.files[target].place.path);
                    let fact = format!(
                        "is another name of {}, by which QEMU finds the backing file {name}",
                        self.files[index].place.path.display()
                    );
                    let remedy = "remove it, or keep one name for each image";
                    self.claims.push(PossibleUse {
                        by: place.path.clone(),
                        owner: Some(self.files[index].stat.id).filter(|_| target != index),
                        uid: self.files[index].stat.uid,
                        reach: UseReach::Image(target),
                        why: format!("{fact}; {remedy}").into(),
                    });
                    doubtful.insert(place, name);
                }
                Ok(_) => references[index][0] = other,
                Err(_) => {
                    references[index][0] = other;
                    if !is_given {
                        self.found_by.insert(index, place);
                    }
                }
            }
        }
        doubtful
    }

    /// The external data file of every image that has one, or why it cannot be used.
    fn data_files(&mut self) -> HashMap<ImageIndex, std::result::Result<ImageIndex, String>> {
        let mut found = HashMap::new();
        for index in 0..self.files.len() {
            let DetectedContent::Qcow2(qcow2) = &self.files[index].content else { continue };
            let Some(data_file) = qcow2.header.data_file.clone() else { continue };
            let from = self.files[index].place.clone();
            let target = match &data_file.name {
                None => {
                    Err("cannot be read: its data is in an external file that its header does not name; \
                             set it with qemu-img amend -o data_file=NAME"
                        .to_string())
                }
                Some(name) => self
                    .find(&from, name)
                    .map_err(|unresolved| unresolved.sentence.replace(REBASE, AMEND))
                    .map_err(|sentence| {
                        format!("cannot be read: its data file \"{}\" {sentence}", printable(name))
                    }),
            };
            found.insert(index, target);
        }
        found
    }

    /// Collects the statements of headers about other files. Only files that are read as qcow2 count: a guest
    /// may have written any header into a raw disk.
    fn listen(
        &self,
        references: &[Vec<FileReference>],
        data_references: &HashMap<ImageIndex, std::result::Result<ImageIndex, String>>,
    ) -> StatedReferences {
        let count = self.files.len();
        let backing =
            |index: ImageIndex| references[index].first().and_then(|r| r.target.as_ref().ok()).copied();
        let data =
            |index: ImageIndex| data_references.get(&index).and_then(|target| target.as_ref().ok()).copied();
        let named = |index: ImageIndex| {
            [backing(index), data(index)].into_iter().flatten().filter(move |t| *t != index)
        };
        // Each file waits for those that name it.
        let mut waiting = vec![0_usize; count];
        (0..count).flat_map(named).for_each(|target| waiting[target] += 1);
        let mut ready: Vec<ImageIndex> = (0..count).filter(|index| waiting[*index] == 0).collect();
        // A loop has to start somewhere: with a file whose format a name or the user states.
        let is_sure = |index: ImageIndex| {
            let path = &self.files[index].place.path;
            has_extension(path, "qcow2")
                || has_extension(path, "raw")
                || self.options.stated_format(path).is_some()
        };
        let mut rest = (0..count).filter(|i| is_sure(*i)).chain((0..count).filter(|i| !is_sure(*i)));
        let mut said = StatedReferences {
            formats: vec![Vec::new(); count],
            is_data_file: vec![false; count],
            is_doubtful: vec![false; count],
        };
        let mut is_heard = vec![false; count];
        while let Some((index, is_in_turn)) =
            ready.pop().map(|i| (i, true)).or_else(|| rest.next().map(|i| (i, false)))
        {
            if std::mem::replace(&mut is_heard[index], true) {
                continue;
            }
            said.is_doubtful[index] = !is_in_turn && !is_sure(index);
            let is_believed = !said.is_doubtful[index]
                && !said.is_data_file[index]
                && matches!(self.files[index].content, DetectedContent::Qcow2(_))
                && self.decide(&self.files[index], &said.formats[index], self.is_single && index == 0).0
                    == Some(Format::Qcow2);
            if is_believed {
                if let (Some(target), Some(reference)) = (backing(index), references[index].first()) {
                    let is_plain = self.files[target].is_plain
                        || matches!(self.files[target].content, DetectedContent::Plain);
                    // A format is probed from content only if the user asks for it.
                    let guess = (self.options.probe && is_plain).then_some(Format::Raw);
                    said.formats[target]
                        .extend(reference.format.as_ref().map_or(guess, |f| Format::from_name(f)));
                }
                if let Some(target) = data(index).filter(|target| *target != index) {
                    said.is_data_file[target] = true;
                }
            }
            for target in named(index) {
                waiting[target] -= 1;
                if waiting[target] == 0 {
                    ready.push(target);
                }
            }
        }
        said
    }

    /// The file that `name` in the header at `from` names, if the name counts there.
    pub(super) fn find(
        &mut self,
        from: &StorePath,
        name: &[u8],
    ) -> std::result::Result<ImageIndex, UnresolvedName> {
        let user = self.by_place.get(from).copied();
        let image = user.map(|index| &self.files[index]);
        // Found by any other name or link: its owner is not responsible for those.
        let (owner, lies_at) = image.map_or((0, from), |image| (image.stat.uid, &image.place));
        let place = resolve(self.roots, &self.options.maps, from, name)?;
        let Some(sentence) = self.owners.refuse(owner, lies_at, &place) else {
            return self.find_any(from, name);
        };
        if let (Some(user), Ok(target)) = (user, self.find_any(from, name)) {
            self.uncounted.push((user, target));
        }
        Err(UnresolvedName::not_followed(sentence))
    }

    /// The same whether the name counts or not. Files that no scan has covered are read now.
    fn find_any(&mut self, from: &StorePath, name: &[u8]) -> std::result::Result<ImageIndex, UnresolvedName> {
        let place = resolve(self.roots, &self.options.maps, from, name)?;
        if climbed(self.roots, &self.options.maps, from, name)
            .iter()
            .any(|directory| !self.is_real(directory))
        {
            let sentence = "goes up (..) from a place that is a symbolic link, or is not in the store, so \
                            that it means one file as text and may mean another to QEMU; write it without ..";
            return Err(UnresolvedName::not_followed(sentence));
        }
        if place.root != 0 || self.is_single {
            let directory = place.path.parent().unwrap_or(Path::new("")).to_path_buf();
            self.directories.insert(StorePath { root: place.root, path: directory });
        }
        if let Some(index) = self.by_place.get(&place) {
            return Ok(*index);
        }
        let file = match describe_place(&*self.roots[place.root], &place, self.ways) {
            Ok(file) => file,
            Err(error) => {
                if !matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Escape) {
                    self.unopened(&place, &error);
                }
                return Err(not_there(&*self.roots[place.root], &place.path, &error));
            }
        };
        Ok(self.met(place, file))
    }

    /// A file at a path that no scan covers, which may be known by another name already.
    pub(super) fn met(&mut self, place: StorePath, file: ScannedFile) -> ImageIndex {
        if let Some(index) = self.by_id.get(&file.stat.id) {
            self.by_place.insert(place, *index);
            return *index;
        }
        self.add(file)
    }

    /// Reads a file by its path.
    pub(super) fn look_at(&self, place: &StorePath) -> Result<ScannedFile> {
        describe_place(&*self.roots[place.root], place, self.ways)
    }

    /// Whether a directory that a name goes up from is a real one: a root, a directory above one, or a
    /// directory beneath one.
    fn is_real(&self, directory: &Path) -> bool {
        self.roots.iter().any(|root| {
            let inside = root.relative(directory).filter(|inside| !inside.as_os_str().is_empty());
            root.canonical().starts_with(directory)
                || inside.is_some_and(|inside| root.is_real_directory(&inside))
        })
    }

    /// The format of a file, and if it has none although it is an image, why.
    fn decide(
        &self,
        file: &ScannedFile,
        by_users: &[Format],
        is_single: bool,
    ) -> (Option<Format>, Option<Arc<str>>, DetectedContent) {
        let path = &file.place.path;
        let has_magic = file.content.has_magic();
        let foreign = foreign_kind(file);
        let is_foreign = || {
            let kind = foreign.map_or("", ForeignFormat::name);
            let fact = format!(
                "cannot be read: it is taken for an image of the format {kind}, which chainfs does not read"
            );
            let remedy = format!(
                "convert it with qemu-img convert -O qcow2, or, if it is a raw disk, say so with -o \
                    format={}:raw",
                pattern(path)
            );
            (None, Some(format!("{fact}; {remedy}").into()), file.content.clone())
        };
        let raw = || (Some(Format::Raw), None, file.content.clone());
        // S2: content that a guest can write never decides.
        let decided = match self.options.stated_format(path) {
            Some(format) => Some(format),
            None if has_extension(path, "raw") => Some(Format::Raw),
            // Images that disagree about their backing file's format: guest-written content must not decide.
            None if by_users.contains(&Format::Raw) => Some(Format::Raw),
            None => by_users.first().copied(),
        };
        match decided {
            Some(Format::Raw) => raw(),
            Some(Format::Qcow2) => self.as_qcow2(file),
            None if has_extension(path, "img") && has_magic => {
                let problem = "cannot be read: it is raw by its name but begins with qcow2's magic, which a \
                    guest could have \
                               written; say which with -o format=NAME:raw or -o format=NAME:qcow2";
                (None, Some(problem.into()), file.content.clone())
            }
            None if has_extension(path, "img") && foreign.is_some() => is_foreign(),
            None if has_extension(path, "img") => raw(),
            // S4: not if it was once seen without the magic.
            None if has_extension(path, "qcow2") || has_magic && !file.is_plain => self.as_qcow2(file),
            None if is_single && foreign.is_some() => is_foreign(),
            // The user has named it as an image, so it is raw.
            None if is_single => raw(),
            None => (None, None, file.content.clone()),
        }
    }

    fn as_qcow2(&self, file: &ScannedFile) -> (Option<Format>, Option<Arc<str>>, DetectedContent) {
        let content = match &file.content {
            // Another name of a file that could not be opened.
            DetectedContent::Unseen => match self.look_at(&file.place) {
                Ok(file) => file.content,
                Err(error) => {
                    return (None, Some(format!("cannot be read: {error}").into()), DetectedContent::Unseen);
                }
            },
            content => content.clone(),
        };
        match &content {
            DetectedContent::Qcow2(qcow2) => (Some(Format::Qcow2), qcow2_problem(qcow2), content),
            DetectedContent::Malformed(header) => {
                let problem = format!("cannot be read: {}", header.reason);
                (None, Some(problem.into()), content)
            }
            DetectedContent::Foreign(foreign) => {
                let fact = "and chainfs reads raw and qcow2; convert it with qemu-img convert -O qcow2";
                let problem =
                    format!("cannot be read: it is an image of the format {}, {fact}", foreign.kind.name());
                (None, Some(problem.into()), content)
            }
            DetectedContent::Plain | DetectedContent::Unseen => {
                let problem = if file.stat.size == 0 {
                    "cannot be read: the file is empty; restore it from a copy".to_string()
                } else {
                    "cannot be read: it does not begin with qcow2's magic; restore it from a copy, or rename \
                        it if it is raw"
                        .to_string()
                };
                (None, Some(problem.into()), content)
            }
        }
    }
}

/// Why a file that a header names is missing, as the rest of a sentence.
fn not_there(root: &dyn Backend, path: &Path, error: &Error) -> UnresolvedName {
    let path = root.canonical().join(path);
    match error.kind() {
        ErrorKind::NotFound => {
            let sentence = format!("is missing (looked for {}); put it back, or {REBASE}", path.display());
            UnresolvedName::new(BrokenLink::Missing, sentence)
        }
        ErrorKind::Escape => {
            let sentence = "leads out of the store by a symbolic link, and is never followed; move the file \
                            itself into the store";
            UnresolvedName::new(BrokenLink::OutsideStore, sentence)
        }
        _ => UnresolvedName::not_followed(format!("cannot be opened ({error})")),
    }
}

/// How to make a header name another backing file, or another data file.
const REBASE: &str = "point the header elsewhere with qemu-img rebase -u";
const AMEND: &str = "name it anew: qemu-img amend -o data_file=NEW --image-opts \
                     driver=qcow2,file.filename=IMAGE,data-file.filename=NEW";

fn printable(name: &[u8]) -> String {
    shown(Path::new(catalog::os(name)))
}
