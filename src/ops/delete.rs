//! Delete: a snapshot goes, and every other view stays what it is.
//!
//! A layer's bytes go up, into everything that stands on it, which then stands on what it stood on; or what
//! stands on it comes down into its file, which takes that one's name. Both are jobs that others know: a
//! pull, and a commit whose base takes top's name. Which of them copies less is told from the plans of both.

use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::format::Snapshot;
use crate::io::FileLock;
use crate::store::{ImageIndex, Store, shown};
use crate::units::human_size;

use super::check::check_view;
use super::command::Command;
use super::commit::CommitRequest;
use super::context::Context;
use super::ending;
use super::job::Begun;
use super::job_table::ChainLocks;
use super::locked::TouchedImages;
use super::lookup;
use super::plan::Plan;
use super::pull::PullRequest;
use super::removal;
use super::scanned_store::{ScannedChain, ScannedStore};
use super::tokenize::quote;
use super::words::{Discards, LineBuilder, ParsedWords, VerbSpec, show, usage};
use super::{commit, pull};

/// The words of `delete`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteRequest {
    /// The snapshot, as a view's name.
    pub name: Vec<u8>,
    /// Where its bytes go.
    pub method: DeleteMethod,
    /// Whether internal snapshots in files that are removed may go with them.
    pub discard_internal: bool,
    /// Whether their persistent bitmaps may.
    pub discard_bitmaps: bool,
}

/// Where the bytes go by which others differ from a snapshot that is deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeleteMethod {
    /// The way that copies less, of those that can be gone.
    #[default]
    Auto,
    /// Down: what stands on the snapshot is merged into its file.
    Commit,
    /// Up: the snapshot is merged into everything that stands on it.
    Pull,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "delete",
    usage: "\
delete VIEW [method=commit|pull|auto] [discard-internal] [discard-bitmaps]

Removes a snapshot. What every other view shows stays the same.
  method=pull        its bytes go up, into everything that stands on it
  method=commit      what stands on it comes down, into its file, which takes that one's name
  method=auto        whichever of the two copies less (this is what happens without method=)
  discard-internal   internal snapshots in a file that is removed may go with it
  discard-bitmaps    its persistent bitmaps may
LAYER@NAME removes an internal snapshot.
",
    positional: Some("VIEW"),
    keys: &["method"],
    flags: &["discard-internal", "discard-bitmaps"],
    is_for_store: false,
};

impl Command for DeleteRequest {
    fn parse(words: &mut ParsedWords) -> Result<Self> {
        Ok(Self {
            name: words.positional()?,
            method: words
                .value("method")
                .map_or(Ok(DeleteMethod::Auto), |word| DeleteMethod::parse(&word))?,
            discard_internal: words.flag("discard-internal"),
            discard_bitmaps: words.flag("discard-bitmaps"),
        })
    }

    fn print(&self, line: &mut LineBuilder) {
        let Self { name, method, discard_internal, discard_bitmaps } = self;
        line.word(&quote(name));
        line.value("method", Some(method.name().as_bytes()).filter(|_| *method != DeleteMethod::Auto));
        line.discards(*discard_internal, *discard_bitmaps);
    }

    fn check(&self) -> Result<()> {
        if SPEC.is_word(&self.name) || self.name.starts_with(b"method=") {
            return Err(usage(format!("{} is a word of delete, and names no view", show(&self.name))));
        }
        check_view("the name", Some(&self.name))
    }

    fn discards(&self) -> Discards {
        Discards { internal: self.discard_internal, bitmaps: self.discard_bitmaps }
    }

    fn plan(&self, context: &Context, world: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, way) = plan(context, world, chain, self)?;
        Ok((plan, way.touched()))
    }

    fn begin(&self, context: &Context, chain: &Path, command: &str, locks: &mut ChainLocks) -> Result<Begun> {
        begin(context, chain, self, command, locks)
    }
}

impl DeleteMethod {
    /// The words of `method=`.
    const ALL: [(Self, &'static str); 3] =
        [(Self::Commit, "commit"), (Self::Pull, "pull"), (Self::Auto, "auto")];

    fn parse(word: &[u8]) -> Result<Self> {
        let known = Self::ALL.iter().find(|(_, name)| name.as_bytes() == word);
        known
            .map(|(method, _)| *method)
            .ok_or_else(|| usage(format!("method= is {}; the methods are commit, pull and auto", show(word))))
    }

    /// Its word.
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(method, _)| *method == self).expect("all of them").1
    }
}

/// What deleting comes to.
pub(super) enum PlannedDelete {
    /// The layer is merged into everything that stands on it.
    Up(pull::PullRange),
    /// What stands on it is merged into it.
    Down(commit::CommitRange),
    /// An internal snapshot of that image.
    Inner(ImageIndex, Snapshot),
}

