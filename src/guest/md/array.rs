//! Arrays: which members are used, and where an array's bytes are on them.

use std::collections::BTreeMap;

use crate::guest::raid::{Parity, ParityLayout, Ten, parity_device, striped_device, ten_device};
use crate::guest::volumes::{Device, DeviceDisks};

use super::MdMember;
use super::superblock::{Role, Superblock};

/// Members of an array; the kernel's limit of version 1 is 1920, and mdadm's is 384.
const MEMBER_LIMIT: u32 = 384;

/// The members of an array that are used, and why others are not.
pub(super) struct Chosen<'a> {
    /// The newest superblock.
    pub(super) newest: &'a Superblock,
    /// By role.
    pub(super) used: BTreeMap<u32, &'a MdMember>,
    /// The roles that the newest superblock calls active and that no device has.
    pub(super) absent: Vec<u32>,
    /// Sentences about devices that are not used.
    pub(super) remarks: Vec<String>,
}

/// Chooses the members of an array: those that the newest superblock calls active and that have its state.
/// `None` without any member.
pub(super) fn choose<'a>(members: &[&'a MdMember]) -> Option<Chosen<'a>> {
    let newest = members.iter().map(|member| &member.superblock).max_by_key(|found| found.events)?;
    let mut chosen = Chosen { newest, used: BTreeMap::new(), absent: Vec::new(), remarks: Vec::new() };
    for member in members {
        let found = &member.superblock;
        let says = |fact: String| format!("{} is not used: {fact}", member.place);
        let role = match newest.role_of(found.number) {
            Role::Active(role) => role,
            Role::Faulty => {
                chosen.remarks.push(says("the array marked it as faulty".to_owned()));
                continue;
            }
            Role::Spare => {
                // The newest state of a member that was added since is its own.
                if let Role::Active(_) = found.role_of(found.number) {
                    chosen.remarks.push(says("the array has removed it".to_owned()));
                }
                continue;
            }
            Role::Journal => continue,
        };
        // Members' superblocks are written one after the other, so the last change may be in some only.
        if found.events.saturating_add(1) < newest.events {
            let fact = format!("its state is {}, and the array's is {}", found.events, newest.events);
            chosen.remarks.push(says(fact));
            continue;
        }
        if let Some(recovered) = found.recovered
            && recovered < used_len(found)
        {
            chosen.remarks.push(says("it is being rebuilt".to_owned()));
            continue;
        }
        let room = member.device.size().saturating_sub(found.data_offset);
        if newest.level > 0 && room < found.member_len {
            chosen.remarks.push(says("it is shorter than the array needs".to_owned()));
            continue;
        }
        if found.has_bad_blocks {
            chosen.remarks.push(format!("{} has recorded bad blocks", member.place));
        }
        match chosen.used.get(&role) {
            None => drop(chosen.used.insert(role, member)),
            // Both are in sync: the replaced one was used until now.
            Some(other) if other.superblock.is_replacement && !found.is_replacement => {
                chosen.used.insert(role, member);
            }
            Some(other) if !found.is_replacement => {
                chosen.remarks.push(says(format!("{} has the same role", other.place)));
            }
            Some(_) => {}
        }
    }
    let active = newest.roles.iter().filter_map(|role| match role {
        Role::Active(role) if *role < newest.members => Some(*role),
        _ => None,
    });
    let mut absent: Vec<u32> = active.filter(|role| !chosen.used.contains_key(role)).collect();
    absent.sort_unstable();
    absent.dedup();
    chosen.absent = absent;
    Some(chosen)
}

/// Bytes of the member that its array uses.
fn used_len(found: &Superblock) -> u64 {
    if found.member_len > 0 { found.member_len } else { found.data_len }
}

