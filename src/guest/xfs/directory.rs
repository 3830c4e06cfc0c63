//! Directories: in the inode, in one block, or in blocks with an index.
//!
//! A listing reads the blocks of entries in their order; a lookup in a large directory follows the index of
//! hashes (`lookup`). Positions are those of the kernel: the offset of an entry in the directory, in units of
//! eight bytes. Fields follow "XFS Algorithms & Data Structures", chapter "Directories".

use std::sync::Arc;

use crate::error::{Error, Result};
use crate::guest::bytes::{be16, be32, be64, corrupt};
use crate::guest::filesystem::{DirectoryEntry, FileKind, Ino};

use super::Xfs;
use super::blocks::Buffer;
use super::checksum::{DIRECTORY, INDEX};
use super::extents::{ExtentWalk, Mapping};
use super::inode::{Fork, ForkFormat, Inode};

/// Where the index begins in a directory, in bytes: behind all entries.
pub(super) const INDEX_AT: u64 = 1 << 35;
/// The unit of positions in a directory.
pub(super) const UNIT: u64 = 8;
/// `freetag`: the space is unused.
const FREE: u16 = 0xffff;

/// Magics of blocks, without and with checksums.
const ONE_BLOCK: [u32; 2] = [0x5844_3242, 0x5844_4233];
const DATA_BLOCK: [u32; 2] = [0x5844_3244, 0x5844_4433];

/// An entry as it is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry<'a> {
    pub(super) ino: u64,
    pub(super) name: &'a [u8],
    /// Its kind as stored, 0 if unknown.
    kind: u8,
    /// Its offset in the directory, in units of eight bytes.
    pub(super) position: u64,
}

impl Entry<'_> {
    fn is_dot(&self) -> bool {
        matches!(self.name, b"." | b"..")
    }

    fn is_valid(&self) -> bool {
        !self.name.is_empty() && !self.name.contains(&b'/') && !self.name.contains(&0)
    }

    fn shown(&self) -> DirectoryEntry {
        let kind = match self.kind {
            1 => Some(FileKind::File),
            2 => Some(FileKind::Directory),
            3 => Some(FileKind::CharDevice),
            4 => Some(FileKind::BlockDevice),
            5 => Some(FileKind::Fifo),
            6 => Some(FileKind::Socket),
            7 => Some(FileKind::Symlink),
            _ => None,
        };
        DirectoryEntry { name: self.name.to_vec(), ino: Ino(self.ino), kind, next: self.position + 1 }
    }
}

impl Xfs {
    pub(super) fn directory(&self, number: u64) -> Result<Arc<Inode>> {
        let inode = self.inode(number)?;
        if inode.kind != FileKind::Directory {
            return Err(inode.corrupt("is not a directory"));
        }
        Ok(inode)
    }

