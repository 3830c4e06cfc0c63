//! Commands on real mounts while guests, loop devices and other programs are at work.

mod guest;
mod interruptions;
mod killed;
mod model;
mod verbs;
mod waits;
