//! The layout of a frozen disk: which file holds which of its bytes, and where. It is what the
//! kernel needs to read the layers' files without this program.

use crate::error::{ErrorKind, Result};
use crate::image::{Layer, Mapping};
use crate::units::{GuestOffset, HostOffset};

use super::view::View;

/// A range of a disk, with the place of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First byte of the disk.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// Where they are.
    pub place: Place,
}

/// Where the bytes of a range are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: they are zeroes.
    Zero,
    /// In the data file of a layer, as they are.
    File {
        /// Index of the layer, counted from the top.
        layer: usize,
        /// Offset in its data file.
        at: u64,
    },
    /// Only [`View::read_at`] can give them, or the reason why they cannot be read.
    Unplaced,
}

impl View {
    /// Calls `paint` with all pieces of each layer within `[from, to)`, from the lowest layer up: a piece
    /// covers those before it, and what is in no piece is zero. Each layer is asked once for each of its
    /// pieces, so that the whole of a deep chain takes no longer than its tables are long. The view must be
    /// frozen.
    pub fn paint(&self, from: u64, to: u64, mut paint: impl FnMut(Piece) -> Result<()>) -> Result<()> {
        assert!(!self.is_live(), "the layout of a disk that changes");
        for (index, layer) in self.layers().iter().enumerate().rev() {
            let (layer_walk, mut at) = (layer.walk(), from);
            while at < to {
                let (place, len) = match layer_walk.map(GuestOffset(at), to - at) {
                    Ok(run) => match run.value {
                        Mapping::Data(host) => (Some(Place::File { layer: index, at: host.0 }), run.len),
                        Mapping::Zero(_) => (Some(Place::Zero), run.len),
                        Mapping::Compressed(_) => (Some(Place::Unplaced), run.len),
                        Mapping::Hole => (None, run.len),
                    },
                    // It matters only if no layer above covers it.
                    Err(error) if error.kind() == ErrorKind::Corrupt => {
                        (Some(Place::Unplaced), layer.rest_of_cluster(GuestOffset(at), to - at))
                    }
                    Err(error) => return Err(error),
                };
                if let Some(place) = place {
                    paint(Piece { start: at, len, place })?;
                }
                at += len;
            }
        }
        Ok(())
    }

    /// The granularity of its layout: the smallest unit that any of its layers allocates. `None` if all
    /// layers are raw.
    pub fn granularity(&self) -> Option<u64> {
        self.layers().iter().filter_map(Layer::allocation_unit).min()
    }
}

/// Whether a layer has the `len` bytes at `start` of the disk in one piece at `at` of its data file.
pub fn is_at(layer: &Layer, start: u64, len: u64, at: u64) -> Result<bool> {
    let mut done = 0;
    while done < len {
        let found = layer.map(GuestOffset(start + done), len - done)?;
        if found.value != Mapping::Data(HostOffset(at + done)) {
            return Ok(false);
        }
        done += found.len;
    }
    Ok(true)
}
