//! What a header says, whatever its version: key slots, digests of volume keys, and segments of data.
//!
//! A [`Header`] is checked: counts, costs, lengths and offsets are bounded. Nothing else of it is trusted.

use serde::{Deserialize, Serialize};

use crate::guest::Source;

use super::cipher::{SECTOR, SECTOR_LEN_LIMIT};
use super::hash::Hash;
use super::{luks1, luks2};

/// Key slots, digests, and segments of a container at most: cryptsetup's limit is 32.
pub(super) const COUNT_LIMIT: usize = 32;
/// Bytes of a key at most: cryptsetup's limit.
pub(super) const KEY_LEN_LIMIT: usize = 512;
/// Stripes of a key at most. cryptsetup makes 4,000.
const STRIPES_LIMIT: usize = 10_000;
/// Bytes of a salt or of a digest at most.
const SALT_LEN_LIMIT: usize = 1024;
/// Rounds of PBKDF2 at most: minutes of work.
const ROUNDS_LIMIT: u32 = 100_000_000;
/// KiB of memory of Argon2 at most: cryptsetup's limit.
pub(super) const ARGON2_MEMORY_LIMIT: u32 = 4 << 20;
/// KiB that Argon2 may fill in all rounds at most: minutes of work.
const ARGON2_WORK_LIMIT: u64 = 64 << 20;
/// Lanes of Argon2 at most: cryptsetup's limit.
const ARGON2_LANES_LIMIT: u32 = 4;

/// Identifies a container and its keys: a digest of the header. Containers with equal ones have equal keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct HeaderId([u8; 32]);

/// A container's header.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) id: HeaderId,
    /// Its identity; chosen by the guest, and not empty.
    pub(crate) uuid: String,
    pub(super) slots: Vec<KeySlot>,
    pub(super) digests: Vec<KeyDigest>,
    /// In the order of the data.
    pub(super) segments: Vec<Segment>,
}

/// A key slot: a volume key that a passphrase protects.
#[derive(Debug)]
pub(super) struct KeySlot {
    /// Index of the digest of the key.
    pub(super) digest: usize,
    /// Bytes of the volume key.
    pub(super) key_len: usize,
    /// Where the split key lies, and how it is encrypted.
    pub(super) area_at: u64,
    pub(super) area_cipher: String,
    pub(super) area_key_len: usize,
    pub(super) stripes: usize,
    pub(super) merge: Hash,
    pub(super) derivation: KeyDerivation,
    pub(super) salt: Vec<u8>,
}

/// How a key is made of a passphrase.
#[derive(Clone, Debug)]
pub(super) enum KeyDerivation {
    Pbkdf2 {
        hash: Hash,
        rounds: u32,
    },
    Argon2 {
        /// Argon2id, else Argon2i.
        is_id: bool,
        rounds: u32,
        /// KiB.
        memory: u32,
        lanes: u32,
    },
}

/// A digest that tells whether a volume key is the right one.
#[derive(Debug)]
pub(super) struct KeyDigest {
    pub(super) hash: Hash,
    pub(super) rounds: u32,
    pub(super) salt: Vec<u8>,
    pub(super) digest: Vec<u8>,
}

/// A range of the container's data.
#[derive(Debug)]
pub(super) struct Segment {
    /// Where it begins in the container.
    pub(super) offset: u64,
    /// Bytes; `None`: up to the end of the container.
    pub(super) len: Option<u64>,
    /// `None`: it is not encrypted, during a re-encryption.
    pub(super) cipher: Option<SegmentCipher>,
}

/// How a segment is encrypted.
#[derive(Debug)]
pub(super) struct SegmentCipher {
    pub(super) name: String,
    /// Bytes of a sector.
    pub(super) sector_len: u64,
    /// The number of its first sector, in units of 512 bytes.
    pub(super) first: u64,
    /// Index of the digest of its key.
    pub(super) digest: usize,
}

impl HeaderId {
    pub(super) fn of(parts: &[&[u8]]) -> Self {
        let digest = Hash::Sha256.of(parts);
        let mut id = [0; 32];
        id.copy_from_slice(&digest);
        Self(id)
    }
}

impl Header {
    /// The header of a container; an error says why it cannot be used.
    pub(crate) fn read(source: &dyn Source) -> Result<Self, String> {
        let header = if luks1::is_it(source) { luks1::read(source)? } else { luks2::read(source)? };
        header.check(source.size())?;
        Ok(header)
    }

