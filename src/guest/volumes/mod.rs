//! The volumes of a guest's disk: its partitions, the logical volumes it has a part in, or the disk as a whole.
//!
//! Promises: [`layout`] never fails. What is damaged, missing or of an unknown kind is said in remarks, and at each volume
//! in its `problem`; the rest is shown. Whatever the disks hold, lists and texts stay below the limits stated here.

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

/// What the guest's disks hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeLayout {
    /// The kind of partition table, as blkid(8) spells it: `gpt` or `dos`.
    pub table: Option<String>,
    /// Bytes of a sector as that table counts them: 512 or 4096.
    pub sector_size: Option<u32>,
    /// Those of the first disk, by number; extended ones too, which only hold others.
    pub partitions: Vec<Partition>,
    /// All there are, whether their files can be shown or not. Names differ.
    pub volumes: Vec<Volume>,
    /// What should be known, a sentence each: that the first partition table is damaged and its copy was used, say.
    pub remarks: Vec<String>,
    /// Volume groups that the first disk has a part in, and parts of which are on no disk that was given.
    pub missing: Vec<MissingVolumeGroup>,
}

/// A volume: something that may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// `p1` for a partition, `VG-LV` for a logical volume (as in `/dev/mapper`), `disk` for a whole disk. Can stand as a file's name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Where they are: without gaps, from 0 to `size`. Empty if that is not known; then there is a `problem`.
    pub segments: Vec<VolumeSegment>,
    /// What it holds.
    pub content: VolumeContent,
    /// The content's own label.
    pub label: Option<String>,
    /// The content's own identity, as blkid(8) writes it.
    pub uuid: Option<String>,
    /// Why its files cannot be shown, a sentence; `None` if a reader for its content exists.
    pub problem: Option<String>,
}

/// A volume group that lacks physical volumes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingVolumeGroup {
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: String,
    /// How often it has been changed: its other physical volumes say the same, unless they were away.
    pub state: u64,
    /// The identities of the physical volumes that are not there.
    pub absent: Vec<String>,
}

impl Volume {
    /// Where the bytes from `at` on lie, as many of `len` as lie together; `None` at and beyond the end.
    pub fn locate(&self, at: u64, len: u64) -> Option<VolumeRun> {
        locate(&self.segments, at, len)
    }
}

/// A physical volume that a disk holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhysicalVolumeName {
    /// Its identity.
    pub id: String,
    /// The identity of the volume group that it says it belongs to.
    pub group: Option<String>,
    /// How often that group had been changed when it was last told.
    pub state: Option<u64>,
}

/// What the guest's disks hold. `disks[0]` is the one that is looked at; the others are offered for the volume groups that it
/// has a part in, and only those parts of them are used.
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
    // A disc made to be started from a stick has a partition table as well, which says less.
    if layout.volumes.is_empty() || disk_as_a_whole.content == VolumeContent::Iso9660 {
        layout.volumes.push(disk_as_a_whole);
    }
    if layout.volumes.iter().any(|volume| volume.content == VolumeContent::LvmPhysicalVolume) {
        add_logical_volumes(&mut layout, disks);
    }
    if layout.remarks.len() > REMARK_LIMIT {
        let more = layout.remarks.len() - REMARK_LIMIT;
        layout.remarks.truncate(REMARK_LIMIT);
        layout.remarks.push(format!("there is more to be said of it ({more} remarks)"));
    }
    layout
}

/// The physical volumes that a disk holds, itself or in its partitions: by these the other disks of a volume group are
/// found.
pub fn physical_volumes(disk: &Arc<dyn Source>) -> Vec<PhysicalVolumeName> {
    let name = |pv: PhysicalVolume| PhysicalVolumeName {
        id: pv.id.to_string(),
        group: pv.group_id().map(|id| id.to_string()),
        state: pv.state(),
    };
    find_physical_volumes(disk, 0).into_iter().map(name).collect()
}

/// The bytes of a volume; `disks` as [`layout`] was given them.
pub fn volume_source(volume: &Volume, disks: &[Arc<dyn Source>]) -> Arc<dyn Source> {
    Arc::new(map::Mapped { size: volume.size, segments: volume.segments.clone(), disks: disks.to_vec() })
}

/// A volume that is a stretch of the first disk.
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
        // LVM leaves a disk with partitions alone, even where a label was left in front of them.
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
