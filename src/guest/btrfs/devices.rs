//! The devices of a file system, and reading of logical addresses from them.
//!
//! A [`Volume`] reads a range from each place that has it: copies, or what parity gives. Which answer is
//! right, checksums decide: they are the callers'.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::source::Source;

use super::chunks::{Chunk, Chunks, Located, Place};
use super::format::{corrupt, is_fact};
use super::superblock::{self, Superblock};

/// The devices of a file system at most. Its device numbers are not reused, but it can lose devices.
const MAX_DEVICES: usize = 4096;

/// A device that is there.
pub(super) struct Device {
    pub(super) id: u64,
    uuid: [u8; 16],
    generation: u64,
    source: Arc<dyn Source>,
}

/// The devices that are there, by their numbers.
pub(super) struct Devices(Vec<Device>);

impl Devices {
    /// The devices among `sources`, and the newest superblock with the number of its copy. A source without a
    /// superblock is left out if there is another one.
    pub(super) fn open(sources: &[Arc<dyn Source>]) -> Result<(Self, Superblock, usize)> {
        let mut newest: Option<(Superblock, usize)> = None;
        let (mut devices, mut failed): (Vec<Device>, _) = (Vec::new(), None);
        for source in sources.iter().take(MAX_DEVICES) {
            let (found, copy) = match superblock::find(&**source) {
                Ok(found) => found,
                Err(error) if is_fact(&error) => {
                    failed = Some(error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let device = Device {
                id: found.device.id,
                uuid: found.device.uuid,
                generation: found.generation,
                source: Arc::clone(source),
            };
            // Of two clones of a device, the newer one, or the first.
            match devices.iter_mut().find(|other| other.id == device.id) {
                Some(other) if other.generation < device.generation => *other = device,
                Some(_) => {}
                None => devices.push(device),
            }
            // A copy does not name the log.
            let rank = |found: &Superblock, copy: usize| (found.generation, copy == 0);
            if newest.as_ref().is_none_or(|(other, other_copy)| rank(other, *other_copy) < rank(&found, copy))
            {
                newest = Some((found, copy));
            }
        }
        let Some((superblock, copy)) = newest else {
            return Err(failed.unwrap_or_else(|| corrupt("there is no btrfs superblock")));
        };
        Ok((Self(devices), superblock, copy))
    }

    fn of(&self, chunk: &Chunk, place: Place) -> Result<&Device> {
        let stripe = &chunk.stripes[place.stripe];
        let found = self.0.iter().find(|device| device.id == stripe.device && device.uuid == stripe.uuid);
        found.ok_or_else(|| corrupt(format!("device {} is missing", stripe.device)))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Device> {
        self.0.iter()
    }
}

/// The logical addresses of a file system.
pub(super) struct Volume {
    pub(super) devices: Devices,
    pub(super) chunks: Chunks,
    /// Whether the offsets of the only source can be told to others.
    pub(super) is_alone: bool,
}

/// A piece of a range that was asked for: it lies in one stripe.
pub(super) struct Piece<'a> {
    chunk: &'a Chunk,
    located: Located,
    /// Bytes.
    pub(super) len: u64,
}

impl Volume {
    /// The first piece of `len` bytes from `at` on; `len` is not 0.
    pub(super) fn piece(&self, at: u64, len: u64) -> Result<Piece<'_>> {
        let chunk = self.chunks.at(at)?;
        let located = chunk.locate(at);
        let len = located.len.min(len);
        Ok(Piece { chunk, located, len })
    }

    /// The offset of a piece in the only source, if it has only one copy.
    pub(super) fn offset(&self, piece: &Piece<'_>) -> Option<u64> {
        let [place] = piece.located.copies[..] else { return None };
        let device = self.devices.of(piece.chunk, place).ok()?;
        let fits = place.at.checked_add(piece.len).is_some_and(|end| end <= device.source.size());
        (self.is_alone && fits && piece.located.parity.is_empty()).then_some(place.at)
    }

    /// In how many ways a piece can be read.
    pub(super) fn ways(piece: &Piece<'_>) -> usize {
        piece.located.copies.len() + usize::from(!piece.located.parity.is_empty())
    }

    /// Reads bytes of a piece, from `skip` on, in one of its ways.
    pub(super) fn read(&self, piece: &Piece<'_>, way: usize, skip: u64, buf: &mut [u8]) -> Result<()> {
        let from = |place: Place, buf: &mut [u8]| {
            self.devices.of(piece.chunk, place)?.source.read_at(place.at + skip, buf)
        };
        if let Some(place) = piece.located.copies.get(way) {
            return from(*place, buf);
        }
        buf.fill(0);
        let mut other = vec![0; buf.len()];
        for place in &piece.located.parity {
            from(*place, &mut other)?;
            buf.iter_mut().zip(&other).for_each(|(byte, other)| *byte ^= other);
        }
        Ok(())
    }
}
