//! POSIX access control lists: converts the short form on disk to the form of getxattr(2).

use crate::guest::bytes::{le16, le32};

const DISK_VERSION: u32 = 1;
const XATTR_VERSION: u32 = 2;
/// In the form of getxattr(2) every entry has an ID; this value means "no ID".
const NO_ID: u32 = !0;

const USER: u16 = 0x2;
const GROUP: u16 = 0x8;

/// The list in the form of getxattr(2); `None` if it violates its format.
pub(super) fn to_xattr(disk: &[u8]) -> Option<Vec<u8>> {
    if disk.len() < 4 || le32(disk, 0) != DISK_VERSION {
        return None;
    }
    let mut list = XATTR_VERSION.to_le_bytes().to_vec();
    let mut rest = &disk[4..];
    while !rest.is_empty() {
        let tag = le16(rest.get(..4)?, 0);
        // The entries of the owner, the group, the mask and others have no ID.
        let len = match tag {
            USER | GROUP => 8,
            0x1 | 0x4 | 0x10 | 0x20 => 4,
            _ => return None,
        };
        let entry = rest.get(..len)?;
        list.extend(&entry[..4]);
        list.extend(if len == 8 { le32(entry, 4) } else { NO_ID }.to_le_bytes());
        rest = &rest[len..];
    }
    Some(list)
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn entries_without_an_id_get_the_empty_id() {
        let disk = [1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 7, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0];
        let expected = [
            [2, 0, 0, 0].as_slice(),
            &[1, 0, 6, 0, 255, 255, 255, 255],
            &[2, 0, 7, 0, 0xe8, 3, 0, 0],
            &[4, 0, 4, 0, 255, 255, 255, 255],
        ];
        assert_eq!(to_xattr(&disk), Some(expected.concat()));
    }

    #[test]
    fn damaged_lists_are_refused() {
        for disk in
            [&[][..], &[1, 0, 0], &[2, 0, 0, 0], &[1, 0, 0, 0, 2, 0, 7, 0, 1], &[1, 0, 0, 0, 3, 0, 7, 0]]
        {
            assert_eq!(to_xattr(disk), None, "{disk:?}");
        }
    }
}
