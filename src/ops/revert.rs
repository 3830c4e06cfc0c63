//! Revert: the active disk becomes what a snapshot shows.
//!
//! On a layer of the chain a new, empty overlay takes the active layer's name, in one step; an internal
//! snapshot of the active image is applied to it, in one write of its header. Nobody has the disk open
//! meanwhile. What it held is kept if it is saved, and lost if not; a crash leaves all of the old disk or all
//! of the new one.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::{Frozen, Snapshot};
use crate::image::write::NewSnapshot;
use crate::io::{FileLock, directory_of};
use crate::store::{
    FileRef, Format, ImageIndex, Intent, JobImage, NewTop, SnapshotOperation, Store, shown,
};

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
use super::scanned_store::{ScannedChain, ScannedStore, with_stem};
use super::snapshot;
use super::snapshot::SnapshotRequest;
use super::words::{LineBuilder, ParsedWords, VerbSpec};

/// The words of `revert`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RevertRequest {
    /// What the disk becomes, as a view's name.
    pub to: Vec<u8>,
    /// The snapshot under which what the active layer held is kept.
    pub save: Option<Vec<u8>>,
    /// Whether internal snapshots in a file that is removed may go with it.
    pub discard_internal: bool,
    /// Whether its persistent bitmaps may.
    pub discard_bitmaps: bool,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "revert",
    usage: "\
revert to=VIEW [save=NAME] [discard-internal] [discard-bitmaps]

Makes the active disk what VIEW shows. Nobody may have it open. What it held is lost, unless it is saved.
  to=VIEW            a snapshot of this chain, or an internal one
  save=NAME          what it held is kept as snapshot NAME
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

    fn plan(&self, context: &Context, world: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, layers) = plan(context, world, chain, self)?;
        Ok((plan, layers.touched(world)))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, _: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command)
    }
}

/// What a revert comes to.
pub(super) struct PlannedRevert {
    leaf: ImageIndex,
    way: RevertMethod,
    /// What the old active layer is called from then on, beneath the store.
    saved: Option<PathBuf>,
}

enum RevertMethod {
    /// A new overlay takes its place.
    Overlay(CopySource),
    /// An internal snapshot of it is applied.
    Apply(Snapshot),
}

/// A disk that is about to be replaced, also while something is being copied for that: nobody comes to write
/// it.
pub(super) struct ClosedDisk {
    leaf: FileRef,
    saved: Option<PathBuf>,
    held: JobImage,
}

impl PlannedRevert {
    /// What is opened for it.
    pub(super) fn touched(&self, world: &ScannedStore) -> TouchedImages {
        let read = match &self.way {
            RevertMethod::Overlay(source) => world.catalog.layers(source.index),
            RevertMethod::Apply(_) => world.catalog.layers(self.leaf),
        };
        TouchedImages { written: vec![self.leaf], read }
    }
}

/// What the request would do, with every refusal.
pub(super) fn plan(
    context: &Context,
    world: &ScannedStore,
    path: &Path,
    request: &RevertRequest,
) -> Result<(Plan, PlannedRevert)> {
    let chain = world.chain(path)?;
    let view = lookup::view(world, &chain, &request.to)?;
    let leaf = chain.views.layers[0];
    let image = world.image(leaf);
    if chain.views.active().is_none() {
        let fact = "has no active disk that could be reverted; clone the snapshot";
        return Err(Error::new(ErrorKind::ReadOnly, format!("{} {fact}", chain.shown(world))));
    }
    if view.active {
        return Err(Error::new(
            ErrorKind::Usage,
            "the active disk is what it is; say to= with one of the snapshots",
        ));
    }
    let mut plan = Plan { before: lookup::tree(world, &chain), ..Plan::default() };
    let refusals = &mut plan.refusals;
    refusals.extend(world.untouchable(leaf));
    if view.snapshot.is_none() || view.layer != 0 {
        // A new overlay takes its name.
        refusals.extend(world.not_renamable(&image.place.path));
    }
    refusals.extend(world.begun(&chain.views.layers));
    refusals.extend(used_by_others(world, leaf));
    if world.store.is_active_open(image.stat.id) {
        let names = [format!("the active disk of {}", chain.shown(world))];
        refusals.push(refusals::still_open(context, path, &names, "it becomes another one"));
    }
    let (way, saved) = if let Some(place) = view.snapshot.filter(|_| view.layer == 0) {
        let snapshot = lookup::inner(world, leaf, place)?;
        plan_apply(world, &chain, &snapshot, request, &mut plan);
        (RevertMethod::Apply(snapshot), None)
    } else {
        let source = CopySource::of(world, chain.views.layers[view.layer], view.snapshot)?;
        let saved = request.save.as_ref().map(|name| with_stem(&image.place.path, name));
        plan_overlay(context, world, &chain, (&source, saved.as_deref()), request, &mut plan);
        (RevertMethod::Overlay(source), saved)
    };
    if request.save.is_none() {
        let is_kept = world.store.keeps_trash(image.stat.id) && matches!(way, RevertMethod::Overlay(_));
        let fate = if is_kept { "goes to the trash" } else { "is lost" };
        plan.notes.push(format!("what the active disk holds {fate}; save=NAME keeps it"));
    }
    Ok((plan, PlannedRevert { leaf, way, saved }))
}

