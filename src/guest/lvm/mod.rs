//! LVM2: logical volumes on physical volumes.
//!
//! `label` finds a physical volume, `area` its metadata. `config` parses their text, `group` interprets it,
//! and `resolve` maps the bytes of a logical volume. This file assembles them: it decides which physical
//! volumes belong to a group, and which volumes the group shows.

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

/// Groups that one disk may be part of.
const GROUP_LIMIT: usize = 64;
/// Volumes of a group that are shown.
const VOLUME_LIMIT: usize = 1024;
/// Bytes of a name in `/dev/mapper`; the kernel's limit.
const MAPPER_NAME_LIMIT: usize = 127;
/// Characters of a sentence that may quote names.
const PROBLEM_LIMIT: usize = 300;

/// A physical volume, and its copy of its group's metadata.
pub struct PhysicalVolume {
    /// Its identity.
    pub id: LvmId,
    present: Present,
    /// The newest copy in its metadata areas; `None` if they are empty (the metadata may be on other physical
    /// volumes).
    group: Option<VolumeGroup>,
    /// Facts about its damage.
    pub remarks: Vec<String>,
}

impl PhysicalVolume {
    /// The physical volume in a range of a disk with this number, if there is one.
    pub fn find(disk: &dyn Source, number: u32, start: u64, len: u64) -> Option<Self> {
        let part = DiskRange::new(disk, start, len);
        let mut head = vec![0; part.size().min(2048) as usize];
        part.read_at(0, &mut head).ok()?;
        let label = find_label(&head)?;
        let (texts, mut remarks) = area::texts(&part, &label);
        let mut group: Option<VolumeGroup> = None;
        for text in texts {
            match VolumeGroup::parse(&text) {
                Ok(found) if group.as_ref().is_none_or(|group| group.number < found.number) => {
                    group = Some(found);
                }
                Ok(_) => {}
                Err(fact) => remarks.push(format!("physical volume {}: its metadata: {fact}", label.id)),
            }
        }
        let present = Present { disk: number, start, len: part.size() };
        Some(Self { id: label.id, present, group, remarks })
    }

    /// The sequence number of its copy of the group's metadata.
    pub fn state(&self) -> Option<u64> {
        self.group.as_ref().map(|group| group.number)
    }

    /// The identity of its group, by its own copy.
    pub fn group_id(&self) -> Option<LvmId> {
        self.group.as_ref().map(|group| group.id)
    }
}

/// A logical volume as it is shown.
pub struct LogicalVolume {
    /// `VG-LV`.
    pub name: String,
    /// Where its bytes are, or why that is unknown.
    pub segments: Result<Vec<VolumeSegment>, String>,
    /// Bytes, as far as known.
    pub size: u64,
}

/// The result of the assembly.
#[derive(Default)]
pub struct AssembledGroups {
    /// Ordered by the names of the groups, then their own.
    pub volumes: Vec<LogicalVolume>,
    /// Groups that lack physical volumes.
    pub missing: Vec<MissingVolumeGroup>,
    /// Facts that the user should know.
    pub remarks: Vec<String>,
}

