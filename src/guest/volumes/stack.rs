//! Finds what devices hold, and assembles it: partitions, arrays, volume groups and encrypted volumes, on
//! each other in any order.
//!
//! Every device is sorted in once: as a member of an array, as a physical volume, or as a volume with files.
//! An array or a group is assembled once, when all of its members are there, or when nothing else is left to
//! be assembled. The devices that it has are sorted in next.
//!
//! Promise: this ends for any disks. Devices are bounded in number and in nesting.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;

use crate::guest::btrfs::{Btrfs, BtrfsDevice};
use crate::guest::content::{DetectedVolume, VolumeContent, probe};
use crate::guest::luks::{DataSegment, HeaderId};
use crate::guest::lvm::{GroupAssembler, PhysicalVolume};
use crate::guest::md::{self, MdMember};
use crate::guest::{Source, partition};

use super::device::TOTAL_WEIGHT;
use super::{
    Assembly, Device, DeviceDisks, LockedVolume, MissingMembers, OpenContainer, SetKind, SetMember, Volume,
    VolumeLayout, VolumeMapping, VolumeSegment,
};

/// Remarks that are kept.
const REMARK_LIMIT: usize = 100;
/// Devices that are sorted in.
const DEVICE_LIMIT: usize = 4096;
/// Devices on each other: partition, array, physical volume, encrypted volume, and the same again.
const DEPTH_LIMIT: u32 = 10;
/// Encrypted volumes that are opened.
const CONTAINER_LIMIT: usize = 64;
/// Absent members that are reported, of all sets together.
const ABSENT_LIMIT: usize = 1024;
/// Bytes of a sentence that may quote a guest's texts.
const PROBLEM_LIMIT: usize = 1000;

/// Opens encrypted volumes.
pub trait Unlock {
    /// The volume inside of an encrypted one: `name` is the volume's own.
    fn unlock(&self, name: &str, found: &DetectedVolume, source: &Arc<dyn Source>) -> UnlockOutcome;
}

/// What an encrypted volume is without and with its key.
pub enum UnlockOutcome {
    /// Opened.
    Opened(UnlockedVolume),
    /// A container whose key is not known.
    Locked(HeaderId),
    /// It cannot be opened; one sentence.
    Problem(String),
    /// Of a kind that is never opened.
    Unknown,
}

/// An opened encrypted volume.
pub struct UnlockedVolume {
    /// Its name, unique as far as the encrypted volume's is.
    pub name: String,
    /// Its decrypted bytes.
    pub source: Arc<dyn Source>,
    /// Identifies the container.
    pub id: HeaderId,
    /// Where its bytes are in the container.
    pub data: Vec<DataSegment>,
}

/// A device that is not yet sorted in.
struct Candidate {
    device: Device,
    /// What messages call it: a volume's name, and the disk unless that is the first.
    place: String,
    /// The disk where it begins, for messages.
    disk: u32,
    /// It has a part of the first disk.
    is_own: bool,
    depth: u32,
}

/// The state of the assembly.
struct Stack<'a> {
    disks: DeviceDisks,
    unlock: Option<&'a dyn Unlock>,
    layout: VolumeLayout,
    devices: Vec<Option<Device>>,
    queue: VecDeque<Candidate>,
    queued_count: usize,
    members: Vec<MdMember>,
    /// How deep the deepest member of an array or a group lies.
    depth: u32,
    physical: Vec<PhysicalVolume>,
    /// Devices of file systems that can be on several, and whether they are shown as volumes.
    file_system_devices: Vec<(BtrfsDevice, Device, bool)>,
    arrays: BTreeSet<String>,
    groups: GroupAssembler,
    /// Segments and legs that the layout may still have.
    listed_left: usize,
}

pub(super) fn assemble(disks: &[Arc<dyn Source>], unlock: Option<&dyn Unlock>) -> Assembly {
    if disks.is_empty() {
        return Assembly { layout: VolumeLayout::default(), devices: Vec::new(), others: Vec::new() };
    }
    let mut stack = Stack::new(disks, unlock);
    stack.first_disk();
    for number in 1..disks.len() as u32 {
        stack.other_disk(number);
    }
    stack.run();
    let others = stack.file_systems();
    let Stack { mut layout, devices, .. } = stack;
    limit_absent(&mut layout.missing);
    if layout.remarks.len() > REMARK_LIMIT {
        let more = layout.remarks.len() - REMARK_LIMIT;
        layout.remarks.truncate(REMARK_LIMIT);
        layout.remarks.push(format!("{more} more remarks are not shown"));
    }
    Assembly { layout, devices, others }
}

