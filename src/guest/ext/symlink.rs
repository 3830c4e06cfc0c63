//! The targets of symbolic links: in the inode, or in a block.

use crate::error::Result;
use crate::guest::bytes::le16;

use super::Ext;
use super::FileKind;
use super::inline::FIRST_LEN;
use super::inode::{BLOCK_AREA, flags};
use super::nokey;
use super::superblock::incompat;

/// Linux' limit of a target's length, with its NUL; a block may be shorter.
const MAX_LEN: u64 = 4096;

impl Ext {
    pub(super) fn target(&self, number: u32) -> Result<Vec<u8>> {
        let inode = self.inode(number)?;
        if inode.kind != FileKind::Symlink {
            return Err(inode.corrupt("is not a symbolic link"));
        }
        if inode.size == 0 || inode.size > MAX_LEN {
            return Err(inode.corrupt(&format!("is a symbolic link of {} bytes", inode.size)));
        }
        // A block of extended attributes counts as the link's own.
        let attribute_sectors = if inode.attribute_block == 0 {
            0
        } else {
            1 << (self.superblock.block_bits + self.superblock.cluster_bits - 9)
        };
        let without_blocks = self.superblock.has(incompat::EA_INODE) || inode.sectors == attribute_sectors;
        let within = inode.size < FIRST_LEN as u64 && without_blocks && !inode.is(flags::INLINE_DATA);
        let mut target = vec![0; inode.size as usize];
        if within {
            target.copy_from_slice(&inode.raw[BLOCK_AREA][..inode.size as usize]);
        } else {
            self.read_content(&inode, 0, &mut target)?;
        }
        if inode.is(flags::ENCRYPT) {
            // The length in two bytes, then the encrypted target.
            let len = if target.len() < 2 { 0 } else { usize::from(le16(&target, 0)) };
            let raw = target.get(2..2 + len).filter(|raw| raw.len() >= nokey::LEAST);
            let raw = raw.ok_or_else(|| inode.corrupt("is a damaged encrypted symbolic link"))?;
            return Ok(nokey::encode_name(raw, (0, 0)));
        }
        let end = target.iter().position(|byte| *byte == 0).unwrap_or(target.len());
        target.truncate(end);
        if target.is_empty() {
            return Err(inode.corrupt("is a symbolic link with an empty target"));
        }
        Ok(target)
    }
}
