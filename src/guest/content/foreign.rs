//! File systems of other systems: DOS and Windows, macOS, optical discs.

use super::{ContentProbe, DetectedVolume, VolumeContent};
use crate::guest::bytes::{array, be16, le32, le64, slice, text, utf16, uuid};
use crate::guest::fat;

pub(super) fn fat(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let volume = fat::FatVolume::detect(&probe.head)?;
    let content = match volume.kind {
        fat::FatWidth::Fat12 => VolumeContent::Fat12,
        fat::FatWidth::Fat16 => VolumeContent::Fat16,
        fat::FatWidth::Fat32 => VolumeContent::Fat32,
    };
    Some(DetectedVolume::new(content, volume.label(probe.source), volume.serial()))
}

/// NTFS. Its label is an attribute of the fourth file, `$Volume`.
pub(super) fn ntfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let head = &probe.head;
    if !probe.has(3, b"NTFS    ") {
        return None;
    }
    let id = le64(head, 72);
    let id = (id != 0).then(|| format!("{id:016X}"));
    Some(DetectedVolume::new(VolumeContent::Ntfs, ntfs_label(probe), id))
}

fn ntfs_label(probe: &ContentProbe<'_>) -> Option<String> {
    const LABEL: u32 = 0x60;
    let sector = u64::from(u16::from_le_bytes(array(&probe.head, 11)));
    // Negative counts are powers of two.
    let cluster = match probe.head[13] {
        count @ 0..=0x80 => sector * u64::from(count),
        power => sector << (256 - u32::from(power)).min(20),
    };
    let record_len = match probe.head[64].cast_signed() {
        power @ -20..=-1 => 1u64 << -power,
        count => cluster * u64::from(count.unsigned_abs()),
    };
    if !(256..=1 << 16).contains(&record_len) {
        return None;
    }
    let at = le64(&probe.head, 48).checked_mul(cluster)?.checked_add(3 * record_len)?;
    let record = probe.read(at, record_len as usize)?;
    if !record.starts_with(b"FILE") {
        return None;
    }
    let mut at = usize::from(u16::from_le_bytes(array(&record, 20)));
    while at + 24 <= record.len() {
        let (kind, len) = (le32(&record, at), le32(&record, at + 4) as usize);
        if kind == LABEL && record[at + 8] == 0 {
            let (value_len, value_at) = (le32(&record, at + 16), u16::from_le_bytes(array(&record, at + 20)));
            return utf16(slice(&record, at + usize::from(value_at), value_len.min(256) as usize));
        }
        if len < 16 || kind == u32::MAX {
            return None;
        }
        at += len;
    }
    None
}

/// exFAT. Its label is an entry of the root directory.
pub(super) fn exfat(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let head = &probe.head;
    if !probe.has(3, b"EXFAT   ") {
        return None;
    }
    let id = le32(head, 100);
    let id = format!("{:04X}-{:04X}", id >> 16, id & 0xffff);
    Some(DetectedVolume::new(VolumeContent::Exfat, exfat_label(probe), Some(id)))
}

fn exfat_label(probe: &ContentProbe<'_>) -> Option<String> {
    const LABEL: u8 = 0x83;
    let head = &probe.head;
    let (sector_bits, cluster_bits) = (head[108], head[109]);
    if !(9..=12).contains(&sector_bits) || cluster_bits > 25 - sector_bits {
        return None;
    }
    let root = u64::from(le32(head, 96).checked_sub(2)?) << (sector_bits + cluster_bits);
    let at = (u64::from(le32(head, 88)) << sector_bits).checked_add(root)?;
    // mkfs puts the label first; a search beyond this length is not worth its cost.
    let len = (1usize << (sector_bits + cluster_bits)).min(4096);
    let entries = probe.read(at, len)?;
    let entry = entries.chunks_exact(32).take_while(|entry| entry[0] != 0).find(|entry| entry[0] == LABEL)?;
    utf16(slice(entry, 2, 2 * usize::from(entry[1]).min(11)))
}

pub(super) fn refs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    probe.has(0, b"\0\0\0ReFS\0").then(|| DetectedVolume::new(VolumeContent::Refs, None, None))
}

/// UDF: the volume recognition sequence contains `NSR02` or `NSR03`, even if the disc has other formats as
/// well.
pub(super) fn udf(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    for sector in 16..32 {
        match slice(&probe.head, sector * 2048 + 1, 5) {
            b"NSR02" | b"NSR03" => return Some(DetectedVolume::new(VolumeContent::Udf, None, None)),
            b"BEA01" | b"BOOT2" | b"CD001" | b"CDW02" | b"TEA01" => {}
            _ => break,
        }
    }
    None
}

/// ISO 9660. Its identity is the time of its last change, or else of its creation.
pub(super) fn iso9660(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = slice(&probe.head, 0x8000, 2048);
    if slice(block, 1, 5) != b"CD001" {
        return None;
    }
    let time = |at| {
        let digits: [u8; 16] = array(block, at);
        let is_time = digits.iter().all(u8::is_ascii_digit) && digits.iter().any(|digit| *digit != b'0');
        let part = |from: usize, to: usize| String::from_utf8_lossy(&digits[from..to]).into_owned();
        is_time.then(|| {
            let year = part(0, 4);
            let rest: Vec<String> = (4..16).step_by(2).map(|at| part(at, at + 2)).collect();
            format!("{year}-{}", rest.join("-"))
        })
    };
    let id = time(830).or_else(|| time(813));
    Some(DetectedVolume::new(VolumeContent::Iso9660, text(slice(block, 40, 32)), id))
}

pub(super) fn hfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = slice(&probe.head, 1024, 512);
    let block_size = u32::from_be_bytes(array(block, 20));
    let content = match (slice(block, 0, 2), be16(block, 2)) {
        (b"H+", 4) | (b"HX", 5) => VolumeContent::HfsPlus,
        // An HFS volume that only wraps an HFS+ volume.
        (b"BD", _) if slice(block, 124, 2) == b"H+" => VolumeContent::HfsPlus,
        // Two bytes of magic are weak evidence: the block size is checked as well.
        (b"BD", _) if block_size != 0 && block_size % 512 == 0 => VolumeContent::Hfs,
        _ => return None,
    };
    Some(DetectedVolume::new(content, None, None))
}

pub(super) fn apfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    probe
        .has(32, b"NXSB")
        .then(|| DetectedVolume::new(VolumeContent::Apfs, None, uuid(array(&probe.head, 72))))
}
