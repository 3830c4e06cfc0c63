//! Decrypts sectors as dm-crypt does: a block cipher, a mode, and how the sector's number enters it.
//!
//! The names are cryptsetup's: `aes-xts-plain64`, `aes-cbc-essiv:sha256`, `cipher_null-ecb`.

use aes::{Aes128, Aes192, Aes256};
use cipher::{Array, Block, BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
use serpent::Serpent;
use twofish::Twofish;

use super::hash::Hash;

/// Bytes of a block of every supported cipher.
const BLOCK_LEN: usize = 16;
/// Blocks that are decrypted at once: those of the smallest sector.
const GROUP: usize = 32;
/// Bytes of the unit in which sectors are numbered, whatever their size.
pub(super) const SECTOR: u64 = 512;
/// Bytes of the longest sector.
pub(super) const SECTOR_LEN_LIMIT: usize = 4096;

type CipherBlock = Block<Aes128>;

/// A block cipher with its key.
enum BlockCipher {
    Aes128(Box<Aes128>),
    Aes192(Box<Aes192>),
    Aes256(Box<Aes256>),
    Serpent(Box<Serpent>),
    Twofish(Box<Twofish>),
}

/// How blocks of a sector depend on each other.
enum Mode {
    Ecb,
    Cbc,
    /// With the cipher of the tweak.
    Xts(BlockCipher),
}

/// What the number of a sector becomes.
enum InitialVector {
    None,
    /// Little-endian, of 32 bits.
    Plain,
    /// Little-endian, of 64 bits.
    Plain64,
    /// Big-endian, of 64 bits, at the end.
    Plain64Be,
    /// As `Plain64`, encrypted with a hash of the key.
    Essiv(BlockCipher),
}

/// A cipher for sectors, with its key.
pub(super) struct SectorCipher(Option<(BlockCipher, Mode, InitialVector)>);

impl BlockCipher {
    fn new(name: &str, key: &[u8]) -> Result<Self, String> {
        fn with<C: KeyInit>(key: &[u8]) -> Result<Box<C>, String> {
            let bits = key.len() * 8;
            C::new_from_slice(key).map(Box::new).map_err(|_| format!("a key of {bits} bits does not fit it"))
        }
        match (name, key.len()) {
            ("aes", 16) => with(key).map(Self::Aes128),
            ("aes", 24) => with(key).map(Self::Aes192),
            ("aes", _) => with(key).map(Self::Aes256),
            ("serpent", _) => with(key).map(Self::Serpent),
            ("twofish", _) => with(key).map(Self::Twofish),
            _ => Err(format!("the cipher {name:?} is not supported")),
        }
    }

    fn decrypt(&self, blocks: &mut [CipherBlock]) {
        match self {
            Self::Aes128(cipher) => cipher.decrypt_blocks(blocks),
            Self::Aes192(cipher) => cipher.decrypt_blocks(blocks),
            Self::Aes256(cipher) => cipher.decrypt_blocks(blocks),
            Self::Serpent(cipher) => cipher.decrypt_blocks(blocks),
            Self::Twofish(cipher) => cipher.decrypt_blocks(blocks),
        }
    }

    fn encrypted(&self, block: [u8; BLOCK_LEN]) -> [u8; BLOCK_LEN] {
        let mut block = CipherBlock::from(block);
        match self {
            Self::Aes128(cipher) => cipher.encrypt_block(&mut block),
            Self::Aes192(cipher) => cipher.encrypt_block(&mut block),
            Self::Aes256(cipher) => cipher.encrypt_block(&mut block),
            Self::Serpent(cipher) => cipher.encrypt_block(&mut block),
            Self::Twofish(cipher) => cipher.encrypt_block(&mut block),
        }
        block.into()
    }
}

impl SectorCipher {
    /// The cipher of this name with a key. An error names what is not supported.
    pub(super) fn new(name: &str, key: &[u8]) -> Result<Self, String> {
        let (algorithm, rest) = name.split_once('-').unwrap_or((name, "cbc-plain"));
        if algorithm == "cipher_null" {
            return Ok(Self(None));
        }
        let (mode, iv) = match rest {
            // What the first versions of dm-crypt called it.
            "plain" => ("cbc", "plain"),
            _ => rest.split_once('-').unwrap_or((rest, "null")),
        };
        let about = |fact: String| format!("its cipher is {name:?}: {fact}");
        if !["ecb", "cbc", "xts"].contains(&mode) {
            return Err(about(format!("the mode {mode:?} is not supported")));
        }
        let halves = if mode == "xts" { key.split_at(key.len() / 2) } else { (key, &key[..0]) };
        let cipher = BlockCipher::new(algorithm, halves.0).map_err(about)?;
        let mode = match mode {
            "ecb" => Mode::Ecb,
            "cbc" => Mode::Cbc,
            _ => Mode::Xts(BlockCipher::new(algorithm, halves.1).map_err(about)?),
        };
        let iv = match (&mode, iv.split_once(':').unwrap_or((iv, ""))) {
            (Mode::Ecb, _) | (_, ("null", _)) => InitialVector::None,
            (_, ("plain", _)) => InitialVector::Plain,
            (_, ("plain64", _)) => InitialVector::Plain64,
            (_, ("plain64be", _)) => InitialVector::Plain64Be,
            (_, ("essiv", hash)) => {
                let salt = Hash::from_name(hash).map_err(about)?.of(&[key]);
                InitialVector::Essiv(BlockCipher::new(algorithm, &salt).map_err(about)?)
            }
            _ => return Err(about(format!("the initial vector {iv:?} is not supported"))),
        };
        Ok(Self(Some((cipher, mode, iv))))
    }

    /// Decrypts one sector in place: `number` counts units of 512 bytes, `sector` has a power of two of bytes
    /// between 512 and 4096.
    pub(super) fn decrypt(&self, number: u64, sector: &mut [u8]) {
        let Some((cipher, mode, iv)) = &self.0 else { return };
        let iv = iv.of(number);
        let (blocks, _) = Array::slice_as_chunks_mut(sector);
        match mode {
            Mode::Ecb => cipher.decrypt(blocks),
            Mode::Cbc => decrypt_cbc(cipher, iv, blocks),
            Mode::Xts(tweak) => decrypt_xts(cipher, tweak.encrypted(iv), blocks),
        }
    }
}

impl InitialVector {
    fn of(&self, number: u64) -> [u8; BLOCK_LEN] {
        let plain64 = || u128::from(number).to_le_bytes();
        match self {
            Self::None => [0; BLOCK_LEN],
            Self::Plain => u128::from(number as u32).to_le_bytes(),
            Self::Plain64 => plain64(),
            Self::Plain64Be => u128::from(number).to_be_bytes(),
            Self::Essiv(cipher) => cipher.encrypted(plain64()),
        }
    }
}

fn xor(block: &mut CipherBlock, with: u128) {
    let mixed = u128::from_le_bytes((*block).into()) ^ with;
    *block = CipherBlock::from(mixed.to_le_bytes());
}

fn decrypt_cbc(cipher: &BlockCipher, iv: [u8; BLOCK_LEN], blocks: &mut [CipherBlock]) {
    let mut previous = u128::from_le_bytes(iv);
    for group in blocks.chunks_mut(GROUP) {
        let mut before = [0; GROUP];
        for (block, before) in group.iter().zip(&mut before) {
            *before = previous;
            previous = u128::from_le_bytes((*block).into());
        }
        cipher.decrypt(group);
        group.iter_mut().zip(before).for_each(|(block, before)| xor(block, before));
    }
}

/// IEEE 1619, without incomplete blocks.
fn decrypt_xts(cipher: &BlockCipher, tweak: [u8; BLOCK_LEN], blocks: &mut [CipherBlock]) {
    let mut tweak = u128::from_le_bytes(tweak);
    for group in blocks.chunks_mut(GROUP) {
        let mut tweaks = [0; GROUP];
        for (block, used) in group.iter_mut().zip(&mut tweaks) {
            *used = tweak;
            xor(block, tweak);
            // Times x in GF(2^128).
            tweak = (tweak << 1) ^ ((tweak >> 127) * 0x87);
        }
        cipher.decrypt(group);
        group.iter_mut().zip(tweaks).for_each(|(block, used)| xor(block, used));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn vectors_of_the_standards_are_decrypted() {
        // IEEE 1619, vectors 1 and 2; NIST SP 800-38A, F.2.1 with the vector in place of the sector's number.
        let zero = vec![0; 32];
        let first = SectorCipher::new("aes-xts-plain64", &zero).unwrap();
        let mut sector = bytes("917cf69ebd68b2ec9b9fe9a3eadda692cd43d2f59598ed858c02c2652fbf922e");
        first.decrypt(0, &mut sector);
        assert_eq!(sector, zero);
        let key = [[0x11; 16], [0x22; 16]].concat();
        let second = SectorCipher::new("aes-xts-plain64", &key).unwrap();
        let mut sector = bytes("c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0");
        second.decrypt(0x33_3333_3333, &mut sector);
        assert_eq!(sector, [0x44; 32]);
    }

    #[test]
    fn names_that_are_not_supported_are_said() {
        let refused =
            |name: &str, len: usize| SectorCipher::new(name, &vec![1; len]).err().unwrap_or_default();
        for (name, len, fact) in [
            ("aes-xts-plain64", 20, "its cipher is \"aes-xts-plain64\": a key of 80 bits does not fit it"),
            ("camellia-xts-plain64", 64, "the cipher \"camellia\" is not supported"),
            ("aes-lrw-benbi", 48, "the mode \"lrw\" is not supported"),
            ("aes-cbc-lmk:md5", 32, "the initial vector \"lmk:md5\" is not supported"),
            ("aes-cbc-essiv:sha1", 32, "a key of 160 bits does not fit it"),
            ("xchacha20,aes-adiantum-plain64", 32, "the mode \"adiantum\" is not supported"),
            ("", 32, "the cipher \"\" is not supported"),
        ] {
            assert!(refused(name, len).contains(fact), "{name}: {}", refused(name, len));
        }
        let known = ["aes", "aes-plain", "aes-ecb", "aes-cbc-null", "serpent-xts-plain", "cipher_null-ecb"];
        for name in known {
            assert_eq!(refused(name, 32), "", "{name}");
        }
    }
}
