//! Commit: top and the layers between are merged into base, and overlays of top are backed by base
//! afterwards.
//!
//! Promises: the view through top, and all above it, has the same bytes at every moment, since top covers
//! every range that is written below it. Views that change are hidden, durably, before the first byte below
//! them changes. Until the switch, a commit into a qcow2 base can be rolled back completely. A commit into a
//! raw base cannot: the views that it has invalidated stay hidden until it is resumed. The files show which
//! steps are done, so an interrupted commit is repeated from the beginning, or from the switch on.
//! on.

mod finish;
mod job;
mod refuse;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::image::write::Writer;
use crate::store::{CommitOperation, Format, ImageIndex, OpenView, Store, ViewPart, invalidated_name};
use crate::units::Stability;

use super::check::check_view;
use super::command::Command;
use super::context::Context;
use super::copy::CommitSegment;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::lookup;
use super::plan::{Plan, PlanLayer};
use super::refusals;
use super::removal;
use super::scanned_store::{ScannedChain, ScannedStore, beside};
use super::virsh::DomainDisk;
use super::words::{Discards, LineBuilder, ParsedWords, VerbSpec};

pub(super) use job::{begin, begin_with, examine, resume};

/// The words of `commit`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommitRequest {
    /// The upper end, as a view's name; none: the active layer.
    pub top: Option<Vec<u8>>,
    /// The lower end; none: the layer below top.
    pub base: Option<Vec<u8>>,
    /// Whether top's file stays.
    pub keep: bool,
    /// Whether internal snapshots in the layers concerned may be lost.
    pub discard_internal: bool,
    /// Whether their persistent bitmaps may be lost.
    pub discard_bitmaps: bool,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "commit",
    usage: "\
commit [top=VIEW] [base=VIEW] [keep] [discard-internal] [discard-bitmaps]

Merges top and everything down to base into base.
  top=VIEW           the upper end (the active disk)
  base=VIEW          the lower end (the layer below top)
  keep               top's file stays
  discard-internal   internal snapshots in the layers concerned may go
  discard-bitmaps    their persistent bitmaps may
",
    positional: None,
    keys: &["top", "base"],
    flags: &["keep", "discard-internal", "discard-bitmaps"],
    is_for_store: false,
};

impl Command for CommitRequest {
    fn parse(words: &mut ParsedWords) -> Result<Self> {
        Ok(Self {
            top: words.value("top"),
            base: words.value("base"),
            keep: words.flag("keep"),
            discard_internal: words.flag("discard-internal"),
            discard_bitmaps: words.flag("discard-bitmaps"),
        })
    }

    fn print(&self, line: &mut LineBuilder) {
        let Self { top, base, keep, discard_internal, discard_bitmaps } = self;
        line.value("top", top.as_deref());
        line.value("base", base.as_deref());
        line.flag("keep", *keep);
        line.discards(*discard_internal, *discard_bitmaps);
    }

    fn check(&self) -> Result<()> {
        check_view("top=", self.top.as_deref())?;
        check_view("base=", self.base.as_deref())
    }

    fn discards(&self) -> Discards {
        Discards { internal: self.discard_internal, bitmaps: self.discard_bitmaps }
    }

    fn virsh(&self, disk: &DomainDisk<'_>) -> Option<String> {
        let top = disk.layer(self.top.as_deref())?;
        let base = match &self.base {
            Some(name) => disk.layer(Some(name))?,
            None => top + 1,
        };
        disk.commit(top, base)
    }

    fn plan(&self, context: &Context, scan: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, layers) = plan(context, scan, chain, self)?;
        Ok((plan, layers.touched()))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, locks: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command, locks)
    }
}

/// The images of a commit, by index in one catalog.
#[derive(Clone, Debug)]
pub(super) struct CommitRange {
    /// The layers of the chain, leaf first.
    chain: Vec<ImageIndex>,
    top: ImageIndex,
    base: ImageIndex,
    /// From below top to above base.
    between: Vec<ImageIndex>,
    /// The overlays of top.
    children: Vec<ImageIndex>,
    /// The layers below base, top first.
    below: Vec<ImageIndex>,
    /// Whether top is the active layer.
    is_active: bool,
    /// Whether base gets top's name, by which the overlays of top name it.
    takes_name: bool,
    /// Whether this is how base is deleted.
    is_deletion: bool,
}

impl CommitRange {
    /// The images that are opened for it.
    pub(super) fn touched(&self) -> TouchedImages {
        let active = self.is_active.then_some(self.top);
        let children = self.children.iter().copied().filter(|_| !self.takes_name);
        TouchedImages { written: children.chain(active).chain([self.base]).collect(), read: self.segment() }
    }

    /// The layers that are merged: top and all between.
    fn segment(&self) -> Vec<ImageIndex> {
        std::iter::once(self.top).chain(self.between.iter().copied()).collect()
    }
}

