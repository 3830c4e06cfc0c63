//! Names of encrypted directories, as Linux shows them without the key (fs/crypto/fname.c).
//!
//! A shown name is the directory's hash followed by the name on disk, in base64url; all bytes after the first
//! 149 are replaced by a SHA-256 checksum. These names reveal nothing and never equal a name in plain text,
//! but they identify each file.

use crate::guest::bytes::le32;

use super::Ext;
use super::hash::Hasher;
use super::inode::{Inode, flags};

/// Bytes that an encrypted name has at least.
pub(super) const LEAST: usize = 16;
/// Bytes of it that are shown unchanged.
const SHOWN: usize = 149;
const HASHES_LEN: usize = 8;
const SUM_LEN: usize = 32;
const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

/// The shown name of an encrypted one with these hashes.
pub(super) fn encode_name(raw: &[u8], hashes: (u32, u32)) -> Vec<u8> {
    let mut bytes = [hashes.0.to_le_bytes(), hashes.1.to_le_bytes()].concat();
    let (head, rest) = raw.split_at(raw.len().min(SHOWN));
    bytes.extend_from_slice(head);
    if !rest.is_empty() {
        bytes.extend_from_slice(&sha256(rest));
    }
    encode(&bytes)
}

/// The encrypted name behind a shown one, or its beginning; true if it is complete.
pub(super) fn decode_name(name: &[u8]) -> Option<(Vec<u8>, bool)> {
    let mut bytes = decode(name)?;
    let is_whole = bytes.len() <= HASHES_LEN + SHOWN;
    if !is_whole && bytes.len() != HASHES_LEN + SHOWN + SUM_LEN {
        return None;
    }
    bytes.truncate(HASHES_LEN + SHOWN);
    (bytes.len() >= HASHES_LEN + LEAST).then(|| (bytes.split_off(HASHES_LEN), is_whole))
}

/// The source of the hashes in a directory's shown names.
pub(super) enum Hashes {
    /// A directory that is read block by block: none.
    None,
    /// The index's hash function.
    Of(Hasher),
    /// Stored after each name.
    Stored,
}

impl Hashes {
    pub(super) fn of(ext: &Ext, inode: &Inode) -> Self {
        let superblock = &ext.superblock;
        let is_indexed = inode.is(flags::INDEX);
        let is_small = inode.size >> superblock.block_bits == 1 || inode.is(flags::INLINE_DATA);
        if !superblock.indexed_directories() || !(is_indexed || is_small) {
            return Self::None;
        }
        if inode.is(flags::CASEFOLD) {
            return Self::Stored;
        }
        let version =
            if is_indexed { super::htree::version(ext, inode).ok() } else { Some(superblock.hash_version) };
        let hasher =
            version.and_then(|number| Hasher::new(number, superblock.unsigned_hash, superblock.hash_seed));
        hasher.map_or(Self::None, Self::Of)
    }

    /// The hashes of a name; `tail` is the rest of its record.
    pub(super) fn get(&self, raw: &[u8], tail: &[u8]) -> (u32, u32) {
        match self {
            Self::None => (0, 0),
            Self::Of(hasher) => hasher.hashes(raw),
            Self::Stored => match tail.get(..HASHES_LEN) {
                Some(stored) => (le32(stored, 0), le32(stored, 4)),
                None => (0, 0),
            },
        }
    }
}

fn encode(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len().div_ceil(3) * 4);
    for group in bytes.chunks(3) {
        let word = group.iter().fold(0, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        let letters = (0..=group.len()).map(|place| LETTERS[(word >> (18 - 6 * place)) as usize & 63]);
        out.extend(letters);
    }
    out
}

fn decode(name: &[u8]) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(name.len() / 4 * 3 + 2);
    let (mut word, mut bits) = (0u32, 0);
    for letter in name {
        let value = LETTERS.iter().position(|known| known == letter)?;
        (word, bits) = (word << 6 | value as u32, bits + 6);
        if bits >= 8 {
            bits -= 8;
            out.push((word >> bits) as u8);
            word &= (1 << bits) - 1;
        }
    }
    // The remaining bits must be zero: each name has exactly one encoding.
    (word == 0 && bits < 6).then_some(out)
}

