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
    /// Removes a snapshot, and no other view.
    Delete,
    /// Makes the active disk what a view shows.
    Revert,
    /// Puts a layer on another one.
    Rebase,
    /// Makes a new chain on top of a snapshot.
    Clone,
    /// Makes the active disk longer or shorter.
    Resize,
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
    /// `delete`.
    Delete(DeleteRequest),
    /// `revert`.
    Revert(RevertRequest),
    /// `rebase`.
    Rebase(RebaseRequest),
    /// `clone`.
    Clone(CloneRequest),
    /// `resize`.
    Resize(ResizeRequest),
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
    /// Whether their persistent bitmaps may.
    pub discard_bitmaps: bool,
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
    /// Whether their persistent bitmaps may.
    pub discard_bitmaps: bool,
}

/// The words of `delete`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteRequest {
    /// The snapshot, as a view's name.
    pub name: Vec<u8>,
    /// Where its bytes go.
    pub method: DeleteMethod,
    /// Whether internal snapshots in files that are removed may go with them.
    pub discard_internal: bool,
    /// Whether their persistent bitmaps may.
    pub discard_bitmaps: bool,
}

/// Where the bytes go by which others differ from a snapshot that is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeleteMethod {
    /// The way that copies less, of those that can be gone.
    #[default]
    Auto,
    /// Down: what stands on the snapshot is merged into its file.
    Commit,
    /// Up: the snapshot is merged into everything that stands on it.
    Pull,
}

/// The words of `revert`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RevertRequest {
    /// What the disk becomes, as a view's name.
    pub to: Vec<u8>,
    /// The snapshot under which what the active layer held is kept.
    pub save: Option<Vec<u8>>,
    /// Whether internal snapshots in a file that is removed may go with it.
    pub discard_internal: bool,
    /// Whether its persistent bitmaps may.
    pub discard_bitmaps: bool,
}

/// The words of `rebase`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RebaseRequest {
    /// The layer that is put on something else, as a view's name; none: the active one.
    pub layer: Option<Vec<u8>>,
    /// A file as the layer's header would name it, or a view of the chain; none: nothing.
    pub base: Option<Vec<u8>>,
    /// Whether only the name in the header is changed.
    pub is_unsafe: bool,
    /// Whether layers may drop out of the chain by that.
    pub drop_layers: bool,
}

/// The words of `clone`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CloneRequest {
    /// What the new chain is to be called.
    pub name: Vec<u8>,
    /// The snapshot that it stands on, as a view's name; none: what the active layer stands on.
    pub from: Option<Vec<u8>>,
}

/// The words of `resize`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ResizeRequest {
    /// How long the disk is to be.
    pub size: NewSize,
    /// Whether it may become shorter, and lose what lies behind its new end.
    pub shrink: bool,
}

/// A size in bytes, or a difference to what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NewSize {
    /// So many bytes.
    To(u64),
    /// So many bytes more than now.
    More(u64),
    /// So many bytes less than now.
    Less(u64),
}

impl Verb {
    /// All of them, with their names.
    pub const ALL: [(Verb, &'static str); 9] = [
        (Verb::Snapshot, "snapshot"),
        (Verb::Commit, "commit"),
        (Verb::Pull, "pull"),
        (Verb::Delete, "delete"),
        (Verb::Revert, "revert"),
        (Verb::Rebase, "rebase"),
        (Verb::Clone, "clone"),
        (Verb::Resize, "resize"),
        (Verb::Cancel, "cancel"),
    ];

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
            Verb::Delete => DELETE_USAGE,
            Verb::Revert => REVERT_USAGE,
            Verb::Rebase => REBASE_USAGE,
            Verb::Clone => CLONE_USAGE,
            Verb::Resize => RESIZE_USAGE,
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
commit [top=VIEW] [base=VIEW] [keep] [discard-internal] [discard-bitmaps]

Merges top and everything down to base into base.
  top=VIEW           the upper end (the active disk)
  base=VIEW          the lower end (the layer below top)
  keep               top's file stays
  discard-internal   internal snapshots in the layers concerned may go
  discard-bitmaps    their persistent bitmaps may
";

const PULL_USAGE: &str = "\
pull [base=VIEW|none] [into=VIEW] [delete] [discard-internal] [discard-bitmaps]

Copies what lies between base and a layer into that layer, which then stands on base.
  base=VIEW          what it stands on afterwards (none: nothing)
  into=VIEW          the layer that is filled (the active disk)
  delete             removes layers that nobody needs afterwards
  discard-internal   internal snapshots of those may go with them
  discard-bitmaps    their persistent bitmaps may
";

const DELETE_USAGE: &str = "\
delete VIEW [method=commit|pull|auto] [discard-internal] [discard-bitmaps]

Removes a snapshot. What every other view shows stays the same.
  method=pull        its bytes go up, into everything that stands on it
  method=commit      what stands on it comes down, into its file, which takes that one's name
  method=auto        whichever of the two copies less (this is what happens without method=)
  discard-internal   internal snapshots in a file that is removed may go with it
  discard-bitmaps    its persistent bitmaps may
LAYER@NAME removes an internal snapshot.
";

const REVERT_USAGE: &str = "\
revert to=VIEW [save=NAME] [discard-internal] [discard-bitmaps]

Makes the active disk what VIEW shows. Nobody may have it open. What it held is lost, unless it is saved.
  to=VIEW            a snapshot of this chain, or an internal one
  save=NAME          what it held is kept as snapshot NAME
  discard-internal   internal snapshots in a file that is removed may go with it
  discard-bitmaps    its persistent bitmaps may
";

const REBASE_USAGE: &str = "\
rebase [layer=VIEW] base=FILE|none [unsafe [drop-layers]]

Puts a layer on another backing file.
  layer=VIEW   the layer (the active disk)
  base=FILE    as the layer's header would name it, or a view of this chain; none: it stands on nothing
  unsafe       only the name is changed: for a backing file that was moved or renamed, also when the old one is gone.
               The layer is the one right above that file. Without it what the layer shows stays the same, and what
               differs is copied
  drop-layers  with unsafe: FILE need not be the old backing file, and what lies between may drop out of the chain
";

const CLONE_USAGE: &str = "\
clone NAME [from=VIEW]

Makes a new chain NAME that stands on a snapshot and shows what it does.
  from=VIEW   the snapshot, or an internal one (what the active disk stands on)
";

const RESIZE_USAGE: &str = "\
resize [+|-]SIZE [shrink]

Makes the active disk SIZE bytes long, or by so much longer or shorter; K, M, G, T follow a number as in qemu-img.
  shrink   it may become shorter: what lies behind the new end is lost, and nobody may have the disk open
";
