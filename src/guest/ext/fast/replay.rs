//! Reads the complete fast commits from the journal and applies them in memory.

use std::ops::Range;

use crate::error::{Error, ErrorKind, Result};
use crate::guest::bytes::{corrupt, le16, le32};

use super::super::Ext;
use super::super::blocks::Block;
use super::super::bytes::join;
use super::super::checksum::crc32c;
use super::super::inode::{BLOCK_AREA, OLD_LEN, flags};
use super::super::journal::Log;
use super::super::map::{ExtMapping, ExtSegment};
use super::{FastCommits, NameChange, NameChanges};

const ADD_RANGE: u16 = 1;
const DEL_RANGE: u16 = 2;
const CREATE: u16 = 3;
const LINK: u16 = 4;
const UNLINK: u16 = 5;
const INODE: u16 = 6;
const PAD: u16 = 7;
const TAIL: u16 = 8;
const HEAD: u16 = 9;

const TAG_LEN: usize = 4;
/// Blocks of fast commits at most; the kernel uses 256.
const MAX_BLOCKS: usize = 1 << 12;
/// Fields of an inode.
const LINKS: Range<usize> = 0x1a..0x1c;
const SECTORS: Range<usize> = 0x1c..0x20;
const SECTORS_HIGH: Range<usize> = 0x74..0x76;

/// An extent of at most this many blocks is written; a larger value means a reserved one, this many blocks
/// shorter.
const MAX_WRITTEN: u16 = 1 << 15;

/// A record of a fast commit.
struct FastCommitTag<'a> {
    kind: u16,
    value: &'a [u8],
    /// The record with its header, for the checksum.
    raw: &'a [u8],
}

/// The records of a block up to its end, or up to the first invalid one, which yields an error.
fn tags(block: &[u8], inode_len: usize) -> impl Iterator<Item = Result<FastCommitTag<'_>>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at + TAG_LEN > block.len() {
            return None;
        }
        let (kind, len) = (le16(block, at), usize::from(le16(block, at + 2)));
        let Some(raw) = block[at..].get(..TAG_LEN + len).filter(|_| has_valid_len(kind, len, inode_len))
        else {
            at = block.len();
            return Some(Err(corrupt("a fast commit is damaged")));
        };
        at += raw.len();
        Some(Ok(FastCommitTag { kind, value: &raw[TAG_LEN..], raw }))
    })
}

fn has_valid_len(kind: u16, len: usize, inode_len: usize) -> bool {
    match kind {
        ADD_RANGE => len == 16,
        DEL_RANGE => len == 12,
        CREATE | LINK | UNLINK => (9..=8 + 255).contains(&len),
        INODE => (4 + OLD_LEN..=4 + inode_len).contains(&len),
        PAD => true,
        TAIL => len >= 8,
        HEAD => len == 8,
        _ => false,
    }
}

impl FastCommits {
    /// The fast commits that belong to `transaction`, the first incomplete one.
    pub(in super::super) fn replay(ext: &Ext, log: &Log, transaction: u32) -> Result<Self> {
        let inode_len = ext.superblock.inode_len;
        let mut found = Self::default();
        let (blocks, whole) = whole(log, transaction, inode_len)?;
        let all = blocks.iter().flat_map(|block| tags(block, inode_len));
        for tag in all.take(whole) {
            let FastCommitTag { kind, value, .. } = tag?;
            match kind {
                ADD_RANGE => found.add_range(value),
                DEL_RANGE => {
                    let (start, count) = (le32(value, 4).into(), le32(value, 8).into());
                    found.put_range(le32(value, 0), start, ExtSegment { count, mapping: ExtMapping::Hole });
                }
                CREATE => {
                    let (parent, ino) = found.change_name(value, NameChange::Added);
                    found.make_directory(parent, ino);
                }
                LINK => drop(found.change_name(value, NameChange::Added)),
                UNLINK => drop(found.change_name(value, NameChange::Removed)),
                INODE => found.put_inode(ext, le32(value, 0), &value[4..])?,
                _ => {}
            }
        }
        found.names.values_mut().for_each(NameChanges::settle);
        Ok(found)
    }

