//! Guests' file systems are parsed in a process of its own, which has nothing but memory and what it is sent.

mod confine;
mod lane;
mod pool;
mod process;
pub(super) mod protocol;
mod remote;
mod serve;

pub(super) use pool::Pool;
pub(super) use process::{Disks, Worker};
pub use process::{Program, WITHOUT_SECCOMP, WORKER};
pub use protocol::{ListedEntry, Listing, Mounted, OpenedFile};
pub use serve::serve;
