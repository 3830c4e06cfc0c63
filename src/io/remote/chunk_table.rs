//! The table of a cached object: which of its chunks are there, as a file that processes share.
//!
//! A block with what the object is, then four bytes for each chunk. An entry is read and written with one
//! call, and never lies across a sector, so that it is never half old and half new. It says:
//!
//! - *absent*, *present*, or *durable*. A chunk that is only present counts as long as this machine runs,
//!   because its bytes may be in the page cache alone. A durable one was synced first.
//! - its generation, which grows whenever it is stored: a reader that finds the same entry before and after
//!   its read has the bytes that this entry promises.
//! - when it was last used, in turns of the eviction.

use crate::error::{Error, ErrorKind, Result};
use crate::io::{Storage, WriteStorage};

/// Bytes of a chunk: small enough for guests' metadata, and large enough for a request.
pub(super) const CHUNK_LEN: u64 = 256 << 10;
/// Bytes before the entries.
const HEADER_LEN: usize = 4096;
const ENTRY_LEN: usize = 4;
const MAGIC: &[u8; 16] = b"chainfs cache 1\n";
/// Entries that are read at a time.
const BATCH: usize = 16 << 10;

/// Whether a chunk is in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Presence {
    Absent,
    /// Until the machine is started again.
    Present,
    Durable,
}

/// The entry of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub presence: Presence,
    /// The turn of the eviction in which it was last used, modulo 256.
    pub used: u8,
    pub generation: u16,
}

impl Entry {
    fn of_bytes(bytes: [u8; ENTRY_LEN]) -> Self {
        let presence = match bytes[0] {
            1 => Presence::Present,
            2 => Presence::Durable,
            _ => Presence::Absent,
        };
        Self { presence, used: bytes[1], generation: u16::from_le_bytes([bytes[2], bytes[3]]) }
    }

    fn bytes(self) -> [u8; ENTRY_LEN] {
        let presence = match self.presence {
            Presence::Absent => 0,
            Presence::Present => 1,
            Presence::Durable => 2,
        };
        let [low, high] = self.generation.to_le_bytes();
        [presence, self.used, low, high]
    }

    pub(super) fn is_there(self) -> bool {
        self.presence != Presence::Absent
    }

    /// Whether both promise the same bytes.
    pub(super) fn promises_the_same(self, other: Self) -> bool {
        self.is_there() && other.is_there() && self.generation == other.generation
    }
}

/// What a table begins with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TableHeader {
    /// Length of the object.
    pub len: u64,
    /// The file of its chunks, as text: a table without its own file is worth nothing.
    pub data_file: String,
    /// The run of this machine in which chunks that are only present count.
    pub boot: String,
    /// Which version of which object it is; not read by the program.
    pub object: String,
}

impl TableHeader {
    /// Number of chunks.
    pub(super) fn chunks(&self) -> u64 {
        self.len.div_ceil(CHUNK_LEN)
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.len.to_le_bytes());
        for text in [&self.data_file, &self.boot, &self.object] {
            // The object's name may be longer than the block; it is for people only.
            let text = &text.as_bytes()[..text.len().min(1024)];
            bytes.extend((text.len() as u16).to_le_bytes());
            bytes.extend(text);
        }
        bytes.resize(HEADER_LEN - 4, 0);
        bytes.extend(crc32c::crc32c(&bytes).to_le_bytes());
        bytes
    }

    /// `None` if the bytes are no header, or one that was only half written.
    fn parse(bytes: &[u8]) -> Option<Self> {
        let (block, sum) = bytes.split_at_checked(HEADER_LEN - 4)?;
        if sum != crc32c::crc32c(block).to_le_bytes() {
            return None;
        }
        let mut rest = block.strip_prefix(MAGIC)?;
        let mut take = |len: usize| {
            let (taken, left) = rest.split_at_checked(len)?;
            rest = left;
            Some(taken)
        };
        let len = u64::from_le_bytes(take(8)?.try_into().ok()?);
        let mut text = || {
            let len = u16::from_le_bytes(take(2)?.try_into().ok()?);
            Some(String::from_utf8_lossy(take(usize::from(len))?).into_owned())
        };
        Some(Self { len, data_file: text()?, boot: text()?, object: text()? })
    }

    /// Reads it from a table's file. `None` if there is no sound one.
    pub(super) fn read(file: &dyn Storage) -> Result<Option<Self>> {
        let mut bytes = vec![0; HEADER_LEN];
        let len = file.read_at(0, &mut bytes)?;
        Ok(Self::parse(&bytes[..len]))
    }

    /// Writes it. A crash leaves the old one, this one, or none.
    pub(super) fn write(&self, file: &dyn WriteStorage) -> Result<()> {
        file.write_at(0, &self.bytes())
    }
}

