//! An inode: its raw bytes, verified, and its stat(2) attributes.

use crate::error::Result;
use crate::guest::bytes::{corrupt, le16, le32};
use crate::guest::filesystem::{FileAttributes, FileKind, Time};

use super::bytes::join;
use super::checksum::crc32c;
use super::superblock::Superblock;

/// Flags that change how an inode is read.
pub(super) mod flags {
    pub(in super::super) const ENCRYPT: u32 = 0x800;
    pub(in super::super) const INDEX: u32 = 0x1000;
    pub(in super::super) const HUGE_FILE: u32 = 0x4_0000;
    pub(in super::super) const EXTENTS: u32 = 0x8_0000;
    pub(in super::super) const EA_INODE: u32 = 0x20_0000;
    pub(in super::super) const INLINE_DATA: u32 = 0x1000_0000;
    pub(in super::super) const CASEFOLD: u32 = 0x4000_0000;
}

/// The area with block numbers, a short link target or the beginning of inline data.
pub(super) const BLOCK_AREA: std::ops::Range<usize> = 0x28..0x64;
/// The part that every inode has.
pub(super) const OLD_LEN: usize = 128;
/// The length of the extra part that the kernel assumes where the inode states none: all fields it knows.
const EXTRA_LEN: usize = 32;

#[derive(Debug)]
pub(super) struct Inode {
    pub(super) number: u32,
    /// Its length is the superblock's inode size.
    pub(super) raw: Box<[u8]>,
    pub(super) kind: FileKind,
    pub(super) flags: u32,
    /// At most `i64::MAX`.
    pub(super) size: u64,
    /// Sectors of 512 bytes.
    pub(super) sectors: u64,
    /// The block of extended attributes; 0: none.
    pub(super) attribute_block: u64,
    /// Where the extra fields end and extended attributes, if any, begin.
    pub(super) extra_end: usize,
    /// Whether the inode itself states the length of the extra part: only then it can hold extended
    /// attributes.
    pub(super) states_extra: bool,
    /// The initial checksum state for its directory and extent blocks, if these have checksums.
    pub(super) seed: Option<u32>,
}

impl Inode {
    /// Decodes and verifies. An inode not in use is `Corrupt`: only a stale name leads to it.
    pub(super) fn parse(
        superblock: &Superblock,
        number: u32,
        raw: Box<[u8]>,
        verify_sum: bool,
    ) -> Result<Self> {
        assert_eq!(raw.len(), superblock.inode_len);
        let wrong = |fact: String| corrupt(format!("inode {number} {fact}"));
        let seed = superblock.seed().map(|seed| own_seed(seed, number, &raw));
        if let Some(seed) = seed.filter(|_| verify_sum)
            && !sum_is_right(seed, &raw)
        {
            return Err(wrong("has a wrong checksum".into()));
        }
        let mode = le16(&raw, 0);
        if le16(&raw, 0x1a) == 0 || mode == 0 {
            return Err(wrong("is referenced, but deleted".into()));
        }
        let Some(kind) = FileKind::of_mode(mode.into()) else {
            return Err(wrong(format!("is of no known kind (mode {mode:#o})")));
        };
        let flags = le32(&raw, 0x20);
        // In other inodes these bytes once had other meanings.
        let long = kind == FileKind::File
            || kind == FileKind::Directory && superblock.has(super::superblock::incompat::LARGE_DIR);
        let size = join(le32(&raw, 0x4), if long { le32(&raw, 0x6c) } else { 0 });
        if i64::try_from(size).is_err() {
            return Err(wrong(format!("has an impossible size: {size} bytes")));
        }
        let sectors = if superblock.huge_files() {
            let count = join(le32(&raw, 0x1c), le16(&raw, 0x74));
            if flags & flags::HUGE_FILE == 0 { count } else { count << (superblock.block_bits - 9) }
        } else {
            le32(&raw, 0x1c).into()
        };
        let stated = if raw.len() > OLD_LEN { usize::from(le16(&raw, 0x80)) } else { 0 };
        if stated % 4 != 0 || OLD_LEN + stated > raw.len() {
            return Err(wrong(format!("has an impossible extra size: {stated} bytes")));
        }
        let extra = if stated == 0 && raw.len() > OLD_LEN { EXTRA_LEN } else { stated };
        Ok(Self {
            number,
            kind,
            flags,
            size,
            sectors,
            attribute_block: join(le32(&raw, 0x68), le16(&raw, 0x76)),
            extra_end: OLD_LEN + extra,
            states_extra: stated != 0,
            seed,
            raw,
        })
    }

