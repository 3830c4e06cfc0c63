//! The arguments of the verbs that change chains: those of control files, as options.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand, ValueEnum};

use crate::error::Result;
use crate::ops::{
    CloneRequest, CommitRequest, DeleteMethod, DeleteRequest, NewSize, PullRequest, RebaseRequest, Request,
    ResizeRequest, RevertRequest, SnapshotRequest, parse_chains,
};

/// The verbs. A verb has a row here and one in [`VerbCommand::invocation`], and nothing else in the command
/// line.
#[derive(Debug, Subcommand)]
pub enum VerbCommand {
    /// Freeze the active disk of a chain under a name
    Snapshot(SnapshotArgs),
    /// Merge layers of a chain down into one of them
    Commit(CommitArgs),
    /// Copy the data of the backing files into a layer
    Pull(PullArgs),
    /// Remove a snapshot without changing any other
    Delete(DeleteArgs),
    /// Set the active disk to the content of a snapshot
    Revert(RevertArgs),
    /// Change the backing file of a layer
    Rebase(RebaseArgs),
    /// Create a new chain on top of a snapshot
    Clone(CloneArgs),
    /// Grow or shrink the active disk
    Resize(ResizeArgs),
    /// Stop the running command of a chain
    Cancel(CancelArgs),
}

/// A verb with its arguments.
#[derive(Debug)]
pub struct Invocation<'a> {
    /// A chain's directory in a mount, or an image of an unmounted store.
    pub target: &'a Path,
    /// The request, checked.
    pub request: Request,
    /// How it is run.
    pub run: &'a RunArgs,
}

impl VerbCommand {
    /// The request that these arguments describe, and where and how it is run. `Usage` if the arguments
    /// contradict each other.
    pub fn invocation(&self) -> Result<Invocation<'_>> {
        let (target, request, run) = match self {
            Self::Snapshot(args) => (&args.target, args.request(), &args.run),
            Self::Commit(args) => (&args.target, args.request(), &args.run),
            Self::Pull(args) => (&args.target, args.request(), &args.run),
            Self::Delete(args) => (&args.target, args.request(), &args.run),
            Self::Revert(args) => (&args.target, args.request(), &args.run),
            Self::Rebase(args) => (&args.target, args.request(), &args.run),
            Self::Clone(args) => (&args.target, args.request(), &args.run),
            Self::Resize(args) => (&args.target, args.request(), &args.run),
            Self::Cancel(args) => (&args.target, Request::Cancel, &NO_OPTION),
        };
        request.check()?;
        Ok(Invocation { target, request, run })
    }
}

/// No option given.
static NO_OPTION: RunArgs =
    RunArgs { progress: false, dry_run: false, detach: false, store: None, options: Vec::new() };

/// How a verb is run.
#[derive(Debug, Args)]
pub struct RunArgs {
    /// Show progress
    #[arg(short, long)]
    pub progress: bool,
    /// Show the plan; change nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Return without waiting for the end; only in a mount
    #[arg(long, conflicts_with_all = ["progress", "dry_run"])]
    pub detach: bool,
    /// The store of an unmounted image; by default the nearest directory above that holds .chainfs
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Options as for `mount -o`, for an unmounted image (repeatable)
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<OsString>,
}

/// The arguments of `snapshot`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs snapshot /mnt/images/web01 before-upgrade
  chainfs snapshot --description 'works so far' web01.qcow2 monday
  chainfs snapshot --chains web01,db01 /mnt/images monday")]
