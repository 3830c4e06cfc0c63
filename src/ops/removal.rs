//! Removing layers that show nothing any more, or go to the trash.

use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Frozen;
use crate::io::{ObjectId, directory_of};
use crate::store::{FileRef, Format, ImageIndex, Store, shown};

use super::freeze;
use super::plan::Plan;
use super::scanned_store::ScannedStore;

/// Removes files that nothing is left to use, in this order; a user found late stops it. Those that still
/// show what they did (`is_valid`) go to the trash, if the store has one.
pub(super) fn remove(store: &Arc<Store>, files: &[FileRef], is_valid: bool, command: &str) -> Result<()> {
    let names = store.guard_names();
    for named in files {
        let world = ScannedStore::look(store)?;
        let Some(index) = world.find(named) else { continue };
        let others = world.others_using(index, &[]);
        if !others.is_empty() {
            let fact = format!("is used by {} by now, and was not removed", others.join(", "));
            return Err(Error::new(ErrorKind::NotEmpty, format!("{} {fact}", shown(&named.path))));
        }
        if is_valid && store.keeps_trash(world.image(index).stat.id) {
            // What comes back is a snapshot. If it cannot be marked now, it is when it comes back.
            if let Err(error) = freeze::freeze(store, &world, index, &Frozen::now("")) {
                tracing::info!("{error}: it goes to the trash as it is");
            }
            let backing = world.stands_on(index).map(|below| world.named(below));
            let is_raw = world.image(index).format == Some(Format::Raw);
            let kind = (command, is_raw);
            store.put_into_trash(&world.catalog, &named.path, &named.path, kind, backing.as_ref()).map_err(
                |error| {
                    let remedy = "it stays as a snapshot of its own; see to the trash, and delete it again";
                    Error::new(ErrorKind::NotEmpty, format!("{error}; {remedy}"))
                },
            )?;
        } else {
            forget_trash(&world, &[named.file.id()])?;
            names.unlink(&named.path)?;
        }
        if world.image(index).format == Some(Format::Raw) {
            store.note_frozen(&named.path, None)?;
        }
        names.sync(&directory_of(&named.path))?;
    }
    Ok(())
}

/// Removes from the trash what would show something else if these files were changed or gone.
pub(super) fn forget_trash(world: &ScannedStore, changed: &[ObjectId]) -> Result<()> {
    // T1: what would show something else goes before that happens.
    let spoilt = world.store.trash_on(&world.catalog, changed)?;
    for item in &spoilt {
        tracing::info!("{} goes from the trash: what it stands on changes", shown(&item.path));
    }
    world.store.remove_from_trash(spoilt.iter())
}

/// How notes begin on what does not go to the trash.
pub(super) const NOT_KEPT: &str = "not kept in the trash: ";

/// Those notes: they are told also of a command that is not only planned.
pub(super) fn not_kept(notes: Vec<String>) -> impl Iterator<Item = String> {
    notes.into_iter().filter(|note| note.starts_with(NOT_KEPT))
}

/// Notes what of the trash would go.
pub(super) fn note_trash(world: &ScannedStore, changed: &[ImageIndex], plan: &mut Plan) {
    let files: Vec<ObjectId> = changed.iter().map(|index| world.image(*index).stat.id).collect();
    let spoilt = match world.store.trash_on(&world.catalog, &files) {
        Ok(spoilt) => spoilt,
        // The command would be refused with that.
        Err(error) => return plan.refusals.push(error),
    };
    plan.notes.extend(spoilt.iter().map(|item| {
        format!("{} goes from the trash ({}), for what it stands on changes", shown(&item.path), item.id)
    }));
}