/// The members of volume groups, arrays and file systems of a disk: on the disk itself, in its partitions,
/// and in what is assembled of it alone. They identify the other disks of a set.
pub fn set_members(disk: &Arc<dyn Source>) -> Vec<SetMember> {
    /// A disk's metadata can name any number.
    const MEMBER_LIMIT: usize = 1024;
    let mut stack = Stack::new(std::slice::from_ref(disk), None);
    stack.other_disk(0);
    stack.run();
    let physical = stack.physical.iter().map(|pv| SetMember {
        id: pv.id.to_string(),
        set: pv.group_id().map(|id| id.to_string()),
        state: pv.state(),
    });
    let members = stack.members.iter().filter_map(|member| {
        let (set, state) = (Some(member.array().to_owned()), Some(member.state()));
        Some(SetMember { id: member.id()?, set, state })
    });
    let devices = stack.file_system_devices.iter().map(|(found, ..)| SetMember {
        id: found.id.clone(),
        set: Some(found.fsid.clone()),
        state: None,
    });
    physical.chain(members).chain(devices).take(MEMBER_LIMIT).collect()
}

impl<'a> Stack<'a> {
    fn new(disks: &[Arc<dyn Source>], unlock: Option<&'a dyn Unlock>) -> Self {
        Self {
            disks: DeviceDisks::new(disks),
            unlock,
            layout: VolumeLayout::default(),
            devices: Vec::new(),
            queue: VecDeque::new(),
            queued_count: 0,
            members: Vec::new(),
            depth: 0,
            physical: Vec::new(),
            file_system_devices: Vec::new(),
            arrays: BTreeSet::new(),
            groups: GroupAssembler::default(),
            listed_left: TOTAL_WEIGHT,
        }
    }

    /// Shows the first disk's partitions, or the disk as a whole.
    fn first_disk(&mut self) {
        let disk = self.disks.disk(0);
        let (table, remarks) = partition::read(&**disk.source());
        self.layout.remarks = remarks;
        if let Some(table) = table {
            self.layout.table = Some(table.kind.name().to_owned());
            self.layout.sector_size = Some(table.sector_len as u32);
            self.layout.partitions = table.partitions;
        }
        for part in self.layout.partitions.clone().iter().filter(|part| !part.is_extended) {
            self.show(
                format!("p{}", part.number),
                Ok(disk.range(part.start, part.len, &self.disks)),
                part.len,
                0,
            );
        }
        // A hybrid ISO image has a partition table as well, but the ISO 9660 file system describes all of it.
        let is_plain = self.layout.volumes.is_empty();
        if is_plain || probe(&**disk.source()).content == VolumeContent::Iso9660 {
            let size = disk.size();
            self.show("disk".to_owned(), Ok(disk), size, 0);
        }
    }

    /// Queues the partitions of another disk, or the disk as a whole.
    fn other_disk(&mut self, number: u32) {
        let disk = self.disks.disk(number);
        let mut parts = Vec::new();
        let mut add = |place: String, device: Device| {
            parts.push(Candidate { device, place, disk: number, is_own: false, depth: 0 });
        };
        match partition::read(&**disk.source()).0 {
            // LVM ignores a disk with partitions, even if an old label precedes them.
            Some(table) if !table.partitions.is_empty() => {
                for part in table.partitions.iter().filter(|part| !part.is_extended) {
                    let device = disk.range(part.start, part.len, &self.disks);
                    add(format!("p{} of disk {number}", part.number), device);
                }
            }
            _ => add(format!("disk {number}"), disk),
        }
        for part in parts {
            self.queue(part);
        }
    }

    fn queue(&mut self, candidate: Candidate) {
        if candidate.depth <= DEPTH_LIMIT && self.queued_count < DEVICE_LIMIT {
            self.queued_count += 1;
            self.queue.push_back(candidate);
        }
    }

    /// Assembles until nothing is left. What lacks members waits until nothing else can be done: they may be
    /// on devices that are assembled later.
    fn run(&mut self) {
        loop {
            while let Some(candidate) = self.queue.pop_front() {
                self.sort_in(candidate);
            }
            let has_more = self.add_arrays(true)
                || self.add_groups(true)
                || self.add_arrays(false)
                || self.add_groups(false);
            if !has_more {
                return;
            }
        }
    }

    /// Keeps a member of an array or a group.
    fn sort_in(&mut self, candidate: Candidate) {
        let Candidate { device, place, disk, is_own, depth } = candidate;
        match MdMember::find(&device, &place, is_own) {
            Some(Ok(member)) => {
                self.depth = self.depth.max(depth);
                self.members.push(member);
                return;
            }
            Some(Err(remark)) => {
                if is_own {
                    self.layout.remarks.push(remark);
                }
                return;
            }
            None => {}
        }
        if let Some(mut found) = PhysicalVolume::find(&device, disk, is_own) {
            self.depth = self.depth.max(depth);
            if is_own {
                self.layout.remarks.append(&mut found.remarks);
            }
            self.physical.push(found);
            return;
        }
        if let Some(found) = Btrfs::device(&**device.source()) {
            self.file_system_devices.push((found, device, is_own));
        }
    }