    fn add_range(&mut self, value: &[u8]) {
        let len = le16(value, 8);
        let (len, written) = if len > MAX_WRITTEN { (len - MAX_WRITTEN, false) } else { (len, true) };
        let block = Block(join(le32(value, 12), le16(value, 10)));
        let mapping = if written { ExtMapping::Stored(block) } else { ExtMapping::Unwritten };
        self.put_range(le32(value, 0), le32(value, 4).into(), ExtSegment { count: len.into(), mapping });
    }

    fn put_range(&mut self, number: u32, start: u64, segment: ExtSegment) {
        if segment.count > 0 {
            self.ranges.entry(number).or_default().put(start, segment);
        }
    }

    /// Records a change of a name; returns the directory and the inode.
    fn change_name(&mut self, value: &[u8], change: fn(u32) -> NameChange) -> (u32, u32) {
        let (parent, ino) = (le32(value, 0), le32(value, 4));
        self.names.entry(parent).or_default().change(&value[8..], change(ino));
        (parent, ino)
    }

    /// A directory created by a fast commit has no recorded blocks: it is empty until names are added. The
    /// kernel gives it one link and counts no blocks. One link also tells programs that the link count says
    /// nothing about its subdirectories.
    fn make_directory(&mut self, parent: u32, ino: u32) {
        // The inode's record comes before the name's.
        let Some(raw) = self.inodes.get_mut(&ino).filter(|raw| le16(raw, 0) >> 12 == 0o4 && parent != ino)
        else {
            return;
        };
        raw[LINKS].copy_from_slice(&1u16.to_le_bytes());
        raw[SECTORS].fill(0);
        raw[SECTORS_HIGH].fill(0);
        self.names.entry(ino).or_default().fresh = true;
    }

    /// The new bytes of an inode without its block mapping, which range records set.
    fn put_inode(&mut self, ext: &Ext, number: u32, new: &[u8]) -> Result<()> {
        let mut raw = match self.inodes.remove(&number) {
            Some(raw) => raw,
            None => ext.raw_inode(number)?,
        };
        raw[..BLOCK_AREA.start].copy_from_slice(&new[..BLOCK_AREA.start]);
        raw[BLOCK_AREA.end..new.len()].copy_from_slice(&new[BLOCK_AREA.end..]);
        let flags = le32(&raw, 0x20);
        let area = &mut raw[BLOCK_AREA];
        if flags & flags::EXTENTS != 0 {
            if area[..2] != [0x0a, 0xf3] {
                area[..12].copy_from_slice(&[0x0a, 0xf3, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
            }
        } else if flags & flags::INLINE_DATA != 0 {
            area.copy_from_slice(&new[BLOCK_AREA]);
        }
        self.inodes.insert(number, raw);
        Ok(())
    }
}

/// The blocks of fast commits, and how many of their records belong to complete commits.
fn whole(log: &Log, transaction: u32, inode_len: usize) -> Result<(Vec<Vec<u8>>, usize)> {
    let (mut blocks, mut count, mut whole, mut sum) = (Vec::new(), 0, 0, 0);
    'blocks: for at in log.fast.clone() {
        if blocks.len() == MAX_BLOCKS {
            let fact = format!("its fast commits fill more than {MAX_BLOCKS} blocks");
            return Err(Error::new(ErrorKind::Limit, fact));
        }
        let block = log.read(at)?;
        if blocks.is_empty() && le16(&block, 0) != HEAD {
            break;
        }
        blocks.push(block);
        for tag in tags(blocks.last().expect("it was just pushed"), inode_len) {
            let Ok(FastCommitTag { kind, value, raw }) = tag else { break 'blocks };
            let mine = || le32(value, if kind == HEAD { 4 } else { 0 }) == transaction;
            count += 1;
            if kind == HEAD {
                if le32(value, 0) != 0 {
                    return Err(Error::new(ErrorKind::Unsupported, "its fast commits have unknown features"));
                }
                if !mine() {
                    break 'blocks;
                }
            }
            if kind != TAIL {
                sum = crc32c(sum, raw);
                continue;
            }
            // The checksum covers the transaction's number and follows it.
            if !mine() || crc32c(sum, &raw[..TAG_LEN + 4]) != le32(value, 4) {
                break 'blocks;
            }
            (whole, sum) = (count, 0);
        }
    }
    Ok((blocks, whole))
}
