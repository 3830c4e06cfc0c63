//! Guests' file systems, volumes and partitions: the parsers, the workers, the mounts and the commands that
//! look into them.

mod btrfs;
mod cli;
mod counted;
mod damage;
mod ext;
mod fat;
mod groups;
mod images;
mod mount;
mod scramble;
mod volumes;
mod worker;
