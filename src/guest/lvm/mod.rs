//! LVM2: logical volumes on physical volumes.
//!
//! `label` finds a physical volume, `area` its metadata. `config` parses their text, `group` interprets it,
//! and `resolve` makes devices of logical volumes. `mirror` chooses the images of RAID volumes, `snapshot`,
//! `thin` and `cache` read the metadata of dm-snapshot, dm-thin and dm-cache (the latter two by `btree`), and
//! `overlay` puts chunks of one device over another. This file assembles them: it decides which physical
//! volumes belong to a group, and which volumes the group shows.

mod area;
mod btree;
mod cache;
mod config;
mod group;
mod label;
mod mirror;
mod overlay;
mod resolve;
mod snapshot;
mod thin;

use std::collections::{BTreeMap, BTreeSet};

use crate::guest::Source as _;
use crate::guest::volumes::{Device, DeviceDisks, MissingMembers, SetKind};

use group::{LogicalDefinition, VolumeGroup, check_name};
use resolve::Resolver;

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
pub(crate) struct PhysicalVolume {
    /// Its identity.
    pub(crate) id: LvmId,
    /// All of it, with the label.
    device: Device,
    /// The disk where it begins, for messages.
    disk: u32,
    /// It has a part of the first disk.
    is_own: bool,
    /// The newest copy in its metadata areas; `None` if they are empty (the metadata may be on other physical
    /// volumes).
    group: Option<VolumeGroup>,
    /// Facts about its damage.
    pub(crate) remarks: Vec<String>,
}

impl PhysicalVolume {
    /// The physical volume on a device, if it is one.
    pub(crate) fn find(device: &Device, disk: u32, is_own: bool) -> Option<Self> {
        let part = device.source();
        let mut head = vec![0; part.size().min(2048) as usize];
        part.read_at(0, &mut head).ok()?;
        let label = find_label(&head)?;
        let (texts, mut remarks) = area::texts(part, &label);
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
        Some(Self { id: label.id, device: device.clone(), disk, is_own, group, remarks })
    }

    /// The sequence number of its copy of the group's metadata.
    pub(crate) fn state(&self) -> Option<u64> {
        self.group.as_ref().map(|group| group.number)
    }

    /// The identity of its group, by its own copy.
    pub(crate) fn group_id(&self) -> Option<LvmId> {
        self.group.as_ref().map(|group| group.id)
    }
}

/// A logical volume as it is shown.
pub(crate) struct LogicalVolume {
    /// `VG-LV`.
    pub(crate) name: String,
    /// The identity of its group.
    pub(crate) id: String,
    /// Its bytes, or why they are unknown.
    pub(crate) device: Result<Device, String>,
    /// Bytes, as far as known.
    pub(crate) size: u64,
}

/// The result of the assembly.
#[derive(Default)]
pub(crate) struct AssembledGroups {
    /// Ordered by the names of the groups, then their own.
    pub(crate) volumes: Vec<LogicalVolume>,
    /// Groups that lack physical volumes.
    pub(crate) missing: Vec<MissingMembers>,
    /// Facts that the user should know.
    pub(crate) remarks: Vec<String>,
    /// Whether a group was assembled.
    pub(crate) has_some: bool,
}

/// The groups that were assembled already.
#[derive(Default)]
pub(crate) struct GroupAssembler {
    done: BTreeSet<LvmId>,
    /// How many groups have a name.
    names: BTreeMap<String, u32>,
    /// Physical volumes whose group is unknown, and said to be.
    unknown: BTreeSet<LvmId>,
}

impl GroupAssembler {
    /// Assembles the groups that own physical volumes are part of, and that were not assembled before; only
    /// those with all physical volumes if `complete`. Of the others, a physical volume is used only if it
    /// names such a group itself, or if it names none and matches the group's description.
    pub(crate) fn assemble(
        &mut self,
        physical: &[PhysicalVolume],
        complete: bool,
        disks: &DeviceDisks,
    ) -> AssembledGroups {
        let mut groups = AssembledGroups::default();
        let own: BTreeSet<LvmId> = physical.iter().filter(|pv| pv.is_own).map(|pv| pv.id).collect();
        let mut newest: BTreeMap<LvmId, &VolumeGroup> = BTreeMap::new();
        for group in physical.iter().filter_map(|pv| pv.group.as_ref()) {
            let known = newest.entry(group.id).or_insert(group);
            if known.number < group.number {
                *known = group;
            }
        }
        let has_part =
            |group: &&&VolumeGroup| group.physical.values().any(|physical| own.contains(&physical.id));
        let mut ours: Vec<&VolumeGroup> = newest.values().filter(has_part).copied().collect();
        if !complete {
            for id in &own {
                let is_known =
                    ours.iter().any(|group| group.physical.values().any(|physical| physical.id == *id));
                if !is_known && self.unknown.insert(*id) {
                    groups.remarks.push(format!("the volume group of physical volume {id} is unknown"));
                }
            }
        }
        ours.sort_by(|one, other| (&one.name, one.id).cmp(&(&other.name, other.id)));
        for group in ours {
            if self.done.contains(&group.id) || complete && !is_complete(group, physical) {
                continue;
            }
            groups.has_some = true;
            self.done.insert(group.id);
            if self.done.len() > GROUP_LIMIT {
                let fact = format!("volume group {} is not shown: {GROUP_LIMIT} others are", group.name);
                groups.remarks.push(fact);
                continue;
            }
            // Groups of one name are distinguished by their identity.
            let seen = self.names.entry(group.name.clone()).or_default();
            *seen += 1;
            let suffix = if *seen > 1 { format!("~{}", group.id) } else { String::new() };
            show(group, &suffix, physical, disks, &mut groups);
        }
        groups
    }
}

