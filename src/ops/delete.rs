//! Delete: a snapshot is removed, and every other view keeps its bytes.
//!
//! With method=pull the layer's bytes are copied into all its overlays, which then get its backing file: a
//! pull. With method=commit its overlay is merged into its file, which takes the overlay's name: a commit
//! with a change of names. The plans of both tell which one copies less.

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
use super::virsh::DomainDisk;
use super::words::{Discards, LineBuilder, ParsedWords, VerbSpec, show, usage};
use super::{commit, pull};

/// The words of `delete`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteRequest {
    /// The snapshot, as a view's name.
    pub name: Vec<u8>,
    /// The method: where its bytes go.
    pub method: DeleteMethod,
    /// Whether internal snapshots in removed files may be lost.
    pub discard_internal: bool,
    /// Whether their persistent bitmaps may be lost.
    pub discard_bitmaps: bool,
}

/// Where the bytes go that overlays need from a deleted snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeleteMethod {
    /// The method that copies less, of those that are possible.
    #[default]
    Auto,
    /// Down: the overlay is merged into the snapshot's file.
    Commit,
    /// Up: the snapshot is copied into all its overlays.
    Pull,
}

/// The verb.
pub(super) const SPEC: VerbSpec = VerbSpec {
    name: "delete",
    usage: "\
delete VIEW [method=commit|pull|auto] [discard-internal] [discard-bitmaps]

Removes a snapshot. Every other view keeps its bytes.
  method=pull        copies its bytes up, into all its overlays
  method=commit      merges its overlay down into its file, which takes the overlay's name
  method=auto        the one that copies less (the default)
  discard-internal   internal snapshots in a removed file may be lost
  discard-bitmaps    its persistent bitmaps may be lost
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

    fn virsh(&self, disk: &DomainDisk<'_>) -> Option<String> {
        let layer = disk.layer(Some(&self.name))?;
        disk.commit(layer.checked_sub(1)?, layer)
    }

    fn plan(&self, context: &Context, scan: &ScannedStore, chain: &Path) -> Result<(Plan, TouchedImages)> {
        let (plan, way) = plan(context, scan, chain, self)?;
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

/// The plan of a deletion.
pub(super) enum PlannedDelete {
    /// The layer is copied into all its overlays.
    Up(pull::PullRange),
    /// Its overlay is merged into it.
    Down(commit::CommitRange),
    /// An internal snapshot of that image.
    Inner(ImageIndex, Snapshot),
}

impl PlannedDelete {
    /// The images that are opened for it.
    pub(super) fn touched(&self) -> TouchedImages {
        match self {
            PlannedDelete::Up(layers) => layers.opened(),
            PlannedDelete::Down(layers) => layers.touched(),
            PlannedDelete::Inner(index, _) => TouchedImages { written: vec![*index], read: Vec::new() },
        }
    }
}

/// The plan of the request, with every refusal.
pub(super) fn plan(
    context: &Context,
    scan: &ScannedStore,
    path: &Path,
    request: &DeleteRequest,
) -> Result<(Plan, PlannedDelete)> {
    let chain = scan.chain(path)?;
    let view = lookup::view(scan, &chain, &request.name)?;
    if let Some(inner) = view.snapshot {
        return plan_inner(scan, &chain, chain.views.layers[view.layer], inner);
    }
    let (depth, index) = (view.layer, chain.views.layers[view.layer]);
    let name = scan.image(index).shown();
    if view.active {
        let fact = "is the active disk's; delete a snapshot, or revert the disk to one";
        return Err(Error::new(ErrorKind::Usage, format!("{name} {fact}")));
    }
    if chain.views.layers.len() == 1 {
        let fact = "is the last layer of its chain; remove the file if it is no longer needed";
        return Err(Error::new(ErrorKind::Forbidden, format!("{name} {fact}")));
    }
    if depth == 0 && scan.catalog.single.is_some() {
        let fact = "is itself mounted; mount its directory, and delete it there";
        return Err(Error::new(ErrorKind::Forbidden, format!("{name} {fact}")));
    }
    let up = || plan_up(context, scan, &chain, depth, request);
    let down = || plan_down(context, scan, &chain, depth, request);
    let (mut plan, way) = match (depth, request.method) {
        (0, DeleteMethod::Commit) => {
            let fact = "has no single overlay that could be merged into it; leave out method=";
            return Err(Error::new(ErrorKind::Usage, format!("{name} {fact}")));
        }
        (0, _) | (_, DeleteMethod::Pull) => up(),
        (_, DeleteMethod::Commit) => down(),
        (_, DeleteMethod::Auto) => {
            let (up, down) = (up(), down());
            let can_go_down = down.0.refusals.is_empty() && has_one_user(scan, &chain, depth);
            let is_less = !up.0.refusals.is_empty() || down.0.bytes < up.0.bytes;
            if can_go_down && is_less { down } else { up }
        }
    };
    let method =
        if matches!(way, PlannedDelete::Down(_)) { DeleteMethod::Commit } else { DeleteMethod::Pull };
    plan.notes.insert(0, format!("method: {}", method.name()));
    Ok((plan, way))
}

fn has_one_user(scan: &ScannedStore, chain: &ScannedChain, depth: usize) -> bool {
    let (above, index) = (chain.views.layers[depth - 1], chain.views.layers[depth]);
    scan.image(index).users == [above] && scan.others_using(index, &[above]).is_empty()
}

fn plan_up(
    context: &Context,
    scan: &ScannedStore,
    chain: &ScannedChain,
    depth: usize,
    request: &DeleteRequest,
) -> (Plan, PlannedDelete) {
    let layers = &chain.views.layers;
    let index = layers[depth];
    let into = scan.image(index).users.clone();
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
    let mut plan = pull::plan_of(context, scan, chain, &found, &terms);
    if found.into.len() > 1 && layers.len() == depth + 1 {
        let names: Vec<String> = found.into.iter().map(|index| scan.image(*index).shown()).collect();
        let fact = "is the base of several images, and each would need a full copy of it";
        let sentence =
            format!("{} {fact}: {}; pull into those first", scan.image(index).shown(), names.join(", "));
        plan.refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
    let others = scan.others_using(index, &found.into);
    if !others.is_empty() {
        let fact = "may back other images, whose headers cannot be read";
        let sentence =
            format!("{} {fact}: {}; repair those first", scan.image(index).shown(), others.join(", "));
        plan.refusals.push(Error::new(ErrorKind::NotEmpty, sentence));
    }
    for other in found.into.iter().filter(|other| !layers.contains(other)) {
        plan.notes
            .push(format!("{} is backed by it as well, and is filled, too", scan.image(*other).shown()));
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
    scan: &ScannedStore,
    chain: &ScannedChain,
    depth: usize,
    request: &DeleteRequest,
) -> (Plan, PlannedDelete) {
    let layers = commit::merge_into_base(scan, chain, depth);
    let terms = CommitRequest {
        discard_internal: request.discard_internal,
        discard_bitmaps: request.discard_bitmaps,
        ..CommitRequest::default()
    };
    let plan = commit::plan_of(context, scan, chain, &layers, &terms);
    (plan, PlannedDelete::Down(layers))
}

fn plan_inner(
    scan: &ScannedStore,
    chain: &ScannedChain,
    index: ImageIndex,
    inner: usize,
) -> Result<(Plan, PlannedDelete)> {
    let image = scan.image(index);
    let snapshot = lookup::inner(scan, index, inner)?;
    let mut plan = Plan { before: lookup::tree(scan, chain), ..Plan::default() };
    plan.after.clone_from(&plan.before);
    plan.refusals.extend(scan.untouchable(index));
    plan.refusals.extend(scan.begun(&[index]));
    plan.refusals.extend(scan.unfillable(index));
    if !image.users.is_empty() {
        plan.refusals.extend(scan.unguarded());
    }
    let is_it = |view: &&crate::store::ChainView| {
        view.snapshot == Some(inner) && chain.views.layers[view.layer] == index
    };
    plan.invalid = chain.views.views.iter().filter(is_it).map(|view| view.name.clone()).collect();
    if snapshot.vm_state_size > 0 {
        plan.notes.push(format!("its VM state ({}) goes with it", human_size(snapshot.vm_state_size)));
    }
    if scan.store.has_trash() {
        let fact = "the clusters of an internal snapshot are freed; clone it first if it may be needed";
        plan.notes.push(format!("{}{}: {fact}", removal::NOT_KEPT, String::from_utf8_lossy(&snapshot.name)));
    }
    Ok((plan, PlannedDelete::Inner(index, snapshot)))
}

/// Begins a delete, or carries it out if no data has to be moved.
pub(super) fn begin(
    context: &Context,
    path: &Path,
    request: &DeleteRequest,
    command: &str,
    locks: &mut ChainLocks,
) -> Result<Begun> {
    let (lock, scan) = ScannedStore::begin(context.store())?;
    let (plan, way) = plan(context, &scan, path, request)?;
    scan.accept(&plan)?;
    locks.notes.extend(removal::not_kept(plan.notes));
    match way {
        PlannedDelete::Up(layers) => {
            let job = pull::begin_with(context, &scan, lock, path, &layers, command, locks)?;
            Ok(Some(Box::new(job)))
        }
        PlannedDelete::Down(layers) => {
            let job = commit::begin_with(context, &scan, lock, path, &layers, false, command, locks)?;
            Ok(Some(Box::new(job)))
        }
        PlannedDelete::Inner(index, snapshot) => {
            locks.extend(&scan.chains_of(&[index]))?;
            delete_inner(context.store(), &scan, index, &snapshot, lock)?;
            Ok(None)
        }
    }
}

fn delete_inner(
    store: &Arc<Store>,
    scan: &ScannedStore,
    index: ImageIndex,
    snapshot: &Snapshot,
    lock: FileLock,
) -> Result<()> {
    let image = scan.image(index);
    let name = format!("{}@{}", shown(&image.place.path), String::from_utf8_lossy(&snapshot.name));
    let leaving = store.leave_inner(image.stat.id, &snapshot.id).map_err(|error| error.within(name))?;
    delete_by_writer(store, scan, index, snapshot)?;
    let before = Arc::clone(&scan.catalog);
    store.rescan()?;
    ending::notify_disks_of(store, &before, &[image.stat.id], None);
    drop((leaving, lock));
    Ok(())
}

/// The active disk's writer deletes it, also while guests use the disk, or a writer opened for this.
fn delete_by_writer(
    store: &Arc<Store>,
    scan: &ScannedStore,
    index: ImageIndex,
    snapshot: &Snapshot,
) -> Result<()> {
    if scan.is_active_disk(index) {
        let job = store.take_active(&scan.catalog, &scan.catalog.layers(index))?;
        let done = job.writer()?.delete_snapshot(snapshot);
        // Also after a failure: its progress is unknown.
        return done.and(job.describe_anew());
    }
    let mut job = store.take_image(&scan.catalog, index)?;
    let writer = job.open_writer(None)?;
    let done = writer.delete_snapshot(snapshot).and_then(|()| writer.close());
    drop(writer);
    done.and(job.finish())
}
