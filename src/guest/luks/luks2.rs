//! The header of LUKS2 (LUKS2 On-Disk Format Specification, sections 2 and 3): two copies, each a binary part
//! of 4,096 bytes and an area of JSON. The newer one whose checksum is right counts.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::guest::Source;
use crate::guest::bytes::{be16, be64, slice, text};

use super::base64;
use super::hash::Hash;
use super::header::{
    COUNT_LIMIT, Header, HeaderId, KeyDerivation, KeyDigest, KeySlot, Segment, SegmentCipher, bytes_of,
};
use super::luks1::MAGIC;

/// `LUKS2_MAGIC_2ND`, of the second copy.
pub(in crate::guest) const SECOND_MAGIC: &[u8; 6] = b"SKUL\xba\xbe";
/// Bytes of the binary part.
const BINARY_LEN: usize = 4096;
/// `csum`: where the checksum is, which is computed with zeroes in its place.
const SUM_AT: usize = 448;
const SUM_LEN: usize = 64;
/// `hdr_size`: the lengths of a copy that the format has. The second copy begins where the first one ends.
const LENGTHS: [u64; 9] =
    [0x4000, 0x8000, 0x10000, 0x20000, 0x40000, 0x80000, 0x0010_0000, 0x0020_0000, 0x0040_0000];
/// Requirements that a reader can ignore: a re-encryption is told by the segments.
const KNOWN_REQUIREMENTS: [&str; 3] = ["online-reencrypt", "online-reencrypt-v2", "online-reencrypt-v3"];

/// A valid copy.
struct Copy {
    /// `seqid`: the higher, the newer.
    sequence: u64,
    uuid: String,
    bytes: Vec<u8>,
}

/// The JSON area; what is not listed here does not matter to a reader.
#[derive(Deserialize)]
struct Metadata {
    keyslots: BTreeMap<String, JsonSlot>,
    segments: BTreeMap<String, JsonSegment>,
    digests: BTreeMap<String, JsonDigest>,
    config: JsonConfig,
}

#[derive(Deserialize)]
struct JsonConfig {
    #[serde(default)]
    requirements: Option<JsonRequirements>,
}

#[derive(Deserialize)]
struct JsonRequirements {
    #[serde(default)]
    mandatory: Vec<String>,
}

#[derive(Deserialize)]
struct JsonSlot {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    key_size: usize,
    /// 2: tried first; 0: tried last.
    #[serde(default = "usual_priority")]
    priority: i64,
    #[serde(default)]
    af: Option<JsonSplitter>,
    #[serde(default)]
    area: Option<JsonArea>,
    #[serde(default)]
    kdf: Option<JsonDerivation>,
}

fn usual_priority() -> i64 {
    1
}

#[derive(Deserialize)]
struct JsonSplitter {
    stripes: usize,
    hash: String,
}

#[derive(Deserialize)]
struct JsonArea {
    offset: String,
    size: String,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    key_size: usize,
}

#[derive(Deserialize)]
struct JsonDerivation {
    #[serde(rename = "type")]
    kind: String,
    salt: String,
    #[serde(default)]
    hash: String,
    #[serde(default)]
    iterations: u32,
    #[serde(default)]
    time: u32,
    #[serde(default)]
    memory: u32,
    #[serde(default)]
    cpus: u32,
}

#[derive(Deserialize)]
struct JsonSegment {
    #[serde(rename = "type")]
    kind: String,
    offset: String,
    size: String,
    #[serde(default)]
    iv_tweak: Option<String>,
    #[serde(default)]
    encryption: String,
    #[serde(default)]
    sector_size: u64,
    #[serde(default)]
    integrity: Option<JsonIntegrity>,
    #[serde(default)]
    flags: Vec<String>,
}

#[derive(Deserialize)]
struct JsonIntegrity {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Deserialize)]
struct JsonDigest {
    #[serde(rename = "type")]
    kind: String,
    keyslots: Vec<String>,
    segments: Vec<String>,
    hash: String,
    iterations: u32,
    salt: String,
    digest: String,
}

