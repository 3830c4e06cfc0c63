//! Finds the volume keys of a container with what the user gave: passphrases and key files.
//!
//! This is slow on purpose, as the header demands it. Promise: the costs are bounded by the header's checks,
//! and memory is taken only if there is room for it.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use crate::guest::Source;

use super::cipher::{SECTOR, SectorCipher};
use super::header::{Header, KeyDerivation, KeyDigest, KeySlot, bytes_of};
use super::secret::Secret;

/// The volume keys of a container, by the index of their digest in the header: one, except during a
/// re-encryption.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeKeys(pub(super) Vec<Option<Secret>>);

/// What the attempt to unlock a container has given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Unlocked {
    /// The volume keys.
    Keys(VolumeKeys),
    /// No secret opens any key slot.
    NoKeyFits,
    /// It cannot be unlocked; one sentence.
    Problem(String),
}

impl VolumeKeys {
    /// How many digests there are, with keys or without.
    #[expect(clippy::len_without_is_empty, reason = "it is never asked")]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The keys themselves.
    pub fn all(&self) -> impl Iterator<Item = &Secret> {
        self.0.iter().flatten()
    }
}

/// Tries secrets on the key slots of a container.
pub(crate) fn unlock(header: &Header, source: &dyn Source, secrets: &[Secret]) -> Unlocked {
    let is_needed = |digest: usize| {
        let ciphers = header.segments.iter().filter_map(|segment| segment.cipher.as_ref());
        ciphers.into_iter().any(|cipher| cipher.digest == digest)
    };
    let needed: Vec<bool> = (0..header.digests.len()).map(is_needed).collect();
    let mut keys: Vec<Option<Secret>> = header.digests.iter().map(|_| None).collect();
    let is_done =
        |keys: &[Option<Secret>]| keys.iter().zip(&needed).all(|(key, needed)| key.is_some() || !needed);
    let is_empty = header.slots.is_empty();
    let mut problem = is_empty.then(|| "it has no key slot in use".to_owned());
    for secret in secrets {
        for slot in &header.slots {
            if is_done(&keys) {
                break;
            }
            if keys.get(slot.digest).is_none_or(Option::is_some) {
                continue;
            }
            match try_slot(header, slot, source, secret) {
                Ok(Some(key)) => keys[slot.digest] = Some(key),
                Ok(None) => {}
                // Another slot may be good.
                Err(fact) => problem = problem.or(Some(fact)),
            }
        }
    }
    if is_done(&keys) {
        Unlocked::Keys(VolumeKeys(keys))
    } else if keys.iter().any(Option::is_some) {
        Unlocked::Problem("it is being re-encrypted, and there is a key for a part of it only".to_owned())
    } else {
        problem.map_or(Unlocked::NoKeyFits, Unlocked::Problem)
    }
}

/// The volume key of a slot, if the secret is the slot's.
fn try_slot(
    header: &Header,
    slot: &KeySlot,
    source: &dyn Source,
    secret: &Secret,
) -> Result<Option<Secret>, String> {
    slot.check()?;
    let digest = header.digests.get(slot.digest).ok_or("a key slot has no digest")?;
    digest.check()?;
    // Before the costly part: what would make it vain.
    let mut split = Zeroizing::new(bytes_of(source, slot.area_at, slot.area_len())?);
    let derived = slot.derivation.derive(secret.bytes(), &slot.salt, slot.area_key_len)?;
    let cipher = SectorCipher::new(&slot.area_cipher, &derived)?;
    for (number, sector) in (0..).zip(split.chunks_mut(SECTOR as usize)) {
        cipher.decrypt(number, sector);
    }
    let key = slot.merge.merge(&split[..slot.key_len * slot.stripes], slot.key_len);
    Ok(digest.fits(&key).then(|| Secret::from(key)))
}

impl KeyDigest {
    /// Whether a volume key is the one of this digest.
    pub(super) fn fits(&self, key: &[u8]) -> bool {
        self.hash.pbkdf2(key, &self.salt, self.rounds, self.digest.len())[..] == self.digest[..]
    }
}

impl KeyDerivation {
    fn derive(&self, secret: &[u8], salt: &[u8], len: usize) -> Result<Zeroizing<Vec<u8>>, String> {
        match *self {
            Self::Pbkdf2 { hash, rounds } => Ok(hash.pbkdf2(secret, salt, rounds, len)),
            Self::Argon2 { is_id, rounds, memory, lanes } => {
                let refuse =
                    |error: argon2::Error| format!("a key slot's Argon2 costs are not valid: {error}");
                let params = Params::new(memory, rounds, lanes, Some(len)).map_err(refuse)?;
                let mut blocks: Vec<Block> = Vec::new();
                blocks.try_reserve_exact(params.block_count()).map_err(|_| {
                    format!("a key slot demands {memory} KiB of memory, which are not available")
                })?;
                blocks.resize(params.block_count(), Block::new());
                let algorithm = if is_id { Algorithm::Argon2id } else { Algorithm::Argon2i };
                let mut key = Zeroizing::new(vec![0; len]);
                let argon2 = Argon2::new(algorithm, Version::V0x13, params);
                let derived = argon2.hash_password_into_with_memory(secret, salt, &mut key, &mut blocks);
                // The blocks that the key was made of.
                blocks.iter_mut().rev().take(lanes as usize).for_each(Block::zeroize);
                derived.map_err(refuse)?;
                Ok(key)
            }
        }
    }
}
