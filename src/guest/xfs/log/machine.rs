//! The byte order of the machine that wrote the log. Unlike everything else of XFS, items have that order.

use crate::guest::bytes::{array, le16, le32, le64};

/// A machine, by `h_fmt`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Machine {
    /// Low byte first.
    Little,
    /// High byte first.
    Big,
}

impl Machine {
    /// The machine of a record; `None` if it is unknown.
    pub(super) fn of(format: u32) -> Option<Self> {
        match format {
            1 => Some(Self::Little),
            2 | 3 => Some(Self::Big),
            _ => None,
        }
    }

    /// `N` bytes at `at` with the high byte first, as on the disk.
    pub(super) fn disk_order<const N: usize>(self, bytes: &[u8], at: usize) -> [u8; N] {
        let mut field: [u8; N] = array(bytes, at);
        if self == Self::Little {
            field.reverse();
        }
        field
    }

    pub(super) fn u16(self, bytes: &[u8], at: usize) -> u16 {
        let value = le16(bytes, at);
        if self == Self::Big { value.swap_bytes() } else { value }
    }

    pub(super) fn u32(self, bytes: &[u8], at: usize) -> u32 {
        let value = le32(bytes, at);
        if self == Self::Big { value.swap_bytes() } else { value }
    }

    pub(super) fn u64(self, bytes: &[u8], at: usize) -> u64 {
        let value = le64(bytes, at);
        if self == Self::Big { value.swap_bytes() } else { value }
    }
}