impl PlannedDelete {
    /// What is opened for it.
    pub(super) fn touched(&self) -> TouchedImages {
        match self {
            PlannedDelete::Up(layers) => layers.opened(),
            PlannedDelete::Down(layers) => layers.touched(),
            PlannedDelete::Inner(index, _) => TouchedImages { written: vec![*index], read: Vec::new() },
        }
    }
}

/// What the request would do, with every refusal.
pub(super) fn plan(
    context: &Context,
    world: &ScannedStore,
    path: &Path,
    request: &DeleteRequest,
) -> Result<(Plan, PlannedDelete)> {
    let chain = world.chain(path)?;
    let view = lookup::view(world, &chain, &request.name)?;
    if let Some(inner) = view.snapshot {
        return plan_inner(world, &chain, chain.views.layers[view.layer], inner);
    }
    let (depth, index) = (view.layer, chain.views.layers[view.layer]);
    let name = world.image(index).shown();
    if view.active {
        let fact = "is the active disk's; delete a snapshot, or revert the disk to one";
        return Err(Error::new(ErrorKind::Usage, format!("{name} {fact}")));
    }
    if chain.views.layers.len() == 1 {
        let fact = "is the last layer of its chain; remove the file if nothing of it is needed any more";
        return Err(Error::new(ErrorKind::Forbidden, format!("{name} {fact}")));
    }
    if depth == 0 && world.catalog.single.is_some() {
        let fact = "is what is mounted; mount the directory that holds it, and delete it there";
        return Err(Error::new(ErrorKind::Forbidden, format!("{name} {fact}")));
    }
    let up = || plan_up(context, world, &chain, depth, request);
    let down = || plan_down(context, world, &chain, depth, request);
    let (mut plan, way) = match (depth, request.method) {
        (0, DeleteMethod::Commit) => {
            let fact = "has nothing standing on it that could be merged into it; leave out method=";
            return Err(Error::new(ErrorKind::Usage, format!("{name} {fact}")));
        }
        (0, _) | (_, DeleteMethod::Pull) => up(),
        (_, DeleteMethod::Commit) => down(),
        (_, DeleteMethod::Auto) => {
            let (up, down) = (up(), down());
            let can_go_down = down.0.refusals.is_empty() && has_one_user(world, &chain, depth);
            let is_less = !up.0.refusals.is_empty() || down.0.bytes < up.0.bytes;
            if can_go_down && is_less { down } else { up }
        }
    };
    let method =
        if matches!(way, PlannedDelete::Down(_)) { DeleteMethod::Commit } else { DeleteMethod::Pull };
    plan.notes.insert(0, format!("method: {}", method.name()));
    Ok((plan, way))
}

fn has_one_user(world: &ScannedStore, chain: &ScannedChain, depth: usize) -> bool {
    let (above, index) = (chain.views.layers[depth - 1], chain.views.layers[depth]);
    world.image(index).users == [above] && world.others_using(index, &[above]).is_empty()
}