/// FIPS 180-4.
fn sha256(bytes: &[u8]) -> [u8; SUM_LEN] {
    const START: [u32; 8] = [
        0x6a09_e667,
        0xbb67_ae85,
        0x3c6e_f372,
        0xa54f_f53a,
        0x510e_527f,
        0x9b05_688c,
        0x1f83_d9ab,
        0x5be0_cd19,
    ];
    let constants = constants();
    let mut state = START;
    let mut message = bytes.to_vec();
    message.push(0x80);
    message.resize((bytes.len() + 9).next_multiple_of(64) - 8, 0);
    message.extend_from_slice(&(bytes.len() as u64 * 8).to_be_bytes());
    for block in message.chunks_exact(64) {
        let mut words = [0u32; 64];
        for (word, bytes) in words.iter_mut().zip(block.chunks_exact(4)) {
            *word = u32::from_be_bytes(bytes.try_into().expect("four bytes"));
        }
        for at in 16..64 {
            let (near, far) = (words[at - 2], words[at - 15]);
            let far = far.rotate_right(7) ^ far.rotate_right(18) ^ (far >> 3);
            let near = near.rotate_right(17) ^ near.rotate_right(19) ^ (near >> 10);
            words[at] = words[at - 16].wrapping_add(far).wrapping_add(words[at - 7]).wrapping_add(near);
        }
        let mut mixed = state;
        for (word, constant) in words.iter().zip(constants) {
            let turned = mixed[4].rotate_right(6) ^ mixed[4].rotate_right(11) ^ mixed[4].rotate_right(25);
            let chosen = mixed[4] & mixed[5] ^ !mixed[4] & mixed[6];
            let one =
                mixed[7].wrapping_add(turned).wrapping_add(chosen).wrapping_add(constant).wrapping_add(*word);
            let turned = mixed[0].rotate_right(2) ^ mixed[0].rotate_right(13) ^ mixed[0].rotate_right(22);
            let most = mixed[0] & mixed[1] ^ mixed[0] & mixed[2] ^ mixed[1] & mixed[2];
            mixed.rotate_right(1);
            mixed[4] = mixed[4].wrapping_add(one);
            mixed[0] = one.wrapping_add(turned).wrapping_add(most);
        }
        for (word, add) in state.iter_mut().zip(mixed) {
            *word = word.wrapping_add(add);
        }
    }
    let mut sum = [0; SUM_LEN];
    for (bytes, word) in sum.chunks_exact_mut(4).zip(state) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    sum
}

/// The first 32 bits of the fractional parts of the cube roots of the first 64 primes.
fn constants() -> [u32; 64] {
    let mut constants = [0; 64];
    let mut primes =
        (2u128..).filter(|number| (2..*number).take_while(|d| d * d <= *number).all(|d| number % d != 0));
    for constant in &mut constants {
        let scaled = primes.next().expect("primes are infinite") << 96;
        // The cube root of the prime, times 2^32.
        let (mut low, mut high) = (0u128, 1 << 36);
        while low + 1 < high {
            let middle = u128::midpoint(low, high);
            if middle * middle * middle <= scaled { low = middle } else { high = middle }
        }
        *constant = low as u32;
    }
    constants
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"))
    }

    #[test]
    fn checksums_match_the_standard() {
        assert_eq!(hex(&sha256(b"abc")), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(hex(&sha256(b"")), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
        let two = sha256(b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq");
        assert_eq!(hex(&two), "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
    }

    #[test]
    fn only_the_shown_name_decodes_to_its_raw_name() {
        for len in [LEAST, 17, 18, 32, SHOWN, SHOWN + 1, 255] {
            let raw: Vec<u8> = (0..len as u32).map(|at| (at * 37) as u8).collect();
            let name = encode_name(&raw, (0x1234_5678, 9));
            assert!(name.len() <= 255 && name.iter().all(|letter| LETTERS.contains(letter)));
            let head = raw[..len.min(SHOWN)].to_vec();
            assert_eq!(decode_name(&name), Some((head, len <= SHOWN)));
            assert_eq!(decode_name(&name[1..]).filter(|(decoded, _)| *decoded == raw), None);
        }
        assert_eq!([decode_name(b"AAAA"), decode_name(b"a name"), decode_name(b"")], [None, None, None]);
    }
}
