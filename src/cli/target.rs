//! Resolves a PATH operand: a store, an image, a view of an image, or a path in a mount.
//!
//! For a path in a mount, the store of the mount is opened directly. No request goes to the daemon, so
//! commands work while it is dead or busy.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::fs::CONTROL;
use crate::fs::mount::{KIND, store_of};
use crate::io::{MountEntry, is_address, mounts};
use crate::store::{
    ACTIVE, Catalog, ChainView, ImageIndex, OpenView, README, STORE_DIRECTORY, Store, StoreOptions, ViewPart,
    shown,
};
use crate::units::Stability;

use super::address;
use super::args::ImageArgs;
use super::config;
use super::mount_options::{FormatRule, ImageFormat, MountOptions};
use super::store_options::{store_options, variable};

/// A resolved path.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) store: Arc<Store>,
    pub(super) catalog: Arc<Catalog>,
    pub(super) what: TargetKind,
    /// The image's name in output: the user's spelling if the user named it.
    pub(super) filename: PathBuf,
}

/// What a path names.
#[derive(Clone, Debug)]
pub(super) enum TargetKind {
    /// A whole store.
    Store,
    /// A chain, by its leaf.
    Chain(ImageIndex),
    /// One disk of a chain.
    Disk(TargetDisk),
}

/// One disk of a chain.
#[derive(Clone, Debug)]
pub(super) struct TargetDisk {
    /// Its layers, top first.
    pub(super) layers: Vec<ImageIndex>,
    /// Which state of the top one.
    pub(super) part: ViewPart,
}

impl TargetDisk {
    /// The disk of a view of the chain from the image `top` downwards.
    fn of(catalog: &Catalog, top: ImageIndex, view: &ChainView) -> Self {
        let layers = catalog.layers(top)[view.layer..].to_vec();
        Self { layers, part: view.snapshot.map_or(ViewPart::Active, ViewPart::Snapshot) }
    }
}

impl Target {
    /// Resolves `path`. `format` is the image format given by the user.
    pub(super) fn find(path: &Path, format: Option<ImageFormat>, args: &ImageArgs) -> Result<Self> {
        Self::find_as(path, format, args, false)
    }

    /// The same for a command that follows the store.
    pub(super) fn find_watched(path: &Path, args: &ImageArgs) -> Result<Self> {
        Self::find_as(path, None, args, true)
    }

    /// `notify`: whether the backend is asked to tell of changes.
    fn find_as(path: &Path, format: Option<ImageFormat>, args: &ImageArgs, notify: bool) -> Result<Self> {
        let mut options = config::load(MountOptions::parse(&args.options, false)?, variable)?;
        options.force_share |= args.force_share;
        let store_options = |options: &MountOptions| {
            let options = store_options(options);
            StoreOptions { notify: notify && options.notify, ..options }
        };
        if let Some((store, rest)) = place_in_mount(path)? {
            return Self::in_mount(&store, &rest, &store_options(&options));
        }
        let (image, view) = if is_address(path) { split_address(path) } else { split_view(path) };
        if let (Some(format), Some(name)) = (format, image.file_name().and_then(OsStr::to_str)) {
            // The rule for this image precedes those for patterns.
            options.formats.insert(0, FormatRule { glob: literal(name), format });
        }
        let options = store_options(&options);
        let store = match Store::open(image, options.clone()) {
            // A symbolic link given by the user may lead anywhere: it means its target.
            Err(error) if error.kind() == ErrorKind::Escape => {
                let target = image.canonicalize().map_err(|error| Error::io(context(image), error))?;
                Store::open(&target, options)?
            }
            other => other?,
        };
        let catalog = store.catalog();
        let mut filename = image.to_path_buf();
        let what = match (catalog.single, view) {
            (None, _) => TargetKind::Store,
            (Some(leaf), None) => {
                TargetKind::Disk(TargetDisk { layers: catalog.layers(leaf), part: ViewPart::Active })
            }
            (Some(leaf), Some(name)) => {
                let view = address::resolve(&store, &catalog, leaf, image, name)?;
                let disk = TargetDisk::of(&catalog, leaf, &view);
                if view.layer > 0 {
                    filename = host_path(&store, &catalog, disk.layers[0]);
                }
                TargetKind::Disk(disk)
            }
        };
        Ok(Self { store, catalog, what, filename })
    }

    /// Resolves `rest`, a path within a mount of the store at `path`.
    fn in_mount(path: &Path, rest: &Path, options: &StoreOptions) -> Result<Self> {
        let store = Store::open(path, options.clone())?;
        let catalog = store.catalog();
        let what = resolve(&store, &catalog, rest)?;
        let top = match &what {
            TargetKind::Store => None,
            TargetKind::Chain(leaf) => Some(*leaf),
            TargetKind::Disk(disk) => Some(disk.layers[0]),
        };
        let filename = top.map_or_else(|| path.to_path_buf(), |top| host_path(&store, &catalog, top));
        Ok(Self { store, catalog, what, filename })
    }