fn plan_apply(
    world: &ScannedStore,
    chain: &ScannedChain,
    snapshot: &Snapshot,
    request: &RevertRequest,
    plan: &mut Plan,
) {
    let leaf = chain.views.layers[0];
    refusals::bitmaps(world, std::iter::once(leaf), request.discard_bitmaps, &mut plan.refusals);
    plan.refusals.extend(world.unfillable(leaf));
    if let Some(name) = &request.save
        && world
            .image(leaf)
            .qcow2()
            .is_some_and(|qcow2| qcow2.snapshots.iter().any(|other| other.name == *name))
    {
        let name = String::from_utf8_lossy(name);
        let fact = format!("{} holds an internal snapshot {name} already", world.image(leaf).shown());
        plan.refusals.push(Error::new(ErrorKind::Exists, format!("{fact}; choose another name")));
    }
    if let Some(name) = &request.save {
        let inner = SnapshotRequest { name: name.clone(), internal: true, ..SnapshotRequest::default() };
        snapshot::refuse_address(world, chain, name, &inner, &mut plan.refusals);
    }
    if snapshot.vm_state_size > 0 {
        plan.notes.push("only the disk is reverted: the snapshot's VM state stays where it is".into());
    }
    if let Some(name) = &request.save {
        let fact = format!("what it holds is kept as internal snapshot {}", String::from_utf8_lossy(name));
        plan.notes.push(fact);
    }
    plan.after.clone_from(&plan.before);
}

fn plan_overlay(
    context: &Context,
    world: &ScannedStore,
    chain: &ScannedChain,
    (source, saved): (&CopySource, Option<&Path>),
    request: &RevertRequest,
    plan: &mut Plan,
) {
    let leaf = chain.views.layers[0];
    let image = world.image(leaf);
    let old = &image.place.path;
    if let Some(saved) = saved {
        let kind = (image.format.unwrap_or(Format::Raw), false);
        overlay::refuse_name(world, saved, kind, Some(leaf), &mut plan.refusals);
        freeze::check_freeze(world, leaf, &mut plan.refusals);
        plan.renamed.push((old.clone(), saved.to_path_buf()));
    } else {
        let gone = || std::iter::once(leaf);
        refusals::inner_snapshots(world, gone(), request.discard_internal, &mut plan.refusals);
        refusals::bitmaps(world, gone(), request.discard_bitmaps, &mut plan.refusals);
        plan.invalid
            .extend(lookup::views_of(chain, gone()).into_iter().filter(|name| name != crate::store::ACTIVE));
        if let Some(left) = left_alone(world, leaf, source) {
            freeze::check_freeze(world, left, &mut plan.refusals);
        }
    }
    note_newer(world, chain, source, saved, &mut plan.notes);
    source.plan(context, world, (leaf, old), plan);
    plan.after = source.below(world).iter().map(|index| lookup::line(world, chain, *index)).collect();
    let top = PlanLayer {
        name: crate::store::ACTIVE.to_vec(),
        path: old.clone(),
        active: true,
        note: "new".into(),
    };
    plan.after.insert(0, top);
}

/// Says where snapshots go on that are newer than the one to which a disk goes back: no longer below it.
fn note_newer(
    world: &ScannedStore,
    chain: &ScannedChain,
    source: &CopySource,
    saved: Option<&Path>,
    notes: &mut Vec<String>,
) {
    let layers = &chain.views.layers;
    let end = source.below(world).first().and_then(|first| layers.iter().position(|layer| layer == first));
    let newer = &layers[1..end.unwrap_or(layers.len()).max(1)];
    let names: Vec<String> = newer.iter().map(|index| world.image(*index).shown()).collect();
    let Some(first) = newer.first() else {
        if let Some(saved) = saved {
            notes.push(format!("{} becomes a chain of its own", shown(saved)));
        }
        return;
    };
    let is_alone = world.image(*first).users == [layers[0]];
    let chain = match saved {
        Some(saved) => shown(Path::new(saved.file_stem().unwrap_or_default())),
        None if is_alone => shown(Path::new(world.image(*first).place.path.file_stem().unwrap_or_default())),
        None => "of those who use them".to_owned(),
    };
    let (is, go) = if names.len() == 1 { ("is", "goes") } else { ("are", "go") };
    notes.push(format!("{} {is} newer, and {go} on in the chain {chain}, beside this one", names.join(", ")));
}

