//! Formats that contain other disks instead of files: members of arrays and volume groups, caches,
//! encryption.

use super::{ContentProbe, DetectedVolume, VolumeContent};
use crate::guest::bytes::{array, be16, be32, be64, le32, slice, text, uuid};
use crate::guest::luks::SECOND_MAGIC;
use crate::guest::lvm;

const MD_MAGIC: u32 = 0xa92b_4efc;

pub(super) fn md_raid(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let size = probe.source.size();
    // Versions 1.1 and 1.2 lie at the beginning, 1.0 and 0.90 at the end.
    for at in [0, 4096] {
        if let Some(found) = md_version_1(slice(&probe.head, at, 256), at as u64) {
            return Some(found);
        }
    }
    let late = (size / 512).checked_sub(16).map(|sectors| (sectors & !7) * 512);
    if let Some(found) = late.and_then(|at| md_version_1(&probe.read(at, 256)?, at)) {
        return Some(found);
    }
    let old = (size & !0xffff).checked_sub(0x10000)?;
    md_version_0(&probe.read(old, 64)?)
}

fn md_version_1(block: &[u8], at: u64) -> Option<DetectedVolume> {
    // The offset stated in the superblock decides: the start of one array may be the end of another.
    let says = u64::from_le_bytes(array(block, 144)).checked_mul(512)?;
    if le32(block, 0) != MD_MAGIC || le32(block, 4) != 1 || says != at {
        return None;
    }
    Some(DetectedVolume::new(VolumeContent::MdRaid, text(slice(block, 32, 32)), uuid(array(block, 16))))
}

fn md_version_0(block: &[u8]) -> Option<DetectedVolume> {
    let is_little = le32(block, 0) == MD_MAGIC;
    if !is_little && be32(block, 0) != MD_MAGIC {
        return None;
    }
    let mut id = [0; 16];
    for (to, from) in id.chunks_exact_mut(4).zip([20, 52, 56, 60]) {
        to.copy_from_slice(&array::<4>(block, from));
        if is_little {
            to.reverse();
        }
    }
    Some(DetectedVolume::new(VolumeContent::MdRaid, None, uuid(id)))
}

pub(super) fn lvm(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let label = lvm::find_label(&probe.head)?;
    Some(DetectedVolume::new(VolumeContent::LvmPhysicalVolume, None, Some(label.id.to_string())))
}

pub(super) fn luks(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    if !probe.has(0, b"LUKS\xba\xbe") {
        return None;
    }
    let id = text(slice(&probe.head, 168, 40));
    match be16(&probe.head, 6) {
        1 => Some(DetectedVolume::new(VolumeContent::Luks1, None, id)),
        2 => Some(DetectedVolume::new(VolumeContent::Luks2, text(slice(&probe.head, 24, 48)), id)),
        _ => None,
    }
}

/// A LUKS2 container whose first header lost its magic; its second one is where cryptsetup usually puts it. A
/// volume that was formatted anew may still have it, so anything else has precedence.
pub(super) fn luks_second(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    for at in [0x4000, 0x8000, 0x10000] {
        let block = slice(&probe.head, at, 0x1000);
        if block.starts_with(SECOND_MAGIC) && be16(block, 6) == 2 && be64(block, 256) == at as u64 {
            let (label, id) = (text(slice(block, 24, 48)), text(slice(block, 168, 40)));
            return Some(DetectedVolume::new(VolumeContent::Luks2, label, id));
        }
    }
    None
}

pub(super) fn bitlocker(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    probe.has(3, b"-FVE-FS-").then(|| DetectedVolume::new(VolumeContent::BitLocker, None, None))
}

pub(super) fn bcache(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let magic = b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81";
    let head = &probe.head;
    probe.has(4096 + 24, magic).then(|| {
        DetectedVolume::new(
            VolumeContent::Bcache,
            text(slice(head, 4096 + 72, 32)),
            uuid(array(head, 4096 + 40)),
        )
    })
}

pub(super) fn vdo(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    probe
        .has(0, b"dmvdo001")
        .then(|| DetectedVolume::new(VolumeContent::Vdo, None, uuid(array(&probe.head, 40))))
}
