//! Intents: what was begun and is not finished, as small durable notes in the store.
//!
//! Promises: an intent is on disk, whole, before the first step that it speaks of, and goes after the last;
//! its owner holds a lock on it all the while, and only who gets that lock may take it up. What an
//! intent spoils is not shown by anybody who scans the store, until it is gone. How its steps are done is for
//! others; each of them can be told, from the files alone, to be done or not.

use std::ffi::OsString;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Claim, Directory, EntryKind, Root};

use super::leftovers::DRAFT;

use super::trust;

/// What marks a directory as a store.
pub const MARKER: &str = ".chainfs";
/// Where intents are kept beneath the marker.
const INTENTS: &str = ".chainfs/intents";
/// Where they are kept beside an image that is in no marked store.
const STRAY_INTENTS: &str = ".chainfs-intents";
const LOCK: &str = ".chainfs/lock";
/// Its name alone: it says nothing by being opened and closed.
pub(super) const LOCK_NAME: &[u8] = b"lock";
const STRAY_LOCK: &str = ".chainfs-lock";
/// Whether a name is one of those under which chainfs keeps what it knows of a store.
pub(super) fn is_own_name(name: &[u8]) -> bool {
    [MARKER, STRAY_INTENTS, STRAY_LOCK].iter().any(|own| own.as_bytes() == name)
}

const VERSION: u32 = 1;
/// Longer notes are not ours.
const MAX_LEN: u64 = 4 << 20;
/// For how long the store's lock is waited for: it is held for moments.
const PATIENCE: Duration = Duration::from_secs(10);
/// The same for a job that has done hours of work.
const JOB_PATIENCE: Duration = Duration::from_hours(1);

/// A file that an intent speaks of, by name and identity.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// Its path beneath the guarded directory.
    #[serde(with = "encoded")]
    pub path: PathBuf,
    /// Its inode number: a name can be given to another file.
    pub inode: u64,
}

/// What was begun.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Intent {
    version: u32,
    /// The command's words.
    pub command: String,
    /// The chain that was asked, by its path in the mount.
    #[serde(with = "encoded")]
    pub chain: PathBuf,
    /// What it was.
    #[serde(flatten)]
    pub deed: Deed,
}

/// What was begun, by its verb.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verb", rename_all = "lowercase")]
pub enum Deed {
    /// New overlays take the names of active layers.
    Snapshot {
        /// When: seconds since 1970.
        seconds: i64,
        /// Nanoseconds of that second.
        nanoseconds: u32,
        /// The user's words.
        description: String,
        /// Each disk that is frozen.
        disks: Vec<NewTop>,
    },
    /// Layers are merged down.
    Commit {
        /// The upper end; its view stays what it is throughout.
        top: Named,
        /// What is written.
        base: Named,
        /// What lies between, top first, and is worth nothing once base has changed.
        between: Vec<Named>,
        /// The images that stand on top, and shall stand on base.
        children: Vec<Named>,
        /// Whether top's file stays.
        keep: bool,
        /// For the active layer: the name that base gets.
        #[serde(default, with = "encoded_option", skip_serializing_if = "Option::is_none")]
        rename: Option<PathBuf>,
    },
    /// Layers are merged up.
    Pull {
        /// What is filled.
        into: Vec<Named>,
        /// What they shall stand on.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        base: Option<Named>,
        /// What goes afterwards, if nobody needs it, top first.
        remove: Vec<Named>,
        /// What lies between; frozen afterwards where nobody stands on it any more.
        between: Vec<Named>,
    },
    /// A new image is filled, of which nobody knows before it is whole.
    Copy {
        /// The image, by the name under which it was made.
        draft: Named,
        /// The name that it gets.
        #[serde(with = "encoded")]
        name: PathBuf,
    },
    /// A disk becomes shorter: what lay behind its end is given back once its header says so.
    Shrink {
        /// Its image.
        image: Named,
        /// Bytes that it shall have.
        size: u64,
    },
}

