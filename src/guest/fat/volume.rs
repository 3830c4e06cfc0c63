//! The boot sector, checked like Linux' driver and blkid(8) check it. A [`FatVolume`] that exists is safe to
//! compute with: no offset of a cluster below its count overflows. Whether the source reaches that far is
//! checked when it is read.

use crate::guest::Source;
use crate::guest::bytes::{array, le16, le32, slice};

/// Bytes of a directory entry.
pub(super) const ENTRY_LEN: usize = 32;
/// The number of the first cluster.
pub(super) const FIRST_CLUSTER: u32 = 2;

const VOLUME_LABEL: u8 = 0x08;
const LONG_NAME: u8 = 0x0f;

/// The width of an allocation table's entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum FatWidth {
    Fat12,
    Fat16,
    Fat32,
}

/// The positions of a volume's parts.
#[derive(Clone, Debug)]
pub struct FatVolume {
    /// The width of its allocation tables' entries.
    pub kind: FatWidth,
    /// Bytes of a cluster.
    pub(super) cluster_len: u32,
    /// Where the first table begins, and the bytes of each.
    pub(super) table_at: u64,
    pub(super) table_len: u64,
    pub(super) table_count: u8,
    /// The root directory of FAT12 and FAT16, which is not a chain of clusters.
    pub(super) root_at: u64,
    pub(super) root_len: u64,
    /// The first cluster of FAT32's root directory, which is a chain.
    pub(super) root_cluster: u32,
    /// Where the first cluster begins, and the number of clusters.
    pub(super) data_at: u64,
    pub(super) cluster_count: u32,
    /// Where FAT32 stores its count of free clusters.
    pub(super) information_at: Option<u64>,
    /// It was not unmounted since its last change.
    pub(super) is_dirty: bool,
    /// The serial number and the label that mkfs wrote.
    id: Option<u32>,
    boot_label: [u8; 11],
}

impl FatVolume {
    /// Detects FAT like blkid(8): a signature, and consistent sizes.
    pub fn detect(head: &[u8]) -> Option<Self> {
        let has = |at, magic: &[u8]| slice(head, at, magic.len()) == magic;
        let is_named = has(82, b"MSWIN") || has(82, b"FAT32   ") || has(54, b"MSDOS");
        let is_named = is_named || has(54, b"FAT16   ") || has(54, b"FAT12   ") || has(54, b"FAT     ");
        // OS/2 puts such a sector in front of its other file systems.
        let is_other = has(54, b"JFS     ") || has(54, b"HPFS    ");
        let is_boot = has(0, b"\xeb") || has(0, b"\xe9") || has(510, b"\x55\xaa");
        if !is_named && (is_other || !is_boot) {
            return None;
        }
        Self::parse(head).ok()
    }

