//! Guests' file systems are parsed in a separate process that has only memory and what it is sent.

mod channel;
mod confine;
mod pool;
mod process;
pub(super) mod protocol;
mod remote;
mod serve;

pub(super) use pool::Pool;
pub(super) use process::{Disks, Worker};
pub use process::{UNLOCKS, WITHOUT_SECCOMP, WORKER, WorkerProgram, WorkerTask};
pub use protocol::{FoundEntry, ListedEntry, Listing, Mounted, OpenedFile, Trees};
pub use serve::serve;
