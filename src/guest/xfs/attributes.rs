//! Extended attributes: in the inode, in one leaf, or in leaves below an index.
//!
//! Fields follow "XFS Algorithms & Data Structures", chapter "Extended Attributes". The parent pointers of
//! newer file systems are stored like attributes, and are none.

use std::sync::Arc;

use crate::error::Result;
use crate::guest::bytes::{be16, be32, slice};
use crate::guest::filesystem::ExtendedAttribute;

use super::Xfs;
use super::acl;
use super::blocks::Buffer;
use super::checksum::{INDEX, REMOTE};
use super::extents::ExtentWalk;
use super::inode::{Fork, ForkFormat, Inode};
use super::symlink::REMOTE_HEADER_LEN;

/// Flags of an attribute.
const LOCAL: u8 = 1;
const ROOT: u8 = 1 << 1;
const SECURE: u8 = 1 << 2;
const PARENT: u8 = 1 << 3;
const INCOMPLETE: u8 = 1 << 7;

/// `XATTR_SIZE_MAX`.
const VALUE_LIMIT: usize = 1 << 16;
/// Bytes of all attributes of an inode that are kept; listxattr(2) itself ends at 64 KiB of names.
const TOTAL_LIMIT: usize = 4 << 20;
/// Leaves that are read for one inode.
const LEAF_LIMIT: usize = 1 << 14;
/// Levels of an index.
const LEVEL_LIMIT: u16 = 5;

/// Magics without and with checksums.
const NODE: [u16; 2] = [0xfebe, 0x3ebe];
const LEAF: [u16; 2] = [0xfbee, 0x3bee];
/// `XARM`.
const VALUE: u32 = 0x5841_524d;

/// The attributes found so far.
#[derive(Default)]
struct Found {
    all: Vec<ExtendedAttribute>,
    len: usize,
}

impl Found {
    /// Adds an attribute under the name by which the kernel shows it.
    fn add(&mut self, inode: &Inode, flags: u8, name: &[u8], value: Vec<u8>) -> Result<()> {
        if flags & (PARENT | INCOMPLETE) != 0 {
            return Ok(());
        }
        self.len += name.len() + value.len();
        if self.len > TOTAL_LIMIT {
            return Err(inode.corrupt("has more extended attributes than the kernel can list"));
        }
        let list = match name {
            b"SGI_ACL_FILE" if flags & ROOT != 0 => Some("system.posix_acl_access"),
            b"SGI_ACL_DEFAULT" if flags & ROOT != 0 => Some("system.posix_acl_default"),
            _ => None,
        };
        if let Some(shown) = list {
            let value = acl::to_xattr(&value).ok_or_else(|| inode.corrupt("has a damaged ACL"))?;
            self.all.push(ExtendedAttribute { name: shown.into(), value });
        }
        let prefix: &[u8] = match flags & (ROOT | SECURE) {
            0 => b"user.",
            ROOT => b"trusted.",
            _ => b"security.",
        };
        self.all.push(ExtendedAttribute { name: [prefix, name].concat(), value });
        Ok(())
    }
}

impl Xfs {
    pub(super) fn attributes_of(&self, number: u64) -> Result<Vec<ExtendedAttribute>> {
        let inode = self.inode(number)?;
        let mut found = Found::default();
        if !inode.has_attributes() {
            return Ok(found.all);
        }
        match inode.attribute_format {
            ForkFormat::Local => short(&inode, &mut found)?,
            ForkFormat::Extents if inode.extent_count(Fork::Attributes) == 0 => {}
            ForkFormat::Extents | ForkFormat::Btree => self.leaves(&inode, &mut found)?,
            ForkFormat::Device | ForkFormat::Invalid => {
                return Err(inode.corrupt("has attributes of an unknown format"));
            }
        }
        Ok(found.all)
    }

    fn leaves(&self, inode: &Inode, found: &mut Found) -> Result<()> {
        let version = usize::from(self.superblock.has_checksums);
        let damaged = || inode.corrupt("has a damaged block of extended attributes");
        let mut walk = ExtentWalk::new(self, inode, Fork::Attributes);
        let (mut block, mut level, mut leaves) = (0, None, 0);
        loop {
            let buffer = self.attribute_block(inode, &mut walk, block)?;
            let magic = be16(&buffer.bytes, 8);
            if magic == NODE[version] && leaves == 0 {
                let own = be16(&buffer.bytes, [14, 58][version]);
                let is_lower = level.is_none_or(|level| level == own);
                if own == 0 || own > LEVEL_LIMIT || !is_lower || be16(&buffer.bytes, [12, 56][version]) == 0 {
                    return Err(damaged());
                }
                level = Some(own - 1);
                // The first child: its leaves are linked to the following ones.
                block = be32(&buffer.bytes, [16, 64][version] + 4).into();
                continue;
            }
            if magic != LEAF[version] || level.is_some_and(|level| level != 0) {
                return Err(damaged());
            }
            self.leaf(inode, &mut walk, &buffer.bytes, found)?;
            leaves += 1;
            block = be32(&buffer.bytes, 0).into();
            if block == 0 {
                return Ok(());
            }
            if leaves >= LEAF_LIMIT {
                return Err(damaged());
            }
        }
    }

