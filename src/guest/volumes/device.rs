//! Block devices of a guest that are made of others: partitions, RAID sets, logical volumes.
//!
//! Promises:
//! - A device's segments lead down to the disks as far as its bytes lie there unchanged, however many devices
//!   lie between. Where they do not, its source computes them.
//! - Segments are bounded: a device with more of them than it may have is computed as a whole.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::sync::Arc;

use crate::error::Result;
use crate::guest::source::within;
use crate::guest::{Slice, Source};

use super::map::{ContainerPosition, DiskPosition, MappedSource, Stripes, VolumeMapping, VolumeSegment};

/// Segments and legs of all devices of a layout together, and of those that are shown. A fragmented group of
/// 10,000 volumes has fewer.
pub(super) const TOTAL_WEIGHT: usize = 1 << 17;
/// Segments and legs of one device.
const DEVICE_WEIGHT: usize = 1 << 15;

/// The disks of a guest, and the memory that maps of devices may still take.
pub(crate) struct DeviceDisks {
    disks: Arc<[Arc<dyn Source>]>,
    left: Cell<usize>,
}

/// A block device.
#[derive(Clone)]
pub(crate) struct Device {
    size: u64,
    segments: Arc<[VolumeSegment]>,
    source: Arc<dyn Source>,
}

impl DeviceDisks {
    pub(crate) fn new(disks: &[Arc<dyn Source>]) -> Self {
        Self { disks: disks.into(), left: Cell::new(TOTAL_WEIGHT) }
    }

    /// The disk with this number as a device.
    pub(crate) fn disk(&self, number: u32) -> Device {
        let source = Arc::clone(&self.disks[number as usize]);
        let (at, len) = (0, source.size());
        let place = VolumeMapping::Linear(DiskPosition { disk: number, offset: 0 });
        let segments = (len > 0).then_some(VolumeSegment { at, len, place });
        Device { size: len, segments: segments.into_iter().collect(), source }
    }
}

impl Device {
    /// Bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    /// Where they are: without gaps.
    pub(crate) fn segments(&self) -> &[VolumeSegment] {
        &self.segments
    }

    /// Its bytes.
    pub(crate) fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// A range of it, cut off at its end.
    pub(crate) fn range(&self, start: u64, len: u64, disks: &DeviceDisks) -> Self {
        let len = len.min(self.size.saturating_sub(start));
        if (start, len) == (0, self.size) {
            return self.clone();
        }
        let mut map = DeviceMap::new(disks);
        map.linear(self, start, len);
        map.finish(|| Arc::new(Slice::new(Arc::clone(&self.source), start, len)))
    }

    /// Devices one after the other.
    pub(crate) fn concatenated(parts: Vec<Self>, disks: &DeviceDisks) -> Self {
        if let [only] = &parts[..] {
            return only.clone();
        }
        let mut map = DeviceMap::new(disks);
        let (mut sources, mut end) = (Vec::new(), 0);
        for part in parts {
            map.linear(&part, 0, part.size);
            sources.push((end, Arc::clone(&part.source)));
            end += part.size;
        }
        map.finish(|| Arc::new(Concatenated { size: end, parts: sources }))
    }

    /// Stripes over legs, each a device and the offset of its first chunk. A leg without a device, and every
    /// range whose place is not known, is read from `computed`, which has the size of the whole.
    pub(crate) fn striped(
        stripes: &Stripes<StripeLeg>,
        size: u64,
        computed: Option<Arc<dyn Source>>,
        disks: &DeviceDisks,
    ) -> Self {
        let mut map = DeviceMap::new(disks);
        map.striped(stripes, size);
        map.finish(|| Arc::new(Striped { size, stripes: stripes.clone(), computed }))
    }

    /// The data of an opened container, by its number.
    pub(crate) fn encrypted(source: Arc<dyn Source>, container: u32, disks: &DeviceDisks) -> Self {
        let mut map = DeviceMap::new(disks);
        map.push(source.size(), VolumeMapping::Encrypted(ContainerPosition { container, offset: 0 }));
        map.finish(|| source)
    }
}

/// A leg of a striped device: a device, and where its first chunk begins; `None` if its bytes are computed.
pub(crate) type StripeLeg = Option<(Device, u64)>;

/// The map of a device while it is composed of ranges of others.
pub(crate) struct DeviceMap<'a> {
    disks: &'a DeviceDisks,
    segments: Vec<VolumeSegment>,
    end: u64,
    left: usize,
    /// It has too many segments, or impossible ones.
    is_opaque: bool,
}

impl<'a> DeviceMap<'a> {
    pub(crate) fn new(disks: &'a DeviceDisks) -> Self {
        let left = disks.left.get().min(DEVICE_WEIGHT);
        Self { disks, segments: Vec::new(), end: 0, left, is_opaque: false }
    }

    /// Whether no more segments fit: the whole device will be computed.
    pub(crate) fn is_full(&self) -> bool {
        self.is_opaque
    }