    pub(super) fn list_directory(
        &self,
        number: u64,
        from: u64,
        each: &mut dyn FnMut(DirectoryEntry) -> bool,
    ) -> Result<()> {
        let inode = self.directory(number)?;
        let mut damage = None;
        let mut pass = |entry: Entry<'_>| {
            if entry.position < from || entry.is_dot() {
                return true;
            }
            if !entry.is_valid() {
                damage.get_or_insert_with(|| inode.corrupt("has an entry with an invalid name"));
                return true;
            }
            each(entry.shown())
        };
        if inode.format == ForkFormat::Local {
            self.short_entries(&inode, &mut pass)?;
        } else {
            self.blocks_of_entries(&inode, from, &mut pass)?;
        }
        damage.map_or(Ok(()), Err)
    }

    /// The entries of a directory in the inode, until `each` returns false.
    pub(super) fn short_entries(&self, inode: &Inode, each: &mut dyn FnMut(Entry<'_>) -> bool) -> Result<()> {
        let area = inode.area(Fork::Data);
        let area = &area[..area.len().min(inode.size as usize)];
        let ino_len = if area.get(1).is_some_and(|wide| *wide != 0) { 8 } else { 4 };
        let kind_len = usize::from(self.superblock.has_kinds);
        let mut at = 2 + ino_len;
        for _ in 0..area.first().copied().unwrap_or(0) {
            let short = || inode.corrupt("has more entries than fit into it");
            let name_len = usize::from(*area.get(at).ok_or_else(short)?);
            let position = u64::from(be16(area, at + 1)) / UNIT;
            let name_at = at + 3;
            let ino_at = name_at + name_len + kind_len;
            let name = area.get(name_at..name_at + name_len).ok_or_else(short)?;
            let raw = area.get(ino_at..ino_at + ino_len).ok_or_else(short)?;
            let ino = if ino_len == 8 { be64(raw, 0) & ((1 << 56) - 1) } else { be32(raw, 0).into() };
            let kind = if kind_len == 1 { area[name_at + name_len] } else { 0 };
            if !each(Entry { ino, name, kind, position }) {
                break;
            }
            at = ino_at + ino_len;
        }
        Ok(())
    }

    /// The entries of a directory in blocks, from that position on, until `each` returns false. A damaged
    /// block is an error after the entries of the others.
    fn blocks_of_entries(
        &self,
        inode: &Inode,
        from: u64,
        each: &mut dyn FnMut(Entry<'_>) -> bool,
    ) -> Result<()> {
        let bits = self.superblock.block_bits;
        let per_block = 1 << (self.superblock.directory_bits - bits);
        // A directory ends where its size says, and cannot have more blocks than there are.
        let end = inode.size.min(INDEX_AT).div_ceil(1 << bits).min(self.superblock.block_count);
        let mut walk = ExtentWalk::new(self, inode, Fork::Data);
        let mut block = (from.saturating_mul(UNIT) >> bits).min(end) / per_block * per_block;
        let mut damage: Option<Error> = None;
        while block < end {
            let segment = walk.segment(block, end - block)?;
            if !matches!(segment.mapping, Mapping::Stored(_)) {
                block += segment.count.div_ceil(per_block) * per_block;
                continue;
            }
            match self.entry_block(inode, &mut walk, block) {
                Ok(Some(buffer)) => {
                    let start = block << bits;
                    let mut goes_on = true;
                    let parsed = self.entries(&buffer, start, &mut |entry| {
                        goes_on = each(entry);
                        goes_on
                    });
                    if !goes_on {
                        return Ok(());
                    }
                    if let Err(error) = parsed {
                        damage.get_or_insert_with(|| inode.about(error));
                    }
                }
                Ok(None) => {
                    damage.get_or_insert_with(|| inode.corrupt("has a directory block with a hole"));
                }
                Err(error) => {
                    damage.get_or_insert(error);
                }
            }
            block += per_block;
        }
        damage.map_or(Ok(()), Err)
    }

    /// The block of entries that begins at block `block` of a directory; `None` if any of it is a hole.
    pub(super) fn entry_block(
        &self,
        inode: &Inode,
        walk: &mut ExtentWalk<'_>,
        block: u64,
    ) -> Result<Option<Arc<Buffer>>> {
        self.directory_block(inode, walk, block, true)
    }

    /// The same for a block of the index.
    pub(super) fn index_block(
        &self,
        inode: &Inode,
        walk: &mut ExtentWalk<'_>,
        block: u64,
    ) -> Result<Option<Arc<Buffer>>> {
        self.directory_block(inode, walk, block, false)
    }

    fn directory_block(
        &self,
        inode: &Inode,
        walk: &mut ExtentWalk<'_>,
        block: u64,
        has_entries: bool,
    ) -> Result<Option<Arc<Buffer>>> {
        let superblock = &self.superblock;
        let count = 1 << (superblock.directory_bits - superblock.block_bits);
        let Some(pieces) = self.pieces(walk, block, count)? else { return Ok(None) };
        let layout = if has_entries { &DIRECTORY } else { &INDEX };
        self.owned(inode, &pieces, layout).map(Some).map_err(|error| inode.about(error))
    }

    /// The entries of a block that begins at the byte `start` of its directory, until `each` returns false.
    pub(super) fn entries(
        &self,
        buffer: &Buffer,
        start: u64,
        each: &mut dyn FnMut(Entry<'_>) -> bool,
    ) -> Result<()> {
        let bytes = &buffer.bytes;
        let version = usize::from(self.superblock.has_checksums);
        let magic = be32(bytes, 0);
        let end = if magic == ONE_BLOCK[version] {
            // The index is behind the entries: its records, their number, and the number of stale ones.
            let tail = bytes.len() - 8;
            let index_len = u64::from(be32(bytes, tail)) * 8;
            usize::try_from(index_len).ok().and_then(|len| tail.checked_sub(len))
        } else if magic == DATA_BLOCK[version] {
            Some(bytes.len())
        } else {
            None
        };
        let damaged = || corrupt("has a damaged directory block");
        let end = end.ok_or_else(damaged)?;
        let kind_len = usize::from(self.superblock.has_kinds);
        let mut at = if self.superblock.has_checksums { 64 } else { 16 };
        while at < end {
            if be16(bytes, at) == FREE {
                let len = usize::from(be16(bytes, at + 2));
                if len == 0 || !len.is_multiple_of(UNIT as usize) || at + len > end {
                    return Err(damaged());
                }
                at += len;
                continue;
            }
            let name_len = usize::from(*bytes.get(at + 8).ok_or_else(damaged)?);
            let len = (8 + 1 + name_len + kind_len + 2).next_multiple_of(UNIT as usize);
            // The last two bytes of an entry say where it begins.
            if name_len == 0 || at + len > end || usize::from(be16(bytes, at + len - 2)) != at {
                return Err(damaged());
            }
            let name = &bytes[at + 9..at + 9 + name_len];
            let kind = if kind_len == 1 { bytes[at + 9 + name_len] } else { 0 };
            let position = (start + at as u64) / UNIT;
            if !each(Entry { ino: be64(bytes, at), name, kind, position }) {
                return Ok(());
            }
            at += len;
        }
        Ok(())
    }

    /// Whether a block of entries is the only one of its directory, with the index in it.
    pub(super) fn is_one_block(&self, buffer: &Buffer) -> bool {
        be32(&buffer.bytes, 0) == ONE_BLOCK[usize::from(self.superblock.has_checksums)]
    }
}
