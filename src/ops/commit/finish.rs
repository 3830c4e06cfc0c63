//! The stage of a commit, as the files show it, and the steps after the copy is durable. A job and a resumed
//! commit use the same steps.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::image::check::{Scope, repair};
use crate::io::{Directory, Existing, FileLock, directory_of};
use crate::store::{
    ActiveJob, Catalog, CommitOperation, FileRef, Format, ImageIndex, Intent, OwnedIntent, Store,
    invalidated_name, shown,
};

use super::super::context::Context;
use super::super::rebased::OverlayToRebase;
use super::super::scanned_store::ScannedStore;
use super::super::{ending, freeze, rebased, removal};
use super::CommitRange;

/// The stage of a commit.
pub(in crate::ops) enum CommitStage {
    /// Base holds all the bytes, durably.
    Copied,
    /// The content of base is unknown; top and all layers between are unchanged.
    NotCopied(CommitRange),
}

/// The stage of an intent's commit, as the files show it.
pub(super) fn commit_state(scan: &ScannedStore, intent: &Intent<CommitOperation>) -> Result<CommitStage> {
    let CommitOperation { top, base, is_copied, rename, .. } = &intent.operation;
    let is_switched = if let Some(name) = rename {
        let base_is_there = scan.find(&FileRef::known(name.clone(), base.file)).is_some();
        base_is_there && (*name != base.path || scan.find(top).is_none())
    } else {
        *is_copied && scan.find(base).is_some()
    };
    if is_switched {
        return Ok(CommitStage::Copied);
    }
    CommitRange::of_operation(scan, &intent.operation).map(CommitStage::NotCopied).ok_or_else(|| {
        let gone: Vec<String> = intent
            .files()
            .iter()
            .filter(|named| scan.find(named).is_none())
            .map(|named| shown(&named.path))
            .collect();
        let fact = "cannot be resumed: the layers that it was merging have been changed or removed";
        let sentence = format!("{}: {fact} ({}); restore it from a copy", intent.command, gone.join(", "));
        Error::new(ErrorKind::Stale, sentence)
    })
}

/// The steps of a commit after the copy is durable; `lock` is held since the last check for users. `held`:
/// the children that the job has locked throughout.
pub(super) fn commit(
    context: &Context,
    mut intent: OwnedIntent<CommitOperation>,
    lock: FileLock,
    mut held: Vec<OverlayToRebase>,
) -> Result<()> {
    let store = context.store();
    let operation = &mut intent.intent.operation;
    if operation.rename.is_none() && !std::mem::replace(&mut operation.is_copied, true) {
        // Before any image is backed by base: an overlay that is found later may be another process's.
        store.guard().rewrite(&*store.guard_names(), &mut intent)?;
    }
    let CommitOperation { top, base, between, children, keep, rename, .. } = intent.intent.operation.clone();
    let scan = ScannedStore::scan(store)?;
    let before = Arc::clone(&scan.catalog);
    if rename.is_none() {
        let base_index = scan.expect(&base)?;
        if keep && let Some(top) = scan.find(&top) {
            freeze::freeze(store, &scan, top, &Frozen::now(""))?;
        }
        let scan = ScannedStore::scan(store)?;
        let mut jobs = Vec::new();
        for named in &children {
            // A child that another process has rebased meanwhile has another backing file.
            let Some(index) = scan.find(named).filter(|index| scan.names(*index, &top)) else { continue };
            let child = match held.iter().position(|child| child.is(named)) {
                Some(place) => held.swap_remove(place),
                None => OverlayToRebase::open(store, &scan, index)?,
            };
            jobs.extend(child.change_backing(&scan, index, base_index)?);
        }
        drop(held);
        let scan = ScannedStore::scan(store)?;
        rebased::switch_backing(&scan, &jobs)?;
        if keep
            && let (Some(top), Some(base)) = (scan.find(&top), scan.find(&base))
            && scan.backing_of(top) != Some(base)
        {
            OverlayToRebase::open(store, &scan, top)?.change_backing(&scan, top, base)?;
        }
        drop(jobs);
        let scan = ScannedStore::scan(store)?;
        if let Some(base) = scan.find(&base)
            && !keep
            && scan.image(base).users.iter().all(|user| {
                let named = scan.named(*user);
                named.is(&top) || between.iter().any(|other| other.is(&named))
            })
        {
            // The file there, which is removed now, was no disk that any client wrote.
            freeze::freeze(store, &scan, base, &Frozen::now(""))?;
        }
    }
    ending::notify_disks(store, &before, &intent.intent, Some(&base));
    let names = store.guard_names();
    if let Some(name) = &rename {
        // The process that renamed it may have been killed before the rename was durable.
        names.sync(&directory_of(name))?;
        names.sync(&directory_of(&base.path))?;
    }
    if keep {
        for named in &between {
            if ScannedStore::scan(store)?.find(named).is_some() {
                names.rename(&named.path, &invalidated_name(&named.path), Existing::Refuse)?;
                names.sync(&directory_of(&named.path))?;
            }
        }
    } else {
        // From the top down: no layer loses its backing file.
        let all: Vec<FileRef> = std::iter::once(top).chain(between).collect();
        removal::remove(store, &all, false, &intent.intent.command)?;
    }
    ending::end_intent(store, intent, lock)
}

