//! Inline data: small files, directories and targets that lie in the inode itself.
//!
//! The first 60 bytes are where block numbers would be, the rest is the value of an extended attribute that nobody
//! lists.

use crate::error::Result;

use super::inode::{BLOCK_AREA, Inode};
use super::xattr;

/// Bytes that lie in place of the block numbers.
pub(super) const FIRST_LEN: usize = BLOCK_AREA.end - BLOCK_AREA.start;

/// What lies beyond those.
pub(super) fn rest(inode: &Inode) -> Result<&[u8]> {
    Ok(xattr::inline_value(inode)?.unwrap_or_default())
}

/// Fills `buf` with the bytes from `at` on; what is not there is zero, as after a truncation upwards.
pub(super) fn read(inode: &Inode, at: u64, buf: &mut [u8]) -> Result<()> {
    let (first, rest) = (&inode.raw[BLOCK_AREA], rest(inode)?);
    let stored = first.iter().chain(rest).skip(at.min(1 << 16) as usize);
    let mut stored = stored.copied();
    buf.fill_with(|| stored.next().unwrap_or(0));
    Ok(())
}
