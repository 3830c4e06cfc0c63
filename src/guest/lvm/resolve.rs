//! Makes devices of logical volumes.
//!
//! Volumes can consist of other volumes (such as the images of a mirror). Each is resolved once. A loop is an
//! error of the affected volumes.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::guest::raid::{ParityLayout, Ten, parity_device, striped_device, ten_device};
use crate::guest::volumes::{Device, DeviceDisks};

use super::group::{Area, CacheVolume, GroupMember, LvmSegment, SegmentType, VolumeGroup};
use super::label::LvmId;
use super::thin::ThinPool;
use super::{cache, snapshot};

/// Nesting of volumes: a thin snapshot of a thin volume on a cached RAID volume is seven deep.
const DEPTH_LIMIT: u32 = 16;
/// Parts of all volumes of a group together.
const PART_LIMIT: usize = 1 << 17;

/// A volume's device, or the reason why its bytes are unknown.
type Resolved = Result<Device, String>;

pub(super) struct Resolver<'a> {
    pub(super) group: &'a VolumeGroup,
    pub(super) present: &'a BTreeMap<LvmId, Device>,
    pub(super) disks: &'a DeviceDisks,
    /// Facts about volumes that are shown.
    pub(super) remarks: Vec<String>,
    /// The links between snapshots of the old kind and their origins: by store, and by origin if it is
    /// merging.
    stores: BTreeMap<&'a str, &'a str>,
    merging: BTreeMap<&'a str, &'a str>,
    known: BTreeMap<String, Resolved>,
    pools: BTreeMap<String, Result<Arc<ThinPool>, String>>,
    left: usize,
}

impl<'a> Resolver<'a> {
    pub(super) fn new(
        group: &'a VolumeGroup,
        present: &'a BTreeMap<LvmId, Device>,
        disks: &'a DeviceDisks,
    ) -> Self {
        let (mut stores, mut merging) = (BTreeMap::new(), BTreeMap::new());
        let segments = group.logical.values().filter_map(|logical| logical.segments.as_ref().ok()).flatten();
        for segment in segments {
            if let SegmentType::Snapshot { origin, store, is_merging } = &segment.kind {
                stores.insert(store.as_str(), origin.as_str());
                if *is_merging {
                    merging.insert(origin.as_str(), store.as_str());
                }
            }
        }
        let (known, pools, remarks) = (BTreeMap::new(), BTreeMap::new(), Vec::new());
        Self { group, present, disks, remarks, stores, merging, known, pools, left: PART_LIMIT }
    }

    /// Whether a volume holds the changes of a snapshot of the old kind.
    pub(super) fn is_store(&self, name: &str) -> bool {
        self.stores.contains_key(name)
    }

    /// A logical volume as the guest sees it: a snapshot instead of its store, and instead of an origin into
    /// which a snapshot is being merged, that snapshot.
    pub(super) fn shown(&mut self, name: &str) -> Resolved {
        let (origin, store) = match (self.stores.get(name), self.merging.get(name)) {
            (Some(origin), _) => (*origin, name),
            (None, Some(store)) => (name, *store),
            (None, None) => return self.logical(name, 0),
        };
        let (base, changes) = (self.logical(origin, 0)?, self.logical(store, 0)?);
        snapshot::device(&base, &changes, self.disks)
    }

    pub(super) fn logical(&mut self, name: &str, depth: u32) -> Resolved {
        if let Some(known) = self.known.get(name) {
            return known.clone();
        }
        if depth > DEPTH_LIMIT {
            return Err("its volumes are nested too deeply, or in a loop".to_owned());
        }
        let resolved = self.concatenated(name, depth);
        self.known.insert(name.to_owned(), resolved.clone());
        resolved
    }

    fn concatenated(&mut self, name: &str, depth: u32) -> Resolved {
        let logical = self.group.logical.get(name).ok_or_else(|| format!("there is no volume {name}"))?;
        let mut parts = Vec::new();
        for segment in logical.segments.as_ref().map_err(Clone::clone)? {
            self.left = self.left.checked_sub(1).ok_or("the volume group has too many segments")?;
            parts.push(self.segment(name, segment, depth)?);
        }
        Ok(Device::concatenated(parts, self.disks))
    }

