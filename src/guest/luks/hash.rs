//! Hashes by the names that headers use, PBKDF2 over them, and the anti-forensic merge.

use pbkdf2::pbkdf2_hmac;
use ripemd::Ripemd160;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};
use zeroize::Zeroizing;

/// A hash function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hash {
    Sha1,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
    Ripemd160,
}

/// The longest hash.
pub(super) const HASH_LEN_LIMIT: usize = 64;

impl Hash {
    /// The hash of this name in a header; an error that names it if there is none.
    pub(super) fn from_name(name: &str) -> Result<Self, String> {
        match name.to_ascii_lowercase().as_str() {
            "sha1" => Ok(Self::Sha1),
            "sha224" => Ok(Self::Sha224),
            "sha256" => Ok(Self::Sha256),
            "sha384" => Ok(Self::Sha384),
            "sha512" => Ok(Self::Sha512),
            "ripemd160" | "rmd160" => Ok(Self::Ripemd160),
            _ => Err(format!("its hash {name:?} is not supported")),
        }
    }

    /// Bytes of a hash.
    pub(super) fn len(self) -> usize {
        match self {
            Self::Sha1 | Self::Ripemd160 => 20,
            Self::Sha224 => 28,
            Self::Sha256 => 32,
            Self::Sha384 => 48,
            Self::Sha512 => HASH_LEN_LIMIT,
        }
    }

    /// The hash of the parts one after the other.
    pub(super) fn of(self, parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
        fn hash<D: Digest>(parts: &[&[u8]]) -> Zeroizing<Vec<u8>> {
            let mut state = D::new();
            for part in parts {
                state.update(part);
            }
            Zeroizing::new(state.finalize().to_vec())
        }
        match self {
            Self::Sha1 => hash::<Sha1>(parts),
            Self::Sha224 => hash::<Sha224>(parts),
            Self::Sha256 => hash::<Sha256>(parts),
            Self::Sha384 => hash::<Sha384>(parts),
            Self::Sha512 => hash::<Sha512>(parts),
            Self::Ripemd160 => hash::<Ripemd160>(parts),
        }
    }

    /// PBKDF2 with HMAC over this hash.
    pub(super) fn pbkdf2(self, password: &[u8], salt: &[u8], rounds: u32, len: usize) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(vec![0; len]);
        match self {
            Self::Sha1 => pbkdf2_hmac::<Sha1>(password, salt, rounds, &mut key),
            Self::Sha224 => pbkdf2_hmac::<Sha224>(password, salt, rounds, &mut key),
            Self::Sha256 => pbkdf2_hmac::<Sha256>(password, salt, rounds, &mut key),
            Self::Sha384 => pbkdf2_hmac::<Sha384>(password, salt, rounds, &mut key),
            Self::Sha512 => pbkdf2_hmac::<Sha512>(password, salt, rounds, &mut key),
            Self::Ripemd160 => pbkdf2_hmac::<Ripemd160>(password, salt, rounds, &mut key),
        }
        key
    }

    /// Joins a key that was split into stripes of its length so that all of them are needed (LUKS1
    /// specification, section 2.4). `split` has one stripe at least.
    pub(super) fn merge(self, split: &[u8], key_len: usize) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(vec![0; key_len]);
        let last = split.len().saturating_sub(key_len);
        for (at, stripe) in split.chunks(key_len.max(1)).enumerate() {
            for (to, from) in key.iter_mut().zip(stripe) {
                *to ^= from;
            }
            if at * key_len < last {
                self.diffuse(&mut key);
            }
        }
        key
    }

    /// Replaces each piece of the hash's length by the hash of its number and itself.
    fn diffuse(self, block: &mut [u8]) {
        for (number, piece) in block.chunks_mut(self.len()).enumerate() {
            let hashed = self.of(&[&(number as u32).to_be_bytes(), piece]);
            let len = piece.len();
            piece.copy_from_slice(&hashed[..len]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pbkdf2_gives_the_keys_of_other_implementations() {
        // The first is of RFC 6070, the others of OpenSSL.
        for (name, key) in [
            ("sha1", "ea6c014dc72d6f8ccd1ed92ace1d41f0d8de8957"),
            ("sha224", "93200ffa96c5776d38fa10abdf8f5bfc0054b971"),
            ("sha256", "ae4d0c95af6b46d32d0adff928f06dd02a303f8e"),
            ("sha384", "54f775c6d790f21930459162fc535dbf04a93918"),
            ("sha512", "e1d9c16aa681708a45f5c7c4e215ceb66e011a2e"),
            ("ripemd160", "768dcc27b7bfdef794a1ff9d935090fcf598555e"),
        ] {
            let hash = Hash::from_name(name).expect("a hash");
            assert_eq!(crate::guest::bytes::hex(&hash.pbkdf2(b"password", b"salt", 2, 20)), key, "{name}");
            assert_eq!(hash.of(&[b"a"]).len(), hash.len());
        }
    }

    #[test]
    fn a_split_key_needs_every_stripe() {
        let key: Vec<u8> = (0..70).collect();
        for hash in [Hash::Sha1, Hash::Sha256, Hash::Sha512, Hash::Ripemd160] {
            let mut split: Vec<u8> = (0..70 * 4_u32).map(|at| (at * 7 % 251) as u8).collect();
            // The last stripe is the key, mixed with the others.
            let others = hash.merge(&[&split[..210], &[0; 70]].concat(), 70);
            for (to, (key, other)) in split[210..].iter_mut().zip(key.iter().zip(&*others)) {
                *to = key ^ other;
            }
            assert_eq!(*hash.merge(&split, 70), key);
            split[3] ^= 1;
            assert_ne!(*hash.merge(&split, 70), key);
        }
    }

    #[test]
    fn unknown_hashes_are_named() {
        assert_eq!(Hash::from_name("whirlpool").unwrap_err(), "its hash \"whirlpool\" is not supported");
        assert_eq!(Hash::from_name("SHA256"), Ok(Hash::Sha256));
    }
}