    fn attribute_block(&self, inode: &Inode, walk: &mut ExtentWalk<'_>, block: u64) -> Result<Arc<Buffer>> {
        let pieces = self.pieces(walk, block, 1)?;
        let pieces = pieces.ok_or_else(|| inode.corrupt("has a hole in its extended attributes"))?;
        self.owned(inode, &pieces, &INDEX).map_err(|error| inode.about(error))
    }

    /// The attributes of a leaf.
    fn leaf(&self, inode: &Inode, walk: &mut ExtentWalk<'_>, bytes: &[u8], found: &mut Found) -> Result<()> {
        let version = usize::from(self.superblock.has_checksums);
        let damaged = || inode.corrupt("has a damaged block of extended attributes");
        let count = usize::from(be16(bytes, [12, 56][version]));
        let entries = bytes.get([32, 80][version]..).and_then(|rest| rest.get(..count * 8));
        for entry in entries.ok_or_else(damaged)?.chunks_exact(8) {
            let (at, flags) = (usize::from(be16(entry, 4)), entry[6]);
            if flags & LOCAL != 0 {
                let (value_len, name_len) = (usize::from(be16(bytes, at)), usize::from(byte(bytes, at + 2)));
                let name = bytes.get(at + 3..at + 3 + name_len).ok_or_else(damaged)?;
                let value_at = at + 3 + name_len;
                let value = bytes.get(value_at..value_at + value_len).ok_or_else(damaged)?;
                found.add(inode, flags, name, value.to_vec())?;
                continue;
            }
            let (block, len) = (be32(bytes, at), be32(bytes, at + 4) as usize);
            let name = bytes.get(at + 9..at + 9 + usize::from(byte(bytes, at + 8))).ok_or_else(damaged)?;
            if flags & (PARENT | INCOMPLETE) != 0 {
                continue;
            }
            let value = self.remote_value(inode, walk, block.into(), len)?;
            found.add(inode, flags, name, value)?;
        }
        Ok(())
    }

    /// A value in blocks of its own.
    fn remote_value(
        &self,
        inode: &Inode,
        walk: &mut ExtentWalk<'_>,
        block: u64,
        len: usize,
    ) -> Result<Vec<u8>> {
        if len > VALUE_LIMIT {
            return Err(inode.corrupt(&format!("has an extended attribute of {len} bytes")));
        }
        let superblock = &self.superblock;
        let header_len = if superblock.has_checksums { REMOTE_HEADER_LEN } else { 0 };
        let mut value = Vec::with_capacity(len);
        let mut block = block;
        while value.len() < len {
            let pieces = self.pieces(walk, block, 1)?;
            let pieces = pieces.ok_or_else(|| inode.corrupt("has a hole in an extended attribute"))?;
            let buffer = self.owned(inode, &pieces, &REMOTE).map_err(|error| inode.about(error))?;
            let is_part = be32(&buffer.bytes, 0) == VALUE && be32(&buffer.bytes, 4) as usize == value.len();
            if superblock.has_checksums && !is_part {
                return Err(inode.corrupt("has a damaged extended attribute"));
            }
            let body = slice(&buffer.bytes, header_len, len - value.len());
            value.extend(body);
            block += 1;
        }
        Ok(value)
    }
}

/// The attributes in the inode.
fn short(inode: &Inode, found: &mut Found) -> Result<()> {
    let area = inode.area(Fork::Attributes);
    let area = slice(area, 0, be16(area, 0).into());
    let mut at = 4;
    for _ in 0..byte(area, 2) {
        let (name_len, value_len) = (usize::from(byte(area, at)), usize::from(byte(area, at + 1)));
        let flags = byte(area, at + 2);
        let end = at + 3 + name_len + value_len;
        let Some(entry) = area.get(at + 3..end) else {
            return Err(inode.corrupt("has more extended attributes than fit into it"));
        };
        let (name, value) = entry.split_at(name_len);
        found.add(inode, flags, name, value.to_vec())?;
        at = end;
    }
    Ok(())
}

fn byte(bytes: &[u8], at: usize) -> u8 {
    bytes.get(at).copied().unwrap_or(0)
}
