//! The directory of a store's own files: where it is, and the store's lock.
//!
//! Promises: the holder of the lock changes the store alone. Files of the directory are used only if no other
//! users than the store's can have written them.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Backend, Directory, FileLock, MountPoints, OpenDirectory};

use super::freeze_list;
use super::known_intents::KnownIntents;
use super::trust;

/// Opens a directory that a store consists of, by a path of this machine.
pub type OpenBackend<'a> = dyn Fn(&Path) -> Result<Arc<dyn Backend>> + 'a;

/// The directory that marks a store.
pub const MARKER: &str = ".chainfs";
/// The directory of intents beneath the marker.
const INTENTS: &str = ".chainfs/intents";
/// The directory of intents beside an image in no marked store.
const STRAY_INTENTS: &str = ".chainfs-intents";
const LOCK: &str = ".chainfs/lock";
/// The name alone: opening and closing it changes nothing.
pub(super) const LOCK_NAME: &[u8] = b"lock";
const STRAY_LOCK: &str = ".chainfs-lock";
/// Whether a name is one of those under which chainfs keeps its own files in a store.
pub(super) fn is_own_name(name: &[u8]) -> bool {
    [MARKER, STRAY_INTENTS, STRAY_LOCK].iter().any(|own| own.as_bytes() == name)
}

/// How long to wait for the store's lock: it is held for moments.
const PATIENCE: Duration = Duration::from_secs(10);
/// Maximum number of attempts at a write whose directory others remove.
const MOST_ATTEMPTS: usize = 100;
/// The same for a job that has done hours of work.
const JOB_PATIENCE: Duration = Duration::from_hours(1);

/// The directory of a store's intents and lock: the store's own, or for a single image the nearest marked one
/// above it.
#[derive(Clone, Debug)]
pub struct ControlDir {
    /// The directory.
    pub root: Arc<dyn Backend>,
    /// The path from there to the store's own directory.
    pub prefix: PathBuf,
    /// Whether all users of the store's images are known to be beneath it.
    pub is_whole: bool,
    /// Whether its files are beneath the marker.
    pub(super) is_marked: bool,
    pub(super) known: KnownIntents,
    pub(super) is_leaving: Arc<AtomicBool>,
    /// Whether the control directory was created, and not reported yet.
    pub(super) is_new_place: Arc<AtomicBool>,
}

impl ControlDir {
    fn at(root: Arc<dyn Backend>, prefix: PathBuf, is_marked: bool) -> Self {
        Self {
            root,
            prefix,
            is_whole: is_marked,
            is_marked,
            known: KnownIntents::default(),
            is_leaving: Arc::default(),
            is_new_place: Arc::default(),
        }
    }

    /// Ends waiting for the store's lock: its holder may be stopped, and the store is being closed.
    pub(crate) fn leave(&self) {
        self.is_leaving.store(true, Ordering::Release);
    }

    /// The guard of a store that is a directory: its own, unless it is not marked and lies in a store that
    /// is.
    pub(super) fn of_directory(root: &Arc<dyn Backend>, open: &OpenBackend<'_>) -> Result<Self> {
        let own = root.canonical();
        let (root, prefix) = match marked(own).next() {
            Some(marked) if marked != own => {
                (open(marked)?, own.strip_prefix(marked).unwrap_or(Path::new("")).to_path_buf())
            }
            _ => (Arc::clone(root), PathBuf::new()),
        };
        Ok(Self::at(root, prefix, true))
    }

    /// The guard of a store that is the whole of a tree.
    pub(super) fn of_tree(root: &Arc<dyn Backend>) -> Self {
        Self::at(Arc::clone(root), PathBuf::new(), true)
    }

    /// The guard of a single image in the directory `root`; `stated`: the store as the user says.
    pub(super) fn of_image(
        root: &Arc<dyn Backend>,
        stated: Option<&Path>,
        open: &OpenBackend<'_>,
    ) -> Result<Self> {
        let own = root.canonical();
        let marked = match stated {
            Some(stated) => Some(
                stated
                    .canonicalize()
                    .map_err(|error| Error::io(format!("opening {}", stated.display()), error))?,
            ),
            None => marked(own).next().map(Path::to_path_buf),
        };
        let Some(marked) = marked else {
            return Ok(Self::at(Arc::clone(root), PathBuf::new(), false));
        };
        let prefix = own.strip_prefix(&marked).map_err(|_| {
            let fact = "does not hold the image; name the directory of its store";
            Error::new(ErrorKind::Usage, format!("{} {fact}", marked.display()))
        })?;
        Ok(Self::at(open(&marked)?, prefix.to_path_buf(), true))
    }

    /// Whether it is a directory that has, or may have, a store's marker.
    pub(super) fn is_marked(&self) -> bool {
        self.is_marked
    }

