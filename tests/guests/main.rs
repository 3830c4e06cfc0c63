//! Guests' file systems, volumes and partitions: the parsers, the workers, the mounts and the commands that
//! look into them.

mod btrfs;
mod cli;
mod content;
mod counted;
mod damage;
mod disk;
mod ext;
mod fat;
mod groups;
mod images;
mod luks;
mod mount;
mod scramble;
mod systems;
mod volumes;
mod worker;
mod xfs;
