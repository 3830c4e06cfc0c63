//! A volume group as its metadata describe it: physical volumes, logical volumes, and their segments.

use std::collections::BTreeMap;

use crate::guest::raid::Parity;

use super::config::{Section, Value};
use super::label::LvmId;

const SECTOR_LEN: u64 = 512;
/// LVM's own limit of a name.
const NAME_LIMIT: usize = 127;

/// A volume group.
#[derive(Clone, Debug)]
pub(super) struct VolumeGroup {
    pub(super) name: String,
    pub(super) id: LvmId,
    /// The sequence number; it grows with every change.
    pub(super) number: u64,
    /// Bytes of an extent.
    pub(super) extent_len: u64,
    /// Exported by one machine and not yet imported by another.
    pub(super) is_exported: bool,
    /// By the names that segments use.
    pub(super) physical: BTreeMap<String, GroupMember>,
    /// By name.
    pub(super) logical: BTreeMap<String, LogicalDefinition>,
}

/// The group's record of a physical volume.
#[derive(Clone, Debug)]
pub(super) struct GroupMember {
    pub(super) id: LvmId,
    /// It was absent when the group was changed: its content may be old.
    pub(super) is_missing: bool,
    /// Where its extents begin, in bytes.
    pub(super) start: u64,
    pub(super) extent_count: u64,
}

/// A logical volume.
#[derive(Clone, Debug)]
pub(super) struct LogicalDefinition {
    pub(super) is_visible: bool,
    /// A mirror image that is being rebuilt.
    pub(super) is_rebuilding: bool,
    /// A mirror image that is only read if there is no other.
    pub(super) is_write_mostly: bool,
    /// In order and without gaps; or an error.
    pub(super) segments: Result<Vec<LvmSegment>, String>,
}

/// A range of a logical volume's extents.
#[derive(Clone, Debug)]
pub(super) struct LvmSegment {
    /// In extents.
    pub(super) start: u64,
    pub(super) count: u64,
    pub(super) kind: SegmentType,
}

/// A range of extents of a physical or another logical volume.
#[derive(Clone, Debug)]
pub(super) struct Area {
    pub(super) name: String,
    pub(super) extent: u64,
}

/// A mirror image, and the volume that holds its state.
#[derive(Clone, Debug)]
pub(super) struct MirrorImage {
    pub(super) data: Area,
    pub(super) state: Option<String>,
}

/// The parts of a cache that is one volume, in bytes.
#[derive(Clone, Debug)]
pub(super) struct CacheVolume {
    pub(super) metadata: (u64, u64),
    pub(super) data: (u64, u64),
    pub(super) block_len: u64,
    pub(super) is_writeback: bool,
}

/// The layout of a segment.
#[derive(Clone, Debug)]
pub(super) enum SegmentType {
    /// Striped over the areas; with one area, linear.
    Striped { stripe_len: u64, areas: Vec<Area> },
    /// Images with equal content.
    Mirrored { images: Vec<MirrorImage> },
    /// RAID 10 with so many copies of each stripe.
    Ten { stripe_len: u64, copies: u32, images: Vec<MirrorImage> },
    /// RAID 4, 5 or 6.
    Parity { parity: Parity, has_second: bool, stripe_len: u64, images: Vec<MirrorImage> },
    /// A snapshot of the old kind: not a volume itself, but a link between two volumes.
    Snapshot { origin: String, store: String, is_merging: bool },
    /// A pool of thin volumes: its blocks, and the volume with their map.
    ThinPool { data: String, metadata: String, block_len: u64 },
    /// A volume in a pool. Blocks that were never written are those of the external origin, if it has one.
    Thin { pool: String, device: u64, origin: Option<String> },
    /// The blocks of a cache, and the volume with their map.
    CachePool { data: Area, metadata: Area, block_len: u64, is_writeback: bool },
    /// A volume with a cache.
    Cached { origin: String, pool: String, volume: Option<CacheVolume> },
    /// Of an unsupported type.
    Other(String),
}

impl VolumeGroup {
    /// Parses LVM's text.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let all = Section::parse(text)?;
        let (name, group) = all.sections.iter().next().ok_or("it describes no volume group")?;
        check_name(name)?;
        let need = |key: &str| group.number(key).ok_or_else(|| format!("it has no {key}"));
        let extent_len = need("extent_size")?.checked_mul(SECTOR_LEN).filter(|len| *len > 0);
        let extent_len = extent_len.ok_or("its extents have no length")?;
        let sections = |key: &str| group.sections.get(key).into_iter().flat_map(|section| &section.sections);
        let physical = |(name, section): (&String, &Section)| Some((name.clone(), physical(section)?));
        let logical = |(name, section): (&String, &Section)| (name.clone(), logical(section));
        Ok(Self {
            name: name.clone(),
            id: group.text("id").and_then(LvmId::parse).ok_or("it has no identity")?,
            number: need("seqno")?,
            extent_len,
            is_exported: group.has("status", "EXPORTED"),
            physical: sections("physical_volumes").filter_map(physical).collect(),
            logical: sections("logical_volumes").map(logical).collect(),
        })
    }
}

