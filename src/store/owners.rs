//! Whether a name in an image counts: only if the owner of that image may read the named file.
//!
//! Otherwise a user could name another user's private disk as a backing file, and have it read, merged and
//! moved by a mount of root's, or keep its owner from writing it. A user's own file counts for that user
//! whatever its mode.

use std::cell::OnceCell;
use std::sync::Arc;

use crate::io::Backend;

use super::judge::AccessJudge;
use super::options::StoreOptions;
use super::resolve::StorePath;
use super::rights::Subject;
use super::users::groups_of;

/// The rule, as of one scan.
pub(super) struct Owners<'a> {
    roots: &'a [Arc<dyn Backend>],
    /// Whether it applies: when the mounting user may read more than each owner.
    holds: bool,
    /// Made when a file is found that is not root's.
    judge: OnceCell<AccessJudge>,
}

impl<'a> Owners<'a> {
    pub(super) fn new(roots: &'a [Arc<dyn Backend>], options: &StoreOptions) -> Self {
        Self { roots, holds: options.owners_count, judge: OnceCell::new() }
    }

    /// Why a name of `place` does not count in the image at `from`, which the user `owner` owns, as the rest
    /// of a sentence.
    pub(super) fn refuse(&self, owner: u32, from: &StorePath, place: &StorePath) -> Option<String> {
        if !self.holds || owner == 0 {
            return None;
        }
        let judge = self.judge.get_or_init(|| AccessJudge::new(self.roots));
        if judge.counts_for(&Subject::new(owner, groups_of(owner)), from, place) {
            return None;
        }
        Some(format!(
            "does not count, for the owner of the image (uid {owner}) may not read it; let that user read \
                the file and search \
             the directories on the way, or give the image to root"
        ))
    }
}