/// Assembles the groups that disk 0 is part of. Of the other disks, a physical volume is used only if it
/// names such a group itself, or if it names none and matches the group's description.
pub fn groups(physical: &[PhysicalVolume], disks: &[Arc<dyn Source>]) -> AssembledGroups {
    let mut groups = AssembledGroups::default();
    let own: BTreeSet<LvmId> = physical.iter().filter(|pv| pv.present.disk == 0).map(|pv| pv.id).collect();
    let mut newest: BTreeMap<LvmId, &VolumeGroup> = BTreeMap::new();
    for group in physical.iter().filter_map(|pv| pv.group.as_ref()) {
        let known = newest.entry(group.id).or_insert(group);
        if known.number < group.number {
            *known = group;
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
            groups.remarks.push(format!("the volume group of physical volume {id} is unknown"));
        }
    }
    let mut names: BTreeMap<&str, u32> = BTreeMap::new();
    for group in ours {
        // Groups of one name are distinguished by their identity.
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
    let known =
        |pv: &&PhysicalVolume| pv.group.as_ref().filter(|group| group.id == id).map(|group| group.number);
    let own = physical.iter().filter(|pv| pv.present.disk == 0).filter_map(|pv| known(&pv)).max();
    if let Some(own) = own
        && own < group.number
        && let Some(other) = physical.iter().find(|pv| known(pv) == Some(group.number))
    {
        // The disks are from different machines or moments, or one was absent for a while.
        let disk = other.present.disk;
        let fact = format!(
            "volume group {name}: the metadata of disk {disk} are newer ({}) and are used",
            group.number
        );
        shown.remarks.push(format!("{fact}; the first disk's are older ({own})"));
    }
    let links = snapshot_links(group);
    let mut resolver = Resolver::new(group, &present, disks);
    // A snapshot is known by the name of its hidden store, not by that of the link to its origin.
    let is_shown = |name: &String, logical: &LogicalDefinition| {
        !logical.is_snapshot_link() && (logical.is_visible || links.contains_key(name.as_str()))
    };
    let visible: Vec<_> = group.logical.iter().filter(|(name, logical)| is_shown(name, logical)).collect();
    if visible.len() > VOLUME_LIMIT {
        shown
            .remarks
            .push(format!("volume group {name} has {} volumes; {VOLUME_LIMIT} are shown", visible.len()));
    }
    for (volume, logical) in visible.into_iter().take(VOLUME_LIMIT) {
        let shown_name = format!("{}{suffix}", mapper_name(name, volume));
        let fits =
            if shown_name.len() - suffix.len() > MAPPER_NAME_LIMIT { Err(too_long(volume)) } else { Ok(()) };
        if let Err(fact) = check_name(volume).and(fits) {
            shown.remarks.push(format!("volume group {name}: {fact}"));
            continue;
        }
        let segments = match links.get(volume.as_str()) {
            Some(problem) => Err(problem.clone()),
            None => resolver.volume(volume).map(Arc::unwrap_or_clone),
        };
        let extents = logical
            .segments
            .as_ref()
            .ok()
            .and_then(|all| all.last())
            .map_or(0, |last| last.start + last.count);
        let segments = segments.map_err(|problem| readable(&problem));
        let size = extents.saturating_mul(group.extent_len);
        shown.volumes.push(LogicalVolume { name: shown_name, segments, size });
    }
}

/// The present physical volumes of a group.
fn joined(
    group: &VolumeGroup,
    physical: &[PhysicalVolume],
    remarks: &mut Vec<String>,
) -> BTreeMap<LvmId, Present> {
    let mut present: BTreeMap<LvmId, Present> = BTreeMap::new();
    for pv in physical {
        let Some(described) = group.physical.values().find(|described| described.id == pv.id) else {
            continue;
        };
        let extents_len = described.extent_count.checked_mul(group.extent_len);
        let needed = extents_len.and_then(|len| len.checked_add(described.start));
        let joins = match pv.group_id() {
            Some(id) => id == group.id,
            None => needed.is_some_and(|needed| needed <= pv.present.len),
        };
        if !joins {
            let fact =
                format!("disk {}: physical volume {} is not part of volume group", pv.present.disk, pv.id);
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

/// Volumes that differ from their own segments because snapshots of the old kind are linked to them; and the
/// reason.
fn snapshot_links(group: &VolumeGroup) -> BTreeMap<&str, String> {
    let mut links = BTreeMap::new();
    let segments = group.logical.values().filter_map(|logical| logical.segments.as_ref().ok()).flatten();
    for segment in segments {
        if let SegmentType::Snapshot { origin, store, is_merging } = &segment.kind {
            links.insert(
                store.as_str(),
                format!("it is of the type snapshot (of {origin}), which is not supported"),
            );
            if *is_merging {
                links.insert(origin.as_str(), format!("the snapshot {store} is being merged into it"));
            }
        }
    }
    links
}

fn too_long(volume: &str) -> String {
    format!("the name of volume {} is too long", readable(volume))
}

/// A sentence that quotes unchecked names: without control characters, and cut.
fn readable(text: &str) -> String {
    let shown = text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c });
    shown.take(PROBLEM_LIMIT).collect()
}

/// The name in `/dev/mapper`: hyphens are doubled, and a single one is the separator.
fn mapper_name(group: &str, volume: &str) -> String {
    format!("{}-{}", group.replace('-', "--"), volume.replace('-', "--"))
}
