//! The mapping of a volume's bytes to the guest's disks.
//!
//! A map is a list of segments without gaps from the beginning of the volume to its end. Its memory grows
//! with the segments, not with the stripes, and a lookup takes logarithmic time.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::guest::Source;
use crate::guest::source::within;

/// A range of a volume, and where its bytes are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSegment {
    /// Where it begins in the volume.
    pub at: u64,
    /// Bytes; never 0.
    pub len: u64,
    /// Where its bytes are.
    pub place: VolumeMapping,
}

/// The mapping of a segment's bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VolumeMapping {
    /// Contiguous on one disk.
    Linear(DiskPosition),
    /// Striped over the legs, `stripe_len` bytes each in turn.
    Striped {
        /// Bytes; never 0.
        stripe_len: u64,
        /// Two or more.
        legs: Vec<DiskPosition>,
    },
}

/// A position on a disk where the bytes of a segment or a leg begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPosition {
    /// The disk's number: its index in [`layout`](super::layout)'s `disks`.
    pub disk: u32,
    /// Bytes from the disk's beginning.
    pub offset: u64,
}

/// A run of a volume's bytes that is contiguous on one disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeRun {
    /// The disk's number.
    pub disk: u32,
    /// Bytes from the disk's beginning.
    pub offset: u64,
    /// Bytes; never 0, and at most the requested number.
    pub len: u64,
}

/// Where the bytes from `at` on are, up to `len` contiguous ones; `None` outside all segments, or if `len` is
/// 0.
pub fn locate(segments: &[VolumeSegment], at: u64, len: u64) -> Option<VolumeRun> {
    let index = segments.partition_point(|segment| segment.at <= at).checked_sub(1)?;
    let segment = &segments[index];
    let into = at - segment.at;
    let len = len.min(segment.len.checked_sub(into)?);
    if len == 0 {
        return None;
    }
    let (leg, leg_at, len) = match &segment.place {
        VolumeMapping::Linear(leg) => (leg, into, len),
        VolumeMapping::Striped { stripe_len, legs } => {
            let (stripe, within) = (into.checked_div(*stripe_len)?, into % stripe_len);
            let count = legs.len() as u64;
            let leg = legs.get(stripe.checked_rem(count)? as usize)?;
            let leg_at = (stripe / count).checked_mul(*stripe_len)?.checked_add(within)?;
            (leg, leg_at, len.min(stripe_len - within))
        }
    };
    Some(VolumeRun { disk: leg.disk, offset: leg.offset.checked_add(leg_at)?, len })
}

/// A volume as a source.
pub(super) struct Mapped {
    pub(super) size: u64,
    pub(super) segments: Vec<VolumeSegment>,
    pub(super) disks: Vec<Arc<dyn Source>>,
}

impl Source for Mapped {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, at, buf.len())?;
        let mut done = 0;
        while done < buf.len() {
            let here = at + done as u64;
            let run = locate(&self.segments, here, (buf.len() - done) as u64);
            let found = run.and_then(|run| Some((run, self.disks.get(run.disk as usize)?)));
            let Some((run, disk)) = found else {
                let fact = format!("no disk holds the volume's bytes at {here:#x}");
                return Err(Error::new(ErrorKind::Corrupt, fact));
            };
            let end = done + run.len as usize;
            disk.read_at(run.offset, &mut buf[done..end])?;
            done = end;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leg(disk: u32, offset: u64) -> DiskPosition {
        DiskPosition { disk, offset }
    }

    /// 30 bytes of two disks: ten in a row, then twenty in stripes of four over three legs.
    fn mapped() -> Mapped {
        let legs = vec![leg(1, 0), leg(0, 20), leg(1, 50)];
        let segments = vec![
            VolumeSegment { at: 0, len: 10, place: VolumeMapping::Linear(leg(0, 5)) },
            VolumeSegment { at: 10, len: 20, place: VolumeMapping::Striped { stripe_len: 4, legs } },
        ];
        let disks: Vec<Arc<dyn Source>> =
            vec![Arc::new((0..100).collect::<Vec<u8>>()), Arc::new((100..200).collect::<Vec<u8>>())];
        Mapped { size: 30, segments, disks }
    }

    #[test]
    fn stripes_take_turns_over_the_legs() {
        let mut all = [0; 30];
        mapped().read_at(0, &mut all).unwrap();
        let expected = [
            5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 100, 101, 102, 103, 20, 21, 22, 23, 150, 151, 152, 153, 104,
            105, 106, 107, 24, 25, 26, 27,
        ];
        assert_eq!(all, expected);
        for at in 0..30 {
            for len in 0..30 - at {
                let mut part = vec![0; len];
                mapped().read_at(at as u64, &mut part).unwrap();
                assert_eq!(part, expected[at..at + len], "{len} at {at}");
            }
        }
    }

    #[test]
    fn bytes_outside_all_segments_have_no_position() {
        let segments = mapped().segments;
        assert_eq!(locate(&segments, 9, 100), Some(VolumeRun { disk: 0, offset: 14, len: 1 }));
        assert_eq!(locate(&segments, 13, 100), Some(VolumeRun { disk: 1, offset: 3, len: 1 }));
        for (at, len) in [(30, 1), (u64::MAX, 1), (5, 0)] {
            assert_eq!(locate(&segments, at, len), None);
        }
        assert_eq!(locate(&segments[1..], 9, 1), None);
        assert_eq!(mapped().read_at(25, &mut [0; 6]).unwrap_err().kind(), ErrorKind::Corrupt);
        let far = VolumeSegment { at: 0, len: u64::MAX, place: VolumeMapping::Linear(leg(0, u64::MAX - 5)) };
        assert_eq!(locate(&[far], 6, 1), None);
    }
}