/// The array as a device. An error is the reason why its bytes are unknown.
pub(super) fn device(chosen: &Chosen<'_>, disks: &DeviceDisks) -> Result<Device, String> {
    let newest = chosen.newest;
    if newest.is_reshaping {
        return Err("its shape is being changed, which is not supported while it lasts".to_owned());
    }
    if newest.has_journal {
        return Err("it has a journal on a device of its own, which is not supported".to_owned());
    }
    if !(1..=MEMBER_LIMIT).contains(&newest.members) {
        return Err(format!("it has {} members, which is not supported", newest.members));
    }
    match newest.level {
        -1 => linear(chosen, disks),
        0 => zones(chosen, disks),
        1 => {
            let members = members(chosen, newest.member_len, disks)?;
            members.into_iter().flatten().next().ok_or_else(|| "no member is in sync".to_owned())
        }
        4..=6 => {
            let chunk_len = chunk_len(newest)?;
            let layout = match newest.level {
                4 => Some(Parity::Last),
                level => Parity::of_number(level.cast_unsigned(), newest.layout),
            };
            let layout = layout.ok_or_else(|| format!("its layout {} is unknown", newest.layout))?;
            let layout = ParityLayout::new(layout, newest.members as usize, newest.level == 6);
            let layout = layout.ok_or_else(|| format!("it has {} members", newest.members))?;
            let member_len = newest.member_len / chunk_len * chunk_len;
            let len = member_len.checked_mul(layout.data_count() as u64).ok_or("it is too large")?;
            parity_device(layout, chunk_len, &members(chosen, member_len, disks)?, len, disks)
        }
        10 => {
            let chunk_len = chunk_len(newest)?;
            let chunks = newest.member_len / chunk_len;
            let layout = Ten::of_number(newest.layout, newest.members as usize, chunks)?;
            let len = layout.chunk_count().checked_mul(chunk_len).ok_or("it is too large")?;
            ten_device(&layout, chunk_len, &members(chosen, newest.member_len, disks)?, len, disks)
        }
        level => Err(format!("its level {level} is not supported")),
    }
}

fn chunk_len(newest: &Superblock) -> Result<u64, String> {
    let len = newest.chunk_len;
    if len.is_power_of_two() { Ok(len) } else { Err("its chunks have an impossible length".to_owned()) }
}

/// The data areas of the members by role, each of `len` bytes.
fn members(chosen: &Chosen<'_>, len: u64, disks: &DeviceDisks) -> Result<Vec<Option<Device>>, String> {
    if len == 0 {
        return Err("its members have no length".to_owned());
    }
    let mut all = Vec::new();
    for role in 0..chosen.newest.members {
        let Some(member) = chosen.used.get(&role) else {
            all.push(None);
            continue;
        };
        let area = member.device.range(member.superblock.data_offset, len, disks);
        if area.size() < len {
            return Err(format!("it reaches beyond the end of {}", member.place));
        }
        all.push(Some(area));
    }
    Ok(all)
}

/// All members with the whole room of each, in whole chunks.
fn whole_members(chosen: &Chosen<'_>, chunk_len: u64, disks: &DeviceDisks) -> Result<Vec<Device>, String> {
    let mut all = Vec::new();
    for role in 0..chosen.newest.members {
        let member = chosen.used.get(&role).ok_or_else(|| format!("its member {role} is missing"))?;
        let found = &member.superblock;
        // The members of 0.90 metadata say one length, of the smallest.
        let room = found.data_len / chunk_len * chunk_len;
        let area = member.device.range(found.data_offset, room, disks);
        if area.size() < room {
            return Err(format!("it reaches beyond the end of {}", member.place));
        }
        all.push(area);
    }
    Ok(all)
}

fn linear(chosen: &Chosen<'_>, disks: &DeviceDisks) -> Result<Device, String> {
    let chunk_len = chosen.newest.chunk_len.max(512);
    Ok(Device::concatenated(whole_members(chosen, chunk_len, disks)?, disks))
}

/// RAID 0: zones, the first striped over all members up to the length of the smallest, the next over the
/// others, and so on.
fn zones(chosen: &Chosen<'_>, disks: &DeviceDisks) -> Result<Device, String> {
    let newest = chosen.newest;
    let chunk_len = chunk_len(newest)?;
    let members = whole_members(chosen, chunk_len, disks)?;
    let mut zones = Vec::new();
    let (mut begin, mut end) = (0, 0);
    loop {
        let longer: Vec<&Device> = members.iter().filter(|member| member.size() > begin).collect();
        let Some(next) = longer.iter().map(|member| member.size()).min() else { break };
        let mut legs: Vec<(Device, u64)> = longer.into_iter().map(|member| (member.clone(), begin)).collect();
        let len = (next - begin).checked_mul(legs.len() as u64).ok_or("it is too large")?;
        if !zones.is_empty() {
            // Linux before 3.14 dealt the chunks of later zones by their number in the array, and since then
            // by their number in the zone.
            match (newest.has_layout, newest.layout) {
                (true, 1) => {
                    let count = legs.len();
                    legs.rotate_left((end / chunk_len % count as u64) as usize);
                }
                (true, 2) => {}
                _ => {
                    let fact = "its members have several lengths, and its superblock does not say how they \
                        are used";
                    return Err(fact.to_owned());
                }
            }
        }
        zones.push(striped_device(chunk_len, legs, len, disks)?);
        end = u64::checked_add(end, len).ok_or("it is too large")?;
        begin = next;
    }
    if zones.is_empty() {
        Err("its members have no length".to_owned())
    } else {
        Ok(Device::concatenated(zones, disks))
    }
}
