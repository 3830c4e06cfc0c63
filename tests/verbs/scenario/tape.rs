//! The real machine, with a recorder: every operation of a store on files and names is done, and recorded on
//! one tape, in order. One of these calls can be made to fail.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use chainfs::error::{Error, Result};
use chainfs::io::{
    Backend, Directory, Existing, LocalFile, Storage, WriteObject, WriteStorage, directory_of,
};
use chainfs::units::{BlockStatus, Run};
use parking_lot::{Mutex, MutexGuard};
use rustix::io::Errno;

use super::scene::Scene;
use support::host::{Hands, wrap};
use support::sim::action::Action;
use support::sim::mix;

/// A change of names.
#[derive(Clone, Debug)]
pub(crate) enum Naming {
    Create { file: usize, path: PathBuf },
    Directory { path: PathBuf },
    Link { file: usize, to: PathBuf },
    Rename { file: usize, from: PathBuf, to: PathBuf },
    Unlink { file: usize, path: PathBuf },
}

impl Naming {
    /// The directory whose sync makes it durable.
    pub(crate) fn directory(&self) -> PathBuf {
        match self {
            Self::Create { path, .. } | Self::Directory { path } | Self::Unlink { path, .. } => {
                directory_of(path)
            }
            Self::Link { to, .. } | Self::Rename { to, .. } => directory_of(to),
        }
    }

    /// Applies it, as far as its files exist: others may have been lost.
    pub(crate) fn apply(&self, names: &mut BTreeMap<PathBuf, usize>, directories: &mut BTreeSet<PathBuf>) {
        let mut take = |file: &usize, path: &PathBuf| {
            if names.get(path) == Some(file) {
                names.remove(path);
            }
        };
        match self {
            Self::Unlink { file, path } => take(file, path),
            Self::Rename { file, from, to } => {
                take(file, from);
                names.insert(to.clone(), *file);
            }
            Self::Create { file, path: to } | Self::Link { file, to } => {
                names.insert(to.clone(), *file);
            }
            Self::Directory { path } => drop(directories.insert(path.clone())),
        }
    }
}

/// An event on the tape.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A change of the bytes of a file.
    Did { file: usize, action: Action },
    /// All such changes of the file so far are durable.
    Synced { file: usize },
    /// A change of names.
    Named(Naming),
    /// All such changes in that directory so far are durable.
    NamesSynced(PathBuf),
    /// An operation began or ended.
    Mark,
    /// A guest's flush has been acknowledged.
    Flushed,
}

/// The call that fails: its number, from 0, and how.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fault {
    pub(crate) number: u64,
    pub(crate) errno: Errno,
    /// Whether all after it fail as well.
    pub(crate) lasting: bool,
}

/// The result of a run.
#[derive(Clone)]
pub(crate) struct Tape {
    pub(crate) start: Scene,
    pub(crate) events: Vec<Event>,
    /// Of all files, those at the start first.
    pub(crate) inodes: Vec<u64>,
}

struct State {
    tape: Tape,
    files: HashMap<u64, usize>,
    names: BTreeMap<PathBuf, usize>,
    /// While a file is open, no other gets its inode number.
    held: Vec<File>,
    calls: u64,
    fault: Option<Fault>,
}

struct Shared {
    root: PathBuf,
    state: Mutex<State>,
    honest: bool,
    jitter: bool,
}

/// The host.
#[derive(Clone)]
pub(crate) struct Recorder(Arc<Shared>);

impl Recorder {
    /// One for the store at `root`. `jitter`: threads take turns more often than they would.
    pub(crate) fn new(root: &Path, jitter: bool) -> Self {
        Self::with(root, jitter, true)
    }

    /// One that returns from a sync as if it had been done.
    pub(crate) fn swallowing_syncs(root: &Path) -> Self {
        Self::with(root, true, false)
    }

    fn with(root: &Path, jitter: bool, honest: bool) -> Self {
        let start = Scene::load(root);
        let held = start.names.keys().map(|path| File::open(root.join(path)).expect("a file")).collect();
        let files = start.inodes.iter().enumerate().map(|(file, inode)| (*inode, file)).collect();
        let (names, inodes) = (start.names.clone(), start.inodes.clone());
        let tape = Tape { start, events: Vec::new(), inodes };
        let state = Mutex::new(State { tape, files, names, held, calls: 0, fault: None });
        Self(Arc::new(Shared { root: root.canonicalize().expect("the store"), state, honest, jitter }))
    }

