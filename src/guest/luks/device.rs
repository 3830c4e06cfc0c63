//! The decrypted bytes of a container.
//!
//! A [`Decryptor`] only computes: where a byte lies in the container, and how it is decrypted. So a process
//! that must not parse what guests write can use it, with what another one has parsed ([`DataSegment`]).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::guest::Source;
use crate::guest::source::within;

use super::cipher::{SECTOR, SECTOR_LEN_LIMIT, SectorCipher};
use super::hash::Hash;
use super::header::{COUNT_LIMIT, Header};
use super::unlock::VolumeKeys;

/// A range of a container's data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataSegment {
    /// Where it begins in the data.
    pub at: u64,
    /// Bytes; never 0.
    pub len: u64,
    /// Where it begins in the container.
    pub offset: u64,
    /// How it is encrypted; `None`: it is not, during a re-encryption.
    pub cipher: Option<DataCipher>,
}

/// How a range is encrypted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataCipher {
    /// cryptsetup's name of it.
    pub name: String,
    /// Bytes of a sector.
    pub sector_len: u64,
    /// The number of its first sector, in units of 512 bytes.
    pub first: u64,
    /// Index of its key among those of the container.
    pub key: usize,
}

/// Decrypts a container's data.
pub struct Decryptor(Vec<DecryptorSegment>);

struct DecryptorSegment {
    at: u64,
    len: u64,
    offset: u64,
    cipher: Option<DecryptorCipher>,
}

struct DecryptorCipher {
    cipher: SectorCipher,
    sector_len: u64,
    first: u64,
    id: CipherId,
}

/// Identifies a cipher with its key: equal ones decrypt equal bytes of sectors with equal numbers to equal
/// bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CipherId([u8; 32]);

/// Where a byte of the data lies.
pub struct DataPlace {
    /// The sector that has it begins here in the container; if it is not encrypted, the byte itself does.
    pub start: u64,
    /// Bytes from there to the byte.
    pub into: u64,
    /// Bytes from `start` to the end of what is encrypted alike.
    pub len: u64,
    /// The cipher, the length of a sector, and the number of the sector; `None`: it is not encrypted.
    pub cipher: Option<(CipherId, u64, u64)>,
}

impl Header {
    /// The data of a container of `size` bytes.
    pub(super) fn data(&self, size: u64) -> std::result::Result<Vec<DataSegment>, String> {
        let mut segments = Vec::new();
        let mut at: u64 = 0;
        for segment in &self.segments {
            let rest = size.saturating_sub(segment.offset);
            let mut len = segment.len.unwrap_or(rest).min(rest);
            let cipher = segment.cipher.as_ref().map(|cipher| {
                // dm-crypt has no incomplete sectors.
                len -= len % cipher.sector_len.max(1);
                let (name, sector_len) = (cipher.name.clone(), cipher.sector_len);
                DataCipher { name, sector_len, first: cipher.first, key: cipher.digest }
            });
            if len > 0 {
                segments.push(DataSegment { at, len, offset: segment.offset, cipher });
                at = at.checked_add(len).ok_or("its data is longer than any device")?;
            }
        }
        Ok(segments)
    }
}

impl Decryptor {
    /// For data that may be any. An error says what is not supported, or not possible.
    pub fn new(data: &[DataSegment], keys: &VolumeKeys) -> std::result::Result<Self, String> {
        let mut segments = Vec::new();
        let mut end: u64 = 0;
        for segment in data {
            let is_possible = segment.at == end && segment.len > 0 && segments.len() < COUNT_LIMIT;
            end = end.saturating_add(segment.len);
            if !is_possible || end == u64::MAX || segment.offset.checked_add(segment.len).is_none() {
                return Err("its data is not possible".to_owned());
            }
            let cipher = segment.cipher.as_ref().map(|cipher| cipher.open(segment.len, keys)).transpose()?;
            segments.push(DecryptorSegment {
                at: segment.at,
                len: segment.len,
                offset: segment.offset,
                cipher,
            });
        }
        Ok(Self(segments))
    }

    /// Bytes of the data.
    pub fn size(&self) -> u64 {
        self.0.last().map_or(0, |segment| segment.at + segment.len)
    }