fn plan_up(
    context: &Context,
    world: &ScannedStore,
    chain: &ScannedChain,
    depth: usize,
    request: &DeleteRequest,
) -> (Plan, PlannedDelete) {
    let layers = &chain.views.layers;
    let index = layers[depth];
    let into = world.image(index).users.clone();
    let base = layers.get(depth + 1).copied();
    let between = if into.is_empty() { base.into_iter().collect() } else { vec![index] };
    let below = if into.is_empty() { Vec::new() } else { layers[depth..].to_vec() };
    let base = base.filter(|_| !into.is_empty());
    let found = pull::PullRange { into, below, base, between, remove: vec![index] };
    let terms = PullRequest {
        discard_internal: request.discard_internal,
        discard_bitmaps: request.discard_bitmaps,
        ..PullRequest::default()
    };
    let mut plan = pull::plan_of(context, world, chain, &found, &terms);
    if found.into.len() > 1 && layers.len() == depth + 1 {
        let names: Vec<String> = found.into.iter().map(|index| world.image(*index).shown()).collect();
        let fact = "is the base of several images, each of which would have to hold all of it";
        let sentence =
            format!("{} {fact}: {}; pull into those first", world.image(index).shown(), names.join(", "));
        plan.refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
    let others = world.others_using(index, &found.into);
    if !others.is_empty() {
        let fact = "may be what others stand on, whose headers cannot be followed";
        let sentence =
            format!("{} {fact}: {}; mend those first", world.image(index).shown(), others.join(", "));
        plan.refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
    for other in found.into.iter().filter(|other| !layers.contains(other)) {
        plan.notes.push(format!("{} stands on it as well, and is filled, too", world.image(*other).shown()));
    }
    if depth < plan.after.len() {
        plan.after.remove(depth);
        if let Some(above) = depth.checked_sub(1).and_then(|above| plan.after.get_mut(above)) {
            above.note = format!("with the bytes of {}", String::from_utf8_lossy(&request.name));
        }
    }
    (plan, PlannedDelete::Up(found))
}

fn plan_down(
    context: &Context,
    world: &ScannedStore,
    chain: &ScannedChain,
    depth: usize,
    request: &DeleteRequest,
) -> (Plan, PlannedDelete) {
    let layers = commit::fall_onto(world, chain, depth);
    let terms = CommitRequest {
        discard_internal: request.discard_internal,
        discard_bitmaps: request.discard_bitmaps,
        ..CommitRequest::default()
    };
    let plan = commit::plan_of(context, world, chain, &layers, &terms);
    (plan, PlannedDelete::Down(layers))
}

fn plan_inner(
    world: &ScannedStore,
    chain: &ScannedChain,
    index: ImageIndex,
    inner: usize,
) -> Result<(Plan, PlannedDelete)> {
    let image = world.image(index);
    let snapshot = lookup::inner(world, index, inner)?;
    let mut plan = Plan { before: lookup::tree(world, chain), ..Plan::default() };
    plan.after.clone_from(&plan.before);
    plan.refusals.extend(world.untouchable(index));
    plan.refusals.extend(world.begun(&[index]));
    plan.refusals.extend(world.unfillable(index));
    if !image.users.is_empty() {
        plan.refusals.extend(world.unguarded());
    }
    let is_it = |view: &&crate::store::ChainView| {
        view.snapshot == Some(inner) && chain.views.layers[view.layer] == index
    };
    plan.invalid = chain.views.views.iter().filter(is_it).map(|view| view.name.clone()).collect();
    if snapshot.vm_state_size > 0 {
        plan.notes.push(format!("its VM state ({}) goes with it", human_size(snapshot.vm_state_size)));
    }
    if world.store.has_trash() {
        let fact = "an internal snapshot goes with its clusters; clone it first if it may be needed";
        plan.notes.push(format!("{}{}: {fact}", removal::NOT_KEPT, String::from_utf8_lossy(&snapshot.name)));
    }
    Ok((plan, PlannedDelete::Inner(index, snapshot)))
}

/// Begins a delete, or does it if no data has to be moved.
pub(super) fn begin(
    context: &Context,
    path: &Path,
    request: &DeleteRequest,
    command: &str,
    tokens: &mut ChainLocks,
) -> Result<Begun> {
    let (lock, world) = ScannedStore::begin(context.store())?;
    let (plan, way) = plan(context, &world, path, request)?;
    world.accept(&plan)?;
    tokens.notes.extend(removal::not_kept(plan.notes));
    match way {
        PlannedDelete::Up(layers) => {
            let job = pull::begin_with(context, &world, lock, path, &layers, command, tokens)?;
            Ok(Some(Box::new(job)))
        }
        PlannedDelete::Down(layers) => {
            let job = commit::begin_with(context, &world, lock, path, &layers, false, command, tokens)?;
            Ok(Some(Box::new(job)))
        }
        PlannedDelete::Inner(index, snapshot) => {
            tokens.extend(&world.chains_of(&[index]))?;
            delete_inner(context.store(), &world, index, &snapshot, lock)?;
            Ok(None)
        }
    }
}

fn delete_inner(
    store: &Arc<Store>,
    world: &ScannedStore,
    index: ImageIndex,
    snapshot: &Snapshot,
    lock: FileLock,
) -> Result<()> {
    let image = world.image(index);
    let name = format!("{}@{}", shown(&image.place.path), String::from_utf8_lossy(&snapshot.name));
    let leaving = store.leave_inner(image.stat.id, &snapshot.id).map_err(|error| error.within(name))?;
    delete_by_writer(store, world, index, snapshot)?;
    let before = Arc::clone(&world.catalog);
    store.rescan()?;
    ending::tell_files(store, &before, &[image.stat.id], None);
    drop((leaving, lock));
    Ok(())
}

/// The active disk's writer does it, also while guests use it, or one of our own.
fn delete_by_writer(
    store: &Arc<Store>,
    world: &ScannedStore,
    index: ImageIndex,
    snapshot: &Snapshot,
) -> Result<()> {
    if world.is_active_disk(index) {
        let job = store.take_active(&world.catalog, &world.catalog.layers(index))?;
        let done = job.writer()?.delete_snapshot(snapshot);
        // Also if it has failed: how far it came is not known.
        return done.and(job.describe_anew());
    }
    let mut job = store.take_image(&world.catalog, index)?;
    let writer = job.open_writer(None)?;
    let done = writer.delete_snapshot(snapshot).and_then(|()| writer.close());
    drop(writer);
    done.and(job.finish())
}