    /// Opens the directory of the store, so that what is done there is recorded.
    pub(crate) fn open(&self, directory: &Path) -> Result<Arc<dyn Backend>> {
        assert_eq!(directory.canonicalize().expect("the store"), self.0.root, "one store, one tape");
        wrap(directory, self.clone())
    }

    /// The tape so far.
    pub(crate) fn tape(&self) -> Tape {
        self.0.state.lock().tape.clone()
    }

    /// Puts a mark on the tape and returns its position.
    pub(crate) fn mark(&self, event: Event) -> usize {
        let events = &mut self.0.state.lock().tape.events;
        events.push(event);
        events.len() - 1
    }

    /// Arms a fault; its number counts from here on.
    pub(crate) fn arm(&self, fault: Option<Fault>) {
        let mut state = self.0.state.lock();
        (state.fault, state.calls) = (fault, 0);
    }

    /// Calls that change something, since a fault was armed or not.
    pub(crate) fn calls(&self) -> u64 {
        self.0.state.lock().calls
    }

    fn number(&self, inode: u64) -> usize {
        self.0.state.lock().files[&inode]
    }

    /// Runs a change of a file or a name exclusively, and records it.
    fn doing<T>(&self, work: impl FnOnce(&mut State) -> Result<T>) -> Result<T> {
        let done = {
            let mut state: MutexGuard<'_, State> = self.0.state.lock();
            let number = state.calls;
            state.calls += 1;
            match state.fault {
                Some(fault) if number == fault.number || (fault.lasting && number > fault.number) => {
                    Err(Error::io("a disk that fails when told to: changing it", fault.errno))
                }
                _ => work(&mut state),
            }
        };
        if self.0.jitter {
            let chance = mix(self.0.state.lock().calls);
            match chance % 8 {
                0 => thread::sleep(Duration::from_micros(chance >> 32 & 0x7f)),
                1..4 => thread::yield_now(),
                _ => {}
            }
        }
        done
    }
}

impl Hands for Recorder {
    fn image(&self, opened: Arc<dyn WriteObject>) -> Arc<dyn WriteStorage> {
        let number = opened.stat().expect("its attributes").id.number();
        Arc::new(TapedFile { inner: opened, file: self.number(number), recorder: self.clone() })
    }

    fn names(&self, inner: Arc<dyn Directory>) -> Arc<dyn Directory> {
        Arc::new(TapedNames { inner, recorder: self.clone() })
    }
}

struct TapedFile {
    inner: Arc<dyn WriteStorage>,
    file: usize,
    recorder: Recorder,
}

impl TapedFile {
    fn change(&self, work: impl FnOnce() -> Result<()>, action: impl FnOnce() -> Action) -> Result<()> {
        self.recorder.doing(|state| {
            work()?;
            state.tape.events.push(Event::Did { file: self.file, action: action() });
            Ok(())
        })
    }
}

impl Storage for TapedFile {
    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.inner.read_at(at, buf)
    }

    fn len(&self) -> Result<u64> {
        self.inner.len()
    }

    fn extent(&self, at: u64, end: u64) -> Result<Run<BlockStatus>> {
        self.inner.extent(at, end)
    }

    fn read_table_at(&self, at: u64, buf: &mut [u8]) -> Result<usize> {
        self.inner.read_table_at(at, buf)
    }

    fn local_file(&self) -> Option<LocalFile> {
        self.inner.local_file()
    }
}

