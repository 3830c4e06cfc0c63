//! Refusals that several verbs share, and the counting of what a plan would copy.

use std::path::Path;

use crate::error::{Error, ErrorKind, Result};
use crate::format::bitmap::Bitmap;
use crate::image::{HeaderChange, check_header_change, read_bitmaps};
use crate::io::Expect;
use crate::store::{ImageIndex, Store, shown};
use crate::units::human_size;

use super::context::Context;
use super::plan::Plan;
use super::scanned_store::ScannedStore;

/// The first refusal.
pub(super) fn first(refusals: Vec<Error>) -> Result<()> {
    refusals.into_iter().next().map_or(Ok(()), Err)
}

/// The names of an image's internal snapshots, if it has any.
pub(super) fn inner_names(world: &ScannedStore, index: ImageIndex) -> Option<String> {
    let qcow2 = world.image(index).qcow2()?;
    let names: Vec<_> =
        qcow2.snapshots.iter().map(|snapshot| String::from_utf8_lossy(&snapshot.name)).collect();
    let count = qcow2.header.snapshots.count;
    (count > 0).then(|| if names.is_empty() { format!("{count} of them") } else { names.join(", ") })
}

/// Refuses what would cost internal snapshots, unless the command says so.
pub(super) fn inner_snapshots(
    world: &ScannedStore,
    holders: impl Iterator<Item = ImageIndex>,
    discard: bool,
    refusals: &mut Vec<Error>,
) {
    for index in holders.filter(|_| !discard) {
        let Some(names) = inner_names(world, index) else { continue };
        let fact = "holds internal snapshots, which this may cost";
        let name = world.image(index).shown();
        let sentence = format!("{name} {fact}: {names}; delete them, or say discard-internal");
        refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
}

/// Refuses what would cost persistent bitmaps that are good, unless the command says so.
pub(super) fn bitmaps(
    world: &ScannedStore,
    holders: impl Iterator<Item = ImageIndex>,
    discard: bool,
    refusals: &mut Vec<Error>,
) {
    for index in holders.filter(|_| !discard) {
        let names = match bitmap_names(world, index, |bitmap| !bitmap.in_use) {
            Ok(names) => names,
            // Nobody can tell whether they are good.
            Err(error) => {
                let fact = "holds persistent bitmaps that cannot be read, and which this would cost";
                let name = world.image(index).shown();
                let sentence = format!("{name} {fact}: {error}; remove them, or say discard-bitmaps");
                refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
                continue;
            }
        };
        if !names.is_empty() {
            let fact = "holds persistent bitmaps, which this would cost";
            let name = world.image(index).shown();
            let sentence =
                format!("{name} {fact}: {}; remove them, or say discard-bitmaps", names.join(", "));
            refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
        }
    }
}

/// The names of an image's persistent bitmaps, of those that are wanted. Fails where that cannot be read.
pub(super) fn bitmap_names(
    world: &ScannedStore,
    index: ImageIndex,
    wanted: impl Fn(&Bitmap) -> bool,
) -> Result<Vec<String>> {
    let image = world.image(index);
    let Some(qcow2) = image.qcow2() else { return Ok(Vec::new()) };
    let file = world.store.file(&image.place, &image.stat, Expect::AnyVersion);
    let found = read_bitmaps(&image.shown(), &*file, &qcow2.header)?;
    let all = found.iter().flat_map(|(_, bitmaps)| bitmaps).filter(|bitmap| wanted(bitmap));
    Ok(all.map(|bitmap| String::from_utf8_lossy(&bitmap.name).into_owned()).collect())
}

/// Why something cannot be done while views are open.
pub(super) fn still_open(context: &Context, chain: &Path, names: &[String], why: &str) -> Error {
    let openers = context.openers(chain);
    let by = if openers.is_empty() { String::new() } else { format!(" by {openers}") };
    Error::new(ErrorKind::Busy, format!("still open{by}: {}; {why}, so close them first", names.join(", ")))
}

/// Refuses a name that something else has.
pub(super) fn taken(world: &ScannedStore, path: &Path, refusals: &mut Vec<Error>) {
    if world.store.roots()[0].stat(path).is_ok() {
        let fact = "exists already; remove it or choose another name";
        refusals.push(Error::new(ErrorKind::Exists, format!("{} {fact}", shown(path))));
    }
}

/// Refuses what a header has no room for: found out later, it could not be done after all.
pub(super) fn check_header(
    world: &ScannedStore,
    index: ImageIndex,
    change: &HeaderChange,
    refusals: &mut Vec<Error>,
) {
    let image = world.image(index);
    if image.qcow2().is_some() {
        let file = world.store.file(&image.place, &image.stat, Expect::AnyVersion);
        refusals.extend(check_header_change(&image.shown(), &*file, change).err());
    }
    refusals.extend(world.unwritable(index));
}

/// Refuses what there is surely no room for.
pub(super) fn check_room(world: &ScannedStore, target: ImageIndex, space: u64, refusals: &mut Vec<Error>) {
    let image = world.image(target);
    let free = world.store.file(&image.place, &image.stat, Expect::AnyVersion).free_space();
    if let Ok(free) = free
        && free < space
        && !shares_blocks(&world.store)
    {
        let fact =
            format!("{} would need {}, and {} are free", image.shown(), human_size(space), human_size(free));
        refusals.push(Error::new(ErrorKind::NoSpace, fact));
    }
}

/// Notes how much would be copied into `target`, as it was `counted`; where that cannot be told, a plan that
/// is refused anyway does without.
pub(super) fn count(world: &ScannedStore, target: ImageIndex, counted: Result<u64>, plan: &mut Plan) {
    match counted {
        Ok(bytes) => plan.bytes += bytes,
        Err(error) if plan.refusals.is_empty() => plan.refusals.push(error),
        Err(_) => {}
    }
    plan.space = plan.bytes;
    check_room(world, target, plan.space, &mut plan.refusals);
}

/// Whether what is copied within the store may take no space of its own: none is asked for beforehand then.
pub(super) fn shares_blocks(store: &Store) -> bool {
    store.roots()[0].shares_blocks()
}
