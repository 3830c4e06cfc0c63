//! Commands on real stores by the library, without a mount: their effects, and their states after a crash or
//! an error.

mod commit_pull_snapshot;
mod crash_commit_pull_snapshot;
mod crash_delete_revert_rebase;
mod delete_revert_rebase;
mod faults;
mod identity;
mod memory;
mod names_and_files;
mod references;
mod remote;
mod remote_crash;
mod scans;
mod scenario;
mod trash;
mod users_of_layers;
