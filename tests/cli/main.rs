//! The command line, its messages, and tests of the documents.

mod architecture;
mod cli;
mod documentation;
mod messages;
mod notes;
mod semantics;
