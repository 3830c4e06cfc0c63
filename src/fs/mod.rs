//! The mount: the store's tree in plain types, and the thin adapter that FUSE needs.
//!
//! [`Tree`] answers what a kernel asks (lookup, attributes, reading, seeking) in terms of nodes;
//! only the file `fuse` names fuser, only `mount` speaks to mount(2). Only active disks can be
//! written; `change` is about that. What is written to control files goes to the engine; `control` and
//! `progress` are about those.

mod access;
mod attributes;
mod change;
mod control;
mod documents;
mod fuse;
mod guest_file;
mod handles;
mod links;
pub mod mount;
mod node;
mod pieces;
mod progress;
mod slots;
mod tree;
mod window;

pub use access::Caller;
pub use attributes::{Attributes, Ownership};
pub use change::Fallocate;
pub use control::{CONTROL, ControlFile, ControlHandle, ControlScope};
pub use fuse::{Features, Server};
pub use guest_file::{GuestDirectory, GuestFile};
pub use handles::Handle;
pub use node::{ChainDocument, Node, NodeKind, PartitionNode, StoreDocument};
pub use pieces::Pieces;
pub use progress::{Answer, ProgressReader};
pub use slots::GuestNode;
pub use tree::{GuestOptions, Listed, Tree};
pub use window::Window;