impl LogicalDefinition {
    /// Whether it only links a snapshot of the old kind to its origin.
    pub(super) fn is_snapshot_link(&self) -> bool {
        let is_link = |segment: &LvmSegment| matches!(segment.kind, SegmentType::Snapshot { .. });
        self.segments.as_ref().is_ok_and(|segments| segments.iter().any(is_link))
    }
}

/// Refuses names that LVM does not allow: they become file names.
pub(super) fn check_name(name: &str) -> Result<(), String> {
    let is_known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '_' | '.' | '-');
    if name.len() <= NAME_LIMIT
        && name.chars().all(is_known)
        && !matches!(name, "." | "..")
        && !name.starts_with('-')
    {
        return Ok(());
    }
    let shown: String = name.chars().take(NAME_LIMIT).collect();
    Err(format!("{shown:?} is not a valid LVM name"))
}

fn physical(section: &Section) -> Option<GroupMember> {
    let is_missing = section.has("flags", "MISSING") || section.has("status", "MISSING");
    let id = section.text("id").and_then(LvmId::parse)?;
    let start = section.number("pe_start")? * SECTOR_LEN;
    Some(GroupMember { id, is_missing, start, extent_count: section.number("pe_count")? })
}

fn logical(section: &Section) -> LogicalDefinition {
    let has = |flag| section.has("status", flag);
    LogicalDefinition {
        is_visible: has("VISIBLE"),
        is_rebuilding: has("REBUILD"),
        is_write_mostly: has("WRITEMOSTLY"),
        segments: segments(section),
    }
}

fn segments(section: &Section) -> Result<Vec<LvmSegment>, String> {
    let count = section.number("segment_count").ok_or("it has no segments")?;
    let (mut segments, mut end) = (Vec::new(), 0);
    for number in 1..=count {
        let name = format!("segment{number}");
        let Some(found) = section.sections.get(&name) else { return Err(format!("it has no {name}")) };
        let segment = segment(found).ok_or_else(|| format!("{name} cannot be understood"))?;
        if segment.start != end || segment.count == 0 {
            return Err(format!("{name} does not follow the one before"));
        }
        end = segment.start + segment.count;
        segments.push(segment);
    }
    Ok(segments)
}

fn segment(section: &Section) -> Option<LvmSegment> {
    let (start, count) = (section.number("start_extent")?, section.number("extent_count")?);
    let stripe_len = section.number("stripe_size").unwrap_or(0) * SECTOR_LEN;
    // Flags that a version of LVM must know follow the type: `cache-pool+METADATA_FORMAT`.
    let name = section.text("type")?.split('+').next()?;
    let kind = match name {
        "striped" | "linear" => SegmentType::Striped { stripe_len, areas: areas(section.list("stripes"))? },
        "raid0" => SegmentType::Striped { stripe_len, areas: names(section.list("raid0_lvs"))? },
        "raid0_meta" => {
            let images = images(section.list("raids"))?;
            SegmentType::Striped { stripe_len, areas: images.into_iter().map(|image| image.data).collect() }
        }
        "mirror" => {
            let mut areas = areas(section.list("mirrors"))?;
            // During pvmove, moved extents are written only to the new place, and the current ones to both.
            // (The copies of a permanent mirror are all written.)
            if section.number("extents_moved") == Some(count) && areas.len() > 1 {
                areas.remove(0);
            }
            let images = areas.into_iter().map(|data| MirrorImage { data, state: None }).collect();
            SegmentType::Mirrored { images }
        }
        "raid1" => SegmentType::Mirrored { images: images(section.list("raids"))? },
        "raid10" | "raid10_near" => {
            let copies = section.number("data_copies").unwrap_or(2) as u32;
            SegmentType::Ten { stripe_len, copies, images: images(section.list("raids"))? }
        }
        "snapshot" => {
            let merging = section.text("merging_store");
            let store = merging.or_else(|| section.text("cow_store"))?.to_owned();
            SegmentType::Snapshot {
                origin: section.text("origin")?.to_owned(),
                store,
                is_merging: merging.is_some(),
            }
        }
        "thin-pool" => SegmentType::ThinPool {
            data: section.text("pool")?.to_owned(),
            metadata: section.text("metadata")?.to_owned(),
            block_len: section.number("chunk_size")? * SECTOR_LEN,
        },
        "thin" => SegmentType::Thin {
            pool: section.text("thin_pool")?.to_owned(),
            device: section.number("device_id")?,
            origin: section.text("external_origin").map(str::to_owned),
        },
        "cache-pool" => {
            let whole = |name: &str| Area { name: name.to_owned(), extent: 0 };
            SegmentType::CachePool {
                data: whole(section.text("data")?),
                metadata: whole(section.text("metadata")?),
                block_len: section.number("chunk_size")? * SECTOR_LEN,
                is_writeback: is_writeback(section),
            }
        }
        "cache" => SegmentType::Cached {
            origin: section.text("origin")?.to_owned(),
            pool: section.text("cache_pool")?.to_owned(),
            volume: cache_volume(section),
        },
        other => match raid(other) {
            Some((parity, has_second)) => {
                let images = images(section.list("raids"))?;
                SegmentType::Parity { parity, has_second, stripe_len, images }
            }
            None => SegmentType::Other(other.chars().take(NAME_LIMIT).collect()),
        },
    };
    let has_areas = match &kind {
        SegmentType::Striped { areas, .. } => !areas.is_empty(),
        SegmentType::Mirrored { images }
        | SegmentType::Ten { images, .. }
        | SegmentType::Parity { images, .. } => !images.is_empty(),
        SegmentType::Snapshot { .. }
        | SegmentType::ThinPool { .. }
        | SegmentType::Thin { .. }
        | SegmentType::CachePool { .. }
        | SegmentType::Cached { .. }
        | SegmentType::Other(_) => true,
    };
    has_areas.then_some(LvmSegment { start, count, kind })
}

