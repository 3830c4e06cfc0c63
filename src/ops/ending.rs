//! The last steps that all jobs share: the store's lock, notifying open disks, and the end of the intent.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::io::{FileLock, ObjectId};
use crate::store::{Catalog, Effects, FileRef, Intent, OwnedIntent, Store};

use super::job_table::JobProgress;

/// Takes the store's lock for a job that has done its work, unless the job is cancelled or stopped while
/// another process holds the lock.
pub(super) fn lock_for_job(store: &Store, progress: &JobProgress) -> Result<FileLock> {
    store.guard().lock_for_job(&*store.guard_names(), &|| progress.check())
}

/// Notifies open disks of the changes to the files below them: all remaining layers still show the same
/// bytes, except `changed`.
pub(super) fn notify_disks<O: Effects>(
    store: &Arc<Store>,
    before: &Catalog,
    intent: &Intent<O>,
    changed: Option<&FileRef>,
) {
    let files: Vec<ObjectId> = intent.files().iter().map(|named| named.file.id()).collect();
    notify_disks_of(store, before, &files, changed);
}

/// The same for files by their identity.
pub(super) fn notify_disks_of(
    store: &Arc<Store>,
    before: &Catalog,
    files: &[ObjectId],
    changed: Option<&FileRef>,
) {
    let all = before.images.iter().map(|image| image.stat.id);
    let files: Vec<ObjectId> = all.filter(|id| files.contains(id)).collect();
    store.keep_states(before, &files, changed.map(|named| named.file.id()));
    store.refresh_disks(&files);
}

/// Removes the intent: the command is complete.
pub(super) fn end_intent<O>(store: &Arc<Store>, intent: OwnedIntent<O>, lock: FileLock) -> Result<()> {
    let ended = remove_intent(store, intent);
    drop(lock);
    ended
}

/// Removes the intent of a command that did not happen.
pub(super) fn remove_intent<O>(store: &Arc<Store>, intent: OwnedIntent<O>) -> Result<()> {
    intent.end(&*store.guard_names())?;
    store.rescan().map(drop)
}

/// A path relative to the guarded directory, made relative to the store.
pub(super) fn own_path(store: &Store, path: &Path) -> PathBuf {
    path.strip_prefix(&store.guard().prefix).unwrap_or(path).to_path_buf()
}
