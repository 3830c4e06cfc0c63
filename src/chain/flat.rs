//! The flattened map: for every piece of a frozen chain, the layer that speaks for it.
//!
//! Depth is paid for once. The first read of a block of guest space asks every layer; what
//! comes out is a short sorted list of extents, kept in a bounded cache, and every later read of
//! that block is one look into it, as for a chain of one layer. Only frozen layers are
//! flattened: their answers never change.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache::Cache;
use crate::error::{ErrorKind, Result};
use crate::image::{Layer, Mapping};
use crate::units::{GuestOffset, HostOffset, SECTOR_SIZE};

/// Blocks of all flattened maps of a store: (map, number of the block).
pub type FlatCache = Cache<(u64, u64), Arc<Block>>;

/// Clusters in a block, so that one block needs one 4 KiB slice of each layer's L2 tables.
const BLOCK_CLUSTERS: u64 = 512;
const LEAST_SPAN: u64 = 1 << 20;
const MOST_SPAN: u64 = 64 << 20;

/// What speaks for an extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Data in a layer's file.
    Data,
    /// Zeroes, or nothing in any layer.
    Zero,
    /// To be asked of the layer again: a compressed cluster, or an entry that is corrupt. Both
    /// need more than an extent holds, and cost far more than a second look.
    Ask,
}

/// A run within a block, packed: a store's working set has millions.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    host: u64,
    /// First sector, relative to the block.
    start: u32,
    layer: u16,
    pub(super) kind: Kind,
}

/// The extents of one block of guest space, in order, without gaps.
#[derive(Debug)]
pub struct Block {
    pieces: Box<[Piece]>,
    sector_count: u32,
}

/// A frozen chain, flattened as it is read.
#[derive(Debug)]
pub struct FlatMap {
    serial: u64,
    layers: Arc<[Layer]>,
    size: u64,
    span: u64,
    cache: Arc<FlatCache>,
}

/// An answer of the map: a layer (by index from the top) and where in its file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Flat {
    pub(super) kind: Kind,
    pub(super) layer: usize,
    pub(super) host: HostOffset,
    pub(super) len: u64,
}

impl FlatMap {
    /// A map of `layers`, top first, for the first `size` bytes.
    pub fn new(layers: Arc<[Layer]>, size: u64, cache: &Arc<FlatCache>) -> Arc<Self> {
        static SERIAL: AtomicU64 = AtomicU64::new(0);
        let cluster = layers.iter().filter_map(Layer::cluster_size).min().unwrap_or(1 << 16);
        Arc::new(Self {
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            layers,
            size,
            span: (cluster * BLOCK_CLUSTERS).clamp(LEAST_SPAN, MOST_SPAN),
            cache: Arc::clone(cache),
        })
    }

    /// The layers, top first.
    pub fn layers(&self) -> &Arc<[Layer]> {
        &self.layers
    }

    /// Calls `each` with the extents of `[at, at + len)`, in order, until it returns an error.
    pub(super) fn walk(&self, at: u64, len: u64, mut each: impl FnMut(u64, Flat) -> Result<()>) -> Result<()> {
        let (mut at, end) = (at, at + len);
        while at < end {
            let number = at / self.span;
            let block = self.block(number)?;
            let origin = number * self.span;
            let mut index = block.find(((at - origin) / SECTOR_SIZE) as u32);
            while at < end && index < block.pieces.len() {
                let piece = block.pieces[index];
                let piece_start = origin + u64::from(piece.start) * SECTOR_SIZE;
                let piece_end = origin + u64::from(block.end_of(index)) * SECTOR_SIZE;
                let len = piece_end.min(end) - at;
                let host = HostOffset(piece.host + (at - piece_start));
                each(at, Flat { kind: piece.kind, layer: usize::from(piece.layer), host, len })?;
                at += len;
                index += 1;
            }
        }
        Ok(())
    }

    /// The extent at `at`, at most to the end of its block.
    pub(super) fn lookup(&self, at: u64) -> Result<Flat> {
        let number = at / self.span;
        let block = self.block(number)?;
        let origin = number * self.span;
        let index = block.find(((at - origin) / SECTOR_SIZE) as u32);
        let piece = block.pieces[index];
        let host = HostOffset(piece.host + (at - origin - u64::from(piece.start) * SECTOR_SIZE));
        let len = origin + u64::from(block.end_of(index)) * SECTOR_SIZE - at;
        Ok(Flat { kind: piece.kind, layer: usize::from(piece.layer), host, len })
    }

