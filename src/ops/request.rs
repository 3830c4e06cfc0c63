//! What users ask for, as values that make sense by themselves.
//!
//! The file beside this, `parse`, makes them of words and words of them. Whether the store has what they
//! name is for others to say.

use std::path::PathBuf;

/// Bytes of a command, at most.
pub const MAX_COMMAND_LEN: usize = 64 << 10;

/// The verbs that have a control file each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Verb {
    /// Freezes the active layer under a name.
    Snapshot,
    /// Merges layers down.
    Commit,
    /// Merges layers up.
    Pull,
    /// Stops the running job.
    Cancel,
}

/// A request that makes sense by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// `snapshot`.
    Snapshot(SnapshotRequest),
    /// `commit`.
    Commit(CommitRequest),
    /// `pull`.
    Pull(PullRequest),
    /// `cancel`.
    Cancel,
}

/// The words of `snapshot`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// What the frozen layer, or the internal snapshot, is to be called.
    pub name: Vec<u8>,
    /// Whether it is kept inside the active image.
    pub internal: bool,
    /// The file that becomes the overlay, while the old one keeps its name: virsh's way.
    pub file: Option<Vec<u8>>,
    /// The user's words on it; at most 1,024 bytes.
    pub description: String,
    /// For the store's control file: the chains that are frozen at one instant. Empty: the one asked.
    pub chains: Vec<PathBuf>,
}

/// The words of `commit`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitRequest {
    /// The upper end, as a view's name; none: the active layer.
    pub top: Option<Vec<u8>>,
    /// The lower end; none: the layer below top.
    pub base: Option<Vec<u8>>,
    /// Whether top's file stays.
    pub keep: bool,
    /// Whether internal snapshots in the layers concerned may go.
    pub discard_internal: bool,
}

/// The words of `pull`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PullRequest {
    /// The layer that is to be stood on afterwards; none: nothing.
    pub base: Option<Vec<u8>>,
    /// The layer that is filled, as a view's name; none: the active one.
    pub into: Option<Vec<u8>>,
    /// Whether layers that nobody needs afterwards are removed.
    pub delete: bool,
    /// Whether internal snapshots of those may go with them.
    pub discard_internal: bool,
}

impl Verb {
    /// All of them, with their names.
    pub const ALL: [(Verb, &'static str); 4] =
        [(Verb::Snapshot, "snapshot"), (Verb::Commit, "commit"), (Verb::Pull, "pull"), (Verb::Cancel, "cancel")];

    /// Its name.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(verb, _)| *verb == self).expect("all of them").1
    }

    /// The verb of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known)| *known == name).map(|(verb, _)| *verb)
    }

    /// What reading its control file says.
    pub fn usage(self) -> &'static str {
        match self {
            Verb::Snapshot => SNAPSHOT_USAGE,
            Verb::Commit => COMMIT_USAGE,
            Verb::Pull => PULL_USAGE,
            Verb::Cancel => "cancel\n\nStops the running command at its next chunk. There are no words.\n",
        }
    }
}

const SNAPSHOT_USAGE: &str = "\
snapshot NAME [internal] [file=FILE] [description=\"TEXT\"]

Freezes the active disk as snapshot NAME and goes on in a new, empty overlay.
  internal        keeps the snapshot inside the active image
  file=FILE       the overlay is FILE, and the old file keeps its name
  description=    words of yours on it, at most 1,024 bytes
  chains=A,B      in .chainfs/control only: these chains, at one instant
";

const COMMIT_USAGE: &str = "\
commit [top=VIEW] [base=VIEW] [keep] [discard-internal]

Merges top and everything down to base into base.
  top=VIEW           the upper end (the active disk)
  base=VIEW          the lower end (the layer below top)
  keep               top's file stays
  discard-internal   internal snapshots in the layers concerned may go
";

const PULL_USAGE: &str = "\
pull [base=VIEW|none] [into=VIEW] [delete] [discard-internal]

Copies what lies between base and a layer into that layer, which then stands on base.
  base=VIEW          what it stands on afterwards (none: nothing)
  into=VIEW          the layer that is filled (the active disk)
  delete             removes layers that nobody needs afterwards
  discard-internal   internal snapshots of those may go with them
";
