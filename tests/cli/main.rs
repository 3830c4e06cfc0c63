//! The command line, its messages, and tests of the documents.

mod architecture;
mod cli;
mod doctor;
mod documentation;
mod history;
mod journal;
mod manual;
mod messages;
mod notes;
mod packages;
mod recipes;
mod semantics;
mod tree;
mod try_view;
mod who;

use std::process::Command;

use support::{Store, chainfs_binary, tool};

/// The chainfs binary in the store's directory, without a user's configuration.
fn chainfs(store: &Store, args: &[&str]) -> Command {
    let mut command = tool(chainfs_binary());
    command.args(args).current_dir(store.root()).env("XDG_CONFIG_HOME", store.beside("config"));
    command
}
