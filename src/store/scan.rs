//! A store's directory becomes a list of files, each with its own word.
//!
//! Directories are walked and files described by as many threads as there are processors. A file
//! whose signature has not changed since the last scan is not opened again; one whose name says
//! that it is raw is not opened at all. Other mounts are entered, except those of chainfs.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use parking_lot::{Condvar, Mutex};
use rustix::fs::{AtFlags, statat};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{DirEntry, EntryKind, FileId, FileStat, Root};

use super::describe::{Content, describe};
use super::leftovers::is_draft;
use super::names::OWN_PREFIX;
use super::resolve::Place;

/// A file that may be an image.
#[derive(Clone, Debug)]
pub(super) struct ScannedFile {
    /// Where it is.
    pub place: Place,
    /// Its attributes.
    pub stat: FileStat,
    /// What it says of itself.
    pub content: Content,
}

/// Something that could not be shown, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// The file, beneath the store.
    pub path: PathBuf,
    /// What is wrong and what to do, to follow the file's name.
    pub sentence: String,
}

/// All that a scan found.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Files in no particular order.
    pub files: Vec<ScannedFile>,
    /// What could not be looked at.
    pub problems: Vec<Problem>,
    /// Drafts of images.
    pub drafts: Vec<PathBuf>,
    /// What could not be read: whatever it says of other images is not known.
    pub unread: Vec<PathBuf>,
    /// Files that are looked at besides, because a command has named them.
    pub introduced: Vec<Place>,
}

/// What the last scan knew of each file.
pub(super) type Known = HashMap<FileId, (FileStat, Content)>;

/// How the names of files end that a commit has left and that show nothing any more.
pub const SPOILT: &str = "invalid";
/// How often a directory is listed that does not keep still.
const LISTINGS: usize = 8;
/// Directories below each other, at most; deeper ones are a problem.
const MAX_NESTING: usize = 64;

/// Threads that walk at the same time, at most: each has a few directories and files open.
const MAX_THREADS: usize = 8;

struct Work<'a> {
    root: &'a Root,
    known: &'a Known,
    /// Told of every directory before it is listed, so that no change falls between.
    visit: &'a (dyn Fn(&Path, &OwnedFd) + Sync),
    /// Directories to be listed, and how many are being listed now.
    queue: Mutex<(Vec<PathBuf>, usize)>,
    changed: Condvar,
    found: Mutex<Scan>,
    /// Why nothing of this scan can be believed.
    failed: Mutex<Option<Error>>,
}

/// Walks the whole store. `Exhausted` if the system has run out of something: what could not be looked at for that is no
/// fact about the store.
pub(super) fn scan(root: &Root, known: &Known, visit: &(dyn Fn(&Path, &OwnedFd) + Sync)) -> Result<Scan> {
    let work = Work {
        root,
        known,
        visit,
        queue: Mutex::new((vec![PathBuf::new()], 0)),
        changed: Condvar::new(),
        found: Mutex::new(Scan::default()),
        failed: Mutex::default(),
    };
    let threads = thread::available_parallelism().map_or(2, usize::from).min(MAX_THREADS);
    thread::scope(|scope| {
        for _ in 1..threads {
            // Where there can be no more threads, there are fewer that work.
            if thread::Builder::new().name("scan".into()).spawn_scoped(scope, || work.run()).is_err() {
                break;
            }
        }
        work.run();
    });
    match work.failed.into_inner() {
        Some(error) => Err(error),
        None => Ok(work.found.into_inner()),
    }
}