    /// Adds a range of a device; what is beyond its end is computed.
    pub(crate) fn linear(&mut self, device: &Device, offset: u64, len: u64) {
        let end = self.end.saturating_add(len);
        each_piece(&device.segments, offset, len, |piece| self.push(piece.len, piece.place));
        if self.end < end {
            self.computed(end - self.end);
        }
    }

    /// Adds zeroes.
    pub(crate) fn zero(&mut self, len: u64) {
        self.push(len, VolumeMapping::Zero);
    }

    /// Adds a range that the device's source produces.
    pub(crate) fn computed(&mut self, len: u64) {
        self.push(len, VolumeMapping::Computed);
    }

    /// Adds stripes. Where the mapping of a leg changes, a new segment begins, and a row in which it changes
    /// is mapped chunk by chunk.
    fn striped(&mut self, stripes: &Stripes<StripeLeg>, len: u64) {
        let row = stripes.row_of();
        if stripes.chunk_len == 0 || stripes.row_len == 0 || stripes.legs.is_empty() || stripes.start != 0 {
            return self.computed(len);
        }
        let rows = len.div_ceil(row);
        let Some(mut cuts) = self.cuts(stripes, rows) else { return self.computed(len) };
        if !len.is_multiple_of(row) {
            // The legs that the last row does not reach may lie beyond the ends of their devices.
            cuts.insert(rows - 1);
        }
        let mut cuts = cuts.into_iter().peekable();
        let end = self.end.saturating_add(len);
        while let Some(first) = cuts.next() {
            let count = cuts.peek().copied().unwrap_or(rows) - first;
            let here = (row.saturating_mul(count)).min(end - self.end);
            if here == 0 || self.is_opaque {
                break;
            }
            match same_rows(stripes, first, count) {
                Some(legs) => {
                    let (chunk_len, row_len) = (stripes.chunk_len, stripes.row_len);
                    let stripes = Stripes { chunk_len, row_len, start: 0, legs };
                    self.push(here, VolumeMapping::Striped(stripes));
                }
                None => self.chunks(stripes, first, here),
            }
        }
        if self.end < end {
            self.computed(end - self.end);
        }
    }

    /// The rows in which the mapping of a leg changes, and those after them; `None` if there are too many.
    fn cuts(&self, stripes: &Stripes<StripeLeg>, rows: u64) -> Option<BTreeSet<u64>> {
        let mut cuts = BTreeSet::from([0]);
        for (device, offset) in stripes.legs.iter().flatten() {
            let begins = device.segments.partition_point(|segment| segment.at <= *offset);
            for segment in &device.segments[begins..] {
                // The first row whose chunk ends after the segment's begin.
                let into = segment.at - offset;
                let row = into.saturating_sub(stripes.chunk_len - 1).div_ceil(stripes.row_len);
                if row >= rows {
                    break;
                }
                cuts.insert(row);
                if row.saturating_mul(stripes.row_len) < into && row + 1 < rows {
                    cuts.insert(row + 1);
                }
                if cuts.len() > self.left {
                    return None;
                }
            }
        }
        Some(cuts)
    }

    /// Adds `len` bytes of a row, and of those after it, chunk by chunk.
    fn chunks(&mut self, stripes: &Stripes<StripeLeg>, row: u64, len: u64) {
        let from = row.saturating_mul(stripes.row_of());
        let mut into = 0;
        while into < len && !self.is_opaque {
            let found = stripes.find(from.saturating_add(into));
            let here = found.map_or(len - into, |(_, _, rest)| rest.min(len - into));
            match found {
                Some((Some((device, offset)), leg_at, _)) => {
                    self.linear(device, offset.saturating_add(leg_at), here);
                }
                Some((None, _, _)) | None => self.computed(here),
            }
            into += here;
        }
    }

    fn push(&mut self, len: u64, place: VolumeMapping) {
        if len == 0 {
            return;
        }
        let at = self.end;
        self.end = self.end.saturating_add(len);
        if let Some(last) = self.segments.last_mut() {
            let is_next = match (&last.place, &place) {
                (VolumeMapping::Linear(before), VolumeMapping::Linear(after)) => {
                    before.disk == after.disk && before.offset.checked_add(last.len) == Some(after.offset)
                }
                (VolumeMapping::Encrypted(before), VolumeMapping::Encrypted(after)) => {
                    before.container == after.container
                        && before.offset.checked_add(last.len) == Some(after.offset)
                }
                (VolumeMapping::Zero, VolumeMapping::Zero)
                | (VolumeMapping::Computed, VolumeMapping::Computed) => true,
                _ => false,
            };
            if is_next {
                last.len = last.len.saturating_add(len);
                return;
            }
        }
        let segment = VolumeSegment { at, len, place };
        if let Some(left) = self.left.checked_sub(segment.weight()) {
            self.left = left;
            self.segments.push(segment);
        } else {
            self.is_opaque = true;
            self.segments = Vec::new();
            self.left = 0;
        }
    }

