//! The devices of a file system, and reading of logical addresses from them.
//!
//! A [`Volume`] reads a range from each place that has it: copies, or what parity gives. Which answer is
//! right, checksums decide: they are the callers'.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::raid::{ReadPart, RowParts};
use crate::guest::source::Source;

use super::chunks::{Chunk, Chunks, Located, Place, PlacesOfRow};
use super::format::{corrupt, is_fact};
use super::superblock::{self, DeviceId, Superblock};

/// The devices of a file system at most. Its device numbers are not reused, but it can lose devices.
pub(super) const MAX_DEVICES: usize = 4096;

/// A device that is there.
pub(super) struct Device {
    pub(super) id: u64,
    uuid: [u8; 16],
    source: Arc<dyn Source>,
}

impl Device {
    pub(super) fn identity(&self) -> DeviceId {
        (self.id, self.uuid)
    }
}

/// The devices that are there, by their numbers.
pub(super) struct Devices(Vec<Device>);

impl Devices {
    /// The devices among `sources`, and the newest superblock with the number of its copy. A source without a
    /// superblock is left out if there is another one.
    ///
    /// Of clones of a device, one is used: the first source if it is one of them, else one of the first
    /// source's generation, else the newest.
    pub(super) fn open(sources: &[Arc<dyn Source>]) -> Result<(Self, Superblock, usize)> {
        let mut found: Vec<(Device, Superblock, usize)> = Vec::new();
        let (mut failed, mut main) = (None, None);
        for (number, source) in sources.iter().take(MAX_DEVICES).enumerate() {
            let (superblock, copy) = match superblock::find(&**source) {
                Ok(found) => found,
                Err(error) if is_fact(&error) => {
                    failed = Some(error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            let item = superblock.device;
            let device = Device { id: item.id, uuid: item.uuid, source: Arc::clone(source) };
            let generation = superblock.generation;
            if number == 0 {
                main = Some(generation);
            }
            let rank = |generation: u64| (Some(generation) == main, generation);
            match found.iter_mut().position(|(other, ..)| other.id == device.id) {
                Some(0) if main.is_some() => {}
                Some(at) if rank(found[at].1.generation) < rank(generation) => {
                    found[at] = (device, superblock, copy);
                }
                Some(_) => {}
                None => found.push((device, superblock, copy)),
            }
        }
        // A copy does not name the log. Of equal superblocks, the first source's.
        let newest = found.iter().rev().max_by_key(|(_, found, copy)| (found.generation, *copy == 0));
        let Some((superblock, copy)) = newest.map(|(_, found, copy)| (found.clone(), *copy)) else {
            return Err(failed.unwrap_or_else(|| corrupt("there is no btrfs superblock")));
        };
        Ok((Self(found.into_iter().map(|(device, ..)| device).collect()), superblock, copy))
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

    /// The offset of a piece in the only source, and whether that is its only copy. `None` if there are
    /// several sources.
    pub(super) fn place(&self, piece: &Piece<'_>) -> Option<(u64, bool)> {
        let [place, rest @ ..] = &piece.located.copies[..] else { return None };
        let device = self.devices.of(piece.chunk, *place).ok()?;
        let fits = place.at.checked_add(piece.len).is_some_and(|end| end <= device.source.size());
        (self.is_alone && fits).then_some((place.at, rest.is_empty() && piece.located.row.is_none()))
    }

    /// In how many ways a piece can be read.
    pub(super) fn ways(piece: &Piece<'_>) -> usize {
        let computed = match &piece.located.row {
            None => 0,
            Some(PlacesOfRow { second: None, .. }) => 1,
            // By either parity, and by both without one of the other data.
            Some(row) => 1 + row.data.len(),
        };
        piece.located.copies.len() + computed
    }

    /// Reads bytes of a piece, from `skip` on, in one of its ways.
    pub(super) fn read(&self, piece: &Piece<'_>, way: usize, skip: u64, buf: &mut [u8]) -> Result<()> {
        if let Some(place) = piece.located.copies.get(way) {
            return self.devices.of(piece.chunk, *place)?.source.read_at(place.at + skip, buf);
        }
        let (Some(row), way) = (&piece.located.row, way - piece.located.copies.len()) else {
            return Err(corrupt("there is no such copy"));
        };
        let part = |place: Place| -> Option<ReadPart<'_>> {
            let device = self.devices.of(piece.chunk, place).ok()?;
            Some(Box::new(move |buf| device.source.read_at(place.at + skip, buf)))
        };
        let others = (0..row.data.len()).filter(|other| *other != row.column);
        let left_out = way.checked_sub(2).and_then(|number| others.clone().nth(number));
        let data = row.data.iter().enumerate().map(|(number, place)| {
            (number != row.column && Some(number) != left_out).then(|| part(*place)).flatten()
        });
        let parts = RowParts {
            data: data.collect(),
            first: if way == 1 { None } else { part(row.first) },
            second: row.second.and_then(part),
            powers: (0..row.data.len()).collect(),
        };
        parts.reconstruct(row.column, buf)
    }
}
