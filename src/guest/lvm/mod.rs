//! LVM2: logical volumes of physical volumes.
//!
//! `label` finds a physical volume, `area` its metadata; these are text, which `config` reads and `group`
//! understands. `resolve` says where the bytes of a logical volume are. Here they are put together: which physical
//! volumes belong to a group, and what it shows.

mod area;
mod config;
mod group;
mod label;
mod resolve;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::guest::Source;
use crate::guest::partition::DiskRange;
use crate::guest::volumes::{MissingVolumeGroup, VolumeSegment};

use group::{LogicalDefinition, SegmentType, VolumeGroup, check_name};
use resolve::{Present, Resolver};

pub use label::{Label, LvmId, find_label};

/// Groups that one disk may have a part in.
const GROUP_LIMIT: usize = 64;
/// Volumes of a group that are shown.
const VOLUME_LIMIT: usize = 1024;
/// Bytes of a name in `/dev/mapper`; the kernel has none that are longer.
const MAPPER_NAME_LIMIT: usize = 127;
/// Characters of a sentence that may quote names.
const PROBLEM_LIMIT: usize = 300;

/// A physical volume, and what it says of its group.
pub struct PhysicalVolume {
    /// Its identity.
    pub id: LvmId,
    present: Present,
    /// The newest that its metadata areas hold; `None` if they hold nothing (it may be kept elsewhere).
    group: Option<VolumeGroup>,
    /// What is wrong with it.
    pub remarks: Vec<String>,
}

impl PhysicalVolume {
    /// The one in a stretch of a disk (`number` is that disk's), if there is one.
    pub fn find(disk: &dyn Source, number: u32, start: u64, len: u64) -> Option<Self> {
        let part = DiskRange::new(disk, start, len);
        let mut head = vec![0; part.size().min(2048) as usize];
        part.read_at(0, &mut head).ok()?;
        let label = find_label(&head)?;
        let (texts, mut remarks) = area::texts(&part, &label);
        let mut group: Option<VolumeGroup> = None;
        for text in texts {
            match VolumeGroup::parse(&text) {
                Ok(found) if group.as_ref().is_none_or(|group| group.number < found.number) => group = Some(found),
                Ok(_) => {}
                Err(fact) => remarks.push(format!("physical volume {}: its metadata: {fact}", label.id)),
            }
        }
        let present = Present { disk: number, start, len: part.size() };
        Some(Self { id: label.id, present, group, remarks })
    }

    /// How often its group had been changed when it was last told.
    pub fn state(&self) -> Option<u64> {
        self.group.as_ref().map(|group| group.number)
    }

    /// The identity of its group, as far as it knows it itself.
    pub fn group_id(&self) -> Option<LvmId> {
        self.group.as_ref().map(|group| group.id)
    }
}

/// A logical volume as it is shown.
pub struct LogicalVolume {
    /// `VG-LV`.
    pub name: String,
    /// Where its bytes are, or why that is not known.
    pub segments: Result<Vec<VolumeSegment>, String>,
    /// Bytes, as far as is known.
    pub size: u64,
}

/// What was put together.
#[derive(Default)]
pub struct AssembledGroups {
    /// In the order of their groups' and their own names.
    pub volumes: Vec<LogicalVolume>,
    /// Groups that lack physical volumes.
    pub missing: Vec<MissingVolumeGroup>,
    /// What should be known.
    pub remarks: Vec<String>,
}

/// Puts together the groups that disk 0 has a part in. Of other disks only those physical volumes are used that say
/// themselves that they belong to such a group, or say nothing and are what the group describes.
pub fn groups(physical: &[PhysicalVolume], disks: &[Arc<dyn Source>]) -> AssembledGroups {
    let mut groups = AssembledGroups::default();
    let own: BTreeSet<LvmId> = physical.iter().filter(|pv| pv.present.disk == 0).map(|pv| pv.id).collect();
    let mut newest: BTreeMap<LvmId, &VolumeGroup> = BTreeMap::new();
    for group in physical.iter().filter_map(|pv| pv.group.as_ref()) {
        let kept = newest.entry(group.id).or_insert(group);
        if kept.number < group.number {
            *kept = group;
        }
    }
    let has_part = |group: &&&VolumeGroup| group.physical.values().any(|physical| own.contains(&physical.id));
    let mut ours: Vec<&VolumeGroup> = newest.values().filter(has_part).copied().collect();
    ours.sort_by(|one, other| (&one.name, one.id).cmp(&(&other.name, other.id)));
    if ours.len() > GROUP_LIMIT {
        groups.remarks.push(format!("there are {} volume groups; {GROUP_LIMIT} are shown", ours.len()));
        ours.truncate(GROUP_LIMIT);
    }
    for id in &own {
        if !ours.iter().any(|group| group.physical.values().any(|physical| physical.id == *id)) {
            groups.remarks.push(format!("no volume group is known that physical volume {id} belongs to"));
        }
    }
    let mut names: BTreeMap<&str, u32> = BTreeMap::new();
    for group in ours {
        // Groups of one name differ by their identity.
        let seen = names.entry(&group.name).or_default();
        *seen += 1;
        let suffix = if *seen > 1 { format!("~{}", group.id) } else { String::new() };
        show(group, &suffix, physical, disks, &mut groups);
    }
    groups
}

