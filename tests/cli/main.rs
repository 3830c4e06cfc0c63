//! The command line, its sentences, and the documents held to their word.

mod architecture;
mod cli;
mod documentation;
mod messages;
mod notes;
mod semantics;
