//! The content of a sector: bytes that identify the write they came from, and the sector they are for.
//!
//! So that bytes in the wrong place are detected, and not taken for an allowed older version.

use std::sync::Arc;

use chainfs::units::are_zero;

use super::{Pages, SECTOR, mix};

/// Marks the first word of a written sector.
const MARK: u64 = 0xC4A1_F500_0000_0000;
/// The tag of bytes in a backing image.
pub const BACKING_TAG: u64 = 0xBA;

/// The bytes that one write, numbered `tag`, puts in `sector`.
pub fn pattern(tag: u64, sector: u64) -> [u8; SECTOR as usize] {
    let mut bytes = [0; SECTOR as usize];
    let first = MARK ^ (tag << 20) ^ sector.wrapping_mul(1 << 44 | 1);
    let mut state = mix(first);
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => tag,
            1 => sector,
            2 => state,
            _ => {
                state = state.rotate_left(17).wrapping_mul(0x2545_f491_4f6c_dd1d) ^ first;
                state
            }
        };
        word.copy_from_slice(&value.to_be_bytes());
    }
    bytes
}

/// The bytes of a range of the disk as write `tag` leaves them.
pub fn pattern_range(tag: u64, at: u64, len: u64) -> Vec<u8> {
    let (first, end) = (at / SECTOR, (at + len).div_ceil(SECTOR));
    let whole: Vec<u8> = (first..end).flat_map(|sector| pattern(tag, sector)).collect();
    let skip = (at - first * SECTOR) as usize;
    whole[skip..skip + len as usize].to_vec()
}

/// The content of one sector.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Zeroes.
    Zero,
    /// The bytes of the write of this number.
    Written(u64),
    /// The bytes at the beginning of the test.
    Initial,
    /// Of several writes that did not cover the whole.
    Mixed(Arc<[u8]>),
}

impl Value {
    /// Its bytes.
    pub fn bytes(&self, sector: u64, initial: &Pages) -> [u8; SECTOR as usize] {
        match self {
            Self::Zero => [0; SECTOR as usize],
            Self::Written(tag) => pattern(*tag, sector),
            Self::Initial => {
                let mut bytes = [0; SECTOR as usize];
                initial.fill(sector * SECTOR, &mut bytes);
                bytes
            }
            Self::Mixed(bytes) => bytes[..].try_into().expect("a sector"),
        }
    }

    /// Whether `bytes` are its bytes. Most that are not differ at once.
    pub fn is(&self, bytes: &[u8], sector: u64, initial: &Pages) -> bool {
        match self {
            Self::Zero => are_zero(bytes),
            Self::Written(tag) => bytes[..8] == tag.to_be_bytes() && bytes == pattern(*tag, sector),
            Self::Initial | Self::Mixed(_) => bytes == self.bytes(sector, initial),
        }
    }
}

/// A description of these bytes for people.
pub fn describe(bytes: &[u8]) -> String {
    let word =
        |index: usize| u64::from_be_bytes(bytes[index * 8..index * 8 + 8].try_into().expect("eight bytes"));
    let (tag, sector) = (word(0), word(1));
    if are_zero(bytes) {
        "zeroes".into()
    } else if bytes == pattern(tag, sector) {
        let whose = if tag == BACKING_TAG { "the backing image".into() } else { format!("write {tag}") };
        format!("the bytes of {whose} for sector {sector:#x}")
    } else {
        format!("bytes of no write, starting {:02x?}", &bytes[..32])
    }
}
