//! Scans a store's directory into a list of files with their detected content.
//!
//! Directories are walked and files described by as many threads as there are processors. A file
//! whose version has not changed since the last scan is not opened again. What cannot be looked at is
//! told of: it may stand on anything. Other mounts are entered, except those of chainfs.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{
    Backend, DirEntry, EntryKind, MountPoints, ObjectId, ObjectStat, ObjectVersion, OpenDirectory, OpenObject,
};

use super::control_dir::is_own_name;
use super::describe::{DetectedContent, MIN_HEADER_LEN, describe};
use super::file_names::{INVALIDATED_EXTENSION, has_extension};
use super::leftovers::is_draft;
use super::names::OWN_PREFIX;
use super::plain::{PlainFile, PlainList, birth_of};
use super::resolve::StorePath;

/// A file that may be an image.
#[derive(Clone, Debug)]
pub(super) struct ScannedFile {
    /// Its path.
    pub place: StorePath,
    /// Its attributes.
    pub stat: ObjectStat,
    /// Its detected content.
    pub content: DetectedContent,
    /// Whether it has once been seen without qcow2's magic: its header may be a guest's.
    pub is_plain: bool,
    /// Whether its name, or that of a directory above, is one of chainfs' own: it is no chain.
    pub is_hidden: bool,
}

/// A file that could not be read, and why: it may use any image.
#[derive(Clone, Debug)]
pub(super) struct Unread {
    /// The file or directory.
    pub path: PathBuf,
    /// Why, to follow its name.
    pub fact: String,
}

/// A file that could not be shown, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file, relative to the store.
    pub path: PathBuf,
    /// What is wrong and the remedy, to follow the file's name.
    pub sentence: String,
}

/// The result of a scan.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Files in no particular order.
    pub files: Vec<ScannedFile>,
    /// Files that could not be shown.
    pub problems: Vec<Problem>,
    /// Drafts of images.
    pub drafts: Vec<PathBuf>,
    /// Files that could not be read: their references to other images are unknown.
    pub unread: Vec<Unread>,
    /// Symbolic links.
    pub links: Vec<PathBuf>,
    /// Additional files, because a command has named them.
    pub introduced: Vec<StorePath>,
    /// What it was found in.
    pub basis: ScanBasis,
}

/// What the result of a scan rests on. Names that change during a scan can make a state of which nobody has
/// ever been told: a disk under its snapshot's name, or under none.
#[derive(Debug, Default)]
pub(super) struct ScanBasis {
    directories: Vec<ListedDirectory>,
    /// The files that were found under several names.
    linked: Vec<(PathBuf, ObjectId)>,
}

#[derive(Debug)]
struct ListedDirectory {
    path: PathBuf,
    /// Its version before it was listed.
    version: ObjectVersion,
    files: Vec<(PathBuf, ObjectId)>,
}

impl ScanBasis {
    /// Whether every file still has the name by which it was found. Other names may have come. Versions of
    /// directories may be as coarse as the kernel's clock, so files with several names are always looked at.
    pub(super) fn holds(&self, root: &dyn Backend) -> bool {
        let are_there = |files: &[(PathBuf, ObjectId)]| {
            files.iter().all(|(path, id)| root.stat_itself(path).is_ok_and(|now| now.id == *id))
        };
        let is_as_listed = |listed: &ListedDirectory| {
            let path = if listed.path.as_os_str().is_empty() { Path::new(".") } else { &listed.path };
            root.stat(path).is_ok_and(|now| now.version == listed.version) || are_there(&listed.files)
        };
        are_there(&self.linked) && self.directories.iter().all(is_as_listed)
    }
}

/// The results of the last scan for each file.
pub(super) type KnownFiles = HashMap<ObjectId, KnownFile>;

/// The result for one file.
#[derive(Clone, Debug)]
pub(super) struct KnownFile {
    stat: ObjectStat,
    content: DetectedContent,
    is_plain: bool,
}