    /// The disk of this target; for a chain, its active disk.
    pub(super) fn disk(&self) -> Result<TargetDisk> {
        match &self.what {
            TargetKind::Disk(disk) => Ok(disk.clone()),
            TargetKind::Chain(leaf) => {
                Ok(TargetDisk { layers: self.catalog.layers(*leaf), part: ViewPart::Active })
            }
            TargetKind::Store => Err(Error::new(
                ErrorKind::Usage,
                format!("{} is a store; name one of its images or disks", shown(&self.filename)),
            )),
        }
    }

    /// Opens the disk of this target for reading.
    pub(super) fn open(&self) -> Result<OpenView> {
        let TargetDisk { layers, part } = self.disk()?;
        // Without locks, another process may be writing the top layer.
        let stability = Stability::live_if(self.store.options().force_share);
        self.store.open_shown(&self.catalog, &layers, part, stability)
    }
}

fn literal(name: &str) -> glob::Pattern {
    glob::Pattern::new(&glob::Pattern::escape(name)).expect("an escaped pattern is one")
}

fn context(path: &Path) -> String {
    format!("opening {}", shown(path))
}

pub(super) fn host_path(store: &Store, catalog: &Catalog, index: ImageIndex) -> PathBuf {
    let place = &catalog.images[index].place;
    store.roots()[place.root].given().join(&place.path)
}

/// The store of the mount that `path` lies in, and the path within the mount.
pub(super) fn place_in_mount(path: &Path) -> Result<Option<(PathBuf, PathBuf)>> {
    Ok(mount_above(path)?.map(|(mount, rest)| (store_of(&mount), rest)))
}

/// The directory of the mount that `path` lies in.
pub(super) fn mount_directory(path: &Path) -> Result<Option<PathBuf>> {
    Ok(mount_above(path)?.map(|(mount, _)| mount.directory))
}

fn mount_above(path: &Path) -> Result<Option<(MountEntry, PathBuf)>> {
    if is_address(path) {
        return Ok(None);
    }
    let absolute = std::path::absolute(path).map_err(|error| Error::io(context(path), error))?;
    let mounts = mounts()?;
    // Links on the way to the mount are followed; a daemon that does not answer is not waited for
    // longer than the kernel does, and what it would say is not needed.
    let candidates = [Some(absolute.clone()), canonical(&absolute)];
    for candidate in candidates.into_iter().flatten() {
        let covering = mounts.iter().filter(|mount| candidate.starts_with(&mount.directory));
        // Of several mounts on one directory, the last one is visible.
        let Some(mount) = covering.max_by_key(|mount| mount.directory.as_os_str().len()) else { continue };
        if mount.kind == KIND {
            let rest = candidate.strip_prefix(&mount.directory).unwrap_or(Path::new(""));
            return Ok(Some((mount.clone(), rest.to_path_buf())));
        }
    }
    Ok(None)
}

/// The path with the symbolic links of its existing part resolved.
fn canonical(path: &Path) -> Option<PathBuf> {
    path.ancestors().find_map(|existing| {
        let rest = path.strip_prefix(existing).ok()?;
        let plain = rest.components().all(|component| matches!(component, Component::Normal(_)));
        existing.canonicalize().ok().filter(|_| plain).map(|existing| existing.join(rest))
    })
}

/// Splits `IMAGE@VIEW`, unless a file has the whole name.
fn split_view(path: &Path) -> (&Path, Option<&[u8]>) {
    if path.symlink_metadata().is_ok() {
        return (path, None);
    }
    let found = ats(path).find(|(image, _)| image.is_file());
    found.map_or((path, None), |(image, view)| (image, Some(view)))
}

/// Splits `ADDRESS@VIEW`. An at sign in the name of an object is written as `%40`.
fn split_address(path: &Path) -> (&Path, Option<&[u8]>) {
    let last = path.as_os_str().as_bytes().rsplit(|byte| *byte == b'/').next().map_or(0, <[u8]>::len);
    let whole = path.as_os_str().len();
    let found = ats(path).filter(|(image, _)| image.as_os_str().len() >= whole - last).last();
    found.map_or((path, None), |(image, view)| (image, Some(view)))
}

/// The two parts of a path at each of its at signs, the last one first.
fn ats(path: &Path) -> impl Iterator<Item = (&Path, &[u8])> {
    let bytes = path.as_os_str().as_bytes();
    let splits = (0..bytes.len()).rev().filter(|at| bytes[*at] == b'@');
    splits.map(|at| (Path::new(OsStr::from_bytes(&bytes[..at])), &bytes[at + 1..]))
}