/// Whether all physical volumes of a group are there.
fn is_complete(group: &VolumeGroup, physical: &[PhysicalVolume]) -> bool {
    let present = joined(group, physical, &mut Vec::new());
    group.physical.values().all(|described| present.contains_key(&described.id))
}

fn show(
    group: &VolumeGroup,
    suffix: &str,
    physical: &[PhysicalVolume],
    disks: &DeviceDisks,
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
        let (kind, name, id) = (SetKind::VolumeGroup, name.clone(), id.to_string());
        shown.missing.push(MissingMembers { kind, name, id, state: Some(group.number), absent });
    }
    let known =
        |pv: &&PhysicalVolume| pv.group.as_ref().filter(|group| group.id == id).map(|group| group.number);
    let own = physical.iter().filter(|pv| pv.is_own).filter_map(|pv| known(&pv)).max();
    if let Some(own) = own
        && own < group.number
        && let Some(other) = physical.iter().find(|pv| known(pv) == Some(group.number))
    {
        // The disks are from different machines or moments, or one was absent for a while.
        let disk = other.disk;
        let fact = format!(
            "volume group {name}: the metadata of disk {disk} are newer ({}) and are used",
            group.number
        );
        shown.remarks.push(format!("{fact}; the first disk's are older ({own})"));
    }
    let mut resolver = Resolver::new(group, &present, disks);
    // A snapshot is known by the name of its hidden store, not by that of the link to its origin.
    let is_shown = |name: &String, logical: &LogicalDefinition| {
        !logical.is_snapshot_link() && (logical.is_visible || resolver.is_store(name))
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
        let device = resolver.shown(volume).map_err(|problem| readable(&problem));
        let extents = logical
            .segments
            .as_ref()
            .ok()
            .and_then(|all| all.last())
            .map_or(0, |last| last.start + last.count);
        let size = extents.saturating_mul(group.extent_len);
        let id = id.to_string();
        shown.volumes.push(LogicalVolume { name: shown_name, id, device, size });
    }
    shown
        .remarks
        .extend(resolver.remarks.iter().map(|remark| readable(&format!("volume group {name}: {remark}"))));
}

/// The present physical volumes of a group.
fn joined(
    group: &VolumeGroup,
    physical: &[PhysicalVolume],
    remarks: &mut Vec<String>,
) -> BTreeMap<LvmId, Device> {
    let mut present: BTreeMap<LvmId, Device> = BTreeMap::new();
    let mut first_disks: BTreeMap<LvmId, u32> = BTreeMap::new();
    for pv in physical {
        let Some(described) = group.physical.values().find(|described| described.id == pv.id) else {
            continue;
        };
        let extents_len = described.extent_count.checked_mul(group.extent_len);
        let needed = extents_len.and_then(|len| len.checked_add(described.start));
        let joins = match pv.group_id() {
            Some(id) => id == group.id,
            None => needed.is_some_and(|needed| needed <= pv.device.size()),
        };
        if !joins {
            let fact = format!("disk {}: physical volume {} is not part of volume group", pv.disk, pv.id);
            remarks.push(format!("{fact} {}", group.name));
            continue;
        }
        // Those of disk 0 come first.
        if let Some(first) = first_disks.get(&pv.id) {
            let place = if *first == pv.disk {
                "twice on it".to_owned()
            } else {
                format!("on disk {}, too", pv.disk)
            };
            remarks.push(format!("physical volume {} is {place}; the first is used", pv.id));
            continue;
        }
        first_disks.insert(pv.id, pv.disk);
        present.insert(pv.id, pv.device.clone());
    }
    present
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