/// The last steps of an active commit.
pub(super) fn active_commit(
    context: &Context,
    job: &ActiveJob,
    intent: OwnedIntent<CommitOperation>,
    lock: FileLock,
    before: &Arc<Catalog>,
) -> Result<()> {
    let store = context.store();
    store.rescan()?;
    job.settle();
    ending::notify_disks(store, before, &intent.intent, Some(&intent.intent.operation.base));
    commit(context, intent, lock, Vec::new())
}

/// Renames the base to the active layer's name, or to one with its own extension. From that moment on, the
/// base is the active layer. If the rename fails, nothing has happened.
pub(super) fn take_name(names: &dyn Directory, base: &Path, top: &Path, name: &Path) -> Result<()> {
    if name == base {
        // A file of the same stem has to be removed.
        return names.unlink(top);
    }
    let existing = if name == top { Existing::Replace } else { Existing::Refuse };
    names.rename(base, name, existing)
}

/// Makes the rename durable, and removes the old active layer.
pub(super) fn settle_name(names: &dyn Directory, base: &Path, top: &Path, name: &Path) -> Result<()> {
    if name != top && name != base {
        names.sync(&directory_of(name))?;
        names.unlink(top)?;
    }
    names.sync(&directory_of(name))?;
    if directory_of(base) != directory_of(name) {
        names.sync(&directory_of(base))?;
    }
    Ok(())
}

/// Renames a frozen base, which shows the same bytes as `top` by now, over `top`: in one step, since overlays
/// of top name it. A process that has top open continues to read through it, and has to see base unchanged.
pub(super) fn replace(
    store: &Arc<Store>,
    before: &Catalog,
    intent: &Intent<CommitOperation>,
    (base, top, name): (&FileRef, &FileRef, &Path),
) -> Result<()> {
    let scan = ScannedStore::scan(store)?;
    ending::notify_disks(store, before, intent, Some(base));
    let names = store.guard_names();
    let id = scan.image(scan.expect(base)?).stat.id;
    store.rename_open(id, &ending::own_path(store, name), || {
        take_name(&*names, &base.path, &top.path, name)
    })?;
    settle_name(&*names, &base.path, &top.path, name)
}

/// Frees clusters that an interrupted commit has counted in its base and that nothing refers to.
pub(super) fn repair_leaks(store: &Arc<Store>, scan: &ScannedStore, base: ImageIndex) -> Result<()> {
    if scan.image(base).format != Some(Format::Qcow2) {
        return Ok(());
    }
    let job = store.take_image(&scan.catalog, base)?;
    let repaired = repair(&*job.file()?, job.name(), Scope::Leaks, &mut |_| Ok(()));
    job.finish()?;
    repaired.map(drop)
}