/// One disk of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewTop {
    /// The active layer, by the name that it has.
    pub old: Named,
    /// The name that it gets; the one it has if that stays.
    #[serde(with = "encoded")]
    pub frozen: PathBuf,
    /// The overlay, by the name under which it was made.
    pub overlay: Named,
    /// The name that the overlay gets.
    #[serde(with = "encoded")]
    pub name: PathBuf,
    /// What the old layer stands on, where it is going to be removed: for the trash.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<Named>,
}

/// Paths as text: bytes that are not plain ASCII are percent-encoded.
pub(super) mod encoded {
    use super::{Deserialize, Deserializer, OsStrExt, OsString, OsStringExt, Path, PathBuf, Serializer};
    use std::fmt::Write;

    pub(super) fn text(path: &Path) -> String {
        let mut text = String::new();
        for byte in path.as_os_str().as_bytes() {
            if byte.is_ascii_graphic() && *byte != b'%' || *byte == b' ' {
                text.push(*byte as char);
            } else {
                let _ = write!(text, "%{byte:02X}");
            }
        }
        text
    }

    pub(super) fn path(text: &str) -> Option<PathBuf> {
        let mut bytes = Vec::with_capacity(text.len());
        let mut rest = text.as_bytes();
        while let Some((first, more)) = rest.split_first() {
            if *first == b'%' {
                let digits = std::str::from_utf8(more.get(..2)?).ok()?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                rest = &more[2..];
            } else {
                bytes.push(*first);
                rest = more;
            }
        }
        Some(PathBuf::from(OsString::from_vec(bytes)))
    }

    pub(crate) fn serialize<S: Serializer>(path: &Path, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&text(path))
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
        let text = String::deserialize(deserializer)?;
        path(&text).ok_or_else(|| serde::de::Error::custom("a path that is not percent-encoded"))
    }
}

mod encoded_option {
    use super::{Deserializer, PathBuf, Serializer, encoded};

    #[expect(clippy::ref_option, reason = "what serde calls")]
    pub(super) fn serialize<S: Serializer>(path: &Option<PathBuf>, serializer: S) -> Result<S::Ok, S::Error> {
        match path {
            Some(path) => encoded::serialize(path, serializer),
            None => serializer.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
        encoded::deserialize(deserializer).map(Some)
    }
}

impl Intent {
    /// An intent of a command on a chain.
    pub fn new(command: &str, chain: &Path, deed: Deed) -> Self {
        Self { version: VERSION, command: command.to_owned(), chain: chain.to_path_buf(), deed }
    }

    /// The text of its file.
    pub fn text(&self) -> String {
        toml::to_string(self).expect("strings, numbers and tables")
    }

    /// Reads the text of its file.
    pub fn parse(text: &str) -> std::result::Result<Self, String> {
        let intent: Self = toml::from_str(text).map_err(|error| error.message().to_owned())?;
        if intent.version == VERSION { Ok(intent) } else { Err(format!("its version is {}", intent.version)) }
    }

    /// All files that it speaks of as being changed, renamed or removed, or as what that rests on.
    pub fn files(&self) -> Vec<&Named> {
        match &self.deed {
            Deed::Snapshot { disks, .. } => disks.iter().flat_map(|disk| [&disk.old, &disk.overlay]).collect(),
            Deed::Commit { top, base, between, children, .. } => {
                [top, base].into_iter().chain(between).chain(children).collect()
            }
            Deed::Copy { draft, .. } => vec![draft],
            Deed::Shrink { image, .. } => vec![image],
            Deed::Pull { into, base, remove, between } => {
                into.iter().chain(base).chain(remove).chain(between).collect()
            }
        }
    }
}

/// Files that ought to be intents, and what is wrong with each.
pub(super) type Senseless = Vec<(PathBuf, String)>;

/// An intent as it is found in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundIntent {
    /// The name of its file.
    pub name: OsString,
    /// What it says.
    pub intent: Intent,
}

/// Where the intents and the lock of a store are: at the store's own directory, or for a single image at the nearest
/// marked one above it.
#[derive(Clone, Debug)]
pub struct Guard {
    /// The directory.
    pub root: Arc<Root>,
    /// The path from there to the store's own directory.
    pub prefix: PathBuf,
    /// Whether everybody who uses an image of the store is known to lie beneath it.
    pub is_whole: bool,
    /// Whether what is kept lies beneath the marker.
    is_marked: bool,
}