    /// Reports the devices that file systems on volumes lack. Returns those that they have on other disks,
    /// with the file system's UUID.
    fn file_systems(&mut self) -> Vec<(String, Device)> {
        let own: BTreeSet<String> = self
            .file_system_devices
            .iter()
            .filter(|(.., is_own)| *is_own)
            .map(|(found, ..)| found.fsid.clone())
            .collect();
        let mut others = Vec::new();
        for id in own {
            let of_it = || self.file_system_devices.iter().filter(|(found, ..)| found.fsid == id);
            let sources: Vec<_> = of_it().map(|(_, device, _)| Arc::clone(device.source())).collect();
            // What is damaged is a problem of the volume.
            let absent = Btrfs::absent_devices(&sources).unwrap_or_default();
            if !absent.is_empty() {
                let volume = self.layout.volumes.iter().find(|volume| volume.uuid.as_ref() == Some(&id));
                let name = volume.map_or_else(|| id.clone(), |volume| volume.name.clone());
                let (kind, state) = (SetKind::FileSystem, None);
                self.layout.missing.push(MissingMembers { kind, name, id: id.clone(), state, absent });
            }
            others.extend(
                of_it().filter(|(.., is_own)| !is_own).map(|(_, device, _)| (id.clone(), device.clone())),
            );
        }
        others
    }

    /// Assembles arrays; only those with all members if `complete`. Whether there was one.
    fn add_arrays(&mut self, complete: bool) -> bool {
        let members = std::mem::take(&mut self.members);
        let mut has_some = false;
        for (id, of_array) in md::by_array(&members) {
            if self.arrays.contains(id) || complete && !md::is_complete(&of_array) {
                continue;
            }
            has_some = true;
            self.arrays.insert(id.to_owned());
            let Some(array) = md::assemble(&of_array, &self.disks) else { continue };
            let depth = self.depth + 1;
            if !array.is_own {
                if let Ok(device) = array.device {
                    self.queue(Candidate { device, place: array.name, disk: 0, is_own: false, depth });
                }
                continue;
            }
            self.layout.remarks.extend(array.remarks);
            let name = self.unique(array.name, &array.uuid);
            if !array.absent.is_empty() {
                let (kind, name, id) = (SetKind::Array, name.clone(), array.uuid);
                let absent = array.absent;
                self.layout.missing.push(MissingMembers { kind, name, id, state: None, absent });
            }
            let size = array.device.as_ref().map_or(0, Device::size);
            self.show(name, array.device, size, depth);
        }
        self.members = members;
        has_some
    }

    /// Assembles volume groups; only those with all physical volumes if `complete`. Whether there was one.
    fn add_groups(&mut self, complete: bool) -> bool {
        let groups = self.groups.assemble(&self.physical, complete, &self.disks);
        self.layout.missing.extend(groups.missing);
        self.layout.remarks.extend(groups.remarks);
        let depth = self.depth + 1;
        for found in groups.volumes {
            let name = self.unique(found.name, &found.id);
            self.show(name, found.device, found.size, depth);
        }
        groups.has_some
    }

    /// A name that no other volume has.
    fn unique(&self, name: String, id: &str) -> String {
        let is_taken = |name: &str| self.layout.volumes.iter().any(|volume| volume.name == name);
        if is_taken(&name) { format!("{name}~{id}") } else { name }
    }

    /// Shows a device with a part of the first disk, and queues it and what it holds.
    fn show(&mut self, name: String, device: Result<Device, String>, size: u64, depth: u32) {
        if self.layout.volumes.len() >= DEVICE_LIMIT {
            return;
        }
        let unknown = DetectedVolume { content: VolumeContent::Unknown, label: None, uuid: None };
        let (device, found, problem) = match device {
            Ok(device) => {
                let found = probe(&**device.source());
                let problem = found.content.problem();
                (Some(device), found, problem)
            }
            Err(problem) => (None, unknown, Some(readable(&problem))),
        };
        let index = self.layout.volumes.len();
        let segments = device.as_ref().map(|device| self.listed(device)).unwrap_or_default();
        let size = device.as_ref().map_or(size, Device::size);
        let DetectedVolume { content, label, uuid } = found.clone();
        let volume = Volume { name: name.clone(), size, segments, content, label, uuid, problem };
        self.layout.volumes.push(volume);
        self.devices.push(device.clone());
        let Some(device) = device else { return };
        if matches!(content, VolumeContent::Luks1 | VolumeContent::Luks2 | VolumeContent::BitLocker) {
            self.open(index, &found, &device, depth);
        }
        // Linux looks for partitions on arrays, and not on logical volumes.
        let is_plain = matches!(content, VolumeContent::Unknown | VolumeContent::Empty);
        if depth > 0 && is_plain && name.starts_with("md") && self.partitions(&name, &device, depth) {
            return;
        }
        let disk = device.segments().first().and_then(first_disk).unwrap_or(0);
        self.queue(Candidate { device, place: name, disk, is_own: true, depth });
    }

