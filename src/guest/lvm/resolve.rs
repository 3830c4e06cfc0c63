//! Maps the segments of a logical volume to positions on disks.
//!
//! Volumes can consist of other volumes (such as the images of a mirror). Each is resolved once. A loop, or
//! more segments than [`SEGMENT_LIMIT`], is an error of the affected volumes.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::guest::Source;
use crate::guest::bytes::{le32, le64};
use crate::guest::volumes::{DiskPosition, VolumeMapping, VolumeSegment, locate};

use super::group::{Area, GroupMember, LvmSegment as Extents, MirrorImage, SegmentType, VolumeGroup};
use super::label::LvmId;

/// Segments and legs of all volumes of a group together. A fragmented group of 10,000 volumes has fewer.
const SEGMENT_LIMIT: usize = 1 << 17;
/// Nesting of volumes: a mirror's images on integrity-protected volumes are three deep.
const DEPTH_LIMIT: u32 = 8;

/// The position of a physical volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Present {
    pub(super) disk: u32,
    pub(super) start: u64,
    pub(super) len: u64,
}

/// The segments of a volume, or the reason why they are unknown.
type Resolved = Result<Arc<Vec<VolumeSegment>>, String>;

pub(super) struct Resolver<'a> {
    pub(super) group: &'a VolumeGroup,
    pub(super) present: &'a BTreeMap<LvmId, Present>,
    pub(super) disks: &'a [Arc<dyn Source>],
    known: BTreeMap<String, Resolved>,
    left: usize,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(
        group: &'a VolumeGroup,
        present: &'a BTreeMap<LvmId, Present>,
        disks: &'a [Arc<dyn Source>],
    ) -> Self {
        Self { group, present, disks, known: BTreeMap::new(), left: SEGMENT_LIMIT }
    }

    /// Resolves a logical volume.
    pub(super) fn volume(&mut self, name: &str) -> Resolved {
        self.logical(name, 0)
    }

    fn logical(&mut self, name: &str, depth: u32) -> Resolved {
        if let Some(known) = self.known.get(name) {
            return known.clone();
        }
        if depth > DEPTH_LIMIT {
            return Err("its volumes are nested too deeply, or in a loop".to_owned());
        }
        let resolved = self.segments_of(name, depth).map(Arc::new);
        self.known.insert(name.to_owned(), resolved.clone());
        resolved
    }

    fn segments_of(&mut self, name: &str, depth: u32) -> Result<Vec<VolumeSegment>, String> {
        let logical = self.group.logical.get(name).ok_or_else(|| format!("there is no volume {name}"))?;
        let mut all = Vec::new();
        for extents in logical.segments.as_ref().map_err(Clone::clone)? {
            let at = self.bytes(extents.start)?;
            for mut segment in self.extents(name, extents, depth)? {
                segment.at += at;
                self.spend(&segment)?;
                append(&mut all, segment);
            }
        }
        Ok(all)
    }

    /// The segments of some extents, as if they began at 0.
    fn extents(&mut self, name: &str, extents: &Extents, depth: u32) -> Result<Vec<VolumeSegment>, String> {
        match &extents.kind {
            SegmentType::Striped { stripe_len, areas } => {
                let count = share(extents.count, areas.len())?;
                let mut legs = Vec::new();
                for area in areas {
                    legs.push(self.area(area, count, depth)?);
                }
                stripe(&legs, *stripe_len)
            }
            SegmentType::Mirrored { stripe_len, copies, images } => {
                // The images of a RAID set are whole volumes, used from their beginning; pvmove's copies may
                // be anywhere.
                if extents.start != 0 && images.iter().any(|image| image.state.is_some()) {
                    return Err("only a part of it is mirrored".to_owned());
                }
                let count = share(extents.count, images.len() / copies)?;
                let mut legs = Vec::new();
                for (index, set) in images.chunks(*copies).enumerate() {
                    legs.push(self.best(set, index * copies, count, depth)?);
                }
                stripe(&legs, *stripe_len)
            }
            SegmentType::Snapshot { .. } => {
                Err(format!("{name} is of the type snapshot, which is not supported"))
            }
            SegmentType::Other(kind) => Err(format!("it is of the type {kind}, which is not supported")),
        }
    }

    /// Chooses the image to read from a set with equal content: one in sync with the newest state, if there
    /// is one. `first` is the first image's number.
    fn best(
        &mut self,
        set: &[MirrorImage],
        first: usize,
        count: u64,
        depth: u32,
    ) -> Result<Vec<VolumeSegment>, String> {
        let mut absent = None;
        let mut found = Vec::new();
        for (index, image) in set.iter().enumerate() {
            match self.area(&image.data, count, depth) {
                Ok(segments) => found.push((index, segments, self.state(image, depth))),
                Err(problem) => absent = absent.or(Some(problem)),
            }
        }
        let newest = found.iter().filter_map(|(_, _, state)| *state).max_by_key(|state| state.events);
        let rank = |index: usize, state: Option<RaidSuperblock>| {
            let logical = self.group.logical.get(&set[index].data.name);
            let is_rebuilding = logical.is_some_and(|logical| logical.is_rebuilding);
            let is_in_sync = match (state, newest) {
                (Some(state), Some(newest)) => {
                    let number = first + index;
                    let has_failed = number < 64 && newest.failed & (1 << number) != 0;
                    // The images' states are written one after the other.
                    state.is_whole && !has_failed && state.events + 1 >= newest.events
                }
                (None, Some(_)) => false,
                (_, None) => true,
            };
            let is_last_choice = logical.is_some_and(|logical| logical.is_write_mostly);
            (is_in_sync && !is_rebuilding, !is_last_choice, std::cmp::Reverse(index))
        };
        let best = found.into_iter().max_by_key(|(index, _, state)| rank(*index, *state));
        match best {
            Some((index, segments, state)) if rank(index, state).0 => Ok(segments),
            Some(_) => Err(match absent {
                Some(problem) => {
                    format!("the present images are out of sync, and another cannot be used: {problem}")
                }
                None => "all its images are out of sync".to_owned(),
            }),
            None => Err(absent.unwrap_or_else(|| "it has no images".to_owned())),
        }
    }

    /// The kernel's state of an image; `None` if the image was never used.
    fn state(&mut self, image: &MirrorImage, depth: u32) -> Option<RaidSuperblock> {
        let segments = self.logical(image.state.as_deref()?, depth + 1).ok()?;
        let stretch = locate(&segments, 0, 512).filter(|stretch| stretch.len == 512)?;
        let mut block = vec![0; 512];
        self.disks.get(stretch.disk as usize)?.read_at(stretch.offset, &mut block).ok()?;
        RaidSuperblock::parse(&block)
    }

    /// Extents of a physical or a logical volume, as if they began at 0.
    fn area(&mut self, area: &Area, count: u64, depth: u32) -> Result<Vec<VolumeSegment>, String> {
        let (from, len) = (self.bytes(area.extent)?, self.bytes(count)?);
        if let Some(physical) = self.group.physical.get(&area.name) {
            return self.physical(physical, area, count);
        }
        let segments = self.logical(&area.name, depth + 1)?;
        let mut cut = Vec::new();
        let end = from.checked_add(len).ok_or("it is too large")?;
        for segment in &segments[segments.partition_point(|segment| segment.at + segment.len <= from)..] {
            if segment.at >= end {
                break;
            }
            let VolumeMapping::Linear(leg) = &segment.place else {
                return Err(format!("{}, which it is on, has stripes", area.name));
            };
            let (first, last) = (segment.at.max(from), (segment.at + segment.len).min(end));
            let leg = DiskPosition { disk: leg.disk, offset: leg.offset + (first - segment.at) };
            let segment =
                VolumeSegment { at: first - from, len: last - first, place: VolumeMapping::Linear(leg) };
            self.spend(&segment)?;
            cut.push(segment);
        }
        if cut.last().is_none_or(|last| last.at + last.len != len) {
            return Err(format!("{}, which it is on, is too small", area.name));
        }
        Ok(cut)
    }

    fn physical(
        &self,
        physical: &GroupMember,
        area: &Area,
        count: u64,
    ) -> Result<Vec<VolumeSegment>, String> {
        let id = physical.id;
        let Some(present) = self.present.get(&id) else {
            return Err(format!("physical volume {id} is missing"));
        };
        if physical.is_missing {
            return Err(format!("physical volume {id} is marked as missing: its content may be old"));
        }
        let end = area.extent + count;
        let from = self.bytes(area.extent)?.checked_add(physical.start);
        let to = self.bytes(end)?.checked_add(physical.start);
        match (from, to) {
            (Some(from), Some(to)) if end <= physical.extent_count && to <= present.len => {
                let leg = DiskPosition { disk: present.disk, offset: present.start + from };
                Ok(vec![VolumeSegment { at: 0, len: to - from, place: VolumeMapping::Linear(leg) }])
            }
            _ => Err(format!("it reaches beyond the end of physical volume {id}")),
        }
    }

    fn bytes(&self, extents: u64) -> Result<u64, String> {
        let bytes = extents.checked_mul(self.group.extent_len).filter(|bytes| i64::try_from(*bytes).is_ok());
        bytes.ok_or_else(|| "it is too large".to_owned())
    }

    fn spend(&mut self, segment: &VolumeSegment) -> Result<(), String> {
        let price = match &segment.place {
            VolumeMapping::Linear(_) => 1,
            VolumeMapping::Striped { legs, .. } => 1 + legs.len(),
        };
        self.left = self.left.checked_sub(price).ok_or("the volume group has too many segments")?;
        Ok(())
    }
}

