//! The flattened map: for every run of a frozen chain, the layer that holds it.
//!
//! The depth of a chain costs time only once. The first read of a block of guest space asks every layer. The
//! result is a short sorted list of extents in a bounded cache, and every later read of that block is one
//! lookup there, as for a chain of one layer. Only frozen layers are flattened: their answers never change.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache::Cache;
use crate::error::{ErrorKind, Result};
use crate::image::{Layer, Mapping};
use crate::units::{GuestOffset, HostOffset, Run, SECTOR_SIZE};

use super::extent::Extent;

/// Blocks of all flattened maps of a store: (map, number of the block).
pub type FlatCache = Cache<(u64, u64), Arc<FlatBlock>>;

/// Clusters in a block, so that one block needs one 4 KiB slice of each layer's L2 tables.
const BLOCK_CLUSTERS: u64 = 512;
const LEAST_SPAN: u64 = 1 << 20;
const MOST_SPAN: u64 = 64 << 20;

/// The mapping of an extent, packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PackedMapping {
    /// Data in a layer's file.
    Data,
    /// Zeroes, or unallocated in all layers.
    Zero,
    /// The layer has to be asked again: a compressed cluster, or a corrupt entry. Both need more than an
    /// extent holds, and cost far more than a second lookup.
    Ask,
}

/// A run within a block, packed: a store's working set has millions.
#[derive(Clone, Copy, Debug)]
struct PackedExtent {
    host: u64,
    /// First sector, relative to the block.
    start: u32,
    layer: u16,
    mapping: PackedMapping,
}

impl PackedExtent {
    /// The `len` bytes that begin `within` bytes into it.
    fn unpack(&self, within: u64, len: u64) -> Extent {
        let mapping = match self.mapping {
            PackedMapping::Data => Some(Mapping::Data(HostOffset(self.host + within))),
            PackedMapping::Zero => Some(Mapping::Zero(None)),
            PackedMapping::Ask => None,
        };
        Extent { layer: usize::from(self.layer), mapping, len }
    }
}

/// The extents of one block of guest space, in order, without gaps.
#[derive(Debug)]
pub struct FlatBlock {
    extents: Box<[PackedExtent]>,
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
    pub(super) fn walk(
        &self,
        at: u64,
        len: u64,
        mut each: impl FnMut(u64, Extent) -> Result<()>,
    ) -> Result<()> {
        let (mut at, end) = (at, at + len);
        while at < end {
            let number = at / self.span;
            let block = self.block(number)?;
            let origin = number * self.span;
            let mut index = block.find(((at - origin) / SECTOR_SIZE) as u32);
            while at < end && index < block.extents.len() {
                let packed = block.extents[index];
                let packed_start = origin + u64::from(packed.start) * SECTOR_SIZE;
                let packed_end = origin + u64::from(block.end_of(index)) * SECTOR_SIZE;
                let len = packed_end.min(end) - at;
                each(at, packed.unpack(at - packed_start, len))?;
                at += len;
                index += 1;
            }
        }
        Ok(())
    }

    /// The extent at `at`, at most to the end of its block.
    pub(super) fn lookup(&self, at: u64) -> Result<Extent> {
        let number = at / self.span;
        let block = self.block(number)?;
        let origin = number * self.span;
        let index = block.find(((at - origin) / SECTOR_SIZE) as u32);
        let packed = block.extents[index];
        let len = origin + u64::from(block.end_of(index)) * SECTOR_SIZE - at;
        Ok(packed.unpack(at - origin - u64::from(packed.start) * SECTOR_SIZE, len))
    }

    fn block(&self, number: u64) -> Result<Arc<FlatBlock>> {
        let key = (self.serial, number);
        if let Some(block) = self.cache.get(&key) {
            return Ok(block);
        }
        let block = Arc::new(self.flatten(number)?);
        self.cache.put(key, Arc::clone(&block), block.extents.len() * size_of::<PackedExtent>() + 96);
        Ok(block)
    }

