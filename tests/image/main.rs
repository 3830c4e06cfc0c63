//! The engine of images by itself, without a store or a mount: formats, writers, repairs, on simulated disks
//! and beside QEMU.

mod check_oracle;
mod create_oracle;
mod fill;
mod format_oracle;
mod fuzz_format;
mod fuzz_images;
mod header_oracle;
mod internal_snapshot;
mod internal_snapshot_changes;
mod repair;
mod repair_crash;
mod shadow;
mod shrink;
mod writer_bad_images;
mod writer_crash;
mod writer_faults;
mod writer_memory;
mod writer_model;
