//! Mounts: their views of good and bad stores, writes through them, and access rights.

mod adversary;
mod bad_chains;
mod bad_input;
mod confinement;
mod control;
mod damaged_images;
mod damaged_layers;
mod descriptors;
mod external_changes;
mod locks;
mod locks_writer;
mod mounting;
mod repair;
mod rights;
mod service;
mod sweep;
mod switches;
mod tree;
mod write;
mod write_faults;
mod writer_judges;
mod writer_neighbours;
