//! Moving the bytes of some layers into a layer below them, piece by piece.
//!
//! Promises: ranges that the layers leave unallocated are not touched; zeroes become zeroes; data that a file
//! holds as it is, is moved by the kernel. Pieces are bounded, so that a waiting request does not wait long.

use std::sync::Arc;

use crate::chain::View;
use crate::error::Result;
use crate::image::Mapping;
use crate::image::write::{Writer, Zeroing};
use crate::io::Storage;
use crate::units::{BlockStatus, HostOffset, Run};

/// Maximum bytes of the disk that one piece covers.
pub(super) const PIECE: u64 = 8 << 20;
/// Bytes copied through memory at once.
const BUFFER: u64 = 1 << 20;

/// The layers that are merged down.
pub(super) struct CommitSegment {
    /// The active layer, whose content only its writer knows; `None` if all are frozen.
    pub(super) live: Option<Arc<Writer>>,
    /// The frozen layers, top first; `None` if there are none.
    pub(super) frozen: Option<Arc<View>>,
}

/// Where a segment has a range.
enum SegmentMapping {
    Silent,
    Zero,
    /// In this file at this offset.
    In(Arc<dyn Storage>, u64),
    /// To be read through the segment.
    Read,
}

impl CommitSegment {
    /// The size of the disk at the top of the segment.
    pub(super) fn size(&self) -> u64 {
        match (&self.live, &self.frozen) {
            (Some(writer), _) => writer.size(),
            (None, Some(view)) => view.size(),
            (None, None) => 0,
        }
    }

    fn find(&self, at: u64, max: u64) -> Result<Run<SegmentMapping>> {
        let mut max = max;
        if let Some(writer) = &self.live {
            let run = writer.map(at, max)?;
            match run.value {
                Mapping::Data(host) => {
                    return Ok(run.map(|_| SegmentMapping::In(writer.data_storage(), host.0)));
                }
                Mapping::Zero(_) => return Ok(run.map(|_| SegmentMapping::Zero)),
                Mapping::Compressed(_) => return Ok(run.map(|_| SegmentMapping::Read)),
                Mapping::Hole => max = run.len,
            }
        }
        let Some(view) = &self.frozen else { return Ok(Run::new(SegmentMapping::Silent, max)) };
        if at >= view.size() {
            // A shorter layer reads as zeroes beyond its end, whatever lies below it.
            return Ok(Run::new(SegmentMapping::Zero, max));
        }
        let extent = view.resolve(at, max.min(view.size() - at))?;
        let Some(layer) = view.layers().get(extent.layer) else {
            return Ok(Run::new(SegmentMapping::Silent, extent.len));
        };
        match extent.mapping {
            Some(Mapping::Zero(_)) => Ok(Run::new(SegmentMapping::Zero, extent.len)),
            Some(Mapping::Data(host)) => {
                // A range without blocks in the file reads as zeroes, and needs no space in the target.
                let run = layer.image().file_extent(host, HostOffset(host.0 + extent.len))?;
                Ok(run.map(|status| match status {
                    BlockStatus::Data => SegmentMapping::In(Arc::clone(layer.image().data()), host.0),
                    BlockStatus::Zero => SegmentMapping::Zero,
                }))
            }
            Some(Mapping::Compressed(_) | Mapping::Hole) | None => {
                Ok(Run::new(SegmentMapping::Read, extent.len))
            }
        }
    }

    /// Moves the bytes of the segment in `[at, at + len)` into `target`; returns the number of data bytes.
    pub(super) fn merge(&self, target: &Writer, at: u64, len: u64) -> Result<u64> {
        let (mut at, end) = (at, (at + len).min(self.size()));
        let mut moved = 0;
        while at < end {
            let Run { value: found, len: run } = self.find(at, end - at)?;
            match found {
                SegmentMapping::Silent => {}
                SegmentMapping::Zero => target.zero(at, run, Zeroing::Unmap)?,
                SegmentMapping::In(storage, host) => {
                    target.copy_from(at, run, &*storage, host)?;
                    moved += run;
                }
                SegmentMapping::Read => {
                    self.carry(target, at, run)?;
                    moved += run;
                }
            }
            at += run;
        }
        Ok(moved)
    }

    fn carry(&self, target: &Writer, at: u64, len: u64) -> Result<()> {
        let mut buffer = vec![0; len.min(BUFFER) as usize];
        let mut done = 0;
        while done < len {
            let piece = &mut buffer[..(len - done).min(BUFFER) as usize];
            match (&self.live, &self.frozen) {
                (Some(writer), _) => writer.read_at(at + done, piece)?,
                (None, Some(view)) => view.read_at(at + done, piece)?,
                (None, None) => unreachable!("something was found"),
            }
            target.write_at(at + done, piece)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    /// Reserves space in a raw target for all the data that will be moved into it.
    pub(super) fn reserve_in(&self, target: &Writer) -> Result<()> {
        let (mut at, end) = (0, self.size());
        while at < end {
            let Run { value: found, len: run } = self.find(at, end - at)?;
            if matches!(found, SegmentMapping::In(..) | SegmentMapping::Read) {
                target.allocate(at, run)?;
            }
            at += run;
        }
        Ok(())
    }

    /// The number of data bytes in the segment, as far as known without reading.
    pub(super) fn data_len(&self) -> Result<u64> {
        let (mut at, end, mut sum) = (0, self.size(), 0);
        while at < end {
            let Run { value: found, len: run } = self.find(at, end - at)?;
            if matches!(found, SegmentMapping::In(..) | SegmentMapping::Read) {
                sum += run;
            }
            at += run;
        }
        Ok(sum)
    }
}