/// Resolves `rest`, a path within a mount, or `DISK@VIEW` with such a path.
fn resolve(store: &Store, catalog: &Catalog, rest: &Path) -> Result<TargetKind> {
    let unknown = match resolve_path(store, catalog, rest) {
        Err(error) if error.kind() == ErrorKind::NotFound => error,
        found => return found,
    };
    for (disk, view) in ats(rest) {
        if let Ok(TargetKind::Disk(TargetDisk { layers, part: ViewPart::Active })) =
            resolve_path(store, catalog, disk)
        {
            let view = address::resolve(store, catalog, layers[0], disk, view)?;
            return Ok(TargetKind::Disk(TargetDisk::of(catalog, layers[0], &view)));
        }
    }
    Err(unknown)
}

/// The layers, top first, of the disk whose bytes a path within a mount shows: a disk, a partition or a
/// guest's file.
pub(super) fn layers_at(store: &Store, catalog: &Catalog, rest: &Path) -> Option<Vec<ImageIndex>> {
    let names: Vec<&OsStr> = rest.iter().collect();
    let inner = names.iter().position(|name| *name == "files" || *name == "partitions");
    let disk = match inner.and_then(|at| Some((at, names.get(at + 1)?))) {
        Some((at, view)) => {
            let chain: PathBuf = names[..at].iter().collect();
            let file = [view.as_bytes(), b".raw"].concat();
            let directory = if view.as_bytes() == ACTIVE { "" } else { "snapshots" };
            chain.join(directory).join(OsStr::from_bytes(&file))
        }
        None => rest.to_path_buf(),
    };
    match resolve_path(store, catalog, &disk) {
        Ok(TargetKind::Disk(disk)) => Some(disk.layers),
        Ok(TargetKind::Store | TargetKind::Chain(_)) | Err(_) => None,
    }
}

/// Resolves `rest`, a path within a mount.
fn resolve_path(store: &Store, catalog: &Catalog, rest: &Path) -> Result<TargetKind> {
    let names: Vec<&OsStr> = rest.iter().collect();
    let chain = (0..=names.len()).find_map(|len| {
        catalog.chain(&names[..len].iter().collect::<PathBuf>()).map(|leaf| (leaf, &names[len..]))
    });
    let Some((leaf, inner)) = chain else {
        let is_directory = catalog.directories.contains_key(rest);
        let is_own = names.first().is_some_and(|name| is_own(name));
        return if is_directory || is_own { Ok(TargetKind::Store) } else { Err(nothing_at(rest)) };
    };
    let view = |name: &[u8], suffix: &[u8]| -> Result<(ChainView, Vec<ImageIndex>)> {
        let views = store.chain_views(catalog, leaf);
        let view =
            name.strip_suffix(suffix).and_then(|name| views.find(name)).ok_or_else(|| nothing_at(rest))?;
        Ok((view.clone(), views.layers[view.layer..].to_vec()))
    };
    match inner {
        [] => Ok(TargetKind::Chain(leaf)),
        [name] if *name == "snapshots" || *name == "info" || *name == CONTROL || is_own(name) => {
            Ok(TargetKind::Chain(leaf))
        }
        [name, _] if *name == "info" || *name == CONTROL || is_own(name) => Ok(TargetKind::Chain(leaf)),
        [name, file] if *name == "snapshots" && file.as_bytes().ends_with(b".vmstate") => {
            match view(file.as_bytes(), b".vmstate")? {
                (ChainView { snapshot: Some(index), .. }, layers) => {
                    Ok(TargetKind::Disk(TargetDisk { layers, part: ViewPart::VmState(index) }))
                }
                _ => Err(nothing_at(rest)),
            }
        }
        [file] | [_, file] => {
            let (view, layers) = view(file.as_bytes(), b".raw")?;
            let is_in_its_place =
                view.active == (inner.len() == 1) && (inner.len() == 1 || inner[0] == "snapshots");
            if !is_in_its_place {
                return Err(nothing_at(rest));
            }
            let part = view.snapshot.map_or(ViewPart::Active, ViewPart::Snapshot);
            Ok(TargetKind::Disk(TargetDisk { layers, part }))
        }
        _ => Err(nothing_at(rest)),
    }
}

/// Whether a name at the top of a mount is about the mount itself.
fn is_own(name: &OsStr) -> bool {
    [STORE_DIRECTORY, README].contains(&name.as_bytes())
}

fn nothing_at(rest: &Path) -> Error {
    Error::new(ErrorKind::NotFound, format!("the mount has no {}", shown(rest)))
}