    /// Asks the layers from the top down, each only for the ranges that are unallocated above.
    fn flatten(&self, number: u64) -> Result<FlatBlock> {
        let origin = number * self.span;
        // Saved VM state may end within a sector. No layer is asked about the bytes beyond: the answer,
        // "zero", would apply to the whole of that sector.
        let end = (origin + self.span).min(self.size);
        assert!(origin < end, "a block beyond the end of the disk");
        let mut found: Vec<(u64, PackedExtent)> = Vec::new();
        let mut unallocated = vec![(origin, end)];
        for (index, layer) in self.layers.iter().enumerate() {
            let mut still_silent: Vec<(u64, u64)> = Vec::new();
            let last = unallocated.last().map_or(origin, |(_, to)| *to);
            // One answer may cover many small unallocated ranges: a layer is asked for as long a run as it
            // can give.
            let mut answer = LayerAnswer { from: origin, to: origin, found: None };
            for (from, to) in unallocated {
                let mut at = from;
                while at < to {
                    if at >= answer.to {
                        answer = ask(layer, at, last - at)?;
                    }
                    let run = answer.to.min(to) - at;
                    match answer.found {
                        Some((mapping, host)) => {
                            let start = ((at - origin) / SECTOR_SIZE) as u32;
                            let host =
                                if mapping == PackedMapping::Data { host + (at - answer.from) } else { 0 };
                            found.push((at, PackedExtent { host, start, layer: index as u16, mapping }));
                        }
                        None => match still_silent.last_mut() {
                            Some((_, end)) if *end == at => *end += run,
                            _ => still_silent.push((at, at + run)),
                        },
                    }
                    at += run;
                }
            }
            unallocated = still_silent;
            if unallocated.is_empty() {
                break;
            }
        }
        // R1: an unallocated range is zero only after all layers have been asked.
        for (from, _) in unallocated {
            let start = ((from - origin) / SECTOR_SIZE) as u32;
            found.push((from, PackedExtent { host: 0, start, layer: 0, mapping: PackedMapping::Zero }));
        }
        found.sort_unstable_by_key(|(at, _)| *at);
        let mut extents: Vec<PackedExtent> = Vec::with_capacity(found.len());
        for (_, extent) in found {
            match extents.last() {
                Some(last) if joins(last, &extent) => {}
                _ => extents.push(extent),
            }
        }
        Ok(FlatBlock { extents: extents.into(), sector_count: (end - origin).div_ceil(SECTOR_SIZE) as u32 })
    }
}

impl FlatBlock {
    /// The index of the extent that holds `sector`.
    fn find(&self, sector: u32) -> usize {
        self.extents.partition_point(|extent| extent.start <= sector) - 1
    }

    fn end_of(&self, index: usize) -> u32 {
        self.extents.get(index + 1).map_or(self.sector_count, |next| next.start)
    }
}

/// One layer's answer for `[from, to)`: the mapping, and where its bytes begin; `None` if unallocated.
struct LayerAnswer {
    from: u64,
    to: u64,
    found: Option<(PackedMapping, u64)>,
}

fn ask(layer: &Layer, from: u64, max: u64) -> Result<LayerAnswer> {
    let (found, run) = match layer.map(GuestOffset(from), max) {
        Ok(Run { value: mapping, len }) => {
            let found = match mapping {
                Mapping::Data(host) => Some((PackedMapping::Data, host.0)),
                Mapping::Zero(_) => Some((PackedMapping::Zero, 0)),
                Mapping::Compressed(_) => Some((PackedMapping::Ask, 0)),
                Mapping::Hole => None,
            };
            (found, len)
        }
        // A bad entry is a property of the image and may be cached; a failed read may not.
        Err(error) if error.kind() == ErrorKind::Corrupt => {
            (Some((PackedMapping::Ask, 0)), layer.rest_of_cluster(GuestOffset(from), max))
        }
        Err(error) => return Err(error),
    };
    Ok(LayerAnswer { from, to: from + run, found })
}

/// Whether `next`, which follows `last` without a gap, continues it.
fn joins(last: &PackedExtent, next: &PackedExtent) -> bool {
    last.mapping == next.mapping
        && match last.mapping {
            PackedMapping::Zero => true,
            PackedMapping::Ask => last.layer == next.layer,
            PackedMapping::Data => {
                let run = u64::from(next.start - last.start) * SECTOR_SIZE;
                last.layer == next.layer && last.host + run == next.host
            }
        }
}
