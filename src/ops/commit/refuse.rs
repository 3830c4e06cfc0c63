//! The refusals of a commit, checked before anything is changed.

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

/// Every reason why a commit cannot be done, except open views.
pub(super) fn refusals(
    scan: &ScannedStore,
    layers: &CommitRange,
    request: &CommitRequest,
    refusals: &mut Vec<Error>,
) {
    refusals.extend(scan.unguarded());
    let all: Vec<ImageIndex> =
        layers.segment().into_iter().chain([layers.base]).chain(layers.children.clone()).collect();
    refusals.extend(scan.begun(&all));
    refusals.extend(all.iter().filter_map(|index| scan.untouchable(*index)));
    let active = layers.children.iter().copied().filter(|index| scan.is_active_disk(*index));
    let active = active.chain(layers.is_active.then_some(layers.top));
    refusals.extend(std::iter::once(layers.base).chain(active).filter_map(|index| scan.unfillable(index)));
    if let Some(problem) = scan.catalog.view_problem(&layers.chain[position(layers, layers.top)..]) {
        refusals.push(Error::new(ErrorKind::Broken, problem));
    }
    if layers.is_active && request.keep {
        let fact = "keep leaves top's file valid, which the active layer's cannot be while base is written; \
            take a \
                    snapshot first, and commit that";
        refusals.push(Error::new(ErrorKind::Usage, fact));
    }
    // A layer that another image depends on is never changed.
    let merged: Vec<ImageIndex> = layers.segment();
    for index in layers.between.iter().chain([&layers.base]) {
        sharers(scan, *index, &merged, refusals);
    }
    let known: Vec<ImageIndex> = layers.children.clone();
    sharers(scan, layers.top, &known, refusals);
    let holders = merged.iter().chain([&layers.base]).copied();
    refusals::inner_snapshots(scan, holders.clone(), request.discard_internal, refusals);
    refusals::bitmaps(scan, holders, request.discard_bitmaps, refusals);
    if request.keep && refusals::inner_names(scan, layers.top).is_some() {
        let fact = "holds internal snapshots, which would show other bytes if it were kept; delete them, or \
            do without \
                    keep";
        refusals.push(Error::new(ErrorKind::NotEmpty, format!("{} {fact}", scan.image(layers.top).shown())));
    }
    if layers.takes_name {
        refuse_taking_name(scan, layers, refusals);
    }
    let kept = request.keep.then_some(layers.top).filter(|top| scan.backing_of(*top) != Some(layers.base));
    let put_on_base = layers.children.iter().copied().filter(|_| !layers.takes_name);
    for index in put_on_base.chain(kept) {
        refusals.extend(scan.uncounted(index, &scan.image(index).place.path, layers.base));
        let backing = Some(Some(scan.backing_name(index, layers.base)));
        refusals::check_header(scan, index, &HeaderChange { backing, frozen: None }, refusals);
    }
    if request.keep {
        freeze::check_freeze(scan, layers.top, refusals);
    }
    if layers.children.is_empty() && !layers.takes_name {
        freeze::check_freeze(scan, layers.base, refusals);
    }
    if request.keep {
        for path in layers.between.iter().map(|index| invalidated_name(&scan.image(*index).place.path)) {
            refusals::taken(scan, &path, refusals);
        }
    }
}

/// Why a commit whose copy is complete cannot be finished: the files that it writes or removes must still be
/// writable by this store.
pub(super) fn rest(scan: &ScannedStore, operation: &CommitOperation, refusals: &mut Vec<Error>) {
    let CommitOperation { top, between, children, rename, .. } = operation;
    let is_left = |index: &ImageIndex| rename.is_none() && scan.names(*index, top);
    let children = children.iter().filter_map(|named| scan.find(named)).filter(is_left);
    let merged = std::iter::once(top).chain(between).filter_map(|named| scan.find(named));
    refusals.extend(children.chain(merged).filter_map(|index| scan.untouchable(index)));
}

/// Why a base cannot take top's name.
fn refuse_taking_name(scan: &ScannedStore, layers: &CommitRange, refusals: &mut Vec<Error>) {
    let (top, base) = (scan.image(layers.top), scan.image(layers.base));
    let name = final_name(scan, layers);
    if name != top.place.path && name != base.place.path {
        refusals::taken(scan, &name, refusals);
    }
    if !layers.is_active && base.format != top.format {
        let fact = "is not of the format that the headers above state for the layer whose name it would \
                    take; delete with method=pull, or commit without a change of names";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", base.shown())));
    }
    if let Some(mark) = top.frozen.clone().filter(|_| !layers.is_active) {
        refusals::check_header(
            scan,
            layers.base,
            &HeaderChange { backing: None, frozen: Some(Some(mark)) },
            refusals,
        );
    }
    if !scan.store.options().reads_as(&name, base.format.unwrap_or(Format::Raw), !layers.children.is_empty())
    {
        let fact =
            "would be the disk's name, and the base would be read in another format; rename the base first";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", shown(&name))));
    }
    if !top.stat.id.is_near(base.stat.id) {
        let fact = "is on another file system than the layer whose name it would take; copy it there first";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", base.shown())));
    }
    let is_elsewhere = directory_of(&top.place.path) != directory_of(&base.place.path);
    if is_elsewhere && (!layers.below.is_empty() || base.data_file.is_some()) {
        let fact = "has backing or data files and is in another directory than the layer whose name it would \
                    take: the names in its header would lead elsewhere; move it into that directory first";
        refusals.push(Error::new(ErrorKind::Unsupported, format!("{} {fact}", base.shown())));
    }
}

pub(super) fn sharers(
    scan: &ScannedStore,
    index: ImageIndex,
    known: &[ImageIndex],
    refusals: &mut Vec<Error>,
) {
    let others = scan.others_using(index, known);
    if !others.is_empty() {
        let name = scan.image(index).shown();
        let fact = "is used by other images as well, which would be invalidated";
        let sentence = format!("{name} {fact}: {}; pull into those first, or delete them", others.join(", "));
        refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
}

/// Open views that would show other bytes.
pub(super) fn exposed(
    context: &Context,
    scan: &ScannedStore,
    chain: &Path,
    layers: &CommitRange,
    refusals: &mut Vec<Error>,
) {
    let cover: Vec<_> = layers.segment().iter().map(|index| scan.image(*index).stat.id).collect();
    let names = context.store().exposed(scan.image(layers.base).stat.id, &cover);
    if !names.is_empty() {
        refusals.push(refusals::still_open(context, chain, &names, "a commit changes their bytes"));
    }
}
