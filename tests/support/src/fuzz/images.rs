//! Whole images, good and damaged where it hurts: in the tables, with numbers that mean something.

use std::ops::Range;
use std::sync::Arc;

use chainfs::format::entry::EntryFormat;
use chainfs::format::snapshot::SnapshotParser;
use chainfs::format::{Header, Mapping, bitmap};
use chainfs::units::GuestOffset;

use super::random::{Random, put};
use super::reader::File;

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// An undamaged image, and the offsets of its tables.
pub struct Specimen {
    pub name: String,
    pub file: File,
    /// Its backing chain, by index in the corpus, the next one first.
    pub below: Vec<usize>,
    cluster: usize,
    tables: Vec<Range<usize>>,
}

impl Specimen {
    pub fn new(name: &str, bytes: Vec<u8>, data: Vec<u8>, below: Vec<usize>) -> Self {
        let (cluster, tables) = match Header::parse(&bytes, bytes.len() as u64) {
            Ok(header) => (header.cluster.size() as usize, Map::of(&bytes, &header).0),
            Err(_) => (4096, Vec::new()),
        };
        let file = File { bytes: Arc::new(bytes), data: Arc::new(data) };
        Self { name: name.to_owned(), file, below, cluster, tables }
    }

    pub fn is_qcow2(&self) -> bool {
        !self.tables.is_empty()
    }

    /// The image with some damage.
    pub fn mutated(&self, others: &[Self], random: &mut Random) -> File {
        let mut bytes = Vec::clone(&self.file.bytes);
        let most = random.one_of(&[2, 4, 12]);
        for _ in 0..=random.below(most) {
            self.change(&mut bytes, others, random);
        }
        let mut data = Arc::clone(&self.file.data);
        if random.once_in(8) {
            data = Arc::new(data[..random.below(data.len() + 1)].to_vec());
        }
        File { bytes: Arc::new(bytes), data }
    }

    fn change(&self, bytes: &mut Vec<u8>, others: &[Self], random: &mut Random) {
        if bytes.is_empty() {
            return;
        }
        match random.below(40) {
            0 => bytes.truncate(self.end(bytes, random)),
            1 => bytes.resize(bytes.len() + random.below(2 * self.cluster), 0),
            2 | 3 => {
                let (from, to) = (self.start(bytes, random), self.start(bytes, random));
                let end = (from + self.cluster).min(bytes.len());
                move_within(bytes, from..end, to);
            }
            4 => {
                let (one, other) = (self.start(bytes, random), self.start(bytes, random));
                let len = self.cluster.min(bytes.len() - one.max(other)).min(one.abs_diff(other));
                (0..len).for_each(|at| bytes.swap(one + at, other + at));
            }
            5 => {
                // The head of one, the tail of another.
                let other = &others[random.below(others.len())];
                let cut = self.end(bytes, random).min(other.file.bytes.len());
                bytes.truncate(cut);
                bytes.extend_from_slice(&other.file.bytes[cut..]);
            }
            6 => {
                // A table of another image, where that image has it.
                let other = &others[random.below(others.len())];
                let Some(table) = pick(&other.tables, random) else { return };
                let end = table.end.min(bytes.len());
                if table.start < end {
                    bytes[table.start..end].copy_from_slice(&other.file.bytes[table.start..end]);
                }
            }
            7..=9 => {
                // Entries of one table into another.
                let (from, to) = (self.entry(bytes, random), self.entry(bytes, random));
                let end = (from + 8 * (1 + random.below(16))).min(bytes.len());
                move_within(bytes, from..end, to);
            }
            10..=15 => {
                let at = self.entry(bytes, random) + random.below(8);
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 1 << random.below(8);
                }
            }
            16 => {
                let at = random.below(bytes.len());
                bytes[at] ^= 1 << random.below(8);
            }
            17..=20 => {
                let at = self.entry(bytes, random);
                let len = random.one_of(&[1, 2, 4]);
                let within = len * random.below(8 / len);
                let at = (at + within).min(bytes.len());
                random.put(bytes, at, len);
            }
            _ => {
                let at = self.entry(bytes, random);
                let value = self.value(bytes, random);
                put(bytes, at, 8, value);
            }
        }
    }

    /// A multiple of 8 within one of the tables.
    fn entry(&self, bytes: &[u8], random: &mut Random) -> usize {
        // The header comes first, and is soon beyond repair.
        let tables =
            if random.once_in(4) { &self.tables[..] } else { &self.tables[2.min(self.tables.len())..] };
        let table = pick(tables, random).unwrap_or(0..bytes.len());
        let at = table.start + random.below(table.len().max(1));
        at.min(bytes.len() - 1) & !7
    }

    /// The start of a cluster.
    fn start(&self, bytes: &[u8], random: &mut Random) -> usize {
        random.below(bytes.len().div_ceil(self.cluster)) * self.cluster
    }

    /// Where the file may be cut: at or near a cluster's end, or anywhere.
    fn end(&self, bytes: &[u8], random: &mut Random) -> usize {
        let end = match random.below(4) {
            0 => random.below(bytes.len()),
            1 => self.start(bytes, random) + 1 + random.below(1024),
            _ => self.start(bytes, random),
        };
        end.min(bytes.len())
    }

    /// A word that a table may hold: an offset in the file with flags, a word of another table, or a boundary
    /// value.
    fn value(&self, bytes: &[u8], random: &mut Random) -> u64 {
        let (place, len) = (self.start(bytes, random) as u64, bytes.len() as u64);
        match random.below(18) {
            0..=3 => place | COPIED,
            4 => place,
            5 => place | 1 | if random.once_in(2) { COPIED } else { 0 },
            6 | 7 => {
                let sectors = random.below(4) as u64;
                let count_at = 62 - (self.cluster.trailing_zeros() - 8);
                COMPRESSED | sectors << count_at | random.below(bytes.len()) as u64
            }
            8 => place + 512 * random.below(16) as u64,
            9 => (len + random.below(3 * self.cluster) as u64).saturating_sub(self.cluster as u64),
            10 => (len.next_multiple_of(self.cluster as u64) + place) | COPIED,
            11 | 12 => {
                let at = self.entry(bytes, random);
                let word = bytes
                    .get(at..at + 8)
                    .map_or(0, |word| u64::from_be_bytes(word.try_into().expect("8 bytes")));
                match random.below(3) {
                    0 => word ^ 1 << random.below(64),
                    1 => word.wrapping_add(self.cluster as u64),
                    _ => word,
                }
            }
            13 => random.below(1 << 20) as u64,
            // A bitmap of subclusters.
            14 => random.next() & random.next(),
            // More than a file can be.
            15 => u64::MAX - random.below(1 << 12) as u64,
            _ => random.number(),
        }
    }
}

