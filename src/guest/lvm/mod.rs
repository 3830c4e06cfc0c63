//! LVM2: logical volumes of physical volumes.
//!
//! [`label`] finds a physical volume and its metadata areas.

mod label;

pub use label::{Id, Label, find_label};
