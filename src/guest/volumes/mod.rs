//! The volumes of a guest's disk: its partitions, the logical volumes it has a part in, or the disk as a whole.
//!
//! Promises: [`layout`] never fails. What is damaged, missing or of an unknown kind is said in remarks, and at each volume
//! in its `problem`; the rest is shown. Whatever the disks hold, lists and texts stay below the limits stated here.

mod map;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::guest::Source;
use crate::guest::content::{Content, probe};

pub use map::{Leg, Place, Segment, Stretch, locate};

/// What the guest's disks hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
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

/// A partition of the first disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Partition {
    /// As Linux numbers them: from 1, logical ones from 5.
    pub number: u32,
    /// Where it begins, in bytes.
    pub start: u64,
    /// Bytes; what would lie beyond the end of the disk is cut off.
    pub len: u64,
    /// Its name in the table (GPT), if it has one.
    pub name: Option<String>,
    /// What the table says that it is for: `Linux filesystem`, `EFI System`, or its type's code.
    pub type_name: String,
    /// What Linux calls its `PARTUUID`.
    pub uuid: Option<String>,
    /// It only holds logical partitions.
    pub is_extended: bool,
}

/// A volume: something that may hold a file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// `p1` for a partition, `VG-LV` for a logical volume (as in `/dev/mapper`), `disk` for a whole disk. Can stand as a file's name.
    pub name: String,
    /// Bytes.
    pub size: u64,
    /// Where they are: without gaps, from 0 to `size`. Empty if that is not known; then there is a `problem`.
    pub segments: Vec<Segment>,
    /// What it holds.
    pub content: Content,
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
    /// The identities of the physical volumes that are not there.
    pub absent: Vec<String>,
}

impl Volume {
    /// Where the bytes from `at` on lie, as many of `len` as lie together; `None` at and beyond the end.
    pub fn locate(&self, at: u64, len: u64) -> Option<Stretch> {
        locate(&self.segments, at, len)
    }
}

/// What the guest's disks hold. `disks[0]` is the one that is looked at; the others are offered for the volume groups that it
/// has a part in, and only those parts of them are used.
pub fn layout(disks: &[Arc<dyn Source>]) -> Layout {
    let mut layout = Layout::default();
    if let Some(disk) = disks.first() {
        layout.volumes.push(whole(disk));
    }
    layout
}

/// The bytes of a volume; `disks` as [`layout`] was given them.
pub fn volume_source(volume: &Volume, disks: &[Arc<dyn Source>]) -> Arc<dyn Source> {
    Arc::new(map::Mapped { size: volume.size, segments: volume.segments.clone(), disks: disks.to_vec() })
}

/// A disk without a partition table.
fn whole(disk: &Arc<dyn Source>) -> Volume {
    plain("disk".to_owned(), disk, 0, disk.size())
}

/// A volume that is a stretch of the first disk.
fn plain(name: String, disk: &Arc<dyn Source>, start: u64, len: u64) -> Volume {
    let found = probe(&crate::guest::Slice::new(Arc::clone(disk), start, len));
    let place = Place::Linear(Leg { disk: 0, offset: start });
    let segments = if len > 0 { vec![Segment { at: 0, len, place }] } else { Vec::new() };
    let problem = found.content.problem();
    Volume { name, size: len, segments, content: found.content, label: found.label, uuid: found.uuid, problem }
}
