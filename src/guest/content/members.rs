//! Members of pools, replicated devices and clusters, which are named and not assembled.

use super::{ContentProbe, DetectedVolume, VolumeContent};
use crate::guest::bytes::{array, be32, le32, le64, slice, text, uuid};

/// The uberblocks of the first of a pool's four labels.
pub(super) const ZFS_UBERBLOCKS: u64 = 128 << 10;
pub(super) const ZFS_UBERBLOCKS_LEN: usize = 128 << 10;
/// The pool's configuration in the first label.
const ZFS_CONFIG: u64 = 16 << 10;
const ZFS_CONFIG_LEN: usize = 112 << 10;

/// A member of a ZFS pool, with the pool's name and number. As in blkid(8), four uberblocks of either byte
/// order are required.
pub(super) fn zfs(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let ring = probe.read(ZFS_UBERBLOCKS, ZFS_UBERBLOCKS_LEN)?;
    let is_uberblock = |block: &&[u8]| {
        let magic = le64(block, 0);
        magic == 0x00ba_b10c || magic.swap_bytes() == 0x00ba_b10c
    };
    if ring.chunks_exact(1024).filter(is_uberblock).count() < 4 {
        return None;
    }
    let config = probe.read(ZFS_CONFIG, ZFS_CONFIG_LEN).unwrap_or_default();
    let (name, id) = pool(&config);
    Some(DetectedVolume::new(VolumeContent::Zfs, name, id.map(|id| id.to_string())))
}

/// The name and the number of a pool, from the pairs of names and values that describe it in the XDR encoding
/// (RFC 4506). Nested lists are passed over.
fn pool(config: &[u8]) -> (Option<String>, Option<u64>) {
    const HEADER_LEN: usize = 12;
    const UINT64: u32 = 8;
    const STRING: u32 = 9;
    let (mut name, mut id) = (None, None);
    if config.first() != Some(&1) {
        return (name, id);
    }
    let mut at = HEADER_LEN;
    while at < config.len() {
        let len = be32(config, at) as usize;
        let key_len = be32(config, at + 8) as usize;
        let value_at = at.saturating_add(12).saturating_add(key_len.next_multiple_of(4));
        if len < 20 || value_at.saturating_add(8) > at.saturating_add(len) || at + len > config.len() {
            break;
        }
        let key = slice(config, at + 12, key_len);
        // A type, a number of elements, and the elements.
        let (kind, value) = (be32(config, value_at), &config[value_at + 8..at + len]);
        match (key, kind) {
            (b"name", STRING) => name = text(slice(value, 4, be32(value, 0).min(256) as usize)),
            (b"pool_guid", UINT64) => id = Some(u64::from_be_bytes(array(value, 0))),
            _ => {}
        }
        at += len;
    }
    (name, id)
}

/// A device of Ceph's `BlueStore`: a text with the identity of the OSD.
pub(super) fn ceph(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    const MAGIC: &[u8] = b"bluestore block device\n";
    let id = || text(slice(&probe.head, MAGIC.len(), 36)).filter(|id| id.len() == 36 && id.is_ascii());
    probe.has(0, &MAGIC[..22]).then(|| DetectedVolume::new(VolumeContent::Ceph, None, id()))
}

/// A device of a Stratis pool. Its two superblocks are in the first sectors.
pub(super) fn stratis(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    const MAGIC: &[u8] = b"!Stra0tis\x86\xff\x02^\x41rh";
    let at = [512, 9 * 512].into_iter().find(|at| probe.has(at + 4, MAGIC))?;
    Some(DetectedVolume::new(VolumeContent::Stratis, None, text(slice(&probe.head, at + 64, 32))))
}

/// A device that DRBD replicates, with its metadata behind the data.
pub(super) fn drbd(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = probe.read(probe.source.size().checked_sub(4096)?, 64)?;
    // The versions 8.0, 8.4 (in use) and 9.
    let is_known = (0x8374_026b..=0x8374_026d).contains(&be32(&block, 60));
    is_known.then(|| DetectedVolume::new(VolumeContent::Drbd, None, None))
}

/// A disk of an array of Intel's firmware.
pub(super) fn intel_raid(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = probe.read(probe.source.size().checked_sub(1024)?, 24)?;
    (block == b"Intel Raid ISM Cfg Sig. ").then(|| DetectedVolume::new(VolumeContent::IntelRaid, None, None))
}

/// A disk of an array in SNIA's common format.
pub(super) fn ddf_raid(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = probe.read(probe.source.size().checked_sub(512)?, 4)?;
    [be32(&block, 0), le32(&block, 0)]
        .contains(&0xde11_de11)
        .then(|| DetectedVolume::new(VolumeContent::DdfRaid, None, None))
}

/// A device with dm-integrity's checksums, which lie between its data.
pub(super) fn integrity(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    probe.has(0, b"integrt\0").then(|| DetectedVolume::new(VolumeContent::Integrity, None, None))
}

/// dm-verity's hashes of another device.
pub(super) fn verity(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    probe
        .has(0, b"verity\0\0")
        .then(|| DetectedVolume::new(VolumeContent::Verity, None, uuid(array(&probe.head, 16))))
}

/// GFS2, which several machines mount together. Its label names the cluster.
pub(super) fn gfs2(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let block = slice(&probe.head, 0x10000, 512);
    let is_superblock = be32(block, 0) == 0x0116_1970 && be32(block, 4) == 1 && be32(block, 24) >= 1800;
    is_superblock.then(|| {
        DetectedVolume::new(VolumeContent::Gfs2, text(slice(block, 160, 64)), uuid(array(block, 256)))
    })
}

/// OCFS2, which several machines mount together. Its superblock is the third block.
pub(super) fn ocfs2(probe: &ContentProbe<'_>) -> Option<DetectedVolume> {
    let at = [1024, 2048, 4096, 8192].into_iter().find(|at| probe.has(*at, b"OCFSV2"))?;
    let block = slice(&probe.head, at, 512);
    Some(DetectedVolume::new(VolumeContent::Ocfs2, text(slice(block, 272, 64)), uuid(array(block, 336))))
}
