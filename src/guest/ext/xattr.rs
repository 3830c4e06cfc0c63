//! Extended attributes: in the inode, in a block of their own, in inodes of their own.

use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::{le16, le32};
use crate::guest::filesystem::ExtendedAttribute;

use super::Ext;
use super::acl;
use super::blocks::Block;
use super::checksum::{crc32c, crc32c_without_field};
use super::inode::{Inode, flags};

const MAGIC: u32 = 0xea02_0000;
const BLOCK_HEADER_LEN: usize = 32;
const ENTRY_LEN: usize = 16;
/// Linux' limit of a value's length.
const MAX_VALUE_LEN: u32 = 64 << 10;

/// Bytes of all values of an inode at most.
const MAX_LEN: usize = 16 << 20;

const INDEX_ACCESS_ACL: u8 = 2;
const INDEX_DEFAULT_ACL: u8 = 3;
const INDEX_SYSTEM: u8 = 7;

/// An entry of a table of attributes.
struct XattrEntry<'a> {
    index: u8,
    name: &'a [u8],
    /// Where the value begins, unless an inode holds it.
    offset: usize,
    /// The inode that holds the value; 0: none.
    inode: u32,
    len: u32,
}

/// The entries from `first` on; the offsets of values are relative to `base`.
fn entries<'a>(
    inode: &'a Inode,
    base: &'a [u8],
    first: usize,
) -> impl Iterator<Item = Result<XattrEntry<'a>>> {
    let mut at = first;
    std::iter::from_fn(move || {
        // Four zero bytes end the table, and so does its end.
        if base.len() < at + 4 || le32(base, at) == 0 {
            return None;
        }
        let name_len = usize::from(base[at]);
        let Some(name) = base.get(at + ENTRY_LEN..).and_then(|rest| rest.get(..name_len)) else {
            at = base.len();
            return Some(Err(inode.corrupt("has a damaged table of extended attributes")));
        };
        let entry = XattrEntry {
            index: base[at + 1],
            name,
            offset: le16(base, at + 2).into(),
            inode: le32(base, at + 4),
            len: le32(base, at + 8),
        };
        at += (ENTRY_LEN + name_len).next_multiple_of(4);
        Some(Ok(entry))
    })
}

impl<'a> XattrEntry<'a> {
    /// The value, if it lies in the same table.
    fn value(&self, inode: &Inode, base: &'a [u8]) -> Result<&'a [u8]> {
        let found = base.get(self.offset..).and_then(|rest| rest.get(..self.len as usize));
        found.ok_or_else(|| inode.corrupt("has an extended attribute whose value lies outside its table"))
    }

    fn is_inline_data(&self) -> bool {
        self.index == INDEX_SYSTEM && self.name == b"data"
    }
}

/// The part of an inode that holds attributes, if there is one.
fn table_within(inode: &Inode) -> Option<&[u8]> {
    let end = inode.extra_end;
    let exists = inode.states_extra && inode.raw.len() >= end + 8 && le32(&inode.raw, end) == MAGIC;
    exists.then(|| &inode.raw[end + 4..])
}

/// The part of an inode's inline data after the place of the block numbers.
pub(super) fn inline_value(inode: &Inode) -> Result<Option<&[u8]>> {
    let Some(base) = table_within(inode) else { return Ok(None) };
    for entry in entries(inode, base, 0) {
        let entry = entry?;
        if entry.is_inline_data() && entry.inode == 0 {
            return entry.value(inode, base).map(Some);
        }
    }
    Ok(None)
}

impl Ext {
    pub(super) fn attributes_of(&self, number: u32) -> Result<Vec<ExtendedAttribute>> {
        let inode = self.inode(number)?;
        let mut found = Vec::new();
        if let Some(base) = table_within(&inode) {
            self.collect(&inode, base, 0, &mut found)?;
        }
        if inode.attribute_block != 0 {
            let block = Block(inode.attribute_block);
            let base = self.blocks.read(block).map_err(|error| inode.about(error))?;
            if le32(&base, 0) != MAGIC || le32(&base, 8) != 1 {
                return Err(inode.corrupt("has a damaged block of extended attributes"));
            }
            if let Some(seed) = self.superblock.seed() {
                let state = crc32c(seed, &block.0.to_le_bytes());
                if crc32c_without_field(state, &base, 16, 4) != le32(&base, 16) {
                    return Err(inode.corrupt("has a block of extended attributes with a wrong checksum"));
                }
            }
            self.collect(&inode, &base, BLOCK_HEADER_LEN, &mut found)?;
        }
        Ok(found)
    }

    fn collect(
        &self,
        inode: &Inode,
        base: &[u8],
        first: usize,
        found: &mut Vec<ExtendedAttribute>,
    ) -> Result<()> {
        for entry in entries(inode, base, first) {
            let entry = entry?;
            let Some(name) = full_name(&entry) else { continue };
            let mut value = match entry.inode {
                0 => entry.value(inode, base)?.to_vec(),
                holder => self.value_of(inode, holder, entry.len)?,
            };
            if matches!(entry.index, INDEX_ACCESS_ACL | INDEX_DEFAULT_ACL) {
                value = acl::to_xattr(&value)
                    .ok_or_else(|| inode.corrupt("has a damaged access control list"))?;
            }
            found.push(ExtendedAttribute { name, value });
            let len: usize = found.iter().map(|found| found.value.len()).sum();
            if len > MAX_LEN {
                return Err(Error::new(
                    ErrorKind::Limit,
                    format!("inode {} has too many extended attributes", inode.number),
                ));
            }
        }
        Ok(())
    }

    /// A value that fills an inode of its own.
    fn value_of(&self, inode: &Inode, holder: u32, len: u32) -> Result<Vec<u8>> {
        let holder = self.inode(holder).map_err(|error| inode.about(error))?;
        if !holder.is(flags::EA_INODE) || len > MAX_VALUE_LEN || holder.size != u64::from(len) {
            return Err(inode.corrupt("has an extended attribute in an unrelated inode"));
        }
        let mut value = vec![0; len as usize];
        self.read_content(&holder, 0, &mut value)?;
        Ok(value)
    }
}

/// The name with its namespace; `None` for attributes that are never shown.
fn full_name(entry: &XattrEntry<'_>) -> Option<Vec<u8>> {
    let prefix: &[u8] = match entry.index {
        1 => b"user.",
        INDEX_ACCESS_ACL => b"system.posix_acl_access",
        INDEX_DEFAULT_ACL => b"system.posix_acl_default",
        4 => b"trusted.",
        6 => b"security.",
        INDEX_SYSTEM if !entry.is_inline_data() => b"system.",
        8 => b"system.richacl",
        10 => b"gnu.",
        // Encryption's own (9), Lustre's (5), and unassigned numbers.
        _ => return None,
    };
    Some([prefix, entry.name].concat())
}
