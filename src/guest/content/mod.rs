//! Detects the content of a disk, a partition or a logical volume from its first bytes and, for some formats,
//! its last.
//!
//! Names, labels and identities are those of blkid(8). The detection checks only what distinguishes formats;
//! errors in a volume are found when it is read.

mod containers;
mod foreign;
mod linux;
mod members;

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::guest::{READERS, Reader, Source};
use crate::units::are_zero;

/// All formats that are detected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names say it")]
pub enum VolumeContent {
    /// Zero at every offset at which a format is detected.
    Empty,
    /// No known format.
    Unknown,
    Ext2,
    Ext3,
    Ext4,
    /// An external journal of an ext file system.
    ExtJournal,
    Fat12,
    Fat16,
    Fat32,
    Exfat,
    Ntfs,
    Refs,
    Xfs,
    Btrfs,
    Bcachefs,
    F2fs,
    Jfs,
    Reiserfs,
    Nilfs2,
    Zfs,
    Squashfs,
    Erofs,
    Cramfs,
    Iso9660,
    Udf,
    Hfs,
    HfsPlus,
    Apfs,
    Swap,
    /// Swap space with the memory of a hibernated machine.
    Hibernation,
    LvmPhysicalVolume,
    MdRaid,
    Luks1,
    Luks2,
    BitLocker,
    Bcache,
    Vdo,
    Ceph,
    Stratis,
    Drbd,
    IntelRaid,
    DdfRaid,
    Integrity,
    Verity,
    Gfs2,
    Ocfs2,
}

impl VolumeContent {
    /// The name in blkid(8); `empty` and `unknown` are additions.
    pub fn name(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Unknown => "unknown",
            Self::Ext2 => "ext2",
            Self::Ext3 => "ext3",
            Self::Ext4 => "ext4",
            Self::ExtJournal => "jbd",
            Self::Fat12 | Self::Fat16 | Self::Fat32 => "vfat",
            Self::Exfat => "exfat",
            Self::Ntfs => "ntfs",
            Self::Refs => "ReFS",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Bcachefs => "bcachefs",
            Self::F2fs => "f2fs",
            Self::Jfs => "jfs",
            Self::Reiserfs => "reiserfs",
            Self::Nilfs2 => "nilfs2",
            Self::Zfs => "zfs_member",
            Self::Squashfs => "squashfs",
            Self::Erofs => "erofs",
            Self::Cramfs => "cramfs",
            Self::Iso9660 => "iso9660",
            Self::Udf => "udf",
            Self::Hfs => "hfs",
            Self::HfsPlus => "hfsplus",
            Self::Apfs => "apfs",
            Self::Swap => "swap",
            Self::Hibernation => "swsuspend",
            Self::LvmPhysicalVolume => "LVM2_member",
            Self::MdRaid => "linux_raid_member",
            Self::Luks1 | Self::Luks2 => "crypto_LUKS",
            Self::BitLocker => "BitLocker",
            Self::Bcache => "bcache",
            Self::Vdo => "vdo",
            Self::Ceph => "ceph_bluestore",
            Self::Stratis => "stratis",
            Self::Drbd => "drbd",
            Self::IntelRaid => "isw_raid_member",
            Self::DdfRaid => "ddf_raid_member",
            Self::Integrity => "DM_integrity",
            Self::Verity => "DM_verity_hash",
            Self::Gfs2 => "gfs2",
            Self::Ocfs2 => "ocfs2",
        }
    }

    /// Why its files cannot be shown; `None` if it has a reader.
    pub fn problem(self) -> Option<String> {
        if Reader::of(READERS, self).is_some() {
            return None;
        }
        let sentence = match self {
            Self::Empty => "it is empty".to_owned(),
            Self::Unknown => "its content is unknown".to_owned(),
            Self::ExtJournal => "it is an external journal of an ext file system".to_owned(),
            Self::Swap => "it is swap space, without files".to_owned(),
            Self::Hibernation => "it holds the memory of a hibernated machine, without files".to_owned(),
            Self::LvmPhysicalVolume => {
                "it is a physical volume; its files are in the logical volumes".to_owned()
            }
            Self::Luks1 | Self::Luks2 | Self::BitLocker => format!("it is encrypted ({self})"),
            Self::MdRaid => "it is a member of an md array; its files are in the array".to_owned(),
            Self::Verity => "it holds checksums of another device, without files".to_owned(),
            Self::Bcache
            | Self::Vdo
            | Self::Zfs
            | Self::Ceph
            | Self::Stratis
            | Self::Drbd
            | Self::IntelRaid
            | Self::DdfRaid
            | Self::Integrity => {
                format!("it is a member of a larger device ({self}), which is not assembled")
            }
            Self::Ext2
            | Self::Ext3
            | Self::Ext4
            | Self::Fat12
            | Self::Fat16
            | Self::Fat32
            | Self::Exfat
            | Self::Ntfs
            | Self::Refs
            | Self::Xfs
            | Self::Btrfs
            | Self::Bcachefs
            | Self::F2fs
            | Self::Jfs
            | Self::Reiserfs
            | Self::Nilfs2
            | Self::Squashfs
            | Self::Erofs
            | Self::Cramfs
            | Self::Iso9660
            | Self::Udf
            | Self::Gfs2
            | Self::Ocfs2
            | Self::Hfs
            | Self::HfsPlus
            | Self::Apfs => format!("there is no reader for {self} yet"),
        };
        Some(sentence)
    }
}