    /// The device of one segment.
    fn segment(&mut self, name: &str, segment: &LvmSegment, depth: u32) -> Resolved {
        let len = self.bytes(segment.count)?;
        match &segment.kind {
            SegmentType::Striped { areas, .. } if areas.len() == 1 => {
                self.area(&areas[0], segment.count, depth)
            }
            SegmentType::Striped { stripe_len, areas } => {
                let count = share(segment.count, areas.len())?;
                let mut legs = Vec::new();
                for area in areas {
                    self.left = self.left.checked_sub(1).ok_or("the volume group has too many segments")?;
                    legs.push((self.area(area, count, depth)?, 0));
                }
                striped_device(*stripe_len, legs, len, self.disks)
            }
            SegmentType::Mirrored { images } => {
                // The images of a RAID set are whole volumes, used from their beginning; pvmove's copies may
                // be anywhere.
                if segment.start != 0 && images.iter().any(|image| image.state.is_some()) {
                    return Err("only a part of it is mirrored".to_owned());
                }
                let found = self.images(name, images, segment.count, depth)?;
                found.best()
            }
            SegmentType::Ten { stripe_len, copies, images } => {
                let all = (segment.count).checked_mul(u64::from(*copies)).ok_or("it is too large")?;
                let count = share(all, images.len())?;
                let found = self.images(name, images, count, depth)?;
                let chunks =
                    self.bytes(count)?.checked_div(*stripe_len).ok_or("its stripes have no length")?;
                let layout = Ten::of_number(copies | 1 << 8, images.len(), chunks)?;
                found.named(|members| ten_device(&layout, *stripe_len, members, len, self.disks))
            }
            SegmentType::Parity { parity, has_second, stripe_len, images } => {
                let layout = ParityLayout::new(*parity, images.len(), *has_second);
                let layout = layout.ok_or_else(|| format!("it has {} images", images.len()))?;
                let count = share(segment.count, layout.data_count())?;
                let found = self.images(name, images, count, depth)?;
                found.named(|members| parity_device(layout, *stripe_len, members, len, self.disks))
            }
            SegmentType::Thin { pool, device, origin } => {
                let origin = origin.as_ref().map(|origin| self.logical(origin, depth + 1)).transpose()?;
                let pool = self.pool(pool, depth)?;
                pool.device(*device, len, origin.as_ref(), self.disks)
            }
            SegmentType::Cached { origin, pool, volume } => {
                let origin = self.logical(origin, depth + 1)?;
                self.cached(&origin, pool, volume.as_ref(), depth)
            }
            SegmentType::ThinPool { .. } => Err("it is a pool; its files are in the thin volumes".to_owned()),
            SegmentType::CachePool { .. } => Err("it is the cache of other volumes".to_owned()),
            SegmentType::Snapshot { .. } => Err(format!("{name} is only the link to a snapshot")),
            SegmentType::Other(kind) => Err(format!("it is of the type {kind}, which is not supported")),
        }
    }

    /// A thin pool, opened once.
    fn pool(&mut self, name: &str, depth: u32) -> Result<Arc<ThinPool>, String> {
        if let Some(known) = self.pools.get(name) {
            return known.clone();
        }
        let opened = self.open_pool(name, depth).map(Arc::new);
        self.pools.insert(name.to_owned(), opened.clone());
        opened
    }

    fn open_pool(&mut self, name: &str, depth: u32) -> Result<ThinPool, String> {
        let segments = self.group.logical.get(name).and_then(|pool| pool.segments.as_ref().ok());
        let Some(SegmentType::ThinPool { data, metadata, block_len }) =
            segments.and_then(|segments| Some(&segments.first()?.kind))
        else {
            return Err(format!("there is no thin pool {name}"));
        };
        let (data, metadata) = (self.logical(data, depth + 1)?, self.logical(metadata, depth + 1)?);
        ThinPool::open(metadata.source(), data, *block_len)
    }

    fn cached(&mut self, origin: &Device, pool: &str, parts: Option<&CacheVolume>, depth: u32) -> Resolved {
        if let Some(parts) = parts {
            let volume = self.logical(pool, depth + 1)?;
            let range = |(start, len): (u64, u64)| volume.range(start, len, self.disks);
            let (metadata, data) = (range(parts.metadata), range(parts.data));
            return cache::device(origin, &metadata, &data, parts.block_len, parts.is_writeback, self.disks);
        }
        let segments = self.group.logical.get(pool).and_then(|pool| pool.segments.as_ref().ok());
        let Some(SegmentType::CachePool { data, metadata, block_len, is_writeback }) =
            segments.and_then(|segments| Some(&segments.first()?.kind))
        else {
            return Err(format!("there is no cache {pool}"));
        };
        let (metadata, data) =
            (self.logical(&metadata.name, depth + 1)?, self.logical(&data.name, depth + 1)?);
        cache::device(origin, &metadata, &data, *block_len, *is_writeback, self.disks)
    }

    /// Extents of a physical or a logical volume.
    pub(super) fn area(&mut self, area: &Area, count: u64, depth: u32) -> Resolved {
        let (from, len) = (self.bytes(area.extent)?, self.bytes(count)?);
        if let Some(physical) = self.group.physical.get(&area.name) {
            return self.physical(physical, area, count);
        }
        let device = self.logical(&area.name, depth + 1)?.range(from, len, self.disks);
        if device.size() != len {
            return Err(format!("{}, which it is on, is too small", area.name));
        }
        Ok(device)
    }

    fn physical(&self, physical: &GroupMember, area: &Area, count: u64) -> Resolved {
        let id = physical.id;
        let Some(present) = self.present.get(&id) else {
            return Err(format!("physical volume {id} is missing"));
        };
        if physical.is_missing {
            return Err(format!("physical volume {id} is marked as missing: its content may be old"));
        }
        let end = area.extent.checked_add(count).ok_or("it is too large")?;
        let from = self.bytes(area.extent)?.checked_add(physical.start);
        let to = self.bytes(end)?.checked_add(physical.start);
        match (from, to) {
            (Some(from), Some(to)) if end <= physical.extent_count && to <= present.size() => {
                Ok(present.range(from, to - from, self.disks))
            }
            _ => Err(format!("it reaches beyond the end of physical volume {id}")),
        }
    }

    pub(super) fn bytes(&self, extents: u64) -> Result<u64, String> {
        let bytes = extents.checked_mul(self.group.extent_len).filter(|bytes| i64::try_from(*bytes).is_ok());
        bytes.ok_or_else(|| "it is too large".to_owned())
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