pub(super) fn read(source: &dyn Source) -> Result<Header, String> {
    let first = Copy::read(source, 0, None);
    // If the first copy does not say where the second one is, it is looked for.
    let ends = first.as_ref().map_or(&LENGTHS[..], |(len, _)| std::slice::from_ref(len));
    let second = ends.iter().find_map(|at| Copy::read(source, *at, Some(*at)));
    let mut copies: Vec<Copy> = [first, second].into_iter().flatten().filter_map(|(_, copy)| copy).collect();
    copies.sort_by_key(|copy| std::cmp::Reverse(copy.sequence));
    let mut fact = "both copies of its header are damaged".to_owned();
    for (number, copy) in copies.iter().enumerate() {
        match copy.header() {
            Ok(header) => return Ok(header),
            Err(error) if number == 0 => fact = error,
            Err(_) => {}
        }
    }
    Err(fact)
}

impl Copy {
    /// The copy at an offset: its length, if the binary part is there, and itself, if it is valid.
    fn read(source: &dyn Source, at: u64, expected_len: Option<u64>) -> Option<(u64, Option<Self>)> {
        let binary = bytes_of(source, at, BINARY_LEN).ok()?;
        let magic = if at == 0 { MAGIC } else { SECOND_MAGIC };
        let len = be64(&binary, 8);
        let is_it = binary.starts_with(magic) && be16(&binary, 6) == 2;
        let is_here = be64(&binary, 256) == at && expected_len.is_none_or(|expected| expected == len);
        if !is_it || !is_here || !LENGTHS.contains(&len) {
            return None;
        }
        Some((len, Self::valid(source, at, len)))
    }

    fn valid(source: &dyn Source, at: u64, len: u64) -> Option<Self> {
        let bytes = bytes_of(source, at, len as usize).ok()?;
        let hash = Hash::from_name(&text(slice(&bytes, 72, 32))?).ok()?;
        let (before, rest) = bytes.split_at(SUM_AT);
        let (sum, after) = rest.split_at(SUM_LEN);
        if hash.of(&[before, &[0; SUM_LEN], after])[..] != sum[..hash.len()] {
            return None;
        }
        let uuid = text(slice(&bytes, 168, 40)).unwrap_or_default();
        Some(Self { sequence: be64(&bytes, 16), uuid, bytes })
    }

    fn header(&self) -> Result<Header, String> {
        let json = &self.bytes[BINARY_LEN..];
        let json = &json[..json.iter().position(|byte| *byte == 0).unwrap_or(json.len())];
        // The message of an error quotes nothing: it names a position.
        let found: Metadata = serde_json::from_slice(json).map_err(|error| {
            format!("its header is not valid: line {} column {}", error.line(), error.column())
        })?;
        let mandatory = found.config.requirements.iter().flat_map(|all| &all.mandatory);
        if let Some(unknown) = mandatory.into_iter().find(|name| !KNOWN_REQUIREMENTS.contains(&name.as_str()))
        {
            return Err(format!("it requires {}, which is not supported", quoted(unknown)));
        }
        // Not of the sequence number and the label: they do not change keys.
        let id = HeaderId::of(&[self.uuid.as_bytes(), &[0], json]);
        found.header(id, self.uuid.clone())
    }
}

impl Metadata {
    fn header(self, id: HeaderId, uuid: String) -> Result<Header, String> {
        let counts = [self.keyslots.len(), self.segments.len(), self.digests.len()];
        if counts.iter().any(|count| *count > COUNT_LIMIT) {
            return Err(format!("its header has more than {COUNT_LIMIT} entries of one kind"));
        }
        let digests: Vec<&JsonDigest> = self.digests.values().collect();
        let mut segments: Vec<(u32, &JsonSegment)> = Vec::new();
        for (number, segment) in &self.segments {
            segments.push((number.parse().map_err(|_| "a segment has no number".to_owned())?, segment));
        }
        segments.sort_by_key(|(number, _)| *number);
        let is_backup = |segment: &JsonSegment| segment.flags.iter().any(|flag| flag.starts_with("backup-"));
        let shown: Vec<_> = segments.into_iter().filter(|(_, segment)| !is_backup(segment)).collect();
        let digest_of = |number: u32| {
            let number = number.to_string();
            digests.iter().position(|digest| digest.segments.contains(&number))
        };
        let is_used = |digest: usize| shown.iter().any(|(number, _)| digest_of(*number) == Some(digest));
        let mut slots: Vec<(i64, KeySlot)> = Vec::new();
        for (number, slot) in &self.keyslots {
            // A slot without a digest of the data holds another key.
            let digest = digests.iter().position(|digest| digest.keyslots.contains(number));
            let Some(digest) = digest.filter(|digest| is_used(*digest)) else { continue };
            if slot.kind == "luks2" {
                slots.push((slot.priority, slot.slot(digest)?));
            }
        }
        slots.sort_by_key(|(priority, _)| std::cmp::Reverse(*priority));
        let slots = slots.into_iter().map(|(_, slot)| slot).collect();
        let segments = shown.iter().map(|(number, segment)| segment.segment(digest_of(*number)));
        let segments = segments.collect::<Result<Vec<_>, _>>()?;
        if segments.iter().rev().skip(1).any(|segment| segment.len.is_none()) {
            return Err("its header has data of an unknown length before other data".to_owned());
        }
        let digests = digests.iter().map(|digest| digest.digest()).collect::<Result<Vec<_>, _>>()?;
        Ok(Header { id, uuid, slots, digests, segments })
    }
}