const fn place_of(chunk: u64) -> u64 {
    HEADER_LEN as u64 + chunk * ENTRY_LEN as u64
}

/// Length of the file of a table.
pub(super) const fn table_len(chunks: u64) -> u64 {
    place_of(chunks)
}

/// The entry of a chunk; absent behind the end of the file.
pub(super) fn read_entry(file: &dyn Storage, chunk: u64) -> Result<Entry> {
    let mut bytes = [0; ENTRY_LEN];
    file.read_at(place_of(chunk), &mut bytes)?;
    Ok(Entry::of_bytes(bytes))
}

pub(super) fn write_entry(file: &dyn WriteStorage, chunk: u64, entry: Entry) -> Result<()> {
    file.write_at(place_of(chunk), &entry.bytes())
}

/// Notes when a chunk was used: nothing else of the entry, which another process may be changing.
pub(super) fn write_use(file: &dyn WriteStorage, chunk: u64, used: u8) -> Result<()> {
    file.write_at(place_of(chunk) + 1, &[used])
}

/// Calls `each` for every chunk that is there, in order.
pub(super) fn for_present(file: &dyn Storage, chunks: u64, mut each: impl FnMut(u64, Entry)) -> Result<()> {
    let mut bytes = vec![0; BATCH * ENTRY_LEN];
    let mut chunk = 0;
    while chunk < chunks {
        let count = (chunks - chunk).min(BATCH as u64);
        let buf = &mut bytes[..count as usize * ENTRY_LEN];
        let len = file.read_at(place_of(chunk), buf)?;
        for (at, entry) in (chunk..).zip(buf[..len].as_chunks::<ENTRY_LEN>().0) {
            let entry = Entry::of_bytes(*entry);
            if entry.is_there() {
                each(at, entry);
            }
        }
        if len < buf.len() {
            break;
        }
        chunk += count;
    }
    Ok(())
}

/// E1: makes absent what was only present when the machine stopped.
pub(super) fn forget_undurable(file: &dyn WriteStorage, chunks: u64) -> Result<()> {
    let mut lost = Vec::new();
    for_present(file, chunks, |chunk, entry| {
        if entry.presence == Presence::Present {
            lost.push((chunk, Entry { presence: Presence::Absent, ..entry }));
        }
    })?;
    lost.into_iter().try_for_each(|(chunk, entry)| write_entry(file, chunk, entry))
}

/// A table that cannot be used, to be made anew.
pub(super) fn unusable(fact: &str) -> Error {
    Error::new(ErrorKind::Stale, format!("the cache {fact}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_and_entries_are_read_as_they_were_written() {
        let header = TableHeader {
            len: 5 << 40,
            data_file: "1:2:3".into(),
            boot: "b".into(),
            object: "s3://x/y".repeat(200),
        };
        let bytes = header.bytes();
        let read = TableHeader::parse(&bytes).unwrap();
        assert_eq!((read.len, &read.data_file, &read.boot), (header.len, &header.data_file, &header.boot));
        for at in [0, 16, 30, HEADER_LEN - 1] {
            let mut torn = bytes.clone();
            torn[at] ^= 1;
            assert_eq!(TableHeader::parse(&torn), None, "{at}");
        }
        assert_eq!(TableHeader::parse(&bytes[..100]), None);
        for presence in [Presence::Absent, Presence::Present, Presence::Durable] {
            let entry = Entry { presence, used: 200, generation: 0xabcd };
            assert_eq!(Entry::of_bytes(entry.bytes()), entry);
        }
        assert_eq!(512 % ENTRY_LEN, 0, "no entry lies across a sector");
    }
}