    /// The segments of a device, as far as the layout may have them; else all of it is computed.
    fn listed(&mut self, device: &Device) -> Vec<VolumeSegment> {
        let weight: usize = device.segments().iter().map(VolumeSegment::weight).sum();
        if let Some(left) = self.listed_left.checked_sub(weight) {
            self.listed_left = left;
            return device.segments().to_vec();
        }
        vec![VolumeSegment { at: 0, len: device.size(), place: VolumeMapping::Computed }]
    }

    /// Shows the partitions of an array, and whether it has any.
    fn partitions(&mut self, name: &str, device: &Device, depth: u32) -> bool {
        let Some(table) = partition::read(&**device.source()).0 else { return false };
        let parts: Vec<_> = table.partitions.iter().filter(|part| !part.is_extended).collect();
        if depth >= DEPTH_LIMIT {
            return false;
        }
        for part in &parts {
            let id = format!("p{}", part.number);
            let shown = self.unique(format!("{name}{id}"), &id);
            self.show(shown, Ok(device.range(part.start, part.len, &self.disks)), part.len, depth + 1);
        }
        !parts.is_empty()
    }

    /// Shows what an encrypted volume holds, if there is a key for it.
    fn open(&mut self, index: usize, found: &DetectedVolume, device: &Device, depth: u32) {
        let name = &self.layout.volumes[index].name;
        let Some(unlock) = self.unlock else { return };
        match unlock.unlock(name, found, device.source()) {
            UnlockOutcome::Opened(_)
                if depth >= DEPTH_LIMIT || self.layout.containers.len() >= CONTAINER_LIMIT =>
            {
                let fact = format!("it is encrypted ({}); there are too many of these", found.content);
                self.layout.volumes[index].problem = Some(fact);
            }
            UnlockOutcome::Opened(UnlockedVolume { name, source, id, data }) => {
                let device = Device::encrypted(source, self.layout.containers.len() as u32, &self.disks);
                self.layout.containers.push(OpenContainer { volume: index, id, data });
                let (name, size) = (self.unique(name, &index.to_string()), device.size());
                self.layout.volumes[index].problem =
                    Some(format!("it is encrypted ({}); its files are in {name}", found.content));
                self.show(name, Ok(device), size, depth + 1);
            }
            UnlockOutcome::Locked(id) => self.layout.locked.push(LockedVolume { volume: index, id }),
            UnlockOutcome::Problem(problem) => {
                self.layout.volumes[index].problem = Some(readable(&problem));
            }
            UnlockOutcome::Unknown => {}
        }
    }
}

/// Keeps the first absent members: a disk's metadata can name any number.
fn limit_absent(missing: &mut Vec<MissingMembers>) {
    let mut left = ABSENT_LIMIT;
    missing.retain_mut(|set| {
        set.absent.truncate(left);
        left -= set.absent.len();
        !set.absent.is_empty()
    });
}

/// The disk where a segment begins.
fn first_disk(segment: &VolumeSegment) -> Option<u32> {
    segment.cut(0, 1, 0).and_then(|cut| super::locate(&[cut], 0, 1)?.on_disk()).map(|position| position.disk)
}

/// A sentence that quotes unchecked texts: without control characters, and cut.
fn readable(text: &str) -> String {
    let shown = text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c });
    shown.take(PROBLEM_LIMIT).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn absent_members_are_reported_up_to_a_limit() {
        let set = |name: &str, count: usize| MissingMembers {
            kind: SetKind::VolumeGroup,
            name: name.to_owned(),
            id: name.to_owned(),
            state: None,
            absent: (0..count).map(|number| number.to_string()).collect(),
        };
        let mut missing = vec![set("a", 1000), set("b", 1000), set("c", 1)];
        limit_absent(&mut missing);
        let left: Vec<(&str, usize)> =
            missing.iter().map(|set| (set.name.as_str(), set.absent.len())).collect();
        assert_eq!(left, [("a", 1000), ("b", 24)]);
    }
}
