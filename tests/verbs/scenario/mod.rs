//! Commands on a real directory, and every state in which a crash could leave it.
//!
//! A [`Recorder`](tape::Recorder) between a store and the machine records every operation on files and names.
//! [`crash`] cuts its tape and makes directories of the results; a [`Judge`](judge::Judge) checks them, lets
//! a store resume interrupted commands, and checks again.
//!
//! `CHAINFS_SEED` replays random choices, `CHAINFS_LONG=1` takes time for many more states, and
//! `CHAINFS_KEEP=DIRECTORY` keeps the bad ones.

pub(crate) mod crash;
pub(crate) mod guest;
pub(crate) mod judge;
pub(crate) mod run;
pub(crate) mod scene;
pub(crate) mod shape;
pub(crate) mod strace;
pub(crate) mod tape;
