//! Revert: the active disk is reset to a snapshot.
//!
//! For a layer of the chain, a new, empty overlay takes the active layer's name in one step. An internal
//! snapshot of the active image is applied, in one write of the image's header. No client has the disk open
//! meanwhile. The old content is kept if `save=` names it, and lost otherwise. A crash leaves all of the old
//! disk or all of the new one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Frozen, Snapshot};
use crate::image::write::NewSnapshot;
use crate::store::{Format, ImageIndex, Store, shown};

use super::branch::{BranchJob, CopySource, ImagePurpose};
use super::check::{check_new_name, check_view};
use super::command::Command;
use super::context::Context;
use super::freeze;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::lookup;
use super::overlay::{self, DraftImage};
use super::plan::{Plan, PlanLayer};
use super::refusals;
use super::replace::{self, ClosedDisk};
use super::scanned_store::{ScannedChain, ScannedStore, with_stem};
use super::snapshot;
use super::snapshot::SnapshotRequest;
use super::virsh::DomainDisk;
use super::words::{LineBuilder, ParsedWords, VerbSpec};

/// The words of `revert`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RevertRequest {
    /// The view that the disk is reset to, by name.
    pub to: Vec<u8>,
    /// The snapshot that keeps the content of the active layer.
    pub save: Option<Vec<u8>>,
    /// Whether internal snapshots in a removed file may be lost.
    pub discard_internal: bool,
    /// Whether its persistent bitmaps may be lost.
    pub discard_bitmaps: bool,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "revert",
    usage: "\
revert to=VIEW [save=NAME] [discard-internal] [discard-bitmaps]

Resets the active disk to VIEW. The disk must not be open. Its content is lost unless save= is given.
  to=VIEW            a snapshot of this chain, or an internal one
  save=NAME          keeps the old content as snapshot NAME
  discard-internal   internal snapshots in a file that is removed may go with it
  discard-bitmaps    its persistent bitmaps may
",
    positional: None,
    keys: &["to", "save"],
    flags: &["discard-internal", "discard-bitmaps"],
    is_for_store: false,
};

impl Command for RevertRequest {
    fn parse(words: &mut ParsedWords) -> Result<Self> {
        Ok(Self {
            to: words.needed("to")?,
            save: words.value("save"),
            discard_internal: words.flag("discard-internal"),
            discard_bitmaps: words.flag("discard-bitmaps"),
        })
    }

    fn print(&self, line: &mut LineBuilder) {
        let Self { to, save, discard_internal, discard_bitmaps } = self;
        line.value("to", Some(to));
        line.value("save", save.as_deref());
        line.discards(*discard_internal, *discard_bitmaps);
    }

    fn check(&self) -> Result<()> {
        check_view("to=", Some(&self.to))?;
        self.save.as_deref().map_or(Ok(()), |name| check_new_name(&SPEC, name))
    }

    fn virsh(&self, disk: &DomainDisk<'_>) -> Option<String> {
        let snapshot = disk.snapshot(&self.to).filter(|_| self.save.is_none())?;
        disk.command("snapshot-revert", [snapshot.as_bytes()])
    }

    fn plan(&self, context: &Context, scan: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, layers) = plan(context, scan, chain, self)?;
        Ok((plan, layers.touched(scan)))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, _: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command)
    }
}

/// The plan of a revert.
pub(super) struct PlannedRevert {
    leaf: ImageIndex,
    way: RevertMethod,
    /// The new name of the old active layer, relative to the store.
    saved: Option<PathBuf>,
}

enum RevertMethod {
    /// A new overlay takes its place.
    Overlay(CopySource),
    /// An internal snapshot of it is applied.
    Apply(Snapshot),
}

impl PlannedRevert {
    /// The images that are opened for it.
    pub(super) fn touched(&self, scan: &ScannedStore) -> TouchedImages {
        let read = match &self.way {
            RevertMethod::Overlay(source) => scan.catalog.layers(source.index),
            RevertMethod::Apply(_) => scan.catalog.layers(self.leaf),
        };
        TouchedImages { written: vec![self.leaf], read }
    }
}

