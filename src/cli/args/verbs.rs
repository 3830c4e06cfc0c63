//! The verbs that change chains: the same words as in control files, as options.

use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::error::Result;
use crate::ops::{
    CloneRequest, CommitRequest, DeleteMethod, DeleteRequest, NewSize, PullRequest, RebaseRequest, Request,
    ResizeRequest, RevertRequest, SnapshotRequest, parse_chains,
};

/// How a verb is carried out.
#[derive(Debug, Default, Args)]
pub struct RunArgs {
    /// Show how far it is
    #[arg(short, long)]
    pub progress: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Do not wait for the end; only in a mount
    #[arg(long, conflicts_with_all = ["progress", "dry_run"])]
    pub detach: bool,
    /// The store of an image that is not mounted; else the nearest directory above that holds .chainfs
    #[arg(long, value_name = "DIR")]
    pub store: Option<PathBuf>,
    /// Options as of `mount -o`, for an image that is not mounted (repeatable)
    #[arg(short, value_name = "OPTIONS")]
    pub options: Vec<OsString>,
}

/// The words of `snapshot`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs snapshot /mnt/images/web01 before-upgrade
  chainfs snapshot --description 'works so far' web01.qcow2 monday
  chainfs snapshot --chains web01,db01 /mnt/images monday")]
pub struct SnapshotArgs {
    /// A chain's directory in a mount, or the image of a store that is not mounted
    pub target: PathBuf,
    /// What the snapshot is to be called
    pub name: OsString,
    /// Keep it inside the active image
    #[arg(long)]
    pub internal: bool,
    /// Let the old file keep its name; FILE is the new overlay
    #[arg(long, value_name = "FILE", conflicts_with = "internal")]
    pub file: Option<OsString>,
    /// Your words on it
    #[arg(long, value_name = "TEXT")]
    pub description: Option<String>,
    /// These chains at one instant; TARGET is then the mount, or the store. A comma within a path is written \,
    #[arg(long, value_name = "CHAINS")]
    pub chains: Vec<OsString>,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
}

/// What may go with a file that is merged or removed.
#[derive(Debug, Args)]
pub struct DiscardArgs {
    /// Let internal snapshots in a file that is merged or removed go with it
    #[arg(long)]
    pub discard_internal: bool,
    /// Let its persistent bitmaps go
    #[arg(long)]
    pub discard_bitmaps: bool,
}

/// The words of `commit`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs commit /mnt/images/web01
  chainfs commit -p --top tuesday --base monday /mnt/images/web01
  chainfs commit --dry-run web01.qcow2")]
