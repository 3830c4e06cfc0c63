//! Refusals that several verbs share, and the estimate of the bytes that a plan would copy.

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
pub(super) fn inner_names(scan: &ScannedStore, index: ImageIndex) -> Option<String> {
    let qcow2 = scan.image(index).qcow2()?;
    let names: Vec<_> =
        qcow2.snapshots.iter().map(|snapshot| String::from_utf8_lossy(&snapshot.name)).collect();
    let count = qcow2.header.snapshots.count;
    (count > 0).then(|| if names.is_empty() { format!("{count} of them") } else { names.join(", ") })
}

/// Refuses to lose internal snapshots, unless the command allows it.
pub(super) fn inner_snapshots(
    scan: &ScannedStore,
    holders: impl Iterator<Item = ImageIndex>,
    discard: bool,
    refusals: &mut Vec<Error>,
) {
    for index in holders.filter(|_| !discard) {
        let Some(names) = inner_names(scan, index) else { continue };
        let fact = "holds internal snapshots, which may be lost";
        let name = scan.image(index).shown();
        let sentence = format!("{name} {fact}: {names}; delete them, or say discard-internal");
        refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
}

/// Refuses to lose valid persistent bitmaps, unless the command allows it.
pub(super) fn bitmaps(
    scan: &ScannedStore,
    holders: impl Iterator<Item = ImageIndex>,
    discard: bool,
    refusals: &mut Vec<Error>,
) {
    for index in holders.filter(|_| !discard) {
        let names = match bitmap_names(scan, index, |bitmap| !bitmap.in_use) {
            Ok(names) => names,
            // Their validity is unknown.
            Err(error) => {
                let fact = "holds unreadable persistent bitmaps, which would be lost";
                let name = scan.image(index).shown();
                let sentence = format!("{name} {fact}: {error}; remove them, or say discard-bitmaps");
                refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
                continue;
            }
        };
        if !names.is_empty() {
            let fact = "holds persistent bitmaps, which would be lost";
            let name = scan.image(index).shown();
            let sentence =
                format!("{name} {fact}: {}; remove them, or say discard-bitmaps", names.join(", "));
            refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
        }
    }
}

/// The names of an image's persistent bitmaps that pass the filter. Fails if they cannot be read.
pub(super) fn bitmap_names(
    scan: &ScannedStore,
    index: ImageIndex,
    wanted: impl Fn(&Bitmap) -> bool,
) -> Result<Vec<String>> {
    let image = scan.image(index);
    let Some(qcow2) = image.qcow2() else { return Ok(Vec::new()) };
    let file = scan.store.file(&image.place, &image.stat, Expect::AnyVersion);
    let found = read_bitmaps(&image.shown(), &*file, &qcow2.header)?;
    let all = found.iter().flat_map(|(_, bitmaps)| bitmaps).filter(|bitmap| wanted(bitmap));
    Ok(all.map(|bitmap| String::from_utf8_lossy(&bitmap.name).into_owned()).collect())
}

/// The refusal of a command while views are open.
pub(super) fn still_open(context: &Context, chain: &Path, names: &[String], why: &str) -> Error {
    let openers = context.openers(chain);
    let by = if openers.is_empty() { String::new() } else { format!(" by {openers}") };
    Error::new(ErrorKind::Busy, format!("still open{by}: {}; {why}, so close them first", names.join(", ")))
}

/// Refuses a name that is in use.
pub(super) fn taken(scan: &ScannedStore, path: &Path, refusals: &mut Vec<Error>) {
    if scan.store.roots()[0].stat(path).is_ok() {
        let fact = "exists already; remove it or choose another name";
        refusals.push(Error::new(ErrorKind::Exists, format!("{} {fact}", shown(path))));
    }
}

/// Refuses a change for which a header has no room, before the command begins.
pub(super) fn check_header(
    scan: &ScannedStore,
    index: ImageIndex,
    change: &HeaderChange,
    refusals: &mut Vec<Error>,
) {
    let image = scan.image(index);
    if image.qcow2().is_some() {
        let file = scan.store.file(&image.place, &image.stat, Expect::AnyVersion);
        refusals.extend(check_header_change(&image.shown(), &*file, change).err());
    }
    refusals.extend(scan.unwritable(index));
}

/// Refuses a command that certainly lacks space.
pub(super) fn check_room(scan: &ScannedStore, target: ImageIndex, space: u64, refusals: &mut Vec<Error>) {
    let image = scan.image(target);
    let free = scan.store.file(&image.place, &image.stat, Expect::AnyVersion).free_space();
    if let Ok(free) = free
        && free < space
        && !shares_blocks(&scan.store)
    {
        let fact =
            format!("{} would need {}, and {} are free", image.shown(), human_size(space), human_size(free));
        refusals.push(Error::new(ErrorKind::NoSpace, fact));
    }
}

/// Adds the number of bytes that would be copied into `target`, as `counted`. A plan that is refused anyway
/// is shown without the number if it is unknown.
pub(super) fn count(scan: &ScannedStore, target: ImageIndex, counted: Result<u64>, plan: &mut Plan) {
    match counted {
        Ok(bytes) => plan.bytes += bytes,
        Err(error) if plan.refusals.is_empty() => plan.refusals.push(error),
        Err(_) => {}
    }
    plan.space = plan.bytes;
    check_room(scan, target, plan.space, &mut plan.refusals);
}

/// Whether copies within the store may share blocks: then no free space is required beforehand.
pub(super) fn shares_blocks(store: &Store) -> bool {
    store.roots()[0].shares_blocks()
}

/// Why a disk cannot be replaced: other images use it, or some cannot be read.
pub(super) fn used_by_others(scan: &ScannedStore, leaf: ImageIndex) -> Option<Error> {
    let others = scan.others_using(leaf, &[]);
    if others.is_empty() {
        return None;
    }
    let fact = "is used by other images as well, which would be invalidated";
    let sentence = format!("{} {fact}: {}; snapshot it instead", scan.image(leaf).shown(), others.join(", "));
    Some(Error::new(ErrorKind::NotEmpty, sentence))
}
