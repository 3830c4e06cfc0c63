//! A run of a disk, with the layer that decides about it.

use crate::image::Mapping;

/// A run of one disk and where its bytes are.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Index of the layer that decides, from the top; behind the last one if none does, and it reads as
    /// zeroes.
    pub layer: usize,
    /// Where that layer has the bytes; never a hole. `None` where only the layer itself can tell: its tables
    /// are damaged there, or the flattened map has no room for what it says (a compressed cluster).
    pub mapping: Option<Mapping>,
    /// Bytes.
    pub len: u64,
}