pub struct SnapshotArgs {
    /// A chain's directory in a mount, or an image of an unmounted store
    pub target: PathBuf,
    /// The snapshot's name
    pub name: OsString,
    /// Create an internal snapshot in the active image
    #[arg(long)]
    pub internal: bool,
    /// Name the new overlay FILE; the old file keeps its name
    #[arg(long, value_name = "FILE", conflicts_with = "internal")]
    pub file: Option<OsString>,
    /// A description of the snapshot
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// Snapshot these chains at one instant; TARGET is the mount or the store. Write a comma within a path as
    /// \,
    #[arg(long, value_name = "CHAINS")]
    pub chains: Vec<OsString>,
    /// How the verb is run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// What may be lost with a file that is merged or removed.
#[derive(Debug, Args)]
pub struct DiscardArgs {
    /// Discard the internal snapshots of a file that is merged or removed
    #[arg(long)]
    pub discard_internal: bool,
    /// Discard the persistent bitmaps of a file that is merged or removed
    #[arg(long)]
    pub discard_bitmaps: bool,
}

/// The arguments of `commit`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs commit /mnt/images/web01
  chainfs commit -p --top tuesday --base monday /mnt/images/web01
  chainfs commit --dry-run web01.qcow2")]
pub struct CommitArgs {
    /// A chain's directory in a mount, or an image of an unmounted store
    pub target: PathBuf,
    /// The topmost layer to merge; by default the active disk
    #[arg(long, value_name = "VIEW")]
    pub top: Option<OsString>,
    /// The layer to merge into; by default the backing file of top
    #[arg(long, value_name = "VIEW")]
    pub base: Option<OsString>,
    /// Keep top's file
    #[arg(long)]
    pub keep: bool,
    /// What may be lost.
    #[command(flatten)]
    pub discard: DiscardArgs,
    /// How the verb is run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The arguments of `pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs pull -p /mnt/images/web01
  chainfs pull --base monday --delete /mnt/images/web01
  chainfs pull --dry-run --into tuesday web01.qcow2")]
pub struct PullArgs {
    /// A chain's directory in a mount, or an image of an unmounted store
    pub target: PathBuf,
    /// The layer's backing file afterwards, or none; by default none
    #[arg(long, value_name = "VIEW")]
    pub base: Option<OsString>,
    /// The layer to copy into; by default the active disk
    #[arg(long, value_name = "VIEW")]
    pub into: Option<OsString>,
    /// Remove layers that no chain needs afterwards
    #[arg(long)]
    pub delete: bool,
    /// What may be lost.
    #[command(flatten)]
    pub discard: DiscardArgs,
    /// How the verb is run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The arguments of `delete`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs delete /mnt/images/web01 monday
  chainfs delete -p --method commit /mnt/images/web01 monday
  chainfs delete --dry-run web01.qcow2 active@before-upgrade")]
pub struct DeleteArgs {
    /// A chain's directory in a mount, or an image of an unmounted store
    pub target: PathBuf,
    /// The snapshot; LAYER@NAME for an internal one
    pub name: OsString,
    /// Where to copy its data
    #[arg(long, value_enum, default_value = "auto")]
    pub method: DeleteMethodArg,
    /// What may be lost.
    #[command(flatten)]
    pub discard: DiscardArgs,
    /// How the verb is run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Where the data of a deleted snapshot goes.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DeleteMethodArg {
    /// The method that copies less
    Auto,
    /// Merge its overlay into its file
    Commit,
    /// Copy its data into each of its overlays
    Pull,
}

/// The arguments of `revert`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs revert /mnt/images/web01 monday
  chainfs revert --save before-revert /mnt/images/web01 monday
  chainfs revert --dry-run web01.qcow2 active@before-upgrade")]
pub struct RevertArgs {
    /// A chain's directory in a mount, or an image of an unmounted store
    pub target: PathBuf,
    /// The snapshot of the chain to revert to; LAYER@NAME for an internal one
    #[arg(value_name = "VIEW")]
    pub to: OsString,
    /// Keep the disk's present content as this snapshot
    #[arg(long, value_name = "NAME")]
    pub save: Option<OsString>,
    /// What may be lost.
    #[command(flatten)]
    pub discard: DiscardArgs,
    /// How the verb is run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The arguments of `rebase`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs rebase -b golden.qcow2 /mnt/images/web01
  chainfs rebase -u -b ../moved/base.raw --layer monday web01.qcow2
  chainfs rebase -b none /mnt/images/web01")]
pub struct RebaseArgs {
    /// A chain's directory in a mount, or an image of an unmounted store
    pub target: PathBuf,
    /// The new backing file as the layer's header is to name it, or a view of the chain, or none
    #[arg(short, long, value_name = "FILE")]
    pub base: OsString,
    /// The layer to rebase; by default the active disk
    #[arg(long, value_name = "VIEW")]
    pub layer: Option<OsString>,
    /// Change only the backing file name in the header, for a backing file that was moved
    #[arg(short = 'u', long = "unsafe")]
    pub is_unsafe: bool,
    /// With --unsafe: allow layers to drop out of the chain
    #[arg(long, requires = "is_unsafe")]
    pub drop_layers: bool,
    /// How the verb is run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The arguments of `clone`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs clone /mnt/images/web01 web02
  chainfs clone --from monday /mnt/images/web01 web02
  chainfs clone --from golden@release golden.qcow2 web03")]
pub struct CloneArgs {
    /// A chain's directory in a mount, or an image of an unmounted store
    pub target: PathBuf,
    /// The new chain's name
    pub name: OsString,
    /// The snapshot that backs the new chain; by default the backing file of the active disk
    #[arg(long, value_name = "VIEW")]
    pub from: Option<OsString>,
    /// How the verb is run.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The arguments of `resize`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs resize /mnt/images/web01 40G
  chainfs resize web01.qcow2 +10G
  chainfs resize --shrink web01.qcow2 -- -10G")]
pub struct ResizeArgs {
    /// A chain's directory in a mount, or an image of an unmounted store
    pub target: PathBuf,
    /// The new size, or how much to grow (+) or shrink (-)
    #[arg(value_parser = new_size, allow_hyphen_values = true)]
    pub size: NewSize,
    /// Allow shrinking; data beyond the new end is lost
    #[arg(long)]
    pub shrink: bool,
    /// How the verb is run.
    #[command(flatten)]
    pub run: RunArgs,
}

fn new_size(text: &str) -> std::result::Result<NewSize, String> {
    NewSize::parse(text.as_bytes()).map_err(|error| error.to_string())
}

/// The arguments of `cancel`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  chainfs cancel /mnt/images/web01")]
pub struct CancelArgs {
    /// A chain's directory in a mount
    pub target: PathBuf,
}

impl SnapshotArgs {
    /// The request that these arguments describe.
    fn request(&self) -> Request {
        Request::Snapshot(SnapshotRequest {
            name: self.name.clone().into_vec(),
            internal: self.internal,
            file: bytes(self.file.as_ref()),
            description: self.description.clone().unwrap_or_default(),
            chains: self.chains.iter().flat_map(|list| parse_chains(list.as_bytes())).collect(),
        })
    }
}

impl CommitArgs {
    /// The request that these arguments describe.
    fn request(&self) -> Request {
        Request::Commit(CommitRequest {
            top: bytes(self.top.as_ref()),
            base: bytes(self.base.as_ref()),
            keep: self.keep,
            discard_internal: self.discard.discard_internal,
            discard_bitmaps: self.discard.discard_bitmaps,
        })
    }
}

impl PullArgs {
    /// The request that these arguments describe.
    fn request(&self) -> Request {
        Request::Pull(PullRequest {
            base: bytes(self.base.as_ref()).filter(|base| base != b"none"),
            into: bytes(self.into.as_ref()),
            delete: self.delete,
            discard_internal: self.discard.discard_internal,
            discard_bitmaps: self.discard.discard_bitmaps,
        })
    }
}

impl DeleteArgs {
    /// The request that these arguments describe.
    fn request(&self) -> Request {
        Request::Delete(DeleteRequest {
            name: self.name.clone().into_vec(),
            method: match self.method {
                DeleteMethodArg::Auto => DeleteMethod::Auto,
                DeleteMethodArg::Commit => DeleteMethod::Commit,
                DeleteMethodArg::Pull => DeleteMethod::Pull,
            },
            discard_internal: self.discard.discard_internal,
            discard_bitmaps: self.discard.discard_bitmaps,
        })
    }
}

impl RevertArgs {
    /// The request that these arguments describe.
    fn request(&self) -> Request {
        Request::Revert(RevertRequest {
            to: self.to.clone().into_vec(),
            save: bytes(self.save.as_ref()),
            discard_internal: self.discard.discard_internal,
            discard_bitmaps: self.discard.discard_bitmaps,
        })
    }
}

impl RebaseArgs {
    /// The request that these arguments describe.
    fn request(&self) -> Request {
        Request::Rebase(RebaseRequest {
            layer: bytes(self.layer.as_ref()),
            base: bytes(Some(&self.base)).filter(|base| base != b"none"),
            is_unsafe: self.is_unsafe,
            drop_layers: self.drop_layers,
        })
    }
}

impl CloneArgs {
    /// The request that these arguments describe.
    fn request(&self) -> Request {
        Request::Clone(CloneRequest { name: self.name.clone().into_vec(), from: bytes(self.from.as_ref()) })
    }
}

impl ResizeArgs {
    /// The request that these arguments describe.
    fn request(&self) -> Request {
        Request::Resize(ResizeRequest { size: self.size, shrink: self.shrink })
    }
}

fn bytes(word: Option<&OsString>) -> Option<Vec<u8>> {
    word.map(|word| word.clone().into_vec())
}
