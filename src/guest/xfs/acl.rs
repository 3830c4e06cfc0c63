//! POSIX access control lists: converts the form on disk to the form of getxattr(2).

use crate::guest::bytes::{be16, be32};

const XATTR_VERSION: u32 = 2;
/// In the form of getxattr(2) every entry has an ID; this value means "no ID".
const NO_ID: u32 = !0;
/// Bytes of an entry on disk (`xfs_acl_entry`).
const ENTRY_LEN: usize = 12;

const USER: u32 = 0x2;
const GROUP: u32 = 0x8;

/// The list in the form of getxattr(2); `None` if it violates its format.
pub(super) fn to_xattr(disk: &[u8]) -> Option<Vec<u8>> {
    let count = be32(disk, 0) as usize;
    let entries = disk.get(4..)?.get(..count.checked_mul(ENTRY_LEN)?)?;
    let mut list = XATTR_VERSION.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(ENTRY_LEN) {
        let tag = be32(entry, 0);
        let id = match tag {
            USER | GROUP => be32(entry, 4),
            0x1 | 0x4 | 0x10 | 0x20 => NO_ID,
            _ => return None,
        };
        list.extend((tag as u16).to_le_bytes());
        list.extend(be16(entry, 8).to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    Some(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_converted_and_damaged_lists_refused() {
        let entry = |tag: u8, id: u8, rights: u8| [0, 0, 0, tag, 0, 0, 0, id, 0, rights, 0, 0];
        let disk = [&[0, 0, 0, 3][..], &entry(1, 9, 6), &entry(2, 5, 7), &entry(0x20, 0, 4)].concat();
        let expected = [
            &[2, 0, 0, 0][..],
            &[1, 0, 6, 0, 255, 255, 255, 255],
            &[2, 0, 7, 0, 5, 0, 0, 0],
            &[0x20, 0, 4, 0, 255, 255, 255, 255],
        ];
        assert_eq!(to_xattr(&disk), Some(expected.concat()));
        assert_eq!(to_xattr(&disk[..disk.len() - 1]), None);
        assert_eq!(to_xattr(&[0xff; 40]), None);
        assert_eq!(to_xattr(&[&[0, 0, 0, 1][..], &entry(3, 0, 0)].concat()), None);
    }
}
