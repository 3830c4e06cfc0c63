//! Checksums and identities of metadata of version 5.
//!
//! A checksum is a CRC-32C of the whole structure with its own field as zero, stored with the low byte first;
//! everything else of XFS is stored with the high byte first.

use crate::error::Result;
use crate::guest::bytes::{array, be64, corrupt, le32, slice};

use super::superblock::Superblock;

/// The checksum of `bytes` with the four bytes at `at` as zeroes.
pub(super) fn checksum(bytes: &[u8], at: usize) -> u32 {
    let first = crc32c::crc32c(slice(bytes, 0, at));
    let zeroes = crc32c::crc32c_append(first, &[0; 4]);
    crc32c::crc32c_append(zeroes, bytes.get(at + 4..).unwrap_or_default())
}

/// Whether the checksum at `at` is the one of `bytes`.
pub(super) fn is_valid(bytes: &[u8], at: usize) -> bool {
    checksum(bytes, at) == le32(bytes, at)
}

/// Where a header of version 5 keeps its fields.
pub(super) struct HeaderLayout {
    /// `crc`.
    pub(super) checksum: usize,
    /// `blkno`: the structure's own place, in sectors of 512 bytes.
    pub(super) place: usize,
    /// `uuid`.
    pub(super) uuid: usize,
    /// `owner`: the number of the inode.
    pub(super) owner: usize,
}

/// `xfs_btree_block`, long form.
pub(super) const BTREE: HeaderLayout = HeaderLayout { checksum: 64, place: 24, uuid: 40, owner: 56 };
/// `xfs_dir3_blk_hdr`.
pub(super) const DIRECTORY: HeaderLayout = HeaderLayout { checksum: 4, place: 8, uuid: 24, owner: 40 };
/// `xfs_da3_blkinfo`.
pub(super) const INDEX: HeaderLayout = HeaderLayout { checksum: 12, place: 16, uuid: 32, owner: 48 };
/// `xfs_attr3_rmt_hdr` and `xfs_dsymlink_hdr`.
pub(super) const REMOTE: HeaderLayout = HeaderLayout { checksum: 12, place: 40, uuid: 16, owner: 32 };

impl HeaderLayout {
    /// Checks a structure at the byte offset `at`. A checksum of what the log has changed is not known.
    pub(super) fn check(
        &self,
        superblock: &Superblock,
        bytes: &[u8],
        is_replayed: bool,
        at: u64,
        owner: u64,
    ) -> Result<()> {
        let fact = if !is_replayed && !is_valid(bytes, self.checksum) {
            "has a wrong checksum"
        } else if be64(bytes, self.place) != at >> 9 || array::<16>(bytes, self.uuid) != superblock.meta_uuid
        {
            "belongs elsewhere"
        } else if be64(bytes, self.owner) != owner {
            "belongs to another inode"
        } else {
            return Ok(());
        };
        Err(corrupt(format!("the metadata block at {at:#x} {fact}")))
    }
}