impl Work<'_> {
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

    /// Whether it is for want of something that `error` says a thing cannot be read: then the scan comes to nothing.
    fn is_exhausted(&self, error: &Error) -> bool {
        let is_exhausted = error.kind() == ErrorKind::Exhausted;
        if is_exhausted {
            self.failed.lock().get_or_insert_with(|| error.clone());
            self.queue.lock().0.clear();
        }
        is_exhausted
    }

    fn unread(&self, path: PathBuf, sentence: String) {
        // Of every file system that is a store itself, and nobody's but root's.
        if path.file_name().is_none_or(|name| name != "lost+found") {
            self.found.lock().unread.push(path.clone());
        }
        self.problem(path, sentence);
    }

    fn list(&self, path: &Path) {
        let fd = match self.open(path) {
            Ok(Some(fd)) => fd,
            Ok(None) => return,
            Err(error) if self.is_exhausted(&error) => return,
            Err(error) => return self.unread(path.to_path_buf(), format!("cannot be listed: {error}")),
        };
        (self.visit)(path, &fd);
        let entries = match list_still(&fd) {
            Ok(entries) => entries,
            Err(error) if self.is_exhausted(&error) => return,
            Err(error) => return self.unread(path.to_path_buf(), format!("cannot be listed: {error}")),
        };
        let mut files = Vec::new();
        for DirEntry { name, kind } in entries {
            let place = path.join(&name);
            if name.as_bytes().starts_with(OWN_PREFIX) {
                if is_draft(Path::new(&name)) && kind == EntryKind::File {
                    self.found.lock().drafts.push(place);
                }
                continue;
            }
            if has_extension(&place, SPOILT) {
                continue;
            }
            match kind {
                EntryKind::Directory if place.components().count() > MAX_NESTING => {
                    self.problem(place, format!("lies more than {MAX_NESTING} directories deep; mount it on its own"));
                }
                EntryKind::Directory => self.push(place),
                EntryKind::File => match self.file(&fd, &name, &place) {
                    Ok(file) => files.extend(file),
                    Err(error) if self.is_exhausted(&error) => return,
                    Err(error) => self.unread(place, format!("cannot be read: {error}")),
                },
                EntryKind::Symlink => self.link(place),
                EntryKind::Other if looks_like_image(&place) => {
                    self.problem(place, "is not a regular file, and is not opened; remove or rename it".into());
                }
                EntryKind::Other => {}
            }
        }
        drop_former_names(&fd, &mut files);
        self.found.lock().files.append(&mut files);
    }

    fn push(&self, directory: PathBuf) {
        self.queue.lock().0.push(directory);
        self.changed.notify_one();
    }

    /// Opens a directory, also one on another file system, but never one of a chainfs mount: that
    /// may be our own, which cannot answer before the scan is done.
    fn open(&self, path: &Path) -> Result<Option<OwnedFd>> {
        match self.root.open_directory(path, false)? {
            Some(fd) => Ok(Some(fd)),
            None if is_chainfs_mount(&self.root.canonical().join(path)) => Ok(None),
            None => self.root.open_directory(path, true),
        }
    }

    fn file(&self, directory: &OwnedFd, name: &std::ffi::OsStr, path: &Path) -> Result<Option<ScannedFile>> {
        let place = Place { root: 0, path: path.to_path_buf() };
        // The attributes are asked for without opening, for most files have been seen before.
        let Ok(stat) = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) else { return Ok(None) };
        let stat = FileStat::from(stat);
        if let Some((old, content)) = self.known.get(&stat.id)
            && old.signature == stat.signature
        {
            return Ok(Some(ScannedFile { place, stat, content: content.clone() }));
        }
        if has_extension(path, "raw") {
            return Ok(Some(ScannedFile { place, stat, content: Content::Unseen }));
        }
        let Some(file) = Root::open_entry(directory, name)? else { return Ok(None) };
        let stat = FileStat::of(&file)?;
        let content = describe(&file, stat.signature.size)?;
        Ok(Some(ScannedFile { place, stat, content }))
    }

    /// A link is another name, not another image. One that leads nowhere we may go is worth a word
    /// if its name says that somebody expects an image there.
    fn link(&self, path: PathBuf) {
        if looks_like_image(&path)
            && let Err(error) = self.root.stat(&path)
            && !self.is_exhausted(&error)
        {
            let sentence = format!("is a symbolic link that cannot be followed: {error}; put the file itself here");
            self.problem(path, sentence);
        }
    }
}

/// The entries of a directory. What is renamed while it is listed may be met under neither name, and its chain would be
/// gone until the next scan: one that does not keep still is listed again, and every name counts that was met.
fn list_still(directory: &OwnedFd) -> Result<Vec<DirEntry>> {
    let mut before = FileStat::of(directory)?.signature;
    let mut entries = Root::list(directory)?;
    for _ in 1..LISTINGS {
        let after = FileStat::of(directory)?.signature;
        if after == before {
            break;
        }
        before = after;
        entries.append(&mut Root::list(directory)?);
        entries.sort_by(|a, b| a.name.cmp(&b.name));
        entries.dedup_by(|a, b| a.name == b.name);
    }
    Ok(entries)
}

/// Of files that were met under two names, those that have lost one of them since: a file that is renamed while its
/// directory is looked at is not two.
fn drop_former_names(directory: &OwnedFd, files: &mut Vec<ScannedFile>) {
    let mut names: HashMap<FileId, usize> = HashMap::new();
    for file in files.iter() {
        *names.entry(file.stat.id).or_default() += 1;
    }
    files.retain(|file| {
        let name = file.place.path.file_name().unwrap_or_default();
        names[&file.stat.id] == 1 || statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).is_ok()
    });
}

/// Describes one file that a header or the user has named. `None` for a file that is no image.
pub(super) fn describe_place(root: &Root, place: &Place, known: &Known) -> Result<ScannedFile> {
    let file = root.open_file(&place.path)?;
    let stat = FileStat::of(&file)?;
    let content = match known.get(&stat.id) {
        Some((old, content)) if old.signature == stat.signature && !matches!(content, Content::Unseen) => {
            content.clone()
        }
        _ => describe(&file, stat.signature.size)?,
    };
    Ok(ScannedFile { place: place.clone(), stat, content })
}

/// Whether `path` ends in `.extension`, in any case.
pub(super) fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension))
}

/// Whether somebody who chose this name means a disk image.
pub(super) fn looks_like_image(path: &Path) -> bool {
    ["qcow2", "raw", "img"].iter().any(|extension| has_extension(path, extension))
}

/// Whether a mount of chainfs is what one sees at `path`.
fn is_chainfs_mount(path: &Path) -> bool {
    crate::io::mounts().is_ok_and(|mounts| {
        mounts.iter().rfind(|mount| mount.directory == path).is_some_and(|mount| mount.kind == crate::io::OWN_KIND)
    })
}

/// A path by which inotify finds an open directory, wherever it has been moved.
pub(super) fn by_descriptor(fd: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Shared by those who follow [`Known`].
pub(super) fn known_of<'a>(files: impl IntoIterator<Item = &'a ScannedFile>) -> Arc<Known> {
    Arc::new(files.into_iter().map(|file| (file.stat.id, (file.stat, file.content.clone()))).collect())
}
