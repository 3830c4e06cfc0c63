//! Thin pools (dm-thin): which blocks of a pool a volume has.
//!
//! The metadata's superblock leads to a tree with the root of each volume's own tree, which maps the volume's
//! blocks to the pool's. Blocks that several volumes share are in all of their trees. Blocks without an entry
//! were never written.
//!
//! Promise: a volume's map takes bounded memory and time. The blocks of a large one beyond that are looked up
//! when they are read.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, ErrorKind, Result};
use crate::guest::Source;
use crate::guest::bytes::{le32, le64};
use crate::guest::source::within;
use crate::guest::volumes::{Device, DeviceDisks, DeviceMap};

use super::btree::{BLOCK_LEN, BlockKind, MetadataBlocks};

const MAGIC: u64 = 27_022_010;
const SECTOR: u64 = 512;
/// The time of a mapping is in its low bits.
const TIME_BITS: u32 = 24;
/// Mapped blocks of a pool's volumes that are listed; the rest is looked up.
const LISTED_LIMIT: usize = 1 << 20;

/// A pool.
pub(super) struct ThinPool {
    blocks: MetadataBlocks,
    data: Device,
    block_len: u64,
    /// The root of the tree of volumes.
    root: u64,
    /// Blocks that may still be listed.
    left: AtomicUsize,
}

impl ThinPool {
    /// Opens a pool with blocks of `block_len` bytes.
    pub(super) fn open(
        metadata: &Arc<dyn Source>,
        data: Device,
        block_len: u64,
    ) -> std::result::Result<Self, String> {
        let blocks = MetadataBlocks::new(metadata);
        let mut head = vec![0; BLOCK_LEN as usize];
        let says = |error: Error| format!("its pool's metadata: {error}");
        metadata.read_at(0, &mut head).map_err(says)?;
        if le64(&head, 32) != MAGIC {
            return Err("its pool's metadata have no superblock".to_owned());
        }
        let superblock = blocks.read(0, BlockKind::ThinSuperblock, 8).map_err(says)?;
        let version = le32(&superblock, 40);
        if !(1..=2).contains(&version) {
            return Err(format!("its pool's metadata have the unknown version {version}"));
        }
        if block_len == 0 || u64::from(le32(&superblock, 336)) * SECTOR != block_len {
            return Err("its pool's metadata have another block length".to_owned());
        }
        Ok(Self {
            blocks,
            data,
            block_len,
            root: le64(&superblock, 320),
            left: AtomicUsize::new(LISTED_LIMIT),
        })
    }

    /// The volume with this number, of `size` bytes. Blocks that it does not have are those of `origin`, or
    /// zeroes.
    pub(super) fn device(
        self: &Arc<Self>,
        number: u64,
        size: u64,
        origin: Option<&Device>,
        disks: &DeviceDisks,
    ) -> std::result::Result<Device, String> {
        let says = |error: Error| format!("its pool's metadata: {error}");
        let root = self.blocks.lookup(self.root, number).map_err(says)?;
        let root = root.ok_or_else(|| format!("its pool has no volume with the number {number}"))?;
        let mut map = DeviceMap::new(disks);
        let (mut end, mut left) = (0, self.left.load(Ordering::Relaxed));
        let unmapped = |map: &mut DeviceMap<'_>, from: u64, to: u64| {
            let of_origin = origin.map_or(0, |origin| origin.size().saturating_sub(from).min(to - from));
            if let Some(origin) = origin {
                map.linear(origin, from, of_origin);
            }
            map.zero(to - from - of_origin);
        };
        let walked = self.blocks.walk(root, &mut |block, mapping| {
            let at = block.saturating_mul(self.block_len);
            if at >= size || map.is_full() || left == 0 {
                return false;
            }
            left -= 1;
            unmapped(&mut map, end, at);
            let len = self.block_len.min(size - at);
            map.linear(&self.data, (mapping >> TIME_BITS).saturating_mul(self.block_len), len);
            end = at + len;
            true
        });
        // What is left is unmapped, or looked up when it is read: also what lies behind damage.
        self.left.store(left, Ordering::Relaxed);
        if walked.is_ok() && left > 0 {
            unmapped(&mut map, end, size);
        } else {
            map.computed(size - end);
        }
        let origin = origin.map(|origin| Arc::clone(origin.source()));
        Ok(map.finish(|| Arc::new(ThinVolume { pool: Arc::clone(self), root, size, origin })))
    }
}

/// A volume of a pool, by lookup.
struct ThinVolume {
    pool: Arc<ThinPool>,
    /// The root of its own tree.
    root: u64,
    size: u64,
    origin: Option<Arc<dyn Source>>,
}

impl ThinVolume {
    /// Fills `buf` with bytes of one block that has no entry.
    fn read_unmapped(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        let Some(origin) = &self.origin else {
            buf.fill(0);
            return Ok(());
        };
        let len = origin.size().saturating_sub(at).min(buf.len() as u64) as usize;
        let (piece, rest) = buf.split_at_mut(len);
        rest.fill(0);
        if piece.is_empty() { Ok(()) } else { origin.read_at(at, piece) }
    }
}

impl Source for ThinVolume {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, at, buf.len())?;
        let ThinPool { blocks, data, block_len, .. } = &*self.pool;
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let (block, into) = (at / block_len, at % block_len);
            let len = (block_len - into).min(rest.len() as u64) as usize;
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(len);
            match blocks.lookup(self.root, block)? {
                Some(mapping) => {
                    let place = (mapping >> TIME_BITS).checked_mul(*block_len);
                    let place = place.and_then(|place| place.checked_add(into));
                    let beyond = || Error::new(ErrorKind::Corrupt, "a block lies beyond the end of its pool");
                    data.source().read_at(place.ok_or_else(beyond)?, piece)?;
                }
                None => self.read_unmapped(at, piece)?,
            }
            at += len as u64;
            rest = more;
        }
        Ok(())
    }
}
