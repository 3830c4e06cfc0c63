//! Access rights to a file: the kernel's own rule, from stat(2) and access lists.
//!
//! Pure: values in, a decision out. Two questions are answered. May *this* user (exact, as in the kernel)?
//! And may *all* of a class (the owner of another file, the members of its group, all others)? The second one
//! is for the mode of a disk, which consists of several files, and errs to the side of no.
//!
//! Root may do everything. No other user is assumed to have capabilities.

use crate::io::{AccessEntry, Permissions, Who};

/// Reading, in the bits of a mode.
pub(crate) const READ: u32 = 4;
/// Writing.
pub(crate) const WRITE: u32 = 2;
/// Searching a directory.
pub(crate) const SEARCH: u32 = 1;
/// The bit of a directory in which only owners may remove and rename.
const STICKY: u32 = 0o1000;

/// A user, as the kernel knows a process.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Subject {
    /// The user id.
    pub uid: u32,
    /// All groups, in order.
    pub groups: Vec<u32>,
}

impl Subject {
    /// A user of these groups.
    pub fn new(uid: u32, mut groups: Vec<u32>) -> Self {
        groups.sort_unstable();
        groups.dedup();
        Self { uid, groups }
    }

    /// Whether it is the administrator.
    pub fn is_root(&self) -> bool {
        self.uid == 0
    }

    /// Whether the user is in a group.
    pub fn is_in(&self, gid: u32) -> bool {
        self.groups.binary_search(&gid).is_ok()
    }

    /// Whether the kernel would let this user do that.
    pub fn may(&self, file: &Permissions, want: u32) -> bool {
        if self.is_root() {
            return true;
        }
        if self.uid == file.uid {
            return has(file.mode >> 6, want);
        }
        let Some(list) = list(file) else {
            return has(if self.is_in(file.gid) { file.mode >> 3 } else { file.mode }, want);
        };
        if let Some(entry) = list.iter().find(|entry| entry.who == Who::User(self.uid)) {
            return has(entry.bits & mask(list), want);
        }
        let mut is_member = false;
        for (_, bits) in groups(file, list).filter(|(gid, _)| self.is_in(*gid)) {
            is_member = true;
            if has(bits, want) {
                return has(bits & mask(list), want);
            }
        }
        !is_member && has(other(list), want)
    }

    /// Whether this user may remove or rename a file of `owner` in `directory`.
    pub fn may_rename_in(&self, directory: &Permissions, owner: u32) -> bool {
        let is_kept = directory.mode & STICKY != 0 && self.uid != owner && self.uid != directory.uid;
        self.may(directory, WRITE | SEARCH) && (self.is_root() || !is_kept)
    }
}

/// The users to whom one part of a file's mode applies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    /// The owner, who is at least in these groups.
    Owner(Subject),
    /// All members of a group, except this user.
    Group { uid: u32, gid: u32 },
    /// All other users.
    Other { uid: u32, gid: u32 },
}

impl Class {
    /// Whether every user of the class may do that, in whatever other groups they are.
    pub(crate) fn may(&self, file: &Permissions, want: u32) -> bool {
        match self {
            Class::Owner(subject) => {
                let is_named =
                    |list: &[AccessEntry]| list.iter().any(|entry| entry.who == Who::User(subject.uid));
                let decided =
                    subject.is_root() || subject.uid == file.uid || list(file).is_some_and(is_named);
                subject.may(file, want)
                    && (decided
                        || entries(file).iter().all(|(gid, bits)| {
                            // A right of "others" may be denied to a member of a group.
                            granted_as_member(subject, file, want) || subject.is_in(*gid) || has(*bits, want)
                        }))
            }
            Class::Group { uid, gid } => {
                if !owners_may(*uid, file, want) {
                    return false;
                }
                let own: Vec<u32> =
                    entries(file).into_iter().filter(|(of, _)| of == gid).map(|(_, bits)| bits).collect();
                if own.is_empty() {
                    return entries(file).iter().all(|(_, bits)| has(*bits, want)) && has(others(file), want);
                }
                own.iter().any(|bits| has(*bits, want))
            }
            Class::Other { uid, gid } => {
                owners_may(*uid, file, want)
                    && entries(file).iter().all(|(of, bits)| of == gid || has(*bits, want))
                    && has(others(file), want)
            }
        }
    }
}

/// Whether a user has the right as a member of a group.
fn granted_as_member(subject: &Subject, file: &Permissions, want: u32) -> bool {
    entries(file).iter().any(|(gid, bits)| subject.is_in(*gid) && has(*bits, want))
}

/// Whether the owner of a file, and the users in its list, may do that: any of them except `uid` may be of
/// the class.
fn owners_may(uid: u32, file: &Permissions, want: u32) -> bool {
    let owner = file.uid == 0 || file.uid == uid || has(file.mode >> 6, want);
    let named = list(file).unwrap_or_default().iter().all(|entry| match entry.who {
        Who::User(named) => {
            named == 0
                || named == uid
                || named == file.uid
                || has(entry.bits & mask(list(file).unwrap_or_default()), want)
        }
        _ => true,
    });
    owner && named
}

fn has(bits: u32, want: u32) -> bool {
    bits & want == want
}

/// The access list, if the kernel uses it: not if the mode's mask is empty.
fn list(file: &Permissions) -> Option<&[AccessEntry]> {
    file.list.as_deref().filter(|_| file.mode & 0o070 != 0)
}

fn mask(list: &[AccessEntry]) -> u32 {
    list.iter().find(|entry| entry.who == Who::Mask).map_or(7, |entry| entry.bits)
}

fn other(list: &[AccessEntry]) -> u32 {
    list.iter().find(|entry| entry.who == Who::Other).map_or(0, |entry| entry.bits)
}

fn others(file: &Permissions) -> u32 {
    list(file).map_or(file.mode, other)
}

/// The groups of a list, with their rights.
fn groups<'a>(file: &'a Permissions, list: &'a [AccessEntry]) -> impl Iterator<Item = (u32, u32)> + 'a {
    list.iter().filter_map(|entry| match entry.who {
        Who::Group => Some((file.gid, entry.bits)),
        Who::NamedGroup(gid) => Some((gid, entry.bits)),
        _ => None,
    })
}

/// The groups of a file, with the rights of their members.
fn entries(file: &Permissions) -> Vec<(u32, u32)> {
    match list(file) {
        Some(list) => groups(file, list).map(|(gid, bits)| (gid, bits & mask(list))).collect(),
        None => vec![(file.gid, file.mode >> 3 & 7)],
    }
}

#[cfg(test)]
mod tests;
