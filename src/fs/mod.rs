//! The mount: the store's tree in plain types, and the thin adapter that FUSE needs.
//!
//! [`Tree`] answers what a kernel asks (lookup, attributes, reading, seeking) in terms of nodes;
//! only the file `fuse` names fuser, only `mount` speaks to mount(2). Only active disks can be
//! written; `change` is about that.

mod attributes;
mod change;
mod documents;
mod fuse;
mod handles;
pub mod mount;
mod node;
mod tree;

pub use attributes::{Attributes, Ownership};
pub use change::Fallocate;
pub use fuse::{Features, Server};
pub use handles::Handle;
pub use node::{ChainDocument, Node, NodeKind, Part, StoreDocument, ViewNode};
pub use tree::{Listed, Tree};
