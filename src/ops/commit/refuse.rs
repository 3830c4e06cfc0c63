//! What keeps a commit from being done, said before anything is touched.

use std::path::Path;

use crate::error::{Error, ErrorKind};
use crate::image::HeaderChange;
use crate::io::directory_of;
use crate::store::{CommitOperation, Format, ImageIndex, invalidated_name, shown};

use super::super::context::Context;
use super::super::freeze;
use super::super::refusals;
use super::super::scanned_store::ScannedStore;
use super::CommitRequest;
use super::{CommitRange, final_name, position};

/// Everything that keeps a commit from being done, but for views that are open.
pub(super) fn refusals(
    world: &ScannedStore,
    layers: &CommitRange,
    request: &CommitRequest,
    refusals: &mut Vec<Error>,
) {
    refusals.extend(world.unguarded());
    let all: Vec<ImageIndex> =
        layers.segment().into_iter().chain([layers.base]).chain(layers.children.clone()).collect();
    refusals.extend(world.begun(&all));
    refusals.extend(all.iter().filter_map(|index| world.untouchable(*index)));
    let active = layers.children.iter().copied().filter(|index| world.is_active_disk(*index));
    let active = active.chain(layers.is_active.then_some(layers.top));
    refusals.extend(std::iter::once(layers.base).chain(active).filter_map(|index| world.unfillable(index)));
    if let Some(problem) = world.catalog.view_problem(&layers.chain[position(layers, layers.top)..]) {
        refusals.push(Error::new(ErrorKind::Broken, problem));
    }
    if layers.is_active && request.keep {
        let fact = "keep leaves top's file valid, which the active layer's cannot be while base is written; \
            take a \
                    snapshot first, and commit that";
        refusals.push(Error::new(ErrorKind::Usage, fact));
    }
    // Whatever others depend on is never changed under them.
    let merged: Vec<ImageIndex> = layers.segment();
    for index in layers.between.iter().chain([&layers.base]) {
        sharers(world, *index, &merged, refusals);
    }
    let known: Vec<ImageIndex> = layers.children.clone();
    sharers(world, layers.top, &known, refusals);
    let holders = merged.iter().chain([&layers.base]).copied();
    refusals::inner_snapshots(world, holders.clone(), request.discard_internal, refusals);
    refusals::bitmaps(world, holders, request.discard_bitmaps, refusals);
    if request.keep && refusals::inner_names(world, layers.top).is_some() {
        let fact = "holds internal snapshots, which would show other bytes if it were kept; delete them, or \
            do without \
                    keep";
        refusals.push(Error::new(ErrorKind::NotEmpty, format!("{} {fact}", world.image(layers.top).shown())));
    }
    if layers.takes_name {
        fall_refusals(world, layers, refusals);
    }
    let kept = request.keep.then_some(layers.top).filter(|top| world.stands_on(*top) != Some(layers.base));
    let put_on_base = layers.children.iter().copied().filter(|_| !layers.takes_name);
    for index in put_on_base.chain(kept) {
        refusals.extend(world.uncounted(index, &world.image(index).place.path, layers.base));
        let backing = Some(Some(world.backing_name(index, layers.base)));
        refusals::check_header(world, index, &HeaderChange { backing, frozen: None }, refusals);
    }
    if request.keep {
        freeze::check_freeze(world, layers.top, refusals);
    }
    if layers.children.is_empty() && !layers.takes_name {
        freeze::check_freeze(world, layers.base, refusals);
    }
    if request.keep {
        for path in layers.between.iter().map(|index| invalidated_name(&world.image(*index).place.path)) {
            refusals::taken(world, &path, refusals);
        }
    }
}

/// What keeps the rest from being done of a commit whose copy is whole: what is to be written or removed has
/// to be ours to change, still.
pub(super) fn rest(world: &ScannedStore, operation: &CommitOperation, refusals: &mut Vec<Error>) {
    let CommitOperation { top, between, children, rename, .. } = operation;
    let is_left = |index: &ImageIndex| rename.is_none() && world.names(*index, top);
    let children = children.iter().filter_map(|named| world.find(named)).filter(is_left);
    let merged = std::iter::once(top).chain(between).filter_map(|named| world.find(named));
    refusals.extend(children.chain(merged).filter_map(|index| world.untouchable(index)));
}

/// What keeps a base from taking top's place.
fn fall_refusals(world: &ScannedStore, layers: &CommitRange, refusals: &mut Vec<Error>) {
    let (top, base) = (world.image(layers.top), world.image(layers.base));
    let name = final_name(world, layers);
    if name != top.place.path && name != base.place.path {
        refusals::taken(world, &name, refusals);
    }
    if !layers.is_active && base.format != top.format {
        let fact = "is not of the format that the headers above state of the layer whose name it would take; \
            delete \
                    with method=pull, or commit without a change of names";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", base.shown())));
    }
    if let Some(mark) = top.frozen.clone().filter(|_| !layers.is_active) {
        refusals::check_header(
            world,
            layers.base,
            &HeaderChange { backing: None, frozen: Some(Some(mark)) },
            refusals,
        );
    }
    if !world.store.options().reads_as(&name, base.format.unwrap_or(Format::Raw), !layers.children.is_empty())
    {
        let fact =
            "is what the disk would be called, and it would not be read as what it is; rename the base first";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", shown(&name))));
    }
    if !top.stat.id.is_near(base.stat.id) {
        let fact = "lies on another file system than the layer whose name it would take; copy it there first";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", base.shown())));
    }
    let is_elsewhere = directory_of(&top.place.path) != directory_of(&base.place.path);
    if is_elsewhere && (!layers.below.is_empty() || base.data_file.is_some()) {
        let fact = "stands on other files and lies in another directory than the layer whose name it would \
                    take: the names in its header would lead elsewhere; move it into that directory first";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", base.shown())));
    }
}

pub(super) fn sharers(
    world: &ScannedStore,
    index: ImageIndex,
    known: &[ImageIndex],
    refusals: &mut Vec<Error>,
) {
    let others = world.others_using(index, known);
    if !others.is_empty() {
        let name = world.image(index).shown();
        let fact = "is used by other images as well, which would be spoilt";
        let sentence = format!("{name} {fact}: {}; pull into those first, or delete them", others.join(", "));
        refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
}

/// Open views that would show other bytes.
pub(super) fn exposed(
    context: &Context,
    world: &ScannedStore,
    chain: &Path,
    layers: &CommitRange,
    refusals: &mut Vec<Error>,
) {
    let cover: Vec<_> = layers.segment().iter().map(|index| world.image(*index).stat.id).collect();
    let names = context.store().exposed(world.image(layers.base).stat.id, &cover);
    if !names.is_empty() {
        refusals.push(refusals::still_open(context, chain, &names, "a commit changes what they show"));
    }
}
