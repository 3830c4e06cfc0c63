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
    /// Striped over the legs.
    Striped(Stripes<Option<DiskPosition>>),
    /// Nowhere: they read as zeroes.
    Zero,
    /// Contiguous in the data of an opened container, from which they are decrypted.
    Encrypted(ContainerPosition),
    /// Only the worker can produce them: they are reconstructed from parity.
    Computed,
}

/// Stripes that are dealt to legs in turn. Chunk `c` is in row `c / legs` of leg `c % legs`, so rotating
/// parity is a list of as many legs as one period of it has chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stripes<L> {
    /// Bytes of a chunk; never 0.
    pub chunk_len: u64,
    /// Bytes from a leg's chunk of one row to that of the next: `chunk_len`, unless other chunks (of parity,
    /// or of other legs of the same disk) lie between them.
    pub row_len: u64,
    /// Where the segment begins in the first row: below `chunk_len * legs.len()`.
    pub start: u64,
    /// One or more. `None`: the leg's bytes are computed.
    pub legs: Vec<L>,
}

/// A position on a disk where the bytes of a segment or a leg begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskPosition {
    /// The disk's number: its index in [`layout`](super::layout)'s `disks`.
    pub disk: u32,
    /// Bytes from the disk's beginning.
    pub offset: u64,
}

/// A position in the data of an opened container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerPosition {
    /// The container's number: its index in the layout.
    pub container: u32,
    /// Bytes from the beginning of its data.
    pub offset: u64,
}

/// A run of a volume's bytes with one location.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeRun {
    /// Where its first byte is.
    pub place: RunPlace,
    /// Bytes; never 0, and at most the requested number.
    pub len: u64,
}

/// The location of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunPlace {
    /// Contiguous on a disk.
    Disk(DiskPosition),
    /// Nowhere: it reads as zeroes.
    Zero,
    /// Contiguous in the data of an opened container.
    Encrypted(ContainerPosition),
    /// Only the worker can produce it.
    Computed,
}

impl VolumeRun {
    /// The position on a disk, if it has one.
    pub fn on_disk(&self) -> Option<DiskPosition> {
        match self.place {
            RunPlace::Disk(position) => Some(position),
            RunPlace::Zero | RunPlace::Encrypted(_) | RunPlace::Computed => None,
        }
    }
}

impl ContainerPosition {
    /// The position `bytes` further.
    fn plus(self, bytes: u64) -> Option<Self> {
        Some(Self { container: self.container, offset: self.offset.checked_add(bytes)? })
    }
}

impl DiskPosition {
    /// The position `bytes` further.
    pub(super) fn plus(self, bytes: u64) -> Option<Self> {
        Some(Self { disk: self.disk, offset: self.offset.checked_add(bytes)? })
    }
}

impl<L> Stripes<L> {
    /// The leg of the byte at `into` of the segment, the offset in the leg, and the rest of the chunk.
    pub(super) fn find(&self, into: u64) -> Option<(&L, u64, u64)> {
        let at = self.start.checked_add(into)?;
        let (chunk, within) = (at.checked_div(self.chunk_len)?, at % self.chunk_len);
        let count = self.legs.len() as u64;
        let leg = self.legs.get(chunk.checked_rem(count)? as usize)?;
        let leg_at = (chunk / count).checked_mul(self.row_len)?.checked_add(within)?;
        Some((leg, leg_at, self.chunk_len - within))
    }

    /// Bytes of the volume in one row.
    pub(super) fn row_of(&self) -> u64 {
        self.chunk_len.saturating_mul(self.legs.len() as u64)
    }
}

impl VolumeSegment {
    /// The end of the segment in the volume.
    pub(super) fn end(&self) -> u64 {
        self.at.saturating_add(self.len)
    }

    /// How many positions it has: the measure of its memory.
    pub fn weight(&self) -> usize {
        match &self.place {
            VolumeMapping::Striped(stripes) => 1 + stripes.legs.len(),
            _ => 1,
        }
    }

