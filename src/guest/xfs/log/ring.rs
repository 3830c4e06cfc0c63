//! The log as a ring of basic blocks of 512 bytes, and its records.
//!
//! Fields follow "XFS Algorithms & Data Structures", chapter "Journaling Log". The first word of every block
//! is the number of the cycle in which it was written; the header of a record keeps the words that these
//! numbers replace.

use crate::error::Result;
use crate::guest::bytes::{array, be32, be64, corrupt, le32, slice};
use crate::guest::source::Source;
use crate::guest::xfs::checksum::checksum;

/// Bytes of a basic block.
pub(super) const UNIT: usize = 512;
/// `XLOG_HEADER_MAGIC_NUM`.
const MAGIC: u32 = 0xfeed_babe;
/// Bytes that one header block describes.
const DESCRIBED_LEN: usize = 32 << 10;
/// The largest record: the limit of `logbsize`, and the rounding to a stripe unit of that size.
pub(super) const RECORD_LIMIT: usize = 512 << 10;
/// Bytes of the first header that its checksum covers, with the padding of 64-bit machines and without.
const HEADER_LENS: [usize; 2] = [328, 324];
/// The same of a further header.
const FURTHER_HEADER_LEN: usize = 260;
const CHECKSUM_AT: usize = 32;

/// A position in the log: the cycle, and the block (`xfs_lsn_t`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lsn(pub(super) u64);

impl Lsn {
    pub(super) fn cycle(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub(super) fn block(self) -> u64 {
        self.0 & 0xffff_ffff
    }
}

/// The log on its device.
pub(super) struct Ring<'a> {
    pub(super) source: &'a dyn Source,
    /// The byte offset of its first block.
    pub(super) start: u64,
    /// Number of blocks.
    pub(super) count: u64,
}

/// The header of a record.
#[derive(Debug)]
pub(super) struct Header {
    /// Where it begins in the ring.
    pub(super) block: u64,
    /// `h_lsn`.
    pub(super) lsn: Lsn,
    /// `h_tail_lsn`: the oldest record whose changes may not be on the disk.
    pub(super) tail: Lsn,
    /// `h_len`: bytes of the content.
    pub(super) len: usize,
    /// Blocks of headers.
    pub(super) heads: u64,
    /// `h_num_logops`.
    pub(super) operation_count: u32,
    /// `h_fmt`: 1 for little-endian, 2 for big-endian machines.
    pub(super) machine: u32,
    /// `h_fs_uuid`.
    pub(super) uuid: [u8; 16],
    checksum: u32,
}

impl Header {
    /// Blocks of the whole record.
    pub(super) fn block_count(&self) -> u64 {
        self.heads + self.len.div_ceil(UNIT) as u64
    }
}

impl Ring<'_> {
    /// Fills `buf` with whole blocks from `block` on, around the end of the ring.
    pub(super) fn read(&self, block: u64, buf: &mut [u8]) -> Result<()> {
        let mut block = block % self.count;
        let mut done = 0;
        while done < buf.len() {
            let len = (((self.count - block) * UNIT as u64) as usize).min(buf.len() - done);
            self.source.read_at(self.start + block * UNIT as u64, &mut buf[done..done + len])?;
            done += len;
            block = 0;
        }
        Ok(())
    }

    /// The cycle of a block.
    pub(super) fn cycle(&self, block: u64) -> Result<u32> {
        let mut bytes = [0; UNIT];
        self.read(block, &mut bytes)?;
        Ok(cycle_of(&bytes))
    }

    /// The header at `block`; `None` if no record begins there.
    pub(super) fn header(&self, block: u64) -> Result<Option<Header>> {
        let block = block % self.count;
        let mut bytes = [0; UNIT];
        self.read(block, &mut bytes)?;
        let (version, len) = (be32(&bytes, 8), be32(&bytes, 12) as usize);
        let lsn = Lsn(be64(&bytes, 16));
        if be32(&bytes, 0) != MAGIC || lsn.block() != block || lsn.cycle() != be32(&bytes, 4) {
            return Ok(None);
        }
        if !(1..=3).contains(&version) || len > RECORD_LIMIT {
            return Err(corrupt(format!("its record at block {block} is damaged")));
        }
        // Records of version 2 have as many headers as the size of the writer's buffers asks for.
        let size = be32(&bytes, 320) as usize;
        let is_long = version & 2 != 0 && size > DESCRIBED_LEN && size <= RECORD_LIMIT;
        let heads = if is_long { size.div_ceil(DESCRIBED_LEN) } else { 1 };
        Ok(Some(Header {
            block,
            lsn,
            tail: Lsn(be64(&bytes, 24)),
            len,
            heads: heads as u64,
            operation_count: be32(&bytes, 40),
            machine: be32(&bytes, 300),
            uuid: array(&bytes, 304),
            checksum: le32(&bytes, CHECKSUM_AT),
        }))
    }

    /// The content of a record. `Corrupt` if it was written in part.
    pub(super) fn content(&self, header: &Header, must_match: bool) -> Result<Vec<u8>> {
        let torn = || corrupt(format!("its record at block {} was written in part", header.block));
        if header.block_count() > self.count {
            return Err(torn());
        }
        let mut headers = vec![0; header.heads as usize * UNIT];
        self.read(header.block, &mut headers)?;
        let mut content = vec![0; header.len.next_multiple_of(UNIT)];
        self.read(header.block + header.heads, &mut content)?;
        if header.checksum != 0 && must_match && !matches(header, &headers, &content) {
            return Err(torn());
        }
        for (index, block) in content.chunks_exact_mut(UNIT).enumerate() {
            let (number, within) = (index / 64, index % 64);
            let at = if number == 0 { 44 } else { number * UNIT + 4 } + within * 4;
            block[..4].copy_from_slice(&array::<4>(&headers, at));
        }
        content.truncate(header.len);
        Ok(content)
    }
}

/// Whether the checksum of a record is the one of its headers and content.
fn matches(header: &Header, headers: &[u8], content: &[u8]) -> bool {
    let rest = |first: u32| {
        let further = headers.chunks_exact(UNIT).skip(1);
        let seed =
            further.fold(first, |seed, block| crc32c::crc32c_append(seed, &block[..FURTHER_HEADER_LEN]));
        crc32c::crc32c_append(seed, &content[..header.len])
    };
    HEADER_LENS.iter().any(|len| rest(checksum(slice(headers, 0, *len), CHECKSUM_AT)) == header.checksum)
}

pub(super) fn cycle_of(block: &[u8]) -> u32 {
    let first = be32(block, 0);
    if first == MAGIC { be32(block, 4) } else { first }
}