    /// The device. `computed` produces all of its bytes; it is called if some of them have no place.
    pub(crate) fn finish(self, computed: impl FnOnce() -> Arc<dyn Source>) -> Device {
        let (size, len) = (self.end, self.end);
        let segments = if self.is_opaque {
            vec![VolumeSegment { at: 0, len, place: VolumeMapping::Computed }]
        } else {
            self.segments
        };
        let weight: usize = segments.iter().map(VolumeSegment::weight).sum();
        self.disks.left.set(self.disks.left.get().saturating_sub(weight));
        let is_computed = |segment: &VolumeSegment| match &segment.place {
            VolumeMapping::Linear(_) | VolumeMapping::Zero => false,
            VolumeMapping::Striped(stripes) => stripes.legs.contains(&None),
            VolumeMapping::Encrypted(_) | VolumeMapping::Computed => true,
        };
        let computed = segments.iter().any(is_computed).then(computed);
        let segments: Arc<[VolumeSegment]> = segments.into();
        let disks = Arc::clone(&self.disks.disks);
        let source = MappedSource { size, segments: Arc::clone(&segments), disks, computed };
        Device { size, segments, source: Arc::new(source) }
    }
}

/// The legs of `count` rows from `first` on, if each leg is contiguous on one disk or wholly computed; `None`
/// for a single row in which the mapping of a leg changes.
fn same_rows(stripes: &Stripes<StripeLeg>, first: u64, count: u64) -> Option<Vec<Option<DiskPosition>>> {
    let leg = |leg: &StripeLeg| {
        let Some((device, offset)) = leg else { return Some(None) };
        let from = offset.checked_add(first.checked_mul(stripes.row_len)?)?;
        let len = (count - 1).checked_mul(stripes.row_len)?.checked_add(stripes.chunk_len)?;
        let index = device.segments.partition_point(|segment| segment.at <= from).checked_sub(1);
        let segment = index.and_then(|index| device.segments.get(index));
        match segment {
            Some(segment) if segment.end() >= from.saturating_add(len) => match &segment.place {
                VolumeMapping::Linear(leg) => leg.plus(from - segment.at).map(Some),
                _ if count == 1 => None,
                // Stripes of stripes.
                _ => Some(None),
            },
            _ if count == 1 => None,
            _ => Some(None),
        }
    };
    stripes.legs.iter().map(leg).collect()
}

/// Calls `each` with the pieces of `len` bytes from `start` on, at offsets from 0 on.
fn each_piece(segments: &[VolumeSegment], start: u64, len: u64, mut each: impl FnMut(VolumeSegment)) {
    let end = start.saturating_add(len);
    for segment in &segments[segments.partition_point(|segment| segment.end() <= start)..] {
        if segment.at >= end {
            break;
        }
        let (first, last) = (segment.at.max(start), segment.end().min(end));
        let piece = segment.cut(first - segment.at, last - first, first - start);
        let (at, len, place) = (first - start, last - first, VolumeMapping::Computed);
        each(piece.unwrap_or(VolumeSegment { at, len, place }));
    }
}

/// Sources one after the other, each with the offset of its first byte.
struct Concatenated {
    size: u64,
    parts: Vec<(u64, Arc<dyn Source>)>,
}

impl Source for Concatenated {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, at, buf.len())?;
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let index = self.parts.partition_point(|(begin, _)| *begin <= at).saturating_sub(1);
            let (begin, part) = &self.parts[index];
            let left = (part.size() - (at - begin)).min(rest.len() as u64) as usize;
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(left);
            part.read_at(at - begin, piece)?;
            at += left as u64;
            rest = more;
        }
        Ok(())
    }
}

/// A striped device's bytes.
struct Striped {
    size: u64,
    stripes: Stripes<StripeLeg>,
    computed: Option<Arc<dyn Source>>,
}

impl Source for Striped {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, at: u64, buf: &mut [u8]) -> Result<()> {
        within(self.size, at, buf.len())?;
        let (mut at, mut rest) = (at, buf);
        while !rest.is_empty() {
            let found = self.stripes.find(at);
            let len = found.map_or(rest.len(), |(_, _, left)| left.min(rest.len() as u64) as usize);
            let (piece, more) = std::mem::take(&mut rest).split_at_mut(len);
            match (found, &self.computed) {
                (Some((Some((device, offset)), leg_at, _)), _) => {
                    device.source.read_at(offset.saturating_add(leg_at), piece)?;
                }
                (_, Some(computed)) => computed.read_at(at, piece)?,
                (_, None) => within(0, at, piece.len())?,
            }
            at += len as u64;
            rest = more;
        }
        Ok(())
    }
}

#[cfg(test)]
impl DeviceDisks {
    /// A device of these segments.
    pub(crate) fn device(&self, segments: &[VolumeSegment]) -> Device {
        let mut map = DeviceMap::new(self);
        for segment in segments {
            map.push(segment.len, segment.place.clone());
        }
        map.finish(|| Arc::new(Vec::new()))
    }
}