fn pick(tables: &[Range<usize>], random: &mut Random) -> Option<Range<usize>> {
    (!tables.is_empty()).then(|| tables[random.below(tables.len())].clone())
}

fn move_within(bytes: &mut [u8], from: Range<usize>, to: usize) {
    let end = from.end.min(from.start + (bytes.len() - to));
    bytes.copy_within(from.start..end, to);
}

/// The offsets of an image where a changed byte matters.
struct Map(Vec<Range<usize>>);

impl Map {
    fn of(bytes: &[u8], header: &Header) -> Self {
        let cluster = header.cluster.size();
        // The header's fields and its extensions.
        let mut map = Self(vec![0..112, 112..(112 + 400).min(bytes.len())]);
        let l2_tables = |map: &mut Self, l1: u64, len: u64| {
            map.table(bytes, l1, len);
            for entry in words(bytes, l1, len) {
                let Ok(Some(l2)) = header.entry_format().l1(entry).map(|entry| entry.l2) else { continue };
                map.table(bytes, l2.0, cluster);
                map.streams(bytes, header.entry_format(), l2.0, cluster);
            }
        };
        l2_tables(&mut map, header.l1.offset.0, header.l1.len_bytes());

        let refcounts = (header.refcount_table.offset.0, u64::from(header.refcount_table.clusters) * cluster);
        map.table(bytes, refcounts.0, refcounts.1);
        for block in words(bytes, refcounts.0, refcounts.1).filter(|block| *block != 0) {
            map.table(bytes, block, cluster);
        }

        let mut parser = SnapshotParser::new(header);
        if header.snapshots.count > 0 && parser.feed(&bytes[header.snapshots.offset.0 as usize..]) == Ok(true)
        {
            let len = parser.table_len();
            for snapshot in parser.finish().expect("it is complete") {
                map.table(bytes, header.snapshots.offset.0, len);
                l2_tables(&mut map, snapshot.l1.offset.0, snapshot.l1.len_bytes());
            }
        }
        if let Some(bitmaps) = header.bitmaps {
            let (at, len) = (bitmaps.directory.0, bitmaps.directory_len);
            map.table(bytes, at, len);
            let directory = &bytes[at as usize..][..len as usize];
            for bitmap in
                bitmap::parse_directory(directory, bitmaps.count, header.cluster).expect("QEMU wrote it")
            {
                map.table(bytes, bitmap.table.0, u64::from(bitmap.table_entries) * 8);
            }
        }
        map
    }

    /// Adds a table without the long unallocated range at its end.
    fn table(&mut self, bytes: &[u8], at: u64, len: u64) {
        let (start, end) = (at as usize, ((at + len) as usize).min(bytes.len()));
        let Some(table) = bytes.get(start..end) else { return };
        let used = table.iter().rposition(|byte| *byte != 0).unwrap_or(0);
        let end = (start + used + 32).min(end);
        if start < end && !self.0.contains(&(start..end)) {
            self.0.push(start..end);
        }
    }

    /// The heads of two compressed clusters: one table may name hundreds.
    fn streams(&mut self, bytes: &[u8], format: EntryFormat, l2: u64, cluster: u64) {
        let entries = words(bytes, l2, cluster).step_by(format.l2_entry_len() as usize / 8);
        let streams = entries.filter_map(|entry| match format.l2(entry, GuestOffset(0)).ok()?.mapping {
            Mapping::Compressed(stream) => Some(stream),
            Mapping::Data(_) | Mapping::Zero(_) | Mapping::Hole => None,
        });
        for stream in streams.take(2) {
            self.table(bytes, stream.at.0, 64);
        }
    }
}

/// The words of a table, as far as the file has it.
fn words(bytes: &[u8], at: u64, len: u64) -> impl Iterator<Item = u64> {
    let end = ((at + len) as usize).min(bytes.len());
    let table = bytes.get(at as usize..end).unwrap_or_default();
    table.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word))
}
