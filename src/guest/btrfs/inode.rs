//! An inode's item, and its stat(2) attributes.

use crate::error::Result;
use crate::guest::bytes::{le32, le64};
use crate::guest::filesystem::{FileAttributes, FileKind, Time};

use super::format::corrupt;

/// The fields of `btrfs_inode_item`, by their offsets.
pub(super) mod field {
    pub(in super::super) const GENERATION: usize = 0;
    pub(in super::super) const SIZE: usize = 16;
    pub(in super::super) const BYTES: usize = 24;
    pub(in super::super) const LINKS: usize = 40;
    pub(super) const UID: usize = 44;
    pub(super) const GID: usize = 48;
    pub(super) const MODE: usize = 52;
    pub(super) const DEVICE: usize = 56;
    pub(super) const ACCESSED: usize = 112;
    pub(super) const CHANGED: usize = 124;
    pub(super) const MODIFIED: usize = 136;
    pub(super) const CREATED: usize = 148;
}

pub(super) const LEN: usize = 160;

/// What an inode's item says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Inode {
    pub(super) attributes: FileAttributes,
}

impl Inode {
    /// Decodes the item of an inode.
    pub(super) fn parse(number: u64, item: &[u8], sector_len: u32) -> Result<Self> {
        let wrong = |fact: String| corrupt(format!("inode {number} {fact}"));
        if item.len() < LEN {
            return Err(wrong("has an item that is too short".into()));
        }
        let mode = le32(item, field::MODE);
        let Some(kind) = FileKind::of_mode(mode) else {
            return Err(wrong(format!("is of no known kind (mode {mode:#o})")));
        };
        let size = le64(item, field::SIZE);
        if i64::try_from(size).is_err() {
            return Err(wrong(format!("has an impossible size: {size} bytes")));
        }
        let bytes = le64(item, field::BYTES).checked_next_multiple_of(sector_len.into()).unwrap_or(u64::MAX);
        let device = le64(item, field::DEVICE);
        let attributes = FileAttributes {
            kind,
            mode: mode as u16 & 0o7777,
            uid: le32(item, field::UID),
            gid: le32(item, field::GID),
            size,
            blocks: bytes >> 9,
            links: le32(item, field::LINKS),
            // The kernel's own form: 12 and 20 bits.
            device: match kind {
                FileKind::CharDevice | FileKind::BlockDevice => {
                    (device as u32 >> 20, device as u32 & 0xf_ffff)
                }
                _ => (0, 0),
            },
            accessed: time(item, field::ACCESSED),
            modified: time(item, field::MODIFIED),
            changed: time(item, field::CHANGED),
            created: Some(time(item, field::CREATED)),
        };
        Ok(Self { attributes })
    }
}

fn time(item: &[u8], at: usize) -> Time {
    Time { seconds: le64(item, at).cast_signed(), nanoseconds: le32(item, at + 8).min(999_999_999) }
}

/// The kind of an inode by its item.
pub(super) fn kind_of_item(item: &[u8]) -> Option<FileKind> {
    FileKind::of_mode(le32(item, field::MODE))
}

/// The type byte of a directory entry for an inode of this kind.
pub(super) fn entry_type(kind: FileKind) -> u8 {
    match kind {
        FileKind::File => 1,
        FileKind::Directory => 2,
        FileKind::CharDevice => 3,
        FileKind::BlockDevice => 4,
        FileKind::Fifo => 5,
        FileKind::Socket => 6,
        FileKind::Symlink => 7,
    }
}

/// The kind of an inode by the type byte of a directory entry.
pub(super) fn kind_of_entry(kind: u8) -> Option<FileKind> {
    // The upper bit says that the name is encrypted.
    Some(match kind & 0x7f {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_have_the_kernels_numbers() {
        let mut item = [0; LEN];
        item[field::MODE..field::MODE + 2].copy_from_slice(&0o020_640u16.to_le_bytes());
        item[field::DEVICE..field::DEVICE + 4].copy_from_slice(&0x1234_5678u32.to_le_bytes());
        assert_eq!(Inode::parse(257, &item, 4096).unwrap().attributes.device, (0x123, 0x45678));
        assert!(Inode::parse(257, &item[1..], 4096).is_err());
        assert_eq!(kind_of_item(&[0; LEN]), None);
        for kind in [FileKind::File, FileKind::Directory, FileKind::Symlink, FileKind::Socket] {
            assert_eq!(kind_of_entry(entry_type(kind)), Some(kind));
        }
    }
}