    pub(super) fn is(&self, flag: u32) -> bool {
        self.flags & flag != 0
    }

    pub(super) fn attributes(&self) -> FileAttributes {
        let raw = &self.raw;
        let mut blocks = self.sectors;
        if self.is(flags::INLINE_DATA) && self.kind == FileKind::File {
            // A file with zero blocks would look like a hole to some programs.
            blocks = blocks.saturating_add(self.size.div_ceil(512));
        }
        FileAttributes {
            kind: self.kind,
            mode: le16(raw, 0) & 0o7777,
            uid: u32::from(le16(raw, 0x2)) | u32::from(le16(raw, 0x78)) << 16,
            gid: u32::from(le16(raw, 0x18)) | u32::from(le16(raw, 0x7a)) << 16,
            size: self.size,
            blocks,
            links: le16(raw, 0x1a).into(),
            device: match self.kind {
                FileKind::CharDevice | FileKind::BlockDevice => device(&raw[BLOCK_AREA]),
                _ => (0, 0),
            },
            accessed: self.time(0x8, 0x8c),
            modified: self.time(0x10, 0x88),
            changed: self.time(0xc, 0x84),
            created: (self.extra_end >= 0x94).then(|| self.time(0x90, 0x94)),
        }
    }

    /// Seconds at `at`; two more bits of seconds and the nanoseconds at `extra`, if the inode is long enough.
    fn time(&self, at: usize, extra: usize) -> Time {
        let seconds = i64::from(le32(&self.raw, at).cast_signed());
        if self.extra_end < extra + 4 {
            return Time { seconds, nanoseconds: 0 };
        }
        let extra = le32(&self.raw, extra);
        Time { seconds: seconds + (i64::from(extra & 3) << 32), nanoseconds: (extra >> 2).min(999_999_999) }
    }
}

/// The initial checksum state of an inode and the blocks it owns.
fn own_seed(seed: u32, number: u32, raw: &[u8]) -> u32 {
    crc32c(crc32c(seed, &number.to_le_bytes()), &raw[0x64..0x68])
}

fn sum_is_right(seed: u32, raw: &[u8]) -> bool {
    let state = crc32c(crc32c(crc32c(seed, &raw[..0x7c]), &[0; 2]), &raw[0x7e..OLD_LEN]);
    let low = u32::from(le16(raw, 0x7c));
    if raw.len() == OLD_LEN {
        return state & 0xffff == low;
    }
    if le16(raw, 0x80) < 4 {
        return crc32c(state, &raw[0x80..]) & 0xffff == low;
    }
    let state = crc32c(crc32c(crc32c(state, &raw[0x80..0x82]), &[0; 2]), &raw[0x84..]);
    state == low | u32::from(le16(raw, 0x82)) << 16
}

/// The kind of an inode by the type byte of a directory entry.
pub(super) fn kind_of_entry(kind: u8) -> Option<FileKind> {
    Some(match kind & 0xf {
        1 => FileKind::File,
        2 => FileKind::Directory,
        3 => FileKind::CharDevice,
        4 => FileKind::BlockDevice,
        5 => FileKind::Fifo,
        6 => FileKind::Socket,
        7 => FileKind::Symlink,
        _ => return None,
    })
}

/// A device's numbers: 8 and 8 bits in the first word, or 12 and 20 bits in the second.
fn device(area: &[u8]) -> (u32, u32) {
    let old = le32(area, 0);
    if old != 0 {
        return (old >> 8 & 0xff, old & 0xff);
    }
    let new = le32(area, 4);
    (new >> 8 & 0xfff, new & 0xff | new >> 12 & 0xf_ff00)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_of_device_numbers() {
        let mut area = [0; 60];
        area[0..4].copy_from_slice(&0x0803u32.to_le_bytes());
        assert_eq!(device(&area), (8, 3));
        area[0..4].fill(0);
        // Major 0x123, minor 0x45678.
        area[4..8].copy_from_slice(&0x4561_2378u32.to_le_bytes());
        assert_eq!(device(&area), (0x123, 0x45678));
    }

    #[test]
    fn kinds_of_modes() {
        assert_eq!(FileKind::of_mode(0o100_644), Some(FileKind::File));
        assert_eq!(FileKind::of_mode(0o040_755), Some(FileKind::Directory));
        assert_eq!(FileKind::of_mode(0o120_777), Some(FileKind::Symlink));
        assert_eq!(FileKind::of_mode(0o150_000), None);
    }
}
