//! Which groups a user is in, as the system's user database has it.
//!
//! That a file is of a group proves nothing of its owner: a directory may give its group to whatever is made
//! in it.

use std::collections::HashMap;
use std::ffi::CString;
use std::time::{Duration, Instant};

use nix::unistd::{Gid, Uid, User, getgrouplist};
use parking_lot::Mutex;

/// For how long an answer is believed.
const BELIEF: Duration = Duration::from_secs(30);

/// Groups by user, and when they were looked up.
type KnownGroups = HashMap<u32, (Instant, Vec<u32>)>;

static KNOWN: Mutex<Option<KnownGroups>> = Mutex::new(None);

/// The groups of a user; none where nobody knows the user.
pub(super) fn groups_of(uid: u32) -> Vec<u32> {
    if let Some((when, groups)) = KNOWN.lock().get_or_insert_default().get(&uid)
        && when.elapsed() < BELIEF
    {
        return groups.clone();
    }
    // Not under the lock: the database may be another machine's.
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
    fn who_is_not_known_is_in_no_group() {
        assert!(groups_of(0).contains(&0), "root is in its own");
        assert_eq!(groups_of(0), groups_of(0));
        assert!(groups_of(3_999_999_999).is_empty());
    }
}