impl Guard {
    /// The guard of a store that is a directory: its own, unless it is not marked and lies in a store that is.
    pub(super) fn of_directory(root: &Arc<Root>) -> Result<Self> {
        let own = root.canonical();
        let (root, prefix) = match marked(own).next() {
            Some(marked) if marked != own => {
                (Arc::new(Root::open(marked)?), own.strip_prefix(marked).unwrap_or(Path::new("")).to_path_buf())
            }
            _ => (Arc::clone(root), PathBuf::new()),
        };
        Ok(Self { root, prefix, is_whole: true, is_marked: true })
    }

    /// The guard of a single image in the directory `root`; `stated`: the store as the user says.
    pub(super) fn of_image(root: &Arc<Root>, stated: Option<&Path>) -> Result<Self> {
        let own = root.canonical();
        let marked = match stated {
            Some(stated) => {
                Some(stated.canonicalize().map_err(|error| Error::io(format!("opening {}", stated.display()), error))?)
            }
            None => marked(own).next().map(Path::to_path_buf),
        };
        let Some(marked) = marked else {
            return Ok(Self { root: Arc::clone(root), prefix: PathBuf::new(), is_whole: false, is_marked: false });
        };
        let prefix = own.strip_prefix(&marked).map_err(|_| {
            let fact = "does not hold the image; name the directory of its store";
            Error::new(ErrorKind::Usage, format!("{} {fact}", marked.display()))
        })?;
        Ok(Self { root: Arc::new(Root::open(&marked)?), prefix: prefix.to_path_buf(), is_whole: true, is_marked: true })
    }

    /// Whether it is a directory that bears, or may bear, a store's marker.
    pub(super) fn is_marked(&self) -> bool {
        self.is_marked
    }

