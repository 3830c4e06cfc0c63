//! Commands that change chains: requests become plans, plans become jobs.
//!
//! A [`Request`] is parsed without looking at the store. A [`Plan`] lists all the effects of its job, and
//! every refusal, before anything is changed; a job runs exactly the plan that was shown. Promises: every
//! listed view keeps exactly its bytes, whatever fails and whenever the process or the machine stops. Inodes,
//! directories of the mount and the kernel are not handled here.

mod asker;
mod branch;
mod check;
mod clone;
mod command;
mod commit;
mod context;
mod copy;
mod delete;
mod domain_notes;
mod dropped;
mod ending;
mod engine;
mod freeze;
mod job;
mod job_table;
mod locked;
mod lookup;
mod mirror;
mod overlay;
mod permissions;
mod plan;
mod pull;
mod rebase;
mod rebased;
mod refusals;
mod removal;
mod replace;
mod request;
mod resize;
mod revert;
mod scanned_store;
mod snapshot;
mod status;
mod tokenize;
mod virsh;
mod words;

pub use asker::{AsUser, as_user};
pub use delete::DeleteMethod;
pub use engine::Engine;
pub use plan::{Plan, PlanLayer};
pub use resize::NewSize;
pub use status::{JobState, Status};
pub use tokenize::{MAX_COMMAND_LEN, quote};
pub use words::parse_chains;

request::verbs! {
    /// Freezes the active layer under a name.
    Snapshot = snapshot::SnapshotRequest;
    /// Merges layers of a chain down into one of them.
    Commit = commit::CommitRequest;
    /// Copies the data of the backing files into a layer.
    Pull = pull::PullRequest;
    /// Removes a snapshot, and no other view.
    Delete = delete::DeleteRequest;
    /// Sets the active disk to the content of a snapshot.
    Revert = revert::RevertRequest;
    /// Changes the backing file of a layer.
    Rebase = rebase::RebaseRequest;
    /// Creates a new chain on top of a snapshot.
    Clone = clone::CloneRequest;
    /// Grows or shrinks the active disk.
    Resize = resize::ResizeRequest;
}
