//! Directories: blocks of entries, an index over them in large directories, and names that fast commits added
//! or removed.
//!
//! A listing reads all blocks in order; index blocks look like blocks without names. Damage ends its block,
//! not the listing: the entries of the other blocks are listed first, and the error comes last. For this, the
//! positions that a listing returns record whether there was damage before them.

use std::hash::BuildHasher as _;
use std::sync::Arc;

use crate::error::{Error, Result};
use crate::guest::bytes::{le16, le32};
use crate::guest::filesystem::{DirectoryEntry, FileKind, Ino};

use super::checksum::crc32c;
use super::fast::NameChanges;
use super::inode::{BLOCK_AREA, Inode, flags, kind_of_entry};
use super::map::{ExtMapping, MapWalk};
use super::superblock::incompat;
use super::{Ext, htree, inline, nokey};

/// Set in a position after damage.
const DAMAGED: u64 = 1 << 61;
/// Set in a position among the names that fast commits added: the rest is an index, not a byte offset.
const ADDED: u64 = 1 << 62;

/// Blocks that one request reads at most: 4 GiB of names.
const MAX_BLOCKS: u64 = 1 << 20;
/// A larger directory (in blocks) without an index on disk gets an index in memory.
const SMALL: u64 = 4;
/// Names in such an index at most; larger directories are read for each request.
const MAX_INDEXED: usize = 4 << 20;

const HEADER_LEN: usize = 8;
const TAIL_LEN: usize = 12;
const TAIL_KIND: u8 = 0xde;

/// Where the inline entries begin, after the parent's number.
const INLINE_FIRST: usize = 4;

/// An entry in use.
struct ExtEntry<'a> {
    name: &'a [u8],
    /// The rest of the record after the name, from the next multiple of four bytes on.
    tail: &'a [u8],
    ino: u32,
    kind: Option<FileKind>,
    /// Where the entry begins, and where the next one does: byte offsets in the directory.
    at: u64,
    next: u64,
    /// Something before it is damaged.
    damaged: bool,
}

/// The blocks that can hold a name, by the name's hash; sorted.
pub(super) struct NameIndex {
    hashes: Vec<(u32, u32)>,
    damage: Option<Error>,
}

impl Ext {
    fn directory(&self, number: u32) -> Result<Arc<Inode>> {
        let inode = self.inode(number)?;
        if inode.kind != FileKind::Directory {
            return Err(inode.corrupt("is not a directory"));
        }
        Ok(inode)
    }

    pub(super) fn look_up(&self, directory: u32, name: &[u8]) -> Result<Option<u32>> {
        let inode = self.directory(directory)?;
        if !inode.is(flags::ENCRYPT) {
            return self.look_up_raw(&inode, directory, name);
        }
        let Some((raw, is_whole)) = nokey::decode_name(name) else { return Ok(None) };
        if is_whole && !inode.is(flags::CASEFOLD) {
            let is_it = nokey::encode_name(&raw, nokey::Hashes::of(self, &inode).get(&raw, &[])) == name;
            return if is_it { self.look_up_raw(&inode, directory, &raw) } else { Ok(None) };
        }
        // The name has only a checksum of the rest: the listed names are compared.
        let mut found = None;
        self.list_directory(directory, 0, &mut |entry| {
            if entry.name == name {
                found = Some(entry.ino.0 as u32);
            }
            found.is_none()
        })?;
        Ok(found)
    }

    /// The same for a name as it is on the disk.
    fn look_up_raw(&self, inode: &Inode, directory: u32, name: &[u8]) -> Result<Option<u32>> {
        let Some(names) = self.fast.names(directory) else { return self.stored_name(inode, name) };
        let stored = if names.fresh() { None } else { self.stored_name(inode, name)? };
        Ok(names.now(name, stored))
    }

