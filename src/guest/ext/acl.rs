//! POSIX access control lists: from the short form on disk to the one that getxattr(2) gives.

use crate::guest::bytes::{le16, le32};

const DISK_VERSION: u32 = 1;
const SHOWN_VERSION: u32 = 2;
/// In the shown form every entry has an ID; this one says that it means nothing.
const NO_ID: u32 = !0;

const USER: u16 = 0x2;
const GROUP: u16 = 0x8;

/// The list as it is shown; `None` if it breaks the rules of its form.
pub(super) fn as_shown(disk: &[u8]) -> Option<Vec<u8>> {
    if disk.len() < 4 || le32(disk, 0) != DISK_VERSION {
        return None;
    }
    let mut shown = SHOWN_VERSION.to_le_bytes().to_vec();
    let mut rest = &disk[4..];
    while !rest.is_empty() {
        let tag = le16(rest.get(..4)?, 0);
        // The owner, the group, the mask and the others need no ID.
        let len = match tag {
            USER | GROUP => 8,
            0x1 | 0x4 | 0x10 | 0x20 => 4,
            _ => return None,
        };
        let entry = rest.get(..len)?;
        shown.extend(&entry[..4]);
        shown.extend(if len == 8 { le32(entry, 4) } else { NO_ID }.to_le_bytes());
        rest = &rest[len..];
    }
    Some(shown)
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn entries_without_an_id_get_one() {
        let disk = [1, 0, 0, 0, 1, 0, 6, 0, 2, 0, 7, 0, 0xe8, 3, 0, 0, 4, 0, 4, 0];
        let shown = [
            [2, 0, 0, 0].as_slice(),
            &[1, 0, 6, 0, 255, 255, 255, 255],
            &[2, 0, 7, 0, 0xe8, 3, 0, 0],
            &[4, 0, 4, 0, 255, 255, 255, 255],
        ];
        assert_eq!(as_shown(&disk), Some(shown.concat()));
    }

    #[test]
    fn damaged_lists_are_told_from_good_ones() {
        for disk in [&[][..], &[1, 0, 0], &[2, 0, 0, 0], &[1, 0, 0, 0, 2, 0, 7, 0, 1], &[1, 0, 0, 0, 3, 0, 7, 0]] {
            assert_eq!(as_shown(disk), None, "{disk:?}");
        }
    }
}
