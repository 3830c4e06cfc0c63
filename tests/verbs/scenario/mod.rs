//! Commands on a real directory, and every state in which a crash could leave it.
//!
//! A [`Recorder`](tape::Recorder) stands between a store and the machine and notes whatever is done to files
//! and names. [`crash`] cuts its tape and makes directories of what is left; a [`Judge`](judge::Judge) looks
//! at them, lets a store take up what was begun, and looks again.
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
