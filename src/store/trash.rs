//! The store's trash: layers that a command has removed although they still show what they did.
//!
//! `.chainfs/trash/ID` is the file, `.chainfs/trash/ID.toml` says what it was. Promises: what is in the trash keeps no
//! command from anything, and is no part of any chain; it is restored only onto the very file on which it stood; and
//! what would show something else, because a command changes or removes what lies below it, goes before that. A note
//! is durable before its file comes, and goes after it.

use std::ffi::OsStr;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::image::{HeaderChange, change_header};
use crate::io::{EntryKind, Root, directory_of};

use super::Store;
use super::catalog::{Catalog, ImageEntry, ImageIndex, shown};
use super::intents::{Named, encoded};
use super::options::Format;

/// Where it is, beneath the store.
const TRASH: &str = ".chainfs/trash";
/// Longer notes are not ours.
const MAX_LEN: u64 = 64 << 10;
/// Notes that are read, at most.
const MAX_ITEMS: usize = 1 << 16;

/// What the note of a removed layer says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Note {
    /// Where it was, beneath the guarded directory.
    #[serde(with = "encoded")]
    path: PathBuf,
    /// When it was removed: seconds since 1970.
    seconds: u64,
    /// The command that removed it.
    command: String,
    /// What it is read as: another name may mean another format.
    is_raw: bool,
    /// What it stands on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    backing: Option<Named>,
}

/// A layer in the trash.
#[derive(Clone, Debug)]
pub struct TrashItem {
    /// By which it is called.
    pub id: String,
    /// Where it was, beneath the store.
    pub path: PathBuf,
    /// When it was removed: seconds since 1970.
    pub seconds: u64,
    /// The command that removed it.
    pub command: String,
    /// Bytes of its file on disk.
    pub disk_len: u64,
    inode: u64,
    is_raw: bool,
    backing: Option<Named>,
}

impl TrashItem {
    /// Its file, beneath the guarded directory.
    pub(crate) fn file(&self) -> PathBuf {
        Path::new(TRASH).join(&self.id)
    }
}

impl Store {
    /// Whether removed layers that lie on the file system `device` go to the trash: not from another one than the
    /// store's own directory.
    pub(crate) fn keeps_trash(&self, device: u64) -> bool {
        let is_near = || self.guard.root.stat(Path::new(".")).is_ok_and(|own| own.id.device == device);
        self.options.trash.is_some() && self.guard.is_marked() && is_near()
    }

