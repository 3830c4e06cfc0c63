//! The store's trash: layers that a command has removed although they are still valid.
//!
//! `.chainfs/trash/ID` is the file, `.chainfs/trash/ID.toml` its note. Promises: the trash never blocks a
//! command, and is no part of any chain. An item is restored only onto its own backing files, and only if
//! these were not written except by commands that kept its bytes; else the reason is reported. An item that
//! would become invalid, because a command changes or removes a layer below it, is removed before that. A
//! note is durable before its file is moved, and is removed after it. A file that cannot be moved to the
//! trash is not removed.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::image::{HeaderChange, change_header};
use crate::io::{
    EntryKind, Existing, Identity, MountPoints, ObjectId, ObjectStat, Timestamp, directory_of, read_text,
};

use super::Store;
use super::catalog::{Catalog, ImageEntry, ImageIndex};
use super::encoded;
use super::evidence::FileRef;
use super::evidence::identity;
use super::file_names::shown;
use super::freeze_list::write;
use super::leftovers::DRAFT;
use super::options::Format;

/// The directory, relative to the store.
pub(super) const TRASH: &str = ".chainfs/trash";
/// The suffix of notes.
const NOTE: &str = "toml";
/// Longer files are no notes.
const MAX_LEN: u64 = 64 << 10;
/// Maximum number of notes that are read.
const MAX_ITEMS: usize = 1 << 16;

/// The note of a removed layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TrashRecord {
    /// Its former path, relative to the guarded directory.
    #[serde(with = "encoded")]
    path: PathBuf,
    /// When it was removed: seconds since 1970.
    seconds: u64,
    /// The command that removed it.
    command: String,
    /// Its format: another name may imply another format.
    is_raw: bool,
    /// Its backing file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backing: Option<FileRef>,
    /// All layers below it, top first, as of its removal.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    below: Vec<TrashBacking>,
}

/// A file below a layer of the trash: a write changes these fields.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct TrashBacking {
    #[serde(with = "identity")]
    file: Identity,
    size: u64,
    /// Of its last modification: seconds since 1970, and nanoseconds of that second.
    seconds: i64,
    nanoseconds: u32,
}

impl TrashBacking {
    fn of(file: Identity, stat: &ObjectStat) -> Self {
        let Timestamp { seconds, nanoseconds } = stat.modified;
        Self { file, size: stat.size, seconds, nanoseconds }
    }

    fn looks_like(&self, stat: &ObjectStat) -> bool {
        let Timestamp { seconds, nanoseconds } = stat.modified;
        (self.size, self.seconds, self.nanoseconds) == (stat.size, seconds, nanoseconds)
    }
}

/// A layer in the trash.
#[derive(Clone, Debug)]
pub struct TrashItem {
    /// Its name in the trash.
    pub id: String,
    /// Its former path, relative to the store.
    pub path: PathBuf,
    /// When it was removed: seconds since 1970.
    pub seconds: u64,
    /// The command that removed it.
    pub command: String,
    /// Bytes of its file on disk.
    pub disk_len: u64,
    /// Why it is invalid, or why that is unknown, if so.
    pub problem: Option<String>,
    identity: Identity,
    /// None if the note cannot be read.
    note: Option<TrashRecord>,
}

impl TrashItem {
    fn backing(&self) -> Option<&FileRef> {
        self.note.as_ref()?.backing.as_ref()
    }

    /// Its file, relative to the guarded directory.
    pub(crate) fn file(&self) -> PathBuf {
        Path::new(TRASH).join(&self.id)
    }
}

impl Store {
    /// Whether removed layers go to the trash that lie where `file` does: not from another file system than
    /// that of the store's own directory.
    pub(crate) fn keeps_trash(&self, file: ObjectId) -> bool {
        // If that is unknown, the error prevents the removal.
        let is_near = || self.guard.root.stat(Path::new(".")).map_or(true, |own| own.id.is_near(file));
        self.options.trash.is_some() && self.guard.is_marked() && is_near()
    }

    /// Whether removed layers go to the trash at all.
    pub(crate) fn has_trash(&self) -> bool {
        self.options.trash.is_some() && self.guard.is_marked()
    }

    /// Whether a copy of an image that shares its blocks can be kept, as far as its file system shows.
    pub(crate) fn can_keep_copy(&self, image: &ImageEntry) -> bool {
        let is_near = self.keeps_trash(image.stat.id) && image.place.root == 0 && image.data_file.is_none();
        is_near && self.guard.root.shares_blocks()
    }

