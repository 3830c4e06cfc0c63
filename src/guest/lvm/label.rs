//! The label of a physical volume: in one of its first four sectors, with the volume's identity and the
//! positions of its data and its metadata areas.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::guest::bytes::{array, crc32, le32, le64, slice};

/// The seed of LVM's checksums; there is no final inversion.
const CRC_SEED: u32 = 0xf597_a6cf;
/// Labels are found in sectors of 512 bytes, whatever the disk's sector size.
const SECTOR_LEN: usize = 512;
/// Areas in a list; two or three are usual, and the header's size is LVM's only limit.
const AREA_LIMIT: usize = 16;

/// LVM's checksum.
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    crc32(CRC_SEED, bytes)
}

/// The identity of a physical volume, a volume group or a logical volume: 32 letters, digits, `!` or `#`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct LvmId([u8; 32]);

impl LvmId {
    fn of(bytes: [u8; 32]) -> Option<Self> {
        let is_known = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'!' | b'#');
        bytes.iter().all(is_known).then_some(Self(bytes))
    }

    /// From text with or without hyphens.
    pub fn parse(text: &str) -> Option<Self> {
        let bytes: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').take(33).collect();
        Self::of(bytes.try_into().ok()?)
    }
}

impl fmt::Display for LvmId {
    /// With hyphens, as LVM writes it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = &self.0[..];
        for (index, len) in [6, 4, 4, 4, 4, 4, 6].into_iter().enumerate() {
            let (part, next) = rest.split_at(len);
            rest = next;
            let hyphen = if index == 0 { "" } else { "-" };
            write!(f, "{hyphen}{}", String::from_utf8_lossy(part))?;
        }
        Ok(())
    }
}

impl fmt::Debug for LvmId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<LvmId> for String {
    fn from(id: LvmId) -> Self {
        id.to_string()
    }
}

impl TryFrom<String> for LvmId {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text).ok_or("not an LVM identity")
    }
}

/// The content of the label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Label {
    /// The physical volume's identity.
    pub id: LvmId,
    /// Bytes of the device when it was initialised.
    pub device_len: u64,
    /// Its metadata areas: offset and length in bytes.
    pub metadata_areas: Vec<(u64, u64)>,
}

/// The label in the first four sectors of `head`: the first one with a valid checksum.
pub fn find_label(head: &[u8]) -> Option<Label> {
    head.chunks_exact(SECTOR_LEN)
        .take(4)
        .enumerate()
        .find_map(|(number, sector)| parse(sector, number as u64))
}

fn parse(sector: &[u8], number: u64) -> Option<Label> {
    let is_label = sector.starts_with(b"LABELONE") && slice(sector, 24, 8) == b"LVM2 001";
    if !is_label || le64(sector, 8) != number || le32(sector, 16) != checksum(&sector[20..]) {
        return None;
    }
    let header = sector.get(le32(sector, 20) as usize..)?;
    let id = LvmId::of(array(header, 0))?;
    let mut at = 40;
    let _data_areas = areas(header, &mut at);
    let metadata_areas = areas(header, &mut at);
    Some(Label { id, device_len: le64(header, 32), metadata_areas })
}

/// A list of offsets and lengths, terminated by an offset of 0.
fn areas(header: &[u8], at: &mut usize) -> Vec<(u64, u64)> {
    let mut areas = Vec::new();
    loop {
        let (offset, len) = (le64(header, *at), le64(header, *at + 8));
        *at += 16;
        if offset == 0 || areas.len() == AREA_LIMIT {
            return areas;
        }
        areas.push((offset, len));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_written_like_lvms() {
        let text = "Zq2hEb-zKAX-21qc-nyTF-Otwz-f61A-2Q7Lhc";
        let id = LvmId::parse(text).unwrap();
        assert_eq!(id.to_string(), text);
        assert_eq!(LvmId::parse(&text.replace('-', "")), Some(id));
        for wrong in
            ["", "x", "Zq2hEb-zKAX-21qc-nyTF-Otwz-f61A-2Q7Lh/", "Zq2hEb-zKAX-21qc-nyTF-Otwz-f61A-2Q7Lhcc"]
        {
            assert_eq!(LvmId::parse(wrong), None, "{wrong}");
        }
    }
}