pub struct CommitArgs {
    /// A chain's directory in a mount, or the image of a store that is not mounted
    pub target: PathBuf,
    /// The upper end; by default the active disk
    #[arg(long, value_name = "VIEW")]
    pub top: Option<OsString>,
    /// The lower end; by default the layer below top
    #[arg(long, value_name = "VIEW")]
    pub base: Option<OsString>,
    /// Keep top's file
    #[arg(long)]
    pub keep: bool,
    /// What may be lost.
    #[command(flatten)]
    pub discard: DiscardArgs,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The words of `pull`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs pull -p /mnt/images/web01
  chainfs pull --base monday --delete /mnt/images/web01
  chainfs pull --dry-run --into tuesday web01.qcow2")]
pub struct PullArgs {
    /// A chain's directory in a mount, or the image of a store that is not mounted
    pub target: PathBuf,
    /// What it stands on afterwards, or none; by default nothing
    #[arg(long, value_name = "VIEW")]
    pub base: Option<OsString>,
    /// The layer that is filled; by default the active disk
    #[arg(long, value_name = "VIEW")]
    pub into: Option<OsString>,
    /// Remove layers that nobody needs afterwards
    #[arg(long)]
    pub delete: bool,
    /// What may be lost.
    #[command(flatten)]
    pub discard: DiscardArgs,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The words of `delete`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs delete /mnt/images/web01 monday
  chainfs delete -p --method commit /mnt/images/web01 monday
  chainfs delete --dry-run web01.qcow2 active@before-upgrade")]
pub struct DeleteArgs {
    /// A chain's directory in a mount, or the image of a store that is not mounted
    pub target: PathBuf,
    /// The snapshot; LAYER@NAME is an internal one
    pub name: OsString,
    /// Where its bytes go
    #[arg(long, value_enum, default_value = "auto")]
    pub method: DeleteMethodArg,
    /// What may be lost.
    #[command(flatten)]
    pub discard: DiscardArgs,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
}

/// Where the bytes of a snapshot go that is deleted.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum DeleteMethodArg {
    /// Whichever of the two copies less
    Auto,
    /// What stands on it comes down into its file
    Commit,
    /// Up, into everything that stands on it
    Pull,
}

/// The words of `revert`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs revert /mnt/images/web01 monday
  chainfs revert --save before-revert /mnt/images/web01 monday
  chainfs revert --dry-run web01.qcow2 active@before-upgrade")]
pub struct RevertArgs {
    /// A chain's directory in a mount, or the image of a store that is not mounted
    pub target: PathBuf,
    /// What the disk becomes: a snapshot of the chain; LAYER@NAME is an internal one
    #[arg(value_name = "VIEW")]
    pub to: OsString,
    /// Keep what the disk held as this snapshot
    #[arg(long, value_name = "NAME")]
    pub save: Option<OsString>,
    /// What may be lost.
    #[command(flatten)]
    pub discard: DiscardArgs,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The words of `rebase`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs rebase -b golden.qcow2 /mnt/images/web01
  chainfs rebase -u -b ../moved/base.raw --layer monday web01.qcow2
  chainfs rebase -b none /mnt/images/web01")]
pub struct RebaseArgs {
    /// A chain's directory in a mount, or the image of a store that is not mounted
    pub target: PathBuf,
    /// The new backing file, as the layer's header would name it, or a view of the chain, or none
    #[arg(short, long, value_name = "FILE")]
    pub base: OsString,
    /// The layer that is put on it; by default the active disk
    #[arg(long, value_name = "VIEW")]
    pub layer: Option<OsString>,
    /// Change only the name, as for a backing file that was moved: of the layer right above that file
    #[arg(short = 'u', long = "unsafe")]
    pub is_unsafe: bool,
    /// With --unsafe: let layers drop out of the chain
    #[arg(long, requires = "is_unsafe")]
    pub drop_layers: bool,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The words of `clone`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs clone /mnt/images/web01 web02
  chainfs clone --from monday /mnt/images/web01 web02
  chainfs clone --from golden@release golden.qcow2 web03")]
pub struct CloneArgs {
    /// A chain's directory in a mount, or the image of a store that is not mounted
    pub target: PathBuf,
    /// What the new chain is called
    pub name: OsString,
    /// The snapshot that it stands on; by default what the active disk stands on
    #[arg(long, value_name = "VIEW")]
    pub from: Option<OsString>,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
}

/// The words of `resize`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  chainfs resize /mnt/images/web01 40G
  chainfs resize web01.qcow2 +10G
  chainfs resize --shrink web01.qcow2 -- -10G")]
pub struct ResizeArgs {
    /// A chain's directory in a mount, or the image of a store that is not mounted
    pub target: PathBuf,
    /// How long the disk is to be, or by how much longer (+) or shorter (-)
    #[arg(value_parser = new_size, allow_hyphen_values = true)]
    pub size: NewSize,
    /// It may become shorter, and lose what lies behind its new end
    #[arg(long)]
    pub shrink: bool,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
}

fn new_size(text: &str) -> std::result::Result<NewSize, String> {
    NewSize::parse(text.as_bytes()).map_err(|error| error.to_string())
}

/// The words of `cancel`.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  chainfs cancel /mnt/images/web01")]
pub struct CancelArgs {
    /// A chain's directory in a mount
    pub target: PathBuf,
}

impl SnapshotArgs {
    /// What is asked for.
    pub fn request(&self) -> Result<Request> {
        checked(Request::Snapshot(SnapshotRequest {
            name: self.name.clone().into_vec(),
            internal: self.internal,
            file: bytes(self.file.as_ref()),
            description: self.description.clone().unwrap_or_default(),
            chains: self.chains.iter().flat_map(|list| parse_chains(list.as_bytes())).collect(),
        }))
    }
}

impl CommitArgs {
    /// What is asked for.
    pub fn request(&self) -> Result<Request> {
        checked(Request::Commit(CommitRequest {
            top: bytes(self.top.as_ref()),
            base: bytes(self.base.as_ref()),
            keep: self.keep,
            discard_internal: self.discard.discard_internal,
            discard_bitmaps: self.discard.discard_bitmaps,
        }))
    }
}

impl PullArgs {
    /// What is asked for.
    pub fn request(&self) -> Result<Request> {
        checked(Request::Pull(PullRequest {
            base: bytes(self.base.as_ref()).filter(|base| base != b"none"),
            into: bytes(self.into.as_ref()),
            delete: self.delete,
            discard_internal: self.discard.discard_internal,
            discard_bitmaps: self.discard.discard_bitmaps,
        }))
    }
}

impl DeleteArgs {
    /// What is asked for.
    pub fn request(&self) -> Result<Request> {
        checked(Request::Delete(DeleteRequest {
            name: self.name.clone().into_vec(),
            method: match self.method {
                DeleteMethodArg::Auto => DeleteMethod::Auto,
                DeleteMethodArg::Commit => DeleteMethod::Commit,
                DeleteMethodArg::Pull => DeleteMethod::Pull,
            },
            discard_internal: self.discard.discard_internal,
            discard_bitmaps: self.discard.discard_bitmaps,
        }))
    }
}

impl RevertArgs {
    /// What is asked for.
    pub fn request(&self) -> Result<Request> {
        checked(Request::Revert(RevertRequest {
            to: self.to.clone().into_vec(),
            save: bytes(self.save.as_ref()),
            discard_internal: self.discard.discard_internal,
            discard_bitmaps: self.discard.discard_bitmaps,
        }))
    }
}

impl RebaseArgs {
    /// What is asked for.
    pub fn request(&self) -> Result<Request> {
        checked(Request::Rebase(RebaseRequest {
            layer: bytes(self.layer.as_ref()),
            base: bytes(Some(&self.base)).filter(|base| base != b"none"),
            is_unsafe: self.is_unsafe,
            drop_layers: self.drop_layers,
        }))
    }
}

impl CloneArgs {
    /// What is asked for.
    pub fn request(&self) -> Result<Request> {
        checked(Request::Clone(CloneRequest { name: self.name.clone().into_vec(), from: bytes(self.from.as_ref()) }))
    }
}

impl ResizeArgs {
    /// What is asked for.
    pub fn request(&self) -> Result<Request> {
        checked(Request::Resize(ResizeRequest { size: self.size, shrink: self.shrink }))
    }
}

fn checked(request: Request) -> Result<Request> {
    request.check()?;
    Ok(request)
}

fn bytes(word: Option<&OsString>) -> Option<Vec<u8>> {
    word.map(|word| word.clone().into_vec())
}