    /// Fills `buf` with the data from `at` on. `read` fills a buffer with bytes of the container.
    pub fn read_at(
        &self,
        at: u64,
        buf: &mut [u8],
        read: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        within(self.size(), at, buf.len())?;
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let segment = self.segment(at);
            let into = at - segment.at;
            let len = (segment.len - into).min(rest.len() as u64) as usize;
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(len);
            segment.read_at(into, piece, read)?;
            at += len as u64;
            rest = more;
        }
        Ok(())
    }

    /// Where the byte at `at` lies; `None` at and beyond the end.
    pub fn place(&self, at: u64) -> Option<DataPlace> {
        if at >= self.size() {
            return None;
        }
        let segment = self.segment(at);
        let into = at - segment.at;
        let Some(cipher) = &segment.cipher else {
            let (start, len) = (segment.offset + into, segment.len - into);
            return Some(DataPlace { start, into: 0, len, cipher: None });
        };
        let first = into - into % cipher.sector_len;
        Some(DataPlace {
            start: segment.offset + first,
            into: into - first,
            len: segment.len - first,
            cipher: Some((cipher.id, cipher.sector_len, cipher.first.wrapping_add(first / SECTOR))),
        })
    }

    /// The segment with the byte at `at`, which is there.
    fn segment(&self, at: u64) -> &DecryptorSegment {
        &self.0[self.0.partition_point(|segment| segment.at <= at).saturating_sub(1)]
    }
}

impl DataCipher {
    fn open(&self, len: u64, keys: &VolumeKeys) -> std::result::Result<DecryptorCipher, String> {
        let (sector_len, first) = (self.sector_len, self.first);
        let is_sector =
            sector_len.is_power_of_two() && (SECTOR..=SECTOR_LEN_LIMIT as u64).contains(&sector_len);
        if !is_sector || !len.is_multiple_of(sector_len) {
            return Err("its sectors have an impossible size".to_owned());
        }
        let key = keys.0.get(self.key).and_then(Option::as_ref);
        let key = key.ok_or("there is no key for a part of its data")?;
        let cipher = SectorCipher::new(&self.name, key.bytes())?;
        let mut id = [0; 32];
        let parts: [&[u8]; 3] = [self.name.as_bytes(), &sector_len.to_le_bytes(), key.bytes()];
        id.copy_from_slice(&Hash::Sha256.of(&parts));
        Ok(DecryptorCipher { cipher, sector_len, first, id: CipherId(id) })
    }
}

impl DecryptorSegment {
    /// Reads bytes from `into` on, all of which are the segment's.
    fn read_at(
        &self,
        mut into: u64,
        buf: &mut [u8],
        read: &mut dyn FnMut(u64, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let Some(DecryptorCipher { cipher, sector_len, first, .. }) = &self.cipher else {
            return read(self.offset + into, buf);
        };
        let (sector_len, mut rest) = (*sector_len, buf);
        while !rest.is_empty() {
            let start = into % sector_len;
            let number = first.wrapping_add((into - start) / SECTOR);
            let whole = if start == 0 { rest.len() - rest.len() % sector_len as usize } else { 0 };
            if whole > 0 {
                let (piece, more) = std::mem::take(&mut rest).split_at_mut(whole);
                read(self.offset + into, piece)?;
                let numbers = (0..).map(|sector: u64| number.wrapping_add(sector * (sector_len / SECTOR)));
                for (number, sector) in numbers.zip(piece.chunks_mut(sector_len as usize)) {
                    cipher.decrypt(number, sector);
                }
                into += whole as u64;
                rest = more;
                continue;
            }
            // A part of a sector.
            let mut sector = [0; SECTOR_LEN_LIMIT];
            let sector = &mut sector[..sector_len as usize];
            read(self.offset + into - start, sector)?;
            cipher.decrypt(number, sector);
            let len = (sector_len - start).min(rest.len() as u64) as usize;
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(len);
            piece.copy_from_slice(&sector[start as usize..][..len]);
            into += len as u64;
            rest = more;
        }
        Ok(())
    }
}

/// A container with its keys, as a source.
pub(super) struct Decrypted {
    pub(super) below: Arc<dyn Source>,
    pub(super) decryptor: Decryptor,
}

impl Source for Decrypted {
    fn size(&self) -> u64 {
        self.decryptor.size()
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        self.decryptor.read_at(at, buf, &mut |at, buf| self.below.read_at(at, buf))
    }
}
