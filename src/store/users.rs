//! The groups of a user, from the system's user database.
//!
//! The group of a file is no evidence about its owner: a directory may pass its group on to new files.

use std::collections::HashMap;
use std::ffi::CString;
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Uid, User, getgrouplist};
use parking_lot::Mutex;

/// How long an answer is cached.
const ANSWER_TTL: Duration = Duration::from_secs(30);

/// Groups by user, and the time of the lookup.
type KnownGroups = HashMap<u32, (Instant, Vec<u32>)>;

static KNOWN: Mutex<Option<KnownGroups>> = Mutex::new(None);

/// The groups of a user; none for an unknown user.
pub(super) fn groups_of(uid: u32) -> Vec<u32> {
    if let Some((when, groups)) = KNOWN.lock().get_or_insert_default().get(&uid)
        && when.elapsed() < ANSWER_TTL
    {
        return groups.clone();
    }
    // Not under the lock: the database may be on another machine.
    let found = lookup(uid).unwrap_or_default();
    KNOWN.lock().get_or_insert_default().insert(uid, (Instant::now(), found.clone()));
    found
}

fn lookup(uid: u32) -> Option<Vec<u32>> {
    let user = User::from_uid(Uid::from_raw(uid)).ok()??;
    let name = CString::new(user.name).ok()?;
    let groups = getgrouplist(&name, user.gid).ok()?;
    Some(groups.into_iter().map(Gid::as_raw).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_user_is_in_no_group() {
        assert!(groups_of(0).contains(&0), "root is in its own");
        assert_eq!(groups_of(0), groups_of(0));
        assert!(groups_of(3_999_999_999).is_empty());
    }
}