/// The plan of the request, with every refusal.
pub(super) fn plan(
    context: &Context,
    scan: &ScannedStore,
    path: &Path,
    request: &RevertRequest,
) -> Result<(Plan, PlannedRevert)> {
    let chain = scan.chain(path)?;
    let view = lookup::view(scan, &chain, &request.to)?;
    let leaf = chain.views.layers[0];
    let image = scan.image(leaf);
    if chain.views.active().is_none() {
        let fact = "has no active disk to revert; clone the snapshot";
        return Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", chain.shown(scan))));
    }
    if view.active {
        return Err(Error::new(
            ErrorKind::Usage,
            "the active disk cannot be reverted to itself; name one of the snapshots with to=",
        ));
    }
    let mut plan = Plan { before: lookup::tree(scan, &chain), ..Plan::default() };
    let refusals = &mut plan.refusals;
    refusals.extend(scan.untouchable(leaf));
    if view.snapshot.is_none() || view.layer != 0 {
        // A new overlay takes its name.
        refusals.extend(scan.not_renamable(&image.place.path));
    }
    refusals.extend(scan.begun(&chain.views.layers));
    refusals.extend(refusals::used_by_others(scan, leaf));
    if scan.store.is_active_open(image.stat.id) {
        let names = [format!("the active disk of {}", chain.shown(scan))];
        refusals.push(refusals::still_open(context, path, &names, "it is about to be replaced"));
    }
    let (way, saved) = if let Some(place) = view.snapshot.filter(|_| view.layer == 0) {
        let snapshot = lookup::inner(scan, leaf, place)?;
        plan_apply(scan, &chain, &snapshot, request, &mut plan);
        (RevertMethod::Apply(snapshot), None)
    } else {
        let source = CopySource::of(scan, chain.views.layers[view.layer], view.snapshot)?;
        let saved = request.save.as_ref().map(|name| with_stem(&image.place.path, image.format, name));
        plan_overlay(context, scan, &chain, (&source, saved.as_deref()), request, &mut plan);
        (RevertMethod::Overlay(source), saved)
    };
    if request.save.is_none() {
        let is_kept = scan.store.keeps_trash(image.stat.id) && matches!(way, RevertMethod::Overlay(_));
        let fate = if is_kept { "goes to the trash" } else { "is lost" };
        plan.notes.push(format!("the content of the active disk {fate}; save=NAME keeps it"));
    }
    Ok((plan, PlannedRevert { leaf, way, saved }))
}

fn plan_apply(
    scan: &ScannedStore,
    chain: &ScannedChain,
    snapshot: &Snapshot,
    request: &RevertRequest,
    plan: &mut Plan,
) {
    let leaf = chain.views.layers[0];
    refusals::bitmaps(scan, std::iter::once(leaf), request.discard_bitmaps, &mut plan.refusals);
    plan.refusals.extend(scan.unfillable(leaf));
    if let Some(name) = &request.save
        && scan
            .image(leaf)
            .qcow2()
            .is_some_and(|qcow2| qcow2.snapshots.iter().any(|other| other.name == *name))
    {
        let name = String::from_utf8_lossy(name);
        let fact = format!("{} holds an internal snapshot {name} already", scan.image(leaf).shown());
        plan.refusals.push(Error::new(ErrorKind::Exists, format!("{fact}; choose another name")));
    }
    if let Some(name) = &request.save {
        let inner = SnapshotRequest { name: name.clone(), internal: true, ..SnapshotRequest::default() };
        snapshot::refuse_address(scan, chain, name, &inner, &mut plan.refusals);
    }
    if snapshot.vm_state_size > 0 {
        plan.notes.push("only the disk is reverted; the snapshot's VM state is not used".into());
    }
    if let Some(name) = &request.save {
        let fact = format!("its content is kept as internal snapshot {}", String::from_utf8_lossy(name));
        plan.notes.push(fact);
    }
    plan.after.clone_from(&plan.before);
}

fn plan_overlay(
    context: &Context,
    scan: &ScannedStore,
    chain: &ScannedChain,
    (source, saved): (&CopySource, Option<&Path>),
    request: &RevertRequest,
    plan: &mut Plan,
) {
    let leaf = chain.views.layers[0];
    let image = scan.image(leaf);
    let old = &image.place.path;
    if let Some(saved) = saved {
        let kind = (image.format.unwrap_or(Format::Raw), false);
        overlay::refuse_name(scan, saved, kind, Some(leaf), &mut plan.refusals);
        freeze::check_freeze(scan, leaf, &mut plan.refusals);
        plan.renamed.push((old.clone(), saved.to_path_buf()));
    } else {
        let gone = || std::iter::once(leaf);
        refusals::inner_snapshots(scan, gone(), request.discard_internal, &mut plan.refusals);
        refusals::bitmaps(scan, gone(), request.discard_bitmaps, &mut plan.refusals);
        plan.invalid
            .extend(lookup::views_of(chain, gone()).into_iter().filter(|name| name != crate::store::ACTIVE));
        if let Some(left) = becomes_leaf(scan, leaf, source) {
            freeze::check_freeze(scan, left, &mut plan.refusals);
        }
    }
    note_newer(scan, chain, source, saved, &mut plan.notes);
    source.plan(context, scan, (leaf, old), plan);
    plan.after = source.below(scan).iter().map(|index| lookup::line(scan, chain, *index)).collect();
    let top = PlanLayer {
        name: crate::store::ACTIVE.to_vec(),
        path: old.clone(),
        active: true,
        note: "new".into(),
    };
    plan.after.insert(0, top);
}