/// dm-raid's superblock at the beginning of each image's state.
#[derive(Clone, Copy)]
struct RaidSuperblock {
    /// The sequence number; it grows with every change of the set.
    events: u64,
    /// A bit for each failed image.
    failed: u64,
    /// The image is fully synchronised.
    is_whole: bool,
}

impl RaidSuperblock {
    fn parse(block: &[u8]) -> Option<Self> {
        const MAGIC: u32 = 0x6452_6d44;
        (le32(block, 0) == MAGIC).then(|| Self {
            events: le64(block, 16).min(u64::MAX - 1),
            failed: le64(block, 24),
            is_whole: le64(block, 32) == u64::MAX,
        })
    }
}

/// The number of extents of each of `count` parts.
fn share(extents: u64, count: usize) -> Result<u64, String> {
    let count = count as u64;
    if count == 0 || !extents.is_multiple_of(count) {
        return Err(format!("{extents} extents cannot be divided by {count}"));
    }
    Ok(extents / count)
}

/// Combines legs of equal lengths into stripes. Where the mapping of one of them breaks, a new segment
/// begins.
fn stripe(legs: &[Vec<VolumeSegment>], stripe_len: u64) -> Result<Vec<VolumeSegment>, String> {
    let [first, others @ ..] = legs else { return Err("it has no legs".to_owned()) };
    if others.is_empty() {
        return Ok(first.clone());
    }
    if stripe_len == 0 {
        return Err("its stripes have no length".to_owned());
    }
    let mut ends: Vec<u64> = legs.iter().flatten().map(|segment| segment.at + segment.len).collect();
    ends.sort_unstable();
    ends.dedup();
    if ends.len().saturating_mul(legs.len()) > SEGMENT_LIMIT {
        return Err("it has too many segments".to_owned());
    }
    let count = legs.len() as u64;
    let mut striped = Vec::new();
    let mut places = vec![0; legs.len()];
    let mut from = 0;
    for end in ends {
        if !end.is_multiple_of(stripe_len) {
            return Err("its parts do not end at a stripe's end".to_owned());
        }
        let mut here = Vec::new();
        for (leg, place) in legs.iter().zip(&mut places) {
            while leg.get(*place).is_some_and(|segment| segment.at + segment.len <= from) {
                *place += 1;
            }
            let Some(VolumeSegment { at, place: VolumeMapping::Linear(leg), .. }) = leg.get(*place) else {
                return Err("its legs are of different kinds or lengths".to_owned());
            };
            here.push(DiskPosition { disk: leg.disk, offset: leg.offset + (from - at) });
        }
        let (Some(at), Some(len)) = (from.checked_mul(count), (end - from).checked_mul(count)) else {
            return Err("it is too large".to_owned());
        };
        striped.push(VolumeSegment { at, len, place: VolumeMapping::Striped { stripe_len, legs: here } });
        from = end;
    }
    Ok(striped)
}

/// Adds a segment; joins it with the last one if the two are contiguous.
fn append(all: &mut Vec<VolumeSegment>, segment: VolumeSegment) {
    if let Some(last) = all.last_mut()
        && let (VolumeMapping::Linear(before), VolumeMapping::Linear(leg)) = (&last.place, &segment.place)
        && before.disk == leg.disk
        && before.offset + last.len == leg.offset
    {
        last.len += segment.len;
        return;
    }
    all.push(segment);
}