    /// Where intents are kept.
    fn intents(&self) -> &'static Path {
        Path::new(if self.is_marked { INTENTS } else { STRAY_INTENTS })
    }

    /// The directories of our own that there are.
    pub(super) fn own_directories(&self) -> Vec<OwnedFd> {
        let paths = [Path::new(if self.is_marked { MARKER } else { STRAY_INTENTS }), self.intents()];
        paths.iter().filter_map(|path| self.root.open_directory(path, false).ok().flatten()).collect()
    }

    /// Fails if what is kept here may be another's word.
    pub(super) fn check_trust(&self) -> Result<()> {
        let own = Path::new(if self.is_marked { MARKER } else { STRAY_INTENTS });
        trust::check(&self.root, own).and_then(|()| trust::check(&self.root, self.intents()))
    }

    /// Makes sure that there is a place for intents and notes.
    pub fn prepare(&self, names: &dyn Directory) -> Result<()> {
        if self.root.stat(self.intents()).is_ok() {
            return Ok(());
        }
        if self.is_marked {
            names.create_directory(Path::new(MARKER))?;
            names.sync(Path::new(""))?;
        }
        names.create_directory(self.intents())?;
        names.sync(self.intents().parent().unwrap_or(Path::new("")))
    }

    /// Whether there is a place for intents and notes.
    pub fn has_place(&self) -> bool {
        self.root.stat(self.intents()).is_ok()
    }

    /// What a first command has left in a directory, for users to know.
    pub fn place_note(&self) -> String {
        let directory = self.root.canonical().display();
        if self.is_marked {
            format!("{directory}/{MARKER} was made: it marks the store, and holds its lock and notes; keep it")
        } else {
            format!(
                "{STRAY_LOCK} and {STRAY_INTENTS} were made in {directory}, for the lock and notes of commands; they may be \
                 removed while no command runs and {STRAY_INTENTS} is empty"
            )
        }
    }

    /// Takes the store's lock: who holds it may look at who uses what, and change it.
    pub fn lock(&self, names: &dyn Directory) -> Result<Claim> {
        self.lock_within(names, PATIENCE)
    }

    /// The same for a job, which would not give up what it has done because another takes its time.
    pub fn lock_for_job(&self, names: &dyn Directory) -> Result<Claim> {
        self.lock_within(names, JOB_PATIENCE)
    }

    fn lock_within(&self, names: &dyn Directory, patience: Duration) -> Result<Claim> {
        let path = Path::new(if self.is_marked { LOCK } else { STRAY_LOCK });
        let file = match self.root.open_file_for_writing(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                match names.create(path, None) {
                    Err(error) if error.kind() != ErrorKind::Exists => return Err(error),
                    _ => {}
                }
                self.root.open_file_for_writing(path)?
            }
            found => found?,
        };
        Claim::take(file, path, patience)
    }

    /// Writes an intent, durably, and keeps it ours.
    pub fn begin(&self, names: &dyn Directory, name: &str, intent: &Intent) -> Result<OwnedIntent> {
        let (draft, path) = (self.intents().join(format!("{name}.new")), self.intents().join(format!("{name}.toml")));
        let written = (|| {
            let file = names.create(&draft, None)?;
            file.write_at(0, intent.text().as_bytes())?;
            file.sync()?;
            let claim = Claim::take(self.root.open_file_for_writing(&draft)?, &draft, Duration::ZERO)?;
            names.rename(&draft, &path, false)?;
            names.sync(self.intents())?;
            Ok(claim)
        })();
        match written {
            Ok(claim) => Ok(OwnedIntent { path, intent: intent.clone(), _claim: claim }),
            Err(error) => {
                let _ = names.unlink(&draft);
                let _ = names.unlink(&path);
                Err(error)
            }
        }
    }

    /// Notes that are being written, or were when somebody was cut off.
    pub(super) fn drafts(&self) -> Vec<PathBuf> {
        let directories = [self.intents(), Path::new(MARKER)];
        let drafts = directories.into_iter().flat_map(|directory| {
            let listed = self.root.open_directory(directory, false).ok().flatten().map(|fd| Root::list(&fd));
            let entries = listed.and_then(Result::ok).unwrap_or_default().into_iter();
            let paths = entries.filter(|entry| entry.kind == EntryKind::File).map(|entry| directory.join(entry.name));
            paths.filter(|path| path.extension().is_some_and(|extension| extension == DRAFT)).collect::<Vec<_>>()
        });
        drafts.collect()
    }

    /// Takes up an intent that somebody has left. `Busy` if he has not.
    pub fn take_up(&self, found: &FoundIntent) -> Result<OwnedIntent> {
        let path = self.intents().join(&found.name);
        let file = self.root.open_file_for_writing(&path)?;
        let seen = crate::io::FileStat::of(&file)?.id;
        let claim = Claim::take(file, &path, Duration::ZERO)?;
        // He may have finished it in between.
        if self.root.stat(&path)?.id != seen {
            return Err(Error::new(ErrorKind::Stale, format!("{} has changed hands", path.display())));
        }
        Ok(OwnedIntent { path, intent: found.intent.clone(), _claim: claim })
    }

    /// Whether somebody is at work on an intent.
    pub fn is_owned(&self, found: &FoundIntent) -> bool {
        let path = self.intents().join(&found.name);
        self.root.open_file(&path).and_then(|file: OwnedFd| Claim::is_held(file, &path)).unwrap_or(false)
    }

    /// All intents of the store, and what is wrong with those that make no sense.
    /// Fails where nobody can tell: what is spoilt would be shown.
    pub(super) fn read(&self) -> Result<(Vec<FoundIntent>, Senseless)> {
        let (mut found, mut problems) = (Vec::new(), Vec::new());
        if let Err(error) = self.check_trust() {
            let sentence = format!("notes commands that were begun, and nothing of it is carried out: {error}");
            return Ok((found, vec![(self.intents().to_path_buf(), sentence)]));
        }
        let directory = match self.root.open_directory(self.intents(), true) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok((found, problems)),
            opened => opened?,
        };
        let Some(directory) = directory else { return Ok((found, problems)) };
        for entry in Root::list(&directory)? {
            let path = self.intents().join(&entry.name);
            if entry.kind != EntryKind::File || path.extension().is_none_or(|extension| extension != "toml") {
                continue;
            }
            let file = match self.root.open_file(&path) {
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                opened => opened?,
            };
            let mut text = String::new();
            let read = std::fs::File::from(file).take(MAX_LEN).read_to_string(&mut text);
            match read.map_err(|error| error.to_string()).and_then(|_| Intent::parse(&text)) {
                Ok(intent) => found.push(FoundIntent { name: entry.name, intent }),
                Err(reason) => {
                    let sentence = format!("notes a command that was begun, but cannot be understood: {reason}");
                    problems.push((path, sentence));
                }
            }
        }
        Ok((found, problems))
    }
}