impl WriteStorage for TapedFile {
    fn write_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.change(|| self.inner.write_at(at, bytes), || Action::Write { at, bytes: bytes.into() })
    }

    fn set_len(&self, len: u64) -> Result<()> {
        self.change(|| self.inner.set_len(len), || Action::SetLen(len))
    }

    fn punch_hole(&self, at: u64, len: u64) -> Result<()> {
        self.change(|| self.inner.punch_hole(at, len), || Action::Punch { at, len })
    }

    fn write_zeroes(&self, at: u64, len: u64) -> Result<()> {
        self.change(|| self.inner.write_zeroes(at, len), || Action::Zero { at, len })
    }

    fn allocate(&self, at: u64, len: u64) -> Result<()> {
        self.change(|| self.inner.allocate(at, len), || Action::Allocate { at, len })
    }

    fn reserve(&self, at: u64, len: u64) -> Result<()> {
        // The file does not change.
        self.recorder.doing(|_| self.inner.reserve(at, len))
    }

    fn write_table_at(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.change(|| self.inner.write_table_at(at, bytes), || Action::Write { at, bytes: bytes.into() })
    }

    fn copy_from(&self, at: u64, source: &dyn Storage, from: u64, len: u64) -> Result<()> {
        self.recorder.doing(|state| {
            let mut bytes = vec![0; len as usize];
            let have = source.read_at(from, &mut bytes)?;
            self.inner.copy_from(at, source, from, len)?;
            assert_eq!(have as u64, len, "a source has to have what is copied");
            let action = Action::Write { at, bytes: bytes.into() };
            state.tape.events.push(Event::Did { file: self.file, action });
            Ok(())
        })
    }

    fn sync(&self) -> Result<()> {
        self.recorder.doing(|state| {
            self.inner.sync()?;
            if self.recorder.0.honest {
                state.tape.events.push(Event::Synced { file: self.file });
            }
            Ok(())
        })
    }
}

struct TapedNames {
    inner: Arc<dyn Directory>,
    recorder: Recorder,
}

impl TapedNames {
    fn change(&self, work: impl FnOnce() -> Result<()>, naming: impl FnOnce(&State) -> Naming) -> Result<()> {
        self.recorder.doing(|state| {
            work()?;
            let naming = naming(state);
            naming.apply(&mut state.names, &mut BTreeSet::new());
            state.tape.events.push(Event::Named(naming));
            Ok(())
        })
    }
}

impl Directory for TapedNames {
    fn create(&self, path: &Path, like: Option<&Path>) -> Result<Arc<dyn WriteStorage>> {
        self.recorder.doing(|state| {
            let inner = self.inner.create(path, like)?;
            let held = File::open(self.recorder.0.root.join(path)).expect("what was made");
            let inode = held.metadata().expect("its attributes").ino();
            let file = state.tape.inodes.len();
            state.held.push(held);
            state.tape.inodes.push(inode);
            assert!(state.files.insert(inode, file).is_none(), "a file of its own");
            state.names.insert(path.to_path_buf(), file);
            state.tape.events.push(Event::Named(Naming::Create { file, path: path.to_path_buf() }));
            Ok(Arc::new(TapedFile { inner, file, recorder: self.recorder.clone() }) as Arc<dyn WriteStorage>)
        })
    }

    fn create_directory(&self, path: &Path) -> Result<()> {
        let is_there = fs::metadata(self.recorder.0.root.join(path)).is_ok();
        if is_there {
            return self.inner.create_directory(path);
        }
        self.change(|| self.inner.create_directory(path), |_| Naming::Directory { path: path.to_path_buf() })
    }

    fn link(&self, from: &Path, to: &Path) -> Result<()> {
        let naming = |state: &State| Naming::Link { file: state.names[from], to: to.to_path_buf() };
        self.change(|| self.inner.link(from, to), naming)
    }

    fn rename(&self, from: &Path, to: &Path, existing: Existing) -> Result<()> {
        let (old, new) = (from.to_path_buf(), to.to_path_buf());
        let naming = |state: &State| Naming::Rename { file: state.names[from], from: old, to: new };
        self.change(|| self.inner.rename(from, to, existing), naming)
    }

    fn unlink(&self, path: &Path) -> Result<()> {
        let naming = |state: &State| Naming::Unlink { file: state.names[path], path: path.to_path_buf() };
        self.change(|| self.inner.unlink(path), naming)
    }

    fn sync(&self, path: &Path) -> Result<()> {
        self.recorder.doing(|state| {
            self.inner.sync(path)?;
            if self.recorder.0.honest {
                state.tape.events.push(Event::NamesSynced(path.to_path_buf()));
            }
            Ok(())
        })
    }
}