/// The context of a scan besides the directory.
pub(super) struct ScanContext<'a> {
    /// The results of the last scan.
    pub known: &'a KnownFiles,
    /// The files that have been seen without the magic.
    pub plain: &'a Mutex<PlainList>,
    /// The path from the guarded directory to the store's own.
    pub prefix: &'a Path,
    /// Called for every directory before it is listed, so that no change is missed in between.
    pub visit: &'a (dyn Fn(&Path, &dyn OpenDirectory) + Sync),
}

/// Retries of listing a directory that changes meanwhile.
const LISTINGS: usize = 8;
/// Maximum depth of directories; deeper ones are a problem.
const MAX_NESTING: usize = 64;

/// Maximum number of scan threads: each has a few directories and files open.
const MAX_THREADS: usize = 8;

struct ScanWork<'a> {
    root: &'a dyn Backend,
    ways: &'a ScanContext<'a>,
    /// Directories to list, and how many are being listed now.
    queue: Mutex<(Vec<PathBuf>, usize)>,
    changed: Condvar,
    found: Mutex<Scan>,
    /// Why the result of this scan is unusable.
    failed: Mutex<Option<Error>>,
}

/// Walks the whole store. `Exhausted` if the system lacks a resource: a file that could not be read for that
/// reason says nothing about the store.
pub(super) fn scan(root: &dyn Backend, ways: &ScanContext<'_>) -> Result<Scan> {
    let work = ScanWork {
        root,
        ways,
        queue: Mutex::new((vec![PathBuf::new()], 0)),
        changed: Condvar::new(),
        found: Mutex::new(Scan::default()),
        failed: Mutex::default(),
    };
    let threads = thread::available_parallelism().map_or(2, usize::from).min(MAX_THREADS);
    thread::scope(|scope| {
        for _ in 1..threads {
            // If no more threads can be started, fewer do the work.
            if thread::Builder::new().name("scan".into()).spawn_scoped(scope, || work.run()).is_err() {
                break;
            }
        }
        work.run();
    });
    if let Some(error) = work.failed.into_inner() {
        return Err(error);
    }
    let mut found = work.found.into_inner();
    let names = name_counts(&found.files);
    let linked = found.files.iter().filter(|file| names[&file.stat.id] > 1);
    found.basis.linked = linked.map(|file| (file.place.path.clone(), file.stat.id)).collect();
    Ok(found)
}

