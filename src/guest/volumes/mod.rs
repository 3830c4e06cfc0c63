//! The volumes of a guest's disk: its partitions, the arrays and logical volumes it is part of, or the whole
//! disk.
//!
//! `map` says where a volume's bytes are, `device` composes devices of others, `stack` finds what devices
//! hold and assembles it.
//!
//! Promises: [`assemble`] never fails. Damage, missing parts and unknown content become remarks, or the
//! `problem` of a volume; the rest is shown. For any disks, lists and texts stay below the limits stated
//! here.

mod device;
mod map;
mod stack;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::guest::Source;
use crate::guest::content::VolumeContent;
use crate::guest::luks::{DataSegment, HeaderId};

pub use crate::guest::partition::Partition;
pub(crate) use device::{Device, DeviceDisks, DeviceMap};
pub use map::{
    ContainerPosition, DiskPosition, RunPlace, Stripes, VolumeMapping, VolumeRun, VolumeSegment, locate,
};
pub use stack::{Unlock, UnlockOutcome, UnlockedVolume, set_members};

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
    /// Volume groups, arrays and file systems that the first disk is part of and that lack members.
    pub missing: Vec<MissingMembers>,
    /// Encrypted volumes whose keys were not given.
    pub locked: Vec<LockedVolume>,
    /// Encrypted volumes that were opened.
    pub containers: Vec<OpenContainer>,
}

/// An encrypted volume that was opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenContainer {
    /// Its index among the volumes: below those of all volumes in it.
    pub volume: usize,
    /// Identifies the container.
    pub id: HeaderId,
    /// Its data.
    pub data: Vec<DataSegment>,
}

/// An encrypted volume whose key was not given.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockedVolume {
    /// Its index among the volumes.
    pub volume: usize,
    /// Identifies the container.
    pub id: HeaderId,
}

/// A volume: it may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// `p1` for a partition, `VG-LV` for a logical volume (as in `/dev/mapper`), `md0` or `md-NAME` for an
    /// array, `disk` for a whole disk. A valid file name.
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

/// What is assembled from several devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SetKind {
    /// An LVM volume group of physical volumes.
    VolumeGroup,
    /// An md array.
    Array,
    /// A file system on several devices.
    FileSystem,
}

/// A volume group that lacks physical volumes, an array that lacks members, or a file system that lacks
/// devices.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingMembers {
    /// What it is.
    pub kind: SetKind,
    /// Its name.
    pub name: String,
    /// Its identity.
    pub id: String,
    /// The sequence number of its metadata, if the absent members must have the same, unless they were
    /// detached.
    pub state: Option<u64>,
    /// The identities of the absent members: a physical volume's or a device's own, or an array's with the
    /// member's role.
    pub absent: Vec<String>,
}

/// A member of a volume group, an array or a file system, on a disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetMember {
    /// Its identity, as in [`MissingMembers::absent`].
    pub id: String,
    /// The identity of what it is a member of, by its own metadata.
    pub set: Option<String>,
    /// The sequence number of its copy of the set's metadata.
    pub state: Option<u64>,
}

/// The content of the guest's disks, and how their volumes are read.
pub struct Assembly {
    /// The content.
    pub layout: VolumeLayout,
    /// The devices of its volumes; `None` where their bytes are unknown.
    devices: Vec<Option<Device>>,
    /// Devices on other disks, of file systems that are on a volume as well: the file system's UUID, and the
    /// device.
    others: Vec<(String, Device)>,
}

impl Volume {
    /// Where the bytes from `at` on are, up to `len` of one location; `None` at and beyond the end.
    pub fn locate(&self, at: u64, len: u64) -> Option<VolumeRun> {
        locate(&self.segments, at, len)
    }
}

impl Assembly {
    /// The bytes of the volume with this index.
    pub fn source(&self, volume: usize) -> Arc<dyn Source> {
        match self.devices.get(volume) {
            Some(Some(device)) => Arc::clone(device.source()),
            Some(None) | None => Arc::new(Vec::new()),
        }
    }

    /// The bytes of all devices of the file system on the volume with this index: first those of the volume.
    pub fn file_system_sources(&self, volume: usize) -> Vec<Arc<dyn Source>> {
        let own = &self.layout.volumes[volume];
        let is_of = |other: &Volume| other.content == own.content && other.uuid == own.uuid;
        let mut sources = vec![self.source(volume)];
        if let Some(id) = &own.uuid {
            let volumes = self.layout.volumes.iter().enumerate();
            let volumes = volumes.filter(|(index, other)| *index != volume && is_of(other));
            sources.extend(volumes.map(|(index, _)| self.source(index)));
            let others = self.others.iter().filter(|(of, _)| of == id);
            sources.extend(others.map(|(_, device)| Arc::clone(device.source())));
        }
        sources
    }
}

#[cfg(test)]
impl Assembly {
    /// Volumes as they say where their bytes are.
    pub(crate) fn with_segments(layout: VolumeLayout, disks: &[Arc<dyn Source>]) -> Self {
        let disks = DeviceDisks::new(disks);
        let devices = layout.volumes.iter().map(|volume| Some(disks.device(&volume.segments))).collect();
        Self { layout, devices, others: Vec::new() }
    }
}

/// Assembles the volumes of the guest's disks. `disks[0]` is the requested one. The others are candidates for
/// the volume groups and arrays that it is part of; only their parts of these are used. Encrypted volumes are
/// opened by `unlock`, if it has their keys.
pub fn assemble(disks: &[Arc<dyn Source>], unlock: Option<&dyn Unlock>) -> Assembly {
    stack::assemble(disks, unlock)
}

/// The content of the guest's disks, as [`assemble`] finds it without keys.
pub fn layout(disks: &[Arc<dyn Source>]) -> VolumeLayout {
    assemble(disks, None).layout
}