    /// The run at `into` of the segment, which is below its length.
    fn run(&self, into: u64, len: u64) -> Option<VolumeRun> {
        let (place, len) = match &self.place {
            VolumeMapping::Linear(leg) => (RunPlace::Disk(leg.plus(into)?), len),
            VolumeMapping::Striped(stripes) => {
                let (leg, leg_at, rest) = stripes.find(into)?;
                let place = match leg {
                    Some(leg) => RunPlace::Disk(leg.plus(leg_at)?),
                    None => RunPlace::Computed,
                };
                (place, len.min(rest))
            }
            VolumeMapping::Zero => (RunPlace::Zero, len),
            VolumeMapping::Encrypted(position) => (RunPlace::Encrypted(position.plus(into)?), len),
            VolumeMapping::Computed => (RunPlace::Computed, len),
        };
        Some(VolumeRun { place, len })
    }

    /// `len` bytes of the segment from `into` on, as a segment at `at`; `None` if its positions overflow.
    pub(super) fn cut(&self, into: u64, len: u64, at: u64) -> Option<Self> {
        let place = match &self.place {
            VolumeMapping::Linear(leg) => VolumeMapping::Linear(leg.plus(into)?),
            VolumeMapping::Striped(stripes) => {
                let from = stripes.start.checked_add(into)?;
                let row = stripes.row_of();
                let skipped = from.checked_div(row)?.checked_mul(stripes.row_len)?;
                let moved = |leg: &Option<DiskPosition>| match leg {
                    Some(leg) => leg.plus(skipped).map(Some),
                    None => Some(None),
                };
                let legs = stripes.legs.iter().map(moved).collect::<Option<Vec<_>>>()?;
                VolumeMapping::Striped(Stripes { start: from % row, legs, ..*stripes })
            }
            VolumeMapping::Zero => VolumeMapping::Zero,
            VolumeMapping::Encrypted(position) => VolumeMapping::Encrypted(position.plus(into)?),
            VolumeMapping::Computed => VolumeMapping::Computed,
        };
        Some(Self { at, len, place })
    }
}

/// Where the bytes from `at` on are, up to `len` of one location; `None` outside all segments, or if `len` is
/// 0.
pub fn locate(segments: &[VolumeSegment], at: u64, len: u64) -> Option<VolumeRun> {
    let index = segments.partition_point(|segment| segment.at <= at).checked_sub(1)?;
    let segment = &segments[index];
    let into = at - segment.at;
    let len = len.min(segment.len.checked_sub(into)?);
    if len == 0 { None } else { segment.run(into, len) }
}

/// The bytes of a volume: from the disks where they have a position.
pub(super) struct MappedSource {
    pub(super) size: u64,
    pub(super) segments: Arc<[VolumeSegment]>,
    pub(super) disks: Arc<[Arc<dyn Source>]>,
    /// Produces the computed ranges, at the volume's own offsets.
    pub(super) computed: Option<Arc<dyn Source>>,
}

