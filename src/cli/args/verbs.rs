//! The verbs that change chains: the same words as in control files, as options.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use clap::Args;

use crate::error::Result;
use crate::ops::{CommitRequest, PullRequest, Request, SnapshotRequest};

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
    /// These chains at one instant; TARGET is then the mount, or the store
    #[arg(long, value_name = "CHAINS", value_delimiter = ',')]
    pub chains: Vec<PathBuf>,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
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
    /// Let internal snapshots in the layers concerned go
    #[arg(long)]
    pub discard_internal: bool,
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
    /// Let internal snapshots of those go with them
    #[arg(long)]
    pub discard_internal: bool,
    /// How it is carried out.
    #[command(flatten)]
    pub run: RunArgs,
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
            chains: self.chains.clone(),
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
            discard_internal: self.discard_internal,
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
            discard_internal: self.discard_internal,
        }))
    }
}

fn checked(request: Request) -> Result<Request> {
    request.check()?;
    Ok(request)
}

fn bytes(word: Option<&OsString>) -> Option<Vec<u8>> {
    word.map(|word| word.clone().into_vec())
}
