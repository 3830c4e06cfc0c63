//! Commands on real mounts during I/O by guests, loop devices and other programs.

mod guest;
mod interruptions;
mod killed;
mod libvirt;
mod model;
mod verbs;
mod waits;
