//! Where the bytes of a disk come from, in comparable form: two ranges of the same origin, of one disk or of
//! two that share layers, hold the same bytes. No data is read to find that out.

use crate::error::{Error, ErrorKind, Result};
use crate::image::Mapping;
use crate::units::GuestOffset;

use super::view::View;

/// The origin of a range of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Origin {
    /// The serial number of an opened image; 0: none, the bytes are zeroes.
    pub image: u64,
    /// An offset in that image's data; the beginning of a stream if it is compressed.
    pub place: u64,
    /// Offset within the decompressed stream; `None` if it is not compressed.
    pub within: Option<u64>,
    /// Bytes.
    pub len: u64,
}

impl Origin {
    fn goes_on_with(&self, next: &Origin) -> bool {
        let goes_on = match (self.within, next.within) {
            _ if self.image == 0 => true,
            (None, None) => self.place + self.len == next.place,
            (Some(within), Some(next_within)) => self.place == next.place && within + self.len == next_within,
            _ => false,
        };
        self.image == next.image && goes_on
    }
}

impl View {
    /// The origins of a range, as far as it lies within the disk, in order; contiguous ones are joined.
    /// `Corrupt` where tables are damaged.
    pub fn origins(&self, start: u64, len: u64) -> Result<Vec<Origin>> {
        let end = start.saturating_add(len).min(self.size());
        let mut found: Vec<Origin> = Vec::new();
        let mut at = start;
        while at < end {
            let next = self.origin(at, end - at)?;
            at += next.len;
            match found.last_mut() {
                Some(last) if last.goes_on_with(&next) => last.len += next.len,
                _ => found.push(next),
            }
        }
        Ok(found)
    }

    /// The origin of the bytes at `at`, for at most `max` bytes.
    pub fn origin(&self, at: u64, max: u64) -> Result<Origin> {
        let extent = self.resolve(at, max)?;
        let len = extent.len;
        let zero = Origin { image: 0, place: 0, within: None, len };
        let Some(layer) = self.layers().get(extent.layer) else { return Ok(zero) };
        let image = layer.image().serial();
        match extent.mapping {
            Some(Mapping::Zero(_)) => Ok(zero),
            Some(Mapping::Data(host)) => Ok(Origin { image, place: host.0, within: None, len }),
            Some(Mapping::Compressed(stream)) => {
                let within = Some(layer.within_cluster(GuestOffset(at)));
                Ok(Origin { image, place: stream.at.0, within, len })
            }
            Some(Mapping::Hole) | None => {
                Err(Error::new(ErrorKind::Corrupt, format!("tables are damaged at {at:#x} of the disk")))
            }
        }
    }
}
