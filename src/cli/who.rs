//! `chainfs who`: lists who has an image, a disk or a store open, and what would let it go.
//!
//! Answered from `/proc` and the kernel's locks; no request goes to the daemon of a mount, except for the
//! status of running commands. What cannot be seen from here is said.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::args::{Output, WhoArgs};
use super::output::print;
use super::target::{Target, TargetKind, host_path, layers_at, place_in_mount};
use super::warn;
use crate::error::Result;
use crate::fs::CONTROL;
use crate::fs::mount::{KIND, store_of};
use crate::io::{
    FileNumber, FileUser, ImageLocks, LockConflict, LockKind, MountEntry, UsedFile, WantedFiles, WhichFile,
    file_users, loop_devices, mounts,
};
use crate::ops::JobState;
use crate::report::json::pretty;
use crate::report::status::parse_status;
use crate::report::who::{Access, JobRow, UserRow, WhoReport, text};
use crate::store::{Catalog, ImageIndex, Store, StoreOptions, shown};

const SOMEBODY: u8 = 0;
const NOBODY: u8 = 1;

/// Runs the command.
pub(super) fn run(args: &WhoArgs) -> Result<u8> {
    let target = Target::find(&args.path, None, &args.image)?;
    let asked = Asked::new(&target, &args.path)?;
    let report = asked.report();
    print(&match args.output.format() {
        Output::Human => text(&report),
        Output::Json => pretty(&report),
    })?;
    if report.unseen_processes > 0 {
        let count = report.unseen_processes;
        let of = if count == 1 { "1 process".to_owned() } else { format!("{count} processes") };
        warn(&format!("the open files of {of} of other users cannot be seen; run it as root to see them"));
    }
    let is_free = report.users.is_empty() && report.jobs.is_empty() && report.unidentified.is_empty();
    Ok(if is_free { NOBODY } else { SOMEBODY })
}

/// What the user has asked about.
struct Asked<'a> {
    target: &'a Target,
    /// The images, and their path on the host.
    images: Vec<(ImageIndex, PathBuf)>,
    /// All files of these images, with the path of each.
    files: Vec<(FileNumber, PathBuf)>,
    /// The same numbers.
    numbers: HashSet<FileNumber>,
    mounts: Vec<StoreMount>,
    /// The path within the mount, if one was given.
    place: Option<PathBuf>,
}

/// A mount that shows the images.
struct StoreMount {
    entry: MountEntry,
    /// Its store; `None` if it cannot be opened from here.
    store: Option<Arc<Store>>,
}

impl<'a> Asked<'a> {
    fn new(target: &'a Target, path: &Path) -> Result<Self> {
        let (store, catalog) = (&*target.store, &*target.catalog);
        let in_mount = place_in_mount(path)?;
        let wanted: Vec<ImageIndex> = match &target.what {
            TargetKind::Store => (0..catalog.images.len()).collect(),
            TargetKind::Chain(leaf) => catalog.layers(*leaf),
            // What a disk in a mount shows needs all its layers; an image is one file.
            TargetKind::Disk(disk) if in_mount.is_some() => disk.layers.clone(),
            TargetKind::Disk(disk) => disk.layers[..1].to_vec(),
        };
        let images: Vec<(ImageIndex, PathBuf)> =
            wanted.into_iter().map(|index| (index, host_path(store, catalog, index))).collect();
        let mut files = Vec::new();
        for (index, path) in &images {
            let data = catalog.images[*index].data_file.as_ref();
            let data = data.map(|(place, _)| store.roots()[place.root].given().join(&place.path));
            for path in std::iter::once(path.clone()).chain(data) {
                // A file that is gone is open by its number at most, which is not known any more.
                if let Ok(number) = FileNumber::of(&path) {
                    files.push((number, path));
                }
            }
        }
        let numbers = files.iter().map(|(number, _)| *number).collect();
        let places: Vec<PathBuf> = images.iter().filter_map(|(_, path)| path.canonicalize().ok()).collect();
        let shows = |entry: &MountEntry| {
            let shown = store_of(entry);
            let has_one = || places.iter().any(|path| path.starts_with(&shown));
            entry.kind == KIND && (store.given() == shown || has_one())
        };
        let open = |entry: MountEntry| {
            let options = StoreOptions { notify: false, ..store.options().clone() };
            let store = Store::open(&store_of(&entry), options).ok();
            StoreMount { entry, store }
        };
        let mounts = mounts()?.into_iter().filter(shows).map(open).collect();
        let place = in_mount.map(|(_, rest)| rest);
        Ok(Self { target, images, files, numbers, mounts, place })
    }

    fn report(&self) -> WhoReport {
        let numbers: Vec<FileNumber> = self.files.iter().map(|(number, _)| *number).collect();
        let entries: Vec<MountEntry> = self.mounts.iter().map(|mount| mount.entry.clone()).collect();
        let found = file_users(&WantedFiles { files: &numbers, mounts: &entries });
        let rows = found.users.iter().flat_map(|user| user.open.iter().map(move |file| (user, file)));
        let mut users: Vec<UserRow> = rows.filter_map(|(user, file)| self.row(user, file)).collect();
        users.extend(self.loops());
        let jobs = self.jobs();
        let unidentified = self.unidentified(&found.users);
        WhoReport { users, jobs, unidentified, unseen_processes: found.unseen }
    }

