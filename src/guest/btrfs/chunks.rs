//! Chunks: which ranges of which devices hold a range of logical addresses.
//!
//! [`Chunk::locate`] is arithmetic only. It answers for a piece of a chunk that lies in one stripe, with all
//! copies of it and, for RAID5 and RAID6, with the stripes that it can be computed from.

use crate::error::Result;
use crate::guest::bytes::{array, le16, le64};

use super::format::{KEY_LEN, Key, corrupt, kind, limit, object, unsupported};
use super::superblock::DeviceId;

const HEADER_LEN: usize = 48;
const STRIPE_LEN: usize = 32;
/// The only stripe length that btrfs has ever used.
pub(super) const STRIPE: u64 = 64 << 10;
/// Stripes of a row with parity at most, the kernel's limit of RAID 6.
const MAX_PARITY_STRIPES: u64 = 255;
/// Chunks of a file system at most. The usual ones are of a GiB.
const MAX_CHUNKS: usize = 1 << 20;

/// Types and profiles of chunks and block groups.
pub(super) mod profile {
    pub(in super::super) const DATA: u64 = 1 << 0;
    pub(in super::super) const SYSTEM: u64 = 1 << 1;
    pub(in super::super) const METADATA: u64 = 1 << 2;
    pub(in super::super) const RAID0: u64 = 1 << 3;
    pub(in super::super) const RAID1: u64 = 1 << 4;
    pub(in super::super) const DUP: u64 = 1 << 5;
    pub(in super::super) const RAID10: u64 = 1 << 6;
    pub(in super::super) const RAID5: u64 = 1 << 7;
    pub(in super::super) const RAID6: u64 = 1 << 8;
    pub(in super::super) const RAID1C3: u64 = 1 << 9;
    pub(in super::super) const RAID1C4: u64 = 1 << 10;
    /// All profiles; none of them: single.
    pub(in super::super) const ALL: u64 = 0x7f8;
    const REMAPPED: u64 = 1 << 11;
    pub(super) const KNOWN: u64 = ALL | DATA | SYSTEM | METADATA;
    pub(super) const NEWER: u64 = REMAPPED;
}

/// A range of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stripe {
    pub(super) device: u64,
    pub(super) uuid: [u8; 16],
    pub(super) offset: u64,
}

/// A range of logical addresses, and its stripes.
#[derive(Clone, Debug)]
pub(super) struct Chunk {
    pub(super) start: u64,
    pub(super) len: u64,
    /// Types and profile.
    pub(super) flags: u64,
    layout: Layout,
    pub(super) stripes: Vec<Stripe>,
}

/// How the stripes of a chunk share its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// Each stripe has everything.
    Copies,
    /// Stripes in turn, each with so many copies.
    Striped { copies: u64 },
    /// Stripes in turn, so many of each row with parity.
    Parity { parities: u64 },
}

/// A place on a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Which of the chunk's stripes.
    pub(super) stripe: usize,
    /// The offset on its device.
    pub(super) at: u64,
}

/// Where a piece of a chunk is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Located {
    /// Bytes from the asked address on.
    pub(super) len: u64,
    /// Each of them holds all bytes.
    pub(super) copies: Vec<Place>,
    /// The row with parity that the only copy belongs to.
    pub(super) row: Option<PlacesOfRow>,
}

/// A row of stripes with parity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct PlacesOfRow {
    /// The data, in order.
    pub(super) data: Vec<Place>,
    /// Which of them was asked for.
    pub(super) column: usize,
    pub(super) first: Place,
    /// RAID6's second parity: data have the powers of the generator with their own numbers there.
    pub(super) second: Option<Place>,
}

impl Chunk {
    /// Decodes the item of the chunk at `start`.
    pub(super) fn parse(start: u64, item: &[u8]) -> Result<Self> {
        let wrong = |fact: &str| corrupt(format!("the chunk at {start:#x} {fact}"));
        let (len, stripe_len, flags) = (le64(item, 0), le64(item, 16), le64(item, 24));
        let (count, sub_stripes) = (usize::from(le16(item, 44)), u64::from(le16(item, 46)));
        if count == 0 || item.len() < HEADER_LEN + count * STRIPE_LEN {
            return Err(wrong("is shorter than its stripes"));
        }
        if len == 0 || start.checked_add(len).is_none() || stripe_len != STRIPE {
            return Err(wrong("has impossible lengths"));
        }
        let profile = flags & profile::ALL;
        if profile.count_ones() > 1 || flags & !(profile::KNOWN | profile::NEWER) != 0 {
            return Err(unsupported(format!("the chunk at {start:#x} has an unknown profile ({flags:#x})")));
        }
        if flags & profile::NEWER != 0 {
            return Err(unsupported(format!("the chunk at {start:#x} is remapped")));
        }
        let layout = match profile {
            profile::RAID0 => Layout::Striped { copies: 1 },
            profile::RAID10 => Layout::Striped { copies: sub_stripes },
            profile::RAID5 => Layout::Parity { parities: 1 },
            profile::RAID6 => Layout::Parity { parities: 2 },
            _ => Layout::Copies,
        };
        let fits = match layout {
            Layout::Copies => profile != 0 || count == 1,
            Layout::Striped { copies } => copies > 0 && (count as u64).is_multiple_of(copies),
            Layout::Parity { parities } => (parities + 1..=MAX_PARITY_STRIPES).contains(&(count as u64)),
        };
        if !fits {
            return Err(wrong("has an impossible number of stripes"));
        }
        let stripe = |index: usize| {
            let at = HEADER_LEN + index * STRIPE_LEN;
            Stripe { device: le64(item, at), offset: le64(item, at + 8), uuid: array(item, at + 16) }
        };
        let stripes: Vec<Stripe> = (0..count).map(stripe).collect();
        if stripes.iter().any(|stripe| stripe.offset.checked_add(len).is_none()) {
            return Err(wrong("has a stripe at an impossible offset"));
        }
        Ok(Self { start, len, flags, layout, stripes })
    }