fn show(
    group: &VolumeGroup,
    suffix: &str,
    physical: &[PhysicalVolume],
    disks: &[Arc<dyn Source>],
    shown: &mut AssembledGroups,
) {
    let (name, id) = (&group.name, group.id);
    let present = joined(group, physical, &mut shown.remarks);
    let absent = group.physical.values().map(|physical| physical.id).filter(|id| !present.contains_key(id));
    let absent: Vec<String> = absent.map(|id| id.to_string()).collect();
    if group.is_exported {
        shown.remarks.push(format!("volume group {name} is exported"));
    }
    if !absent.is_empty() {
        let state = group.number;
        shown.missing.push(MissingVolumeGroup { name: name.clone(), id: id.to_string(), state, absent });
    }
    let known = |pv: &&PhysicalVolume| pv.group.as_ref().filter(|group| group.id == id).map(|group| group.number);
    let own = physical.iter().filter(|pv| pv.present.disk == 0).filter_map(|pv| known(&pv)).max();
    if let Some(own) = own
        && own < group.number
        && let Some(other) = physical.iter().find(|pv| known(pv) == Some(group.number))
    {
        // Disks of different machines, or of different moments; or one that was absent for a while.
        let disk = other.present.disk;
        let fact =
            format!("disk {disk} describes volume group {name} by a newer state ({}), which is used", group.number);
        shown.remarks.push(format!("{fact}, than the first one does ({own})"));
    }
    let ties = ties(group);
    let mut resolver = Resolver::new(group, &present, disks);
    // A snapshot is known by the name of its store, which is hidden, not by that of what ties it to its origin.
    let is_shown = |name: &String, logical: &LogicalDefinition| {
        !logical.is_tie() && (logical.is_visible || ties.contains_key(name.as_str()))
    };
    let visible: Vec<_> = group.logical.iter().filter(|(name, logical)| is_shown(name, logical)).collect();
    if visible.len() > VOLUME_LIMIT {
        shown.remarks.push(format!("volume group {name} has {} volumes; {VOLUME_LIMIT} are shown", visible.len()));
    }
    for (volume, logical) in visible.into_iter().take(VOLUME_LIMIT) {
        let shown_name = format!("{}{suffix}", mapper_name(name, volume));
        let fits = if shown_name.len() - suffix.len() > MAPPER_NAME_LIMIT { Err(too_long(volume)) } else { Ok(()) };
        if let Err(fact) = check_name(volume).and(fits) {
            shown.remarks.push(format!("volume group {name}: {fact}"));
            continue;
        }
        let segments = match ties.get(volume.as_str()) {
            Some(problem) => Err(problem.clone()),
            None => resolver.volume(volume).map(Arc::unwrap_or_clone),
        };
        let extents =
            logical.segments.as_ref().ok().and_then(|all| all.last()).map_or(0, |last| last.start + last.count);
        let segments = segments.map_err(|problem| readable(&problem));
        let size = extents.saturating_mul(group.extent_len);
        shown.volumes.push(LogicalVolume { name: shown_name, segments, size });
    }
}

/// The physical volumes of a group that are there.
fn joined(group: &VolumeGroup, physical: &[PhysicalVolume], remarks: &mut Vec<String>) -> BTreeMap<LvmId, Present> {
    let mut present: BTreeMap<LvmId, Present> = BTreeMap::new();
    for pv in physical {
        let Some(described) = group.physical.values().find(|described| described.id == pv.id) else { continue };
        let extents_len = described.extent_count.checked_mul(group.extent_len);
        let needed = extents_len.and_then(|len| len.checked_add(described.start));
        let joins = match pv.group_id() {
            Some(id) => id == group.id,
            None => needed.is_some_and(|needed| needed <= pv.present.len),
        };
        if !joins {
            let fact = format!("disk {}: physical volume {} does not belong to volume group", pv.present.disk, pv.id);
            remarks.push(format!("{fact} {}", group.name));
            continue;
        }
        // Those of disk 0 come first.
        if let Some(first) = present.get(&pv.id) {
            let place = if first.disk == pv.present.disk {
                "twice on it".to_owned()
            } else {
                format!("on disk {}, too", pv.present.disk)
            };
            remarks.push(format!("physical volume {} is {place}; the first is used", pv.id));
            continue;
        }
        present.insert(pv.id, pv.present);
    }
    present
}

/// Volumes that are not what their own segments say, because snapshots of the old kind are tied to them; and why.
fn ties(group: &VolumeGroup) -> BTreeMap<&str, String> {
    let mut ties = BTreeMap::new();
    let segments = group.logical.values().filter_map(|logical| logical.segments.as_ref().ok()).flatten();
    for segment in segments {
        if let SegmentType::Snapshot { origin, store, is_merging } = &segment.kind {
            ties.insert(store.as_str(), format!("it is of the type snapshot (of {origin}), which is not read"));
            if *is_merging {
                ties.insert(origin.as_str(), format!("the snapshot {store} is being merged into it"));
            }
        }
    }
    ties
}

fn too_long(volume: &str) -> String {
    format!("the name of volume {} is too long", readable(volume))
}

/// A sentence that quotes names which nobody has checked.
fn readable(text: &str) -> String {
    let shown = text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c });
    shown.take(PROBLEM_LIMIT).collect()
}

/// As in `/dev/mapper`: hyphens are doubled, and a single one stands between.
fn mapper_name(group: &str, volume: &str) -> String {
    format!("{}-{}", group.replace('-', "--"), volume.replace('-', "--"))
}