impl ScanWork<'_> {
    fn run(&self) {
        while let Some(directory) = self.next() {
            self.list(&directory);
            self.queue.lock().1 -= 1;
            self.changed.notify_all();
        }
    }

    fn next(&self) -> Option<PathBuf> {
        let mut queue = self.queue.lock();
        loop {
            if let Some(directory) = queue.0.pop() {
                queue.1 += 1;
                return Some(directory);
            }
            if queue.1 == 0 {
                return None;
            }
            self.changed.wait(&mut queue);
        }
    }

    fn problem(&self, path: PathBuf, sentence: String) {
        self.found.lock().problems.push(Problem { path, sentence });
    }

    /// Whether `error` means that a resource is exhausted: then the scan fails.
    fn is_exhausted(&self, error: &Error) -> bool {
        let is_exhausted = error.kind() == ErrorKind::Exhausted;
        if is_exhausted {
            self.failed.lock().get_or_insert_with(|| error.clone());
            self.queue.lock().0.clear();
        }
        is_exhausted
    }

    fn unread(&self, path: PathBuf, fact: String) {
        // On any file system that is a store itself, owned by root only.
        if path.file_name().is_some_and(|name| name == "lost+found") {
            return self.problem(path, fact);
        }
        self.found.lock().unread.push(Unread { path, fact });
    }

    fn list(&self, path: &Path) {
        // A mount of chainfs may be our own, which cannot answer before the scan is done.
        let directory = match self.root.open_directory(path, MountPoints::SkipOwn) {
            Ok(Some(directory)) => directory,
            Ok(None) => return,
            Err(error) if self.is_exhausted(&error) => return,
            Err(error) => return self.unread(path.to_path_buf(), format!("cannot be listed ({error})")),
        };
        (self.ways.visit)(path, &*directory);
        let (entries, version) = match list_still(&*directory) {
            Ok(listed) => listed,
            Err(error) if self.is_exhausted(&error) => return,
            Err(error) => return self.unread(path.to_path_buf(), format!("cannot be listed ({error})")),
        };
        let mut files = Vec::new();
        for DirEntry { name, kind } in entries {
            let place = path.join(&name);
            if is_own_name(name.as_bytes()) {
                continue;
            }
            if is_draft(Path::new(&name)) {
                if kind == EntryKind::File {
                    self.found.lock().drafts.push(place);
                }
                continue;
            }
            if has_extension(&place, INVALIDATED_EXTENSION) {
                continue;
            }
            match kind {
                // B1: deeper directories are a problem.
                EntryKind::Directory if place.components().count() > MAX_NESTING => {
                    self.unread(
                        place,
                        format!("is more than {MAX_NESTING} directories deep, and is not scanned"),
                    );
                }
                EntryKind::Directory => self.push(place),
                EntryKind::File => self.file(&*directory, &name, &place, &mut files),
                EntryKind::Symlink => self.found.lock().links.push(place),
                EntryKind::Other if looks_like_image(&place) => {
                    self.problem(
                        place,
                        "is not a regular file, and is not opened; remove or rename it".into(),
                    );
                }
                EntryKind::Other => {}
            }
        }
        drop_former_names(&*directory, &mut files);
        let names = files.iter().map(|file| (file.place.path.clone(), file.stat.id)).collect();
        let mut found = self.found.lock();
        found.files.append(&mut files);
        found.basis.directories.push(ListedDirectory { path: path.to_path_buf(), version, files: names });
    }

    fn push(&self, directory: PathBuf) {
        self.queue.lock().0.push(directory);
        self.changed.notify_one();
    }

    fn file(
        &self,
        directory: &dyn OpenDirectory,
        name: &std::ffi::OsStr,
        path: &Path,
        files: &mut Vec<ScannedFile>,
    ) {
        // The attributes are read without opening, since most files have been seen before.
        let stat = match directory.stat_entry(name) {
            Ok(Some(stat)) => stat,
            Ok(None) => return,
            Err(error) => return self.unread(path.to_path_buf(), format!("cannot be read ({error})")),
        };
        let is_hidden = is_hidden(path);
        let file = |stat, (content, is_plain)| {
            let place = StorePath { root: 0, path: path.to_path_buf() };
            ScannedFile { place, stat, content, is_plain, is_hidden }
        };
        if let Some(seen) = seen(self.ways.known, &stat) {
            return files.push(file(stat, seen));
        }
        match self.look(directory, name, path) {
            Ok(Some((stat, seen))) => files.push(file(stat, seen)),
            Ok(None) => {}
            Err(error) if self.is_exhausted(&error) => {}
            Err(error) => {
                // By its name it is a disk all the same.
                if has_extension(path, "raw") {
                    files.push(file(stat, (DetectedContent::Unseen, false)));
                }
                if stat.size >= MIN_HEADER_LEN {
                    self.unread(path.to_path_buf(), format!("cannot be read ({error})"));
                } else {
                    self.problem(path.to_path_buf(), format!("cannot be read: {error}"));
                }
            }
        }
    }

    fn look(
        &self,
        directory: &dyn OpenDirectory,
        name: &std::ffi::OsStr,
        path: &Path,
    ) -> Result<Option<(ObjectStat, (DetectedContent, bool))>> {
        let Some(file) = directory.open_entry(name)? else { return Ok(None) };
        let stat = file.stat()?;
        let content = describe(&*file, stat.size)?;
        let is_plain = recall(self.ways, &*file, path, &stat, &content);
        Ok(Some((stat, (content, is_plain))))
    }
}

