//! Replaces the active layer of a closed disk by a complete overlay, in one rename.
//!
//! Promises: a crash leaves the old disk or the new one. The layer that is replaced keeps its bytes until the
//! rename is durable; it is then a snapshot, in the trash, or removed.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::format::Frozen;
use crate::io::{FileLock, directory_of};
use crate::store::{FileRef, Intent, JobImage, NewTop, SnapshotOperation};

use super::context::Context;
use super::overlay::{self, DraftImage};
use super::refusals;
use super::scanned_store::ScannedStore;
use super::snapshot;

/// A disk that is about to be replaced, locked against writers, also while data is copied for its
/// replacement.
pub(super) struct ClosedDisk {
    pub(super) leaf: FileRef,
    /// The new name of the disk's file; `None` if it is removed.
    pub(super) saved: Option<PathBuf>,
    pub(super) held: JobImage,
}

/// Renames a complete overlay over the active layer. Returns the lock once the rename is durable. If it fails
/// before that, nothing has changed.
pub(super) fn switch(
    context: &Context,
    scan: &ScannedStore,
    lock: FileLock,
    path: &Path,
    command: &str,
    draft: &DraftImage,
    closed: ClosedDisk,
) -> Result<FileLock> {
    let store = context.store();
    let ClosedDisk { leaf, saved, held } = closed;
    let index = scan.expect(&leaf)?;
    refusals::used_by_others(scan, index).map_or(Ok(()), Err)?;
    let of = context.intent_name();
    // A layer that is not saved needs a name, too, until it is removed.
    let frozen = match &saved {
        Some(saved) => scan.guarded(saved),
        None => overlay::draft_name(&leaf.path, &of, 1),
    };
    let below = scan.backing_of(index).filter(|_| saved.is_none());
    let backing = below.map(|below| scan.witness(below, false)).transpose()?;
    let top = NewTop {
        old: scan.witness(index, false)?,
        frozen,
        overlay: draft.named.clone(),
        name: leaf.path.clone(),
        backing,
    };
    let mark = Frozen::now("");
    let (seconds, nanoseconds, description) = (mark.seconds, mark.nanoseconds, mark.description);
    let operation = SnapshotOperation { seconds, nanoseconds, description, disks: vec![top] };
    let names = store.guard_names();
    store.while_closed(scan.image(index), || {
        let intent = store.guard().begin(&*names, &of, &Intent::new(command, path, operation))?;
        // From here on the steps are those of a resumed revert.
        snapshot::finish_or_roll_back(context, intent, vec![held], true)
    })?;
    names.sync(&directory_of(&leaf.path))?;
    store.rescan()?;
    Ok(lock)
}