impl Source for MappedSource {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, at, buf.len())?;
        let mut done = 0;
        while done < buf.len() {
            let here = at + done as u64;
            let run = locate(&self.segments, here, (buf.len() - done) as u64);
            let len = run.map_or(0, |run| run.len as usize);
            let piece = &mut buf[done..done + len];
            let absent = || {
                let fact = format!("no disk holds the volume's bytes at {here:#x}");
                Error::new(ErrorKind::Corrupt, fact)
            };
            match run.ok_or_else(absent)?.place {
                RunPlace::Disk(position) => {
                    let disk = self.disks.get(position.disk as usize).ok_or_else(absent)?;
                    disk.read_at(position.offset, piece)?;
                }
                RunPlace::Zero => piece.fill(0),
                RunPlace::Encrypted(_) | RunPlace::Computed => {
                    self.computed.as_ref().ok_or_else(absent)?.read_at(here, piece)?;
                }
            }
            done += len;
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

    /// 40 bytes: ten of a disk in a row, twenty in stripes of four over three legs, five zeroes, and five
    /// that are computed.
    fn mapped() -> MappedSource {
        let legs = vec![Some(leg(1, 0)), Some(leg(0, 20)), Some(leg(1, 50))];
        let stripes = Stripes { chunk_len: 4, row_len: 4, start: 0, legs };
        let segments = vec![
            VolumeSegment { at: 0, len: 10, place: VolumeMapping::Linear(leg(0, 5)) },
            VolumeSegment { at: 10, len: 20, place: VolumeMapping::Striped(stripes) },
            VolumeSegment { at: 30, len: 5, place: VolumeMapping::Zero },
            VolumeSegment { at: 35, len: 5, place: VolumeMapping::Computed },
        ];
        let disks: Vec<Arc<dyn Source>> =
            vec![Arc::new((0..100).collect::<Vec<u8>>()), Arc::new((100..200).collect::<Vec<u8>>())];
        let computed = Arc::new((200..240).collect::<Vec<u8>>());
        MappedSource { size: 40, segments: segments.into(), disks: disks.into(), computed: Some(computed) }
    }

    #[test]
    fn stripes_take_turns_over_the_legs() {
        let mut all = [0; 40];
        mapped().read_at(0, &mut all).unwrap();
        let expected = [
            5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 100, 101, 102, 103, 20, 21, 22, 23, 150, 151, 152, 153, 104,
            105, 106, 107, 24, 25, 26, 27, 0, 0, 0, 0, 0, 235, 236, 237, 238, 239,
        ];
        assert_eq!(all, expected);
        for at in 0..40 {
            for len in 0..40 - at {
                let mut part = vec![0; len];
                mapped().read_at(at as u64, &mut part).unwrap();
                assert_eq!(part, expected[at..at + len], "{len} at {at}");
            }
        }
    }

    #[test]
    fn a_cut_segment_keeps_its_positions() {
        let whole = mapped();
        let legs = vec![Some(leg(0, 0)), None, Some(leg(1, 8))];
        let rotating = Stripes { chunk_len: 4, row_len: 12, start: 5, legs };
        let rotating = VolumeSegment { at: 0, len: 60, place: VolumeMapping::Striped(rotating) };
        for segment in whole.segments.iter().chain([&rotating]) {
            for into in 0..segment.len {
                for len in 1..=segment.len - into {
                    let cut = segment.cut(into, len, 7).unwrap();
                    for at in 0..len {
                        let run = locate(std::slice::from_ref(&cut), 7 + at, 1);
                        assert_eq!(run, segment.run(into + at, 1), "{segment:?}: {len} at {into}");
                    }
                }
            }
        }
    }

    #[test]
    fn bytes_outside_all_segments_have_no_position() {
        let segments = mapped().segments;
        let on_disk = |disk, offset, len| Some(VolumeRun { place: RunPlace::Disk(leg(disk, offset)), len });
        assert_eq!(locate(&segments, 9, 100), on_disk(0, 14, 1));
        assert_eq!(locate(&segments, 13, 100), on_disk(1, 3, 1));
        assert_eq!(locate(&segments, 31, 100), Some(VolumeRun { place: RunPlace::Zero, len: 4 }));
        assert_eq!(locate(&segments, 36, 2), Some(VolumeRun { place: RunPlace::Computed, len: 2 }));
        for (at, len) in [(40, 1), (u64::MAX, 1), (5, 0)] {
            assert_eq!(locate(&segments, at, len), None);
        }
        assert_eq!(locate(&segments[1..], 9, 1), None);
        assert_eq!(mapped().read_at(35, &mut [0; 6]).unwrap_err().kind(), ErrorKind::Corrupt);
        let far = VolumeSegment { at: 0, len: u64::MAX, place: VolumeMapping::Linear(leg(0, u64::MAX - 5)) };
        assert_eq!(locate(&[far], 6, 1), None);
        // Fields of a compromised worker.
        for (chunk_len, row_len, start) in [(0, 1, 0), (1, u64::MAX, u64::MAX - 1), (u64::MAX, u64::MAX, 9)] {
            let stripes = Stripes { chunk_len, row_len, start, legs: vec![Some(leg(0, 1)); 2] };
            let odd = VolumeSegment { at: 0, len: u64::MAX, place: VolumeMapping::Striped(stripes) };
            let _ = locate(std::slice::from_ref(&odd), u64::MAX - 3, 9);
            let _ = odd.cut(u64::MAX - 3, 1, 0);
        }
    }
}
