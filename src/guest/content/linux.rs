//! File systems and swap space of Linux.

use super::{ContentProbe, DetectedVolume, VolumeContent};
use crate::guest::bytes::{array, crc32, le16, le32, slice, text, utf16, uuid};

pub(super) fn ext(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = slice(&probe.head, 1024, 1024);
    if le16(block, 56) != 0xef53 {
        return None;
    }
    let (compatible, incompatible, read_only) = (le32(block, 92), le32(block, 96), le32(block, 100));
    // The features of the ext3 driver: sparse superblocks, large files, directory B-trees; file types,
    // recovery, meta groups.
    let is_new = read_only & !0x7 != 0 || incompatible & !0x16 != 0;
    let content = if incompatible & 0x8 != 0 {
        VolumeContent::ExtJournal
    } else if is_new {
        VolumeContent::Ext4
    } else if compatible & 0x4 != 0 {
        VolumeContent::Ext3
    } else {
        VolumeContent::Ext2
    };
    Some(DetectedVolume::new(content, text(slice(block, 120, 16)), uuid(array(block, 104))))
}

pub(super) fn xfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let head = &probe.head;
    probe
        .has(0, b"XFSB")
        .then(|| DetectedVolume::new(VolumeContent::Xfs, text(slice(head, 108, 12)), uuid(array(head, 32))))
}

pub(super) fn btrfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = slice(&probe.head, 0x10000, 0x1000);
    slice(block, 64, 8).eq(b"_BHRfS_M").then(|| {
        DetectedVolume::new(VolumeContent::Btrfs, text(slice(block, 299, 256)), uuid(array(block, 32)))
    })
}

pub(super) fn bcachefs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let magic = b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef";
    let head = &probe.head;
    probe.has(4096 + 24, magic).then(|| {
        DetectedVolume::new(
            VolumeContent::Bcachefs,
            text(slice(head, 4096 + 72, 32)),
            uuid(array(head, 4096 + 56)),
        )
    })
}

pub(super) fn f2fs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = slice(&probe.head, 1024, 3072);
    (le32(block, 0) == 0xf2f5_2010).then(|| {
        DetectedVolume::new(VolumeContent::F2fs, utf16(slice(block, 124, 1024)), uuid(array(block, 108)))
    })
}

pub(super) fn jfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = slice(&probe.head, 0x8000, 512);
    block.starts_with(b"JFS1").then(|| {
        DetectedVolume::new(VolumeContent::Jfs, text(slice(block, 152, 16)), uuid(array(block, 136)))
    })
}

pub(super) fn reiserfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let is_magic = |at: usize| {
        let magic = slice(&probe.head, at + 52, 10);
        [&b"ReIsErFs"[..], b"ReIsEr2Fs", b"ReIsEr3Fs"].iter().any(|known| magic.starts_with(known))
    };
    if is_magic(0x10000) {
        let block = slice(&probe.head, 0x10000, 512);
        return Some(DetectedVolume::new(
            VolumeContent::Reiserfs,
            text(slice(block, 100, 16)),
            uuid(array(block, 84)),
        ));
    }
    is_magic(0x2000).then(|| DetectedVolume::new(VolumeContent::Reiserfs, None, None))
}

pub(super) fn nilfs2(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = slice(&probe.head, 1024, 1024);
    let len = usize::from(le16(block, 8));
    if le16(block, 6) != 0x3434 || !(20..=block.len()).contains(&len) {
        return None;
    }
    // The magic has only two bytes. The checksum decides; it is computed with its own field as zero.
    let seed = crc32(le32(block, 12), &block[..16]);
    let sum = crc32(crc32(seed, &[0; 4]), &block[20..len]);
    (sum == le32(block, 16)).then(|| {
        DetectedVolume::new(VolumeContent::Nilfs2, text(slice(block, 168, 80)), uuid(array(block, 152)))
    })
}

pub(super) fn squashfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let is_known = probe.has(0, b"hsqs") || probe.has(0, b"sqsh");
    is_known.then(|| DetectedVolume::new(VolumeContent::Squashfs, None, None))
}

pub(super) fn erofs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = slice(&probe.head, 1024, 128);
    (le32(block, 0) == 0xe0f5_e1e2).then(|| {
        DetectedVolume::new(VolumeContent::Erofs, text(slice(block, 64, 16)), uuid(array(block, 48)))
    })
}

pub(super) fn cramfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let is_magic = |at: usize| {
        let magic = le32(&probe.head, at);
        magic == 0x28cd_3d45 || magic.swap_bytes() == 0x28cd_3d45
    };
    // A boot loader may precede the superblock.
    let at = [0, 512].into_iter().find(|at| is_magic(*at))?;
    Some(DetectedVolume::new(VolumeContent::Cramfs, text(slice(&probe.head, at + 48, 16)), None))
}

/// Swap space. Its magic ends its first page, whose size is the page size of the machine that made it.
pub(super) fn swap(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    const HIBERNATIONS: [&[u8]; 5] =
        [b"S1SUSPEND", b"S2SUSPEND", b"ULSUSPEND", b"LINHIB0001", b"\xed\xc3\x02\xe9\x98\x56\xe5\x0c"];
    for page_len in [0x1000, 0x2000, 0x4000, 0x8000, 0x10000] {
        let magic = slice(&probe.head, page_len - 10, 10);
        let is_hibernated = HIBERNATIONS.iter().any(|known| magic.starts_with(known));
        let content = match magic {
            b"SWAPSPACE2" | b"SWAP-SPACE" => VolumeContent::Swap,
            _ if is_hibernated => VolumeContent::Hibernation,
            _ => continue,
        };
        // Only version 2 has a header, and only a header holds a label.
        let header = slice(&probe.head, 1024, 64);
        let has_header =
            magic != b"SWAP-SPACE" && (le32(header, 0) == 1 || le32(header, 0).swap_bytes() == 1);
        let label = if has_header { text(slice(header, 28, 16)) } else { None };
        let id = if has_header { uuid(array(header, 12)) } else { None };
        return Some(DetectedVolume::new(content, label, id));
    }
    None
}