/// Finds the layers that the words of a commit name.
fn layers(scan: &ScannedStore, chain: &ScannedChain, request: &CommitRequest) -> Result<CommitRange> {
    let usage = |fact: String| Error::new(ErrorKind::Usage, fact);
    let views = &chain.views;
    let top = lookup::layer_or_active(scan, chain, request.top.as_deref(), "top")?;
    let base = match &request.base {
        Some(name) => lookup::layer(scan, chain, name)?,
        None => top + 1,
    };
    if base >= views.layers.len() {
        let name = scan.image(views.layers[top]).shown();
        return Err(usage(format!("{name} has no backing file that it could be merged into")));
    }
    if base <= top {
        let fact = if base == top { "top and base are the same layer" } else { "base is above top" };
        return Err(usage(format!("{fact}; base has to be one of the layers below top")));
    }
    let is_active = top == 0 && views.active().is_some();
    Ok(CommitRange {
        top: views.layers[top],
        base: views.layers[base],
        between: views.layers[top + 1..base].to_vec(),
        children: scan.image(views.layers[top]).users.clone(),
        below: views.layers[base + 1..].to_vec(),
        chain: views.layers.clone(),
        is_active,
        takes_name: is_active,
        is_deletion: false,
    })
}

/// The overlay of the layer `depth` of a chain, counted from its leaf, is merged into that layer, which takes
/// the overlay's name.
pub(super) fn merge_into_base(scan: &ScannedStore, chain: &ScannedChain, depth: usize) -> CommitRange {
    let views = &chain.views;
    let top = views.layers[depth - 1];
    CommitRange {
        top,
        base: views.layers[depth],
        between: Vec::new(),
        children: scan.image(top).users.clone(),
        below: views.layers[depth + 1..].to_vec(),
        chain: views.layers.clone(),
        is_active: depth == 1 && views.active().is_some(),
        takes_name: true,
        is_deletion: true,
    }
}

/// The plan of the request, with every refusal.
pub(super) fn plan(
    context: &Context,
    scan: &ScannedStore,
    path: &Path,
    request: &CommitRequest,
) -> Result<(Plan, CommitRange)> {
    let chain = scan.chain(path)?;
    let layers = layers(scan, &chain, request)?;
    Ok((plan_of(context, scan, &chain, &layers, request), layers))
}

/// The plan for a range that is known already; only the flags of the request count.
pub(super) fn plan_of(
    context: &Context,
    scan: &ScannedStore,
    chain: &ScannedChain,
    layers: &CommitRange,
    request: &CommitRequest,
) -> Plan {
    let mut plan = Plan { before: lookup::tree(scan, chain), ..Plan::default() };
    refuse::refusals(scan, layers, request, &mut plan.refusals);
    let is_undoable = is_undoable(scan, layers);
    let base = scan.image(layers.base);
    if !is_undoable {
        let fact = "cannot be rolled back once it has begun: if it is interrupted, the layers from it up \
                    to below top stay hidden until it is resumed";
        plan.notes.push(format!("a commit into {} {fact}", base.shown()));
    }
    plan.invalid =
        lookup::views_of(chain, std::iter::once(layers.base).chain(layers.between.iter().copied()));
    if !request.keep {
        let is_inner = |name: &Vec<u8>| chain.views.find(name).is_some_and(|view| view.snapshot.is_some());
        plan.invalid
            .extend(lookup::views_of(chain, std::iter::once(layers.top)).into_iter().filter(is_inner));
    }
    let gone = if request.keep { Vec::new() } else { layers.segment() };
    if layers.takes_name {
        let name = final_name(scan, layers);
        if name != base.place.path {
            plan.renamed.push((base.place.path.clone(), name));
        }
    }
    if request.keep {
        plan.renamed.extend(layers.between.iter().map(|index| {
            let path = &scan.image(*index).place.path;
            (path.clone(), invalidated_name(path))
        }));
    }
    let is_replaced = |path: &PathBuf| plan.renamed.iter().any(|(_, new)| new == path);
    plan.removed =
        gone.iter().map(|index| scan.image(*index).place.path.clone()).filter(|p| !is_replaced(p)).collect();
    // A refused plan states the amount, too, if it is known.
    let segment = segment(context.store(), scan, layers, None);
    refusals::count(scan, layers.base, segment.and_then(|(segment, _view)| segment.data_len()), &mut plan);
    refuse::exposed(context, scan, &chain.path, layers, &mut plan.refusals);
    plan.after = after(&plan, layers, request);
    let changed: Vec<ImageIndex> = layers.segment().into_iter().chain([layers.base]).collect();
    removal::note_dependent_trash(scan, &changed, &mut plan);
    note_what_is_not_kept(scan, chain, layers, &mut plan);
    plan
}

