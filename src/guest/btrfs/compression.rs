//! Decompression of extents: zlib, zstd, and btrfs' own framing of LZO.

use std::sync::Arc;

use crate::codec::{Codec, decompress};
use crate::error::Result;
use crate::guest::bytes::{le32, slice};

use super::format::{corrupt, unsupported};

/// A compressed extent has at most so many bytes, before and after.
pub(super) const MAX_LEN: u64 = 128 << 10;
/// Bytes of the header of zlib; none of its forms with a dictionary is used.
const ZLIB_HEADER: usize = 2;

/// How an extent is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Compression {
    None,
    Zlib,
    Lzo,
    Zstd,
}

impl Compression {
    pub(super) fn parse(number: u8) -> Result<Self> {
        match number {
            0 => Ok(Self::None),
            1 => Ok(Self::Zlib),
            2 => Ok(Self::Lzo),
            3 => Ok(Self::Zstd),
            _ => Err(unsupported(format!("an extent has an unknown compression ({number})"))),
        }
    }

    /// Decompresses an extent. What the stream does not reach is zero.
    pub(super) fn decompress(self, stored: &[u8], len: u64, sector_len: u32) -> Result<Arc<[u8]>> {
        if len > MAX_LEN || stored.len() as u64 > MAX_LEN {
            return Err(corrupt("a compressed extent is too long"));
        }
        let mut bytes = vec![0; len as usize];
        let result = match self {
            Self::None => {
                let len = stored.len().min(bytes.len());
                bytes[..len].copy_from_slice(&stored[..len]);
                Ok(len)
            }
            Self::Zlib => {
                let stream = slice(stored, ZLIB_HEADER, stored.len());
                decompress(Codec::Deflate, stream, &mut bytes).map_err(|_| corrupt("a damaged zlib stream"))
            }
            Self::Zstd => {
                decompress(Codec::ZstdFrame, stored, &mut bytes).map_err(|_| corrupt("a damaged zstd stream"))
            }
            Self::Lzo => lzo(stored, &mut bytes, sector_len as usize),
        };
        match result {
            Ok(0) if len > 0 => Err(corrupt("a compressed extent holds nothing")),
            Ok(_) => Ok(bytes.into()),
            Err(error) => Err(error),
        }
    }
}

/// Segments of LZO, each with its length before it and with a sector of content. No length lies across the
/// end of a sector. The first number is the length of everything.
fn lzo(stored: &[u8], out: &mut [u8], sector_len: usize) -> Result<usize> {
    let damaged = || corrupt("a damaged lzo stream");
    let total = le32(stored, 0) as usize;
    let stored = stored.get(..total).ok_or_else(damaged)?;
    let (mut at, mut done) = (4, 0);
    while at < total && done < out.len() {
        let left = sector_len - at % sector_len;
        if left < 4 {
            at += left;
            continue;
        }
        let len = le32(stored, at) as usize;
        let segment = stored.get(at + 4..).and_then(|rest| rest.get(..len)).ok_or_else(damaged)?;
        let room = (out.len() - done).min(sector_len);
        let got = decompress(Codec::Lzo, segment, &mut out[done..][..room]).map_err(|_| damaged())?;
        // Only the last segment is shorter than a sector.
        done += got;
        at += 4 + len;
        if got < room {
            break;
        }
    }
    Ok(done)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stream of `text` as one run of literals, and the mark of its end.
    fn literals(text: &[u8]) -> Vec<u8> {
        [&[17 + text.len() as u8], text, &[0x11, 0, 0]].concat()
    }

    #[test]
    fn lengths_of_lzo_do_not_cross_sectors() {
        // With sectors of 8 bytes, the second length would begin two bytes before the end of the third.
        let first = [literals(&[b'a'; 8]), vec![0; 2]].concat();
        let second = literals(b"bcde");
        let len = |len: usize| (len as u32).to_le_bytes();
        let parts = [&len(first.len()), &first[..], &[0; 2], &len(second.len()), &second];
        let parts = parts.concat();
        let stored = [&len(parts.len() + 4)[..], &parts].concat();
        assert_eq!(first.len() + 8, 22);
        let mut out = [0; 12];
        assert_eq!(lzo(&stored, &mut out, 8).unwrap(), 12);
        assert_eq!(&out, b"aaaaaaaabcde");
        assert!(lzo(&stored[..stored.len() - 1], &mut out, 8).is_err());
        assert!(lzo(&[], &mut out, 8).is_ok_and(|len| len == 0));
    }

    #[test]
    fn impossible_extents_are_refused() {
        for kind in [Compression::Zlib, Compression::Lzo, Compression::Zstd] {
            assert!(kind.decompress(&[], 4096, 4096).is_err(), "{kind:?}");
            assert!(kind.decompress(&[0xff; 64], 4096, 4096).is_err(), "{kind:?}");
            assert!(kind.decompress(&[0; 64], MAX_LEN + 1, 4096).is_err(), "{kind:?}");
        }
        assert!(Compression::parse(4).is_err());
    }
}