    /// Checks what both versions have in common.
    fn check(&self, size: u64) -> Result<(), String> {
        let counts = [self.slots.len(), self.digests.len(), self.segments.len()];
        if counts.iter().any(|count| *count > COUNT_LIMIT) {
            return Err(format!("its header has more than {COUNT_LIMIT} entries of one kind"));
        }
        if self.segments.is_empty() {
            return Err("its header names no data".to_owned());
        }
        for segment in &self.segments {
            segment.check(size, self.digests.len())?;
        }
        Ok(())
    }
}

impl KeySlot {
    /// Whether the slot can be tried; an error says why not.
    pub(super) fn check(&self) -> Result<(), String> {
        let is_key = |len: usize| (1..=KEY_LEN_LIMIT).contains(&len);
        if !is_key(self.key_len) || !is_key(self.area_key_len) {
            return Err("a key slot has a key of an impossible length".to_owned());
        }
        if !(1..=STRIPES_LIMIT).contains(&self.stripes) {
            return Err("a key slot has an impossible number of stripes".to_owned());
        }
        check_salt(&self.salt)?;
        self.derivation.check()
    }

    /// Bytes of the split key, in whole sectors.
    pub(super) fn area_len(&self) -> usize {
        (self.key_len * self.stripes).next_multiple_of(SECTOR as usize)
    }
}

impl KeyDigest {
    pub(super) fn check(&self) -> Result<(), String> {
        check_salt(&self.salt)?;
        check_salt(&self.digest)?;
        if self.digest.is_empty() {
            return Err("a digest of a volume key is empty".to_owned());
        }
        KeyDerivation::Pbkdf2 { hash: self.hash, rounds: self.rounds }.check()
    }
}

impl KeyDerivation {
    /// Whether the costs are sane: a header may name any.
    fn check(&self) -> Result<(), String> {
        let (cost, fact) = match *self {
            Self::Pbkdf2 { rounds, .. } => {
                let is_good = (1..=ROUNDS_LIMIT).contains(&rounds);
                (is_good, format!("PBKDF2 with {rounds} rounds (at most {ROUNDS_LIMIT})"))
            }
            Self::Argon2 { rounds, memory, lanes, .. } => {
                let is_good = memory <= ARGON2_MEMORY_LIMIT
                    && u64::from(memory) * u64::from(rounds) <= ARGON2_WORK_LIMIT
                    && (1..=ARGON2_LANES_LIMIT).contains(&lanes)
                    && rounds > 0;
                let fact = format!("Argon2 with {rounds} rounds over {memory} KiB in {lanes} lanes");
                (
                    is_good,
                    format!("{fact} (at most {ARGON2_MEMORY_LIMIT} KiB and {ARGON2_LANES_LIMIT} lanes)"),
                )
            }
        };
        if cost { Ok(()) } else { Err(format!("a key slot demands {fact}")) }
    }
}

impl Segment {
    fn check(&self, size: u64, digest_count: usize) -> Result<(), String> {
        let end = self.offset.checked_add(self.len.unwrap_or(0));
        if self.offset >= size || end.is_none_or(|end| end > size) {
            let fact = "its data ends beyond the volume";
            return Err(format!("{fact}: {} bytes from {:#x} on", self.len.unwrap_or(0), self.offset));
        }
        let Some(cipher) = &self.cipher else { return Ok(()) };
        let is_sector = [512, 1024, 2048, SECTOR_LEN_LIMIT as u64].contains(&cipher.sector_len);
        if !is_sector || self.len.is_some_and(|len| !len.is_multiple_of(cipher.sector_len)) {
            return Err(format!("its sectors have an impossible size of {} bytes", cipher.sector_len));
        }
        if cipher.digest >= digest_count {
            return Err("its header has no digest for the key of the data".to_owned());
        }
        Ok(())
    }
}

fn check_salt(salt: &[u8]) -> Result<(), String> {
    if salt.len() > SALT_LEN_LIMIT { Err("a salt or a digest is too long".to_owned()) } else { Ok(()) }
}

/// Bytes of a header, which must lie within the container.
pub(super) fn bytes_of(source: &dyn Source, at: u64, len: usize) -> Result<Vec<u8>, String> {
    if at.checked_add(len as u64).is_none_or(|end| end > source.size()) {
        return Err("its header is cut off".to_owned());
    }
    let mut bytes = vec![0; len];
    source.read_at(at, &mut bytes).map_err(|error| format!("its header cannot be read: {error}"))?;
    Ok(bytes)
}