/// Adds notes on invalidated views that do not go to the trash, and why, where the store has one.
fn note_what_is_not_kept(scan: &ScannedStore, chain: &ScannedChain, layers: &CommitRange, plan: &mut Plan) {
    let base = scan.image(layers.base);
    if plan.invalid.is_empty() || !scan.store.has_trash() {
        return;
    }
    let mut lost = plan.invalid.clone();
    if layers.is_deletion && scan.store.can_keep_copy(base) {
        let kept = lookup::line(scan, chain, layers.base).name;
        lost.retain(|name| *name != kept);
        plan.notes.push(format!("{} goes to the trash, as a copy that shares its blocks", base.shown()));
    }
    if lost.is_empty() {
        return;
    }
    let names: Vec<_> = lost.iter().map(|name| String::from_utf8_lossy(name)).collect();
    let reason = match (layers.is_deletion, lost.len()) {
        (true, 1) => {
            "its file takes the bytes of its overlay, and this file system shares no blocks between \
                      files, so that a copy would cost space; method=pull keeps it"
        }
        (true, _) => "internal snapshots go with the file that is changed; method=pull keeps them",
        (false, _) => {
            "the file that is merged into stays in its place, with other bytes; clone what you need first"
        }
    };
    plan.notes.push(format!("{}{}: {reason}", removal::NOT_KEPT, names.join(", ")));
}

/// The segment to merge, and the files that keep it open. It is read through top, which is valid throughout;
/// the layers between are not valid by themselves. Without the active layer's writer (`live`), data that a
/// guest has not flushed may be missing.
fn segment(
    store: &Arc<Store>,
    scan: &ScannedStore,
    layers: &CommitRange,
    live: Option<Arc<Writer>>,
) -> Result<(CommitSegment, OpenView)> {
    let through_top = &layers.chain[position(layers, layers.top)..];
    let stability = Stability::live_if(layers.is_active);
    let view = store.open_view(&scan.catalog, through_top, ViewPart::Active, stability)?;
    let first = usize::from(live.is_some());
    let frozen = store.part_of(&view.view, first, layers.segment().len());
    Ok((CommitSegment { live, frozen }, view))
}

fn position(layers: &CommitRange, index: ImageIndex) -> usize {
    layers.chain.iter().position(|layer| *layer == index).expect("a layer of the chain")
}

fn is_undoable(scan: &ScannedStore, layers: &CommitRange) -> bool {
    let base = scan.image(layers.base);
    base.format == Some(Format::Qcow2) && base.data_file.is_none()
}

/// The name of base when it takes top's place: the headers above name a frozen layer as it is.
fn final_name(scan: &ScannedStore, layers: &CommitRange) -> PathBuf {
    if !layers.is_active {
        return scan.image(layers.top).place.path.clone();
    }
    let (top, base) = (scan.image(layers.top), scan.image(layers.base));
    let format = base.format.unwrap_or(Format::Raw);
    let stem = top.place.path.file_stem().unwrap_or_default().as_encoded_bytes();
    let with = |extension: &[u8]| beside(&top.place.path, &[stem, b".", extension].concat());
    let own = base.place.path.extension().map(|extension| with(extension.as_encoded_bytes()));
    // No overlay's header will state its format.
    own.filter(|name| scan.store.options().reads_as(name, format, false))
        .unwrap_or_else(|| with(format.name().as_bytes()))
}

fn after(plan: &Plan, layers: &CommitRange, request: &CommitRequest) -> Vec<PlanLayer> {
    let (from, to) = (position(layers, layers.top), position(layers, layers.base));
    let mut after: Vec<PlanLayer> = plan.before.clone();
    if after.len() <= to {
        return after;
    }
    after[to].note = format!("with the bytes of {}", String::from_utf8_lossy(&after[from].name.clone()));
    if layers.takes_name {
        after[to].active = layers.is_active;
        let name = after[from].name.clone();
        after[to].name = name;
        if let Some((_, new)) = plan.renamed.first() {
            after[to].path.clone_from(new);
        }
    }
    if request.keep {
        "kept, beside the chain".clone_into(&mut after[from].note);
    }
    after.drain(from..to);
    after
}

impl CommitRange {
    /// The range of an operation, if all its files exist.
    pub(super) fn of_operation(scan: &ScannedStore, operation: &CommitOperation) -> Option<Self> {
        let CommitOperation { top, base, between, children, rename, .. } = operation;
        let top = scan.find(top)?;
        let base = scan.find(base)?;
        let between = between.iter().map(|named| scan.find(named)).collect::<Option<Vec<_>>>()?;
        let children = children.iter().filter_map(|named| scan.find(named));
        let children = children.filter(|index| scan.backing_of(*index) == Some(top)).collect();
        let chain = scan.catalog.layers(top);
        let depth = chain.iter().position(|layer| *layer == base)?;
        let below = chain[depth + 1..].to_vec();
        let takes_name = rename.is_some();
        let is_active = takes_name && scan.is_active_disk(top);
        Some(Self { chain, top, base, between, children, below, is_active, takes_name, is_deletion: false })
    }
}
