//! Inline data: small files, directories and link targets that lie in the inode itself.
//!
//! The first 60 bytes are in the place of the block numbers. The rest is the value of an extended attribute
//! that is never listed.

use crate::error::Result;

use super::inode::{BLOCK_AREA, Inode};
use super::xattr;

/// Bytes that lie in the place of the block numbers.
pub(super) const FIRST_LEN: usize = BLOCK_AREA.end - BLOCK_AREA.start;

/// The inline data after these bytes.
pub(super) fn rest(inode: &Inode) -> Result<&[u8]> {
    Ok(xattr::inline_value(inode)?.unwrap_or_default())
}

/// Fills `buf` with the bytes from `at` on; missing bytes are zero, as after truncate(2) extended the file.
pub(super) fn read(inode: &Inode, at: u64, buf: &mut [u8]) -> Result<()> {
    let (first, rest) = (&inode.raw[BLOCK_AREA], rest(inode)?);
    let stored = first.iter().chain(rest).skip(at.min(1 << 16) as usize);
    let mut stored = stored.copied();
    buf.fill_with(|| stored.next().unwrap_or(0));
    Ok(())
}