    pub(super) fn list_directory(
        &self,
        directory: u32,
        from: u64,
        each: &mut dyn FnMut(DirectoryEntry) -> bool,
    ) -> Result<()> {
        let inode = self.directory(directory)?;
        let names = self.fast.names(directory);
        let hashes = inode.is(flags::ENCRYPT).then(|| nokey::Hashes::of(self, &inode));
        let shown = |raw: &[u8], tail: &[u8]| match &hashes {
            Some(hashes) => nokey::encode_name(raw, hashes.get(raw, tail)),
            None => raw.to_vec(),
        };
        let (was_damaged, position) = (from & DAMAGED != 0, from & !(DAMAGED | ADDED));
        let mut damage = None;
        if from & ADDED == 0 && !names.is_some_and(NameChanges::fresh) {
            let (stopped, found) = self.visit(&inode, position, &mut |found: ExtEntry<'_>| {
                let mut entry = DirectoryEntry {
                    name: shown(found.name, found.tail),
                    ino: Ino(found.ino.into()),
                    kind: found.kind,
                    next: found.next | if found.damaged || was_damaged { DAMAGED } else { 0 },
                };
                if let Some(names) = names {
                    match names.now(found.name, Some(found.ino)) {
                        None => return true,
                        Some(now) if now != found.ino => (entry.ino, entry.kind) = (Ino(now.into()), None),
                        Some(_) => {}
                    }
                }
                each(entry)
            });
            if stopped {
                return Ok(());
            }
            damage = found;
        }
        let damaged = was_damaged || damage.is_some();
        if let Some(names) = names {
            let skip = if from & ADDED == 0 { 0 } else { position as usize };
            for (number, name) in names.in_order().iter().enumerate().skip(skip) {
                if !names.fresh() && self.stored_name(&inode, name)?.is_some() {
                    continue;
                }
                let Some(ino) = names.now(name, None) else { continue };
                let next = ADDED | (number as u64 + 1) | if damaged { DAMAGED } else { 0 };
                let kind = self.inode(ino).ok().map(|inode| inode.kind);
                if !each(DirectoryEntry { name: shown(name, &[]), ino: Ino(ino.into()), kind, next }) {
                    return Ok(());
                }
            }
        }
        match damage {
            Some(error) => Err(error),
            None if was_damaged => Err(inode.corrupt("is a directory with damaged blocks")),
            None => Ok(()),
        }
    }

    /// The inode of a name, without fast commits.
    fn stored_name(&self, inode: &Inode, name: &[u8]) -> Result<Option<u32>> {
        if inode.is(flags::INLINE_DATA) {
            return self.search(inode, name);
        }
        let indexed = inode.is(flags::INDEX) && self.superblock.indexed_directories();
        if indexed
            && !inode.is(flags::CASEFOLD)
            && let Ok(leaves) = htree::leaves(self, inode, name)
        {
            return self.search_blocks(inode, leaves.into_iter(), name);
        }
        if inode.size >> self.superblock.block_bits <= SMALL {
            return self.search(inode, name);
        }
        let Some(index) = self.name_index(inode) else { return self.search(inode, name) };
        let hash = self.hash_of(name);
        let first = index.hashes.partition_point(|(other, _)| *other < hash);
        let blocks =
            index.hashes[first..].iter().take_while(|(other, _)| *other == hash).map(|(_, block)| *block);
        match self.search_blocks(inode, blocks, name)? {
            None => index.damage.clone().map_or(Ok(None), Err),
            found => Ok(found),
        }
    }

    fn hash_of(&self, name: &[u8]) -> u32 {
        self.name_hasher.hash_one(name) as u32
    }

    fn search_blocks(
        &self,
        inode: &Inode,
        blocks: impl Iterator<Item = u32>,
        name: &[u8],
    ) -> Result<Option<u32>> {
        for block in blocks {
            let bytes = self.directory_block(inode, block)?;
            let mut entries = ExtEntries::new(self, inode, &bytes, 0);
            if let Some(found) = entries.find(|found| found.name == name) {
                return Ok(Some(found.ino));
            }
            if entries.damaged {
                return Err(inode.corrupt("is a directory with a damaged block"));
            }
        }
        Ok(None)
    }

    /// Reads the directory until the name is found.
    fn search(&self, inode: &Inode, name: &[u8]) -> Result<Option<u32>> {
        let mut found = None;
        let (_, damage) = self.visit(inode, 0, &mut |entry: ExtEntry<'_>| {
            if entry.name == name {
                found = Some(entry.ino);
            }
            found.is_none()
        });
        match (found, damage) {
            (None, Some(damage)) => Err(damage),
            (found, _) => Ok(found),
        }
    }

    /// The in-memory index of a directory without an index on disk; `None` if the directory is too large.
    fn name_index(&self, inode: &Inode) -> Option<Arc<NameIndex>> {
        if let Some(index) = self.name_indexes.get(&inode.number) {
            return Some(index);
        }
        let mut hashes = Vec::new();
        let bits = self.superblock.block_bits;
        let (full, damage) = self.visit(inode, 0, &mut |found: ExtEntry<'_>| {
            hashes.push((self.hash_of(found.name), (found.at >> bits) as u32));
            hashes.len() < MAX_INDEXED
        });
        if full {
            return None;
        }
        hashes.sort_unstable();
        let weight = hashes.len() * 8 + 64;
        let index = Arc::new(NameIndex { hashes, damage });
        self.name_indexes.put(inode.number, Arc::clone(&index), weight);
        Some(index)
    }

    /// Calls `each` with the entries in use from byte `from` on, without `.` and `..`, until it returns
    /// false. Returns whether it did, and the first damage.
    fn visit(
        &self,
        inode: &Inode,
        from: u64,
        each: &mut dyn FnMut(ExtEntry<'_>) -> bool,
    ) -> (bool, Option<Error>) {
        let mut damage = None;
        let mut part = |bytes: &[u8], start: u64, damage: &mut Option<Error>| {
            let mut entries = ExtEntries::new(self, inode, bytes, start);
            for found in entries.by_ref() {
                if found.at >= from && !each(ExtEntry { damaged: damage.is_some(), ..found }) {
                    return true;
                }
            }
            if entries.damaged && damage.is_none() {
                *damage = Some(inode.corrupt("is a directory with a damaged block"));
            }
            false
        };
        if inode.is(flags::INLINE_DATA) {
            let first = &inode.raw[BLOCK_AREA][INLINE_FIRST..];
            let first_len = (inode.size as usize).saturating_sub(INLINE_FIRST).min(first.len());
            let stopped = part(&first[..first_len], INLINE_FIRST as u64, &mut damage);
            return match inline::rest(inode) {
                _ if stopped => (true, damage),
                Ok(rest) => (part(rest, inline::FIRST_LEN as u64, &mut damage), damage),
                Err(error) => (false, Some(error)),
            };
        }
        let bits = self.superblock.block_bits;
        let (end, mut at) = (inode.size.div_ceil(1 << bits), from >> bits);
        let mut walk = MapWalk::new(self, inode);
        let mut left = MAX_BLOCKS.min(self.superblock.block_count);
        while at < end {
            let segment = match walk.segment(at, end - at) {
                Ok(segment) => segment,
                Err(error) => return (false, damage.or(Some(error))),
            };
            if let ExtMapping::Stored(first) = segment.mapping {
                for index in 0..segment.count {
                    let Some(less) = left.checked_sub(1) else {
                        let error = inode.corrupt("is a directory with more blocks than the file system");
                        return (false, damage.or(Some(error)));
                    };
                    left = less;
                    let bytes = self.blocks.read(super::Block(first.0 + index));
                    match bytes.and_then(|bytes| verified(inode, bytes)) {
                        Ok(bytes) if part(&bytes, (at + index) << bits, &mut damage) => {
                            return (true, damage);
                        }
                        Ok(_) => {}
                        Err(error) => drop(damage.get_or_insert(error)),
                    }
                }
            }
            at += segment.count;
        }
        (false, damage)
    }

    /// A block of a directory, by its number within the directory.
    pub(super) fn directory_block(&self, inode: &Inode, number: u32) -> Result<Arc<[u8]>> {
        let at = u64::from(number);
        if at >= inode.size.div_ceil(self.superblock.block_len() as u64) {
            return Err(inode.corrupt("is a directory whose index references a block beyond its end"));
        }
        match MapWalk::new(self, inode).segment(at, 1)?.mapping {
            ExtMapping::Stored(block) => verified(inode, self.blocks.read(block)?),
            ExtMapping::Hole | ExtMapping::Unwritten => {
                Err(inode.corrupt("is a directory whose index references a hole"))
            }
        }
    }
}

