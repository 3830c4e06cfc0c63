//! The targets of symbolic links: in the inode, or in blocks with headers of their own.

use crate::error::Result;
use crate::guest::bytes::{be32, corrupt};
use crate::guest::filesystem::FileKind;

use super::Xfs;
use super::checksum::REMOTE;
use super::extents::{ExtentWalk, Mapping};
use super::inode::{Fork, ForkFormat};

/// `XFS_SYMLINK_MAXLEN`.
const MAX_LEN: u64 = 1024;
/// `XSLM`.
const MAGIC: u32 = 0x5853_4c4d;
/// Bytes of the header of a block with a target or a value (`xfs_dsymlink_hdr`, `xfs_attr3_rmt_hdr`).
pub(super) const REMOTE_HEADER_LEN: usize = 56;

impl Xfs {
    pub(super) fn target(&self, number: u64) -> Result<Vec<u8>> {
        let inode = self.inode(number)?;
        if inode.kind != FileKind::Symlink {
            return Err(inode.corrupt("is not a symbolic link"));
        }
        if inode.size == 0 || inode.size > MAX_LEN {
            return Err(inode.corrupt(&format!("is a symbolic link of {} bytes", inode.size)));
        }
        let len = inode.size as usize;
        let mut target = Vec::with_capacity(len);
        if inode.format == ForkFormat::Local {
            let stored = inode.area(Fork::Data).get(..len);
            target.extend(stored.ok_or_else(|| inode.corrupt("has a target longer than itself"))?);
        } else {
            let superblock = &self.superblock;
            let header_len = if superblock.has_checksums { REMOTE_HEADER_LEN } else { 0 };
            let mut walk = ExtentWalk::new(self, &inode, Fork::Data);
            let mut block = 0;
            while target.len() < len {
                // One header describes an extent.
                let left = len - target.len();
                let most = left.div_ceil(superblock.block_len() - header_len) as u64;
                let segment = walk.segment(block, most)?;
                let Mapping::Stored(at) = segment.mapping else {
                    return Err(inode.corrupt("has a target with a hole"));
                };
                let bytes = (segment.count as usize) << superblock.block_bits;
                let buffer = self.blocks.metadata(&[(at, bytes)], |buffer| {
                    if superblock.has_checksums {
                        REMOTE.check(superblock, &buffer.bytes, buffer.is_replayed, at, inode.number)?;
                        if be32(&buffer.bytes, 0) != MAGIC || be32(&buffer.bytes, 4) as usize != target.len()
                        {
                            return Err(corrupt("has a damaged target"));
                        }
                    }
                    Ok(())
                });
                let buffer = buffer.map_err(|error| inode.about(error))?;
                let body = &buffer.bytes[header_len..];
                let mut here = left.min(body.len());
                if superblock.has_checksums {
                    here = here.min(be32(&buffer.bytes, 8) as usize);
                }
                if here == 0 {
                    return Err(inode.corrupt("has a target that ends early"));
                }
                target.extend(&body[..here]);
                block += segment.count;
            }
        }
        if target.contains(&0) {
            return Err(inode.corrupt("has a target with a NUL byte"));
        }
        Ok(target)
    }
}