    /// The directory of intents.
    pub(super) fn intents(&self) -> &'static Path {
        Path::new(if self.is_marked { INTENTS } else { STRAY_INTENTS })
    }

    /// The directories of our own that there are.
    pub(super) fn own_directories(&self) -> Vec<Box<dyn OpenDirectory>> {
        let paths = [Path::new(if self.is_marked { MARKER } else { STRAY_INTENTS }), self.intents()];
        paths
            .iter()
            .filter_map(|path| self.root.open_directory(path, MountPoints::Skip).ok().flatten())
            .collect()
    }

    /// Fails if another user may have written these files.
    pub(super) fn check_trust(&self) -> Result<()> {
        let own = Path::new(if self.is_marked { MARKER } else { STRAY_INTENTS });
        trust::check(&*self.root, own).and_then(|()| trust::check(&*self.root, self.intents()))
    }

    /// Fails if no intents can be written there.
    pub fn check_place(&self) -> Result<()> {
        let own =
            [Path::new(""), Path::new(if self.is_marked { MARKER } else { STRAY_INTENTS }), self.intents()];
        let mut is_needed = true;
        for path in own.iter().rev() {
            let crossing = if path.as_os_str().is_empty() { MountPoints::Enter } else { MountPoints::Skip };
            let Some(directory) = self.root.open_directory(path, crossing).ok().flatten() else { continue };
            // Above what is there nothing has to be made.
            if std::mem::take(&mut is_needed) || *path == Path::new(MARKER) {
                directory.check_writable().map_err(|error| {
                    let shown = self.root.canonical().join(path).display().to_string();
                    let fact = "is where commands are noted, and cannot be written; make it writable first";
                    let text = error.to_string();
                    Error::new(Error::io("", error).kind(), format!("{shown} {fact} ({text})"))
                })?;
            }
        }
        Ok(())
    }

    /// Carries out a write beneath the directory, and again if others have removed the directory meanwhile: a
    /// running command must not fail because of that.
    pub(super) fn in_place<T>(&self, names: &dyn Directory, write: impl Fn() -> Result<T>) -> Result<T> {
        let is_removed = |error: &Error| error.kind() == ErrorKind::NotFound;
        for _ in 1..MOST_ATTEMPTS {
            match write() {
                Err(error) if is_removed(&error) => {}
                done => return done,
            }
            match self.prepare(names) {
                Err(error) if !is_removed(&error) => return Err(error),
                _ => {}
            }
        }
        write()
    }

    /// The directory created in the user's store, to be reported once.
    pub fn new_place_note(&self) -> Option<String> {
        self.is_new_place.swap(false, Ordering::AcqRel).then(|| self.place_note())
    }

    fn place_note(&self) -> String {
        let directory = self.root.canonical().display();
        if self.is_marked {
            format!(
                "{directory}/{MARKER} was made: it marks the store, and holds its lock and notes; keep it"
            )
        } else {
            format!(
                "{STRAY_LOCK} and {STRAY_INTENTS} were made in {directory}, for the lock and notes of \
                    commands; they may be \
                 removed while no command runs and {STRAY_INTENTS} is empty"
            )
        }
    }

    /// Takes the store's lock: its holder may look up the users of images, and change files. Creates the
    /// freeze list if missing: two processes that did that at once could discard what one has recorded.
    pub fn lock(&self, names: &dyn Directory) -> Result<FileLock> {
        let lock = self.lock_within(names, PATIENCE, &|| Ok(()))?;
        if self.is_marked {
            self.in_place(names, || freeze_list::prepare(self, names))?;
        }
        Ok(lock)
    }

    /// The same for a job, which would not discard its work because another process is slow; `go_on` is
    /// called meanwhile, and its error ends the wait.
    pub fn lock_for_job(&self, names: &dyn Directory, go_on: &dyn Fn() -> Result<()>) -> Result<FileLock> {
        self.lock_within(names, JOB_PATIENCE, go_on)
    }

    fn lock_within(
        &self,
        names: &dyn Directory,
        patience: Duration,
        go_on: &dyn Fn() -> Result<()>,
    ) -> Result<FileLock> {
        let path = Path::new(if self.is_marked { LOCK } else { STRAY_LOCK });
        let go_on = || {
            if self.is_leaving.load(Ordering::Acquire) {
                let fact = "is held by another process, and the store is being closed";
                return Err(Error::new(ErrorKind::Cancelled, format!("{} {fact}", path.display())));
            }
            go_on()
        };
        loop {
            let file = self.in_place(names, || match self.root.open_file_for_writing(path) {
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    match names.create(path, None) {
                        Err(error) if error.kind() != ErrorKind::Exists => return Err(error),
                        _ => {}
                    }
                    self.root.open_file_for_writing(path)
                }
                found => found,
            })?;
            let opened = file.identity()?;
            let claim = FileLock::take_while(file, path, patience, &go_on)?;
            // A lock file that was removed during the wait excludes no later process.
            match self.root.identify(path) {
                Ok(now) if now == opened => return Ok(claim),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
            go_on()?;
        }
    }
}

/// The marked directories from this one upwards.
pub(super) fn marked(directory: &Path) -> impl Iterator<Item = &Path> {
    directory.ancestors().filter(|above| above.join(MARKER).is_dir())
}