/// The same block of a directory, if its checksum is correct or it has none.
fn verified(inode: &Inode, bytes: Arc<[u8]>) -> Result<Arc<[u8]>> {
    let Some(seed) = inode.seed else { return Ok(bytes) };
    // An index block that once held names may still end like one.
    let right = names_sum_is_right(seed, &bytes) || index_sum_is_right(seed, &bytes);
    if right { Ok(bytes) } else { Err(inode.corrupt("is a directory with a wrong checksum in a block")) }
}

/// The checksum of a block of names: it is stored in a nameless entry at the block's end.
fn names_sum_is_right(seed: u32, bytes: &[u8]) -> bool {
    let (names, tail) = bytes.split_at(bytes.len() - TAIL_LEN);
    let is_tail = le32(tail, 0) == 0 && le16(tail, 4) == TAIL_LEN as u16 && tail[6..8] == [0, TAIL_KIND];
    is_tail && crc32c(seed, names) == le32(tail, 8)
}

/// The checksum of an index block: it covers the entries in use and is stored after the space for all
/// entries.
fn index_sum_is_right(seed: u32, bytes: &[u8]) -> bool {
    let at = match record_len(bytes, 0, bytes.len()) {
        len if len == bytes.len() => 8,
        12 => 32,
        _ => return false,
    };
    let (limit, count) = (usize::from(le16(bytes, at)), usize::from(le16(bytes, at + 2)));
    let tail = at + limit * 8;
    if count > limit || tail + 8 > bytes.len() {
        return false;
    }
    let state = crc32c(seed, &bytes[..at + count * 8]);
    crc32c(crc32c(state, &bytes[tail..tail + 4]), &[0; 4]) == le32(bytes, tail + 4)
}

