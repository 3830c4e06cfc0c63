//! The checksums of nodes and data: CRC-32C, xxHash64, SHA-256 and BLAKE2.

use blake2::Blake2b256;
use sha2::{Digest as _, Sha256};

use crate::error::Result;

use super::format::unsupported;

/// Bytes at the beginning of superblocks and nodes that hold their checksum.
pub(super) const CHECKSUM_AREA: usize = 32;

/// The checksum of a file system (`csum_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Checksum {
    Crc32c,
    XxHash64,
    Sha256,
    Blake2b,
}

impl Checksum {
    pub(super) fn parse(number: u16) -> Result<Self> {
        match number {
            0 => Ok(Self::Crc32c),
            1 => Ok(Self::XxHash64),
            2 => Ok(Self::Sha256),
            3 => Ok(Self::Blake2b),
            _ => Err(unsupported(format!("its checksums are of an unknown kind ({number})"))),
        }
    }

    /// Bytes of a checksum.
    pub(super) fn len(self) -> usize {
        match self {
            Self::Crc32c => 4,
            Self::XxHash64 => 8,
            Self::Sha256 | Self::Blake2b => 32,
        }
    }

    /// Whether the checksum of `bytes` is `stored`, or begins it.
    pub(super) fn fits(self, bytes: &[u8], stored: &[u8]) -> bool {
        let Some(stored) = stored.get(..self.len()) else { return false };
        match self {
            Self::Crc32c => crc32c::crc32c(bytes).to_le_bytes() == stored,
            Self::XxHash64 => twox_hash::XxHash64::oneshot(0, bytes).to_le_bytes() == stored,
            Self::Sha256 => Sha256::digest(bytes).as_slice() == stored,
            Self::Blake2b => Blake2b256::digest(bytes).as_slice() == stored,
        }
    }

    /// Whether a superblock or node has the checksum at its beginning.
    pub(super) fn fits_block(self, block: &[u8]) -> bool {
        block.len() > CHECKSUM_AREA && self.fits(&block[CHECKSUM_AREA..], block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        let digit = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).unwrap();
        (0..hex.len()).step_by(2).map(digit).collect()
    }

    /// Published test vectors of the algorithms.
    #[test]
    fn the_checksums_are_those_of_their_specifications() {
        let sha = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        let blake = "bddd813c634239723171ef3fee98579b94964e3bb1cb3e427262c8c068d52319";
        assert!(Checksum::Sha256.fits(b"abc", &bytes(sha)));
        assert!(Checksum::Blake2b.fits(b"abc", &bytes(blake)));
        assert!(Checksum::XxHash64.fits(b"abc", &0x44bc_2cf5_ad77_0999u64.to_le_bytes()));
        assert!(Checksum::Crc32c.fits(b"123456789", &0xe306_9283u32.to_le_bytes()));
        assert!(!Checksum::Sha256.fits(b"abc", &bytes(&sha[..40])));
    }
}
