//! The header of LUKS1 (LUKS1 On-Disk Format Specification 1.2.3, section 3): 592 bytes, big-endian.

use crate::guest::Source;
use crate::guest::bytes::{be16, be32, slice, text};

use super::cipher::SECTOR;
use super::hash::Hash;
use super::header::{Header, HeaderId, KeyDerivation, KeyDigest, KeySlot, Segment, SegmentCipher, bytes_of};

/// `LUKS_MAGIC`.
pub(super) const MAGIC: &[u8; 6] = b"LUKS\xba\xbe";
/// `phdr`: the whole header.
const HEADER_LEN: usize = 592;
/// `key-slots`: eight.
const SLOTS_AT: usize = 208;
const SLOT_LEN: usize = 48;
const SLOT_COUNT: usize = 8;
/// `LUKS_KEY_ENABLED`.
const ENABLED: u32 = 0x00ac_71f3;
/// `mk-digest` has 20 bytes.
const DIGEST_LEN: usize = 20;

/// Whether the container is one of LUKS1.
pub(super) fn is_it(source: &dyn Source) -> bool {
    bytes_of(source, 0, 8).is_ok_and(|head| head.starts_with(MAGIC) && be16(&head, 6) == 1)
}

pub(super) fn read(source: &dyn Source) -> Result<Header, String> {
    let head = bytes_of(source, 0, HEADER_LEN)?;
    let word = |at, len| text(slice(&head, at, len)).unwrap_or_default();
    let hash = Hash::from_name(&word(72, 32))?;
    let cipher = format!("{}-{}", word(8, 32), word(40, 32));
    let offset = u64::from(be32(&head, 104)) * SECTOR;
    if offset == 0 {
        return Err("its header is detached: the data is on another device".to_owned());
    }
    let key_len = be32(&head, 108) as usize;
    let digest = KeyDigest {
        hash,
        rounds: be32(&head, 164),
        salt: slice(&head, 132, 32).to_vec(),
        digest: slice(&head, 112, DIGEST_LEN).to_vec(),
    };
    let slots = (0..SLOT_COUNT).map(|number| slice(&head, SLOTS_AT + number * SLOT_LEN, SLOT_LEN));
    let slots = slots.filter(|slot| be32(slot, 0) == ENABLED).map(|slot| KeySlot {
        digest: 0,
        key_len,
        area_at: u64::from(be32(slot, 40)) * SECTOR,
        area_cipher: cipher.clone(),
        area_key_len: key_len,
        stripes: be32(slot, 44) as usize,
        merge: hash,
        derivation: KeyDerivation::Pbkdf2 { hash, rounds: be32(slot, 4) },
        salt: slice(slot, 8, 32).to_vec(),
    });
    let slots = slots.collect();
    let cipher = Some(SegmentCipher { name: cipher, sector_len: SECTOR, first: 0, digest: 0 });
    let segments = vec![Segment { offset, len: None, cipher }];
    let uuid = word(168, 40);
    Ok(Header { id: HeaderId::of(&[&head]), uuid, slots, digests: vec![digest], segments })
}