/// The length of the entry at `at`; the two lowest bits hold the high bits of lengths above 65,535.
fn record_len(bytes: &[u8], at: usize, block_len: usize) -> usize {
    let raw = usize::from(le16(bytes, at + 4));
    if block_len < 1 << 16 {
        return raw;
    }
    if raw == 0 || raw == 0xffff { block_len } else { raw & 0xfffc | (raw & 3) << 16 }
}

/// The entries in use of a block, or of inline data.
struct ExtEntries<'a> {
    bytes: &'a [u8],
    /// The byte of the directory at which `bytes` begin.
    start: u64,
    at: usize,
    typed: bool,
    /// Whether names are encrypted: they may then contain any byte, and have a minimum length.
    is_encrypted: bool,
    block_len: usize,
    damaged: bool,
}

impl<'a> ExtEntries<'a> {
    fn new(ext: &Ext, directory: &Inode, bytes: &'a [u8], start: u64) -> Self {
        let typed = ext.superblock.has(incompat::FILETYPE);
        let (is_encrypted, block_len) = (directory.is(flags::ENCRYPT), ext.superblock.block_len());
        Self { bytes, start, at: 0, typed, is_encrypted, block_len, damaged: false }
    }
}

impl<'a> Iterator for ExtEntries<'a> {
    type Item = ExtEntry<'a>;

    fn next(&mut self) -> Option<ExtEntry<'a>> {
        while self.at + HEADER_LEN <= self.bytes.len() {
            let at = self.at;
            let len = record_len(self.bytes, at, self.block_len);
            let name_len =
                if self.typed { self.bytes[at + 6].into() } else { usize::from(le16(self.bytes, at + 6)) };
            let ino = le32(self.bytes, at);
            if len < HEADER_LEN || !len.is_multiple_of(4) || at + len > self.bytes.len() {
                self.damaged = true;
                self.at = self.bytes.len();
                return None;
            }
            self.at += len;
            if ino == 0 {
                continue;
            }
            let record = &self.bytes[at + HEADER_LEN..at + len];
            let is_good = |name: &&[u8]| if self.is_encrypted { is_a_cipher(name) } else { is_a_name(name) };
            let tail = record.get(name_len.next_multiple_of(4)..).unwrap_or_default();
            let Some(name) = record.get(..name_len).filter(is_good) else {
                self.damaged = true;
                continue;
            };
            if name != b"." && name != b".." {
                let kind = if self.typed { kind_of_entry(self.bytes[at + 7]) } else { None };
                let (at, next) = (self.start + at as u64, self.start + self.at as u64);
                return Some(ExtEntry { name, tail, ino, kind, at, next, damaged: false });
            }
        }
        None
    }
}

/// Whether an encrypted directory may have such a name.
fn is_a_cipher(name: &[u8]) -> bool {
    (nokey::LEAST..=255).contains(&name.len()) || name == b"." || name == b".."
}

fn is_a_name(name: &[u8]) -> bool {
    !name.is_empty() && name.len() <= 255 && !name.iter().any(|byte| matches!(byte, 0 | b'/'))
}
