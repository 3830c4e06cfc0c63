//! The mount: the store's tree in plain types, the service that decides how the kernel is answered, and its
//! transport.
//!
//! [`MountTree`] serves the kernel's requests (lookup, attributes, read, seek) in terms of nodes. [`Service`]
//! decides threads, caching, TTLs and errno. Only the module `fuse`, a transport, uses fuser, and only
//! `mount` calls mount(2). Only active disks can be written (`change`). Writes to control files go to the
//! engine (`control` and `progress`).

mod access;
mod attributes;
mod change;
mod control;
mod disk_labels;
mod fuse;
mod guest_file;
mod guest_numbers;
mod handles;
mod info_files;
mod kernel_map;
mod links;
pub mod mount;
mod mounted_volumes;
mod node;
mod partition_range;
mod pieces;
mod progress;
mod ring;
pub mod service;
mod tree;

pub use access::Caller;
pub use attributes::{Attributes, Ownership};
pub use change::Fallocate;
pub use control::{CONTROL, ControlFile, ControlHandle, ControlScope};
pub use disk_labels::SetMode;
pub use fuse::Server;
pub use guest_file::{GuestDirectory, GuestFile};
pub use guest_numbers::GuestNode;
pub use handles::Handle;
pub use info_files::{METRICS_PATH, PROCESS_METRIC};
pub use kernel_map::{DEFAULT_MAP_DIRECTORY, KernelMapStatistics, KernelMaps};
pub use node::{ChainDocument, Node, NodeKind, PartitionNode, StoreDocument};
pub use partition_range::PartitionRange;
pub use pieces::Pieces;
pub use progress::{ProgressReader, ProgressReply};
pub use service::{Features, Service, errno};
pub use tree::{GuestOptions, MountTree, NodeEntry};
