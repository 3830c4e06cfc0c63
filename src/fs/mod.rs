//! The mount: the store's tree in plain types, and the thin adapter that FUSE needs.
//!
//! [`Tree`] answers what a kernel asks (lookup, attributes, reading, seeking) in terms of nodes;
//! only the file `fuse` names fuser, only `mount` speaks to mount(2). Everything shown is
//! read-only in this version.

mod attributes;
mod documents;
mod fuse;
mod handles;
pub mod mount;
mod node;
mod tree;

pub use attributes::{Attributes, Ownership};
pub use fuse::{Features, Server};
pub use handles::{Handle, OpenDisk};
pub use node::{ChainDocument, Node, NodeKind, Part, StoreDocument, ViewNode};
pub use tree::{Listed, Tree};
