//! md: Linux' software RAID.
//!
//! `superblock` parses a member's metadata, `array` decides which members are used and where the array's
//! bytes are. This file groups members and names arrays.

mod array;
mod superblock;

use std::collections::BTreeMap;

use crate::guest::volumes::{Device, DeviceDisks};

use superblock::{Role, Superblock};

/// Bytes of an array's name; the kernel has 32.
const NAME_LIMIT: usize = 64;

/// A device with a superblock.
pub(crate) struct MdMember {
    /// All of it, with the superblock.
    device: Device,
    /// What messages call it.
    place: String,
    /// It has a part of the first disk.
    is_own: bool,
    superblock: Superblock,
}

/// An array, assembled as far as possible.
pub(crate) struct MdArray {
    /// `md0`, or `md-NAME`.
    pub(crate) name: String,
    /// Its identity.
    pub(crate) uuid: String,
    /// Its bytes, or why they are unknown.
    pub(crate) device: Result<Device, String>,
    /// It has a part of the first disk.
    pub(crate) is_own: bool,
    /// Identities of the members that it should have and that no disk has.
    pub(crate) absent: Vec<String>,
    /// Facts that the user should know.
    pub(crate) remarks: Vec<String>,
}

impl MdMember {
    /// The member on a device, if it is one; an error if its superblock is damaged.
    pub(crate) fn find(device: &Device, place: &str, is_own: bool) -> Option<Result<Self, String>> {
        let found = Superblock::find(&**device.source())?;
        Some(match found {
            Ok(superblock) => {
                Ok(Self { device: device.clone(), place: place.to_owned(), is_own, superblock })
            }
            Err(fact) => Err(format!("{place}: {fact}")),
        })
    }

    /// The array's identity.
    pub(crate) fn array(&self) -> &str {
        &self.superblock.uuid
    }

    /// The identity of this member: the array and its role.
    pub(crate) fn id(&self) -> Option<String> {
        match self.superblock.role_of(self.superblock.number) {
            Role::Active(role) => Some(member_id(&self.superblock.uuid, role)),
            Role::Spare | Role::Faulty | Role::Journal => None,
        }
    }

    /// The array's state that it knows.
    pub(crate) fn state(&self) -> u64 {
        self.superblock.events
    }
}

fn member_id(array: &str, role: u32) -> String {
    format!("{array}:{role}")
}

/// Whether all members of the array are there that its newest superblock calls active.
pub(crate) fn is_complete(members: &[&MdMember]) -> bool {
    array::choose(members).is_some_and(|chosen| chosen.absent.is_empty())
}

/// Assembles an array of these members, all of one array.
pub(crate) fn assemble(members: &[&MdMember], disks: &DeviceDisks) -> Option<MdArray> {
    let chosen = array::choose(members)?;
    let newest = chosen.newest;
    let name = shown_name(newest);
    let device = array::device(&chosen, disks);
    let describes = |fact: &String| format!("md array {name}: {fact}");
    let mut remarks: Vec<String> = chosen.remarks.iter().map(describes).collect();
    let is_degraded = chosen.used.len() < newest.members as usize;
    if device.is_ok() && is_degraded {
        let count = chosen.used.len();
        remarks.push(describes(&format!("it is degraded: {count} of {} members are used", newest.members)));
    }
    if device.is_ok() && is_degraded && newest.is_dirty && matches!(newest.level, 4..=6) {
        remarks.push(describes(
            &"it was not stopped, so what is computed in place of a missing member may be wrong".to_owned(),
        ));
    }
    Some(MdArray {
        uuid: newest.uuid.clone(),
        device,
        is_own: members.iter().any(|member| member.is_own),
        absent: chosen.absent.iter().map(|role| member_id(&newest.uuid, *role)).collect(),
        remarks,
        name,
    })
}

/// Members by array, in the order of their identities.
pub(crate) fn by_array(members: &[MdMember]) -> BTreeMap<&str, Vec<&MdMember>> {
    let mut arrays: BTreeMap<&str, Vec<&MdMember>> = BTreeMap::new();
    for member in members {
        arrays.entry(member.array()).or_default().push(member);
    }
    arrays
}

/// The name as in `/dev`: an array with a number is `md0`, and one with another name (`/dev/md/NAME`) is
/// `md-NAME`.
fn shown_name(newest: &Superblock) -> String {
    let Some(name) = &newest.name else { return format!("md-{}", newest.uuid) };
    if name.len() <= 3 && name.bytes().all(|byte| byte.is_ascii_digit()) {
        return format!("md{name}");
    }
    let is_known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '+' | '_' | '.' | '-');
    let known: String = name.chars().map(|c| if is_known(c) { c } else { '_' }).take(NAME_LIMIT).collect();
    format!("md-{known}")
}