/// The known result for a file that has not changed since.
fn seen(known: &KnownFiles, stat: &ObjectStat) -> Option<(DetectedContent, bool)> {
    let seen = known.get(&stat.id).filter(|seen| seen.stat.version == stat.version)?;
    // A file that could not be opened is tried again.
    (!matches!(seen.content, DetectedContent::Unseen)).then(|| (seen.content.clone(), seen.is_plain))
}

/// Whether a file has once been seen without the magic; one that is seen so now is recorded. An empty file is
/// undecided yet, and the name of a qcow2 image decides its format.
fn recall(
    ways: &ScanContext<'_>,
    file: &dyn OpenObject,
    path: &Path,
    stat: &ObjectStat,
    content: &DetectedContent,
) -> bool {
    if stat.size == 0 || has_extension(path, "qcow2") {
        return false;
    }
    let trace = PlainFile { number: stat.id.number(), birth: birth_of(file), path: ways.prefix.join(path) };
    let mut plain = ways.plain.lock();
    let is_plain = plain.knows(&trace);
    if matches!(content, DetectedContent::Plain) {
        plain.note(trace);
    }
    is_plain || matches!(content, DetectedContent::Plain)
}

/// Whether a name on the path is one of chainfs' own.
fn is_hidden(path: &Path) -> bool {
    path.iter().any(|name| name.as_bytes().starts_with(OWN_PREFIX))
}

/// The entries of a directory, and its version before they were listed. A file that is renamed during the
/// listing may be found under neither name, and its chain would be gone until the next scan: a directory that
/// changes is listed again, and every name counts that was found.
fn list_still(directory: &dyn OpenDirectory) -> Result<(Vec<DirEntry>, ObjectVersion)> {
    let mut before = directory.version()?;
    let mut entries = directory.list()?;
    for _ in 1..LISTINGS {
        let after = directory.version()?;
        if after == before {
            break;
        }
        before = after;
        entries.append(&mut directory.list()?);
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries.dedup_by(|a, b| a.name == b.name);
    }
    Ok((entries, before))
}

/// Removes files from the list that were found under two names and have lost one of them since: a file that
/// is renamed during a scan is not two.
fn drop_former_names(directory: &dyn OpenDirectory, files: &mut Vec<ScannedFile>) {
    let names = name_counts(files);
    files.retain(|file| {
        let name = file.place.path.file_name().unwrap_or_default();
        names[&file.stat.id] == 1 || directory.stat_entry(name).is_ok_and(|found| found.is_some())
    });
}

fn name_counts(files: &[ScannedFile]) -> HashMap<ObjectId, usize> {
    let mut names = HashMap::new();
    for file in files {
        *names.entry(file.stat.id).or_default() += 1;
    }
    names
}

/// Describes one file that a header or the user has named. `None` for a file that is no image.
pub(super) fn describe_place(
    root: &dyn Backend,
    place: &StorePath,
    ways: &ScanContext<'_>,
) -> Result<ScannedFile> {
    let file = root.open_file(&place.path)?;
    let stat = file.stat()?;
    let (content, is_plain) = if let Some(seen) = seen(ways.known, &stat) {
        seen
    } else {
        let content = describe(&*file, stat.size)?;
        // Files outside of the store are not recorded there.
        let is_plain = place.root == 0 && recall(ways, &*file, &place.path, &stat, &content);
        (content, is_plain)
    };
    Ok(ScannedFile { place: place.clone(), stat, content, is_plain, is_hidden: false })
}

/// Whether the name indicates a disk image.
pub(super) fn looks_like_image(path: &Path) -> bool {
    ["qcow2", "raw", "img"].iter().any(|extension| has_extension(path, extension))
}

/// The known results of these files, shared.
pub(super) fn known_of<'a>(files: impl IntoIterator<Item = &'a ScannedFile>) -> Arc<KnownFiles> {
    let seen = |file: &ScannedFile| KnownFile {
        stat: file.stat,
        content: file.content.clone(),
        is_plain: file.is_plain,
    };
    Arc::new(files.into_iter().map(|file| (file.stat.id, seen(file))).collect())
}