/// Adds notes on snapshots that are newer than the target: they leave this chain.
fn note_newer(
    scan: &ScannedStore,
    chain: &ScannedChain,
    source: &CopySource,
    saved: Option<&Path>,
    notes: &mut Vec<String>,
) {
    let layers = &chain.views.layers;
    let end = source.below(scan).first().and_then(|first| layers.iter().position(|layer| layer == first));
    let newer = &layers[1..end.unwrap_or(layers.len()).max(1)];
    let names: Vec<String> = newer.iter().map(|index| scan.image(*index).shown()).collect();
    let Some(first) = newer.first() else {
        if let Some(saved) = saved {
            notes.push(format!("{} becomes a chain of its own", shown(saved)));
        }
        return;
    };
    let is_alone = scan.image(*first).users == [layers[0]];
    let chain = match saved {
        Some(saved) => shown(Path::new(saved.file_stem().unwrap_or_default())),
        None if is_alone => shown(Path::new(scan.image(*first).place.path.file_stem().unwrap_or_default())),
        None => "of those who use them".to_owned(),
    };
    let (is, go) = if names.len() == 1 { ("is", "goes") } else { ("are", "go") };
    notes.push(format!("{} {is} newer, and {go} on in the chain {chain}, beside this one", names.join(", ")));
}

/// The layer that becomes a leaf when the old active layer is removed.
fn becomes_leaf(scan: &ScannedStore, leaf: ImageIndex, source: &CopySource) -> Option<ImageIndex> {
    let below = scan.backing_of(leaf)?;
    let is_left = scan.image(below).users == [leaf] && source.below(scan).first() != Some(&below);
    (is_left && freeze::may_be_marked(scan, below)).then_some(below)
}

/// Carries it out, or begins a job if data has to be copied.
pub(super) fn begin(context: &Context, path: &Path, request: &RevertRequest, command: &str) -> Result<Begun> {
    let store = context.store();
    let (lock, scan) = ScannedStore::begin(store)?;
    let (plan, PlannedRevert { leaf, way, saved }) = plan(context, &scan, path, request)?;
    scan.accept(&plan)?;
    let source = match way {
        RevertMethod::Apply(snapshot) => {
            apply(store, &scan, leaf, &snapshot, request.save.as_deref())?;
            drop(lock);
            return store.rescan().map(|_| None);
        }
        RevertMethod::Overlay(source) => source,
    };
    if saved.is_none()
        && let Some(left) = becomes_leaf(&scan, leaf, &source)
    {
        freeze::freeze(store, &scan, left, &Frozen::now(""))?;
    }
    let scan = ScannedStore::scan(store)?;
    let closed = ClosedDisk { leaf: scan.named(leaf), saved, held: store.take_image(&scan.catalog, leaf)? };
    let old = scan.image(leaf).place.path.clone();
    let of = context.intent_name();
    let draft = overlay::draft_name(&old, &of, 0);
    let draft = DraftImage::make(&scan, draft, &old, &source.options(&scan, &old))?;
    if source.is_copied() {
        let purpose = ImagePurpose::Revert(Box::new(closed));
        let job = BranchJob::begin(context, &scan, path, command, &of, (source, draft), purpose)?;
        return Ok(Some(Box::new(job)));
    }
    match replace::switch(context, &scan, lock, path, command, &draft, closed) {
        Ok(lock) => {
            drop(lock);
            Ok(None)
        }
        Err(error) => {
            draft.remove(store);
            Err(error)
        }
    }
}

/// Applies an internal snapshot, and keeps the old content as another one.
fn apply(
    store: &Arc<Store>,
    scan: &ScannedStore,
    leaf: ImageIndex,
    snapshot: &Snapshot,
    save: Option<&[u8]>,
) -> Result<()> {
    store.while_closed(scan.image(leaf), || {
        let mut job = store.take_image(&scan.catalog, leaf)?;
        let writer = job.open_writer(None)?;
        let now = Frozen::now("");
        let (seconds, nanoseconds) = (u32::try_from(now.seconds).unwrap_or(0), now.nanoseconds);
        let save = save.map(|name| NewSnapshot { name: name.to_vec(), seconds, nanoseconds });
        let applied = writer.apply_snapshot(snapshot, save.as_ref()).and_then(|()| writer.close());
        drop(writer);
        applied.and(job.finish())
    })
}