    /// Parses a boot sector; the error says what is wrong with it.
    pub(super) fn parse(head: &[u8]) -> Result<Self, String> {
        let sector_len = u32::from(le16(head, 11));
        if !sector_len.is_power_of_two() || !(512..=4096).contains(&sector_len) {
            return Err(format!("a sector of {sector_len} bytes"));
        }
        let sectors = u32::from(slice(head, 13, 1).first().copied().unwrap_or(0));
        if !sectors.is_power_of_two() {
            return Err(format!("clusters of {sectors} sectors"));
        }
        let cluster_len = sectors * sector_len;
        let (reserved, [table_count], [media]) = (le16(head, 14), array(head, 16), array(head, 21));
        if reserved == 0 || table_count == 0 {
            return Err(format!("{reserved} reserved sectors and {table_count} tables"));
        }
        if media < 0xf8 && media != 0xf0 {
            return Err(format!("an unknown medium ({media:#04x})"));
        }
        let is_32 = le16(head, 22) == 0;
        let table_len = if is_32 { le32(head, 36) } else { u32::from(le16(head, 22)) };
        if table_len == 0 {
            return Err("tables of no length".to_owned());
        }
        let total = match le16(head, 19) {
            0 => u64::from(le32(head, 32)),
            total => u64::from(total),
        };
        let sector = u64::from(sector_len);
        let root_entries = u64::from(le16(head, 17));
        let root_len = root_entries * ENTRY_LEN as u64;
        if !root_len.is_multiple_of(sector) {
            return Err(format!("a root directory of {root_entries} entries"));
        }
        let table_at = u64::from(reserved) * sector;
        let table_len = u64::from(table_len) * sector;
        let root_at = table_at + table_len * u64::from(table_count);
        let data_at = root_at + root_len;
        let Some(data_len) = (total * sector).checked_sub(data_at) else {
            return Err(format!("{total} sectors, fewer than its tables need"));
        };
        let cluster_count = data_len / u64::from(cluster_len);
        let (kind, bits, most) = match cluster_count {
            _ if is_32 => (FatWidth::Fat32, 32, 0x0fff_fff6),
            count if count > 0xff4 => (FatWidth::Fat16, 16, 0xfff4),
            _ => (FatWidth::Fat12, 12, 0xff4),
        };
        // A table may be too short for its volume: the clusters beyond it are inaccessible.
        let cluster_count =
            cluster_count.min((table_len * 8 / bits).saturating_sub(u64::from(FIRST_CLUSTER)));
        if cluster_count > most {
            return Err(format!("{cluster_count} clusters"));
        }
        // The offset of the fields that follow the ones whose number depends on the width.
        let late = if is_32 { 64 } else { 36 };
        let [state, signature] = array(head, late + 1);
        let has_names = matches!(signature, 0x28 | 0x29);
        let information = u64::from(le16(head, 48));
        Ok(Self {
            kind,
            cluster_len,
            table_at,
            table_len,
            table_count,
            root_at,
            root_len,
            root_cluster: if is_32 { le32(head, 44) } else { 0 },
            data_at,
            cluster_count: cluster_count as u32,
            information_at: (is_32 && information != 0 && information != 0xffff)
                .then_some(information * sector),
            is_dirty: state & 1 != 0,
            id: has_names.then(|| le32(head, late + 3)),
            boot_label: if signature == 0x29 { array(head, late + 7) } else { [b' '; 11] },
        })
    }

    /// The serial number, in blkid(8)'s form.
    pub fn serial(&self) -> Option<String> {
        self.id.filter(|id| *id != 0).map(|id| format!("{:04X}-{:04X}", id >> 16, id & 0xffff))
    }

    /// The label: an entry of the root directory, or else the boot sector's.
    pub fn label(&self, source: &dyn Source) -> Option<String> {
        let (mut at, mut cluster) = (self.root_at, self.root_cluster);
        // mkfs puts the label first. A later one is found up to a limit that also bounds a chain's loop.
        for _ in 0..64 {
            let len = if self.kind == FatWidth::Fat32 {
                at = self.cluster_at(cluster)?;
                self.cluster_len as usize
            } else {
                self.root_len as usize
            };
            let mut entries = vec![0; len];
            if source.read_at(at, &mut entries).is_err() {
                break;
            }
            for entry in entries.chunks_exact(ENTRY_LEN) {
                let is_label = entry[11] & VOLUME_LABEL != 0 && entry[11] & 0x3f != LONG_NAME;
                if entry[0] == 0 {
                    return readable(&self.boot_label);
                }
                if is_label && entry[0] != 0xe5 && le16(entry, 20) == 0 && le16(entry, 26) == 0 {
                    return readable(&entry[..11]);
                }
            }
            if self.kind != FatWidth::Fat32 {
                break;
            }
            let mut next = [0; 4];
            source.read_at(self.table_at + u64::from(cluster) * 4, &mut next).ok()?;
            cluster = u32::from_le_bytes(next) & 0x0fff_ffff;
            if self.cluster_at(cluster).is_none() {
                break;
            }
        }
        readable(&self.boot_label)
    }

    /// Where a cluster begins; `None` if it does not exist.
    pub(super) fn cluster_at(&self, cluster: u32) -> Option<u64> {
        let index = cluster.checked_sub(FIRST_CLUSTER)?;
        (index < self.cluster_count).then(|| self.data_at + u64::from(index) * u64::from(self.cluster_len))
    }
}

fn readable(label: &[u8]) -> Option<String> {
    if label == b"NO NAME    " {
        return None;
    }
    // 0x05 stands for 0xe5, which would mark the entry as deleted.
    let mut label = label.to_vec();
    if label[0] == 0x05 {
        label[0] = 0xe5;
    }
    crate::guest::bytes::text(&label)
}
