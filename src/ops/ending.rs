//! The last steps that all jobs share: the store's lock, telling open disks, and the end of the intent.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Result;
use crate::io::{FileLock, ObjectId};
use crate::store::{Catalog, Effects, FileRef, Intent, OwnedIntent, Store};

use super::job_table::JobProgress;

/// The store's lock for a job that has done its work, unless it is cancelled or stopped while another has
/// that.
pub(super) fn lock_for_job(store: &Store, progress: &JobProgress) -> Result<FileLock> {
    store.guard().lock_for_job(&*store.guard_names(), &|| progress.check())
}

/// Tells those who have disks open what has become of the files below: all layers that are still there show
/// what they did, but for `changed`.
pub(super) fn tell<O: Effects>(
    store: &Arc<Store>,
    before: &Catalog,
    intent: &Intent<O>,
    changed: Option<&FileRef>,
) {
    let files: Vec<ObjectId> = intent.files().iter().map(|named| named.file.id()).collect();
    tell_files(store, before, &files, changed);
}

/// The same of files by their numbers.
pub(super) fn tell_files(
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

/// Takes the intent away: all is done.
pub(super) fn end<O>(store: &Arc<Store>, intent: OwnedIntent<O>, lock: FileLock) -> Result<()> {
    let ended = forget(store, intent);
    drop(lock);
    ended
}

/// Takes the intent of something that did not come to pass away.
pub(super) fn forget<O>(store: &Arc<Store>, intent: OwnedIntent<O>) -> Result<()> {
    intent.end(&*store.guard_names())?;
    store.rescan().map(drop)
}

/// A path beneath the guarded directory as one beneath the store.
pub(super) fn own_path(store: &Store, path: &Path) -> PathBuf {
    path.strip_prefix(&store.guard().prefix).unwrap_or(path).to_path_buf()
}
