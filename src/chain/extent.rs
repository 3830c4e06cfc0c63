//! A run of a disk, with the layer that holds it.

use crate::image::Mapping;

/// A run of one disk and where its bytes are.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Index of the layer that holds the run, counted from the top; one past the last layer if no layer does:
    /// it reads as zeroes.
    pub layer: usize,
    /// Where that layer has the bytes; never a hole. `None` if only the layer itself can answer: its tables
    /// are damaged there, or the flattened map has no room for the mapping (a compressed cluster).
    pub mapping: Option<Mapping>,
    /// Bytes.
    pub len: u64,
}