    /// Where the bytes from `at` on are, which must be an address within the chunk.
    pub(super) fn locate(&self, at: u64) -> Located {
        let offset = at - self.start;
        let count = self.stripes.len() as u64;
        let place = |stripe: u64, row: u64| {
            let within = row * STRIPE + offset % STRIPE;
            Place { stripe: stripe as usize, at: self.stripes[stripe as usize].offset + within }
        };
        let (number, stripe_left) = (offset / STRIPE, STRIPE - offset % STRIPE);
        let len = stripe_left.min(self.len - offset);
        match self.layout {
            Layout::Copies => {
                let copies = self.stripes.iter().enumerate();
                let copies = copies.map(|(stripe, found)| Place { stripe, at: found.offset + offset });
                Located { len: self.len - offset, copies: copies.collect(), row: None }
            }
            Layout::Striped { copies } => {
                let columns = count / copies;
                // Stripes of a single column lie one after the other.
                let len = if columns == 1 { self.len - offset } else { len };
                let first = number % columns * copies;
                let places = (first..first + copies).map(|stripe| place(stripe, number / columns));
                Located { len, copies: places.collect(), row: None }
            }
            Layout::Parity { parities } => {
                let data = count - parities;
                let (row, column) = (number / data, number % data);
                // Each row begins one stripe further: its data, then the parity.
                let stripe = |of_row: u64| place((row + of_row) % count, row);
                let places = PlacesOfRow {
                    data: (0..data).map(stripe).collect(),
                    column: column as usize,
                    first: stripe(data),
                    second: (parities == 2).then(|| stripe(data + 1)),
                };
                Located { len, copies: vec![stripe(column)], row: Some(places) }
            }
        }
    }

    /// How many bytes of a device a byte of the chunk takes: with RAID5 and RAID6, 1, as the kernel counts.
    pub(super) fn factor(flags: u64) -> u64 {
        match flags & profile::ALL {
            profile::DUP | profile::RAID1 | profile::RAID10 => 2,
            profile::RAID1C3 => 3,
            profile::RAID1C4 => 4,
            _ => 1,
        }
    }
}

/// All chunks, by their addresses.
#[derive(Debug, Default)]
pub(super) struct Chunks(Vec<Chunk>);

impl Chunks {
    /// The chunks of the superblock's array.
    pub(super) fn of_array(mut array: &[u8]) -> Result<Self> {
        let mut chunks = Self::default();
        while !array.is_empty() {
            let key = Key::parse(array, 0);
            let rest = array.get(KEY_LEN..).unwrap_or_default();
            if (key.object, key.kind) != (object::CHUNKS, kind::CHUNK) {
                return Err(corrupt("the superblock's chunk array holds something else"));
            }
            let chunk = Chunk::parse(key.offset, rest)?;
            array = &rest[HEADER_LEN + chunk.stripes.len() * STRIPE_LEN..];
            chunks.add(chunk)?;
        }
        Ok(chunks)
    }

    /// Adds a chunk, or replaces the one at the same address.
    pub(super) fn add(&mut self, chunk: Chunk) -> Result<()> {
        let index = self.0.partition_point(|other| other.start < chunk.start);
        let overlaps =
            |other: &Chunk| other.start < chunk.start + chunk.len && chunk.start < other.start + other.len;
        if self.0.get(index).is_some_and(|other| other.start == chunk.start) {
            self.0.remove(index);
        }
        let (before, after) = (index.checked_sub(1).and_then(|before| self.0.get(before)), self.0.get(index));
        if before.is_some_and(overlaps) || after.is_some_and(overlaps) {
            return Err(corrupt(format!("the chunk at {:#x} overlaps another one", chunk.start)));
        }
        if self.0.len() == MAX_CHUNKS {
            return Err(limit("it has too many chunks"));
        }
        self.0.insert(index, chunk);
        Ok(())
    }

