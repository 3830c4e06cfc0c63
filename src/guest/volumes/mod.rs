//! The volumes of a guest's disk: its partitions, the logical volumes it is part of, or the whole disk.
//!
//! Promises: [`layout`] never fails. Damage, missing parts and unknown content become remarks, or the
//! `problem` of a volume; the rest is shown. For any disks, lists and texts stay below the limits stated
//! here.

mod map;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::guest::content::{DetectedVolume, VolumeContent, probe};
use crate::guest::lvm::{self, PhysicalVolume};
use crate::guest::{Slice, Source, partition};

pub use crate::guest::partition::Partition;
pub use map::{DiskPosition, VolumeMapping, VolumeRun, VolumeSegment, locate};

/// Remarks that are kept.
const REMARK_LIMIT: usize = 100;

/// The content of the guest's disks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeLayout {
    /// The kind of partition table, in blkid(8)'s spelling: `gpt` or `dos`.
    pub table: Option<String>,
    /// Bytes of a sector as the table counts them: 512 or 4096.
    pub sector_size: Option<u32>,
    /// The first disk's partitions, by number, including extended ones.
    pub partitions: Vec<Partition>,
    /// All volumes, whether or not their files can be shown. Names are unique.
    pub volumes: Vec<Volume>,
    /// Facts that the user should know, one sentence each, for example that the first partition table is
    /// damaged and its copy was used.
    pub remarks: Vec<String>,
    /// Volume groups that the first disk is part of and that lack physical volumes.
    pub missing: Vec<MissingVolumeGroup>,
}

/// A volume: it may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// `p1` for a partition, `VG-LV` for a logical volume (as in `/dev/mapper`), `disk` for a whole disk. A
    /// valid file name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Where the bytes are: without gaps, from 0 to `size`. Empty if unknown; then there is a `problem`.
    pub segments: Vec<VolumeSegment>,
    /// Its content.
    pub content: VolumeContent,
    /// The content's own label.
    pub label: Option<String>,
    /// The content's own identity, in blkid(8)'s form.
    pub uuid: Option<String>,
    /// Why its files cannot be shown, one sentence; `None` if its content has a reader.
    pub problem: Option<String>,
}

/// A volume group that lacks physical volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingVolumeGroup {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: String,
    /// The sequence number of its metadata: the absent physical volumes have the same, unless they were
    /// detached.
    pub state: u64,
    /// The identities of the absent physical volumes.
    pub absent: Vec<String>,
}

impl Volume {
    /// Where the bytes from `at` on are, up to `len` contiguous ones; `None` at and beyond the end.
    pub fn locate(&self, at: u64, len: u64) -> Option<VolumeRun> {
        locate(&self.segments, at, len)
    }
}

/// A physical volume on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhysicalVolumeName {
    /// Its identity.
    pub id: String,
    /// The identity of its volume group, by its own metadata.
    pub group: Option<String>,
    /// The sequence number of its copy of the group's metadata.
    pub state: Option<u64>,
}

/// The content of the guest's disks. `disks[0]` is the requested one. The others are candidates for the
/// volume groups that it is part of; only their parts of these groups are used.
pub fn layout(disks: &[Arc<dyn Source>]) -> VolumeLayout {
    let Some(disk) = disks.first() else { return VolumeLayout::default() };
    let (table, remarks) = partition::read(disk);
    let mut layout = VolumeLayout { remarks, ..VolumeLayout::default() };
    if let Some(table) = table {
        layout.table = Some(table.kind.name().to_owned());
        layout.sector_size = Some(table.sector_len as u32);
        layout.partitions = table.partitions;
    }
    for part in layout.partitions.iter().filter(|part| !part.is_extended) {
        layout.volumes.push(plain(format!("p{}", part.number), disk, part.start, part.len));
    }
    let disk_as_a_whole = plain("disk".to_owned(), disk, 0, disk.size());
    // A hybrid ISO image has a partition table as well, but the ISO 9660 file system describes all of it.
    if layout.volumes.is_empty() || disk_as_a_whole.content == VolumeContent::Iso9660 {
        layout.volumes.push(disk_as_a_whole);
    }
    if layout.volumes.iter().any(|volume| volume.content == VolumeContent::LvmPhysicalVolume) {
        add_logical_volumes(&mut layout, disks);
    }
    if layout.remarks.len() > REMARK_LIMIT {
        let more = layout.remarks.len() - REMARK_LIMIT;
        layout.remarks.truncate(REMARK_LIMIT);
        layout.remarks.push(format!("{more} more remarks are not shown"));
    }
    layout
}

/// The physical volumes of a disk, on the disk itself or in its partitions. They identify the other disks of
/// a volume group.
pub fn physical_volumes(disk: &Arc<dyn Source>) -> Vec<PhysicalVolumeName> {
    let name = |pv: PhysicalVolume| PhysicalVolumeName {
        id: pv.id.to_string(),
        group: pv.group_id().map(|id| id.to_string()),
        state: pv.state(),
    };
    find_physical_volumes(disk, 0).into_iter().map(name).collect()
}

/// The bytes of a volume; `disks` as for [`layout`].
pub fn volume_source(volume: &Volume, disks: &[Arc<dyn Source>]) -> Arc<dyn Source> {
    Arc::new(map::Mapped { size: volume.size, segments: volume.segments.clone(), disks: disks.to_vec() })
}

/// A volume that is a range of the first disk.
fn plain(name: String, disk: &Arc<dyn Source>, start: u64, len: u64) -> Volume {
    let found = probe(&Slice::new(Arc::clone(disk), start, len));
    let place = VolumeMapping::Linear(DiskPosition { disk: 0, offset: start });
    let segments = if len > 0 { vec![VolumeSegment { at: 0, len, place }] } else { Vec::new() };
    described(name, len, segments, found)
}

fn described(name: String, size: u64, segments: Vec<VolumeSegment>, found: DetectedVolume) -> Volume {
    let problem = found.content.problem();
    Volume { name, size, segments, content: found.content, label: found.label, uuid: found.uuid, problem }
}

fn find_physical_volumes(disk: &Arc<dyn Source>, number: u32) -> Vec<PhysicalVolume> {
    let in_partition = |part: &Partition| PhysicalVolume::find(disk, number, part.start, part.len);
    match partition::read(disk).0 {
        // LVM ignores a disk with partitions, even if an old label precedes them.
        Some(table) if !table.partitions.is_empty() => {
            table.partitions.iter().filter(|part| !part.is_extended).filter_map(in_partition).collect()
        }
        _ => PhysicalVolume::find(disk, number, 0, disk.size()).into_iter().collect(),
    }
}

fn add_logical_volumes(layout: &mut VolumeLayout, disks: &[Arc<dyn Source>]) {
    let mut physical = Vec::new();
    for (number, disk) in (0..).zip(disks) {
        let mut found = find_physical_volumes(disk, number);
        if number == 0 {
            for pv in &mut found {
                layout.remarks.append(&mut pv.remarks);
            }
        }
        physical.append(&mut found);
    }
    let groups = lvm::groups(&physical, disks);
    layout.missing = groups.missing;
    layout.remarks.extend(groups.remarks);
    for found in groups.volumes {
        let unknown = DetectedVolume { content: VolumeContent::Unknown, label: None, uuid: None };
        let mut volume = described(found.name, found.size, Vec::new(), unknown);
        match found.segments {
            Ok(segments) => {
                volume.segments = segments;
                let found = probe(&*volume_source(&volume, disks));
                volume = described(volume.name, volume.size, volume.segments, found);
            }
            Err(problem) => volume.problem = Some(problem),
        }
        layout.volumes.push(volume);
    }
}