impl JsonSlot {
    fn slot(&self, digest: usize) -> Result<KeySlot, String> {
        let (Some(splitter), Some(area), Some(derivation)) = (&self.af, &self.area, &self.kdf) else {
            return Err("a key slot of its header is incomplete".to_owned());
        };
        let slot = KeySlot {
            digest,
            key_len: self.key_size,
            area_at: number(&area.offset)?,
            area_cipher: area.encryption.clone(),
            area_key_len: area.key_size,
            stripes: splitter.stripes,
            merge: Hash::from_name(&splitter.hash)?,
            derivation: derivation.derivation()?,
            salt: base64::decode(&derivation.salt)?,
        };
        let len = number(&area.size)?;
        if slot.key_len.checked_mul(slot.stripes).is_none_or(|needed| needed as u64 > len) {
            return Err("a key slot of its header is larger than its area".to_owned());
        }
        Ok(slot)
    }
}

impl JsonDerivation {
    fn derivation(&self) -> Result<KeyDerivation, String> {
        let argon2 =
            |is_id| KeyDerivation::Argon2 { is_id, rounds: self.time, memory: self.memory, lanes: self.cpus };
        match self.kind.as_str() {
            "pbkdf2" => {
                Ok(KeyDerivation::Pbkdf2 { hash: Hash::from_name(&self.hash)?, rounds: self.iterations })
            }
            "argon2i" => Ok(argon2(false)),
            "argon2id" => Ok(argon2(true)),
            other => Err(format!("its key derivation {} is not supported", quoted(other))),
        }
    }
}

impl JsonSegment {
    fn segment(&self, digest: Option<usize>) -> Result<Segment, String> {
        if let Some(integrity) = &self.integrity {
            let kind = quoted(&integrity.kind);
            return Err(format!("its data has integrity protection ({kind}), which is not supported"));
        }
        if self.flags.iter().any(|flag| flag == "in-reencryption") {
            let fact = "its re-encryption was interrupted in the middle of a step";
            return Err(format!("{fact}; run cryptsetup repair on a clone"));
        }
        let (offset, len) = (number(&self.offset)?, length(&self.size)?);
        let cipher = match self.kind.as_str() {
            "linear" => None,
            "crypt" if offset == 0 => {
                return Err("its header is detached: the data is on another device".to_owned());
            }
            "crypt" => Some(SegmentCipher {
                name: self.encryption.clone(),
                sector_len: self.sector_size,
                first: self.iv_tweak.as_deref().map_or(Ok(0), number)?,
                digest: digest.ok_or("its header has no digest for the key of the data")?,
            }),
            other => {
                return Err(format!("its data is of the kind {}, which is not supported", quoted(other)));
            }
        };
        Ok(Segment { offset, len, cipher })
    }
}

impl JsonDigest {
    fn digest(&self) -> Result<KeyDigest, String> {
        if self.kind != "pbkdf2" {
            return Err(format!("its digest is of the kind {}, which is not supported", quoted(&self.kind)));
        }
        Ok(KeyDigest {
            hash: Hash::from_name(&self.hash)?,
            rounds: self.iterations,
            salt: base64::decode(&self.salt)?,
            digest: base64::decode(&self.digest)?,
        })
    }
}

fn number(digits: &str) -> Result<u64, String> {
    digits.parse().map_err(|_| "a number of its header is not valid".to_owned())
}

/// Bytes of a segment; `None`: up to the end.
fn length(digits: &str) -> Result<Option<u64>, String> {
    if digits == "dynamic" { Ok(None) } else { number(digits).map(Some) }
}

/// A word of the header in a message.
fn quoted(word: &str) -> String {
    format!("{:?}", word.chars().take(64).collect::<String>())
}
