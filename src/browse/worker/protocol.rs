//! What a daemon and its worker say to each other.
//!
//! One lane, one conversation at a time: the daemon asks, the worker may ask back for bytes of the disks, as often as it
//! needs, and then answers. Numbers and names that come from the worker are as trustworthy as the guest's disk: whoever
//! uses them looks at them first.

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind};
use crate::guest::inspect::OperatingSystem;
use crate::guest::volumes::{PhysicalVolumeName, VolumeLayout};
use crate::guest::{DirectoryEntry, ExtendedAttribute, FileAttributes, FileRun, Ino, Statistics};

/// Bytes that are fetched and kept as one.
pub(in crate::browse) const CHUNK: u64 = 1 << 16;
/// Chunks whose keys are fetched at once.
pub(in crate::browse) const GROUP: u64 = 64;
/// Bytes of one read, at most.
pub(in crate::browse) const READ_LEN: usize = 1 << 20;
/// Entries of a directory in one answer, at most.
pub(in crate::browse) const LIST_LEN: usize = 256;
/// Bytes of a file about whose place is asked at once.
pub(in crate::browse) const RUNS_SPAN: u64 = 1 << 30;
/// Runs that are told of a file when it is opened, at most.
pub(in crate::browse) const FIRST_RUNS_LEN: usize = 64;
/// Runs in one answer, at most.
pub(in crate::browse) const RUNS_LEN: usize = 1024;

/// What a chunk of a disk holds: two of the same key hold the same bytes, whatever disk they are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(in crate::browse) struct ChunkKey(pub u64, pub u64);

impl ChunkKey {
    /// Of a chunk of zeroes.
    pub(in crate::browse) const ZERO: Self = Self(0, 0);
}

/// A file system of a set of disks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(in crate::browse) struct VolumeId {
    /// The number that the daemon has given to the set.
    pub(in crate::browse) set: u32,
    /// Index in the set's layout.
    pub(in crate::browse) volume: u32,
}

/// What the daemon asks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::browse) enum Request {
    /// Looks at the disks of a set, whose sizes these are, and keeps the set under its number.
    Open { set: u32, sizes: Vec<u64> },
    /// Which physical volumes of which volume groups there are on the one disk of a set that is not kept.
    PhysicalVolumes { size: u64 },
    /// What is known of a file system as a whole.
    Mount(VolumeId),
    /// A name in a directory.
    Lookup(VolumeId, Ino, Vec<u8>),
    /// Entries of a directory from a place on.
    List(VolumeId, Ino, u64),
    /// What stat(2) says.
    Attributes(VolumeId, Ino),
    /// The target of a symbolic link.
    ReadLink(VolumeId, Ino),
    /// A file that is about to be read.
    OpenFile(VolumeId, Ino),
    /// Where bytes of a file are.
    Runs(VolumeId, Ino, u64, u64),
    /// Bytes of a file.
    Read(VolumeId, Ino, u64, u32),
    /// All extended attributes.
    ExtendedAttributes(VolumeId, Ino),
    /// Which operating systems a set holds.
    Inspect(u32),
}

/// What the worker answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::browse) enum Answer {
    /// To a request for a set that is not kept, or no longer: it is to be opened again.
    NoSuchSet,
    Layout(Box<VolumeLayout>),
    PhysicalVolumes(Vec<PhysicalVolumeName>),
    Mounted(Mounted),
    Found(Option<(Ino, FileAttributes)>),
    Listed(Listing),
    Attributes(FileAttributes),
    Link(Vec<u8>),
    OpenedFile(OpenedFile),
    Runs(Vec<FileRun>),
    /// The bytes follow as the frame's payload.
    Bytes,
    ExtendedAttributes(Vec<ExtendedAttribute>),
    OperatingSystems(Vec<OperatingSystem>),
}

/// What is known of a file system as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mounted {
    /// Its root directory.
    pub root: Ino,
    /// Its sizes.
    pub statistics: Statistics,
    /// What should be known of what is shown.
    pub remarks: Vec<String>,
    /// Why what is shown is not what was written last, if so.
    pub stale: Vec<String>,
}

/// An entry of a directory.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ListedEntry {
    /// Its name, and what that stands for.
    pub entry: DirectoryEntry,
    /// What stat(2) says, where that can be said.
    pub attributes: Option<FileAttributes>,
    /// Whether it is known to have no extended attributes.
    pub is_plain: bool,
}

/// A file that is about to be read.
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
    /// Whether these were the last.
    pub ends: bool,
}

/// Why something is not answered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::browse) struct Failure {
    kind: ErrorKind,
    sentence: String,
}

impl Failure {
    /// What an error says.
    pub(in crate::browse) fn of(error: &Error) -> Self {
        Self { kind: error.kind(), sentence: error.to_string() }
    }

    /// The error that was meant.
    pub(in crate::browse) fn error(&self) -> Error {
        // A sentence may hold whatever was on the disk.
        let sentence: String = self.sentence.chars().filter(|c| !c.is_control()).take(1000).collect();
        Error::new(self.kind, sentence)
    }
}

/// From the daemon.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::browse) enum ToWorker {
    Request(Request),
    Keys(Vec<ChunkKey>),
    /// The bytes follow as the frame's payload.
    Bytes,
    Refused(Failure),
}

/// From the worker.
#[derive(Debug, Serialize, Deserialize)]
pub(in crate::browse) enum FromWorker {
    /// The keys of chunks of a disk of the set in question.
    Locate {
        disk: u32,
        first: u64,
        count: u64,
    },
    /// Bytes of a disk.
    Read {
        disk: u32,
        at: u64,
        len: u32,
    },
    Answer(Result<Answer, Failure>),
}