/// Why a disk cannot become another, if somebody else needs it as it is, or nobody can tell.
pub(super) fn used_by_others(world: &ScannedStore, leaf: ImageIndex) -> Option<Error> {
    let others = world.others_using(leaf, &[]);
    if others.is_empty() {
        return None;
    }
    let fact = "is used by other images as well, which would be spoilt";
    let sentence =
        format!("{} {fact}: {}; snapshot it instead", world.image(leaf).shown(), others.join(", "));
    Some(Error::new(ErrorKind::NotEmpty, sentence))
}

/// What would have nobody standing on it when the old active layer has gone.
fn left_alone(world: &ScannedStore, leaf: ImageIndex, source: &CopySource) -> Option<ImageIndex> {
    let below = world.stands_on(leaf)?;
    let is_left = world.image(below).users == [leaf] && source.below(world).first() != Some(&below);
    (is_left && freeze::may_be_marked(world, below)).then_some(below)
}

/// Does it, or begins to where something has to be copied.
pub(super) fn begin(context: &Context, path: &Path, request: &RevertRequest, command: &str) -> Result<Begun> {
    let store = context.store();
    let (lock, world) = ScannedStore::begin(store)?;
    let (plan, PlannedRevert { leaf, way, saved }) = plan(context, &world, path, request)?;
    world.accept(&plan)?;
    let source = match way {
        RevertMethod::Apply(snapshot) => {
            apply(store, &world, leaf, &snapshot, request.save.as_deref())?;
            drop(lock);
            return store.rescan().map(|_| None);
        }
        RevertMethod::Overlay(source) => source,
    };
    if saved.is_none()
        && let Some(left) = left_alone(&world, leaf, &source)
    {
        freeze::freeze(store, &world, left, &Frozen::now(""))?;
    }
    let world = ScannedStore::look(store)?;
    let closed = ClosedDisk { leaf: world.named(leaf), saved, held: store.take_image(&world.catalog, leaf)? };
    let old = world.image(leaf).place.path.clone();
    let of = context.intent_name();
    let draft = overlay::draft_name(&old, &of, 0);
    let draft = DraftImage::make(&world, draft, &old, &source.options(&world, &old))?;
    if source.is_copied() {
        let purpose = ImagePurpose::Revert(Box::new(closed));
        let job = BranchJob::begin(context, &world, path, command, &of, (source, draft), purpose)?;
        return Ok(Some(Box::new(job)));
    }
    match switch(context, &world, lock, path, command, &draft, closed) {
        Ok(lock) => {
            drop(lock);
            Ok(None)
        }
        Err(error) => {
            draft.unmake(store);
            Err(error)
        }
    }
}

/// Applies an internal snapshot, and keeps what there was as another.
fn apply(
    store: &Arc<Store>,
    world: &ScannedStore,
    leaf: ImageIndex,
    snapshot: &Snapshot,
    save: Option<&[u8]>,
) -> Result<()> {
    store.while_closed(world.image(leaf), || {
        let mut job = store.take_image(&world.catalog, leaf)?;
        let writer = job.open_writer(None)?;
        let now = Frozen::now("");
        let (seconds, nanoseconds) = (u32::try_from(now.seconds).unwrap_or(0), now.nanoseconds);
        let save = save.map(|name| NewSnapshot { name: name.to_vec(), seconds, nanoseconds });
        let applied = writer.apply_snapshot(snapshot, save.as_ref()).and_then(|()| writer.close());
        drop(writer);
        applied.and(job.finish())
    })
}

/// Puts a whole overlay into the place of the active layer. Returns the lock when that is durable; nothing
/// has happened if it fails before.
pub(super) fn switch(
    context: &Context,
    world: &ScannedStore,
    lock: FileLock,
    path: &Path,
    command: &str,
    draft: &DraftImage,
    closed: ClosedDisk,
) -> Result<FileLock> {
    let store = context.store();
    let ClosedDisk { leaf, saved, held } = closed;
    let index = world.expect(&leaf)?;
    used_by_others(world, index).map_or(Ok(()), Err)?;
    let of = context.intent_name();
    // What is not saved has a name to go by all the same, until it is gone.
    let frozen = match &saved {
        Some(saved) => world.guarded(saved),
        None => overlay::draft_name(&leaf.path, &of, 1),
    };
    let below = world.stands_on(index).filter(|_| saved.is_none());
    let backing = below.map(|below| world.witness(below, false)).transpose()?;
    let top = NewTop {
        old: world.witness(index, false)?,
        frozen,
        overlay: draft.named.clone(),
        name: leaf.path.clone(),
        backing,
    };
    let mark = Frozen::now("");
    let (seconds, nanoseconds, description) = (mark.seconds, mark.nanoseconds, mark.description);
    let operation = SnapshotOperation { seconds, nanoseconds, description, disks: vec![top] };
    let names = store.guard_names();
    store.while_closed(world.image(index), || {
        let intent = store.guard().begin(&*names, &of, &Intent::new(command, path, operation))?;
        // From here on it goes as it would if it had been cut off.
        snapshot::carry_on(context, intent, vec![held], true)
    })?;
    names.sync(&directory_of(&leaf.path))?;
    store.rescan()?;
    Ok(lock)
}