impl fmt::Display for VolumeContent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The content of a volume, as far as its first and last bytes show it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DetectedVolume {
    /// The format.
    pub content: VolumeContent,
    /// The label that its owner gave it.
    pub label: Option<String>,
    /// Its identity.
    pub uuid: Option<String>,
}

impl DetectedVolume {
    fn new(content: VolumeContent, label: Option<String>, uuid: Option<String>) -> Self {
        Self { content, label, uuid }
    }
}

/// Detects the content of `source`. Bytes that cannot be read count as zero.
pub fn probe(source: &dyn Source) -> DetectedVolume {
    let probe = ContentProbe::new(source);
    // Multi-device formats come before the formats inside them; a magic of two bytes comes last.
    let formats = [
        containers::md_raid,
        containers::lvm,
        containers::luks,
        containers::bitlocker,
        containers::bcache,
        containers::vdo,
        members::intel_raid,
        members::ddf_raid,
        members::ceph,
        members::stratis,
        members::drbd,
        members::integrity,
        members::verity,
        foreign::fat,
        linux::swap,
        linux::xfs,
        linux::ext,
        linux::reiserfs,
        linux::jfs,
        foreign::udf,
        foreign::iso9660,
        members::zfs,
        foreign::hfs,
        foreign::ntfs,
        foreign::refs,
        linux::cramfs,
        linux::squashfs,
        linux::nilfs2,
        linux::btrfs,
        foreign::exfat,
        linux::f2fs,
        linux::bcachefs,
        members::gfs2,
        members::ocfs2,
        foreign::apfs,
        linux::erofs,
        containers::luks_second,
    ];
    let found = formats.iter().find_map(|format| format(&probe));
    found.unwrap_or_else(|| {
        let content = if probe.is_zero() { VolumeContent::Empty } else { VolumeContent::Unknown };
        DetectedVolume::new(content, None, None)
    })
}

/// The input of all detectors: the start of the source, read once.
struct ContentProbe<'a> {
    source: &'a dyn Source,
    /// The source's first bytes, followed by zeroes if the source is short.
    head: Vec<u8>,
}

impl<'a> ContentProbe<'a> {
    /// The end of the last superblock at a fixed early offset (btrfs').
    const HEAD_LEN: usize = 0x11000;

    fn new(source: &'a dyn Source) -> Self {
        let mut head = vec![0; Self::HEAD_LEN];
        let len = source.size().min(head.len() as u64) as usize;
        if source.read_at(0, &mut head[..len]).is_err() {
            // Parts of it may still be readable.
            for at in (0..len).step_by(512) {
                let end = len.min(at + 512);
                if source.read_at(at as u64, &mut head[at..end]).is_err() {
                    head[at..end].fill(0);
                }
            }
        }
        Self { source, head }
    }

    fn has(&self, at: usize, magic: &[u8]) -> bool {
        self.head.get(at..).is_some_and(|rest| rest.starts_with(magic))
    }

    /// `len` bytes at another offset.
    fn read(&self, at: u64, len: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.source.read_at(at, &mut bytes).ok()?;
        Some(bytes)
    }

    fn is_zero(&self) -> bool {
        let tail_at = self.source.size().saturating_sub(1 << 16);
        let tail = self.read(tail_at, (self.source.size() - tail_at) as usize);
        let further = self.read(members::ZFS_UBERBLOCKS, members::ZFS_UBERBLOCKS_LEN).unwrap_or_default();
        [&self.head, &further, &tail.unwrap_or_default()].iter().all(|bytes| are_zero(bytes))
    }
}
