//! The decrypted bytes of a container.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::Source;
use crate::guest::source::within;

use super::cipher::{SECTOR, SECTOR_LEN_LIMIT, SectorCipher};
use super::header::Header;
use super::unlock::VolumeKeys;

/// A container with its keys.
pub(crate) struct Decrypted {
    below: Arc<dyn Source>,
    size: u64,
    segments: Vec<DecryptedSegment>,
}

struct DecryptedSegment {
    /// Where it begins in the data.
    at: u64,
    len: u64,
    /// Where it begins in the container.
    offset: u64,
    /// `None`: it is not encrypted.
    cipher: Option<(SectorCipher, u64, u64)>,
}

impl Decrypted {
    /// An error if the keys are not those of the header, or its ciphers are not supported.
    pub(crate) fn new(header: &Header, keys: &VolumeKeys, below: Arc<dyn Source>) -> std::result::Result<Self, String> {
        let mut segments: Vec<DecryptedSegment> = Vec::new();
        let mut size: u64 = 0;
        for segment in &header.segments {
            let rest = below.size().saturating_sub(segment.offset);
            let mut len = segment.len.unwrap_or(rest).min(rest);
            let cipher = match &segment.cipher {
                None => None,
                Some(cipher) => {
                    let key = keys.0.get(cipher.digest).and_then(Option::as_ref);
                    let key = key.ok_or("there is no key for a part of its data")?;
                    // dm-crypt has no incomplete sectors.
                    len -= len % cipher.sector_len;
                    Some((SectorCipher::new(&cipher.name, key.bytes())?, cipher.sector_len, cipher.first))
                }
            };
            if len > 0 {
                segments.push(DecryptedSegment { at: size, len, offset: segment.offset, cipher });
                size = size.checked_add(len).ok_or("its data is longer than any device")?;
            }
        }
        Ok(Self { below, size, segments })
    }
}

impl Source for Decrypted {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, at, buf.len())?;
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let index = self.segments.partition_point(|segment| segment.at <= at).saturating_sub(1);
            let segment = &self.segments[index];
            let into = at - segment.at;
            let len = (segment.len - into).min(rest.len() as u64) as usize;
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(len);
            segment.read_at(&*self.below, into, piece)?;
            at += len as u64;
            rest = more;
        }
        Ok(())
    }
}

impl DecryptedSegment {
    /// Reads bytes from `into` on, all of which are the segment's.
    fn read_at(&self, below: &dyn Source, mut into: u64, buf: &mut [u8]) -> Result<()> {
        let Some((cipher, sector_len, first)) = &self.cipher else {
            return below.read_at(self.offset + into, buf);
        };
        let (sector_len, mut rest) = (*sector_len, buf);
        while !rest.is_empty() {
            let start = into % sector_len;
            let number = first.wrapping_add((into - start) / SECTOR);
            let whole = if start == 0 { rest.len() - rest.len() % sector_len as usize } else { 0 };
            if whole > 0 {
                let (piece, more) = std::mem::take(&mut rest).split_at_mut(whole);
                below.read_at(self.offset + into, piece)?;
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
            below.read_at(self.offset + into - start, sector)?;
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
