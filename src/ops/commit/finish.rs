//! How far a commit has come, by what the files say, and its steps after the copy is durable: the same
//! whether a job comes to them or a commit that was cut off is resumed.

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

/// How far a commit has come.
pub(in crate::ops) enum CommitStage {
    /// Base holds everything, durably.
    Copied,
    /// Nobody knows what base holds; top and all between are as they were.
    NotCopied(CommitRange),
}

/// How far the commit of an intent has come, by what the files say.
pub(super) fn commit_state(world: &ScannedStore, intent: &Intent<CommitOperation>) -> Result<CommitStage> {
    let CommitOperation { top, base, is_copied, rename, .. } = &intent.operation;
    let is_switched = if let Some(name) = rename {
        let base_is_there = world.find(&FileRef::known(name.clone(), base.file)).is_some();
        base_is_there && (*name != base.path || world.find(top).is_none())
    } else {
        *is_copied && world.find(base).is_some()
    };
    if is_switched {
        return Ok(CommitStage::Copied);
    }
    CommitRange::of_operation(world, &intent.operation).map(CommitStage::NotCopied).ok_or_else(|| {
        let gone: Vec<String> = intent
            .files()
            .iter()
            .filter(|named| world.find(named).is_none())
            .map(|named| shown(&named.path))
            .collect();
        let fact = "cannot be taken up: what it was merging has been changed or taken away";
        let sentence = format!("{}: {fact} ({}); restore it from a copy", intent.command, gone.join(", "));
        Error::new(ErrorKind::Stale, sentence)
    })
}

/// The steps of a commit after the copy is durable; `lock` is held from the last look at who uses what.
/// `held`: those of the children that the job has held all the while.
pub(super) fn commit(
    context: &Context,
    mut intent: OwnedIntent<CommitOperation>,
    lock: FileLock,
    mut held: Vec<OverlayToRebase>,
) -> Result<()> {
    let store = context.store();
    let operation = &mut intent.intent.operation;
    if operation.rename.is_none() && !std::mem::replace(&mut operation.is_copied, true) {
        // Before anybody stands on base: what is found there later may be others' doing.
        store.guard().rewrite(&*store.guard_names(), &mut intent)?;
    }
    let CommitOperation { top, base, between, children, keep, rename, .. } = intent.intent.operation.clone();
    let world = ScannedStore::look(store)?;
    let before = Arc::clone(&world.catalog);
    if rename.is_none() {
        let base_index = world.expect(&base)?;
        if keep && let Some(top) = world.find(&top) {
            freeze::freeze(store, &world, top, &Frozen::now(""))?;
        }
        let world = ScannedStore::look(store)?;
        let mut jobs = Vec::new();
        for named in &children {
            // What others have put on something else in the meantime shows that.
            let Some(index) = world.find(named).filter(|index| world.names(*index, &top)) else { continue };
            let child = match held.iter().position(|child| child.is(named)) {
                Some(place) => held.swap_remove(place),
                None => OverlayToRebase::take(store, &world, index)?,
            };
            jobs.extend(child.put_on(&world, index, base_index)?);
        }
        drop(held);
        let world = ScannedStore::look(store)?;
        rebased::stand_on_new(&world, &jobs)?;
        if keep
            && let (Some(top), Some(base)) = (world.find(&top), world.find(&base))
            && world.stands_on(top) != Some(base)
        {
            OverlayToRebase::take(store, &world, top)?.put_on(&world, top, base)?;
        }
        drop(jobs);
        let world = ScannedStore::look(store)?;
        if let Some(base) = world.find(&base)
            && !keep
            && world.image(base).users.iter().all(|user| {
                let named = world.named(*user);
                named.is(&top) || between.iter().any(|other| other.is(&named))
            })
        {
            // What stood there, and goes now, was no disk that anybody wrote.
            freeze::freeze(store, &world, base, &Frozen::now(""))?;
        }
    }
    ending::tell(store, &before, &intent.intent, Some(&base));
    let names = store.guard_names();
    if let Some(name) = &rename {
        // Whoever gave it may have been cut off before it was durable.
        names.sync(&directory_of(name))?;
        names.sync(&directory_of(&base.path))?;
    }
    if keep {
        for named in &between {
            if ScannedStore::look(store)?.find(named).is_some() {
                names.rename(&named.path, &invalidated_name(&named.path), Existing::Refuse)?;
                names.sync(&directory_of(&named.path))?;
            }
        }
    } else {
        // From the top down: nothing is left standing on what has gone.
        let all: Vec<FileRef> = std::iter::once(top).chain(between).collect();
        removal::remove(store, &all, false, &intent.intent.command)?;
    }
    ending::end(store, intent, lock)
}

/// The last steps when the active layer has fallen onto its base.
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
    ending::tell(store, before, &intent.intent, Some(&intent.intent.operation.base));
    commit(context, intent, lock, Vec::new())
}

/// Gives the base the name of the active layer, or one with its own extension: the moment from which on it is
/// that. If it fails, nothing has happened.
pub(super) fn take_name(names: &dyn Directory, base: &Path, top: &Path, name: &Path) -> Result<()> {
    if name == base {
        // What bears the same stem has to go.
        return names.unlink(top);
    }
    let existing = if name == top { Existing::Replace } else { Existing::Refuse };
    names.rename(base, name, existing)
}

/// Makes that durable, and takes the old active layer away.
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

/// Gives a frozen base, which shows what `top` does by now, the name of that: in one step, since whoever
/// stands on top names it. Who has top open goes on reading through it, and so has to see base as it is
/// before.
pub(super) fn replace(
    store: &Arc<Store>,
    before: &Catalog,
    intent: &Intent<CommitOperation>,
    (base, top, name): (&FileRef, &FileRef, &Path),
) -> Result<()> {
    let world = ScannedStore::look(store)?;
    ending::tell(store, before, intent, Some(base));
    let names = store.guard_names();
    let id = world.image(world.expect(base)?).stat.id;
    store.rename_open(id, &ending::own_path(store, name), || {
        take_name(&*names, &base.path, &top.path, name)
    })?;
    settle_name(&*names, &base.path, &top.path, name)
}

/// Gives back what a commit that was cut off has counted in its base and nothing refers to.
pub(super) fn repair_leaks(store: &Arc<Store>, world: &ScannedStore, base: ImageIndex) -> Result<()> {
    if world.image(base).format != Some(Format::Qcow2) {
        return Ok(());
    }
    let job = store.take_image(&world.catalog, base)?;
    let repaired = repair(&*job.file()?, job.name(), Scope::Leaks, &mut |_| Ok(()));
    job.finish()?;
    repaired.map(drop)
}