/// The layout of a type of RAID 4, 5 or 6, and whether it is RAID 6. dm-raid's RAID 4 has its parity first.
fn raid(name: &str) -> Option<(Parity, bool)> {
    Some(match name {
        "raid4" => (Parity::First, false),
        "raid5_n" => (Parity::Last, false),
        "raid5_la" => (Parity::LeftAsymmetric, false),
        "raid5_ra" => (Parity::RightAsymmetric, false),
        "raid5" | "raid5_ls" => (Parity::LeftSymmetric, false),
        "raid5_rs" => (Parity::RightSymmetric, false),
        "raid6" | "raid6_zr" => (Parity::ZeroRestart, true),
        "raid6_nr" => (Parity::NRestart, true),
        "raid6_nc" => (Parity::NContinue, true),
        "raid6_n_6" => (Parity::Last, true),
        "raid6_la_6" => (Parity::LeftAsymmetric6, true),
        "raid6_ra_6" => (Parity::RightAsymmetric6, true),
        "raid6_ls_6" => (Parity::LeftSymmetric6, true),
        "raid6_rs_6" => (Parity::RightSymmetric6, true),
        _ => return None,
    })
}

/// Whether a cache may have blocks that its origin has not.
fn is_writeback(section: &Section) -> bool {
    let is_it = |key: &str| matches!(section.text(key), Some("writethrough" | "passthrough"));
    !is_it("cache_mode")
}

/// The parts of a cache that is one volume; their places are in sectors.
fn cache_volume(section: &Section) -> Option<CacheVolume> {
    let number = |key| Some(section.number(key)? * SECTOR_LEN);
    Some(CacheVolume {
        metadata: (number("metadata_start")?, number("metadata_len")?),
        data: (number("data_start")?, number("data_len")?),
        block_len: number("chunk_size")?,
        is_writeback: is_writeback(section),
    })
}

/// Pairs of a name and an extent.
fn areas(list: &[Value]) -> Option<Vec<Area>> {
    let area = |pair: &[Value]| match pair {
        [Value::Text(name), Value::Number(extent)] => {
            let extent = u32::try_from(*extent).ok()?;
            Some(Area { name: name.clone(), extent: extent.into() })
        }
        _ => None,
    };
    list.chunks(2).map(area).collect()
}

/// Names of volumes that are used from their beginning.
fn names(list: &[Value]) -> Option<Vec<Area>> {
    let area = |value: &Value| match value {
        Value::Text(name) => Some(Area { name: name.clone(), extent: 0 }),
        Value::Number(_) | Value::Other | Value::List(_) => None,
    };
    list.iter().map(area).collect()
}

/// Pairs of the names of a state volume and a data volume.
fn images(list: &[Value]) -> Option<Vec<MirrorImage>> {
    let image = |pair: &[Value]| match pair {
        [Value::Text(state), Value::Text(data)] => {
            Some(MirrorImage { data: Area { name: data.clone(), extent: 0 }, state: Some(state.clone()) })
        }
        _ => None,
    };
    list.chunks(2).map(image).collect()
}