    fn block(&self, number: u64) -> Result<Arc<Block>> {
        let key = (self.serial, number);
        if let Some(block) = self.cache.get(&key) {
            return Ok(block);
        }
        let block = Arc::new(self.flatten(number)?);
        self.cache.put(key, Arc::clone(&block), block.pieces.len() * size_of::<Piece>() + 96);
        Ok(block)
    }

    /// Asks the layers from the top down, each only about what those above are silent on.
    fn flatten(&self, number: u64) -> Result<Block> {
        let origin = number * self.span;
        // Saved VM state may end within a sector. No layer is asked about what is beyond: the
        // answer, "zero", would be for the whole of that sector.
        let end = (origin + self.span).min(self.size);
        assert!(origin < end, "a block beyond the end of the disk");
        let mut found: Vec<(u64, u64, Piece)> = Vec::new();
        let mut silent = vec![(origin, end)];
        for (index, layer) in self.layers.iter().enumerate() {
            let mut still_silent: Vec<(u64, u64)> = Vec::new();
            let last = silent.last().map_or(origin, |(_, to)| *to);
            // One answer may serve many small silences: a layer is asked as far as it will tell.
            let mut answer = Answer { from: origin, to: origin, found: None };
            for (from, to) in silent {
                let mut at = from;
                while at < to {
                    if at >= answer.to {
                        answer = ask(layer, at, last - at)?;
                    }
                    let run = answer.to.min(to) - at;
                    match answer.found {
                        Some((kind, host)) => {
                            let start = ((at - origin) / SECTOR_SIZE) as u32;
                            let host = if kind == Kind::Data { host + (at - answer.from) } else { 0 };
                            found.push((at, run, Piece { host, start, layer: index as u16, kind }));
                        }
                        None => match still_silent.last_mut() {
                            Some((_, end)) if *end == at => *end += run,
                            _ => still_silent.push((at, at + run)),
                        },
                    }
                    at += run;
                }
            }
            silent = still_silent;
            if silent.is_empty() {
                break;
            }
        }
        // R1: what all layers are silent on is zero, and only that.
        for (from, to) in silent {
            let start = ((from - origin) / SECTOR_SIZE) as u32;
            found.push((from, to - from, Piece { host: 0, start, layer: 0, kind: Kind::Zero }));
        }
        found.sort_unstable_by_key(|(at, ..)| *at);
        let mut pieces: Vec<Piece> = Vec::with_capacity(found.len());
        for (_, _, piece) in found {
            match pieces.last() {
                Some(last) if joins(last, &piece) => {}
                _ => pieces.push(piece),
            }
        }
        Ok(Block { pieces: pieces.into(), sector_count: (end - origin).div_ceil(SECTOR_SIZE) as u32 })
    }
}

impl Block {
    /// The index of the piece that holds `sector`.
    fn find(&self, sector: u32) -> usize {
        self.pieces.partition_point(|piece| piece.start <= sector) - 1
    }

    fn end_of(&self, index: usize) -> u32 {
        self.pieces.get(index + 1).map_or(self.sector_count, |next| next.start)
    }
}

/// One layer's answer for `[from, to)`: what speaks, and where its bytes begin; `None` if it is silent.
struct Answer {
    from: u64,
    to: u64,
    found: Option<(Kind, u64)>,
}

fn ask(layer: &Layer, from: u64, max: u64) -> Result<Answer> {
    let (found, run) = match layer.map(GuestOffset(from), max) {
        Ok((Mapping::Data(host), run)) => (Some((Kind::Data, host.0)), run),
        Ok((Mapping::Zero(_), run)) => (Some((Kind::Zero, 0)), run),
        Ok((Mapping::Compressed(_), run)) => (Some((Kind::Ask, 0)), run),
        Ok((Mapping::Hole, run)) => (None, run),
        // A bad entry is a fact about the image and may be remembered; a failed read is not.
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            (Some((Kind::Ask, 0)), layer.rest_of_cluster(GuestOffset(from), max))
        }
        Err(error) => return Err(error),
    };
    Ok(Answer { from, to: from + run, found })
}

/// Whether `next`, which follows `last` without a gap, only goes on with it.
fn joins(last: &Piece, next: &Piece) -> bool {
    last.kind == next.kind
        && match last.kind {
            Kind::Zero => true,
            Kind::Ask => last.layer == next.layer,
            Kind::Data => {
                let run = u64::from(next.start - last.start) * SECTOR_SIZE;
                last.layer == next.layer && last.host + run == next.host
            }
        }
}