    /// The items of the trash, oldest first. Notes without a file are ignored; a file without a readable note
    /// is an item with a problem.
    pub fn trash(&self) -> Result<Vec<TrashItem>> {
        let root = &self.guard.root;
        self.guard.check_trust()?;
        let directory = match root.open_directory(Path::new(TRASH), MountPoints::Enter) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            opened => opened?,
        };
        let Some(directory) = directory else { return Ok(Vec::new()) };
        let mut items = Vec::new();
        for entry in directory.list()?.into_iter().take(MAX_ITEMS) {
            let path = Path::new(TRASH).join(&entry.name);
            if entry.kind != EntryKind::File || path.extension().is_some() {
                continue;
            }
            let id = entry.name.to_string_lossy().into_owned();
            let (stat, identity) = match root.stat(&path).and_then(|stat| Ok((stat, root.identify(&path)?))) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                found => found?,
            };
            let disk_len = stat.blocks * 512;
            items.push(match self.note(&path.with_extension(NOTE)) {
                Ok(note) => {
                    let (path, command) = (note.path.clone(), note.command.clone());
                    let seconds = note.seconds;
                    TrashItem {
                        id,
                        path,
                        seconds,
                        command,
                        disk_len,
                        problem: None,
                        identity,
                        note: Some(note),
                    }
                }
                Err(error) => {
                    let problem = format!("its note cannot be read ({error}); see for yourself what it is");
                    let seconds = stat.modified.seconds.max(0).cast_unsigned();
                    let (command, problem) = (String::new(), Some(problem));
                    TrashItem { id, path, seconds, command, disk_len, problem, identity, note: None }
                }
            });
        }
        items.sort_by(|a, b| (a.seconds, &a.id).cmp(&(b.seconds, &b.id)));
        let catalog = self.catalog();
        let problems: Vec<_> = items.iter().map(|item| self.doubt(&catalog, &items, item)).collect();
        for (item, problem) in items.iter_mut().zip(problems) {
            item.problem = item.problem.take().or(problem);
        }
        Ok(items)
    }

    fn note(&self, path: &Path) -> Result<TrashRecord> {
        let file = self.guard.root.open_file(path)?;
        let text =
            read_text(&*file, MAX_LEN).map_err(|error| error.within(format!("reading {}", shown(path))))?;
        toml::from_str(&text).map_err(|error| Error::new(ErrorKind::Corrupt, error.message().to_owned()))
    }

    /// Why an item is invalid, or why that is unknown, if so. Its backing file may be in the trash, too.
    fn doubt(&self, catalog: &Catalog, items: &[TrashItem], item: &TrashItem) -> Option<String> {
        let note = item.note.as_ref()?;
        let backing = note.backing.as_ref()?;
        let name = shown(&backing.path);
        let Some(index) = find(self, catalog, backing) else {
            let is_below = |other: &&TrashItem| other.identity.is(&backing.file);
            return match items.iter().find(is_below) {
                Some(_) => None,
                None => Some(format!("its backing file {name} is missing, or another file by now")),
            };
        };
        let layers = catalog.layers(index);
        let is_as_it_was = |index: &&ImageIndex| {
            let image = &catalog.images[**index];
            let now = self.stat_now(image);
            note.below.iter().any(|below| below.file.id() == image.stat.id && below.looks_like(&now))
        };
        let written = layers.iter().find(|index| !is_as_it_was(index))?;
        let name = catalog.images[*written].shown();
        Some(format!("its backing file {name} has been written since: it may show other bytes"))
    }

    /// The layers below an image, as they are now.
    fn below(&self, catalog: &Catalog, backing: Option<&FileRef>) -> Vec<TrashBacking> {
        let index = backing.and_then(|backing| find(self, catalog, backing));
        let layers = index.map(|index| catalog.layers(index)).unwrap_or_default();
        let look = |index: &ImageIndex| {
            let image = &catalog.images[*index];
            let file = self.roots[image.place.root].identify(&image.place.path);
            // A file that cannot be checked is unknown later as well, and then the item has a problem.
            let file = file.unwrap_or(Identity::of_id(image.stat.id));
            TrashBacking::of(file, &self.stat_now(image))
        };
        layers.iter().map(look).collect()
    }

    /// Moves the file at `at` into the trash, durably: it was at `path` (both relative to the guarded
    /// directory), and is backed by `backing`. If that is impossible the file stays. Under the store's lock.
    pub(crate) fn put_into_trash(
        &self,
        catalog: &Catalog,
        at: &Path,
        path: &Path,
        says: (&str, bool),
        backing: Option<&FileRef>,
    ) -> Result<()> {
        let names = self.guard_names();
        let number = self.guard.root.stat(at)?.id.number();
        let put = self.write_note(catalog, number, path, says, backing).and_then(|item| {
            names.rename(at, &item, Existing::Refuse).inspect_err(|_| {
                let _ = names.unlink(&item.with_extension(NOTE));
            })
        });
        put.map_err(|error| {
            let fact = "could not be moved to the trash, and stays where it is";
            Error::new(error.kind(), format!("{} {fact}: {error}", shown(at)))
        })?;
        names.sync(Path::new(TRASH))?;
        names.sync(&directory_of(at))
    }

    /// Writes the note of a new item; returns the item's path.
    fn write_note(
        &self,
        catalog: &Catalog,
        number: u64,
        path: &Path,
        (command, is_raw): (&str, bool),
        backing: Option<&FileRef>,
    ) -> Result<PathBuf> {
        let names = self.guard_names();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let item = Path::new(TRASH).join(format!("{:x}-{number:x}", now.as_nanos()));
        let note = item.with_extension(NOTE);
        let says = TrashRecord {
            path: path.to_path_buf(),
            seconds: now.as_secs(),
            command: command.to_owned(),
            is_raw,
            backing: backing.cloned(),
            below: self.below(catalog, backing),
        };
        let text = toml::to_string(&says).map_err(|error| {
            Error::new(ErrorKind::Unsupported, format!("{} cannot be recorded: {error}", shown(path)))
        })?;
        let written = self.guard.in_place(&*names, || {
            names.create_directory(Path::new(TRASH))?;
            names.sync(&directory_of(Path::new(TRASH)))?;
            let file = names.create(&note, None)?;
            file.write_at(0, text.as_bytes())?;
            file.sync()?;
            names.sync(Path::new(TRASH))
        });
        if let Err(error) = written {
            if error.kind() != ErrorKind::Exists {
                let _ = names.unlink(&note);
            }
            return Err(error);
        }
        Ok(item)
    }

    /// Puts a copy of the image into the trash that shares its blocks with it, before a command changes it.
    /// `None`: the file system cannot share blocks, and nothing is kept. Returns its name in the trash. Under
    /// the store's lock.
    pub(crate) fn keep_copy(
        &self,
        catalog: &Catalog,
        index: ImageIndex,
        command: &str,
    ) -> Result<Option<String>> {
        let image = &catalog.images[index];
        if image.place.root != 0 || image.data_file.is_some() || !self.keeps_trash(image.stat.id) {
            return Ok(None);
        }
        let (names, root) = (self.guard_names(), &self.guard.root);
        let path = self.guard.prefix.join(&image.place.path);
        let backing = image.below.image().map(|below| self.known(&catalog.images[below]));
        let is_raw = image.format == Some(Format::Raw);
        let item =
            self.write_note(catalog, image.stat.id.number(), &path, (command, is_raw), backing.as_ref())?;
        let copied = (|| {
            names.create(&item, Some(&path))?;
            let (from, to) = (root.open_file(&path)?, root.open_file_for_writing(&item)?);
            if !to.share_all_of(&*from) {
                return Ok(false);
            }
            to.sync()?;
            names.sync(Path::new(TRASH)).map(|()| true)
        })();
        if !matches!(copied, Ok(true)) {
            let _ = names.unlink(&item);
            let _ = names.unlink(&item.with_extension(NOTE));
        }
        let id = item.file_name().unwrap_or_default().to_string_lossy().into_owned();
        copied.map(|is_copied| is_copied.then_some(id))
    }

    /// An image by its path relative to the guarded directory and by its identity.
    fn known(&self, image: &ImageEntry) -> FileRef {
        let path = match image.place.root {
            0 => self.guard.prefix.join(&image.place.path),
            _ => self.host_path(&image.place),
        };
        let found = self.roots[image.place.root].identify(&image.place.path);
        FileRef::known(path, found.unwrap_or(Identity::of_id(image.stat.id)))
    }

    /// Notes for items backed by a file in the trash that a command has written it and left what it shows as
    /// it was.
    pub(super) fn touched(&self, file: ObjectId, before: &ObjectStat, after: &ObjectStat) {
        if before.version == after.version || self.guard.root.stat(Path::new(TRASH)).is_err() {
            return;
        }
        let _turn = self.trash_notes.lock();
        let noted = self.trash().and_then(|items| {
            for mut item in items {
                let Some(note) = &mut item.note else { continue };
                let is_it = |below: &&mut TrashBacking| below.file.id() == file && below.looks_like(before);
                let Some(below) = note.below.iter_mut().find(is_it) else { continue };
                *below = TrashBacking::of(below.file, after);
                let text = toml::to_string(note);
                let text = text.map_err(|error| Error::new(ErrorKind::Unsupported, error.to_string()))?;
                let path = item.file().with_extension(NOTE);
                write(&*self.guard_names(), &path.with_extension(DRAFT), &path, &text)?;
            }
            Ok(())
        });
        if let Err(error) = noted {
            tracing::warn!("could not update the trash, so its items will be reported as doubtful: {error}");
        }
    }

    /// Restores a layer of the trash as a snapshot without overlays, to its former path or to the file `name`
    /// in the same directory. Returns its path, relative to the guarded directory.
    pub fn restore(self: &Arc<Self>, id: &str, name: Option<&OsStr>) -> Result<PathBuf> {
        let _lock = self.guard.lock(&*self.guard_names())?;
        self.rescan()?;
        let item = self.item(id)?;
        let path = match name {
            Some(name)
                if Path::new(name).components().count() != 1 || Path::new(name).file_name() != Some(name) =>
            {
                let fact = format!("{} is no name of a file", shown(Path::new(name)));
                return Err(Error::new(ErrorKind::Usage, fact));
            }
            Some(name) => item.path.with_file_name(name),
            None => item.path.clone(),
        };
        // T1: not if a layer below was replaced, or written by another process.
        if let Some(problem) = &item.problem {
            let fact = "cannot be restored unchanged";
            let remedy = format!("take the file itself, {}, if it is of use", shown(&item.file()));
            return Err(Error::new(ErrorKind::Stale, format!("{id} {fact}: {problem}; {remedy}")));
        }
        let is_raw = item.note.as_ref().is_some_and(|note| note.is_raw);
        let format = if is_raw { Format::Raw } else { Format::Qcow2 };
        if !self.options.reads_as(&path, format, false) {
            let fact = format!("would not be read as {} by that name; choose another", format.name());
            return Err(Error::new(ErrorKind::Usage, format!("{} {fact}", shown(&path))));
        }
        match self.guard.root.stat(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error),
            Ok(_) => {
                let fact = "exists already; choose another name";
                return Err(Error::new(ErrorKind::Exists, format!("{} {fact}", shown(&path))));
            }
        }
        self.take_from_trash(&self.catalog(), &item, &path)?;
        self.rescan()?;
        self.freeze_restored(&path)?;
        Ok(path)
    }

    /// Sets the mark if it could not be set on removal.
    fn freeze_restored(self: &Arc<Self>, path: &Path) -> Result<()> {
        let catalog = self.catalog();
        let is_it =
            |image: &ImageEntry| image.place.root == 0 && self.guard.prefix.join(&image.place.path) == path;
        let Some(index) = catalog.images.iter().position(is_it) else { return Ok(()) };
        let image = &catalog.images[index];
        if image.frozen.is_some() || image.readonly || image.format != Some(Format::Qcow2) {
            return Ok(());
        }
        let job = self.take_image(&catalog, index)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mark =
            Frozen { seconds: now.as_secs().cast_signed(), nanoseconds: 0, description: String::new() };
        change_header(job.name(), &*job.file()?, &HeaderChange { backing: None, frozen: Some(Some(mark)) })?;
        job.finish()?;
        self.rescan().map(drop)
    }

    /// Removes layers from the trash for good: one, or all.
    pub fn empty_trash(&self, id: Option<&str>) -> Result<()> {
        let _lock = self.guard.lock(&*self.guard_names())?;
        let items = match id {
            Some(id) => vec![self.item(id)?],
            None => self.trash()?,
        };
        self.remove_from_trash(items.iter())
    }

    /// Removes an item that was put there in vain.
    pub(crate) fn forget_item(&self, id: &str) -> Result<()> {
        self.remove_from_trash(std::iter::once(&self.item(id)?))
    }

    fn item(&self, id: &str) -> Result<TrashItem> {
        self.trash()?.into_iter().find(|item| item.id == id).ok_or_else(|| {
            let fact = "is not in the trash; chainfs trash lists what is";
            Error::new(ErrorKind::NotFound, format!("{} {fact}", id.escape_debug()))
        })
    }

    fn take_from_trash(&self, catalog: &Catalog, item: &TrashItem, path: &Path) -> Result<()> {
        if let Some(backing) = item.backing()
            && find(self, catalog, backing).is_none()
        {
            let items = self.trash()?;
            let other = items.iter().find(|other| other.identity.is(&backing.file));
            let id = other.map_or("gone", |other| &other.id);
            let name = shown(&backing.path);
            let fact = "is in the trash as well; restore it first: it is";
            return Err(Error::new(ErrorKind::Stale, format!("its backing file {name} {fact} {id}")));
        }
        let names = self.guard_names();
        if item.note.as_ref().is_some_and(|note| note.is_raw) {
            // A raw file has no mark of its own, and no other file has that name.
            self.note_frozen(
                path,
                Some(&Frozen {
                    seconds: item.seconds.cast_signed(),
                    nanoseconds: 0,
                    description: String::new(),
                }),
            )?;
        }
        names.rename(&item.file(), path, Existing::Refuse)?;
        names.sync(&directory_of(path))?;
        names.sync(Path::new(TRASH))?;
        names.unlink(&item.file().with_extension(NOTE))?;
        names.sync(Path::new(TRASH))
    }

    /// Removes layers from the trash for good.
    pub(crate) fn remove_from_trash<'a>(&self, items: impl Iterator<Item = &'a TrashItem>) -> Result<()> {
        let (names, mut is_changed) = (self.guard_names(), false);
        for item in items {
            names.unlink(&item.file())?;
            names.sync(Path::new(TRASH))?;
            names.unlink(&item.file().with_extension(NOTE))?;
            is_changed = true;
        }
        if is_changed { names.sync(Path::new(TRASH)) } else { Ok(()) }
    }

    /// The items that would become invalid if any of these images were changed or removed.
    pub(crate) fn trash_on(&self, catalog: &Catalog, changed: &[ObjectId]) -> Result<Vec<TrashItem>> {
        let items = self.trash()?;
        let stands_on_changed = |item: &TrashItem| {
            let mut below = item.backing().cloned();
            // As many steps as there are items: a circular chain ends, too.
            for _ in 0..=items.len() {
                let Some(backing) = below.take() else { return false };
                if changed.contains(&backing.file.id()) {
                    return true;
                }
                if let Some(index) = find(self, catalog, &backing) {
                    return catalog
                        .layers(index)
                        .iter()
                        .any(|layer| changed.contains(&catalog.images[*layer].stat.id));
                }
                let Some(next) = items.iter().find(|other| other.identity.is(&backing.file)) else {
                    return false;
                };
                below = next.backing().cloned();
            }
            false
        };
        Ok(items.iter().filter(|item| stands_on_changed(item)).cloned().collect())
    }

    /// Removes items for good that are older than the user wants.
    pub fn sweep_trash(&self) -> Result<()> {
        let Some(days) = self.options.trash.filter(|_| !self.options.read_only) else { return Ok(()) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // The origin of a file without a note is unknown.
        let is_old = |item: &TrashItem| {
            item.note.is_some() && now.saturating_sub(Duration::from_secs(item.seconds)) > days
        };
        if !self.trash()?.iter().any(is_old) {
            return Ok(());
        }
        let _lock = self.guard.lock(&*self.guard_names())?;
        let items = self.trash()?;
        let old: Vec<&TrashItem> = items.iter().filter(|item| is_old(item)).collect();
        for item in &old {
            tracing::info!("removed {} from the trash for good ({})", shown(&item.path), item.command);
        }
        self.remove_from_trash(old.into_iter())
    }
}

fn find(store: &Store, catalog: &Catalog, named: &FileRef) -> Option<ImageIndex> {
    catalog.images.iter().position(|image| image.stat.id == named.file.id() && store.known(image).is(named))
}
