//! The protocol between the daemon and a worker.
//!
//! A channel carries one exchange at a time: the daemon sends a request, the worker may request bytes of the
//! disks as often as it needs, and then answers. Numbers and names from the worker are as untrusted as the
//! guest's disk: the daemon validates them before use.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};
use crate::guest::inspect::OperatingSystem;
use crate::guest::luks::{ContainerKeys, HeaderId, Secret, Unlocked};
use crate::guest::volumes::{SetMember, VolumeLayout};
use crate::guest::{
    Crossing, DirectoryEntry, ExtendedAttribute, FileAttributes, FileRun, Ino, Statistics, TreeId,
};

/// Bytes that are fetched and cached as one.
pub(in crate::browse) const CHUNK: u64 = 1 << 16;
/// Chunks whose keys are fetched at once.
pub(in crate::browse) const GROUP: u64 = 64;
/// Bytes of one read at most.
pub(in crate::browse) const READ_LEN: usize = 1 << 20;
/// Entries of a directory in one answer at most.
pub(in crate::browse) const LIST_LEN: usize = 256;
/// Bytes of a file whose runs are requested at once.
pub(in crate::browse) const RUNS_SPAN: u64 = 1 << 30;
/// Runs in the answer to `OpenFile` at most.
pub(in crate::browse) const FIRST_RUNS_LEN: usize = 64;
/// Runs in one answer at most.
pub(in crate::browse) const RUNS_LEN: usize = 1024;

/// Identifies the content of a chunk: chunks with equal keys hold the same bytes, on any disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(in crate::browse) struct ChunkKey(pub u64, pub u64);

impl ChunkKey {
    /// The key of a chunk of zeroes.
    pub(in crate::browse) const ZERO: Self = Self(0, 0);
}

/// A tree of files of a set of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(in crate::browse) struct SetTree {
    /// The set's number, assigned by the daemon.
    pub(in crate::browse) set: u32,
    /// Its tree.
    pub(in crate::browse) tree: TreeId,
}

/// A request of the daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::browse) enum Request {
    /// Opens a set of disks with these sizes, and keeps it under its number. Its encrypted volumes are opened
    /// with these keys.
    Open { set: u32, sizes: Vec<u64>, keys: ContainerKeys },
    /// The members of volume groups and arrays on the one disk of a temporary set.
    SetMembers { size: u64 },
    /// The root, the statistics and the remarks of a file system.
    Mount(SetTree),
    /// The inode of a name in a directory.
    Lookup(SetTree, Ino, Vec<u8>),
    /// Entries of a directory from a position on.
    List(SetTree, Ino, u64),
    /// The stat(2) attributes of an inode.
    Attributes(SetTree, Ino),
    /// The target of a symbolic link.
    ReadLink(SetTree, Ino),
    /// The size of a regular file and its first runs.
    OpenFile(SetTree, Ino),
    /// Runs of a file.
    Runs(SetTree, Ino, u64, u64),
    /// Bytes of a file.
    Read(SetTree, Ino, u64, u32),
    /// All extended attributes.
    ExtendedAttributes(SetTree, Ino),
    /// Bytes of a volume of a set that only the worker can produce.
    ReadVolume(u32, u32, u64, u32),
    /// The operating systems on a set.
    Inspect(u32),
    /// Tries secrets on an encrypted volume of a temporary set. Only for a worker that is started for this.
    Unlock { sizes: Vec<u64>, keys: ContainerKeys, id: HeaderId, secrets: Vec<Secret> },
}

/// An answer of the worker.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::browse) enum Answer {
    /// The set is not open, or no longer: it must be opened again.
    NoSuchSet,
    Layout(Box<VolumeLayout>),
    SetMembers(Vec<SetMember>),
    Mounted(Mounted),
    Found(Option<FoundEntry>),
    Listed(Listing),
    Attributes(FileAttributes),
    Link(Vec<u8>),
    OpenedFile(OpenedFile),
    Runs(Vec<FileRun>),
    /// The bytes follow as the frame's payload.
    Bytes,
    ExtendedAttributes(Vec<ExtendedAttribute>),
    OperatingSystems(Vec<OperatingSystem>),
    Unlocked(Unlocked),
}

impl Request {
    /// Bytes of the secrets in it; `None` if it has none, and need not be overwritten in memory.
    pub(super) fn secret_len(&self) -> Option<usize> {
        match self {
            Self::Open { keys, .. } if !keys.0.is_empty() => Some(keys.secret_len()),
            Self::Unlock { keys, secrets, .. } => {
                let given: usize = secrets.iter().map(|secret| secret.bytes().len()).sum();
                Some(keys.secret_len() + given)
            }
            _ => None,
        }
    }
}

/// The root, the statistics and the remarks of a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounted {
    /// Its root directory.
    pub root: Ino,
    /// Its statfs(2) numbers.
    pub statistics: Statistics,
    /// Facts about the shown state that the user should know.
    pub remarks: Vec<String>,
    /// Why the shown state is not the last one, if so.
    pub stale: Vec<String>,
    /// Its other trees; only of the main tree.
    pub trees: Trees,
}

/// The trees of a file system, for one who sees the main one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trees {
    /// The path of the main tree from the top level, if it is another tree.
    pub main: Option<String>,
    /// Index of the top level, if the main tree is another.
    pub top_level: Option<u32>,
    /// Number of all other trees below the top level.
    pub count: u32,
    /// The paths of the first of them.
    pub paths: Vec<String>,
}

/// What a name in a directory means.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct FoundEntry {
    /// Its inode.
    pub ino: Ino,
    /// The inode's stat(2) attributes.
    pub attributes: FileAttributes,
    /// The tree that begins there.
    pub crossing: Option<Crossing>,
}

/// An entry of a directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ListedEntry {
    /// Its name and inode.
    pub entry: DirectoryEntry,
    /// Its stat(2) attributes, if they can be read.
    pub attributes: Option<FileAttributes>,
    /// Whether it is known to have no extended attributes.
    pub is_plain: bool,
    /// The tree that begins there.
    pub crossing: Option<Crossing>,
}

/// A regular file that is about to be read.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct OpenedFile {
    /// Bytes.
    pub size: u64,
    /// Where the first of them are.
    pub runs: Vec<FileRun>,
}

/// A part of a directory.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Listing {
    /// Its entries.
    pub entries: Vec<ListedEntry>,
    /// Whether the directory ends after them.
    pub ends: bool,
}

/// An error as it is sent.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::browse) struct Failure {
    kind: ErrorKind,
    sentence: String,
}

impl Failure {
    /// From an error.
    pub(in crate::browse) fn of(error: &Error) -> Self {
        Self { kind: error.kind(), sentence: error.to_string() }
    }

    /// The error that was sent.
    pub(in crate::browse) fn error(&self) -> Error {
        // A sentence may contain any bytes from the disk.
        let sentence: String = self.sentence.chars().filter(|c| !c.is_control()).take(1000).collect();
        Error::new(self.kind, sentence)
    }
}

/// A message of the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::browse) enum ToWorker {
    Request(Request),
    Keys(Vec<ChunkKey>),
    /// The bytes follow as the frame's payload.
    Bytes,
    Refused(Failure),
}

/// A message of the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::browse) enum FromWorker {
    /// Requests the keys of chunks of a disk of the current set.
    Locate {
        disk: u32,
        first: u64,
        count: u64,
    },
    /// Requests bytes of a disk.
    Read {
        disk: u32,
        at: u64,
        len: u32,
    },
    Answer(Result<Answer, Failure>),
}