    /// What is in the trash, oldest first. Notes without a file, and files without a note, are none.
    pub fn trash(&self) -> Result<Vec<TrashItem>> {
        let root = &self.guard.root;
        self.guard.check_trust()?;
        let directory = match root.open_directory(Path::new(TRASH), true) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            opened => opened?,
        };
        let Some(directory) = directory else { return Ok(Vec::new()) };
        let mut items = Vec::new();
        for entry in Root::list(&directory)?.into_iter().take(MAX_ITEMS) {
            let path = Path::new(TRASH).join(&entry.name);
            let Some(id) = path.file_stem().and_then(|stem| stem.to_str()).map(str::to_owned) else { continue };
            if entry.kind != EntryKind::File || path.extension().is_none_or(|extension| extension != "toml") {
                continue;
            }
            let Ok(stat) = root.stat(&path.with_extension("")) else { continue };
            let mut text = String::new();
            let read =
                root.open_file(&path).map(|file| std::fs::File::from(file).take(MAX_LEN).read_to_string(&mut text));
            let Ok(Note { path, seconds, command, is_raw, backing }) = toml::from_str(&text) else {
                tracing::warn!(
                    "{}: a note of the trash makes no sense{}",
                    shown(&path),
                    read.err().map_or_else(String::new, |error| format!(": {error}"))
                );
                continue;
            };
            let (disk_len, inode) = (stat.blocks * 512, stat.id.inode);
            items.push(TrashItem { id, path, seconds, command, disk_len, inode, is_raw, backing });
        }
        items.sort_by(|a, b| (a.seconds, &a.id).cmp(&(b.seconds, &b.id)));
        Ok(items)
    }

    /// Puts the file at `at` into the trash, durably: it was at `path` (both beneath the guarded directory), and stands
    /// on `backing`. Where that cannot be done, it is removed for good: who has asked for that is not to be kept from
    /// it. Under the store's lock.
    pub(crate) fn put_into_trash(
        &self,
        at: &Path,
        path: &Path,
        (command, is_raw): (&str, bool),
        backing: Option<Named>,
    ) -> Result<()> {
        let names = self.guard_names();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let inode = self.guard.root.stat(at)?.id.inode;
        let item = Path::new(TRASH).join(format!("{:x}-{inode:x}", now.as_nanos()));
        let note = item.with_extension("toml");
        let put = (|| {
            names.create_directory(Path::new(TRASH))?;
            names.sync(&directory_of(Path::new(TRASH)))?;
            let says =
                Note { path: path.to_path_buf(), seconds: now.as_secs(), command: command.to_owned(), is_raw, backing };
            let text = toml::to_string(&says).map_err(|error| {
                Error::new(ErrorKind::Unsupported, format!("{} cannot be noted: {error}", shown(path)))
            })?;
            let file = names.create(&note, None)?;
            file.write_at(0, text.as_bytes())?;
            file.sync()?;
            names.sync(Path::new(TRASH))?;
            names.rename(at, &item, false)
        })();
        if let Err(error) = put {
            tracing::warn!("{} is removed for good, for it cannot be put into the trash: {error}", shown(path));
            let _ = names.unlink(&note);
            return names.unlink(at);
        }
        names.sync(Path::new(TRASH))?;
        names.sync(&directory_of(at))
    }

    /// Gives a layer of the trash its place in the store again, as a snapshot that nothing stands on; as `name`, a
    /// file beside that, if it is to be called otherwise. Returns where it is, beneath the guarded directory.
    pub fn restore(self: &Arc<Self>, id: &str, name: Option<&OsStr>) -> Result<PathBuf> {
        let _lock = self.guard.lock(&*self.guard_names())?;
        self.rescan()?;
        let item = self.item(id)?;
        let path = match name {
            Some(name) if Path::new(name).components().count() != 1 || Path::new(name).file_name() != Some(name) => {
                let fact = format!("{} is no name of a file", shown(Path::new(name)));
                return Err(Error::new(ErrorKind::Usage, fact));
            }
            Some(name) => item.path.with_file_name(name),
            None => item.path.clone(),
        };
        let format = if item.is_raw { Format::Raw } else { Format::Qcow2 };
        if !self.options.reads_as(&path, format, false) {
            let fact = format!("would not be read as {} by that name; say another one", format.name());
            return Err(Error::new(ErrorKind::Usage, format!("{} {fact}", shown(&path))));
        }
        if self.guard.root.stat(&path).is_ok() {
            let fact = "is there already; say another name";
            return Err(Error::new(ErrorKind::Exists, format!("{} {fact}", shown(&path))));
        }
        self.take_from_trash(&self.catalog(), &item, &path)?;
        self.rescan()?;
        self.freeze_restored(&path)?;
        Ok(path)
    }

    /// What could not be marked when it was removed is marked now.
    fn freeze_restored(self: &Arc<Self>, path: &Path) -> Result<()> {
        let catalog = self.catalog();
        let is_it = |image: &ImageEntry| image.place.root == 0 && self.guard.prefix.join(&image.place.path) == path;
        let Some(index) = catalog.images.iter().position(is_it) else { return Ok(()) };
        let image = &catalog.images[index];
        if image.frozen.is_some() || image.readonly || image.format != Some(Format::Qcow2) {
            return Ok(());
        }
        let job = self.take_image(&catalog, index)?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mark = Frozen { seconds: now.as_secs().cast_signed(), nanoseconds: 0, description: String::new() };
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

    fn item(&self, id: &str) -> Result<TrashItem> {
        self.trash()?.into_iter().find(|item| item.id == id).ok_or_else(|| {
            let fact = "is not in the trash; chainfs trash lists what is";
            Error::new(ErrorKind::NotFound, format!("{} {fact}", id.escape_debug()))
        })
    }

    fn take_from_trash(&self, catalog: &Catalog, item: &TrashItem, path: &Path) -> Result<()> {
        if let Some(backing) = &item.backing
            && find(self, catalog, backing).is_none()
        {
            let fact = "is not there any more, or another file by now";
            let remedy = match self.trash()?.iter().find(|other| other.inode == backing.inode) {
                Some(other) => format!("restore it first: it is {} in the trash", other.id),
                None => "it cannot be restored".to_owned(),
            };
            let name = shown(&backing.path);
            return Err(Error::new(ErrorKind::Stale, format!("{name}, on which it stands, {fact}; {remedy}")));
        }
        let names = self.guard_names();
        if item.is_raw {
            // It cannot say it itself; nobody else is called that.
            self.note_frozen(
                path,
                Some(&Frozen { seconds: item.seconds.cast_signed(), nanoseconds: 0, description: String::new() }),
            )?;
        }
        names.rename(&item.file(), path, false)?;
        names.sync(&directory_of(path))?;
        names.sync(Path::new(TRASH))?;
        names.unlink(&item.file().with_extension("toml"))?;
        names.sync(Path::new(TRASH))
    }

    /// Removes layers from the trash for good.
    pub(crate) fn remove_from_trash<'a>(&self, items: impl Iterator<Item = &'a TrashItem>) -> Result<()> {
        let (names, mut is_changed) = (self.guard_names(), false);
        for item in items {
            names.unlink(&item.file())?;
            names.sync(Path::new(TRASH))?;
            names.unlink(&item.file().with_extension("toml"))?;
            is_changed = true;
        }
        if is_changed { names.sync(Path::new(TRASH)) } else { Ok(()) }
    }

    /// What in the trash would show something else if any of these images (by inode number) were changed or gone.
    pub(crate) fn trash_on(&self, catalog: &Catalog, changed: &[u64]) -> Result<Vec<TrashItem>> {
        let items = self.trash()?;
        let stands_on_changed = |item: &TrashItem| {
            let mut below = item.backing.clone();
            // As many steps as there are items: a file that stands on itself is met and left.
            for _ in 0..=items.len() {
                let Some(backing) = below.take() else { return false };
                if changed.contains(&backing.inode) {
                    return true;
                }
                if let Some(index) = find(self, catalog, &backing) {
                    return catalog
                        .layers(index)
                        .iter()
                        .any(|layer| changed.contains(&catalog.images[*layer].stat.id.inode));
                }
                let Some(next) = items.iter().find(|other| other.inode == backing.inode) else { return false };
                below.clone_from(&next.backing);
            }
            false
        };
        Ok(items.iter().filter(|item| stands_on_changed(item)).cloned().collect())
    }

    /// Removes for good what has been in the trash for longer than the user wants.
    pub fn sweep_trash(&self) -> Result<()> {
        let Some(days) = self.options.trash.filter(|_| !self.options.read_only) else { return Ok(()) };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let is_old = |item: &TrashItem| now.saturating_sub(Duration::from_secs(item.seconds)) > days;
        if !self.trash()?.iter().any(is_old) {
            return Ok(());
        }
        let _lock = self.guard.lock(&*self.guard_names())?;
        let items = self.trash()?;
        let old: Vec<&TrashItem> = items.iter().filter(|item| is_old(item)).collect();
        for item in &old {
            tracing::info!("removing {} from the trash for good ({})", shown(&item.path), item.command);
        }
        self.remove_from_trash(old.into_iter())
    }
}

fn find(store: &Store, catalog: &Catalog, named: &Named) -> Option<ImageIndex> {
    let path = |image: &ImageEntry| match image.place.root {
        0 => store.guard.prefix.join(&image.place.path),
        _ => store.host_path(&image.place),
    };
    let is_it = |image: &ImageEntry| image.stat.id.inode == named.inode && path(image) == named.path;
    catalog.images.iter().position(is_it)
}
