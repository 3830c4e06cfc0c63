//! Removing layers that are no longer valid, or moving them to the trash.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::io::{ObjectId, directory_of};
use crate::store::{FileRef, Format, ImageIndex, Store, shown};

use super::freeze;
use super::plan::Plan;
use super::scanned_store::ScannedStore;

/// Removes unused files in this order; a user found late stops the removal. Files that are still valid
/// (`is_valid`) go to the trash, if the store has one.
pub(super) fn remove(store: &Arc<Store>, files: &[FileRef], is_valid: bool, command: &str) -> Result<()> {
    let names = store.guard_names();
    for named in files {
        let scan = ScannedStore::scan(store)?;
        let Some(index) = scan.find(named) else { continue };
        let others = scan.others_using(index, &[]);
        if !others.is_empty() {
            let fact = format!("has come to be used by {}, and was not removed", others.join(", "));
            return Err(Error::new(ErrorKind::NotEmpty, format!("{} {fact}", shown(&named.path))));
        }
        if is_valid && store.keeps_trash(scan.image(index).stat.id) {
            // A file restored from the trash is a snapshot. If it cannot be marked now, it is marked when it
            // is restored.
            if let Err(error) = freeze::freeze(store, &scan, index, &Frozen::now("")) {
                tracing::info!("{error}: moved to the trash without the mark");
            }
            let backing = scan.backing_of(index).map(|below| scan.named(below));
            let is_raw = scan.image(index).format == Some(Format::Raw);
            let kind = (command, is_raw);
            store.put_into_trash(&scan.catalog, &named.path, &named.path, kind, backing.as_ref()).map_err(
                |error| {
                    let remedy = "it stays as a snapshot of its own; see to the trash, and delete it again";
                    Error::new(ErrorKind::NotEmpty, format!("{error}; {remedy}"))
                },
            )?;
        } else {
            remove_dependent_trash(&scan, &[named.file.id()])?;
            names.unlink(&named.path)?;
        }
        if scan.image(index).format == Some(Format::Raw) {
            store.note_frozen(&named.path, None)?;
        }
        names.sync(&directory_of(&named.path))?;
    }
    Ok(())
}

/// Removes from the trash what would show other bytes if these files were changed or removed.
pub(super) fn remove_dependent_trash(scan: &ScannedStore, changed: &[ObjectId]) -> Result<()> {
    // T1: an item whose backing file changes is removed before the change.
    let invalidated = scan.store.trash_on(&scan.catalog, changed)?;
    for item in &invalidated {
        tracing::info!("removed {} from the trash: its backing file changes", shown(&item.path));
    }
    scan.store.remove_from_trash(invalidated.iter())
}

/// The prefix of notes on files that do not go to the trash.
pub(super) const NOT_KEPT: &str = "not kept in the trash: ";

/// Those notes: the status of a running command has them too, not only its plan.
pub(super) fn not_kept(notes: Vec<String>) -> impl Iterator<Item = String> {
    notes.into_iter().filter(|note| note.starts_with(NOT_KEPT))
}

/// Adds a note for each item that would be removed from the trash.
pub(super) fn note_dependent_trash(scan: &ScannedStore, changed: &[ImageIndex], plan: &mut Plan) {
    let files: Vec<ObjectId> = changed.iter().map(|index| scan.image(*index).stat.id).collect();
    let invalidated = match scan.store.trash_on(&scan.catalog, &files) {
        Ok(invalidated) => invalidated,
        // The command would be refused with the same error.
        Err(error) => return plan.refusals.push(error),
    };
    plan.notes.extend(invalidated.iter().map(|item| {
        format!("{} is removed from the trash ({}): its backing file changes", shown(&item.path), item.id)
    }));
}