    /// What a process does with a file, if the file is one that was asked about.
    fn row(&self, user: &FileUser, file: &UsedFile) -> Option<UserRow> {
        // A daemon keeps files open for the next use; only a lock excludes others.
        let is_idle = user.is_daemon && file.locks == ImageLocks::default();
        let (path, mount, access) = match &file.which {
            WhichFile::Known(_) if is_idle => return None,
            WhichFile::Known(index) => (self.files[*index].1.clone(), None, Access::of(file)),
            WhichFile::InMount(mount, rest) if self.is_asked(*mount, rest) => {
                (self.mounts[*mount].entry.directory.join(rest), Some(*mount), Access::of(file))
            }
            WhichFile::Place(mount, rest) if self.is_whole() => {
                (self.mounts[*mount].entry.directory.join(rest), Some(*mount), Access::Place)
            }
            WhichFile::InMount(..) | WhichFile::Place(..) => return None,
        };
        let serves = user.is_daemon && mount.is_none();
        let serves = self.mounts.iter().filter(|_| serves).map(|mount| shown(&mount.entry.directory));
        Some(UserRow::of(user, shown(&path), access, file.locks, mount.is_some(), serves.collect()))
    }

    /// Whether the user asked about a whole store or chain, not about one disk of it.
    fn is_whole(&self) -> bool {
        !matches!(self.target.what, TargetKind::Disk(_))
    }

    /// Whether a path in a mount shows bytes of what the user asked about.
    fn is_asked(&self, mount: usize, rest: &Path) -> bool {
        let StoreMount { store: Some(store), entry } = &self.mounts[mount] else { return self.is_whole() };
        let catalog = store.catalog();
        if let Some(layers) = layers_at(store, &catalog, rest) {
            // The same disk, or for an image each disk that has it as a layer.
            let number = |index: ImageIndex| FileNumber::of(&host_path(store, &catalog, index)).ok();
            return match &self.target.what {
                TargetKind::Disk(_) if self.place.is_some() => {
                    layers.first().and_then(|top| number(*top)) == FileNumber::of(&self.images[0].1).ok()
                }
                _ => layers.iter().any(|layer| number(*layer).is_some_and(|it| self.numbers.contains(&it))),
            };
        }
        // A directory, a report, a control file.
        match &self.target.what {
            TargetKind::Store => self.target.store.given() == store_of(entry),
            TargetKind::Chain(_) => self.place.as_ref().is_some_and(|place| rest.starts_with(place)),
            TargetKind::Disk(_) => false,
        }
    }

    /// Loop devices on the files, or on disks of the mounts: the kernel has these open.
    fn loops(&self) -> Vec<UserRow> {
        let asked = |file: &Path| {
            let Some(mount) = self.mounts.iter().rposition(|mount| file.starts_with(&mount.entry.directory))
            else {
                let is_one = FileNumber::of(file).is_ok_and(|number| self.numbers.contains(&number));
                return is_one.then_some(false);
            };
            let rest = file.strip_prefix(&self.mounts[mount].entry.directory).ok()?;
            self.is_asked(mount, rest).then_some(true)
        };
        let row = |(device, file): (String, PathBuf)| {
            asked(&file).map(|through| UserRow::of_loop(device, shown(&file), through))
        };
        loop_devices().into_iter().filter_map(row).collect()
    }

    /// Commands that work on the images, or were interrupted.
    fn jobs(&self) -> Vec<JobRow> {
        let mut rows = Vec::new();
        let chains = |catalog: &Catalog, store: &Store| -> Vec<PathBuf> {
            let has = |leaf: ImageIndex| {
                let layers = catalog.layers(leaf);
                let mut numbers =
                    layers.iter().filter_map(|index| FileNumber::of(&host_path(store, catalog, *index)).ok());
                numbers.any(|number| self.numbers.contains(&number))
            };
            catalog.chains().filter(|(_, leaf)| has(*leaf)).map(|(chain, _)| chain).collect()
        };
        let mut running = Vec::new();
        for mount in &self.mounts {
            let Some(store) = &mount.store else { continue };
            for chain in chains(&store.catalog(), store) {
                let directory = mount.entry.directory.join(&chain);
                let Ok(text) = std::fs::read_to_string(directory.join(CONTROL).join("status")) else {
                    continue;
                };
                let status = parse_status(&text);
                if status.state == JobState::Running {
                    rows.push(JobRow::running(&status, &directory));
                    running.push(chain);
                }
            }
        }
        let (store, catalog) = (&*self.target.store, &*self.target.catalog);
        let mine = chains(catalog, store);
        for found in &catalog.intents {
            let chain = &found.intent.chain;
            if mine.contains(chain) && !running.contains(chain) {
                rows.push(JobRow::begun(&found.intent.command, chain, store.given()));
            }
        }
        rows
    }

    /// Files with a lock of which no holder was found.
    fn unidentified(&self, users: &[FileUser]) -> Vec<String> {
        let store = &*self.target.store;
        let has_holder = |path: &Path| {
            let number = FileNumber::of(path).ok();
            let is_it = |file: &UsedFile| match file.which {
                WhichFile::Known(index) => {
                    Some(self.files[index].0) == number && file.locks != ImageLocks::default()
                }
                WhichFile::InMount(..) | WhichFile::Place(..) => false,
            };
            users.iter().any(|user| user.open.iter().any(is_it))
        };
        let is_locked = |index: ImageIndex| {
            let place = &self.target.catalog.images[index].place;
            let file = store.roots()[place.root].open_file(&place.path);
            file.is_ok_and(|file| {
                matches!(file.locks().conflict(LockKind::Writer), Err(LockConflict::Held { .. }))
            })
        };
        let locked = self.images.iter().filter(|(index, path)| is_locked(*index) && !has_holder(path));
        locked.map(|(_, path)| shown(path)).collect()
    }
}