/// The marked directories from this one upwards.
pub(super) fn marked(directory: &Path) -> impl Iterator<Item = &Path> {
    directory.ancestors().filter(|above| above.join(MARKER).is_dir())
}

/// An intent that is ours to finish.
#[derive(Debug)]
pub struct OwnedIntent {
    path: PathBuf,
    /// What it says.
    pub intent: Intent,
    _claim: Claim,
}

impl OwnedIntent {
    /// All is done, or undone: takes the note away, durably.
    pub fn end(self, names: &dyn Directory) -> Result<()> {
        match names.unlink(&self.path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        names.sync(self.path.parent().unwrap_or(Path::new("")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::{Descriptors, Host, ThisHost};

    fn named(path: &str, inode: u64) -> Named {
        Named { path: path.into(), inode }
    }

    fn commit() -> Intent {
        let odd = PathBuf::from(OsString::from_vec(b"sub/\xff 100%\n.qcow2".to_vec()));
        let deed = Deed::Commit {
            top: Named { path: odd, inode: 7 },
            base: named("base.raw", 1),
            between: vec![named("sn1.qcow2", 2)],
            children: vec![],
            keep: true,
            rename: Some("web01.raw".into()),
        };
        Intent::new("commit top=\"a b\"", Path::new("web01"), deed)
    }

    #[test]
    fn what_is_written_is_read() {
        let pull = Deed::Pull { into: vec![named("a", 1)], base: None, remove: vec![], between: vec![named("b", 2)] };
        let disks = vec![NewTop {
            old: named("a", 1),
            frozen: "b".into(),
            overlay: named(".c", 3),
            name: "a".into(),
            backing: Some(named("d", 4)),
        }];
        let snapshot = Deed::Snapshot { seconds: -5, nanoseconds: 6, description: "x\n\"".into(), disks };
        let copy = Deed::Copy { draft: named(".x.new", 5), name: "y\u{fc}".into() };
        let shrink = Deed::Shrink { image: named("a", 1), size: 512 };
        let more = [pull, snapshot, copy, shrink].map(|deed| Intent::new("x", Path::new(""), deed));
        for intent in std::iter::once(commit()).chain(more) {
            assert_eq!(Intent::parse(&intent.text()), Ok(intent.clone()), "{}", intent.text());
        }
        assert!(Intent::parse("version = 1").is_err());
        assert!(Intent::parse(&commit().text().replace("version = 1", "version = 2")).is_err());
    }

    #[test]
    fn an_intent_is_its_owners_until_he_goes() {
        let place = tempfile::tempdir().unwrap();
        let root = Arc::new(Root::open(place.path()).unwrap());
        let names = ThisHost.directory(&root, &Descriptors::with_limit(4));
        let guard = Guard::of_directory(&root).unwrap();
        guard.prepare(&*names).unwrap();
        let owned = guard.begin(&*names, "1", &commit()).unwrap();
        let (found, problems) = guard.read().unwrap();
        assert_eq!((found.len(), problems.len(), &found[0].intent), (1, 0, &commit()));
        assert!(guard.is_owned(&found[0]));
        assert_eq!(guard.take_up(&found[0]).unwrap_err().kind(), ErrorKind::Busy);
        drop(owned);
        assert!(!guard.is_owned(&found[0]));
        guard.take_up(&found[0]).unwrap().end(&*names).unwrap();
        assert!(guard.read().unwrap().0.is_empty());
        std::fs::write(place.path().join(".chainfs/intents/2.toml"), "nonsense").unwrap();
        assert_eq!(guard.read().unwrap().1.len(), 1);
        let lock = guard.lock(&*names).unwrap();
        drop(lock);
        guard.lock(&*names).unwrap();
    }
}
