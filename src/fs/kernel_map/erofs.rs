//! An EROFS image with one file whose bytes lie in other files: a table of chunks, each at a place of a
//! device, or nowhere. Pure bytes. Source: the kernel's Documentation/filesystems/erofs.rst and
//! `fs/erofs/erofs_fs.h` (Linux 6.12), in little-endian order.
//!
//! | from byte | what |
//! |---|---|
//! | 1,024 | the superblock |
//! | 1,152 | a slot of 128 bytes for each device |
//! | the next block | the inode of the root, and its directory in a block of its own |
//! | 64 before the table | the inode of the file |
//! | the table | 8 bytes for each chunk |
//! | the next chunk | further data, of device 0 |
//!
//! The image's own bytes are device 0, the others are counted from 1. The table begins behind the first
//! chunk's length. Once the file is open, nothing before the table is read again: the beginning can be
//! zeroed. From then on an entry of zeroes, as a hole of the table has it, is a chunk of zeroes.

/// The name of the file.
pub(super) const FILE_NAME: &str = "disk";
/// The place of a chunk that is nowhere.
pub(super) const NOWHERE: u32 = u32::MAX;
/// Bytes of a chunk's entry.
pub(super) const ENTRY_LEN: u64 = 8;
/// Bytes of a page, by which the table is aligned.
pub(super) const PAGE: u64 = 4096;
/// The largest block: a page of the smallest kind.
pub(super) const MAX_BLOCK_BITS: u32 = 12;
/// The smallest one: a sector.
pub(super) const MIN_BLOCK_BITS: u32 = 9;

const SUPERBLOCK_AT: usize = 1024;
const SLOT_LEN: usize = 128;
const MAGIC: u32 = 0xE0F5_E1E2;
/// `INCOMPAT_CHUNKED_FILE` and `INCOMPAT_DEVICE_TABLE`.
const FEATURES: u32 = 0x4 | 0x8;
/// Bytes of an extended inode, and the unit in which inodes are numbered.
const INODE_LEN: usize = 64;
const INODE_UNIT: usize = 32;
/// `i_format` of an extended inode: with data in blocks, or in chunks.
const PLAIN: u16 = 1;
const CHUNKED: u16 = 1 | 4 << 1;
/// Entries of the table have a device (`EROFS_CHUNK_FORMAT_INDEXES`).
const INDEXES: u32 = 0x20;
/// File types in a directory.
const REGULAR: u8 = 1;
const DIRECTORY: u8 = 2;

/// An image: how it is divided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Geometry {
    /// Bytes of the file.
    pub(super) size: u64,
    /// A block's length as a power of two: the unit of places.
    pub(super) block_bits: u32,
    /// A chunk's length as a power of two.
    pub(super) chunk_bits: u32,
    /// The number of further files.
    pub(super) devices: usize,
}

impl Geometry {
    /// The number of chunks.
    pub(super) fn chunks(&self) -> u64 {
        self.size.div_ceil(self.chunk())
    }

    /// Bytes of a chunk.
    pub(super) fn chunk(&self) -> u64 {
        1 << self.chunk_bits
    }

    /// Bytes of a block.
    pub(super) fn block(&self) -> u64 {
        1 << self.block_bits
    }

    /// Where the table begins: with a page, behind a chunk.
    pub(super) fn table_at(&self) -> u64 {
        let head = self.directory_at() as u64 + self.block();
        head.max(self.chunk()).next_multiple_of(PAGE) + PAGE
    }

    /// Bytes of the table.
    pub(super) fn table_len(&self) -> u64 {
        self.chunks() * ENTRY_LEN
    }

    /// Where further chunks can be, as data of the image itself.
    pub(super) fn data_at(&self) -> u64 {
        (self.table_at() + self.table_len()).next_multiple_of(self.chunk().max(PAGE))
    }

    /// The root's directory takes one block, and its inode lies in the block before.
    fn directory_at(&self) -> usize {
        let slots = SUPERBLOCK_AT + SLOT_LEN * (1 + self.devices);
        slots.next_multiple_of(self.block() as usize) + self.block() as usize
    }

    /// All that comes before the table. `len`: the bytes of the whole image.
    pub(super) fn head(&self, len: u64) -> Vec<u8> {
        let table = self.table_at() as usize;
        let directory = self.directory_at();
        let root = directory - self.block() as usize;
        let file = table - INODE_LEN;
        let mut head = vec![0; table];
        self.put_superblock(&mut head, (root / INODE_UNIT) as u16, len);
        for device in 0..self.devices {
            let slot = SUPERBLOCK_AT + SLOT_LEN * (1 + device);
            // The tag: the kernel only wants one. Blocks are counted in one space for all devices if they
            // have a place in it, and these have none.
            head[slot] = b'd';
            put32(&mut head, slot + 64, NOWHERE - 1);
        }
        let names = [(".", root, DIRECTORY), ("..", root, DIRECTORY), (FILE_NAME, file, REGULAR)];
        let len = put_directory(&mut head[directory..directory + self.block() as usize], &names);
        let place = (directory >> self.block_bits) as u32;
        put_inode(&mut head[root..], PLAIN, 0o040_555, len as u64, place, 1);
        let chunks = (self.chunk_bits - self.block_bits) | INDEXES;
        put_inode(&mut head[file..], CHUNKED, 0o100_444, self.size, chunks, 2);
        head
    }

    fn put_superblock(&self, head: &mut [u8], root: u16, len: u64) {
        let at = SUPERBLOCK_AT;
        put32(head, at, MAGIC);
        head[at + 12] = self.block_bits as u8;
        put16(head, at + 14, root);
        put64(head, at + 16, 2); // inodes
        put32(head, at + 36, (len >> self.block_bits) as u32);
        head[at + 64..at + 71].copy_from_slice(b"chainfs");
        put32(head, at + 80, FEATURES);
        put16(head, at + 86, self.devices as u16);
        // The slots follow the superblock, which is as long as one.
        put16(head, at + 88, (SUPERBLOCK_AT / SLOT_LEN + 1) as u16);
    }
}

/// An entry of the table: block `block` of device `device`. It is written in little-endian order.
pub(super) fn entry(device: u16, block: u32) -> u64 {
    u64::from(block) << 32 | u64::from(device) << 16
}

/// The device and the block of an entry.
pub(super) fn parts(entry: u64) -> (u16, u32) {
    ((entry >> 16) as u16, (entry >> 32) as u32)
}

/// Writes a directory's entries, which are in order; returns its length.
fn put_directory(block: &mut [u8], entries: &[(&str, usize, u8)]) -> usize {
    const DIRENT_LEN: usize = 12;
    let mut name_at = DIRENT_LEN * entries.len();
    for (index, (name, inode, kind)) in entries.iter().enumerate() {
        let at = DIRENT_LEN * index;
        put64(block, at, (inode / INODE_UNIT) as u64);
        put16(block, at + 8, name_at as u16);
        block[at + 10] = *kind;
        block[name_at..name_at + name.len()].copy_from_slice(name.as_bytes());
        name_at += name.len();
    }
    name_at
}

fn put_inode(at: &mut [u8], format: u16, mode: u16, size: u64, place: u32, number: u32) {
    put16(at, 0, format);
    put16(at, 4, mode);
    put64(at, 8, size);
    put32(at, 16, place);
    put32(at, 20, number);
    put32(at, 44, if format == PLAIN { 2 } else { 1 }); // links
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}
