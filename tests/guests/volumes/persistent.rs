//! Metadata of thin pools, caches and snapshots, written from the formats' descriptions: small ones, to be
//! damaged. `kernel` compares those that the kernel makes.

use super::damage::crc;

const BLOCK: usize = 4096;
/// Bytes of the blocks of the model's pool and cache.
pub(super) const DATA_BLOCK: u64 = 64 << 10;

/// What checksums are mixed with, by the kind of a block.
const NODE: u32 = 121_107;
const ARRAY: u32 = 595_846_735;
const THIN: u32 = 160_774;
const CACHE: u32 = 9_031_977;

fn put32(block: &mut [u8], at: usize, value: u32) {
    block[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put64(block: &mut [u8], at: usize, value: u64) {
    block[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// Gives each block the checksum of what it is; those of other kinds stay.
pub(super) fn seal(blocks: &mut [u8], kinds: &[u32]) {
    for (block, kind) in blocks.chunks_exact_mut(BLOCK).zip(kinds) {
        let sum = crc(0x82f6_3b78, !0, &block[4..]) ^ kind;
        put32(block, 0, sum);
    }
}

/// The kinds of [`thin`]'s and [`cache`]'s blocks.
pub(super) const THIN_KINDS: [u32; 6] = [THIN, NODE, NODE, NODE, NODE, NODE];
pub(super) const CACHE_KINDS: [u32; 5] = [CACHE, NODE, ARRAY, NODE, ARRAY];

fn node(number: u64, is_leaf: bool, entries: &[(u64, u64)], value_len: usize) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    let most = (BLOCK - 32) / (8 + value_len);
    put32(&mut block, 4, if is_leaf { 2 } else { 1 });
    put64(&mut block, 8, number);
    put32(&mut block, 16, entries.len() as u32);
    put32(&mut block, 20, most as u32);
    put32(&mut block, 24, value_len as u32);
    for (index, (key, value)) in entries.iter().enumerate() {
        put64(&mut block, 32 + 8 * index, *key);
        put64(&mut block, 32 + 8 * most + value_len * index, *value);
    }
    block
}

fn superblock(magic: u64, version: u32) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    put64(&mut block, 32, magic);
    put32(&mut block, 40, version);
    block
}

/// A pool with the volumes 1 (of two leaves) and 2.
pub(super) fn thin() -> Vec<u8> {
    let mut head = superblock(27_022_010, 2);
    put64(&mut head, 320, 1);
    put32(&mut head, 336, (DATA_BLOCK / 512) as u32);
    let mapped = |pairs: &[(u64, u64)]| -> Vec<(u64, u64)> {
        pairs.iter().map(|(block, place)| (*block, place << 24 | 5)).collect()
    };
    let mut all = head;
    all.extend(node(1, true, &[(1, 2), (2, 5)], 8));
    all.extend(node(2, false, &[(0, 3), (4, 4)], 8));
    all.extend(node(3, true, &mapped(&[(0, 1), (1, 2), (3, 0)]), 8));
    all.extend(node(4, true, &mapped(&[(4, 3), (7, 2)]), 8));
    all.extend(node(5, true, &mapped(&[(1, 2), (2, 3)]), 8));
    seal(&mut all, &THIN_KINDS);
    all
}

fn array(number: u64, values: &[u64]) -> Vec<u8> {
    let mut block = vec![0; BLOCK];
    put32(&mut block, 4, ((BLOCK - 24) / 8) as u32);
    put32(&mut block, 8, values.len() as u32);
    put32(&mut block, 12, 8);
    put64(&mut block, 16, number);
    for (index, value) in values.iter().enumerate() {
        put64(&mut block, 24 + 8 * index, *value);
    }
    block
}

/// A cache of three blocks, shut down with the first and the last of them dirty.
pub(super) fn cache() -> Vec<u8> {
    let mut head = superblock(1_623_043, 2);
    put32(&mut head, 4, 1);
    put64(&mut head, 192, 1);
    put32(&mut head, 232, (DATA_BLOCK / 512) as u32);
    put32(&mut head, 240, 3);
    put64(&mut head, 284, 3);
    let mut all = head;
    all.extend(node(1, true, &[(0, 2)], 8));
    all.extend(array(2, &[3 << 16 | 1, 1, 2 << 16 | 1]));
    all.extend(node(3, true, &[(0, 4)], 8));
    all.extend(array(4, &[0b101]));
    seal(&mut all, &CACHE_KINDS);
    all
}

/// A store of a snapshot with chunks of 4 KiB and two exceptions.
pub(super) fn snapshot() -> Vec<u8> {
    let mut all = vec![0; 2 * BLOCK];
    for (at, value) in [(0, 0x7041_6e53), (4, 1), (8, 1), (12, 8)] {
        put32(&mut all, at, value);
    }
    for (index, (chunk, place)) in [(3, 2), (9, 3)].into_iter().enumerate() {
        put64(&mut all, BLOCK + 16 * index, chunk);
        put64(&mut all, BLOCK + 16 * index + 8, place);
    }
    all
}
