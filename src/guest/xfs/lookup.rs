//! Finding a name in a directory, by the index of hashes where there is one.
//!
//! The index is a B-tree over the hashes of names (`xfs_da_intnode`) with leaves of (hash, position) pairs.
//! Every step goes one level down, or to a leaf that was not read yet, so that a damaged index ends.

use crate::error::Result;
use crate::guest::bytes::{be16, be32};

use super::Xfs;
use super::directory::{Entry, INDEX_AT, UNIT};
use super::extents::ExtentWalk;
use super::inode::{Fork, ForkFormat, Inode};

/// Levels of an index (`XFS_DA_NODE_MAXDEPTH`).
const LEVEL_LIMIT: u16 = 5;
/// Leaves with one hash that are read, and names of one hash. A hash of 32 bits has few of them.
const LEAF_LIMIT: usize = 1024;
const NAME_LIMIT: usize = 1 << 14;

/// Magics without and with checksums.
const NODE: [u16; 2] = [0xfebe, 0x3ebe];
const LONE_LEAF: [u16; 2] = [0xd2f1, 0x3df1];
const LEAF: [u16; 2] = [0xd2ff, 0x3dff];

impl Xfs {
    pub(super) fn look_up(&self, directory: u64, name: &[u8]) -> Result<Option<u64>> {
        let inode = self.directory(directory)?;
        if matches!(name, b"." | b"..") || name.is_empty() {
            return Ok(None);
        }
        let mut found = None;
        let mut compare = |entry: Entry<'_>| {
            if self.is_same(entry.name, name) {
                found = Some(entry.ino);
            }
            found.is_none()
        };
        if inode.format == ForkFormat::Local {
            self.short_entries(&inode, &mut compare)?;
            return Ok(found);
        }
        let mut walk = ExtentWalk::new(self, &inode, Fork::Data);
        let Some(first) = self.entry_block(&inode, &mut walk, 0)? else { return Ok(None) };
        if self.is_one_block(&first) {
            self.entries(&first, 0, &mut compare).map_err(|error| inode.about(error))?;
            return Ok(found);
        }
        let hash = if self.superblock.ignores_case { folded_hash(name) } else { hash_of(name) };
        for position in self.positions(&inode, &mut walk, hash)? {
            let at = u64::from(position) * UNIT;
            let bits = self.superblock.directory_bits;
            let start = at >> bits << bits;
            let block = start >> self.superblock.block_bits;
            let Some(buffer) = self.entry_block(&inode, &mut walk, block)? else { continue };
            let mut found = None;
            let parsed = self.entries(&buffer, start, &mut |entry| {
                if entry.position != u64::from(position) {
                    return true;
                }
                found = self.is_same(entry.name, name).then_some(entry.ino);
                false
            });
            if found.is_some() {
                return Ok(found);
            }
            parsed.map_err(|error| inode.about(error))?;
        }
        Ok(None)
    }

    fn is_same(&self, one: &[u8], other: &[u8]) -> bool {
        if !self.superblock.ignores_case {
            return one == other;
        }
        one.len() == other.len() && one.iter().zip(other).all(|(one, other)| folded(*one) == folded(*other))
    }

    /// The positions of the entries whose names have a hash, by the index.
    fn positions(&self, inode: &Inode, walk: &mut ExtentWalk<'_>, hash: u32) -> Result<Vec<u32>> {
        let version = usize::from(self.superblock.has_checksums);
        let header_len = if self.superblock.has_checksums { 64 } else { 16 };
        let (magic_at, count_at) = (8, [12, 56][version]);
        let level_at = count_at + 2;
        let damaged = || inode.corrupt("has a damaged directory index");
        let mut block = INDEX_AT >> self.superblock.block_bits;
        let mut level = None;
        let mut positions = Vec::new();
        let mut leaves = 0;
        loop {
            let Some(buffer) = self.index_block(inode, walk, block)? else { return Err(damaged()) };
            let (magic, count) = (be16(&buffer.bytes, magic_at), usize::from(be16(&buffer.bytes, count_at)));
            let entries = buffer.bytes.get(header_len..header_len + count * 8).ok_or_else(damaged)?;
            let pair = |index: usize| (be32(entries, index * 8), be32(entries, index * 8 + 4));
            if magic == NODE[version] && leaves == 0 {
                let own = be16(&buffer.bytes, level_at);
                if own == 0 || own > LEVEL_LIMIT || level.is_some_and(|level| level != own) {
                    return Err(damaged());
                }
                level = Some(own - 1);
                // A node's hashes are the last ones of its children.
                let Some(index) = (0..count).find(|index| pair(*index).0 >= hash) else { break };
                block = pair(index).1.into();
                continue;
            }
            let is_leaf = magic == LEAF[version] || magic == LONE_LEAF[version];
            if !is_leaf || level.is_some_and(|level| level != 0) {
                return Err(damaged());
            }
            let matching = (0..count).map(pair).filter(|(own, position)| *own == hash && *position != 0);
            positions.extend(matching.map(|(_, position)| position));
            let next = be32(&buffer.bytes, 0);
            let continues = count > 0 && pair(count - 1).0 == hash && magic == LEAF[version] && next != 0;
            leaves += 1;
            if !continues {
                break;
            }
            if leaves >= LEAF_LIMIT || positions.len() > NAME_LIMIT {
                return Err(damaged());
            }
            block = next.into();
        }
        Ok(positions)
    }
}

/// The hash of a name (`xfs_da_hashname`): seven bits for each byte, rotated.
pub(super) fn hash_of(name: &[u8]) -> u32 {
    name.iter().fold(0, |hash: u32, byte| u32::from(*byte) ^ hash.rotate_left(7))
}

/// The hash of a name in a file system without regard to case.
fn folded_hash(name: &[u8]) -> u32 {
    name.iter().fold(0, |hash: u32, byte| u32::from(folded(*byte)) ^ hash.rotate_left(7))
}

/// A byte in lower case, as the kernel's table of Latin-1 has it.
fn folded(byte: u8) -> u8 {
    match byte {
        b'A'..=b'Z' | 0xc0..=0xd6 | 0xd8..=0xde => byte + 0x20,
        _ => byte,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's definition: four bytes at a time, then the rest.
    fn by_fours(name: &[u8]) -> u32 {
        let mut hash = 0u32;
        let mut rest = name;
        while let [a, b, c, d, more @ ..] = rest {
            let [a, b, c, d] = [a, b, c, d].map(|byte| u32::from(*byte));
            hash = a << 21 ^ b << 14 ^ c << 7 ^ d ^ hash.rotate_left(28);
            rest = more;
        }
        let rest: Vec<u32> = rest.iter().map(|byte| u32::from(*byte)).collect();
        match rest[..] {
            [a, b, c] => a << 14 ^ b << 7 ^ c ^ hash.rotate_left(21),
            [a, b] => a << 7 ^ b ^ hash.rotate_left(14),
            [a] => a ^ hash.rotate_left(7),
            _ => hash,
        }
    }

    #[test]
    fn the_hash_is_that_of_the_index() {
        for name in [&b"a"[..], b"ab", b"abc", b"abcd", b"abcde", b"\xff\xfe\xfd\xfc\xfb", &[b'n'; 255]] {
            assert_eq!(hash_of(name), by_fours(name), "{name:?}");
        }
        assert_eq!(folded_hash(b"README.\xc4"), hash_of(b"readme.\xe4"));
    }
}