    /// The chunk that holds an address.
    pub(super) fn at(&self, at: u64) -> Result<&Chunk> {
        let index = self.0.partition_point(|chunk| chunk.start <= at);
        let found = index.checked_sub(1).map(|index| &self.0[index]).filter(|c| at - c.start < c.len);
        found.ok_or_else(|| corrupt(format!("address {at:#x} is referenced, but no chunk holds it")))
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Chunk> {
        self.0.iter()
    }

    /// The devices that they are on.
    pub(super) fn devices(&self) -> impl Iterator<Item = DeviceId> {
        self.0.iter().flat_map(|chunk| &chunk.stripes).map(|stripe| (stripe.device, stripe.uuid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(flags: u64, sub_stripes: u8, count: u8) -> Result<Chunk> {
        let mut item = vec![0; HEADER_LEN + usize::from(count) * STRIPE_LEN];
        item[..8].copy_from_slice(&(1u64 << 30).to_le_bytes());
        item[16..24].copy_from_slice(&STRIPE.to_le_bytes());
        item[24..32].copy_from_slice(&flags.to_le_bytes());
        (item[44], item[46]) = (count, sub_stripes);
        for index in 0..usize::from(count) {
            let at = HEADER_LEN + index * STRIPE_LEN;
            item[at] = index as u8 + 1;
            item[at + 8..at + 16].copy_from_slice(&((index as u64) << 32).to_le_bytes());
        }
        Chunk::parse(1 << 20, &item)
    }

    /// The stripes of the copies at an offset, and the row of their stripes.
    fn places(chunk: &Chunk, offset: u64) -> (Vec<usize>, u64) {
        let located = chunk.locate((1 << 20) + offset);
        let rows: Vec<u64> = located.copies.iter().map(|place| (place.at & 0xffff_ffff) / STRIPE).collect();
        assert!(rows.iter().all(|row| *row == rows[0]));
        (located.copies.iter().map(|place| place.stripe).collect(), rows[0])
    }

    #[test]
    fn profiles_find_their_stripes() {
        let single = chunk(profile::DATA, 1, 1).unwrap();
        assert_eq!(single.locate((1 << 20) + 5).len, (1 << 30) - 5);
        let striped = chunk(profile::DATA | profile::RAID0, 1, 3).unwrap();
        assert_eq!(places(&striped, 4 * STRIPE + 9), (vec![1], 1));
        assert_eq!(striped.locate((1 << 20) + 4 * STRIPE + 9).len, STRIPE - 9);
        let ten = chunk(profile::DATA | profile::RAID10, 2, 4).unwrap();
        assert_eq!(places(&ten, 3 * STRIPE), (vec![2, 3], 1));
        let copies = chunk(profile::METADATA | profile::RAID1C3, 1, 3).unwrap();
        assert_eq!(copies.locate(1 << 20).copies.len(), 3);
        let five = chunk(profile::DATA | profile::RAID5, 1, 3).unwrap();
        assert_eq!([0, 1, 2, 3, 4].map(|n| places(&five, n * STRIPE).0[0]), [0, 1, 1, 2, 2]);
        let row = five.locate((1 << 20) + 2 * STRIPE).row.expect("it has parity");
        assert_eq!((row.data.len(), row.first.stripe, row.second), (2, 0, None));
        let six = chunk(profile::DATA | profile::RAID6, 1, 4).unwrap();
        assert_eq!([0, 1, 2, 3].map(|n| places(&six, n * STRIPE).0[0]), [0, 1, 1, 2]);
        let row = six.locate((1 << 20) + STRIPE).row.expect("it has parity");
        let of_places = |places: &[Place]| places.iter().map(|place| place.stripe).collect::<Vec<_>>();
        assert_eq!((of_places(&row.data), row.column), (vec![0, 1], 1));
        assert_eq!((row.first.stripe, row.second.map(|place| place.stripe)), (2, Some(3)));
    }

    #[test]
    fn impossible_chunks_are_refused() {
        for (flags, sub_stripes, count) in [
            (profile::DATA, 1, 2),
            (profile::RAID10, 2, 3),
            (profile::RAID10, 0, 4),
            (profile::RAID6, 1, 2),
            (profile::RAID0 | profile::RAID1, 1, 2),
            (1 << 40, 1, 1),
        ] {
            assert!(chunk(flags, sub_stripes, count).is_err(), "{flags:#x} {sub_stripes} {count}");
        }
    }

    #[test]
    fn chunks_do_not_overlap() {
        let mut chunks = Chunks::default();
        chunks.add(chunk(profile::DATA, 1, 1).unwrap()).unwrap();
        chunks.add(chunk(profile::DATA, 1, 1).unwrap()).unwrap();
        let mut other = chunk(profile::DATA, 1, 1).unwrap();
        other.start += 4096;
        assert!(chunks.add(other.clone()).is_err());
        other.start = 2 << 30;
        chunks.add(other).unwrap();
        assert!(chunks.at(0).is_err() && chunks.at((1 << 20) + (1 << 30)).is_err());
        assert_eq!(chunks.at(1 << 30).unwrap().start, 1 << 20);
        assert_eq!(chunks.iter().count(), 2);
    }
}
